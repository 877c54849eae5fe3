"""Heartbeat: notices a peer that is there no more although its connection still stands.

Both ends look once an interval. Whoever heard nothing since the last look asks (PING), and after three silent looks in a row gives the
peer up. So a connection with traffic costs a flag per read, an idle one a PING and a PONG per interval, and a dead peer is noticed after
three to four intervals, whether it died, hangs, or a box between swallows all. Only where the hellos agreed on an interval.
"""

import asyncio
from typing import TYPE_CHECKING

from isopod.net.rpc.limits import HEARTBEATS_MISSED_MAX
from isopod.wire import frames as f
from isopod.world.errors import Disconnected

if TYPE_CHECKING:
    from isopod.net.rpc.connection import Connection


class Heartbeat:
    """One end's look at the other.

    Args:
        connection: Whose peer.
    """

    __slots__ = ("_asked", "_connection", "_interval_s", "_n_silent", "_timer", "_token", "was_heard")

    def __init__(self, connection: "Connection") -> None:
        self.was_heard = False
        """Set whenever bytes come."""
        self._connection = connection
        self._interval_s = 0.0
        self._n_silent = 0
        self._token = 0
        self._timer: asyncio.TimerHandle | None = None
        self._asked: dict[int, asyncio.Future[None]] = {}

    def start(self, interval_s: float) -> None:
        """Begin to look every `interval_s` seconds."""
        self._interval_s = interval_s
        self._timer = self._connection.loop.call_later(interval_s, self._look)

    def stop(self) -> None:
        """The connection has ended: whoever waits for a PONG is told why."""
        if self._timer is not None:
            self._timer.cancel()
        asked, self._asked = self._asked, {}
        for future in asked.values():
            if not future.done():
                future.set_result(None)

    async def ping(self) -> float:
        """Return how many seconds the peer took to answer. Raises the error of a connection that ends meanwhile."""
        connection = self._connection
        if connection.error is not None:
            raise connection.error
        began_s = connection.loop.time()
        token = self._send_ping()
        future = self._asked[token] = connection.loop.create_future()
        try:
            await future
        finally:
            self._asked.pop(token, None)
        if connection.error is not None:
            raise connection.error
        return connection.loop.time() - began_s

    def on_pong(self, token: int) -> None:
        """The peer answered; a token nobody asked with is late."""
        future = self._asked.pop(token, None)
        if future is not None and not future.done():
            future.set_result(None)

    def _send_ping(self) -> int:
        self._token += 1
        self._connection.send(f.Ping(self._token))
        return self._token

    def _look(self) -> None:
        connection = self._connection
        self._n_silent = 0 if self.was_heard else self._n_silent + 1
        self.was_heard = False
        if self._n_silent > HEARTBEATS_MISSED_MAX:
            silent_s = self._interval_s * self._n_silent
            connection.drop(Disconnected(connection.peer, f"silent for {silent_s:g} s: given up", "look whether it still runs"))
            return
        if self._n_silent:
            self._send_ping()
        self._timer = connection.loop.call_later(self._interval_s, self._look)
