use serde::Serialize;

use crate::cli::{Context, Format, print, print_json};
use crate::image::{Going, Policy};
use crate::outcome::Failure;
use crate::quantity::{Size, Span};
use crate::reap::Images;
use crate::report::bytes;

/// Remove images that nothing keeps: without an option, those that no name leads to any more
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Arguments {
    /// Also those that have names
    #[arg(long, short)]
    all: bool,
    /// Those that were not used for so long, such as 7d
    #[arg(long, value_name = "TIME", value_parser = with_unit)]
    older_than: Option<Span>,
    /// The least recently used, until all together take no more than this, such as 100G
    #[arg(long, value_name = "SIZE")]
    max_size: Option<Size>,
    /// Of each repository all but the newest so many; with other options, these stay in any case
    #[arg(long, value_name = "N")]
    keep_last: Option<usize>,
    /// Only say what would go
    #[arg(long)]
    dry_run: bool,
    /// How to print what went
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

/// A length of time. A bare number would be seconds, and who writes 7 means days.
fn with_unit(text: &str) -> Result<Span, String> {
    let bare = text.bytes().all(|byte| byte.is_ascii_digit());
    if bare && text.bytes().any(|byte| byte != b'0') {
        return Err(format!("write which unit is meant, for example {text}d"));
    }
    text.parse()
}

/// What went; the JSON's keys are these names.
#[derive(Debug, Serialize)]
struct Row {
    digest: String,
    bytes: u64,
    reason: String,
}

pub(super) async fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let images = Images::open(&settings)?;
    let policy = Policy {
        all: arguments.all,
        older_than: arguments.older_than.map(|span| span.0),
        keep_last: arguments.keep_last,
        max_size: arguments.max_size.map(Size::bytes),
        free: 0,
    };
    let gone: Vec<Going> = if arguments.dry_run {
        images.plan(&policy).await?
    } else {
        images.prune(&policy).await?
    };
    if arguments.format == Format::Json {
        let row = |going: &Going| Row {
            digest: going.digest.to_string(),
            bytes: going.bytes,
            reason: going.reason.to_string(),
        };
        return print_json(&gone.iter().map(row).collect::<Vec<_>>());
    }
    let (each, all) = if arguments.dry_run {
        ("would delete", "would be free")
    } else {
        ("Deleted:", "freed")
    };
    for going in &gone {
        print(&format!(
            "{each} {} ({}): {}\n",
            going.digest,
            bytes(going.bytes),
            going.reason
        ));
    }
    let total = gone.iter().map(|going| going.bytes).sum();
    print(&format!("{} {all}.\n", bytes(total)));
    Ok(())
}
