//! The Rust core of isopod: what has to be close to the kernel or fast.
//!
//! Logic lives in modules that know nothing of Python and carry their own tests; `bindings` converts arguments, releases
//! the GIL and turns [`error::Error`] into Python's exceptions. Nothing here keeps state between calls, starts work at
//! import or logs.
//!
//! `cargo test --manifest-path rust/core/Cargo.toml` runs the tests of what is pure; what needs the kernel is tested from
//! Python (`tests/core`), on the module that maturin built.

pub mod archive;
pub mod erofs;
pub mod error;
pub mod exposition;
pub mod mask;
pub mod mounts;
pub mod namespaces;
pub mod netlink;
pub mod raft_core;
pub mod raft_log;
pub mod ring;
pub mod tree;
pub mod uring;

#[cfg(all(feature = "python", not(test)))]
mod bindings;
