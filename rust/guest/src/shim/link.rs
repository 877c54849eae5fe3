//! The way to the agent: one end of a socket pair, or a hybrid vsock that is dialled until the guest listens.
//! Source: Firecracker's docs/vsock.md ("CONNECT PORT\n", "OK HOSTPORT\n"); Cloud Hypervisor does the same.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;

use crate::shim::machine::with_short_path;

const RETRY_MS: u64 = 20;
const RETRY_MS_MAX: u64 = 320;
/// "OK 4294967295\n" and some room.
const GREETING_BYTES_MAX: usize = 32;

enum State {
    None,
    Waiting { due_ms: u64 },
    Greeting { stream: UnixStream, line: Vec<u8> },
    Open(UnixStream),
}

/// See the module.
pub struct Link {
    state: State,
    vsock: Option<(String, u32)>,
    pause_ms: u64,
}

/// What happened to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Nothing of note.
    None,
    /// It stands.
    Opened,
}

impl Link {
    /// No agent.
    pub fn none() -> Self {
        Self { state: State::None, vsock: None, pause_ms: RETRY_MS }
    }

    /// A socket that stands already.
    pub fn open(stream: UnixStream) -> Self {
        Self { state: State::Open(stream), vsock: None, pause_ms: RETRY_MS }
    }

    /// A vsock to dial.
    pub fn dial(path: &str, port: u32, now_ms: u64) -> Self {
        Self { state: State::Waiting { due_ms: now_ms }, vsock: Some((path.to_owned(), port)), pause_ms: RETRY_MS }
    }

    /// The stream, once it stands.
    pub fn stream(&self) -> Option<&UnixStream> {
        if let State::Open(stream) = &self.state { Some(stream) } else { None }
    }

    /// What to wait for.
    pub fn wants(&self, has_output: bool) -> Option<(&UnixStream, PollFlags)> {
        match &self.state {
            State::None | State::Waiting { .. } => None,
            State::Greeting { stream, .. } => Some((stream, PollFlags::IN)),
            State::Open(stream) => Some((stream, if has_output { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN })),
        }
    }

    /// When to dial next.
    pub fn next_ms(&self) -> Option<u64> {
        if let State::Waiting { due_ms } = self.state { Some(due_ms) } else { None }
    }

    /// Dial if it is time.
    pub fn tick(&mut self, now_ms: u64) {
        if self.next_ms().is_some_and(|due_ms| due_ms <= now_ms) {
            match self.connect() {
                Ok(stream) => self.state = State::Greeting { stream, line: Vec::new() },
                Err(_) => {
                    self.lose(now_ms);
                }
            }
        }
    }

    /// Read the greeting, if that is what is awaited.
    pub fn greet(&mut self, now_ms: u64) -> News {
        let State::Greeting { stream, line } = &mut self.state else { return News::None };
        match read_greeting(stream, line) {
            Ok(false) => News::None,
            Ok(true) => {
                if let State::Greeting { stream, .. } = std::mem::replace(&mut self.state, State::None) {
                    self.state = State::Open(stream);
                }
                self.pause_ms = RETRY_MS;
                News::Opened
            }
            Err(_) => {
                self.lose(now_ms);
                News::None
            }
        }
    }

    /// The stream ended. Return whether it is dialled again.
    pub fn lose(&mut self, now_ms: u64) -> bool {
        if self.vsock.is_none() {
            self.state = State::None;
            return false;
        }
        self.state = State::Waiting { due_ms: now_ms + self.pause_ms };
        self.pause_ms = (2 * self.pause_ms).min(RETRY_MS_MAX);
        true
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let (path, port) = self.vsock.as_ref().ok_or(io::ErrorKind::NotFound)?;
        // A Unix socket connects at once or not at all, unless its backlog is full: then this is no time to wait either.
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
            None,
        )?;
        with_short_path(path, |path| Ok(rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(path)?)?))?;
        let mut stream = UnixStream::from(socket);
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        Ok(stream)
    }
}

/// Read up to the end of the line and no further; return whether it is there.
fn read_greeting(stream: &mut UnixStream, line: &mut Vec<u8>) -> io::Result<bool> {
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) if byte == *b"\n" => return if line.starts_with(b"OK ") { Ok(true) } else { Err(io::ErrorKind::InvalidData.into()) },
            Ok(_) if line.len() >= GREETING_BYTES_MAX => return Err(io::ErrorKind::InvalidData.into()),
            Ok(_) => line.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Link, News};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_vsock_is_dialled_until_somebody_says_ok() {
        let folder = format!("{}/isopod-link-{}", std::env::temp_dir().display(), std::process::id());
        std::fs::create_dir(&folder).expect("nobody else has this name");
        let path = format!("{folder}/v");
        let mut link = Link::dial(&path, 1024, 0);
        link.tick(0); // nobody listens
        assert_eq!(link.next_ms(), Some(20));
        let listener = UnixListener::bind(&path).expect("it binds");
        link.tick(20);
        drop(listener.accept().expect("somebody came")); // the guest does not listen yet
        assert_eq!(link.greet(21), News::None);
        assert_eq!(link.next_ms(), Some(61));
        link.tick(61);
        let (mut peer, _) = listener.accept().expect("somebody came");
        let mut asked = [0; 13];
        peer.read_exact(&mut asked).expect("it asks");
        assert_eq!(&asked, b"CONNECT 1024\n");
        peer.write_all(b"OK 10").expect("it listens");
        assert_eq!(link.greet(62), News::None);
        peer.write_all(b"73\nrest").expect("it listens");
        assert_eq!(link.greet(62), News::Opened);
        let mut rest = [0; 4];
        link.stream().expect("it stands").read_exact(&mut rest).expect("the rest was left");
        assert_eq!(&rest, b"rest");
        assert!(link.lose(70));
        std::fs::remove_dir_all(&folder).expect("it was ours");
    }
}
