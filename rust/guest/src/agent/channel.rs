//! The channel to the host: a virtio-serial port, or a connection to a vsock port; bytes and frames, never a wait.
//!
//! A vsock connection that broke is closed, and the next one accepted. A port has no connection that could be closed: what follows a broken
//! frame is skipped until something looks like a HELLO, which the host sends when it gets no more answers.

use std::fs::{File, OpenOptions, read_dir, read_to_string};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::system;
use crate::protocol::{Broken, Decoder, Frame, HEAD_BYTES, Kind, encode};

/// The port's name, told by the machine's command line.
const PORT_NAME: &str = "isopod.agent.0";
/// The vsock port.
const VSOCK_PORT: u32 = 1024;
const APPEAR_S: u64 = 10;
const READ_BYTES: usize = 65_536;
/// Above this, what commands write waits in their pipes.
const FULL_BYTES: usize = 256 << 10;
/// Above this, the host's frames wait as well: it asks and does not read the answers.
const STUCK_BYTES: usize = 2 << 20;
/// A HELLO is not longer.
const HELLO_BYTES_MAX: u32 = 4096;

/// What came.
pub enum Received {
    /// Bytes; [`Channel::next_frame`] says what they are.
    Bytes,
    /// Nothing for now.
    Nothing,
    /// The host is not there.
    Gone,
}

/// The channel.
pub struct Channel {
    file: Option<OwnedFd>,
    listener: Option<OwnedFd>,
    decoder: Decoder,
    /// Bytes among which a HELLO is looked for, after the channel broke.
    skipped: Option<Vec<u8>>,
    out: Vec<u8>,
    n_sent: usize,
}

impl Channel {
    /// Open the port, which appears some moments after its driver was inserted.
    pub fn open_port() -> Result<Self> {
        let until = Instant::now() + Duration::from_secs(APPEAR_S);
        loop {
            if let Some(name) = find_port() {
                let flags = libc::O_NONBLOCK;
                let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(format!("/dev/{name}"))?;
                return Ok(Self::new(Some(file.into()), None));
            }
            if Instant::now() > until {
                return Err(Error::new(ErrorKind::NotFound, format!("no virtio port {PORT_NAME}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Listen for connections of the host.
    pub fn open_vsock() -> Result<Self> {
        Ok(Self::new(None, Some(system::listen_vsock(VSOCK_PORT)?)))
    }

    fn new(file: Option<OwnedFd>, listener: Option<OwnedFd>) -> Self {
        Self { file, listener, decoder: Decoder::default(), skipped: None, out: Vec::new(), n_sent: 0 }
    }

    /// What frames come from and go to, if it is open.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    /// What connections come from.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(AsFd::as_fd)
    }

    /// Take the connection that came instead of any earlier one: the host has one shim.
    pub fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        if let Ok(connection) = system::accept(listener.as_fd()) {
            *self = Self::new(Some(connection), self.listener.take());
        }
    }

    /// Read once.
    pub fn receive(&mut self) -> Received {
        let Some(file) = &self.file else { return Received::Nothing };
        let mut buffer = vec![0; READ_BYTES];
        match rustix::io::read(file, &mut buffer) {
            Ok(0) => self.hang_up(),
            Ok(n_read) => {
                self.take(&buffer[..n_read]);
                Received::Bytes
            }
            Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
            Err(_) => self.hang_up(),
        }
    }

    /// The next whole frame of what was received.
    pub fn next_frame(&mut self) -> std::result::Result<Option<Frame>, Broken> {
        if self.skipped.is_some() { Ok(None) } else { self.decoder.next_frame() }
    }

    /// The host broke the protocol: hear nothing but a HELLO from it, or hang up.
    pub fn distrust(&mut self) {
        let rest = self.decoder.take_rest();
        if self.listener.is_some() {
            self.file = None;
        } else {
            self.skipped = Some(Vec::new());
            self.take(&rest);
        }
    }

    /// Add a frame to what is sent.
    pub fn queue(&mut self, kind: Kind, stream: u32, payload: &[u8]) {
        if self.file.is_some() {
            encode(&mut self.out, kind, stream, payload);
        }
    }

    /// Send what the channel takes now.
    pub fn flush(&mut self) {
        let Some(file) = &self.file else { return };
        while self.n_sent < self.out.len() {
            match rustix::io::write(file, &self.out[self.n_sent..]) {
                Ok(n_sent) if n_sent > 0 => self.n_sent += n_sent,
                Err(Errno::INTR) => {}
                _ => break,
            }
        }
        self.out.drain(..self.n_sent);
        self.n_sent = 0;
    }

    /// Whether there is something to send.
    pub fn has_more(&self) -> bool {
        !self.out.is_empty()
    }

    /// Whether commands should wait with their output.
    pub fn is_full(&self) -> bool {
        self.out.len() > FULL_BYTES
    }

    /// Whether the host should wait with its wishes.
    pub fn is_stuck(&self) -> bool {
        self.out.len() > STUCK_BYTES
    }

    fn hang_up(&mut self) -> Received {
        if self.listener.is_some() {
            self.file = None;
        }
        Received::Gone
    }

    fn take(&mut self, bytes: &[u8]) {
        let Some(mut skipped) = self.skipped.take() else {
            self.decoder.feed(bytes);
            return;
        };
        skipped.extend_from_slice(bytes);
        if let Some(start) = find_hello(&skipped) {
            self.decoder.feed(&skipped[start..]);
        } else {
            let n_useless = skipped.len().saturating_sub(HEAD_BYTES);
            skipped.drain(..n_useless);
            self.skipped = Some(skipped);
        }
    }
}

/// Where a HELLO begins among other bytes: a short frame on stream 0 whose payload begins like an object.
fn find_hello(bytes: &[u8]) -> Option<usize> {
    bytes.windows(HEAD_BYTES + 1).position(|head| {
        let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        (7..=HELLO_BYTES_MAX).contains(&length) && head[4..] == [Kind::Hello as u8, 0, 0, 0, 0, b'{']
    })
}

fn find_port() -> Option<String> {
    let ports = read_dir("/sys/class/virtio-ports").ok()?;
    let named = |name: &String| read_to_string(format!("/sys/class/virtio-ports/{name}/name")).is_ok_and(|text| text.trim() == PORT_NAME);
    ports.filter_map(|port| port.ok()?.file_name().into_string().ok()).find(named)
}

/// Write a line to the console, for who looks for the reason of an end.
pub fn say(line: &str) {
    use std::io::Write;
    let console = File::options().write(true).open("/dev/console").or_else(|_| File::options().write(true).open("/dev/kmsg"));
    if let Ok(mut console) = console {
        let _ = writeln!(console, "isopod-guest: {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::{Channel, READ_BYTES, find_hello};
    use crate::protocol::{Frame, Kind, encode};

    fn channel() -> Channel {
        Channel::new(None, None)
    }

    fn frames(channel: &mut Channel) -> Vec<Frame> {
        std::iter::from_fn(|| channel.next_frame().expect("it is well formed")).collect()
    }

    #[test]
    fn after_a_broken_frame_only_a_hello_is_heard() {
        let mut garbage = vec![255, 255, 255, 255, 2, 0, 0, 0, 0];
        encode(&mut garbage, Kind::Ping, 0, &[0; 8]);
        let mut hello = Vec::new();
        encode(&mut hello, Kind::Hello, 0, b"{\"version\":1}");
        encode(&mut hello, Kind::Ping, 0, &[1; 8]);
        for step in [1, 3, 1000] {
            let mut channel = channel();
            channel.take(&garbage);
            assert!(channel.next_frame().is_err());
            channel.distrust();
            assert_eq!(frames(&mut channel), []);
            hello.chunks(step).for_each(|piece| channel.take(piece));
            let kinds: Vec<Kind> = frames(&mut channel).iter().map(|frame| frame.kind).collect();
            assert_eq!(kinds, [Kind::Hello, Kind::Ping], "in pieces of {step}");
        }
    }

    #[test]
    fn a_hello_that_came_with_the_broken_frame_counts() {
        let mut bytes = vec![1, 0, 0, 0, 1, 0, 0, 0, 0];
        encode(&mut bytes, Kind::Hello, 0, b"{}");
        let mut channel = channel();
        channel.take(&bytes);
        assert!(channel.next_frame().is_err());
        channel.distrust();
        assert_eq!(frames(&mut channel).len(), 1);
    }

    #[test]
    fn what_is_skipped_does_not_grow() {
        let mut channel = channel();
        channel.distrust();
        for _ in 0..100 {
            channel.take(&vec![0; READ_BYTES]);
        }
        assert!(channel.skipped.as_ref().is_some_and(|kept| kept.len() < 16));
        assert_eq!(find_hello(&[7, 0, 0, 0, 1, 0, 0, 0, 0]), None, "nine bytes are not enough");
    }
}
