"""How data files are read and written: the face of a back end, and the one that uses threads.

A back end does single operations on descriptors, which may be short; `files_data` makes them whole. Its buffers belong to the kernel until
the awaitable has ended, and a cancelled one ends only then. The other back end is in `uring`.

With either, a read that the page cache can answer is answered in the loop's thread (preadv2(2), RWF_NOWAIT): handing it over costs many
times the read, and io_uring's own way to the page cache twice as much (docs/performance.md). Not of a direct file: there the flag does
not keep the kernel from waiting for the disk. With threads, everything else is a blocking call in the workers.
"""

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Literal, Protocol, TypeVar

from isopod.world.disk import Data, IoStatistics, Target
from isopod.world.host.workers import Workers

T = TypeVar("T")

INLINE_BYTES_MAX: Final = 256 << 10
"""Above it even a read from the page cache is copied by a thread: some 50 us."""
BATCH_THREADS: Final = 4
"""How many of the workers' threads one batch takes."""
_NOT_NOW: Final = (errno.EAGAIN, errno.EOPNOTSUPP)


class Tally:
    """Counts what a back end does; `IoStatistics` that can change."""

    __slots__ = ("n_bytes_read", "n_bytes_written", "n_errors", "n_in_flight", "n_inline", "n_reads", "n_syncs", "n_writes")

    def __init__(self) -> None:
        self.n_reads = self.n_writes = self.n_syncs = 0
        self.n_bytes_read = self.n_bytes_written = 0
        self.n_errors = self.n_in_flight = self.n_inline = 0

    def snapshot(self) -> IoStatistics:
        """Return it frozen."""
        return IoStatistics(
            n_reads=self.n_reads,
            n_writes=self.n_writes,
            n_syncs=self.n_syncs,
            n_bytes_read=self.n_bytes_read,
            n_bytes_written=self.n_bytes_written,
            n_errors=self.n_errors,
            n_in_flight=self.n_in_flight,
            n_inline=self.n_inline,
        )


class FileIo(Protocol):
    """A back end. Offsets and lengths in bytes; failures are OSErrors."""

    tally: Tally

    @property
    def kind(self) -> Literal["threads", "io_uring"]:
        """Which one it is."""

    async def read(self, fd: int, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes`; b"" at the end of the file."""

    async def read_into(self, fd: int, offset: int, target: Target, *, is_direct: bool) -> int:
        """Read into a buffer; 0 at the end of the file."""

    async def write(self, fd: int, offset: int, data: Data) -> int:
        """Write some of `data`, at least one byte."""

    async def write_durable(self, fd: int, offset: int, data: Data) -> int:
        """Write some of `data`, at least one byte, and make it durable (pwritev2(2), RWF_DSYNC)."""

    async def sync(self, fd: int) -> None:
        """fdatasync(2)."""

    async def read_many(self, fd: int, extents: Sequence[tuple[int, int]]) -> list[bytes | OSError]:
        """Do `read` for each; a failure stands in its place."""

    def close(self) -> None:
        """Wait for what is under way and end."""


class ThreadIo:
    """The back end that uses the workers' threads.

    Args:
        workers: Whose threads.
    """

    kind: Literal["threads"] = "threads"

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.tally = Tally()

    async def read(self, fd: int, offset: int, n_bytes: int) -> bytes:
        """See `FileIo.read`."""
        found = read_bytes_now(self.tally, fd, offset, n_bytes)
        if found is not None:
            return found
        data = await self._run(os.pread, fd, n_bytes, offset)
        self._count_read(len(data))
        return data

    async def read_into(self, fd: int, offset: int, target: Target, *, is_direct: bool) -> int:
        """See `FileIo.read_into`."""
        if not is_direct:
            n_read = read_now(self.tally, fd, offset, target)
            if n_read is not None:
                return n_read
        n_read = await self._run(os.preadv, fd, [target], offset)
        self._count_read(n_read)
        return n_read

    async def write(self, fd: int, offset: int, data: Data) -> int:
        """See `FileIo.write`."""
        n_written = await self._run(os.pwrite, fd, data, offset)
        self.tally.n_writes += 1
        self.tally.n_bytes_written += n_written
        return n_written

    async def write_durable(self, fd: int, offset: int, data: Data) -> int:
        """See `FileIo.write_durable`."""
        n_written = await self._run(_write_durable, fd, offset, data)
        self.tally.n_writes += 1
        self.tally.n_syncs += 1
        self.tally.n_bytes_written += n_written
        return n_written

    async def sync(self, fd: int) -> None:
        """See `FileIo.sync`."""
        await self._run(os.fdatasync, fd)
        self.tally.n_syncs += 1

    async def read_many(self, fd: int, extents: Sequence[tuple[int, int]]) -> list[bytes | OSError]:
        """See `FileIo.read_many`. The batch is dealt out to a few threads, so that one hand-over carries many reads."""
        found, missing = read_many_now(self.tally, fd, extents)
        hands = [missing[first::BATCH_THREADS] for first in range(min(BATCH_THREADS, len(missing)))]
        for hand, results in zip(hands, await self._run_hands(fd, extents, hands), strict=True):
            for index, result in zip(hand, results, strict=True):
                found[index] = result
        return found

    def close(self) -> None:
        """See `FileIo.close`. The workers have an owner of their own."""

    def _count_read(self, n_bytes: int) -> None:
        self.tally.n_reads += 1
        self.tally.n_bytes_read += n_bytes

    async def _run_hands(self, fd: int, extents: Sequence[tuple[int, int]], hands: list[list[int]]) -> list[list[bytes | OSError]]:
        work = [self._run(_read_each, fd, [extents[index] for index in hand]) for hand in hands]
        results = await all_ended(work) if len(work) != 1 else [await work[0]]
        for result in (each for hand in results for each in hand):
            if isinstance(result, bytes):
                self._count_read(len(result))
            else:
                self.tally.n_errors += 1
        return results

    async def _run(self, call: Callable[..., T], *args: object) -> T:
        self.tally.n_in_flight += 1
        try:
            return await self._workers.quick(call, *args)
        except OSError:
            self.tally.n_errors += 1
            raise
        finally:
            self.tally.n_in_flight -= 1


async def all_ended(operations: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run operations at once; raise the first failure, in their order, after all have ended. So does a cancellation: none of them uses
    the descriptor any more then."""
    results = await asyncio.gather(*operations, return_exceptions=True)
    found: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        found.append(result)
    return found


def read_now(tally: Tally, fd: int, offset: int, target: Target) -> int | None:
    """Read what is in the page cache; None if that is not all in it, or too much to copy in the loop's thread."""
    if len(target) > INLINE_BYTES_MAX:
        return None
    try:
        n_read = os.preadv(fd, [target], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in _NOT_NOW:
            return None
        tally.n_errors += 1
        raise
    tally.n_inline += 1
    tally.n_reads += 1
    tally.n_bytes_read += n_read
    return n_read


def read_bytes_now(tally: Tally, fd: int, offset: int, n_bytes: int) -> bytes | None:
    """Return what `read_now` finds."""
    if n_bytes > INLINE_BYTES_MAX:
        return None
    target = bytearray(n_bytes)
    n_read = read_now(tally, fd, offset, target)
    if n_read is None:
        return None
    return bytes(target) if n_read == n_bytes else bytes(target[:n_read])


def read_many_now(tally: Tally, fd: int, extents: Sequence[tuple[int, int]]) -> tuple[list[bytes | OSError], list[int]]:
    """Return what `read_now` finds of each extent, b"" where it finds nothing, and the indexes of those."""
    found: list[bytes | OSError] = []
    missing: list[int] = []
    for index, (offset, n_bytes) in enumerate(extents):
        try:
            data = read_bytes_now(tally, fd, offset, n_bytes)
        except OSError as error:
            found.append(error)
            continue
        if data is None:
            missing.append(index)
        found.append(data or b"")
    return found, missing


def _write_durable(fd: int, offset: int, data: Data) -> int:
    try:
        return os.pwritev(fd, [data], offset, os.RWF_DSYNC)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    n_written = os.pwrite(fd, data, offset)
    os.fdatasync(fd)
    return n_written


def _read_each(fd: int, extents: Sequence[tuple[int, int]]) -> list[bytes | OSError]:
    results: list[bytes | OSError] = []
    for offset, n_bytes in extents:
        try:
            results.append(os.pread(fd, n_bytes, offset))
        except OSError as error:
            results.append(error)
    return results
