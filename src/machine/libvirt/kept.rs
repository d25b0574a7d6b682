//! Machines that somebody keeps: persistent domains, which are not cannery's.

use virt::error::ErrorNumber;
use virt::sys;

use super::{Error, Libvirt, QUERY_DEADLINE, is};

/// How a kept machine is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// There is none of that name.
    Missing,
    /// It runs, or is paused: its disk changes.
    Running,
    /// Its memory is saved and waits to go on: its disk is in the middle of something.
    Saved,
    /// It is shut off; its description, as libvirt keeps it.
    Off(String),
}

impl Libvirt {
    /// How the machine of that name is, and its description if it is shut off.
    ///
    /// # Errors
    /// Where libvirt cannot be asked.
    pub async fn kept(&self, name: &str) -> Result<Kept, Error> {
        let wanted = name.to_owned();
        self.call(
            format!("describe machine {name}"),
            QUERY_DEADLINE,
            move |connection| {
                let domain = match connection.lookup_domain_by_name(&wanted) {
                    Ok(domain) => domain,
                    Err(error) if is(&error, ErrorNumber::NoDomain) => return Ok(Kept::Missing),
                    Err(error) => return Err(error),
                };
                if domain.is_active()? {
                    return Ok(Kept::Running);
                }
                if domain.has_managed_save(0)? {
                    return Ok(Kept::Saved);
                }
                domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE).map(Kept::Off)
            },
        )
        .await
    }

    /// Defines a machine that stays, from the XML that [`render`](super::super::xml::kept::render) wrote. It is not started.
    ///
    /// # Errors
    /// libvirt's refusal ([`Error::Refused`]): a name in use, a network or firmware that is not there.
    pub async fn define(&self, name: &str, xml: String) -> Result<(), Error> {
        self.call(
            format!("define machine {name}"),
            QUERY_DEADLINE,
            move |connection| connection.define_domain_xml(&xml).map(drop),
        )
        .await
    }
}
