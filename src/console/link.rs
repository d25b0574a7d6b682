//! The four structures of the handshake, as bytes.
//!
//! Each channel is a connection of its own and begins so, all numbers little-endian (spice-protocol's protocol.h):
//!
//! ```text
//! viewer ▶ "REDQ" major minor size, then size bytes: session id, kind, id, capabilities      Hello
//! server ▶ "REDQ" major minor size, then size bytes: error, public key, capabilities         Reply
//! viewer ▶ mechanism (where both can choose), 128 bytes: the ticket under that key
//! server ▶ a code: 0, and messages begin                                                     Code
//! ```
//!
//! What is checked here, and with which error it is refused, is what spice-server checks.

/// First bytes of either side.
pub const MAGIC: [u8; 4] = *b"REDQ";
/// The only major version that there is. The minor one is not looked at, as spice-server does not.
pub const MAJOR: u32 = 2;
/// The minor version that is sent.
pub const MINOR: u32 = 2;
/// Bytes of magic, versions and size.
pub const HEADER: usize = 16;
/// Most bytes after the header, either way.
pub const SIZE_MAX: usize = 4096;
/// Bytes of a public key: an RSA key of 1024 bits as SubjectPublicKeyInfo.
pub const KEY: usize = 162;
/// Bytes of a ticket under such a key.
pub const SEALED: usize = 128;
/// Longest ticket, in bytes: what spice-gtk is willing to send.
pub const TICKET_MAX: usize = 60;
/// The mechanism of a ticket under a public key.
pub const MECHANISM_TICKET: u32 = 1;

/// Bytes of a link message before its capabilities.
const HELLO: usize = 18;
/// Bytes of a reply before its capabilities.
const REPLY: usize = 178;
/// Most capability words in one set.
const WORDS_MAX: u32 = 1024;

/// Whether a connection was accepted, as the protocol says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Code {
    /// Accepted.
    #[error("accepted")]
    Ok,
    /// Refused, for a reason that has no number.
    #[error("refused")]
    Error,
    /// The first bytes are not SPICE.
    #[error("not the SPICE protocol")]
    InvalidMagic,
    /// A structure is not well-formed.
    #[error("malformed")]
    InvalidData,
    /// Another major version.
    #[error("another version of the protocol")]
    VersionMismatch,
    /// Only TLS is allowed.
    #[error("only allowed over TLS")]
    NeedSecured,
    /// Only a plain connection is allowed.
    #[error("only allowed without TLS")]
    NeedUnsecured,
    /// The ticket is wrong.
    #[error("permission denied")]
    PermissionDenied,
    /// No session has this number.
    #[error("no such session")]
    BadConnectionId,
    /// The machine has no such channel, or it is not allowed.
    #[error("no such channel")]
    ChannelNotAvailable,
}

impl Code {
    const ALL: [Code; 10] = [
        Code::Ok,
        Code::Error,
        Code::InvalidMagic,
        Code::InvalidData,
        Code::VersionMismatch,
        Code::NeedSecured,
        Code::NeedUnsecured,
        Code::PermissionDenied,
        Code::BadConnectionId,
        Code::ChannelNotAvailable,
    ];

    /// The protocol's number.
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// The code with this number. Numbers that are not known are errors all the same.
    pub fn from_number(number: u32) -> Self {
        Code::ALL
            .into_iter()
            .find(|code| code.number() == number)
            .unwrap_or(Code::Error)
    }
}

/// A capability that all kinds of channels have in common; its number is the bit's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Common {
    /// The viewer names the mechanism by which it authenticates.
    AuthSelection = 0,
    /// By a ticket.
    AuthTicket = 1,
    /// By SASL.
    AuthSasl = 2,
    /// Messages have headers of 6 bytes.
    MiniHeader = 3,
}

/// What one side can do: words of bits, those of all channels and those of this kind.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Caps {
    /// For all kinds of channels.
    pub common: Vec<u32>,
    /// For this kind.
    pub channel: Vec<u32>,
}

impl Caps {
    /// Whether this side has a common capability.
    pub fn has(&self, what: Common) -> bool {
        self.common
            .first()
            .is_some_and(|word| word & (1 << what as u8) != 0)
    }

    /// Sets or clears a common capability.
    pub fn set(&mut self, what: Common, on: bool) {
        if self.common.is_empty() {
            self.common.push(0);
        }
        if let Some(word) = self.common.first_mut() {
            let bit = 1 << what as u8;
            *word = if on { *word | bit } else { *word & !bit };
        }
    }

    /// Whether every capability for this kind of channel that `promised` has is here, too.
    pub fn keeps(&self, promised: &Caps) -> bool {
        promised
            .channel
            .iter()
            .enumerate()
            .all(|(at, word)| word & !self.channel.get(at).copied().unwrap_or(0) == 0)
    }

    fn put(&self, bytes: &mut Vec<u8>) {
        for word in self.common.iter().chain(&self.channel) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }

    fn bytes(&self) -> usize {
        (self.common.len() + self.channel.len()) * 4
    }

    /// Takes both sets from a body whose fixed part has `fixed` bytes and ends with these three numbers.
    fn take(body: &[u8], fixed: usize) -> Result<Self, Code> {
        let counts = fixed.checked_sub(12).ok_or(Code::InvalidData)?;
        let common = word(body, counts)?;
        let channel = word(body, counts + 4)?;
        let offset = word(body, counts + 8)?;
        if common > WORDS_MAX || channel > WORDS_MAX {
            return Err(Code::InvalidData);
        }
        if common + channel == 0 {
            return Ok(Caps::default());
        }
        let offset = usize::try_from(offset).map_err(|_| Code::InvalidData)?;
        if offset < fixed {
            return Err(Code::InvalidData);
        }
        let set = |from: u32, words: u32| -> Result<Vec<u32>, Code> {
            (from..from + words)
                .map(|at| {
                    let at = usize::try_from(at).map_err(|_| Code::InvalidData)?;
                    word(body, offset.checked_add(at * 4).ok_or(Code::InvalidData)?)
                })
                .collect()
        };
        Ok(Caps {
            common: set(0, common)?,
            channel: set(common, channel)?,
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32, Code> {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map(|four| u32::from_le_bytes(*four))
        .ok_or(Code::InvalidData)
}

/// Checks the first four bytes: what speaks another protocol is told so before it has sent more.
///
/// # Errors
/// [`Code::InvalidMagic`].
pub fn check_magic(bytes: [u8; 4]) -> Result<(), Code> {
    if bytes == MAGIC {
        Ok(())
    } else {
        Err(Code::InvalidMagic)
    }
}

/// Checks the twelve bytes behind the magic of a viewer's header and says how many follow.
///
/// # Errors
/// [`Code::VersionMismatch`], [`Code::InvalidData`] for a size that cannot be.
pub fn hello_size(rest: [u8; 12]) -> Result<usize, Code> {
    size(&rest, HELLO)
}

/// The same for a server's header.
///
/// # Errors
/// The same.
pub fn reply_size(rest: [u8; 12]) -> Result<usize, Code> {
    size(&rest, REPLY)
}

fn size(rest: &[u8], least: usize) -> Result<usize, Code> {
    match word(rest, 0)? {
        MAJOR => {}
        // spice-server says so too: a version 0 is noise.
        0 => return Err(Code::InvalidData),
        _ => return Err(Code::VersionMismatch),
    }
    usize::try_from(word(rest, 8)?)
        .ok()
        .filter(|size| (least..=SIZE_MAX).contains(size))
        .ok_or(Code::InvalidData)
}

fn header(size: usize) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&MAJOR.to_le_bytes());
    bytes.extend_from_slice(&MINOR.to_le_bytes());
    // A size that does not fit is more than any side accepts; so is the largest that does.
    bytes.extend_from_slice(&u32::try_from(size).unwrap_or(u32::MAX).to_le_bytes());
    bytes
}

fn counts(caps: &Caps, offset: u32, bytes: &mut Vec<u8>) {
    for count in [caps.common.len(), caps.channel.len()] {
        bytes.extend_from_slice(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
    }
    bytes.extend_from_slice(&offset.to_le_bytes());
}

/// What a viewer asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// 0 for a new session, else the number that its main channel was given.
    pub session: u32,
    /// The kind of channel, as the protocol's number.
    pub kind: u8,
    /// Which of several of this kind.
    pub id: u8,
    /// What the viewer can do.
    pub caps: Caps,
}

impl Hello {
    /// Reads the bytes that follow the header, as many as it said.
    ///
    /// # Errors
    /// [`Code::InvalidData`].
    pub fn decode(body: &[u8]) -> Result<Self, Code> {
        let caps = Caps::take(body, HELLO)?;
        match (body.get(4), body.get(5)) {
            (Some(&kind), Some(&id)) => Ok(Hello {
                session: word(body, 0)?,
                kind,
                id,
                caps,
            }),
            _ => Err(Code::InvalidData),
        }
    }

    /// Header and all.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = header(HELLO + self.caps.bytes());
        bytes.extend_from_slice(&self.session.to_le_bytes());
        bytes.push(self.kind);
        bytes.push(self.id);
        counts(&self.caps, 18, &mut bytes);
        self.caps.put(&mut bytes);
        bytes
    }
}

/// A server's answer: the key for the ticket, and what it can do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// The public key as SubjectPublicKeyInfo.
    pub key: [u8; KEY],
    /// What the server can do.
    pub caps: Caps,
}

impl Reply {
    /// Reads the bytes that follow the header.
    ///
    /// # Errors
    /// What the server refused it with, or [`Code::InvalidData`].
    pub fn decode(body: &[u8]) -> Result<Self, Code> {
        match word(body, 0)? {
            0 => {}
            code => return Err(Code::from_number(code)),
        }
        let key = body
            .get(4..)
            .and_then(|rest| rest.first_chunk())
            .ok_or(Code::InvalidData)?;
        Ok(Reply {
            key: *key,
            caps: Caps::take(body, REPLY)?,
        })
    }

    /// Header and all.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = header(REPLY + self.caps.bytes());
        bytes.extend_from_slice(&Code::Ok.number().to_le_bytes());
        bytes.extend_from_slice(&self.key);
        counts(&self.caps, 178, &mut bytes);
        self.caps.put(&mut bytes);
        bytes
    }

    /// The reply that refuses: 194 bytes, all zero behind the code.
    pub fn refusal(code: Code) -> Vec<u8> {
        let mut bytes = header(REPLY);
        bytes.extend_from_slice(&code.number().to_le_bytes());
        bytes.resize(HEADER + REPLY, 0);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(bytes: &[u8]) -> Result<Hello, Code> {
        check_magic(*bytes.first_chunk().ok_or(Code::InvalidData)?)?;
        let size = hello_size(*bytes[4..].first_chunk().ok_or(Code::InvalidData)?)?;
        Hello::decode(bytes.get(HEADER..HEADER + size).ok_or(Code::InvalidData)?)
    }

    /// What spice-gtk sends to open a session.
    fn usual() -> Vec<u8> {
        let mut bytes = b"REDQ".to_vec();
        bytes.extend([2, 0, 0, 0, 2, 0, 0, 0, 26, 0, 0, 0]);
        bytes.extend([0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 18, 0, 0, 0]);
        bytes.extend([0x0b, 0, 0, 0, 0x0f, 0, 0, 0]);
        bytes
    }

    #[test]
    fn a_usual_link_message_is_read() {
        let hello = read(&usual()).unwrap();
        assert_eq!((hello.session, hello.kind, hello.id), (0, 1, 0));
        assert_eq!(
            (hello.caps.common.as_slice(), hello.caps.channel.as_slice()),
            ([0xb].as_slice(), [0xf].as_slice())
        );
        assert!(hello.caps.has(Common::MiniHeader) && !hello.caps.has(Common::AuthSasl));
        assert_eq!(hello.encode(), usual());
    }

    #[test]
    fn every_malformed_link_message_is_refused_as_spice_server_does() {
        type Change = fn(&mut Vec<u8>);
        let cases: &[(&str, Change, Code)] = &[
            ("another magic", |b| b[0] = b'G', Code::InvalidMagic),
            ("major version 0", |b| b[4] = 0, Code::InvalidData),
            ("major version 1", |b| b[4] = 1, Code::VersionMismatch),
            ("major version 3", |b| b[4] = 3, Code::VersionMismatch),
            ("size 4", |b| b[12] = 4, Code::InvalidData),
            ("size 17", |b| b[12] = 17, Code::InvalidData),
            (
                "size 5000",
                |b| b[12..14].copy_from_slice(&5000u16.to_le_bytes()),
                Code::InvalidData,
            ),
            ("size 2^32-1", |b| b[12..16].fill(0xff), Code::InvalidData),
            ("offset 10", |b| b[30] = 10, Code::InvalidData),
            ("offset past the end", |b| b[30] = 19, Code::InvalidData),
            ("offset 2^32-1", |b| b[30..34].fill(0xff), Code::InvalidData),
            ("three words of two", |b| b[22] = 2, Code::InvalidData),
            (
                "1025 common words",
                |b| b[22..24].copy_from_slice(&1025u16.to_le_bytes()),
                Code::InvalidData,
            ),
            (
                "2^32-1 channel words",
                |b| b[26..30].fill(0xff),
                Code::InvalidData,
            ),
        ];
        for (what, change, code) in cases {
            let mut bytes = usual();
            change(&mut bytes);
            assert_eq!(read(&bytes), Err(*code), "{what}");
        }
        // The minor version is nobody's business, and neither is an offset where there is nothing.
        let mut bytes = usual();
        bytes[8] = 99;
        assert!(read(&bytes).is_ok());
        let mut none = usual();
        none[22] = 0;
        none[26] = 0;
        none[30] = 3;
        assert_eq!(read(&none).unwrap().caps, Caps::default());
    }

    #[test]
    fn a_refusal_is_what_spice_server_sends() {
        let bytes = Reply::refusal(Code::NeedSecured);
        assert_eq!(bytes.len(), 194);
        assert_eq!(bytes[..16], *b"REDQ\x02\0\0\0\x02\0\0\0\xb2\0\0\0");
        assert_eq!((bytes[16], bytes[17..].iter().all(|b| *b == 0)), (5, true));
        assert_eq!(Reply::decode(&bytes[16..]), Err(Code::NeedSecured));
    }

    #[test]
    fn a_reply_has_the_length_that_clients_know() {
        for (channel, length) in [(vec![0xf], 202), (vec![], 198)] {
            let reply = Reply {
                key: [7; KEY],
                caps: Caps {
                    common: vec![0xb],
                    channel,
                },
            };
            let bytes = reply.encode();
            assert_eq!(bytes.len(), length);
            assert_eq!(Reply::decode(&bytes[16..]), Ok(reply));
        }
    }

    #[test]
    fn a_promise_is_kept_only_by_whoever_has_all_of_it() {
        let caps = |channel: &[u32]| Caps {
            common: vec![],
            channel: channel.to_vec(),
        };
        assert!(caps(&[0x1052]).keeps(&caps(&[0x1050])));
        assert!(caps(&[]).keeps(&caps(&[0])));
        assert!(!caps(&[0x1050]).keeps(&caps(&[0x1052])));
        assert!(!caps(&[1]).keeps(&caps(&[1, 1])));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            session: u32, kind: u8, id: u8,
            common in prop::collection::vec(any::<u32>(), 0..40),
            channel in prop::collection::vec(any::<u32>(), 0..40),
        ) {
            let hello = Hello { session, kind, id, caps: Caps { common, channel } };
            prop_assert_eq!(read(&hello.encode()), Ok(hello));
        }

        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            drop(Hello::decode(&bytes));
            drop(Reply::decode(&bytes));
        }
    }
}
