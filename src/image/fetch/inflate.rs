//! The deflate decoder (RFC 1951) of zlib-rs, which can also be stopped between two blocks and begin there.
//!
//! The safe interface of zlib-rs tells neither that a block has ended nor which bits of a byte are still to be used, nor can it
//! be given any; the one that is modelled on zlib's own can, as `zran.c` beside zlib shows. All that is unsafe about it is here.

use std::ffi::{c_int, c_uint};
use std::io;
use std::ptr;

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_DATA_ERROR, Z_MEM_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END, inflate, inflateEnd,
    inflateGetDictionary, inflateInit2_, inflatePrime, inflateReset, inflateSetDictionary, z_stream,
    zlibVersion,
};

/// How far back deflate refers, in bytes.
const WINDOW: usize = 32 << 10;

/// The largest window, and neither header nor trailer.
const RAW: c_int = -15;

/// What `data_type` says after a call, beside how many bits of the last byte are not used yet.
const BITS: c_int = 0x3f;
const LAST_BLOCK: c_int = 0x40;
const BLOCK_ENDED: c_int = 0x80;

/// A decoder of one deflate stream.
pub(super) struct Inflate {
    stream: Box<z_stream>,
    /// The byte that was taken last.
    last: u8,
    place: Place,
}

/// Where a decoder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Inside,
    /// Between two blocks. Told only to those who ask to be stopped there.
    BetweenBlocks,
    /// Behind the last block.
    End,
}

/// What one step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// Bytes taken from the input.
    pub(super) taken: usize,
    /// Bytes given to the output.
    pub(super) given: usize,
    pub(super) place: Place,
}

/// What a decoder needs to begin between two blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Boundary {
    /// The bits of the last byte that are not used yet, from the lowest on, and how many.
    pub(super) bits: u8,
    pub(super) bit_count: u8,
    /// The end of what was given.
    pub(super) window: Vec<u8>,
}

#[allow(
    unsafe_code,
    reason = "the only interface of zlib-rs that can stop between two blocks"
)]
impl Inflate {
    /// A decoder at the beginning of a stream.
    pub(super) fn new() -> io::Result<Self> {
        let mut stream = Box::<z_stream>::default();
        let size = c_int::try_from(size_of::<z_stream>()).unwrap_or_default();
        // SAFETY: the stream is ours, and its allocator is the one that `default` has chosen. The version is a constant that ends
        // with a zero.
        check(unsafe { inflateInit2_(&raw mut *stream, RAW, zlibVersion(), size) })?;
        Ok(Self {
            stream,
            last: 0,
            place: Place::Inside,
        })
    }

    /// A decoder where another was between two blocks. None if there is no such place.
    pub(super) fn at(boundary: &Boundary) -> io::Result<Option<Self>> {
        let &Boundary {
            bits,
            bit_count,
            ref window,
        } = boundary;
        if bit_count > 7 || bits >> bit_count != 0 || window.len() > WINDOW {
            return Ok(None);
        }
        let mut inflate = Self::new()?;
        let stream = &raw mut *inflate.stream;
        // SAFETY: the stream was made by `new`.
        check(unsafe { inflatePrime(stream, bit_count.into(), bits.into()) })?;
        // SAFETY: the same, and `window` is so long; it is copied.
        check(unsafe { inflateSetDictionary(stream, window.as_ptr(), length(window)) })?;
        // As if they had just been taken, with the next lower ones.
        inflate.last = bits.checked_shl(8 - u32::from(bit_count)).unwrap_or_default();
        Ok(Some(inflate))
    }

    /// Goes to the beginning of another stream.
    pub(super) fn again(&mut self) -> io::Result<()> {
        self.place = Place::Inside;
        // SAFETY: the stream was made by `new`.
        check(unsafe { inflateReset(&raw mut *self.stream) })
    }

    /// Takes some of the input and puts what it gives to the beginning of the output. `stop` is whether to stop when a block has
    /// ended: that costs some time for each block.
    pub(super) fn step(&mut self, input: &[u8], output: &mut [u8], stop: bool) -> io::Result<Step> {
        let (offered, room) = (length(input), length(output));
        self.stream.next_in = input.as_ptr();
        self.stream.avail_in = offered;
        self.stream.next_out = output.as_mut_ptr();
        self.stream.avail_out = room;
        let flush = if stop { Z_BLOCK } else { Z_NO_FLUSH };
        // SAFETY: the stream was made by `new`. Input and output are at least as long as was said, and are borrowed until the
        // call is over; the decoder copies what it needs afterwards.
        let code = unsafe { inflate(&raw mut *self.stream, flush) };
        let taken = (offered - self.stream.avail_in) as usize;
        let given = (room - self.stream.avail_out) as usize;
        (self.stream.next_in, self.stream.avail_in) = (ptr::null(), 0);
        (self.stream.next_out, self.stream.avail_out) = (ptr::null_mut(), 0);
        if let Some(last) = input[..taken].last() {
            self.last = *last;
        }
        self.place = match code {
            Z_STREAM_END => Place::End,
            // No error: there was nothing to take, or no room.
            Z_BUF_ERROR => Place::Inside,
            _ => {
                check(code)?;
                match self.stream.data_type & (BLOCK_ENDED | LAST_BLOCK) {
                    BLOCK_ENDED if stop => Place::BetweenBlocks,
                    // What is left of the last byte means nothing.
                    both if both == BLOCK_ENDED | LAST_BLOCK => Place::End,
                    _ => Place::Inside,
                }
            }
        };
        let place = self.place;
        Ok(Step { taken, given, place })
    }

    /// What [`Inflate::at`] needs; none if the decoder is not between two blocks.
    pub(super) fn boundary(&self) -> Option<Boundary> {
        let bit_count = u8::try_from(self.stream.data_type & BITS).ok()?;
        if self.place != Place::BetweenBlocks || bit_count > 7 {
            return None;
        }
        let mut window = vec![0; WINDOW];
        let mut length: c_uint = 0;
        // SAFETY: the stream was made by `new`, and `window` is as long as a window can be.
        let code =
            unsafe { inflateGetDictionary(&raw const *self.stream, window.as_mut_ptr(), &raw mut length) };
        check(code).ok()?;
        window.truncate(length as usize);
        Some(Boundary {
            bits: self
                .last
                .checked_shr(8 - u32::from(bit_count))
                .unwrap_or_default(),
            bit_count,
            window,
        })
    }
}

#[allow(
    unsafe_code,
    reason = "the only interface of zlib-rs that can stop between two blocks"
)]
impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: the stream was made by `new`, and nobody uses it afterwards.
        let _ = unsafe { inflateEnd(&raw mut *self.stream) };
    }
}

/// The length of a slice, or as much of it as the decoder can be told of at once.
fn length(bytes: &[u8]) -> c_uint {
    c_uint::try_from(bytes.len()).unwrap_or(c_uint::MAX)
}

fn check(code: c_int) -> io::Result<()> {
    match code {
        Z_OK => Ok(()),
        Z_DATA_ERROR => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its gzip data is broken",
        )),
        Z_MEM_ERROR => Err(io::ErrorKind::OutOfMemory.into()),
        _ => Err(io::Error::other("zlib-rs refuses what it is asked for")),
    }
}
