use super::{Context, print};
use crate::machine::{Libvirt, network};
use crate::outcome::Failure;
use crate::record::Jobs;
use crate::settings::{Network, Settings};
use crate::stage;

/// Make and remove cannery's own network and its firewall
///
/// Calls by root make them when they are missing. Where gitlab-runner is not root, root runs `network up` once after each boot.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Make the network and its firewall where they are missing
    Up,
    /// Remove both; refused while jobs have machines
    Down,
}

pub(super) async fn run(context: &Context, command: &Command) -> Result<(), Failure> {
    let settings = context.settings()?;
    let Network::Own(own) = &settings.network else {
        return Err(
            Failure::system("the settings name a network of your own, which cannery leaves alone")
                .hint("Without network.libvirt_network cannery makes its own"),
        );
    };
    let plan = stage::network_plan(own);
    let libvirt = Libvirt::open(&settings.libvirt_uri)?;
    let name = &own.name;
    match command {
        Command::Up => {
            let provided = network::provide(&libvirt, &plan, &settings.state_dir).await?;
            let what = match (provided.started, provided.firewall_loaded) {
                (true, _) => "is up",
                (false, true) => "was up; its firewall is loaded again",
                (false, false) => "was up already",
            };
            print(&format!(
                "Network {name} ({}, {} slots) {what}.\n",
                own.subnet, own.slots
            ));
        }
        Command::Down => {
            refuse_in_use(&settings, name)?;
            network::remove(&libvirt, &plan, &settings.state_dir).await?;
            print(&format!("Network {name} is gone.\n"));
        }
    }
    Ok(())
}

/// Nobody's machine loses its network.
fn refuse_in_use(settings: &Settings, name: &str) -> Result<(), Failure> {
    let mut users = Vec::new();
    for job in Jobs::look(&settings.state_dir).list()? {
        let on_it = job
            .read()
            .is_ok_and(|r| r.and_then(|r| r.slot).is_some_and(|s| s.network == *name));
        if on_it {
            users.push(job.key().to_string());
        }
    }
    if users.is_empty() {
        return Ok(());
    }
    Err(
        Failure::system(format!("the network {name} is in use by {}", users.join(", ")))
            .hint("Wait for these jobs, or remove them with `cannery vm rm`"),
    )
}
