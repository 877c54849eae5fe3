"""Data files by io_uring: what is asked in one turn of the loop goes to the kernel in one system call at its end.

The ring's own descriptor is registered with the loop (no eventfd: see rust/core/src/uring.rs). What the kernel can answer at once is
reaped right after the submission, without a wake-up. At most as many operations are in flight as completions fit into the ring;
more of them wait here, in order.

A cancelled operation that the kernel already has ends only with its completion, since its buffer is the kernel's until then; one that still
waits here is withdrawn. The ring is made at the first use, for the loop that runs then (and once more if that loop was closed): a process
that must have no threads yet (`Kernel.prepare`) has no kernel workers either.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from isopod import _core
from isopod.world.disk import Data, Target
from isopod.world.host.files_io import Tally, read_bytes_now, read_many_now, read_now

N_ENTRIES: Final = 256
RETRY_S: Final = 0.005
"""After the kernel had no memory for a submission."""


def refusal() -> str:
    """Return "" if this process can have an io_uring, else why not, in one line."""
    try:
        _core.Uring(8).close()
    except OSError as error:
        return f"io_uring_setup: {error.strerror}"
    return ""


class _Operation:
    """One operation: whom to tell, and, once its caller was cancelled, whom to tell that the kernel is done."""

    __slots__ = ("future", "is_finished", "settled")

    def __init__(self, future: "asyncio.Future[Any]") -> None:  # bytes or int, by operation
        self.future = future
        self.is_finished = False
        self.settled: asyncio.Future[None] | None = None

    def finish(self, result: bytes | int) -> None:
        """Tell the result."""
        self.is_finished = True
        if not self.future.done():
            self.future.set_result(result)
        elif self.settled is not None and not self.settled.done():
            self.settled.set_result(None)

    def abandon(self) -> None:
        """The ring is closed: the kernel is done, and what it said is lost."""
        self.is_finished = True
        loop = self.future.get_loop()
        if not loop.is_closed() and not self.future.cancel() and self.settled is not None and not self.settled.done():
            self.settled.set_result(None)


class UringIo:
    """The back end that uses an io_uring.

    Args:
        n_entries: Operations between two submissions; a power of two. Four times as many may be in flight.
    """

    kind: Literal["io_uring"] = "io_uring"

    def __init__(self, n_entries: int = N_ENTRIES) -> None:
        self.tally = Tally()
        self._n_entries = n_entries
        self._ring: _core.Uring | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._n_room = 0
        self._is_submitting = False
        self._under_way: dict[_Operation, None] = {}
        """What is in the ring."""
        self._waiting: deque[tuple[_Operation, Callable[[_core.Uring, _Operation], None]]] = deque()

    async def read(self, fd: int, offset: int, n_bytes: int) -> bytes:
        """See `FileIo.read`."""
        found = read_bytes_now(self.tally, fd, offset, n_bytes)
        if found is not None:
            return found
        data: bytes = await self._finish(self._start_read(fd, offset, n_bytes))
        self.tally.n_reads += 1
        self.tally.n_bytes_read += len(data)
        return data

    async def read_into(self, fd: int, offset: int, target: Target, *, is_direct: bool) -> int:
        """See `FileIo.read_into`."""
        if not is_direct:
            n_found = read_now(self.tally, fd, offset, target)
            if n_found is not None:
                return n_found
        n_read: int = await self._run(lambda ring, owner: ring.read_into(fd, offset, target, owner))
        self.tally.n_reads += 1
        self.tally.n_bytes_read += n_read
        return n_read

    async def write(self, fd: int, offset: int, data: Data) -> int:
        """See `FileIo.write`."""
        n_written: int = await self._run(lambda ring, owner: ring.write(fd, offset, data, owner))
        self.tally.n_writes += 1
        self.tally.n_bytes_written += n_written
        return n_written

    async def write_durable(self, fd: int, offset: int, data: Data) -> int:
        """See `FileIo.write_durable`."""
        n_written: int = await self._run(lambda ring, owner: ring.write_durable(fd, offset, data, owner))
        self.tally.n_writes += 1
        self.tally.n_syncs += 1
        self.tally.n_bytes_written += n_written
        return n_written

    async def sync(self, fd: int) -> None:
        """See `FileIo.sync`."""
        await self._run(lambda ring, owner: ring.sync(fd, owner))
        self.tally.n_syncs += 1

    async def read_many(self, fd: int, extents: Sequence[tuple[int, int]]) -> list[bytes | OSError]:
        """See `FileIo.read_many`. All are queued before the first is waited for, so they are one submission."""
        results, missing = read_many_now(self.tally, fd, extents)
        operations = [self._start_read(fd, *extents[index]) for index in missing]
        for index, operation in enumerate(operations):
            try:
                data: bytes = await self._finish(operation)
            except OSError as error:
                results[missing[index]] = error
                continue
            except asyncio.CancelledError:
                for left in operations[index + 1 :]:
                    left.future.cancel()
                    await self._settle(left)
                raise
            self.tally.n_reads += 1
            self.tally.n_bytes_read += len(data)
            results[missing[index]] = data
        return results

    def close(self) -> None:
        """See `FileIo.close`. Waits for the kernel; callers that still wait are cancelled."""
        ring, loop = self._ring, self._loop
        self._ring = self._loop = None
        if ring is None:
            return
        if loop is not None and not loop.is_closed():
            loop.remove_reader(ring.fileno())
        ring.close()
        left = [*self._under_way, *(operation for operation, _ in self._waiting)]
        self._under_way.clear()
        self._waiting.clear()
        self.tally.n_in_flight -= len(left)
        for operation in left:
            operation.abandon()

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    async def _run(self, start: Callable[[_core.Uring, _Operation], None]) -> Any:  # bytes or int, by operation
        return await self._finish(self._start(start))

    def _start_read(self, fd: int, offset: int, n_bytes: int) -> _Operation:
        return self._start(lambda ring, owner: ring.read(fd, offset, n_bytes, owner))

    def _start(self, start: Callable[[_core.Uring, _Operation], None]) -> _Operation:
        """Queue an operation, here or in the ring."""
        ring, loop = self._attached()
        operation = _Operation(loop.create_future())
        self.tally.n_in_flight += 1
        if self._n_room == 0 or self._waiting:
            self._waiting.append((operation, start))
            return operation
        self._push(ring, operation, start)
        if not self._is_submitting:
            self._is_submitting = True
            loop.call_soon(self._submit)
        return operation

    async def _finish(self, operation: _Operation) -> Any:  # bytes or int, by operation
        try:
            result = await operation.future
        except asyncio.CancelledError:
            await self._settle(operation)
            raise
        if isinstance(result, int) and result < 0:
            self.tally.n_errors += 1
            raise OSError(-result, os.strerror(-result))
        return result

    async def _settle(self, operation: _Operation) -> None:
        """Wait until the kernel is done with a cancelled operation, whatever happens to us meanwhile."""
        for waiting in self._waiting:
            if waiting[0] is operation:
                self._waiting.remove(waiting)
                self.tally.n_in_flight -= 1
                return
        while not operation.is_finished and self._ring is not None and self._loop is not None:
            operation.settled = self._loop.create_future()
            try:
                await operation.settled
            except asyncio.CancelledError:
                continue

    def _attached(self) -> tuple[_core.Uring, asyncio.AbstractEventLoop]:
        loop = asyncio.get_running_loop()
        if self._ring is not None and self._loop is loop:
            return self._ring, loop
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this World's data files belong to another event loop")
        self.close()
        ring = _core.Uring(self._n_entries)
        self._n_room = ring.n_in_flight_max()
        self._ring, self._loop = ring, loop
        self._is_submitting = False
        loop.add_reader(ring.fileno(), self._reap)
        return ring, loop

    def _push(self, ring: _core.Uring, operation: _Operation, start: Callable[[_core.Uring, _Operation], None]) -> None:
        try:
            start(ring, operation)
        except BaseException:
            self.tally.n_in_flight -= 1
            raise
        self._n_room -= 1
        self._under_way[operation] = None

    def _submit(self) -> None:
        """Hand over what this turn queued, and take what is answered at once."""
        self._is_submitting = False
        ring, loop = self._ring, self._loop
        if ring is None or loop is None:
            return
        try:
            ring.submit()
        except OSError:  # EAGAIN: no memory now; what is queued stays queued
            self._is_submitting = True
            loop.call_later(RETRY_S, self._submit)
        self._reap()

    def _reap(self) -> None:
        """Tell the callers of what has completed, and let those that waited for room have it."""
        ring, loop = self._ring, self._loop
        if ring is None or loop is None:
            return
        for operation, result in ring.reap():
            self._n_room += 1
            self.tally.n_in_flight -= 1
            del self._under_way[operation]
            operation.finish(result)
        while self._waiting and self._n_room > 0:
            operation, start = self._waiting.popleft()
            try:
                self._push(ring, operation, start)
            except (OSError, ValueError, BufferError) as error:
                operation.is_finished = True
                if not operation.future.done():
                    operation.future.set_exception(error)
                continue
            if not self._is_submitting:
                self._is_submitting = True
                loop.call_soon(self._submit)
