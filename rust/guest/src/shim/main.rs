//! From the command line to the loop, and what is to be removed behind it.
//!
//! The engine starts a shim in two steps, as it does with conmon: it waits for a byte on the pipe _OCI_STARTPIPE (its end counts too: the
//! daemon was killed just then), starts the machine, and says {"data": PID} or {"data": -1, "message": WHY} on the pipe _OCI_SYNCPIPE.

use std::fs::{DirBuilder, File, remove_dir, remove_file};
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;

use crate::shim::config::{Agent, Config};
use crate::shim::hub::Hub;
use crate::shim::link::Link;
use crate::shim::machine::{Machine, kill_children, listen, start, watch_signals};
use crate::shim::run::{Pipes, Shim, now_ms};
use crate::shim::sink::{ConsoleLog, Log, Old, Sink, Words};
use crate::shim::verdict::{End, write_whole};

/// Largest configuration.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// What a shim makes and removes at its end.
#[derive(Default)]
struct Made {
    sockets: Vec<String>,
    folder: Option<String>,
}

impl Drop for Made {
    fn drop(&mut self) {
        for socket in &self.sockets {
            let _ = remove_file(socket);
        }
        if let Some(folder) = &self.folder {
            let _ = remove_dir(folder); // one that somebody else put something into stays
        }
    }
}

/// Be the shim of one machine until it has ended.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(path), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: isopod-shim CONFIG.json");
        return ExitCode::from(2);
    };
    let (start_pipe, sync_pipe) = (inherited("_OCI_STARTPIPE"), inherited("_OCI_SYNCPIPE"));
    if let Some(mut pipe) = start_pipe {
        wait_for_word(&mut pipe);
    }
    let mut made = Made::default();
    match read_config(Path::new(&path)) {
        Ok(config) => match begin(config.clone(), &mut made) {
            Ok(mut shim) => {
                report(sync_pipe, &json!({"data": shim.hub.vmm_pid}));
                shim.run();
                ExitCode::SUCCESS
            }
            Err(why) => {
                kill_children();
                let _ = write_whole(&config.end_file, &serde_json::to_vec(&End::not_begun(&why)).unwrap_or_default());
                fail(sync_pipe, &why)
            }
        },
        Err(why) => fail(sync_pipe, &why),
    }
}

fn fail(sync_pipe: Option<File>, why: &str) -> ExitCode {
    eprintln!("isopod-shim: {why}");
    report(sync_pipe, &json!({"data": -1, "message": why}));
    ExitCode::FAILURE
}

/// Take over a descriptor named in the environment; the machine does not inherit it.
fn inherited(name: &str) -> Option<File> {
    let number: i32 = std::env::var(name).ok()?.parse().ok().filter(|number| *number > 2)?;
    // SAFETY: who started us says that this descriptor is ours; nothing else was opened yet that could have its number.
    let pipe = unsafe { OwnedFd::from_raw_fd(number) };
    if fcntl_setfd(&pipe, FdFlags::CLOEXEC).is_err() {
        std::mem::forget(pipe); // it is no descriptor at all
        return None;
    }
    Some(pipe.into())
}

fn wait_for_word(pipe: &mut File) {
    let mut byte = [0];
    while let Err(error) = pipe.read(&mut byte) {
        if error.kind() != io::ErrorKind::Interrupted {
            break;
        }
    }
}

fn report(pipe: Option<File>, message: &serde_json::Value) {
    if let Some(mut pipe) = pipe {
        let _ = pipe.write_all(format!("{message}\n").as_bytes()); // a daemon that was killed does not read it
    }
}

fn read_config(path: &Path) -> Result<Config, String> {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(CONFIG_BYTES_MAX).read_to_end(&mut text));
    read.map_err(|error| format!("read {}: {error}", path.display()))?;
    Config::parse(&text)
}

fn begin(config: Config, made: &mut Made) -> Result<Shim, String> {
    let signals = watch_signals().map_err(|error| format!("watch signals: {error}"))?;
    let log = open(&config.log, config.log_bytes_max, Old::Dropped)?;
    let console_log = open(&config.console_log, config.console_bytes_max, Old::Kept)?;
    let words_path = Path::new(&config.console_log).with_file_name("vmm.log");
    let words = Words::open(&words_path.to_string_lossy()).map_err(|error| format!("open {}: {error}", words_path.display()))?;
    let listener = listen(&config.socket, &mut made.sockets)?;
    let monitor_listener = config.monitor_socket.as_deref().map(|path| listen_for_monitors(path, made)).transpose()?;
    let Machine { mut child, console, agent } = start(&config, &mut made.sockets)?;
    let pipes = Pipes::new(console, child.stdin.take(), child.stdout.take(), child.stderr.take());
    let pipes = pipes.map_err(|error| format!("hold the machine's console: {error}"))?;
    let link = match (&config.agent, agent) {
        (Agent::Vsock { vsock, port }, _) => Link::dial(vsock, *port, now_ms()),
        (Agent::Plain(_), Some(stream)) => Link::open(stream),
        (Agent::Plain(_), None) => Link::none(),
    };
    let vmm_pid = i32::try_from(child.id()).map_err(|_| "a pid of impossible size")?;
    let hub = Hub::new(config, vmm_pid, Log(log), ConsoleLog(console_log), now_ms());
    Ok(Shim::new(hub, link, pipes, words, signals, (listener, monitor_listener)))
}

fn open(path: &str, bytes_max: i64, old: Old) -> Result<Sink, String> {
    Sink::open(path, bytes_max, old).map_err(|error| format!("open {path}: {error}"))
}

fn listen_for_monitors(path: &str, made: &mut Made) -> Result<UnixListener, String> {
    if let Some(folder) = Path::new(path).parent() {
        let outcome = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        outcome.map_err(|error| format!("make {}: {error}", folder.display()))?;
        made.folder = Some(folder.to_string_lossy().into_owned());
    }
    listen(path, &mut made.sockets)
}
