//! The loop: one poll(2) over the channel, signals, the kernel's messages and the pipes of the children.
//!
//! Rules of the protocol that are kept here: a stream is opened by a REQUEST and is in use until its last frame; at most 256 of them and 64
//! commands; frames beyond the credit, or of a kind that has no sense on a stream, break the channel; frames for a stream that is not in use
//! are late, and dropped. A HELLO begins anew: all streams are forgotten but the main command's, which the host may have been restored to.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use super::channel::{Channel, Received};
use super::init::{self, Modules};
use super::launch::Waiting;
use super::messages::Messages;
use super::requests::{self, Command, Failure, Place};
use super::system::{self, Ended};
use super::work::{Task, Work};
use super::{command, files, launch, metrics, network, setup};
use crate::protocol::{Broken, Frame, Kind, MAIN_STREAM, VERSION};

const STREAMS_MAX: usize = 256;
const COMMANDS_MAX: usize = 64;
/// Of prepare, configure, renew and sync.
const SETUP_S: u64 = 60;
/// How long the main command may take to end after ctrl-alt-del.
const GRACE_S: u64 = 10;
/// How often a host that is not there is looked for.
const AWAY_MS: u64 = 100;
const READABLE: PollFlags = PollFlags::IN;

/// What became of the main command.
enum Main {
    None,
    Running,
    Exited(Vec<u8>),
}

/// The agent.
pub struct Server {
    channel: Channel,
    modules: Modules,
    signals: OwnedFd,
    messages: Option<Messages>,
    works: Vec<Work>,
    mounts: Option<OwnedFd>,
    configured: bool,
    main: Main,
    host_is_away: bool,
    stopping: Option<Instant>,
    cpu_s_before: f64,
    /// What is said of the machine; read once, so that a clone of a template has it in its memory.
    facts: Option<Value>,
    /// Becomes the main command.
    waiting: Option<Waiting>,
}

impl Server {
    /// An agent that has heard nothing yet.
    pub fn new(channel: Channel, modules: Modules, signals: OwnedFd) -> Self {
        Self {
            channel,
            modules,
            signals,
            messages: Messages::open().ok(),
            works: Vec::new(),
            mounts: None,
            configured: false,
            main: Main::None,
            host_is_away: false,
            stopping: None,
            cpu_s_before: metrics::own_cpu_s(),
            facts: None,
            waiting: None,
        }
    }

    /// Serve until the machine is powered off.
    pub fn run(mut self) -> ! {
        loop {
            self.channel.flush();
            if self.wait() {
                self.hear();
                self.watch();
            } else {
                self.modules.insert_next();
            }
            let was_configured = self.configured;
            for work in &mut self.works {
                work.pump(&mut self.channel);
                // With the answer, not with the end: the host may ask for a command at once.
                self.configured |= work.task == Task::Setup { configures: true } && work.succeeded();
                if work.task == Task::Main && work.was_refused() {
                    work.task = Task::Exec;
                    self.main = Main::None;
                }
            }
            if self.configured && !was_configured {
                // Now, and not with the first command: a clone of a template has it in its memory. What goes wrong is said there.
                let _ = self.sandbox();
            }
            self.finish();
            self.keep_times();
        }
    }

    /// Wait for anything. False if there was nothing, and modules wait to be inserted.
    fn wait(&mut self) -> bool {
        let is_stuck = self.channel.is_stuck();
        let mut channel_at = None;
        let mut fds = vec![PollFd::new(&self.signals, READABLE)];
        fds.extend(self.messages.as_ref().map(|messages| PollFd::from_borrowed_fd(messages.file(), READABLE)));
        if let (Some(file), false) = (self.channel.file(), self.host_is_away) {
            let mut wanted = if is_stuck { PollFlags::empty() } else { PollFlags::IN };
            wanted.set(PollFlags::OUT, self.channel.has_more());
            channel_at = Some(fds.len());
            fds.push(PollFd::from_borrowed_fd(file, wanted));
        }
        fds.extend(self.channel.listener().map(|listener| PollFd::from_borrowed_fd(listener, READABLE)));
        for work in &self.works {
            work.interests(&self.channel, |file, writes| fds.push(PollFd::new(file, if writes { PollFlags::OUT } else { READABLE })));
        }
        let timeout = self.timeout();
        let timeout =
            timeout.map(|wait| Timespec { tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX), tv_nsec: wait.subsec_nanos().into() });
        let n_ready = poll(&mut fds, timeout.as_ref()).unwrap_or(0);
        // A host that went while there is still much for it: nothing is read that would tell so.
        self.host_is_away |= is_stuck && channel_at.is_some_and(|index| fds[index].revents().contains(PollFlags::HUP));
        n_ready > 0 || self.modules.are_inserted()
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.modules.are_inserted() {
            return Some(Duration::ZERO);
        }
        let away = self.host_is_away.then(|| Instant::now() + Duration::from_millis(AWAY_MS));
        let times =
            self.works.iter().flat_map(|work| [work.deadline, work.looks_at(&self.channel)]).flatten().chain(self.stopping).chain(away);
        times.min().map(|time| time.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    /// Take what the host says.
    fn hear(&mut self) {
        self.channel.accept();
        if self.channel.is_stuck() {
            return;
        }
        self.host_is_away = false;
        match self.channel.receive() {
            Received::Nothing => {}
            Received::Gone => {
                self.host_is_away = true;
                if self.channel.file().is_none() {
                    self.forget_streams();
                }
            }
            Received::Bytes => self.take_frames(),
        }
    }

    fn take_frames(&mut self) {
        loop {
            let outcome = match self.channel.next_frame() {
                Ok(None) => return,
                Ok(Some(frame)) => self.take_frame(&frame),
                Err(broken) => Err(broken),
            };
            if outcome.is_err() {
                self.forget_streams();
                self.channel.distrust();
            }
        }
    }

    fn take_frame(&mut self, frame: &Frame) -> Result<(), Broken> {
        match frame.kind {
            Kind::Hello => self.greet(),
            Kind::Ping => self.channel.queue(Kind::Pong, 0, &frame.payload[..frame.payload.len().min(8)]),
            Kind::Pong => {}
            Kind::Request => return self.take_request(frame),
            _ => return self.take_for_work(frame),
        }
        Ok(())
    }

    fn greet(&mut self) {
        self.forget_streams();
        let facts = self.facts.get_or_insert_with(read_facts);
        facts["main"] = json!(match self.main {
            Main::None => "none",
            Main::Running => "running",
            Main::Exited(_) => "exited",
        });
        self.channel.queue(Kind::Hello, 0, facts.to_string().as_bytes());
        if let Main::Exited(payload) = &self.main {
            self.channel.queue(Kind::Exit, MAIN_STREAM, payload);
        }
    }

    fn forget_streams(&mut self) {
        for work in &mut self.works {
            match work.task {
                Task::Main => work.attach_anew(MAIN_STREAM),
                _ => drop_stream(work),
            }
        }
    }

    fn take_request(&mut self, frame: &Frame) -> Result<(), Broken> {
        let stream = frame.stream;
        if self.works.iter().any(|work| work.stream == Some(stream)) {
            return Err(Broken("a request on a stream in use"));
        }
        let outcome = requests::operation(&frame.payload).and_then(|op| self.begin(&op, stream, &frame.payload));
        // None: a child will answer.
        if let Some(outcome) = outcome.transpose() {
            self.channel.queue(Kind::Response, stream, &requests::response(&outcome));
        }
        Ok(())
    }

    fn begin(&mut self, op: &str, stream: u32, payload: &[u8]) -> Result<Option<Value>, Failure> {
        if stream == 0 {
            return Err(Failure::invalid("stream 0 is not for requests"));
        }
        if self.works.len() >= STREAMS_MAX {
            return Err(Failure::new("busy", format!("there are {STREAMS_MAX} streams already")));
        }
        match op {
            "prepare" => self.set_up(stream, false, requests::parse(payload)?, |wanted| setup::prepare(&wanted)),
            "configure" => self.configure(stream, payload),
            // Here and not in a child: it touches memory and the link only, and what it does comes before a clone's first command.
            "renew" => setup::renew(&requests::parse(payload)?).map(|()| Some(json!({}))),
            "sync" => self.set_up(stream, false, (), |()| {
                rustix::fs::sync();
                Ok(())
            }),
            "start" => self.start(stream, payload),
            "exec" => self.run_command(stream, Task::Exec, &requests::parse(payload)?),
            "warm" => self.warm(stream, requests::parse(payload)?),
            "look" => self.look(stream, requests::parse(payload)?),
            "archive" => self.archive(stream, requests::parse(payload)?),
            "extract" => self.extract(stream, requests::parse(payload)?),
            "metrics" => Ok(Some(metrics::read(self.cpu_s_before))),
            "poweroff" => self.power_off(stream),
            _ => Err(Failure::new("unsupported", format!("this agent does not know {op:?}"))),
        }
    }

    fn configure(&mut self, stream: u32, payload: &[u8]) -> Result<Option<Value>, Failure> {
        if self.configured || self.works.iter().any(|work| work.task == Task::Setup { configures: true } && !work.is_answered()) {
            return Err(Failure::new("busy", "the machine was configured already"));
        }
        self.set_up(stream, true, requests::parse(payload)?, |wanted| setup::configure(&wanted))
    }

    /// Do something in a child that has one answer.
    fn set_up<T>(
        &mut self,
        stream: u32,
        configures: bool,
        wanted: T,
        run: impl FnOnce(T) -> Result<(), Failure>,
    ) -> Result<Option<Value>, Failure> {
        self.modules.insert_all();
        let mut work = launch::spawn(Task::Setup { configures }, stream, None, move || run(wanted).map(|()| json!({})))?;
        work.deadline = Some(Instant::now() + Duration::from_secs(SETUP_S));
        self.works.push(work);
        Ok(None)
    }

    fn start(&mut self, stream: u32, payload: &[u8]) -> Result<Option<Value>, Failure> {
        let wanted: Command = requests::parse(payload)?;
        if stream != MAIN_STREAM {
            return Err(Failure::invalid("the main command has stream 1"));
        }
        if !matches!(self.main, Main::None) {
            return Err(Failure::new("busy", "the main command was started already"));
        }
        wanted.check()?;
        let waiting = self.waiting.take().filter(|_| !wanted.terminal);
        match waiting.and_then(|waiting| waiting.begin(stream, wanted.stdin, payload)) {
            Some(work) => self.works.push(work),
            None => drop(self.run_command(stream, Task::Main, &wanted)?),
        }
        self.main = Main::Running;
        Ok(None)
    }

    fn run_command(&mut self, stream: u32, task: Task, wanted: &Command) -> Result<Option<Value>, Failure> {
        wanted.check()?;
        if self.works.iter().filter(|work| work.task.is_command()).count() >= COMMANDS_MAX {
            return Err(Failure::new("busy", format!("{COMMANDS_MAX} commands run already")));
        }
        let mounts = self.sandbox()?.try_clone_to_owned().map_err(|error| Failure::failed("a descriptor", error))?;
        let work = launch::run(task, stream, wanted, mounts.as_fd()).map_err(|error| Failure::failed(&wanted.argv[0], error))?;
        self.works.push(work);
        Ok(None)
    }

    /// Read what a command will read, without running it, have a child wait for it, and bring the link up: what is done in a template costs
    /// its clones nothing.
    fn warm(&mut self, stream: u32, wanted: Command) -> Result<Option<Value>, Failure> {
        if matches!(self.main, Main::None) && self.waiting.is_none() {
            self.waiting = Some(launch::wait(self.sandbox()?).map_err(|error| Failure::failed("a process", error))?);
        }
        let mounts = self.sandbox()?;
        let run = move || {
            command::warm(&wanted);
            network::warm().map(|()| json!({})).map_err(|error| Failure::failed("the link", error))
        };
        let mut work = launch::spawn(Task::Setup { configures: false }, stream, Some(mounts), run)?;
        work.deadline = Some(Instant::now() + Duration::from_secs(SETUP_S));
        self.works.push(work);
        Ok(None)
    }

    fn look(&mut self, stream: u32, place: Place) -> Result<Option<Value>, Failure> {
        let mounts = self.sandbox()?;
        let run = move || files::look(&place.path, place.follow);
        let mut work = launch::spawn(Task::Setup { configures: false }, stream, Some(mounts), run)?;
        work.deadline = Some(Instant::now() + Duration::from_secs(SETUP_S));
        self.works.push(work);
        Ok(None)
    }

    fn archive(&mut self, stream: u32, place: Place) -> Result<Option<Value>, Failure> {
        let mounts = self.sandbox()?;
        let work = launch::spawn(Task::Archive, stream, Some(mounts), move || files::archive(&place.path))?;
        self.works.push(work);
        Ok(None)
    }

    fn extract(&mut self, stream: u32, place: Place) -> Result<Option<Value>, Failure> {
        let mounts = self.sandbox()?;
        let work = launch::spawn(Task::Extract, stream, Some(mounts), move || files::extract(&place.path))?;
        self.works.push(work);
        Ok(None)
    }

    /// The mount namespace of all that runs in the sandbox.
    fn sandbox(&mut self) -> Result<BorrowedFd<'_>, Failure> {
        if !self.configured {
            return Err(Failure::invalid("the machine was not configured yet"));
        }
        if self.mounts.is_none() {
            self.mounts = Some(setup::open_sandbox().map_err(|error| Failure::failed("the sandbox's mounts", error))?);
        }
        Ok(self.mounts.as_ref().expect("it was just set").as_fd())
    }

    /// Take a frame for a stream that is in use. Others are late ones: their command has ended meanwhile.
    fn take_for_work(&mut self, frame: &Frame) -> Result<(), Broken> {
        let Some(index) = self.works.iter().position(|work| work.stream == Some(frame.stream)) else { return Ok(()) };
        let (work, channel) = (&mut self.works[index], &mut self.channel);
        let payload = frame.payload.as_slice();
        match (frame.kind, work.task) {
            (Kind::Credit, _) => work.grant(u32::from_le_bytes(exactly(payload)?)),
            (Kind::Close, _) => drop_stream(work),
            (Kind::Stdin, Task::Main | Task::Exec) | (Kind::Data, Task::Extract) => {
                if !work.take_input(channel, payload) {
                    return Err(Broken("more than was granted"));
                }
            }
            (Kind::StdinEnd, Task::Main | Task::Exec) | (Kind::DataEnd, Task::Extract) => work.end_input(channel),
            (Kind::Resize, Task::Main | Task::Exec) => {
                let [a, b, c, d] = exactly(payload)?;
                work.resize(u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
            }
            (Kind::Signal, Task::Main | Task::Exec) => {
                let [signal] = exactly(payload)?;
                if work.ended.is_none() {
                    let _ = system::kill(work.pid, signal.into());
                }
            }
            _ => return Err(Broken("a frame that has no sense on its stream")),
        }
        Ok(())
    }

    /// Take what the kernel says: signals, ended children, messages.
    fn watch(&mut self) {
        for signal in system::read_signals(self.signals.as_fd()) {
            if signal != libc::SIGCHLD {
                self.stop_cleanly();
            }
        }
        while let Some((pid, ended)) = system::reap() {
            if let Some(work) = self.works.iter_mut().find(|work| work.pid == pid && work.ended.is_none()) {
                let n_oom = launch::group_of(work.task).map_or(0, setup::n_oom_kills);
                work.out_of_memory = ended.signal == Some(libc::SIGKILL) && n_oom > work.n_oom_before;
                work.end(ended);
            }
        }
        if let Some(messages) = &mut self.messages {
            for event in messages.read() {
                self.channel.queue(Kind::Event, 0, event.to_string().as_bytes());
            }
        }
    }

    /// Say how those that are over ended, and forget them.
    fn finish(&mut self) {
        let mut index = 0;
        while index < self.works.len() {
            if self.works[index].is_over() {
                let work = self.works.remove(index);
                self.conclude(work);
            } else {
                index += 1;
            }
        }
    }

    fn conclude(&mut self, mut work: Work) {
        let Some(ended) = work.ended else { return };
        match work.task {
            Task::Main | Task::Exec if work.was_refused() => {}
            Task::Main | Task::Exec => self.tell_exit(&work, ended),
            Task::Archive if ended.code == 0 => self.tell(&work, Kind::DataEnd, b""),
            // A child that failed said why, unless it had no time for that.
            _ if ended.code != 0 && (!work.is_answered() || work.succeeded()) => {
                let failure = Failure::new("failed", format!("it ended early ({})", ended.code));
                work.answer(&mut self.channel, &requests::response(&Err(failure)));
            }
            _ => {}
        }
    }

    fn tell_exit(&mut self, work: &Work, ended: Ended) {
        let how = json!({"code": ended.code, "signal": ended.signal, "out_of_memory": work.out_of_memory});
        let payload = how.to_string().into_bytes();
        self.tell(work, Kind::Exit, &payload);
        if work.task == Task::Main {
            self.main = Main::Exited(payload);
            if self.stopping.is_some() {
                self.leave();
            }
        }
    }

    fn tell(&mut self, work: &Work, kind: Kind, payload: &[u8]) {
        if let Some(stream) = work.stream {
            self.channel.queue(kind, stream, payload);
        }
    }

    /// End what takes too long.
    fn keep_times(&mut self) {
        let now = Instant::now();
        for work in &mut self.works {
            if work.deadline.is_some_and(|deadline| deadline < now) {
                work.deadline = None;
                let failure = Failure::new("failed", format!("it was not done in {SETUP_S} s"));
                work.answer(&mut self.channel, &requests::response(&Err(failure)));
                let _ = system::kill(work.pid, libc::SIGKILL);
            }
        }
        if self.stopping.is_some_and(|time| time < now) {
            self.leave();
        }
    }

    /// Ctrl-alt-del: ask the main command to end; the machine goes when it has.
    fn stop_cleanly(&mut self) {
        match self.works.iter().find(|work| work.task == Task::Main && work.ended.is_none()) {
            Some(work) => {
                let _ = system::kill(work.pid, libc::SIGTERM);
                self.stopping.get_or_insert(Instant::now() + Duration::from_secs(GRACE_S));
            }
            None => self.leave(),
        }
    }

    fn power_off(&mut self, stream: u32) -> Result<Option<Value>, Failure> {
        self.channel.queue(Kind::Response, stream, &requests::response(&Ok(json!({}))));
        self.leave();
        Err(Failure::new("failed", "the machine could not be powered off"))
    }

    fn leave(&mut self) {
        self.channel.flush();
        self.mounts = None;
        init::power_off();
    }
}

fn exactly<const N: usize>(payload: &[u8]) -> Result<[u8; N], Broken> {
    payload.try_into().map_err(|_| Broken("a payload of the wrong length"))
}

/// What a HELLO says that stays as it is as long as the machine runs.
fn read_facts() -> Value {
    json!({
        "version": VERSION,
        "agent": env!("CARGO_PKG_VERSION"),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "cpus": metrics::n_cpus(),
        "memory_bytes": metrics::memory_bytes(),
        "boot_id": fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim(),
    })
}

fn drop_stream(work: &mut Work) {
    work.detach();
    if matches!(work.task, Task::Archive | Task::Extract) {
        let _ = system::kill(work.pid, libc::SIGKILL);
    }
}
