"""Memory accounts: what pools and buffers have taken and given back, true at every moment.

A ledger is written by those who allocate and read by anybody; it allocates nothing itself. Bytes are those asked of the kernel, in pages.
Not an account of Python's own heap: that one is `sys` and the allocator's business.
"""

from typing import NamedTuple

from isopod.world.errors import BugError


class MemoryStats(NamedTuple):
    """A snapshot of a ledger, in bytes."""

    allocated: int
    """All that was ever taken."""
    freed: int
    """All that was ever given back."""
    active: int
    """What is held now: allocated less freed."""
    peak: int
    """The most that was ever held at once."""


class MemoryLedger:
    """Counts bytes in and out."""

    __slots__ = ("_allocated", "_freed", "_peak")

    def __init__(self) -> None:
        self._allocated = self._freed = self._peak = 0

    @property
    def active(self) -> int:
        """Bytes held now."""
        return self._allocated - self._freed

    def take(self, n_bytes: int) -> None:
        """Note that `n_bytes` were allocated."""
        self._allocated += n_bytes
        self._peak = max(self._peak, self._allocated - self._freed)

    def give_back(self, n_bytes: int) -> None:
        """Note that `n_bytes` were freed.

        Raises:
            BugError: More was freed than allocated.
        """
        if self._freed + n_bytes > self._allocated:
            raise BugError(f"a memory ledger of {self.active} bytes was to give back {n_bytes}")
        self._freed += n_bytes

    def statistics(self) -> MemoryStats:
        """Return the account now."""
        return MemoryStats(self._allocated, self._freed, self.active, self._peak)
