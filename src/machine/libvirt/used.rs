//! Which files the host's domains use, whoever they belong to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::sys;

use super::super::xml::Node;
use super::{Error, Libvirt, QUERY_DEADLINE, is};

/// Longest chain of backing files that is followed: QEMU itself gives up long before.
const CHAIN_MAX: usize = 64;

/// Longest name of a backing file, in bytes (QEMU's own limit).
const NAME_MAX: usize = 1023;

impl Libvirt {
    /// Every file that a domain names, running or not, with the disks' backing files all the way down, and the names of the
    /// domains that do. What a domain names is taken for used, whatever for.
    ///
    /// # Errors
    /// Where libvirt cannot be asked, or a description cannot be read: then nobody knows.
    pub async fn files_in_use(&self) -> Result<BTreeMap<PathBuf, BTreeSet<String>>, Error> {
        let descriptions = self
            .call("list the machines".to_owned(), QUERY_DEADLINE, |connection| {
                let mut all = Vec::new();
                for domain in connection.list_all_domains(0)? {
                    match descriptions(&domain) {
                        // It ended while we looked.
                        Err(error) if is(&error, ErrorNumber::NoDomain) => {}
                        result => all.push(result?),
                    }
                }
                Ok(all)
            })
            .await?;
        let mut used: BTreeMap<PathBuf, BTreeSet<String>> = BTreeMap::new();
        for (name, texts) in descriptions {
            for text in texts {
                let description = Node::parse(&text).map_err(|error| Error::Answer(error.to_string()))?;
                let mut files = BTreeSet::new();
                named(&description, &mut files);
                for file in files {
                    for file in chain(file) {
                        used.entry(file).or_default().insert(name.clone());
                    }
                }
            }
        }
        Ok(used)
    }
}

/// A domain as it runs, and as it would start.
fn descriptions(domain: &Domain) -> Result<(String, Vec<String>), virt::error::Error> {
    let now = domain.xml_desc(sys::VIR_DOMAIN_NONE)?;
    let then = domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
    Ok((domain.name()?, vec![now, then]))
}

/// Everything in a description that is an absolute path.
fn named(node: &Node, files: &mut BTreeSet<PathBuf>) {
    let values = node.attributes.iter().map(|(_, value)| value).chain([&node.text]);
    files.extend(values.filter(|value| value.starts_with('/')).map(PathBuf::from));
    node.children.iter().for_each(|child| named(child, files));
}

/// A file and its backing files, by the names that they have once links are followed.
fn chain(file: PathBuf) -> Vec<PathBuf> {
    let mut chain = Vec::new();
    let mut next = Some(file);
    while let Some(file) = next
        && chain.len() < CHAIN_MAX
    {
        let real = file.canonicalize().unwrap_or(file);
        next = backing(&real);
        chain.push(real);
    }
    chain
}

/// The backing file of a qcow2 file, as its header has it: offset and length of the name at bytes 8 and 16.
fn backing(file: &Path) -> Option<PathBuf> {
    // A pipe or a device would keep us waiting.
    if !std::fs::metadata(file).ok()?.is_file() {
        return None;
    }
    let mut opened = File::open(file).ok()?;
    let mut header = [0; 20];
    opened.read_exact(&mut header).ok()?;
    let offset = u64::from_be_bytes(header[8..16].try_into().ok()?);
    let length = u32::from_be_bytes(header[16..20].try_into().ok()?);
    let length = usize::try_from(length)
        .ok()
        .filter(|length| *length <= NAME_MAX)?;
    if &header[..4] != b"QFI\xfb" || offset == 0 || length == 0 {
        return None;
    }
    let mut name = vec![0; length];
    opened.read_exact_at(&mut name, offset).ok()?;
    let name = String::from_utf8(name).ok()?;
    let name = name.strip_prefix("file:").unwrap_or(&name);
    Some(file.parent()?.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2(path: &Path, backing: &str) {
        let mut file = vec![0; 512];
        file[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        file[8..16].copy_from_slice(&200_u64.to_be_bytes());
        file[16..20].copy_from_slice(&u32::try_from(backing.len()).unwrap().to_be_bytes());
        file[200..200 + backing.len()].copy_from_slice(backing.as_bytes());
        std::fs::write(path, file).unwrap();
    }

    #[test]
    fn a_chain_is_followed_to_its_end_and_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().canonicalize().unwrap().join(name);
        std::fs::write(at("base.raw"), "x").unwrap();
        qcow2(&at("middle"), at("base.raw").to_str().unwrap());
        qcow2(&at("top"), "middle");
        std::os::unix::fs::symlink(at("top"), at("link")).unwrap();
        assert_eq!(chain(at("link")), [at("top"), at("middle"), at("base.raw")]);
        qcow2(&at("circle"), "circle");
        assert_eq!(chain(at("circle")).len(), CHAIN_MAX);
        assert_eq!(chain(at("none")), [at("none")]);
    }

    #[tokio::test]
    async fn what_a_domain_names_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().canonicalize().unwrap().join(name);
        std::fs::write(at("base.raw"), "x").unwrap();
        qcow2(&at("disk"), at("base.raw").to_str().unwrap());
        let libvirt = Libvirt::open("test:///default").unwrap();
        let xml = format!(
            "<domain type='test'><name>kept</name><memory>65536</memory><os><type>hvm</type><kernel>/srv/kernel</kernel></os>\
             <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda'/></disk></devices></domain>",
            at("disk").display()
        );
        libvirt.define("kept", xml).await.unwrap();
        let used = libvirt.files_in_use().await.unwrap();
        for file in [at("disk"), at("base.raw"), "/srv/kernel".into()] {
            assert_eq!(
                used.get(&file),
                Some(&BTreeSet::from(["kept".to_owned()])),
                "{file:?}: {used:?}"
            );
        }
        assert!(!used.contains_key(&at("other")));
    }
}
