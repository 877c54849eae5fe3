//! Metrics as text. A body is read in a fraction of a millisecond, by the one thread that serves: the GIL is kept.

use std::cell::RefCell;
use std::collections::HashMap;

use pyo3::exceptions::{PyIndexError, PyUnicodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyBytes, PyDict, PyList, PyMapping, PyString, PyTuple};

use crate::exposition::coding::{Coder, Combiner, Piece, Source};
use crate::exposition::{self, Family, Kind, Reason, Rules, protobuf};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(exposition_read, module)?)?;
    module.add_function(wrap_pyfunction!(exposition_protobuf, module)?)?;
    module.add_function(wrap_pyfunction!(pack, module)?)?;
    module.add_function(wrap_pyfunction!(gather, module)?)?;
    module.add_function(wrap_pyfunction!(combine_crc32, module)?)
}

/// Limits and renames: `isopod.pulse.core.Rules`.
type Limits = (usize, usize, Vec<(PyBackedBytes, PyBackedBytes)>, f64);

/// Read a body; returns (families, values, number of lines kept, dropped lines by reason).
#[pyfunction]
fn exposition_read<'py>(
    body: &Bound<'py, PyBytes>,
    block: &[u8],
    names: Vec<PyBackedStr>,
    rules: &Bound<'py, PyTuple>,
    wanted: &Bound<'py, PyMapping>,
) -> PyResult<Bound<'py, PyTuple>> {
    let py = body.py();
    let (line_bytes_max, series_max, renames, wrapped_min): Limits = rules.extract()?;
    let renames = renames.iter().map(|(old, new)| (&**old, &**new)).collect();
    let wanted: Vec<(PyBackedStr, Vec<PyBackedStr>)> = wanted.items()?.extract()?;
    let wanted = wanted.iter().map(|(family, labels)| (family.as_bytes(), labels.iter().map(|name| name.as_bytes()).collect())).collect();
    let names = names.iter().map(|name| name.as_bytes()).collect();
    let rules = Rules { line_bytes_max, series_max, renames, wrapped_min, block, names, wanted };
    let reading = exposition::read(body.as_bytes(), &rules);
    let families = PyList::empty(py);
    let values = PyDict::new(py);
    for family in &reading.families {
        let name = PyString::intern(py, text(&family.name)?);
        if let Some(figures) = &family.figures {
            values.set_item(&name, figures_of(py, figures)?)?;
        }
        families.append(tuple_of(&name, family, &reading.text)?)?;
    }
    let dropped = PyDict::new(py);
    for (word, n) in Reason::WORDS.iter().zip(reading.dropped).filter(|(_, n)| *n > 0) {
        dropped.set_item(PyString::intern(py, word), n)?;
    }
    (families, values, reading.n_series, dropped).into_pyobject(py)
}

/// Encode one family as a length-delimited io.prometheus.client.MetricFamily. ValueError: there is no such kind.
#[pyfunction]
fn exposition_protobuf(
    name: PyBackedStr,
    kind: PyBackedStr,
    help_text: Bound<'_, PyBytes>,
    texts: Vec<PyBackedBytes>,
) -> PyResult<Bound<'_, PyBytes>> {
    let known = Kind::ALL.into_iter().find(|known| known.word() == &*kind);
    let known = known.ok_or_else(|| PyValueError::new_err("no such kind of family"))?;
    let message = protobuf::family(name.as_bytes(), known, help_text.as_bytes(), &slices(&texts));
    Ok(PyBytes::new(help_text.py(), &message))
}

thread_local! {
    /// By coding: making one costs as much as packing the few figures of a sandbox that changed.
    static CODERS: RefCell<HashMap<String, Coder>> = RefCell::default();
}

/// Make a pack of texts, and of pieces of the pack before by their numbers. ValueError: there is no such coding.
#[pyfunction]
fn pack<'py>(coding: &str, sources: Vec<Bound<'py, PyAny>>, before: &Bound<'py, PyBytes>) -> PyResult<Bound<'py, PyBytes>> {
    let source = |any: &'_ Bound<'py, PyAny>| any.extract().map(Source::Before);
    let sources: PyResult<Vec<_>> =
        sources.iter().map(|any| any.cast::<PyBytes>().map_or_else(|_| source(any), |text| Ok(Source::Text(text.as_bytes())))).collect();
    let sources = sources?;
    let made = CODERS.with_borrow_mut(|coders| {
        if !coders.contains_key(coding) {
            coders.insert(coding.to_owned(), Coder::of(coding)?.ok_or_else(|| PyValueError::new_err("no such coding"))?);
        }
        let coder = coders.get_mut(coding).expect("it was put there");
        Ok::<_, PyErr>(coder.pack(&sources, before.as_bytes())?)
    })?;
    Ok(PyBytes::new(before.py(), &made))
}

/// Join the pieces of one number from a pack on until there are so many bytes; returns (joined, CRC-32, bytes they hold, the next pack).
#[pyfunction]
fn gather<'py>(
    py: Python<'py>,
    packs: &Bound<'py, PyList>,
    number: usize,
    first: usize,
    n_bytes_wanted: usize,
) -> PyResult<(Bound<'py, PyBytes>, u32, u64, usize)> {
    let (mut combiner, mut n_bytes, mut n_held) = (Combiner::default(), 0, 0);
    let mut taken: Vec<Bound<'py, PyBytes>> = Vec::new();
    for pack in packs.iter().skip(first) {
        let pack: Bound<'py, PyBytes> = pack.cast_into()?;
        let piece = Piece::of(pack.as_bytes(), number).ok_or_else(|| PyIndexError::new_err("no such piece"))?;
        combiner.add(piece.crc32, piece.n_bytes.into());
        n_held += u64::from(piece.n_bytes);
        n_bytes += piece.data.len();
        taken.push(pack);
        if n_bytes >= n_bytes_wanted {
            break;
        }
    }
    let joined = PyBytes::new_with(py, n_bytes, |room| {
        let mut at = 0;
        for piece in taken.iter().filter_map(|pack| Piece::of(pack.as_bytes(), number)) {
            room[at..][..piece.data.len()].copy_from_slice(piece.data);
            at += piece.data.len();
        }
        Ok(())
    })?;
    Ok((joined, combiner.finish(), n_held, first + taken.len()))
}

/// Return the CRC-32 of pieces one behind another, of which each is given by its own and its number of bytes.
#[pyfunction]
fn combine_crc32(pieces: &Bound<'_, PyAny>) -> PyResult<u32> {
    let mut combiner = Combiner::default();
    for piece in pieces.try_iter()? {
        let (crc32, n_bytes) = piece?.extract()?;
        combiner.add(crc32, n_bytes);
    }
    Ok(combiner.finish())
}

fn slices(texts: &[PyBackedBytes]) -> Vec<&[u8]> {
    texts.iter().map(|text| &**text).collect()
}

fn tuple_of<'py>(name: &Bound<'py, PyString>, family: &Family<'_>, text: &[u8]) -> PyResult<Bound<'py, PyTuple>> {
    let py = name.py();
    let open_text = family.open_text.clone().map(|range| PyBytes::new(py, &text[range]));
    let help = PyBytes::new(py, &family.help);
    let body = PyBytes::new(py, &text[family.text.clone()]);
    (name, word(py, family.kind), help, body, family.n_series, open_text).into_pyobject(py)
}

fn word(py: Python<'_>, kind: Kind) -> Bound<'_, PyString> {
    PyString::intern(py, kind.word())
}

fn figures_of<'py>(py: Python<'py>, figures: &[exposition::Figure<'_>]) -> PyResult<Bound<'py, PyTuple>> {
    let figures: PyResult<Vec<_>> = figures
        .iter()
        .map(|(labels, figure)| {
            let labels: PyResult<Vec<_>> = labels.iter().map(|value| Ok(PyString::new(py, text(value)?))).collect();
            (PyTuple::new(py, labels?)?, *figure).into_pyobject(py)
        })
        .collect();
    PyTuple::new(py, figures?)
}

/// What was read is UTF-8; were it not, that would be a bug here and no reason to end a process.
fn text(bytes: &[u8]) -> PyResult<&str> {
    std::str::from_utf8(bytes).map_err(|error| PyUnicodeError::new_err(error.to_string()))
}
