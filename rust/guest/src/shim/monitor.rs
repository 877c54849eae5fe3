//! Kata's routes on the monitor socket: `/metrics` and `/agent-url`. Connections and their buffers; the loop hands in what is ready.
//!
//! Rules: a few connections, each with one request at a time; a new one too many takes the place of the one that was quiet longest. No
//! timer: who says nothing costs nothing.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::event::PollFlags;

use crate::shim::config::{Agent, Config, PlainAgent};
use crate::shim::exposition::{Facts, render};
use crate::shim::http::{HEAD_BYTES_MAX, Parsed, answer, parse};
use crate::shim::hub::Hub;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 16;
const TEXT: &str = "text/plain; charset=utf-8";
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

struct Connection {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    n_sent: usize,
    /// The request for metrics that waits for the guest: is it HEAD, is the connection kept.
    waits: Option<(bool, bool)>,
    is_last: bool,
    used_ms: u64,
}

/// See the module.
#[derive(Default)]
pub struct Monitor {
    connections: Vec<Connection>,
}

impl Monitor {
    /// How many connections there are.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Take who came.
    pub fn accept(&mut self, listener: &UnixListener, now_ms: u64) {
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.connections.len() >= CONNECTIONS_MAX {
                let quiet = (0..self.connections.len()).min_by_key(|index| self.connections[*index].used_ms).unwrap_or(0);
                self.connections.remove(quiet);
            }
            let (input, output) = (Vec::new(), Vec::new());
            self.connections.push(Connection { stream, input, output, n_sent: 0, waits: None, is_last: false, used_ms: now_ms });
        }
    }

    /// What to wait for, in order.
    pub fn wants(&self) -> impl Iterator<Item = (&UnixStream, PollFlags)> {
        self.connections.iter().map(|connection| {
            let wanted = if !connection.output.is_empty() {
                PollFlags::OUT
            } else if connection.waits.is_none() {
                PollFlags::IN
            } else {
                PollFlags::empty() // its end is still heard
            };
            (&connection.stream, wanted)
        })
    }

    /// Serve what is ready: `ready` has the events of each connection, in order.
    pub fn serve(&mut self, ready: &[PollFlags], hub: &mut Hub, buffer: &mut [u8]) {
        for (connection, events) in self.connections.iter_mut().zip(ready) {
            if events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) && connection.output.is_empty() {
                connection.read(buffer, hub.now_ms);
            }
        }
        self.go_on(hub);
    }

    /// Answer what can be answered now.
    pub fn go_on(&mut self, hub: &mut Hub) {
        for connection in &mut self.connections {
            connection.go_on(hub);
        }
        self.connections.retain(|connection| !(connection.is_last && connection.output.is_empty() && connection.waits.is_none()));
    }
}

impl Connection {
    fn read(&mut self, buffer: &mut [u8], now_ms: u64) {
        match self.stream.read(buffer) {
            Ok(0) => self.abandon(),
            Ok(n_bytes) => {
                self.used_ms = now_ms;
                let room = (2 * HEAD_BYTES_MAX).saturating_sub(self.input.len());
                self.input.extend_from_slice(&buffer[..n_bytes.min(room)]);
                self.is_last |= n_bytes > room; // more than anybody who waits for answers would send
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.abandon(),
        }
    }

    fn abandon(&mut self) {
        self.is_last = true;
        self.waits = None;
        self.input.clear();
        self.output.clear();
    }

    fn go_on(&mut self, hub: &mut Hub) {
        loop {
            if let Some((is_head, keeps_alive)) = self.waits.take_if(|_| !hub.is_awaiting_metrics()) {
                let text = exposition(hub);
                self.reply(200, EXPOSITION, &text, is_head, keeps_alive);
            }
            self.write();
            if self.waits.is_some() || !self.output.is_empty() || self.input.is_empty() {
                return;
            }
            match parse(&self.input) {
                Parsed::More => return,
                Parsed::Bad(status) => {
                    self.input.clear();
                    self.reply(status, TEXT, "this is no request\n", false, false);
                }
                Parsed::Whole(request, n_bytes) => {
                    self.input.drain(..n_bytes);
                    if !request.keeps_alive {
                        self.input.clear();
                    }
                    self.route(&request.method, &request.path, request.keeps_alive, hub);
                }
            }
        }
    }

    fn route(&mut self, method: &str, path: &str, keeps_alive: bool, hub: &mut Hub) {
        let is_head = method == "HEAD";
        match path {
            "/metrics" | "/agent-url" if !is_head && method != "GET" => {
                self.reply(405, TEXT, "only GET and HEAD are allowed\n", false, keeps_alive);
            }
            "/metrics" => {
                hub.ask_metrics();
                self.waits = Some((is_head, keeps_alive));
            }
            "/agent-url" => match agent_url(&hub.config) {
                Some(url) => self.reply(200, TEXT, &url, is_head, keeps_alive),
                None => self.reply(500, TEXT, "the machine has no agent\n", is_head, keeps_alive),
            },
            _ => self.reply(404, TEXT, "there are /metrics and /agent-url\n", is_head, keeps_alive),
        }
    }

    fn reply(&mut self, status: u16, content_type: &str, body: &str, is_head: bool, keeps_alive: bool) {
        self.output = answer(status, content_type, body, is_head, keeps_alive);
        self.n_sent = 0;
        self.is_last |= !keeps_alive;
    }

    fn write(&mut self) {
        while self.n_sent < self.output.len() {
            match self.stream.write(&self.output[self.n_sent..]) {
                Ok(n_bytes) => self.n_sent += n_bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.abandon(),
            }
        }
        self.output = Vec::new();
    }
}

fn exposition(hub: &Hub) -> String {
    render(&Facts {
        vmm_pid: hub.vmm_pid,
        taps: hub.config.taps().collect(),
        guest: hub.fresh_metrics(),
        calls: &hub.calls,
        n_scrapes: hub.metrics.n_asked,
    })
}

fn agent_url(config: &Config) -> Option<String> {
    match &config.agent {
        Agent::Plain(PlainAgent::None) => None,
        Agent::Plain(PlainAgent::Socket) => Some(format!("unix://{}", config.socket)),
        Agent::Vsock { vsock, port } => Some(format!("hvsock://{vsock}:{port}")),
    }
}
