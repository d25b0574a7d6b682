use serde::Serialize;

use super::shown;
use crate::cli::{Context, Format, print, print_json};
use crate::image::{Disk, DiskFormat};
use crate::outcome::Failure;
use crate::report::{bytes, table};
use crate::stage::images;

/// List the images that are here
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// How to print the list
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Print digests whole
    #[arg(long)]
    digests: bool,
}

/// One line of the list; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    reference: String,
    digest: String,
    format: DiskFormat,
    virtual_size: u64,
}

impl Row {
    fn of(disk: Disk) -> Self {
        Self {
            digest: disk.digest.to_string(),
            format: disk.format,
            virtual_size: disk.virtual_size,
            reference: disk.reference,
        }
    }

    fn cells(&self, digests: bool) -> Vec<String> {
        let length = if digests { self.digest.len() } else { SHORT_DIGEST };
        vec![
            shown(&self.reference),
            self.digest.chars().take(length).collect(),
            match self.format {
                DiskFormat::Raw => "raw".to_owned(),
                DiskFormat::Qcow2 => "qcow2".to_owned(),
            },
            bytes(self.virtual_size),
        ]
    }
}

/// `sha256:` and twelve digits, as docker and podman show them.
const SHORT_DIGEST: usize = 19;

pub(super) fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let rows: Vec<Row> = images::store(&settings)?
        .list()?
        .into_iter()
        .map(Row::of)
        .collect();
    match arguments.format {
        Format::Json => print_json(&rows),
        Format::Table => {
            let cells: Vec<_> = rows.iter().map(|row| row.cells(arguments.digests)).collect();
            print(&table(&["REFERENCE", "DIGEST", "FORMAT", "VIRTUAL"], &cells));
            Ok(())
        }
    }
}
