//! Reads a file of an image and cuts it into chunks.

use std::io;

use super::chunk;
use crate::image::view::Guest;

/// Bytes that are read, and handed on, together. Small, because two of them are in memory for each processor.
pub(super) const BATCH: usize = 1 << 20;

/// Neighbouring chunks, holes between them included.
#[derive(Debug)]
pub(super) struct Batch {
    /// Where `data` begins in the file.
    pub(super) at: u64,
    pub(super) data: Vec<u8>,
    /// Where each chunk begins in `data`, and its length.
    pub(super) chunks: Vec<(usize, usize)>,
}

/// Hands all chunks from `start` to `end` on, in their order. No chunk goes beyond `end`, so that every region of a disk is
/// cut by itself, whatever lies before it.
pub(super) fn cut<E: From<io::Error>>(
    guest: &dyn Guest,
    start: u64,
    end: u64,
    mut take: impl FnMut(Batch) -> Result<(), E>,
) -> Result<(), E> {
    let mut at = start;
    // What was read before and is not cut yet; it begins at `at`.
    let mut left: Vec<u8> = Vec::new();
    while at < end {
        if left.is_empty() {
            let Some(data) = guest.next_data(at..end)? else {
                return Ok(());
            };
            // Holes of the file are a hint; where chunks end must not depend on them.
            let block = chunk::BLOCK as u64;
            at = at.max(start + (data.start.max(start) - start) / block * block);
            if at >= end {
                return Ok(());
            }
        }
        let length = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(BATCH + chunk::MOST);
        let mut data = std::mem::take(&mut left);
        let had = data.len();
        data.resize(length, 0);
        guest.read(&mut data[had..], at + had as u64)?;
        let is_last = at + length as u64 == end;
        let (mut done, mut chunks) = (0, Vec::new());
        while done < length && (is_last || length - done >= chunk::MOST) {
            done += chunk::hole(&data[done..]);
            if done == length || !(is_last || length - done >= chunk::MOST) {
                break;
            }
            let next = chunk::length(&data[done..]);
            chunks.push((done, next));
            done += next;
        }
        left = data[done..].to_vec();
        data.truncate(done);
        let batch = Batch { at, data, chunks };
        at += done as u64;
        if !batch.chunks.is_empty() {
            take(batch)?;
        }
    }
    Ok(())
}
