//! The loop: descriptors on one side, the hub on the other. One thread, one poll.
//!
//! Rules: nothing here waits but the poll. Each turn reads at most one buffer of each peer, so that nobody who floods keeps the others waiting.
//! While the guest takes no more, clients that send it something are not read; while somebody who hears the console lags, the console is not read.

mod reading;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{ChildStderr, ChildStdin, ChildStdout};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};

use crate::shim::clients::ClientId;
use crate::shim::hub::{Hub, Order};
use crate::shim::link::Link;
use crate::shim::machine::{ask_to_end, kill_children, read_signals};
use crate::shim::monitor::Monitor;
use crate::shim::sink::Words;
use crate::shim::verdict::{Facts, VmmEnd, judge, write_whole};

/// Most connections to the shim's socket.
const CLIENTS_MAX: usize = 256;
/// Read of one peer in one turn.
const BUFFER_BYTES: usize = 64 << 10;
/// Read of a machine that has ended; what it left is at most what fits into sockets and pipes.
const LEFT_BYTES_MAX: usize = 4 << 20;
/// How long clients may take to hear the end.
const FAREWELL_MS: u64 = 1000;
/// How long nobody is let in when that failed.
const DEAF_MS: u64 = 1000;
/// How long a machine whose channel ended may take to end too.
const CHANNEL_GRACE_MS: u64 = 2000;

/// Our ends of the machine's console and of what its program says.
pub enum Pipes {
    /// The console is a socket; the program's own words come by pipes.
    Socket(UnixStream, [Option<OwnedFd>; 2]),
    /// The console is the program's stdio.
    Stdio(Option<ChildStdin>, [Option<OwnedFd>; 2]),
}

impl Pipes {
    /// Sort out what a child was given; our ends do not block.
    pub fn new(
        console: Option<UnixStream>,
        stdin: Option<ChildStdin>,
        stdout: Option<ChildStdout>,
        stderr: Option<ChildStderr>,
    ) -> io::Result<Self> {
        let outputs = [stdout.map(OwnedFd::from), stderr.map(OwnedFd::from)];
        for fd in outputs.iter().flatten() {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        if let Some(fd) = &stdin {
            rustix::io::ioctl_fionbio(fd, true)?;
        }
        Ok(match console {
            Some(console) => Self::Socket(console, outputs),
            None => Self::Stdio(stdin, outputs),
        })
    }
}

#[derive(Clone, Copy, Debug)]
enum Token {
    Signals,
    Listener,
    MonitorListener,
    Link,
    Console,
    ConsoleInput,
    Output(usize),
    Client(ClientId),
    Monitor(usize),
}

/// All descriptors of a shim.
pub struct Shim {
    /// What it knows.
    pub hub: Hub,
    /// The way to the agent.
    pub link: Link,
    /// The console, and what the machine's program says.
    pub pipes: Pipes,
    /// Its last line.
    pub words: Words,
    /// Our signals.
    pub signals: OwnedFd,
    /// The shim's socket.
    pub listener: UnixListener,
    /// Kata's.
    pub monitor_listener: Option<UnixListener>,
    /// Who is connected to that.
    pub monitor: Monitor,
    /// Who is connected to ours.
    pub streams: BTreeMap<ClientId, UnixStream>,
    /// Read into here.
    pub buffer: Vec<u8>,
    next_client: ClientId,
    is_console_over: bool,
    channel_due_ms: Option<u64>,
    deaf_ms: Option<u64>,
    farewell_ms: Option<u64>,
}

/// Milliseconds of a clock that only goes forward.
pub fn now_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1000 + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000_000
}

impl Shim {
    /// One whose machine was just started.
    pub fn new(
        hub: Hub,
        link: Link,
        pipes: Pipes,
        words: Words,
        signals: OwnedFd,
        listeners: (UnixListener, Option<UnixListener>),
    ) -> Self {
        let (listener, monitor_listener) = listeners;
        let (monitor, streams, buffer) = (Monitor::default(), BTreeMap::new(), vec![0; BUFFER_BYTES]);
        let mut shim = Self {
            hub,
            link,
            pipes,
            words,
            signals,
            listener,
            monitor_listener,
            monitor,
            streams,
            buffer,
            next_client: 1,
            is_console_over: false,
            channel_due_ms: None,
            deaf_ms: None,
            farewell_ms: None,
        };
        if shim.link.stream().is_some() {
            shim.hub.begin_channel();
        }
        shim
    }

    /// Run until the machine has ended and everybody was told.
    pub fn run(&mut self) {
        loop {
            self.turn();
            if self.hub.life.end.is_some() {
                let due_ms = *self.farewell_ms.get_or_insert(self.hub.now_ms + FAREWELL_MS);
                if self.hub.is_all_told() || self.hub.now_ms >= due_ms {
                    return;
                }
            }
            let ready = self.wait();
            self.hub.now_ms = now_ms();
            self.serve(&ready);
        }
    }

    /// Do what is due, and write what waits.
    fn turn(&mut self) {
        self.hub.now_ms = now_ms();
        self.hub.tick();
        self.deaf_ms.take_if(|due_ms| *due_ms <= self.hub.now_ms);
        if self.hub.life.end.is_none() {
            self.link.tick(self.hub.now_ms);
            if self.channel_due_ms.take_if(|due_ms| *due_ms <= self.hub.now_ms).is_some() {
                self.hub.on_guest_broken("its channel was closed");
            }
        }
        self.write_console();
        self.monitor.go_on(&mut self.hub);
        self.write_link();
        self.write_clients();
        for order in std::mem::take(&mut self.hub.orders) {
            self.obey(order);
        }
    }

    // -- waiting -------------------------------------------------------------------------------------------------------------------

    fn wait(&mut self) -> Vec<(Token, PollFlags)> {
        let due = [self.hub.next_ms(), self.link.next_ms(), self.channel_due_ms, self.deaf_ms, self.farewell_ms];
        let timeout = due.into_iter().flatten().min().map(|due_ms| timespec(due_ms.saturating_sub(now_ms())));
        let (tokens, mut fds) = self.wanted();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => tokens.into_iter().zip(fds.iter().map(PollFd::revents)).filter(|(_, events)| !events.is_empty()).collect(),
            Err(_) => Vec::new(),
        }
    }

    fn wanted(&self) -> (Vec<Token>, Vec<PollFd<'_>>) {
        let mut wanted = Wanted::default();
        wanted.add(Token::Signals, &self.signals, PollFlags::IN);
        if self.deaf_ms.is_none() {
            wanted.add(Token::Listener, &self.listener, PollFlags::IN);
        }
        if let Some(listener) = &self.monitor_listener {
            wanted.add(Token::MonitorListener, listener, PollFlags::IN);
        }
        if let Some((stream, events)) = self.link.wants(!self.hub.guest.queue.is_empty()) {
            wanted.add(Token::Link, stream, events);
        }
        self.want_console(&mut wanted);
        for (id, stream) in &self.streams {
            let has_output = self.hub.clients.get(id).is_some_and(|client| !client.queue.is_empty());
            let mut events = if self.hub.reads_client(*id) { PollFlags::IN } else { PollFlags::empty() };
            events.set(PollFlags::OUT, has_output);
            wanted.add(Token::Client(*id), stream, events);
        }
        for (index, (stream, events)) in self.monitor.wants().enumerate() {
            wanted.add(Token::Monitor(index), stream, events);
        }
        (wanted.tokens, wanted.fds)
    }

    fn want_console<'a>(&'a self, wanted: &mut Wanted<'a>) {
        let (reads, writes) = (self.hub.reads_console(), !self.hub.console_input.is_empty());
        let outputs = match &self.pipes {
            Pipes::Socket(console, outputs) => {
                let mut events = if reads { PollFlags::IN } else { PollFlags::empty() };
                events.set(PollFlags::OUT, writes);
                if !events.is_empty() && !self.is_console_over {
                    wanted.add(Token::Console, console, events);
                }
                outputs
            }
            Pipes::Stdio(input, outputs) => {
                if let Some(input) = input.as_ref().filter(|_| writes) {
                    wanted.add(Token::ConsoleInput, input, PollFlags::OUT);
                }
                outputs
            }
        };
        let is_read = reads || matches!(self.pipes, Pipes::Socket(..));
        for (index, output) in outputs.iter().enumerate().filter(|_| is_read) {
            if let Some(output) = output {
                wanted.add(Token::Output(index), output, PollFlags::IN);
            }
        }
    }

    // -- serving what is ready -----------------------------------------------------------------------------------------------------

    fn serve(&mut self, ready: &[(Token, PollFlags)]) {
        let mut monitor_events = vec![PollFlags::empty(); self.monitor.len()];
        let mut has_news = false;
        for (token, events) in ready {
            match token {
                Token::Signals => has_news = true,
                Token::Listener => self.accept(),
                Token::Link => self.read_link(),
                Token::Console => {
                    self.read_console();
                }
                Token::Output(index) => {
                    self.read_output(*index);
                }
                Token::Client(id) if events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) => self.read_client(*id),
                Token::Client(_) | Token::MonitorListener | Token::ConsoleInput => {} // what waits is written in any turn
                Token::Monitor(index) => monitor_events[*index] = *events,
            }
        }
        self.monitor.serve(&monitor_events, &mut self.hub, &mut self.buffer);
        if let Some(listener) =
            self.monitor_listener.as_ref().filter(|_| ready.iter().any(|(token, _)| matches!(token, Token::MonitorListener)))
        {
            self.monitor.accept(listener, self.hub.now_ms);
        }
        if has_news {
            self.on_signals();
        }
    }

    fn on_signals(&mut self) {
        for signal in read_signals(&self.signals) {
            if [libc::SIGTERM, libc::SIGINT].iter().any(|wish| u32::try_from(*wish) == Ok(signal)) {
                self.hub.stop();
            }
        }
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid.as_raw_nonzero().get() == self.hub.vmm_pid && self.hub.life.end.is_none() {
                let by_signal = status.terminating_signal().map(VmmEnd::Signal);
                self.on_vmm_end(by_signal.unwrap_or_else(|| VmmEnd::Code(status.exit_status().unwrap_or(0))));
            }
        }
    }

    // -- writing -------------------------------------------------------------------------------------------------------------------

    fn write_console(&mut self) {
        loop {
            let piece = self.hub.console_input.peek(BUFFER_BYTES);
            if piece.is_empty() {
                break;
            }
            let outcome = match &mut self.pipes {
                Pipes::Socket(console, _) => console.write(piece),
                Pipes::Stdio(Some(input), _) => input.write(piece),
                Pipes::Stdio(None, _) => Err(io::ErrorKind::BrokenPipe.into()),
            };
            match outcome {
                Ok(n_bytes) => self.hub.on_console_written(n_bytes),
                Err(error) if is_passing(&error) => return,
                Err(_) => {
                    self.hub.console_input.close();
                    break;
                }
            }
        }
        if let Pipes::Stdio(input, _) = &mut self.pipes {
            if self.hub.console_input.is_over() {
                *input = None;
            }
        }
    }

    fn write_link(&mut self) {
        let Some(stream) = self.link.stream() else { return };
        if !self.hub.guest.queue.is_empty() && self.hub.guest.queue.write_to(stream).is_err() {
            self.lose_link();
        }
    }

    fn write_clients(&mut self) {
        let mut lost = Vec::new();
        for (id, stream) in &self.streams {
            while let Some(client) = self.hub.clients.get_mut(id).filter(|client| !client.queue.is_empty()) {
                match client.queue.write_to(stream) {
                    Ok(0) => break,
                    Ok(_) => self.hub.on_client_drained(*id),
                    Err(_) => {
                        lost.push(*id);
                        break;
                    }
                }
            }
            if self.hub.clients.get(id).is_none_or(crate::shim::clients::Client::is_overrun) {
                lost.push(*id);
            }
        }
        for id in lost {
            self.drop_client(id);
        }
    }

    // -- the machine's process -----------------------------------------------------------------------------------------------------

    fn obey(&mut self, order: Order) {
        match order {
            Order::Kill => self.signal_vmm(Signal::KILL),
            Order::Ask => {
                let argv = self.hub.config.stop_argv.clone();
                if argv.is_none_or(|argv| ask_to_end(&self.hub.config, &argv, self.hub.vmm_pid).is_err()) {
                    self.signal_vmm(Signal::TERM);
                }
            }
        }
    }

    /// It is a child that was not reaped yet: its number is nobody else's.
    fn signal_vmm(&self, signal: Signal) {
        if self.hub.life.end.is_none() {
            let _ = Pid::from_raw(self.hub.vmm_pid).map(|pid| kill_process(pid, signal));
        }
    }

    fn on_vmm_end(&mut self, vmm: VmmEnd) {
        self.hear_the_rest();
        self.hub.end_channel();
        let facts = Facts {
            cause: self.hub.life.cause.as_ref(),
            panic: self.hub.panic_text(),
            exit: self.hub.main.exit.as_ref(),
            main: self.hub.main.state,
            vmm,
            last_words: self.words.last(),
            has_agent: self.hub.config.has_agent(),
        };
        let end = judge(&facts);
        let text = serde_json::to_vec(&end).unwrap_or_default();
        // Where the disk has no room for them the engine sees a shim that is gone and left nothing, as after a kill.
        let _ = write_whole(&self.hub.config.end_file, &text);
        let _ = write_whole(&self.hub.config.exit_file, end.exit_code().to_string().as_bytes());
        kill_children();
        self.link = Link::none();
        self.channel_due_ms = None;
        self.monitor_listener = None;
        self.monitor = Monitor::default();
        self.hub.on_end(end);
    }

    /// What the machine said before it ended still lies in sockets and pipes.
    fn hear_the_rest(&mut self) {
        for _ in 0..LEFT_BYTES_MAX / BUFFER_BYTES {
            let mut is_more = self.read_link_once();
            is_more |= self.read_console();
            is_more |= self.read_output(0);
            is_more |= self.read_output(1);
            if !is_more {
                break;
            }
        }
    }
}

/// What the poll waits for.
#[derive(Default)]
struct Wanted<'a> {
    tokens: Vec<Token>,
    fds: Vec<PollFd<'a>>,
}

impl<'a> Wanted<'a> {
    fn add(&mut self, token: Token, fd: &'a impl AsFd, events: PollFlags) {
        self.tokens.push(token);
        self.fds.push(PollFd::new(fd, events));
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn timespec(milliseconds: u64) -> Timespec {
    let milliseconds = i64::try_from(milliseconds).unwrap_or(i64::MAX / 2);
    Timespec { tv_sec: milliseconds / 1000, tv_nsec: milliseconds % 1000 * 1_000_000 }
}
