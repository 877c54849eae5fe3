"""Streams over files: reading ahead and writing behind.

Both keep a bounded number of operations under way (`n_ahead`, `n_behind`), each of one buffer; memory is that many buffers and one more.
A stream belongs to one task at a time. It does not close its file.

A direct file takes whole units only. The output stream therefore writes the last, partial unit padded with zeros and cuts the file to its
true length afterwards; what is written later begins again at that unit's start.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from types import TracebackType
from typing import Any, Final, Self

from isopod.runtime.files import File
from isopod.world.disk import Data
from isopod.world.errors import InvalidArgument, WrongState

BUFFER_BYTES: Final = 128 << 10
BUFFER_BYTES_MAX: Final = 64 << 20
N_UNDER_WAY: Final = 2
N_UNDER_WAY_MAX: Final = 64


def make_file_input_stream(
    file: File, offset: int = 0, n_bytes: int | None = None, *, buffer_bytes: int = BUFFER_BYTES, n_ahead: int = N_UNDER_WAY
) -> "FileInputStream":
    """Return a stream of a part of a file.

    Args:
        file: Open for reading.
        offset: Where it begins.
        n_bytes: How long it is at most; to the end of the file if None.
        buffer_bytes: How much one read asks for.
        n_ahead: Reads under way before they are asked for; 0 reads when asked.
    """
    return FileInputStream(file, offset, n_bytes, buffer_bytes=buffer_bytes, n_ahead=n_ahead)


def make_file_output_stream(
    file: File, offset: int = 0, *, buffer_bytes: int = BUFFER_BYTES, n_behind: int = N_UNDER_WAY
) -> "FileOutputStream":
    """Return a stream that writes a file.

    Args:
        file: Open for writing.
        offset: Where it begins; of a direct file a multiple of its unit.
        buffer_bytes: How much one write carries, a multiple of the file's unit.
        n_behind: Writes under way while the caller goes on; 0 waits for each.
    """
    return FileOutputStream(file, offset, buffer_bytes=buffer_bytes, n_behind=n_behind)


class _Stream:
    """What both have: a bounded line of tasks, and an end."""

    def __init__(self, file: File, offset: int, buffer_bytes: int, n_under_way: int) -> None:
        if offset < 0 or not 1 <= buffer_bytes <= BUFFER_BYTES_MAX or not 0 <= n_under_way <= N_UNDER_WAY_MAX:
            raise InvalidArgument("stream options", f"{offset}, {buffer_bytes}, {n_under_way}", "out of range")
        self._file = file
        self._offset = offset
        self._buffer_bytes = buffer_bytes
        self._n_under_way = n_under_way
        self._tasks: deque[asyncio.Task[Any]] = deque()
        """In the order of their offsets; of bytes or None."""
        self._is_closed = False

    def _spawn(self, operation: Coroutine[Any, Any, Any], name: str) -> None:  # bytes or None
        self._tasks.append(asyncio.get_running_loop().create_task(operation, name=f"{name} {self._file.path}"))

    def _check(self) -> None:
        if self._is_closed:
            raise WrongState("stream of", self._file.path, "closed", "use it")

    async def _cancel_all(self) -> None:
        """End all tasks; what they raise is nobody's concern any more."""
        tasks, self._tasks = self._tasks, deque()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class FileInputStream(_Stream):
    """Reads a file from front to back. See `make_file_input_stream`."""

    def __init__(self, file: File, offset: int, n_bytes: int | None, *, buffer_bytes: int, n_ahead: int) -> None:
        super().__init__(file, offset, buffer_bytes, n_ahead)
        if n_bytes is not None and n_bytes < 0:
            raise InvalidArgument("stream length", n_bytes, "it must not be negative")
        self._end = None if n_bytes is None else offset + n_bytes
        self._rest = memoryview(b"")
        self._saw_end = False

    async def read(self) -> bytes:
        """Return the next bytes, as they come; b"" at the end.

        Raises:
            UnavailableError: The disk failed; the stream is at its end then.
            WrongState: It is closed.
        """
        return bytes(await self._next(None))

    async def read_up_to(self, n_bytes: int) -> bytes:
        """Return from 1 to `n_bytes` bytes; b"" at the end."""
        return bytes(await self._next(n_bytes))

    async def read_exactly(self, n_bytes: int) -> bytes:
        """Return `n_bytes`, fewer only at the end."""
        pieces: list[bytes] = []
        n_left = n_bytes
        while n_left and (piece := await self._next(n_left)):
            pieces.append(bytes(piece))
            n_left -= len(piece)
        return b"".join(pieces)

    async def skip(self, n_bytes: int) -> None:
        """Go on `n_bytes` further without looking at them."""
        while n_bytes > 0 and (piece := await self._next(n_bytes)):
            n_bytes -= len(piece)

    async def close(self) -> None:
        """End the reads under way; twice is fine."""
        self._is_closed = True
        await self._cancel_all()

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the bytes as they come."""
        return self._iterate()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _iterate(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def _next(self, n_bytes_max: int | None) -> memoryview:
        self._check()
        if not self._rest and not self._saw_end:
            self._rest = memoryview(await self._fetch())
        n_bytes = len(self._rest) if n_bytes_max is None else min(n_bytes_max, len(self._rest))
        piece, self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return piece

    async def _fetch(self) -> bytes:
        """Return the next buffer, and see to it that the ones behind it are under way."""
        while len(self._tasks) < self._n_under_way + 1 and (wanted := self._wanted()) > 0:
            self._spawn(self._file.dma_read(self._offset, wanted), "read ahead in")
            self._offset += wanted
        if not self._tasks:
            self._saw_end = True
            return b""
        task = self._tasks.popleft()
        try:
            data: bytes = await task
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self._cancel_all()
            self._saw_end = True
            raise
        except Exception:
            self._saw_end = True
            await self._cancel_all()
            raise
        if len(data) < self._buffer_bytes:
            self._saw_end = True
            await self._cancel_all()
        return data

    def _wanted(self) -> int:
        return self._buffer_bytes if self._end is None else min(self._buffer_bytes, self._end - self._offset)


class FileOutputStream(_Stream):
    """Writes a file from front to back. See `make_file_output_stream`. After a failure it takes no more."""

    def __init__(self, file: File, offset: int, *, buffer_bytes: int, n_behind: int) -> None:
        super().__init__(file, offset, buffer_bytes, n_behind)
        self._unit = file.alignment.offset_bytes
        if offset % self._unit or buffer_bytes % self._unit:
            raise InvalidArgument("stream options", f"{offset}, {buffer_bytes}", f"a direct file takes multiples of {self._unit}")
        self._buffer = bytearray()
        self._failure: BaseException | None = None

    @property
    def position(self) -> int:
        """The offset behind the last byte that was given to `write`."""
        return self._offset + len(self._buffer)

    async def write(self, data: Data) -> None:
        """Take bytes; they are in the file after `flush`.

        Raises:
            UnavailableError: A write failed, this one or one before; what the file holds behind it is unknown.
            WrongState: It is closed.
        """
        self._check()
        self._check_failure()
        with memoryview(data) as whole, whole.cast("B") as view:
            place = 0
            while place < len(view):
                n_bytes = min(self._buffer_bytes - len(self._buffer), len(view) - place)
                self._buffer += view[place : place + n_bytes]
                place += n_bytes
                if len(self._buffer) == self._buffer_bytes:
                    await self._write_behind()

    async def flush(self) -> None:
        """Write what is buffered, wait for all writes, and make them durable.

        Raises:
            UnavailableError: One of them failed, or the flush did.
            WrongState: It is closed.
        """
        self._check()
        await self._wait_writes(0)
        await self._write_tail()
        await self._file.flush()

    async def close(self) -> None:
        """Write what is buffered and wait for all writes; twice is fine. Durable only after `flush`.

        Raises:
            UnavailableError: One of them failed.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            await self._wait_writes(0)
            await self._write_tail()
        finally:
            await self._cancel_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            await self.close()
        else:
            self._is_closed = True
            await self._cancel_all()

    async def _write_behind(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        self._spawn(self._file.dma_write(self._offset, data), "write behind in")
        self._offset += len(data)
        await self._wait_writes(self._n_under_way)

    async def _wait_writes(self, n_left: int) -> None:
        """Wait until at most `n_left` writes are under way."""
        while len(self._tasks) > n_left:
            try:
                await asyncio.shield(self._tasks[0])
            except asyncio.CancelledError:
                raise
            except Exception as error:
                self._failure = error
                await self._cancel_all()
                raise
            self._tasks.popleft()
        self._check_failure()

    async def _write_tail(self) -> None:
        """Write the partial buffer. It stays, for what comes behind it, except for whole units."""
        if not self._buffer:
            return
        n_padding = -len(self._buffer) % self._unit
        try:
            await self._file.dma_write(self._offset, bytes(self._buffer) + bytes(n_padding))
            if n_padding:
                await self._file.truncate(self.position)
        except Exception as error:
            self._failure = error
            raise
        n_whole = len(self._buffer) - len(self._buffer) % self._unit
        del self._buffer[:n_whole]
        self._offset += n_whole

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
