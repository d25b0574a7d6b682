//! The parsers of this room, each as a function of hostile bytes, with what must hold for all bytes.
//!
//! Compiled for tests and for fuzzers only (`--cfg fuzzing`, which cargo-fuzz sets): `fuzz/` runs each target for as long as
//! one likes, and the test below runs what is kept in `tests/corpus`, and changes of it, each time.

use std::io::Read as _;

use super::manifest::{self, Document};
use super::platform::Platform;
use super::reference::Reference;
use super::registry::challenge;
use super::registry::credentials::{Credentials, Origin};
use super::{decompress, fetch, format, hints, inspect, lz4, native, policy, registry, view};

/// Largest virtual disk that the targets allow, in bytes.
const DISK_MAX: u64 = 1 << 40;

/// Unpacked bytes after which a stream has shown what it can do.
const UNPACKED_MAX: u64 = 1 << 20;

/// One parser: panics where it must not, or where its promise is broken.
pub type Target = fn(&[u8]);

/// Every target by its name, which is also the name of its folder in `tests/corpus`.
pub const TARGETS: &[(&str, Target)] = &[
    ("auth", auth),
    ("challenge", challenge),
    ("config", config),
    ("domain", format::fuzz::domain),
    ("gunzip", fetch::fuzz_gunzip),
    ("labels", labels),
    ("lz4_apple", lz4_apple),
    ("lz4_frame", lz4_frame),
    ("manifest", manifest),
    ("native_index", native::fuzz_index),
    ("qcow2", disk),
    ("qcow2_view", view::fuzz_qcow2),
    ("raw", disk),
    ("recipe", format::fuzz::recipe),
    ("reference", reference),
    ("retry_after", registry::fuzz_retry_after),
    ("signature", policy::fuzz_payload),
    ("stream", stream),
    ("sums", registry::fuzz_sums),
    ("tar", format::fuzz::tar),
    ("xz", xz),
];

/// Runs the target with this name.
///
/// # Panics
/// When there is none, and when the target does.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    match target {
        Some((_, target)) => target(bytes),
        None => panic!("there is no target {name}"),
    }
}

fn auth(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Err(error) = Credentials::from_docker_config(&text, Origin::JobGiven) {
        one_line(&error.to_string());
    }
}

fn challenge(bytes: &[u8]) {
    challenge::parse(&String::from_utf8_lossy(bytes));
}

fn config(bytes: &[u8]) {
    match format::parse_config(bytes, 2) {
        Ok(config) => assert!(config.diff_ids.is_empty() || config.diff_ids.len() == 2),
        Err(reason) => one_line(&reason),
    }
}

fn labels(bytes: &[u8]) {
    let Ok(labels) = serde_json::from_slice(bytes) else {
        return;
    };
    match hints::read(&labels, "vm") {
        Ok((hints, boot)) => {
            for path in boot.kernel.iter().chain(&boot.initrd) {
                inside(path);
            }
            assert!(hints.user.is_none_or(|user| !user.starts_with('-')));
            one_line(&boot.cmdline.unwrap_or_default());
        }
        Err(error) => one_line(&error.to_string()),
    }
}

fn manifest(bytes: &[u8]) {
    let Some(platform) = Platform::of_machine("x86_64") else {
        return;
    };
    match manifest::parse(bytes) {
        Ok(Document::Image(manifest)) => {
            if let Err(reason) = format::recognise(&manifest) {
                one_line(&reason);
            }
        }
        Ok(Document::Index(entries)) => drop(manifest::choose(&entries, &platform)),
        Err(reason) => one_line(&reason),
    }
}

fn disk(bytes: &[u8]) {
    if let Ok(inspected) = inspect::bytes(bytes, DISK_MAX) {
        assert!(inspected.virtual_size > 0 && inspected.virtual_size <= DISK_MAX);
    }
}

fn reference(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match text.parse::<Reference>() {
        Ok(reference) => {
            // What is stored under a name must be found under it.
            let written = reference.to_string();
            assert_eq!(written.parse::<Reference>().as_ref(), Ok(&reference), "{written}");
            one_line(&written);
        }
        Err(error) => one_line(&error.to_string()),
    }
}

fn stream(bytes: &[u8]) {
    if let Ok((_, unpacked)) = decompress::decompress(bytes, "vm") {
        drop(std::io::copy(
            &mut unpacked.take(UNPACKED_MAX),
            &mut std::io::sink(),
        ));
    }
}

/// The decoder of xz without the luck of its magic number, which a fuzzer seldom has.
fn xz(bytes: &[u8]) {
    stream(&[b"\xfd7zXZ\0", bytes].concat());
}

fn lz4_apple(bytes: &[u8]) {
    unpacked(lz4::Apple::new(bytes));
}

fn lz4_frame(bytes: &[u8]) {
    unpacked(lz4::Frames::new(bytes));
}

/// Reads what comes out, as far as it tells something.
fn unpacked(stream: impl std::io::Read) {
    if let Err(error) = std::io::copy(&mut stream.take(UNPACKED_MAX), &mut std::io::sink()) {
        one_line(&error.to_string());
    }
}

/// A path that stays where it is unpacked.
pub(super) fn inside(path: &str) {
    assert!(!path.starts_with('/'), "{path}");
    assert!(path.split('/').all(|part| part != ".."), "{path}");
}

/// What is said about bytes is one line, whatever they are.
pub(super) fn one_line(text: &str) {
    assert!(!text.contains(['\n', '\r', '\x1b', '\0']), "{text:?}");
}

/// Numbers without a pattern, the same for the same seed.
#[cfg(test)]
pub(super) struct Dice(pub(super) u64);

#[cfg(test)]
impl Dice {
    /// Any number.
    pub(super) fn roll(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is not 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.roll() >> 32).unwrap() % end
    }

    /// One of several.
    pub(super) fn of<T: Copy>(&mut self, choice: &[T]) -> T {
        choice[self.below(choice.len())]
    }
}

/// Changes of each kept input that are tried: the whole takes some seconds.
#[cfg(test)]
const CHANGES: usize = 60;

/// Numbers at which arithmetic goes wrong.
#[cfg(test)]
const TELLING: [u64; 8] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// One small change, as fuzzers make them.
#[cfg(test)]
fn change(bytes: &mut Vec<u8>, dice: &mut Dice) {
    let at = dice.below(bytes.len() + 1);
    match dice.below(6) {
        0 => bytes.truncate(at),
        1 => bytes.insert(at, dice.roll().to_le_bytes()[0]),
        2 => {
            let piece = bytes[at..bytes.len().min(at + 16)].to_vec();
            let to = dice.below(bytes.len() + 1);
            bytes.splice(to..to, piece);
        }
        3 => {
            let width = dice.of(&[1, 2, 4, 8]);
            let number = dice.of(&TELLING).to_be_bytes();
            for (byte, new) in bytes.iter_mut().skip(at).zip(&number[8 - width..]) {
                *byte = *new;
            }
        }
        _ => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << dice.below(8);
            }
        }
    }
}

/// Runs what is kept of each target, and changes of it.
#[cfg(test)]
pub(crate) fn kept_inputs_stay_harmless(targets: &[(&str, Target)]) {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut dice = Dice(7);
    for (name, target) in targets {
        let folder = std::fs::read_dir(corpus.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut inputs: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "{name} has no corpus");
        for input in inputs {
            let kept = std::fs::read(&input).unwrap();
            target(&kept);
            for _ in 0..CHANGES {
                let mut bytes = kept.clone();
                for _ in 0..=dice.below(4) {
                    change(&mut bytes, &mut dice);
                }
                target(&bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fuzzers_found_interesting_stays_harmless() {
        kept_inputs_stay_harmless(TARGETS);
    }
}
