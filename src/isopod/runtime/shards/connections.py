"""Distribution: which shard gets an accepted connection: the one with the fewest open ones.

SO_REUSEPORT would let the kernel choose by a hash, which leaves some shards with many long connections and others with none. Here shard 0
accepts, counts what each shard has open, and passes the descriptor on. Shards report ended connections in batches; among equals the one
that was served longest ago is next. A shard that is down is passed over, and its connections are not counted any more: they died with it.
"""

from collections.abc import Callable, Sequence
from typing import Final

from isopod.world.errors import InvalidArgument
from isopod.world.network import Address, Listener
from isopod.world.shards import Part

HandOut = Callable[[int, Part], bool]
"""Gives a connection to a shard; False if it cannot take it now."""
_NONE: Final = 0


class Distribution:
    """One listener's connections over shards; it is the listener that a caller gets.

    Args:
        shards: Among which.
        hand_out: Gives one to a shard.
    """

    def __init__(self, shards: Sequence[int], hand_out: HandOut) -> None:
        if not shards:
            raise InvalidArgument("shards", list(shards), "a listener needs at least one")
        self.listener: Listener | None = None
        self.n_refused = 0
        """Connections closed because no shard could take them."""
        self._hand_out = hand_out
        self._open = dict.fromkeys(shards, _NONE)
        self._last = dict.fromkeys(shards, _NONE)
        self._n_taken = 0

    @property
    def address(self) -> Address:
        """The bound address."""
        assert self.listener is not None
        return self.listener.address

    def n_open(self) -> dict[int, int]:
        """Return how many connections each shard has open, as far as shard 0 knows."""
        return dict(self._open)

    def take(self, part: Part) -> None:
        """Give an accepted connection to a shard."""
        self._n_taken += 1
        for shard in sorted(self._open, key=lambda each: (self._open[each], self._last[each])):
            self._open[shard] += 1  # first: the connection may be over before this returns
            if self._hand_out(shard, part):
                self._last[shard] = self._n_taken
                return
            self._open[shard] -= 1
        self.n_refused += 1
        part.close()

    def on_gone(self, shard: int, n_connections: int) -> None:
        """So many of a shard's connections have ended."""
        if shard in self._open:
            self._open[shard] = max(0, self._open[shard] - n_connections)

    def forget(self, shard: int) -> None:
        """A shard is gone, and its connections with it."""
        if shard in self._open:
            self._open[shard] = 0

    async def close(self) -> None:
        """Stop accepting; open connections go on."""
        if self.listener is not None:
            await self.listener.close()
