//! One source of output, many listeners: the main command's, and the console's.
//!
//! Rules: every listener has its own credit. What exceeds it waits as a reference to the one copy that all share; while anybody lags the
//! source is not granted more, so that at most its window waits. Who takes less than a quarter of a window in two seconds while it lags
//! is dropped. Nothing that came is kept from the log: that is written before anybody is told.

use std::collections::VecDeque;
use std::rc::Rc;

use crate::protocol::{Kind, WINDOW_BYTES};
use crate::shim::clients::{ClientId, Clients};

/// How long a listener may lag without taking `PROGRESS_BYTES`.
pub const GRACE_MS: u64 = 2000;
/// What a listener that lags must take in that time.
const PROGRESS_BYTES: usize = WINDOW_BYTES as usize / 4;
/// What may wait for one listener: the source's window, twice for the frames that were under way.
const WAITING_BYTES_MAX: usize = 2 * WINDOW_BYTES as usize;
/// What is encoded for one client at most, whatever credit it claims to give.
const QUEUED_BYTES_MAX: usize = 2 * WINDOW_BYTES as usize;

struct Waiting {
    kind: Kind,
    body: Rc<[u8]>,
    start: usize,
}

struct Listener {
    client: ClientId,
    stream: u32,
    credit: usize,
    waiting: VecDeque<Waiting>,
    n_waiting: usize,
    lags_since_ms: Option<u64>,
    n_taken: usize,
}

/// What became of a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Listens,
    HeardAll,
    TooSlow,
}

/// The listeners of one source.
#[derive(Default)]
pub struct Feed {
    listeners: Vec<Listener>,
}

impl Feed {
    /// Whether anybody listens.
    pub fn is_empty(&self) -> bool {
        self.listeners.is_empty()
    }

    /// Add a listener; its client has that stream already.
    pub fn add(&mut self, client: ClientId, stream: u32) {
        let credit = WINDOW_BYTES as usize;
        let listener = Listener { client, stream, credit, waiting: VecDeque::new(), n_waiting: 0, lags_since_ms: None, n_taken: 0 };
        self.listeners.push(listener);
    }

    /// Forget a listener.
    pub fn remove(&mut self, client: ClientId, stream: u32) {
        self.listeners.retain(|listener| (listener.client, listener.stream) != (client, stream));
    }

    /// Tell everybody; `Kind::Exit` is the last that they hear.
    pub fn publish(&mut self, kind: Kind, data: &[u8], clients: &mut Clients, now_ms: u64) {
        if self.listeners.is_empty() {
            return;
        }
        let body: Rc<[u8]> = data.into();
        for listener in &mut self.listeners {
            listener.waiting.push_back(Waiting { kind, body: Rc::clone(&body), start: 0 });
            listener.n_waiting += body.len();
        }
        self.settle(|_| true, clients, now_ms);
    }

    /// Tell one listener alone.
    pub fn tell(&mut self, client: ClientId, stream: u32, data: &[u8], clients: &mut Clients, now_ms: u64) {
        for listener in self.listeners.iter_mut().filter(|listener| (listener.client, listener.stream) == (client, stream)) {
            for piece in data.chunks(crate::protocol::PAYLOAD_BYTES_MAX) {
                listener.waiting.push_back(Waiting { kind: Kind::Stdout, body: piece.into(), start: 0 });
                listener.n_waiting += piece.len();
            }
        }
        self.settle(|listener| listener.client == client, clients, now_ms);
    }

    /// A listener grants more.
    pub fn grant(&mut self, client: ClientId, stream: u32, n_bytes: u32, clients: &mut Clients, now_ms: u64) {
        for listener in self.listeners.iter_mut().filter(|listener| (listener.client, listener.stream) == (client, stream)) {
            listener.credit = listener.credit.saturating_add(n_bytes as usize);
        }
        self.settle(|listener| listener.client == client, clients, now_ms);
    }

    /// A client's queue has room again.
    pub fn go_on(&mut self, client: ClientId, clients: &mut Clients, now_ms: u64) {
        self.settle(|listener| listener.client == client, clients, now_ms);
    }

    /// Whether the source is to be held back.
    pub fn is_lagging(&self) -> bool {
        self.listeners.iter().any(|listener| listener.lags_since_ms.is_some())
    }

    /// When somebody is to be dropped next.
    pub fn next_ms(&self) -> Option<u64> {
        self.listeners.iter().filter_map(|listener| listener.lags_since_ms).min().map(|since| since + GRACE_MS)
    }

    /// Drop who has lagged for too long.
    pub fn tick(&mut self, clients: &mut Clients, now_ms: u64) {
        if self.next_ms().is_some_and(|due| due <= now_ms) {
            self.settle(|_| true, clients, now_ms);
        }
    }

    fn settle(&mut self, wanted: impl Fn(&Listener) -> bool, clients: &mut Clients, now_ms: u64) {
        self.listeners.retain_mut(|listener| {
            if !wanted(listener) {
                return true;
            }
            let Some(client) = clients.get_mut(&listener.client) else { return false };
            let fate = listener.settle(&mut client.queue, now_ms);
            if fate == Fate::TooSlow {
                client.queue.push_bytes(Kind::Close, listener.stream, b"");
            }
            if fate != Fate::Listens {
                client.streams.remove(&listener.stream);
            }
            fate == Fate::Listens
        });
    }
}

impl Listener {
    fn settle(&mut self, queue: &mut crate::shim::queue::Queue, now_ms: u64) -> Fate {
        while let Some(first) = self.waiting.front_mut() {
            if first.kind == Kind::Exit {
                queue.push(Kind::Exit, self.stream, &first.body, 0..first.body.len());
                return Fate::HeardAll;
            }
            let room = self.credit.min(QUEUED_BYTES_MAX.saturating_sub(queue.n_bytes()));
            let n_bytes = room.min(first.body.len() - first.start);
            if n_bytes == 0 {
                break;
            }
            queue.push(first.kind, self.stream, &first.body, first.start..first.start + n_bytes);
            first.start += n_bytes;
            self.credit -= n_bytes;
            self.n_waiting -= n_bytes;
            self.n_taken += n_bytes;
            if first.start == first.body.len() {
                self.waiting.pop_front();
            }
        }
        self.judge(now_ms)
    }

    fn judge(&mut self, now_ms: u64) -> Fate {
        match self.lags_since_ms {
            _ if self.waiting.is_empty() => self.lags_since_ms = None,
            _ if self.n_waiting > WAITING_BYTES_MAX => return Fate::TooSlow,
            Some(_) if self.n_taken >= PROGRESS_BYTES => (self.lags_since_ms, self.n_taken) = (Some(now_ms), 0),
            Some(since) if now_ms >= since + GRACE_MS => return Fate::TooSlow,
            Some(_) => {}
            None => (self.lags_since_ms, self.n_taken) = (Some(now_ms), 0),
        }
        Fate::Listens
    }
}

#[cfg(test)]
mod tests {
    use super::{Feed, GRACE_MS};
    use crate::protocol::{Decoder, Kind, WINDOW_BYTES};
    use crate::shim::clients::{Client, Clients};

    fn frames(clients: &mut Clients, id: u32) -> Vec<(Kind, usize)> {
        let mut decoder = Decoder::default();
        let queue = &mut clients.get_mut(&id).expect("it is there").queue;
        decoder.feed(&queue.to_bytes());
        queue.clear();
        std::iter::from_fn(|| decoder.next_frame().expect("they are frames")).map(|frame| (frame.kind, frame.payload.len())).collect()
    }

    #[test]
    fn a_slow_listener_holds_the_source_back_and_is_dropped_after_its_grace() {
        let mut clients = Clients::from([(1, Client::default()), (2, Client::default())]);
        let mut feed = Feed::default();
        feed.add(1, 5);
        feed.add(2, 6);
        for _ in 0..5 {
            feed.publish(Kind::Stdout, &vec![0; 60_000], &mut clients, 10);
            feed.grant(2, 6, 60_000, &mut clients, 10);
        }
        assert_eq!(frames(&mut clients, 1).iter().map(|frame| frame.1).sum::<usize>(), WINDOW_BYTES as usize);
        assert_eq!(frames(&mut clients, 2).len(), 5);
        assert!(feed.is_lagging());
        assert_eq!(feed.next_ms(), Some(10 + GRACE_MS));
        feed.tick(&mut clients, 9 + GRACE_MS);
        assert!(feed.is_lagging());
        feed.tick(&mut clients, 10 + GRACE_MS);
        assert!(!feed.is_lagging());
        assert_eq!(frames(&mut clients, 1), [(Kind::Close, 0)]);
        assert!(frames(&mut clients, 2).is_empty());
    }

    #[test]
    fn the_end_comes_after_the_output() {
        let mut clients = Clients::from([(1, Client::default())]);
        let mut feed = Feed::default();
        feed.add(1, 5);
        feed.publish(Kind::Stdout, &vec![0; WINDOW_BYTES as usize / 4], &mut clients, 0);
        for _ in 0..4 {
            feed.publish(Kind::Stderr, &vec![0; WINDOW_BYTES as usize / 4], &mut clients, 0);
        }
        feed.publish(Kind::Exit, b"{}", &mut clients, 0);
        assert!(frames(&mut clients, 1).iter().all(|frame| frame.0 != Kind::Exit));
        feed.grant(1, 5, WINDOW_BYTES, &mut clients, 0);
        assert_eq!(frames(&mut clients, 1), [(Kind::Stderr, WINDOW_BYTES as usize / 4), (Kind::Exit, 2)]);
        assert!(feed.is_empty());
    }

    #[test]
    fn boundless_credit_is_not_boundless_memory() {
        let mut clients = Clients::from([(1, Client::default())]);
        let mut feed = Feed::default();
        feed.add(1, 5);
        feed.grant(1, 5, u32::MAX, &mut clients, 0);
        feed.grant(1, 5, u32::MAX, &mut clients, 0);
        for _ in 0..40 {
            feed.publish(Kind::Stdout, &vec![0; 65_536], &mut clients, 0);
        }
        assert!(clients[&1].queue.n_bytes() <= 3 * WINDOW_BYTES as usize);
        assert!(feed.is_empty());
    }
}
