//! Which parts of a file its file system stores, and the sparse map (GNU's format 1.0) that says so in an archive.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{SeekFrom, Stat, seek};
use rustix::io::Errno;

use super::BLOCK_BYTES;
use super::sparse::{N_SEGMENTS_MAX, Segment};
use super::writer::append_padding;
use crate::error::Result;

/// What a sparse entry has beside its data: an extended header and the first block of its map.
const N_BYTES_MORE: u64 = 3 * BLOCK_BYTES as u64;

/// What an entry of a sparse file consists of, in this order.
#[derive(Debug, PartialEq, Eq)]
pub struct Parts {
    /// The map, filled up to whole blocks.
    pub map: Vec<u8>,
    /// What is data.
    pub segments: Vec<Segment>,
    /// Bytes of both.
    pub n_bytes: u64,
}

/// Looks for holes; None if leaving them out saves nothing. Moves the file's position.
pub fn find(file: BorrowedFd<'_>, facts: &Stat) -> Result<Option<Parts>> {
    let size = u64::try_from(facts.st_size).unwrap_or(0);
    // Spares most files the search. What is allocated beyond the end may hide a hole, at the price of its zeros.
    if size <= N_BYTES_MORE || u64::try_from(facts.st_blocks).unwrap_or(0).saturating_mul(512) >= size {
        return Ok(None);
    }
    let parts = parts_of(segments(file, size)?, size);
    Ok((parts.n_bytes + N_BYTES_MORE < size).then_some(parts))
}

fn segments(file: BorrowedFd<'_>, size: u64) -> Result<Vec<Segment>> {
    let mut found = Vec::new();
    let mut position = 0;
    while position < size {
        let start = match seek(file.as_fd(), SeekFrom::Data(position)) {
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            start => start?.min(size),
        };
        // One stays free for the mark of the end. The last part takes all the rest, holes included.
        let is_last = found.len() + 2 >= N_SEGMENTS_MAX;
        position = if is_last { size } else { seek(file.as_fd(), SeekFrom::Hole(start))?.min(size) };
        if position > start {
            found.push((start, position - start));
        }
    }
    Ok(found)
}

fn parts_of(segments: Vec<Segment>, size: u64) -> Parts {
    let end = segments.last().map_or(0, |(offset, n_bytes)| offset + n_bytes);
    // A hole at the end is marked by a part of no bytes: some readers make the file too short without.
    let mark = (end < size).then_some((size, 0));
    let mut map = format!("{}\n", segments.len() + usize::from(mark.is_some())).into_bytes();
    for (offset, n_bytes) in segments.iter().chain(&mark) {
        map.extend_from_slice(format!("{offset}\n{n_bytes}\n").as_bytes());
    }
    let n_map_bytes = map.len() as u64;
    append_padding(&mut map, n_map_bytes);
    let n_bytes = map.len() as u64 + segments.iter().map(|(_, n_bytes)| n_bytes).sum::<u64>();
    Parts { map, segments, n_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_fill_blocks_and_mark_the_end() {
        let parts = parts_of(vec![(4096, 10)], 1 << 40);
        assert!(parts.map.starts_with(b"2\n4096\n10\n1099511627776\n0\n\0"));
        assert_eq!((parts.map.len(), parts.n_bytes), (BLOCK_BYTES, 522));
        assert!(parts_of(vec![(0, 5), (8, 2)], 10).map.starts_with(b"2\n0\n5\n8\n2\n\0"));
        assert!(parts_of(vec![], 10).map.starts_with(b"1\n10\n0\n\0"));
    }
}
