//! How a machine is, and what that means for its job (pure).

/// A machine's state, as [`Libvirt::state`](super::libvirt::Libvirt::state) reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It runs.
    Running,
    /// It is stopped and could go on.
    Paused(PauseCause),
    /// The guest suspended itself.
    Asleep,
    /// The guest's kernel panicked; the stopped machine is still there.
    Crashed,
    /// It is just going down.
    Ending,
    /// libvirt does not know it (any more).
    Gone,
    /// A state that this version does not know; taken for alive.
    Other,
}

/// Why a machine is paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseCause {
    /// The host could not read or write the disk.
    IoError,
    /// Somebody suspended it.
    Someone,
    /// A watchdog device fired.
    Watchdog,
    /// The guest crashed.
    Crash,
    /// It is about to start.
    Starting,
    /// Saving, dumping, migrating, or something newer than this version.
    Other,
}

/// What a state means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// Go on.
    Alive,
    /// It will do no more for this job. The sentence has the machine as its subject.
    Dead(&'static str),
    /// It does nothing now and may go on.
    Paused {
        /// What stopped it; the machine is its subject.
        why: &'static str,
        /// Whether it can be expected to go on by itself. A machine that somebody suspended may be waited for; one that
        /// the host's disk stopped is lost to the job.
        waits: bool,
    },
}

/// Judges a state.
pub fn judge(state: State) -> Judgement {
    let paused = |why, waits| Judgement::Paused { why, waits };
    match state {
        // One that is just going down is soon gone, and then its log says why.
        State::Running | State::Ending | State::Other => Judgement::Alive,
        State::Crashed | State::Paused(PauseCause::Crash) => Judgement::Dead("the machine's kernel panicked"),
        State::Gone => Judgement::Dead("the machine is gone"),
        State::Asleep => Judgement::Dead("the machine's guest suspended itself"),
        State::Paused(PauseCause::IoError) => paused(
            "the machine was stopped because the host could not write its disk",
            false,
        ),
        State::Paused(PauseCause::Watchdog) => Judgement::Dead("the machine was stopped by its watchdog"),
        State::Paused(PauseCause::Someone) => paused("the machine was suspended by somebody", true),
        State::Paused(PauseCause::Starting) => paused("the machine is being started", true),
        State::Paused(PauseCause::Other) => paused("the machine is paused", true),
    }
}

/// Reads from the end of a serial log why a machine is gone: libvirt itself forgets a transient machine together with
/// the reason. `None` where the log says nothing, as when QEMU was killed.
///
/// The log is written by the guest, so this explains and never decides.
pub fn last_words(serial_tail: &str) -> Option<&'static str> {
    const SIGNS: [(&str, &str); 6] = [
        ("reboot: Restarting system", "its guest rebooted"),
        ("reboot: machine restart", "its guest rebooted"),
        ("reboot: Power down", "its guest powered off"),
        ("reboot: System halted", "its guest halted"),
        ("Kernel panic - not syncing", "its kernel panicked"),
        ("Out of memory: Killed process 1 ", "its guest ran out of memory"),
    ];
    serial_tail
        .lines()
        .rev()
        .find_map(|line| SIGNS.iter().find(|(sign, _)| line.contains(sign)))
        .map(|(_, meaning)| *meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_come_back_is_dead() {
        for state in [State::Crashed, State::Gone, State::Asleep] {
            assert!(matches!(judge(state), Judgement::Dead(_)), "{state:?}");
        }
        for state in [State::Running, State::Ending, State::Other] {
            assert_eq!(judge(state), Judgement::Alive, "{state:?}");
        }
    }

    #[test]
    fn a_full_host_is_not_waited_for_and_a_suspended_machine_is() {
        let waits = |cause| match judge(State::Paused(cause)) {
            Judgement::Paused { waits, .. } => Some(waits),
            _ => None,
        };
        assert_eq!(waits(PauseCause::IoError), Some(false));
        assert_eq!(waits(PauseCause::Someone), Some(true));
        assert_eq!(waits(PauseCause::Starting), Some(true));
        assert_eq!(waits(PauseCause::Crash), None);
    }

    #[test]
    fn the_last_sign_counts() {
        let log = "[ 1.0] Kernel panic - not syncing: test\nbooted again\n[ 9.1] reboot: Power down\n";
        assert_eq!(last_words(log), Some("its guest powered off"));
        assert_eq!(last_words("login:"), None);
    }
}
