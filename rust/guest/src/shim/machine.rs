//! The machine's process: its descriptors, its cgroup, its network, its end with ours.
//!
//! Rules: all that can fail without the process is done before it is made; what fails in it is named. It gets no descriptor but those it was
//! promised. It is killed by the kernel when we die, and what it leaves behind is ours to kill (child subreaper).
//! Source: PR_SET_PDEATHSIG(2const), PR_SET_CHILD_SUBREAPER(2const), Documentation/networking/tuntap.rst.

use std::fs::{File, OpenOptions, read_to_string};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, set_parent_process_death_signal, wait};

use crate::shim::config::{self, Config, Console};

/// The machine's first descriptor behind its stdio.
const FIRST_FD: i32 = 3;
/// How often, and how long each time, the end of what was killed is awaited.
const KILL_ROUNDS_MAX: u32 = 200;
const KILL_ROUND: Duration = Duration::from_millis(1);
/// Longest path of a Unix socket.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What the child is doing, told by a byte before each step, so that its error can be named.
const STEPS: [(u8, &str); 4] =
    [(b'p', "prepare the machine's process"), (b'c', "join the cgroup"), (b'n', "make a network namespace"), (b'x', "start")];

/// The machine's process and our ends of what it was given.
pub struct Machine {
    /// The process.
    pub child: Child,
    /// The console, if it is a socket.
    pub console: Option<UnixStream>,
    /// The channel to the agent, if it is a socket.
    pub agent: Option<UnixStream>,
}

/// Start it. The listening sockets that were made are in `made`, also on failure.
pub fn start(config: &Config, made: &mut Vec<String>) -> Result<Machine, String> {
    let mut console = None;
    let mut agent = None;
    let mut files = Vec::new();
    for file in &config.files {
        files.push(match file {
            config::File::Listen { path } => OwnedFd::from(listen(path, made)?),
            config::File::Console => pair(&mut console)?,
            config::File::Agent => pair(&mut agent)?,
            config::File::Tap { name } => open_tap(name)?,
        });
    }
    let child = spawn(config, &files)?;
    Ok(Machine { child, console, agent })
}

/// A listening Unix socket that only we and root may open; what stood at its path is replaced.
pub fn listen(path: &str, made: &mut Vec<String>) -> Result<UnixListener, String> {
    let _ = std::fs::remove_file(path);
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let outcome = with_short_path(path, |path| UnixListener::bind(path));
    rustix::process::umask(mask);
    if outcome.is_ok() {
        made.push(path.to_owned());
    }
    outcome.and_then(|listener| listener.set_nonblocking(true).map(|()| listener)).map_err(|error| format!("listen at {path}: {error}"))
}

/// Do something with a socket's path, however long it is.
pub fn with_short_path<T>(path: &str, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let path = Path::new(path);
    match (path.parent(), path.file_name()) {
        (Some(folder), Some(name)) if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX => {
            let folder = File::open(folder)?;
            act(&Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name))
        }
        _ => act(path),
    }
}

/// Let this process be the one that adopts and reaps what the machine leaves behind, and the last that the kernel kills for memory.
/// Returns what the machine's own wish to be spared was.
pub fn become_keeper() -> String {
    let _ = rustix::process::set_child_subreaper(Some(getpid()));
    let old = read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    old.trim().to_owned()
}

/// Kill every child that is left, and theirs, which become ours then. Who cannot die now is left to the kernel.
pub fn kill_children() {
    let pid = getpid().as_raw_nonzero();
    for _ in 0..KILL_ROUNDS_MAX {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        let children = read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        if children.trim().is_empty() {
            return;
        }
        for child in children.split_whitespace().flat_map(str::parse).filter_map(Pid::from_raw) {
            let _ = kill_process(child, Signal::KILL);
        }
        std::thread::sleep(KILL_ROUND);
    }
}

/// Start the program that asks the machine to end; it learns the machine's pid as MAINPID.
pub fn ask_to_end(config: &Config, argv: &[String], vmm_pid: i32) -> io::Result<Child> {
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).env_clear().envs(&config.env).env("MAINPID", vmm_pid.to_string()).current_dir(&config.cwd);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec of a process with one thread; only a system call is made.
    unsafe { command.pre_exec(become_child) };
    command.spawn()
}

fn pair(ours: &mut Option<UnixStream>) -> Result<OwnedFd, String> {
    let make = || {
        let (mine, theirs) = UnixStream::pair()?;
        mine.set_nonblocking(true)?;
        Ok((mine, theirs))
    };
    let (mine, theirs) = make().map_err(|error: io::Error| format!("make a socket pair: {error}"))?;
    *ours = Some(mine);
    Ok(theirs.into())
}

fn spawn(config: &Config, files: &[OwnedFd]) -> Result<Child, String> {
    let cgroups = open_cgroups(config)?;
    let first_free = FIRST_FD + i32::try_from(files.len()).expect("they are few");
    // Out of the way of the numbers they will have, and those numbers taken, so that nothing of the standard library's lies there.
    let place = || -> io::Result<_> {
        let moved: Vec<OwnedFd> = files.iter().map(|file| rustix::io::fcntl_dupfd_cloexec(file, first_free)).collect::<Result<_, _>>()?;
        let mut fillers = vec![File::open("/dev/null")?];
        while fillers.last().is_some_and(|filler| filler.as_raw_fd() < first_free) {
            fillers.push(File::open("/dev/null")?);
        }
        Ok((moved, fillers, rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?))
    };
    let (moved, _fillers, (steps, step)) = place().map_err(|error| format!("make the machine's descriptors: {error}"))?;
    let mut command = Command::new(&config.argv[0]);
    command.args(&config.argv[1..]).env_clear().envs(&config.env).current_dir(&config.cwd);
    let stdio = if config.console == Console::Stdio { Stdio::piped } else { Stdio::null };
    command.stdin(stdio()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let raw: Vec<i32> = moved.iter().map(AsRawFd::as_raw_fd).collect();
    let (own_network, parent, spared) = (config.own_network, getpid(), become_keeper());
    let step = File::from(step);
    let child_step = step.try_clone().map_err(|error| format!("make the machine's descriptors: {error}"))?;
    let prepare = move || {
        (&child_step).write_all(b"p")?;
        become_child()?;
        if rustix::process::getppid() != Some(parent) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let _ = std::fs::write("/proc/self/oom_score_adj", &spared);
        (&child_step).write_all(b"c")?;
        cgroups.iter().try_for_each(|mut cgroup| cgroup.write_all(b"0"))?;
        if own_network {
            (&child_step).write_all(b"n")?;
            unshare_network()?;
        }
        place_files(&raw)?;
        (&child_step).write_all(b"x")
    };
    // SAFETY: between fork and exec of a process with one thread: the heap is whole, and no lock is held by anybody.
    unsafe { command.pre_exec(prepare) };
    let outcome = command.spawn();
    drop((command, step));
    outcome.map_err(|error| failed_step(steps, &config.argv[0], &error))
}

/// Undo for a child what we did to ourselves, and let it die with us.
fn become_child() -> io::Result<()> {
    // SAFETY: the set is made by sigemptyset before it is read, and lives through the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        if libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

fn open_cgroups(config: &Config) -> Result<Vec<File>, String> {
    let open = |path: &String| OpenOptions::new().write(true).open(path).map_err(|error| format!("open {path}: {error}"));
    config.cgroup_procs.iter().map(open).collect()
}

fn failed_step(steps: OwnedFd, program: &str, error: &io::Error) -> String {
    let mut told = Vec::new();
    let _ = File::from(steps).read_to_end(&mut told);
    let doing = STEPS.iter().find(|(letter, _)| told.last() == Some(letter)).map_or("make the machine's process", |step| step.1);
    if doing == "start" || told.is_empty() { format!("start {program}: {error}") } else { format!("{doing}: {error}") }
}

fn unshare_network() -> io::Result<()> {
    // SAFETY: the process has one thread and shares nothing that this flag concerns.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET)? };
    Ok(())
}

fn place_files(files: &[i32]) -> io::Result<()> {
    for (file, number) in files.iter().zip(FIRST_FD..) {
        // SAFETY: the numbers from FIRST_FD on are held by fillers that this process never uses; dup2 replaces them without close-on-exec.
        if unsafe { libc::dup2(*file, number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Open an existing tap. Making one here was rejected: who makes it also sets its bridge, and removes it.
fn open_tap(name: &str) -> Result<OwnedFd, String> {
    let fail = |error: io::Error| format!("open the tap {name}: {error}");
    if !is_interface(name) {
        return Err(format!("open the tap {name}: there is no such interface"));
    }
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun").map_err(fail)?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("they are the lower 15 bits");
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call is over.
    if unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        return Err(fail(io::Error::last_os_error()));
    }
    Ok(device.into())
}

fn is_interface(name: &str) -> bool {
    let text = read_to_string("/proc/self/net/dev").unwrap_or_default();
    text.lines().filter_map(|line| line.split_once(':')).any(|(found, _)| found.trim() == name)
}

/// A descriptor that yields a byte pattern for each of our signals; they are blocked from now on.
pub fn watch_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is made by sigemptyset before it is read, and lives through the calls; signalfd's descriptor is nobody else's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGCHLD] {
            libc::sigaddset(&raw mut set, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// The numbers of the signals that came.
pub fn read_signals(from: impl AsFd) -> Vec<u32> {
    const SIZE: usize = std::mem::size_of::<libc::signalfd_siginfo>();
    let mut buffer = [0_u8; SIZE * 8];
    let n_bytes = rustix::io::read(from, &mut buffer).unwrap_or(0);
    buffer[..n_bytes].chunks_exact(SIZE).map(|info| u32::from_ne_bytes([info[0], info[1], info[2], info[3]])).collect()
}
