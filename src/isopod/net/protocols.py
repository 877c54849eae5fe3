"""A registry of protocols: names to what serves them, open to third parties.

A protocol is a function that makes a `ProtocolServer` for a World. `TcpServer` and the HTTP server are such servers as they are; a plain
asyncio protocol becomes one by `from_factory`. `Endpoints` listens on addresses by the protocol's name and takes all down again.

    registry = ProtocolRegistry()
    registry.register("line", lambda world: line_server(world, answer))
    endpoints = Endpoints(world, registry)
    await endpoints.listen(TcpAddress("127.0.0.1", 7000), protocol="line", tls=tls)

A registry is a value that is handed on: there is no global one that imports would fill.
"""

import asyncio
import difflib
from collections.abc import Callable
from typing import Final, Protocol, cast

from isopod.world.errors import AlreadyExists, InvalidArgument, NotFound, WrongState
from isopod.world.network import Address, Listener, ProtocolFactory, ServerTls
from isopod.world.world import World

NAME_CHARS_MAX: Final = 64


class ProtocolServer(Protocol):
    """Serves one protocol on any number of addresses."""

    async def listen(self, address: Address, *, tls: ServerTls | None = None) -> Listener:
        """Serve one more address."""

    async def drain(self, deadline_s: float) -> object:
        """Stop accepting, and let what is under way finish in that time."""

    async def close(self) -> None:
        """Stop accepting and drop everything."""


Maker = Callable[[World], ProtocolServer]


class ProtocolRegistry:
    """Names to makers of servers."""

    def __init__(self) -> None:
        self._makers: dict[str, Maker] = {}

    def register(self, name: str, maker: Maker) -> None:
        """Add a protocol.

        Args:
            name: Lower-case letters, digits, "-", "." and "/".
            maker: Makes a server.

        Raises:
            InvalidArgument: The name is none.
            AlreadyExists: The name is taken.
        """
        if not 0 < len(name) <= NAME_CHARS_MAX or name != name.lower() or not all(c.isalnum() or c in "-./" for c in name):
            raise InvalidArgument("protocol name", name, "want lower-case letters, digits, '-', '.' and '/'")
        if name in self._makers:
            raise AlreadyExists("protocol", name)
        self._makers[name] = maker

    def remove(self, name: str) -> None:
        """Forget a protocol; servers that were made go on.

        Raises:
            NotFound: There is none of that name.
        """
        self.get(name)
        del self._makers[name]

    def get(self, name: str) -> Maker:
        """Return a protocol's maker.

        Raises:
            NotFound: There is none of that name.
        """
        found = self._makers.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self._makers, 1)
            known = ", ".join(self._makers) or "none"
            raise NotFound("protocol", name, f"did you mean {near[0]}?" if near else f"known: {known}")
        return found

    def names(self) -> tuple[str, ...]:
        """Return the names, in the order they were registered."""
        return tuple(self._makers)


class Endpoints:
    """The addresses that are served, one server for each protocol in use. Who made it closes it.

    Args:
        world: The ports.
        registry: Which protocols there are.
    """

    def __init__(self, world: World, registry: ProtocolRegistry) -> None:
        self._world = world
        self._registry = registry
        self._servers: dict[str, ProtocolServer] = {}
        self._is_closed = False

    async def listen(self, address: Address, *, protocol: str, tls: ServerTls | None = None) -> Listener:
        """Serve a protocol on one more address.

        Args:
            address: Where.
            protocol: The name it is registered by.
            tls: Secure it.

        Raises:
            NotFound: There is no such protocol.
            WrongState: Closed.
            OSError: The address cannot be listened on.
        """
        if self._is_closed:
            raise WrongState("endpoints", "", "closed", "listen")
        server = self._servers.get(protocol)
        if server is None:
            server = self._servers[protocol] = self._registry.get(protocol)(self._world)
        return await server.listen(address, tls=tls)

    async def drain(self, deadline_s: float) -> None:
        """Let every server finish what is under way, all at the same time."""
        await asyncio.gather(*(server.drain(deadline_s) for server in self._servers.values()))

    async def close(self) -> None:
        """Close every server, the newest first."""
        self._is_closed = True
        while self._servers:
            await self._servers.popitem()[1].close()


def from_factory(factory: ProtocolFactory) -> Maker:
    """Return a maker for a plain asyncio protocol: the fast way, one object per connection and no task.

    Args:
        factory: Makes the `asyncio.Protocol` of one connection.
    """
    return lambda world: _FactoryServer(world, factory)


class _FactoryServer:
    """Listens with a factory, and remembers connections so that they can be dropped."""

    def __init__(self, world: World, factory: ProtocolFactory) -> None:
        self._world = world
        self._factory = factory
        self._listeners: list[Listener] = []
        self._open: dict[_Watched, None] = {}

    async def listen(self, address: Address, *, tls: ServerTls | None = None) -> Listener:
        """See `ProtocolServer.listen`."""
        listener = await self._world.network.listen(address, lambda: _Watched(self._factory(), self._open), tls=tls)
        self._listeners.append(listener)
        return listener

    async def drain(self, deadline_s: float) -> bool:
        """Stop accepting; a plain protocol cannot be told to finish, so its connections have until the deadline."""
        await self._stop()
        try:
            async with asyncio.timeout(deadline_s):
                for watched in list(self._open):
                    await watched.wait_lost()
        except TimeoutError:
            await self.close()
            return False
        return True

    async def close(self) -> None:
        """Stop accepting and drop every connection."""
        await self._stop()
        for watched in list(self._open):
            watched.abort()
            await watched.wait_lost()

    async def _stop(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.close()


class _Watched(asyncio.Protocol):
    """Stands in for a protocol at the beginning and the end of its connection; data go straight to it."""

    def __init__(self, inner: asyncio.BaseProtocol, open_: "dict[_Watched, None]") -> None:
        self._inner = inner
        self._open = open_
        self._lost = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        for name in ("data_received", "eof_received", "pause_writing", "resume_writing"):
            setattr(self, name, getattr(inner, name, getattr(self, name)))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the connection."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's only look like it
        self._open[self] = None
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._open.pop(self, None)
        self._inner.connection_lost(exc)
        self._lost.set()

    def abort(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    async def wait_lost(self) -> None:
        """Wait until it is over; a connection that was handed to another protocol is no longer ours."""
        if self._transport is not None and self._transport.get_protocol() is self:
            await self._lost.wait()
