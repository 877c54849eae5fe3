//! A folder in overlayfs form packed as a layer's archive: whiteout devices become `.wh.NAME`, opaque folders get
//! `.wh..wh..opq`.
//!
//! The same tree gives the same bytes: names in the order of their bytes, no user names, no access times. Where files have
//! holes counts as well: they are left out (`holes`), since a container makes one of terabytes at no cost. Sockets are left
//! out, as they mean nothing without the process that listens.
//!
//! What `unpack` would refuse for its size is refused here, before anything of the file is written (EFBIG).

use std::collections::HashMap;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, lgetxattr, llistxattr, major, minor, openat, readlinkat, statat};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::BLOCK_BYTES;
use super::blob::Progress;
use super::holes::{self, Parts};
use super::root::is_whiteout_stat;
use super::writer::{Record, append_header, append_padding};
use crate::error::{About, Error, Result};
use crate::tree::{self, Visitor};

const BUFFER_BYTES: usize = 128 << 10;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);
/// The kernel's bound on a value, and on the list of names; and what nearly always suffices.
const XATTR_BYTES_MAX: usize = 64 << 10;
const XATTR_BYTES_USUAL: usize = 512;
const OVERLAY_XATTR: &[u8] = b"trusted.overlay.";
/// They say that a file's data or a folder's entries lie in a lower layer, or are hidden in a way that archives lack.
const OVERLAY_REFERENCES: [&[u8]; 3] = [b"trusted.overlay.metacopy", b"trusted.overlay.redirect", b"trusted.overlay.whiteout"];

/// Bounds on what is packed.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of the archive, and of all files' sizes, holes included.
    pub n_bytes_max: u64,
    /// Of one file, holes included.
    pub entry_bytes_max: u64,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Of the archive.
    pub diff_id: String,
    /// Of the archive.
    pub n_bytes: u64,
    /// Entries.
    pub n_entries: u64,
}

/// Packs the folder `source` into `target`, from its current position on. Progress is told in bytes written.
pub fn pack(source: &Path, target: BorrowedFd<'_>, limits: Limits, progress: Option<Progress<'_>>) -> Result<Summary> {
    let folder = tree::open_folder(source)?;
    let output = Output {
        file: target.try_clone_to_owned()?.into(),
        buffer: Vec::with_capacity(2 * BUFFER_BYTES),
        hasher: Sha256::new(),
        n_bytes: 0,
        n_bytes_max: limits.n_bytes_max,
        progress,
        reported_at: Instant::now(),
    };
    let mut packer = Packer { output, limits, n_entries: 0, n_file_bytes: 0, linked: HashMap::new() };
    tree::walk(folder, &mut packer).about(source)?;
    packer.output.buffer.resize(packer.output.buffer.len() + 2 * BLOCK_BYTES, 0);
    packer.output.reserve(0).about(source)?;
    packer.output.flush()?;
    let Output { hasher, n_bytes, .. } = packer.output;
    Ok(Summary { diff_id: super::digest_text(&hasher.finalize()), n_bytes, n_entries: packer.n_entries })
}

/// Buffers, hashes, counts and writes.
struct Output<'a> {
    file: File,
    buffer: Vec<u8>,
    hasher: Sha256,
    n_bytes: u64,
    n_bytes_max: u64,
    progress: Option<Progress<'a>>,
    reported_at: Instant,
}

impl Output<'_> {
    /// Refuses what would be too much beside what was written and what waits in the buffer.
    fn reserve(&self, n_bytes: u64) -> Result<()> {
        let n_taken = self.n_bytes + self.buffer.len() as u64;
        if n_taken.checked_add(n_bytes).is_some_and(|n_bytes| n_bytes <= self.n_bytes_max) { Ok(()) } else { Err(Errno::FBIG.into()) }
    }

    fn report_if_due(&mut self) -> Result<()> {
        if self.reported_at.elapsed() < PROGRESS_INTERVAL {
            return Ok(());
        }
        self.reported_at = Instant::now();
        let n_bytes = self.n_bytes;
        let goes_on = self.progress.as_mut().is_none_or(|progress| progress(n_bytes));
        if goes_on { Ok(()) } else { Err(Error::Stopped) }
    }

    fn flush(&mut self) -> Result<()> {
        self.hasher.update(&self.buffer);
        self.n_bytes += self.buffer.len() as u64;
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    fn flush_if_full(&mut self) -> Result<()> {
        self.report_if_due()?;
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Appends exactly `n_bytes` of a file from a position on.
    fn copy(&mut self, file: &mut File, offset: u64, mut n_bytes: u64) -> Result<()> {
        file.seek(SeekFrom::Start(offset))?;
        while n_bytes > 0 {
            let start = self.buffer.len();
            let n_wanted = usize::try_from(n_bytes).map_or(BUFFER_BYTES, |n_bytes| n_bytes.min(BUFFER_BYTES));
            self.buffer.resize(start + n_wanted, 0);
            let n_read = file.read(&mut self.buffer[start..])?;
            self.buffer.truncate(start + n_read);
            if n_read == 0 {
                // It shrank since its header was written.
                return Err(Errno::BUSY.into());
            }
            n_bytes -= n_read as u64;
            self.flush_if_full()?;
        }
        Ok(())
    }
}

struct Packer<'a> {
    output: Output<'a>,
    limits: Limits,
    n_entries: u64,
    n_file_bytes: u64,
    /// First name of each file that has several.
    linked: HashMap<(u64, u64), Vec<u8>>,
}

impl Visitor for Packer<'_> {
    fn enter(&mut self, folder: BorrowedFd<'_>, path: &[u8]) -> Result<()> {
        check_name(path)?;
        let facts = fstat(folder)?;
        let all = xattrs(folder, c".").about(OsStr::from_bytes(path))?;
        let is_opaque = all.iter().any(|(name, value)| name == b"trusted.overlay.opaque" && value == b"y");
        let kept = layer_xattrs(all, path)?;
        let name = if path.is_empty() { b"./".to_vec() } else { [path, b"/"].concat() };
        self.write(&Record { name: &name, kind: b'5', xattrs: &kept, ..record_of(&facts) })?;
        if is_opaque {
            let name = if path.is_empty() { b".wh..wh..opq".to_vec() } else { [path, b"/.wh..wh..opq"].concat() };
            self.write(&Record { name: &name, kind: b'0', ..Record::default() })?;
        }
        Ok(())
    }

    fn entry(&mut self, folder: BorrowedFd<'_>, name: &CStr, path: &[u8]) -> Result<()> {
        match self.pack_entry(folder, name, path) {
            // It vanished since the folder was read.
            Err(Error::Os { errno: Errno::NOENT, .. }) => Ok(()),
            other => other.about(OsStr::from_bytes(path)),
        }
    }
}

impl Packer<'_> {
    fn pack_entry(&mut self, folder: BorrowedFd<'_>, name: &CStr, path: &[u8]) -> Result<()> {
        check_name(path)?;
        let facts = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if is_whiteout_stat(&facts) {
            return self.write(&Record { name: &whiteout_name(path), kind: b'0', ..Record::default() });
        }
        let kept = layer_xattrs(xattrs(folder, name)?, path)?;
        let record = Record { name: path, xattrs: &kept, ..record_of(&facts) };
        let kind = FileType::from_raw_mode(facts.st_mode);
        if let Some(first) = self.linked.get(&(facts.st_dev, facts.st_ino)).cloned() {
            return self.write(&Record { kind: b'1', link: &first, xattrs: &[], ..record });
        }
        match kind {
            FileType::RegularFile => self.pack_file(&open_file(folder, name)?, &record)?,
            FileType::Symlink => {
                let link = readlinkat(folder, name, Vec::new())?;
                self.write(&Record { kind: b'2', link: link.to_bytes(), ..record })?;
            }
            FileType::CharacterDevice => self.write(&Record { kind: b'3', device: device_of(&facts), ..record })?,
            FileType::BlockDevice => self.write(&Record { kind: b'4', device: device_of(&facts), ..record })?,
            FileType::Fifo => self.write(&Record { kind: b'6', ..record })?,
            _ => return Ok(()),
        }
        if facts.st_nlink > 1 {
            self.linked.insert((facts.st_dev, facts.st_ino), path.to_vec());
        }
        Ok(())
    }

    fn pack_file(&mut self, file: &OwnedFd, record: &Record<'_>) -> Result<()> {
        let facts = fstat(file)?;
        let real_size = u64::try_from(facts.st_size).unwrap_or(0);
        self.n_file_bytes = self.n_file_bytes.saturating_add(real_size);
        if real_size > self.limits.entry_bytes_max || self.n_file_bytes > self.limits.n_bytes_max {
            return Err(Errno::FBIG.into());
        }
        let found = holes::find(file.as_fd(), &facts)?;
        let is_sparse = found.is_some();
        let parts = found.unwrap_or_else(|| Parts { map: Vec::new(), segments: vec![(0, real_size)], n_bytes: real_size });
        let size = parts.n_bytes;
        self.output.reserve(size)?;
        self.write(&Record { kind: b'0', size, real_size: is_sparse.then_some(real_size), ..*record })?;
        self.output.buffer.extend_from_slice(&parts.map);
        let mut file = file.try_clone()?.into();
        for (offset, n_bytes) in parts.segments {
            self.output.copy(&mut file, offset, n_bytes)?;
        }
        append_padding(&mut self.output.buffer, size);
        Ok(())
    }

    fn write(&mut self, record: &Record<'_>) -> Result<()> {
        append_header(&mut self.output.buffer, record);
        self.n_entries += 1;
        self.output.reserve(0)?;
        self.output.flush_if_full()
    }
}

/// A real name of this form would delete something when the layer is used.
fn check_name(path: &[u8]) -> Result<()> {
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    if name.starts_with(b".wh.") { Err(Error::archive(path, "the name is reserved for whiteouts")) } else { Ok(()) }
}

fn whiteout_name(path: &[u8]) -> Vec<u8> {
    let start = path.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    [&path[..start], b".wh.", &path[start..]].concat()
}

fn record_of(facts: &Stat) -> Record<'static> {
    Record {
        mode: facts.st_mode & 0o7777,
        uid: facts.st_uid,
        gid: facts.st_gid,
        mtime: (facts.st_mtime, u32::try_from(facts.st_mtime_nsec).unwrap_or(0)),
        ..Record::default()
    }
}

fn device_of(facts: &Stat) -> (u32, u32) {
    (major(facts.st_rdev), minor(facts.st_rdev))
}

fn open_file(folder: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    // Not blocking, should somebody have put a pipe in its place; never following, should it be a link.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(folder, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) == FileType::RegularFile { Ok(file) } else { Err(Errno::BUSY.into()) }
}

fn layer_xattrs(all: Vec<(Vec<u8>, Vec<u8>)>, path: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    if let Some((name, _)) = all.iter().find(|(name, _)| OVERLAY_REFERENCES.contains(&name.as_slice())) {
        let why = format!("it is not complete without its lower layers ({})", String::from_utf8_lossy(name));
        return Err(Error::archive(path, why));
    }
    Ok(all.into_iter().filter(|(name, _)| !name.starts_with(OVERLAY_XATTR)).collect())
}

/// Reads an entry's attributes, sorted by name. Neither a link nor a device can be opened for that, hence the path
/// through the folder's descriptor.
fn xattrs(folder: BorrowedFd<'_>, name: &CStr) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = [format!("/proc/self/fd/{}/", folder.as_raw_fd()).as_bytes(), name.to_bytes()].concat();
    let list = match sized(|buffer| llistxattr(path.as_slice(), buffer)) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        list => list?,
    };
    let mut found = Vec::new();
    for name in list.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        match sized(|buffer| lgetxattr(path.as_slice(), name, buffer)) {
            // Removed since, or listed by a file system that does not hand it out.
            Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            value => found.push((name.to_vec(), value?)),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Reads with the usual buffer, or with the largest if that is too small.
fn sized(read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut buffer = vec![0; XATTR_BYTES_USUAL];
    let n_bytes = match read(&mut buffer) {
        Err(Errno::RANGE) => {
            buffer.resize(XATTR_BYTES_MAX, 0);
            read(&mut buffer)?
        }
        n_bytes => n_bytes?,
    };
    buffer.truncate(n_bytes);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whiteouts_are_named_in_their_folder() {
        assert_eq!(whiteout_name(b"a/b/c"), b"a/b/.wh.c");
        assert_eq!(whiteout_name(b"c"), b".wh.c");
    }

    #[test]
    fn reserved_names_and_references_are_refused() {
        assert!(check_name(b"a/.wh.b").is_err());
        assert!(check_name(b"a.wh.b/.w").is_ok());
        let one = |name: &[u8]| vec![(name.to_vec(), b"y".to_vec())];
        assert!(layer_xattrs(one(b"trusted.overlay.metacopy"), b"a").is_err());
        assert_eq!(layer_xattrs(one(b"trusted.overlay.origin"), b"a"), Ok(vec![]));
        assert_eq!(layer_xattrs(one(b"user.k"), b"a"), Ok(one(b"user.k")));
    }
}
