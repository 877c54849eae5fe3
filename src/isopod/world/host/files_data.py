"""The host's data files: whole operations out of a back end's single ones, alignment, and closing while something is under way."""

import ctypes
import errno
import mmap
import os
import stat as stat_bits
import time
from collections.abc import Sequence
from typing import Final

from isopod.world.disk import BATCH_MAX, IO_BYTES_MAX, Alignment, Data, OpenFlags, Target
from isopod.world.host import libc
from isopod.world.host.files_direct import NOT_DIRECT, PAGE_BYTES, open_aligned
from isopod.world.host.files_io import FileIo, all_ended
from isopod.world.host.workers import Workers

BOUNCE_BYTES: Final = 1 << 20
"""Unaligned memory is copied to a direct file in pieces of it."""
NOW_BYTES_MAX: Final = 64 << 10
"""What may be written durably in the loop's thread at once."""
QUICK_NS: Final = 400_000
"""Durable writes are quick that take no longer in the mean, off the loop or on it; other processes' turns count too."""
STALL_NS: Final = 5_000_000
MEAN_WRITES: Final = 8
QUICK_WRITES: Final = 16
"""So many off the loop without a stall, quick in the mean, and the next is made on it."""
QUICK_WRITES_MAX: Final = 4096
"""As many after the disk stalled again and again."""
GOOD_WRITES: Final = 1024
"""So many on the loop, and stalls are forgotten."""
_OPEN: Final = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
"""O_NONBLOCK: a pipe that somebody put in the file's place is refused, and not waited for."""


def open_data_file(path: str, flags: OpenFlags, mode: int, *, io: FileIo, workers: Workers) -> "HostDataFile":
    """Open a regular file or block device; anything else is EISDIR or EINVAL."""
    bits = _OPEN | (os.O_RDWR if flags.write else os.O_RDONLY)
    bits |= (os.O_CREAT if flags.create else 0) | (os.O_EXCL if flags.exclusive else 0) | (os.O_TRUNC if flags.truncate else 0)
    fd, alignment = open_aligned(path, bits, mode, direct=flags.direct)
    return _adopt(fd, path, alignment, io=io, workers=workers)


def open_data_file_beneath(root: str, path: str, *, io: FileIo, workers: Workers) -> "HostDataFile":
    """Open a regular file or block device inside `root` for reading, following no symlink; anything else is EISDIR or EINVAL."""
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = libc.open_beneath(root_fd, path, _OPEN | os.O_RDONLY)
    finally:
        os.close(root_fd)
    return _adopt(fd, f"{root}/{path}", NOT_DIRECT, io=io, workers=workers)


def _adopt(fd: int, path: str, alignment: Alignment, *, io: FileIo, workers: Workers) -> "HostDataFile":
    kind = os.fstat(fd).st_mode
    if not (stat_bits.S_ISREG(kind) or stat_bits.S_ISBLK(kind)):
        os.close(fd)
        number = errno.EISDIR if stat_bits.S_ISDIR(kind) else errno.EINVAL
        raise OSError(number, os.strerror(number), path)
    os.set_blocking(fd, True)
    return HostDataFile(fd, path, alignment, io=io, workers=workers)


class Pace:
    """Whether a file's durable writes are so quick that waiting for them in the loop's thread costs less than not waiting.

    On a disk with a cache that outlives power a small durable write takes some 50 us; going off the loop for it takes as much again, of
    processor time, and two turns of the loop. A disk that stalled once has to be quick for longer each time before it is trusted again.
    """

    __slots__ = ("_mean_ns", "_n_seen", "_n_wanted", "is_quick")

    def __init__(self) -> None:
        self.is_quick = False
        self._mean_ns = 2.0 * QUICK_NS
        self._n_seen = 0
        self._n_wanted = QUICK_WRITES

    def note(self, took_ns: int) -> None:
        """A write off the loop took so long, the way there and back included."""
        self._mean_ns += (min(took_ns, STALL_NS) - self._mean_ns) / MEAN_WRITES
        self._n_seen = self._n_seen + 1 if took_ns < STALL_NS else 0
        if self._n_seen >= self._n_wanted and self._mean_ns <= QUICK_NS:
            self.is_quick = True
            self._n_seen = 0

    def note_now(self, took_ns: int) -> None:
        """A write in the loop's thread took so long."""
        self._mean_ns += (min(took_ns, STALL_NS) - self._mean_ns) / MEAN_WRITES
        self._n_seen += 1
        if took_ns >= STALL_NS:
            self._n_wanted = min(self._n_wanted * 4, QUICK_WRITES_MAX)
        elif self._mean_ns <= QUICK_NS:
            if self._n_seen >= GOOD_WRITES:
                self._n_seen, self._n_wanted = 0, QUICK_WRITES
            return
        self.is_quick = False
        self._n_seen = 0


class HostDataFile:
    """`DataFile` over a descriptor, which it owns. A `close` during an operation takes effect when that ends.

    Args:
        fd: The descriptor.
        path: Where it was opened.
        alignment: What its operations must keep to.
        io: The back end.
        workers: For what back ends have no operation for (truncate, allocate).
    """

    def __init__(self, fd: int, path: str, alignment: Alignment, *, io: FileIo, workers: Workers) -> None:
        self._fd = fd
        self._path = path
        self._alignment = alignment
        self._io = io
        self._workers = workers
        self._n_calls = 0
        self._is_closed = False
        self._pace = Pace()

    @property
    def path(self) -> str:
        """See `DataFile.path`."""
        return self._path

    @property
    def alignment(self) -> Alignment:
        """See `DataFile.alignment`."""
        return self._alignment

    def fileno(self) -> int:
        """Return the descriptor, for the host's own use (sendfile)."""
        self._check_open()
        return self._fd

    def size_bytes(self) -> int:
        """See `OpenFile.size_bytes`."""
        self._check_open()
        size = os.fstat(self._fd).st_size
        return size or (os.lseek(self._fd, 0, os.SEEK_END) if stat_bits.S_ISBLK(os.fstat(self._fd).st_mode) else 0)

    async def read_at(self, offset: int, n_bytes: int) -> bytes:
        """See `OpenFile.read_at`. Of a direct file any offset and length will do: what is around them is read and thrown away."""
        self._check(offset, n_bytes)
        with _Busy(self):
            if self._alignment.is_direct:
                return await self._read_widened(offset, n_bytes)
            data = await self._io.read(self._fd, offset, n_bytes)
            return data if len(data) == n_bytes else await self._read_rest(data, offset, n_bytes)

    async def read_into(self, offset: int, target: Target) -> int:
        """See `DataFile.read_into`."""
        self._check(offset, len(target))
        self._check_aligned(offset, len(target))
        with _Busy(self):
            return await self._fill(offset, target)

    async def write_at(self, offset: int, data: Data) -> None:
        """See `DataFile.write_at`."""
        self._check(offset, len(data))
        self._check_aligned(offset, len(data))
        with _Busy(self):
            if self._alignment.is_direct and not _is_aligned(data, self._alignment.memory_bytes):
                await self._write_bounced(offset, data)
            else:
                await self._write_whole(offset, data)

    async def write_durable(self, offset: int, data: Data) -> None:
        """See `DataFile.write_durable`."""
        self._check(offset, len(data))
        self._check_aligned(offset, len(data))
        began_ns = time.monotonic_ns()
        with _Busy(self):
            if self._alignment.is_direct and not _is_aligned(data, self._alignment.memory_bytes):
                await self._write_bounced(offset, data, durable=True)
            else:
                await self._write_whole(offset, data, durable=True)
        self._pace.note(time.monotonic_ns() - began_ns)

    def may_write_now(self, n_bytes: int) -> bool:
        """See `DataFile.may_write_now`."""
        return self._pace.is_quick and n_bytes <= NOW_BYTES_MAX and not self._alignment.is_direct and not self._is_closed

    def write_durable_now(self, offset: int, data: Data) -> None:
        """See `DataFile.write_durable_now`."""
        self._check(offset, len(data))
        began_ns = time.monotonic_ns()
        with memoryview(data) as view:
            n_written = 0
            while n_written < len(view):
                with view[n_written:] as rest:
                    n_more = os.pwritev(self._fd, [rest], offset + n_written, os.RWF_DSYNC)
                if n_more == 0:
                    raise OSError(errno.EIO, "the kernel took no more bytes", self._path)
                n_written += n_more
        self._pace.note_now(time.monotonic_ns() - began_ns)
        tally = self._io.tally
        tally.n_writes += 1
        tally.n_syncs += 1
        tally.n_inline += 1
        tally.n_bytes_written += len(data)

    async def append(self, data: Data) -> None:
        """See `OpenFile.append`: at the end as it is now. Appends of one caller at a time: two at once would meet at one place."""
        await self.write_at(self.size_bytes(), data)

    async def read_many(self, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `DataFile.read_many`."""
        self._check_batch(extents)
        for offset, n_bytes in extents:
            self._check(offset, n_bytes)
        with _Busy(self):
            if self._alignment.is_direct:
                return await all_ended([self._read_widened(offset, n_bytes) for offset, n_bytes in extents])
            found = await self._io.read_many(self._fd, extents)
            whole: list[bytes] = []
            for (offset, n_bytes), data in zip(extents, found, strict=True):
                if isinstance(data, OSError):
                    raise data
                whole.append(data if len(data) == n_bytes else await self._read_rest(data, offset, n_bytes))
            return whole

    async def write_many(self, pieces: Sequence[tuple[int, Data]]) -> None:
        """See `DataFile.write_many`."""
        self._check_batch(pieces)
        with _Busy(self):
            await all_ended([self.write_at(offset, data) for offset, data in pieces])

    async def sync(self) -> None:
        """See `OpenFile.sync`."""
        self._check_open()
        with _Busy(self):
            await self._io.sync(self._fd)

    async def truncate(self, n_bytes: int) -> None:
        """See `DataFile.truncate`."""
        self._check_open()
        with _Busy(self):
            await self._workers.quick(os.ftruncate, self._fd, n_bytes)

    async def allocate(self, offset: int, n_bytes: int) -> None:
        """See `DataFile.allocate`."""
        self._check_open()
        with _Busy(self):
            await self._workers.quick(os.posix_fallocate, self._fd, offset, n_bytes)

    def close(self) -> None:
        """See `OpenFile.close`. Closing twice is fine."""
        if not self._is_closed:
            self._is_closed = True
            if self._n_calls == 0:
                os.close(self._fd)

    def enter(self) -> None:
        """Note that an operation begins. For `_Busy` and the host's sendfile."""
        self._n_calls += 1

    def leave(self) -> None:
        """Note that an operation has ended; the last one closes a file that was closed meanwhile."""
        self._n_calls -= 1
        if self._is_closed and self._n_calls == 0:
            os.close(self._fd)

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    async def _read_rest(self, data: bytes, offset: int, n_bytes: int) -> bytes:
        """Go on after a short read, unless the file ends there."""
        pieces = [data]
        n_read = len(data)
        while pieces[-1] and n_read < n_bytes and offset + n_read < self._size_now():
            pieces.append(await self._io.read(self._fd, offset + n_read, n_bytes - n_read))
            n_read += len(pieces[-1])
        return data if len(pieces) == 1 else b"".join(pieces)

    def _size_now(self) -> int:
        """Return the size although the file may have been closed during an operation."""
        return os.fstat(self._fd).st_size

    async def _read_widened(self, offset: int, n_bytes: int) -> bytes:
        unit = self._alignment.offset_bytes
        first = offset - offset % unit
        end = -(-(offset + n_bytes) // unit) * unit
        if end == first:
            return b""
        with mmap.mmap(-1, end - first) as memory, memoryview(memory) as target:
            n_read = await self._fill(first, target)
            return bytes(target[offset - first : min(n_read, offset - first + n_bytes)])

    async def _fill(self, offset: int, target: Target) -> int:
        n_read = await self._io.read_into(self._fd, offset, target, is_direct=self._alignment.is_direct)
        if n_read == len(target) or n_read == 0 or n_read % self._alignment.offset_bytes:
            return n_read  # a direct read that ends inside a unit met the end of the file
        with memoryview(target) as view:
            while n_read < len(view) and offset + n_read < self._size_now():
                with view[n_read:] as rest:
                    n_more = await self._io.read_into(self._fd, offset + n_read, rest, is_direct=self._alignment.is_direct)
                if n_more == 0:
                    break
                n_read += n_more
        return n_read

    async def _write_whole(self, offset: int, data: Data, *, durable: bool = False) -> None:
        write = self._io.write_durable if durable else self._io.write
        n_written = await write(self._fd, offset, data) if len(data) else 0
        if n_written == len(data):
            return
        with memoryview(data) as view:
            while n_written < len(view):
                with view[n_written:] as rest:
                    n_more = await write(self._fd, offset + n_written, rest)
                if n_more == 0:
                    raise OSError(errno.EIO, "the kernel took no more bytes", self._path)
                n_written += n_more

    async def _write_bounced(self, offset: int, data: Data, *, durable: bool = False) -> None:
        """Write memory that may be unaligned, by way of memory that is not."""
        n_bounce = min(-(-len(data) // PAGE_BYTES) * PAGE_BYTES, BOUNCE_BYTES)
        if n_bounce == 0:
            return
        with mmap.mmap(-1, n_bounce) as memory, memoryview(memory) as bounce, memoryview(data) as view:
            for start in range(0, len(view), n_bounce):
                n_bytes = min(n_bounce, len(view) - start)
                bounce[:n_bytes] = view[start : start + n_bytes]
                with bounce[:n_bytes] as piece:
                    await self._write_whole(offset + start, piece, durable=durable)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the file is closed")

    def _check(self, offset: int, n_bytes: int) -> None:
        self._check_open()
        if offset < 0 or not 0 <= n_bytes <= IO_BYTES_MAX:
            raise OSError(errno.EINVAL, f"offset {offset}, length {n_bytes}: out of range", self._path)

    def _check_aligned(self, offset: int, n_bytes: int) -> None:
        unit = self._alignment.offset_bytes
        if offset % unit or n_bytes % unit:
            raise OSError(errno.EINVAL, f"offset {offset}, length {n_bytes}: a direct file takes multiples of {unit}", self._path)

    def _check_batch(self, pieces: Sequence[object]) -> None:
        self._check_open()
        if len(pieces) > BATCH_MAX:
            raise OSError(errno.EINVAL, f"a batch takes at most {BATCH_MAX} pieces", self._path)


class _Busy:
    """Holds a file open for the length of an operation. A class, since a generator would cost more than a read from the page cache."""

    __slots__ = ("_file",)

    def __init__(self, file: HostDataFile) -> None:
        self._file = file

    def __enter__(self) -> None:
        self._file.enter()

    def __exit__(self, *failure: object) -> None:
        self._file.leave()


def _is_aligned(data: Data, n_bytes: int) -> bool:
    """Return whether memory begins at a multiple of `n_bytes`; False if that cannot be told (read-only memory)."""
    if isinstance(data, bytes) or (isinstance(data, memoryview) and data.readonly) or len(data) == 0:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % n_bytes == 0
