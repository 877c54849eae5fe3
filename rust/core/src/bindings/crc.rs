//! The checksum of stored records. Short data keep the GIL: giving it up costs more than the sum.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// 64 KiB take about 5 us.
const N_BYTES_WITH_GIL: usize = 1 << 16;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(checksum, module)?)
}

/// Return the CRC-32C (RFC 3720) of `data`; with `start` the sum of what came before it, that of both.
#[pyfunction]
#[pyo3(name = "crc32c", signature = (data, start = 0))]
fn checksum(py: Python<'_>, data: &Bound<'_, PyAny>, start: u32) -> PyResult<u32> {
    if let Ok(data) = data.cast::<PyBytes>() {
        let bytes = data.as_bytes();
        if bytes.len() <= N_BYTES_WITH_GIL {
            return Ok(crc32c::crc32c_append(start, bytes));
        }
        return Ok(py.detach(|| crc32c::crc32c_append(start, bytes)));
    }
    let buffer = PyBuffer::<u8>::get(data)?;
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the buffer is not contiguous"));
    }
    let address = buffer.buf_ptr() as usize;
    let n_bytes = buffer.len_bytes();
    // SAFETY: the buffer is exported until `buffer` is dropped at the end: it can be neither freed nor resized. An owner that writes to
    // it meanwhile gets some sum; bytes have no invalid values.
    let sum = move || unsafe {
        let bytes: &[u8] = if n_bytes == 0 { &[] } else { std::slice::from_raw_parts(address as *const u8, n_bytes) };
        crc32c::crc32c_append(start, bytes)
    };
    Ok(if n_bytes <= N_BYTES_WITH_GIL { sum() } else { py.detach(sum) })
}
