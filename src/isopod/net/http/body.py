"""RequestBody: a request's body on its way from the connection to its handler.

A bounded queue: over `HttpLimits.body_buffer_bytes` the connection stops reading until the handler has taken half of it. The bound on
the whole is looked at when the handler reads, so that a handler that expects much can say so. Nothing is copied.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, Protocol

from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import HttpError
from isopod.world.errors import IsopodError, WrongState

PIECE_BYTES: Final = 64
"""What a piece costs beside its bytes, so that many small ones count too."""


class Flow(Protocol):
    """What a body asks of its connection."""

    def want_body(self) -> None:
        """The handler waits: invite the peer to send, if it waits for that."""

    def pause_body(self) -> None:
        """Stop reading."""

    def resume_body(self) -> None:
        """Read again."""


class RequestBody:
    """One body.

    Args:
        flow: Its connection.
        limits: The server's.
        n_bytes: What was announced, or None for a chunked body.
    """

    __slots__ = ("_error", "_flow", "_is_paused", "_is_taken", "_limits", "_n_buffered", "_n_bytes", "_pieces", "_waiter", "is_complete")

    def __init__(self, flow: Flow, limits: HttpLimits, n_bytes: int | None) -> None:
        self.is_complete = False
        self._flow = flow
        self._limits = limits
        self._n_bytes = n_bytes
        self._pieces: deque[bytes] = deque()
        self._n_buffered = 0
        self._is_paused = False
        self._is_taken = False
        self._error: IsopodError | None = None
        self._waiter: asyncio.Future[None] | None = None

    # -- the connection's side -------------------------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Add what came."""
        self._pieces.append(data)
        self._n_buffered += len(data) + PIECE_BYTES
        if self._n_buffered >= self._limits.body_buffer_bytes and not self._is_paused:
            self._is_paused = True
            self._flow.pause_body()
        self._wake()

    def finish(self) -> None:
        """All of it came."""
        self.is_complete = True
        self._wake()

    def fail(self, error: IsopodError) -> None:
        """No more will come; whoever reads gets `error`."""
        if not self.is_complete and self._error is None:
            self._error = error
            self._wake()

    def drop(self) -> None:
        """Nobody will read it: forget what waits."""
        self._pieces.clear()
        self._n_buffered = 0
        self._is_paused = False

    # -- the handler's side ----------------------------------------------------------------------------------------------------------

    async def read(self, n_bytes_max: int | None) -> bytes:
        """See `Request.read`."""
        return b"".join([piece async for piece in self.stream(n_bytes_max)])

    async def stream(self, n_bytes_max: int | None) -> AsyncIterator[bytes]:
        """See `Request.stream`."""
        if self._is_taken:
            raise WrongState("request body", "", "read already", "be read again", hint="keep what `await request.read()` returned")
        self._is_taken = True
        limit = self._limits.body_bytes_max if n_bytes_max is None else n_bytes_max
        n_left = limit
        if self._n_bytes is not None and self._n_bytes > limit:
            raise HttpError(413, f"a body of {self._n_bytes} bytes, at most {limit} are taken")
        while True:
            while self._pieces:
                piece = self._take()
                n_left -= len(piece)
                if n_left < 0:
                    raise HttpError(413, f"the body has more than {limit} bytes")
                yield piece
            if self._error is not None:
                raise self._error
            if self.is_complete:
                return
            await self._wait()

    def _take(self) -> bytes:
        piece = self._pieces.popleft()
        self._n_buffered -= len(piece) + PIECE_BYTES
        if self._is_paused and self._n_buffered * 2 <= self._limits.body_buffer_bytes:
            self._is_paused = False
            self._flow.resume_body()
        return piece

    async def _wait(self) -> None:
        self._flow.want_body()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
