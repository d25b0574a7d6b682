//! The thread that unpacks, and does nothing else: it is the one that a gzip layer waits for.

use std::any::Any;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::checkpoint::Mark;
use super::decoder::{Decoder, Stand};
use super::decompress::{Compression, MAGIC, decompress, sniff, unreadable};
use super::part::cut;
use super::verified::Position;
use crate::image::error::Error;
use crate::image::format::Workplace;

/// Time after which there is a mark though few bytes have come: on a slow link they are as dear.
const MARK_AFTER: Duration = Duration::from_secs(2);

/// Unpacked bytes that travel together.
const BLOCK: usize = 256 << 10;

/// Packed bytes, counted and hashed.
pub(super) enum Seen {
    /// Some, and how far all have come with them.
    Bytes(Bytes, Position),
    /// All have been sent, and are what was announced.
    End,
}

/// What travels from the thread that unpacks.
pub(super) enum Block {
    Begin(Compression),
    Bytes(Vec<u8>),
    /// All bytes in front of it are used, and none behind.
    Mark(Box<Mark>),
    End,
}

/// Packed bytes on their way to whoever unpacks them.
pub(super) struct Packed {
    seen: Receiver<Seen>,
    /// What is left of the piece in hand.
    piece: Bytes,
    /// Where that ends.
    end: Position,
    ended: bool,
}

impl Packed {
    /// `rest` are bytes in front of the position that were not used.
    pub(super) fn new(seen: Receiver<Seen>, rest: Vec<u8>, position: Position) -> Self {
        Self {
            seen,
            piece: rest.into(),
            end: position,
            ended: false,
        }
    }

    /// The next bytes, as they came; none behind the last.
    fn piece(&mut self) -> io::Result<Option<Bytes>> {
        self.receive()?;
        let piece = std::mem::take(&mut self.piece);
        Ok((!piece.is_empty()).then_some(piece))
    }

    /// The first bytes, which are read again.
    fn peek(&mut self, length: usize) -> io::Result<&[u8]> {
        self.receive()?;
        while self.piece.len() < length && !self.ended {
            let head = std::mem::take(&mut self.piece);
            self.receive()?;
            self.piece = [head, std::mem::take(&mut self.piece)].concat().into();
        }
        Ok(&self.piece[..length.min(self.piece.len())])
    }

    /// Takes the next piece into the hand, if that is empty and there is one.
    fn receive(&mut self) -> io::Result<()> {
        while self.piece.is_empty() && !self.ended {
            match self.seen.recv() {
                Ok(Seen::Bytes(piece, end)) => (self.piece, self.end) = (piece, end),
                Ok(Seen::End) => self.ended = true,
                Err(_) => return Err(cut()),
            }
        }
        Ok(())
    }
}

impl Read for Packed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive()?;
        let count = self.piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

/// Why the unpacking ended early.
enum Halt {
    /// Nobody takes the bytes any more.
    Unwanted,
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What came since the last mark.
struct Since {
    bytes: u64,
    begin: Instant,
}

impl Since {
    fn now() -> Self {
        Self {
            bytes: 0,
            begin: Instant::now(),
        }
    }

    /// Is it worth a mark?
    fn is_enough(&self, every: u64) -> bool {
        self.bytes >= every || (self.bytes > 0 && self.begin.elapsed() >= MARK_AFTER)
    }
}

/// The thread that unpacks.
pub(super) struct Unpacker {
    /// Packed bytes between two marks.
    pub(super) every: u64,
    pub(super) place: Workplace,
    pub(super) blocks: SyncSender<Block>,
    /// Blocks that were used, to be filled again.
    pub(super) used: Receiver<Vec<u8>>,
    pub(super) _held: Arc<dyn Any + Send + Sync>,
}

impl Unpacker {
    /// Unpacks to the end, from the beginning or from where another was stopped. Where the bytes make no sense, here or to whoever
    /// takes them (`taker`), `checker` is told that its verdict is waited for.
    pub(super) fn run(
        &self,
        mut packed: Packed,
        from: Option<Stand>,
        taker: &Receiver<bool>,
        checker: &Sender<bool>,
    ) -> Result<(), Error> {
        let result = self.unpack(&mut packed, from);
        let senseless = match &result {
            Ok(()) => false,
            Err(Halt::Unwanted) => taker.recv() == Ok(true),
            Err(Halt::Failed(error)) => matches!(error, Error::Malformed { .. }),
        };
        // The other thread may be done with everything.
        let _: Result<(), _> = checker.send(senseless);
        match result {
            Ok(()) | Err(Halt::Unwanted) => Ok(()),
            Err(Halt::Failed(error)) => Err(error),
        }
    }

    fn unpack(&self, packed: &mut Packed, from: Option<Stand>) -> Result<(), Halt> {
        match from {
            Some(Stand::Plain) => return self.pass_on(packed),
            Some(stand) => {
                let decoder = Decoder::resume(&stand).map_err(|error| self.unreadable(error))?;
                let decoder = decoder.ok_or_else(|| self.broken_checkpoint())?;
                return self.decode(packed, decoder);
            }
            None => {}
        }
        let head = packed.peek(MAGIC).map_err(|error| self.unreadable(error))?;
        let compression = sniff(head);
        if compression == Compression::None {
            return self.pass_on(packed);
        }
        if let Some(decoder) = Decoder::new(compression).map_err(|error| self.unreadable(error))? {
            return self.decode(packed, decoder);
        }
        let (compression, mut unpacked) = decompress(packed, &self.place.image)?;
        self.send(Block::Begin(compression))?;
        while let Some(block) = self.read(&mut unpacked)? {
            self.send(Block::Bytes(block))?;
        }
        self.send(Block::End)
    }

    /// A layer that is not packed.
    fn pass_on(&self, packed: &mut Packed) -> Result<(), Halt> {
        self.send(Block::Begin(Compression::None))?;
        let mut since = Since::now();
        while let Some(block) = self.read(packed)? {
            since.bytes += block.len() as u64;
            self.send(Block::Bytes(block))?;
            if since.is_enough(self.every) {
                since = Since::now();
                self.mark(packed, packed.piece.to_vec(), Stand::Plain)?;
            }
        }
        self.send(Block::End)
    }

    /// A layer whose decoder can be stopped.
    fn decode(&self, packed: &mut Packed, mut decoder: Decoder) -> Result<(), Halt> {
        self.send(Block::Begin(decoder.compression()))?;
        let (mut input, mut since, mut ended) = (Bytes::new(), Since::now(), false);
        let (mut block, mut filled) = (self.empty(), 0);
        loop {
            if input.is_empty() && !ended {
                match packed.piece().map_err(|error| self.unreadable(error))? {
                    Some(piece) => {
                        since.bytes += piece.len() as u64;
                        input = piece;
                    }
                    None => ended = true,
                }
            }
            let step = decoder
                .step(&input, &mut block[filled..], since.is_enough(self.every))
                .map_err(|error| self.unreadable(error))?;
            drop(input.split_to(step.taken));
            filled += step.given;
            let stopped = decoder.stop();
            if filled == BLOCK || stopped.is_some() {
                block.truncate(filled);
                self.send(Block::Bytes(std::mem::replace(&mut block, self.empty())))?;
                filled = 0;
            }
            if let Some(stand) = stopped {
                since = Since::now();
                self.mark(packed, input.to_vec(), stand)?;
            }
            if ended && step.is_idle() {
                break;
            }
        }
        if !decoder.is_complete() {
            return Err(self.unreadable(io::ErrorKind::UnexpectedEof.into()));
        }
        block.truncate(filled);
        self.send(Block::Bytes(block))?;
        self.send(Block::End)
    }

    /// Sends a mark. `rest` is what is not used of the pieces that have come.
    fn mark(&self, packed: &Packed, rest: Vec<u8>, stand: Stand) -> Result<(), Halt> {
        self.send(Block::Mark(Box::new(Mark {
            position: packed.end.clone(),
            rest,
            stand,
        })))
    }

    /// A block to fill. One that was full before need not be cleared.
    fn empty(&self) -> Vec<u8> {
        let mut block = self.used.try_recv().unwrap_or_default();
        block.resize(BLOCK, 0);
        block
    }

    fn send(&self, block: Block) -> Result<(), Halt> {
        self.blocks.send(block).map_err(|_| Halt::Unwanted)
    }

    /// Reads a block; none at the end.
    fn read(&self, from: &mut dyn Read) -> Result<Option<Vec<u8>>, Halt> {
        let mut block = Vec::with_capacity(BLOCK);
        let read = from.take(BLOCK as u64).read_to_end(&mut block);
        read.map_err(|error| self.unreadable(error))?;
        Ok((!block.is_empty()).then_some(block))
    }

    fn unreadable(&self, error: io::Error) -> Halt {
        Halt::Failed(unreadable(&self.place.image, error))
    }

    fn broken_checkpoint(&self) -> Halt {
        Halt::Failed(Error::Corrupt {
            image: self.place.image.clone(),
            blob: None,
            reason: "what an earlier pull has written down about it cannot be used".to_owned(),
        })
    }
}
