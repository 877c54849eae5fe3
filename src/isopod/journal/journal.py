"""A journal: records that are durable once they are acknowledged, in the order they were appended.

    journal = await Journal.open(world, "/var/lib/isopod/metadata", format="isopod sandboxes 1")
    async for record in journal.read():
        ...                                            # what was there before
    lsn = await journal.commit([(PUT, b"..."), (PUT, b"...")])      # one atomic batch, durable when it returns
    await journal.close()

- `append` only queues; one task writes whatever is queued with one durable write (group commit), and tells who waits (`wait_durable`,
  `on_durable`). At most one write is under way; what comes meanwhile goes with the next one.
- A batch survives a crash whole or not at all; what was acknowledged survives always; what was not may be there.
- **A failed write is final.** After a failed sync nobody knows what is on the disk, and asking again may be answered with a lie (the kernel
  drops the pages it could not write), so the journal is poisoned: every waiter gets `JournalFailed`, and `on_fatal` ends the process.
- **A full disk is not**: space is allocated a segment ahead. When no further segment can be had and the present one is full, batches are
  refused with `DiskFull`, by `append` or by `wait_durable`; nothing of them is ever seen again, and the next ones are tried anew.

The LSN of a record is one more than that of the record before it, except where batches were refused by a full disk.
Sources: Rebello et al., "Can Applications Recover from fsync Failures?" (2020); Alagappan et al., "Protocol-Aware Recovery" (2018), for
telling a torn write from damage; see `layout`. Not for several processes: a lock keeps others out.
"""

import asyncio
import errno
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Final, NamedTuple

from isopod.journal import layout, snapshots
from isopod.journal.archive import Archive
from isopod.journal.folder import MANIFEST, NEXT, SNAPSHOTS, TEMPORARY, Manifest, check_name, claim, explained, new_manifest, pack_manifest
from isopod.journal.layout import SKIPS, GroupHeader, Record, SegmentHeader
from isopod.journal.reader import Span, read_records
from isopod.journal.recovery import Found, find_or_make
from isopod.journal.settings import JournalLog, JournalMetrics, JournalSettings, JournalStatistics, SilentLog
from isopod.journal.snapshots import Snapshot, Snapshots
from isopod.journal.waiters import Waiters
from isopod.journal.writer import Writer
from isopod.world.disk import OpenFile
from isopod.world.errors import DiskFull, Exhausted, InvalidArgument, IsopodError, JournalFailed, TooLarge, WrongState
from isopod.world.world import World

KIND_MAX: Final = 255
REFUSED_MAX: Final = 1000
"""How many refused batches are remembered for those who ask late; older ones are told that they are unknown."""
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class _Queued(NamedTuple):
    """A batch that is not written yet."""

    data: bytes
    first_lsn: int
    last_lsn: int


class _Tally:
    """`JournalStatistics` that can change."""

    __slots__ = ("n_batches", "n_bytes", "n_records", "n_rotations", "n_snapshots", "n_writes", "torn_bytes_cut")

    def __init__(self) -> None:
        self.n_batches = self.n_records = self.n_bytes = self.n_writes = 0
        self.n_rotations = self.n_snapshots = self.torn_bytes_cut = 0


class Journal:
    """An open journal. Made by `open`; who opened it closes it. For one event loop."""

    # CPython keeps no more than 30 attributes of an object in place; the rest of the hot path would look all of them up in a dictionary.
    __slots__ = (
        "_after_compact", "_archive", "_before_compact", "_callbacks", "_changing", "_durable_lsn", "_failure", "_failure_callbacks",
        "_folder", "_is_closing", "_is_full", "_last_lsn", "_lock", "_log", "_manifest", "_metrics", "_on_fatal", "_preparer", "_queue",
        "_queued_bytes", "_refused", "_rotation", "_seed", "_settings", "_snapshots", "_tally", "_tasks", "_upkeep", "_waiters", "_wake",
        "_world", "_writer",
    )  # fmt: skip

    def __init__(self, world: World, folder: str, settings: JournalSettings, *, found: Found, lock: OpenFile) -> None:
        self._world = world
        self._folder = folder
        self._settings = settings
        self._lock = lock
        self._manifest: Manifest = found.manifest
        self._archive = Archive(world, folder, settings)
        self._writer = Writer(world, folder, layout.seed_of(found.journal_id), archive=self._archive.folder)
        self._seed = layout.seed_of(found.journal_id)
        self._log: JournalLog = SilentLog()
        self._metrics: JournalMetrics | None = None
        self._on_fatal: Callable[[str], object] = world.processes.abort
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._last_lsn = self._durable_lsn = found.ending.lsn - 1
        self._waiters = Waiters()
        self._refused: deque[tuple[int, int]] = deque(maxlen=REFUSED_MAX)
        self._callbacks: list[Callable[[int], None]] = []
        self._failure_callbacks: list[Callable[[int, IsopodError], None]] = []
        self._failure: IsopodError | None = None
        self._is_closing = False
        self._is_full = False
        self._rotation: asyncio.Future[None] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._preparer: asyncio.Task[None] | None = None
        self._upkeep = asyncio.Event()
        self._changing = asyncio.Lock()
        self._tally = _Tally()
        self._snapshots = Snapshots(world, folder, settings)
        self._before_compact = world.failpoints.point("journal.before_compact")
        self._after_compact = world.failpoints.point("journal.after_compact")

    @classmethod
    async def open(
        cls,
        world: World,
        folder: str,
        *,
        format: str,  # noqa: A002 - the word for it
        settings: JournalSettings | None = None,
        log: JournalLog | None = None,
        metrics: JournalMetrics | None = None,
        on_fatal: Callable[[str], object] | None = None,
    ) -> "Journal":
        """Open the journal in a folder, made if it is missing; recover it: a torn last write is cut.

        Args:
            world: Its disk, clock and chance.
            folder: An absolute path. Nobody else may have it open.
            format: What the records mean, with the version of their form: 1 to 64 printable characters. Another one than the journal
                was made with is refused.
            settings: Sizes and bounds.
            log: Who is told what happens.
            metrics: Who counts.
            on_fatal: Called once, with why, when a write failed for good; `world.processes.abort` if None.

        Raises:
            JournalDamaged: Something is damaged that a crash cannot have damaged. Nothing was changed.
            JournalForeign: It is of another format, another version, or another journal's file lies in it.
            InUse: It is open already.
            InvalidArgument: The folder cannot be used as it is, or a setting makes no sense.
            UnavailableError: The disk is full, read-only, or failed.
        """
        check_name(format)
        settings = (settings or JournalSettings()).checked()
        lock = await claim(world, folder, create=True)
        journal: Journal | None = None
        try:
            with explained("recover the journal in", folder):
                found = await find_or_make(world, folder, format, settings)
                journal = cls(world, folder, settings, found=found, lock=lock)
                journal._log = log or journal._log
                journal._metrics = metrics
                journal._on_fatal = on_fatal or journal._on_fatal
                await journal._start(found)
        except BaseException:
            _release(journal, lock)
            raise
        return journal

    # -- what is there ---------------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> str:
        """Where it is."""
        return self._folder

    @property
    def first_lsn(self) -> int:
        """The first record that was not compacted, or the one that will be first."""
        return self._manifest.floor_lsn + 1

    @property
    def last_lsn(self) -> int:
        """The last record that was appended; 0 before the first one."""
        return self._last_lsn

    @property
    def durable_lsn(self) -> int:
        """The last record that is durable."""
        return self._durable_lsn

    @property
    def settings(self) -> JournalSettings:
        """What it was opened with."""
        return self._settings

    @property
    def failure(self) -> IsopodError | None:
        """Why it takes no more, None while it does."""
        return self._failure

    def statistics(self) -> JournalStatistics:
        """Return what it has done since it was opened."""
        history = self._archive.history(self._manifest.floor_lsn)
        tally = self._tally
        return JournalStatistics(
            n_batches=tally.n_batches,
            n_records=tally.n_records,
            n_bytes=tally.n_bytes,
            n_writes=tally.n_writes,
            n_rotations=tally.n_rotations,
            n_snapshots=tally.n_snapshots,
            torn_bytes_cut=tally.torn_bytes_cut,
            n_segments=len(self._archive.segments) - len(history) + 1,
            n_archived=len(history),
            archived_bytes=sum(segment.n_bytes for segment in history),
            queued_bytes=self._queued_bytes,
            first_lsn=self.first_lsn,
            last_lsn=self._last_lsn,
            durable_lsn=self._durable_lsn,
        )

    # -- writing ---------------------------------------------------------------------------------------------------------------------

    def append(self, records: Sequence[tuple[int, bytes]], *, begin: bool = True) -> int:
        """Queue one atomic batch of (kind, payload); it is written with all that is queued in this turn of the loop.

        Args:
            records: The batch.
            begin: False for callers that append more in this turn of the loop and then call `flush`.

        Returns:
            The LSN of its last record, for `wait_durable`.

        Raises:
            JournalFailed: An earlier write failed.
            WrongState: The journal is closed.
            TooLarge: A record, or the batch, is over its bound.
            DiskFull: There is no space for it; nothing was queued.
            Exhausted: Too much is queued.
            InvalidArgument: The batch is empty, or a kind is not 0 to 255.
        """
        if self._failure is not None or self._is_closing:
            raise self._stopped()
        first_lsn = self._last_lsn + 1
        try:
            data = layout.pack_batch(records, first_lsn, self._seed)
        except (struct.error, TypeError, ValueError) as error:
            raise InvalidArgument("journal batch", records[:1], f"want pairs of a kind (0 to {KIND_MAX}) and bytes") from error
        n_bytes = len(data)
        if n_bytes > self._settings.payload_bytes_max or not records:
            self._check_batch(records, n_bytes)
        if self._queued_bytes + n_bytes > self._settings.queue_bytes_max:
            raise Exhausted("the journal's queue", f"{self._queued_bytes} bytes wait for the disk", "the disk is too slow for this load")
        if self._is_full and self._queued_bytes + n_bytes > self._writer.room_bytes:
            self._prepare_next()
            raise DiskFull(self._folder)
        self._last_lsn = first_lsn + len(records) - 1
        self._queue.append(_Queued(data, first_lsn, self._last_lsn))
        self._queued_bytes += n_bytes
        if begin:
            self._rouse()
        return self._last_lsn

    def flush(self) -> bool:
        """Begin to write what is queued. Where the disk is quick (`DataFile.may_write_now`), in the loop's thread: then it is durable, and
        all have been told, on return. Never raises: a write that fails ends the journal as it always does.

        Returns:
            Whether it is durable already.
        """
        if self._failure is not None or self._wake is None or self._rotation is not None or self._is_aged():
            self._rouse()
            return False
        try:
            while self._queue and len(self._queue[0].data) <= self._writer.room_bytes and self._writer.may_write_now(self._queued_bytes):
                batches, header = self._take_group()
                started_ns = self._world.clock.monotonic_ns()
                self._wrote(batches, header.n_records, self._writer.write_now([batch.data for batch in batches], header), started_ns)
        except OSError as error:
            self._fail(_why(error))
            return False
        if self._queue:
            self._rouse()
        return not self._queue

    async def wait_durable(self, lsn: int) -> None:
        """Wait until the record `lsn` is durable. Cancelling it changes nothing about the record.

        Raises:
            JournalFailed: A write failed: whether it is there will be known after the next start.
            DiskFull: The batch was refused, nothing of it is there.
            InvalidArgument: No such record was appended.
        """
        if lsn <= self._durable_lsn and not self._refused:
            return
        if any(first <= lsn <= last for first, last in self._refused):
            raise DiskFull(self._folder)
        if lsn <= self._durable_lsn:
            return
        if self._failure is not None:
            raise self._failure
        if lsn > self._last_lsn:
            raise InvalidArgument("lsn", lsn, f"the last record is {self._last_lsn}")
        await self._waiters.add(lsn)

    async def commit(self, records: Sequence[tuple[int, bytes]]) -> int:
        """Append an atomic batch and wait until it is durable; `append` and `wait_durable` say what can go wrong.

        Returns:
            The LSN of its last record.
        """
        lsn = self.append(records)
        await self._waiters.add(lsn)
        return lsn

    def on_durable(self, callback: Callable[[int], None]) -> None:
        """Have `callback` told the durable LSN after each write, in the loop's thread. It must be quick and not raise."""
        self._callbacks.append(callback)

    def on_refused(self, callback: Callable[[int, IsopodError], None]) -> None:
        """Have `callback` told when queued batches were dropped: the first LSN of them and why (`DiskFull`; all that was appended from
        that LSN on is gone), or that the journal failed (`JournalFailed`)."""
        self._failure_callbacks.append(callback)

    # -- reading ---------------------------------------------------------------------------------------------------------------------

    async def read(self, first_lsn: int = 0, *, archived: bool = False) -> AsyncIterator[Record]:
        """Yield the records that are durable now, in order. None is removed meanwhile: who stops before the end closes the iterator.

        Args:
            first_lsn: Where to begin; records before `Journal.first_lsn` are left out.
            archived: Whether what was compacted is read too, as far as it is still there.

        Raises:
            JournalDamaged: A record cannot be read any more.
        """
        self._archive.n_readers += 1
        try:
            span = Span(max(first_lsn, self._oldest_lsn() if archived else self.first_lsn), self._durable_lsn)
            async with aclosing(read_records(self._world, self._archive, self._writer, span)) as records:
                async for record in records:
                    yield record
        finally:
            self._archive.n_readers -= 1
            self._upkeep.set()

    # -- snapshots and compaction ----------------------------------------------------------------------------------------------------

    async def snapshot(self, data: bytes, lsn: int) -> None:
        """Store the state that covers every record up to `lsn`, durably; older snapshots over the bound are removed.

        Args:
            data: JSON, which stands in the file as it is; anything else stands there in base64.
            lsn: The last record that the state has in it; it must be durable.

        Raises:
            InvalidArgument: The record is not there or not durable.
            TooLarge: It is over 1 GiB.
            JournalFailed, WrongState: The journal takes no more.
            UnavailableError: The disk is full, or failed; the older snapshots are there.
        """
        self._check_open()
        self._check_lsn(lsn)
        if len(data) > snapshots.SNAPSHOT_BYTES_MAX:
            raise TooLarge("a journal's snapshot", len(data), snapshots.SNAPSHOT_BYTES_MAX)
        async with self._changing:
            with explained("store a snapshot in", self._folder):
                n_bytes = await self._snapshots.store(self._manifest, Snapshot(lsn, self._world.clock.now_ns(), data))
        self._tally.n_snapshots += 1
        self._log.info("journal.snapshot", folder=self._folder, lsn=lsn, n_bytes=n_bytes)

    async def load_snapshot(self) -> tuple[int, bytes] | None:
        """Return the newest snapshot that is whole, with its LSN; the records after it are the rest of the state. None if none was made.

        Raises:
            JournalDamaged: The newest is damaged, and records that the one before would need were compacted; or all are.
            UnavailableError: The disk failed.
        """
        with explained("read the snapshots in", self._folder):
            return await self._snapshots.load_newest(self._manifest, self.first_lsn, self._durable_lsn, log=self._log)

    async def snapshot_lsns(self) -> list[int]:
        """Return the LSNs of the snapshots that are kept, the newest first; UnavailableError: the disk failed."""
        with explained("list the snapshots in", self._folder):
            return [file.lsn for file in await self._snapshots.list()]

    async def compact(self, lsn: int) -> None:
        """Note that the records up to `lsn` are not needed any more, durably, and let segments that hold no others go: the archive keeps
        them for as long as the settings say. An `lsn` that was compacted already changes nothing.

        Raises:
            InvalidArgument: The record is not there or not durable.
            JournalFailed, WrongState: The journal takes no more.
            UnavailableError: The disk is full, or failed; nothing was compacted.
        """
        self._check_open()
        self._check_lsn(lsn)
        async with self._changing:
            if lsn <= self._manifest.floor_lsn:
                return
            with explained("compact the journal in", self._folder):
                if self._before_compact.armed:
                    await self._before_compact.hit()
                await self._set_floor(lsn)
                if self._after_compact.armed:
                    await self._after_compact.hit()
        if self._is_worth_rotating(lsn):
            await self.rotate()
        self._upkeep.set()

    async def rotate(self) -> None:
        """Close the current segment and begin another, if it has records.

        Raises:
            DiskFull: There is no space for another; nothing has changed.
            JournalFailed, WrongState: The journal takes no more.
        """
        self._check_open()
        if self._rotation is None:
            self._rotation = asyncio.get_running_loop().create_future()
            self._rouse()
        await asyncio.shield(self._rotation)

    async def tidy(self) -> None:
        """Compress and remove now what the settings want compressed and removed, instead of some time soon.

        Raises:
            UnavailableError: The disk is full, or failed.
        """
        with explained("tidy up the archive of", self._folder):
            await self._keep_archive()

    async def close(self) -> None:
        """Write what is queued, note the orderly end, and let the folder go; twice is fine."""
        if self._is_closing:
            return
        self._is_closing = True
        self._rouse()
        writer, keeper = self._tasks
        keeper.cancel()
        try:
            await asyncio.gather(writer, keeper, return_exceptions=True)
            if self._preparer is not None:
                self._preparer.cancel()
                await asyncio.gather(self._preparer, return_exceptions=True)
            if self._failure is None:
                await self._writer.mark_closed(self._durable_lsn + 1)
                await self._writer.drop_next()
        except OSError as error:  # everything acknowledged is durable: only the mark is missing
            self._log.warning("journal.close_failed", folder=self._folder, why=str(error))
        finally:
            _release(self, self._lock)

    # -- starting --------------------------------------------------------------------------------------------------------------------

    async def _start(self, found: Found) -> None:
        disk = self._world.disk
        await self._archive.load()
        for name, next_lsn in found.closed:
            await self._archive.add(name.first_lsn, next_lsn, is_packed=name.is_packed)
        ending = found.ending
        for folder in (self._archive.folder, f"{self._folder}/{SNAPSHOTS}", self._folder):
            await disk.sync_directory(folder)  # a name that was found may be in memory alone
        if found.header is not None and not found.is_moved:
            await self._writer.resume(found.header, ending)
        if found.header is None or ending.how == "sealed":  # a rotation that was not finished
            if found.header is not None and not found.is_moved:
                await self._writer.archive_current()
                await self._archive.add(found.header.first_lsn, ending.lsn)
            await self._writer.begin(self._new_header())
        for left in (NEXT, NEXT + TEMPORARY):
            await disk.remove(f"{self._folder}/{left}")
        n_torn = ending.end - ending.offset if ending.how == "torn" else 0
        self._tally.torn_bytes_cut = n_torn
        if n_torn:
            self._log.warning("journal.torn_tail_cut", folder=self._folder, offset=ending.offset, n_bytes=n_torn, lsn=ending.lsn)
        self._log.info("journal.opened", folder=self._folder, first_lsn=self.first_lsn, last_lsn=self._last_lsn)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._write_all(), name=f"journal writer {self._folder}"),
            loop.create_task(self._keep(), name=f"journal keeper {self._folder}"),
        ]
        self._upkeep.set()

    def _new_header(self) -> SegmentHeader:
        return SegmentHeader(
            bytes.fromhex(self._manifest.id),
            self._manifest.name,
            self._durable_lsn + 1,
            self._manifest.floor_lsn,
            self._settings.segment_bytes,
            self._world.clock.now_ns(),
        )

    # -- the writer's task -----------------------------------------------------------------------------------------------------------

    async def _write_all(self) -> None:
        try:
            while True:
                if self._rotation is not None or self._is_aged():
                    await self._rotate_as_asked()
                elif self._queue:
                    await self._write_some()
                elif self._is_closing:
                    return
                else:
                    self._wake = asyncio.get_running_loop().create_future()
                    await self._wake
        except OSError as error:
            self._fail(_why(error))
        except Exception as error:  # noqa: BLE001 - the root of the task: those who wait must hear of it
            self._fail(f"internal error: {error!r}")

    async def _write_some(self) -> None:
        if len(self._queue[0].data) > self._writer.room_bytes and not await self._next_segment():
            return
        batches, header = self._take_group()
        started_ns = self._world.clock.monotonic_ns()
        n_bytes = await self._writer.write([batch.data for batch in batches], header)
        self._wrote(batches, header.n_records, n_bytes, started_ns)

    def _take_group(self) -> tuple[list[_Queued], GroupHeader]:
        """Take what one write takes along, with its header."""
        batches = self._take()
        first = batches[0].first_lsn
        flags = 0 if first == self._durable_lsn + 1 else SKIPS
        return batches, GroupHeader(0, sum(batch.last_lsn - batch.first_lsn + 1 for batch in batches), first, 0, flags)

    def _wrote(self, batches: list[_Queued], n_records: int, n_bytes: int, started_ns: int) -> None:
        """A group is durable: tell all."""
        self._durable_lsn = last = batches[-1].last_lsn
        tally = self._tally
        tally.n_batches += len(batches)
        tally.n_records += n_records
        tally.n_bytes += n_bytes
        tally.n_writes += 1
        if self._metrics is not None:
            self._metrics.journal_wrote(n_records, n_bytes, (self._world.clock.monotonic_ns() - started_ns) / 1e9)
        self._waiters.wake(last)
        for callback in self._callbacks:
            callback(last)
        if not (self._writer.has_next or self._is_closing) and self._writer.offset * 2 > self._writer.header.segment_bytes:
            self._prepare_next()

    def _take(self) -> list[_Queued]:
        """Take what one write takes along from the queue: as much as fits, without a gap in the LSNs."""
        queue = self._queue
        batch = queue.popleft()
        batches = [batch]
        n_bytes = len(batch.data)
        n_bytes_max = min(self._settings.group_bytes_max, self._writer.room_bytes)
        while queue and n_bytes + len(queue[0].data) <= n_bytes_max and queue[0].first_lsn == batch.last_lsn + 1:
            batch = queue.popleft()
            n_bytes += len(batch.data)
            batches.append(batch)
        self._queued_bytes -= n_bytes
        return batches

    async def _next_segment(self) -> bool:
        """Rotate; False if there is no space for another segment: then what is queued was refused."""
        try:
            if self._preparer is not None:
                await asyncio.gather(self._preparer, return_exceptions=True)
            await self._writer.prepare(self._settings.segment_bytes)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            self._is_full = True
            self._refuse(DiskFull(self._folder))
            return False
        self._is_full = False
        old = self._writer.header
        if not self._has_records():  # too small for the batch, made under other settings: replaced, since its successor has its name
            async with self._writer.rotating:
                await self._writer.begin(self._new_header())
            return True
        async with self._writer.rotating:
            await self._writer.rotate(self._durable_lsn + 1, self._new_header())
            await self._archive.add(old.first_lsn, self._durable_lsn + 1)
        self._tally.n_rotations += 1
        self._log.info("journal.rotated", folder=self._folder, first_lsn=old.first_lsn, next_lsn=self._durable_lsn + 1)
        if self._metrics is not None:
            self._metrics.journal_rotated()
        self._upkeep.set()
        return True

    async def _rotate_as_asked(self) -> None:
        is_done = not self._has_records() or await self._next_segment()
        rotation, self._rotation = self._rotation, None
        if rotation is not None and not rotation.done():
            if is_done:
                rotation.set_result(None)
            else:
                rotation.set_exception(DiskFull(self._folder))

    def _has_records(self) -> bool:
        """Whether the current segment holds a record: one that holds none is not closed, its successor would have its name."""
        return self._durable_lsn >= self._writer.header.first_lsn

    def _is_aged(self) -> bool:
        limit_s = self._settings.segment_age_s
        if not limit_s or not self._queue or not self._has_records() or self._is_full:
            return False
        return self._world.clock.now_ns() - self._writer.header.created_at_ns > limit_s * 1e9

    def _refuse(self, error: IsopodError) -> None:
        """Drop what is queued: nothing of it was written."""
        if not self._queue:
            return
        first = self._queue[0].first_lsn
        self._refused.append((first, self._last_lsn))
        self._queue.clear()
        self._queued_bytes = 0
        self._waiters.fail(error)
        self._log.warning("journal.refused", folder=self._folder, first_lsn=first, last_lsn=self._last_lsn, why=error.message)
        for callback in self._failure_callbacks:
            callback(first, error)

    def _fail(self, why: str) -> None:
        """A write failed: from now on nothing is taken, and the process is to end."""
        self._failure = JournalFailed(self._folder, why)
        self._queue.clear()
        self._queued_bytes = 0
        self._log.warning("journal.failed", folder=self._folder, durable_lsn=self._durable_lsn, why=why)
        self._waiters.fail(self._failure)
        if self._rotation is not None and not self._rotation.done():
            self._rotation.set_exception(self._failure)
        for callback in self._failure_callbacks:
            callback(self._durable_lsn + 1, self._failure)
        self._on_fatal(f"journal {self._folder}: {why}")

    def _rouse(self) -> None:
        if self._wake is not None:
            if not self._wake.done():
                self._wake.set_result(None)
            self._wake = None

    # -- the keeper's task -----------------------------------------------------------------------------------------------------------

    def _prepare_next(self) -> None:
        """Have the next segment's space allocated in the background."""
        if self._preparer is None or self._preparer.done():
            self._preparer = asyncio.get_running_loop().create_task(self._prepare(), name=f"journal allocation {self._folder}")

    async def _prepare(self) -> None:
        try:
            await self._writer.prepare(self._settings.segment_bytes)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                self._log.warning("journal.allocation_failed", folder=self._folder, why=str(error))
                return
            if not self._is_full:
                self._log.warning("journal.disk_full", folder=self._folder, room_bytes=self._writer.room_bytes)
            self._is_full = True
        else:
            self._is_full = False

    async def _keep(self) -> None:
        while True:
            await self._upkeep.wait()
            self._upkeep.clear()
            try:
                await self._keep_archive()
            except OSError as error:  # the archive is history: the next rotation tries again
                self._log.warning("journal.upkeep_failed", folder=self._folder, why=str(error))

    async def _keep_archive(self) -> None:
        async with self._changing:
            await self._archive.retain(self._manifest.floor_lsn)
        while (segment := self._archive.unpacked()) is not None:
            async with self._changing:
                if segment in self._archive.segments:
                    await self._archive.pack(segment)
        async with self._changing:
            await self._archive.retain(self._manifest.floor_lsn)

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    def _check_batch(self, records: Sequence[tuple[int, bytes]], n_bytes: int) -> None:
        if not records:
            raise InvalidArgument("journal batch", "[]", "want at least one record")
        longest = max(len(payload) for _, payload in records)
        if longest > self._settings.payload_bytes_max:
            raise TooLarge("a journal's record", longest, self._settings.payload_bytes_max)
        if n_bytes > self._settings.batch_bytes_max:
            raise TooLarge("a journal's batch", n_bytes, self._settings.batch_bytes_max)

    def _check_open(self) -> None:
        if self._failure is not None or self._is_closing:
            raise self._stopped()

    def _stopped(self) -> IsopodError:
        return self._failure or WrongState("journal", self._folder, "closed", "write to it")

    def _check_lsn(self, lsn: int) -> None:
        if not 0 <= lsn <= self._durable_lsn:
            raise InvalidArgument("lsn", lsn, f"the last durable record is {self._durable_lsn}")

    async def _set_floor(self, lsn: int) -> None:
        manifest = new_manifest(self._manifest.name, bytes.fromhex(self._manifest.id), lsn)
        await self._world.disk.write_atomic(f"{self._folder}/{MANIFEST}", pack_manifest(manifest))
        self._manifest = manifest
        self._log.info("journal.compacted", folder=self._folder, lsn=lsn)

    def _oldest_lsn(self) -> int:
        segments = self._archive.segments
        return segments[0].first_lsn if segments else self._writer.header.first_lsn

    def _is_worth_rotating(self, lsn: int) -> bool:
        """Whether most of the current segment, and much, was compacted: only a closed segment can go."""
        is_covered = lsn >= self._durable_lsn
        return is_covered and self._writer.offset * 2 > self._writer.header.segment_bytes


def _why(error: OSError) -> str:
    return f"a write or sync failed: {error.strerror or error}"


def _release(journal: Journal | None, lock: OpenFile) -> None:
    if journal is not None:
        journal._writer.close()
    lock.close()
