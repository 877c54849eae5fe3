//! Frames that wait to be written to one peer. A body that goes to many peers is held once.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsFd;
use std::rc::Rc;

use serde_json::Value;

use crate::protocol::{HEAD_BYTES, Kind};

/// Pieces handed to one system call: two for each frame.
const SLICES_MAX: usize = 32;

struct Piece {
    head: [u8; HEAD_BYTES],
    body: Rc<[u8]>,
    range: Range<usize>,
}

impl Piece {
    fn len(&self) -> usize {
        HEAD_BYTES + self.range.len()
    }
}

/// Frames in the order in which they go.
#[derive(Default)]
pub struct Queue {
    pieces: VecDeque<Piece>,
    n_sent: usize,
    n_bytes: usize,
}

impl Queue {
    /// Bytes that wait.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Add a frame with a part of a body.
    pub fn push(&mut self, kind: Kind, stream: u32, body: &Rc<[u8]>, range: Range<usize>) {
        let mut head = [0; HEAD_BYTES];
        let length = u32::try_from(range.len() + HEAD_BYTES - 4).expect("a body is at most 65,536 bytes");
        head[..4].copy_from_slice(&length.to_le_bytes());
        head[4] = kind as u8;
        head[5..].copy_from_slice(&stream.to_le_bytes());
        let piece = Piece { head, body: Rc::clone(body), range };
        self.n_bytes += piece.len();
        self.pieces.push_back(piece);
    }

    /// Add a frame.
    pub fn push_bytes(&mut self, kind: Kind, stream: u32, payload: &[u8]) {
        let body: Rc<[u8]> = payload.into();
        self.push(kind, stream, &body, 0..payload.len());
    }

    /// Add a frame with JSON in it.
    pub fn push_json(&mut self, kind: Kind, stream: u32, value: &Value) {
        self.push_bytes(kind, stream, value.to_string().as_bytes());
    }

    /// Add a frame that grants so many more bytes.
    pub fn push_credit(&mut self, stream: u32, n_bytes: u32) {
        self.push_bytes(Kind::Credit, stream, &n_bytes.to_le_bytes());
    }

    /// Forget all that waits; the peer is gone.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Write until nothing waits or the peer takes no more; return how many bytes went.
    pub fn write_to(&mut self, peer: impl AsFd) -> io::Result<usize> {
        let mut n_written = 0;
        while !self.pieces.is_empty() {
            match rustix::io::writev(&peer, &self.slices()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n_bytes) => {
                    n_written += n_bytes;
                    self.forget(n_bytes);
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(n_written)
    }

    fn slices(&self) -> Vec<IoSlice<'_>> {
        let mut slices = Vec::with_capacity(SLICES_MAX);
        let mut n_skipped = self.n_sent;
        for piece in self.pieces.iter().take(SLICES_MAX / 2) {
            for part in [&piece.head[..], &piece.body[piece.range.clone()]] {
                let start = n_skipped.min(part.len());
                n_skipped -= start;
                if start < part.len() {
                    slices.push(IoSlice::new(&part[start..]));
                }
            }
        }
        slices
    }

    fn forget(&mut self, n_bytes: usize) {
        self.n_bytes -= n_bytes;
        self.n_sent += n_bytes;
        while let Some(piece) = self.pieces.front() {
            if self.n_sent < piece.len() {
                break;
            }
            self.n_sent -= piece.len();
            self.pieces.pop_front();
        }
    }

    /// All that waits, as bytes.
    #[cfg(test)]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.n_bytes);
        for piece in &self.pieces {
            let kind = Kind::of(piece.head[4]).expect("it was made from one");
            let stream = u32::from_le_bytes([piece.head[5], piece.head[6], piece.head[7], piece.head[8]]);
            crate::protocol::encode(&mut bytes, kind, stream, &piece.body[piece.range.clone()]);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::Queue;
    use crate::protocol::{Decoder, Kind};
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    #[test]
    fn what_is_pushed_arrives_however_it_is_cut() {
        let (ours, mut theirs) = UnixStream::pair().expect("there are descriptors");
        ours.set_nonblocking(true).expect("it can");
        let body: Rc<[u8]> = vec![7; 60_000].into();
        let mut queue = Queue::default();
        for stream in 0..40 {
            queue.push(Kind::Stdout, stream, &body, 0..60_000);
            queue.push_bytes(Kind::StdinEnd, stream, b"");
        }
        let expected = queue.to_bytes();
        assert_eq!(queue.n_bytes(), expected.len());
        let mut found = Vec::new();
        let mut buffer = vec![0; 50_001];
        while !queue.is_empty() {
            assert!(queue.write_to(&ours).expect("the peer lives") > 0);
            let n_bytes = theirs.read(&mut buffer).expect("there is something");
            found.extend_from_slice(&buffer[..n_bytes]);
        }
        drop(ours);
        theirs.read_to_end(&mut found).expect("it ends");
        assert_eq!(found, expected);
        let mut decoder = Decoder::default();
        decoder.feed(&found);
        assert_eq!(decoder.next_frame().expect("it is one").expect("it is whole").payload.len(), 60_000);
    }
}
