//! Files of one image that lie upon each other: which of them are its machine's disk.
//!
//! A qcow2 names the file under it. Such a name is compared with those of the image's other files, as their gzip headers say them,
//! and with nothing else: no file of the host is ever looked for because an image says so. Everything here is a word of the
//! image's author; what cannot be one disk is refused in one sentence.

use crate::image::error::quoted;
use crate::image::inspect::{Backing, DiskFormat, Said};

/// A file that the image's own machine has as a drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::image) struct Drive {
    /// Is it a disk, and not a CD or a floppy?
    pub(in crate::image) disk: bool,
    /// The file's name, without its folders.
    pub(in crate::image) name: String,
}

/// One file.
#[derive(Debug, Clone)]
pub(in crate::image) struct Member {
    /// Its name, where gzip could carry it.
    pub(in crate::image) name: Option<String>,
    /// What its header check found.
    pub(in crate::image) format: DiskFormat,
    /// The file under it, as its header names it.
    pub(in crate::image) backing: Option<Backing>,
}

/// Which files are the machine's only disk, the topmost first. The error is a reason.
pub(in crate::image) fn disk(members: &[Member], drives: &[Drive]) -> Result<Vec<usize>, String> {
    let files = Files { members, drives };
    let below = files.below()?;
    let above = files.above(&below)?;
    let stack_of = |top: usize| std::iter::successors(Some(top), |file| below[*file]);
    let tops: Vec<usize> = (0..members.len()).filter(|file| above[*file].is_none()).collect();
    let mut reached = vec![false; members.len()];
    for file in tops.iter().flat_map(|top| stack_of(*top)) {
        reached[file] = true;
    }
    if let Some(lost) = reached.iter().position(|reached| !reached) {
        return Err(format!(
            "its file {} lies on itself in a circle",
            files.title(lost)
        ));
    }
    let stack: Vec<usize> = stack_of(files.topmost(&tops)?).collect();
    for pair in stack.windows(2) {
        files.agree(pair[0], pair[1])?;
    }
    Ok(stack)
}

struct Files<'a> {
    members: &'a [Member],
    drives: &'a [Drive],
}

impl Files<'_> {
    /// What a sentence calls a file.
    fn title(&self, file: usize) -> String {
        match &self.members[file].name {
            Some(name) => quoted(name),
            None => format!("number {}", file + 1),
        }
    }

    fn titles(&self, files: &[usize]) -> String {
        let titles: Vec<String> = files.iter().map(|file| self.title(*file)).collect();
        titles.join(", ")
    }

    /// The file under each.
    fn below(&self) -> Result<Vec<Option<usize>>, String> {
        let one = |file: usize| match &self.members[file].backing {
            Some(backing) => self.named(file, backing).map(Some),
            None => Ok(None),
        };
        (0..self.members.len()).map(one).collect()
    }

    /// The file that another names.
    fn named(&self, by: usize, backing: &Backing) -> Result<usize, String> {
        let title = self.title(by);
        let shown = quoted(&backing.name.to_string_lossy());
        let Some(name) = backing.name.to_str() else {
            return Err(format!(
                "its file {title} names its backing file {shown}, which is no text"
            ));
        };
        if name.contains(':') {
            return Err(format!(
                "its file {title} names its backing file in a way that only QEMU understands, {shown}"
            ));
        }
        if name.contains('/') {
            return Err(format!(
                "its file {title} names its backing file by a path, {shown}, and only a file of the same image can be one"
            ));
        }
        let found: Vec<usize> = match carried(name) {
            Some(name) => (0..self.members.len())
                .filter(|file| self.members[*file].name.as_deref() == Some(name.as_str()))
                .collect(),
            // The name is lost. Each file follows the one that it lies on, so it is known all the same.
            None => by
                .checked_sub(1)
                .filter(|file| self.members[*file].name.is_none())
                .into_iter()
                .collect(),
        };
        match found.as_slice() {
            [one] => Ok(*one),
            [] => Err(format!(
                "its file {title} lies on {shown}, which is not in the image; sarde leaves it out while the machine runs"
            )),
            _ => Err(format!(
                "its file {title} lies on {shown}, and {} of its files have that name",
                found.len()
            )),
        }
    }

    /// The file upon each.
    fn above(&self, below: &[Option<usize>]) -> Result<Vec<Option<usize>>, String> {
        let mut above: Vec<Option<usize>> = vec![None; below.len()];
        for (file, under) in below.iter().enumerate() {
            let Some(under) = *under else { continue };
            if let Some(other) = above[under].replace(file) {
                return Err(format!(
                    "its files {} and {} both lie on {}, and a machine has one disk",
                    self.title(other),
                    self.title(file),
                    self.title(under)
                ));
            }
        }
        Ok(above)
    }

    /// The one under which the machine's disk lies. What is in its CD drive is passed over.
    fn topmost(&self, tops: &[usize]) -> Result<usize, String> {
        if let [one] = tops {
            return Ok(*one);
        }
        let is_named = |file: usize, disk: bool| {
            let name = self.members[file].name.as_deref();
            let has = |drive: &&Drive| drive.disk == disk && carried(&drive.name).as_deref() == name;
            name.is_some() && self.drives.iter().any(|drive| has(&drive))
        };
        let (others, rest): (Vec<usize>, Vec<usize>) = tops
            .iter()
            .partition(|file| is_named(**file, false) && !is_named(**file, true));
        let (disks, unused): (Vec<usize>, Vec<usize>) = rest.iter().partition(|file| is_named(**file, true));
        match (rest.as_slice(), disks.as_slice()) {
            ([one], _) => Ok(*one),
            ([], _) => Err(format!("it has no disk, but only {}", self.titles(&others))),
            (_, [_]) => Err(format!("nothing uses its file {}", self.titles(&unused))),
            _ => Err(format!(
                "a machine has one disk, and it has {}: {}",
                rest.len(),
                self.titles(&rest)
            )),
        }
    }

    /// Is a file what the one upon it says that it is?
    fn agree(&self, file: usize, under: usize) -> Result<(), String> {
        let said = self.members[file].backing.as_ref().map(|backing| backing.format);
        let wrong = match (said, self.members[under].format) {
            (Some(Said::Foreign), _) => "should be neither qcow2 nor raw",
            (Some(Said::Format(DiskFormat::Qcow2)), DiskFormat::Raw) => "should be a qcow2 and is none",
            // A guest can write a header of its own into a raw disk.
            (Some(Said::Format(DiskFormat::Raw)), DiskFormat::Qcow2) => {
                "should be raw and begins like a qcow2, so that nobody can tell which it is"
            }
            _ => return Ok(()),
        };
        let (title, by) = (self.title(under), self.title(file));
        Err(format!(
            "its file {title} {wrong}; {by}, which lies on it, says so"
        ))
    }
}

/// A file's name as Python's gzip carries it: without `.gz`, and none where a character has no place in Latin-1.
fn carried(name: &str) -> Option<String> {
    let name = name.strip_suffix(".gz").unwrap_or(name);
    let latin = name.chars().all(|c| u32::from(c) <= 0xff);
    (latin && !name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests;
