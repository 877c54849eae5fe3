//! The ring between two shards. Its calls are short copies: they keep the GIL.

use std::os::fd::IntoRawFd;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use super::borrowed;
use crate::ring;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Ring>()?;
    module.add_function(wrap_pyfunction!(create_ring, module)?)
}

/// Make the memfd of a pair of rings, `n_bytes` each way (a power of two, 4 KiB to 1 GiB); returns its descriptor, close-on-exec.
#[pyfunction]
fn create_ring(n_bytes: usize) -> PyResult<i32> {
    Ok(ring::create(n_bytes)?.into_raw_fd())
}

/// One end of a pair of rings in a memfd of `create_ring`. `side` is 0 at one end and 1 at the other. The descriptor may be closed after.
#[pyclass(module = "isopod._core")]
struct Ring {
    inner: ring::Ring,
}

#[pymethods]
impl Ring {
    #[new]
    fn new(fd: i32, side: usize, message_bytes_max: usize) -> PyResult<Self> {
        Ok(Self { inner: ring::Ring::open(borrowed(fd)?, side, message_bytes_max)? })
    }

    /// Write the messages of a list until the ring is full; returns how many are wholly written, and whether to wake the peer.
    ///
    /// If not all were, the first that was not must come first the next time; the peer wakes us when there is room.
    fn push(&mut self, messages: &Bound<'_, PyList>) -> PyResult<(usize, bool)> {
        let mut n_done = 0;
        let mut wake = false;
        for message in messages.iter() {
            let message = message.cast_into::<PyBytes>()?;
            while !self.inner.push(message.as_bytes())? {
                wake |= self.inner.publish();
                if self.inner.wait_room()? {
                    return Ok((n_done, wake));
                }
            }
            n_done += 1;
        }
        Ok((n_done, self.inner.publish() | wake))
    }

    /// Take messages until the ring is empty or `n_bytes_max` are exceeded; returns them, and whether to wake the peer.
    fn pop<'py>(&mut self, py: Python<'py>, n_bytes_max: usize) -> PyResult<(Bound<'py, PyList>, bool)> {
        let messages = PyList::empty(py);
        let mut n_left = n_bytes_max;
        while let Some(n_bytes) = self.inner.peek()? {
            let message = PyBytes::new_with(py, n_bytes, |buffer| {
                self.inner.take(buffer);
                Ok(())
            })?;
            messages.append(message)?;
            if n_bytes >= n_left {
                break;
            }
            n_left -= n_bytes;
        }
        let wake = self.inner.release();
        Ok((messages, wake))
    }

    /// Ask to be woken for the next message; False if there is one already.
    fn may_sleep(&mut self) -> bool {
        self.inner.may_sleep()
    }
}
