//! The kinds of channels, and which of them a session may have.

use std::fmt;
use std::str::FromStr;

/// What a channel carries. The numbers are the protocol's (`SPICE_CHANNEL_…` in spice-protocol's enums.h); 7 is a kind that
/// no client has had for a decade, and is refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Kind {
    /// The session itself: its number, the list of channels, the mouse's mode, the guest agent.
    Main = 1,
    /// A screen.
    Display = 2,
    /// Keys and mouse.
    Inputs = 3,
    /// The mouse pointer's shape.
    Cursor = 4,
    /// Sound of the machine.
    Playback = 5,
    /// Sound of the viewer.
    Record = 6,
    /// A smartcard of the viewer.
    Smartcard = 8,
    /// A USB device of the viewer.
    Usbredir = 9,
    /// A character device of the machine.
    Port = 10,
    /// A folder of the viewer.
    Webdav = 11,
}

impl Kind {
    /// All kinds that are known.
    pub const ALL: [Kind; 10] = [
        Kind::Main,
        Kind::Display,
        Kind::Inputs,
        Kind::Cursor,
        Kind::Playback,
        Kind::Record,
        Kind::Smartcard,
        Kind::Usbredir,
        Kind::Port,
        Kind::Webdav,
    ];

    /// The protocol's number.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The kind with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Kind::ALL.into_iter().find(|kind| kind.number() == number)
    }

    /// The name that viewers, settings and audit logs use.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Main => "main",
            Kind::Display => "display",
            Kind::Inputs => "inputs",
            Kind::Cursor => "cursor",
            Kind::Playback => "playback",
            Kind::Record => "record",
            Kind::Smartcard => "smartcard",
            Kind::Usbredir => "usbredir",
            Kind::Port => "port",
            Kind::Webdav => "webdav",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no kind of channel.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "\"{0}\" is no kind of channel; there are main, display, inputs, cursor, playback, record, smartcard, usbredir, port and webdav"
)]
pub struct UnknownKind(String);

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Kind::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

/// A set of kinds: what a session may open.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Kinds(u16);

impl Kinds {
    /// None at all. A session without main cannot begin.
    pub const NONE: Kinds = Kinds(0);

    /// Whether this kind is among them.
    pub fn has(self, kind: Kind) -> bool {
        self.0 & (1 << kind.number()) != 0
    }

    /// These, and one more.
    #[must_use]
    pub fn with(self, kind: Kind) -> Self {
        Kinds(self.0 | (1 << kind.number()))
    }

    /// These, without one.
    #[must_use]
    pub fn without(self, kind: Kind) -> Self {
        Kinds(self.0 & !(1 << kind.number()))
    }

    /// Those of them that `mode` leaves: a viewer who only looks has nothing to do on a channel that carries data into the machine.
    #[must_use]
    pub fn under(self, mode: Mode) -> Self {
        match mode {
            Mode::Full => self,
            Mode::ViewOnly => [
                Kind::Record,
                Kind::Smartcard,
                Kind::Usbredir,
                Kind::Port,
                Kind::Webdav,
            ]
            .into_iter()
            .fold(self, Kinds::without),
        }
    }
}

/// Main, display, inputs, cursor and playback: what it takes to see, hear and use a machine, and nothing that brings the
/// viewer's devices or files into it.
impl Default for Kinds {
    fn default() -> Self {
        [
            Kind::Main,
            Kind::Display,
            Kind::Inputs,
            Kind::Cursor,
            Kind::Playback,
        ]
        .into_iter()
        .collect()
    }
}

impl FromIterator<Kind> for Kinds {
    fn from_iter<I: IntoIterator<Item = Kind>>(kinds: I) -> Self {
        kinds.into_iter().fold(Kinds::NONE, Kinds::with)
    }
}

impl fmt::Debug for Kinds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(Kind::ALL.into_iter().filter(|kind| self.has(*kind)))
            .finish()
    }
}

/// What a viewer may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// See and type.
    Full,
    /// See. Nothing that the viewer sends reaches the machine but what drawing itself takes.
    ViewOnly,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_the_protocols_numbers_and_their_names_read_back() {
        let numbers: Vec<u8> = (0..=255).filter(|n| Kind::from_number(*n).is_some()).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]);
        for kind in Kind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert!("tunnel".parse::<Kind>().is_err());
    }

    #[test]
    fn a_viewer_who_only_looks_gets_no_channel_into_the_machine() {
        let all: Kinds = Kind::ALL.into_iter().collect();
        let left: Vec<Kind> = Kind::ALL
            .into_iter()
            .filter(|kind| all.under(Mode::ViewOnly).has(*kind))
            .collect();
        assert_eq!(
            left,
            [
                Kind::Main,
                Kind::Display,
                Kind::Inputs,
                Kind::Cursor,
                Kind::Playback
            ]
        );
        assert_eq!(all.under(Mode::Full), all);
        assert!(!Kinds::default().has(Kind::Usbredir) && Kinds::default().has(Kind::Main));
    }
}
