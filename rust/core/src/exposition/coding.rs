//! Pieces of compressed streams, made once and sent many times.
//!
//! A piece of a gzip stream is whole blocks of DEFLATE that refer to nothing before them and end at a byte's border, so that any pieces one
//! behind another are a stream; it lacks a header, a last block and a trailer with the CRC of it all, which `Combiner` makes of the pieces'.
//! A piece of a zstd stream is a frame. Sources: RFC 1951, RFC 1952, RFC 8878; the polynomial arithmetic is that of zlib's crc32_combine.
//!
//! A pack is many pieces in one run of bytes: for each an `ENTRY` (where it begins, the CRC-32 of what it holds, 0 in zstd, and how many
//! bytes that is), then the pieces. An answer takes the same piece of a thousand packs: that each is one object and not a hundred is what
//! makes this a matter of copying.

use std::io;

use flate2::{Compress, Compression, Crc, FlushCompress, Status};

/// Half of what level 6 takes, for a sixth more bytes: the figures of each sandbox are compressed with each round.
const DEFLATE_LEVEL: u32 = 1;
const ZSTD_LEVEL: i32 = 1;
/// What a block of stored bytes adds to each 64 KiB, the empty block at the end, and some room.
const OVERHEAD_BYTES: usize = 64;
/// Three numbers of four bytes, the lowest byte first.
const ENTRY_BYTES: usize = 12;

/// What a pack is made with.
pub enum Coder {
    /// As pieces of a gzip stream.
    Gzip(Compress),
    /// As frames of zstd.
    Zstd(zstd::bulk::Compressor<'static>),
}

/// What becomes a piece.
pub enum Source<'a> {
    /// A text.
    Text(&'a [u8]),
    /// The piece of that number of the pack before, as it is.
    Before(usize),
}

/// A piece of a pack.
pub struct Piece<'a> {
    /// What is sent.
    pub data: &'a [u8],
    /// Of what it holds; 0 in zstd, which needs none.
    pub crc32: u32,
    /// How many bytes it holds.
    pub n_bytes: u32,
}

impl<'a> Piece<'a> {
    /// Returns a piece of a pack, None if there is none of that number.
    pub fn of(pack: &'a [u8], number: usize) -> Option<Self> {
        let word = |at: usize| pack.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let entry = number.checked_mul(ENTRY_BYTES)?;
        let first = word(0)? as usize;
        if entry >= first {
            return None;
        }
        let next = entry + ENTRY_BYTES;
        let end = if next < first { word(next)? as usize } else { pack.len() };
        Some(Self { data: pack.get(word(entry)? as usize..end)?, crc32: word(entry + 4)?, n_bytes: word(entry + 8)? })
    }
}

impl Coder {
    /// Returns what codes as a word says, None for a word that is not known.
    pub fn of(coding: &str) -> io::Result<Option<Self>> {
        Ok(match coding {
            "gzip" => Some(Self::Gzip(Compress::new(Compression::new(DEFLATE_LEVEL), false))),
            "zstd" => Some(Self::Zstd(zstd::bulk::Compressor::new(ZSTD_LEVEL)?)),
            _ => None,
        })
    }

    /// Makes a pack.
    pub fn pack(&mut self, sources: &[Source<'_>], before: &[u8]) -> io::Result<Vec<u8>> {
        let mut made = vec![0; sources.len() * ENTRY_BYTES];
        for (number, source) in sources.iter().enumerate() {
            let begin = u32::try_from(made.len()).map_err(io::Error::other)?;
            let (crc32, n_bytes) = match *source {
                Source::Text(text) => (self.add(text, &mut made)?, u32::try_from(text.len()).map_err(io::Error::other)?),
                Source::Before(other) => {
                    let piece = Piece::of(before, other).ok_or_else(|| io::Error::other("no such piece before"))?;
                    made.extend_from_slice(piece.data);
                    (piece.crc32, piece.n_bytes)
                }
            };
            let entry = &mut made[number * ENTRY_BYTES..][..ENTRY_BYTES];
            for (place, word) in entry.chunks_exact_mut(4).zip([begin, crc32, n_bytes]) {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        Ok(made)
    }

    /// Adds a text as a piece; returns its sum.
    fn add(&mut self, text: &[u8], made: &mut Vec<u8>) -> io::Result<u32> {
        match self {
            Self::Gzip(state) => deflate(state, text, made),
            Self::Zstd(state) => {
                made.extend_from_slice(&state.compress(text)?);
                Ok(0)
            }
        }
    }
}

fn deflate(state: &mut Compress, text: &[u8], made: &mut Vec<u8>) -> io::Result<u32> {
    state.reset();
    made.reserve(text.len() / 4 + OVERHEAD_BYTES);
    loop {
        let done = usize::try_from(state.total_in()).map_err(io::Error::other)?;
        let status = state.compress_vec(&text[done..], made, FlushCompress::Sync).map_err(io::Error::other)?;
        let is_taken = state.total_in() == text.len() as u64;
        if is_taken && made.len() < made.capacity() {
            break; // there was room for more, so that was all
        }
        if status == Status::StreamEnd {
            return Err(io::Error::other("a stream ended that nobody ended"));
        }
        made.reserve(text.len() / 4 + OVERHEAD_BYTES);
    }
    let mut crc = Crc::new();
    crc.update(text);
    Ok(crc.sum())
}

/// The polynomial of CRC-32, its lowest power in the highest bit.
const POLYNOMIAL: u32 = 0xEDB8_8320;
const ONE: u32 = 1 << 31;
/// x to the powers 8, 16, 32, ...: what 1, 2, 4, ... bytes multiply a sum by.
const POWERS: [u32; 64] = powers();

const fn multiply(a: u32, b: u32) -> u32 {
    let mut product = 0;
    let mut term = b;
    let mut bits = a;
    while bits != 0 {
        if bits & ONE != 0 {
            product ^= term;
        }
        bits <<= 1;
        term = if term & 1 == 0 { term >> 1 } else { (term >> 1) ^ POLYNOMIAL };
    }
    product
}

const fn powers() -> [u32; 64] {
    let mut table = [ONE >> 8; 64];
    let mut at = 1;
    while at < 64 {
        table[at] = multiply(table[at - 1], table[at - 1]);
        at += 1;
    }
    table
}

/// Puts the CRC-32s of pieces together to that of all of them. Most pieces of one family have one of a few lengths.
#[derive(Default)]
pub struct Combiner {
    crc32: u32,
    /// By the lowest bits of a length: the length, and what that many bytes multiply a sum by.
    factors: [(u64, u32); 16],
}

impl Combiner {
    /// Adds the sum of the next piece.
    pub fn add(&mut self, crc32: u32, n_bytes: u64) {
        if self.crc32 == 0 || n_bytes == 0 {
            self.crc32 ^= crc32;
            return;
        }
        #[expect(clippy::cast_possible_truncation, reason = "the lowest bits are what is wanted")]
        let slot = &mut self.factors[n_bytes as usize % 16];
        if slot.0 != n_bytes {
            let bits = (0..64).filter(|bit| n_bytes >> bit & 1 == 1);
            *slot = (n_bytes, bits.fold(ONE, |factor, bit| multiply(factor, POWERS[bit])));
        }
        self.crc32 = multiply(self.crc32, slot.1) ^ crc32;
    }

    /// Returns the sum of all.
    pub fn finish(&self) -> u32 {
        self.crc32
    }
}
