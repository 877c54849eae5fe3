"""Reading records across segments, while the journal goes on: segments may be closed, compressed and removed meanwhile."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, NamedTuple

from isopod.journal import layout
from isopod.journal.archive import Archive
from isopod.journal.layout import Record, SegmentHeader
from isopod.journal.recovery import read_header
from isopod.journal.scan import Walk
from isopod.journal.source import Source, open_source
from isopod.journal.writer import Writer
from isopod.world.errors import JournalDamaged
from isopod.world.world import World

ATTEMPTS: Final = 5
"""How often a segment is looked up again because it moved between looking it up and opening it."""


class Span(NamedTuple):
    """Which records, both ends included."""

    first_lsn: int
    last_lsn: int


class _Opened(NamedTuple):
    source: Source
    header: SegmentHeader
    next_lsn: int
    end_offset: int | None
    """Where to stop in the segment that is written to; None for a closed one."""


async def read_records(world: World, archive: Archive, writer: Writer, span: Span) -> AsyncGenerator[Record, None]:
    """Yield the records of a span that is durable, in order.

    Args:
        world: Whose disk.
        archive: The closed segments.
        writer: The current one.
        span: Which records.

    Raises:
        JournalDamaged: One cannot be read.
    """
    lsn = span.first_lsn
    while lsn <= span.last_lsn:
        opened = await _open(world, archive, writer, span._replace(first_lsn=lsn))
        try:
            seed = layout.seed_of(opened.header.journal_id)
            walk = Walk(opened.source, opened.header, seed, is_last=opened.end_offset is not None, end_offset=opened.end_offset)
            async with aclosing(walk.batches()) as batches:
                async for batch in batches:
                    for record in batch.records:
                        if record.lsn > span.last_lsn:
                            return
                        if record.lsn >= lsn:
                            yield record
            if walk.ending.how not in ("sealed", "open"):
                raise JournalDamaged(opened.source.path, walk.ending.bad_offset, walk.ending.why, lsn=walk.ending.bad_lsn)
            lsn = opened.next_lsn
        finally:
            opened.source.close()


async def _open(world: World, archive: Archive, writer: Writer, span: Span) -> _Opened:
    """Open the segment that holds the first record of a span."""
    for _ in range(ATTEMPTS):
        async with writer.rotating:
            closed = archive.holding(span.first_lsn)
            path = writer.path if closed is None else archive.path(closed)
            first_lsn = writer.header.first_lsn if closed is None else closed.first_lsn
            next_lsn = span.last_lsn + 1 if closed is None else closed.next_lsn
            end_offset = writer.offset if closed is None else None
            try:
                source = await open_source(world, path, is_packed=closed is not None and closed.is_packed)
            except FileNotFoundError:
                continue
        try:
            header = await read_header(source)
        except BaseException:
            source.close()
            raise
        if header.first_lsn == first_lsn:
            return _Opened(source, header, next_lsn, end_offset)
        source.close()
    raise JournalDamaged(writer.path, 0, "the segment of a record is missing", lsn=span.first_lsn)
