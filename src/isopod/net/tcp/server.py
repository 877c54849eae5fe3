"""TcpServer: runs a handler for every connection that comes, over TCP or Unix sockets, plain or with TLS.

The handler is a coroutine function that is given a `Connection`; the connection is closed when it returns or fails. Peers' failures
(`PeerError`) end a handler as a matter of course and are counted; anything else is reported to the loop's exception handler. The whole
server works in the scheduling group it is given.

Not for thousands of messages a second on one connection: a protocol class on `world.network.listen` spares the task switches.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Any, Final, NamedTuple

from isopod.net.tcp.connection import Connection, TcpLimits
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.timers import TimerWheel
from isopod.runtime.waiters import Waiters
from isopod.world.errors import PeerError, WrongState
from isopod.world.network import Address, Listener, ServerTls, TcpOptions
from isopod.world.world import World

Handler = Callable[[Connection], Coroutine[Any, Any, None]]
SWEEP_S_MAX: Final = 30.0
_DEFAULT_OPTIONS: Final = TcpOptions()


class TcpServerStatistics(NamedTuple):
    """Counts since the beginning, and the connections now."""

    n_active: int
    n_accepted: int
    n_refused: int
    """Closed at once: there were too many."""
    n_idle_closed: int
    n_peer_failures: int
    n_handler_failures: int
    n_bytes_read: int
    n_bytes_written: int


class TcpServer:
    """Serves connections. Who made it closes it.

    Args:
        world: The ports.
        handler: Serves one connection.
        limits: Times and bounds.
        options: Of TCP.
        group: Whose share of time it uses; None for that of whoever listens.
        name: For tasks and messages.
    """

    def __init__(
        self,
        world: World,
        handler: Handler,
        *,
        limits: TcpLimits | None = None,
        options: TcpOptions | None = None,
        group: SchedulingGroup | None = None,
        name: str = "tcp",
    ) -> None:
        self._world = world
        self._handler = handler
        self._limits = limits or TcpLimits()
        self._options = options or _DEFAULT_OPTIONS
        self._group = group
        self._name = name
        self._wheel: TimerWheel | None = None
        self._listeners: list[Listener] = []
        self._tasks: dict[Connection, asyncio.Task[None]] = {}
        self._seen: dict[Connection, tuple[int, int]] = {}
        """Bytes and quiet sweeps of each connection at the last sweep: the hot path reads no clock."""
        self._waiters = Waiters()
        self._sweeping: asyncio.TimerHandle | None = None
        self._swept_at_ns = 0
        self._is_closed = False
        self._n_accepted = 0
        self._n_refused = 0
        self._n_idle_closed = 0
        self._n_peer_failures = 0
        self._n_handler_failures = 0
        self._n_bytes_read = 0
        self._n_bytes_written = 0

    async def listen(
        self, address: Address, *, tls: ServerTls | None = None, mode: int = 0o660, gid: int | None = None, backlog: int = 4096
    ) -> Listener:
        """Accept connections on one more address. `Network.listen` explains the arguments.

        Raises:
            WrongState: The server is closed.
            OSError: The address cannot be listened on.
        """
        if self._is_closed:
            raise WrongState("server", self._name, "closed", "listen")
        if self._wheel is None:
            self._wheel = TimerWheel(asyncio.get_running_loop())
        with self._group.active() if self._group is not None else nullcontext():
            listener = await self._world.network.listen(
                address, self._make, mode=mode, gid=gid, backlog=backlog, tls=tls, options=self._options
            )
        self._listeners.append(listener)
        return listener

    def connections(self) -> tuple[Connection, ...]:
        """Return the connections that are served now, oldest first."""
        return tuple(self._tasks)

    def statistics(self) -> TcpServerStatistics:
        """Return the counts."""
        return TcpServerStatistics(
            len(self._tasks),
            self._n_accepted,
            self._n_refused,
            self._n_idle_closed,
            self._n_peer_failures,
            self._n_handler_failures,
            self._n_bytes_read + sum(connection.n_bytes_read for connection in self._tasks),
            self._n_bytes_written + sum(connection.n_bytes_written for connection in self._tasks),
        )

    async def stop_accepting(self) -> None:
        """Close the listeners; connections go on."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.close()

    async def drain(self, deadline_s: float) -> bool:
        """Stop accepting, and let the handlers finish.

        Args:
            deadline_s: How long they have; then they are cancelled.

        Returns:
            Whether all finished by themselves.
        """
        await self.stop_accepting()
        try:
            async with asyncio.timeout(deadline_s):
                while self._tasks:
                    await self._waiters.wait()
        except TimeoutError:
            await self.close_all()
            return False
        return True

    async def close_all(self) -> None:
        """Cancel every handler and drop its connection."""
        tasks = list(self._tasks.items())
        for connection, task in tasks:
            connection.abort()
            task.cancel()
        await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)
        while self._tasks:
            await self._waiters.wait()

    async def close(self) -> None:
        """Stop accepting and drop everything."""
        self._is_closed = True
        await self.stop_accepting()
        await self.close_all()
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        if self._wheel is not None:
            self._wheel.close()

    def _make(self) -> Connection:
        assert self._wheel is not None
        return Connection(self._limits, self._wheel.call_later, on_made=self._on_made)

    def _on_made(self, connection: Connection) -> None:
        if len(self._tasks) >= self._limits.n_connections_max or self._is_closed:
            self._n_refused += 1
            connection.abort()
            return
        self._n_accepted += 1
        loop = asyncio.get_running_loop()
        context = None if self._group is None else self._group.context()
        task = loop.create_task(self._serve(connection), name=f"{self._name}-{self._n_accepted}", context=context)
        self._tasks[connection] = task
        task.add_done_callback(lambda _: self._forget(connection))
        if self._sweeping is None and self._limits.idle_s:
            self._sweeping = loop.call_later(self._sweep_s(), self._sweep)

    async def _serve(self, connection: Connection) -> None:
        try:
            await self._handler(connection)
        except PeerError:
            self._n_peer_failures += 1
        except Exception as error:  # noqa: BLE001 - the root of the connection's task
            self._n_handler_failures += 1
            message = f"the handler of {self._name} failed for {connection.peer}"
            asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error})
        finally:
            connection.close()
        await connection.wait_closed()

    def _forget(self, connection: Connection) -> None:
        connection.abort()
        del self._tasks[connection]
        self._seen.pop(connection, None)
        self._n_bytes_read += connection.n_bytes_read
        self._n_bytes_written += connection.n_bytes_written
        self._waiters.wake()

    def _sweep_s(self) -> float:
        return min(self._limits.idle_s / 2, SWEEP_S_MAX)

    def _sweep(self) -> None:
        """Close connections on which nothing moved for the whole idle time.

        After the loop has stood still, timers come at once, with no chance for data between them: such a sweep does not count.
        """
        self._sweeping = None
        now_ns = self._world.clock.monotonic_ns()
        if now_ns - self._swept_at_ns >= self._sweep_s() * 0.5e9:
            self._swept_at_ns = now_ns
            self._close_idle()
        if self._tasks:
            self._sweeping = asyncio.get_running_loop().call_later(self._sweep_s(), self._sweep)

    def _close_idle(self) -> None:
        n_sweeps = round(self._limits.idle_s / self._sweep_s())
        for connection in list(self._tasks):
            n_bytes = connection.n_bytes_read + connection.n_bytes_written
            known, n_quiet = self._seen.get(connection, (-1, 0))
            n_quiet = n_quiet + 1 if known == n_bytes else 0
            self._seen[connection] = (n_bytes, n_quiet)
            if n_quiet >= n_sweeps:
                self._n_idle_closed += 1
                connection.abort()
