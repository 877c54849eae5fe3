"""Simulated data files and maps.

Legal behaviours: operations of one file interleave in any order that their delays give, each at one instant; a cancelled one has not
happened, but for `write_durable`, whose bytes are seen from its beginning and durable only at its end; what was not synced is gone after a
crash. A sync covers what was written before it began. A direct file wants units of 512 bytes. The faults are those of `disk_faults`.

Not modelled: short reads and writes.
"""

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from isopod.world.disk import BATCH_MAX, IO_BYTES_MAX, Alignment, Data, OpenFlags, Target
from isopod.world.sim.inodes import Inode
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.view import View, fail

if TYPE_CHECKING:
    from isopod.world.sim.disk import SimDisk

DIRECT_BYTES: Final = 512
NOW_BYTES_MAX: Final = 64 << 10


def open_inode(view: View, path: str, flags: OpenFlags, mode: int) -> Inode:
    """Find or make the regular file that `flags` ask for."""
    found = view.find(path)
    if found is None and not flags.create:
        view.node(path)
    if found is not None:
        if flags.create and flags.exclusive:
            fail(errno.EEXIST, path)
        if found.inode.kind == "directory":
            fail(errno.EISDIR, path)
        if found.inode.kind != "file":
            fail(errno.EINVAL, path)
    inode = view.open_file(path, create_mode=mode if flags.write else None)
    if flags.write and flags.truncate:
        inode.resize(0)
    return inode


class _Handle:
    """Something open: who opened it closes it, the death of its process does so too."""

    def __init__(self, disk: "SimDisk", loop: SimLoop, inode: Inode, path: str) -> None:
        self.inode = inode
        self._disk = disk
        self._path = path
        self._is_open = True
        self._owner = loop.owner()
        self._held = self._owner.hold(self.close)

    @property
    def path(self) -> str:
        """Where it was opened."""
        return self._path

    def close(self) -> None:
        """Close; twice is fine."""
        if self._is_open:
            self._is_open = False
            self._owner.forget(self._held)

    async def _ready(self, n_bytes: int = 0, *, sync: bool = False) -> None:
        self._check()
        await self._disk.pause(n_bytes, sync=sync)
        self._owner.check()

    def _check(self) -> None:
        self._owner.check()
        if not self._is_open:
            raise ValueError("I/O operation on closed file")

    def _tell(self) -> None:
        if self._disk.n_watches and self._disk.view.find(self._path) is not None:
            self._disk.view.touched(self._path)


class SimDataFile(_Handle):
    """An open data file.

    Args:
        disk: Where it lies.
        loop: To find who opens it.
        inode: What is open.
        path: For watchers of its folder.
        flags: How it was opened.
    """

    def __init__(self, disk: "SimDisk", loop: SimLoop, inode: Inode, path: str, *, flags: OpenFlags) -> None:
        super().__init__(disk, loop, inode, path)
        self._flags = flags
        unit = DIRECT_BYTES if flags.direct else 1
        self._alignment = Alignment(flags.direct, unit, unit, "simulated" if flags.direct else "not asked for")

    @property
    def alignment(self) -> Alignment:
        """What direct operations must keep to."""
        return self._alignment

    def size_bytes(self) -> int:
        """Return the size now."""
        self._check()
        return self.inode.content.size

    async def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes` from `offset`."""
        self._check_range(offset, n_bytes)
        await self._ready(n_bytes)
        self._disk.faults.check_read(self.inode, self._path, offset, n_bytes)
        data = self.inode.content.read(offset, n_bytes)
        io = self._disk.io
        io.n_reads += 1
        io.n_bytes_read += len(data)
        return data

    async def read_into(self, offset: int, target: Target) -> int:
        """Read into a buffer."""
        self._check_range(offset, len(target), aligned=True)
        await self._ready(len(target))
        self._disk.faults.check_read(self.inode, self._path, offset, len(target))
        data = self.inode.content.read(offset, len(target))
        target[: len(data)] = data
        io = self._disk.io
        io.n_reads += 1
        io.n_bytes_read += len(data)
        return len(data)

    async def write_at(self, offset: int, data: Data) -> None:
        """Write all of `data`."""
        self._check_range(offset, len(data), aligned=True)
        if not self._flags.write:
            fail(errno.EBADF, self._path)
        await self._ready(len(data))
        self._disk.faults.check("write", self._path)
        if len(data):
            self._disk.note(self._path, offset, data)
            self.inode.write_at(offset, data)
        io = self._disk.io
        io.n_writes += 1
        io.n_bytes_written += len(data)
        self._tell()

    async def write_durable(self, offset: int, data: Data) -> None:
        """Write all of `data`, and make these bytes durable."""
        self._check_range(offset, len(data), aligned=True)
        if not self._flags.write:
            fail(errno.EBADF, self._path)
        disk, content = self._disk, self.inode.content
        faults = disk.faults
        faults.check("write", self._path)
        number = content.mark()
        if len(data):
            disk.note(self._path, offset, data)
            number = self.inode.write_at(offset, data)
        await disk.pause(len(data), sync=True)
        self._owner.check()
        faults.check_sync(content, number, self._path)
        if len(data):
            content.sync_write(number, faults.misdirect if faults.may_misdirect else None)
        io = disk.io
        io.n_writes += 1
        io.n_syncs += 1
        io.n_bytes_written += len(data)
        self._tell()

    def may_write_now(self, n_bytes: int) -> bool:
        """Say yes half of the time, unless the disk is slow."""
        return self._is_open and n_bytes <= NOW_BYTES_MAX and not self._flags.direct and self._disk.is_quick()

    def write_durable_now(self, offset: int, data: Data) -> None:
        """Write all of `data`, and make these bytes durable, in no time."""
        self._check_range(offset, len(data))
        if not self._flags.write:
            fail(errno.EBADF, self._path)
        faults, content = self._disk.faults, self.inode.content
        faults.check("write", self._path)
        number = content.mark()
        if len(data):
            self._disk.note(self._path, offset, data)
            number = self.inode.write_at(offset, data)
        faults.check_sync(content, number, self._path)
        if len(data):
            content.sync_write(number, faults.misdirect if faults.may_misdirect else None)
        io = self._disk.io
        io.n_writes += 1
        io.n_syncs += 1
        io.n_inline += 1
        io.n_bytes_written += len(data)
        self._tell()

    async def append(self, data: Data) -> None:
        """Write at the end."""
        await self.write_at(self.size_bytes(), data)

    async def read_many(self, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read each extent."""
        self._check_batch(extents)
        for offset, n_bytes in extents:
            self._check_range(offset, n_bytes)
        return [await self.read_at(offset, n_bytes) for offset, n_bytes in extents]

    async def write_many(self, pieces: Sequence[tuple[int, Data]]) -> None:
        """Write each piece."""
        self._check_batch(pieces)
        failure: OSError | None = None
        for offset, data in pieces:
            try:
                await self.write_at(offset, data)
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    async def sync(self) -> None:
        """Make data and size durable."""
        self._check()
        mark = self.inode.content.mark()
        await self._ready(sync=True)
        self._disk.sync_inode(self.inode, mark, self._path)
        self._disk.io.n_syncs += 1

    async def truncate(self, n_bytes: int) -> None:
        """Cut or extend."""
        if n_bytes < 0 or not self._flags.write:
            fail(errno.EINVAL, self._path)
        await self._ready()
        self.inode.resize(n_bytes)
        self._tell()

    async def allocate(self, offset: int, n_bytes: int) -> None:
        """Reserve space; here all space is taken by growing."""
        if offset < 0 or n_bytes <= 0:
            fail(errno.EINVAL, self._path)
        if not self._flags.write:
            fail(errno.EBADF, self._path)
        await self._ready()
        self.inode.resize(max(self.inode.content.size, offset + n_bytes))

    def _check_range(self, offset: int, n_bytes: int, *, aligned: bool = False) -> None:
        self._check()
        unit = self._alignment.offset_bytes if aligned else 1
        if offset < 0 or not 0 <= n_bytes <= IO_BYTES_MAX or offset % unit or n_bytes % unit:
            fail(errno.EINVAL, self._path)

    def _check_batch(self, pieces: Sequence[object]) -> None:
        self._check()
        if len(pieces) > BATCH_MAX:
            fail(errno.EINVAL, self._path)


class SimMapping(_Handle):
    """A file in memory.

    Args:
        disk: Where it lies.
        loop: To find who maps it.
        inode: What is mapped.
        path: For messages and watchers.
        is_writable: Whether it may be changed.
    """

    def __init__(self, disk: "SimDisk", loop: SimLoop, inode: Inode, path: str, *, is_writable: bool) -> None:
        if not inode.content.size:
            fail(errno.EINVAL, path)
        super().__init__(disk, loop, inode, path)
        self._size = inode.content.size
        self._is_writable = is_writable

    @property
    def size_bytes(self) -> int:
        """The length of the map."""
        return self._size

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes` from `offset`."""
        self._check()
        end = min(offset + n_bytes, self._size)
        if end <= offset:
            return b""
        self._check_size(end)
        return self.inode.content.read(offset, end - offset)

    def find(self, needle: bytes, start: int, end: int) -> int:
        """Return the first offset of `needle` inside start..end, -1 if there is none."""
        self._check()
        end = min(end, self._size)
        if not needle or start >= end:
            return -1
        self._check_size(end)
        return self.inode.data.find(needle, start, end)

    def write(self, offset: int, data: Data) -> None:
        """Replace bytes."""
        self._check_write(offset, len(data))
        self._check_size(offset + len(data))
        if len(data):
            self.inode.write_at(offset, data)

    def move(self, target: int, source: int, n_bytes: int) -> None:
        """Copy bytes inside the map."""
        self._check_write(target, n_bytes)
        self._check_write(source, n_bytes)
        self._check_size(max(target, source) + n_bytes)
        if n_bytes:
            self.inode.write_at(target, self.inode.content.read(source, n_bytes))

    async def prefetch(self, offset: int, n_bytes: int) -> None:
        """Let the time of reading pass."""
        await self._ready(max(0, min(n_bytes, self._size - offset)))

    async def sync(self, offset: int, n_bytes: int) -> None:
        """Make all bytes durable."""
        self._check()
        if not self._is_writable or n_bytes <= 0:
            return
        self._check_inside(offset, n_bytes)
        mark = self.inode.content.mark()
        await self._ready(sync=True)
        self._disk.sync_inode(self.inode, mark, self._path)

    def _check_write(self, offset: int, n_bytes: int) -> None:
        self._check()
        if not self._is_writable:
            fail(errno.EBADF, self._path)
        self._check_inside(offset, n_bytes)

    def _check_inside(self, offset: int, n_bytes: int) -> None:
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self._size:
            fail(errno.EINVAL, self._path)

    def _check_size(self, end: int) -> None:
        if self.inode.content.size < end:
            fail(errno.ESTALE, self._path)
