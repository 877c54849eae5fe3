//! What clients ask of the shim. What it does not do itself goes to the guest, on a stream of another number.
//!
//! Rules: a client that breaks the protocol loses its connection, and harms nobody else. A frame of a stream that is not open is dropped: its
//! end may have crossed it.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::protocol::{Broken, Frame, Kind, MAIN_STREAM, WINDOW_BYTES};
use crate::shim::calls::Calls;
use crate::shim::clients::{ClientId, Local, STREAMS_MAX};
use crate::shim::config::{Console, milliseconds};
use crate::shim::guest::{Owner, Shape, number_of, take};
use crate::shim::hub::{Hub, seconds};
use crate::shim::verdict::{Cause, MainState};

/// A request, as far as the shim looks at it.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Request {
    op: String,
    stdin: bool,
    signal: Option<i64>,
    tail: Option<u64>,
    write: bool,
    paused: bool,
    timeout_s: Option<f64>,
}

/// An error's code and message.
type Refusal = (&'static str, String);

impl Hub {
    /// Take a frame of a client. An error ends its connection.
    pub fn on_client_frame(&mut self, id: ClientId, frame: Frame) -> Result<(), Broken> {
        let Some(client) = self.clients.get_mut(&id) else { return Ok(()) };
        let Frame { kind, stream, payload } = frame;
        match (kind, client.streams.get(&stream).copied()) {
            (Kind::Ping, _) if stream == 0 && payload.len() == 8 => {
                client.queue.push_bytes(Kind::Pong, 0, &payload);
                Ok(())
            }
            (Kind::Hello | Kind::Pong, _) if stream == 0 => Ok(()),
            (_, _) if stream == 0 => Err(Broken("a frame that the channel itself does not have")),
            (Kind::Request, None) if client.streams.len() < STREAMS_MAX => self.on_request(id, stream, &payload),
            (Kind::Request, None) => {
                self.refuse(id, stream, &("busy", format!("more than {STREAMS_MAX} streams")));
                Ok(())
            }
            (Kind::Request, Some(_)) => Err(Broken("a stream that is open was opened again")),
            (Kind::Hello | Kind::Response | Kind::Stdout | Kind::Stderr | Kind::Exit | Kind::Event, _) => {
                Err(Broken("a frame that clients do not send"))
            }
            (_, None | Some(Local::Start | Local::Watch | Local::Ready)) if kind != Kind::Close => Ok(()),
            (Kind::Close, Some(local)) => {
                client.streams.remove(&stream);
                self.leave(id, stream, local);
                Ok(())
            }
            (kind, Some(Local::Guest(number))) => self.pass_on(id, number, kind, &payload),
            (kind, Some(Local::Attach(window))) => self.on_attach_frame((id, stream), window, kind, payload),
            (kind, Some(Local::Console(window))) => self.on_console_frame((id, stream), window, kind, payload),
            _ => Ok(()),
        }
    }

    fn on_request(&mut self, id: ClientId, stream: u32, payload: &[u8]) -> Result<(), Broken> {
        // A list would be taken for the fields in their order.
        let is_object = payload.trim_ascii_start().starts_with(b"{");
        let request: Request = serde_json::from_slice(payload).ok().filter(|_| is_object).ok_or(Broken("a request that makes no sense"))?;
        let outcome = match request.op.as_str() {
            "ready" => self.ready(id, stream),
            "start" => self.start(id, stream, payload),
            "attach" => self.attach(id, stream, request.stdin),
            "signal" => self.signal(request.signal).map(Some),
            "console" => self.open_console(id, stream, &request),
            "status" => Ok(Some(self.status())),
            "hold" => {
                self.guest.heartbeat.hold(request.paused, self.now_ms);
                Ok(Some(json!({})))
            }
            "stop" => {
                let timeout_ms = request.timeout_s.map_or_else(|| milliseconds(self.config.stop_timeout_s), milliseconds);
                self.end_for(Cause::Stopped, timeout_ms);
                Ok(Some(json!({})))
            }
            "watch" => self.open_stream(id, stream, Local::Watch),
            operation => self.forward(id, stream, operation, payload),
        };
        match outcome {
            Ok(Some(ok)) => self.answer(id, stream, &json!({"ok": ok})),
            Ok(None) => {}
            Err(refusal) => self.refuse(id, stream, &refusal),
        }
        Ok(())
    }

    fn answer(&mut self, id: ClientId, stream: u32, response: &Value) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.queue.push_json(Kind::Response, stream, response);
        }
    }

    fn refuse(&mut self, id: ClientId, stream: u32, (code, message): &Refusal) {
        self.answer(id, stream, &json!({"error": {"code": code, "message": message}}));
    }

    /// Open a stream whose response comes at once.
    fn open_stream(&mut self, id: ClientId, stream: u32, local: Local) -> Result<Option<Value>, Refusal> {
        self.check_alive()?;
        self.set_stream(id, stream, local);
        self.answer(id, stream, &json!({"ok": {}}));
        Ok(None)
    }

    fn set_stream(&mut self, id: ClientId, stream: u32, local: Local) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.streams.insert(stream, local);
        }
    }

    fn check_alive(&self) -> Result<(), Refusal> {
        match &self.life.end {
            Some(end) => Err(("failed", format!("the machine has ended: {}", end.why))),
            None => Ok(()),
        }
    }

    fn check_agent(&self) -> Result<(), Refusal> {
        self.check_alive()?;
        if !self.config.has_agent() {
            return Err(("unsupported", "the machine has no agent".into()));
        }
        if self.guest.hello.is_none() {
            return Err(("busy", "the guest's agent has not answered yet".into()));
        }
        Ok(())
    }

    fn ready(&mut self, id: ClientId, stream: u32) -> Result<Option<Value>, Refusal> {
        self.check_alive()?;
        if !self.config.has_agent() {
            return Ok(Some(json!({})));
        }
        if let Some(hello) = &self.guest.hello {
            return Ok(Some(hello.clone()));
        }
        self.set_stream(id, stream, Local::Ready);
        Ok(None)
    }

    fn start(&mut self, id: ClientId, stream: u32, payload: &[u8]) -> Result<Option<Value>, Refusal> {
        self.check_agent()?;
        if self.main.state != MainState::None || self.main.asked.is_some() {
            return Err(("busy", "the main command was started already".into()));
        }
        self.main.asked = Some((id, stream));
        self.set_stream(id, stream, Local::Start);
        self.guest.queue.push_bytes(Kind::Request, MAIN_STREAM, payload);
        Ok(None)
    }

    fn attach(&mut self, id: ClientId, stream: u32, stdin: bool) -> Result<Option<Value>, Refusal> {
        let exit = self.main.exit.clone();
        if exit.is_none() {
            self.check_alive()?;
        }
        self.set_stream(id, stream, Local::Attach(stdin.then_some(WINDOW_BYTES)));
        self.answer(id, stream, &json!({"ok": {}}));
        if let (Some(exit), Some(client)) = (exit, self.clients.get_mut(&id)) {
            client.streams.remove(&stream);
            client.queue.push_json(Kind::Exit, stream, &json!(exit)); // who comes late hears the end alone
        } else {
            self.output.add(id, stream);
        }
        Ok(None)
    }

    fn signal(&mut self, signal: Option<i64>) -> Result<Value, Refusal> {
        let Some(number) = signal.and_then(|number| u8::try_from(number).ok()).filter(|number| (1..=64).contains(number)) else {
            return Err(("invalid", "a signal is a number from 1 to 64".into()));
        };
        self.check_agent()?;
        if self.main.state != MainState::Running {
            return Err(("failed", "the main command does not run".into()));
        }
        self.guest.queue.push_bytes(Kind::Signal, MAIN_STREAM, &[number]);
        Ok(json!({}))
    }

    fn open_console(&mut self, id: ClientId, stream: u32, request: &Request) -> Result<Option<Value>, Refusal> {
        let window = request.write.then_some(WINDOW_BYTES);
        self.open_stream(id, stream, Local::Console(window))?;
        self.console.add(id, stream);
        let n_bytes = request.tail.unwrap_or(0).min(u64::from(WINDOW_BYTES));
        let tail = self.console_tail(usize::try_from(n_bytes).unwrap_or(0));
        self.console.tell(id, stream, &tail, &mut self.clients, self.now_ms);
        Ok(None)
    }

    fn status(&self) -> Value {
        let state = match self.main.state {
            MainState::None => "none",
            MainState::Running => "running",
            MainState::Exited => "exited",
        };
        json!({
            "vmm_pid": self.vmm_pid,
            "agent": self.guest.hello,
            "main": state,
            "exit": self.main.exit,
            "silent_s": seconds(self.guest.heartbeat.silent_ms(self.now_ms)),
            "paused": self.guest.heartbeat.is_held(),
        })
    }

    fn forward(&mut self, id: ClientId, stream: u32, operation: &str, payload: &[u8]) -> Result<Option<Value>, Refusal> {
        self.check_agent()?;
        let Some(number) = self.guest.open(Owner::Client(id, stream), Shape::of(operation), payload, self.now_ms) else {
            return Err(("busy", "too many streams are open on this machine".into()));
        };
        if let Some(opened) = self.guest.streams.get_mut(&number) {
            opened.call = Calls::index(operation);
        }
        self.set_stream(id, stream, Local::Guest(number));
        Ok(None)
    }

    fn pass_on(&mut self, id: ClientId, number: u32, kind: Kind, payload: &[u8]) -> Result<(), Broken> {
        if kind == Kind::Credit {
            let n_waiting = self.clients.get(&id).map_or(0, |client| client.queue.n_bytes());
            self.guest.grant(number, number_of(payload)?, n_waiting);
            return Ok(());
        }
        let Some(stream) = self.guest.streams.get_mut(&number) else { return Ok(()) };
        match (kind, stream.shape) {
            (Kind::Stdin, Shape::Command) | (Kind::Data, Shape::Extract) => stream.may_send = take(stream.may_send, payload.len())?,
            (Kind::StdinEnd, Shape::Command) | (Kind::DataEnd, Shape::Extract) if payload.is_empty() => {}
            (Kind::Resize, Shape::Command) if payload.len() == 4 => {}
            (Kind::Signal, Shape::Command) if payload.len() == 1 => {}
            _ => return Err(Broken("a frame that its stream does not have")),
        }
        self.guest.queue.push_bytes(kind, number, payload);
        Ok(())
    }

    fn on_attach_frame(&mut self, from: (ClientId, u32), window: Option<u32>, kind: Kind, payload: Vec<u8>) -> Result<(), Broken> {
        let has_agent = self.config.has_agent();
        match kind {
            Kind::Credit => self.output.grant(from.0, from.1, number_of(&payload)?, &mut self.clients, self.now_ms),
            Kind::Stdin | Kind::StdinEnd if window.is_none() => {} // it said that it would send none
            Kind::Stdin => {
                self.set_stream(from.0, from.1, Local::Attach(Some(take(window.unwrap_or(0), payload.len())?)));
                self.push_input(has_agent, from, payload);
            }
            Kind::StdinEnd if has_agent => {
                self.main.input.end();
                self.feed_main();
            }
            Kind::StdinEnd => {
                if self.config.console == Console::Stdio {
                    self.console_input.end();
                }
            }
            Kind::Resize if payload.len() == 4 => self.tell_main(Kind::Resize, &payload),
            Kind::Signal if payload.len() == 1 => self.tell_main(Kind::Signal, &payload),
            _ => return Err(Broken("a frame that its stream does not have")),
        }
        Ok(())
    }

    fn on_console_frame(&mut self, from: (ClientId, u32), window: Option<u32>, kind: Kind, payload: Vec<u8>) -> Result<(), Broken> {
        match kind {
            Kind::Credit => self.console.grant(from.0, from.1, number_of(&payload)?, &mut self.clients, self.now_ms),
            Kind::Stdin if window.is_none() => {}
            Kind::Stdin => {
                self.set_stream(from.0, from.1, Local::Console(Some(take(window.unwrap_or(0), payload.len())?)));
                self.push_input(false, from, payload);
            }
            Kind::StdinEnd | Kind::Resize => {} // a console has neither an end nor a size
            _ => return Err(Broken("a frame that its stream does not have")),
        }
        Ok(())
    }

    fn push_input(&mut self, is_main: bool, from: (ClientId, u32), payload: Vec<u8>) {
        if is_main {
            self.main.input.push(from.0, from.1, payload);
            self.feed_main();
        } else {
            self.console_input.push(from.0, from.1, payload);
        }
    }

    fn tell_main(&mut self, kind: Kind, payload: &[u8]) {
        if self.main.state == MainState::Running && self.guest.hello.is_some() {
            self.guest.queue.push_bytes(kind, MAIN_STREAM, payload);
        }
    }
}
