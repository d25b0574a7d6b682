//! The writer against the reader: what comes out of the packs is what went in.

use super::*;
use crate::image::manifest::Manifest;
use crate::image::native::base::Base;
use crate::image::native::{ARTIFACT_TYPE, CONTENT, Reader};

/// A disk in memory.
struct Memory(Vec<u8>);

impl Guest for Memory {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }

    fn next_data(&self, within: std::ops::Range<u64>) -> io::Result<Option<std::ops::Range<u64>>> {
        let [start, end] = [within.start, within.end].map(|at| usize::try_from(at).unwrap());
        let Some(data) = self.0[start..end].iter().position(|&byte| byte != 0) else {
            return Ok(None);
        };
        // As a file system would say it that knows holes of 512 bytes.
        let start = (start + data) / 512 * 512;
        Ok(Some((start as u64).max(within.start)..within.end))
    }
}

/// A registry in memory.
#[derive(Default)]
struct Blobs {
    blobs: HashMap<Digest, Vec<u8>>,
    put: u64,
}

impl Outlet for Blobs {
    fn has(&mut self, blob: &Descriptor) -> Result<bool, Error> {
        Ok(self.blobs.contains_key(&blob.digest))
    }

    fn put(&mut self, blob: &Descriptor, bytes: Vec<u8>) -> Result<(), Error> {
        assert_eq!((Digest::of(&bytes), bytes.len() as u64), (blob.digest, blob.size));
        self.put += blob.size;
        self.blobs.insert(blob.digest, bytes);
        Ok(())
    }
}

fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    (0..length)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 60).to_le_bytes()[0]
        })
        .collect()
}

fn push(files: [Option<Vec<u8>>; 3], base: &Known, blobs: &mut Blobs) -> (Manifest, Written) {
    let scratch = tempfile::tempdir().unwrap();
    let mut files: Files = files.map(|file| file.map(|file| Box::new(Memory(file)) as _));
    let options = Options {
        level: 1,
        scratch: scratch.path(),
        meter: Arc::default(),
    };
    let written = write(&mut files, base, blobs, &options).unwrap();
    assert_eq!(options.meter.unpacked() > 0, written.data > 0);
    let manifest = Manifest {
        config: written.layers[0].clone(),
        artifact_type: Some(ARTIFACT_TYPE.to_owned()),
        layers: written.layers.clone(),
        annotations: BTreeMap::from([(CONTENT.to_owned(), written.content.to_string())]),
    };
    (manifest, written)
}

fn pull(manifest: &Manifest, blobs: &Blobs) -> [Option<Vec<u8>>; 3] {
    let mut reader = Reader::new(manifest).unwrap();
    let mut files = [None, None, None];
    for segment in reader.segments().to_vec() {
        let plan = reader.next(&blobs.blobs[&segment.digest]).unwrap();
        let number = FILES.iter().position(|name| *name == plan.files[0].name).unwrap();
        let file =
            files[number].get_or_insert_with(|| vec![0; usize::try_from(plan.files[0].length).unwrap()]);
        for blob in &plan.blobs {
            for piece in &blob.pieces {
                let packed =
                    usize::try_from(piece.packed.start).unwrap()..usize::try_from(piece.packed.end).unwrap();
                let frame = &blobs.blobs[&blob.descriptor.digest][packed];
                assert_eq!(
                    zstd::zstd_safe::get_frame_content_size(frame).unwrap(),
                    Some(piece.length)
                );
                let bytes = zstd::bulk::decompress(frame, usize::try_from(piece.length).unwrap()).unwrap();
                assert_eq!(Some(Digest::of(&bytes)), piece.digest);
                let at = usize::try_from(piece.at).unwrap();
                file[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
    }
    let there = reader.finish().unwrap();
    assert_eq!(
        there,
        [files[0].is_some(), files[1].is_some(), files[2].is_some()]
    );
    files
}

fn base(manifest: &Manifest, blobs: &Blobs) -> Known {
    let mut base = Base::new(manifest).unwrap();
    for segment in base.segments().to_vec() {
        base.next(&blobs.blobs[&segment.digest]).unwrap();
    }
    base.finish().unwrap()
}

fn disk() -> Vec<u8> {
    let mut disk = vec![0; 24 << 20];
    disk[512..3 << 20].copy_from_slice(&noise((3 << 20) - 512, 1));
    disk[5 << 20..9 << 20].copy_from_slice(&noise(4 << 20, 2));
    disk[(24 << 20) - 700..].fill(3);
    disk
}

#[test]
fn what_is_written_is_what_is_read() {
    for disk in [disk(), vec![0; 1 << 20], vec![1; 513], Vec::new()] {
        let mut blobs = Blobs::default();
        let (manifest, written) = push([Some(disk.clone()), None, None], &Known::default(), &mut blobs);
        assert!(pull(&manifest, &blobs)[0].as_ref() == Some(&disk));
        assert!(written.data <= disk.len() as u64 && written.reused == 0);
    }
    let mut blobs = Blobs::default();
    let files = [Some(disk()), Some(noise(100_000, 9)), Some(noise(70_001, 10))];
    let (manifest, _) = push(files.clone(), &Known::default(), &mut blobs);
    assert!(pull(&manifest, &blobs) == files);
}

#[test]
fn packs_are_plain_zstd() {
    let mut blobs = Blobs::default();
    let (manifest, written) = push([Some(disk()), None, None], &Known::default(), &mut blobs);
    let pack = &blobs.blobs[&manifest.layers[0].digest];
    let all = zstd::stream::decode_all(pack.as_slice()).unwrap();
    assert_eq!(all.len() as u64, written.data);
}

#[test]
fn a_second_copy_costs_nothing() {
    let mut blobs = Blobs::default();
    let part = noise(4 << 20, 5);
    let (manifest, written) = push(
        [Some([part.clone(), part.clone()].concat()), None, None],
        &Known::default(),
        &mut blobs,
    );
    assert!(written.packed < 3 << 20, "{}", written.packed);
    assert!(pull(&manifest, &blobs)[0] == Some([part.clone(), part].concat()));
}

#[test]
fn only_what_changed_is_put() {
    let mut blobs = Blobs::default();
    let before = disk();
    let (manifest, first) = push([Some(before.clone()), None, None], &Known::default(), &mut blobs);
    let put = blobs.put;
    let known = base(&manifest, &blobs);
    let mut after = before;
    after[6 << 20..(6 << 20) + 1000].fill(7);
    let (manifest, second) = push([Some(after.clone()), None, None], &known, &mut blobs);
    assert!(blobs.put - put < put / 20, "{} of {put}", blobs.put - put);
    assert!(second.reused > first.packed * 9 / 10 && second.content != first.content);
    assert!(pull(&manifest, &blobs)[0] == Some(after.clone()));

    // The same again puts nothing at all, not even the index.
    let (put, known) = (blobs.put, base(&manifest, &blobs));
    let (again, third) = push([Some(after), None, None], &known, &mut blobs);
    assert_eq!(
        (blobs.put, again.layers, third.content),
        (put, manifest.layers, second.content)
    );
}

#[test]
fn a_pack_of_which_little_is_used_is_not_kept() {
    let mut blobs = Blobs::default();
    let before = disk();
    let (manifest, _) = push([Some(before.clone()), None, None], &Known::default(), &mut blobs);
    let known = base(&manifest, &blobs);
    let mut after = before;
    after[5 << 20..9 << 20].copy_from_slice(&noise(4 << 20, 20));
    after[512..2 << 20].copy_from_slice(&noise((2 << 20) - 512, 21));
    let (manifest, written) = push([Some(after.clone()), None, None], &known, &mut blobs);
    assert_eq!(written.reused, 0);
    assert!(
        !manifest
            .layers
            .iter()
            .any(|layer| layer.digest == known.packs[0].digest)
    );
    assert!(pull(&manifest, &blobs)[0] == Some(after));
}

#[test]
fn a_pack_that_the_registry_has_lost_is_packed_again() {
    let mut blobs = Blobs::default();
    let (manifest, _) = push([Some(disk()), None, None], &Known::default(), &mut blobs);
    let known = base(&manifest, &blobs);
    let mut elsewhere = Blobs::default();
    let (manifest, written) = push([Some(disk()), None, None], &known, &mut elsewhere);
    assert_eq!(written.reused, 0);
    assert!(pull(&manifest, &elsewhere)[0] == Some(disk()));
}

#[test]
fn what_the_outlet_refuses_ends_the_writing() {
    struct Broken;
    impl Outlet for Broken {
        fn has(&mut self, _: &Descriptor) -> Result<bool, Error> {
            Ok(false)
        }
        fn put(&mut self, _: &Descriptor, _: Vec<u8>) -> Result<(), Error> {
            Err(Error::NotCached {
                image: "vm".to_owned(),
            })
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    let mut files: Files = [Some(Box::new(Memory(noise(80 << 20, 6)))), None, None];
    let options = Options {
        level: 1,
        scratch: scratch.path(),
        meter: Arc::default(),
    };
    let error = write(&mut files, &Known::default(), &mut Broken, &options).unwrap_err();
    assert!(matches!(error, Error::NotCached { .. }), "{error}");
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}
