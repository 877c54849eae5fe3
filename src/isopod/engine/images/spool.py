"""Spool: an uploaded archive on its way into a file, since its formats need random access.

The outer archive of a load may be compressed (`docker save | gzip`): it is expanded here, in the loop, in bounded steps with the disk's
writes between them. Layers inside stay as they are; the disk's `unpack_layer` expands them.

Rules: never more than `STEP_BYTES` of gzip or 32 MiB of zstd output in memory (1 KiB of zstd holds at most 256 blocks of 128 KiB); the
limits of `UnpackLimits` hold for the outer archive as for a layer; a stream that ends inside its compressed data is refused.
Source: RFC 1952 (gzip members), RFC 8878 (zstd frames).
"""

import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Final, Protocol

import zstandard

from isopod.engine.images.failures import disk_failures
from isopod.engine.images.progress import Meter
from isopod.world.disk import Disk, UnpackLimits
from isopod.world.errors import BadArchive

ByteSource = AsyncIterator[bytes]

STEP_BYTES: Final = 1 << 20
_ZSTD_INPUT_BYTES: Final = 1 << 10
_ZSTD_WINDOW_BYTES_MAX: Final = 128 << 20
_RATIO_FLOOR_BYTES: Final = 64 << 20
_MAGIC_BYTES: Final = 4
_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
UPLOAD: Final = "(the archive)"
"""How errors name the uploaded stream itself."""


class Expander(Protocol):
    """A decompressor in steps."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` expands to, in bounded pieces."""

    def finish(self) -> None:
        """The stream has ended. Raises BadArchive if the compressed data has not."""


async def receive(source: ByteSource, disk: Disk, path: str, *, limits: UnpackLimits, meter: Meter, expand: bool) -> int:
    """Write a stream to a new file.

    Args:
        source: The stream, in pieces of any size.
        disk: Where to.
        path: The file; left behind on failure, for the owner of its folder to remove.
        limits: Bounds on the stream and what it expands to.
        meter: Told what was taken from the stream.
        expand: Whether a compressed stream is expanded on the way.

    Returns:
        The file's size.

    Raises:
        BadArchive: Empty, damaged or over a limit.
        DiskFull, KernelError: The disk refused.
        Exception: Whatever `source` raises.
    """
    n_taken = n_written = 0
    expander: Expander | None = None
    with disk_failures("write", path):
        file = await disk.open_append(path)
    try:
        async for chunk in _rechunk(source):
            expander = expander or (_choose(chunk) if expand else _Plain())
            n_taken += len(chunk)
            for piece in expander.feed(chunk):
                n_written += len(piece)
                _check_limits(n_taken, n_written, limits)
                with disk_failures("write", path):
                    await file.append(piece)
            meter.advance(len(chunk))
        if expander is None:
            raise BadArchive(UPLOAD, "nothing was sent")
        expander.finish()
    finally:
        file.close()
    meter.end()
    return n_written


async def _rechunk(source: ByteSource) -> AsyncIterator[bytes]:
    """Join small pieces, so that the first one shows the magic and the disk gets writes worth a call; split large ones."""
    buffer = bytearray()
    async for data in source:
        buffer += data
        while len(buffer) >= STEP_BYTES:
            yield bytes(memoryview(buffer)[:STEP_BYTES])
            del buffer[:STEP_BYTES]
    if buffer:
        yield bytes(buffer)


def _choose(beginning: bytes) -> Expander:
    if beginning.startswith(_GZIP_MAGIC):
        return _Gunzip()
    return _Unzstd() if beginning.startswith(_ZSTD_MAGIC) else _Plain()


def _check_limits(n_taken: int, n_written: int, limits: UnpackLimits) -> None:
    if n_written > limits.unpacked_bytes_max:
        raise BadArchive(UPLOAD, f"is larger than {limits.unpacked_bytes_max} bytes")
    if n_written > max(_RATIO_FLOOR_BYTES, n_taken * limits.ratio_max):
        raise BadArchive(UPLOAD, f"expands to more than {limits.ratio_max} times its size")


class _Plain:
    """No compression."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data

    def finish(self) -> None:
        pass


class _Gunzip:
    """gzip members one after the other; zero bytes behind the last one are padding."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=31)
        self._between = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                if self._inflate.eof:
                    self._inflate, self._between = zlib.decompressobj(wbits=31), True
                if self._between:
                    data = data.lstrip(b"\0")
                    if not data:
                        return
                    self._between = False
                piece = self._inflate.decompress(data, STEP_BYTES)
                data = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
                if piece:
                    yield piece
            # The window may still hold output that the bound kept back.
            while not self._inflate.eof and (piece := self._inflate.decompress(b"", STEP_BYTES)):
                yield piece
        except zlib.error as error:
            raise BadArchive(UPLOAD, f"damaged gzip data: {error}") from error

    def finish(self) -> None:
        if not self._inflate.eof and not self._between:
            raise BadArchive(UPLOAD, "the gzip data is cut off")


class _Unzstd:
    """zstd frames one after the other; zero bytes behind the last one are padding."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX)
        self._frame = self._decompressor.decompressobj()
        self._between = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        for start in range(0, len(view), _ZSTD_INPUT_BYTES):
            yield from self._step(bytes(view[start : start + _ZSTD_INPUT_BYTES]))

    def finish(self) -> None:
        if not self._frame.eof and not self._between:
            raise BadArchive(UPLOAD, "the zstd data is cut off")

    def _step(self, data: bytes) -> Iterator[bytes]:
        try:
            while data:
                if self._frame.eof:
                    self._frame, self._between = self._decompressor.decompressobj(), True
                if self._between:
                    data = data.lstrip(b"\0")
                    if not data:
                        return
                    self._between = False
                piece = self._frame.decompress(data)
                data = self._frame.unused_data if self._frame.eof else b""
                if piece:
                    yield piece
        except zstandard.ZstdError as error:
            raise BadArchive(UPLOAD, f"damaged zstd data: {error}") from error
