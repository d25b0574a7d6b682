//! What guests of our network may reach: two nftables tables beside whatever else the host has.
//!
//! libvirt rewrites its own chains, so ours are in tables of their own, whose names are `cannery_<network>`:
//!
//! * family `bridge`, where frames enter from the taps: a guest sends from its slot's MAC and address only, no IPv6, no
//!   VLAN tags, and to no other guest;
//! * family `inet`: of the host a guest reaches DHCP, DNS, an echo and the ports that the operator opened; it does not
//!   reach other guests through the gateway, nor ports that the host forwards elsewhere (as container engines do),
//!   nor link-local addresses, where clouds keep their machines' credentials. The rest of the world is open.
//!
//! An `accept` here ends only our own table: a host firewall that drops a packet still drops it.
//!
//! The rules name interfaces by text and so can be there before the interfaces are. They are loaded in one
//! transaction; whoever replaces them leaves no moment without.

use std::fmt::Write as _;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::{NetworkPlan, Protocol};
use crate::children;
use crate::kill::{self, Point};
use crate::record::{hidden, make_finished, write_atomic};

/// Deadline of one run of `nft`, which takes 10 ms; it waits where another program is changing rules.
const NFT_DEADLINE: Duration = Duration::from_secs(15);

/// Where `nft` is looked for. Not the caller's own path: it runs as root, and a user's path often lacks sbin.
const NFT_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The kernel's name of this boot; rules do not outlive it.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why the rules are not in place. All are the operator's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Only root can load rules, and root has not done so since the host started.
    #[error(
        "the firewall of network {0} is not loaded, and only root can load it: run `cannery network up` as root once after each start of the host"
    )]
    NotLoaded(String),
    /// `nft` is not installed or cannot be run.
    #[error("nft cannot be run: {0}")]
    Tool(io::Error),
    /// `nft` took too long.
    #[error("nft did not finish within {} s", NFT_DEADLINE.as_secs())]
    Late,
    /// `nft` said no.
    #[error("nft refused the firewall of network {name}: {reason}")]
    Refused {
        /// Which network.
        name: String,
        /// The first line of what it said.
        reason: String,
    },
    /// The note about the rules cannot be written or read.
    #[error("{} cannot be used: {source}", path.display())]
    Note {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What root noted when it loaded the rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// The boot in which they were loaded.
    boot: String,
    /// Hash of the rules as we wrote them.
    rules: String,
    /// Hash of the rules as nft listed them thereafter.
    listing: String,
}

/// Writes the rules, as `nft -f -` reads them. Pure.
pub fn rules(plan: &NetworkPlan) -> String {
    let mut text = String::new();
    for family in ["bridge", "inet"] {
        // Made, emptied and filled in one transaction, whether it was there or not.
        let table = format!("{family} {}", table(plan));
        let body = match family {
            "bridge" => bridge_rules(plan),
            _ => inet_rules(plan),
        };
        // Writing to a string cannot fail.
        let _ = write!(
            text,
            "add table {table}\ndelete table {table}\ntable {table} {{\n{body}}}\n"
        );
    }
    text
}

fn table(plan: &NetworkPlan) -> String {
    format!("cannery_{}", plan.name)
}

fn bridge_rules(plan: &NetworkPlan) -> String {
    let slots = plan.slots();
    let list = |write: &dyn Fn(&super::Slot) -> String| {
        slots.iter().map(write).collect::<Vec<_>>().join(",\n      ")
    };
    let cards = list(&|slot| format!("\"{}\" . {}", slot.tap, slot.mac));
    let places = list(&|slot| format!("\"{}\" . {} . {}", slot.tap, slot.mac, slot.address));
    let taps = format!("\"{}-*\"", plan.bridge);
    format!(
        "  set cards {{
    type ifname . ether_addr
    elements = {{
      {cards}
    }}
  }}
  set places {{
    type ifname . ether_addr . ipv4_addr
    elements = {{
      {places}
    }}
  }}
  chain from_guest {{
    iifname . ether saddr != @cards drop
    ether type ip iifname . ether saddr . ip saddr @places accept
    ether type ip ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    ether type arp iifname . arp saddr ether . arp saddr ip @places accept
    ether type arp arp operation request iifname . arp saddr ether @cards arp saddr ip 0.0.0.0 accept
    drop
  }}
  chain enter {{
    type filter hook prerouting priority -300; policy accept;
    iifname {taps} jump from_guest
  }}
  chain pass {{
    type filter hook forward priority -200; policy accept;
    iifname {taps} oifname {taps} drop
  }}
"
    )
}

fn inet_rules(plan: &NetworkPlan) -> String {
    let (bridge, gateway) = (format!("\"{}\"", plan.bridge), plan.gateway());
    let ports = |protocol: Protocol| {
        let mut ports: Vec<u16> = plan
            .host_ports
            .iter()
            .filter(|open| open.protocol == protocol)
            .map(|open| open.port)
            .collect();
        ports.sort_unstable();
        ports.dedup();
        if ports.is_empty() {
            return String::new();
        }
        let list: Vec<String> = ports.iter().map(u16::to_string).collect();
        format!("\n    elements = {{ {} }}", list.join(", "))
    };
    let (tcp, udp) = (ports(Protocol::Tcp), ports(Protocol::Udp));
    format!(
        "  set tcp_ports {{
    type inet_service{tcp}
  }}
  set udp_ports {{
    type inet_service{udp}
  }}
  chain to_host {{
    ct state established,related accept
    meta nfproto ipv6 drop
    udp sport 68 udp dport 67 accept
    ip daddr {gateway} udp dport 53 accept
    ip daddr {gateway} tcp dport 53 accept
    ip daddr {gateway} icmp type echo-request accept
    tcp dport @tcp_ports accept
    udp dport @udp_ports accept
    drop
  }}
  chain to_world {{
    oifname {bridge} drop
    meta nfproto ipv6 drop
    ip daddr 169.254.0.0/16 drop
    ct direction original ct status dnat meta l4proto tcp ct original proto-dst @tcp_ports accept
    ct direction original ct status dnat meta l4proto udp ct original proto-dst @udp_ports accept
    ct direction original ct status dnat drop
  }}
  chain enter {{
    type filter hook input priority -10; policy accept;
    iifname {bridge} jump to_host
  }}
  chain pass {{
    type filter hook forward priority -10; policy accept;
    iifname {bridge} jump to_world
  }}
"
    )
}

/// Sees to it that the rules are in place; returns whether they had to be loaded. Rules that are right are not touched.
///
/// Root looks at the rules themselves. Another caller cannot, and trusts the note that root left in `state_dir` in this
/// boot.
///
/// # Errors
/// See [`Error`].
pub async fn provide(plan: &NetworkPlan, state_dir: &Path) -> Result<bool, Error> {
    let rules = rules(plan);
    let path = note_path(plan, state_dir);
    let boot = read(Path::new(BOOT_ID))?.unwrap_or_default().trim().to_owned();
    let note = read(&path)?.and_then(|text| serde_json::from_str(&text).ok());
    let root = rustix::process::geteuid().is_root();
    match standing(root, note.as_ref(), &boot, &hash(&rules)) {
        Standing::Trusted => return Ok(false),
        Standing::Unloadable => return Err(Error::NotLoaded(plan.name.clone())),
        Standing::Compare(noted) => {
            if list(plan).await?.is_some_and(|listing| hash(&listing) == noted) {
                return Ok(false);
            }
        }
        Standing::Missing => {}
    }
    load(plan, &rules).await?;
    kill::point(Point::FirewallLoaded);
    let listing = list(plan).await?.ok_or_else(|| Error::Refused {
        name: plan.name.clone(),
        reason: "the rules were gone as soon as they were loaded".to_owned(),
    })?;
    write_note(
        &path,
        &Note {
            boot,
            rules: hash(&rules),
            listing: hash(&listing),
        },
    )?;
    kill::point(Point::FirewallNoted);
    Ok(true)
}

/// What a note says about the rules.
#[derive(Debug, PartialEq, Eq)]
enum Standing<'a> {
    /// They are there, says root.
    Trusted,
    /// They are not there, and this caller cannot load them.
    Unloadable,
    /// They are there if nft lists them with this hash.
    Compare(&'a str),
    /// They are to be loaded.
    Missing,
}

fn standing<'a>(root: bool, note: Option<&'a Note>, boot: &str, rules: &str) -> Standing<'a> {
    // A boot that cannot be told apart from others proves nothing.
    let note = note.filter(|note| !boot.is_empty() && note.boot == boot && note.rules == rules);
    match (root, note) {
        (false, Some(_)) => Standing::Trusted,
        (false, None) => Standing::Unloadable,
        (true, Some(note)) => Standing::Compare(&note.listing),
        (true, None) => Standing::Missing,
    }
}

/// Takes the rules down; rules that are not there are fine.
///
/// # Errors
/// Where the caller is not root, what nft says.
pub async fn remove(plan: &NetworkPlan, state_dir: &Path) -> Result<(), Error> {
    let mut text = String::new();
    for family in ["bridge", "inet"] {
        // Deleting what is not there is an error, adding what is there is none.
        let table = format!("{family} {}", table(plan));
        let _ = writeln!(text, "add table {table}\ndelete table {table}");
    }
    load(plan, &text).await?;
    let path = note_path(plan, state_dir);
    match std::fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Note { path, source }),
        _ => Ok(()),
    }
}

/// Where the note lies; beside it is the lock of [`super::provide()`].
pub(super) fn note_path(plan: &NetworkPlan, state_dir: &Path) -> PathBuf {
    state_dir.join("networks").join(format!("{}.json", plan.name))
}

/// The folder of notes about networks. Only its maker writes to it, since callers that are not root believe the notes.
pub(super) fn make_folder(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    // Whatever the umask is: others must read the notes.
    make_finished(folder, &hidden(folder), |folder| {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))
    })
}

async fn load(plan: &NetworkPlan, rules: &str) -> Result<(), Error> {
    let output = nft(&["-f", "-"], rules).await?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let reason = stderr.lines().find(|line| !line.trim().is_empty());
    Err(Error::Refused {
        name: plan.name.clone(),
        reason: reason.unwrap_or("it gave no reason").trim().to_owned(),
    })
}

/// Both tables as nft lists them, without counters; `None` where one is missing.
async fn list(plan: &NetworkPlan) -> Result<Option<String>, Error> {
    let mut text = String::new();
    for family in ["bridge", "inet"] {
        let output = nft(&["-s", "list", "table", family, &table(plan)], "").await?;
        if !output.status.success() {
            return Ok(None);
        }
        text.push_str(&String::from_utf8_lossy(&output.stdout));
    }
    Ok(Some(text))
}

async fn nft(arguments: &[&str], input: &str) -> Result<Output, Error> {
    let mut command = Command::new("nft");
    command
        .args(arguments)
        .env("PATH", NFT_PATH)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    children::end_with_us(&mut command);
    let mut child = command.spawn().map_err(Error::Tool)?;
    let run = async {
        if let Some(mut stdin) = child.stdin.take() {
            // An nft that stops reading says why on its stderr.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    tokio::time::timeout(NFT_DEADLINE, run)
        .await
        .map_err(|_| Error::Late)?
        .map_err(Error::Tool)
}

fn hash(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

fn read(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Note {
            path: path.to_owned(),
            source,
        }),
    }
}

/// Writes the note, which another process may be reading.
fn write_note(path: &Path, note: &Note) -> Result<(), Error> {
    let failed = |source: io::Error| Error::Note {
        path: path.to_owned(),
        source,
    };
    let text = serde_json::to_string(note).map_err(|error| failed(error.into()))?;
    if let Some(folder) = path.parent() {
        make_folder(folder).map_err(failed)?;
    }
    // Whatever the umask is: callers that are not root read it.
    write_atomic(path, text.as_bytes(), 0o644).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::super::HostPort;
    use super::super::plan::tests::plan;
    use super::*;

    #[test]
    fn each_slot_is_pinned() {
        let text = rules(&plan());
        for slot in plan().slots() {
            let place = format!("\"{}\" . {} . {}", slot.tap, slot.mac, slot.address);
            assert_eq!(text.matches(&place).count(), 1, "{place}");
        }
        assert_eq!(text.matches("cannery_cannery").count(), 6);
    }

    #[test]
    fn opened_ports_are_listed_once_and_in_order() {
        let port = |protocol, port| HostPort { protocol, port };
        let open = NetworkPlan {
            host_ports: vec![
                port(Protocol::Tcp, 8080),
                port(Protocol::Tcp, 22),
                port(Protocol::Tcp, 8080),
                port(Protocol::Udp, 123),
            ],
            ..plan()
        };
        let text = rules(&open);
        assert!(text.contains("elements = { 22, 8080 }"), "{text}");
        assert!(text.contains("elements = { 123 }"), "{text}");
        assert_ne!(hash(&text), hash(&rules(&plan())));
    }

    #[test]
    fn a_note_of_another_boot_or_plan_is_none() {
        let note = Note {
            boot: "b".to_owned(),
            rules: "r".to_owned(),
            listing: "l".to_owned(),
        };
        let nameless = Note {
            boot: String::new(),
            ..note.clone()
        };
        let some = Some(&note);
        assert_eq!(standing(true, some, "b", "r"), Standing::Compare("l"));
        assert_eq!(standing(false, some, "b", "r"), Standing::Trusted);
        for (note, boot, rules) in [
            (None, "b", "r"),
            (some, "c", "r"),
            (some, "b", "s"),
            (Some(&nameless), "", "r"),
        ] {
            assert_eq!(standing(true, note, boot, rules), Standing::Missing);
            assert_eq!(standing(false, note, boot, rules), Standing::Unloadable);
        }
    }

    #[test]
    fn a_note_is_written_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = note_path(&plan(), folder.path());
        assert!(read(&path).unwrap().is_none());
        let note = Note {
            boot: "b".to_owned(),
            rules: "r".to_owned(),
            listing: "l".to_owned(),
        };
        write_note(&path, &note).unwrap();
        let text = read(&path).unwrap().unwrap();
        assert_eq!(serde_json::from_str::<Note>(&text).unwrap(), note);
    }
}
