"""The segment that is written to: groups into allocated space, closing it, and beginning the next.

Only one task uses it. What may fail without harm is told apart by where it fails: allocating the next segment (ENOSPC) changes nothing;
any failure of a write, a sync or a rename after that is final, since nobody can tell what of it reached the disk.

Order of a rotation, so that each crash leaves a journal that is found whole: the next segment is allocated and its name made durable;
the present one gets its seal; it moves into the archive, durable there; the next one gets its header, durable, and then its name.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from isopod.journal import layout
from isopod.journal.folder import CURRENT, NEXT, TEMPORARY, SegmentName
from isopod.journal.layout import CLOSED, GROUP_HEADER_BYTES, SEALED, SEGMENT_HEADER_BYTES, GroupHeader, SegmentHeader
from isopod.journal.scan import Ending
from isopod.world.disk import DataFile, OpenFlags
from isopod.world.world import World

RESERVED_BYTES: Final = 2 * GROUP_HEADER_BYTES
"""Kept free at the end of a segment: for its seal, and for the mark of an orderly end."""


class Writer:
    """Writes groups to the current segment. `offset` and `header` say where it is.

    Args:
        world: Whose disk.
        folder: The journal's.
        seed: Its checksums' beginning.
        archive: The folder that closed segments go to.
    """

    def __init__(self, world: World, folder: str, seed: int, *, archive: str) -> None:
        self._world = world
        self._folder = folder
        self._seed = seed
        self._archive = archive
        self._file: DataFile | None = None
        self._next: DataFile | None = None
        self._preparing = asyncio.Lock()
        self.rotating = asyncio.Lock()
        """Held while the segment moves into the archive: readers find it there, or here, but not in between."""
        self._before_write = world.failpoints.point("journal.before_write")
        self._after_write = world.failpoints.point("journal.after_write")
        self._before_allocate = world.failpoints.point("journal.before_allocate")
        self._before_seal = world.failpoints.point("journal.before_seal")
        self._before_rotate = world.failpoints.point("journal.before_rotate")
        self._in_rotate = world.failpoints.point("journal.in_rotate")
        self._after_rotate = world.failpoints.point("journal.after_rotate")
        self.header = SegmentHeader(b"", "", 1, 0, 0, 0)
        self.offset = SEGMENT_HEADER_BYTES
        self.is_marked = False
        """Whether the last group says that the journal was closed."""

    @property
    def path(self) -> str:
        """The file that is written to."""
        return f"{self._folder}/{CURRENT}"

    @property
    def room_bytes(self) -> int:
        """How many bytes of records one more group can have."""
        return self.header.segment_bytes - RESERVED_BYTES - self.offset - GROUP_HEADER_BYTES

    @property
    def has_next(self) -> bool:
        """Whether the next segment is ready."""
        return self._next is not None

    async def resume(self, header: SegmentHeader, ending: Ending) -> None:
        """Go on in the segment that is there. Its last group is written once more, and what is torn behind it becomes zeros again.

        The last group may have been read from the page cache alone: its flush failed, or was cut off by the end of the process. After a
        failed flush the kernel takes such pages for clean, and what is appended behind them would be durable without them. The groups
        before it were durable before it was written.

        Args:
            header: The segment's header.
            ending: How it ends.
        """
        self.header = header
        self.offset = ending.offset
        self.is_marked = ending.was_closed
        self._file = await self._world.disk.open_file(self.path, OpenFlags.read_write())
        if ending.last_offset:
            n_bytes = ending.offset - ending.last_offset
            await self._file.write_durable(ending.last_offset, await self._file.read_at(ending.last_offset, n_bytes))
        if ending.how == "torn":
            await self._file.write_durable(ending.offset, bytes(ending.end - ending.offset))

    async def begin(self, header: SegmentHeader) -> None:
        """Make the segment the current one: the next one is prepared if it is not yet, gets its header, and its name."""
        await self.prepare(header.segment_bytes)
        assert self._next is not None
        await self._next.write_durable(0, layout.pack_segment_header(header))
        await self._world.disk.rename(f"{self._folder}/{NEXT}", self.path)
        await self._world.disk.sync_directory(self._folder)
        if self._file is not None:
            self._file.close()
        self._file, self._next = self._next, None
        self.header = header
        self.offset = SEGMENT_HEADER_BYTES
        self.is_marked = False

    async def prepare(self, segment_bytes: int) -> None:
        """Have the next segment's space allocated and its name durable; OSError: nothing has changed."""
        async with self._preparing:
            if self._next is None:
                self._next = await self._allocate(segment_bytes)

    async def drop_next(self) -> None:
        """Give the prepared segment's space back."""
        if self._next is not None:
            self._next.close()
            self._next = None
            await self._world.disk.remove(f"{self._folder}/{NEXT}")

    async def write(self, batches: Sequence[bytes], header: GroupHeader) -> int:
        """Write one group, durably; returns its length. OSError is final."""
        assert self._file is not None
        data = layout.pack_whole_group(batches, self.offset, header, seed=self._seed, segment_lsn=self.header.first_lsn)
        if self._before_write.armed:
            await self._before_write.hit()
        await self._file.write_durable(self.offset, data)
        self.offset += len(data)
        self.is_marked = False
        if self._after_write.armed:
            await self._after_write.hit()
        return len(data)

    def may_write_now(self, n_bytes: int) -> bool:
        """Whether `write_now` is worth its while for batches of so many bytes."""
        if self._before_write.armed or self._after_write.armed or self._file is None:
            return False
        return self._file.may_write_now(n_bytes + RESERVED_BYTES)

    def write_now(self, batches: Sequence[bytes], header: GroupHeader) -> int:
        """Do as `write`, in the loop's thread; right after `may_write_now` said so. OSError is final."""
        assert self._file is not None
        data = layout.pack_whole_group(batches, self.offset, header, seed=self._seed, segment_lsn=self.header.first_lsn)
        self._file.write_durable_now(self.offset, data)
        self.offset += len(data)
        self.is_marked = False
        return len(data)

    async def rotate(self, next_lsn: int, header: SegmentHeader) -> None:
        """Close the segment, move it into the archive, and go on in the prepared next one. OSError is final.

        Args:
            next_lsn: The LSN that comes next.
            header: What the next segment says about itself.
        """
        assert self._file is not None
        if self._before_seal.armed:
            await self._before_seal.hit()
        await self._mark(SEALED, next_lsn)
        await self._file.truncate(self.offset)
        if self._before_rotate.armed:
            await self._before_rotate.hit()
        await self.archive_current()
        if self._in_rotate.armed:
            await self._in_rotate.hit()
        await self.begin(header)
        if self._after_rotate.armed:
            await self._after_rotate.hit()

    async def archive_current(self) -> None:
        """Move the sealed segment into the archive; OSError is final."""
        name = SegmentName(self.header.first_lsn, is_packed=False).name
        await self._world.disk.rename(self.path, f"{self._archive}/{name}")
        await self._world.disk.sync_directory(self._archive)

    async def mark_closed(self, next_lsn: int) -> None:
        """Note that everything up to here was durable and that an orderly end follows."""
        if not self.is_marked and self.offset + RESERVED_BYTES <= self.header.segment_bytes:
            await self._mark(CLOSED, next_lsn)

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._next):
            if file is not None:
                file.close()
        self._file = self._next = None

    async def _mark(self, flags: int, next_lsn: int) -> None:
        assert self._file is not None
        data = layout.pack_whole_group(
            (), self.offset, GroupHeader(0, 0, next_lsn, 0, flags), seed=self._seed, segment_lsn=self.header.first_lsn
        )
        await self._file.write_durable(self.offset, data)
        self.offset += len(data)

    async def _allocate(self, segment_bytes: int) -> DataFile:
        path = f"{self._folder}/{NEXT}"
        disk = self._world.disk
        temporary = path + TEMPORARY
        await disk.remove(temporary)
        file = await disk.open_file(temporary, OpenFlags.create_new())
        try:
            if self._before_allocate.armed:
                await self._before_allocate.hit()
            await file.allocate(0, segment_bytes)
            await file.sync()
            # In the place of one that a rotation left that was not finished: without a current segment there must always be a next one.
            await disk.rename(temporary, path)
            await disk.sync_directory(self._folder)
        except BaseException:
            file.close()
            await disk.remove(temporary)
            raise
        return file
