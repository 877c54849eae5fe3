"""Repairing a journal that does not open: what can be saved, what would be lost, and doing it.

`plan` only looks. `repair` does what a plan says: the old files are kept in `damaged-N/`, and what is kept
of them is written anew. There are three ways, and the one that loses least is taken:

- *nothing to do*: what is wrong is a torn last write or half a rotation; opening the journal mends it.
- *from a snapshot*: a whole snapshot covers the damage, and the records after it can be read: they are kept, and what is before becomes
  history. Nothing that a recovery needs is lost.
- *cut*: everything before the first damage is kept, everything behind it goes. Acknowledged records are lost.

A journal that was cut has forgotten what others were promised: a Raft member whose log was cut must not take part under its old id.
"""

from typing import Final, NamedTuple

from isopod.journal import layout
from isopod.journal.folder import ARCHIVE, CURRENT, MANIFEST, NEXT, SNAPSHOTS, Manifest, explained, new_manifest, pack_manifest
from isopod.journal.layout import GROUP_HEADER_BYTES, SEGMENT_HEADER_BYTES, SKIPS, GroupHeader, Record, SegmentHeader
from isopod.journal.settings import JournalSettings
from isopod.journal.snapshots import BadSnapshot, Snapshots
from isopod.journal.verify import Problem, SegmentCheck, Survey, claim_existing, reading
from isopod.journal.writer import RESERVED_BYTES
from isopod.world.disk import DataFile, OpenFlags
from isopod.world.errors import JournalDamaged
from isopod.world.world import World

ASIDE: Final = "damaged-"


class RepairPlan(NamedTuple):
    """What a repair would do."""

    folder: str
    way: str
    """"nothing", "snapshot" or "cut"."""
    problems: list[Problem]
    base_lsn: int
    """Records up to it are not read by a recovery any more: what was compacted, or what a snapshot covers."""
    last_lsn: int
    """The last record that would be kept; `base_lsn` if none is."""
    rewrite_lsn: int
    """Records from here on are written anew; what is before stays in its files."""
    lost_lsns: tuple[int, int] | None
    """The first and the last record known to be lost, None if none is. There may have been later ones that nothing tells of."""
    moved: list[str]
    """Files that are set aside."""

    @property
    def n_lost(self) -> int:
        """How many records are known to be lost."""
        return self.lost_lsns[1] - self.lost_lsns[0] + 1 if self.lost_lsns else 0


class _Facts(NamedTuple):
    """What a survey found."""

    problems: list[Problem]
    runs: list[tuple[int, int]]
    """Stretches of readable records that nothing wrong lies between: first and last LSN."""
    manifest: Manifest
    segment_bytes: int
    segments: list[SegmentCheck]
    snapshots: list[int]
    """The LSNs of the whole ones, newest first."""
    bad_snapshots: list[str]
    last_lsn: int
    """The last record that anything tells of."""


async def plan(world: World, folder: str) -> RepairPlan:
    """Say what a repair would do, and change nothing.

    Args:
        world: Whose disk.
        folder: The folder of a journal that nobody has open.

    Raises:
        InUse: It is open.
        JournalForeign: There is no journal in it.
        JournalDamaged: Neither the manifest nor any segment says what it was: there is nothing to keep.
        UnavailableError: The disk failed.
    """
    async with reading(world, folder):
        with explained("read the journal in", folder):
            return _plan(folder, await _survey(world, folder))


async def repair(world: World, folder: str) -> RepairPlan:
    """Do what `plan` says, and return it; it raises the same, and DiskFull. A crash in the middle loses nothing more: repair again."""
    lock = await claim_existing(world, folder)
    try:
        with explained("repair the journal in", folder):
            facts = await _survey(world, folder)
            made = _plan(folder, facts)
            if made.way != "nothing":
                await _set_aside(world, made)
                await _write_anew(world, made, facts)
                await _remove_moved(world, made)
            return made
    finally:
        lock.close()


async def _survey(world: World, folder: str) -> _Facts:
    survey = Survey(world, folder)
    problems: list[Problem] = []
    runs: list[tuple[int, int]] = []
    is_broken = True
    async for piece in survey.pieces():
        if piece.problem is not None:
            problems.append(piece.problem)
            is_broken = True
        if piece.batch is not None:
            begin, end = piece.batch.records[0].lsn, piece.batch.records[-1].lsn
            runs = [*runs, (begin, end)] if is_broken or begin <= runs[-1][1] else [*runs[:-1], (runs[-1][0], end)]
            is_broken = False
    manifest = survey.manifest or _rebuilt_manifest(folder, survey.headers)
    whole, bad = await _sort_snapshots(world, folder, manifest)
    problems += [Problem(f"{SNAPSHOTS}/{name}", 0, 0, -1, "the snapshot is damaged") for name in bad]
    segment_bytes = max([header.segment_bytes for header in survey.headers], default=JournalSettings().segment_bytes)
    return _Facts(problems, runs, manifest, segment_bytes, survey.segments, whole, bad, survey.told_lsn)


def _plan(folder: str, facts: _Facts) -> RepairPlan:
    floor = facts.manifest.floor_lsn
    if not facts.problems:
        return RepairPlan(folder, "nothing", [], floor, facts.last_lsn, facts.last_lsn + 1, None, [])
    bases = [(_reach(facts, floor), floor, "cut")]
    if not facts.snapshots or floor <= facts.snapshots[0]:  # else the newest whole snapshot is older than what was compacted
        bases += [(_reach(facts, lsn), lsn, "snapshot") for lsn in facts.snapshots]
    elif facts.bad_snapshots:
        bases = [(_reach(facts, lsn), lsn, "snapshot") for lsn in facts.snapshots]
    reach, base, way = max(bases, key=lambda each: each[0])
    is_all = reach >= facts.last_lsn
    kept = _kept_segments(facts, base, reach)
    names = [segment.path for segment in facts.segments]
    moved = [*(name for name in names if name not in kept), *(f"{SNAPSHOTS}/{name}" for name in facts.bad_snapshots)]
    rewrite = max([segment.next_lsn for segment in facts.segments if segment.path in kept], default=base + 1)
    lost = None if is_all else (reach + 1, facts.last_lsn)
    return RepairPlan(folder, way, facts.problems, base, reach, rewrite, lost, moved)


def _reach(facts: _Facts, base: int) -> int:
    """Return the last record that can be read without a gap behind `base`."""
    return max((end for begin, end in facts.runs if begin <= base + 1 <= end + 1), default=base)


def _kept_segments(facts: _Facts, base: int, reach: int) -> dict[str, None]:
    """Return the closed segments that stay as they are: sound, without a gap, up to the first that is not, and wholly within reach."""
    wrong = {problem.path: None for problem in facts.problems}
    kept: dict[str, None] = {}
    next_lsn = 0
    for segment in facts.segments:
        is_sound = segment.how == "sealed" and segment.path not in wrong and segment.path != CURRENT and segment.next_lsn <= reach + 1
        if not is_sound or (next_lsn and segment.first_lsn != next_lsn):
            if segment.next_lsn > base + 1:
                break
            kept.clear()  # history with a hole is not kept
            next_lsn = 0
            continue
        if not kept and segment.first_lsn > base + 1:
            break
        kept[segment.path] = None
        next_lsn = segment.next_lsn
    return kept if next_lsn > base or not kept else {}


def _rebuilt_manifest(folder: str, headers: list[SegmentHeader]) -> Manifest:
    """Return what the lost manifest must have said, at least: it may have known of later compactions."""
    if not headers:
        raise JournalDamaged(f"{folder}/{MANIFEST}", 0, "neither the manifest nor any segment can be read", hint="restore a backup")
    newest = headers[-1]
    return new_manifest(newest.name, newest.journal_id, max(newest.floor_lsn, headers[0].first_lsn - 1))


async def _sort_snapshots(world: World, folder: str, manifest: Manifest) -> tuple[list[int], list[str]]:
    snapshots = Snapshots(world, folder, JournalSettings())
    whole: list[int] = []
    bad: list[str] = []
    for file in await snapshots.list():
        try:
            whole.append((await snapshots.load(manifest, file)).lsn)
        except BadSnapshot:
            bad.append(file.name)
    return whole, bad


async def _set_aside(world: World, made: RepairPlan) -> None:
    """Copy what will be changed or removed into a new folder, durably."""
    disk = world.disk
    number = 1
    while await disk.stat(f"{made.folder}/{ASIDE}{number}") is not None:
        number += 1
    target = f"{made.folder}/{ASIDE}{number}"
    await disk.make_directory(target)
    for path in [*made.moved, MANIFEST]:
        if await disk.stat(f"{made.folder}/{path}") is None:
            continue
        copy = f"{target}/{path.replace('/', '-')}"
        await disk.copy_file(f"{made.folder}/{path}", copy)
        file = await disk.open_file(copy, OpenFlags.read_write())
        try:
            await file.sync()
        finally:
            file.close()
    await disk.sync_directory(target)
    await disk.sync_directory(made.folder)


async def _write_anew(world: World, made: RepairPlan, facts: _Facts) -> None:
    """Write the kept records that do not stay in their files into a new current segment, then the manifest."""
    batches = await _batches(world, made)
    manifest = new_manifest(facts.manifest.name, bytes.fromhex(facts.manifest.id), made.base_lsn)
    n_bytes = sum(len(layout.pack_batch([(r.kind, r.payload) for r in batch], batch[0].lsn, 0)) + GROUP_HEADER_BYTES for batch in batches)
    segment_bytes = max(facts.segment_bytes, n_bytes + SEGMENT_HEADER_BYTES + RESERVED_BYTES)
    header = SegmentHeader(bytes.fromhex(manifest.id), manifest.name, made.rewrite_lsn, made.base_lsn, segment_bytes, world.clock.now_ns())
    path = f"{made.folder}/{NEXT}"
    await world.disk.remove(path)
    file = await world.disk.open_file(path, OpenFlags.create_new())
    try:
        await file.allocate(0, segment_bytes)
        await file.write_at(0, layout.pack_segment_header(header))
        await _write_batches(file, batches, header)
        await file.sync()
    finally:
        file.close()
    await world.disk.rename(path, f"{made.folder}/{CURRENT}")
    await world.disk.sync_directory(made.folder)
    await world.disk.write_atomic(f"{made.folder}/{MANIFEST}", pack_manifest(manifest))


async def _batches(world: World, made: RepairPlan) -> list[list[Record]]:
    """Return the whole batches between `rewrite_lsn` and `last_lsn`."""
    found: list[list[Record]] = []
    lsn = made.rewrite_lsn
    async for piece in Survey(world, made.folder).pieces():
        if piece.batch is None:
            continue
        records = [record for record in piece.batch.records if lsn <= record.lsn <= made.last_lsn]
        if records:
            found.append(records)
            lsn = records[-1].lsn + 1
    return found


async def _write_batches(file: DataFile, batches: list[list[Record]], header: SegmentHeader) -> None:
    seed = layout.seed_of(header.journal_id)
    offset = SEGMENT_HEADER_BYTES
    lsn = header.first_lsn
    for batch in batches:
        first = batch[0].lsn
        data = layout.pack_batch([(record.kind, record.payload) for record in batch], first, seed)
        flags = SKIPS if first != lsn else 0
        group = layout.pack_whole_group(
            [data], offset, GroupHeader(0, len(batch), first, 0, flags), seed=seed, segment_lsn=header.first_lsn
        )
        await file.write_at(offset, group)
        offset += len(group)
        lsn = batch[-1].lsn + 1


async def _remove_moved(world: World, made: RepairPlan) -> None:
    for path in made.moved:
        if path != CURRENT:
            await world.disk.remove(f"{made.folder}/{path}")
    for child in (ARCHIVE, SNAPSHOTS):
        await world.disk.sync_directory(f"{made.folder}/{child}")
