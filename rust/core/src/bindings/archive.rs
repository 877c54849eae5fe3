//! Layers.

use std::path::PathBuf;

use pyo3::prelude::*;

use super::{borrowed, detached};
use crate::archive::blob::{Extent, Progress};
use crate::archive::rules::Limits;
use crate::archive::{file_digest, index, pack, unpack};
use crate::erofs::index as erofs;
use crate::error::{Error, Result};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(unpack_layer, module)?)?;
    module.add_function(wrap_pyfunction!(index_layer, module)?)?;
    module.add_function(wrap_pyfunction!(pack_layer, module)?)?;
    module.add_function(wrap_pyfunction!(index_archive, module)?)?;
    module.add_function(wrap_pyfunction!(sha256_file, module)?)
}

/// Unpack a layer; returns (blob digest, diff id, blob bytes, unpacked bytes, entries). See `isopod.world.disk.Disk.unpack_layer`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the contract is flat; the callers are one function of the host's disk and tests")]
fn unpack_layer(
    py: Python<'_>,
    fd: i32,
    target: PathBuf,
    offset: u64,
    n_bytes: Option<u64>,
    unpacked_bytes_max: u64,
    n_entries_max: u64,
    entry_bytes_max: u64,
    path_bytes_max: u64,
    ratio_max: u64,
    progress: Option<Py<PyAny>>,
) -> PyResult<(String, String, u64, u64, u64)> {
    let limits = Limits { unpacked_bytes_max, n_entries_max, entry_bytes_max, path_bytes_max, ratio_max };
    let extent = Extent { offset, n_bytes };
    let done = reporting(py, progress.as_ref(), |report| unpack::unpack(borrowed(fd)?, extent, &target, &limits, report))?;
    Ok((done.blob_digest, done.diff_id, done.n_blob_bytes, done.n_unpacked_bytes, done.n_entries))
}

/// Write a layer as a plain tar and an EROFS index over it; returns what `unpack_layer` does, then (tar bytes, index bytes, index
/// digest). See `isopod.world.disk.Disk.index_layer`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "as for unpack_layer")]
#[expect(clippy::type_complexity, reason = "the contract is flat")]
fn index_layer(
    py: Python<'_>,
    fd: i32,
    tar_fd: i32,
    index_fd: i32,
    offset: u64,
    n_bytes: Option<u64>,
    unpacked_bytes_max: u64,
    n_entries_max: u64,
    entry_bytes_max: u64,
    path_bytes_max: u64,
    ratio_max: u64,
    progress: Option<Py<PyAny>>,
) -> PyResult<((String, String, u64, u64, u64), (u64, u64, String))> {
    let limits = Limits { unpacked_bytes_max, n_entries_max, entry_bytes_max, path_bytes_max, ratio_max };
    let extent = Extent { offset, n_bytes };
    let done = reporting(py, progress.as_ref(), |report| {
        let targets = erofs::Targets { tar: borrowed(tar_fd)?, index: borrowed(index_fd)? };
        erofs::index(borrowed(fd)?, extent, targets, &limits, report)
    })?;
    let layer = done.layer;
    let facts = (layer.blob_digest, layer.diff_id, layer.n_blob_bytes, layer.n_unpacked_bytes, layer.n_entries);
    Ok((facts, (done.n_tar_bytes, done.n_index_bytes, done.index_digest)))
}

/// Write a folder in overlayfs form as an OCI layer tar; returns (diff id, bytes, entries). See `isopod.world.disk.Disk.pack_layer`.
#[pyfunction]
fn pack_layer(
    py: Python<'_>,
    source: PathBuf,
    fd: i32,
    n_bytes_max: u64,
    entry_bytes_max: u64,
    progress: Option<Py<PyAny>>,
) -> PyResult<(String, u64, u64)> {
    let limits = pack::Limits { n_bytes_max, entry_bytes_max };
    let done = reporting(py, progress.as_ref(), |report| pack::pack(&source, borrowed(fd)?, limits, report))?;
    Ok((done.diff_id, done.n_bytes, done.n_entries))
}

/// List an uncompressed tar's regular files and links: (name, data offset, bytes, link target).
#[pyfunction]
fn index_archive(py: Python<'_>, fd: i32) -> PyResult<Vec<(String, u64, u64, String)>> {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let found = detached(py, || index::index(borrowed(fd)?))?;
    Ok(found.into_iter().map(|member| (text(member.name), member.offset, member.n_bytes, text(member.link_target))).collect())
}

/// Return "sha256:..." of all bytes of a file from its start.
#[pyfunction]
fn sha256_file(py: Python<'_>, fd: i32) -> PyResult<String> {
    detached(py, || file_digest(borrowed(fd)?))
}

/// Runs without the GIL what reports to a function of Python's. What that raises ends the work, and is raised.
fn reporting<T: Send>(
    py: Python<'_>,
    callback: Option<&Py<PyAny>>,
    work: impl FnOnce(Option<Progress<'_>>) -> Result<T> + Send,
) -> PyResult<T> {
    let (done, raised) = py.detach(|| {
        let mut raised = None;
        let done = work(callback.map(|callback| reporter(callback, &mut raised)));
        (done, raised)
    });
    match (done, raised) {
        (Err(Error::Stopped), Some(error)) => Err(error),
        (done, _) => Ok(done?),
    }
}

/// Makes the core's progress function of Python's. What it raises is kept for the caller, and ends the work.
fn reporter<'a>(callback: &'a Py<PyAny>, raised: &'a mut Option<PyErr>) -> Progress<'a> {
    Box::new(move |n_bytes| {
        *raised = Python::attach(|py| callback.call1(py, (n_bytes,)).err());
        raised.is_none()
    })
}
