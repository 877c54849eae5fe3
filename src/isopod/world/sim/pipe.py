"""Pipe: one direction of a stream connection inside one machine, like a socket's buffer: bounded, in order, delivered a piece at a time.

Legal behaviours: a small seeded delay before each piece; pieces of seeded size, joined or split as a stream's may be. Nothing is ever lost.
Between machines there is a `Wire` (`world.sim.wires`) in its place.
"""

import random
from contextvars import Context
from typing import TYPE_CHECKING, Final

from isopod.world.sim.loop import SimLoop

if TYPE_CHECKING:
    from isopod.world.sim.streams import StreamEnd

PIPE_BYTES: Final = 208 << 10
READ_BYTES_MAX: Final = 256 << 10
_DELAY_NS: Final = (2_000, 60_000)
SPLIT_CHANCE: Final = 0.1


class Pipe:
    """One direction. Written by one end, delivered into the other.

    Args:
        loop: For timers.
        chance: For delays and splits.
    """

    __slots__ = ("_chance", "_is_scheduled", "_loop", "data", "is_broken", "is_ended", "reader", "writer")

    def __init__(self, loop: SimLoop, chance: random.Random) -> None:
        self.data = bytearray()
        """What can be read."""
        self.is_ended = False
        """Whether nothing more comes behind that."""
        self.is_broken = False
        """Whether the sender broke the connection off."""
        self.reader: StreamEnd | None = None
        self.writer: StreamEnd | None = None
        self._loop = loop
        self._chance = chance
        self._is_scheduled = False

    @property
    def room(self) -> int:
        """How many more bytes fit."""
        return PIPE_BYTES - len(self.data)

    @property
    def is_refused(self) -> bool:
        """Whether the writer knows that nobody reads any more."""
        return self.is_broken or self.reader is None

    def offer(self, data: bytes) -> bool:
        """Write bytes if there is room for all of them and somebody may read them; return whether."""
        if len(data) > self.room or self.is_refused:
            return False
        self.put(data)
        return True

    def put(self, data: bytes) -> None:
        """Write bytes for which there is room."""
        self.data += data
        self.wake()

    def end(self) -> None:
        """Say that nothing more will be written."""
        self.is_ended = True
        self.wake()

    def break_off(self) -> None:
        """Say that the writer left bytes of the other direction unread."""
        self.is_broken = True
        self.wake()

    def forget_writer(self) -> None:
        """The writing end is gone."""
        self.writer = None

    def wake(self) -> None:
        """Have something delivered soon; one delivery is under way at a time, so the order is kept."""
        if not self._is_scheduled:
            self._is_scheduled = True
            low, high = _DELAY_NS
            at_ns = self._loop.elapsed_ns + low + int((high - low) * self._chance.random())
            self._loop.call_at_ns(at_ns, self._deliver, context=self._context())

    def take(self) -> bytes:
        """Take the next piece."""
        data = self.data
        n_bytes = min(len(data), READ_BYTES_MAX)
        if n_bytes > 1 and self._chance.random() < SPLIT_CHANCE and (self.reader is None or self.reader.may_split):
            n_bytes = 1 + int(self._chance.random() * (n_bytes - 1))
        if n_bytes == len(data):
            piece = bytes(data)
            data.clear()
        else:
            piece = bytes(data[:n_bytes])
            del data[:n_bytes]
        return piece

    def _context(self) -> Context | None:
        return self.reader.context if self.reader is not None else None

    def _deliver(self) -> None:
        self._is_scheduled = False
        if self.reader is not None:
            self.reader.on_readable()
