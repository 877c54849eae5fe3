"""SimDisk: the Disk port over a memory file system.

Legal behaviours: every call takes a small seeded time, so calls of different tasks interleave; a call takes effect at one instant; what
was not synced is gone after `crash`; over `capacity_bytes` writes fail with ENOSPC and change nothing; a dead process's calls never take
effect, its open files close and its locks are released. A watch repeats names, and after `WATCH_EVENTS_MAX` unread ones delivers "".

What goes wrong only when a test asks for it is `faults` (`disk_faults`): failing, slow and hanging devices, torn and misdirected
writes, bit rot, a crash that keeps some of what was not synced.
"""

import asyncio
import errno
import hashlib
import random
import zlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import zstandard

from isopod.world.disk import (
    ArchiveMember,
    Data,
    Disk,
    FileStat,
    FolderWatches,
    Indexed,
    IoFacts,
    IoStatistics,
    OpenFlags,
    Packed,
    Progress,
    Unpacked,
    UnpackLimits,
    Watch,
)
from isopod.world.disk import OpenFile as OpenFilePort
from isopod.world.errors import BadArchive, Unsupported
from isopod.world.send_pieces import send_in_pieces
from isopod.world.sim import indexes, layers
from isopod.world.sim.data_files import SimDataFile, SimMapping, open_inode
from isopod.world.sim.disk_faults import DiskFaults
from isopod.world.sim.inodes import BLOCK_BYTES, FileSystem, Inode
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.nodes import Node
from isopod.world.sim.view import View, fail
from isopod.world.sim.watches import SimWatches

WATCH_EVENTS_MAX: Final = 1024
WATCHES_MAX: Final = 1 << 20
_CALL_S: Final = (5e-6, 100e-6)
_SYNC_S: Final = (200e-6, 2e-3)
_DIGEST_STEP_BYTES: Final = 1 << 20
_BYTES_PER_S: Final = 400 << 20


class IoCounts:
    """The counters behind `IoStatistics`."""

    __slots__ = ("n_bytes_read", "n_bytes_written", "n_inline", "n_reads", "n_syncs", "n_writes")

    def __init__(self) -> None:
        self.n_reads = self.n_writes = self.n_syncs = self.n_bytes_read = self.n_bytes_written = self.n_inline = 0


class SimDisk:
    """The Disk port of the simulation.

    Args:
        loop: The source of time.
        chance: The stream that delays calls.
        view: The tree of the machine.
        device: The file system of its root.
        faults_chance: The stream of the faults.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, *, view: View, device: FileSystem, faults_chance: random.Random) -> None:
        self.view = view
        self._loop = loop
        self._chance = chance
        self._device = device
        self._locks: dict[int, SimFile] = {}
        self._shared_locks: dict[int, list[SimFile]] = {}
        self.io = IoCounts()
        """What data files have done."""
        self.n_watches = 0
        self.watches_max = WATCHES_MAX
        """How many folders may be watched through `watch_folders`; one more is ENOSPC."""
        self._watches: list[SimWatches] = []
        self.faults = DiskFaults(self, loop, faults_chance, device)
        """What goes wrong."""

    # -- faults and inspection -------------------------------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """What the root file system may hold; set it to let the disk fill up."""
        return self._device.capacity_bytes

    @capacity_bytes.setter
    def capacity_bytes(self, n_bytes: int) -> None:
        self._device.capacity_bytes = n_bytes

    @property
    def used_bytes(self) -> int:
        """What the root file system holds."""
        return self._device.used_bytes

    def lose_changes(self) -> None:
        """Lose what changed in folders that are watched and was not read yet, as the kernel does when its queue is full."""
        for watches in self._watches:
            watches.lose()

    def crash(self) -> None:
        """Lose everything that was not made durable (with `faults.keeps_unsynced`: a part of it).

        Open files and watches are dead afterwards, locks released, mounts gone.
        """
        self._locks.clear()
        self._shared_locks.clear()
        self.view.clear_mounts()
        self._device.crash()

    # -- files -----------------------------------------------------------------------------------------------------------------------

    async def read(self, path: str, *, n_bytes_max: int = 64 << 20) -> bytes:
        """Return a whole small file."""
        await self._call()
        inode = self.view.open_file(path)
        if inode.content.size > n_bytes_max:
            fail(errno.EFBIG, path)
        self.faults.check_read(inode, path, 0, inode.content.size)
        return bytes(inode.data)

    async def read_beneath(self, root: str, path: str, *, n_bytes_max: int = 1 << 20) -> bytes:
        """Return a regular file inside the folder `root`, symlinks resolved as if `root` were "/"."""
        await self._call()
        node = View(self.view.folder(root)).find("/" + path)
        if node is None or node.inode.kind != "file":
            fail(errno.ENOENT, path)
        inode = node.inode
        if len(inode.data) > n_bytes_max:
            fail(errno.EFBIG, path)
        return bytes(inode.data)

    async def write(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """Create or replace a file, not durable."""
        await self._call(len(data))
        self.faults.check("write", path)
        self.view.write(path, data, mode)

    async def write_atomic(self, path: str, data: bytes, *, mode: int = 0o600) -> None:
        """Create or replace a file durably: a crash leaves the old or the new one."""
        await self._call(len(data), sync=True)
        spot = self.view.spot(path, follow=False)
        if spot.node is not None and spot.node.inode.kind == "directory":
            fail(errno.EISDIR, path)
        if spot.parent is None:
            fail(errno.EISDIR, path)
        folder = spot.parent.writable()
        inode = folder.file_system.new("file", mode)
        self.faults.check("write", path)
        self.faults.check("sync", path)
        inode.fill(data)
        folder.file_system.charge(len(data))
        folder.file_system.charge(-len(data))
        spot.parent.attach(spot.name, inode)
        inode.sync_data()
        folder.sync_names()

    async def open_read(self, path: str) -> "SimFile":
        """Open for reading."""
        await self._call()
        return SimFile(self, self._loop, self.view.open_file(path), path)

    async def open_append(self, path: str, *, mode: int = 0o600) -> "SimFile":
        """Open for appending, creating the file."""
        await self._call()
        inode = self.view.open_file(path, create_mode=mode)
        if inode.kind == "fifo" and not inode.watchers:
            fail(errno.ENXIO, path)
        return SimFile(self, self._loop, inode, path)

    async def open_file(self, path: str, flags: OpenFlags = OpenFlags(), *, mode: int = 0o600) -> SimDataFile:  # noqa: B008 - a tuple
        """Open a file for data."""
        await self._call()
        inode = open_inode(self.view, path, flags, mode)
        return SimDataFile(self, self._loop, inode, path, flags=flags)

    async def open_file_beneath(self, root: str, path: str) -> SimDataFile:
        """Open a file inside a folder for reading, following no symlink below it."""
        await self._call()
        parts = path.split("/")
        if path.startswith("/") or ".." in parts:
            fail(errno.EXDEV, path)
        inside = View(self.view.folder(root))
        for n in range(1, len(parts) + 1):
            if inside.node("/" + "/".join(parts[:n]), follow=False).inode.kind == "symlink":
                fail(errno.ELOOP, path)
        inode = open_inode(inside, "/" + path, OpenFlags(), 0)
        return SimDataFile(self, self._loop, inode, f"{root}/{path}", flags=OpenFlags())

    async def map_file(self, path: str, *, write: bool = False) -> SimMapping:
        """Map a file that is not empty."""
        await self._call()
        return SimMapping(self, self._loop, open_inode(self.view, path, OpenFlags(write=write), 0), path, is_writable=write)

    async def send_file(self, file: OpenFilePort, transport: asyncio.WriteTransport, *, offset: int, n_bytes: int) -> int:
        """Send a part of a file over a connection, in pieces."""
        return await send_in_pieces(file.read_at, transport, offset, n_bytes)

    async def copy_file(self, source: str, target: str, *, mode: int = 0o600) -> int:
        """Copy a regular file to a new one."""
        await self._call()
        data = bytes(open_inode(self.view, source, OpenFlags(), 0).data)
        await self.pause(len(data))
        made = open_inode(self.view, target, OpenFlags.create_new(), mode)
        try:
            made.replace(data)
        except OSError:
            self.view.remove(target)
            raise
        return len(data)

    async def compress_file(self, source: str, target: str, *, level: int = 3, mode: int = 0o600) -> int:
        """Write a file's bytes as one zstd frame to a new file."""
        await self._call()
        packer = zstandard.ZstdCompressor(level=level, write_checksum=True)
        data = packer.compress(bytes(open_inode(self.view, source, OpenFlags(), 0).data))
        await self.pause(len(data), sync=True)
        made = open_inode(self.view, target, OpenFlags.create_new(), mode)
        try:
            made.replace(data)
            self.sync_inode(made, made.content.mark(), target)
        except OSError:
            self.view.remove(target)
            raise
        return len(data)

    def io_facts(self) -> IoFacts:
        """Return that all this is simulated."""
        return IoFacts("sim", "a simulated disk")

    def io_statistics(self) -> IoStatistics:
        """Return what data files have done."""
        io = self.io
        return IoStatistics(io.n_reads, io.n_writes, io.n_syncs, io.n_bytes_read, io.n_bytes_written, n_inline=io.n_inline)

    async def list(self, path: str) -> Sequence[str]:
        """Return the sorted names in a folder; [] if the folder does not exist."""
        await self._call()
        node = self.view.find(path)
        if node is None:
            return []
        if node.inode.kind != "directory":
            fail(errno.ENOTDIR, path)
        return node.list_names()

    async def stat(self, path: str) -> FileStat | None:
        """Return facts about a path without following a last symlink; None if there is nothing."""
        await self._call()
        node = self.view.find(path, follow=False)
        return None if node is None else _facts(node.inode)

    async def make_directory(self, path: str, *, mode: int = 0o700) -> None:
        """Create a folder and its parents."""
        await self._call()
        self.view.make_folders(path, mode)

    async def rename(self, source: str, target: str) -> None:
        """Move within one file system, replacing a file at `target`."""
        await self._call()
        self.view.rename(source, target)

    async def remove(self, path: str) -> None:
        """Remove a file or an empty folder; nothing there is fine."""
        await self._call()
        if self.view.find(path, follow=False) is not None:
            self.view.remove(path)

    async def remove_tree(self, path: str) -> None:
        """Remove a folder with all it holds; EBUSY if something is mounted in it."""
        await self._call()
        if self.view.find(path, follow=False) is not None:
            self.view.remove_tree(path)

    async def sync_directory(self, path: str) -> None:
        """Make the names in a folder durable."""
        await self._call(sync=True)
        self.faults.check("sync", path)
        self.view.folder(path).inode.sync_names()

    async def free_bytes(self, path: str) -> int:
        """Return what could still be stored there."""
        await self._call()
        file_system = self.view.node(path).inode.file_system
        return max(0, file_system.capacity_bytes - file_system.used_bytes)

    async def tree_bytes(self, path: str) -> int:
        """Return the bytes allocated under a folder, hard links counted once."""
        await self._call()
        return _allocated(self.view.node(path, follow=False), {})

    # -- watch and lock --------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[Watch]:
        """Watch one folder, from the moment the context is entered."""
        await self._call()
        inode = self.view.folder(path).inode
        watch = SimWatch(self._loop)
        inode.watchers.append(watch.put)
        self.n_watches += 1
        try:
            yield watch
        finally:
            self.n_watches -= 1
            if watch.put in inode.watchers:
                inode.watchers.remove(watch.put)

    @asynccontextmanager
    async def watch_folders(self) -> AsyncIterator[FolderWatches]:
        """Watch many folders, none at first."""
        self._loop.owner().check()
        watches = SimWatches(self, self._loop)
        self._watches.append(watches)
        try:
            yield watches
        finally:
            self._watches.remove(watches)
            watches.close()

    async def lock(self, path: str, contents: bytes) -> "SimFile | None":
        """Take an exclusive lock on a file and write `contents` into it; None if it is taken."""
        await self._call()
        found = self.view.find(path, follow=False)
        if found is not None and found.inode.kind == "symlink":
            fail(errno.ELOOP, path)
        inode = self.view.open_file(path, create_mode=0o600)
        if inode.number in self._locks or self._shared_locks.get(inode.number):
            return None
        file = SimFile(self, self._loop, inode, path)
        self._locks[inode.number] = file
        try:
            inode.replace(contents)
        except OSError:
            file.close()
            raise
        return file

    async def lock_shared(self, path: str) -> "SimFile | None":
        """Take a lock that several may have on a file that exists; None if somebody has it exclusively."""
        await self._call()
        found = self.view.find(path, follow=False)
        if found is None or found.inode.kind == "symlink":
            fail(errno.ENOENT if found is None else errno.ELOOP, path)
        if found.inode.number in self._locks:
            return None
        file = SimFile(self, self._loop, found.inode, path)
        self._shared_locks.setdefault(found.inode.number, []).append(file)
        return file

    def unlock(self, file: "SimFile") -> None:
        """Release what `file` locked, if anything. Called when it closes."""
        if self._locks.get(file.inode.number) is file:
            del self._locks[file.inode.number]
        shared = self._shared_locks.get(file.inode.number, [])
        if file in shared:
            shared.remove(file)

    # -- archives --------------------------------------------------------------------------------------------------------------------

    async def unpack_layer(
        self,
        source: str,
        target: str,
        *,
        offset: int = 0,
        n_bytes: int | None = None,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - an immutable tuple
        progress: Progress | None = None,
    ) -> Unpacked:
        """Unpack a tar (plain, gzip or zstd) below the empty or missing folder `target`, in overlayfs form."""
        await self._call()
        blob = bytes(self.view.open_file(source).data)
        blob = blob[offset:] if n_bytes is None else blob[offset : offset + n_bytes]
        found = self.view.find(target)
        if found is not None and (found.inode.kind != "directory" or found.list_names()):
            fail(errno.ENOTEMPTY, target)
        folder = self.view.make_folders(target, 0o755)
        try:
            await self.pause(len(blob))
            unpacked = layers.unpack(blob, folder, limits)
            await self.pause(unpacked.n_unpacked_bytes, sync=True)
            folder.sync_below()
        except (BadArchive, OSError, asyncio.CancelledError):
            if self._loop.owner().alive:
                self.view.remove_tree(target)
            raise
        if progress is not None:
            progress(len(blob))
        return unpacked

    async def index_layer(
        self,
        source: str,
        tar: str,
        index: str,
        *,
        offset: int = 0,
        n_bytes: int | None = None,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - an immutable tuple
        progress: Progress | None = None,
    ) -> Indexed:
        """Write a layer as an uncompressed tar and as an index over it, two new files."""
        await self._call()
        blob = bytes(self.view.open_file(source).data)
        blob = blob[offset:] if n_bytes is None else blob[offset : offset + n_bytes]
        made: list[str] = []
        try:
            for path in (tar, index):
                self.view.create(path, "file", 0o600)
                made.append(path)
            await self.pause(len(blob))
            indexed, *contents = indexes.make(blob, limits)
            for path, data in zip(made, contents, strict=True):
                inode = self.view.write(path, data)
                await self.pause(len(data), sync=True)
                self.sync_inode(inode, inode.content.mark(), path)
        except (BadArchive, Unsupported, OSError, asyncio.CancelledError):
            if self._loop.owner().alive:
                for path in made:
                    self.view.remove(path)
            raise
        if progress is not None:
            progress(len(blob))
        return indexed

    async def pack_layer(
        self,
        source: str,
        target: str,
        *,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - an immutable tuple
    ) -> Packed:
        """Write the folder `source` (overlayfs form) as an OCI layer tar to the new file `target`."""
        await self._call()
        packed, data = layers.pack(self.view.folder(source).inode, source, limits)
        await self.pause(len(data))
        if self.view.find(target, follow=False) is not None:
            fail(errno.EEXIST, target)
        self.view.write(target, data)
        return packed

    async def index_archive(self, source: str) -> Sequence[ArchiveMember]:
        """List the members of an outer tar without unpacking it."""
        await self._call()
        return layers.index(bytes(self.view.open_file(source).data))

    async def digest(self, path: str) -> str:
        """Return "sha256:..." of a file's bytes."""
        await self._call()
        inode = self.view.open_file(path)
        size = inode.content.size
        await self.pause(size)
        digest = hashlib.sha256()
        for offset in range(0, size, _DIGEST_STEP_BYTES):  # not as a whole: most of a sparse file takes no memory
            digest.update(inode.content.read(offset, _DIGEST_STEP_BYTES))
        return "sha256:" + digest.hexdigest()

    # -- time ------------------------------------------------------------------------------------------------------------------------

    async def pause(self, n_bytes: int = 0, *, sync: bool = False) -> None:
        """Let the time of one device operation pass; a dead process ends here."""
        low, high = _SYNC_S if sync else _CALL_S
        lasts_s = low + (high - low) * self._chance.random() + n_bytes / _BYTES_PER_S
        loop, faults = self._loop, self.faults
        if faults.delay_s[1] or faults.sync_delay_s[1]:
            lasts_s += faults.extra_s(sync=sync)
        waiter: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(lasts_s, _end_pause, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
        if faults.is_stalled:
            await faults.wait()
        loop.owner().check()

    def is_quick(self) -> bool:
        """Whether a durable write may be made without letting time pass: half of the time, on a disk that is not slow."""
        faults = self.faults
        return not (faults.is_stalled or faults.delay_s[1] or faults.sync_delay_s[1]) and self._chance.random() < 0.5

    def sync_inode(self, inode: Inode, mark: int, path: str) -> None:
        """Make what was written up to `mark` durable, unless that is to fail."""
        self.faults.check_sync(inode.content, mark, path)
        inode.content.sync(mark, self.faults.misdirect if self.faults.may_misdirect else None)

    def note(self, path: str, offset: int, data: Data) -> None:
        """Write down what is written, if the run is traced."""
        trace = self._loop.trace
        if trace is not None:
            trace.add(self._loop.elapsed_ns, self._loop.owner().host, f"disk {path} {offset} {len(data)} {zlib.crc32(data):08x}")

    async def _call(self, n_bytes: int = 0, *, sync: bool = False) -> None:
        self._loop.owner().check()
        await self.pause(n_bytes, sync=sync)


class SimFile:
    """An open file. Who opened it closes it; the death of its process does so too.

    Args:
        disk: Where it lies.
        loop: To find who opens it.
        inode: What is open.
        path: For watchers of its folder.
    """

    def __init__(self, disk: SimDisk, loop: SimLoop, inode: Inode, path: str) -> None:
        self.inode = inode
        self._disk = disk
        self._path = path
        self._is_open = True
        self._owner = loop.owner()
        self._held = self._owner.hold(self.close)

    async def read_at(self, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes` from `offset`."""
        await self._ready()
        self._disk.faults.check_read(self.inode, self._path, offset, n_bytes)
        return self.inode.content.read(offset, n_bytes)

    async def append(self, data: Data) -> None:
        """Write all of `data` at the end."""
        await self._ready(len(data))
        self._disk.faults.check("write", self._path)
        self._disk.note(self._path, self.inode.content.size, data)
        self.inode.append(bytes(data))
        if self.inode.kind == "fifo":
            self.inode.notify("")
        else:
            self._tell()

    async def sync(self) -> None:
        """Make data and size durable."""
        self._check()
        mark = self.inode.content.mark()
        await self._ready(sync=True)
        self._disk.sync_inode(self.inode, mark, self._path)

    def size_bytes(self) -> int:
        """Return the size now."""
        self._check()
        return self.inode.content.size

    def close(self) -> None:
        """Close; twice is fine."""
        if self._is_open:
            self._is_open = False
            self._owner.forget(self._held)
            self._disk.unlock(self)

    async def _ready(self, n_bytes: int = 0, *, sync: bool = False) -> None:
        self._check()
        await self._disk.pause(n_bytes, sync=sync)
        self._check()

    def _check(self) -> None:
        self._owner.check()
        if not self._is_open:
            raise ValueError("I/O operation on closed file")

    def _tell(self) -> None:
        if self._disk.n_watches and self._disk.view.find(self._path) is not None:
            self._disk.view.touched(self._path)


class SimWatch:
    """Names that changed in one folder, bounded.

    Args:
        loop: The source of futures.
    """

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._names: deque[str] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, name: str) -> None:
        """Note a change; over the bound everything unread becomes one ""."""
        if len(self._names) >= WATCH_EVENTS_MAX:
            self._names.clear()
            name = ""
        self._names.append(name)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[str]:
        """Iterate over the names, for ever."""
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[str]:
        while True:
            while self._names:
                yield self._names.popleft()
            self._waiter = self._loop.create_future()
            await self._waiter


def _end_pause(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _facts(inode: Inode) -> FileStat:
    return FileStat(
        size_bytes=inode.size_bytes,
        mode=inode.mode,
        modified_at_ns=inode.modified_at_ns,
        inode=inode.number,
        is_directory=inode.kind == "directory",
        is_symlink=inode.kind == "symlink",
        uid=inode.uid,
    )


def _allocated(node: Node, seen: dict[int, None]) -> int:
    inode = node.inode
    if inode.number in seen:
        return 0
    seen[inode.number] = None
    total = -(-inode.content.size // BLOCK_BYTES) * BLOCK_BYTES
    if inode.kind == "directory":
        children = [node.lookup(name) for name in node.list_names()]
        total += BLOCK_BYTES + sum(_allocated(child, seen) for child in children if child is not None)
    return total


def _check_port(disk: SimDisk, file: SimFile) -> tuple[Disk, OpenFilePort]:
    """Let the type checker compare with the ports."""
    return disk, file
