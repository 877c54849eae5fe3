//! Python's side: each function takes plain values, releases the GIL, calls one function of the core and returns plain
//! values. The contract is `src/isopod/_core.pyi`.

#![expect(clippy::needless_pass_by_value, reason = "PyO3 hands converted arguments over by value")]

mod archive;
mod crc;
mod exposition;
mod kernel;
mod mask;
mod network;
mod raft;
mod ring;
mod uring;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

use crate::error::{Error, Result};

pyo3::create_exception!(
    isopod._core,
    ArchiveError,
    pyo3::exceptions::PyException,
    "An archive entry is unsafe, damaged, or over a limit. args = (entry, why)."
);

pyo3::create_exception!(
    isopod._core,
    NotIndexable,
    pyo3::exceptions::PyException,
    "A layer is fine, but cannot be kept as an EROFS index over its archive. args = (entry, why)."
);

pyo3::create_exception!(
    isopod._core,
    RingError,
    pyo3::exceptions::PyException,
    "A ring shared with another process is damaged, or a message does not fit it. args = (why,)."
);

/// Functions of isopod that are close to the kernel.
#[pymodule(name = "_core")]
fn core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("ArchiveError", module.py().get_type::<ArchiveError>())?;
    module.add("NotIndexable", module.py().get_type::<NotIndexable>())?;
    module.add("RingError", module.py().get_type::<RingError>())?;
    archive::register(module)?;
    crc::register(module)?;
    exposition::register(module)?;
    kernel::register(module)?;
    mask::register(module)?;
    network::register(module)?;
    raft::register(module)?;
    ring::register(module)?;
    uring::register(module)?;
    // PyO3 made it while functions were added; what the module offers is said by its stub, and nobody imports "*".
    module.delattr("__all__")
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Os { errno, subject } => os_error(errno.raw_os_error(), subject),
            Error::Archive { entry, why } => ArchiveError::new_err((String::from_utf8_lossy(&entry).into_owned(), why)),
            Error::NotIndexable { entry, why } => NotIndexable::new_err((String::from_utf8_lossy(&entry).into_owned(), why)),
            Error::Ring { why } => RingError::new_err((why,)),
            // Functions that take a callback raise what that raised in its place.
            Error::Stopped => pyo3::exceptions::PyRuntimeError::new_err("stopped by the caller"),
        }
    }
}

/// OSError picks its subclass (FileNotFoundError, ...) by the number of arguments: errno, text and perhaps a file name.
fn os_error(errno: i32, subject: Option<PathBuf>) -> PyErr {
    let text = std::io::Error::from_raw_os_error(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or_default().to_owned();
    match subject {
        Some(subject) => PyOSError::new_err((errno, text, subject.into_os_string())),
        None => PyOSError::new_err((errno, text)),
    }
}

/// Runs without the GIL.
fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    Ok(py.detach(work)?)
}

/// Borrows a descriptor of the caller's; EBADF for a negative number.
fn borrowed<'a>(fd: i32) -> Result<BorrowedFd<'a>> {
    if fd < 0 {
        return Err(rustix::io::Errno::BADF.into());
    }
    // SAFETY: the number is not -1. It comes from Python, whose caller keeps the file open while this call lasts (the
    // contract of every function that takes a descriptor); were it closed or reused meanwhile, system calls would fail
    // or act on the other file, but no memory depends on it.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}
