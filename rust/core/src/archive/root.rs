//! The folder that an archive is unpacked into. No name that comes from the archive is ever resolved outside of it.
//!
//! A folder of the archive is opened by openat2(2) with RESOLVE_IN_ROOT: links and ".." on the way are followed as they
//! will be in the container, whose root this folder becomes, and end at this folder. The last component is never
//! resolved: it is created, replaced or linked by `*at` calls on its parent's descriptor.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chownat, fchmod, fchown,
    fsetxattr, lsetxattr, mkdirat, mknodat, openat, openat2, readlinkat, statat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::header::Refusal;
use crate::error::{Error, Result};
use crate::tree;

const OPAQUE: &str = "trusted.overlay.opaque";
const HANDLE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
/// openat2(2) asks to try again when anything on the machine was renamed while it passed a "..".
const N_TRIES: u32 = 1000;

/// A folder inside the root, open for `*at` calls (`O_PATH`).
pub type Folder = Rc<OwnedFd>;

/// Who owns a file, what may be done with it, and when it changed.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// Permissions with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Extended attributes.
    pub xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

/// The root, with the last folder used kept open: entries come folder by folder.
pub struct Root {
    fd: OwnedFd,
    last: Option<(Vec<u8>, Folder)>,
    /// Folders made because the archive left them out, with their inodes.
    made: Vec<(Vec<u8>, u64)>,
}

/// Splits a name into its components; absolute names and ".." are refused, "." and double slashes are nothing.
pub fn split(name: &[u8]) -> std::result::Result<Vec<&[u8]>, Refusal> {
    if name.starts_with(b"/") {
        return Err("the name is absolute");
    }
    if name.contains(&0) {
        return Err("the name contains NUL");
    }
    let parts: Vec<&[u8]> = name.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
    if parts.contains(&b"..".as_slice()) { Err("the name contains \"..\"") } else { Ok(parts) }
}

impl Root {
    /// Opens the root.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { fd: openat(CWD, path, HANDLE | OFlags::NOFOLLOW, Mode::empty())?, last: None, made: Vec::new() })
    }

    /// Opens a folder of the root; None if it does not exist.
    pub fn find(&mut self, parts: &[&[u8]]) -> Result<Option<Folder>> {
        let path = parts.join(&b'/');
        if let Some(folder) = self.kept(&path) {
            return Ok(Some(folder));
        }
        match self.resolve(&path) {
            Ok(folder) => Ok(Some(self.keep(path, folder))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(unresolved(errno)),
        }
    }

    /// Opens a folder of the root, making what is missing on the way (0755, root's).
    pub fn find_or_make(&mut self, parts: &[&[u8]]) -> Result<Folder> {
        let path = parts.join(&b'/');
        if let Some(folder) = self.kept(&path) {
            return Ok(folder);
        }
        match self.resolve(&path) {
            Ok(folder) => return Ok(self.keep(path, folder)),
            Err(Errno::NOENT | Errno::NOTDIR) => self.make(parts)?,
            Err(errno) => return Err(unresolved(errno)),
        }
        self.find(parts)?.ok_or_else(|| Errno::STALE.into())
    }

    /// Removes whatever has this name.
    pub fn clear(&mut self, parent: &Folder, name: &[u8]) -> Result<()> {
        // A folder that was kept open may be the one that goes, or be reached through the link that goes.
        self.last = None;
        match kind_of(parent, name)? {
            None => Ok(()),
            Some(FileType::Directory) => tree::remove_at(parent.as_fd(), OsStr::from_bytes(name)),
            Some(_) => Ok(unlinkat(&**parent, name, AtFlags::empty())?),
        }
    }

    /// Runs `create`; if something has the name already, removes that and runs it again.
    pub fn replace<T>(&mut self, parent: &Folder, name: &[u8], create: impl Fn() -> rustix::io::Result<T>) -> Result<T> {
        match create() {
            Err(Errno::EXIST) => {
                self.clear(parent, name)?;
                Ok(create()?)
            }
            other => Ok(other?),
        }
    }

    /// Makes or keeps a folder; returns it open for reading. Where the archive hid the name before, the folder hides what
    /// lower layers have in it.
    pub fn make_folder(&mut self, parent: &Folder, name: &[u8]) -> Result<OwnedFd> {
        let hides = match mkdirat(&**parent, name, Mode::RWXU) {
            Ok(()) => false,
            Err(Errno::EXIST) if kind_of(parent, name)? == Some(FileType::Directory) => false,
            Err(Errno::EXIST) => {
                let hides = is_whiteout(parent, name)?;
                self.clear(parent, name)?;
                mkdirat(&**parent, name, Mode::RWXU)?;
                hides
            }
            Err(errno) => return Err(errno.into()),
        };
        let folder = openat(&**parent, name, FOLDER, Mode::empty())?;
        if hides {
            set_opaque(folder.as_fd())?;
        }
        Ok(folder)
    }

    /// Hides a lower layer's entry of this name. What this layer itself has under the name stays.
    pub fn hide(&mut self, parent: &Folder, name: &[u8]) -> Result<()> {
        match kind_of(parent, name)? {
            None => Ok(mknodat(&**parent, name, FileType::CharacterDevice, Mode::empty(), 0)?),
            Some(FileType::Directory) => set_opaque(openat(&**parent, name, FOLDER, Mode::empty())?.as_fd()),
            Some(_) => Ok(()),
        }
    }

    /// Sets a folder's modification time, if it still is what it was.
    pub fn set_folder_time(&self, path: &[u8], inode: u64, mtime: (i64, u32)) -> Result<()> {
        let opened = self.resolve(if path.is_empty() { b"." } else { path });
        let Ok(folder) = opened else { return Ok(()) };
        if rustix::fs::fstat(&folder)?.st_ino == inode {
            utimensat(&folder, "", &times(mtime), AtFlags::EMPTY_PATH)?;
        }
        Ok(())
    }

    /// Returns the path of an open folder from the root on, free of links: those on the way may be replaced later. What the archive
    /// called it, if it lies too deep for the kernel to say.
    pub fn path_of(&self, folder: BorrowedFd<'_>, parts: &[&[u8]]) -> Vec<u8> {
        let path = |fd: BorrowedFd<'_>| readlinkat(CWD, format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()).ok();
        let found = path(self.fd.as_fd()).zip(path(folder)).and_then(|(root, folder)| {
            let inside = folder.to_bytes().strip_prefix(root.to_bytes())?;
            Some(inside.strip_prefix(b"/").unwrap_or(inside).to_vec())
        });
        found.unwrap_or_else(|| parts.join(&b'/'))
    }

    /// Returns the folders that were made unasked since the last call, with their inodes.
    pub fn take_made(&mut self) -> Vec<(Vec<u8>, u64)> {
        std::mem::take(&mut self.made)
    }

    fn kept(&self, path: &[u8]) -> Option<Folder> {
        self.last.as_ref().filter(|(last, _)| last == path).map(|(_, folder)| folder.clone())
    }

    fn keep(&mut self, path: Vec<u8>, folder: OwnedFd) -> Folder {
        let folder = Rc::new(folder);
        self.last = Some((path, folder.clone()));
        folder
    }

    fn resolve(&self, path: &[u8]) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let mut opened = Err(Errno::AGAIN);
        for _ in 0..N_TRIES {
            opened = openat2(&self.fd, path, HANDLE, Mode::empty(), resolve);
            if !matches!(opened, Err(Errno::AGAIN)) {
                break;
            }
        }
        opened
    }

    fn make(&mut self, parts: &[&[u8]]) -> Result<()> {
        let (n_existing, mut parent) = self.deepest(parts)?;
        for n_parts in n_existing + 1..=parts.len() {
            parent = Rc::new(self.make_missing(&parent, parts[n_parts - 1])?);
            self.made.push((self.path_of(parent.as_fd(), &parts[..n_parts]), rustix::fs::fstat(&*parent)?.st_ino));
        }
        Ok(())
    }

    /// Opens the deepest folder on the way that exists; returns how many parts lead to it. Found by halving: one part at a
    /// time would look at a path of thousands of parts thousands of times.
    fn deepest(&mut self, parts: &[&[u8]]) -> Result<(usize, Folder)> {
        let mut found = (0, self.find(&[])?.ok_or(Errno::STALE)?);
        let mut n_missing = parts.len();
        while found.0 + 1 < n_missing {
            let n_parts = usize::midpoint(found.0, n_missing);
            match self.resolve(&parts[..n_parts].join(&b'/')) {
                Ok(folder) => found = (n_parts, Rc::new(folder)),
                Err(Errno::NOENT | Errno::NOTDIR) => n_missing = n_parts,
                Err(errno) => return Err(unresolved(errno)),
            }
        }
        Ok(found)
    }

    fn make_missing(&mut self, parent: &Folder, name: &[u8]) -> Result<OwnedFd> {
        if kind_of(parent, name)?.is_some() && !is_whiteout(parent, name)? {
            return Err(Error::archive(b"", "a parent is neither a folder nor a link to one inside the root"));
        }
        let folder = self.make_folder(parent, name)?;
        // Below a folder with the set-group-id bit it has that folder's group.
        fchown(&folder, Some(Uid::ROOT), Some(Gid::ROOT))?;
        fchmod(&folder, Mode::from_raw_mode(0o755))?;
        Ok(folder)
    }
}

/// Sets owner, permissions, attributes and times of an open file, or of a folder without the time. The order matters: a
/// change of owner clears set-id bits and capabilities.
pub fn set_facts(file: BorrowedFd<'_>, facts: &Facts<'_>, is_folder: bool) -> Result<()> {
    fchown(file, Some(Uid::from_raw(facts.uid)), Some(Gid::from_raw(facts.gid)))?;
    fchmod(file, Mode::from_raw_mode(facts.mode))?;
    for (name, value) in facts.xattrs {
        tolerated(fsetxattr(file, name.as_slice(), value, XattrFlags::empty()), name, true)?;
    }
    if !is_folder {
        rustix::fs::futimens(file, &times(facts.mtime))?;
    }
    Ok(())
}

/// The same for what cannot be opened: links, devices, pipes.
pub fn set_facts_at(parent: &Folder, name: &[u8], facts: &Facts<'_>, is_symlink: bool) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(facts.uid), Gid::from_raw(facts.gid));
    chownat(&**parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if !is_symlink {
        // chmod follows links; this is none, it was just made, and nobody else has the folder.
        rustix::fs::chmodat(&**parent, name, Mode::from_raw_mode(facts.mode), AtFlags::empty())?;
    }
    let path = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), name].concat();
    for (key, value) in facts.xattrs {
        tolerated(lsetxattr(path.as_slice(), key.as_slice(), value, XattrFlags::empty()), key, false)?;
    }
    Ok(utimensat(&**parent, name, &times(facts.mtime), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Marks a folder so that overlayfs shows nothing of the same folder in lower layers.
pub fn set_opaque(folder: BorrowedFd<'_>) -> Result<()> {
    Ok(fsetxattr(folder, OPAQUE, b"y", XattrFlags::empty())?)
}

/// Opens a folder for reading that is held as a handle.
pub fn reopened(folder: &Folder) -> Result<OwnedFd> {
    Ok(openat(&**folder, ".", FOLDER, Mode::empty())?)
}

/// Looks at an entry without following it; None if there is none.
pub fn stat(parent: &Folder, name: &[u8]) -> Result<Option<Stat>> {
    match statat(&**parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(None),
        found => Ok(Some(found?)),
    }
}

/// Whether facts are those of an overlay whiteout: a character device 0/0.
#[must_use]
pub fn is_whiteout_stat(facts: &Stat) -> bool {
    FileType::from_raw_mode(facts.st_mode) == FileType::CharacterDevice && facts.st_rdev == 0
}

fn is_whiteout(parent: &Folder, name: &[u8]) -> Result<bool> {
    Ok(stat(parent, name)?.is_some_and(|facts| is_whiteout_stat(&facts)))
}

fn kind_of(parent: &Folder, name: &[u8]) -> Result<Option<FileType>> {
    Ok(stat(parent, name)?.map(|facts| FileType::from_raw_mode(facts.st_mode)))
}

/// Two refusals of attributes are passed over, as they lose nothing a container could have used: of a kind that this file
/// system cannot store (capabilities excepted: a program would silently lack them), and the kernel's ban of `user.*` on
/// anything but files and folders.
fn tolerated(set: rustix::io::Result<()>, name: &[u8], may_have_user: bool) -> Result<()> {
    match set {
        Err(Errno::OPNOTSUPP) if name != b"security.capability" => Ok(()),
        Err(Errno::PERM) if !may_have_user && name.starts_with(b"user.") => Ok(()),
        Err(errno @ (Errno::RANGE | Errno::TOOBIG | Errno::INVAL | Errno::PERM)) => {
            let name = String::from_utf8_lossy(name);
            Err(Error::archive(b"", format!("its attribute {name:?} cannot be set ({errno})")))
        }
        other => Ok(other?),
    }
}

fn times((seconds, nanoseconds): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: i64::from(nanoseconds) };
    Timestamps { last_access: time, last_modification: time }
}

fn unresolved(errno: Errno) -> Error {
    match errno {
        Errno::LOOP => Error::archive(b"", "its folder lies behind too many links"),
        Errno::NOTDIR => Error::archive(b"", "a parent is neither a folder nor a link to one inside the root"),
        Errno::XDEV => Error::archive(b"", "its folder lies on another file system"),
        Errno::NAMETOOLONG => Error::archive(b"", "the name is too long"),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_and_escapes_refused() {
        assert_eq!(split(b"./a//b/./c/"), Ok(vec![&b"a"[..], b"b", b"c"]));
        assert_eq!(split(b"./"), Ok(vec![]));
        assert_eq!(split(b"..a/b.."), Ok(vec![&b"..a"[..], b"b.."]));
        for bad in [&b"/etc"[..], b"..", b"a/../b", b"a/..", b"../a", b"a\0b"] {
            assert!(split(bad).is_err());
        }
    }
}
