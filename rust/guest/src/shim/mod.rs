//! The process beside one microVM on the host, as conmon is beside a container: `isopod-shim CONFIG.json`.
//!
//! It starts the machine's program, holds its console and the channel to the agent in its guest, writes the main command's log, offers both to
//! clients on a Unix socket, and leaves an exit file when the machine has ended. The machine dies with it. It outlives the daemon.
//!
//! ```text
//!   clients --- shim.sock ---+                        +--- console --- console.log
//!                            |                        |
//!   Prometheus --- monitor --+--- run (poll) -- hub --+--- channel --- the guest's agent
//!                            |                        |
//!   the engine: start/sync --+                        +--- log, end.json, the exit file
//! ```
//!
//! `hub`, `ops`, `guest`, `feed`, `heartbeat`, `verdict` know nothing of descriptors; `run`, `link`, `machine`, `monitor` hold them.
//!
//! Rules: one thread, one poll. Everything that comes from the guest or a client is bounded and checked. Nothing runs when nothing happens but
//! the heartbeat.

pub mod calls;
pub mod clients;
pub mod config;
pub mod exposition;
pub mod feed;
pub mod guest;
pub mod heartbeat;
pub mod http;
pub mod hub;
pub mod input;
pub mod link;
pub mod machine;
pub mod main;
pub mod monitor;
pub mod ops;
pub mod panic;
pub mod queue;
pub mod run;
pub mod sink;
pub mod verdict;
