//! An outer tar (docker-archive, OCI layout) listed by positions, its data never read.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::reader::{Kind, Reader};
use super::stream::Positional;
use crate::error::{Error, Result};

/// An image has some hundred blobs.
const N_MEMBERS_MAX: usize = 1 << 20;
const NAME_BYTES_MAX: usize = 4096;

/// A regular file or link of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name, without a leading "./".
    pub name: Vec<u8>,
    /// Where its data begins.
    pub offset: u64,
    /// How much data it has; all of it lies in the file.
    pub n_bytes: u64,
    /// What a link points to, else empty.
    pub link_target: Vec<u8>,
}

/// Lists an uncompressed tar.
pub fn index(source: BorrowedFd<'_>) -> Result<Vec<Member>> {
    if rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(source)?.st_mode) != rustix::fs::FileType::RegularFile {
        return Err(Errno::SPIPE.into());
    }
    let mut reader = Reader::new(Positional::new(source)?);
    let mut members = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let offset = reader.stream().position();
        let (n_bytes, link_target) = match entry.kind {
            Kind::File => (entry.n_data_bytes, Vec::new()),
            Kind::HardLink | Kind::Symlink => (0, entry.link),
            Kind::SparseFile(_) => return Err(Error::archive(&entry.name, "a sparse file cannot be read in place")),
            _ => continue,
        };
        if members.len() >= N_MEMBERS_MAX || entry.name.len().max(link_target.len()) > NAME_BYTES_MAX {
            return Err(Error::archive(&entry.name, "the archive has too many members, or too long names"));
        }
        members.push(Member { name: stripped(&entry.name).to_vec(), offset, n_bytes, link_target });
    }
    Ok(members)
}

fn stripped(mut name: &[u8]) -> &[u8] {
    while let Some(rest) = name.strip_prefix(b"./") {
        name = rest;
    }
    name
}
