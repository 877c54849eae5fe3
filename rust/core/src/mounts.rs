//! Mounts: overlay and tmpfs by the descriptor interface (fsopen(2), fsconfig(2), fsmount(2), move_mount(2)), binds and
//! propagation by mount(2).
//!
//! Source: the kernel's `Documentation/filesystems/overlayfs.rst`. A string given to fsconfig(2) holds at most 255 bytes,
//! and overlayfs gives `:`, `,` and `\` a meaning in some of its options in some versions. A path that is long or has one
//! of these is therefore opened and named as `/proc/self/fd/N`, which needs no escaping anywhere.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_bind, mount_change, move_mount, unmount as umount2,
};

use crate::error::{About, Error, Result};

const FSCONFIG_STRING_BYTES_MAX: usize = 255;
/// mount(2) copies one page of options, the last byte being a NUL.
const MOUNT_OPTIONS_BYTES_MAX: usize = 4095;
/// What a container writes must be a complete layer by itself, or it could not be committed: no references to lower
/// layers by path (redirect) or by file handle (metacopy, index). Distributions differ in the defaults.
const PLAIN_LAYERS: [(&str, &str); 3] = [("redirect_dir", "off"), ("metacopy", "off"), ("index", "off")];

/// What to stack. Paths are absolute.
#[derive(Debug, Clone)]
pub struct Overlay<'a> {
    /// Read-only folders, the topmost first.
    pub lowers: &'a [PathBuf],
    /// The folder that takes what is written.
    pub upper: &'a Path,
    /// An empty folder on the same file system as `upper`.
    pub work: &'a Path,
    /// Never sync. After an unclean end the kernel refuses to mount `upper` and `work` again.
    pub volatile: bool,
}

/// Mounts an overlay on `target`.
pub fn mount_overlay(target: &Path, overlay: &Overlay<'_>) -> Result<()> {
    if overlay.lowers.is_empty() {
        return Err(Error::from(Errno::INVAL).about(target));
    }
    let lowers = overlay.lowers.iter().map(|path| Name::of(path)).collect::<Result<Vec<_>>>()?;
    let upper = Name::of(overlay.upper)?;
    let work = Name::of(overlay.work)?;
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    match configure_overlay(context.as_fd(), &lowers, &upper, &work, overlay.volatile) {
        Ok(()) => attach(context.as_fd(), target, MountAttrFlags::empty()),
        Err(NotConfigured::NoLayerByLayer) => mount_overlay_by_options(target, &lowers, &upper, &work, overlay.volatile),
        Err(NotConfigured::Failed(error)) => Err(error.about(target)),
    }
}

/// Mounts a tmpfs of at most `n_bytes`, without set-user-id programs and devices.
pub fn mount_tmpfs(target: &Path, n_bytes: u64) -> Result<()> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "tmpfs")?;
    fsconfig_set_string(&context, "size", n_bytes.to_string()).about(target)?;
    fsconfig_set_string(&context, "mode", "0755")?;
    fsconfig_create(&context).about(target)?;
    attach(context.as_fd(), target, MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)
}

/// Mounts an EROFS file read-only, without set-user-id programs and devices: an overlay on it has flags of its own. `tar` is the
/// file that an index without data is about. From files since Linux 6.12; before it ENOTBLK.
pub fn mount_erofs(target: &Path, index: &Path, tar: Option<&Path>) -> Result<()> {
    let source = Name::of_file(index)?;
    let device = tar.map(Name::of_file).transpose()?;
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", source.text.as_slice()).about(index)?;
    if let Some(device) = &device {
        fsconfig_set_string(&context, "device", device.text.as_slice()).about(target)?;
    }
    fsconfig_set_flag(&context, "ro").about(target)?;
    fsconfig_create(&context).about(index)?;
    let flags = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    attach(context.as_fd(), target, flags)
}

/// Binds a file or folder, without what is mounted below it.
pub fn bind(source: &Path, target: &Path) -> Result<()> {
    mount_bind(source, target).about(target)
}

/// Cuts a mount off from its peers.
pub fn make_private(target: &Path) -> Result<()> {
    mount_change(target, MountPropagationFlags::PRIVATE).about(target)
}

/// Lets mounts and unmounts still come in at and below `target`, but none go out.
pub fn make_slave_recursive(target: &Path) -> Result<()> {
    mount_change(target, MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).about(target)
}

/// Unmounts the topmost mount at `target`, never through a link; EINVAL if nothing is mounted there.
pub fn unmount(target: &Path, detach: bool) -> Result<()> {
    let how = if detach { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    umount2(target, UnmountFlags::NOFOLLOW | how).about(target)
}

/// Asks the kernel whether it knows overlayfs (it loads the module for that).
pub fn overlay_supported() -> Result<bool> {
    is_known("overlay")
}

/// Asks the kernel whether it knows EROFS (it loads the module for that). Whether it mounts files shows when one is mounted.
pub fn erofs_supported() -> Result<bool> {
    is_known("erofs")
}

fn is_known(file_system: &str) -> Result<bool> {
    match fsopen(file_system, FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// How a file or folder is named to the kernel.
struct Name {
    text: Vec<u8>,
    /// Keeps `/proc/self/fd/N` true.
    _open: Option<OwnedFd>,
}

impl Name {
    fn of(path: &Path) -> Result<Self> {
        let text = path.as_os_str().as_bytes();
        if text.len() <= FSCONFIG_STRING_BYTES_MAX && !text.iter().any(|byte| b":,\\".contains(byte)) {
            return Ok(Self { text: text.to_vec(), _open: None });
        }
        Self::by_descriptor(path)
    }

    /// Files are opened by the kernel as named; only the length matters.
    fn of_file(path: &Path) -> Result<Self> {
        let text = path.as_os_str().as_bytes();
        if text.len() <= FSCONFIG_STRING_BYTES_MAX {
            return Ok(Self { text: text.to_vec(), _open: None });
        }
        Self::opened(path, OFlags::RDONLY)
    }

    fn by_descriptor(path: &Path) -> Result<Self> {
        Self::opened(path, OFlags::PATH | OFlags::DIRECTORY)
    }

    fn opened(path: &Path, flags: OFlags) -> Result<Self> {
        let fd = open(path, flags | OFlags::CLOEXEC, Mode::empty()).about(path)?;
        let text = format!("/proc/self/fd/{}", fd.as_raw_fd()).into_bytes();
        Ok(Self { text, _open: Some(fd) })
    }
}

enum NotConfigured {
    /// Linux before 6.5 does not know `lowerdir+`.
    NoLayerByLayer,
    Failed(Error),
}

impl<E: Into<Error>> From<E> for NotConfigured {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

fn configure_overlay(
    context: BorrowedFd<'_>,
    lowers: &[Name],
    upper: &Name,
    work: &Name,
    volatile: bool,
) -> std::result::Result<(), NotConfigured> {
    fsconfig_set_string(context, "source", "overlay")?;
    for (number, lower) in lowers.iter().enumerate() {
        match fsconfig_set_string(context, "lowerdir+", lower.text.as_slice()) {
            // An unknown option and a folder that cannot be a layer are both EINVAL. The classic way, which then
            // follows, fails in its turn for the latter.
            Err(Errno::INVAL) if number == 0 => return Err(NotConfigured::NoLayerByLayer),
            other => other?,
        }
    }
    fsconfig_set_string(context, "upperdir", upper.text.as_slice())?;
    fsconfig_set_string(context, "workdir", work.text.as_slice())?;
    for (key, value) in PLAIN_LAYERS {
        fsconfig_set_string(context, key, value)?;
    }
    if volatile {
        fsconfig_set_flag(context, "volatile")?;
    }
    match fsconfig_create(context) {
        // Before 6.5 overlayfs takes any option as text, and looks at it only here (seen on 6.1).
        Err(Errno::INVAL) => Err(NotConfigured::NoLayerByLayer),
        other => Ok(other?),
    }
}

fn attach(context: BorrowedFd<'_>, target: &Path, attributes: MountAttrFlags) -> Result<()> {
    let mounted = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).about(target)?;
    move_mount(&mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).about(target)
}

/// The way of older kernels: all in one page of text.
fn mount_overlay_by_options(target: &Path, lowers: &[Name], upper: &Name, work: &Name, volatile: bool) -> Result<()> {
    let options = overlay_options(lowers, upper, work, volatile);
    if options.len() <= MOUNT_OPTIONS_BYTES_MAX {
        return mount_with_options(target, options);
    }
    let short = lowers.iter().map(Name::shortened).collect::<Result<Vec<_>>>()?;
    let options = overlay_options(&short, upper, work, volatile);
    if options.len() > MOUNT_OPTIONS_BYTES_MAX {
        return Err(Error::from(Errno::TOOBIG).about(target));
    }
    mount_with_options(target, options)
}

impl Name {
    fn shortened(&self) -> Result<Self> {
        Self::by_descriptor(Path::new(std::ffi::OsStr::from_bytes(&self.text)))
    }
}

fn overlay_options(lowers: &[Name], upper: &Name, work: &Name, volatile: bool) -> Vec<u8> {
    let lowers: Vec<&[u8]> = lowers.iter().map(|lower| lower.text.as_slice()).collect();
    let mut options = [b"lowerdir=".as_slice(), &lowers.join(&b':'), b",upperdir=", &upper.text, b",workdir=", &work.text].concat();
    for (key, value) in PLAIN_LAYERS {
        options.extend_from_slice(format!(",{key}={value}").as_bytes());
    }
    if volatile {
        options.extend_from_slice(b",volatile");
    }
    options
}

fn mount_with_options(target: &Path, options: Vec<u8>) -> Result<()> {
    let options = CString::new(options).map_err(|_| Error::from(Errno::INVAL).about(target))?;
    mount("overlay", target, "overlay", MountFlags::empty(), options.as_c_str()).about(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn awkward_paths_are_named_by_descriptor() {
        let plain = Name::of(Path::new("/a/b c")).unwrap();
        assert_eq!(plain.text, b"/a/b c");
        let folder = std::env::temp_dir().join(format!("isopod,core:{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let name = Name::of(&folder).map(|name| name.text);
        std::fs::remove_dir(&folder).unwrap();
        assert!(name.unwrap().starts_with(b"/proc/self/fd/"));
    }

    #[test]
    fn options_of_older_kernels() {
        let name = |text: &str| Name::of(Path::new(text)).unwrap();
        let options = overlay_options(&[name("/l2"), name("/l1")], &name("/u"), &name("/w"), true);
        assert_eq!(
            String::from_utf8(options).unwrap(),
            "lowerdir=/l2:/l1,upperdir=/u,workdir=/w,redirect_dir=off,metacopy=off,index=off,volatile"
        );
    }
}
