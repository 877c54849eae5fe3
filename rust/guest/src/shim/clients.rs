//! Who is connected to the shim's socket, and what their streams are.

use std::collections::BTreeMap;

use crate::protocol::{Decoder, WINDOW_BYTES};
use crate::shim::queue::Queue;

/// A connection's number, never used twice.
pub type ClientId = u32;
/// All connections.
pub type Clients = BTreeMap<ClientId, Client>;

/// Most streams of one connection.
pub const STREAMS_MAX: usize = 256;
/// What may wait for a client beside the windows of its streams: answers and events.
const WORDS_BYTES_MAX: usize = 1 << 20;

/// What a client's stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Local {
    /// The guest's stream of that number.
    Guest(u32),
    /// The start of the main command was asked for.
    Start,
    /// Hears the main command; may still send so many bytes, if it may at all.
    Attach(Option<u32>),
    /// Hears the console; may still send so many bytes, if it may at all.
    Console(Option<u32>),
    /// Hears events.
    Watch,
    /// Waits for the agent's first word.
    Ready,
}

/// One connection.
#[derive(Default)]
pub struct Client {
    /// What it is told.
    pub queue: Queue,
    /// What it says.
    pub decoder: Decoder,
    /// Its streams that are open.
    pub streams: BTreeMap<u32, Local>,
}

impl Client {
    /// Whether more waits for it than it can have asked for.
    pub fn is_overrun(&self) -> bool {
        self.queue.n_bytes() > WORDS_BYTES_MAX + (2 + self.streams.len()) * WINDOW_BYTES as usize
    }
}
