//! The uncompressed bytes of a tar, as a reader of entries takes them: from a blob, or straight from a file.

use std::os::fd::BorrowedFd;

use rustix::fs::fstat;
use rustix::io::{pread, retry_on_intr, write};
use sha2::{Digest, Sha256};

use super::blob::{Blob, Decoder};
use crate::error::{Error, Result};

const BUFFER_BYTES: usize = 128 << 10;
/// Below this, no ratio says anything: a few files of zeros are no bomb.
const RATIO_FROM_BYTES: u64 = 64 << 20;

/// Bytes one after the other.
pub trait Stream {
    /// Returns bytes that are next, at least one; none at the end.
    fn fill(&mut self) -> Result<&[u8]>;

    /// Takes bytes that `fill` returned.
    fn consume(&mut self, n_bytes: usize);

    /// Passes over bytes; an error if there are fewer.
    fn skip(&mut self, mut n_bytes: u64) -> Result<()> {
        while n_bytes > 0 {
            let n_there = self.fill()?.len();
            if n_there == 0 {
                return Err(truncated());
            }
            let n_taken = usize::try_from(n_bytes).map_or(n_there, |n_bytes| n_bytes.min(n_there));
            self.consume(n_taken);
            n_bytes -= n_taken as u64;
        }
        Ok(())
    }

    /// Fills `target`; an error if there are fewer bytes.
    fn read_exact(&mut self, target: &mut [u8]) -> Result<()> {
        let mut n_done = 0;
        while n_done < target.len() {
            let bytes = self.fill()?;
            if bytes.is_empty() {
                return Err(truncated());
            }
            let n_taken = bytes.len().min(target.len() - n_done);
            target[n_done..n_done + n_taken].copy_from_slice(&bytes[..n_taken]);
            self.consume(n_taken);
            n_done += n_taken;
        }
        Ok(())
    }
}

/// The archive ends where more must come; whoever knows the entry adds it.
#[must_use]
pub fn truncated() -> Error {
    Error::archive(b"", "the archive is truncated")
}

/// How large a stream may become.
#[derive(Debug, Clone, Copy)]
pub struct StreamLimits {
    /// In total.
    pub n_bytes_max: u64,
    /// Unpacked over packed bytes, once 64 MiB came out.
    pub ratio_max: u64,
}

/// A blob's decompressed bytes, hashed, counted and bounded.
pub struct Unpacked<'a> {
    decoder: Decoder<'a>,
    limits: StreamLimits,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    n_bytes: u64,
    /// None if nothing is compressed: the blob's own digest is the same.
    hasher: Option<Sha256>,
    /// Takes what came out as well.
    copy: Option<BorrowedFd<'a>>,
}

impl<'a> Unpacked<'a> {
    /// Detects the compression.
    pub fn new(blob: Blob<'a>, limits: StreamLimits) -> Result<Self> {
        let decoder = Decoder::detect(blob)?;
        let hasher = (!matches!(decoder, Decoder::Plain(_))).then(Sha256::new);
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        Ok(Self { decoder, limits, buffer, start: 0, end: 0, n_bytes: 0, hasher, copy: None })
    }

    /// Writes what comes out to a file as well, from its present position on.
    #[must_use]
    pub fn copied_to(self, copy: BorrowedFd<'a>) -> Self {
        Self { copy: Some(copy), ..self }
    }

    /// Reads to the end of the stream and of the blob, whatever follows the archive.
    pub fn drain(&mut self) -> Result<()> {
        loop {
            let n_bytes = self.fill()?.len();
            if n_bytes == 0 {
                return self.decoder.blob_mut().report();
            }
            self.consume(n_bytes);
        }
    }

    /// Returns the uncompressed bytes that came out.
    #[must_use]
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Returns the position of the next byte in what comes out.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.n_bytes - (self.end - self.start) as u64
    }

    /// Returns the digest of the uncompressed bytes that came out.
    #[must_use]
    pub fn digest(&self) -> String {
        self.hasher.as_ref().map_or_else(|| self.blob().digest(), |hasher| super::digest_text(&hasher.clone().finalize()))
    }

    /// Returns the compressed side.
    #[must_use]
    pub fn blob(&self) -> &Blob<'a> {
        self.decoder.blob()
    }

    fn check(&self) -> Result<()> {
        if self.n_bytes > self.limits.n_bytes_max {
            return Err(Error::archive(b"", format!("the archive unpacks to more than {} bytes", self.limits.n_bytes_max)));
        }
        let allowed = self.blob().n_bytes().saturating_mul(self.limits.ratio_max);
        if self.n_bytes > RATIO_FROM_BYTES && self.n_bytes > allowed {
            let why = format!("the archive unpacks to more than {} times its size", self.limits.ratio_max);
            return Err(Error::archive(b"", why));
        }
        Ok(())
    }
}

impl Stream for Unpacked<'_> {
    fn fill(&mut self) -> Result<&[u8]> {
        if self.start == self.end {
            self.start = 0;
            // Up to the limit everything is handed out, so that the error names the entry that goes over it.
            let n_allowed = usize::try_from(self.limits.n_bytes_max - self.n_bytes).unwrap_or(usize::MAX);
            let n_wanted = self.buffer.len().min(n_allowed.max(1));
            self.end = self.decoder.read(&mut self.buffer[..n_wanted])?;
            self.n_bytes += self.end as u64;
            self.check()?;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&self.buffer[..self.end]);
            }
            if let Some(copy) = self.copy {
                write_all(copy, &self.buffer[..self.end])?;
            }
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, n_bytes: usize) {
        self.start = (self.start + n_bytes).min(self.end);
    }
}

/// Writes all bytes at a file's present position.
pub fn write_all(file: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        let n_written = retry_on_intr(|| write(file, bytes))?;
        bytes = &bytes[n_written..];
    }
    Ok(())
}

/// A file's bytes by position, where skipping costs nothing.
pub struct Positional<'a> {
    fd: BorrowedFd<'a>,
    size_bytes: u64,
    /// Of the buffer's first byte.
    position: u64,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<'a> Positional<'a> {
    /// Starts at the file's first byte.
    pub fn new(fd: BorrowedFd<'a>) -> Result<Self> {
        let size_bytes = u64::try_from(fstat(fd)?.st_size).unwrap_or(0);
        let buffer = vec![0; super::BLOCK_BYTES * 8].into_boxed_slice();
        Ok(Self { fd, size_bytes, position: 0, buffer, start: 0, end: 0 })
    }

    /// Returns the position of the next byte.
    #[must_use]
    pub fn position(&self) -> u64 {
        self.position + self.start as u64
    }
}

impl Stream for Positional<'_> {
    fn fill(&mut self) -> Result<&[u8]> {
        if self.start == self.end {
            self.position += self.end as u64;
            (self.start, self.end) = (0, 0);
            self.end = retry_on_intr(|| pread(self.fd, &mut self.buffer[..], self.position))?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, n_bytes: usize) {
        self.start = (self.start + n_bytes).min(self.end);
    }

    fn skip(&mut self, n_bytes: u64) -> Result<()> {
        let target = self.position().checked_add(n_bytes).filter(|&target| target <= self.size_bytes).ok_or_else(truncated)?;
        if target <= self.position + self.end as u64 {
            self.start = usize::try_from(target - self.position).unwrap_or(self.end);
        } else {
            (self.position, self.start, self.end) = (target, 0, 0);
        }
        Ok(())
    }
}
