//! Bytes from clients for one reader: the main command's stdin, or the console. Each client gets back what it sent as credit once the reader
//! took it.

use std::collections::VecDeque;

use crate::shim::clients::ClientId;

/// Bytes of one client.
struct Piece {
    client: ClientId,
    stream: u32,
    bytes: Vec<u8>,
    start: usize,
}

/// What waits for the reader.
#[derive(Default)]
pub struct Input {
    pieces: VecDeque<Piece>,
    is_ended: bool,
}

impl Input {
    /// Add what a client sent; after the end nothing counts.
    pub fn push(&mut self, client: ClientId, stream: u32, bytes: Vec<u8>) {
        if !self.is_ended && !bytes.is_empty() {
            self.pieces.push_back(Piece { client, stream, bytes, start: 0 });
        }
    }

    /// No more comes.
    pub fn end(&mut self) {
        self.is_ended = true;
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether all was taken and no more comes.
    pub fn is_over(&self) -> bool {
        self.is_ended && self.pieces.is_empty()
    }

    /// What comes next, at most so many bytes.
    pub fn peek(&self, n_bytes_max: usize) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| &piece.bytes[piece.start..piece.bytes.len().min(piece.start + n_bytes_max)])
    }

    /// The reader took so many of them; return to whom they are granted anew.
    pub fn take(&mut self, n_bytes: usize) -> Option<(ClientId, u32)> {
        let piece = self.pieces.front_mut()?;
        piece.start += n_bytes;
        let from = (piece.client, piece.stream);
        if piece.start >= piece.bytes.len() {
            self.pieces.pop_front();
        }
        Some(from)
    }

    /// The reader takes no more.
    pub fn close(&mut self) {
        *self = Self { pieces: VecDeque::new(), is_ended: true };
    }
}

#[cfg(test)]
mod tests {
    use super::Input;

    #[test]
    fn bytes_come_in_order_and_their_credit_goes_back() {
        let mut input = Input::default();
        input.push(1, 5, b"abc".to_vec());
        input.push(2, 6, b"d".to_vec());
        input.end();
        input.push(1, 5, b"late".to_vec());
        assert_eq!(input.peek(2), b"ab");
        assert_eq!(input.take(2), Some((1, 5)));
        assert_eq!(input.peek(2), b"c");
        assert_eq!(input.take(1), Some((1, 5)));
        assert!(!input.is_over());
        assert_eq!(input.peek(9), b"d");
        assert_eq!(input.take(1), Some((2, 6)));
        assert!(input.is_over() && input.take(1).is_none());
    }
}
