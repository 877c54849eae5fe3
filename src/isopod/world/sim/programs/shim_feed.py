"""One source of output, many listeners: the main command's output, and the console's, as the simulated shim hands them on.

Every listener has a credit of its own. While anybody lags the source is held back; who lags for a second without taking a quarter of a
window is dropped with CLOSE. What nobody hears is not kept.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from isopod.world.sim.programs.frames import WINDOW_BYTES, Frame, Kind
from isopod.world.sim.programs.sockets import Connection

GRACE_S: Final = 1.0
_PROGRESS_BYTES: Final = WINDOW_BYTES // 4


class _Listener:
    """Somebody who hears it."""

    def __init__(self, connection: Connection, stream: int) -> None:
        self.connection = connection
        self.stream = stream
        self.waiting: deque[Frame] = deque()
        self.credit = WINDOW_BYTES
        self.n_taken = 0
        self.timer: asyncio.TimerHandle | None = None

    def send_what_fits(self) -> None:
        """Send as much as the credit allows."""
        while self.waiting:
            frame = self.waiting[0]
            n_bytes = 0 if frame.kind is Kind.EXIT else min(self.credit, len(frame.payload))
            if frame.kind is not Kind.EXIT and not n_bytes:
                return
            self.waiting.popleft()
            if n_bytes < len(frame.payload) and frame.kind is not Kind.EXIT:
                self.waiting.appendleft(frame._replace(payload=frame.payload[n_bytes:]))
                frame = frame._replace(payload=frame.payload[:n_bytes])
            self.credit -= n_bytes
            self.n_taken += n_bytes
            self.connection.write_nowait(frame._replace(stream=self.stream).encode())


class Feed:
    """The listeners of one source.

    Args:
        on_caught_up: Called when nobody lags any more.
    """

    def __init__(self, on_caught_up: Callable[[], None]) -> None:
        self._listeners: list[_Listener] = []
        self._on_caught_up = on_caught_up
        self._end: Frame | None = None

    def add(self, connection: Connection, stream: int) -> None:
        """Add a listener, who hears what comes from now on; after the end only that."""
        if self._end is not None:
            connection.write_nowait(self._end._replace(stream=stream).encode())
        else:
            self._listeners.append(_Listener(connection, stream))

    def remove(self, connection: Connection, stream: int | None = None) -> None:
        """Forget a listener, or all of a connection."""
        for each in [each for each in self._listeners if each.connection is connection and stream in (None, each.stream)]:
            self._forget(each)

    def grant(self, connection: Connection, stream: int, n_bytes: int) -> None:
        """A listener may be sent more."""
        for each in [each for each in self._listeners if each.connection is connection and each.stream == stream]:
            each.credit += n_bytes
            self._settle(each)

    def publish(self, kind: Kind, payload: bytes) -> None:
        """Tell everybody."""
        frame = Frame(kind, 0, payload)
        if kind is Kind.EXIT:
            self._end = frame
        for each in list(self._listeners):
            each.waiting.append(frame)
            self._settle(each)

    def publish_to(self, connection: Connection, stream: int, payload: bytes) -> None:
        """Tell one listener something."""
        for each in [each for each in self._listeners if each.connection is connection and each.stream == stream]:
            each.waiting.append(Frame(Kind.STDOUT, 0, payload))
            self._settle(each)

    @property
    def is_lagging(self) -> bool:
        """Whether the source is to be held back."""
        return any(each.waiting for each in self._listeners)

    def close(self) -> None:
        """Tell nobody anything more."""
        for each in list(self._listeners):
            self._forget(each)

    def _settle(self, listener: _Listener) -> None:
        listener.send_what_fits()
        if not listener.waiting:
            if listener.timer is not None:
                listener.timer.cancel()
                listener.timer, listener.n_taken = None, 0
            self._look()
        elif listener.timer is None:
            listener.n_taken = 0
            listener.timer = asyncio.get_running_loop().call_later(GRACE_S, self._judge, listener)

    def _judge(self, listener: _Listener) -> None:
        """A listener has lagged for a while."""
        listener.timer = None
        if listener.n_taken < _PROGRESS_BYTES:
            listener.connection.write_nowait(Frame(Kind.CLOSE, listener.stream).encode())
            self._forget(listener)
        else:
            self._settle(listener)

    def _forget(self, listener: _Listener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)
        if listener.timer is not None:
            listener.timer.cancel()
        self._look()

    def _look(self) -> None:
        if not self.is_lagging:
            self._on_caught_up()
