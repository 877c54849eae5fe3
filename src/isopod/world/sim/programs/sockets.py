"""Stream sockets as simulated programs use them: `serve` a path, read and write a connection.

A `Backlog` is a listening socket whose connections nobody has accepted yet: one process may bind it and another one serve it.
"""

import asyncio
from collections import deque
from typing import Final, cast

from isopod.world.network import UnixAddress
from isopod.world.sim.machine import Machine
from isopod.world.sim.network import SimListener

_UNREAD_BYTES_MAX: Final = 1 << 20


class Connection(asyncio.Protocol):
    """One connection of a program. Who reads it closes it."""

    def __init__(self, backlog: "Backlog") -> None:
        self._backlog = backlog
        self._transport: asyncio.Transport | None = None
        self._data = bytearray()
        self._has_ended = False
        self._is_full = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def is_open(self) -> bool:
        """Whether it can be written to."""
        return self._transport is not None and not self._transport.is_closing()

    async def read(self) -> bytes:
        """Return what has come, waiting for the first byte; b"" at the end."""
        while not self._data and not self._has_ended:
            await self._changed()
        data = bytes(self._data)
        self._data.clear()
        if self._transport is not None:
            self._transport.resume_reading()
        return data

    async def write(self, data: bytes) -> None:
        """Write; waits while the other side does not read."""
        self.write_nowait(data)
        while self._is_full and not self._has_ended:
            await self._changed()

    def write_nowait(self, data: bytes) -> None:
        """Write without waiting."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close once all was written."""
        if self._transport is not None:
            self._transport.close()

    # -- the protocol ----------------------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It stands."""
        self._transport = cast(asyncio.Transport, transport)
        self._backlog.put(self)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self._data += data
        if len(self._data) > _UNREAD_BYTES_MAX and self._transport is not None:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """The other side writes no more: the program ends reading, and may still write."""
        self._has_ended = True
        self._wake()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """It is gone."""
        self._has_ended = True
        self._wake()

    def pause_writing(self) -> None:
        """The other side does not read."""
        self._is_full = True

    def resume_writing(self) -> None:
        """It does again."""
        self._is_full = False
        self._wake()

    async def _changed(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class Backlog:
    """A listening socket with the connections that wait."""

    def __init__(self) -> None:
        self.listener: SimListener | None = None
        self._waiting: deque[Connection] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, connection: Connection) -> None:
        """Queue a connection."""
        self._waiting.append(connection)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def accept(self) -> Connection:
        """Return the next connection."""
        while not self._waiting:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._waiting.popleft()


async def serve(machine: Machine, path: str, *, mode: int = 0o600) -> Backlog:
    """Listen at a path, for the process whose code calls this. EADDRINUSE, ENOENT."""
    backlog = Backlog()
    backlog.listener = await machine.network.listen(UnixAddress(path), lambda: Connection(backlog), mode=mode)
    return backlog


def unlink(machine: Machine, path: str) -> None:
    """Remove a socket's file; nothing there is fine."""
    if machine.view.find(path, follow=False) is not None:
        machine.view.remove(path)
