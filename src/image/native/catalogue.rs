//! Which chunks lie where on this host: beside each disk that came in chunks, a sorted list of them.
//!
//! ```text
//! chunks   "CANCHNK1", then lines of 32 bytes, sorted: 16 bytes of the digest, the place (8), the length (4), zeros (4)
//! ```
//!
//! It is a hint. What it leads to is hashed before it is used, so that a damaged list, or a half of a digest that two chunks
//! share, costs a fetch and nothing else.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::FILES;
use crate::image::digest::Digest;
use crate::image::plan::Pieces;
use crate::image::store::listed::{self, Sums};

/// The list's name beside its disk.
pub(in crate::image) const NAME: &str = "chunks";

const MAGIC: &[u8; 8] = b"CANCHNK1";
const LINE: usize = 32;

/// Bytes of a digest that a line has.
const KEY: usize = 16;

/// Lines that are read together: a page of the file.
const PAGE: usize = 128;

/// Lists that are looked through for a pull. Those of the newest images come first, and the rest has little that they lack.
const LISTS_MAX: usize = 32;

/// Bytes that the lists of a disk take for each of its chunks, with the parts of which one of them is made.
pub(super) const BYTES_A_CHUNK: u64 = (2 * LINE + listed::LINE) as u64;

type Line = [u8; LINE];

fn line(digest: &Digest, at: u64, length: u32) -> Line {
    let mut line = [0; LINE];
    line[..KEY].copy_from_slice(&digest.as_bytes()[..KEY]);
    line[KEY..24].copy_from_slice(&at.to_le_bytes());
    line[24..28].copy_from_slice(&length.to_le_bytes());
    line
}

fn place(line: &Line) -> (u64, u64) {
    let at = line[KEY..24].try_into().map_or(0, u64::from_le_bytes);
    let length = line[24..28].try_into().map_or(0, u32::from_le_bytes);
    (at, u64::from(length))
}

/// A list in the making, and the disk's sums with it: each plan's lines are sorted by themselves and merged at the end, so that memory holds one of them.
#[derive(Debug)]
pub(in crate::image) struct Maker {
    path: PathBuf,
    file: BufWriter<File>,
    runs: Vec<u64>,
    sums: Sums,
}

impl Maker {
    /// Begins in the folder that becomes the image's.
    pub(in crate::image) fn create(dir: &Path) -> io::Result<Self> {
        let path = dir.join(NAME);
        let file = BufWriter::new(File::create(Self::runs_path(&path))?);
        Ok(Self {
            path,
            file,
            runs: Vec::new(),
            sums: Sums::create(dir)?,
        })
    }

    fn runs_path(path: &Path) -> PathBuf {
        path.with_extension("runs")
    }

    /// Adds the pieces of the disk, which lie behind those that were added before; those of other files are too few to matter.
    pub(in crate::image) fn add(&mut self, plan: &Pieces) -> io::Result<()> {
        let mut chunks: Vec<(u64, u32, Digest)> = Vec::new();
        for piece in plan.blobs.iter().flat_map(|blob| &blob.pieces) {
            if plan.files[piece.file].name == FILES[0]
                && let Some(digest) = piece.digest
                && let Ok(length) = u32::try_from(piece.length)
            {
                chunks.push((piece.at, length, digest));
            }
        }
        // Each place is one chunk's.
        chunks.sort_unstable_by_key(|(at, ..)| *at);
        for (at, length, digest) in &chunks {
            self.sums.add(*at, *length, digest)?;
        }
        let mut lines: Vec<Line> = chunks
            .iter()
            .map(|(at, length, digest)| line(digest, *at, *length))
            .collect();
        lines.sort_unstable();
        for line in &lines {
            self.file.write_all(line)?;
        }
        if !lines.is_empty() {
            self.runs.push(lines.len() as u64);
        }
        Ok(())
    }

    /// Writes the list; its length in bytes.
    pub(in crate::image) fn finish(mut self) -> io::Result<u64> {
        self.sums.finish()?;
        self.file.flush()?;
        let runs_path = Self::runs_path(&self.path);
        let file = File::open(&runs_path)?;
        let mut runs = Vec::new();
        let mut start = 0;
        for lines in &self.runs {
            let end = start + lines * LINE as u64;
            runs.push(Run::new(&file, start..end));
            start = end;
        }
        let mut heap = BinaryHeap::new();
        for (number, run) in runs.iter_mut().enumerate() {
            heap.extend(run.next()?.map(|line| Reverse((line, number))));
        }
        let mut out = BufWriter::new(File::create(&self.path)?);
        out.write_all(MAGIC)?;
        let mut length = MAGIC.len() as u64;
        let mut last = None;
        while let Some(Reverse((line, number))) = heap.pop() {
            heap.extend(runs[number].next()?.map(|line| Reverse((line, number))));
            // One place of each chunk is enough.
            if last.replace(line).is_none_or(|last| last[..KEY] != line[..KEY]) {
                out.write_all(&line)?;
                length += LINE as u64;
            }
        }
        out.flush()?;
        fs::remove_file(runs_path)?;
        Ok(length)
    }
}

/// Lines that are sorted by themselves. All runs share one open file: there may be more of them than files that a process may open.
struct Run<'a> {
    file: &'a File,
    /// Where the lines that are not read yet begin and end, in bytes.
    rest: Range<u64>,
    page: std::vec::IntoIter<Line>,
}

impl<'a> Run<'a> {
    fn new(file: &'a File, rest: Range<u64>) -> Self {
        let page = Vec::new().into_iter();
        Self { file, rest, page }
    }

    fn next(&mut self) -> io::Result<Option<Line>> {
        if self.page.as_slice().is_empty() {
            let length = (self.rest.end - self.rest.start).min((PAGE * LINE) as u64);
            self.page = read_lines(self.file, self.rest.start, length)?.into_iter();
            self.rest.start += length;
        }
        Ok(self.page.next())
    }
}

/// Whole lines, read together.
fn read_lines(file: &File, at: u64, length: u64) -> io::Result<Vec<Line>> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    file.read_exact_at(&mut bytes, at)?;
    let lines = bytes.chunks_exact(LINE);
    Ok(lines.filter_map(|line| line.try_into().ok()).collect())
}

/// The lists of a host, newest first.
#[derive(Debug, Default)]
pub(in crate::image) struct Catalogue {
    lists: Vec<List>,
}

#[derive(Debug)]
struct List {
    disk: PathBuf,
    file: File,
    lines: u64,
}

impl Catalogue {
    /// Opens the lists of images in these folders. What cannot be read is passed over: it is a hint.
    pub(in crate::image) fn open(dirs: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut found: Vec<_> = dirs
            .into_iter()
            .filter_map(|dir| {
                let file = File::open(dir.join(NAME)).ok()?;
                let metadata = file.metadata().ok()?;
                let mut magic = [0; MAGIC.len()];
                file.read_exact_at(&mut magic, 0).ok()?;
                let lines = (metadata.len() - MAGIC.len() as u64) / LINE as u64;
                let list = List {
                    disk: dir.join(FILES[0]),
                    file,
                    lines,
                };
                (magic == *MAGIC).then_some((metadata.modified().ok(), list))
            })
            .collect();
        found.sort_by_key(|(modified, _)| Reverse(*modified));
        found.truncate(LISTS_MAX);
        Self {
            lists: found.into_iter().map(|(_, list)| list).collect(),
        }
    }

    /// Looks for everything that a plan wants: file and place of each digest that is here.
    pub(in crate::image) fn look_up(&self, plan: &Pieces) -> HashMap<(Digest, u64), (PathBuf, u64)> {
        let mut wanted: Vec<(Digest, u64)> = plan
            .blobs
            .iter()
            .flat_map(|blob| &blob.pieces)
            .filter_map(|piece| Some((piece.digest?, piece.length)))
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut found = HashMap::new();
        for list in &self.lists {
            let mut page = Page::default();
            wanted.retain(|(digest, length)| {
                // A list that cannot be read has nothing.
                match page.find(list, digest) {
                    Ok(Some((at, there))) if there == *length => {
                        found.insert((*digest, *length), (list.disk.clone(), at));
                        false
                    }
                    _ => true,
                }
            });
            if wanted.is_empty() {
                break;
            }
        }
        found
    }
}

/// Some neighbouring lines of a list. Who asks in the order of the digests reads no page twice.
#[derive(Default)]
struct Page {
    first: u64,
    lines: Vec<Line>,
}

impl Page {
    /// Place and length of a chunk. Digests are spread evenly, so that it is easy to say where in the list one must be.
    fn find(&mut self, list: &List, digest: &Digest) -> io::Result<Option<(u64, u64)>> {
        let key = &digest.as_bytes()[..KEY];
        let (mut low, mut high) = (0, list.lines);
        let (mut low_key, mut high_key) = (0_u64, u64::MAX);
        let wanted = prefix(key);
        let mut guesses = 0;
        while low < high {
            if !self.covers(key) {
                let span = u128::from(high - low);
                let share =
                    u128::from(wanted.saturating_sub(low_key)) * span / (u128::from(high_key - low_key) + 1);
                guesses += 1;
                // A list that is not spread evenly is halved instead.
                let guess = if guesses > 4 { span / 2 } else { share };
                let guess = low + u64::try_from(guess).unwrap_or_default();
                self.read(list, guess.saturating_sub(PAGE as u64 / 2))?;
            }
            let Some((first, last)) = self.lines.first().zip(self.lines.last()) else {
                return Ok(None);
            };
            if key < &first[..KEY] {
                (high, high_key) = (self.first.min(high), prefix(first));
            } else if key > &last[..KEY] {
                (low, low_key) = ((self.first + self.lines.len() as u64).max(low), prefix(last));
            } else {
                let found = self.lines.binary_search_by(|line| line[..KEY].cmp(key));
                return Ok(found.ok().map(|index| place(&self.lines[index])));
            }
            if low_key > high_key {
                // Not sorted: worth nothing.
                return Ok(None);
            }
        }
        Ok(None)
    }

    fn covers(&self, key: &[u8]) -> bool {
        self.lines
            .first()
            .zip(self.lines.last())
            .is_some_and(|(first, last)| &first[..KEY] <= key && key <= &last[..KEY])
    }

    fn read(&mut self, list: &List, first: u64) -> io::Result<()> {
        let count = (list.lines - first).min(PAGE as u64);
        let at = MAGIC.len() as u64 + first * LINE as u64;
        self.lines = read_lines(&list.file, at, count * LINE as u64)?;
        self.first = first;
        Ok(())
    }
}

fn prefix(key: &[u8]) -> u64 {
    key.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::Descriptor;
    use crate::image::plan::{Codec, PackedBlob, Piece, PlannedFile};

    fn plan(numbers: std::ops::Range<u64>) -> Pieces {
        let pieces = numbers
            .map(|number| Piece {
                packed: number * 10..number * 10 + 10,
                codec: Codec::Zstd,
                file: 0,
                at: number * 4096,
                length: 4096,
                digest: Some(Digest::of(&number.to_le_bytes())),
            })
            .collect();
        Pieces {
            files: vec![PlannedFile {
                name: FILES[0],
                length: 1 << 40,
            }],
            blobs: vec![PackedBlob {
                descriptor: Descriptor {
                    media_type: String::new(),
                    digest: Digest::of(b"pack"),
                    size: 1 << 40,
                    annotations: std::collections::BTreeMap::new(),
                },
                pieces,
            }],
        }
    }

    fn list(dir: &Path, plans: &[Pieces]) {
        fs::create_dir_all(dir).unwrap();
        let mut maker = Maker::create(dir).unwrap();
        for plan in plans {
            maker.add(plan).unwrap();
        }
        let length = maker.finish().unwrap();
        assert_eq!(fs::metadata(dir.join(NAME)).unwrap().len(), length);
        assert_eq!(fs::read_dir(dir).unwrap().count(), 2, "the list, and the sums");
    }

    #[test]
    fn what_is_listed_is_found_where_it_lies() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        list(&one, &[plan(0..3000), plan(2000..5000)]);
        list(&two, &[plan(10_000..10_001), plan(0..0)]);
        let catalogue = Catalogue::open([one.clone(), two.clone(), dir.path().join("none")]);
        let found = catalogue.look_up(&plan(4000..10_100));
        assert_eq!(found.len(), 1001);
        for number in 4000_u64..5000 {
            let key = (Digest::of(&number.to_le_bytes()), 4096);
            assert_eq!(found[&key], (one.join("disk.raw"), number * 4096));
        }
        assert_eq!(
            found[&(Digest::of(&10_000_u64.to_le_bytes()), 4096)].0,
            two.join("disk.raw")
        );
        // All at once, one by one, and with another length.
        assert_eq!(catalogue.look_up(&plan(0..5000)).len(), 5000);
        for number in (0..5000).step_by(50) {
            assert_eq!(catalogue.look_up(&plan(number..number + 1)).len(), 1, "{number}");
        }
        let mut longer = plan(0..10);
        longer.blobs[0].pieces[3].length = 8192;
        assert_eq!(catalogue.look_up(&longer).len(), 9);
    }

    #[test]
    fn a_list_is_made_of_more_parts_than_files_can_be_open() {
        let dir = tempfile::tempdir().unwrap();
        // Most systems let a process open 1024.
        let parts = 2000;
        let plans: Vec<_> = (0..parts).map(|number| plan(number..number + 1)).collect();
        let one = dir.path().join("one");
        list(&one, &plans);
        let found = Catalogue::open([one]).look_up(&plan(0..parts));
        assert_eq!(found.len() as u64, parts);
    }

    #[test]
    fn a_damaged_list_is_worth_nothing_and_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let one = dir.path().join("one");
        list(&one, &[plan(0..3000)]);
        let path = one.join(NAME);
        let whole = fs::read(&path).unwrap();
        let look_up = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Catalogue::open([one.clone()]).look_up(&plan(0..3000)).len()
        };
        assert_eq!(look_up(&whole), 3000);
        assert_eq!(look_up(&whole[1..]), 0);
        assert_eq!(look_up(b""), 0);
        assert_eq!(look_up(MAGIC), 0);
        let half = look_up(&whole[..whole.len() / 2 + 5]);
        assert!((1000..2000).contains(&half), "{half}");
        // In no order at all.
        let mut reversed = MAGIC.to_vec();
        for line in whole[MAGIC.len()..].chunks(LINE).rev() {
            reversed.extend_from_slice(line);
        }
        look_up(&reversed);
        look_up(&[MAGIC.as_slice(), &[0xff; 32 * 1000]].concat());
        look_up(&[MAGIC.as_slice(), &[0; 32 * 1000]].concat());
    }
}
