"""Output: what a connection writes: collected within one turn, sent in one piece, slowed down to the peer's pace."""

import asyncio
from typing import Final

from isopod.net.http.core import Tally
from isopod.net.http.timing import Pace

FLUSH_BYTES: Final = 64 << 10
"""How much is collected before it is written."""


class Output:
    """The writing half of a connection.

    Args:
        transport: Where to.
        tally: Counts the bytes.
    """

    __slots__ = ("_n_bytes", "_pieces", "_tally", "_waiter", "is_collecting", "is_lost", "is_paused", "pace", "transport")

    def __init__(self, transport: asyncio.Transport, tally: Tally) -> None:
        self.transport = transport
        self.is_collecting = False
        """Whether whoever set this will call `flush`."""
        self.is_paused = False
        self.is_lost = False
        self.pace = Pace()
        self._tally = tally
        self._pieces: list[bytes] = []
        self._n_bytes = 0
        self._waiter: asyncio.Future[None] | None = None

    def write(self, *pieces: bytes) -> None:
        """Send pieces, at the latest with the next `flush`."""
        self._pieces += pieces
        self._n_bytes += sum(map(len, pieces))
        if not self.is_collecting or self._n_bytes > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        pieces = self._pieces
        if not pieces:
            return
        self._pieces = []
        n_bytes, self._n_bytes = self._n_bytes, 0
        self._tally.n_bytes_sent += n_bytes
        if len(pieces) == 1:
            self.transport.write(pieces[0])
        elif n_bytes <= FLUSH_BYTES:
            self.transport.write(b"".join(pieces))
        else:
            self.transport.writelines([piece for piece in pieces if piece])

    def pause(self, now: float) -> None:
        """The peer does not take what was written."""
        self.is_paused = True
        self.begin_pace(now)

    def resume(self) -> None:
        """It did."""
        self.is_paused = False
        self._wake()

    def lose(self) -> None:
        """The connection is gone."""
        self.is_lost = True
        self._wake()

    async def wait_writable(self) -> None:
        """Wait until the peer has taken enough of what was written, or is gone."""
        while self.is_paused and not self.is_lost:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def begin_pace(self, now: float) -> None:
        """Begin to look how fast the peer takes what was written."""
        self.pace.begin(now, -self.transport.get_write_buffer_size())

    def is_taken(self, now: float, rate: float) -> bool:
        """Return whether the peer took at least `rate` bytes a second since the last look."""
        return self.pace.look(now, -self.transport.get_write_buffer_size(), rate)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
