//! Netlink messages as bytes: a builder for requests and a bounds-checked reader for answers. No sockets here.
//!
//! Source: netlink(7), rtnetlink(7), and the kernel's `include/uapi/linux/{netlink,rtnetlink,if_link}.h`. All numbers
//! are in the machine's byte order; messages and attributes start at multiples of four bytes.

use rustix::io::Errno;

/// Bytes of a message header (`struct nlmsghdr`).
pub const HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// The type's upper two bits say "nested" and "network byte order"; the rest is the type.
const ATTRIBUTE_TYPE_MASK: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

/// A message that ends an exchange, or an error with an errno (0: acknowledged).
pub const NLMSG_ERROR: u16 = 2;
/// The end of a dump.
pub const NLMSG_DONE: u16 = 3;

/// This is a request.
pub const NLM_F_REQUEST: u16 = 0x1;
/// Answer also when all went well.
pub const NLM_F_ACK: u16 = 0x4;
/// In an answer: the dump was overtaken by a change and may be inconsistent.
pub const NLM_F_DUMP_INTR: u16 = 0x10;
/// Answer with all objects.
pub const NLM_F_DUMP: u16 = 0x300;
/// Replace what exists.
pub const NLM_F_REPLACE: u16 = 0x100;
/// Fail if it exists.
pub const NLM_F_EXCL: u16 = 0x200;
/// Create if it does not exist.
pub const NLM_F_CREATE: u16 = 0x400;

/// A request being built.
#[derive(Debug, Clone)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// Starts a request with the header of its family (`ifinfomsg`, `ifaddrmsg`, `rtmsg`).
    pub fn new(kind: u16, flags: u16, family_header: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(family_header);
        pad(&mut bytes);
        Self { bytes }
    }

    /// Appends an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        append_attribute(&mut self.bytes, kind, value);
        self
    }

    /// Appends a number.
    #[must_use]
    pub fn with_u32(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    /// Appends a string, with the NUL that the kernel's policies ask for.
    #[must_use]
    pub fn with_str(self, kind: u16, value: &str) -> Self {
        self.with(kind, &terminated(value))
    }

    /// Appends an attribute that holds attributes.
    #[must_use]
    pub fn with_nested(self, kind: u16, inner: &Attributes) -> Self {
        self.with(kind | NESTED, &inner.bytes)
    }

    /// Returns the bytes to send under a sequence number.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let n_bytes = u32::try_from(self.bytes.len()).expect("a request of this module is small");
        self.bytes[0..4].copy_from_slice(&n_bytes.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// Attributes on their own, to be nested.
#[derive(Debug, Default, Clone)]
pub struct Attributes {
    bytes: Vec<u8>,
}

impl Attributes {
    /// Starts after a fixed header (a veth's peer begins with an `ifinfomsg`).
    pub fn after(header: &[u8]) -> Self {
        Self { bytes: header.to_vec() }
    }

    /// Appends an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        append_attribute(&mut self.bytes, kind, value);
        self
    }

    /// Appends a string with its NUL.
    #[must_use]
    pub fn with_str(self, kind: u16, value: &str) -> Self {
        self.with(kind, &terminated(value))
    }

    /// Appends an attribute that holds attributes.
    #[must_use]
    pub fn with_nested(self, kind: u16, inner: &Self) -> Self {
        self.with(kind | NESTED, &inner.bytes)
    }
}

/// One message of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// `RTM_NEWLINK` and the like, or `NLMSG_ERROR`, `NLMSG_DONE`.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// The number of the request it answers.
    pub sequence: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

impl Message<'_> {
    /// Returns the errno of an `NLMSG_ERROR` or `NLMSG_DONE`; None if it reports success.
    pub fn errno(&self) -> Result<Option<Errno>, Errno> {
        if self.payload.is_empty() && self.kind == NLMSG_DONE {
            return Ok(None);
        }
        let bytes = self.payload.first_chunk::<4>().ok_or(Errno::BADMSG)?;
        match i32::from_ne_bytes(*bytes) {
            code if code >= 0 => Ok(None),
            code => Ok(Some(Errno::from_raw_os_error(code.checked_neg().ok_or(Errno::BADMSG)?))),
        }
    }
}

/// Splits a received datagram into its messages. A damaged one ends the iteration with an error.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Errno>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let Some((message, rest)) = split_message(datagram) else {
            datagram = &[];
            return Some(Err(Errno::BADMSG));
        };
        datagram = rest;
        Some(Ok(message))
    })
}

/// Iterates over the attributes of a payload: (type, value). What does not fit ends the iteration.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let n_bytes = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & ATTRIBUTE_TYPE_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER_BYTES..n_bytes)?;
        bytes = bytes.get(aligned(n_bytes)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Reads a number out of a payload.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Reads a string attribute up to its NUL.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

fn split_message(datagram: &[u8]) -> Option<(Message<'_>, &[u8])> {
    let n_bytes = usize::try_from(u32_at(datagram, 0)?).ok()?;
    let message = Message {
        kind: u16_at(datagram, 4)?,
        flags: u16_at(datagram, 6)?,
        sequence: u32_at(datagram, 8)?,
        payload: datagram.get(HEADER_BYTES..n_bytes)?,
    };
    Some((message, datagram.get(aligned(n_bytes)..).unwrap_or_default()))
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..offset + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn append_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let n_bytes = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len()).expect("an attribute of this module is small");
    bytes.extend_from_slice(&n_bytes.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    pad(bytes);
}

fn terminated(value: &str) -> Vec<u8> {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(aligned(bytes.len()), 0);
}

const fn aligned(n_bytes: usize) -> usize {
    n_bytes.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reads_back_as_written() {
        let peer = Attributes::after(&[0; 16]).with_str(3, "eth0");
        let info = Attributes::default().with_str(1, "veth").with_nested(2, &Attributes::default().with_nested(1, &peer));
        let bytes = Request::new(16, NLM_F_ACK, &[0; 16]).with_str(3, "host0").with_u32(10, 7).with_nested(18, &info).finish(42);
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.len(), 1);
        let message = all[0].unwrap();
        assert_eq!((message.kind, message.flags, message.sequence), (16, NLM_F_ACK | NLM_F_REQUEST, 42));
        let found: Vec<_> = attributes(&message.payload[16..]).collect();
        assert_eq!(found[0], (3, &b"host0\0"[..]));
        assert_eq!(u32_at(found[1].1, 0), Some(7));
        let inner: Vec<_> = attributes(found[2].1).collect();
        assert_eq!(text(inner[0].1), "veth");
        let (_, data) = attributes(inner[1].1).next().unwrap();
        assert_eq!(attributes(&data[16..]).next(), Some((3, &b"eth0\0"[..])));
    }

    #[test]
    fn damaged_lengths_end_the_reading() {
        let good = Request::new(18, 0, &[0; 16]).finish(1);
        for n_bytes in [0_u32, 15, 33, u32::MAX] {
            let mut bytes = good.clone();
            bytes[0..4].copy_from_slice(&n_bytes.to_ne_bytes());
            assert_eq!(messages(&bytes).collect::<Vec<_>>(), [Err(Errno::BADMSG)], "{n_bytes}");
        }
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[9, 0, 1, 0, 0, 0, 0, 0]).count(), 0);
    }

    #[test]
    fn errors_carry_their_errno() {
        let payload = (-17_i32).to_ne_bytes();
        let message = Message { kind: NLMSG_ERROR, flags: 0, sequence: 1, payload: &payload };
        assert_eq!(message.errno(), Ok(Some(Errno::EXIST)));
        let message = Message { kind: NLMSG_ERROR, flags: 0, sequence: 1, payload: &[0; 20] };
        assert_eq!(message.errno(), Ok(None));
        let message = Message { kind: NLMSG_ERROR, flags: 0, sequence: 1, payload: &[0; 3] };
        assert_eq!(message.errno(), Err(Errno::BADMSG));
    }
}
