"""HttpServer: listeners, one handler, and the way down.

    server = HttpServer(world, router, logger=logger, metrics=registry)
    listener = await server.listen(TcpAddress("127.0.0.1", 0))
    ...
    await server.drain(10.0)
    await server.close()

All connections live in the loop's thread. A handler that is a plain function is answered without a task; a coroutine function runs in a
task of the server's scheduling group, which is cancelled when its client goes.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from isopod.net.http.connection import HttpConnection
from isopod.net.http.core import Core, HttpStatistics, Tally, total
from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import Handler
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.waiters import Waiters
from isopod.world import network
from isopod.world.errors import WrongState
from isopod.world.network import Address, ProtocolFactory, ServerTls, UnixAddress
from isopod.world.world import World

LOOK_S: Final = 0.02
"""How often a drain looks whether upgraded connections have ended."""
FORCED_S: Final = 5.0
"""How long handlers that were cancelled may take to end."""


class HttpListener:
    """One listening socket of a server.

    Args:
        listener: The port's.
        tally: Its counts.
    """

    def __init__(self, listener: network.Listener, tally: Tally) -> None:
        self._listener = listener
        self._tally = tally
        self._is_open = True

    @property
    def address(self) -> Address:
        """The bound address (with the real port)."""
        return self._listener.address

    def statistics(self) -> HttpStatistics:
        """Return its counts."""
        return self._tally.statistics()

    async def close(self) -> None:
        """Accept no more; open connections go on."""
        if self._is_open:
            self._is_open = False
            await self._listener.close()


class HttpServer:
    """Serves HTTP/1.1 (and 1.0).

    Args:
        world: The ports.
        handler: Answers every request; a `Router`, or any `Handler`.
        logger: For failures of handlers ("http.handler_failed").
        metrics: For `http_*`, one series per listener.
        limits: What it bears.
        group: The scheduling group of handlers' tasks, or None for that of whoever listens.
    """

    def __init__(
        self,
        world: World,
        handler: Handler,
        *,
        logger: Logger,
        metrics: Registry,
        limits: HttpLimits = HttpLimits(),  # noqa: B008 - frozen
        group: SchedulingGroup | None = None,
    ) -> None:
        self._world = world
        self._handler = handler
        self._logger = logger
        self._metrics = metrics
        self._limits = limits
        self._group = group
        self._core: Core | None = None
        self._listeners: list[HttpListener] = []
        self._gone = Waiters()
        self._unhook: Callable[[], None] = _nothing

    @property
    def listeners(self) -> tuple[HttpListener, ...]:
        """In the order they were opened."""
        return tuple(self._listeners)

    async def listen(
        self, address: Address, *, tls: ServerTls | None = None, mode: int = 0o660, gid: int | None = None, backlog: int = 4096
    ) -> HttpListener:
        """Accept connections.

        Args:
            address: Where; TCP port 0 takes a free one.
            tls: Certificates, or None for plain text.
            mode: Permission bits of a Unix socket's file.
            gid: Its group.
            backlog: Connections that may wait to be accepted.

        Raises:
            OSError: As `Network.listen`.
            WrongState: The server drains or is closed.
        """
        core = self._ensure_core()
        if core.is_draining:
            raise WrongState("HTTP server", _name(address), "going down", "listen")
        tally = Tally(self._metrics, _name(address))
        opened = await self._world.network.listen(
            address, lambda: HttpConnection(core, tally), mode=mode, gid=gid, backlog=backlog, tls=tls
        )
        core.tallies.append(tally)
        listener = HttpListener(opened, tally)
        self._listeners.append(listener)
        return listener

    def factory(self, name: str) -> ProtocolFactory:
        """Return what makes the protocols of connections that somebody else accepts, another shard for one.

        Args:
            name: What stands for the listener in metrics.
        """
        core = self._ensure_core()
        tally = Tally(self._metrics, name)
        core.tallies.append(tally)
        return lambda: HttpConnection(core, tally)

    def statistics(self) -> HttpStatistics:
        """Return the sum of all listeners' counts."""
        if self._core is None:
            return total([])
        self._core.forget_closed()
        return total([tally.statistics() for tally in self._core.tallies])

    async def drain(self, deadline_s: float) -> None:
        """Go down gently: accept no more, close idle connections, let busy ones finish with `Connection: close`, tell upgraded ones.

        Args:
            deadline_s: After so many seconds what is left is cancelled and cut.
        """
        core = self._core
        if core is None:
            return
        core.is_draining = True
        for listener in self._listeners:
            await listener.close()
        for peer in list(core.connections.values()):
            peer.begin_drain()
        for _, upgrade, _ in list(core.upgraded.values()):
            if upgrade.on_drain is not None:
                upgrade.on_drain()
        try:
            async with asyncio.timeout(deadline_s):
                await self._wait_gone(core)
        except TimeoutError:
            await self._cut(core)
        core.publish()

    async def close(self) -> None:
        """Stop at once: cut every connection, cancel every handler. May be called again."""
        core = self._core
        if core is None or core.is_closed:
            return
        core.is_draining = True
        for listener in self._listeners:
            await listener.close()
        await self._cut(core)
        core.publish()
        self._unhook()
        core.is_closed = True
        core.wheel.close()

    def _ensure_core(self) -> Core:
        if self._core is None:
            self._core = Core(self._world, self._handler, logger=self._logger, limits=self._limits, group=self._group)
            self._core.on_gone = self._gone.wake
            self._unhook = self._metrics.before_snapshot(self._publish)
        return self._core

    def _publish(self) -> None:
        """Bring the counts up to date for a snapshot; for others that read the pages the core does so once a second."""
        if self._core is not None:
            self._core.publish()

    async def _wait_gone(self, core: Core) -> None:
        while core.connections or core.upgraded:
            if core.connections:
                await self._gone.wait()
            else:
                await asyncio.sleep(LOOK_S)
                core.forget_closed()

    async def _cut(self, core: Core) -> None:
        for peer in list(core.connections.values()):
            peer.force()
        for transport, _, _ in list(core.upgraded.values()):
            transport.abort()
        running = list(core.tasks.values())
        for peer, _ in running:
            peer.cancel()
        try:
            async with asyncio.timeout(FORCED_S):
                await asyncio.gather(*(task for _, task in running), return_exceptions=True)
                await self._wait_gone(core)
        except TimeoutError:
            self._logger.error("http.handlers_left", n_tasks=len(core.tasks), n_connections=len(core.connections))


def _name(address: Address) -> str:
    return f"unix:{address.path}" if isinstance(address, UnixAddress) else f"{address.host}:{address.port}"


def _nothing() -> None:
    """Take off a hook that was never set."""
