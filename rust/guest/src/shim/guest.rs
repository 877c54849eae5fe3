//! The shim's side of the channel to the agent: which streams are open, and what the guest may say on each.
//!
//! Rules: the guest is not trusted. A frame on a stream that was not opened, of a kind that the stream's operation does not have, beyond the
//! credit, or with words that make no sense breaks the channel. A stream that its client has left is kept until the guest has ended it, and
//! what still comes on it is dropped.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::protocol::{Broken, Decoder, Kind, MAIN_STREAM, WINDOW_BYTES};
use crate::shim::clients::ClientId;
use crate::shim::heartbeat::Heartbeat;
use crate::shim::queue::Queue;

/// Most streams beside the main command's; the guest takes 256.
const STREAMS_MAX: usize = 250;

/// Who hears what comes on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// That client, on that stream of its own.
    Client(ClientId, u32),
    /// The shim: the answer to its question for metrics.
    Metrics,
    /// Nobody any more.
    Nobody,
}

/// What an operation's stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A response.
    Call,
    /// A response, output and an exit.
    Command,
    /// A response and data.
    Archive,
    /// Data from the host, then a response.
    Extract,
}

impl Shape {
    /// The shape of an operation; one that is not known is answered by the guest.
    pub fn of(operation: &str) -> Self {
        match operation {
            "exec" => Self::Command,
            "archive" => Self::Archive,
            "extract" => Self::Extract,
            _ => Self::Call,
        }
    }
}

/// One stream of the channel.
pub struct Stream {
    /// Who hears it.
    pub owner: Owner,
    /// What it carries.
    pub shape: Shape,
    /// The operation's place among those that are measured.
    pub call: Option<usize>,
    /// When it was opened.
    pub opened_ms: u64,
    /// Whether the guest has agreed.
    pub is_agreed: bool,
    /// What the guest may send.
    pub may_receive: u32,
    /// What the owner granted and the guest was not told yet.
    pub owed: u32,
    /// What the client may send.
    pub may_send: u32,
}

/// What to do with a frame that was in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Hand it on.
    Pass,
    /// Hand it on; it was the last.
    PassLast,
    /// Drop it.
    Drop,
}

/// The channel's state.
pub struct Guest {
    /// What waits to be sent.
    pub queue: Queue,
    /// What came.
    pub decoder: Decoder,
    /// Its first word.
    pub hello: Option<Value>,
    /// Whether it answers.
    pub heartbeat: Heartbeat,
    /// The streams but the main command's.
    pub streams: BTreeMap<u32, Stream>,
    next_stream: u32,
    /// The highest number of a stream that was given up before the guest had ended it.
    forgotten: u32,
}

impl Guest {
    /// A channel on which nothing was said.
    pub fn new(patience_ms: u64) -> Self {
        Self {
            queue: Queue::default(),
            decoder: Decoder::default(),
            hello: None,
            heartbeat: Heartbeat::new(patience_ms),
            streams: BTreeMap::new(),
            next_stream: MAIN_STREAM + 1,
            forgotten: 0,
        }
    }

    /// Open a stream with a request; None if too many are open.
    pub fn open(&mut self, owner: Owner, shape: Shape, request: &[u8], now_ms: u64) -> Option<u32> {
        if self.streams.len() >= STREAMS_MAX {
            // A guest has at most 64 commands: of so many streams that were left the first is one it has forgotten, or soon will.
            let forgotten = self.streams.iter().find(|(_, stream)| stream.owner == Owner::Nobody).map(|(number, _)| *number)?;
            self.streams.remove(&forgotten);
            self.forgotten = self.forgotten.max(forgotten);
        }
        let number = self.next_stream;
        self.next_stream = self.next_stream.checked_add(1)?;
        let (may_receive, may_send) = (WINDOW_BYTES, WINDOW_BYTES);
        let stream = Stream { owner, shape, call: None, opened_ms: now_ms, is_agreed: false, may_receive, owed: 0, may_send };
        self.streams.insert(number, stream);
        self.queue.push_bytes(Kind::Request, number, request);
        Some(number)
    }

    /// Whether what waits for the guest leaves no room for what clients send.
    pub fn is_busy(&self) -> bool {
        self.queue.n_bytes() > WINDOW_BYTES as usize
    }

    /// The owner has left: the guest is told, unless all that can come is an answer.
    pub fn leave(&mut self, number: u32) {
        if let Some(stream) = self.streams.get_mut(&number) {
            stream.owner = Owner::Nobody;
            if stream.shape != Shape::Call {
                self.queue.push_bytes(Kind::Close, number, b"");
            }
        }
    }

    /// The owner granted more; the guest is told as far as its window has room.
    pub fn grant(&mut self, number: u32, n_bytes: u32, n_waiting: usize) {
        if let Some(stream) = self.streams.get_mut(&number) {
            stream.owed = stream.owed.saturating_add(n_bytes);
            let waiting = u32::try_from(n_waiting).unwrap_or(u32::MAX);
            let room = WINDOW_BYTES.saturating_sub(stream.may_receive).saturating_sub(waiting);
            let granted = stream.owed.min(room);
            if granted > 0 {
                stream.owed -= granted;
                stream.may_receive += granted;
                self.queue.push_credit(number, granted);
            }
        }
    }

    /// Check a frame of a stream but the main command's.
    pub fn check(&mut self, kind: Kind, number: u32, payload: &[u8]) -> Result<Verdict, Broken> {
        let Some(stream) = self.streams.get_mut(&number) else {
            let is_late = number < self.next_stream && matches!(kind, Kind::Credit | Kind::Close);
            return if is_late || number <= self.forgotten {
                Ok(Verdict::Drop)
            } else {
                Err(Broken("a frame of a stream that nobody opened"))
            };
        };
        let verdict = stream.check(kind, payload)?;
        Ok(if stream.owner == Owner::Nobody && verdict == Verdict::Pass { Verdict::Drop } else { verdict })
    }
}

impl Stream {
    fn check(&mut self, kind: Kind, payload: &[u8]) -> Result<Verdict, Broken> {
        match (kind, self.shape) {
            (Kind::Response, _) => self.check_response(payload),
            (Kind::Stdout | Kind::Stderr, Shape::Command) | (Kind::Data, Shape::Archive) if self.is_agreed => {
                self.may_receive = take(self.may_receive, payload.len())?;
                Ok(Verdict::Pass)
            }
            (Kind::Exit, Shape::Command) if self.is_agreed => match super::verdict::Exit::parse(payload) {
                Some(_) => Ok(Verdict::PassLast),
                None => Err(Broken("an exit that makes no sense")),
            },
            (Kind::DataEnd, Shape::Archive) if self.is_agreed && payload.is_empty() => Ok(Verdict::PassLast),
            (Kind::Credit, _) => {
                self.may_send = self.may_send.saturating_add(number_of(payload)?);
                Ok(Verdict::Pass)
            }
            (Kind::Close, Shape::Archive) if self.is_agreed => Ok(Verdict::PassLast),
            (Kind::Close, _) => Ok(Verdict::Pass),
            _ => Err(Broken("a frame that its stream does not have")),
        }
    }

    fn check_response(&mut self, payload: &[u8]) -> Result<Verdict, Broken> {
        let is_agreed = is_agreement(payload)?;
        match self.shape {
            Shape::Command | Shape::Archive if is_agreed && self.is_agreed => Err(Broken("a second response")),
            Shape::Command if self.is_agreed => Err(Broken("a second response")),
            Shape::Command | Shape::Archive if is_agreed => {
                self.is_agreed = true;
                Ok(Verdict::Pass)
            }
            _ => Ok(Verdict::PassLast),
        }
    }
}

/// Take bytes off a credit.
pub fn take(credit: u32, n_bytes: usize) -> Result<u32, Broken> {
    u32::try_from(n_bytes).ok().and_then(|n_bytes| credit.checked_sub(n_bytes)).ok_or(Broken("more bytes than were granted"))
}

/// The number in a CREDIT.
pub fn number_of(payload: &[u8]) -> Result<u32, Broken> {
    payload.try_into().map(u32::from_le_bytes).map_err(|_| Broken("a credit of impossible length"))
}

/// Whether a response says yes.
pub fn is_agreement(payload: &[u8]) -> Result<bool, Broken> {
    const NONSENSE: Broken = Broken("a response that makes no sense");
    let value: Value = serde_json::from_slice(payload).map_err(|_| NONSENSE)?;
    match (value.get("ok"), value.get("error")) {
        (Some(Value::Object(_)), None) => Ok(true),
        (None, Some(Value::Object(error))) if ["code", "message"].iter().all(|key| error.get(*key).is_some_and(Value::is_string)) => {
            Ok(false)
        }
        _ => Err(NONSENSE),
    }
}

#[cfg(test)]
mod tests {
    use super::{Guest, Owner, Shape, Verdict};
    use crate::protocol::{Broken, Kind, WINDOW_BYTES};

    const OK: &[u8] = br#"{"ok":{}}"#;
    const NO: &[u8] = br#"{"error":{"code":"failed","message":"m"}}"#;
    const EXIT: &[u8] = br#"{"code":0,"signal":null,"out_of_memory":false}"#;

    fn opened(operation: &str) -> (Guest, u32) {
        let mut guest = Guest::new(30_000);
        let number = guest.open(Owner::Client(1, 1), Shape::of(operation), b"{}", 0).expect("there is room");
        (guest, number)
    }

    #[test]
    fn each_operation_has_its_frames_and_no_others() {
        for (operation, legal) in [
            ("sync", vec![(Kind::Response, OK)]),
            ("sync", vec![(Kind::Response, NO)]),
            ("exec", vec![(Kind::Response, NO)]),
            ("exec", vec![(Kind::Response, OK), (Kind::Stdout, b"x"), (Kind::Close, b""), (Kind::Stderr, b"x"), (Kind::Exit, EXIT)]),
            ("archive", vec![(Kind::Response, OK), (Kind::Data, b"x"), (Kind::DataEnd, b"")]),
            ("archive", vec![(Kind::Response, OK), (Kind::Data, b"x"), (Kind::Response, NO)]),
            ("archive", vec![(Kind::Response, OK), (Kind::Close, b"")]),
            ("extract", vec![(Kind::Credit, &[1, 0, 0, 0]), (Kind::Close, b""), (Kind::Response, NO)]),
        ] {
            let (mut guest, number) = opened(operation);
            for (index, (kind, payload)) in legal.iter().enumerate() {
                let expected = if index + 1 == legal.len() { Verdict::PassLast } else { Verdict::Pass };
                assert_eq!(guest.check(*kind, number, payload), Ok(expected), "{operation} {kind:?}");
            }
        }
        for (operation, illegal) in [
            ("sync", vec![(Kind::Stdout, &b"x"[..])]),
            ("sync", vec![(Kind::Response, b"{}")]),
            ("sync", vec![(Kind::Response, br#"{"error":{}}"#)]),
            ("exec", vec![(Kind::Stdout, b"x")]),
            ("exec", vec![(Kind::Response, OK), (Kind::Response, OK)]),
            ("exec", vec![(Kind::Response, OK), (Kind::Response, NO)]),
            ("exec", vec![(Kind::Response, OK), (Kind::Exit, b"{}")]),
            ("exec", vec![(Kind::Response, OK), (Kind::Data, b"x")]),
            ("exec", vec![(Kind::Hello, b"{}")]),
            ("archive", vec![(Kind::Response, OK), (Kind::Stdout, b"x")]),
            ("extract", vec![(Kind::Credit, b"xyz")]),
        ] {
            let (mut guest, number) = opened(operation);
            let outcomes: Vec<_> = illegal.iter().map(|(kind, payload)| guest.check(*kind, number, payload)).collect();
            assert!(outcomes.last().expect("there is one").is_err(), "{operation} {illegal:?}");
        }
    }

    #[test]
    fn credit_is_kept_and_passed_on_as_far_as_the_window_goes() {
        let (mut guest, number) = opened("exec");
        guest.check(Kind::Response, number, OK).expect("it is in order");
        let piece = vec![0; 65_536];
        for _ in 0..4 {
            assert_eq!(guest.check(Kind::Stdout, number, &piece), Ok(Verdict::Pass));
        }
        guest.grant(number, 100, 0);
        assert_eq!(guest.check(Kind::Stdout, number, &piece[..100]), Ok(Verdict::Pass));
        assert_eq!(guest.check(Kind::Stdout, number, b"x"), Err(Broken("more bytes than were granted")));
        guest.grant(number, u32::MAX, 1000);
        assert_eq!(guest.streams[&number].may_receive, WINDOW_BYTES - 1000);
        guest.grant(number, 0, 0);
        assert_eq!(guest.streams[&number].may_receive, WINDOW_BYTES);
    }

    #[test]
    fn a_stream_that_was_left_is_heard_no_more_but_still_checked() {
        let (mut guest, number) = opened("exec");
        guest.leave(number);
        assert_eq!(guest.check(Kind::Response, number, OK), Ok(Verdict::Drop));
        assert_eq!(guest.check(Kind::Stdout, number, b"x"), Ok(Verdict::Drop));
        assert_eq!(guest.check(Kind::Exit, number, EXIT), Ok(Verdict::PassLast));
        guest.streams.remove(&number);
        assert_eq!(guest.check(Kind::Credit, number, &[1, 0, 0, 0]), Ok(Verdict::Drop));
        assert!(guest.check(Kind::Stdout, number, b"x").is_err());
        assert!(guest.check(Kind::Close, number + 1, b"").is_err());
    }

    #[test]
    fn streams_are_bounded() {
        let mut guest = Guest::new(30_000);
        let n_opened = (0..1000).filter_map(|_| guest.open(Owner::Client(1, 1), Shape::Call, b"{}", 0)).count();
        assert_eq!(n_opened, super::STREAMS_MAX);
        guest.leave(100);
        assert!(guest.open(Owner::Metrics, Shape::Call, b"{}", 0).is_some());
        assert!(!guest.streams.contains_key(&100));
        assert_eq!(guest.check(Kind::Response, 100, OK), Ok(Verdict::Drop));
        assert!(guest.check(Kind::Response, 1000, OK).is_err());
        assert!(guest.open(Owner::Metrics, Shape::Call, b"{}", 0).is_none());
    }
}
