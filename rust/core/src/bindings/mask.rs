//! The mask of WebSocket frames. Some microseconds at most for what a frame may hold here: it keeps the GIL.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::mask;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(apply_mask, module)?)
}

/// Return `data` combined by XOR with the 4 bytes of `key`, repeated. `ValueError`: the key has another length.
#[pyfunction]
fn apply_mask<'py>(py: Python<'py>, data: &[u8], key: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    let key: [u8; 4] = key.try_into().map_err(|_| PyValueError::new_err("a mask has 4 bytes"))?;
    PyBytes::new_with(py, data.len(), |out| {
        mask::apply(data, key, out);
        Ok(())
    })
}
