//! Hub: all that the shim knows about one machine, and what follows from each thing that happens. No descriptor is touched here but those of
//! the logs: bytes come in as frames, leave in queues, and what is to be done to the machine's process is an `Order`.
//!
//! Rules:
//! - The log gets what the command wrote before any client, and waits for none.
//! - Whoever breaks the protocol loses its channel: a client its connection, the guest its machine.
//! - The first cause of an end is the one that is told.
//!
//! In `hear`: what comes from the machine. Not here: the requests of clients (`ops`), descriptors (`run`), the judgement at the end (`verdict`).

mod hear;

use serde_json::{Value, json};

use crate::protocol::{Kind, WINDOW_BYTES};
use crate::shim::calls::Calls;
use crate::shim::clients::{Client, ClientId, Clients, Local};
use crate::shim::config::{Config, milliseconds};
use crate::shim::feed::Feed;
use crate::shim::guest::{Guest, Owner, Shape};
use crate::shim::heartbeat::Beat;
use crate::shim::input::Input;
use crate::shim::panic::Scanner;
use crate::shim::sink::{ConsoleLog, Log};
use crate::shim::verdict::{Cause, End, Exit, MainState};

/// Granted to the main command at once, so that a line costs no frame of its own.
const CREDIT_STEP: u32 = WINDOW_BYTES / 4;
/// How long a guest that panicked may take to end by itself.
const PANIC_GRACE_MS: u64 = 5000;
/// Events that may wait for one client.
const EVENT_BYTES_MAX: usize = 256 << 10;
/// How long the answer to a question for metrics may take.
pub const METRICS_TIMEOUT_MS: u64 = 1000;
/// How long an answer is good.
pub const METRICS_AGE_MS: u64 = 1000;

/// What is to be done to the machine's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// SIGKILL.
    Kill,
    /// Run `stop_argv`, or SIGTERM where there is none.
    Ask,
}

/// The main command.
pub struct Main {
    /// Whether there is one.
    pub state: MainState,
    /// Who asked for its start and waits for the guest's word.
    pub asked: Option<(ClientId, u32)>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// What it may read.
    pub input: Input,
    is_input_end_sent: bool,
    may_send: u32,
    may_receive: u32,
    n_logged: u32,
}

/// A panic that the console told of.
struct Panic {
    text: String,
    due_ms: u64,
    question: u64,
    at_ms: u64,
}

/// How far the end has come.
#[derive(Default)]
pub struct Life {
    /// Why it is to end.
    pub cause: Option<Cause>,
    /// When it is killed.
    kill_ms: Option<u64>,
    /// When the agent must have spoken: for the first time, or again on a new channel.
    boot_ms: Option<u64>,
    has_answered: bool,
    panic: Option<Panic>,
    is_killed: bool,
    /// It has.
    pub end: Option<End>,
}

/// What the guest said about itself last.
#[derive(Default)]
pub struct Metrics {
    asked: Option<(u32, u64)>,
    asked_ms: Option<u64>,
    found: Option<(Value, u64)>,
    /// How often it was asked.
    pub n_asked: u64,
}

/// See the module.
pub struct Hub {
    /// What it was told.
    pub config: Config,
    /// The present, in milliseconds since some past moment. Set before anything is called.
    pub now_ms: u64,
    /// The machine's process.
    pub vmm_pid: i32,
    /// Who is connected.
    pub clients: Clients,
    /// The channel to the agent.
    pub guest: Guest,
    /// The main command.
    pub main: Main,
    /// Who hears it.
    pub output: Feed,
    /// Who hears the console.
    pub console: Feed,
    /// What the console may read.
    pub console_input: Input,
    /// How far the end has come.
    pub life: Life,
    /// How long the agent's answers took.
    pub calls: Calls,
    /// What the guest said about itself.
    pub metrics: Metrics,
    /// To be done.
    pub orders: Vec<Order>,
    /// The log of the main command.
    pub log: Log,
    console_log: ConsoleLog,
    scanner: Scanner,
}

impl Hub {
    /// A machine that was just started.
    pub fn new(config: Config, vmm_pid: i32, log: Log, console_log: ConsoleLog, now_ms: u64) -> Self {
        let has_agent = config.has_agent();
        let boot_ms = has_agent.then(|| now_ms + milliseconds(config.boot_timeout_s));
        let state = if has_agent { MainState::None } else { MainState::Running };
        let (may_send, may_receive) = (WINDOW_BYTES, WINDOW_BYTES);
        let input = Input::default();
        Self {
            guest: Guest::new(milliseconds(config.silent_timeout_s)),
            main: Main { state, asked: None, exit: None, input, is_input_end_sent: false, may_send, may_receive, n_logged: 0 },
            life: Life { boot_ms, ..Life::default() },
            clients: Clients::new(),
            output: Feed::default(),
            console: Feed::default(),
            console_input: Input::default(),
            calls: Calls::default(),
            metrics: Metrics::default(),
            orders: Vec::new(),
            scanner: Scanner::default(),
            config,
            now_ms,
            vmm_pid,
            log,
            console_log,
        }
    }

    // -- clients -------------------------------------------------------------------------------------------------------------------

    /// Somebody connected.
    pub fn add_client(&mut self, id: ClientId) {
        self.clients.insert(id, Client::default());
    }

    /// A connection ended; its commands run on.
    pub fn remove_client(&mut self, id: ClientId) {
        if let Some(client) = self.clients.remove(&id) {
            for (number, local) in client.streams {
                self.leave(id, number, local);
            }
        }
        self.grant_main();
    }

    /// Whether a client is read now: not while it sends to a guest that takes no more. A guest that is paused takes nothing, and who would
    /// let it go on must be heard: what it is sent meanwhile is bounded by its credit.
    pub fn reads_client(&self, id: ClientId) -> bool {
        let sends = |local: &Local| matches!(local, Local::Guest(_) | Local::Attach(Some(_)));
        !self.guest.is_busy()
            || self.guest.heartbeat.is_held()
            || !self.clients.get(&id).is_some_and(|client| client.streams.values().any(sends))
    }

    /// A client's queue has room again.
    pub fn on_client_drained(&mut self, id: ClientId) {
        self.output.go_on(id, &mut self.clients, self.now_ms);
        self.console.go_on(id, &mut self.clients, self.now_ms);
        let Some(client) = self.clients.get(&id) else { return };
        let n_waiting = client.queue.n_bytes();
        for local in client.streams.values() {
            if let Local::Guest(number) = local {
                self.guest.grant(*number, 0, n_waiting);
            }
        }
        self.grant_main();
    }

    /// Forget a client's stream.
    pub(super) fn leave(&mut self, id: ClientId, number: u32, local: Local) {
        match local {
            Local::Guest(theirs) => self.guest.leave(theirs),
            Local::Attach(_) => self.output.remove(id, number),
            Local::Console(_) => self.console.remove(id, number),
            Local::Start | Local::Watch | Local::Ready => {}
        }
    }

    fn fail_stream(&mut self, id: ClientId, local: u32, is_agreed: bool, why: &str) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.streams.remove(&local).is_none() {
            return;
        }
        if is_agreed {
            client.queue.push_bytes(Kind::Close, local, b"");
        } else {
            client.queue.push_json(Kind::Response, local, &json!({"error": {"code": "failed", "message": why}}));
        }
    }

    fn tell_event(&mut self, event: &Value) {
        for client in self.clients.values_mut() {
            let is_slow = client.queue.n_bytes() > EVENT_BYTES_MAX;
            let watching: Vec<u32> =
                client.streams.iter().filter(|(_, local)| **local == Local::Watch).map(|(number, _)| *number).collect();
            for number in watching {
                if is_slow {
                    client.streams.remove(&number);
                    client.queue.push_bytes(Kind::Close, number, b"");
                } else {
                    client.queue.push_json(Kind::Event, number, event);
                }
            }
        }
    }

    // -- metrics -------------------------------------------------------------------------------------------------------------------

    /// Ask the guest about itself, unless the last answer is fresh; return whether to wait.
    pub fn ask_metrics(&mut self) -> bool {
        let is_recent = self.metrics.asked_ms.is_some_and(|asked_ms| self.now_ms < asked_ms + METRICS_AGE_MS);
        if self.metrics.asked.is_none() && !is_recent && self.guest.hello.is_some() && !self.guest.heartbeat.is_held() {
            self.metrics.asked_ms = Some(self.now_ms);
            if let Some(number) = self.guest.open(Owner::Metrics, Shape::Call, br#"{"op":"metrics"}"#, self.now_ms) {
                self.guest.streams.get_mut(&number).expect("it was just opened").call = Calls::index("metrics");
                self.metrics.asked = Some((number, self.now_ms + METRICS_TIMEOUT_MS));
                self.metrics.n_asked += 1;
            }
        }
        self.is_awaiting_metrics()
    }

    /// Whether an answer may still come in time.
    pub fn is_awaiting_metrics(&self) -> bool {
        self.metrics.asked.is_some()
    }

    /// What the guest said last, if that is fresh.
    pub fn fresh_metrics(&self) -> Option<&Value> {
        let (found, at_ms) = self.metrics.found.as_ref()?;
        (self.now_ms <= at_ms + METRICS_AGE_MS + METRICS_TIMEOUT_MS && self.metrics.asked_ms <= Some(*at_ms)).then_some(found)
    }

    fn on_metrics(&mut self, number: u32, payload: &[u8]) {
        if self.metrics.asked.take_if(|(asked, _)| *asked == number).is_some() {
            let answer: Option<Value> = serde_json::from_slice(payload).ok();
            self.metrics.found = answer.and_then(|mut answer| answer.get_mut("ok").map(Value::take)).map(|found| (found, self.now_ms));
        }
    }

    // -- time and the end ----------------------------------------------------------------------------------------------------------

    /// Do what is due.
    pub fn tick(&mut self) {
        let now_ms = self.now_ms;
        while let Some(beat) = self.guest.heartbeat.tick(now_ms) {
            match beat {
                Beat::Ping(number) if !self.guest.is_busy() => self.guest.queue.push_bytes(Kind::Ping, 0, &number.to_le_bytes()),
                Beat::Ping(_) => {}
                Beat::Silent => {
                    let silent_ms = self.guest.heartbeat.silent_ms(now_ms);
                    self.tell_event(&json!({"event": "silent", "silent_s": seconds(silent_ms)}));
                }
                Beat::Dead => self.kill_for(Cause::Silent(milliseconds(self.config.silent_timeout_s))),
            }
        }
        if self.life.boot_ms.take_if(|due| *due <= now_ms).is_some() {
            self.kill_for(if self.life.has_answered {
                Cause::Silent(milliseconds(self.config.silent_timeout_s))
            } else {
                Cause::BootTimeout(milliseconds(self.config.boot_timeout_s))
            });
        }
        if self.life.panic.as_ref().is_some_and(|panic| panic.due_ms <= now_ms && self.config.has_agent()) {
            self.kill_for(Cause::Panic);
        }
        if self.life.kill_ms.take_if(|due| *due <= now_ms).is_some() {
            self.kill();
        }
        if self.metrics.asked.is_some_and(|(_, due)| due <= now_ms) {
            let number = self.metrics.asked.take().expect("it was there").0;
            self.guest.leave(number);
        }
        self.output.tick(&mut self.clients, now_ms);
        self.console.tick(&mut self.clients, now_ms);
        self.grant_main();
    }

    /// When something is due next.
    pub fn next_ms(&self) -> Option<u64> {
        let panic_ms = self.life.panic.as_ref().filter(|_| self.config.has_agent() && !self.life.is_killed).map(|panic| panic.due_ms);
        let asked_ms = self.metrics.asked.map(|(_, due)| due);
        let heartbeat_ms = self.guest.heartbeat.next_ms().filter(|_| !self.life.is_killed);
        let due = [heartbeat_ms, self.life.boot_ms, self.life.kill_ms, panic_ms, asked_ms, self.output.next_ms(), self.console.next_ms()];
        due.into_iter().flatten().min()
    }

    /// Let the machine end in order; it is killed when the time is over.
    pub fn end_for(&mut self, cause: Cause, timeout_ms: u64) {
        if self.life.end.is_some() {
            return;
        }
        let kill_ms = self.now_ms + timeout_ms;
        let is_first = self.life.cause.is_none();
        self.life.cause.get_or_insert(cause);
        self.life.kill_ms = Some(self.life.kill_ms.map_or(kill_ms, |earlier| earlier.min(kill_ms)));
        if !is_first {
            return;
        }
        if !self.config.has_agent() {
            self.orders.push(Order::Ask);
        } else if self.guest.hello.is_none() || self.guest.heartbeat.is_held() {
            self.kill(); // nobody is there to be asked
        } else if self.guest.open(Owner::Nobody, Shape::Call, br#"{"op":"poweroff"}"#, self.now_ms).is_none() {
            self.kill();
        }
    }

    /// The machine's process has ended: answer everybody.
    pub fn on_end(&mut self, end: End) {
        let why = format!("the machine has ended: {}", end.why);
        self.end_channel();
        self.life.boot_ms = None;
        self.life.kill_ms = None;
        self.life.panic = None;
        if self.main.state != MainState::Exited {
            self.output.publish(Kind::Exit, end.as_exit().to_string().as_bytes(), &mut self.clients, self.now_ms);
        }
        let ids: Vec<ClientId> = self.clients.keys().copied().collect();
        for id in ids {
            let streams: Vec<(u32, Local)> = self.clients[&id].streams.iter().map(|(number, local)| (*number, *local)).collect();
            for (number, local) in streams {
                match local {
                    Local::Ready | Local::Start => self.fail_stream(id, number, false, &why),
                    Local::Watch => self.fail_stream(id, number, true, &why),
                    Local::Guest(_) | Local::Attach(_) | Local::Console(_) => {}
                }
            }
        }
        self.life.end = Some(end);
    }

    /// Somebody wishes from outside that it ends.
    pub fn stop(&mut self) {
        self.end_for(Cause::Stopped, milliseconds(self.config.stop_timeout_s));
    }

    /// Whether everybody has heard all there is to hear.
    pub fn is_all_told(&self) -> bool {
        self.output.is_empty() && !self.console.is_lagging() && self.clients.values().all(|client| client.queue.is_empty())
    }

    /// The text of a panic, unless it is long past and the guest lived on.
    pub fn panic_text(&self) -> Option<&str> {
        let panic = self.life.panic.as_ref()?;
        (self.config.has_agent() || self.now_ms <= panic.at_ms + 2 * PANIC_GRACE_MS).then_some(panic.text.as_str())
    }

    fn kill_for(&mut self, cause: Cause) {
        self.life.cause.get_or_insert(cause);
        self.kill();
    }

    fn kill(&mut self) {
        if !self.life.is_killed && self.life.end.is_none() {
            self.life.is_killed = true;
            self.orders.push(Order::Kill);
        }
    }

    fn ping(&mut self) -> u64 {
        let number = self.guest.heartbeat.ask(self.now_ms);
        self.guest.queue.push_bytes(Kind::Ping, 0, &number.to_le_bytes());
        number
    }
}

/// For people.
pub fn seconds(milliseconds: u64) -> f64 {
    // A time of at most a few thousand years: the last digits of a larger one do not matter.
    #[allow(clippy::cast_precision_loss)]
    {
        milliseconds as f64 / 1000.0
    }
}

#[cfg(test)]
mod tests;
