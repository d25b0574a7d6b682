use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::Context;
use crate::outcome::Failure;
use crate::serve;
use crate::settings::Access;

/// Serve the console: pages on which people see and enter the machines of jobs
///
/// SIGHUP has the certificate read again; SIGTERM ends it. docs/consoles.md says what the settings need.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {}

pub(super) async fn run(context: &Context, _: &Arguments) -> Result<(), Failure> {
    let settings = context.settings()?;
    let listen = |kind| signal(kind).map_err(|e| Failure::system(format!("cannot listen for signals: {e}")));
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let mut hang_up = listen(SignalKind::hangup())?;
    let (reload, reloads) = mpsc::channel(1);
    let stop = async {
        loop {
            tokio::select! {
                _ = terminate.recv() => return,
                _ = interrupt.recv() => return,
                _ = hang_up.recv() => {
                    // One that waits already reads the files later than now.
                    let _ = reload.try_send(());
                }
            }
        }
    };
    let page = settings.console.as_ref().map(|console| console.origin());
    let link = settings
        .console
        .as_ref()
        .is_some_and(|console| console.access == Access::Link);
    let ready = |address| {
        context.log.line(format!(
            "cannery: the console {} is served on {address}.",
            page.unwrap_or_default()
        ));
        if link {
            context.log.line(
                "cannery: warning: console.access is \"link\": whoever can read a job's log gets into its machine, except where \
                 the job's ref is protected.",
            );
        }
    };
    serve::serve(settings, ready, reloads, stop).await
}
