"""Sinks of log lines that never hold up the loop: a bounded queue before a pipe or terminal, and files that rotate.

A logger's `write` is called in the middle of whatever is being logged, so it must not wait: what cannot be written now is queued, what does
not fit into the queue is dropped and counted, and the next line that gets through is preceded by one that says how many were lost.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from isopod.world.disk import Disk, OpenFile

QUEUE_BYTES_MAX: Final = 4 << 20
RETRY_S: Final = 0.05
FLUSH_S: Final = 1.0
"""How long a closing sink tries to get rid of what is queued."""

WriteSome = Callable[[bytes], int]
"""Writes what can be written without waiting and returns how many bytes that was; OSError if nobody will ever read."""


class BoundedSink:
    """Writes lines without ever waiting. Pass it to a logger as `write`.

    Lines may come from several threads (the watch for stalls has its own): who finds another one writing only queues its line.

    Args:
        write: Takes what it can at once.
        n_bytes_max: The most that is queued.
    """

    def __init__(self, write: WriteSome, *, n_bytes_max: int = QUEUE_BYTES_MAX) -> None:
        self._write = write
        self._n_bytes_max = n_bytes_max
        self._queue: deque[bytes] = deque()
        self._n_bytes = 0
        self._n_lost = 0
        self._timer: asyncio.TimerHandle | None = None
        self._turns: list[None] = [None]
        """Empty while somebody writes: taking the turn is one step for the interpreter, as a lock would be."""
        self.n_dropped = 0
        """Lines that were lost."""

    def __call__(self, line: bytes) -> None:
        """Write a line, or queue it, or drop it."""
        if not self._take_turn():
            self._enqueue(line)
            return
        try:
            if not self._queue or self._flush():
                line = line[self._try(line) :]
            if line:
                self._enqueue(line)
            elif self._queue:  # another thread's, which could not arm the timer
                self._arm()
        finally:
            self._turns.append(None)

    @property
    def n_bytes_queued(self) -> int:
        """What waits to be written."""
        return self._n_bytes

    def flush(self) -> bool:
        """Write what can be written now; return whether nothing is left."""
        if not self._take_turn():
            return False
        try:
            return self._flush()
        finally:
            self._turns.append(None)

    def _take_turn(self) -> bool:
        try:
            self._turns.pop()
        except IndexError:
            return False
        return True

    def _enqueue(self, line: bytes) -> None:
        n_bytes = len(line)
        if self._n_bytes + n_bytes > self._n_bytes_max:
            self.n_dropped += 1
            self._n_lost += 1
            return
        self._queue.append(line)
        self._n_bytes += n_bytes
        self._arm()

    def _flush(self) -> bool:
        while self._queue:
            line = self._queue[0]
            written = self._try(line)
            self._n_bytes -= written
            if written < len(line):
                self._queue[0] = line[written:]
                return False
            self._queue.popleft()
        if self._n_lost:
            lost, self._n_lost = self._n_lost, 0
            notice = msgspec.json.encode({"level": "warning", "event": "log.dropped", "n_lines": lost}) + b"\n"
            self._queue.append(notice)
            self._n_bytes += len(notice)
            return self._flush()
        return True

    async def close(self, timeout_s: float = FLUSH_S) -> None:
        """Write what is queued, for a bounded time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self.flush() and loop.time() < deadline:  # noqa: ASYNC110 - no event tells that a pipe has room again
            await asyncio.sleep(RETRY_S)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _try(self, line: bytes) -> int:
        try:
            return self._write(line)
        except BlockingIOError:
            return 0
        except OSError:  # nobody reads any more: the line is lost, and those behind it will be
            self.n_dropped += 1
            return len(line)

    def _arm(self) -> None:
        if self._timer is not None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # before the loop runs, or in another thread: the next line tries again
            return
        self._timer = loop.call_later(RETRY_S, self._retry)

    def _retry(self) -> None:
        self._timer = None
        if not self.flush():
            self._arm()


class FileSink:
    """Appends lines to a file and starts a new one when it is full: app.log, then app.log.1 (the youngest), app.log.2, ...

    Lines are gathered and written by one task, off the loop's back; a disk that cannot keep up, or fails, costs lines, never time.

    Args:
        disk: Where the file is.
        path: Absolute; its folder exists.
        n_bytes_max: A file's size, about.
        n_files_max: Files kept, the one in use included.
        n_queue_bytes_max: The most that waits to be written.
    """

    def __init__(
        self, disk: Disk, path: str, *, n_bytes_max: int = 100 << 20, n_files_max: int = 10, n_queue_bytes_max: int = QUEUE_BYTES_MAX
    ) -> None:
        self._disk = disk
        self._path = path
        self._n_bytes_max = n_bytes_max
        self._n_files_max = n_files_max
        self._n_queue_bytes_max = n_queue_bytes_max
        self._queue: list[bytes] = []
        self._n_bytes = 0
        self._wake = asyncio.Event()
        self._is_closing = False
        self._file: OpenFile | None = None
        self._task: asyncio.Task[None] | None = None
        self.n_dropped = 0
        """Lines that were lost."""

    def __call__(self, line: bytes) -> None:
        """Take a line, or drop it."""
        if self._is_closing or self._n_bytes + len(line) > self._n_queue_bytes_max:
            self.n_dropped += 1
            return
        self._queue.append(line)
        self._n_bytes += len(line)
        self._wake.set()

    async def start(self) -> None:
        """Open the file and write from now on. OSError if it cannot be opened."""
        self._file = await self._disk.open_append(self._path)
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"log {self._path}")

    async def close(self) -> None:
        """Write what was taken, and close the file."""
        self._is_closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.shield(self._task)
            self._task = None
        if self._file is not None:
            self._file.close()
            self._file = None

    async def _run(self) -> None:
        while not self._is_closing or self._queue:
            await self._wake.wait()
            self._wake.clear()
            await self._write_queue()

    async def _write_queue(self) -> None:
        lines, self._queue, self._n_bytes = self._queue, [], 0
        if not lines:
            return
        try:
            if self._file is None:  # the last rotation failed half-way: to rotate once more would push good files out
                self._file = await self._disk.open_append(self._path)
            if self._file.size_bytes() >= self._n_bytes_max:
                await self._rotate()
            await self._file.append(b"".join(lines))
        except OSError:
            self.n_dropped += len(lines)

    async def _rotate(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        for number in range(self._n_files_max - 1, 0, -1):
            older = f"{self._path}.{number}"
            newer = f"{self._path}.{number - 1}" if number > 1 else self._path
            if await self._disk.stat(newer) is not None:
                await self._disk.rename(newer, older)
        if self._n_files_max == 1:
            await self._disk.remove(self._path)
        self._file = await self._disk.open_append(self._path)
