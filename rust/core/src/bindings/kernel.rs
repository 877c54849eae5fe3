//! Mounts, namespaces, trees.

use std::os::fd::IntoRawFd;
use std::path::PathBuf;

use pyo3::prelude::*;

use super::{borrowed, detached};
use crate::mounts::{self, Overlay};
use crate::{namespaces, tree};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(remove_tree, module)?)?;
    module.add_function(wrap_pyfunction!(tree_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(mount_overlay, module)?)?;
    module.add_function(wrap_pyfunction!(mount_tmpfs, module)?)?;
    module.add_function(wrap_pyfunction!(mount_erofs, module)?)?;
    module.add_function(wrap_pyfunction!(erofs_supported, module)?)?;
    module.add_function(wrap_pyfunction!(bind_mount, module)?)?;
    module.add_function(wrap_pyfunction!(make_private, module)?)?;
    module.add_function(wrap_pyfunction!(make_slave_recursive, module)?)?;
    module.add_function(wrap_pyfunction!(unmount, module)?)?;
    module.add_function(wrap_pyfunction!(overlay_supported, module)?)?;
    module.add_function(wrap_pyfunction!(unshare_mounts, module)?)?;
    module.add_function(wrap_pyfunction!(enter_mount_namespace, module)?)?;
    module.add_function(wrap_pyfunction!(create_network_namespace, module)?)?;
    module.add_function(wrap_pyfunction!(pidfd_open, module)?)
}

/// Remove a folder and all in it without following links and without crossing a mount (EBUSY).
#[pyfunction]
fn remove_tree(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    detached(py, || tree::remove(&path))
}

/// Return allocated bytes below a folder, hard links once.
#[pyfunction]
fn tree_bytes(py: Python<'_>, path: PathBuf) -> PyResult<u64> {
    detached(py, || tree::allocated_bytes(&path))
}

/// Mount an overlay through fsopen(2)/fsconfig(2)/move_mount(2).
#[pyfunction]
fn mount_overlay(py: Python<'_>, target: PathBuf, lowers: Vec<PathBuf>, upper: PathBuf, work: PathBuf, volatile: bool) -> PyResult<()> {
    detached(py, || mounts::mount_overlay(&target, &Overlay { lowers: &lowers, upper: &upper, work: &work, volatile }))
}

/// Mount a tmpfs of a bounded size, nosuid, nodev.
#[pyfunction]
fn mount_tmpfs(py: Python<'_>, target: PathBuf, n_bytes: u64) -> PyResult<()> {
    detached(py, || mounts::mount_tmpfs(&target, n_bytes))
}

/// Mount an EROFS file read-only, with the file its data lies in if that is another.
#[pyfunction]
fn mount_erofs(py: Python<'_>, target: PathBuf, index: PathBuf, tar: Option<PathBuf>) -> PyResult<()> {
    detached(py, || mounts::mount_erofs(&target, &index, tar.as_deref()))
}

/// Return whether fsopen(2) knows "erofs".
#[pyfunction]
fn erofs_supported(py: Python<'_>) -> PyResult<bool> {
    detached(py, mounts::erofs_supported)
}

/// Bind `source` on `target`.
#[pyfunction]
fn bind_mount(py: Python<'_>, source: PathBuf, target: PathBuf) -> PyResult<()> {
    detached(py, || mounts::bind(&source, &target))
}

/// Make the mount at `target` private.
#[pyfunction]
fn make_private(py: Python<'_>, target: PathBuf) -> PyResult<()> {
    detached(py, || mounts::make_private(&target))
}

/// Make the mounts at and below `target` slaves.
#[pyfunction]
fn make_slave_recursive(py: Python<'_>, target: PathBuf) -> PyResult<()> {
    detached(py, || mounts::make_slave_recursive(&target))
}

/// umount2(2) with UMOUNT_NOFOLLOW, and MNT_DETACH on request.
#[pyfunction]
fn unmount(py: Python<'_>, target: PathBuf, detach: bool) -> PyResult<()> {
    detached(py, || mounts::unmount(&target, detach))
}

/// Return whether fsopen(2) knows "overlay".
#[pyfunction]
fn overlay_supported(py: Python<'_>) -> PyResult<bool> {
    detached(py, mounts::overlay_supported)
}

/// unshare(CLONE_NEWNS) for the calling process; it must have one thread.
#[pyfunction]
fn unshare_mounts(py: Python<'_>) -> PyResult<()> {
    detached(py, namespaces::unshare_mounts)
}

/// setns(fd, CLONE_NEWNS); the process must have one thread.
#[pyfunction]
fn enter_mount_namespace(py: Python<'_>, fd: i32) -> PyResult<()> {
    detached(py, || namespaces::enter_mount_namespace(borrowed(fd)?))
}

/// Make a network namespace in a helper thread, loopback up, and pin it at the new file `path`.
#[pyfunction]
fn create_network_namespace(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    detached(py, || namespaces::create_network_namespace(&path))
}

/// Return a pidfd, close-on-exec.
#[pyfunction]
fn pidfd_open(py: Python<'_>, pid: i32) -> PyResult<i32> {
    detached(py, || namespaces::pidfd_open(pid).map(IntoRawFd::into_raw_fd))
}
