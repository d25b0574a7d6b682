use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use super::choose::choose;
use crate::cli::{Context, print};
use crate::machine::Libvirt;
use crate::outcome::Failure;
use crate::record::Jobs;

/// Write a picture of a machine's screen, as PNG
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// A job as `vm list` shows it, or its number where only one job has it
    #[arg(value_name = "JOB")]
    job: String,
    /// The file to write, `-` for standard output [default: JOB.png]
    #[arg(short, long, value_name = "FILE.png")]
    output: Option<PathBuf>,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let all = Jobs::look(&settings.state_dir).list()?;
    let job = choose(&all, &arguments.job)?;
    let record = job.read()?;
    let Some(machine) = record.and_then(|record| record.machine) else {
        return Err(Failure::system(format!(
            "job {} has no machine yet, or none any more",
            job.key()
        )));
    };
    let picture = Libvirt::open(&machine.uri)?.screenshot(&machine.name).await?;
    let file = arguments
        .output
        .clone()
        .unwrap_or_else(|| PathBuf::from(format!("{}.png", job.key())));
    if file == Path::new("-") {
        let mut out = std::io::stdout();
        if out.is_terminal() {
            return Err(Failure::system("a picture is nothing for a terminal")
                .hint("Name a file with -o, or send it into a pipe"));
        }
        return out
            .write_all(&picture)
            .map_err(|e| Failure::system(format!("cannot write the picture: {e}")));
    }
    std::fs::write(&file, &picture)
        .map_err(|e| Failure::system(format!("cannot write {}: {e}", file.display())))?;
    print(&format!("{}\n", file.display()));
    Ok(())
}
