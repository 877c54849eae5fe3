"""Where the bytes of a segment come from: a plain file, or a compressed one. Read forwards, a window in memory.

Compressed segments are unpacked piece by piece, so that neither the loop is held up nor more memory taken than a window.
"""

import asyncio
from typing import Final, Protocol

import zstandard

from isopod.world.disk import DataFile, OpenFlags
from isopod.world.errors import JournalDamaged
from isopod.world.world import World

WINDOW_BYTES: Final = 1 << 20
_PACKED_BYTES: Final = 64 << 10


class Source(Protocol):
    """A segment being read. Who opened it closes it."""

    @property
    def path(self) -> str:
        """The file."""

    async def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to `n_bytes` from `offset`, fewer only at the end. Offsets never go back by more than what was last returned."""

    def close(self) -> None:
        """Close the file."""


class PlainSource:
    """A segment as it was written.

    Args:
        file: The open file; closed with this.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._window = b""
        self._start = 0

    @property
    def path(self) -> str:
        """See `Source.path`."""
        return self._file.path

    async def read(self, offset: int, n_bytes: int) -> bytes:
        """See `Source.read`."""
        at = offset - self._start
        if at >= 0 and at + n_bytes <= len(self._window):
            return self._window[at : at + n_bytes]
        self._window = await self._file.read_at(offset, max(n_bytes, WINDOW_BYTES))
        self._start = offset
        return self._window[:n_bytes]

    def close(self) -> None:
        """See `Source.close`."""
        self._file.close()


class PackedSource:
    """A segment that was compressed. A damaged one is `JournalDamaged` at the place in the compressed file.

    Args:
        file: The open file; closed with this.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
        self._n_packed = 0
        self._window = bytearray()
        self._start = 0
        self._is_ended = False

    @property
    def path(self) -> str:
        """See `Source.path`."""
        return self._file.path

    async def read(self, offset: int, n_bytes: int) -> bytes:
        """See `Source.read`."""
        if offset < self._start:
            raise ValueError("a compressed segment is read forwards")
        while not self._is_ended and self._start + len(self._window) < offset + n_bytes:
            self._window += await self._unpack()
            n_past = min(offset - self._start, len(self._window))
            del self._window[:n_past]
            self._start += n_past
        at = offset - self._start
        return bytes(self._window[at : at + n_bytes])

    def close(self) -> None:
        """See `Source.close`."""
        self._file.close()

    async def _unpack(self) -> bytes:
        packed = b"" if self._is_ended else await self._file.read_at(self._n_packed, _PACKED_BYTES)
        if not packed:
            if not self._unpacker.eof:
                raise JournalDamaged(self.path, self._n_packed, "the compressed segment is cut off")
            self._is_ended = True
            return b""
        try:
            piece = b"" if self._unpacker.eof else self._unpacker.decompress(packed)
        except zstandard.ZstdError as error:
            raise JournalDamaged(self.path, self._n_packed, f"the compressed segment is damaged: {error}") from error
        if self._unpacker.eof and self._unpacker.unused_data:
            raise JournalDamaged(self.path, self._n_packed, "bytes follow the compressed segment")
        self._n_packed += len(packed)
        await asyncio.sleep(0)
        return piece


async def open_source(world: World, path: str, *, is_packed: bool) -> Source:
    """Open a segment for reading; OSError."""
    file = await world.disk.open_file(path, OpenFlags.read_only())
    return PackedSource(file) if is_packed else PlainSource(file)
