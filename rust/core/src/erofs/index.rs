//! A layer taken in, in one pass: decompressed, hashed, written as a plain archive, its entries put together, the index written.

use std::os::fd::BorrowedFd;

use sha2::{Digest, Sha256};

use super::BLOCK_BYTES;
use super::chunks::too_large;
use super::image::{self, Archive};
use super::tree::Tree;
use crate::archive;
use crate::archive::blob::{Blob, Extent, Progress};
use crate::archive::digest_text;
use crate::archive::reader::Reader;
use crate::archive::rules::{self, Limits, Rules};
use crate::archive::stream::{StreamLimits, Unpacked, write_all};
use crate::error::{Error, Result};

/// What was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The layer.
    pub layer: rules::Summary,
    /// Of the archive's file: padded to whole blocks.
    pub n_tar_bytes: u64,
    /// Of the index.
    pub n_index_bytes: u64,
    /// Of the index.
    pub index_digest: String,
}

/// Where the two files go; both are empty.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// Takes the archive.
    pub tar: BorrowedFd<'a>,
    /// Takes the index.
    pub index: BorrowedFd<'a>,
}

/// Takes a layer in. On any failure the targets hold something of no use.
pub fn index<'a>(
    source: BorrowedFd<'a>,
    extent: Extent,
    targets: Targets<'a>,
    limits: &Limits,
    progress: Option<Progress<'a>>,
) -> Result<Summary> {
    let blob = Blob::new(source, extent, progress)?;
    let stream_limits = StreamLimits { n_bytes_max: limits.unpacked_bytes_max, ratio_max: limits.ratio_max };
    let mut reader = Reader::new(Unpacked::new(blob, stream_limits)?.copied_to(targets.tar));
    let mut rules = Rules::new(*limits);
    let mut tree = Tree::default();
    while let Some(entry) = reader.next_entry()? {
        let position = reader.stream().position();
        rules.admit(&entry).and_then(|()| tree.apply(&entry, position)).map_err(|error| named(error, &entry.name))?;
    }
    reader.stream_mut().drain()?;
    let stream = reader.stream();
    let n_bytes = stream.n_bytes();
    let n_blocks = u32::try_from(n_bytes.div_ceil(BLOCK_BYTES)).map_err(|_| too_large())?;
    let n_tar_bytes = u64::from(n_blocks) * BLOCK_BYTES;
    let padding = usize::try_from(n_tar_bytes - n_bytes).unwrap_or(0);
    write_all(targets.tar, &[0; archive::BLOCK_BYTES][..padding])?;
    let diff_id = stream.digest();
    let digest = diff_id.rsplit(':').next().unwrap_or_default();
    let bytes = image::write(&tree, Archive { n_blocks, digest })?;
    write_all(targets.index, &bytes)?;
    let layer = rules::Summary {
        blob_digest: stream.blob().digest(),
        n_blob_bytes: stream.blob().n_bytes(),
        n_unpacked_bytes: n_bytes,
        n_entries: rules.n_entries(),
        diff_id,
    };
    Ok(Summary { layer, n_tar_bytes, n_index_bytes: bytes.len() as u64, index_digest: digest_text(&Sha256::digest(&bytes)) })
}

fn named(error: Error, name: &[u8]) -> Error {
    match error {
        Error::Archive { entry, why } if entry.is_empty() => Error::Archive { entry: name.to_vec(), why },
        Error::NotIndexable { entry, why } if entry.is_empty() => Error::NotIndexable { entry: name.to_vec(), why },
        other => other,
    }
}
