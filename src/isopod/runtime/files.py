"""Files: reading and writing data off the loop, under the names that a Seastar user knows.

    file = await open_file_dma(world, "/data/log", OpenFlags.create_or_open(direct=True))
    data = await file.dma_read(0, 4096)
    await file.dma_write(0, data)
    await file.flush()
    await file.close()

"dma" is kept as the name; whether a file really goes past the page cache is what `File.alignment` says. With an `IoQueue` every operation
waits for the turn of its scheduling group. Streams over a file are in `file_streams`. Failures are errors of the tree: `NotFound`,
`AlreadyExists`, `DiskFull`, `KernelError`.
"""

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

from isopod.runtime.file_errors import wrapping
from isopod.runtime.gate import Gate
from isopod.runtime.io_queue import Direction, IoProperties, IoQueue
from isopod.runtime.scheduling import SchedulingGroup
from isopod.world.disk import Alignment, Data, DataFile, OpenFlags, Target
from isopod.world.errors import InvalidArgument, NotFound
from isopod.world.world import World

__all__ = [
    "File",
    "FileStats",
    "OpenFlags",
    "calibrate",
    "copy_file",
    "file_exists",
    "file_size",
    "list_directory",
    "open_file_dma",
    "remove_file",
]

T = TypeVar("T")

CALIBRATION_BYTES: Final = 32 << 20
CALIBRATION_OPERATIONS: Final = 2048
_LARGE_BYTES: Final = 1 << 20
_SMALL_BYTES: Final = 4096
_DEPTH: Final = 32


class FileStats(NamedTuple):
    """What was done through one `File`."""

    n_reads: int
    n_writes: int
    n_flushes: int
    n_bytes_read: int
    n_bytes_written: int


async def open_file_dma(
    world: World,
    path: str,
    flags: OpenFlags | None = None,
    *,
    mode: int = 0o600,
    queue: IoQueue | None = None,
    group: SchedulingGroup | None = None,
) -> "File":
    """Open a file. Who opened it closes it.

    Args:
        world: On whose disk.
        path: The file.
        flags: How; for reading, directly, if None (as the reference has it).
        mode: Permission bits if it is created.
        queue: Where its operations wait for their turn; none wait if None.
        group: Whose turn; each caller's own if None.

    Raises:
        NotFound: There is no such file.
        AlreadyExists: There is one, and `flags` want a new one.
        UnavailableError: It cannot be opened.
    """
    with wrapping("open", path):
        file = await world.disk.open_file(path, OpenFlags.read_only(direct=True) if flags is None else flags, mode=mode)
    return File(file, queue=queue, group=group)


class File:
    """An open file. Operations may overlap; `close` waits for those under way.

    Args:
        file: What it works on; closed with it.
        queue: Where operations wait for their turn.
        group: Whose turn.
    """

    def __init__(self, file: DataFile, *, queue: IoQueue | None = None, group: SchedulingGroup | None = None) -> None:
        self._file = file
        self._queue = queue
        self._group = group
        self._gate = Gate(f"of file {file.path}")
        self._n_reads = self._n_writes = self._n_flushes = 0
        self._n_bytes_read = self._n_bytes_written = 0

    @property
    def path(self) -> str:
        """Where it was opened."""
        return self._file.path

    @property
    def alignment(self) -> Alignment:
        """Whether it goes past the page cache, and what writes and `dma_read_into` must keep to then."""
        return self._file.alignment

    @property
    def data_file(self) -> DataFile:
        """The port's file, for `Disk.send_file`."""
        return self._file

    def size(self) -> int:
        """Return the length in bytes."""
        with wrapping("look at", self.path):
            return self._file.size_bytes()

    async def dma_read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes` from `offset`; fewer at the end. Need not be aligned.

        Raises:
            KernelError: The disk failed.
            WrongState: The file is closed.
        """
        data = await self._run("read", n_bytes, lambda: self._file.read_at(offset, n_bytes))
        self._n_reads += 1
        self._n_bytes_read += len(data)
        return data

    async def dma_read_exactly(self, offset: int, n_bytes: int) -> bytes:
        """Return `n_bytes` from `offset`.

        Raises:
            InvalidArgument: The file ends before.
            KernelError: The disk failed.
            WrongState: The file is closed.
        """
        data = await self.dma_read(offset, n_bytes)
        if len(data) < n_bytes:
            raise InvalidArgument("range", f"{offset}..{offset + n_bytes}", f"{self.path} ends at {offset + len(data)}")
        return data

    async def dma_read_into(self, offset: int, target: Target) -> int:
        """Read into a buffer of the caller's until it is full or the file ends; return the number of bytes.

        Raises:
            KernelError: The disk failed; EINVAL if a direct file is given what is not aligned.
            WrongState: The file is closed.
        """
        n_read = await self._run("read", len(target), lambda: self._file.read_into(offset, target))
        self._n_reads += 1
        self._n_bytes_read += n_read
        return n_read

    async def dma_read_many(self, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return what `dma_read` would for each (offset, length), all read at once."""
        found = await self._run("read", sum(n_bytes for _, n_bytes in extents), lambda: self._file.read_many(extents))
        self._n_reads += len(found)
        self._n_bytes_read += sum(map(len, found))
        return found

    async def dma_write(self, offset: int, data: Data) -> int:
        """Write all of `data` at `offset`; return its length. Offset and length of a direct file are aligned.

        Raises:
            DiskFull: There is no space.
            KernelError: The disk failed; EINVAL if a direct file is given what is not aligned.
            WrongState: The file is closed.
        """
        await self._run("write", len(data), lambda: self._file.write_at(offset, data))
        self._n_writes += 1
        self._n_bytes_written += len(data)
        return len(data)

    async def dma_write_many(self, pieces: Sequence[tuple[int, Data]]) -> None:
        """Do `dma_write` for each (offset, data), all at once; the first failure is raised after all have ended."""
        n_bytes = sum(len(data) for _, data in pieces)
        await self._run("write", n_bytes, lambda: self._file.write_many(pieces))
        self._n_writes += len(pieces)
        self._n_bytes_written += n_bytes

    async def flush(self) -> None:
        """Make data and size durable. A failure may mean that writes that seemed to succeed are lost.

        Raises:
            UnavailableError: The disk failed.
            WrongState: The file is closed.
        """
        await self._run("write", 0, self._file.sync)
        self._n_flushes += 1

    async def truncate(self, n_bytes: int) -> None:
        """Cut or extend (with zeros) to `n_bytes`."""
        await self._run("write", 0, lambda: self._file.truncate(n_bytes))

    async def allocate(self, offset: int, n_bytes: int) -> None:
        """Reserve space; the file grows if it must."""
        await self._run("write", 0, lambda: self._file.allocate(offset, n_bytes))

    async def close(self) -> None:
        """Close, after the operations under way; twice is fine. Nothing is flushed."""
        await self._gate.close()
        self._file.close()

    def statistics(self) -> FileStats:
        """Return what was done through this object."""
        return FileStats(self._n_reads, self._n_writes, self._n_flushes, self._n_bytes_read, self._n_bytes_written)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _run(self, direction: Direction, n_bytes: int, operation: Callable[[], Awaitable[T]]) -> T:
        self._gate.enter()
        try:
            with wrapping(direction, self.path):
                if self._queue is None:
                    return await operation()
                return await self._queue.run(direction, n_bytes, operation, group=self._group)
        finally:
            self._gate.leave()


async def file_exists(world: World, path: str) -> bool:
    """Return whether there is something at `path` (a dangling link counts)."""
    with wrapping("look at", path):
        return await world.disk.stat(path) is not None


async def file_size(world: World, path: str) -> int:
    """Return the length of a file in bytes. Raises NotFound."""
    with wrapping("look at", path):
        found = await world.disk.stat(path)
    if found is None:
        raise NotFound("file", path)
    return found.size_bytes


async def remove_file(world: World, path: str) -> None:
    """Remove a file or an empty folder; nothing there is fine."""
    with wrapping("remove", path):
        await world.disk.remove(path)


async def copy_file(world: World, source: str, target: str, *, mode: int = 0o600) -> int:
    """Copy a file to a new one and return its length. Not durable. Raises NotFound, AlreadyExists, DiskFull, KernelError."""
    with wrapping("copy", source):
        return await world.disk.copy_file(source, target, mode=mode)


async def list_directory(world: World, path: str) -> Sequence[str]:
    """Return the sorted names in a folder; [] if there is none."""
    with wrapping("list", path):
        return await world.disk.list(path)


async def calibrate(world: World, folder: str, *, n_bytes: int = CALIBRATION_BYTES) -> IoProperties:
    """Measure what the disk of a folder can do, with a temporary file of `n_bytes` (at least 1 MiB); takes some seconds on a slow disk.

    Direct where the file system can. What is measured is this moment: run it on an idle machine and keep the result.
    """
    path = f"{folder.rstrip('/')}/.calibration-{world.random.token_hex(8)}"
    n_bytes = max(_LARGE_BYTES, n_bytes - n_bytes % _LARGE_BYTES)
    try:
        async with await open_file_dma(world, path, OpenFlags.create_new(direct=True)) as file:
            large = [(offset, _LARGE_BYTES) for offset in range(0, n_bytes, _LARGE_BYTES)]
            chance = world.random.stream("calibrate")
            places = [chance.randrange(n_bytes // _SMALL_BYTES) * _SMALL_BYTES for _ in range(CALIBRATION_OPERATIONS)]
            small = [(place, _SMALL_BYTES) for place in places]
            return IoProperties(
                write_bytes_per_s=n_bytes / await _time_writes(world, file, large),
                read_bytes_per_s=n_bytes / await _time_reads(world, file, large),
                write_operations_per_s=len(small) / await _time_writes(world, file, small),
                read_operations_per_s=len(small) / await _time_reads(world, file, small),
            )
    finally:
        await remove_file(world, path)


async def _time_writes(world: World, file: File, extents: Sequence[tuple[int, int]]) -> float:
    block = bytes(range(256)) * (extents[0][1] // 256)
    began_ns = world.clock.monotonic_ns()
    for first in range(0, len(extents), _DEPTH):
        await file.dma_write_many([(offset, block) for offset, _ in extents[first : first + _DEPTH]])
    await file.flush()
    return _seconds_since(world, began_ns)


async def _time_reads(world: World, file: File, extents: Sequence[tuple[int, int]]) -> float:
    began_ns = world.clock.monotonic_ns()
    for first in range(0, len(extents), _DEPTH):
        await file.dma_read_many(extents[first : first + _DEPTH])
    return _seconds_since(world, began_ns)


def _seconds_since(world: World, began_ns: int) -> float:
    return max(1, world.clock.monotonic_ns() - began_ns) / 1e9
