//! What libvirt does with a machine's screen and keyboard.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::stream::Stream;
use virt::sys;

use super::super::keys::Keys;
use super::super::screen::{self, MOST_BYTES};
use super::super::xml::Node;
use super::machines::{find, gone_if_missing};
use super::{Error, Libvirt};

/// The screen that our machines have.
const SCREEN: u32 = 0;
/// For how long keys are held down, in milliseconds: a guest that is emulated looks at its keyboard late.
const HOLD_MS: u32 = 100;
/// Deadline of all that is done with a screen. It takes milliseconds; who waits is a person, or a job that has failed already.
const SCREEN_DEADLINE: Duration = Duration::from_secs(10);
/// How much of a picture is read at once, in bytes: what libvirt sends in one message.
const PIECE: usize = 64 << 10;

/// What came of a call to a screen.
enum Seen<T> {
    Done(T),
    NoMachine,
    NoScreen,
    TooLarge,
}

impl Libvirt {
    /// A picture of a machine's screen as it is now, as PNG.
    ///
    /// # Errors
    /// [`Error::NoMachine`] and [`Error::NoScreen`] where there is none; [`Error::Answer`] where what QEMU gives is no picture
    /// or is larger than [`MOST_BYTES`].
    pub async fn screenshot(&self, name: &str) -> Result<Vec<u8>, Error> {
        let picture = self
            .at_screen("show the screen of machine", name, |connection, domain| {
                let stream = Stream::new(connection, 0)?;
                domain.screenshot(&stream, SCREEN, 0)?;
                read(stream)
            })
            .await?;
        screen::png(picture).map_err(|e| Error::Answer(e.to_string()))
    }

    /// Presses keys together on a machine's keyboard, and lets them go.
    ///
    /// # Errors
    /// [`Error::NoMachine`]; [`Error::NoScreen`], since a machine without a screen has no keyboard either.
    pub async fn send_key(&self, name: &str, keys: &Keys) -> Result<(), Error> {
        let keys = keys.numbers().to_vec();
        self.at_screen("press keys of machine", name, move |_, domain| {
            let mut keys = keys.clone();
            let count = i32::try_from(keys.len()).unwrap_or(0);
            domain
                .send_key(sys::VIR_KEYCODE_SET_LINUX, HOLD_MS, keys.as_mut_ptr(), count, 0)
                .map(Seen::Done)
        })
        .await
    }

    /// A new connection to a machine's SPICE server, which asks for no password on it: whoever holds the descriptor is in. The
    /// server listens nowhere; this is the only way to it.
    ///
    /// # Errors
    /// [`Error::NoMachine`] and [`Error::NoScreen`] where there is none.
    pub async fn open_graphics(&self, name: &str) -> Result<OwnedFd, Error> {
        self.at_screen("open the console of machine", name, |_, domain| {
            // A pair of our own rather than one that libvirt makes: it hands out a bare number, which would have to be trusted.
            let Ok((ours, theirs)) = UnixStream::pair() else {
                return Ok(Seen::Done(None));
            };
            domain.open_graphics(SCREEN, theirs.as_raw_fd(), sys::VIR_DOMAIN_OPEN_GRAPHICS_SKIPAUTH)?;
            Ok(Seen::Done(Some(OwnedFd::from(ours))))
        })
        .await?
        .ok_or_else(|| Error::Refused {
            what: format!("open the console of machine {name}"),
            reason: "this process may open no more files".to_owned(),
        })
    }

    /// Does something with a machine that has a screen.
    async fn at_screen<T, F>(&self, what: &str, name: &str, mut job: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnMut(&Connect, &Domain) -> Result<Seen<T>, virt::error::Error> + Send + 'static,
    {
        let wanted = name.to_owned();
        let seen = self
            .call(format!("{what} {name}"), SCREEN_DEADLINE, move |connection| {
                let Some(domain) = find(connection, &wanted)? else {
                    return Ok(Seen::NoMachine);
                };
                let done = domain.xml_desc(0).and_then(|xml| match has_screen(&xml) {
                    true => job(connection, &domain),
                    false => Ok(Seen::NoScreen),
                });
                // It may end at any moment.
                Ok(gone_if_missing(done)?.unwrap_or(Seen::NoMachine))
            })
            .await?;
        match seen {
            Seen::Done(value) => Ok(value),
            Seen::NoMachine => Err(Error::NoMachine(name.to_owned())),
            Seen::NoScreen => Err(Error::NoScreen(name.to_owned())),
            Seen::TooLarge => Err(Error::Answer(format!(
                "the picture of the screen is larger than {} MiB",
                MOST_BYTES >> 20
            ))),
        }
    }
}

/// Does a machine of this description have a screen? What cannot be read has none.
fn has_screen(xml: &str) -> bool {
    Node::parse(xml).is_ok_and(|tree| {
        tree.first("devices")
            .is_some_and(|devices| devices.first("graphics").is_some())
    })
}

/// Reads a picture to its end.
fn read(stream: Stream) -> Result<Seen<Vec<u8>>, virt::error::Error> {
    let mut picture = Vec::new();
    let mut piece = vec![0; PIECE];
    loop {
        let count = match stream.recv(&mut piece) {
            Ok(count) => usize::try_from(count).unwrap_or(0),
            Err(error) => {
                // The first error is the one that says something.
                let _ = stream.abort();
                return Err(error);
            }
        };
        if count == 0 {
            stream.finish()?;
            return Ok(Seen::Done(picture));
        }
        if picture.len() + count > MOST_BYTES {
            // What libvirt says to that changes nothing.
            let _ = stream.abort();
            return Ok(Seen::TooLarge);
        }
        picture.extend_from_slice(&piece[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_is_seen_in_the_devices_alone() {
        assert!(has_screen(
            "<domain><devices><graphics type='spice'/></devices></domain>"
        ));
        assert!(!has_screen(
            "<domain><graphics/><devices><video/></devices></domain>"
        ));
        assert!(!has_screen("<domain>"));
    }

    #[tokio::test]
    async fn a_machine_that_is_not_there_or_has_no_screen_is_named() {
        let libvirt = Libvirt::open("test:///default").unwrap();
        let keys = "ctrl-alt-del".parse().unwrap();
        assert!(matches!(
            libvirt.screenshot("none").await,
            Err(Error::NoMachine(_))
        ));
        // The test driver's own domain has no devices at all.
        for error in [
            libvirt.screenshot("test").await.unwrap_err(),
            libvirt.send_key("test", &keys).await.unwrap_err(),
            libvirt.open_graphics("test").await.unwrap_err(),
        ] {
            assert_eq!(error.to_string(), "machine test has no screen");
        }
    }
}
