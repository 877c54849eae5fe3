//! What comes from the machine: the frames of its agent, what its command wrote, what its console says.

use std::time::SystemTime;

use serde_json::{Value, json};

use super::{CREDIT_STEP, Hub, PANIC_GRACE_MS, Panic};
use crate::protocol::{Broken, Frame, Kind, MAIN_STREAM, VERSION, WINDOW_BYTES};
use crate::shim::clients::{ClientId, Local};
use crate::shim::config::{Console, milliseconds};
use crate::shim::guest::{Owner, Verdict, is_agreement, number_of, take};
use crate::shim::verdict::{Cause, Exit, MainState};

impl Hub {
    // -- the channel to the agent --------------------------------------------------------------------------------------------------

    /// The channel stands: say who we are. What was on an earlier one is over.
    pub fn begin_channel(&mut self) {
        self.end_channel();
        self.guest.queue.push_json(Kind::Hello, 0, &json!({"version": VERSION}));
    }

    /// The channel is gone; commands run on.
    pub fn end_channel(&mut self) {
        self.guest.queue.clear();
        self.guest.decoder = crate::protocol::Decoder::default();
        self.guest.heartbeat.end();
        if self.guest.hello.take().is_some() {
            self.life.boot_ms = Some(self.now_ms + milliseconds(self.config.silent_timeout_s));
        }
        let streams = std::mem::take(&mut self.guest.streams);
        for stream in streams.values() {
            if let Owner::Client(id, local) = stream.owner {
                self.fail_stream(id, local, stream.is_agreed, "the channel to the guest was lost");
            }
        }
        if let Some((id, local)) = self.main.asked.take() {
            self.main.state = MainState::Running; // it may have begun; the next hello says whether it has
            self.fail_stream(id, local, false, "the channel to the guest was lost");
        }
        self.metrics.asked = None;
        (self.main.may_send, self.main.may_receive, self.main.n_logged) = (WINDOW_BYTES, WINDOW_BYTES, 0);
    }

    /// Take a frame of the guest. An error breaks the channel.
    pub fn on_guest_frame(&mut self, frame: &Frame) -> Result<(), Broken> {
        let Frame { kind, stream, payload } = frame;
        if self.guest.hello.is_none() {
            // Before its first word everything is the rest of an earlier connection, of a machine that was restored.
            return if (*kind, *stream) == (Kind::Hello, 0) { self.on_hello(payload) } else { Ok(()) };
        }
        if self.guest.heartbeat.hear(self.now_ms) {
            self.tell_event(&json!({"event": "answers"}));
        }
        match (*kind, *stream) {
            (Kind::Pong, 0) => self.on_pong(payload),
            (Kind::Ping, 0) if payload.len() == 8 => {
                if !self.guest.is_busy() {
                    self.guest.queue.push_bytes(Kind::Pong, 0, payload);
                }
                Ok(())
            }
            (Kind::Event, 0) => self.on_guest_event(payload),
            (_, 0) => Err(Broken("a frame that the channel itself does not have")),
            (kind, MAIN_STREAM) => self.on_main_frame(kind, payload),
            (kind, number) => self.on_stream_frame(kind, number, payload),
        }
    }

    /// The guest broke the protocol, or its channel broke.
    pub fn on_guest_broken(&mut self, why: &str) {
        self.kill_for(Cause::Broken(why.into()));
    }

    fn on_hello(&mut self, payload: &[u8]) -> Result<(), Broken> {
        let hello: Value = serde_json::from_slice(payload).map_err(|_| Broken("a hello that makes no sense"))?;
        if hello.get("version") != Some(&json!(VERSION)) {
            return Err(Broken("a hello of another version"));
        }
        match (self.main.state, hello.get("main").and_then(Value::as_str)) {
            // A machine restored from a snapshot of one that was at work.
            (MainState::None, Some("running")) => self.main.state = MainState::Running,
            (MainState::Running, Some("none")) => self.main.state = MainState::None,
            _ => {}
        }
        self.life.boot_ms = None;
        self.life.has_answered = true;
        self.life.panic = None;
        self.guest.heartbeat.begin(self.now_ms);
        for client in self.clients.values_mut() {
            let waiting: Vec<u32> = client.streams.iter().filter(|(_, local)| **local == Local::Ready).map(|(number, _)| *number).collect();
            for number in waiting {
                client.streams.remove(&number);
                client.queue.push_json(Kind::Response, number, &json!({"ok": hello}));
            }
        }
        self.guest.hello = Some(hello);
        self.tell_event(&json!({"event": "agent"}));
        Ok(())
    }

    fn on_pong(&mut self, payload: &[u8]) -> Result<(), Broken> {
        let number = payload.try_into().map(u64::from_le_bytes).map_err(|_| Broken("a pong of impossible length"))?;
        // Who answers what was asked after the panic did not panic: somebody wrote these words to the console.
        self.life.panic.take_if(|panic| number >= panic.question);
        Ok(())
    }

    pub(super) fn on_guest_event(&mut self, payload: &[u8]) -> Result<(), Broken> {
        let event: Value = serde_json::from_slice(payload).map_err(|_| Broken("an event that makes no sense"))?;
        match event.get("event").and_then(Value::as_str) {
            None => Err(Broken("an event that makes no sense")),
            Some("agent" | "silent" | "answers" | "panic") => Ok(()), // these are ours: a guest cannot say them
            Some(_) => {
                self.tell_event(&event);
                Ok(())
            }
        }
    }

    fn on_main_frame(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Broken> {
        // A machine restored from a snapshot runs a command that this shim never started.
        let may_speak = self.main.asked.is_none() && self.main.state != MainState::Exited;
        match kind {
            Kind::Response => self.on_main_response(payload),
            Kind::Stdout | Kind::Stderr if may_speak => {
                self.main.state = MainState::Running;
                self.main.may_receive = take(self.main.may_receive, payload.len())?;
                self.hear(kind == Kind::Stderr, payload);
                self.main.n_logged += u32::try_from(payload.len()).unwrap_or(0);
                self.grant_main();
                Ok(())
            }
            Kind::Exit if may_speak => {
                let exit = Exit::parse(payload).ok_or(Broken("an exit that makes no sense"))?;
                self.on_main_exit(exit);
                Ok(())
            }
            Kind::Exit if self.main.state == MainState::Exited => Ok(()), // told again on a new channel
            Kind::Credit => {
                self.main.may_send = self.main.may_send.saturating_add(number_of(payload)?);
                self.feed_main();
                Ok(())
            }
            Kind::Close => {
                self.main.input.close();
                self.main.is_input_end_sent = true;
                Ok(())
            }
            _ => Err(Broken("a frame that its stream does not have")),
        }
    }

    fn on_main_response(&mut self, payload: &[u8]) -> Result<(), Broken> {
        let Some((id, local)) = self.main.asked.take() else { return Err(Broken("a response that nobody asked for")) };
        let is_agreed = is_agreement(payload)?;
        if let Some(client) = self.clients.get_mut(&id).filter(|client| client.streams.get(&local) == Some(&Local::Start)) {
            client.streams.remove(&local);
            client.queue.push_bytes(Kind::Response, local, payload);
        }
        if is_agreed {
            self.main.state = MainState::Running;
            self.feed_main();
        }
        Ok(())
    }

    fn on_main_exit(&mut self, exit: Exit) {
        self.main.state = MainState::Exited;
        self.main.input.close();
        let told = json!({"code": exit.code, "signal": exit.signal, "out_of_memory": exit.out_of_memory}).to_string();
        self.main.exit = Some(exit);
        self.output.publish(Kind::Exit, told.as_bytes(), &mut self.clients, self.now_ms);
        self.end_for(Cause::Command, milliseconds(self.config.stop_timeout_s));
    }

    fn on_stream_frame(&mut self, kind: Kind, number: u32, payload: &[u8]) -> Result<(), Broken> {
        let verdict = self.guest.check(kind, number, payload)?;
        if verdict == Verdict::Drop {
            return Ok(());
        }
        let owner = self.guest.streams[&number].owner;
        if kind == Kind::Response {
            let stream = &self.guest.streams[&number];
            self.calls.observe(stream.call, self.now_ms.saturating_sub(stream.opened_ms));
        }
        if verdict == Verdict::PassLast {
            self.guest.streams.remove(&number);
        }
        match owner {
            Owner::Client(id, local) => {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.queue.push_bytes(kind, local, payload);
                    if verdict == Verdict::PassLast {
                        client.streams.remove(&local);
                    }
                }
            }
            Owner::Metrics if kind == Kind::Response => self.on_metrics(number, payload),
            Owner::Metrics | Owner::Nobody => {}
        }
        Ok(())
    }

    // -- output and console --------------------------------------------------------------------------------------------------------

    /// The command wrote something.
    pub fn hear(&mut self, is_stderr: bool, data: &[u8]) {
        self.log.write(is_stderr, data, SystemTime::now());
        let kind = if is_stderr { Kind::Stderr } else { Kind::Stdout };
        self.output.publish(kind, data, &mut self.clients, self.now_ms);
    }

    /// The console said something.
    pub fn on_console(&mut self, data: &[u8], is_stderr: bool) {
        self.console_log.write(data);
        self.console.publish(Kind::Stdout, data, &mut self.clients, self.now_ms);
        if let Some(text) = self.scanner.feed(data) {
            self.on_panic(text);
        }
        if !self.config.has_agent() && self.config.console == Console::Stdio {
            self.hear(is_stderr, data);
        }
    }

    /// Whether the console is read now: not while somebody who hears it lags.
    pub fn reads_console(&self) -> bool {
        let is_output = !self.config.has_agent() && self.config.console == Console::Stdio;
        !(self.console.is_lagging() || is_output && self.output.is_lagging())
    }

    /// The last words of the console.
    pub fn console_tail(&self, n_bytes: usize) -> Vec<u8> {
        self.console_log.0.tail(n_bytes)
    }

    /// The console took so many bytes.
    pub fn on_console_written(&mut self, n_bytes: usize) {
        if let Some((id, local)) = self.console_input.take(n_bytes) {
            self.give_back(id, local, n_bytes);
        }
    }

    fn on_panic(&mut self, text: String) {
        self.tell_event(&json!({"event": "panic", "message": text}));
        if self.life.panic.is_none() || !self.config.has_agent() {
            let question = if self.guest.hello.is_some() { self.ping() } else { u64::MAX };
            self.life.panic = Some(Panic { text, due_ms: self.now_ms + PANIC_GRACE_MS, question, at_ms: self.now_ms });
        }
    }

    pub(super) fn grant_main(&mut self) {
        if self.main.n_logged >= CREDIT_STEP && !self.output.is_lagging() && self.guest.hello.is_some() {
            self.guest.queue.push_credit(MAIN_STREAM, self.main.n_logged);
            self.main.may_receive += self.main.n_logged;
            self.main.n_logged = 0;
        }
    }

    /// Hand the main command what waits for it, as far as it grants.
    pub fn feed_main(&mut self) {
        if self.main.state != MainState::Running || self.guest.hello.is_none() {
            return;
        }
        while self.main.may_send > 0 && !self.main.input.is_empty() {
            let piece = self.main.input.peek(self.main.may_send as usize);
            let n_bytes = piece.len();
            self.guest.queue.push_bytes(Kind::Stdin, MAIN_STREAM, piece);
            self.main.may_send = take(self.main.may_send, n_bytes).unwrap_or(0);
            if let Some((id, local)) = self.main.input.take(n_bytes) {
                self.give_back(id, local, n_bytes);
            }
        }
        if self.main.input.is_over() && !self.main.is_input_end_sent {
            self.main.is_input_end_sent = true;
            self.guest.queue.push_bytes(Kind::StdinEnd, MAIN_STREAM, b"");
        }
    }

    fn give_back(&mut self, id: ClientId, local: u32, n_bytes: usize) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if let Some(Local::Attach(Some(window)) | Local::Console(Some(window))) = client.streams.get_mut(&local) {
            let n_bytes = u32::try_from(n_bytes).unwrap_or(0);
            *window += n_bytes;
            client.queue.push_credit(local, n_bytes);
        }
    }
}
