//! Namespaces and processes: entering and making mount namespaces, making and pinning network namespaces, pidfds.

use std::fs::{self, OpenOptions};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;

use rustix::io::Errno;
use rustix::mount::mount_bind;
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::error::{About, Error, Result};
use crate::netlink::links;
use crate::netlink::socket::Socket;

/// Moves the calling process, which must have one thread (else EINVAL), into a new mount namespace.
///
/// The kernel would move the calling thread alone and leave the others behind, which no caller wants.
pub fn unshare_mounts() -> Result<()> {
    if fs::read_dir("/proc/self/task").about("/proc/self/task")?.count() != 1 {
        return Err(Errno::INVAL.into());
    }
    // SAFETY: only CLONE_FILES is unsafe, since other threads' descriptors would vanish; it is not asked for.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?)
}

/// Moves the calling process, which must have one thread (else EINVAL), into an open mount namespace.
pub fn enter_mount_namespace(namespace: BorrowedFd<'_>) -> Result<()> {
    Ok(move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))?)
}

/// Makes a network namespace with loopback up and pins it at the new file `path`.
///
/// A thread of its own moves there and ends, so that the caller's threads stay where they are.
pub fn create_network_namespace(path: &Path) -> Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(0o444).open(path).about(path)?;
    let made = thread::scope(|scope| scope.spawn(|| make_and_pin(path)).join()).unwrap_or_else(|_| Err(Errno::IO.into()));
    if made.is_err() {
        fs::remove_file(path).about(path)?;
    }
    made.map_err(|error| error.about(path))
}

/// Returns a pidfd, close-on-exec.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd> {
    // Pid::from_raw panics below zero and knows no zero.
    let pid = if pid > 0 { Pid::from_raw(pid) } else { None };
    Ok(rustix::process::pidfd_open(pid.ok_or(Errno::INVAL)?, PidfdFlags::empty())?)
}

fn make_and_pin(path: &Path) -> Result<()> {
    // SAFETY: only CLONE_FILES is unsafe; see `unshare_mounts`.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(Error::from)?;
    links::set_loopback_up(&mut Socket::open()?)?;
    Ok(mount_bind("/proc/thread-self/ns/net", path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pidfd_of_nobody_is_refused() {
        assert_eq!(pidfd_open(0).unwrap_err(), Errno::INVAL.into());
        assert_eq!(pidfd_open(-1).unwrap_err(), Errno::INVAL.into());
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(pidfd_open(own).is_ok());
    }

    #[test]
    fn a_process_with_threads_is_not_split() {
        // The test harness has at least its main thread besides this one.
        assert_eq!(unshare_mounts().unwrap_err(), Errno::INVAL.into());
    }
}
