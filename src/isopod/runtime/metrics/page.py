"""The binary layout of one page of metrics: written by one process, read by any, without a lock or a message.

::

    0   "ISOMETRC"                  16  shard number          40  bytes of the table
    8   version (u32)               24  generation            48  bytes of the table that are whole ("committed")
    12  flags (u32)                 32  number of cells       56  0
    64  cells: aligned float64, each written by one thread
    ..  table: entries one after another, each: bytes (u32), crc32 (u32), a MessagePack array (`Entry`)

All in the byte order of the machine, 64 bits unless marked. An entry names a series and its run of cells; it is appended with its checksum
and `committed` is raised after it, so a reader sees whole entries or none. A cell is one aligned store of eight bytes: a reader sees its
old or its new value. Between cells there is no order: a scrape
may see an observation's bucket before its sum.

What does not fit (a foreign file, a later version, a damaged entry, cells outside the page) ends the reading there, never the scrape.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

import msgspec

from isopod.runtime.metrics.model import Aggregation, Kind

MAGIC: Final = b"ISOMETRC"
VERSION: Final = 1
FLAG_RETIRED: Final = 1
"""The page holds the sums of all generations up to its own: pages of those are not counted any more."""
HEADER_BYTES: Final = 64
CELL_BYTES: Final = 8
_PREFIX: Final = "shard-"
_SUFFIX: Final = ".page"
PAGE_BYTES_MIN: Final = 64 << 10
PAGE_BYTES_MAX: Final = 4 << 20
_HEADER: Final = Struct("=8sIIqqQQQQ")
_FRAME: Final = Struct("=II")
_COMMITTED_AT: Final = 6
"""Index of the committed word in the page seen as 64-bit words."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One series in a page's table."""

    cell: int
    n_cells: int
    kind: Kind
    name: str
    help: str
    unit: str
    aggregation: Aggregation
    labels: tuple[tuple[str, str], ...]
    bounds: tuple[float, ...]


class PageKey(NamedTuple):
    """What a page's name says: sorted, shards and their lives are in order."""

    shard: int
    generation: int
    number: int


class Header(NamedTuple):
    """The head of a page."""

    flags: int
    shard: int
    generation: int
    n_cells: int
    n_table_bytes: int


_ENCODE: Final = msgspec.msgpack.Encoder().encode
_DECODE: Final = msgspec.msgpack.Decoder(Entry).decode


def page_name(shard: int, generation: int, number: int) -> str:
    """Return the name of a shard's page: "shard-0-3-1.page"."""
    return f"{_PREFIX}{shard}-{generation}-{number}{_SUFFIX}"


def parse_page_name(name: str) -> PageKey | None:
    """Return what "shard-0-3-1.page" says, None for any other name."""
    if not name.startswith(_PREFIX) or not name.endswith(_SUFFIX):
        return None
    words = name.removeprefix(_PREFIX).removesuffix(_SUFFIX).split("-")
    if len(words) != 3 or not all(word.isascii() and word.isdigit() and len(word) <= 18 for word in words):
        return None
    return PageKey(int(words[0]), int(words[1]), int(words[2]))


def page_head(n_bytes: int, *, shard: int, generation: int, flags: int = 0) -> bytes:
    """Return the head of an empty page: a quarter of it is cells, the rest table."""
    n_cells = (n_bytes - HEADER_BYTES) // 4 // CELL_BYTES
    n_table_bytes = n_bytes - HEADER_BYTES - n_cells * CELL_BYTES
    return _HEADER.pack(MAGIC, VERSION, flags, shard, generation, n_cells, n_table_bytes, 0, 0)


def read_head(view: memoryview) -> Header | None:
    """Return a page's head, None if it is no page of this version or its numbers do not fit its size."""
    if len(view) < HEADER_BYTES:
        return None
    magic, version, flags, shard, generation, n_cells, n_table_bytes, _committed, _spare = _HEADER.unpack_from(view, 0)
    if magic != MAGIC or version != VERSION or HEADER_BYTES + n_cells * CELL_BYTES + n_table_bytes > len(view):
        return None
    return Header(flags, shard, generation, n_cells, n_table_bytes)


class PageWriter:
    """The writing side of one page.

    Args:
        view: The page's bytes, beginning with `page_head`.
    """

    __slots__ = ("_committed", "_head", "_table_at", "_view", "_words", "cells", "n_cells_used")

    def __init__(self, view: memoryview) -> None:
        head = read_head(view)
        if head is None:
            raise ValueError("not a page of metrics")
        self._view = view
        self._head = head
        self._words = view[:HEADER_BYTES].cast("Q")
        self._table_at = HEADER_BYTES + head.n_cells * CELL_BYTES
        self._committed = self._words[_COMMITTED_AT]
        self.cells = view[HEADER_BYTES : self._table_at].cast("d")
        self.n_cells_used = 0

    def add(self, entry: Entry) -> "memoryview[float] | None":
        """Append a series and return its cells; None if the page has no room. `entry.cell` is set here."""
        begin = self.n_cells_used
        packed = _ENCODE(msgspec.structs.replace(entry, cell=begin))
        n_bytes = _FRAME.size + len(packed)
        if begin + entry.n_cells > self._head.n_cells or self._committed + n_bytes > self._head.n_table_bytes:
            return None
        at = self._table_at + self._committed
        _FRAME.pack_into(self._view, at, len(packed), crc32(packed))
        self._view[at + _FRAME.size : at + n_bytes] = packed
        self.n_cells_used = begin + entry.n_cells
        self._committed += n_bytes
        self._words[_COMMITTED_AT] = self._committed
        return self.cells[begin : self.n_cells_used]

    def values(self) -> Sequence[float]:
        """Return the cells in use."""
        return self.cells[: self.n_cells_used].tolist()


class PageReader:
    """The reading side of one page; `entries` grows by `refresh`.

    Args:
        view: The page's bytes.

    Raises:
        ValueError: It is no page.
    """

    __slots__ = ("_at", "_cells", "_table", "_words", "entries", "head", "is_damaged", "n_cells_used")

    def __init__(self, view: memoryview) -> None:
        head = read_head(view)
        if head is None:
            raise ValueError("not a page of metrics")
        self.head = head
        table_at = HEADER_BYTES + head.n_cells * CELL_BYTES
        self._words = view[:HEADER_BYTES].cast("Q")
        self._cells = view[HEADER_BYTES:table_at].cast("d")
        self._table = view[table_at : table_at + head.n_table_bytes]
        self._at = 0
        self.entries: list[Entry] = []
        self.n_cells_used = 0
        self.is_damaged = False

    def refresh(self) -> bool:
        """Read entries that came since the last time; return whether there were any."""
        before = len(self.entries)
        if not self.is_damaged:
            self.entries.extend(self._new())
        return len(self.entries) != before

    def values(self) -> Sequence[float]:
        """Return the cells of all entries read so far."""
        return self._cells[: self.n_cells_used].tolist()

    def _new(self) -> Iterator[Entry]:
        committed = self._words[_COMMITTED_AT]
        if committed < self._at or committed > len(self._table):
            self.is_damaged = True
            return
        while self._at < committed:
            entry = self._entry(committed)
            if entry is None:
                self.is_damaged = True
                return
            self.n_cells_used = entry.cell + entry.n_cells
            yield entry

    def _entry(self, committed: int) -> Entry | None:
        if committed - self._at < _FRAME.size:
            return None
        n_bytes, checksum = _FRAME.unpack_from(self._table, self._at)
        begin = self._at + _FRAME.size
        packed = bytes(self._table[begin : begin + n_bytes])
        if begin + n_bytes > committed or crc32(packed) != checksum:
            return None
        try:
            entry = _DECODE(packed)
        except msgspec.MsgspecError:
            return None
        wanted = len(entry.bounds) + 2 if entry.kind == "histogram" else 1
        if entry.n_cells != wanted or entry.cell != self.n_cells_used or entry.cell + entry.n_cells > self.head.n_cells:
            return None
        self._at = begin + n_bytes
        return entry
