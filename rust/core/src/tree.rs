//! Folders with all they hold: a walk that no link and no depth can mislead, and what is built on it: removing and measuring.
//!
//! The walk opens one folder at a time relative to its parent and never follows a link. Going up it opens ".." and
//! checks that this is the folder it came from, so a depth of thousands needs neither descriptors nor stack, and a
//! folder that somebody moves away in the meantime ends the walk (ESTALE) instead of leading it elsewhere.

use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, Stat, Statx, StatxFlags, fstat, openat, statat, statx, unlinkat};
use rustix::io::Errno;

use crate::error::{About, Error, Result};

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const LISTING_BYTES: usize = 32 << 10;

/// What is done on the way through a tree. Names are relative to the open folder given with them.
pub trait Visitor {
    /// A folder was opened, before its names are visited.
    fn enter(&mut self, _folder: BorrowedFd<'_>, _path: &[u8]) -> Result<()> {
        Ok(())
    }

    /// An entry that is not a folder.
    fn entry(&mut self, folder: BorrowedFd<'_>, name: &CStr, path: &[u8]) -> Result<()>;

    /// Whether to go into a folder inside.
    fn descends(&mut self, _parent: BorrowedFd<'_>, _folder: BorrowedFd<'_>, _path: &[u8]) -> Result<bool> {
        Ok(true)
    }

    /// All of a folder inside was visited.
    fn leave(&mut self, _parent: BorrowedFd<'_>, _name: &CStr, _path: &[u8]) -> Result<()> {
        Ok(())
    }
}

/// Walks a tree depth first, names in the order of their bytes. Paths given to the visitor are relative to `root` and
/// "" for itself. What vanishes meanwhile is passed over.
pub fn walk(root: OwnedFd, visitor: &mut impl Visitor) -> Result<()> {
    visitor.enter(root.as_fd(), b"")?;
    let mut path = Vec::new();
    let mut levels = vec![Level::read(root.as_fd())?];
    let mut folder = root;
    while let Some(level) = levels.last_mut() {
        path.truncate(level.path_bytes);
        if let Some((name, kind)) = level.names.pop() {
            append(&mut path, &name);
            if let Some(inner) = step(visitor, folder.as_fd(), &name, kind, &path)? {
                visitor.enter(inner.as_fd(), &path)?;
                folder = inner;
                levels.push(Level { path_bytes: path.len(), name, ..Level::read(folder.as_fd())? });
            }
            continue;
        }
        let done = levels.pop().unwrap_or_default();
        if let Some(parent) = levels.last() {
            folder = parent.reopen(folder.as_fd())?;
            visitor.leave(folder.as_fd(), &done.name, &path)?;
        }
    }
    Ok(())
}

/// Removes a folder and all in it. Nothing there is fine; a mount at or below it is EBUSY, and nothing in it is touched.
pub fn remove(path: &Path) -> Result<()> {
    let Some(name) = path.file_name() else { return Err(Error::from(Errno::INVAL).about(path)) };
    let parent_path = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let parent = match openat(CWD, parent_path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened.about(parent_path)?,
    };
    remove_at(parent.as_fd(), name).about(path)
}

/// Removes the folder `name` of an open folder.
pub fn remove_at(parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    let root = match openat(parent, name, FOLDER, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        opened => opened?,
    };
    let mount = Mount::of(root.as_fd())?;
    if mount != Mount::of(parent)? {
        return Err(Errno::BUSY.into());
    }
    walk(root, &mut Remover { mount })?;
    gone(unlinkat(parent, name, AtFlags::REMOVEDIR))
}

/// Returns the bytes allocated under a folder and for itself, hard links counted once. What is mounted inside is left out.
pub fn allocated_bytes(path: &Path) -> Result<u64> {
    let root = openat(CWD, path, FOLDER, Mode::empty()).about(path)?;
    let mut counter = Counter { device: fstat(&root)?.st_dev, n_bytes: 0, linked: HashSet::new() };
    walk(root, &mut counter).about(path)?;
    Ok(counter.n_bytes)
}

/// Opens a folder itself, not what a link of that name leads to.
pub fn open_folder(path: &Path) -> Result<OwnedFd> {
    openat(CWD, path, FOLDER, Mode::empty()).about(path)
}

/// Whether an open folder holds nothing.
pub fn is_empty(folder: BorrowedFd<'_>) -> Result<bool> {
    Ok(Level::read(folder)?.names.is_empty())
}

/// A folder on the way down: what identifies it, and what is still to visit in it, the next one last.
#[derive(Default)]
struct Level {
    device: u64,
    inode: u64,
    name: CString,
    path_bytes: usize,
    names: Vec<(CString, FileType)>,
}

enum Found {
    Gone,
    Folder(OwnedFd),
    Other,
}

impl Level {
    fn read(folder: BorrowedFd<'_>) -> Result<Self> {
        let facts = fstat(folder)?;
        let mut buffer = Vec::with_capacity(LISTING_BYTES);
        buffer.resize(LISTING_BYTES, MaybeUninit::uninit());
        let mut listing = RawDir::new(folder, &mut buffer);
        let mut names = Vec::new();
        while let Some(entry) = listing.next() {
            let entry = entry?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                names.push((name.to_owned(), entry.file_type()));
            }
        }
        names.sort_unstable_by(|one, other| other.0.cmp(&one.0));
        Ok(Self { device: facts.st_dev, inode: facts.st_ino, names, ..Self::default() })
    }

    /// Opens this folder again from one of its folders.
    fn reopen(&self, inner: BorrowedFd<'_>) -> Result<OwnedFd> {
        let folder = openat(inner, "..", FOLDER, Mode::empty())?;
        let facts = fstat(&folder)?;
        if (facts.st_dev, facts.st_ino) != (self.device, self.inode) {
            return Err(Errno::STALE.into());
        }
        Ok(folder)
    }
}

fn step(visitor: &mut impl Visitor, folder: BorrowedFd<'_>, name: &CStr, kind: FileType, path: &[u8]) -> Result<Option<OwnedFd>> {
    match find(folder, name, kind)? {
        Found::Gone => Ok(None),
        Found::Other => visitor.entry(folder, name, path).map(|()| None),
        Found::Folder(inner) => Ok(visitor.descends(folder, inner.as_fd(), path)?.then_some(inner)),
    }
}

fn find(folder: BorrowedFd<'_>, name: &CStr, kind: FileType) -> Result<Found> {
    if kind != FileType::Directory && kind != FileType::Unknown {
        return Ok(Found::Other);
    }
    match openat(folder, name, FOLDER, Mode::empty()) {
        Ok(inner) => Ok(Found::Folder(inner)),
        Err(Errno::NOENT) => Ok(Found::Gone),
        Err(Errno::NOTDIR | Errno::LOOP) => Ok(Found::Other),
        Err(errno) => Err(errno.into()),
    }
}

fn append(path: &mut Vec<u8>, name: &CStr) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name.to_bytes());
}

fn gone(removed: rustix::io::Result<()>) -> Result<()> {
    match removed {
        Err(Errno::NOENT) => Ok(()),
        other => Ok(other?),
    }
}

/// What tells mounts apart: the mount's number where the kernel knows it (5.8), which also tells a bind of the same file
/// system, else the device.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mount {
    mount: u64,
    device: (u32, u32),
}

impl Mount {
    fn of(folder: BorrowedFd<'_>) -> Result<Self> {
        let facts: Statx = statx(folder, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
        let known = facts.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        Ok(Self { mount: if known { facts.stx_mnt_id } else { 0 }, device: (facts.stx_dev_major, facts.stx_dev_minor) })
    }
}

struct Remover {
    mount: Mount,
}

impl Visitor for Remover {
    fn entry(&mut self, folder: BorrowedFd<'_>, name: &CStr, path: &[u8]) -> Result<()> {
        gone(unlinkat(folder, name, AtFlags::empty())).about(OsStr::from_bytes(path))
    }

    fn descends(&mut self, _parent: BorrowedFd<'_>, folder: BorrowedFd<'_>, path: &[u8]) -> Result<bool> {
        if Mount::of(folder)? == self.mount { Ok(true) } else { Err(Error::from(Errno::BUSY).about(OsStr::from_bytes(path))) }
    }

    fn leave(&mut self, parent: BorrowedFd<'_>, name: &CStr, path: &[u8]) -> Result<()> {
        gone(unlinkat(parent, name, AtFlags::REMOVEDIR)).about(OsStr::from_bytes(path))
    }
}

struct Counter {
    device: u64,
    n_bytes: u64,
    linked: HashSet<u64>,
}

impl Counter {
    fn add(&mut self, facts: &Stat, may_repeat: bool) {
        if may_repeat && facts.st_nlink > 1 && !self.linked.insert(facts.st_ino) {
            return;
        }
        self.n_bytes += u64::try_from(facts.st_blocks).unwrap_or(0) * 512;
    }
}

impl Visitor for Counter {
    fn enter(&mut self, folder: BorrowedFd<'_>, _path: &[u8]) -> Result<()> {
        self.add(&fstat(folder)?, false);
        Ok(())
    }

    fn entry(&mut self, folder: BorrowedFd<'_>, name: &CStr, _path: &[u8]) -> Result<()> {
        match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Ok(facts) if facts.st_dev != self.device => {}
            facts => self.add(&facts?, true),
        }
        Ok(())
    }

    fn descends(&mut self, _parent: BorrowedFd<'_>, folder: BorrowedFd<'_>, _path: &[u8]) -> Result<bool> {
        Ok(fstat(folder)?.st_dev == self.device)
    }
}
