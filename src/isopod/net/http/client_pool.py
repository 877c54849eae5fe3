"""The HTTP client's connections: bounded in number, kept while useful, handed to who waits longest.

A request takes the freshest idle connection to its host, else opens one, else (at the bound) closes another host's oldest idle one, else
waits in line. Rules: every open or opening connection counts against the bounds until it is lost; a freed place goes to the first waiter
that it helps. Unused connections are closed after `idle_s`.
"""

import asyncio
from collections.abc import Awaitable
from typing import NamedTuple, Protocol

from isopod.net.http.client_connection import ClientConnection
from isopod.net.http.client_messages import ClientLimits
from isopod.runtime.timers import TimerWheel, WheelTimer
from isopod.runtime.waiters import Waiters
from isopod.world.errors import Exhausted, WrongState
from isopod.world.network import Address


class Key(NamedTuple):
    """What connections can be shared by: the origin, and the address if it is not the origin's own."""

    scheme: str
    host: str
    port: int
    address: Address | None


class Opener(Protocol):
    """Connects a connection."""

    def __call__(self, key: Key, connection: ClientConnection) -> Awaitable[None]:
        """Connect. Raises IsopodError."""


class _Waiter:
    """A request in line. `result` is set to a connection, or to None: a place to open one."""

    __slots__ = ("key", "result")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.result: asyncio.Future[ClientConnection | None] = asyncio.get_running_loop().create_future()


class Pool:
    """All connections of one client.

    Args:
        limits: Bounds.
        wheel: For idle time.
        connect: Opens a connection to a key.
    """

    def __init__(self, limits: ClientLimits, wheel: TimerWheel, connect: Opener) -> None:
        self._limits = limits
        self._wheel = wheel
        self._connect = connect
        self._idle: dict[Key, list[ClientConnection]] = {}
        self._keys: dict[ClientConnection, Key] = {}
        self._n_open = 0
        self._per_host: dict[Key, int] = {}
        self._waiters: list[_Waiter] = []
        self._gone = Waiters()
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._reaper: WheelTimer | None = None
        self.n_opened = 0
        self.n_reused = 0

    @property
    def n_open(self) -> int:
        """Connections open or being opened."""
        return self._n_open

    @property
    def n_idle(self) -> int:
        """Connections that nobody uses."""
        return sum(len(idle) for idle in self._idle.values())

    @property
    def n_waiting(self) -> int:
        """Requests in line."""
        return len(self._waiters)

    async def acquire(self, key: Key, *, fresh: bool = False) -> ClientConnection:
        """Return a connection to use; when its exchange ends it comes back by itself.

        Args:
            key: Where to.
            fresh: Do not take a used one.

        Raises:
            Exhausted: Too many wait already.
            WrongState: The pool is closed.
            IsopodError: Connecting failed.
        """
        if self._is_closed:
            raise WrongState("HTTP client", "", "closed", "send a request")
        if not fresh:
            found = self.take_idle(key)
            if found is not None:
                return found
        if not self._take_place(key):
            found = await self._wait(key, fresh=fresh)
            if found is not None:
                return found
        return await self._open(key)

    async def close(self) -> None:
        """Cut all connections and fail who waits; returns when all are gone."""
        self._is_closed = True
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.result.done():
                waiter.result.set_exception(WrongState("HTTP client", "", "closed", "send a request"))
        for connection in list(self._keys):
            connection.abort()
        while self._n_open:
            await self._gone.wait()

    # --- places -------------------------------------------------------------------------------------------------------

    def _take_place(self, key: Key) -> bool:
        """Count one more connection in, if the bounds (after closing an idle one of another host) allow it."""
        if self._per_host.get(key, 0) >= self._limits.connections_per_host_max:
            return False
        if self._n_open >= self._limits.connections_max:
            self._evict()
            return False  # its place is free when it is gone
        self._n_open += 1
        self._per_host[key] = self._per_host.get(key, 0) + 1
        return True

    def _give_place(self, key: Key) -> None:
        self._n_open -= 1
        left = self._per_host[key] - 1
        if left:
            self._per_host[key] = left
        else:
            del self._per_host[key]
        self._gone.wake()
        self._serve_waiters()

    def _evict(self) -> None:
        """Close an idle connection of some host, its oldest."""
        for idle in self._idle.values():
            if idle:
                victim = idle.pop(0)
                victim.abort()
                return

    async def _wait(self, key: Key, *, fresh: bool) -> ClientConnection | None:
        if len(self._waiters) >= self._limits.waiting_max:
            raise Exhausted("HTTP client", f"{len(self._waiters)} requests wait for a connection")
        waiter = _Waiter(key)
        self._waiters.append(waiter)
        try:
            found = await waiter.result
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            elif not waiter.result.cancelled() and waiter.result.exception() is None:
                self._pass_on(key, waiter.result.result())
            raise
        if found is not None and fresh:  # a used one will not do: its place will
            found.abort()
            return await self._wait(key, fresh=fresh)
        return found

    def _pass_on(self, key: Key, found: ClientConnection | None) -> None:
        """Who was served is not there any more: somebody else gets it."""
        if found is None:
            self._give_place(key)
        elif not found.is_lost:
            self._on_free(found)

    def _serve_waiters(self) -> None:
        """Give free places to those who waited longest."""
        for waiter in list(self._waiters):
            if self._n_open >= self._limits.connections_max:
                return
            if waiter.result.done() or not self._take_place(waiter.key):
                continue
            self._waiters.remove(waiter)
            waiter.result.set_result(None)

    # --- connections --------------------------------------------------------------------------------------------------

    async def _open(self, key: Key) -> ClientConnection:
        """Open a connection in a place that was taken for it."""
        peer = f"{key.host}:{key.port}" if key.address is None else str(key.address[0])
        connection = ClientConnection(peer, self._limits, self._wheel, on_free=self._on_free, on_gone=self._on_gone)
        try:
            await self._connect(key, connection)
        except BaseException:
            connection.abort()  # it may stand already
            self._give_place(key)
            raise
        if connection.is_lost:
            self._give_place(key)
            return connection
        self._keys[connection] = key
        self.n_opened += 1
        if self._is_closed:
            connection.abort()
        return connection

    def take_idle(self, key: Key) -> ClientConnection | None:
        """Return an idle connection, None if there is none."""
        idle = self._idle.get(key)
        while idle:
            connection = idle.pop()
            if connection.is_usable:
                self.n_reused += 1
                return connection
        return None

    def drop_idle(self, key: Key) -> None:
        """Cut the connections to a key that nobody uses."""
        for connection in list(self._idle.get(key, ())):
            connection.abort()

    def _on_free(self, connection: ClientConnection) -> None:
        """A connection's exchange has ended."""
        key = self._keys[connection]
        if self._is_closed:
            connection.abort()
            return
        for waiter in self._waiters:
            if waiter.key == key and not waiter.result.done():
                self._waiters.remove(waiter)
                self.n_reused += 1
                waiter.result.set_result(connection)
                return
        if self._waiters and self._n_open >= self._limits.connections_max:
            connection.abort()  # its place is worth more to another host
            return
        self._idle.setdefault(key, []).append(connection)
        connection.idle_since_s = self._loop.time()
        if self._reaper is None:
            self._reaper = self._wheel.call_later(self._limits.idle_s, self._reap)

    def _reap(self) -> None:
        """Close what has been idle too long; look again when the next one will have been. One timer for all."""
        self._reaper = None
        longest_s = self._limits.idle_s
        now_s = self._loop.time()
        since_s = [each.idle_since_s for idle in self._idle.values() for each in idle]
        for idle in list(self._idle.values()):
            for connection in list(idle):
                if now_s - connection.idle_since_s >= longest_s:
                    self._forget_idle(connection)
                    connection.abort()
        left_s = [each + longest_s - now_s for each in since_s if now_s - each < longest_s]
        if left_s:
            self._reaper = self._wheel.call_later(min(left_s), self._reap)

    def _on_gone(self, connection: ClientConnection) -> None:
        """A connection is lost, or belongs to somebody else now."""
        self._forget_idle(connection)
        key = self._keys.pop(connection, None)
        if key is not None:
            self._give_place(key)

    def _forget_idle(self, connection: ClientConnection) -> None:
        key = self._keys.get(connection)
        idle = self._idle.get(key) if key is not None else None
        if key is not None and idle is not None:
            if connection in idle:
                idle.remove(connection)
            if not idle:
                del self._idle[key]
