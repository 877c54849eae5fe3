"""DiskFaults: what a test may let go wrong with a simulated disk. Everything is off in the beginning.

Legal faults:

- `keeps_unsynced`: a crash keeps a seeded part of what was not made durable, in any order, torn at sectors of 512 bytes (`content`); names
  change in their order, up to any one of the changes, a rename always as a whole (`inodes`). Off: a crash loses all of it, always.
- `misdirection`: the chance that a write lands at another sector when it becomes durable, of its own file or of another one.
- `bit_rot`: bits of a file flip. `break_sectors`: reading a range fails with EIO.
- `read_errors`, `write_errors`, `sync_errors`: chances of EIO; `fail_next` for the next ones of a kind, with any error. After a failed sync
  the bytes it was for count as clean although they are not durable, and the next sync succeeds; they may vanish at once.
- `delay_s`, `sync_delay_s`: bounds of what every operation, every sync takes longer. `stall` lets all operations wait until `go_on`.
- Full: `SimDisk.capacity_bytes`, or `fill`.

`SimDisk.write_atomic` stays atomic under all of them: it fails and leaves the old file, or it has made the new one durable.
"""

import asyncio
import errno
import os
import random
from typing import TYPE_CHECKING, Final, Literal

from isopod.world.errors import InvalidArgument
from isopod.world.sim.content import SECTOR_BYTES, Content
from isopod.world.sim.inodes import FileSystem, Inode
from isopod.world.sim.loop import SimLoop

if TYPE_CHECKING:
    from isopod.world.sim.disk import SimDisk

Kind = Literal["read", "write", "sync"]
_KINDS: Final = ("read", "write", "sync")
_DROPPED_AT_ONCE: Final = 0.5


class DiskFaults:
    """The switches, and how often each fault happened.

    Args:
        disk: What they are for.
        loop: For waiting.
        chance: A stream that nothing else draws from, so that a fault changes only what it is about.
        device: The file system of the machine's root.
    """

    def __init__(self, disk: "SimDisk", loop: SimLoop, chance: random.Random, device: FileSystem) -> None:
        self.misdirection = 0.0
        self.read_errors = 0.0
        self.write_errors = 0.0
        self.sync_errors = 0.0
        self.delay_s: tuple[float, float] = (0.0, 0.0)
        self.sync_delay_s: tuple[float, float] = (0.0, 0.0)
        self.counts: dict[str, int] = {}
        """How often each of them happened, by name."""
        self._disk = disk
        self._loop = loop
        self._chance = chance
        self._device = device
        self._next: dict[str, list[tuple[int, str]]] = {kind: [] for kind in _KINDS}
        self._broken: dict[int, list[tuple[int, int]]] = {}
        self._n_misdirect_next = 0
        self._waiters: list[asyncio.Future[None]] | None = None

    # -- switches --------------------------------------------------------------------------------------------------------------------

    @property
    def keeps_unsynced(self) -> bool:
        """Whether a crash keeps a seeded part of what was not made durable."""
        return self._device.crash_chance is not None

    @keeps_unsynced.setter
    def keeps_unsynced(self, keeps: bool) -> None:
        if keeps and not self.keeps_unsynced:
            self._device.root.sync_below()  # what was before is not in question: the kernel has written it by now
        self._device.crash_chance = self._chance if keeps else None

    def fail_next(self, kind: Kind, *, number: int = errno.EIO, times: int = 1, path: str = "") -> None:
        """Let the next operations of a kind fail with that errno; with a path only those on what lies there or below."""
        self._next[kind] += [(number, path)] * times

    def misdirect_next(self, *, times: int = 1) -> None:
        """Let the next writes that become durable land elsewhere."""
        self._n_misdirect_next += times

    def bit_rot(self, path: str, *, n_bits: int = 1, offset: int = 0, n_bytes: int | None = None) -> list[int]:
        """Flip bits of a file, chosen by chance from a range of it; returns the offsets of the bytes, sorted.

        Raises:
            InvalidArgument: The range is empty.
        """
        content = self._inode(path).content
        end = content.size if n_bytes is None else min(content.size, offset + n_bytes)
        if offset >= end:
            raise InvalidArgument("range", f"{offset}..{end}", f"{path} has no bytes there")
        places = sorted(self._chance.randrange(offset, end) for _ in range(n_bits))
        for place in places:
            content.damage(place, 1 << self._chance.randrange(8))
            self.count("rot")
        return places

    def break_sectors(self, path: str, offset: int, n_bytes: int) -> None:
        """Let every read of that range fail with EIO from now on."""
        self._broken.setdefault(self._inode(path).number, []).append((offset, offset + n_bytes))

    def mend_sectors(self) -> None:
        """Let broken ranges be read again, with the bytes they had."""
        self._broken.clear()

    def fill(self, *, leaving_bytes: int = 0) -> None:
        """Let the disk be full, but for so many bytes."""
        self._disk.capacity_bytes = self._disk.used_bytes + leaving_bytes

    def stall(self) -> None:
        """Let every operation wait from now on, as on a device that hangs."""
        if self._waiters is None:
            self._waiters = []

    def go_on(self) -> None:
        """Let operations go on."""
        waiters, self._waiters = self._waiters or [], None
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        """Switch everything off, but for what is broken already and the size of the disk."""
        self.keeps_unsynced = False
        self.misdirection = self.read_errors = self.write_errors = self.sync_errors = 0.0
        self.delay_s = self.sync_delay_s = (0.0, 0.0)
        self._next = {kind: [] for kind in _KINDS}
        self._n_misdirect_next = 0
        self.go_on()

    # -- for the disk ----------------------------------------------------------------------------------------------------------------

    def count(self, what: str) -> None:
        """Note that a fault happened."""
        self.counts[what] = self.counts.get(what, 0) + 1

    def extra_s(self, *, sync: bool) -> float:
        """Return what an operation takes longer."""
        total = 0.0
        for low, high in (self.delay_s, self.sync_delay_s if sync else (0.0, 0.0)):
            if high:
                total += self._chance.uniform(low, high)
        if total:
            self.count("slow")
        return total

    @property
    def is_stalled(self) -> bool:
        """Whether operations wait."""
        return self._waiters is not None

    async def wait(self) -> None:
        """Wait while the device hangs."""
        while self._waiters is not None:
            self.count("stalled")
            waiter = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    def check(self, kind: Kind, path: str) -> None:
        """Fail if it is to fail now."""
        number = self.drawn(kind, path)
        if number:
            raise OSError(number, os.strerror(number), path)

    def drawn(self, kind: Kind, path: str) -> int:
        """Return the errno that an operation fails with now, 0 if it does not."""
        for index, (number, where) in enumerate(self._next[kind]):
            if path == where or path.startswith(where.rstrip("/") + "/" if where else ""):
                self.count(f"{kind}_error")
                del self._next[kind][index]
                return number
        rate = self.read_errors if kind == "read" else self.write_errors if kind == "write" else self.sync_errors
        if rate and self._chance.random() < rate:
            self.count(f"{kind}_error")
            return errno.EIO
        return 0

    def check_read(self, inode: Inode, path: str, offset: int, n_bytes: int) -> None:
        """Fail if a read of that range is to fail."""
        self.check("read", path)
        if self._broken:
            for low, high in self._broken.get(inode.number, ()):
                if low < offset + n_bytes and offset < high:
                    self.count("broken_sector")
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def check_sync(self, content: Content, mark: int, path: str) -> None:
        """Fail if a sync is to fail; then what it was for counts as clean, and may be gone."""
        number = self.drawn("sync", path)
        if number:
            content.drop(mark, at_once=self._chance.random() < _DROPPED_AT_ONCE)
            raise OSError(number, os.strerror(number), path)

    def misdirect(self, content: Content, offset: int, data: bytes) -> bool:
        """Decide where a write lands; see `content.Misdirect`."""
        if self._n_misdirect_next:
            self._n_misdirect_next -= 1
        elif not self.misdirection or self._chance.random() >= self.misdirection:
            return False
        others = [content, *(inode.content for inode in self._files() if inode.content is not content)]
        target = others[0] if self._chance.random() < 0.5 or len(others) == 1 else self._chance.choice(others[1:])
        n_sectors = max(1, target.durable_size // SECTOR_BYTES)
        target.store_stray(self._chance.randrange(n_sectors) * SECTOR_BYTES + offset % SECTOR_BYTES, data)
        self.count("misdirected")
        return True

    @property
    def may_misdirect(self) -> bool:
        """Whether writes may land elsewhere."""
        return bool(self._n_misdirect_next or self.misdirection)

    def _files(self) -> list[Inode]:
        """Return all files that are not empty, in the order of the tree."""
        found: dict[int, Inode] = {}
        todo = [self._device.root]
        while todo:
            inode = todo.pop()
            if inode.kind == "file" and inode.content.durable_size:
                found[inode.number] = inode
            todo += [inode.names[name] for name in sorted(inode.names)]
        return list(found.values())

    def _inode(self, path: str) -> Inode:
        return self._disk.view.open_file(path)
