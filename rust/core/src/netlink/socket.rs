//! A route netlink socket: requests out, acknowledgements and dumps in, each exchange with a deadline.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::message::{Message, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, Request, messages};
use crate::error::{About, Result};

const DEADLINE: Duration = Duration::from_secs(5);
/// The kernel builds dumps in pieces of at most 32 KiB.
const BUFFER_BYTES: usize = 64 << 10;
const N_DUMPS_MAX: u32 = 16;

/// A netlink socket of one network namespace. It stays in that namespace, whichever thread uses it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_timeout(&fd, Timeout::Recv, Some(DEADLINE))?;
        sockopt::set_socket_timeout(&fd, Timeout::Send, Some(DEADLINE))?;
        Ok(Self { fd, sequence: 0, buffer: vec![0; BUFFER_BYTES] })
    }

    /// Opens a socket in the network namespace pinned at `namespace`. A thread of its own enters it, so that the
    /// caller's thread never leaves its namespace, not even when something fails half-way.
    pub fn open_in(namespace: &Path) -> Result<Self> {
        let file = File::open(namespace).about(namespace)?;
        Self::open_in_fd(&file).map_err(|error| error.about(namespace))
    }

    /// The same for an open namespace file.
    pub fn open_in_fd(namespace: &File) -> Result<Self> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                    Self::open()
                })
                .join()
                .unwrap_or_else(|_| Err(Errno::IO.into()))
        })
    }

    /// Sends one request and waits until the kernel has done it.
    pub fn execute(&mut self, request: Request) -> Result<()> {
        let sequence = self.send(request, NLM_F_ACK)?;
        self.receive(sequence, |_| ()).map(|_| ())
    }

    /// Asks for one object: calls `visit` with its message.
    pub fn get(&mut self, request: Request, mut visit: impl FnMut(&Message<'_>)) -> Result<()> {
        let sequence = self.send(request, NLM_F_ACK)?;
        self.receive(sequence, &mut visit).map(|_| ())
    }

    /// Asks for all objects. A dump that a change overtook is asked for again, from the start.
    pub fn dump<T>(&mut self, request: &Request, mut parse: impl FnMut(&Message<'_>) -> Option<T>) -> Result<Vec<T>> {
        for _ in 0..N_DUMPS_MAX {
            let mut found = Vec::new();
            let sequence = self.send(request.clone(), NLM_F_DUMP)?;
            let consistent = self.receive(sequence, |message| found.extend(parse(message)))?;
            if consistent {
                return Ok(found);
            }
        }
        Err(Errno::BUSY.into())
    }

    fn send(&mut self, request: Request, flags: u16) -> Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = request.finish(self.sequence);
        let all = u16::from_ne_bytes([bytes[6], bytes[7]]) | flags;
        bytes[6..8].copy_from_slice(&all.to_ne_bytes());
        let n_sent = retry_on_intr(|| send(&self.fd, &bytes, SendFlags::empty()))?;
        if n_sent != bytes.len() {
            return Err(Errno::MSGSIZE.into());
        }
        Ok(self.sequence)
    }

    /// Reads until the request of that number is done; returns whether no answer was marked inconsistent.
    fn receive(&mut self, sequence: u32, mut visit: impl FnMut(&Message<'_>)) -> Result<bool> {
        let deadline = Instant::now() + DEADLINE;
        let mut consistent = true;
        loop {
            let n_bytes = self.receive_datagram(deadline)?;
            for message in messages(&self.buffer[..n_bytes]) {
                let message = message?;
                if message.sequence != sequence {
                    continue;
                }
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                if message.kind != NLMSG_ERROR && message.kind != NLMSG_DONE {
                    visit(&message);
                    continue;
                }
                return match message.errno()? {
                    None => Ok(consistent),
                    Some(errno) => Err(errno.into()),
                };
            }
        }
    }

    fn receive_datagram(&mut self, deadline: Instant) -> Result<usize> {
        loop {
            if Instant::now() > deadline {
                return Err(Errno::TIMEDOUT.into());
            }
            match recv(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC) {
                Ok((_, n_bytes)) if n_bytes > self.buffer.len() => return Err(Errno::MSGSIZE.into()),
                Ok((_, n_bytes)) => return Ok(n_bytes),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(Errno::TIMEDOUT.into()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
