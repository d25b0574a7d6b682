//! What libvirt does with networks.

use virt::connect::Connect;
use virt::error::ErrorNumber;
use virt::network::Network;

use super::{Error, Libvirt, NETWORK_DEADLINE, QUERY_DEADLINE, is};

/// A network that libvirt has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkState {
    /// Whether its bridge is up.
    pub active: bool,
    /// The bridge's name.
    pub bridge: Option<String>,
    /// Its XML: the running one where it is up.
    pub xml: String,
}

impl Libvirt {
    /// Looks a network up; `None` where libvirt has none of that name.
    ///
    /// # Errors
    /// Where libvirt cannot be asked.
    pub async fn network(&self, name: &str) -> Result<Option<NetworkState>, Error> {
        let wanted = name.to_owned();
        self.call(
            format!("look up network {name}"),
            QUERY_DEADLINE,
            move |connection| {
                let Some(network) = find(connection, &wanted)? else {
                    return Ok(None);
                };
                Ok(Some(NetworkState {
                    active: network.is_active()?,
                    // A network without a bridge (macvtap, hostdev) is an error to libvirt and nothing to us.
                    bridge: network.bridge_name().ok(),
                    xml: network.xml_desc(0)?,
                }))
            },
        )
        .await
    }

    /// Defines a network; one of that name and UUID is replaced in its definition, not while it runs.
    ///
    /// # Errors
    /// libvirt's refusal.
    pub async fn define_network(&self, name: &str, xml: String) -> Result<(), Error> {
        self.call(
            format!("define network {name}"),
            NETWORK_DEADLINE,
            move |connection| connection.define_network_xml(&xml).map(drop),
        )
        .await
    }

    /// Starts a network that is defined; one that runs already is fine.
    ///
    /// # Errors
    /// libvirt's refusal: the subnet is in use, dnsmasq is missing, the caller has no right to.
    pub async fn start_network(&self, name: &str) -> Result<(), Error> {
        let wanted = name.to_owned();
        self.call(
            format!("start network {name}"),
            NETWORK_DEADLINE,
            move |connection| {
                let network = connection.lookup_network_by_name(&wanted)?;
                match network.create() {
                    Err(error) if is(&error, ErrorNumber::OperationInvalid) && network.is_active()? => Ok(()),
                    result => result,
                }
            },
        )
        .await
    }

    /// Stops and forgets a network; one that is not there is fine.
    ///
    /// # Errors
    /// libvirt's refusal.
    pub async fn remove_network(&self, name: &str) -> Result<(), Error> {
        let wanted = name.to_owned();
        self.call(
            format!("remove network {name}"),
            NETWORK_DEADLINE,
            move |connection| {
                let Some(network) = find(connection, &wanted)? else {
                    return Ok(());
                };
                let persistent = network.is_persistent()?;
                if network.is_active()? {
                    network.destroy()?;
                }
                if persistent { network.undefine() } else { Ok(()) }
            },
        )
        .await
    }
}

fn find(connection: &Connect, name: &str) -> Result<Option<Network>, virt::error::Error> {
    match connection.lookup_network_by_name(name) {
        Ok(network) => Ok(Some(network)),
        Err(error) if is(&error, ErrorNumber::NoNetwork) => Ok(None),
        Err(error) => Err(error),
    }
}
