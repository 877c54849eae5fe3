"""RingBuffer: the last so many things, in constant memory.

For histories (the last log lines, the last errors) with `drop_oldest`, for bounded hand-over with `refuse`. Not for waiting: that is
`asyncio.Queue`; not shared with another process: that is the shards' ring.
"""

from collections.abc import Iterator
from typing import Final, Generic, Literal, TypeVar

from isopod.world.errors import Exhausted, InvalidArgument

T = TypeVar("T")
Overflow = Literal["drop_oldest", "refuse"]
CAPACITY_MAX: Final = 1 << 24


class RingBuffer(Generic[T]):
    """A queue of at most `capacity` items.

    Args:
        capacity: From 1 to 16 Mi.
        overflow: What `push` does to a full one.
    """

    __slots__ = ("_first", "_items", "_n", "n_dropped", "overflow")

    def __init__(self, capacity: int, overflow: Overflow = "drop_oldest") -> None:
        if not 1 <= capacity <= CAPACITY_MAX:
            raise InvalidArgument("ring capacity", capacity, f"it must be from 1 to {CAPACITY_MAX}")
        self._items: list[T | None] = [None] * capacity
        self._first = 0
        self._n = 0
        self.overflow: Overflow = overflow
        self.n_dropped = 0
        """Items that were pushed out unread."""

    @property
    def capacity(self) -> int:
        """The most it holds."""
        return len(self._items)

    @property
    def is_full(self) -> bool:
        """Whether the next push drops or is refused."""
        return self._n == len(self._items)

    def __len__(self) -> int:
        """Return how many items it holds."""
        return self._n

    def __iter__(self) -> Iterator[T]:
        """Iterate over the items, the oldest first, as they are now."""
        return iter([self[index] for index in range(self._n)])

    def __getitem__(self, index: int) -> T:
        """Return an item: 0 is the oldest, -1 the newest. IndexError outside."""
        if not -self._n <= index < self._n:
            raise IndexError(f"{index} in a ring of {self._n}")
        item: T = self._items[(self._first + index % self._n) % len(self._items)]  # type: ignore[assignment]  # inside the range all are set
        return item

    def push(self, item: T) -> None:
        """Add at the end.

        Raises:
            Exhausted: It is full and refuses.
        """
        if self.is_full:
            if self.overflow == "refuse":
                raise Exhausted("ring buffer", f"it holds {self._n} items")
            self.n_dropped += 1
            self._first = (self._first + 1) % len(self._items)
            self._n -= 1
        self._items[(self._first + self._n) % len(self._items)] = item
        self._n += 1

    def pop(self) -> T:
        """Remove and return the oldest item. IndexError if there is none."""
        item = self[0]
        self._items[self._first] = None
        self._first = (self._first + 1) % len(self._items)
        self._n -= 1
        return item

    def clear(self) -> None:
        """Forget all items; they do not count as dropped."""
        self._items = [None] * len(self._items)
        self._first = self._n = 0
