"""Walking through a segment: its sound batches, then what its end is.

The rules that tell a torn tail from damage are in `layout`. A walk yields whole batches only; after it `ending` says how it ended:

- `sealed`: the segment was closed, nothing may follow;
- `open`: after the last group come zeros, as they should;
- `torn`: a write was cut off by a crash; nothing that was acknowledged is in it;
- `damaged`: something else is wrong.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, Literal, NamedTuple

from isopod.journal import layout
from isopod.journal.layout import (
    CLOSED,
    GROUP_HEADER_BYTES,
    GROUP_MAGIC,
    SEALED,
    SECTOR_BYTES,
    SEGMENT_HEADER_BYTES,
    SKIPS,
    BadRecordAt,
    GroupHeader,
    Record,
    SegmentHeader,
)
from isopod.journal.source import Source

SEARCH_BYTES: Final = 1 << 20
_HEADER_MORE: Final = GROUP_HEADER_BYTES - 1

How = Literal["sealed", "open", "torn", "damaged"]


class Ending(NamedTuple):
    """How a segment ends."""

    how: How
    offset: int
    """Behind the last sound group."""
    lsn: int
    """The LSN that comes next."""
    bad_offset: int = 0
    """Where the first thing is that does not check."""
    bad_lsn: int = 0
    why: str = ""
    last_offset: int = 0
    """Where the last sound group begins, 0 if there is none: the only one that may be in the page cache alone."""
    was_closed: bool = False
    """Whether the last group says that the journal was closed in order."""
    end: int = 0
    """Behind the last byte that is not zero, for `torn`."""
    told_lsn: int = 0
    """The last record that a damaged group's sound header tells of."""


class Batch(NamedTuple):
    """What was appended at once."""

    records: list[Record]
    offsets: list[int]
    """Where each record is in the file."""


class Walk:
    """One pass through one segment.

    Args:
        source: Its bytes.
        header: What it says about itself.
        seed: The journal's.
        is_last: Whether it is the one that is written to: only that one may end without a seal.
        end_offset: Where to stop, for a segment that is being written to; None for its end.
    """

    def __init__(self, source: Source, header: SegmentHeader, seed: int, *, is_last: bool, end_offset: int | None = None) -> None:
        self.start = (SEGMENT_HEADER_BYTES, header.first_lsn)
        """Where to begin: offset and LSN. Set before `batches` to go on behind damage."""
        self._source = source
        self._header = header
        self._seed = seed
        self._is_last = is_last
        self._end_offset = end_offset
        self._was_closed = False
        self._last_offset = 0
        self.ending = Ending("damaged", SEGMENT_HEADER_BYTES, header.first_lsn, why="not walked to its end")
        self.n_groups = 0

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Yield the sound batches in order, up to whatever ends the segment."""
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                yield batch
        self.ending = self.ending._replace(was_closed=self._was_closed, last_offset=self._last_offset)

    async def _batches(self) -> AsyncGenerator[Batch, None]:
        offset, lsn = self.start
        while self._end_offset is None or offset < self._end_offset:
            data = await self._source.read(offset, GROUP_HEADER_BYTES)
            header = layout.parse_group(data, 0, offset, seed=self._seed, segment_lsn=self._header.first_lsn)
            if header is None:
                self.ending = await self._judge_headless(offset, lsn, data)
                return
            if header.first_lsn != lsn and not (header.flags & SKIPS and header.first_lsn > lsn):
                why = f"a group of lsn {header.first_lsn} in the place of {lsn}"
                self.ending = Ending("damaged", offset, lsn, bad_offset=offset, bad_lsn=lsn, why=why)
                return
            body = await self._source.read(offset + GROUP_HEADER_BYTES, header.n_bytes)
            found, bad = _parse(body, header, offset + GROUP_HEADER_BYTES, self._seed)
            if bad is not None:
                self.ending = await self._judge_group(offset, lsn, header, bad=bad)
                if self.ending.how == "torn":
                    return
            for batch in found:
                lsn = batch.records[-1].lsn + 1
                yield batch
            if bad is not None:
                self.ending = self.ending._replace(lsn=lsn)
                return
            self.n_groups += 1
            self._last_offset = offset
            offset += GROUP_HEADER_BYTES + header.n_bytes
            self._was_closed = bool(header.flags & CLOSED)
            if header.flags & SEALED:
                self.ending = Ending("sealed", offset, lsn)
                return
        self.ending = Ending("open", offset, lsn)

    async def _judge_group(self, offset: int, lsn: int, header: GroupHeader, *, bad: BadRecordAt) -> Ending:
        """Judge a group whose header is sound and whose content is not."""
        told = header.first_lsn + header.n_records - 1
        damaged = Ending("damaged", offset, lsn, bad_offset=bad.offset, bad_lsn=bad.lsn, why=bad.why, told_lsn=told)
        n_bytes = GROUP_HEADER_BYTES + header.n_bytes
        if not self._is_last or offset + n_bytes > self._header.segment_bytes:
            return damaged
        later, last = await self._look_ahead(offset + n_bytes)
        if later is not None:
            return damaged._replace(why=f"{bad.why}, and what was written later is there, at byte {later}")
        wrong_size = await self._wrong_size()
        if wrong_size:
            return damaged._replace(why=f"{bad.why}; {wrong_size}")
        data = await self._source.read(offset, n_bytes)
        if len(data) == n_bytes and not last and layout.count_zero_sectors(data, offset) > header.n_zero_sectors:
            return damaged._replace(how="torn", end=offset + n_bytes)
        return damaged

    async def _judge_headless(self, offset: int, lsn: int, data: bytes) -> Ending:
        """Judge what is in the place of a group's header: zeros if the segment ends as it should."""
        damaged = Ending("damaged", offset, lsn, bad_offset=offset, bad_lsn=lsn, why="a group's header does not check")
        if not self._is_last:
            return damaged
        later, last = await self._look_ahead(offset)
        if later is not None:
            return damaged._replace(why=f"a group's header does not check, and what was written later is there, at byte {later}")
        wrong_size = await self._wrong_size()
        if wrong_size:
            return damaged._replace(why=wrong_size)
        if not last:
            return Ending("open", offset, lsn)
        in_sector = SECTOR_BYTES - offset % SECTOR_BYTES
        is_missing = not any(data[:in_sector])
        if not is_missing and in_sector < GROUP_HEADER_BYTES:  # the header lies across two sectors: the second one may be missing
            is_missing = not any(await self._source.read(offset + in_sector, SECTOR_BYTES))
        return damaged._replace(how="torn", end=last) if is_missing else damaged

    async def find_group(self, offset: int) -> tuple[int, int] | None:
        """Return where the first sound group begins at or behind `offset`, and its first LSN; None if there is none."""
        place, _ = await self._look_ahead(offset)
        while place is not None:
            data = await self._source.read(place, GROUP_HEADER_BYTES)
            header = layout.parse_group(data, 0, place, seed=self._seed, segment_lsn=self._header.first_lsn)
            if header is not None:
                return place, header.first_lsn
            place, _ = await self._look_ahead(place + 1)
        return None

    async def _wrong_size(self) -> str:
        """Return "" if the file is as long as it was made, else what is wrong: a crash changes no length that was durable before."""
        n_bytes = self._header.segment_bytes
        data = await self._source.read(n_bytes - 1, 2)
        return "" if len(data) == 1 else f"the file is {'longer' if data else 'shorter'} than the {n_bytes} bytes it was made with"

    async def _look_ahead(self, offset: int) -> tuple[int | None, int]:
        """Return where a sound group header is behind `offset`, if there is one, and behind the last byte that is not zero (0: none)."""
        last = 0
        at = offset
        while data := await self._source.read(at, SEARCH_BYTES):
            if layout.any_but_zeros(data):
                last = at + len(data.rstrip(b"\0"))
                place = data.find(GROUP_MAGIC)
                while place >= 0:
                    # Written for here and found there: a misdirected write, which had been acknowledged as well.
                    if await self._is_group(at + place) or await self._is_group(at + place, meant_for=offset):
                        return at + place, last
                    place = data.find(GROUP_MAGIC, place + 1)
            if len(data) < SEARCH_BYTES:
                break
            at += len(data) - _HEADER_MORE  # a header may lie across two pieces
        return None, last

    async def _is_group(self, offset: int, *, meant_for: int = 0) -> bool:
        data = await self._source.read(offset, GROUP_HEADER_BYTES)
        return layout.parse_group(data, 0, meant_for or offset, seed=self._seed, segment_lsn=self._header.first_lsn) is not None


def _parse(body: bytes, header: GroupHeader, offset: int, seed: int) -> tuple[list[Batch], BadRecordAt | None]:
    """Return the sound batches of a group, in order, up to the first record that does not check."""
    found: list[Batch] = []
    records: list[Record] = []
    offsets: list[int] = []
    try:
        if len(body) < header.n_bytes:
            raise BadRecordAt(offset + len(body), header.first_lsn, "the file ends inside a group")
        for parsed in layout.parse_records(memoryview(body), header, offset, seed):
            records.append(parsed.record)
            offsets.append(parsed.offset)
            if parsed.ends_batch:
                found.append(Batch(records, offsets))
                records, offsets = [], []
    except BadRecordAt as error:
        return found, error
    return found, None
