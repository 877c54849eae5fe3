"""Packets: simulated SOCK_SEQPACKET connections, for clients (the port) and for simulated programs that serve them.

Records keep their boundaries and their order. Legal behaviours: a seeded delay per packet; a sender waits while the receiver's queue is
full; a closed peer gives b"" after all packets, and EPIPE to who sends. A packet over 64 KiB is EMSGSIZE.
"""

import asyncio
import errno
import os
import random
from collections import deque
from typing import Final

from isopod.world.sim.loop import SimLoop
from isopod.world.sim.owners import Owner

PACKET_BYTES_MAX: Final = 64 << 10
QUEUE_PACKETS_MAX: Final = 64
_DELAY_S: Final = (2e-6, 60e-6)


class PacketQueue:
    """One direction of a connection, bounded in packets.

    Args:
        loop: The source of futures.
    """

    def __init__(self, loop: SimLoop) -> None:
        self.is_ended = False
        self.is_unread = False
        self._loop = loop
        self._packets: deque[bytes] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def put(self, data: bytes) -> None:
        """Add a packet, waiting for room. EPIPE once nobody reads any more."""
        while len(self._packets) >= QUEUE_PACKETS_MAX and not self.is_unread and not self.is_ended:
            await self._wait()
        if self.is_unread or self.is_ended:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self._packets.append(data)
        self._wake()

    async def take(self) -> bytes:
        """Take the oldest packet; b"" at the end."""
        while not self._packets:
            if self.is_ended or self.is_unread:
                return b""
            await self._wait()
        data = self._packets.popleft()
        self._wake()
        return data

    def end(self) -> None:
        """Nothing more will be put."""
        self.is_ended = True
        self._wake()

    def abandon(self) -> None:
        """Nothing more will be taken."""
        self.is_unread = True
        self._packets.clear()
        self._wake()

    async def _wait(self) -> None:
        waiter = self._loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class PacketEnd:
    """One end of a connection. Who opened it closes it; the death of its process does so too.

    Args:
        loop: The loop.
        chance: For delays.
        owner: The process that has it open.
        incoming: What it receives.
        outgoing: What it sends.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, owner: Owner, *, incoming: PacketQueue, outgoing: PacketQueue) -> None:
        self._loop = loop
        self._chance = chance
        self._owner = owner
        self._in = incoming
        self._out = outgoing
        self._is_closed = False
        self._held = owner.hold(self.close)

    async def receive(self) -> bytes:
        """Return the next packet, b"" when the peer closed."""
        self._owner.check()
        data = await self._in.take()
        self._owner.check()
        return data

    async def send(self, data: bytes) -> None:
        """Send one packet, waiting while the peer's queue is full."""
        self._owner.check()
        if self._is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if len(data) > PACKET_BYTES_MAX:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        await asyncio.sleep(self._chance.uniform(*_DELAY_S))
        self._owner.check()
        await self._out.put(bytes(data))

    def shutdown_write(self) -> None:
        """Say that nothing more will be sent."""
        if self._owner.alive:
            self._out.end()

    def close(self) -> None:
        """Close; a pending `receive` returns b""."""
        if not self._is_closed:
            self._is_closed = True
            self._owner.forget(self._held)
            self._out.end()
            self._in.abandon()


class PacketListener:
    """A listening SEQPACKET socket of a simulated program.

    Args:
        loop: The source of futures.
        owner: The process that listens; its death closes the socket.
    """

    def __init__(self, loop: SimLoop, owner: Owner) -> None:
        self.is_open = True
        self.owner = owner
        self._held = owner.hold(self.close)
        self._loop = loop
        self._waiting: deque[PacketEnd] = deque()
        self._waiter: asyncio.Future[None] | None = None

    async def accept(self) -> PacketEnd:
        """Return the next connection."""
        while not self._waiting:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._waiting.popleft()

    def offer(self, end: PacketEnd) -> None:
        """Queue a connection. Called by the network."""
        self._waiting.append(end)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Stop listening; the socket's file stays, as in the kernel. Connections not accepted are closed."""
        self.is_open = False
        self.owner.forget(self._held)
        while self._waiting:
            self._waiting.popleft().close()
