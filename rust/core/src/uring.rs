//! One io_uring: positional reads, writes and syncs of files, queued, submitted together and reaped together.
//!
//! It is not a ring for sockets: readiness over epoll is what the event loops know, and what they do well. A file is
//! always "ready" for epoll, so for files this is the only way to have the kernel work while the loop goes on, without a
//! thread of our own.
//!
//! Rules:
//! - Memory named by a queued operation belongs to the kernel until the operation's completion has been reaped; nothing
//!   takes it back earlier, and that is why [`Ring::push`] is unsafe.
//! - The descriptor of the ring itself is what an event loop polls: it is readable while completions wait (io_uring(7)).
//!   An eventfd would say the same with one more system call for every wake-up, and would also speak of completions that
//!   were reaped right after the submission.
//! - A kernel that has no io_uring, or that forbids it (seccomp, kernel.io_uring_disabled), fails in [`Ring::new`].
//!
//! Sources: io_uring(7), io_uring_setup(2), io_uring_enter(2).

use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use rustix::io::Errno;

use crate::error::Result;

/// Completions that fit, per submission entry: who waits for an answer may be four times what one turn submits.
const COMPLETIONS_PER_ENTRY: u32 = 4;

/// linux/fs.h.
const RWF_DSYNC: i32 = 2;

/// One thing to do with a file. `offset` and lengths are in bytes.
#[derive(Debug, Clone, Copy)]
pub enum Operation {
    /// pread(2).
    Read {
        /// The open file.
        fd: RawFd,
        /// Where the bytes go.
        target: *mut u8,
        /// How many at most.
        n_bytes: u32,
        /// From where in the file.
        offset: u64,
    },
    /// pwrite(2).
    Write {
        /// The open file.
        fd: RawFd,
        /// Where the bytes are.
        source: *const u8,
        /// How many at most.
        n_bytes: u32,
        /// To where in the file.
        offset: u64,
        /// Complete only when the data are durable (pwritev2(2), `RWF_DSYNC`).
        durable: bool,
    },
    /// fdatasync(2).
    Sync {
        /// The open file.
        fd: RawFd,
    },
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The number it was queued with.
    pub token: u64,
    /// Bytes moved, or a negative errno.
    pub result: i32,
}

/// The ring. It belongs to one thread at a time.
pub struct Ring {
    ring: IoUring,
    n_in_flight: usize,
}

impl Ring {
    /// Makes a ring that takes `n_entries` (a power of two) operations between two submissions. ENOSYS or EPERM where the
    /// kernel refuses, EOPNOTSUPP where it is too old to know the three operations.
    pub fn new(n_entries: u32) -> Result<Self> {
        let ring = build(n_entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for code in [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE] {
            if !probe.is_supported(code) {
                return Err(Errno::OPNOTSUPP.into());
            }
        }
        Ok(Self { ring, n_in_flight: 0 })
    }

    /// The descriptor to poll: readable while completions wait.
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// How many operations are queued or under way.
    pub fn n_in_flight(&self) -> usize {
        self.n_in_flight
    }

    /// How many may be queued or under way without a completion having to wait in the kernel.
    pub fn n_in_flight_max(&self) -> usize {
        self.ring.params().cq_entries() as usize
    }

    /// Queues an operation; what is queued is submitted early if there is no more room. EBUSY: too many are in flight.
    ///
    /// # Safety
    ///
    /// The memory that `operation` names must stay valid, and must be used by nobody else, until the completion with
    /// `token` has been reaped.
    pub unsafe fn push(&mut self, token: u64, operation: Operation) -> Result<()> {
        if self.n_in_flight >= self.n_in_flight_max() {
            return Err(Errno::BUSY.into());
        }
        let entry = entry(operation).user_data(token);
        // SAFETY: the caller keeps the memory valid; the entry names nothing else.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit()?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(&entry) }.map_err(|_| Errno::BUSY)?;
        }
        self.n_in_flight += 1;
        Ok(())
    }

    /// Gives the kernel all that is queued; returns how many it took.
    pub fn submit(&mut self) -> Result<usize> {
        loop {
            match self.ring.submit() {
                Err(error) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
                done => return Ok(done?),
            }
        }
    }

    /// Appends what has completed to `found`, without waiting.
    pub fn reap(&mut self, found: &mut Vec<Completion>) {
        let before = found.len();
        found.extend(self.ring.completion().map(|entry| completion(&entry)));
        self.n_in_flight -= found.len() - before;
    }

    /// Waits until nothing is in flight. What the completions say is dropped.
    pub fn finish(&mut self) -> Result<()> {
        let mut dropped = Vec::new();
        while self.n_in_flight > 0 {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.raw_os_error() != Some(Errno::INTR.raw_os_error()) => return Err(error.into()),
                _ => self.reap(&mut dropped),
            }
        }
        Ok(())
    }
}

/// Asks for completions without interrupting the thread, which kernels before 5.19 do not know (EINVAL).
fn build(n_entries: u32) -> std::io::Result<IoUring> {
    let n_completions = n_entries * COMPLETIONS_PER_ENTRY;
    match IoUring::builder().setup_cqsize(n_completions).setup_coop_taskrun().build(n_entries) {
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
            IoUring::builder().setup_cqsize(n_completions).build(n_entries)
        }
        done => done,
    }
}

fn entry(operation: Operation) -> squeue::Entry {
    match operation {
        Operation::Read { fd, target, n_bytes, offset } => opcode::Read::new(types::Fd(fd), target, n_bytes).offset(offset).build(),
        Operation::Write { fd, source, n_bytes, offset, durable } => {
            let flags = if durable { RWF_DSYNC } else { 0 };
            opcode::Write::new(types::Fd(fd), source, n_bytes).offset(offset).rw_flags(flags).build()
        }
        Operation::Sync { fd } => opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

fn completion(entry: &cqueue::Entry) -> Completion {
    Completion { token: entry.user_data(), result: entry.result() }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;

    use super::*;

    /// The ring, or None on a kernel that has none for us: the fall-back is tested from Python.
    fn ring() -> Option<Ring> {
        Ring::new(8).ok()
    }

    fn file(name: &str, data: &[u8]) -> File {
        let path = std::env::temp_dir().join(format!("isopod-uring-{}-{name}", std::process::id()));
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all(data).unwrap();
        file
    }

    fn wait(ring: &mut Ring) -> Vec<Completion> {
        let mut found = Vec::new();
        while ring.n_in_flight() > 0 {
            ring.ring.submit_and_wait(1).unwrap();
            ring.reap(&mut found);
        }
        found.sort_by_key(|each| each.token);
        found
    }

    #[test]
    fn more_operations_than_entries_all_complete() {
        let Some(mut ring) = ring() else { return };
        let file = file("many", b"0123456789abcdef");
        let mut targets = [[0_u8; 1]; 16];
        for (index, target) in targets.iter_mut().enumerate() {
            let operation = Operation::Read { fd: file.as_raw_fd(), target: target.as_mut_ptr(), n_bytes: 1, offset: index as u64 };
            // SAFETY: `targets` outlives `wait` below.
            unsafe { ring.push(index as u64, operation) }.unwrap();
        }
        let found = wait(&mut ring);
        assert_eq!(found.iter().map(|each| each.result).collect::<Vec<_>>(), vec![1; 16]);
        assert_eq!(targets.concat(), b"0123456789abcdef");
    }

    #[test]
    fn a_write_is_read_back_and_a_bad_descriptor_is_an_errno() {
        let Some(mut ring) = ring() else { return };
        let file = file("write", b"");
        let source = *b"hello";
        // SAFETY: `source` outlives `wait` below.
        unsafe {
            ring.push(1, Operation::Write { fd: file.as_raw_fd(), source: source.as_ptr(), n_bytes: 5, offset: 3, durable: true }).unwrap();
            ring.push(2, Operation::Sync { fd: -1 }).unwrap();
        }
        let found = wait(&mut ring);
        assert_eq!(found[0], Completion { token: 1, result: 5 });
        assert_eq!(found[1], Completion { token: 2, result: -Errno::BADF.raw_os_error() });
        assert_eq!(file.metadata().unwrap().len(), 8);
    }

    #[test]
    fn what_is_in_flight_is_bounded_and_finish_waits_for_it() {
        let Some(mut ring) = ring() else { return };
        let file = file("bound", b"x");
        for token in 0..ring.n_in_flight_max() {
            // SAFETY: a sync names no memory.
            unsafe { ring.push(token as u64, Operation::Sync { fd: file.as_raw_fd() }) }.unwrap();
        }
        // SAFETY: as above.
        let refused = unsafe { ring.push(99, Operation::Sync { fd: file.as_raw_fd() }) };
        assert_eq!(refused, Err(Errno::BUSY.into()));
        ring.finish().unwrap();
        assert_eq!(ring.n_in_flight(), 0);
    }
}
