//! Children and their pipes: a command of the sandbox, or a function of this program.
//!
//! Both ends of every pipe close with an exec. A child that does not exec closes all that is not its own, because a pipe's other end among
//! it would keep somebody else's file from ending.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use serde_json::Value;

use super::command::{self, Stdio};
use super::requests::{self, Command, Failure};
use super::work::{Pipes, Task, Work};
use super::{
    root, setup,
    system::{self, Pid},
};
use crate::protocol::Kind;

/// Where a child of this program answers: its stderr.
const ANSWERS: i32 = 2;
/// What an empty pipe takes at once in any case.
const ORDER_BYTES_MAX: usize = 32 << 10;

/// The cgroup of a command.
pub fn group_of(task: Task) -> Option<&'static str> {
    match task {
        Task::Main => Some("main"),
        Task::Exec => Some("exec"),
        _ => None,
    }
}

/// Start a command.
pub fn run(task: Task, stream: u32, wanted: &Command, mounts: BorrowedFd<'_>) -> io::Result<Work> {
    let group = group_of(task).expect("it is a command");
    let hostname = hostname();
    let (answers, answers_end) = system::pipe()?;
    let (stdio, input, outputs) = if wanted.terminal { open_terminal(wanted)? } else { open_pipes(wanted)? };
    let cgroup = setup::open_group(group)?;
    let n_oom_before = setup::n_oom_kills(group);
    if let Some(pid) = system::fork(Some(cgroup.as_fd()))? {
        drop((stdio, answers_end));
        for file in [Some(&answers), input.as_ref()].into_iter().flatten().chain(outputs.iter().map(|(file, _)| file)) {
            system::set_nonblocking(file)?;
        }
        let mut work = Work::new(pid, task, stream, Pipes { answers, input, outputs });
        (work.terminal, work.n_oom_before) = (wanted.terminal, n_oom_before);
        return Ok(work);
    }
    let failure = match command::settle(mounts) {
        Ok(accounts) => command::become_command(wanted, &accounts, &stdio, &hostname),
        Err(failure) => failure,
    };
    say(&answers_end, &Err(failure));
    system::exit_now(127)
}

/// A child that waits to be told the main command, and has done all that does not depend on it. In a template's memory it waits for every
/// clone, which only has to tell it. One that is not told anything ends.
pub struct Waiting {
    pid: Pid,
    orders: OwnedFd,
    pipes: Pipes,
    n_oom_before: u64,
}

/// Start one.
pub fn wait(mounts: BorrowedFd<'_>) -> io::Result<Waiting> {
    let group = group_of(Task::Main).expect("it is a command");
    let (answers, answers_end) = system::pipe()?;
    let (orders_end, orders) = system::pipe()?;
    let (stdin, input) = system::pipe()?;
    let (output, stdout) = system::pipe()?;
    let (errors, stderr) = system::pipe()?;
    let nothing = open_nothing()?;
    let cgroup = setup::open_group(group)?;
    if let Some(pid) = system::fork(Some(cgroup.as_fd()))? {
        for file in [&answers, &orders, &input, &output, &errors] {
            system::set_nonblocking(file)?;
        }
        let outputs = vec![(output, Kind::Stdout), (errors, Kind::Stderr)];
        let pipes = Pipes { answers, input: Some(input), outputs };
        return Ok(Waiting { pid, orders, pipes, n_oom_before: setup::n_oom_kills(group) });
    }
    drop((answers, orders, input, output, errors));
    let accounts = command::settle(mounts);
    let mut order = Vec::new();
    if File::from(orders_end).read_to_end(&mut order).is_err() || order.is_empty() {
        system::exit_now(0);
    }
    let outcome = accounts.and_then(|accounts| Ok((accounts, requests::parse::<Command>(&order)?)));
    let failure = outcome.map_or_else(
        |failure| failure,
        |(accounts, wanted)| {
            let files = Stdio { stdin: if wanted.stdin { stdin } else { nothing }, stdout, stderr, is_terminal: false };
            command::become_command(&wanted, &accounts, &files, &hostname())
        },
    );
    say(&answers_end, &Err(failure));
    system::exit_now(127)
}

impl Waiting {
    /// Tell it the command, which has no terminal; None if it cannot take it.
    pub fn begin(self, stream: u32, stdin: bool, order: &[u8]) -> Option<Work> {
        let is_told = order.len() <= ORDER_BYTES_MAX && rustix::io::write(&self.orders, order) == Ok(order.len());
        let Pipes { answers, input, outputs } = self.pipes;
        let mut work = Work::new(self.pid, Task::Main, stream, Pipes { answers, input: input.filter(|_| stdin), outputs });
        work.n_oom_before = self.n_oom_before;
        is_told.then_some(work)
    }
}

fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn open_nothing() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

type Ends = (Stdio, Option<OwnedFd>, Vec<(OwnedFd, Kind)>);

fn open_pipes(wanted: &Command) -> io::Result<Ends> {
    let (stdin, input) = if wanted.stdin {
        let (stdin, input) = system::pipe()?;
        (stdin, Some(input))
    } else {
        (open_nothing()?, None)
    };
    let (output, stdout) = system::pipe()?;
    let (errors, stderr) = system::pipe()?;
    Ok((Stdio { stdin, stdout, stderr, is_terminal: false }, input, vec![(output, Kind::Stdout), (errors, Kind::Stderr)]))
}

fn open_terminal(wanted: &Command) -> io::Result<Ends> {
    let sandbox = root::Root::open(setup::ROOT.as_ref())?;
    let master = sandbox.file("/dev/pts/ptmx".as_ref(), OFlags::RDWR | OFlags::NOCTTY)?;
    let slave = system::open_slave(master.as_fd())?;
    if wanted.rows > 0 && wanted.columns > 0 {
        let size = rustix::termios::Winsize { ws_row: wanted.rows, ws_col: wanted.columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&master, size)?;
    }
    let stdio = Stdio { stdin: slave.try_clone()?, stdout: slave.try_clone()?, stderr: slave, is_terminal: true };
    let input = wanted.stdin.then(|| master.try_clone()).transpose()?;
    Ok((stdio, input, vec![(master, Kind::Stdout)]))
}

/// Run a function of this program in a child. With `mounts` it runs in the sandbox; then its stdin and stdout are the stream's DATA.
pub fn spawn(
    task: Task,
    stream: u32,
    mounts: Option<BorrowedFd<'_>>,
    run: impl FnOnce() -> Result<Value, Failure>,
) -> Result<Work, Failure> {
    let failed = |error: io::Error| Failure::failed("a process", error);
    let (answers, answers_end) = system::pipe().map_err(failed)?;
    let (stdin, input) = system::pipe().map_err(failed)?;
    let (output, stdout) = system::pipe().map_err(failed)?;
    if let Some(pid) = system::fork(None).map_err(failed)? {
        drop((answers_end, stdin, stdout));
        for file in [&answers, &input, &output] {
            system::set_nonblocking(file).map_err(failed)?;
        }
        let input = (task == Task::Extract).then_some(input);
        let outputs = if task == Task::Archive { vec![(output, Kind::Data)] } else { Vec::new() };
        return Ok(Work::new(pid, task, stream, Pipes { answers, input, outputs }));
    }
    system::reset_signals();
    let ready = mounts.map_or(Ok(()), system::enter_mounts).and_then(|()| only_these(&stdin, &stdout, &answers_end));
    // Archives say "ok" before their bytes, and so answer by themselves (`files`).
    let outcome = ready.map_err(failed).and_then(|()| run());
    let code = i32::from(outcome.is_err());
    if outcome.is_err() || task != Task::Archive {
        say(system::borrow_stderr(), &outcome);
    }
    system::exit_now(code)
}

/// Keep nothing of process 1's open: a pipe's other end among it would never see the end of its file.
fn only_these(stdin: &OwnedFd, stdout: &OwnedFd, answers: &OwnedFd) -> io::Result<()> {
    system::put_at(stdin.as_fd(), 0)?;
    system::put_at(stdout.as_fd(), 1)?;
    system::put_at(answers.as_fd(), ANSWERS)?;
    system::close_above(ANSWERS)
}

fn say(file: impl AsFd, outcome: &Result<Value, Failure>) {
    let mut line = requests::response(outcome);
    line.push(b'\n');
    let _ = rustix::io::write(file, &line);
}
