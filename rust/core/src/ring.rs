//! A pair of single-producer, single-consumer byte rings in one memfd: what two shards send each other.
//!
//! Each of the two ends ([`Ring`]) writes into one ring and reads from the other. A ring carries messages as records: a header of
//! eight bytes (length, a flag "more of this message follows", a check word), the bytes, padding to eight. A message over a quarter
//! of the ring goes as several records, so that any message fits through any ring.
//!
//! Positions only grow; their low bits are places in the ring. The producer publishes `tail` after its bytes (release), the consumer
//! reads it before them (acquire), and the same the other way round for `head`. Who finds nothing to do says so in a flag (`asleep`,
//! `waiting`), fences, and looks again; who publishes fences and looks at the flag: so a wake-up is sent when, and only when, the
//! other end needs one. How it is woken (an eventfd) is the caller's business.
//!
//! The peer is not trusted, it may have crashed half-way: own positions are never read back from the shared memory, each shared
//! word is read once, and what does not fit ends in [`Error::Ring`], never outside the mapping. The memfd is sealed, so that nobody can
//! shrink it under us. Sources: memfd_create(2), fcntl(2) on seals; Lamport, "Proving the Correctness of Multiprocess Programs" (1977).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::error::{Error, Result};

/// The smallest ring, in bytes.
pub const RING_BYTES_MIN: usize = 4096;
/// The largest ring, in bytes.
pub const RING_BYTES_MAX: usize = 1 << 30;
/// Where the first ring's bytes begin: the page before holds the positions.
const DATA_OFFSET: usize = 4096;
const HEADER_BYTES: usize = 8;
const MORE: u32 = 1 << 31;
const CHECK: u32 = 0x5A5A_A5A5;

/// One word that two processes share, alone in its cache line.
#[repr(C, align(64))]
struct Line<T>(T);

/// The shared words of one direction.
#[repr(C)]
struct Control {
    /// Bytes written so far; the producer's.
    tail: Line<AtomicUsize>,
    /// Bytes read so far; the consumer's.
    head: Line<AtomicUsize>,
    /// Whether the consumer wants to be woken for the next message.
    asleep: Line<AtomicU32>,
    /// Whether the producer wants to be woken when there is room.
    waiting: Line<AtomicU32>,
}

/// The mapped memfd.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    n_bytes: usize,
}

// SAFETY: the mapping is plain memory that any thread may use; all that is shared in it is reached through atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Ring` gives access to it only through `&mut self`.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `mmap` gave, and every pointer into it dies with us.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.n_bytes) };
    }
}

/// A message that can be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ready {
    Nothing,
    /// A whole message of so many bytes stands in the ring.
    InPlace(usize),
    /// The message was put together in `partial`.
    Joined,
}

/// One end of the pair.
#[derive(Debug)]
pub struct Ring {
    mapping: Mapping,
    capacity: usize,
    message_bytes_max: usize,
    /// The direction we write, 0 or 1; we read the other.
    side: usize,
    out_tail: usize,
    /// What we last saw of the peer's head.
    out_head: usize,
    /// How much of the message at hand is already in the ring.
    n_sent: usize,
    in_head: usize,
    /// What we last saw of the peer's tail.
    in_tail: usize,
    partial: Vec<u8>,
    ready: Ready,
}

/// Makes the memfd of a pair of empty rings of `n_bytes` each: a power of two, 4 KiB to 1 GiB, else EINVAL.
pub fn create(n_bytes: usize) -> Result<OwnedFd> {
    if !(RING_BYTES_MIN..=RING_BYTES_MAX).contains(&n_bytes) || !n_bytes.is_power_of_two() {
        return Err(Errno::INVAL.into());
    }
    let fd = memfd_create("isopod-ring", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, (DATA_OFFSET + 2 * n_bytes) as u64)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

impl Ring {
    /// Maps one end of a pair. Each end is for one owner at a time, and an end that was used cannot be opened again.
    ///
    /// EINVAL: not a memfd of [`create`], or `side` is not 0 or 1.
    pub fn open(fd: BorrowedFd<'_>, side: usize, message_bytes_max: usize) -> Result<Self> {
        let n_bytes = usize::try_from(fstat(fd)?.st_size).unwrap_or(0);
        let capacity = n_bytes.saturating_sub(DATA_OFFSET) / 2;
        let is_ours = (RING_BYTES_MIN..=RING_BYTES_MAX).contains(&capacity) && capacity.is_power_of_two();
        if side > 1 || !is_ours || n_bytes != DATA_OFFSET + 2 * capacity || !fcntl_get_seals(fd)?.contains(SealFlags::SHRINK) {
            return Err(Errno::INVAL.into());
        }
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(ptr::null_mut(), n_bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or(Errno::NOMEM)?;
        Ok(Self {
            mapping: Mapping { start, n_bytes },
            capacity,
            message_bytes_max,
            side,
            out_tail: 0,
            out_head: 0,
            n_sent: 0,
            in_head: 0,
            in_tail: 0,
            partial: Vec::new(),
            ready: Ready::Nothing,
        })
    }

    // --- the producer -------------------------------------------------------------------------------------------------

    /// Writes a message, or as much of it as fits; returns whether all of it is in the ring.
    ///
    /// After `false` the same message must be given again: what is in the ring already is skipped. Nothing is seen by the
    /// peer before [`Ring::publish`].
    pub fn push(&mut self, message: &[u8]) -> Result<bool> {
        if message.len() > self.message_bytes_max {
            return Err(Error::ring(format!("a message of {} bytes is over {}", message.len(), self.message_bytes_max)));
        }
        loop {
            let rest = &message[self.n_sent.min(message.len())..];
            let n_bytes = rest.len().min(self.record_bytes_max());
            if !self.has_room(HEADER_BYTES + padded(n_bytes))? {
                return Ok(false);
            }
            let is_last = n_bytes == rest.len();
            self.write_record(&rest[..n_bytes], !is_last);
            if is_last {
                self.n_sent = 0;
                return Ok(true);
            }
            self.n_sent += n_bytes;
        }
    }

    /// Shows the peer what was pushed; returns whether it sleeps and must be woken.
    pub fn publish(&mut self) -> bool {
        let control = self.control(self.side);
        control.tail.0.store(self.out_tail, Ordering::Release);
        fence(Ordering::SeqCst);
        take_flag(&control.asleep.0)
    }

    /// Asks to be woken when there is room; returns false if there is room already (then nobody will be).
    pub fn wait_room(&mut self) -> Result<bool> {
        let seen = self.out_head;
        let control = self.control(self.side);
        control.waiting.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.refresh_head()?;
        if self.out_head == seen {
            return Ok(true);
        }
        self.control(self.side).waiting.0.store(0, Ordering::Relaxed);
        Ok(false)
    }

    fn record_bytes_max(&self) -> usize {
        self.capacity / 4 - HEADER_BYTES
    }

    /// Returns whether so many bytes are free, looking at the peer's head only if our last look does not suffice.
    fn has_room(&mut self, n_bytes: usize) -> Result<bool> {
        if self.capacity - self.out_tail.wrapping_sub(self.out_head) < n_bytes {
            self.refresh_head()?;
        }
        Ok(self.capacity - self.out_tail.wrapping_sub(self.out_head) >= n_bytes)
    }

    fn refresh_head(&mut self) -> Result<()> {
        let head = self.control(self.side).head.0.load(Ordering::Acquire);
        // It lies between what we saw last and what we wrote, or the peer lies.
        if head.wrapping_sub(self.out_head) > self.out_tail.wrapping_sub(self.out_head) || head % HEADER_BYTES != 0 {
            return Err(Error::ring("the reader's position is not in the ring"));
        }
        self.out_head = head;
        Ok(())
    }

    /// Writes one record; the caller made sure of the room.
    fn write_record(&mut self, bytes: &[u8], more: bool) {
        #[expect(clippy::cast_possible_truncation, reason = "at most a quarter of RING_BYTES_MAX")]
        let word = bytes.len() as u32 | if more { MORE } else { 0 };
        let header = u64::from(word) | u64::from(word ^ CHECK) << 32;
        self.write_bytes(self.out_tail, &header.to_ne_bytes());
        self.write_bytes(self.out_tail.wrapping_add(HEADER_BYTES), bytes);
        self.out_tail = self.out_tail.wrapping_add(HEADER_BYTES + padded(bytes.len()));
    }

    fn write_bytes(&mut self, position: usize, bytes: &[u8]) {
        let place = position & (self.capacity - 1);
        let n_first = bytes.len().min(self.capacity - place);
        let data = self.data(self.side);
        // SAFETY: `place + n_first <= capacity` and the rest is shorter than the ring, so both pieces lie in this ring's bytes;
        // `bytes` is our own memory. An honest peer does not read them before `publish`; a hostile one reads garbage.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), data.add(place), n_first);
            ptr::copy_nonoverlapping(bytes.as_ptr().add(n_first), data, bytes.len() - n_first);
        }
    }

    // --- the consumer -------------------------------------------------------------------------------------------------

    /// Returns the length of the next message, None if there is no whole one now. It stays until [`Ring::take`].
    pub fn peek(&mut self) -> Result<Option<usize>> {
        loop {
            match self.ready {
                Ready::InPlace(n_bytes) => return Ok(Some(n_bytes)),
                Ready::Joined => return Ok(Some(self.partial.len())),
                Ready::Nothing => {}
            }
            let Some((n_bytes, more)) = self.read_header()? else { return Ok(None) };
            if self.partial.len() + n_bytes > self.message_bytes_max {
                return Err(Error::ring(format!("a message is over {} bytes", self.message_bytes_max)));
            }
            if more || !self.partial.is_empty() {
                self.join(n_bytes);
                self.ready = if more { Ready::Nothing } else { Ready::Joined };
            } else {
                self.ready = Ready::InPlace(n_bytes);
            }
        }
    }

    /// Copies the message that [`Ring::peek`] announced, whose length `buffer` has, and goes on to the next.
    pub fn take(&mut self, buffer: &mut [u8]) {
        match self.ready {
            Ready::InPlace(n_bytes) => {
                assert_eq!(buffer.len(), n_bytes, "take follows peek");
                self.read_bytes(buffer);
            }
            Ready::Joined => {
                buffer.copy_from_slice(&self.partial);
                self.partial = Vec::new(); // a large message's memory goes with it
            }
            Ready::Nothing => panic!("take follows peek"),
        }
        self.ready = Ready::Nothing;
    }

    /// Gives the room of what was taken back; returns whether the peer waits for it and must be woken.
    pub fn release(&mut self) -> bool {
        let control = self.control(1 - self.side);
        control.head.0.store(self.in_head, Ordering::Release);
        fence(Ordering::SeqCst);
        take_flag(&control.waiting.0)
    }

    /// Asks to be woken for the next message; returns false if there is one already (then nobody will be).
    pub fn may_sleep(&mut self) -> bool {
        let control = self.control(1 - self.side);
        control.asleep.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.ready == Ready::Nothing && control.tail.0.load(Ordering::Acquire) == self.in_head {
            return true;
        }
        control.asleep.0.store(0, Ordering::Relaxed);
        false
    }

    /// Returns (bytes, more follow) of the record at our head, None if there is none; all of it is then in the ring.
    fn read_header(&mut self) -> Result<Option<(usize, bool)>> {
        if self.in_tail == self.in_head {
            let tail = self.control(1 - self.side).tail.0.load(Ordering::Acquire);
            if tail.wrapping_sub(self.in_head) > self.capacity || tail % HEADER_BYTES != 0 {
                return Err(Error::ring("the writer's position is not in the ring"));
            }
            self.in_tail = tail;
            if tail == self.in_head {
                return Ok(None);
            }
        }
        let place = self.in_head & (self.capacity - 1);
        // SAFETY: positions are multiples of eight and the ring's size too, so that the eight bytes at `place` lie in the ring and are
        // aligned. Volatile: read once, so that what is checked is what is used, whatever the peer writes meanwhile.
        #[expect(clippy::cast_ptr_alignment, reason = "see above")]
        let header = unsafe { self.data(1 - self.side).add(place).cast::<u64>().read_volatile() };
        #[expect(clippy::cast_possible_truncation, reason = "the halves of the header")]
        let (word, check) = (header as u32, (header >> 32) as u32);
        let n_bytes = (word & !MORE) as usize;
        let n_there = self.in_tail.wrapping_sub(self.in_head);
        if word ^ CHECK != check || n_bytes > self.record_bytes_max() || HEADER_BYTES + padded(n_bytes) > n_there {
            return Err(Error::ring("a record's length is damaged"));
        }
        Ok(Some((n_bytes, word & MORE != 0)))
    }

    fn join(&mut self, n_bytes: usize) {
        let mut partial = std::mem::take(&mut self.partial);
        let n_before = partial.len();
        partial.resize(n_before + n_bytes, 0);
        self.read_bytes(&mut partial[n_before..]);
        self.partial = partial;
    }

    /// Copies the bytes of the record at our head, whose length was checked, and steps over it.
    fn read_bytes(&mut self, buffer: &mut [u8]) {
        let place = self.in_head.wrapping_add(HEADER_BYTES) & (self.capacity - 1);
        let n_first = buffer.len().min(self.capacity - place);
        let data = self.data(1 - self.side);
        // SAFETY: as in `write_bytes`: both pieces lie in the ring's bytes, and `buffer` is our own. An honest peer does not write there
        // before `release`; from a hostile one we get garbage bytes, whose number is still ours.
        unsafe {
            ptr::copy_nonoverlapping(data.add(place), buffer.as_mut_ptr(), n_first);
            ptr::copy_nonoverlapping(data, buffer.as_mut_ptr().add(n_first), buffer.len() - n_first);
        }
        self.in_head = self.in_head.wrapping_add(HEADER_BYTES + padded(buffer.len()));
    }

    // --- both ---------------------------------------------------------------------------------------------------------

    fn control(&self, direction: usize) -> &Control {
        // SAFETY: two `Control`s lie in the first page of the mapping, which is page-aligned and lives as long as we do; every
        // bit pattern is valid for atomics, and nobody has a plain reference to them.
        #[expect(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
        unsafe {
            &*self.mapping.start.as_ptr().cast::<Control>().add(direction)
        }
    }

    fn data(&self, direction: usize) -> *mut u8 {
        // SAFETY: `direction` is 0 or 1, and the mapping holds two rings after its first page.
        unsafe { self.mapping.start.as_ptr().add(DATA_OFFSET + direction * self.capacity) }
    }
}

const fn padded(n_bytes: usize) -> usize {
    n_bytes.next_multiple_of(HEADER_BYTES)
}

/// Returns whether the flag was up, and takes it down.
fn take_flag(flag: &AtomicU32) -> bool {
    flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::AcqRel) != 0
}

const _: () = assert!(2 * size_of::<Control>() <= DATA_OFFSET);

#[cfg(test)]
#[expect(clippy::cast_ptr_alignment, reason = "words at multiples of eight in a page-aligned mapping")]
mod tests {
    use std::os::fd::AsFd;
    use std::thread;

    use super::*;

    const MESSAGE_BYTES_MAX: usize = 1 << 20;

    fn pair(n_bytes: usize) -> (Ring, Ring) {
        let fd = create(n_bytes).unwrap();
        let open = |side| Ring::open(fd.as_fd(), side, MESSAGE_BYTES_MAX).unwrap();
        (open(0), open(1))
    }

    fn pop(ring: &mut Ring) -> Option<Vec<u8>> {
        let n_bytes = ring.peek().unwrap()?;
        let mut message = vec![0; n_bytes];
        ring.take(&mut message);
        ring.release();
        Some(message)
    }

    /// A message that can be told from every other.
    fn message(number: usize, n_bytes: usize) -> Vec<u8> {
        (0..n_bytes).map(|at| u8::try_from((number * 31 + at * 7) % 251).unwrap()).collect()
    }

    #[test]
    fn messages_come_out_as_they_went_in() {
        let (mut left, mut right) = pair(4096);
        for text in [b"".as_slice(), b"one", b"eight by", &[7; 500]] {
            assert!(left.push(text).unwrap());
        }
        assert_eq!(pop(&mut right), None, "not before publish");
        left.publish();
        for text in [b"".as_slice(), b"one", b"eight by", &[7; 500]] {
            assert_eq!(pop(&mut right).unwrap(), text);
        }
        assert_eq!(pop(&mut right), None);
        assert!(right.push(b"back").unwrap());
        right.publish();
        assert_eq!(pop(&mut left).unwrap(), b"back");
    }

    #[test]
    fn a_full_ring_takes_what_fits_and_goes_on_later() {
        let (mut left, mut right) = pair(4096);
        let large = message(1, 20_000);
        assert!(!left.push(&large).unwrap());
        left.publish();
        assert!(left.wait_room().unwrap(), "no room yet");
        let mut whole = None;
        for _ in 0..100 {
            whole = pop(&mut right);
            if whole.is_some() {
                break;
            }
            assert!(right.release() || !left.wait_room().unwrap(), "who waits for room is told");
            left.push(&large).unwrap();
            left.publish();
        }
        assert_eq!(whole.unwrap(), large);
    }

    #[test]
    fn wake_ups_are_asked_for_once() {
        let (mut left, mut right) = pair(4096);
        assert!(right.may_sleep());
        left.push(b"x").unwrap();
        assert!(left.publish(), "the consumer sleeps");
        left.push(b"y").unwrap();
        assert!(!left.publish(), "it was woken already");
        assert!(!right.may_sleep(), "there is something");
        pop(&mut right).unwrap();
        pop(&mut right).unwrap();
        assert!(right.may_sleep());
    }

    #[test]
    fn too_large_is_refused_on_both_sides() {
        let fd = create(4096).unwrap();
        let mut left = Ring::open(fd.as_fd(), 0, 5000).unwrap();
        let mut right = Ring::open(fd.as_fd(), 1, 100).unwrap();
        assert!(matches!(left.push(&[0; 5001]), Err(Error::Ring { .. })));
        assert!(left.push(&[0; 101]).unwrap());
        left.publish();
        assert!(matches!(right.peek(), Err(Error::Ring { .. })));
    }

    #[test]
    fn damaged_words_are_errors() {
        for (at, word) in [(0, 3_usize), (0, 1 << 20), (0, usize::MAX - 7), (DATA_OFFSET, usize::MAX), (DATA_OFFSET, 0)] {
            let (mut left, mut right) = pair(4096);
            left.push(b"good").unwrap();
            left.publish();
            // SAFETY: a word inside the mapping, aligned; no other thread runs.
            unsafe { right.mapping.start.as_ptr().add(at).cast::<usize>().write_volatile(word) };
            assert!(matches!(right.peek(), Err(Error::Ring { .. })), "{at} {word}");
        }
        for head in [3, 4096, usize::MAX - 7] {
            let (mut left, _right) = pair(4096);
            left.control(0).head.0.store(head, Ordering::Release);
            assert!(matches!(left.wait_room(), Err(Error::Ring { .. })), "{head}");
        }
    }

    #[test]
    fn random_bytes_in_the_ring_never_lead_outside() {
        let mut state = 88_172_645_463_325_252_u64;
        for _ in 0..2_000 {
            let (_left, mut right) = pair(4096);
            for at in (0..4096).step_by(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Small lengths with a right check word now and then, so that the walk goes on for a while.
                let word = u32::try_from(state % 64).unwrap() | if state & 1 << 40 == 0 { MORE } else { 0 };
                let honest = u64::from(word) | u64::from(word ^ CHECK) << 32;
                let value = if state & 1 << 50 == 0 { state } else { honest };
                // SAFETY: a word inside the first ring, aligned; no other thread runs.
                unsafe { right.data(0).add(at).cast::<u64>().write_volatile(value) };
            }
            right.control(0).tail.0.store(4096, Ordering::Release);
            while let Ok(Some(n_bytes)) = right.peek() {
                right.take(&mut vec![0; n_bytes]);
            }
        }
    }

    #[test]
    fn strange_descriptors_are_refused() {
        assert_eq!(create(5000).unwrap_err(), Errno::INVAL.into());
        assert_eq!(create(2048).unwrap_err(), Errno::INVAL.into());
        let fd = create(4096).unwrap();
        assert!(Ring::open(fd.as_fd(), 2, 1).is_err());
        let unsealed = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, (DATA_OFFSET + 2 * 4096) as u64).unwrap();
        assert_eq!(Ring::open(unsealed.as_fd(), 0, 1).unwrap_err(), Errno::INVAL.into());
    }

    #[test]
    fn two_threads_stress() {
        const N_MESSAGES: usize = 200_000;
        let (mut left, mut right) = pair(4096);
        let writer = thread::spawn(move || {
            for number in 0..N_MESSAGES {
                let bytes = message(number, if number % 1000 == 0 { 9000 } else { number % 97 });
                while !left.push(&bytes).unwrap() {
                    left.publish();
                    if left.wait_room().unwrap() {
                        thread::yield_now();
                    }
                }
                left.publish();
            }
            left
        });
        for number in 0..N_MESSAGES {
            let found = loop {
                if let Some(found) = pop(&mut right) {
                    break found;
                }
                right.release();
                if right.may_sleep() {
                    thread::yield_now();
                }
            };
            assert_eq!(found, message(number, if number % 1000 == 0 { 9000 } else { number % 97 }));
        }
        let mut left = writer.join().unwrap();
        assert!(!left.wait_room().unwrap() || left.out_head == left.out_tail);
    }

    /// Both sides really sleep until woken: a lost wake-up would hang here.
    #[test]
    fn no_wake_up_is_lost() {
        use std::sync::mpsc::channel;

        const N_MESSAGES: usize = 50_000;
        let (mut left, mut right) = pair(4096);
        let (wake_right, right_woken) = channel();
        let (wake_left, left_woken) = channel();
        let writer = thread::spawn(move || {
            for number in 0..N_MESSAGES {
                let bytes = message(number, number % 600);
                loop {
                    let done = left.push(&bytes).unwrap();
                    if left.publish() {
                        wake_right.send(()).unwrap();
                    }
                    if done {
                        break;
                    }
                    if left.wait_room().unwrap() {
                        left_woken.recv().unwrap();
                    }
                }
            }
        });
        let mut number = 0;
        while number < N_MESSAGES {
            while right.peek().unwrap().is_some() {
                assert_eq!(pop_silent(&mut right), message(number, number % 600));
                number += 1;
            }
            if right.release() {
                wake_left.send(()).unwrap();
            }
            if number < N_MESSAGES && right.may_sleep() {
                right_woken.recv().unwrap();
            }
        }
        writer.join().unwrap();
    }

    fn pop_silent(ring: &mut Ring) -> Vec<u8> {
        let mut found = vec![0; ring.peek().unwrap().unwrap()];
        ring.take(&mut found);
        found
    }
}
