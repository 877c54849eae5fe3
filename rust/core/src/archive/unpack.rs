//! A layer's archive unpacked into a folder, in one pass, in the form overlayfs takes: what the layer deletes becomes
//! whiteout devices and opaque folders.
//!
//! Rules, where layers in the wild leave a choice:
//! - Absolute names and names with ".." are refused, also as targets of hard links. Targets of symbolic links may be
//!   anything: they are resolved in the container's root.
//! - A folder reached through a link is fine as long as it lies in the root; the last component is never followed.
//! - A later entry replaces an earlier one; a folder over a folder keeps its contents.
//! - Whiteouts act on lower layers only, as the OCI specification has it, whatever their place in the archive.
//! - Whiteouts are written as `.wh.NAME` and never as devices: an entry that is a device 0/0, and attributes of overlayfs,
//!   would let an archive act on lower layers behind other readers' backs, and are refused. Other devices are made, since
//!   a container's device control group decides about their use, not the file.
//! - On any failure the folder is removed with all that is in it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ftruncate, linkat, makedev, mkdirat, mknodat, openat, symlinkat};
use rustix::io::{Errno, pwrite, retry_on_intr};

use super::blob::{Blob, Extent, Progress};
use super::reader::{Entry, Kind, Reader};
use super::root::{self, Facts, Folder, Root};
use super::rules::{self, Hiding, Limits, Rules, Summary, refused};
use super::sparse::Map;
use super::stream::{StreamLimits, Unpacked};
use crate::error::{About, Error, Result};
use crate::tree;

/// Of all folders' paths, which are kept until the end. Real layers have some megabytes; an archive of a few kilobytes can
/// name some thousand folders in each of its entries.
const FOLDER_PATH_BYTES_MAX: usize = 128 << 20;

/// Unpacks into the folder `target`, which must be empty or missing (its parent must exist).
pub fn unpack<'a>(
    source: BorrowedFd<'a>,
    extent: Extent,
    target: &Path,
    limits: &Limits,
    progress: Option<Progress<'a>>,
) -> Result<Summary> {
    let blob = Blob::new(source, extent, progress)?;
    let mut unfinished = prepare(target)?;
    let stream_limits = StreamLimits { n_bytes_max: limits.unpacked_bytes_max, ratio_max: limits.ratio_max };
    let mut unpacker = Unpacker {
        reader: Reader::new(Unpacked::new(blob, stream_limits)?),
        root: Root::open(target).about(target)?,
        rules: Rules::new(*limits),
        folders: Vec::new(),
        n_path_bytes: 0,
    };
    let summary = unpacker.run()?;
    unfinished.target = None;
    Ok(summary)
}

/// Removes the target when dropped, unless it was taken out: on errors, and when a panic passes.
struct Unfinished {
    target: Option<PathBuf>,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(target) = &self.target {
            // The cause is on its way up already, and says more than a second failure would.
            let _ = tree::remove(target);
        }
    }
}

fn prepare(target: &Path) -> Result<Unfinished> {
    match mkdirat(CWD, target, Mode::RWXU) {
        Err(Errno::EXIST) if !tree::is_empty(tree::open_folder(target)?.as_fd())? => {
            return Err(Error::from(Errno::NOTEMPTY).about(target));
        }
        Err(Errno::EXIST) => {}
        made => made.about(target)?,
    }
    let unfinished = Unfinished { target: Some(target.to_path_buf()) };
    rustix::fs::fchmod(tree::open_folder(target)?, Mode::from_raw_mode(0o755)).about(target)?;
    Ok(unfinished)
}

/// A folder whose time is set at the end, because what is made inside changes it.
struct Pending {
    path: Vec<u8>,
    inode: u64,
    mtime: (i64, u32),
}

struct Unpacker<'a> {
    reader: Reader<Unpacked<'a>>,
    root: Root,
    rules: Rules,
    folders: Vec<Pending>,
    /// Of all folders.
    n_path_bytes: usize,
}

impl Unpacker<'_> {
    fn run(&mut self) -> Result<Summary> {
        let root = self.root.find_or_make(&[])?;
        self.remember(root.as_fd(), &[], (0, 0))?;
        while let Some(entry) = self.reader.next_entry()? {
            self.apply(&entry).map_err(|error| of_entry(error, &entry.name))?;
        }
        self.reader.stream_mut().drain()?;
        for folder in &self.folders {
            self.root.set_folder_time(&folder.path, folder.inode, folder.mtime)?;
        }
        let stream = self.reader.stream();
        Ok(Summary {
            blob_digest: stream.blob().digest(),
            diff_id: stream.digest(),
            n_blob_bytes: stream.blob().n_bytes(),
            n_unpacked_bytes: stream.n_bytes(),
            n_entries: self.rules.n_entries(),
        })
    }

    fn apply(&mut self, entry: &Entry) -> Result<()> {
        self.rules.admit(entry)?;
        let parts = root::split(&entry.name).map_err(refused)?;
        let Some((&name, folders)) = parts.split_last() else {
            return self.apply_to_root(entry);
        };
        rules::check_folders(folders)?;
        let parent = self.root.find_or_make(folders)?;
        for (path, inode) in self.root.take_made() {
            // Without a time in the archive, the epoch: unpacking twice gives the same.
            self.keep(Pending { path, inode, mtime: (0, 0) })?;
        }
        match rules::hiding(entry, name)? {
            Hiding::Folder => root::set_opaque(root::reopened(&parent)?.as_fd()),
            Hiding::Name(hidden) => self.root.hide(&parent, hidden),
            Hiding::Nothing => self.create(entry, &parent, name, &parts),
        }
    }

    fn apply_to_root(&mut self, entry: &Entry) -> Result<()> {
        if entry.kind != Kind::Folder {
            return Err(refused("the root must be a folder"));
        }
        let folder = root::reopened(&self.root.find_or_make(&[])?)?;
        root::set_facts(folder.as_fd(), &facts_of(entry), true)?;
        self.remember(folder.as_fd(), &[], entry.mtime)
    }

    fn create(&mut self, entry: &Entry, parent: &Folder, name: &[u8], parts: &[&[u8]]) -> Result<()> {
        let facts = facts_of(entry);
        match &entry.kind {
            Kind::File => self.create_file(parent, name, &facts, None),
            Kind::SparseFile(map) => self.create_file(parent, name, &facts, Some(map)),
            Kind::HardLink => self.create_hard_link(entry, parent, name),
            Kind::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) {
                    return Err(refused("the link has no target"));
                }
                self.root.replace(parent, name, || symlinkat(entry.link.as_slice(), &**parent, name))?;
                root::set_facts_at(parent, name, &facts, true)
            }
            Kind::Folder => {
                let folder = self.root.make_folder(parent, name)?;
                root::set_facts(folder.as_fd(), &facts, true)?;
                self.remember(folder.as_fd(), parts, entry.mtime)
            }
            Kind::CharacterDevice => self.create_node(entry, parent, name, FileType::CharacterDevice),
            Kind::BlockDevice => self.create_node(entry, parent, name, FileType::BlockDevice),
            Kind::Fifo => self.create_node(entry, parent, name, FileType::Fifo),
        }
    }

    fn create_file(&mut self, parent: &Folder, name: &[u8], facts: &Facts<'_>, map: Option<&Map>) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = self.root.replace(parent, name, || openat(&**parent, name, flags, Mode::RUSR | Mode::WUSR))?;
        match map {
            None => self.write_segment(&file, 0, u64::MAX)?,
            Some(map) => {
                for &(offset, n_bytes) in &map.segments {
                    self.write_segment(&file, offset, n_bytes)?;
                }
                ftruncate(&file, map.size)?;
            }
        }
        root::set_facts(file.as_fd(), facts, false)
    }

    /// Writes the entry's data, or its next `n_bytes`, at a position.
    fn write_segment(&mut self, file: &OwnedFd, mut offset: u64, mut n_bytes: u64) -> Result<()> {
        while n_bytes > 0 {
            let data = self.reader.data()?;
            if data.is_empty() {
                break;
            }
            let n_wanted = usize::try_from(n_bytes).map_or(data.len(), |n_bytes| n_bytes.min(data.len()));
            let n_written = retry_on_intr(|| pwrite(file, &data[..n_wanted], offset))?;
            self.reader.consume(n_written);
            offset += n_written as u64;
            n_bytes -= n_written as u64;
        }
        Ok(())
    }

    fn create_node(&mut self, entry: &Entry, parent: &Folder, name: &[u8], kind: FileType) -> Result<()> {
        let device = if kind == FileType::Fifo { 0 } else { makedev(entry.device.0, entry.device.1) };
        self.root.replace(parent, name, || mknodat(&**parent, name, kind, Mode::RUSR | Mode::WUSR, device))?;
        root::set_facts_at(parent, name, &facts_of(entry), false)
    }

    /// The new name gets the target's facts with it, so the entry's own are not looked at.
    fn create_hard_link(&mut self, entry: &Entry, parent: &Folder, name: &[u8]) -> Result<()> {
        let parts = root::split(&entry.link).map_err(|why| refused(&format!("the link's target is refused: {why}")))?;
        let missing = || refused("the link's target is no earlier entry");
        let (&target, folders) = parts.split_last().ok_or_else(missing)?;
        let target_parent = self.root.find(folders)?.ok_or_else(missing)?;
        let facts = root::stat(&target_parent, target)?.filter(|facts| !root::is_whiteout_stat(facts)).ok_or_else(missing)?;
        if FileType::from_raw_mode(facts.st_mode) == FileType::Directory {
            return Err(refused("the link's target is a folder"));
        }
        let existing = root::stat(parent, name)?;
        if existing.is_some_and(|existing| (existing.st_dev, existing.st_ino) == (facts.st_dev, facts.st_ino)) {
            return Ok(());
        }
        let flags = rustix::fs::AtFlags::empty();
        let linked = self.root.replace(parent, name, || linkat(&*target_parent, target, &**parent, name, flags));
        // Making room for the name may have removed the folder that the target was in.
        linked.map_err(|error| if error == Errno::NOENT.into() { missing() } else { error })
    }

    fn remember(&mut self, folder: BorrowedFd<'_>, parts: &[&[u8]], mtime: (i64, u32)) -> Result<()> {
        let inode = rustix::fs::fstat(folder)?.st_ino;
        self.keep(Pending { path: self.root.path_of(folder, parts), inode, mtime })
    }

    fn keep(&mut self, folder: Pending) -> Result<()> {
        self.n_path_bytes += folder.path.len() + size_of::<Pending>();
        if self.n_path_bytes > FOLDER_PATH_BYTES_MAX {
            return Err(refused("the paths of all folders are longer than 128 MiB"));
        }
        self.folders.push(folder);
        Ok(())
    }
}

fn facts_of(entry: &Entry) -> Facts<'_> {
    Facts { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs: &entry.xattrs }
}

fn of_entry(error: Error, name: &[u8]) -> Error {
    match error {
        Error::Archive { entry, why } if entry.is_empty() => Error::Archive { entry: name.to_vec(), why },
        Error::Os { errno: Errno::NAMETOOLONG, .. } => Error::archive(name, "the name is too long"),
        other => other.about(OsStr::from_bytes(name)),
    }
}
