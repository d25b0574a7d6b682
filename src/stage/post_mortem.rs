//! What is kept of a machine whose job's script failed: a picture of its screen, and the end of its serial log.

use std::time::Duration;

use crate::guest::report;
use crate::guest::ssh::{Connection, Patience};
use crate::history::{SCREEN_BYTES, SERIAL_BYTES};
use crate::kill::{self, Point};
use crate::machine::{Libvirt, serial};
use crate::outcome::Failure;
use crate::reap::SCREEN;
use crate::record::{self, Guest, JobDir, Machine};
use crate::report::{JobLog, plain};
use crate::settings::GuestSettings;
use crate::start;

/// How long a guest is waited for that is to take its own report: it answered when its script ended, and one that does not any more
/// must not hold up a job that has failed.
const ANSWER: Duration = Duration::from_secs(5);
/// The picture shows what the guest shows: whoever may read the job's serial log may see it.
const SCREEN_MODE: u32 = 0o640;

/// What a guest may say about why it did not take its report, in characters.
const REASON_LENGTH: usize = 200;

/// A machine whose job's script failed.
pub(super) struct PostMortem<'a> {
    pub(super) job: &'a JobDir,
    pub(super) guest: &'a Guest,
    pub(super) machine: &'a Machine,
    pub(super) way: &'a GuestSettings,
    /// The folder for the report in the guest, where one is wanted.
    pub(super) folder: Option<String>,
}

impl PostMortem<'_> {
    /// Keeps the picture with the job, and writes the report into the guest if that is wanted. What fails is said, and fails no job.
    pub(super) async fn take(&self, log: &JobLog) {
        let screen = self.screen().await.unwrap_or_else(|e| {
            tracing::info!(job = %self.job.key(), "no picture of the screen is kept: {e}");
            None
        });
        let Some(folder) = &self.folder else { return };
        let what = match screen {
            Some(_) => "the end of the serial log and the screen are",
            None => "the end of the serial log is",
        };
        match self.write(folder, screen).await {
            Ok(()) => log.line(format!("cannery: {what} in {folder}.")),
            Err(e) => log.line(format!(
                "cannery: {folder} could not be written in the guest: {}",
                plain(&e.message, REASON_LENGTH)
            )),
        }
    }

    /// The screen as it is now, kept for the history; none where there is none, or it is too large.
    async fn screen(&self) -> Result<Option<Vec<u8>>, Failure> {
        let picture = Libvirt::open(&self.machine.uri)?
            .screenshot(&self.machine.name)
            .await?;
        if picture.len() > SCREEN_BYTES {
            return Ok(None);
        }
        let file = self.job.file(SCREEN);
        record::write_atomic(&file, &picture, SCREEN_MODE)
            .map_err(|e| Failure::system(format!("cannot write {}: {e}", file.display())))?;
        kill::point(Point::ScreenKept);
        Ok(Some(picture))
    }

    async fn write(&self, folder: &str, screen: Option<Vec<u8>>) -> Result<(), Failure> {
        let patience = Patience {
            login: ANSWER,
            silence: ANSWER,
        };
        let target = start::target(self.job, self.guest, self.way)?;
        let connection = Connection::open(target, patience, |_| ()).await?;
        // A log that cannot be read is as one that has nothing.
        let serial = serial::last_bytes(&self.job.file("serial.log"), SERIAL_BYTES).unwrap_or_default();
        let mut files = vec![("serial.log", serial)];
        files.extend(screen.map(|picture| ("screen.png", picture)));
        let written = report::write(&connection, folder, files).await;
        written.map_err(|e| Failure::system(e.to_string()))
    }
}
