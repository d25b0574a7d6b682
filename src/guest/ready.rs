//! Waits until a guest lets us in.

use std::future::Future;
use std::time::Duration;

use super::ssh::{self, Connection, Patience, Progress, Target};

/// How often the machine is asked whether it still lives: a dead one is noticed well within the ten seconds that are promised.
const ASK_MACHINE: Duration = Duration::from_secs(1);

/// Why a guest did not become ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine has ended or stopped meanwhile.
    #[error("{0}")]
    Machine(String),
    /// The machine lives, but nobody can log in.
    #[error(transparent)]
    Ssh(#[from] ssh::Error),
}

/// Logs in as soon as the guest allows it. `alive` is asked once a second and says in a sentence why the machine no longer
/// can answer; `progress` hears each step once.
pub async fn wait_ready<A, F>(
    target: Target,
    patience: Patience,
    alive: A,
    progress: impl FnMut(Progress),
) -> Result<Connection, Error>
where
    A: Fn() -> F,
    F: Future<Output = Result<(), String>>,
{
    let opened = ssh::unless(Connection::open(target, patience, progress), machine_ends(alive));
    Ok(opened.await.map_err(Error::Machine)??)
}

/// Ends with the reason when the machine no longer lives.
pub(super) async fn machine_ends<A, F>(alive: A) -> String
where
    A: Fn() -> F,
    F: Future<Output = Result<(), String>>,
{
    loop {
        tokio::time::sleep(ASK_MACHINE).await;
        if let Err(why) = alive().await {
            return why;
        }
    }
}
