"""Recorded histories: a journal that was written to, as the files it left, and what it had acknowledged."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from isopod.journal import Journal, JournalSettings, Record
from isopod.world.disk import OpenFlags
from isopod.world.world import World

FORMAT: Final = "test 1"
SMALL: Final = JournalSettings(segment_bytes=4 << 10, compress=False)
FOLDERS: Final = ("", "archive/", "snapshots/")

Batch = Sequence[tuple[int, bytes]]


class History(NamedTuple):
    """A journal that nobody has open."""

    files: dict[str, bytes]
    """By their path in the journal's folder."""
    records: list[Record]
    """What was acknowledged."""


async def records_of(journal: Journal, first_lsn: int = 0, *, archived: bool = False) -> list[Record]:
    return [record async for record in journal.read(first_lsn, archived=archived)]


async def reopened(world: World, folder: str, settings: JournalSettings = SMALL) -> list[Record]:
    """Open a journal, return its records, and close it."""
    journal = await Journal.open(world, folder, format=FORMAT, settings=settings, on_fatal=lambda why: None)
    try:
        return await records_of(journal)
    finally:
        await journal.close()


async def files_in(world: World, folder: str) -> dict[str, bytes]:
    """Return all files of a journal."""
    found: dict[str, bytes] = {}
    for child in FOLDERS:
        for name in await world.disk.list(f"{folder}/{child}"):
            stat = await world.disk.stat(f"{folder}/{child}{name}")
            if stat is not None and not stat.is_directory:
                found[child + name] = await world.disk.read(f"{folder}/{child}{name}")
    return found


async def put_files(world: World, folder: str, files: Mapping[str, bytes]) -> None:
    """Make a journal's folder of files, in the place of what is there."""
    await world.disk.remove_tree(folder)
    for child in FOLDERS:
        await world.disk.make_directory(f"{folder}/{child}".rstrip("/"))
    for name, data in files.items():
        await world.disk.write(f"{folder}/{name}", data)


async def put_file(world: World, path: str, data: bytes) -> None:
    """Replace one file's bytes in place."""
    file = await world.disk.open_file(path, OpenFlags(write=True, create=True, truncate=True))
    if data:
        await file.write_at(0, data)
    await file.sync()
    file.close()


async def record_history(
    world: World, folder: str, batches: Sequence[Batch], *, settings: JournalSettings = SMALL, close: bool = True
) -> History:
    """Write batches, one commit each, and return what is on the disk then; without `close` as a kill would leave it."""
    journal = await Journal.open(world, folder, format=FORMAT, settings=settings)
    expected: list[Record] = []
    for batch in batches:
        lsn = await journal.commit(batch)
        expected += [Record(lsn - len(batch) + 1 + n, kind, payload) for n, (kind, payload) in enumerate(batch)]
    await journal.tidy()
    files = await files_in(world, folder)
    await journal.close()
    if close:
        files = await files_in(world, folder)
    files.pop("lock")
    return History(files, expected)
