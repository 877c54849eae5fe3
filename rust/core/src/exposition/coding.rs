//! Pieces of compressed streams, made once and sent many times.
//!
//! A piece of a gzip stream is whole blocks of DEFLATE that refer to nothing before them and end at a byte's border, so that any pieces one
//! behind another are a stream; it lacks a header, a last block and a trailer with the CRC of it all, which `combine` makes of the pieces'.
//! A piece of a zstd stream is a frame. Sources: RFC 1951, RFC 1952, RFC 8878; the polynomial arithmetic is that of zlib's crc32_combine.

use std::io;

use flate2::{Compress, Compression, Crc, FlushCompress, Status};

/// Half of what level 6 takes, for a sixth more bytes: the figures of each sandbox are compressed with each round.
const DEFLATE_LEVEL: u32 = 1;
const ZSTD_LEVEL: i32 = 1;
/// What a block of stored bytes adds to each 64 KiB, the empty block at the end, and some room.
const OVERHEAD_BYTES: usize = 64;

/// Blocks of DEFLATE, and the CRC-32 of what they hold.
pub struct Deflated {
    /// The blocks.
    pub data: Vec<u8>,
    /// Of what they hold.
    pub crc32: u32,
}

/// Deflates texts, each for itself.
pub fn deflate(texts: &[&[u8]]) -> io::Result<Vec<Deflated>> {
    let mut state = Compress::new(Compression::new(DEFLATE_LEVEL), false);
    texts.iter().map(|text| deflate_one(&mut state, text)).collect()
}

fn deflate_one(state: &mut Compress, text: &[u8]) -> io::Result<Deflated> {
    state.reset();
    let mut data = Vec::with_capacity(text.len() / 4 + OVERHEAD_BYTES);
    loop {
        let done = usize::try_from(state.total_in()).map_err(io::Error::other)?;
        let status = state.compress_vec(&text[done..], &mut data, FlushCompress::Sync).map_err(io::Error::other)?;
        let is_taken = state.total_in() == text.len() as u64;
        if is_taken && data.len() < data.capacity() {
            break; // there was room for more, so that was all
        }
        if status == Status::StreamEnd {
            return Err(io::Error::other("a stream ended that nobody ended"));
        }
        data.reserve(data.len() + OVERHEAD_BYTES);
    }
    let mut crc = Crc::new();
    crc.update(text);
    Ok(Deflated { data, crc32: crc.sum() })
}

/// Compresses texts to frames.
pub fn zstd_frames(texts: &[&[u8]]) -> io::Result<Vec<Vec<u8>>> {
    let mut state = zstd::bulk::Compressor::new(ZSTD_LEVEL)?;
    texts.iter().map(|text| state.compress(text)).collect()
}

/// The polynomial of CRC-32, its lowest power in the highest bit.
const POLYNOMIAL: u32 = 0xEDB8_8320;
const ONE: u32 = 1 << 31;
/// x to the powers 8, 16, 32, ...: what 1, 2, 4, ... bytes multiply a sum by.
const POWERS: [u32; 64] = powers();
const N_CACHED: usize = 1024;

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

/// Puts the CRC-32s of pieces together to that of all of them. Most pieces of one family have the same length in each sandbox.
pub struct Combiner {
    crc32: u32,
    /// By the lowest bits of a length: the length, and what that many bytes multiply a sum by.
    factors: Vec<(u64, u32)>,
}

impl Default for Combiner {
    fn default() -> Self {
        Self { crc32: 0, factors: vec![(0, ONE); N_CACHED] }
    }
}

impl Combiner {
    /// Adds the sum of the next piece.
    pub fn add(&mut self, crc32: u32, n_bytes: u64) {
        #[expect(clippy::cast_possible_truncation, reason = "the lowest bits are what is wanted")]
        let slot = &mut self.factors[n_bytes as usize % N_CACHED];
        if slot.0 != n_bytes {
            let bits = (0..64).filter(|bit| n_bytes >> bit & 1 == 1);
            *slot = (n_bytes, bits.fold(ONE, |factor, bit| multiply(factor, POWERS[bit])));
        }
        self.crc32 = multiply(slot.1, self.crc32) ^ crc32;
    }

    /// Returns the sum of all.
    pub fn finish(&self) -> u32 {
        self.crc32
    }
}
