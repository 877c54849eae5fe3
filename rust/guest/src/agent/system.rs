//! The system calls of the agent that need `unsafe`, each wrapped once.
//!
//! Source: the manual pages clone3(2) is "clone(2)", signalfd(2), setns(2), ioctl_tty(2), random(4), reboot(2), capabilities(7).

use std::fs::File;
use std::io::{Error, Result};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// A process.
pub type Pid = libc::pid_t;

/// The signals the loop reads instead of being interrupted by.
const SIGNALS: [i32; 3] = [libc::SIGCHLD, libc::SIGINT, libc::SIGTERM];

/// Of linux/random.h and linux/sched.h, which the library lacks or has too narrow.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
const CLONE_INTO_CGROUP: u64 = 1 << 33;
/// As wide as clone3(2) has it.
const SIGCHLD: u64 = 17;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code; 128 and the signal if one killed it.
    pub code: i32,
    /// The signal that killed it.
    pub signal: Option<i32>,
}

fn check(result: i32) -> Result<i32> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

/// Fork: None in the child. The child is born in the cgroup of that folder, if one is given.
///
/// A child that is moved into a cgroup afterwards would wait for a grace period of the kernel; one born there does not.
pub fn fork(cgroup: Option<BorrowedFd<'_>>) -> Result<Option<Pid>> {
    // SAFETY: all-zero is this plain struct's meaning of "nothing wanted".
    let mut wanted: libc::clone_args = unsafe { zeroed() };
    wanted.exit_signal = SIGCHLD;
    if let Some(folder) = cgroup {
        wanted.flags |= CLONE_INTO_CGROUP;
        wanted.cgroup = u64::try_from(folder.as_raw_fd()).unwrap_or(u64::MAX);
    }
    // SAFETY: the struct outlives the call. Without a stack of its own the child goes on here, as after fork(2); the process has one
    // thread, so no lock of the library is held by another one.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut wanted, size_of::<libc::clone_args>()) };
    match Pid::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) if pid > 0 => Ok(Some(pid)),
        _ => Err(Error::last_os_error()),
    }
}

/// End a child at once, without running anything of the parent's.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: it does not return and touches no memory.
    unsafe { libc::_exit(code) }
}

/// The next child that ended, of any parent that is gone too; None if none did.
pub fn reap() -> Option<(Pid, Ended)> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    if pid <= 0 {
        return None;
    }
    let ended = if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        Ended { code: 128 + signal, signal: Some(signal) }
    } else {
        Ended { code: libc::WEXITSTATUS(status), signal: None }
    };
    Some((pid, ended))
}

/// Send a signal; to all but process 1 if `pid` is -1.
pub fn kill(pid: Pid, signal: i32) -> Result<()> {
    // SAFETY: it touches no memory.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Block the signals the loop wants to read, and return where it reads them.
pub fn open_signals() -> Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset(3) and outlives the calls; the descriptor is new and nobody else's.
    unsafe {
        let mut set = zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in SIGNALS {
            libc::sigaddset(&raw mut set, signal);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The signals that came.
pub fn read_signals(fd: BorrowedFd<'_>) -> Vec<i32> {
    const BYTES: usize = size_of::<libc::signalfd_siginfo>();
    let mut buffer = [0; BYTES * 8];
    let n_read = rustix::io::read(fd, &mut buffer).unwrap_or(0);
    // The number of the signal is the first field, four bytes.
    buffer[..n_read].chunks_exact(BYTES).map(|one| i32::from_ne_bytes([one[0], one[1], one[2], one[3]])).collect()
}

/// Undo, in a child, what process 1 does with signals: none is blocked, a broken pipe ends the program again.
pub fn reset_signals() {
    // SAFETY: the set is initialised before it is used; SIG_DFL is a valid action.
    unsafe {
        let mut set = zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Enter a mount namespace; the caller's root becomes that namespace's.
pub fn enter_mounts(namespace: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: it touches no memory.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) }).map(drop)
}

/// Give the caller a copy of its mount namespace.
pub fn unshare_mounts() -> Result<()> {
    // SAFETY: it touches no memory; the process has one thread.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }).map(drop)
}

/// Both ends of a new terminal of the given multiplexer (an open `ptmx`): its slave. The multiplexer's file is the master.
pub fn open_slave(master: BorrowedFd<'_>) -> Result<OwnedFd> {
    let unlocked: i32 = 0;
    // SAFETY: the integer outlives the call; the descriptor is new and nobody else's.
    unsafe {
        check(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked))?;
        let fd = check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Make a terminal the caller's controlling one; the caller leads a session without one.
pub fn control_terminal(slave: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the argument is a plain number.
    check(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Become a user: groups, then group, then user, because only the former user may do it.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> Result<()> {
    // SAFETY: the slice outlives the call, which is told its length.
    unsafe {
        check(libc::setgroups(groups.len(), groups.as_ptr()))?;
        check(libc::setresgid(gid, gid, gid))?;
        check(libc::setresuid(uid, uid, uid)).map(drop)
    }
}

/// Limit the caller's open files, as an init system does for a service.
pub fn limit_files(soft: u64, hard: u64) {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the struct outlives the call.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
}

/// Bytes that can be read at once.
pub fn readable_bytes(fd: BorrowedFd<'_>) -> u64 {
    let mut n_bytes: i32 = 0;
    // SAFETY: the integer outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n_bytes) };
    if result < 0 { 0 } else { u64::try_from(n_bytes).unwrap_or(0) }
}

/// Feed the kernel's generator with bytes nobody else knows, and make it use them at once.
pub fn feed_entropy(random: &File, entropy: &[u8]) -> Result<()> {
    const BYTES_MAX: usize = 512;
    #[repr(C)]
    struct Pool {
        n_bits: i32,
        n_bytes: i32,
        data: [u8; BYTES_MAX],
    }
    let entropy = &entropy[..entropy.len().min(BYTES_MAX)];
    let n_bytes = i32::try_from(entropy.len()).expect("it is at most 512");
    let mut pool = Pool { n_bits: n_bytes * 8, n_bytes, data: [0; BYTES_MAX] };
    pool.data[..entropy.len()].copy_from_slice(entropy);
    // SAFETY: the struct has the layout of `struct rand_pool_info` with its buffer, and outlives the calls.
    unsafe {
        check(libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool))?;
        check(libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG, 0)).map(drop)
    }
}

/// Set the clock to nanoseconds since 1970.
pub fn set_clock(time_ns: u64) -> Result<()> {
    let since = Duration::from_nanos(time_ns);
    let seconds = libc::time_t::try_from(since.as_secs()).map_err(|_| Error::from(std::io::ErrorKind::InvalidInput))?;
    let time = libc::timespec { tv_sec: seconds, tv_nsec: since.subsec_nanos().into() };
    // SAFETY: the struct outlives the call.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) }).map(drop)
}

/// Have ctrl-alt-del send SIGINT to process 1, where the kernel's default is a reboot at once.
pub fn catch_ctrl_alt_del() {
    // SAFETY: it touches no memory.
    unsafe { libc::reboot(libc::RB_DISABLE_CAD) };
}

/// End the machine: its power goes off, or, if `reboots`, it restarts, which is what ends a monitor that has no power to switch. Does not
/// return where the caller is process 1.
pub fn end_machine(reboots: bool) {
    let how = if reboots { libc::RB_AUTOBOOT } else { libc::RB_POWER_OFF };
    // SAFETY: it touches no memory.
    unsafe { libc::reboot(how) };
}

/// Listen on a vsock port, for any host.
pub fn listen_vsock(port: u32) -> Result<OwnedFd> {
    // SAFETY: the descriptor is new and nobody else's; the address is a plain struct that outlives the calls, which are told its length.
    unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let socket = OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, kind, 0))?);
        let mut address: libc::sockaddr_vm = zeroed();
        address.svm_family = u16::try_from(libc::AF_VSOCK).expect("it is 40");
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let length = u32::try_from(size_of::<libc::sockaddr_vm>()).expect("it is 16");
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
        check(libc::listen(socket.as_raw_fd(), 4))?;
        Ok(socket)
    }
}

/// Accept a connection of the host, which is not blocking.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: null asks for no address; the descriptor is new and nobody else's.
    unsafe {
        let fd = check(libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Make a descriptor the caller's stdin, stdout or stderr; it survives an exec.
pub fn put_at(fd: BorrowedFd<'_>, number: RawFd) -> Result<()> {
    // SAFETY: it touches no memory; 0, 1 and 2 are owned by nobody in this program.
    check(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map(drop)
}

/// A pipe: what is read, what is written. Neither survives an exec.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// Have reads and writes return at once.
pub fn set_nonblocking(fd: impl AsFd) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    Ok(rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// Close all descriptors of the caller above a number. Whatever owns them is not used any more: the caller is a child that will not return.
pub fn close_above(number: RawFd) -> Result<()> {
    let first = u32::try_from(number).unwrap_or(0) + 1;
    // SAFETY: it touches no memory; the caller promises that nobody uses the descriptors.
    check(unsafe { libc::close_range(first, u32::MAX, 0) }).map(drop)
}

/// The caller's stderr.
pub fn borrow_stderr() -> BorrowedFd<'static> {
    rustix::stdio::stderr()
}
