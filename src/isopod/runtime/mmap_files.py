"""Files in memory: search and change a file as if it were bytes.

For files that are searched more than once or changed in place. What is not in memory yet makes the loop wait for the disk when it is
touched: long searches fetch ahead in a thread and let others run in between. A file that is cut while it is mapped is an error
(`KernelError`, ESTALE), never a signal; see `isopod.world.disk.MappedBytes` for what exactly is caught.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Final, Self

from isopod.runtime.file_errors import wrapping
from isopod.runtime.scheduling import maybe_yield
from isopod.world.disk import Data, MappedBytes, OpenFlags
from isopod.world.errors import InvalidArgument
from isopod.world.world import World

WINDOW_BYTES: Final = 4 << 20
"""Searched between two chances for others."""
LINE_BYTES_MAX: Final = 1 << 20
"""A longer line is cut there."""
FILL_BYTES: Final = 1 << 20


class MappedFile:
    """A file that is mapped for reading. Open with `open`, close with `close` or as `async with`.

    Args:
        mapped: The map.
        path: For messages.
    """

    def __init__(self, mapped: MappedBytes, path: str) -> None:
        self._mapped = mapped
        self._path = path

    @classmethod
    async def open(cls, world: World, path: str) -> Self:
        """Map a file for reading.

        Raises:
            UnavailableError: It cannot be mapped: missing, empty, not a regular file.
        """
        with wrapping("map", path):
            return cls(await world.disk.map_file(path, write=False), path)

    @property
    def size_bytes(self) -> int:
        """Its length when it was mapped."""
        return self._mapped.size_bytes

    def __len__(self) -> int:
        """Return its length when it was mapped."""
        return self._mapped.size_bytes

    def read(self, offset: int = 0, n_bytes: int | None = None) -> bytes:
        """Return up to `n_bytes` from `offset`, to the end if None."""
        if offset < 0 or (n_bytes is not None and n_bytes < 0):
            raise InvalidArgument("range", f"{offset}, {n_bytes}", "it must not be negative")
        with wrapping("read", self._path):
            return self._mapped.read(offset, self.size_bytes if n_bytes is None else n_bytes)

    def starts_with(self, prefix: bytes) -> bool:
        """Return whether the file begins with these bytes."""
        return self.read(0, len(prefix)) == prefix

    async def find(self, needle: bytes, start: int = 0, end: int | None = None) -> int | None:
        """Return the first offset of `needle` wholly inside start..end, None if there is none.

        Raises:
            InvalidArgument: `needle` is empty.
        """
        async with aclosing(self.find_all(needle, start, end)) as found:
            async for offset in found:
                return offset
        return None

    async def find_all(self, needle: bytes, start: int = 0, end: int | None = None) -> AsyncGenerator[int, None]:
        """Yield every offset of `needle` inside start..end, overlapping ones too.

        Raises:
            InvalidArgument: `needle` is empty.
        """
        if not needle:
            raise InvalidArgument("needle", needle, "it must not be empty")
        end = self.size_bytes if end is None else min(end, self.size_bytes)
        for first in range(max(start, 0), end, WINDOW_BYTES):
            stop = min(first + WINDOW_BYTES + len(needle) - 1, end)
            with wrapping("read", self._path):
                await self._mapped.prefetch(first, stop - first)
            place = first
            while True:
                with wrapping("read", self._path):
                    found = self._mapped.find(needle, place, stop)
                if found < 0:
                    break
                yield found
                place = found + 1
            await maybe_yield()

    async def count(self, needle: bytes) -> int:
        """Return how often `needle` occurs, overlapping ones counted."""
        return sum([1 async for _ in self.find_all(needle)])

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the lines without their ends; the last one also if it has none. A line over 1 MiB comes in pieces of that."""
        place = 0
        while place < self.size_bytes:
            stop = min(place + LINE_BYTES_MAX, self.size_bytes)
            with wrapping("read", self._path):
                found = self._mapped.find(b"\n", place, stop)
            end = stop if found < 0 else found
            yield self.read(place, end - place)
            place = end if found < 0 else end + 1
            await maybe_yield()

    def close(self) -> None:
        """Unmap; twice is fine."""
        self._mapped.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MappedFileMut(MappedFile):
    """A file that is mapped for reading and changing. What is changed is seen by all at once and durable after `flush`."""

    @classmethod
    async def open(cls, world: World, path: str) -> Self:
        """Map an existing file. Its holes get their space first, so that a full disk is an error here and not later.

        Raises:
            UnavailableError: It cannot be mapped.
            DiskFull: There is no space for its holes.
        """
        with wrapping("map", path):
            file = await world.disk.open_file(path, OpenFlags.read_write())
            try:
                if file.size_bytes():
                    await file.allocate(0, file.size_bytes())
            finally:
                file.close()
            return cls(await world.disk.map_file(path, write=True), path)

    @classmethod
    async def create(cls, world: World, path: str, n_bytes: int, *, mode: int = 0o600) -> Self:
        """Make a new file of zeros and map it. On failure there is no file.

        Raises:
            InvalidArgument: `n_bytes` is less than 1.
            UnavailableError: It cannot be made: there is something at `path`, or no space (`DiskFull`).
        """
        if n_bytes < 1:
            raise InvalidArgument("file length", n_bytes, "it must be at least 1")
        with wrapping("create", path):
            file = await world.disk.open_file(path, OpenFlags.create_new(), mode=mode)
            try:
                await file.allocate(0, n_bytes)
                return cls(await world.disk.map_file(path, write=True), path)
            except (OSError, asyncio.CancelledError):
                await world.disk.remove(path)
                raise
            finally:
                file.close()

    def write_at(self, offset: int, data: Data) -> None:
        """Replace bytes.

        Raises:
            KernelError: EINVAL outside of the map, ESTALE if the file was cut.
        """
        with wrapping("write", self._path):
            self._mapped.write(offset, data)

    def fill(self, value: int, offset: int = 0, n_bytes: int | None = None) -> None:
        """Set `n_bytes` (to the end if None) from `offset` to one byte value."""
        end = self.size_bytes if n_bytes is None else offset + n_bytes
        if not 0 <= value <= 255 or not 0 <= offset <= end <= self.size_bytes:
            raise InvalidArgument("fill", f"{value} at {offset}..{end}", f"a byte, and inside the {self.size_bytes} bytes")
        block = bytes([value]) * min(FILL_BYTES, end - offset)
        for place in range(offset, end, FILL_BYTES):
            self.write_at(place, block[: end - place])

    def copy_within(self, source: int, target: int, n_bytes: int) -> None:
        """Copy bytes inside the file; the ranges may overlap."""
        with wrapping("write", self._path):
            self._mapped.move(target, source, n_bytes)

    async def flush(self) -> None:
        """Make all changes durable."""
        await self.flush_range(0, self.size_bytes)

    async def flush_range(self, offset: int, n_bytes: int) -> None:
        """Make the changes of a range durable."""
        with wrapping("sync", self._path):
            await self._mapped.sync(offset, n_bytes)
