"""Files in memory by mmap(2), guarded against SIGBUS.

Touching a mapped page that lies behind the file's end kills the process with SIGBUS, and Python has nothing to catch it with. So a read
does not touch the map at all (pread(2) copies from the same page cache and ends early instead), and what needs the map (search, change)
looks at the file's size before each step of at most 1 MiB. Between that look and the touch lie microseconds; a file that another process
cuts within them is not caught. Give a map a file that only its owner cuts.

A write into a hole of a file takes space at that moment, and SIGBUS is how a full disk then says so: writers allocate first
(`MappedBytes`).
"""

import ctypes
import errno
import mmap
import os
import stat as stat_bits
from collections.abc import Callable
from typing import Final

from isopod.world.disk import Data
from isopod.world.host.workers import Workers

STEP_BYTES: Final = 1 << 20
_MS_SYNC: Final = 4


def map_file(path: str, *, write: bool, workers: Workers) -> "HostMapping":
    """Map a regular file that is not empty."""
    fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat_bits.S_ISREG(found.st_mode) or found.st_size == 0:
            raise OSError(errno.EINVAL, "only a regular file that is not empty can be mapped", path)
        # Private to this process would do for reading, but shared is what sees later writes of others.
        memory = mmap.mmap(fd, found.st_size, mmap.MAP_SHARED, mmap.PROT_READ | (mmap.PROT_WRITE if write else 0))
    except BaseException:
        os.close(fd)
        raise
    return HostMapping(fd, path, memory, is_writable=write, workers=workers)


class HostMapping:
    """`MappedBytes` over a map and its descriptor, which it owns. A `close` during a call in a thread takes effect when that ends.

    Args:
        fd: The descriptor.
        path: Where it was opened.
        memory: The map.
        is_writable: Whether it may be changed.
        workers: For `sync` and `prefetch`.
    """

    def __init__(self, fd: int, path: str, memory: mmap.mmap, *, is_writable: bool, workers: Workers) -> None:
        self._fd = fd
        self._path = path
        self._memory = memory
        self._size = len(memory)
        self._is_writable = is_writable
        self._workers = workers
        self._n_calls = 0
        self._is_closed = False

    @property
    def size_bytes(self) -> int:
        """See `MappedBytes.size_bytes`."""
        return self._size

    def read(self, offset: int, n_bytes: int) -> bytes:
        """See `MappedBytes.read`."""
        self._check_open()
        wanted = max(0, min(n_bytes, self._size - offset))
        data = os.pread(self._fd, wanted, offset) if wanted else b""
        if len(data) < wanted:
            self._check_size(offset + wanted)
        return data

    def find(self, needle: bytes, start: int, end: int) -> int:
        """See `MappedBytes.find`. An empty needle is found nowhere."""
        self._check_open()
        end = min(end, self._size)
        overlap = len(needle) - 1
        for first in range(start, end if needle else start, STEP_BYTES):
            stop = min(first + STEP_BYTES + overlap, end)
            self._check_size(stop)
            found = self._memory.find(needle, first, stop)
            if found >= 0:
                return found
        return -1

    def write(self, offset: int, data: Data) -> None:
        """See `MappedBytes.write`."""
        self._check_write(offset, len(data))
        with memoryview(data) as view:
            for first in range(0, len(view), STEP_BYTES):
                piece = view[first : first + STEP_BYTES]
                self._check_size(offset + first + len(piece))
                self._memory[offset + first : offset + first + len(piece)] = piece

    def move(self, target: int, source: int, n_bytes: int) -> None:
        """See `MappedBytes.move`."""
        self._check_write(target, n_bytes)
        self._check_write(source, n_bytes)
        self._check_size(max(target, source) + n_bytes)
        self._memory.move(target, source, n_bytes)

    async def prefetch(self, offset: int, n_bytes: int) -> None:
        """See `MappedBytes.prefetch`. The bytes are read once, so that they are there when it returns."""
        self._check_open()
        await self._in_thread(_read_through, self._fd, offset, min(n_bytes, self._size - offset))

    async def sync(self, offset: int, n_bytes: int) -> None:
        """See `MappedBytes.sync`: msync(2) of the pages of the range, then the file's size (fdatasync)."""
        self._check_open()
        if not self._is_writable or n_bytes <= 0:
            return
        self._check_inside(offset, n_bytes)
        await self._in_thread(_sync_range, self._fd, self._memory, offset, n_bytes)

    def close(self) -> None:
        """See `MappedBytes.close`."""
        if not self._is_closed:
            self._is_closed = True
            if self._n_calls == 0:
                self._release()

    async def _in_thread(self, call: Callable[..., None], *args: object) -> None:
        self._n_calls += 1
        try:
            await self._workers.quick(call, *args)
        finally:
            self._n_calls -= 1
            if self._is_closed and self._n_calls == 0:
                self._release()

    def _release(self) -> None:
        self._memory.close()
        os.close(self._fd)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("the map is closed")

    def _check_inside(self, offset: int, n_bytes: int) -> None:
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self._size:
            raise OSError(errno.EINVAL, f"{offset}..{offset + n_bytes} is outside of the map of {self._size} bytes", self._path)

    def _check_write(self, offset: int, n_bytes: int) -> None:
        self._check_open()
        if not self._is_writable:
            raise OSError(errno.EBADF, "it was not mapped for writing", self._path)
        self._check_inside(offset, n_bytes)

    def _check_size(self, end: int) -> None:
        """ESTALE if the file has become shorter than what is about to be touched. The rest of its last page may be touched."""
        if os.fstat(self._fd).st_size < end:
            raise OSError(errno.ESTALE, "the file became shorter than its map", self._path)


def _read_through(fd: int, offset: int, n_bytes: int) -> None:
    end = offset + n_bytes
    while offset < end and (data := os.pread(fd, min(STEP_BYTES, end - offset), offset)):
        offset += len(data)


def _sync_range(fd: int, memory: mmap.mmap, offset: int, n_bytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    first = offset - offset % mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + first
    if libc.msync(ctypes.c_void_p(address), ctypes.c_size_t(offset + n_bytes - first), _MS_SYNC) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    os.fdatasync(fd)
