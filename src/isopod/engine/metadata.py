"""MetadataStore: the records of all sandboxes, in memory and in the journal.

    store = await MetadataStore.open(world, "/var/lib/isopod/metadata", logger=logger)
    await store.commit(Create(record), UpdateLabels(record.id, {"tier": "web"}))     # all or none; durable when it returns
    store.subscribe(LoggingHandler(logger))

The way of a change: `commit` queues it; the writer takes all that is queued, checks each change on what those before it leave
(`operations.Draft`), appends the accepted ones to the journal as one atomic batch, waits until they are durable, and only then changes
what readers see, tells the events and answers. So nobody ever sees what a crash could take back, a refused change has left no trace
anywhere, and a hundred concurrent changes cost one durable write.

Beside what is stored, the engine knows more of a sandbox that is just starting or stopping: `note` changes what readers see and not
what is stored. The next `commit` of a state stores it; a crash forgets it, and adoption finds out anew.

Recovery: the newest snapshot that is whole, then the journal's records after its number, each exactly once. Snapshots are taken in the
background after so many records or so much time.

Not here: what the journal's bytes look like (`isopod.journal`), what a change means (`operations`), old formats (`migrations`).
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self, cast

import msgspec

from isopod.api.messages import Container, Event
from isopod.engine import operations as ops
from isopod.engine.events import Handler, Hub, follow
from isopod.engine.migrations import FORMAT, KEPT, Json, decode, keep, read_files, set_aside, set_aside_in, upgrade
from isopod.journal import METADATA, Journal, JournalSettings, Record
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.disk import Disk
from isopod.world.errors import BadRecord, IsopodError, NotFound, RefusedError, UnavailableError, UsageError, from_os_error
from isopod.world.world import World

JOURNAL_FORMAT: Final = "isopod sandbox records"
RECORDS: Final = METADATA._replace(segment_bytes=4 << 20, record_bytes_max=2 << 20)
"""The journal's settings for records: two segments lie ready on every node's disk, and small disks exist."""
KIND: Final = 1
"""Of the journal's records: one `Entry` in JSON."""
FILES_FOLDER: Final = "containers"
"""Below the metadata folder: the records of format 1."""
RESTORED: Final = ".restored"
"""Ends the name of a folder that a restore has made and that is whole."""
IMPORT_CHUNK: Final = 256
GROUP_MAX: Final = 4096
"""Changes that go into one durable write."""
_YIELD_RECORDS: Final = 256
"""Records encoded for a snapshot before others get their turn."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One journal record: a change, when it was made, and what subscribers were told of it."""

    at_ns: int
    change: ops.Operation
    told: Event | None = None


class _Envelope(msgspec.Struct, frozen=True):
    """What is looked at before an entry is decoded: a number that never moves, whatever the format."""

    v: int
    entry: msgspec.Raw


class SnapshotHead(msgspec.Struct, frozen=True):
    """A snapshot as it is read."""

    format: int
    cursor: int
    taken_at_ns: int
    containers: list[Json]


class Loaded(NamedTuple):
    """What a newly opened store found."""

    records: Sequence[Container]
    """Ordered by id."""
    damaged: Sequence[str]
    """Ids of containers whose records of format 1 could not be read."""


@dataclass(slots=True)
class _Row:
    seen: Container
    stored: Container


@dataclass(slots=True)
class _Request:
    changes: Sequence[ops.Operation]
    done: "asyncio.Future[None]"


class _Planned(NamedTuple):
    change: ops.Operation
    entry: Entry


@dataclass(slots=True)
class _Table:
    """All rows and the index of their names."""

    rows: dict[str, _Row] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def get(self, identifier: str) -> Container | None:
        row = self.rows.get(identifier)
        return None if row is None else row.seen

    def id_of(self, name: str) -> str | None:
        return self.names.get(name)

    def change(self, change: ops.Operation, *, at_ns: int, revision: int) -> None:
        row = self.rows.get(change.id)
        if row is None:
            made = ops.apply(change, None, at_ns=at_ns, revision=revision)
            if made is not None:
                self.rows[made.id] = _Row(made, made)
                self.names[made.name] = made.id
            return
        stored = ops.apply(change, row.stored, at_ns=at_ns, revision=revision)
        seen = ops.apply(change, row.seen, at_ns=at_ns, revision=revision)
        if stored is None or seen is None:
            del self.rows[change.id]
            if self.names.get(row.seen.name) == change.id:
                del self.names[row.seen.name]
        else:
            row.stored, row.seen = stored, seen


class MetadataStore:
    """See the module's header. Made by `open`."""

    def __init__(self, world: World, folder: str, journal: Journal, *, settings: JournalSettings, logger: Logger) -> None:
        self._world = world
        self._folder = folder
        self._journal = journal
        self._settings = settings
        self._logger = logger
        self._table = _Table()
        self._hub = Hub(logger)
        self._damaged: Sequence[str] = ()
        self._applied = 0
        self._snapshot_at = 0
        self._queue: list[_Request] = []
        self._news = asyncio.Event()
        self._is_closed = False
        self._writer: asyncio.Task[None] | None = None
        self._snapshots: asyncio.Task[None] | None = None
        self._due: asyncio.TimerHandle | None = None
        self._encoder = msgspec.json.Encoder()

    @classmethod
    async def open(
        cls,
        world: World,
        folder: str,
        *,
        logger: Logger,
        metrics: Registry | None = None,
        settings: JournalSettings = RECORDS,
    ) -> Self:
        """Recover, take over records of format 1, and begin to write.

        Args:
            world: Where.
            folder: The metadata folder: journal, archive, snapshots.
            logger: Told of what was found, and of handlers that fail.
            metrics: Where durable writes are counted.
            settings: The journal's; how often and after how many records snapshots are taken stands there too.

        Raises:
            JournalDamaged, JournalForeign: As they say; nothing was changed.
            BadRecord: A record is of a newer isopod.
            UnavailableError: The disk failed.
        """
        await _finish_restore(world.disk, folder)
        counts = None if metrics is None else _Counts(metrics)
        journal = await Journal.open(world, folder, format=JOURNAL_FORMAT, settings=settings, log=logger, metrics=counts)
        store = cls(world, folder, journal, settings=settings, logger=logger)
        try:
            await store._recover()
            store._writer = asyncio.get_running_loop().create_task(store._write(), name="metadata writer")
            await store._take_over_files()
        except BaseException:
            await store.close()
            raise
        return store

    # --- asking -------------------------------------------------------------------------------------------------------

    @property
    def last_cursor(self) -> int:
        """The number of the last journal record that readers see."""
        return self._applied

    def get(self, identifier: str) -> Container | None:
        """Return a record by its whole id, None if there is none."""
        return self._table.get(identifier)

    def id_of(self, name: str) -> str | None:
        """Return the id of the record of exactly that name, None if there is none."""
        return self._table.id_of(name)

    def records(self) -> list[Container]:
        """Return all records, in the order they were made."""
        return [row.seen for row in self._table.rows.values()]

    def stored(self, identifier: str) -> Container | None:
        """Return a record as a crash would leave it, None if there is none."""
        row = self._table.rows.get(identifier)
        return None if row is None else row.stored

    def loaded(self) -> Loaded:
        """Return what adoption begins with."""
        return Loaded(sorted(self.records(), key=lambda record: record.id), self._damaged)

    # --- changing -----------------------------------------------------------------------------------------------------

    async def commit(self, *changes: ops.Operation) -> None:
        """Make changes, all of them or none; when this returns they are durable and everybody sees them.

        A caller that is cancelled cannot know whether they were made.

        Raises:
            NotFound, AlreadyExists, WrongState, InUse, InvalidArgument: One is refused (`operations.check`); nothing changed.
            TooLarge: They are more than fits into one segment of the journal; nothing changed.
            DiskFull: There is no room for it; nothing changed.
            JournalFailed: The disk failed for good; the process is about to end.
            UnavailableError: The store is closed.
        """
        if self._is_closed:
            raise _closed(self._folder)
        if not changes:
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(_Request(changes, done))
        self._news.set()
        await done

    async def put_state(self, record: Container) -> None:
        """Store what is known of a sandbox's state (`operations.State`); nothing is written if that is stored already."""
        row = self._table.rows.get(record.id)
        if row is None:
            raise NotFound("container", record.id[:12], "it was removed meanwhile")
        state, stored, seen = ops.state_of(record), ops.state_of(row.stored), ops.state_of(row.seen)
        if state == stored:
            self.note(record)
        elif msgspec.structs.replace(state, status=stored.status) == stored == msgspec.structs.replace(seen, status=stored.status):
            await self.commit(ops.UpdateStatus(record.id, record.status))
        else:
            await self.commit(ops.UpdateState(record.id, state))

    def note(self, record: Container) -> None:
        """Show a state (`operations.State`) that a crash may forget; nothing else of the record is looked at."""
        row = self._table.rows.get(record.id)
        if row is None:
            raise NotFound("container", record.id[:12], "it was removed meanwhile")
        change = ops.UpdateState(record.id, ops.state_of(record))
        ops.check(change, self._table)
        noted = ops.apply(change, row.seen, at_ns=self._world.clock.now_ns(), revision=row.seen.revision)
        if noted is not None:
            row.seen = noted

    # --- events -------------------------------------------------------------------------------------------------------

    @property
    def n_streams(self) -> int:
        """How many streams of events are open."""
        return self._hub.n_streams

    def subscribe(self, handler: Handler) -> Callable[[], None]:
        """Have a handler told of every durable change from now on; return what ends that."""
        return self._hub.subscribe(handler)

    def follow(self, cursor: int) -> AsyncGenerator[Event, None]:
        """Yield every event after a journal record, past ones and those to come, until the store closes. See `events.follow`."""
        return follow(self._hub, self, cursor)

    async def events_after(self, cursor: int) -> AsyncGenerator[Event, None]:
        """Yield past events after a journal record.

        Raises:
            NotFound: The journal does not go back so far.
        """
        oldest = await self.oldest_cursor()
        if cursor < oldest:
            raise NotFound("event", f"after record {cursor}", f"the journal goes back to record {oldest}: begin with a time (--since)")
        async with aclosing(self._read(cursor + 1)) as records:
            async for lsn, _kind, payload in records:
                if lsn > self._applied:
                    return
                told = self._decode(payload, lsn).told
                if told is not None:
                    yield msgspec.structs.replace(told, cursor=lsn)

    async def oldest_cursor(self) -> int:
        """Return the journal record after which events can still be had: the archive's retention decides."""
        async with aclosing(self._read(0)) as records:
            async for lsn, _kind, _payload in records:
                return lsn - 1
        return self._applied

    def _read(self, first_lsn: int) -> AsyncGenerator[Record, None]:
        return cast(AsyncGenerator[Record, None], self._journal.read(first_lsn, archived=True))

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def snapshot(self) -> int:
        """Store all records in one file, and let the journal archive what the snapshot before it covers: two can be recovered from.

        Returns:
            The number of the last journal record in it.

        Raises:
            UnavailableError: The disk refused; everything is as before.
        """
        cursor, data = await self.encode()
        if cursor > self._snapshot_at:
            await self._journal.snapshot(data, cursor)
            before, self._snapshot_at = self._snapshot_at, cursor
            if before:
                await self._journal.compact(before)
        return cursor

    async def encode(self) -> tuple[int, bytes]:
        """Return all stored records at one moment as readable JSON, and the number of the last journal record in them."""
        cursor, now_ns = self._applied, self._world.clock.now_ns()
        rows = [row.stored for row in self._table.rows.values()]
        pieces: list[bytes] = []
        for n_done, record in enumerate(rows, 1):
            pieces.append(msgspec.json.format(self._encoder.encode(record), indent=2).replace(b"\n", b"\n    "))
            if n_done % _YIELD_RECORDS == 0:
                await asyncio.sleep(0)
        containers = b",\n    ".join(pieces)
        head = b'{\n  "format": %d,\n  "cursor": %d,\n  "taken_at_ns": %d,\n' % (FORMAT, cursor, now_ns)
        return cursor, head + (b'  "containers": [\n    %s\n  ]\n}' % containers if pieces else b'  "containers": []\n}')

    async def close(self) -> None:
        """Make what is queued durable, take a last snapshot if there is something new, and let go."""
        if self._is_closed:
            return
        self._is_closed = True
        self._news.set()
        if self._due is not None:
            self._due.cancel()
        for task in (self._writer, self._snapshots):
            if task is not None:
                await asyncio.gather(task, return_exceptions=True)
        self._hub.close()
        if self._writer is not None and self._applied > self._snapshot_at:
            try:
                await self.snapshot()
            except IsopodError as error:  # the journal has it all
                self._logger.warning("metadata.snapshot_failed", why=str(error))
        await self._journal.close()

    # --- the writer ---------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while self._queue or not self._is_closed:
            if not self._queue:
                self._news.clear()
                await self._news.wait()
                continue
            group, self._queue = self._queue[:GROUP_MAX], self._queue[GROUP_MAX:]
            await self._write_or_refuse(group)

    async def _write_or_refuse(self, group: Sequence[_Request]) -> None:
        try:
            await self._write_group(group)
        except Exception as error:  # noqa: BLE001  whatever it was, nobody may wait for ever
            for request in group:
                _refuse(request, error)
            if not isinstance(error, IsopodError):
                self._logger.error("metadata.writer_failed", why=repr(error))

    async def _write_group(self, group: Sequence[_Request]) -> None:
        accepted, planned = self._plan(group)
        if not planned:
            return
        packed = [(KIND, self._pack(entry)) for _, entry in planned]
        if len(group) > 1 and not self._fits([len(payload) for _, payload in packed]):
            middle = len(group) // 2  # what is too large is refused alone, and not those who came at the same time
            await self._write_or_refuse(group[:middle])
            await self._write_or_refuse(group[middle:])
            return
        last = await self._journal.commit(packed)
        first = last - len(planned) + 1
        events: list[Event] = []
        for lsn, (change, entry) in enumerate(planned, first):
            self._table.change(change, at_ns=entry.at_ns, revision=lsn)
            if entry.told is not None:
                events.append(msgspec.structs.replace(entry.told, cursor=lsn))
        self._applied = last
        for request in accepted:
            if not request.done.done():
                request.done.set_result(None)
        for event in events:
            self._hub.tell(event)
        self._schedule_snapshot()

    def _plan(self, group: Sequence[_Request]) -> tuple[list[_Request], list[_Planned]]:
        """Check every request on what those before it leave; refuse those that cannot be."""
        at_ns = self._world.clock.now_ns()
        draft = ops.Draft(self._table)
        told = ops.Draft(_Stored(self._table))
        accepted: list[_Request] = []
        planned: list[_Planned] = []
        for request in group:
            if request.done.done():
                continue  # its caller went away before anything was done
            try:
                draft.add(request.changes, at_ns=at_ns)
            except IsopodError as error:
                _refuse(request, error)
                continue
            accepted.append(request)
            for change in request.changes:
                before = told.get(change.id)
                planned.append(_Planned(change, Entry(at_ns, change, ops.event(change, before, at_ns=at_ns))))
                told.put(change.id, ops.apply(change, before, at_ns=at_ns, revision=0))
        return accepted, planned

    def _fits(self, sizes: Sequence[int]) -> bool:
        """Whether records of these sizes surely go into one batch of the journal, which has to fit into one segment."""
        return sum(sizes) <= self._settings.batch_bytes_max // 2 and max(sizes) <= self._settings.payload_bytes_max

    def _pack(self, entry: Entry) -> bytes:
        return b'{"v":%d,"entry":%s}' % (FORMAT, self._encoder.encode(entry))

    def _schedule_snapshot(self) -> None:
        """Have a snapshot taken soon if there is enough for one, later if there is anything."""
        if self._is_closed or (self._snapshots is not None and not self._snapshots.done()):
            return
        loop = asyncio.get_running_loop()
        if self._applied - self._snapshot_at >= self._settings.snapshot_records:
            self._begin_snapshot()
        elif self._due is None:
            self._due = loop.call_later(self._settings.snapshot_interval_s, self._begin_snapshot)

    def _begin_snapshot(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if not self._is_closed and (self._snapshots is None or self._snapshots.done()):
            self._snapshots = asyncio.get_running_loop().create_task(self._take_snapshot(), name="metadata snapshot")

    async def _take_snapshot(self) -> None:
        try:
            cursor = await self.snapshot()
            self._logger.debug("metadata.snapshot", cursor=cursor)
        except IsopodError as error:
            self._logger.warning("metadata.snapshot_failed", why=str(error))

    # --- opening ------------------------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        snapshot = await self._journal.load_snapshot()
        if snapshot is not None:
            lsn, data = snapshot
            for record in read_snapshot(data, f"snapshot {lsn}"):
                self._table.rows[record.id] = _Row(record, record)
                self._table.names[record.name] = record.id
            self._applied = self._snapshot_at = lsn
        async with aclosing(self._read(self._applied + 1)) as records:
            async for lsn, kind, payload in records:
                if kind != KIND:
                    raise BadRecord(f"{self._folder}, record {lsn}", f"of an unknown kind {kind}", "was it written by a newer isopod?")
                entry = self._decode(payload, lsn)
                self._table.change(entry.change, at_ns=entry.at_ns, revision=lsn)
                self._applied = lsn
        self._logger.info("metadata.recovered", containers=len(self._table.rows), snapshot=self._snapshot_at, cursor=self._applied)

    def _decode(self, payload: bytes, lsn: int) -> Entry:
        where = f"{self._folder}, record {lsn}"
        try:
            envelope = msgspec.json.decode(payload, type=_Envelope)
            if envelope.v == FORMAT:
                return msgspec.json.decode(envelope.entry, type=Entry)
            plain = msgspec.json.decode(envelope.entry)
            if plain["change"]["op"] == "create":
                plain["change"]["record"] = upgrade(plain["change"]["record"], envelope.v, where)
            else:
                upgrade({}, envelope.v, where)
            return msgspec.convert(plain, Entry)
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise BadRecord(where, str(error), f"see: isopod journal dump {self._folder}") from error

    async def _take_over_files(self) -> None:
        """Take over records of format 1, once. Their folder is renamed when all of them are durable; a crash before begins anew."""
        disk, folder = self._world.disk, f"{self._folder}/{FILES_FOLDER}"
        try:
            if await disk.stat(folder) is not None:
                found = await read_files(disk, folder, self._logger)
                refused = await self._import([record for record in found.records if self.get(record.id) is None])
                for identifier in refused:
                    await set_aside(disk, folder, identifier)
                await keep(disk, folder)
                self._logger.info("metadata.taken_over", containers=len(found.records), damaged=len(found.damaged) + len(refused))
            self._damaged = [found for found in await set_aside_in(disk, f"{folder}{KEPT}") if self.get(found) is None]
        except OSError as error:
            raise from_os_error(error, "take over the records in", folder) from error

    async def _import(self, records: Sequence[Container]) -> Sequence[str]:
        """Store records; return the ids of those that are refused: no record keeps the others from loading."""
        refused: list[str] = []
        for start in range(0, len(records), IMPORT_CHUNK):
            chunk = records[start : start + IMPORT_CHUNK]
            try:
                await self.commit(*(ops.Create(record) for record in chunk))
            except (RefusedError, UsageError):
                refused += await self._import_each(chunk)
        return refused

    async def _import_each(self, records: Sequence[Container]) -> Sequence[str]:
        refused: list[str] = []
        for record in records:
            try:
                await self.commit(ops.Create(record))
            except (RefusedError, UsageError) as error:
                self._logger.error("record.damaged", id=record.id, why=str(error))
                refused.append(record.id)
        return refused


class _Counts:
    """What the journal of records does, as metrics."""

    def __init__(self, metrics: Registry) -> None:
        self._changes = metrics.counter("isopod_metadata_changes_total", "Changes of records that were made durable.")
        self._seconds = metrics.histogram("isopod_metadata_write_seconds", "Time of one durable write of records.")
        self._rotations = metrics.counter("isopod_metadata_rotations_total", "Segments of the records' journal that were closed.")

    def journal_wrote(self, n_records: int, n_bytes: int, duration_s: float) -> None:
        self._changes.inc(n_records)
        self._seconds.observe(duration_s)

    def journal_rotated(self) -> None:
        self._rotations.inc()


class _Stored:
    """What is stored, as `operations.Known`."""

    def __init__(self, table: _Table) -> None:
        self._table = table

    def get(self, identifier: str) -> Container | None:
        row = self._table.rows.get(identifier)
        return None if row is None else row.stored

    def id_of(self, name: str) -> str | None:
        return self._table.id_of(name)


def read_snapshot(data: bytes, where: str) -> list[Container]:
    """Return the records of a snapshot or a backup.

    Raises:
        BadRecord: It cannot be read, or is of a newer isopod.
    """
    try:
        head = msgspec.json.decode(data, type=SnapshotHead)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRecord(where, str(error)) from error
    return [decode(record, head.format, where) for record in head.containers]


async def _finish_restore(disk: Disk, folder: str) -> None:
    """Put a restored folder into its place if a crash came between the two renamings of a restore."""
    try:
        if await disk.stat(folder) is None and await disk.stat(f"{folder}{RESTORED}") is not None:
            await disk.rename(f"{folder}{RESTORED}", folder)
            await disk.sync_directory(folder.rpartition("/")[0] or "/")
    except OSError as error:
        raise from_os_error(error, "finish the restoring of", folder) from error


def _refuse(request: _Request, error: Exception) -> None:
    if not request.done.done():
        request.done.set_exception(error)


def _closed(folder: str) -> IsopodError:
    return UnavailableError(f"the records in {folder} are closed", "the node is going down; try again when it is up")
