"""Finding out what a journal's folder holds, and whether all of it is sound.

What recovery accepts is exactly what a crash can leave (see `writer` for the order of steps): a torn last write; a segment that was closed
and not moved yet, or moved and still there by its old name; no current segment between two steps of a rotation, and then a prepared next
one; a journal that was being made, without a record. All else is damage, and is refused with its place.
"""

import itertools
from typing import Final, NamedTuple

from isopod.journal import layout
from isopod.journal.archive import Archive
from isopod.journal.folder import (
    ARCHIVE,
    CURRENT,
    MANIFEST,
    NEXT,
    SNAPSHOTS,
    Manifest,
    SegmentName,
    new_manifest,
    pack_manifest,
    parse_manifest,
)
from isopod.journal.layout import ID_BYTES, SEGMENT_HEADER_BYTES, BadHeader, SegmentHeader
from isopod.journal.scan import Ending, Walk
from isopod.journal.settings import JournalSettings
from isopod.journal.source import Source, open_source
from isopod.journal.writer import Writer
from isopod.world.errors import IsopodError, JournalDamaged, JournalForeign
from isopod.world.world import World

MANIFEST_BYTES_MAX: Final = 64 << 10


class Found(NamedTuple):
    """A journal on the disk."""

    manifest: Manifest
    closed: list[tuple[SegmentName, int]]
    """Closed segments, oldest first, each with the LSN after it."""
    header: SegmentHeader | None
    """The current segment's; None if there is none, in the middle of a rotation."""
    ending: Ending
    """How the current segment ends; without one, `lsn` alone counts."""
    is_moved: bool
    """Whether the current segment is closed, and in the archive already."""

    @property
    def journal_id(self) -> bytes:
        """The id that all its files carry."""
        return bytes.fromhex(self.manifest.id)


async def find_or_make(world: World, folder: str, name: str, settings: JournalSettings) -> Found:
    """Return what a folder holds, after making a journal in it if it holds none. The caller has its lock.

    Args:
        world: Whose disk, clock and chance.
        folder: The journal's.
        name: What it must hold, in its user's words.
        settings: Of a journal that is made.

    Raises:
        JournalDamaged: Something is damaged that a crash cannot have damaged.
        JournalForeign: It holds something else, or is a newer version's.
        OSError: The disk failed.
    """
    disk = world.disk
    for child in (ARCHIVE, SNAPSHOTS):
        await disk.make_directory(f"{folder}/{child}")
    names = await Archive(world, folder, settings).load()
    manifest = await read_manifest(world, folder)
    if manifest is None:
        await _check_unfinished(world, folder, names)
        manifest = await _make(world, folder, name, settings)
    if manifest.name != name:
        raise JournalForeign(f"{folder}/{MANIFEST}", f"a journal of {manifest.name!r}, not {name!r}")
    return await inspect(world, folder, manifest, names)


async def read_manifest(world: World, folder: str) -> Manifest | None:
    """Return a folder's manifest, None if there is none; JournalDamaged, JournalForeign, OSError."""
    path = f"{folder}/{MANIFEST}"
    if await world.disk.stat(path) is None:
        return None
    return parse_manifest(path, await world.disk.read(path, n_bytes_max=MANIFEST_BYTES_MAX))


async def inspect(world: World, folder: str, manifest: Manifest, names: list[SegmentName]) -> Found:
    """Walk through everything that a recovery needs.

    Args:
        world: Whose disk.
        folder: The journal's.
        manifest: Its manifest.
        names: The closed segments, oldest first.

    Raises:
        JournalDamaged: Something is damaged.
        JournalForeign: A file is not this journal's.
        OSError: The disk failed.
    """
    seed = layout.seed_of(bytes.fromhex(manifest.id))
    closed = await _walk_closed(world, folder, manifest, names, seed=seed)
    lsn = closed[-1][1] if closed else 0
    path = f"{folder}/{CURRENT}"
    if await world.disk.stat(path) is None:
        await _check_in_rotation(world, folder, closed)
        return Found(manifest, closed, None, Ending("sealed", 0, lsn), is_moved=False)
    source = await open_source(world, path, is_packed=False)
    try:
        header = await read_header(source)
        _check_belongs(path, header, manifest)
        is_moved = bool(closed) and closed[-1][0].first_lsn == header.first_lsn
        walk = Walk(source, header, seed, is_last=True)
        async for _ in walk.batches():
            pass
    finally:
        source.close()
    ending = walk.ending
    if ending.how == "damaged":
        raise JournalDamaged(path, ending.bad_offset, ending.why, lsn=ending.bad_lsn)
    if is_moved and ending.how != "sealed":
        raise JournalDamaged(path, 0, "the segment is in the archive too, and is not closed", lsn=header.first_lsn)
    if closed and not is_moved and lsn != header.first_lsn:
        raise JournalDamaged(path, 0, f"begins with lsn {header.first_lsn}, and the archive ends before {lsn}", lsn=lsn)
    if not closed and header.first_lsn > manifest.floor_lsn + 1:
        raise JournalDamaged(path, 0, f"the records from lsn {manifest.floor_lsn + 1} are missing", lsn=manifest.floor_lsn + 1)
    if ending.lsn <= manifest.floor_lsn:
        raise JournalDamaged(path, ending.offset, f"the records up to lsn {manifest.floor_lsn} are missing", lsn=ending.lsn)
    return Found(manifest, closed, header, ending, is_moved)


async def read_header(source: Source) -> SegmentHeader:
    """Return a segment's header; JournalDamaged, JournalForeign."""
    try:
        return layout.parse_segment_header(await source.read(0, SEGMENT_HEADER_BYTES))
    except BadHeader as error:
        bad: IsopodError = JournalForeign(source.path, error.why) if error.is_foreign else JournalDamaged(source.path, 0, error.why)
        raise bad from error


async def _check_unfinished(world: World, folder: str, names: list[SegmentName]) -> None:
    """Without a manifest there may be at most a journal that was being made: nothing was ever acknowledged in it."""
    path = f"{folder}/{CURRENT}"
    missing = JournalDamaged(f"{folder}/{MANIFEST}", 0, "the manifest is missing, and there are segments")
    if names:
        raise missing
    if await world.disk.stat(path) is None:
        return
    source = await open_source(world, path, is_packed=False)
    try:
        header = await read_header(source)
        if header.first_lsn != 1 or layout.any_but_zeros(await source.read(SEGMENT_HEADER_BYTES, SEGMENT_HEADER_BYTES)):
            raise missing
    finally:
        source.close()


async def _make(world: World, folder: str, name: str, settings: JournalSettings) -> Manifest:
    """Make an empty journal; the manifest comes last and makes it one."""
    disk = world.disk
    await disk.remove(f"{folder}/{CURRENT}")
    journal_id = bytes.fromhex(world.random.token_hex(ID_BYTES))
    writer = Writer(world, folder, layout.seed_of(journal_id), archive=f"{folder}/{ARCHIVE}")
    try:
        await writer.begin(SegmentHeader(journal_id, name, 1, 0, settings.segment_bytes, world.clock.now_ns()))
    finally:
        writer.close()
    manifest = new_manifest(name, journal_id, 0)
    await disk.write_atomic(f"{folder}/{MANIFEST}", pack_manifest(manifest))
    return manifest


async def _walk_closed(
    world: World, folder: str, manifest: Manifest, names: list[SegmentName], *, seed: int
) -> list[tuple[SegmentName, int]]:
    """Check the closed segments that hold live records; of the others only the names are looked at."""
    closed: list[tuple[SegmentName, int]] = []
    for index, name in enumerate(names):
        next_lsn = names[index + 1].first_lsn if index + 1 < len(names) else 0
        if not 0 < next_lsn <= manifest.floor_lsn + 1:
            next_lsn = await _walk_one(world, f"{folder}/{ARCHIVE}/{name.name}", name, manifest, seed=seed)
        closed.append((name, next_lsn))
    for (_, next_lsn), (name, _) in itertools.pairwise(closed):
        if name.first_lsn != next_lsn:
            path = f"{folder}/{ARCHIVE}/{name.name}"
            raise JournalDamaged(path, 0, f"begins with lsn {name.first_lsn}, the one before ends before {next_lsn}", lsn=next_lsn)
    if closed and closed[0][0].first_lsn > manifest.floor_lsn + 1:
        path = f"{folder}/{ARCHIVE}/{closed[0][0].name}"
        raise JournalDamaged(path, 0, f"the records from lsn {manifest.floor_lsn + 1} are missing", lsn=manifest.floor_lsn + 1)
    return closed


async def _walk_one(world: World, path: str, name: SegmentName, manifest: Manifest, *, seed: int) -> int:
    source = await open_source(world, path, is_packed=name.is_packed)
    try:
        header = await read_header(source)
        _check_belongs(path, header, manifest)
        if header.first_lsn != name.first_lsn:
            raise JournalDamaged(path, 0, f"begins with lsn {header.first_lsn}, its name says {name.first_lsn}", lsn=name.first_lsn)
        walk = Walk(source, header, seed, is_last=False)
        async for _ in walk.batches():
            pass
    finally:
        source.close()
    ending = walk.ending
    if ending.how != "sealed":
        raise JournalDamaged(path, ending.bad_offset or ending.offset, ending.why, lsn=ending.bad_lsn or ending.lsn)
    return ending.lsn


def _check_belongs(path: str, header: SegmentHeader, manifest: Manifest) -> None:
    if header.journal_id.hex() != manifest.id:
        raise JournalForeign(path, "the segment belongs to another journal", "put back the file that belongs here, or the whole folder")
    if header.name != manifest.name:
        raise JournalForeign(path, f"the segment is of a journal of {header.name!r}, not {manifest.name!r}")


async def _check_in_rotation(world: World, folder: str, closed: list[tuple[SegmentName, int]]) -> None:
    """Without a current segment there must be a closed one, and the next one that was prepared to follow it."""
    if not closed or await world.disk.stat(f"{folder}/{NEXT}") is None:
        raise JournalDamaged(f"{folder}/{CURRENT}", 0, "the segment that was written to last is missing")
