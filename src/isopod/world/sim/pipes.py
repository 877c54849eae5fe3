"""Pipes between simulated processes: bounded bytes, ends that are counted.

A read returns what is there and b"" once every write end is closed; a write waits while the pipe is full and fails with EPIPE once no
read end is open. An end belongs to one process, whose death closes it; `dup` gives another process an end of its own, as fork does.
"""

import asyncio
import errno
import os
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

from isopod.world.sim.owners import Owner

PIPE_BYTES: Final = 64 << 10
READ_BYTES_MAX: Final = 64 << 10


class Channel:
    """The pipe itself."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.n_readers = 0
        self.n_writers = 0
        self.n_ends = 0
        """End-of-file marks typed into a terminal: each ends one read, not the stream."""
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Wait until something about the pipe changed."""
        await wait_any([self])

    def add_waiter(self, waiter: asyncio.Future[None]) -> None:
        """Resolve `waiter` at the next change."""
        self._waiters.append(waiter)

    def wake(self) -> None:
        """Something changed."""
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class ReadEnd:
    """The reading end, owned by one process."""

    def __init__(self, channel: Channel, owner: Owner) -> None:
        self.channel = self._channel = channel
        self._owner = owner
        self._is_open = True
        self._held = owner.hold(self.close)
        channel.n_readers += 1

    def dup(self, owner: Owner) -> "ReadEnd":
        """Return another reading end for `owner`."""
        return ReadEnd(self._channel, owner)

    async def read(self) -> bytes:
        """Return what is there, waiting for the first byte; b"" at the end."""
        return await self.read_at_most(READ_BYTES_MAX)

    async def read_at_most(self, n_bytes: int) -> bytes:
        """Return at most `n_bytes`."""
        self._check()
        while not self._channel.data:
            if self._channel.n_ends:
                self._channel.n_ends -= 1
                return b""
            if not self._channel.n_writers:
                return b""
            await self._channel.wait()
            self._check()
        data = bytes(self._channel.data[:n_bytes])
        del self._channel.data[:n_bytes]
        self._channel.wake()
        return data

    def read_nowait(self) -> bytes:
        """Return what is there now."""
        self._check()
        data = bytes(self._channel.data)
        self._channel.data.clear()
        self._channel.wake()
        return data

    async def write(self, data: bytes) -> None:
        """Fail: this end reads."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def close(self) -> None:
        """Close this end."""
        if self._is_open:
            self._is_open = False
            self._owner.forget(self._held)
            self._channel.n_readers -= 1
            self._channel.wake()

    def _check(self) -> None:
        self._owner.check()
        if not self._is_open:
            raise ValueError("I/O operation on closed pipe")


class WriteEnd:
    """The writing end, owned by one process."""

    def __init__(self, channel: Channel, owner: Owner) -> None:
        self._channel = channel
        self._owner = owner
        self._is_open = True
        self._held = owner.hold(self.close)
        channel.n_writers += 1

    def dup(self, owner: Owner) -> "WriteEnd":
        """Return another writing end for `owner`."""
        return WriteEnd(self._channel, owner)

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting for room."""
        self._check()
        rest = memoryview(data)
        while rest:
            if not self._channel.n_readers:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            room = PIPE_BYTES - len(self._channel.data)
            if room:
                self._channel.data += rest[:room]
                rest = rest[room:]
                self._channel.wake()
            else:
                await self._channel.wait()
                self._check()

    async def read(self) -> bytes:
        """Fail: this end writes."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def close(self) -> None:
        """Close this end."""
        if self._is_open:
            self._is_open = False
            self._owner.forget(self._held)
            self._channel.n_writers -= 1
            self._channel.wake()

    def _check(self) -> None:
        self._owner.check()
        if not self._is_open:
            raise ValueError("I/O operation on closed pipe")


class Sink(Protocol):
    """What a process's output may go to: a pipe, or a file."""

    async def write(self, data: bytes) -> None:
        """Write all of `data`."""

    def dup(self, owner: Owner) -> "Sink":
        """Return the same for another process."""

    def close(self) -> None:
        """Close."""


async def wait_any(channels: Sequence[Channel]) -> None:
    """Wait until something about one of the pipes changed."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    for channel in channels:
        channel.add_waiter(waiter)
    await waiter


def open_pipe(reader: Owner, writer: Owner) -> tuple[ReadEnd, WriteEnd]:
    """Make a pipe whose ends belong to two processes."""
    channel = Channel()
    return ReadEnd(channel, reader), WriteEnd(channel, writer)
