"""Content: the bytes of one simulated file, as they are seen and as they would survive a crash.

What is written is seen at once and remembered as pending until it is made durable: by `sync` (all that was written before it began) or by
`sync_write` (one write, and what it covers). Space that was only reserved costs no memory: bytes behind the last written one are zeros.

Legal outcomes of a crash, as of a page cache over a device with sectors of 512 bytes:

- `lose`: nothing that was pending survives (the worst a kernel may do, always).
- `survive`: each sector is as it was after any of the writes that touched it, or as it was durable; so writes survive in any order, in
  part, torn at sectors. The size is one of those that the file had. After a pending cut the writes survive in order, up to any one of
  them.

Legal outcomes of a failed sync (`drop`): what was pending counts as clean afterwards although it is not durable, and later syncs
succeed; the lost bytes are seen until a crash, or gone at once (the pages were dropped). A misdirected write is durable at another
sector than it was for, of this file or another, and the right one keeps its old bytes. Source: "Can applications recover from fsync
failures?", Rebello et al., 2020.
"""

import random
from collections.abc import Callable
from typing import Final, NamedTuple

SECTOR_BYTES: Final = 512
_PENDING_MAX: Final = 4096
_PENDING_BYTES_MAX: Final = 8 << 20

Misdirect = Callable[["Content", int, bytes], bool]
"""Asked for each write that becomes durable; True: it landed elsewhere."""


class _Pending(NamedTuple):
    """A change that is not durable: bytes at an offset, or with None a new size."""

    offset: int
    data: bytes | None

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + (0 if self.data is None else len(self.data))


class _Image:
    """Bytes with a tail of zeros that take no memory."""

    __slots__ = ("head", "size")

    def __init__(self) -> None:
        self.head = bytearray()
        self.size = 0

    def read(self, offset: int, n_bytes: int) -> bytes:
        end = min(offset + n_bytes, self.size)
        found = bytes(self.head[offset:end])
        return found if len(found) >= end - offset else found + bytes(end - offset - len(found))

    def write(self, offset: int, data: bytes) -> None:
        n_gap = offset - len(self.head)
        if n_gap > 0:
            self.head += bytes(n_gap)
        end = offset + len(data)
        self.head[offset:end] = data
        self.size = max(self.size, end)

    def resize(self, n_bytes: int) -> None:
        if n_bytes < len(self.head):
            del self.head[n_bytes:]
        self.size = n_bytes

    def copy_from(self, other: "_Image") -> None:
        self.head[:] = other.head
        self.size = other.size

    def whole(self) -> bytearray:
        if len(self.head) < self.size:
            self.head += bytes(self.size - len(self.head))
        return self.head


class Content:
    """The bytes of one file."""

    __slots__ = ("_durable", "_is_stale", "_n_done", "_n_pending_bytes", "_now", "_pending")

    def __init__(self) -> None:
        self._now = _Image()
        self._durable = _Image()
        self._pending: list[_Pending] = []
        self._n_done = 0
        self._n_pending_bytes = 0
        self._is_stale = False

    # -- what is seen ----------------------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The length."""
        return self._now.size

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes` from `offset`."""
        return self._now.read(offset, n_bytes)

    def whole(self) -> bytearray:
        """Return all bytes; not to be changed."""
        return self._now.whole()

    def head(self) -> bytes:
        """Return the bytes up to the last that was ever written: behind it there are only zeros."""
        return bytes(self._now.head[: self._now.size])

    def write(self, offset: int, data: bytes) -> int:
        """Set bytes; what lies between them and the present end becomes zeros. Returns the number of the change."""
        self._now.write(offset, data)
        return self._note(_Pending(offset, data))

    def resize(self, n_bytes: int) -> int:
        """Cut, or extend with zeros. Returns the number of the change."""
        self._now.resize(n_bytes)
        return self._note(_Pending(n_bytes, None))

    def damage(self, offset: int, mask: int) -> None:
        """Flip the bits of one byte, of what is seen and of what is durable."""
        for image in (self._now, self._durable):
            if offset < image.size:
                whole = image.whole()
                whole[offset] ^= mask

    # -- durability ------------------------------------------------------------------------------------------------------------------

    def mark(self) -> int:
        """Return the number of the last change."""
        return self._n_done + len(self._pending)

    def sync(self, mark: int | None = None, misdirect: Misdirect | None = None) -> None:
        """Make the changes up to `mark` durable, all of them without one."""
        if self._is_stale:
            self._durable.copy_from(self._now)
            self._forget(len(self._pending))
            self._is_stale = False
            return
        n_changes = len(self._pending) if mark is None else max(0, mark - self._n_done)
        for change in self._pending[:n_changes]:
            self._store(change, misdirect)
        self._forget(n_changes)

    def sync_write(self, number: int, misdirect: Misdirect | None = None) -> None:
        """Make one write durable, and what it covers. Where it made the file longer, nothing is promised, and nothing kept."""
        index = number - self._n_done - 1
        pending = self._pending
        if index < 0 or self._is_stale:
            if self._is_stale:
                self.sync()
            return
        change = pending[index]
        if change.end > self._durable.size:
            return
        if len(pending) == 1:
            self._store(change, misdirect)
            pending.clear()
            self._n_pending_bytes = 0
            self._n_done += 1
            return
        chosen = self._covered(index)
        if any(self._pending[each].end > self._durable.size or self._pending[each].data is None for each in chosen):
            self.sync(number, misdirect)
            return
        for each in reversed(chosen):
            self._store(self._pending[each], misdirect)
        for each in chosen:
            # The numbers of the others stay: in its place comes a change that changes nothing.
            self._pending[each] = _Pending(0, b"")

    def drop(self, mark: int, *, at_once: bool) -> None:
        """A sync of the changes up to `mark` failed: they count as clean from now on, and are gone (`at_once`, or at the next crash)."""
        n_changes = max(0, mark - self._n_done)
        dropped = self._pending[:n_changes]
        self._forget(n_changes)
        if at_once and not self._is_stale:
            for change in dropped:
                if change.data:
                    end = min(change.end, self._now.size)
                    old = self._durable.read(change.offset, len(change.data)).ljust(len(change.data), b"\0")
                    self._now.head[change.offset : end] = old[: max(0, end - change.offset)]
        self._is_stale = False

    # -- crashes ---------------------------------------------------------------------------------------------------------------------

    def lose(self) -> None:
        """Crash: what was not durable is gone."""
        self._now.copy_from(self._durable)
        self._forget(len(self._pending))
        self._is_stale = False

    def survive(self, chance: random.Random) -> bool:
        """Crash: a part of what was pending survives. Returns whether anything did."""
        if not self._pending:
            self.lose()
            return False
        how = chance.random()
        pending = list(self._pending)
        if how < 0.25:
            pending.clear()
        elif how >= 0.5:
            pending = self._torn(pending, chance)
        for change in pending:
            self._store(change, None)
        self.lose()
        return bool(pending)

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    def _note(self, change: _Pending) -> int:
        pending = self._pending
        pending.append(change)
        self._n_pending_bytes += 0 if change.data is None else len(change.data)
        if len(pending) > _PENDING_MAX or self._n_pending_bytes > _PENDING_BYTES_MAX:
            self._forget(len(pending))
            self._is_stale = True
        return self._n_done + len(pending)

    def _forget(self, n_changes: int) -> None:
        for change in self._pending[:n_changes]:
            self._n_pending_bytes -= 0 if change.data is None else len(change.data)
        del self._pending[:n_changes]
        self._n_done += n_changes

    def _store(self, change: _Pending, misdirect: Misdirect | None) -> None:
        if change.data is None:
            self._durable.resize(change.offset)
        elif change.data and (misdirect is None or not misdirect(self, change.offset, change.data)):
            self._durable.write(change.offset, change.data)

    def store_stray(self, offset: int, data: bytes) -> None:
        """Take in what was meant for elsewhere: durable, and not seen before a crash. Nothing becomes longer."""
        room = max(0, self._durable.size - offset)
        if room:
            self._durable.write(offset, data[:room])

    @property
    def durable_size(self) -> int:
        """The length after a crash that loses all."""
        return self._durable.size

    def _covered(self, index: int) -> list[int]:
        """Return the changes that must be durable with one, the newest first: those before it that share a sector with a chosen one."""
        chosen, spans = [index], [_sectors(self._pending[index])]
        for each in range(index - 1, -1, -1):
            change = self._pending[each]
            low, high = _sectors(change)
            if change.data is None or any(low < other_high and other_low < high for other_low, other_high in spans):
                if change.data is None and change.offset >= self._durable.size:
                    continue  # reserved space behind the durable end: not needed to read these bytes
                chosen.append(each)
                spans.append((low, high))
        return chosen

    def _torn(self, pending: list[_Pending], chance: random.Random) -> list[_Pending]:
        """Draw for each sector which of its versions survives, and for the size."""
        sizes = [self._durable.size]
        touched: dict[int, list[int]] = {}
        for index, change in enumerate(pending):
            size = change.offset if change.data is None else max(sizes[-1], change.end)
            if size < sizes[-1]:
                return pending[: chance.randrange(len(pending) + 1)]
            sizes.append(size)
            for sector in range(*_sectors(change)):
                touched.setdefault(sector, []).append(index)
        survivors: list[_Pending] = []
        for sector, indexes in touched.items():
            for index in indexes[: chance.randrange(len(indexes) + 1)]:
                survivors.append(_piece(pending[index], sector))
        survivors.append(_Pending(chance.choice(sizes), None))
        return survivors


def _sectors(change: _Pending) -> tuple[int, int]:
    """Return the sectors that a change touches, the first and the one behind the last."""
    if not change.data:
        return 0, 0
    return change.offset // SECTOR_BYTES, -(-change.end // SECTOR_BYTES)


def _piece(change: _Pending, sector: int) -> _Pending:
    """Return the part of a change that lies in one sector."""
    assert change.data is not None
    low = max(change.offset, sector * SECTOR_BYTES)
    high = min(change.end, (sector + 1) * SECTOR_BYTES)
    return _Pending(low, change.data[low - change.offset : high - change.offset])
