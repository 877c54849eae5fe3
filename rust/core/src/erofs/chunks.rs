//! Where a file's bytes lie in the archive: chunks of one power-of-two size, each a piece of the archive or a hole.

use super::{BLOCK_BITS, BLOCK_BYTES};
use crate::archive::sparse::Map;
use crate::error::{Error, Result};

/// A chunk of zeros that are not stored.
pub const HOLE: u32 = u32::MAX;
/// The format has five bits for the size of chunks, in powers of two from a block on.
const CHUNK_BITS_MAX: u32 = BLOCK_BITS + 31;
/// Of one file: eight bytes each in the index.
const N_CHUNKS_MAX: u64 = 1 << 20;

/// A file's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// In bytes, holes included.
    pub size: u64,
    /// Each chunk has two to the power of this many bytes.
    pub chunk_bits: u32,
    /// The block of the archive that each chunk begins at, or `HOLE`. None for an empty file.
    pub starts: Box<[u32]>,
}

impl Content {
    /// A file that lies in one piece from `position` on.
    pub fn whole(position: u64, size: u64) -> Result<Self> {
        Self::of(&[(0, size)], size, position)
    }

    /// A file of which the parts of a map follow each other from `position` on.
    pub fn sparse(position: u64, map: &Map) -> Result<Self> {
        let parts: Vec<_> = map.segments.iter().copied().filter(|&(_, n_bytes)| n_bytes > 0).collect();
        Self::of(&parts, map.size, position)
    }

    fn of(parts: &[(u64, u64)], size: u64, mut position: u64) -> Result<Self> {
        let chunk_bits = chunk_bits(parts, size)?;
        let n_chunks = size.div_ceil(1 << chunk_bits);
        if n_chunks > N_CHUNKS_MAX {
            return Err(Error::not_indexable(format!("its holes cut it into more than {N_CHUNKS_MAX} pieces")));
        }
        let mut starts = Vec::new();
        for &(offset, n_bytes) in parts {
            starts.resize(index_of(offset, chunk_bits), HOLE);
            for inside in (0..n_bytes).step_by(1 << chunk_bits) {
                starts.push(block_of(position + inside)?);
            }
            position += n_bytes;
        }
        starts.resize(index_of(size.div_ceil(1 << chunk_bits) << chunk_bits, chunk_bits), HOLE);
        Ok(Self { size, chunk_bits, starts: starts.into_boxed_slice() })
    }
}

/// Returns the largest size of chunks that no border between data and hole cuts; one chunk for the whole file where it can be.
fn chunk_bits(parts: &[(u64, u64)], size: u64) -> Result<u32> {
    let whole = u64::BITS - size.saturating_sub(1).leading_zeros();
    let borders = parts.iter().flat_map(|&(offset, n_bytes)| [offset, offset + n_bytes]).filter(|&border| border < size);
    let bits = borders.map(u64::trailing_zeros).fold(whole, u32::min);
    if bits < BLOCK_BITS && bits < whole {
        return Err(Error::not_indexable("a hole does not begin and end at a multiple of 512 bytes"));
    }
    Ok(bits.clamp(BLOCK_BITS, CHUNK_BITS_MAX))
}

fn index_of(offset: u64, chunk_bits: u32) -> usize {
    usize::try_from(offset >> chunk_bits).unwrap_or(usize::MAX)
}

fn block_of(position: u64) -> Result<u32> {
    if position % BLOCK_BYTES != 0 {
        return Err(Error::not_indexable("its data does not begin at a multiple of 512 bytes"));
    }
    u32::try_from(position / BLOCK_BYTES).ok().filter(|&block| block != HOLE).ok_or_else(too_large)
}

/// Block numbers have 32 bits.
pub fn too_large() -> Error {
    Error::not_indexable("the archive is larger than 2 TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(segments: &[(u64, u64)], size: u64) -> Result<Content> {
        Content::sparse(1024, &Map { segments: segments.to_vec(), size })
    }

    #[test]
    fn a_file_in_one_piece_is_one_chunk() {
        for (size, bits) in [(1, 9), (512, 9), (513, 10), (4096, 12), (4097, 13), ((1 << 40) - 1, 40)] {
            let content = Content::whole(1536, size).unwrap();
            assert_eq!((content.chunk_bits, &*content.starts), (bits, &[3_u32][..]), "{size}");
        }
        let huge = Content::whole(512, (2 << 40) - 512 * 4).unwrap();
        assert_eq!((huge.chunk_bits, &*huge.starts), (40, &[1_u32, (1 << 31) + 1][..]));
        assert!(Content::whole(0, 0).unwrap().starts.is_empty());
        assert!(Content::whole(2 << 40, 1).is_err());
    }

    #[test]
    fn holes_are_chunks_of_their_own() {
        let content = sparse(&[(4096, 4096), (16384, 100)], 16484).unwrap();
        assert_eq!((content.chunk_bits, &*content.starts), (12, &[HOLE, 2, HOLE, HOLE, 10][..]));
        let content = sparse(&[(1024, 512)], 1 << 20).unwrap();
        assert_eq!((content.chunk_bits, content.starts.len(), content.starts[2], content.starts[3]), (9, 2048, 2, HOLE));
        let content = sparse(&[(0, 0), (1 << 30, 0)], 1 << 30).unwrap();
        assert_eq!((content.chunk_bits, &*content.starts), (30, &[HOLE][..]));
        let adjacent = sparse(&[(0, 4096), (4096, 4096)], 8192).unwrap();
        assert_eq!(&*adjacent.starts, &[2, 10]);
    }

    #[test]
    fn what_chunks_cannot_say_is_told() {
        assert!(sparse(&[(100, 512)], 4096).is_err());
        assert!(sparse(&[(0, 10)], 4096).is_err());
        assert!(sparse(&[(0, 10), (1024, 5)], 1029).is_err());
        assert!(sparse(&[(512, 512)], 1 << 32).is_err());
        assert!(sparse(&[(0, 10)], 10).is_ok());
    }
}
