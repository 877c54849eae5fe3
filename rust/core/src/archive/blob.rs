//! The compressed bytes of a layer: read from a descriptor once, hashed and counted on the way, and decompressed.

use std::io::{self, BufRead, Read};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use flate2::bufread::MultiGzDecoder;
use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, pread, read, retry_on_intr};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

const BUFFER_BYTES: usize = 128 << 10;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
/// What detection looks at.
const MAGIC_BYTES: usize = 6;
/// zstd's own default bound: frames that want more than 128 MiB of window are refused.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Called with the compressed bytes consumed so far; false asks to stop.
pub type Progress<'a> = Box<dyn FnMut(u64) -> bool + 'a>;

/// Where a blob lies: `n_bytes` from `offset`, or all from there if None.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// First byte; a pipe has none but 0.
    pub offset: u64,
    /// How many, None: to the end.
    pub n_bytes: Option<u64>,
}

/// A buffered, hashing reader of a file or a pipe.
pub struct Blob<'a> {
    fd: BorrowedFd<'a>,
    /// The next position to read; None for what cannot seek.
    position: Option<u64>,
    left: Option<u64>,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    n_bytes: u64,
    hasher: Sha256,
    progress: Option<Progress<'a>>,
    reported_at: Instant,
    failure: Option<Error>,
}

impl<'a> Blob<'a> {
    /// Looks at what `fd` is; reads nothing yet.
    pub fn new(fd: BorrowedFd<'a>, extent: Extent, progress: Option<Progress<'a>>) -> Result<Self> {
        let kind = FileType::from_raw_mode(fstat(fd)?.st_mode);
        let can_seek = matches!(kind, FileType::RegularFile | FileType::BlockDevice);
        if !can_seek && extent.offset != 0 {
            return Err(Errno::SPIPE.into());
        }
        Ok(Self {
            fd,
            position: can_seek.then_some(extent.offset),
            left: extent.n_bytes,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            n_bytes: 0,
            hasher: Sha256::new(),
            progress,
            reported_at: Instant::now(),
            failure: None,
        })
    }

    /// Returns how many bytes were read from the descriptor.
    #[must_use]
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Returns the digest of all bytes read.
    #[must_use]
    pub fn digest(&self) -> String {
        super::digest_text(&self.hasher.clone().finalize())
    }

    /// Reports progress now.
    pub fn report(&mut self) -> Result<()> {
        self.reported_at = Instant::now();
        let n_bytes = self.n_bytes;
        let goes_on = self.progress.as_mut().is_none_or(|progress| progress(n_bytes));
        if goes_on { Ok(()) } else { Err(Error::Stopped) }
    }

    /// Reads until the first bytes are there that tell the format.
    fn magic(&mut self) -> Result<&[u8]> {
        while self.end < MAGIC_BYTES && self.refill()? > 0 {}
        Ok(&self.buffer[..self.end])
    }

    /// Appends what the descriptor gives to the buffer; returns how much that is, 0 at the end.
    fn refill(&mut self) -> Result<usize> {
        let room = self.buffer.len() - self.end;
        let n_wanted = self.left.map_or(room, |left| room.min(usize::try_from(left).unwrap_or(room)));
        let (fd, position) = (self.fd, self.position);
        let space = &mut self.buffer[self.end..self.end + n_wanted];
        let n_read = retry_on_intr(|| match position {
            Some(position) => pread(fd, &mut *space, position),
            None => read(fd, &mut *space),
        })?;
        if n_read == 0 && self.left.is_some_and(|left| left > 0) && n_wanted > 0 {
            return Err(Error::archive(b"", "the blob ends before its size"));
        }
        self.hasher.update(&self.buffer[self.end..self.end + n_read]);
        self.end += n_read;
        self.n_bytes += n_read as u64;
        self.position = position.map(|position| position + n_read as u64);
        self.left = self.left.map(|left| left - n_read as u64);
        if self.reported_at.elapsed() >= PROGRESS_INTERVAL {
            self.report()?;
        }
        Ok(n_read)
    }
}

impl BufRead for Blob<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let Err(error) = self.refill() {
                // Decoders only pass on io::Errors; the cause waits here for `Decoder::read`.
                self.failure = Some(error);
                return Err(io::Error::other("see Blob::failure"));
            }
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, n_bytes: usize) {
        self.start = (self.start + n_bytes).min(self.end);
    }
}

impl Read for Blob<'_> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let n_bytes = self.fill_buf()?.read(target)?;
        self.consume(n_bytes);
        Ok(n_bytes)
    }
}

/// A blob and what undoes its compression.
pub enum Decoder<'a> {
    /// Not compressed.
    Plain(Box<Blob<'a>>),
    /// gzip, of one or more members.
    Gzip(Box<MultiGzDecoder<Blob<'a>>>),
    /// zstd, of one or more frames.
    Zstd(Box<zstd::stream::read::Decoder<'static, Blob<'a>>>),
}

impl<'a> Decoder<'a> {
    /// Detects the compression by its magic number.
    pub fn detect(mut blob: Blob<'a>) -> Result<Self> {
        match *blob.magic()? {
            [0x1f, 0x8b, ..] => Ok(Self::Gzip(Box::new(MultiGzDecoder::new(blob)))),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(blob)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Ok(Self::Zstd(Box::new(decoder)))
            }
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err(Error::archive(b"", "compressed with xz, which layers do not use")),
            [b'B', b'Z', b'h', ..] => Err(Error::archive(b"", "compressed with bzip2, which layers do not use")),
            _ => Ok(Self::Plain(Box::new(blob))),
        }
    }

    /// Reads decompressed bytes; 0 at the end.
    pub fn read(&mut self, target: &mut [u8]) -> Result<usize> {
        let read = match self {
            Self::Plain(blob) => blob.read(target),
            Self::Gzip(decoder) => decoder.read(target),
            Self::Zstd(decoder) => decoder.read(target),
        };
        read.map_err(|error| match self.blob_mut().failure.take() {
            Some(failure) => failure,
            None if error.kind() == io::ErrorKind::UnexpectedEof => Error::archive(b"", "the compressed data is truncated"),
            None => Error::archive(b"", format!("the compressed data is damaged: {error}")),
        })
    }

    /// Returns the blob.
    pub fn blob(&self) -> &Blob<'a> {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Zstd(decoder) => decoder.get_ref(),
        }
    }

    /// Returns the blob, to report progress.
    pub fn blob_mut(&mut self) -> &mut Blob<'a> {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Zstd(decoder) => decoder.get_mut(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    /// What a pipe that is fed `bytes` in pieces of `piece` decodes to.
    fn through_pipe(bytes: &[u8], piece: usize) -> Result<(Vec<u8>, String)> {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut writer = std::fs::File::from(writer);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for chunk in bytes.chunks(piece) {
                    // The reader may stop early at an error.
                    if writer.write_all(chunk).is_err() {
                        break;
                    }
                }
            });
            let blob = Blob::new(reader.as_fd(), Extent { offset: 0, n_bytes: None }, None)?;
            let mut decoder = Decoder::detect(blob)?;
            let mut all = Vec::new();
            let mut buffer = [0; 777];
            loop {
                match decoder.read(&mut buffer)? {
                    0 => return Ok((all, decoder.blob().digest())),
                    n_read => all.extend_from_slice(&buffer[..n_read]),
                }
            }
        })
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn formats_are_told_apart_even_byte_by_byte() {
        let text: Vec<u8> = (0..50_000_u32).flat_map(u32::to_le_bytes).collect();
        let members = [gzip(&text[..7]), gzip(&text[7..])].concat();
        let frames = [zstd::encode_all(&text[..9], 1).unwrap(), zstd::encode_all(&text[9..], 1).unwrap()].concat();
        for packed in [&text, &members, &frames] {
            for piece in [1, 4096] {
                let (found, digest) = through_pipe(packed, piece).unwrap();
                assert!(found == text);
                assert_eq!(digest, super::super::digest_text(&Sha256::digest(packed)));
            }
        }
    }

    #[test]
    fn damage_is_an_archive_error() {
        let packed = gzip(&[7; 5000]);
        let squeezed = zstd::encode_all(&[7; 5000][..], 1).unwrap();
        let mut flipped = packed.clone();
        flipped[packed.len() - 6] ^= 1;
        for bad in [&packed[..packed.len() - 1], &squeezed[..squeezed.len() - 1], &flipped, b"BZh91AY", b"\xfd7zXZ\0\0"] {
            assert!(matches!(through_pipe(bad, 100), Err(Error::Archive { .. })));
        }
    }
}
