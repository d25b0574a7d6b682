use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::filter::{Filter, lists, lists_as};
use super::shown;
use crate::cli::{Context, Format, print, print_json};
use crate::image::{Digest, DiskFormat, Held};
use crate::outcome::Failure;
use crate::reap::{Images, Keeper, Users};
use crate::report::{age, bytes, table};

/// List the images that are here
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Only those whose name fits: REPOSITORY, REPOSITORY:TAG or a pattern, with the registry or without; or whose digest begins so
    #[arg(value_name = "NAME")]
    names: Vec<Filter>,
    /// How to print the list
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Print digests whole
    #[arg(long)]
    digests: bool,
    /// Print nothing but digests
    #[arg(long, short, conflicts_with = "format")]
    quiet: bool,
}

/// One line of the list; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    references: Vec<String>,
    digest: Digest,
    /// None where the image is damaged, or not verified.
    format: Option<DiskFormat>,
    /// It is compared with what came before it is used, or by `cannery image verify`.
    unverified: bool,
    virtual_size: Option<u64>,
    size: u64,
    created: Timestamp,
    last_used: Timestamp,
    pins: Vec<String>,
    jobs: Vec<String>,
    domains: Vec<String>,
    processes: Vec<u32>,
}

impl Row {
    fn of(held: &Held, users: &Users) -> Self {
        let mut row = Self {
            references: held.names.iter().map(|name| name.reference.clone()).collect(),
            digest: held.digest,
            format: held.disk.as_ref().map(|disk| disk.format),
            unverified: held.unverified,
            virtual_size: held.disk.as_ref().map(|disk| disk.virtual_size),
            size: held.size,
            created: held.created,
            last_used: held.used,
            pins: Vec::new(),
            jobs: Vec::new(),
            domains: Vec::new(),
            processes: Vec::new(),
        };
        for keeper in users.keepers(held) {
            match keeper {
                Keeper::Pin(name) => row.pins.push(name),
                Keeper::Job(key) => row.jobs.push(key.to_string()),
                Keeper::Domain(name) => row.domains.push(name),
                Keeper::Process(pid) => row.processes.push(pid),
            }
        }
        row
    }

    /// A line for each name that is asked for; what no name leads to has one, too.
    fn lines(&self, arguments: &Arguments, now: Timestamp) -> Vec<Vec<String>> {
        let digest = self.digest.to_string();
        let length = if arguments.digests {
            digest.len()
        } else {
            SHORT_DIGEST
        };
        let ago = |at: Timestamp| age(Duration::try_from(now.duration_since(at)).unwrap_or_default());
        let format = match self.format {
            Some(DiskFormat::Raw) => "raw",
            Some(DiskFormat::Qcow2) => "qcow2",
            None if self.unverified => "unverified",
            None => "damaged",
        };
        let mut kept = Vec::new();
        if !self.pins.is_empty() {
            kept.push("pinned");
        }
        if !(self.jobs.is_empty() && self.domains.is_empty() && self.processes.is_empty()) {
            kept.push("in use");
        }
        let line = |name: String| {
            vec![
                name,
                digest.chars().take(length).collect(),
                format.to_owned(),
                self.virtual_size.map_or_else(|| "-".to_owned(), bytes),
                bytes(self.size),
                ago(self.created),
                ago(self.last_used),
                if kept.is_empty() {
                    "-".to_owned()
                } else {
                    kept.join(", ")
                },
            ]
        };
        if self.references.is_empty() {
            return vec![line("<none>".to_owned())];
        }
        let names = self.references.iter();
        let listed = names.filter(|name| lists_as(&arguments.names, &self.digest, name));
        listed.map(|name| line(shown(name))).collect()
    }
}

/// `sha256:` and twelve digits, as docker and podman show them.
const SHORT_DIGEST: usize = 19;

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let images = Images::open(&settings)?;
    let mut all = images.store().inventory()?;
    all.retain(|held| lists(&arguments.names, held));
    if arguments.quiet {
        let digests = all.iter().map(|held| format!("{}\n", held.digest));
        print(&digests.collect::<String>());
        return Ok(());
    }
    let users = match images.users().await {
        Ok(users) => users,
        // A list is good for something without it.
        Err(failure) => {
            context.log.line(format!(
                "cannery: which machines use an image is not known: {failure}"
            ));
            Users::default()
        }
    };
    let rows: Vec<Row> = all.iter().map(|held| Row::of(held, &users)).collect();
    match arguments.format {
        Format::Json => print_json(&rows),
        Format::Table => {
            let now = Timestamp::now();
            let mut lines: Vec<_> = rows.iter().flat_map(|row| row.lines(arguments, now)).collect();
            lines.sort();
            print(&table(
                &[
                    "REFERENCE",
                    "DIGEST",
                    "FORMAT",
                    "VIRTUAL",
                    "ON DISK",
                    "CREATED",
                    "USED",
                    "KEPT",
                ],
                &lines,
            ));
            Ok(())
        }
    }
}
