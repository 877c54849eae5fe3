//! The children of the agent: commands, archives, set-ups. Each is a process with pipes, most of them with a stream to the host.
//!
//! A child tells its outcome on a pipe of its own, one RESPONSE per line; a command's pipe is closed by its exec, which says "ok". Output is
//! read only while there is credit for it, so a host that does not read stops the command, as a full pipe does anywhere.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::channel::Channel;
use super::system::{self, Ended, Pid};
use crate::protocol::{Kind, PAYLOAD_BYTES_MAX, WINDOW_BYTES};

const READ_BYTES: usize = 32 << 10;
/// Of one answer of a child.
const ANSWER_BYTES_MAX: usize = PAYLOAD_BYTES_MAX;
/// Credit is given back in pieces of at least this many bytes, or when nothing is left to write.
const CREDIT_BYTES_MIN: u32 = 32 << 10;
/// What a terminal holds at most of what was written to it.
const TERMINAL_BYTES_MAX: u64 = 72 << 10;
/// The kernel hands on what was written to a terminal some moments later. After so long without anything, that was all.
const QUIET_MS: u64 = 50;
/// More credit than this is as good as any.
const CREDIT_BYTES_MAX: u64 = 1 << 40;

/// What a child is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The main command.
    Main,
    /// Another command.
    Exec,
    /// A tar for the host.
    Archive,
    /// A tar from the host.
    Extract,
    /// One answer, nothing else; `configures` if that makes the sandbox.
    Setup {
        /// Whether commands can run after its success.
        configures: bool,
    },
}

impl Task {
    /// Whether it is a program of the sandbox.
    pub fn is_command(self) -> bool {
        matches!(self, Self::Main | Self::Exec)
    }
}

/// A pipe, or a terminal, that a child writes to.
struct Output {
    file: OwnedFd,
    kind: Kind,
    /// What is still to be read of one that ended: others may hold the pipe and write for ever.
    left: Option<u64>,
}

/// What a child is given and what is known of it.
#[allow(clippy::struct_excessive_bools)] // four facts, each true or not, of which any may go with any
pub struct Work {
    /// The process.
    pub pid: Pid,
    /// What it is for.
    pub task: Task,
    /// Where its frames go; None if nobody listens any more.
    pub stream: Option<u32>,
    /// When it is killed.
    pub deadline: Option<Instant>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Killed by the kernel for want of memory before it began, in its group.
    pub n_oom_before: u64,
    /// How it ended.
    pub ended: Option<Ended>,
    /// Whether the kernel killed it for want of memory.
    pub out_of_memory: bool,
    answers: Option<OwnedFd>,
    answer: Vec<u8>,
    n_answers: usize,
    /// Whether the last answer was "ok".
    succeeded: bool,
    input: Option<OwnedFd>,
    pending: VecDeque<u8>,
    input_ends: bool,
    received_credit: u32,
    owed_credit: u32,
    outputs: Vec<Output>,
    send_credit: u64,
    /// Since when there is nothing to read of one that ended.
    quiet_since: Instant,
}

/// The parent's ends of a child's pipes.
pub struct Pipes {
    /// Its answers.
    pub answers: OwnedFd,
    /// What it reads.
    pub input: Option<OwnedFd>,
    /// What it writes, and as which frames that goes out.
    pub outputs: Vec<(OwnedFd, Kind)>,
}

impl Work {
    /// Look after a child.
    pub fn new(pid: Pid, task: Task, stream: u32, pipes: Pipes) -> Self {
        let outputs = pipes.outputs.into_iter().map(|(file, kind)| Output { file, kind, left: None }).collect();
        Self {
            pid,
            task,
            stream: Some(stream),
            deadline: None,
            terminal: false,
            n_oom_before: 0,
            ended: None,
            out_of_memory: false,
            answers: Some(pipes.answers),
            answer: Vec::new(),
            n_answers: 0,
            succeeded: false,
            input: pipes.input,
            pending: VecDeque::new(),
            input_ends: false,
            received_credit: WINDOW_BYTES,
            owed_credit: 0,
            outputs,
            send_credit: WINDOW_BYTES.into(),
            quiet_since: Instant::now(),
        }
    }

    /// What to wait for: its answers, its input if there is something to write, its outputs if they may be read.
    pub fn interests<'a>(&'a self, channel: &Channel, mut add: impl FnMut(&'a OwnedFd, bool)) {
        if let Some(file) = &self.answers {
            add(file, false);
        }
        if let Some(file) = &self.input {
            if !self.pending.is_empty() {
                add(file, true);
            }
        }
        if self.may_read(channel) {
            self.outputs.iter().for_each(|output| add(&output.file, false));
        }
    }

    /// Move what can be moved between the child and the channel.
    pub fn pump(&mut self, channel: &mut Channel) {
        self.read_answers(channel);
        self.write_input(channel);
        while self.may_read(channel) && self.read_outputs(channel) {}
    }

    /// Whether the last answer of a set-up was "ok".
    pub fn succeeded(&self) -> bool {
        self.succeeded
    }

    /// Whether it was answered at all.
    pub fn is_answered(&self) -> bool {
        self.n_answers > 0
    }

    /// Whether nothing more will come of it.
    pub fn is_over(&self) -> bool {
        self.ended.is_some() && self.answers.is_none() && self.outputs.is_empty()
    }

    /// It ended. What others write into its pipes from now on is not its output any more.
    pub fn end(&mut self, ended: Ended) {
        self.ended = Some(ended);
        self.close_input();
        self.quiet_since = Instant::now();
        for output in &mut self.outputs {
            let n_bytes = if self.terminal { TERMINAL_BYTES_MAX } else { system::readable_bytes(output.file.as_fd()) };
            output.left = Some(n_bytes);
        }
        self.outputs.retain(|output| output.left != Some(0));
    }

    /// When to look again at the terminal of one that ended, which others may hold open.
    pub fn looks_at(&self, channel: &Channel) -> Option<Instant> {
        let waits = self.terminal && self.ended.is_some() && self.may_read(channel);
        waits.then(|| self.quiet_since + Duration::from_millis(QUIET_MS))
    }

    /// Nobody listens any more: its output is read and dropped, so that it can go on.
    pub fn detach(&mut self) {
        self.stream = None;
        self.close_input();
    }

    /// Somebody else listens now, on that stream.
    pub fn attach_anew(&mut self, stream: u32) {
        self.stream = Some(stream);
        self.pending.clear();
        (self.received_credit, self.owed_credit) = (WINDOW_BYTES, 0);
        self.send_credit = WINDOW_BYTES.into();
    }

    /// Take bytes for its input. False if they are more than it was granted.
    pub fn take_input(&mut self, channel: &mut Channel, data: &[u8]) -> bool {
        let n_bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let Some(left) = self.received_credit.checked_sub(n_bytes) else { return false };
        self.received_credit = left;
        if self.input.is_some() && !self.input_ends {
            self.pending.extend(data);
            self.write_input(channel);
        } else {
            self.give_back(channel, n_bytes);
        }
        true
    }

    /// No more will come for its input.
    pub fn end_input(&mut self, channel: &mut Channel) {
        if self.terminal && !self.input_ends {
            self.pending.push_back(end_character(self.input.as_ref()));
        }
        self.input_ends = true;
        self.write_input(channel);
    }

    /// The host takes so many more bytes.
    pub fn grant(&mut self, n_bytes: u32) {
        self.send_credit = (self.send_credit + u64::from(n_bytes)).min(CREDIT_BYTES_MAX);
    }

    /// Its terminal has another size.
    pub fn resize(&self, rows: u16, columns: u16) {
        if let (true, Some(output)) = (self.terminal, self.outputs.first()) {
            let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
            let _ = rustix::termios::tcsetwinsize(&output.file, size);
        }
    }

    /// Answer in the child's stead.
    pub fn answer(&mut self, channel: &mut Channel, payload: &[u8]) {
        self.n_answers += 1;
        self.succeeded = payload.starts_with(b"{\"ok\"");
        if let Some(stream) = self.stream {
            channel.queue(Kind::Response, stream, payload);
        }
        if !self.succeeded || matches!(self.task, Task::Setup { .. } | Task::Extract) {
            // That was the stream's last frame: the host may use the number again before the child is gone.
            self.detach();
        }
    }

    /// Whether it was to be a command and never became one.
    pub fn was_refused(&self) -> bool {
        self.n_answers > 0 && !self.succeeded
    }

    fn may_read(&self, channel: &Channel) -> bool {
        // Nothing overtakes the answer.
        let is_heard = self.n_answers > 0 && self.send_credit > 0 && !channel.is_full();
        !self.outputs.is_empty() && (self.stream.is_none() || is_heard)
    }

    fn read_answers(&mut self, channel: &mut Channel) {
        let Some(file) = &self.answers else { return };
        let mut buffer = [0; 4096];
        match rustix::io::read(file, &mut buffer) {
            Ok(0) => self.answers = None,
            Ok(n_read) => self.answer.extend_from_slice(&buffer[..n_read]),
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => self.answers = None,
        }
        while let Some(end) = self.answer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.answer.drain(..=end).collect();
            self.answer(channel, &line[..end]);
        }
        if self.answer.len() > ANSWER_BYTES_MAX {
            self.answers = None;
        }
        if self.answers.is_none() && self.n_answers == 0 && self.task.is_command() {
            self.answer(channel, format!("{{\"ok\":{{\"pid\":{}}}}}", self.pid).as_bytes());
        }
    }

    fn write_input(&mut self, channel: &mut Channel) {
        let Some(file) = &self.input else { return };
        let mut n_done = 0;
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            match rustix::io::write(file, front) {
                Ok(n_written) => {
                    self.pending.drain(..n_written);
                    n_done += n_written;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                // It reads no more: the rest is dropped.
                Err(_) => {
                    n_done += self.pending.len();
                    self.close_input();
                    break;
                }
            }
        }
        if self.pending.is_empty() && self.input_ends {
            self.input = None;
        }
        self.give_back(channel, u32::try_from(n_done).unwrap_or(u32::MAX));
    }

    fn close_input(&mut self) {
        self.input = None;
        self.pending.clear();
    }

    fn give_back(&mut self, channel: &mut Channel, n_bytes: u32) {
        self.owed_credit = self.owed_credit.saturating_add(n_bytes);
        let is_due = self.owed_credit >= CREDIT_BYTES_MIN || (self.owed_credit > 0 && self.pending.is_empty());
        if let (true, Some(stream)) = (is_due, self.stream) {
            channel.queue(Kind::Credit, stream, &self.owed_credit.to_le_bytes());
            self.received_credit = self.received_credit.saturating_add(self.owed_credit).min(WINDOW_BYTES);
            self.owed_credit = 0;
        }
    }

    /// Read each output once. Whether there was anything.
    fn read_outputs(&mut self, channel: &mut Channel) -> bool {
        let mut buffer = vec![0; READ_BYTES];
        let mut any = false;
        let (stream, credit) = (self.stream, &mut self.send_credit);
        let is_quiet = !self.terminal || self.quiet_since.elapsed() >= Duration::from_millis(QUIET_MS);
        self.outputs.retain_mut(|output| {
            let wanted = if stream.is_some() { usize::try_from(*credit).unwrap_or(READ_BYTES) } else { READ_BYTES };
            let wanted = wanted.min(READ_BYTES).min(usize::try_from(output.left.unwrap_or(u64::MAX)).unwrap_or(READ_BYTES));
            if wanted == 0 {
                return output.left != Some(0);
            }
            match rustix::io::read(&output.file, &mut buffer[..wanted]) {
                Ok(0) => false,
                Ok(n_read) => {
                    any = true;
                    if let Some(stream) = stream {
                        channel.queue(output.kind, stream, &buffer[..n_read]);
                        *credit -= n_read as u64;
                    }
                    output.left = output.left.map(|left| left.saturating_sub(n_read as u64));
                    output.left != Some(0)
                }
                Err(Errno::AGAIN | Errno::INTR) => output.left.is_none() || !is_quiet,
                // A terminal whose last user is gone says "input/output error".
                Err(_) => false,
            }
        });
        if any {
            self.quiet_since = Instant::now();
        }
        any
    }
}

/// What a terminal takes for the end of its input.
fn end_character(terminal: Option<&OwnedFd>) -> u8 {
    const CONTROL_D: u8 = 4;
    let settings = terminal.and_then(|file| rustix::termios::tcgetattr(file).ok());
    settings.map_or(CONTROL_D, |settings| settings.special_codes[rustix::termios::SpecialCodeIndex::VEOF])
}
