//! What the job log says of the job's console: its address, and who gets in there.
//!
//! Everybody who may read the job log reads it, so that the address alone opens nothing. Where the operator wants it otherwise, it has a
//! ticket behind it; but not where the job's ref is protected: such jobs have variables that not everybody is to have.

use jiff::Timestamp;

use crate::record::JobDir;
use crate::secret::Secret;
use crate::settings::{Access, ConsoleSettings};
use crate::ticket::{self, Grant, Mode, WITH_THE_JOB};

/// Who minted the ticket, for lists and the audit log.
const BY: &str = "the job log";

/// Is the job log to have a ticket? With the reason where the operator wants one and the job is not to have it. Pure.
fn may_have_link(access: Access, protected: Option<bool>) -> Result<bool, &'static str> {
    match (access, protected) {
        (Access::Ticket, _) => Ok(false),
        (Access::Link, Some(false)) => Ok(true),
        (Access::Link, Some(true)) => Err("no open link: the job's ref is protected"),
        (Access::Link, None) => Err("no open link: GitLab does not say whether the job's ref is protected"),
    }
}

/// The lines of the job log; mints the ticket that is in them, where one is to be.
pub(super) fn lines(console: &ConsoleSettings, job: &JobDir, protected: Option<bool>) -> Vec<String> {
    let (link, why) = match may_have_link(console.access, protected) {
        Ok(true) => match mint(console, job) {
            Ok(text) => (Some(text), None),
            Err(e) => {
                // The job can do without.
                tracing::warn!("the job log gets no link to the console: {e}");
                (None, Some("no open link: the runner's host failed to make one"))
            }
        },
        Ok(false) => (None, None),
        Err(why) => (None, Some(why)),
    };
    let page = console.page(job.key());
    if let Some(link) = link {
        return vec![
            format!("Console: {} (for whoever reads this).", ticket::address(&page, &link)),
            "Warning: whoever can read this job log can enter this job's machine while it is there, and has its variables, \
             also those that are masked here."
                .to_owned(),
        ];
    }
    let who = match &console.gitlab {
        Some(_) => "for Developers of the project and above",
        None => "ask the runner's operator for a ticket",
    };
    let why = why.map_or(String::new(), |why| format!("; {why}"));
    vec![format!("Console: {page} ({who}{why}).")]
}

fn mint(console: &ConsoleSettings, job: &JobDir) -> Result<Secret, ticket::Error> {
    let grant = Grant::new(
        Mode::Full,
        Timestamp::now(),
        WITH_THE_JOB,
        console.viewers,
        BY.to_owned(),
    );
    Ok(ticket::mint(job, &grant)?.0)
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::*;
    use crate::record::{Caller, JobKey, Jobs, Record, State};
    use crate::settings::{Settings, Sources};

    /// The settings of a console with this line.
    pub(in crate::stage) fn console(line: &str) -> ConsoleSettings {
        let text = format!(
            "[console]\nurl = \"https://ci.example.com\"\ncertificate = \"/c\"\nkey = \"/k\"\n{line}"
        );
        let file = crate::settings::parse(&text, Path::new("x")).unwrap();
        let settings = Settings::resolve(file, Path::new("x"), &Sources::default()).unwrap();
        settings.console.unwrap()
    }

    fn job(folder: &Path) -> JobDir {
        let now = Timestamp::now();
        let key = JobKey::new("https://gitlab.example.com", 1, 0);
        let record = Record::new(key, "/tmp/x".into(), Caller::this(), now, now);
        Jobs::open(folder).unwrap().create(record).unwrap()
    }

    const LINK: &str = "access = \"link\"\n";
    const GITLAB: &str = "gitlab_url = \"https://gitlab.example.com\"\ngitlab_application = \"a\"\n";

    #[test]
    fn a_job_log_has_no_ticket_unless_the_operator_wants_it_and_gitlab_says_that_the_ref_is_not_protected() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        for (line, protected, part) in [
            ("", Some(false), "ask the runner's operator for a ticket)."),
            ("access = \"ticket\"", Some(false), "for a ticket)."),
            (GITLAB, Some(false), "(for Developers of the project and above)."),
            (
                LINK,
                Some(true),
                "for a ticket; no open link: the job's ref is protected).",
            ),
            (LINK, None, "for a ticket; no open link: GitLab does not say"),
        ] {
            let lines = lines(&console(line), &job, protected);
            let begin = format!("Console: https://ci.example.com/jobs/{} (", job.key());
            assert!(
                lines[0].starts_with(&begin) && lines[0].contains(part),
                "{lines:?}"
            );
            assert_eq!(lines.len(), 1);
        }
        assert_eq!(ticket::list(&job).unwrap(), []);
    }

    #[test]
    fn a_link_lets_whoever_reads_the_job_log_in_until_the_job_is_cleaned_up_and_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let lines = lines(&console(&format!("{LINK}{GITLAB}viewers = 5")), &job, Some(false));
        let (_, rest) = lines[0].split_once("#ticket=").unwrap();
        let text = rest.split(' ').next().unwrap();
        assert!(
            lines[1].starts_with("Warning: whoever can read this job log"),
            "{lines:?}"
        );
        let years = Timestamp::now()
            .saturating_add(jiff::SignedDuration::from_hours(100_000))
            .unwrap();
        let redeemed = ticket::redeem_for(&job, text, years).unwrap().unwrap();
        assert_eq!((redeemed.grant.mode, redeemed.grant.viewers), (Mode::Full, 5));
        drop(job.enter(State::Cleaning, |_| ()).unwrap());
        assert!(ticket::redeem_for(&job, text, Timestamp::now()).unwrap().is_err());
    }

    #[test]
    fn a_job_whose_link_cannot_be_made_has_a_console_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        drop(job.enter(State::Cleaning, |_| ()).unwrap());
        let lines = lines(&console(LINK), &job, Some(false));
        assert_eq!(lines.len(), 1);
        assert!(
            !lines[0].contains('#') && lines[0].contains("failed to make one"),
            "{lines:?}"
        );
    }
}
