//! Links and routes.

use std::path::PathBuf;

use pyo3::prelude::*;

use super::detached;
use crate::netlink::{links, routes};

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(list_links, module)?)?;
    module.add_function(wrap_pyfunction!(create_bridge, module)?)?;
    module.add_function(wrap_pyfunction!(create_veth, module)?)?;
    module.add_function(wrap_pyfunction!(configure_link, module)?)?;
    module.add_function(wrap_pyfunction!(move_link, module)?)?;
    module.add_function(wrap_pyfunction!(delete_link, module)?)?;
    module.add_function(wrap_pyfunction!(list_routes, module)?)
}

/// (index, name, kind, up, master index)
type Link = (u32, String, String, bool, u32);

/// Return (index, name, kind, up, master index) of the links in the current network namespace, kind "" if none.
#[pyfunction]
fn list_links(py: Python<'_>) -> PyResult<Vec<Link>> {
    let found = detached(py, links::list)?;
    Ok(found.into_iter().map(|link| (link.index, link.name, link.kind, link.is_up, link.master)).collect())
}

/// Make a bridge that is up and carries `address` ("10.88.0.1/24"); what exists already is kept.
#[pyfunction]
fn create_bridge(py: Python<'_>, name: &str, address: &str) -> PyResult<()> {
    detached(py, || links::create_bridge(name, address))
}

/// Make a veth pair between a bridge and a pinned namespace in one request each.
#[pyfunction]
fn create_veth(py: Python<'_>, host_name: &str, bridge: &str, namespace: PathBuf, guest_name: &str) -> PyResult<()> {
    detached(py, || links::create_veth(host_name, bridge, &namespace, guest_name))
}

/// Set address and default route ("" for none) inside a pinned namespace; returns the link's MAC.
#[pyfunction]
fn configure_link(py: Python<'_>, namespace: PathBuf, name: &str, address: &str, gateway: &str) -> PyResult<String> {
    detached(py, || links::configure(&namespace, name, address, gateway))
}

/// Move a link of the current namespace into a pinned one.
#[pyfunction]
fn move_link(py: Python<'_>, name: &str, namespace: PathBuf) -> PyResult<()> {
    detached(py, || links::move_to(name, &namespace))
}

/// Remove a link; False if there is none of that name.
#[pyfunction]
fn delete_link(py: Python<'_>, name: &str) -> PyResult<bool> {
    detached(py, || links::delete(name))
}

/// Return the IPv4 prefixes routed in the main table, without the default route.
#[pyfunction]
fn list_routes(py: Python<'_>) -> PyResult<Vec<String>> {
    let found = detached(py, routes::list)?;
    Ok(found.iter().map(ToString::to_string).collect())
}
