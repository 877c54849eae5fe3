"""Codings: an answer packed as gzip or zstd out of pieces that were packed alone, and kept.

What a sandbox shows is packed when it is first asked for, or as it comes while somebody asks for its coding: each family for itself, all
of them in one pack (`core.pack`). From then on a family stands in each answer as it is. That costs some ratio (no piece refers to another),
and makes a packed answer a matter of joining: the same piece of all sandboxes' packs, many by one call of the Rust core.

    gzip    header, pieces of DEFLATE that each end at a byte's end and refer to nothing before them, an empty last block,
            the CRC of the whole from those of the pieces, the length
    zstd    frames: one behind the other they are one stream

Headers of families are not worth compressing: in gzip they stand in stored blocks. What is made for one answer is packed for it, together.
Source: RFC 1951 section 3.2.4, RFC 1952 section 2.3, RFC 8878 section 3.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Final, Protocol

from isopod.pulse import core
from isopod.pulse.formats import Coding
from isopod.pulse.merge import Part, Run
from isopod.pulse.model import Fragment, Row

BATCH_BYTES: Final = 256 << 10
"""How much text is packed in one go, about."""
GATHERED_BYTES: Final = 256 << 10
"""How many packed bytes are joined in one go, about."""
KEPT: Final[tuple[Coding, ...]] = ("gzip", "zstd")
"""Codings in which rows are kept."""
_GZIP_HEAD: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_LAST_BLOCK: Final = b"\x03\x00"
_STORED_BYTES_MAX: Final = 0xFFFF
_SIZE: Final = itemgetter(1)


class Packer(Protocol):
    """Makes an answer's bytes of its parts, in their order."""

    def begin(self) -> bytes:
        """Return what stands before all others."""

    def plain(self, data: bytes) -> bytes:
        """Return some bytes packed; nothing is kept."""

    def family(self, parts: Sequence[Part], *, is_open: bool) -> Iterator[Sequence[bytes]]:
        """Iterate over a family packed, some of it at a time; empty sequences say that time went by.

        Args:
            parts: Its samples.
            is_open: Whether in their form for OpenMetrics.
        """

    def end(self) -> bytes:
        """Return what stands behind all others."""


def packer(coding: Coding) -> Packer:
    """Return what packs one answer in a coding."""
    match coding:
        case "gzip":
            return _Gzip()
        case "zstd":
            return _Zstd()
    return _Identity()


def prepare(row: Row, coding: Coding, before: Row | None = None) -> None:
    """Pack a row and keep what came of it, unless that was done.

    Args:
        row: What is packed.
        coding: How; for one that is not kept nothing is done.
        before: The row in whose place it came: what both have is not packed again.
    """
    if coding not in KEPT or coding in row.packs or not row.fragments:
        return
    old = None if before is None else before.packs.get(coding)
    if before is None or old is None:
        row.packs[coding] = core.pack(coding, [each.text for each in row.fragments])
    else:
        row.packs[coding] = core.pack(coding, _changes(row, before), old)


def _changes(row: Row, before: Row) -> list[bytes | int]:
    """Return what of a row is another than before, and where the rest stands there: mostly at the same place."""
    if len(row.fragments) == len(before.fragments):
        pairs = zip(row.fragments, before.fragments, strict=True)
        return [number if one is other else one.text for number, (one, other) in enumerate(pairs)]
    known = {each: number for number, each in enumerate(before.fragments)}
    return [known.get(each, each.text) for each in row.fragments]


class _Identity:
    """No coding: fragments are joined as they are."""

    def begin(self) -> bytes:
        """See `Packer`."""
        return b""

    def plain(self, data: bytes) -> bytes:
        """See `Packer`."""
        return data

    def family(self, parts: Sequence[Part], *, is_open: bool) -> Iterator[Sequence[bytes]]:
        """See `Packer`."""
        for part in parts:
            if isinstance(part, Fragment):
                yield (part.open_text if is_open and part.open_text is not None else part.text,)
                continue
            column = part.column
            if is_open and any([column in row.differing for row in part.rows]):  # noqa: C419 - twice as fast
                fragments = [row.fragments[column] for row in part.rows]
                yield [each.text if each.open_text is None else each.open_text for each in fragments]
            else:
                yield [row.texts[column] for row in part.rows]

    def end(self) -> bytes:
        """See `Packer`."""
        return b""


class _Packed:
    """Takes pieces of the packs that are kept.

    Args:
        coding: Their coding.
    """

    def __init__(self, coding: Coding) -> None:
        self._coding = coding
        self._checks: list[tuple[int, int]] = []
        """The CRC-32 and the length of what was packed so far."""
        self._rows: Sequence[Row] = ()
        self._packs: list[bytes] = []
        """What is packed of `_rows`: they are mostly the same from family to family."""
        self._looked: Sequence[Row] = ()
        self._differing: frozenset[int] = frozenset()
        """Which columns of `_looked` are others in OpenMetrics, in any of its rows."""

    def family(self, parts: Sequence[Part], *, is_open: bool) -> Iterator[Sequence[bytes]]:
        """See `Packer`."""
        texts: list[bytes] = []
        n_bytes = 0
        for part in self._opened(parts) if is_open else parts:
            if isinstance(part, Fragment):
                text = part.open_text if is_open and part.open_text is not None else part.text
                texts.append(text)
                n_bytes += len(text)
                if n_bytes < BATCH_BYTES:
                    continue
            if texts:
                yield [self._once(b"".join(texts))]
                texts, n_bytes = [], 0
            if not isinstance(part, Fragment):
                yield from self._run(part)
        if texts:
            yield [self._once(b"".join(texts))]

    def _run(self, run: Run) -> Iterator[Sequence[bytes]]:
        """Join what is kept of a run, after packing what is not."""
        if run.rows is not self._rows:
            for row in run.rows:
                if self._coding not in row.packs:
                    prepare(row, self._coding)
                    yield ()
            self._packs = [row.packs[self._coding] for row in run.rows]
            self._rows = run.rows
        first = 0
        while first < len(run.rows):
            data, crc32, n_bytes, first = core.gather(self._packs, run.column, first, GATHERED_BYTES)
            self._checks.append((crc32, n_bytes))
            yield (data,)

    def _opened(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Iterate over parts; what is another in OpenMetrics stands by itself: nothing is kept of it, since it is rare."""
        for part in parts:
            if isinstance(part, Fragment) or part.column not in self._differing_in(part.rows):
                yield part
                continue
            column = part.column
            for differs, rows in groupby(part.rows, key=lambda row: column in row.differing):
                if differs:
                    yield from [row.fragments[column] for row in rows]
                else:
                    yield Run(list(rows), column)

    def _differing_in(self, rows: Sequence[Row]) -> frozenset[int]:
        if rows is not self._looked:
            self._looked = rows
            self._differing = frozenset(chain.from_iterable([row.differing for row in rows]))
        return self._differing

    def _once(self, text: bytes) -> bytes:
        """Return a text packed, for this answer alone."""
        data, crc32, n_bytes, _ = core.gather([core.pack(self._coding, (text,))], 0, 0, 1)
        self._checks.append((crc32, n_bytes))
        return data


class _Gzip(_Packed):
    """One member of gzip, however many pieces it is made of."""

    def __init__(self) -> None:
        super().__init__("gzip")

    def begin(self) -> bytes:
        """See `Packer`."""
        return _GZIP_HEAD

    def plain(self, data: bytes) -> bytes:
        """See `Packer`."""
        if len(data) > _STORED_BYTES_MAX:
            return self._once(data)
        self._checks.append((zlib.crc32(data), len(data)))
        return b"\x00%b%b" % (struct.pack("<HH", len(data), len(data) ^ _STORED_BYTES_MAX), data)

    def end(self) -> bytes:
        """See `Packer`."""
        n_bytes = sum(map(_SIZE, self._checks))
        return _LAST_BLOCK + struct.pack("<II", core.combine_crc(self._checks), n_bytes & 0xFFFFFFFF)


class _Zstd(_Packed):
    """Frames, one behind the other."""

    def __init__(self) -> None:
        super().__init__("zstd")

    def begin(self) -> bytes:
        """See `Packer`."""
        return b""

    def plain(self, data: bytes) -> bytes:
        """See `Packer`."""
        return self._once(data)

    def end(self) -> bytes:
        """See `Packer`."""
        return b""
