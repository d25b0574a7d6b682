//! Points at which a test can have the process killed.
//!
//! Whatever is done for a job can be cut off by SIGKILL behind any of its effects, and the next call must make the best of
//! what is there. So behind each effect stands one line, [`point`], and each line has a name of its own. In a release build
//! the line is nothing. In a debug build the process sends itself SIGKILL there once it is armed, which only the command
//! line can do; `tests/kills.rs` walks through all of them.

use std::fmt;

/// Lists the points once: variant, the name by which it is armed, and what has just been done there.
macro_rules! points {
    ($($variant:ident $name:literal $done:literal)*) => {
        /// A place behind an effect.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Point {
            $(#[doc = concat!($done, ".")] $variant,)*
        }

        impl Point {
            /// All there are, in the order in which a job meets them.
            pub const ALL: &[Point] = &[$(Point::$variant,)*];

            /// The name by which it is armed.
            pub fn name(self) -> &'static str {
                match self { $(Point::$variant => $name,)* }
            }
        }

        impl fmt::Display for Point {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Point::$variant => $done,)* })
            }
        }
    };
}

points! {
    FolderBegun "folder-begun" "a folder of the state is made and not yet everybody's"
    FileBegun "file-begun" "a small file of the state is written and has not got its name"
    ConfigAnswered "config-answered" "config has answered"
    RemainSwept "remain-swept" "a file that a killed process was writing is swept"
    WorkSwept "work-swept" "a download that a killed process began is swept"
    JobBegun "job-begun" "a job's folder is made and has no record"
    SavedAdmitted "saved-admitted" "the record says admitted"
    SlotLeased "slot-leased" "a slot is leased"
    FirewallLoaded "firewall-loaded" "the firewall is loaded and not noted"
    FirewallNoted "firewall-noted" "the firewall is noted"
    NetworkDefined "network-defined" "the network is defined"
    NetworkStarted "network-started" "the network is started"
    SavedFetching "saved-fetching" "the record says fetching"
    BlobBegun "blob-begun" "a manifest is written and has not got its name"
    BlobKept "blob-kept" "a manifest is in the store"
    UnsyncedNoted "unsynced-noted" "it is noted that an image's bytes may not be on the disk"
    ImageSettled "image-settled" "an image is on the disk, and the note that it may not be is still there"
    WorkBegun "work-begun" "an image's folder is made, where nobody looks for images"
    LayerBegun "layer-begun" "a layer's first file is begun"
    CheckpointBegun "checkpoint-begun" "how far a layer is stands in a file that has not got its name"
    CheckpointKept "checkpoint-kept" "it is written down how far a layer is"
    PiecesBegun "pieces-begun" "the file of a plan's pieces is begun"
    PiecesKept "pieces-kept" "it is written down which pieces are done"
    LayerUnpacked "layer-unpacked" "a layer is unpacked and verified"
    LayerKept "layer-kept" "it is written down that a layer is done"
    FileNamed "file-named" "one of an image's files has got the name that it has in the store"
    DiskNamed "disk-named" "the disk has passed its check"
    DiskFinished "disk-finished" "the image is whole and not yet in the store"
    DiskStored "disk-stored" "the image is in the store"
    ReferenceKept "reference-kept" "the image's name is kept"
    OriginKept "origin-kept" "an image's repository is noted"
    GrantKept "grant-kept" "a registry's leave is noted"
    ReferenceForgotten "reference-forgotten" "an image's name is forgotten"
    ImageHidden "image-hidden" "an image is no longer where images are looked for"
    ImageRemoved "image-removed" "an image is removed"
    PinKept "pin-kept" "an image is pinned"
    PinRemoved "pin-removed" "a pin is taken away"
    SavedCloning "saved-cloning" "the record says cloning"
    UserKeyWritten "user-key-written" "the first of two keys is written"
    KeysWritten "keys-written" "both keys are written"
    OverlayBegun "overlay-begun" "qemu-img makes the overlay"
    OverlayMade "overlay-made" "the overlay is made"
    SerialMade "serial-made" "the serial log is made"
    KernelCopied "kernel-copied" "the kernel is copied"
    SeedMade "seed-made" "the seed disk is made"
    CredentialWritten "credential-written" "a credential is written"
    SavedStarting "saved-starting" "the record says starting"
    DomainCreated "domain-created" "the domain is created"
    SavedBooting "saved-booting" "the record says booting"
    TrialEnded "trial-ended" "the domain that KVM did not boot is destroyed"
    TrialNoted "trial-noted" "what the trial of KVM showed is noted"
    GuestAnswered "guest-answered" "the guest has let us in"
    GuestSettled "guest-settled" "the guest is ready for scripts"
    SavedReady "saved-ready" "the record says ready"
    CodeRemoved "code-removed" "the exit code of an earlier script is removed"
    SavedRunning "saved-running" "the record says running"
    GuestEntered "guest-entered" "run is in the guest"
    LeftEnded "left-ended" "what a killed run left in the guest is ended"
    ScriptStarted "script-started" "the script has started"
    ScriptEnded "script-ended" "the script has ended"
    CancelBegun "cancel-begun" "the script is to be cancelled"
    ScriptCancelled "script-cancelled" "the script is cancelled"
    ScreenKept "screen-kept" "a picture of the screen is in the job's folder"
    CodeWritten "code-written" "the exit code is written"
    ImportNoted "import-noted" "it is noted which files a machine is to get"
    ImportNamed "import-named" "one of a machine's files has got its name"
    ImportDefined "import-defined" "a machine is defined, and the note of its files is still there"
    ImportUndone "import-undone" "a file of a machine that is not to be is removed"
    TicketKept "ticket-kept" "a console's ticket is kept"
    TicketRevoked "ticket-revoked" "a console's ticket is taken away"
    SavedHeld "saved-held" "the record says held"
    SavedCleaning "saved-cleaning" "the record says cleaning"
    HistoryBegun "history-begun" "the job is written down for the history"
    HistoryKept "history-kept" "the job is in the history"
    DomainDestroyed "domain-destroyed" "the domain is destroyed"
    SlotReleased "slot-released" "the slot is released"
    FileRemoved "file-removed" "one of the job's files is removed"
    FolderHidden "folder-hidden" "nothing but the record is left of the job, and no longer under its name"
    FolderRemoved "folder-removed" "the job's folder is removed"
}

/// Behind an effect: here the process ends if it is armed for this point.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn point(_: Point) {}

#[cfg(debug_assertions)]
pub use armed::{Manner, NotAPoint, arm, point};

#[cfg(debug_assertions)]
mod armed {
    use std::sync::{Mutex, PoisonError};

    use rustix::process::{Signal, getpid, kill_process};

    use super::Point;

    /// The point, how many more times it is passed by before, and what happens then.
    static ARMED: Mutex<Option<(Point, u32, Manner)>> = Mutex::new(None);

    /// What happens at the point.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Manner {
        /// The process is killed.
        Kill,
        /// It panics, as if by an error of its own.
        Panic,
    }

    /// A text names no point.
    #[derive(Debug, PartialEq, Eq, thiserror::Error)]
    #[error("\"{0}\" is no point at which cannery can be killed")]
    pub struct NotAPoint(String);

    /// Arms the process: `NAME` is a point's name, `NAME:N` its N-th time, from 1.
    ///
    /// # Errors
    /// No point has that name, or N is no such number.
    pub fn arm(text: &str, manner: Manner) -> Result<(), NotAPoint> {
        let (point, times) = parse(text).ok_or_else(|| NotAPoint(text.to_owned()))?;
        *ARMED.lock().unwrap_or_else(PoisonError::into_inner) = Some((point, times, manner));
        Ok(())
    }

    fn parse(text: &str) -> Option<(Point, u32)> {
        let (name, nth) = text.split_once(':').unwrap_or((text, "1"));
        let point = Point::ALL.iter().copied().find(|point| point.name() == name)?;
        Some((point, nth.parse::<u32>().ok()?.checked_sub(1)?))
    }

    /// Behind an effect: here the process ends if it is armed for this point.
    #[allow(clippy::panic, reason = "that is what it was armed for")]
    pub fn point(point: Point) {
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        let manner = match armed.as_mut() {
            Some((wanted, 0, manner)) if *wanted == point => *manner,
            Some((wanted, left, _)) if *wanted == point => {
                *left -= 1;
                return;
            }
            _ => return,
        };
        drop(armed);
        match manner {
            // Nothing of this process runs on, in no thread: the kernel sees to it before the call returns.
            Manner::Kill => drop(kill_process(getpid(), Signal::KILL)),
            Manner::Panic => panic!("armed to fail once {point}"),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_point_is_armed_by_its_name_and_its_count() {
            assert_eq!(parse("slot-leased"), Some((Point::SlotLeased, 0)));
            assert_eq!(parse("file-removed:3"), Some((Point::FileRemoved, 2)));
            for text in ["", "slot", "slot-leased:", "slot-leased:0", "slot-leased:x"] {
                assert_eq!(parse(text), None, "{text}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_point_has_a_name_and_a_sentence_of_its_own() {
        let mut names: Vec<&str> = Point::ALL.iter().map(|point| point.name()).collect();
        let mut sentences: Vec<String> = Point::ALL.iter().map(ToString::to_string).collect();
        names.sort_unstable();
        names.dedup();
        sentences.sort_unstable();
        sentences.dedup();
        assert_eq!(
            (names.len(), sentences.len()),
            (Point::ALL.len(), Point::ALL.len())
        );
    }
}
