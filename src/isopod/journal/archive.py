"""Closed segments: where they are, compressing them, and removing those that nobody needs.

A closed segment is *live* as long as it holds a record above the floor (what was compacted): recovery reads it. The others are history,
kept for as long as the settings say, oldest removed first. Compression makes `wal-LSN.log.zst` beside the file, whole and durable, before
the file goes; a crash between leaves both, and the plain one counts.
"""

from typing import Final, NamedTuple

from isopod.journal.folder import ARCHIVE, TEMPORARY, SegmentName, parse_segment_name
from isopod.journal.settings import JournalSettings
from isopod.world.world import World

LEVEL: Final = 3


class Closed(NamedTuple):
    """A closed segment."""

    first_lsn: int
    next_lsn: int
    """The first LSN of the segment after it."""
    is_packed: bool
    n_bytes: int
    """As it lies there."""
    modified_at_ns: int


class Archive:
    """The closed segments of a journal, oldest first.

    Args:
        world: Whose disk.
        folder: The journal's.
        settings: What is kept, and how.
    """

    def __init__(self, world: World, folder: str, settings: JournalSettings) -> None:
        self._world = world
        self._folder = f"{folder}/{ARCHIVE}"
        self._settings = settings
        self._before_remove = world.failpoints.point("journal.before_archive_remove")
        self._before_pack = world.failpoints.point("journal.before_archive_compress")
        self._before_swap = world.failpoints.point("journal.after_archive_compress")
        self.segments: list[Closed] = []
        self.n_readers = 0
        """Who reads now: nothing is removed from under them."""

    def path(self, segment: Closed) -> str:
        """Return where a segment is."""
        return f"{self._folder}/{SegmentName(segment.first_lsn, segment.is_packed).name}"

    def plain_path(self, first_lsn: int) -> str:
        """Return where a segment comes when it is closed."""
        return f"{self._folder}/{SegmentName(first_lsn, is_packed=False).name}"

    @property
    def folder(self) -> str:
        """Where closed segments are."""
        return self._folder

    async def load(self) -> list[SegmentName]:
        """Return the closed segments on the disk, oldest first, after tidying up what a crash left; OSError."""
        names, left = await list_closed(self._world, self._folder)
        for name in left:
            await self._world.disk.remove(f"{self._folder}/{name}")
        return names

    async def add(self, first_lsn: int, next_lsn: int, *, is_packed: bool = False) -> None:
        """Take a closed segment into the list, behind the others."""
        segment = Closed(first_lsn, next_lsn, is_packed, 0, 0)
        stat = await self._world.disk.stat(self.path(segment))
        if stat is not None:
            segment = segment._replace(n_bytes=stat.size_bytes, modified_at_ns=stat.modified_at_ns)
        self.segments.append(segment)

    def holding(self, lsn: int) -> Closed | None:
        """Return the segment that holds a record, None if it is in none of them."""
        for segment in self.segments:
            if segment.first_lsn <= lsn < segment.next_lsn:
                return segment
        return None

    def unpacked(self) -> Closed | None:
        """Return the oldest segment that is not compressed, although the settings want it."""
        if not self._settings.compress:
            return None
        return next((segment for segment in self.segments if not segment.is_packed), None)

    async def pack(self, segment: Closed) -> None:
        """Compress a segment; OSError leaves it as it was, or compressed."""
        if self._before_pack.armed:
            await self._before_pack.hit()
        disk = self._world.disk
        packed = segment._replace(is_packed=True)
        temporary = self.path(packed) + TEMPORARY
        await disk.remove(temporary)
        n_bytes = await disk.compress_file(self.path(segment), temporary, level=LEVEL)
        await disk.rename(temporary, self.path(packed))
        await disk.sync_directory(self._folder)
        if self._before_swap.armed:
            await self._before_swap.hit()
        if segment in self.segments:  # else it was removed meanwhile
            self.segments[self.segments.index(segment)] = packed._replace(n_bytes=n_bytes)
        else:
            await disk.remove(self.path(packed))
        await disk.remove(self.path(segment))

    async def retain(self, floor_lsn: int) -> int:
        """Remove the history that is over the settings' bounds, oldest first; returns how many segments went.

        Args:
            floor_lsn: Records up to it are history.
        """
        n_removed = 0
        while self.n_readers == 0 and self._is_over(floor_lsn):
            if self._before_remove.armed:
                await self._before_remove.hit()
            segment = self.segments.pop(0)
            await self._world.disk.remove(self.path(segment))
            n_removed += 1
        return n_removed

    def history(self, floor_lsn: int) -> list[Closed]:
        """Return the segments that no recovery needs."""
        return [segment for segment in self.segments if segment.next_lsn <= floor_lsn + 1]

    def _is_over(self, floor_lsn: int) -> bool:
        history = self.history(floor_lsn)
        if not history:
            return False
        settings = self._settings
        age_ns = self._world.clock.now_ns() - history[0].modified_at_ns
        return (
            len(history) > settings.archive_n_max
            or sum(segment.n_bytes for segment in history) > settings.archive_bytes_max
            or age_ns > settings.archive_age_s_max * 1e9
        )


async def list_closed(world: World, folder: str) -> tuple[list[SegmentName], list[str]]:
    """Return the closed segments in an archive's folder, oldest first, and the names of what a crash left there besides; OSError."""
    found: dict[int, SegmentName] = {}
    left: list[str] = []
    for name in await world.disk.list(folder):
        segment = parse_segment_name(name)
        if segment is None:
            left += [name] if name.endswith(TEMPORARY) else []
        elif segment.first_lsn in found:  # in both forms: the plain one counts, for it was there first and is whole
            left.append(SegmentName(segment.first_lsn, is_packed=True).name)
            found[segment.first_lsn] = SegmentName(segment.first_lsn, is_packed=False)
        else:
            found[segment.first_lsn] = segment
    return [found[lsn] for lsn in sorted(found)], left
