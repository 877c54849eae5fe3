//! Paths inside the sandbox's root, while the caller's own root is another one.
//!
//! Every name is resolved by openat2(2) with RESOLVE_IN_ROOT: links, absolute ones and `..` too, lead to the same place as for a process
//! whose root this is, and nowhere else.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, open, openat, openat2};
use rustix::io::{Errno, Result};

/// A folder as root.
pub struct Root {
    folder: OwnedFd,
}

impl Root {
    /// Open it.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { folder })
    }

    /// Open a file or folder inside.
    pub fn file(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        openat2(&self.folder, inside(path), flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    /// Open a folder, after making those of its path that are missing.
    pub fn make_folder(&self, path: &Path) -> Result<OwnedFd> {
        let mut so_far = PathBuf::from(".");
        let mut folder = self.file(&so_far, OFlags::PATH | OFlags::DIRECTORY)?;
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            so_far.push(name);
            folder = match self.file(&so_far, OFlags::PATH | OFlags::DIRECTORY) {
                Err(Errno::NOENT) => {
                    mkdirat(&folder, name, Mode::from_raw_mode(0o755))?;
                    self.file(&so_far, OFlags::PATH | OFlags::DIRECTORY)?
                }
                other => other?,
            };
        }
        Ok(folder)
    }

    /// Open a regular file, after making it if it is missing, empty.
    pub fn make_file(&self, path: &Path) -> Result<OwnedFd> {
        match self.file(path, OFlags::PATH) {
            Err(Errno::NOENT) => {}
            other => return other,
        }
        let folder = self.make_folder(path.parent().unwrap_or(Path::new("/")))?;
        let name = path.file_name().unwrap_or(OsStr::new("."));
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        openat(&folder, name, flags, Mode::from_raw_mode(0o644))?;
        openat(&folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    }
}

/// The name of an open file for a system call that wants a path, which then is not resolved again.
pub fn path_of(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// Make a folder outside of any root, with those above it.
pub fn make_own_folder(path: &str) -> Result<()> {
    match mkdirat(CWD, path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

fn inside(path: &Path) -> &Path {
    let path = path.strip_prefix("/").unwrap_or(path);
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

#[cfg(test)]
mod tests {
    use super::{Root, path_of};
    use rustix::fs::OFlags;
    use rustix::io::Errno;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("isopod-root-{}-{name}", std::process::id()));
        fs::create_dir_all(folder.join("in")).expect("a temporary folder");
        folder
    }

    #[test]
    fn links_stay_inside() {
        let folder = folder("links");
        fs::write(folder.join("secret"), "outside").expect("a file");
        fs::write(folder.join("in/secret"), "inside").expect("a file");
        symlink("/secret", folder.join("in/absolute")).expect("a link");
        symlink("../../../secret", folder.join("in/upwards")).expect("a link");
        let root = Root::open(&folder.join("in")).expect("it is there");
        for name in ["/secret", "absolute", "upwards", "../../secret"] {
            let fd = root.file(Path::new(name), OFlags::RDONLY).expect(name);
            assert_eq!(fs::read_to_string(path_of(&fd)).expect(name), "inside");
        }
        fs::remove_dir_all(folder).expect("it is ours");
    }

    #[test]
    fn what_is_missing_is_made_inside() {
        let folder = folder("made");
        symlink("/deep", folder.join("in/link")).expect("a link");
        fs::create_dir(folder.join("in/deep")).expect("a folder");
        let root = Root::open(&folder.join("in")).expect("it is there");
        root.make_folder(Path::new("/link/a/b")).expect("it can be made");
        root.make_file(Path::new("/link/a/file")).expect("it can be made");
        assert!(folder.join("in/deep/a/b").is_dir() && folder.join("in/deep/a/file").is_file());
        fs::write(folder.join("in/deep/a/file"), "kept").expect("a file");
        root.make_file(Path::new("/deep/a/file")).expect("it is there");
        assert_eq!(fs::read_to_string(folder.join("in/deep/a/file")).expect("it is there"), "kept");
        assert_eq!(root.make_folder(Path::new("/deep/a/file/x")).map(drop), Err(Errno::NOTDIR));
        fs::remove_dir_all(folder).expect("it is ours");
    }
}
