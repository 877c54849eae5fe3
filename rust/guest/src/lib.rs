//! Both ends of a microVM. `agent` is the guest's init and agent, `shim` the process beside the machine on the host; what they say to
//! each other is `protocol`.

pub mod agent;
pub mod protocol;
pub mod shim;
