//! What libvirt does with domains.

use std::net::IpAddr;

use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::{Domain, DomainPausedReason, DomainShutoffReason, DomainState, DomainStateReason};
use virt::error::ErrorNumber;
use virt::sys;

use super::super::placement::{Mac, Owner};
use super::super::watch::{PauseCause, State};
use super::super::xml::domain::read_owner;
use super::super::xml::{Node, OWNER_NAMESPACE};
use super::{END_DEADLINE, Error, Libvirt, QUERY_DEADLINE, START_DEADLINE, is};

/// A domain that bears our tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Whose it is.
    pub owner: Owner,
}

impl Libvirt {
    /// Starts a transient machine from the XML that [`render`](super::super::xml::domain::render) wrote.
    ///
    /// Where the connection breaks after libvirt had begun, the machine of that UUID is taken for started.
    ///
    /// # Errors
    /// libvirt's refusal ([`Error::Refused`]) is the operator's: memory, a missing network, a name in use.
    pub async fn create(&self, name: &str, uuid: Uuid, xml: String) -> Result<(), Error> {
        let mut again = false;
        self.call(
            format!("start machine {name}"),
            START_DEADLINE,
            move |connection| {
                if again && connection.lookup_domain_by_uuid_string(&uuid.to_string()).is_ok() {
                    return Ok(());
                }
                again = true;
                connection.create_domain_xml(&xml, sys::VIR_DOMAIN_NONE).map(drop)
            },
        )
        .await
    }

    /// How a machine is. One that libvirt does not know is [`State::Gone`], not an error.
    ///
    /// # Errors
    /// Only where libvirt cannot be asked; that says nothing about the machine.
    pub async fn state(&self, name: &str) -> Result<State, Error> {
        let wanted = name.to_owned();
        self.call(
            format!("tell the state of machine {name}"),
            QUERY_DEADLINE,
            move |connection| {
                Ok(match find(connection, &wanted)? {
                    Some(domain) => gone_if_missing(state_of(&domain))?.unwrap_or(State::Gone),
                    None => State::Gone,
                })
            },
        )
        .await
    }

    /// Ends a machine at once and for good; one that is already gone is fine. Returns whether there was one.
    ///
    /// # Errors
    /// [`Error::Late`] where QEMU does not die, which only the host's administrator can mend.
    pub async fn destroy(&self, name: &str) -> Result<bool, Error> {
        let wanted = name.to_owned();
        self.call(format!("end machine {name}"), END_DEADLINE, move |connection| {
            let Some(domain) = find(connection, &wanted)? else {
                return Ok(false);
            };
            match domain.destroy() {
                // It ended by itself in between.
                Err(error) if is(&error, ErrorNumber::OperationInvalid) => Ok(true),
                result => gone_if_missing(result).map(|_| true),
            }
        })
        .await
    }

    /// All domains that bear our tag, of whatever state folder.
    ///
    /// # Errors
    /// Where libvirt cannot be asked.
    pub async fn list_ours(&self) -> Result<Vec<Known>, Error> {
        self.call("list the machines".to_owned(), QUERY_DEADLINE, |connection| {
            let mut ours = Vec::new();
            for domain in connection.list_all_domains(0)? {
                // Domains end and foreign ones come and go while we look: those are simply not in the list.
                let found = known(&domain);
                match found {
                    Err(error) if is(&error, ErrorNumber::NoDomain) => {}
                    Err(error) if is(&error, ErrorNumber::NoDomainMetadata) => {}
                    result => ours.extend(result?),
                }
            }
            Ok(ours)
        })
        .await
    }

    /// A running machine's XML as libvirt would send it to another host: every detail that a guest can see.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no such machine.
    pub async fn migratable_xml(&self, name: &str) -> Result<String, Error> {
        let wanted = name.to_owned();
        self.call(
            format!("describe machine {name}"),
            QUERY_DEADLINE,
            move |connection| {
                let domain = connection.lookup_domain_by_name(&wanted)?;
                domain.xml_desc(sys::VIR_DOMAIN_XML_MIGRATABLE)
            },
        )
        .await
    }

    /// Addresses that a card of a foreign network has, as far as libvirt can tell: from its own leases, from the
    /// guest's agent, from the host's neighbour table; the first source that knows one wins. Link-local and loopback
    /// addresses are left out. Empty while nothing is known.
    ///
    /// # Errors
    /// Where libvirt cannot be asked; a source that has no answer is none.
    pub async fn addresses(&self, name: &str, mac: Mac) -> Result<Vec<IpAddr>, Error> {
        let wanted = name.to_owned();
        self.call(
            format!("tell the address of machine {name}"),
            QUERY_DEADLINE,
            move |connection| {
                let Some(domain) = find(connection, &wanted)? else {
                    return Ok(Vec::new());
                };
                let sources = [
                    sys::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_LEASE,
                    sys::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT,
                    sys::VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_ARP,
                ];
                for source in sources {
                    // No agent, no lease file, no neighbour table: each is an error of its own kind, and none is news.
                    let Ok(cards) = domain.interface_addresses(source, 0) else {
                        continue;
                    };
                    let found: Vec<IpAddr> = cards
                        .into_iter()
                        .filter(|card| card.hwaddr.as_deref().and_then(|text| text.parse().ok()) == Some(mac))
                        .flat_map(|card| card.addrs)
                        .filter_map(|address| address.addr.parse().ok())
                        .filter(usable)
                        .collect();
                    if !found.is_empty() {
                        return Ok(found);
                    }
                }
                Ok(Vec::new())
            },
        )
        .await
    }
}

fn usable(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local() && !v6.is_unspecified(),
    }
}

pub(super) fn find(connection: &Connect, name: &str) -> Result<Option<Domain>, virt::error::Error> {
    gone_if_missing(connection.lookup_domain_by_name(name))
}

pub(super) fn gone_if_missing<T>(
    result: Result<T, virt::error::Error>,
) -> Result<Option<T>, virt::error::Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is(&error, ErrorNumber::NoDomain) => Ok(None),
        Err(error) => Err(error),
    }
}

fn known(domain: &Domain) -> Result<Option<Known>, virt::error::Error> {
    let kind = i32::try_from(sys::VIR_DOMAIN_METADATA_ELEMENT).unwrap_or(2);
    let text = domain.metadata(kind, Some(OWNER_NAMESPACE), 0)?;
    // A tag that cannot be read belongs to nobody whom we know; the reaper must not guess.
    let Some(owner) = Node::parse(&text).ok().as_ref().and_then(read_owner) else {
        return Ok(None);
    };
    Ok(Some(Known {
        name: domain.name()?,
        uuid: domain.uuid()?,
        owner,
    }))
}

fn state_of(domain: &Domain) -> Result<State, virt::error::Error> {
    use virt::domain::{DomainStateEnum, DomainStateReasonEnum};
    let (state, reason) = domain.state()?;
    let state = match state {
        DomainStateEnum::Known(state) => state,
        // The binding (0.5.0) passes libvirt's error over and hands on the -1 that it started with.
        DomainStateEnum::Unknown(sys::virDomainState::MAX) => return Err(virt::error::Error::last_error()),
        DomainStateEnum::Unknown(_) => return Ok(State::Other),
    };
    let reason = match reason {
        DomainStateReasonEnum::Known(reason) => Some(reason),
        DomainStateReasonEnum::Unknown(_) => None,
    };
    Ok(match (state, reason) {
        (DomainState::Running | DomainState::Blocked, _) => State::Running,
        (DomainState::Paused, Some(DomainStateReason::Paused(reason))) => {
            let known = [
                (DomainPausedReason::IOError, PauseCause::IoError),
                (DomainPausedReason::User, PauseCause::Someone),
                (DomainPausedReason::Watchdog, PauseCause::Watchdog),
                (DomainPausedReason::Crashed, PauseCause::Crash),
                (DomainPausedReason::StartingUp, PauseCause::Starting),
            ];
            let cause = known.iter().find(|(theirs, _)| reason.is(*theirs));
            State::Paused(cause.map_or(PauseCause::Other, |(_, ours)| *ours))
        }
        (DomainState::Paused, _) => State::Paused(PauseCause::Other),
        (DomainState::PMSuspended, _) => State::Asleep,
        (DomainState::Crashed, _) => State::Crashed,
        (DomainState::Shutdown, _) => State::Ending,
        (DomainState::Shutoff, Some(DomainStateReason::Shutoff(reason)))
            if reason.is(DomainShutoffReason::Crashed) =>
        {
            State::Crashed
        }
        (DomainState::Shutoff, _) => State::Gone,
        (DomainState::NoState, _) => State::Other,
    })
}
