//! sardinecake's images made by hand, with disks of several files.

use std::io::Write as _;

use super::image_fixture::{Image, noise, sha256};

/// Bytes of a cluster, and of the disks that are made of them by hand.
pub const CLUSTER: usize = 512;
pub const SIZE: usize = 64 << 10;

/// What a cluster of a qcow2 is to be.
#[derive(Clone, Copy)]
pub enum Cluster {
    Filled(u8),
    Zero,
}

/// A qcow2 of 64 KiB by hand. `format` is what it says of the file under it.
pub fn qcow2(clusters: &[(usize, Cluster)], below: &str, format: &str) -> Vec<u8> {
    let mut file = vec![0; CLUSTER * 6];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &9_u32.to_be_bytes());
    put(24, &(SIZE as u64).to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    if !format.is_empty() {
        put(104, &0xe279_2aca_u32.to_be_bytes());
        put(108, &u32::try_from(format.len()).unwrap().to_be_bytes());
        put(112, format.as_bytes());
    }
    if !below.is_empty() {
        put(8, &200_u64.to_be_bytes());
        put(16, &u32::try_from(below.len()).unwrap().to_be_bytes());
        put(200, below.as_bytes());
    }
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    put(3 * CLUSTER, &(4 * CLUSTER as u64).to_be_bytes());
    put(3 * CLUSTER + 8, &(5 * CLUSTER as u64).to_be_bytes());
    for (number, cluster) in clusters {
        let entry = 4 * CLUSTER + number * 8;
        let value = match cluster {
            Cluster::Zero => 1,
            Cluster::Filled(_) => file.len() as u64,
        };
        file[entry..entry + 8].copy_from_slice(&value.to_be_bytes());
        if let Cluster::Filled(byte) = cluster {
            file.extend([*byte; CLUSTER]);
        }
    }
    file
}

/// A raw disk of that size.
pub fn raw() -> Vec<u8> {
    let mut disk = noise(5, SIZE);
    disk[3 * CLUSTER..20 * CLUSTER].fill(0);
    disk
}

/// A gzip stream as Python writes it: the name in Latin-1, or none.
pub fn gzip_named(bytes: &[u8], name: Option<&str>) -> Vec<u8> {
    let mut builder = flate2::GzBuilder::new();
    if let Some(name) = name {
        let latin: Vec<u8> = name
            .chars()
            .map(|c| u8::try_from(u32::from(c)).unwrap())
            .collect();
        builder = builder.filename(latin);
    }
    let mut encoder = builder.write(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The machine of an image, with these drives: what each is, and its file.
pub fn domain(drives: &[(&str, &str)]) -> String {
    let mut text =
        "<domain type='kvm'><memory unit='MiB'>320</memory><os><type arch='x86_64'>hvm</type></os><devices>"
            .to_owned();
    for (device, file) in drives {
        text += &format!(
            "<disk type='file' device='{device}'><source file='{file}'/><target dev='vda' bus='virtio'/></disk>"
        );
    }
    text + "</devices></domain>"
}

/// A file, with the name that gzip carries.
pub type File<'a> = (Option<&'a str>, Vec<u8>);

/// An image of these files, each cut into blobs of so many bytes.
pub fn cake(domain: &str, files: &[File<'_>], chunk: usize) -> Image {
    let mut image = Image::default().layer(
        domain.as_bytes().to_vec(),
        "application/vnd.libvirt.domain.config+xml",
        &[],
    );
    image.diff_ids = vec![sha256(domain.as_bytes())];
    for (name, bytes) in files {
        image.diff_ids.push(sha256(bytes));
        for (number, piece) in gzip_named(bytes, *name).chunks(chunk).enumerate() {
            let media_type = match number {
                0 => "application/x-qemu-disk+gzip".to_owned(),
                _ => format!("application/x-qemu-disk+gzip;chunk={number}"),
            };
            image = image.layer(piece.to_vec(), &media_type, &[]);
        }
    }
    image
}
