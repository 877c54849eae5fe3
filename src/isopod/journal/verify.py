"""Looking at a journal without changing it: every batch that can be read, everything that is wrong, and a report of both.

Unlike recovery this does not stop at the first damage: it goes on behind it, where the next sound group or segment begins. What a crash
may leave (a torn last write, half a rotation) is no error; it is counted apart.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Final, NamedTuple

from isopod.journal import layout
from isopod.journal.archive import list_closed
from isopod.journal.folder import ARCHIVE, CURRENT, MANIFEST, NEXT, Manifest, SegmentName, check_folder, claim, claim_to_read, explained
from isopod.journal.layout import SegmentHeader
from isopod.journal.recovery import read_header, read_manifest
from isopod.journal.scan import Batch, Ending, Walk
from isopod.journal.settings import JournalSettings
from isopod.journal.snapshots import BadSnapshot, Snapshots
from isopod.journal.source import open_source
from isopod.world.disk import OpenFile
from isopod.world.errors import JournalDamaged, JournalForeign
from isopod.world.world import World

PROBLEMS_MAX: Final = 1000
"""More are counted and not listed."""


class Problem(NamedTuple):
    """One thing that is wrong."""

    path: str
    """The file, relative to the journal's folder."""
    offset: int
    lsn: int
    """The record concerned, or the one expected there; 0 for none."""
    record_index: int
    """The ordinal of that record among all that the journal's files should hold, from 0; -1 for none."""
    why: str


class SnapshotCheck(NamedTuple):
    """One snapshot."""

    name: str
    lsn: int
    why: str
    """"" if it is sound."""


class SegmentCheck(NamedTuple):
    """One segment."""

    path: str
    first_lsn: int
    next_lsn: int
    how: str
    """How it ends: "sealed", "open", "torn" or "damaged"."""


class IntegrityReport(NamedTuple):
    """What `verify` found."""

    folder: str
    name: str
    journal_id: str
    floor_lsn: int
    first_lsn: int
    """The first record that is there, compacted or not; 0 for none."""
    last_lsn: int
    n_records: int
    """Sound ones."""
    n_batches: int
    n_lost: int
    """Records that should be there and cannot be read."""
    torn_bytes: int
    """What a crash left of the last write; nothing in it was acknowledged."""
    was_closed: bool
    """Whether the journal was closed in order."""
    segments: list[SegmentCheck]
    snapshots: list[SnapshotCheck]
    problems: list[Problem]

    @property
    def is_valid(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def error_count(self) -> int:
        """How much is wrong."""
        return len(self.problems)

    @property
    def success_rate(self) -> float:
        """Sound records over those that should be there; 1.0 for an empty journal."""
        total = self.n_records + self.n_lost
        return self.n_records / total if total else 1.0


class Piece(NamedTuple):
    """Something found on the way through a journal: a sound batch, or what is wrong."""

    path: str
    batch: Batch | None = None
    problem: Problem | None = None


class Survey:
    """One pass through all files of a journal. The caller holds its lock.

    Args:
        world: Whose disk.
        folder: The journal's.
    """

    def __init__(self, world: World, folder: str) -> None:
        self._world = world
        self._folder = folder
        self.manifest: Manifest | None = None
        self.headers: list[SegmentHeader] = []
        self.segments: list[SegmentCheck] = []
        self.last_ending: Ending | None = None
        """How the current segment ends, None if there is none."""
        self.told_lsn = 0
        """The last record that anything tells of, readable or not."""
        self._lsn = 0
        self._first_lsn = 0
        self._seen: dict[int, None] = {}

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield what is there, in order. OSError: the disk failed."""
        try:
            self.manifest = await read_manifest(self._world, self._folder)
            if self.manifest is None:
                yield self._problem(MANIFEST, 0, 0, "the manifest is missing")
        except (JournalDamaged, JournalForeign) as error:
            yield self._problem(MANIFEST, 0, 0, error.message)
        names, _ = await list_closed(self._world, f"{self._folder}/{ARCHIVE}")
        for name in names:
            async with aclosing(self._segment(f"{ARCHIVE}/{name.name}", name)) as pieces:
                async for piece in pieces:
                    yield piece
        if await self._world.disk.stat(f"{self._folder}/{CURRENT}") is not None:
            async with aclosing(self._segment(CURRENT, None)) as pieces:
                async for piece in pieces:
                    yield piece
        elif not names or await self._world.disk.stat(f"{self._folder}/{NEXT}") is None:
            yield self._problem(CURRENT, 0, self._lsn, "the segment that was written to last is missing")
        if self.manifest is not None and self._lsn and self._lsn <= self.manifest.floor_lsn:
            yield self._problem(CURRENT, 0, self._lsn, f"the records up to lsn {self.manifest.floor_lsn} are missing")

    async def _segment(self, path: str, name: SegmentName | None) -> AsyncGenerator[Piece, None]:
        source = await open_source(self._world, f"{self._folder}/{path}", is_packed=name is not None and name.is_packed)
        try:
            header = await read_header(source)
            if name is None and header.first_lsn in self._seen:
                return  # a rotation that was interrupted: it is in the archive too
            for problem in self._checked(path, name, header):
                yield problem
            walk = Walk(source, header, layout.seed_of(header.journal_id), is_last=name is None)
            async with aclosing(self._walk(path, walk, is_last=name is None)) as pieces:
                async for piece in pieces:
                    yield piece
        except (JournalDamaged, JournalForeign) as error:
            # Whatever it held cannot be read, and nothing tells how much that was: its first record at least.
            floor = self.manifest.floor_lsn if self.manifest is not None else 0
            lsn = self._lsn or (name.first_lsn if name else floor + 1)
            yield self._problem(path, error.offset if isinstance(error, JournalDamaged) else 0, lsn, error.message)
            self.segments.append(SegmentCheck(path, name.first_lsn if name else self._lsn, self._lsn, "damaged"))
        finally:
            source.close()

    def _checked(self, path: str, name: SegmentName | None, header: SegmentHeader) -> Iterator[Piece]:
        """Check a header against what is known of the journal."""
        self.headers.append(header)
        self._seen[header.first_lsn] = None
        known = self.manifest
        if known is not None and (header.journal_id.hex() != known.id or header.name != known.name):
            yield self._problem(path, 0, header.first_lsn, "the segment belongs to another journal")
        if name is not None and name.first_lsn != header.first_lsn:
            yield self._problem(path, 0, header.first_lsn, f"begins with lsn {header.first_lsn}, its name says {name.first_lsn}")
        expected = self._lsn or (known.floor_lsn + 1 if known is not None else header.first_lsn)
        if header.first_lsn > expected or (self._lsn and header.first_lsn < expected):
            yield self._problem(path, 0, expected, f"begins with lsn {header.first_lsn}, the records from lsn {expected} are missing")
        self._first_lsn = self._first_lsn or header.first_lsn
        self._lsn = header.first_lsn

    async def _walk(self, path: str, walk: Walk, *, is_last: bool) -> AsyncGenerator[Piece, None]:
        first_lsn = self._lsn
        while True:
            async with aclosing(walk.batches()) as batches:
                async for batch in batches:
                    self.told_lsn = max(self.told_lsn, batch.records[-1].lsn)
                    yield Piece(path, batch=batch)
            ending = walk.ending
            self._lsn = ending.lsn
            is_fine = ending.how in ("sealed", "torn", "open") if is_last else ending.how == "sealed"
            if is_fine:
                break
            self.told_lsn = max(self.told_lsn, ending.told_lsn)
            yield self._problem(path, ending.bad_offset, ending.bad_lsn, ending.why or "the segment is not closed")
            found = await walk.find_group(max(ending.bad_offset, ending.offset + 1))
            if found is None:
                break
            walk.start = found
        self.segments.append(SegmentCheck(path, first_lsn, self._lsn, walk.ending.how))
        if is_last:
            self.last_ending = walk.ending

    def _problem(self, path: str, offset: int, lsn: int, why: str) -> Piece:
        self.told_lsn = max(self.told_lsn, lsn)
        index = lsn - self._first_lsn if lsn and self._first_lsn else -1
        return Piece(path, problem=Problem(path, offset, lsn, index, why))


async def verify(world: World, folder: str) -> IntegrityReport:
    """Check every byte of the journal in a folder, history and snapshots included, and change nothing.

    Args:
        world: Whose disk.
        folder: The folder of a journal that nobody has open.

    Raises:
        InUse: It is open.
        JournalForeign: There is no journal in it.
        InvalidArgument: There is no such folder, or it cannot be used.
        UnavailableError: The disk failed.
    """
    async with reading(world, folder):
        with explained("read the journal in", folder):
            return await _report(world, folder)


@asynccontextmanager
async def reading(world: World, folder: str) -> AsyncGenerator[None, None]:
    """Keep who writes out of a folder that holds a journal, changing nothing in it. It raises as `verify`."""
    await _check_existing(world, folder)
    lock = await claim_to_read(world, folder)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


async def claim_existing(world: World, folder: str) -> OpenFile:
    """Take the lock of a folder that holds a journal, to change it; nothing is written to one that holds none. It raises as `verify`."""
    await _check_existing(world, folder)
    return await claim(world, folder, create=False)


async def _check_existing(world: World, folder: str) -> None:
    with explained("read the journal in", folder):
        await check_folder(world, folder, create=False)
        names, _ = await list_closed(world, f"{folder}/{ARCHIVE}")
        if not names and not [name for name in (MANIFEST, CURRENT) if await world.disk.stat(f"{folder}/{name}") is not None]:
            raise JournalForeign(folder, "there is no journal in it", "give the folder that holds current.wal and journal.json")


async def _report(world: World, folder: str) -> IntegrityReport:
    survey = Survey(world, folder)
    problems: list[Problem] = []
    n_records = n_batches = first = last = 0
    async for piece in survey.pieces():
        if piece.problem is not None:
            problems.append(piece.problem)
        if piece.batch is not None:
            records = piece.batch.records
            n_records += len(records)
            n_batches += 1
            first, last = first or records[0].lsn, records[-1].lsn
    begin = survey.headers[0].first_lsn if survey.headers else first
    n_lost = max(0, survey.told_lsn - begin + 1 - n_records) if problems else 0
    checks = await _check_snapshots(world, folder, survey.manifest)
    problems += [Problem(f"snapshots/{check.name}", 0, check.lsn, -1, check.why) for check in checks if check.why]
    manifest, ending = survey.manifest, survey.last_ending
    return IntegrityReport(
        folder=folder,
        name=manifest.name if manifest else survey.headers[0].name if survey.headers else "",
        journal_id=manifest.id if manifest else "",
        floor_lsn=manifest.floor_lsn if manifest else 0,
        first_lsn=first,
        last_lsn=last,
        n_records=n_records,
        n_batches=n_batches,
        n_lost=n_lost,
        torn_bytes=ending.end - ending.offset if ending is not None and ending.how == "torn" else 0,
        was_closed=ending is not None and ending.was_closed,
        segments=survey.segments,
        snapshots=checks,
        problems=problems[:PROBLEMS_MAX],
    )


async def _check_snapshots(world: World, folder: str, manifest: Manifest | None) -> list[SnapshotCheck]:
    snapshots = Snapshots(world, folder, JournalSettings())
    checks: list[SnapshotCheck] = []
    for file in await snapshots.list():
        why = ""
        if manifest is not None:
            try:
                await snapshots.load(manifest, file)
            except BadSnapshot as error:
                why = str(error)
        checks.append(SnapshotCheck(file.name, file.lsn, why))
    return checks
