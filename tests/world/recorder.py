"""A stream protocol that records what happens to it, for tests of connections."""

import asyncio
from typing import cast


class Recorder(asyncio.Protocol):
    """Collects bytes; `changed` is set whenever something happened."""

    def __init__(self, *, echo: bool = False) -> None:
        self.echo = echo
        self.transport: asyncio.Transport | None = None
        self.received = bytearray()
        self.at_end = False
        self.lost = False
        self.error: Exception | None = None
        self.changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports only look like it
        self.changed.set()

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.echo and self.transport is not None:
            self.transport.write(data)
        self.changed.set()

    def eof_received(self) -> bool:
        self.at_end = True
        self.changed.set()
        return not self.echo

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.error = exc
        self.changed.set()

    async def wait_received(self, n_bytes: int) -> bytes:
        """Return once so many bytes came in."""
        while len(self.received) < n_bytes and not self.lost:
            await self._wait_changed()
        return bytes(self.received)

    async def wait_made(self) -> asyncio.Transport:
        """Return once the connection stands."""
        while self.transport is None:
            await self._wait_changed()
        return self.transport

    async def wait_end(self) -> None:
        """Return once the peer has said that nothing follows."""
        while not self.at_end and not self.lost:
            await self._wait_changed()

    async def wait_lost(self) -> None:
        """Return once the connection is over."""
        while not self.lost:
            await self._wait_changed()

    async def _wait_changed(self) -> None:
        self.changed.clear()
        async with asyncio.timeout(40):
            await self.changed.wait()
