//! How far a layer has come, in one small file, so that another process can go on with it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::decoder::Stand;
use super::ledger::Segment;
use super::verified::Position;
use crate::image::digest::Hasher;
use crate::image::error::Error;
use crate::kill::{self, Point};

/// Name of the checkpoint in an image's folder, with the version of its content.
pub(super) const CHECKPOINT: &str = "checkpoint-2.json";

/// Largest checkpoint that is read, in bytes: its parts are bounded when it is written.
const CHECKPOINT_MAX: u64 = 8 << 20;

/// What another process needs to go on with a layer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Checkpoint {
    pub(super) layer: usize,
    pub(super) mark: Mark,
    /// The hash over the unpacked bytes, where there is one to compare with.
    pub(super) unpacked: Option<Hasher>,
    pub(super) segments: Vec<Segment>,
    /// Bytes of each file that are written.
    pub(super) files: BTreeMap<String, u64>,
}

/// Where the unpacking was.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Mark {
    pub(super) position: Position,
    /// Packed bytes in front of the position that are still to be unpacked.
    #[serde(with = "hex")]
    pub(super) rest: Vec<u8>,
    pub(super) stand: Stand,
}

impl Checkpoint {
    /// What an earlier process has written down about this layer, if it can be used.
    pub(super) fn find(dir: &Path, layer: usize) -> Option<Self> {
        let mut bytes = Vec::new();
        let file = File::open(dir.join(CHECKPOINT)).ok()?;
        file.take(CHECKPOINT_MAX).read_to_end(&mut bytes).ok()?;
        let found: Self = serde_json::from_slice(&bytes).ok()?;
        (found.layer == layer).then_some(found)
    }

    pub(super) fn write(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(CHECKPOINT);
        let begun: PathBuf = dir.join(format!("{CHECKPOINT}.begun"));
        let write = || -> io::Result<()> {
            fs::write(&begun, serde_json::to_vec(self)?)?;
            kill::point(Point::CheckpointBegun);
            fs::rename(&begun, &path)
        };
        write().map_err(Error::storage(&path))?;
        kill::point(Point::CheckpointKept);
        Ok(())
    }
}
