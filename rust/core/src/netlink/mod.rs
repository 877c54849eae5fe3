//! The few kinds of rtnetlink messages that isopod needs, written out.
//!
//! A general library was rejected: the useful part is some three hundred lines, and this way every request is one
//! message whose attributes can be read next to the kernel's source.

pub mod address;
pub mod links;
pub mod message;
pub mod routes;
pub mod socket;
