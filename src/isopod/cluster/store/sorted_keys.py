"""SortedKeys: the store's keys in order, in blocks of some hundred.

Writers only note what came and went; whoever reads in order pays for putting it in place. So a put of a new key costs an append, and a
prefix is found in two binary searches. Not thread-safe, not for keys that are not strings.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

BLOCK: Final = 512
"""Keys in a block, when it was made; it is split at twice as many."""
REBUILD_SHARE: Final = 8
"""When more than one in so many keys is new, all is sorted again: nearly sorted data sorts in linear time."""


class SortedKeys:
    """An ordered set of strings."""

    __slots__ = ("_blocks", "_changed", "_firsts", "_n")

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._blocks: list[list[str]] = []
        self._firsts: list[str] = []
        self._n = 0
        self._changed: dict[str, bool] = {}
        """Keys that came (True) or went, in that order, and are not yet in place."""
        self._build(sorted(keys))

    def add(self, key: str) -> None:
        """Note a key that is not there."""
        self._changed[key] = True

    def remove(self, key: str) -> None:
        """Note that a key went."""
        self._changed[key] = False

    def starting_with(self, prefix: str, after: str = "") -> Iterator[str]:
        """Iterate over the keys that begin with `prefix` and come behind `after`; change nothing meanwhile."""
        self._settle()
        blocks = self._blocks
        if not blocks:
            return
        behind = after >= prefix and after != ""
        low = after if behind else prefix
        index = max(0, bisect_right(self._firsts, low) - 1)
        block = blocks[index]
        place = bisect_right(block, low) if behind else bisect_left(block, low)
        while True:
            for key in block[place:] if place else block:
                if not key.startswith(prefix):
                    return
                yield key
            index += 1
            if index == len(blocks):
                return
            block, place = blocks[index], 0

    def all(self) -> list[str]:
        """Return all keys, as they are now."""
        self._settle()
        return list(chain.from_iterable(self._blocks))

    def _settle(self) -> None:
        """Put what was noted in its place."""
        changed = self._changed
        if not changed:
            return
        self._changed = {}
        if len(changed) * REBUILD_SHARE > self._n:
            self._rebuild(changed)
            return
        for key, is_there in changed.items():
            if is_there:
                self._insert(key)
            else:
                self._take_out(key)

    def _rebuild(self, changed: dict[str, bool]) -> None:
        kept = [key for block in self._blocks for key in block if key not in changed]
        kept.extend(key for key, is_there in changed.items() if is_there)
        kept.sort()
        self._build(kept)

    def _build(self, keys: list[str]) -> None:
        self._blocks = [keys[start : start + BLOCK] for start in range(0, len(keys), BLOCK)]
        self._firsts = [block[0] for block in self._blocks]
        self._n = len(keys)

    def _insert(self, key: str) -> None:
        index = max(0, bisect_right(self._firsts, key) - 1)
        block = self._blocks[index]
        place = bisect_left(block, key)
        if place < len(block) and block[place] == key:
            return  # it went and came again
        insort(block, key)
        self._n += 1
        if len(block) > 2 * BLOCK:
            self._blocks[index : index + 1] = [block[:BLOCK], block[BLOCK:]]
            self._firsts.insert(index + 1, block[BLOCK])
        self._firsts[index] = self._blocks[index][0]

    def _take_out(self, key: str) -> None:
        index = bisect_right(self._firsts, key) - 1
        block = self._blocks[index] if index >= 0 else []
        place = bisect_left(block, key)
        if place == len(block) or block[place] != key:
            return  # it came and went
        del block[place]
        self._n -= 1
        if block:
            self._firsts[index] = block[0]
        else:
            del self._blocks[index], self._firsts[index]
