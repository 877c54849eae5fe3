//! io_uring: one class, whose operations hold the Python objects that own their memory.

use std::ffi::c_void;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::Result;
use crate::uring::{Completion, Operation, Ring};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Uring>()
}

/// The most that one operation moves: what read(2) and write(2) take (0x7ffff000), rounded down.
const N_BYTES_MAX: usize = 0x4000_0000;

/// What an operation needs until it has completed.
enum Held {
    /// A bytes object that nobody has seen yet.
    Fresh(Py<PyBytes>),
    /// A caller's buffer, exported: it can be neither freed nor resized.
    Exported {
        _buffer: PyBuffer<u8>,
    },
    Nothing,
}

struct Pending {
    held: Held,
    owner: Py<PyAny>,
}

/// An io_uring for files. Operations are queued, `submit` hands them over, `reap` tells what became of them.
#[pyclass(module = "isopod._core")]
pub struct Uring {
    ring: Option<Ring>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    found: Vec<Completion>,
}

#[pymethods]
impl Uring {
    #[new]
    fn new(n_entries: u32) -> PyResult<Self> {
        if !n_entries.is_power_of_two() || n_entries > 4096 {
            return Err(PyValueError::new_err("n_entries must be a power of two up to 4096"));
        }
        let ring = Ring::new(n_entries)?;
        Ok(Self { ring: Some(ring), pending: Vec::new(), free: Vec::new(), found: Vec::new() })
    }

    /// Return the descriptor to poll: readable while completions wait.
    fn fileno(&mut self) -> PyResult<i32> {
        Ok(self.open()?.fd())
    }

    /// Return how many operations may be in flight.
    fn n_in_flight_max(&mut self) -> PyResult<usize> {
        Ok(self.open()?.n_in_flight_max())
    }

    /// Return how many operations are queued or under way.
    fn n_in_flight(&self) -> usize {
        self.ring.as_ref().map_or(0, Ring::n_in_flight)
    }

    /// Queue a read of up to `n_bytes`; its result is the bytes.
    fn read(&mut self, py: Python<'_>, fd: i32, offset: u64, n_bytes: usize, owner: Py<PyAny>) -> PyResult<()> {
        let n_bytes_checked = length(n_bytes)?;
        let n_bytes_signed = isize::try_from(n_bytes)?;
        // SAFETY: a null pointer asks for a new object of that size with undefined content. Nobody sees it before it is
        // full: what the kernel did not write is cut off in `result_of`.
        let fresh = unsafe {
            let made = pyo3::ffi::PyBytes_FromStringAndSize(std::ptr::null(), n_bytes_signed);
            Bound::from_owned_ptr_or_err(py, made)?.cast_into_unchecked::<PyBytes>()
        };
        // SAFETY: a bytes object, not yet shared.
        let target = unsafe { pyo3::ffi::PyBytes_AsString(fresh.as_ptr()) }.cast::<u8>();
        let operation = Operation::Read { fd, target, n_bytes: n_bytes_checked, offset };
        self.queue(operation, Held::Fresh(fresh.unbind()), owner)
    }

    /// Queue a read into a writable buffer; its result is the number of bytes.
    fn read_into(&mut self, fd: i32, offset: u64, buffer: PyBuffer<u8>, owner: Py<PyAny>) -> PyResult<()> {
        if buffer.readonly() {
            return Err(PyBufferError::new_err("the buffer is read-only"));
        }
        let (pointer, n_bytes) = memory(&buffer)?;
        let operation = Operation::Read { fd, target: pointer.cast::<u8>(), n_bytes, offset };
        self.queue(operation, Held::Exported { _buffer: buffer }, owner)
    }

    /// Queue a write of a buffer; its result is the number of bytes.
    fn write(&mut self, fd: i32, offset: u64, buffer: PyBuffer<u8>, owner: Py<PyAny>) -> PyResult<()> {
        self.queue_write(fd, offset, buffer, owner, false)
    }

    /// As `write`, but the data are durable when it completes (`RWF_DSYNC`).
    fn write_durable(&mut self, fd: i32, offset: u64, buffer: PyBuffer<u8>, owner: Py<PyAny>) -> PyResult<()> {
        self.queue_write(fd, offset, buffer, owner, true)
    }

    /// Queue an fdatasync(2); its result is 0.
    fn sync(&mut self, fd: i32, owner: Py<PyAny>) -> PyResult<()> {
        self.queue(Operation::Sync { fd }, Held::Nothing, owner)
    }

    /// Hand over what is queued; returns how many the kernel took. The GIL is kept: getting it back from a busy thread
    /// can take longer than the call.
    fn submit(&mut self) -> PyResult<usize> {
        Ok(self.open()?.submit()?)
    }

    /// Return (owner, result) of what has completed: bytes, a count, or a negative errno.
    fn reap(&mut self, py: Python<'_>) -> PyResult<Vec<(Py<PyAny>, Py<PyAny>)>> {
        let mut found = std::mem::take(&mut self.found);
        self.open()?.reap(&mut found);
        let mut told = Vec::with_capacity(found.len());
        for completion in found.drain(..) {
            let Some((index, pending)) = self.take(completion.token) else { continue };
            self.free.push(index);
            told.push((pending.owner, result_of(py, pending.held, completion.result)?));
        }
        self.found = found;
        Ok(told)
    }

    /// Wait for what is in flight and give the ring back; twice is fine. Owners that were not told are dropped.
    fn close(&mut self, py: Python<'_>) -> PyResult<()> {
        let Some(mut ring) = self.ring.take() else { return Ok(()) };
        let finished = py.detach(|| ring.finish());
        self.release(finished.is_ok());
        Ok(finished?)
    }
}

impl Uring {
    fn open(&mut self) -> PyResult<&mut Ring> {
        self.ring.as_mut().ok_or_else(|| PyValueError::new_err("the ring is closed"))
    }

    fn queue_write(&mut self, fd: i32, offset: u64, buffer: PyBuffer<u8>, owner: Py<PyAny>, durable: bool) -> PyResult<()> {
        let (pointer, n_bytes) = memory(&buffer)?;
        let operation = Operation::Write { fd, source: pointer.cast::<u8>(), n_bytes, offset, durable };
        self.queue(operation, Held::Exported { _buffer: buffer }, owner)
    }

    fn queue(&mut self, operation: Operation, held: Held, owner: Py<PyAny>) -> PyResult<()> {
        self.open()?;
        let index = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        // SAFETY: `held` goes into `pending`, where it stays until `reap` has seen this completion or `close` has waited
        // for it; if waiting fails it is never freed.
        let queued: Result<()> = unsafe { self.open()?.push(index as u64, operation) };
        if let Err(error) = queued {
            self.free.push(index);
            return Err(error.into());
        }
        self.pending[index] = Some(Pending { held, owner });
        Ok(())
    }

    fn take(&mut self, token: u64) -> Option<(usize, Pending)> {
        let index = usize::try_from(token).ok()?;
        Some((index, self.pending.get_mut(index)?.take()?))
    }

    /// Lets go of what operations held, or leaks it if the kernel may still write into it.
    fn release(&mut self, is_finished: bool) {
        let pending = std::mem::take(&mut self.pending);
        if !is_finished {
            std::mem::forget(pending);
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if let Some(mut ring) = self.ring.take() {
            let finished = ring.finish();
            self.release(finished.is_ok());
        }
    }
}

fn length(n_bytes: usize) -> PyResult<u32> {
    let fits = if n_bytes <= N_BYTES_MAX { u32::try_from(n_bytes).ok() } else { None };
    fits.ok_or_else(|| PyValueError::new_err("one operation moves at most 1 GiB"))
}

fn memory(buffer: &PyBuffer<u8>) -> PyResult<(*mut c_void, u32)> {
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the buffer is not contiguous"));
    }
    Ok((buffer.buf_ptr(), length(buffer.len_bytes())?))
}

fn result_of(py: Python<'_>, held: Held, result: i32) -> PyResult<Py<PyAny>> {
    match (held, usize::try_from(result)) {
        (Held::Fresh(fresh), Ok(n_bytes)) => {
            let whole = fresh.bind(py);
            Ok(if n_bytes < whole.as_bytes().len() {
                PyBytes::new(py, &whole.as_bytes()[..n_bytes]).into_any().unbind()
            } else {
                fresh.into_any()
            })
        }
        _ => Ok(result.into_pyobject(py)?.into_any().unbind()),
    }
}
