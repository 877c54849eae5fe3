"""Container logs: from the supervisor's file (CRI format, which conmon calls k8s-file) to the items of a `container.logs` stream.

A record is one line, `2026-11-20T23:01:27.315608161+00:00 stdout F text`; the tag P says that the container has not ended this line yet
(it flushed, or the line is longer than conmon's 8 KiB buffer), so the next record of that stream continues it. `Decoder` and the
functions on single records are pure; `read_logs` adds the file.

Rules:
- A batch is at most one block of the file: its items, then one `Cursor`. A client that counts a batch only when its cursor came, and
  asks again from the last cursor it got, loses nothing and doubles nothing.
- A cursor names the file too: conmon, over its size limit, begins a new file under the same name. Its upper bits are a checksum of the
  file's first time stamp; a cursor of another file, or one not at a line's beginning, starts at the beginning of the present file.
  (Inode numbers were rejected: file systems give them again at once.) Clients do not compute with cursors.
- A follower reads the old file to its end before it opens the new one. What conmon dropped between two looks is gone for everyone.
- A line without its newline is not yet a record. Damaged lines are skipped and counted. Memory is bounded by the longest line and two
  blocks.
- `tail` counts line ends, of both streams together. Pieces of a long line that stand before the first line counted are not shown.

Source: Kubernetes' design proposal "CRI: log management for container stdout/stderr streams"; conmon(8).
"""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import date
from functools import lru_cache
from typing import Final, NamedTuple

from isopod.api.messages import Cursor, LogOutput, LogsRequest, Stderr, Stdout
from isopod.runtime.logger import Logger
from isopod.world.disk import Disk, OpenFile, Watch
from isopod.world.errors import BugError, from_os_error
from isopod.world.world import World

BLOCK_BYTES: Final = 64 << 10
LINE_BYTES_MAX: Final = 256 << 10
"""A longer line is damage: conmon writes at most 8 KiB of text in one."""
CURSOR_FROM_START: Final = 1 << 62
"""The cursor of a log that was still empty."""
_OFFSET_BITS: Final = 40
_OFFSET_MASK: Final = (1 << _OFFSET_BITS) - 1
_TAG_MASK: Final = (1 << 21) - 1
_STAMP_BYTES_MAX: Final = 35
_OPEN_TRIES_MAX: Final = 16
_EPOCH_DAYS: Final = date(1970, 1, 1).toordinal()

Stream = type[Stdout] | type[Stderr]


class Record(NamedTuple):
    """One line of the file. `text` has no newline; `is_partial` means that the container's line goes on."""

    stamp: bytes
    time_ns: int
    stream: Stream
    is_partial: bool
    text: bytes


def parse_record(line: bytes) -> Record | None:
    """Return the record that a line (without its newline) is, or None if it is none."""
    fields = line.split(b" ", 3)
    if len(fields) != 4:
        return None
    stamp, name, tags, text = fields
    time_ns = parse_stamp(stamp)
    if time_ns is None or name not in (b"stdout", b"stderr") or tags[:1] not in (b"P", b"F") or tags[1:2] not in (b"", b":"):
        return None
    return Record(stamp, time_ns, Stdout if name == b"stdout" else Stderr, tags[:1] == b"P", text)


def parse_stamp(stamp: bytes) -> int | None:
    """Return nanoseconds since the epoch of an RFC 3339 time stamp with up to nine decimals, or None if it is none."""
    minute_ns = _minute_ns(stamp[:17])
    seconds, digits, zone = _split_seconds(stamp[17:])
    zone_ns = _zone_ns(zone)
    if minute_ns is None or zone_ns is None or len(seconds) != 2 or not seconds.isdigit() or len(digits) > 9:
        return None
    if digits and not digits.isdigit():
        return None
    return minute_ns + int(seconds) * 1_000_000_000 + int(digits.ljust(9, b"0")) - zone_ns


class Decoder:
    """Bytes of the file in, items out.

    Args:
        since_ns: Records before that time are dropped.
        timestamps: Whether the beginning of each line gets its time stamp, as docker prints it.
    """

    def __init__(self, *, since_ns: int | None = None, timestamps: bool = False) -> None:
        self.n_invalid = 0
        """Lines that were skipped."""
        self._since_ns = since_ns
        self._timestamps = timestamps
        self._rest = b""
        self._is_skipping = False
        self._mid_line: dict[Stream, bool] = {}

    @property
    def is_skipping(self) -> bool:
        """Whether what was fed ends inside a line too long to be one: such a place is no place for a cursor."""
        return self._is_skipping

    @property
    def n_held_bytes(self) -> int:
        """Bytes at the end of what was fed that belong to an unfinished line."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[Stdout | Stderr]:
        """Return the items of all lines that `data` completes; neighbours of one stream are one item."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if self._is_skipping and lines:
            self._is_skipping = False
            del lines[0]
        if self._is_skipping or len(self._rest) > LINE_BYTES_MAX:
            self.n_invalid += not self._is_skipping
            self._rest, self._is_skipping = b"", True
        return self._decode(lines)

    def end_file(self) -> None:
        """Say that this file goes on no more: an unfinished line is damage, and continued lines begin anew."""
        self.n_invalid += bool(self._rest)
        self._rest, self._is_skipping = b"", False
        self._mid_line.clear()

    def _decode(self, lines: Sequence[bytes]) -> list[Stdout | Stderr]:
        items: list[Stdout | Stderr] = []
        parts: list[bytes] = []
        stream: Stream = Stdout
        for line in lines:
            record = parse_record(line)
            if record is None:
                self.n_invalid += 1
                continue
            if self._since_ns is not None and record.time_ns < self._since_ns:
                continue
            if record.stream is not stream:
                _flush(items, stream, parts)
                stream = record.stream
            if self._timestamps and not self._mid_line.get(stream, False):
                parts.append(record.stamp + b" ")
            self._mid_line[stream] = record.is_partial
            parts.append(record.text if record.is_partial else record.text + b"\n")
        _flush(items, stream, parts)
        return items


class TailCounter:
    """Finds where the last `n_lines` lines begin; records are added from the last one backwards."""

    def __init__(self, n_lines: int) -> None:
        self._n_left = n_lines
        self._seen: dict[Stream, bool] = {}

    def is_before(self, line: bytes) -> bool:
        """Return whether this record ends a line that is one too many: the tail begins right after it. Damage is not counted."""
        record = parse_record(line)
        if record is None:
            return False
        ends_line = not record.is_partial or not self._seen.get(record.stream, False)
        self._seen[record.stream] = True
        if not ends_line:
            return False
        self._n_left -= 1
        return self._n_left < 0


async def read_logs(
    world: World, path: str, request: LogsRequest, *, ended: asyncio.Event, logger: Logger | None = None
) -> AsyncGenerator[LogOutput, None]:
    """Stream a container's log.

    Args:
        world: Its disk is used.
        path: The log file; one that does not exist yet is an empty one, its folder must exist to be followed.
        request: What is wanted; `name` is not looked at.
        ended: Set once the container's supervisor writes no more: a follower then stops after the last record.
        logger: Told at the end if lines were skipped.

    Close it (`contextlib.aclosing`) when leaving early. Without `follow` it ends where the file ended when it began.

    Raises:
        UnavailableError: The disk failed.
    """
    reader = _Reader(world.disk, path, request)
    try:
        if not request.follow:
            async for item in reader.read_to_end(is_bounded=True):
                yield item
            return
        folder, _, name = path.rpartition("/")
        async with _wake_on_change(world.disk, folder, name, ended) as waker:
            async for item in reader.begin():
                yield item
            while True:
                is_last = waker.arm(ended)
                async for item in reader.read_to_end():
                    yield item
                if is_last:
                    return
                await waker.wait()
    except OSError as error:
        raise from_os_error(error, "read log", path) from error
    finally:
        reader.close()
        if logger is not None and reader.n_invalid:
            logger.warning("log_lines_skipped", path=path, n_lines=reader.n_invalid)


class _Reader:
    """A position in the file, across its replacements."""

    def __init__(self, disk: Disk, path: str, request: LogsRequest) -> None:
        self._disk = disk
        self._path = path
        self._request = request
        self._decoder = Decoder(since_ns=request.since_ns, timestamps=request.timestamps)
        self._file: OpenFile | None = None
        self._inode = 0
        self._offset = 0
        self._tag: int | None = None
        self._has_begun = False

    @property
    def n_invalid(self) -> int:
        return self._decoder.n_invalid

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    async def begin(self) -> AsyncIterator[LogOutput]:
        """Find the first position, and tell it: a follower that is cut off before the first record must not count its tail anew."""
        if await self._ensure_open():
            await self._seek_first()
        self._has_begun = True
        yield await self._cursor()

    async def read_to_end(self, *, is_bounded: bool = False) -> AsyncIterator[LogOutput]:
        """Read on until the file's present end; with `is_bounded` not beyond the end it has now."""
        if not await self._ensure_open():
            return
        if not self._has_begun:
            await self._seek_first()
            self._has_begun = True
        end = self._size() if is_bounded else _OFFSET_MASK
        while True:
            data = await self._read(min(BLOCK_BYTES, end - self._offset))
            if data:
                for item in self._decoder.feed(data):
                    yield item
                if not self._decoder.is_skipping:
                    yield await self._cursor()
            elif is_bounded or not await self._step_to_next_file():
                return

    async def _read(self, n_bytes: int) -> bytes:
        data = await self._opened().read_at(self._offset, n_bytes) if n_bytes > 0 else b""
        self._offset += len(data)
        return data

    async def _step_to_next_file(self) -> bool:
        """Go on in a file that replaced this one, or at the start of one that was cut; False if there is nothing more to read."""
        found = await self._disk.stat(self._path)
        if found is not None and found.inode != self._inode:
            if self._size() > self._offset:
                return True  # written between our last read and the replacement
            self.close()
            self._restart()
            return await self._ensure_open()
        if self._size() < self._offset:
            self._restart()
            return True
        return self._size() > self._offset

    def _restart(self) -> None:
        self._decoder.end_file()
        self._offset, self._tag = 0, None

    def _size(self) -> int:
        return self._opened().size_bytes()

    async def _ensure_open(self) -> bool:
        """Open the file and know its inode: asked before and after, because it may be replaced in between."""
        for _ in range(_OPEN_TRIES_MAX):
            if self._file is not None:
                return True
            before = await self._disk.stat(self._path)
            if before is None:
                return False
            try:
                opened = await self._disk.open_read(self._path)
            except FileNotFoundError:
                continue
            after = await self._disk.stat(self._path)
            if after is None or after.inode != before.inode:
                opened.close()
                continue
            self._file, self._inode = opened, before.inode
        return self._file is not None

    async def _seek_first(self) -> None:
        request, size = self._request, self._size()
        if request.cursor:
            self._offset = await self._offset_of(request.cursor, size)
        elif request.tail is not None:
            self._offset = await find_tail(self._opened(), request.tail)

    async def _offset_of(self, cursor: int, size: int) -> int:
        offset = cursor & _OFFSET_MASK
        if cursor == CURSOR_FROM_START or not 0 < offset <= size or cursor >> _OFFSET_BITS != await self._file_tag():
            return 0
        return offset if await self._opened().read_at(offset - 1, 1) == b"\n" else 0

    async def _cursor(self) -> Cursor:
        offset = self._offset - self._decoder.n_held_bytes
        if offset == 0:
            return Cursor(CURSOR_FROM_START)
        return Cursor(await self._file_tag() << _OFFSET_BITS | offset)

    async def _file_tag(self) -> int:
        """Return the checksum of the file's first time stamp; only a whole one is remembered."""
        if self._tag is not None:
            return self._tag
        stamp, space, _ = (await self._opened().read_at(0, _STAMP_BYTES_MAX + 1)).partition(b" ")
        tag = zlib.crc32(stamp) & _TAG_MASK
        if space:
            self._tag = tag
        return tag

    def _opened(self) -> OpenFile:
        if self._file is None:
            raise BugError("a log is read before it was opened")
        return self._file


async def find_tail(file: OpenFile, n_lines: int) -> int:
    """Return the offset at which the last `n_lines` lines of a log begin, reading backwards; an unfinished last line does not count."""
    counter = TailCounter(n_lines)
    end = found = file.size_bytes()
    later = b""  # the head of a line that begins in an earlier block
    is_cut = True  # until the last newline was seen
    while end > 0 and len(later) <= LINE_BYTES_MAX:
        start = max(0, end - BLOCK_BYTES)
        block = await file.read_at(start, end - start) + later
        if is_cut:
            block = block[: block.rfind(b"\n") + 1]
            is_cut = not block
            found = start + len(block)
        n_head = block.find(b"\n") + 1 if start > 0 else 0
        position = start + len(block)
        for line in reversed(block[n_head:].split(b"\n")[:-1]):
            if counter.is_before(line):
                return position
            position -= len(line) + 1
            found = position
        later, end = block[:n_head], start
    return found


class _Waker:
    """Rings when the file may have changed or the container ended."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.watcher: asyncio.Task[None] | None = None

    def arm(self, ended: asyncio.Event) -> bool:
        """Forget earlier rings; return whether what is read from now on is the last."""
        self.event.clear()
        return ended.is_set() or (self.watcher is not None and self.watcher.done())

    async def wait(self) -> None:
        """Wait for a ring.

        Raises:
            OSError: The watch failed.
        """
        await self.event.wait()
        if self.watcher is not None and self.watcher.done():
            self.watcher.result()


@asynccontextmanager
async def _wake_on_change(disk: Disk, folder: str, name: str, ended: asyncio.Event) -> AsyncIterator[_Waker]:
    waker = _Waker()
    async with disk.watch(folder) as watch:
        waker.watcher = asyncio.create_task(_ring_on_change(watch, name, waker.event), name=f"watch {folder}/{name}")
        ender = asyncio.create_task(_ring_on_end(ended, waker.event), name=f"await the end of {folder}/{name}")
        try:
            yield waker
        finally:
            for task in (waker.watcher, ender):
                task.cancel()
            await asyncio.gather(waker.watcher, ender, return_exceptions=True)


async def _ring_on_change(watch: Watch, name: str, event: asyncio.Event) -> None:
    try:
        async for changed in watch:
            if changed in (name, ""):
                event.set()
    finally:
        event.set()


async def _ring_on_end(ended: asyncio.Event, event: asyncio.Event) -> None:
    await ended.wait()
    event.set()


def _flush(items: list[Stdout | Stderr], stream: Stream, parts: list[bytes]) -> None:
    if parts:
        items.append(stream(b"".join(parts)))
        parts.clear()


@lru_cache(maxsize=64)
def _minute_ns(text: bytes) -> int | None:
    """Return the time of "2026-11-20T23:01:"; remembered, because neighbours share it."""
    fields = (text[0:4], text[5:7], text[8:10], text[11:13], text[14:16])
    if (
        len(text) != 17
        or text[4:5] + text[7:8] + text[10:11] + text[13:14] + text[16:17] != b"--T::"
        or not all(f.isdigit() for f in fields)
    ):
        return None
    year, month, day, hour, minute = (int(f) for f in fields)
    if hour > 23 or minute > 59:
        return None
    try:
        n_days = date(year, month, day).toordinal() - _EPOCH_DAYS
    except ValueError:
        return None
    return ((n_days * 24 + hour) * 60 + minute) * 60_000_000_000


def _split_seconds(text: bytes) -> tuple[bytes, bytes, bytes]:
    """Split "27.315608161+00:00" into seconds, decimals and zone."""
    seconds, rest = text[:2], text[2:]
    if not rest.startswith(b"."):
        return seconds, b"", rest
    n_digits = len(rest) - 1 - len(rest[1:].lstrip(b"0123456789"))
    return seconds, rest[1 : 1 + n_digits], rest[1 + n_digits :]


def _zone_ns(zone: bytes) -> int | None:
    if zone in (b"Z", b"+00:00"):
        return 0
    if len(zone) != 6 or zone[:1] not in (b"+", b"-") or zone[3:4] != b":" or not (zone[1:3] + zone[4:6]).isdigit():
        return None
    minutes = int(zone[1:3]) * 60 + int(zone[4:6])
    return (minutes if zone[:1] == b"+" else -minutes) * 60_000_000_000
