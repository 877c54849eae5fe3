//! Layers as archives: unpacking, packing and listing tars.
//!
//! `header`, `pax` and `sparse` parse bytes and touch nothing; `reader` turns a stream of bytes into entries; `unpack`
//! turns entries into files below one folder (`root`), by the `rules` that [`crate::erofs`] has too; `index` lists them; `pack` goes the other way,
//! `holes` tells it what of a file is data. An archive is
//! hostile until proven otherwise: every number is checked before it is used, and every error names the entry.
//!
//! Source: POSIX.1-2017 pax (ustar and extended headers), GNU tar's manual (appendix "Tar Internals": long names, the
//! sparse formats), the OCI image specification's `layer.md` (whiteouts), and the kernel's `overlayfs.rst`.

pub mod blob;
pub mod header;
pub mod holes;
pub mod index;
pub mod pack;
pub mod pax;
pub mod reader;
pub mod root;
pub mod rules;
pub mod sparse;
pub mod stream;
pub mod unpack;
pub mod writer;

use std::os::fd::BorrowedFd;

use rustix::io::{pread, retry_on_intr};
use sha2::{Digest, Sha256};

use crate::error::Result;

/// Tars are made of blocks of this many bytes.
pub const BLOCK_BYTES: usize = 512;

/// Returns "sha256:" and the digest in hexadecimal.
#[must_use]
pub fn digest_text(digest: &[u8]) -> String {
    use std::fmt::Write;
    digest.iter().fold("sha256:".to_owned(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns the digest of all bytes of a file from its start, whatever its position.
pub fn file_digest(file: BorrowedFd<'_>) -> Result<String> {
    let mut buffer = vec![0; 256 << 10];
    let mut hasher = Sha256::new();
    let mut position = 0;
    loop {
        match retry_on_intr(|| pread(file, &mut buffer[..], position))? {
            0 => return Ok(digest_text(&hasher.finalize())),
            n_read => {
                hasher.update(&buffer[..n_read]);
                position += n_read as u64;
            }
        }
    }
}
