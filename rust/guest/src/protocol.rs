//! The frames between host and guest, and between a client and the shim.
//!
//! Frame = u32 LE n, the length of what follows (5..=65541) | u8 kind | u32 LE stream | payload. The Python twin is `isopod/wire/agent.py`.

/// The version of the protocol.
pub const VERSION: u32 = 1;
/// Bytes of the head of a frame.
pub const HEAD_BYTES: usize = 9;
/// Most bytes of a payload.
pub const PAYLOAD_BYTES_MAX: usize = 65_536;
/// What a sender may send on a stream before the receiver grants more.
pub const WINDOW_BYTES: u32 = 262_144;
/// The stream of the main command.
pub const MAIN_STREAM: u32 = 1;

/// What a frame is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// JSON: who is there.
    Hello = 1,
    /// JSON: an operation.
    Request = 2,
    /// JSON: its outcome.
    Response = 3,
    /// Bytes for a command.
    Stdin = 4,
    /// No more of them.
    StdinEnd = 5,
    /// Bytes a command wrote.
    Stdout = 6,
    /// Bytes a command wrote as errors.
    Stderr = 7,
    /// u16 LE rows, u16 LE columns.
    Resize = 8,
    /// u8: a signal for the command.
    Signal = 9,
    /// JSON: how it ended.
    Exit = 10,
    /// u32 LE: so many more bytes may come.
    Credit = 11,
    /// Bytes of an archive.
    Data = 12,
    /// No more of them.
    DataEnd = 13,
    /// JSON: something happened.
    Event = 14,
    /// The sender reads no more of this stream.
    Close = 15,
    /// Eight bytes to send back.
    Ping = 16,
    /// The eight bytes.
    Pong = 17,
}

impl Kind {
    /// The kind of that number.
    pub fn of(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Hello,
            2 => Self::Request,
            3 => Self::Response,
            4 => Self::Stdin,
            5 => Self::StdinEnd,
            6 => Self::Stdout,
            7 => Self::Stderr,
            8 => Self::Resize,
            9 => Self::Signal,
            10 => Self::Exit,
            11 => Self::Credit,
            12 => Self::Data,
            13 => Self::DataEnd,
            14 => Self::Event,
            15 => Self::Close,
            16 => Self::Ping,
            17 => Self::Pong,
            _ => return None,
        })
    }

    /// Whether its payload counts against the receiver's credit.
    pub fn takes_credit(self) -> bool {
        matches!(self, Self::Stdin | Self::Stdout | Self::Stderr | Self::Data)
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is about.
    pub kind: Kind,
    /// Which stream.
    pub stream: u32,
    /// The rest.
    pub payload: Vec<u8>,
}

/// The other side broke the protocol.
#[derive(Debug, PartialEq, Eq)]
pub struct Broken(pub &'static str);

impl std::fmt::Display for Broken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.0)
    }
}

impl std::error::Error for Broken {}

/// Append a frame to `out`.
pub fn encode(out: &mut Vec<u8>, kind: Kind, stream: u32, payload: &[u8]) {
    assert!(payload.len() <= PAYLOAD_BYTES_MAX, "a payload was not cut into pieces");
    let length = u32::try_from(payload.len() + HEAD_BYTES - 4).expect("it is below 65,542");
    out.extend_from_slice(&length.to_le_bytes());
    out.push(kind as u8);
    out.extend_from_slice(&stream.to_le_bytes());
    out.extend_from_slice(payload);
}

/// Bytes in, frames out.
#[derive(Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// Add what was read.
    pub fn feed(&mut self, data: &[u8]) {
        if self.start > 0 && self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        self.buffer.extend_from_slice(data);
    }

    /// The next whole frame, None if more bytes are needed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Broken> {
        let rest = &self.buffer[self.start..];
        if rest.len() < HEAD_BYTES {
            self.compact();
            return Ok(None);
        }
        let length = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        if !(HEAD_BYTES - 4..=PAYLOAD_BYTES_MAX + HEAD_BYTES - 4).contains(&length) {
            return Err(Broken("a frame of impossible length"));
        }
        let Some(kind) = Kind::of(rest[4]) else { return Err(Broken("a frame of an unknown kind")) };
        if rest.len() < length + 4 {
            self.compact();
            return Ok(None);
        }
        let stream = u32::from_le_bytes([rest[5], rest[6], rest[7], rest[8]]);
        let payload = rest[HEAD_BYTES..length + 4].to_vec();
        self.start += length + 4;
        Ok(Some(Frame { kind, stream, payload }))
    }

    /// The bytes that are no frame yet. The decoder is empty afterwards.
    pub fn take_rest(&mut self) -> Vec<u8> {
        self.compact();
        std::mem::take(&mut self.buffer)
    }

    fn compact(&mut self) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Broken, Decoder, Frame, Kind, PAYLOAD_BYTES_MAX, encode};

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let mut bytes = Vec::new();
        encode(&mut bytes, Kind::Hello, 0, b"{}");
        encode(&mut bytes, Kind::Stdout, 7, &vec![9; PAYLOAD_BYTES_MAX]);
        encode(&mut bytes, Kind::StdinEnd, u32::MAX, b"");
        for step in [1, 2, 8, 9, 10, 4096, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut frames = Vec::new();
            for piece in bytes.chunks(step) {
                decoder.feed(piece);
                while let Some(frame) = decoder.next_frame().expect("it is well formed") {
                    frames.push(frame);
                }
            }
            assert_eq!(frames.len(), 3);
            assert_eq!(frames[0], Frame { kind: Kind::Hello, stream: 0, payload: b"{}".to_vec() });
            assert_eq!(frames[1].payload.len(), PAYLOAD_BYTES_MAX);
            assert_eq!(frames[2], Frame { kind: Kind::StdinEnd, stream: u32::MAX, payload: Vec::new() });
        }
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        for (bytes, why) in [
            ([4, 0, 0, 0, 1, 0, 0, 0, 0], "a frame of impossible length"),
            ([6, 0, 1, 0, 1, 0, 0, 0, 0], "a frame of impossible length"),
            ([255, 255, 255, 255, 1, 0, 0, 0, 0], "a frame of impossible length"),
            ([5, 0, 0, 0, 0, 0, 0, 0, 0], "a frame of an unknown kind"),
            ([5, 0, 0, 0, 18, 0, 0, 0, 0], "a frame of an unknown kind"),
        ] {
            let mut decoder = Decoder::default();
            decoder.feed(&bytes);
            assert_eq!(decoder.next_frame(), Err(Broken(why)));
        }
    }
}
