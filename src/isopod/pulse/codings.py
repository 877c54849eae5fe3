"""Codings: an answer packed as gzip or zstd out of pieces that were packed alone, and kept.

A fragment is packed when it is first asked for, or as it comes while somebody asks for its coding; from then on it stands in each answer as
it is. That costs some ratio (no piece refers to another), and makes a packed answer a matter of joining.

    gzip    header, pieces of DEFLATE that each end at a byte's end and refer to nothing before them, an empty last block,
            the CRC of the whole from those of the pieces, the length
    zstd    frames: one behind the other they are one stream

Headers of families are not worth compressing: in gzip they stand in stored blocks.
Source: RFC 1951 section 3.2.4, RFC 1952 section 2.3, RFC 8878 section 3.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Final, Protocol

from isopod.pulse import core
from isopod.pulse.formats import Coding
from isopod.pulse.model import Deflated, Fragment

BATCH_BYTES: Final = 256 << 10
"""How much text is packed in one go, about."""
KEPT: Final[tuple[Coding, ...]] = ("gzip", "zstd")
"""Codings in which fragments are kept."""
_GZIP_HEAD: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_LAST_BLOCK: Final = b"\x03\x00"
_STORED_BYTES_MAX: Final = 0xFFFF
_SIZE: Final = itemgetter(1)
_N_BYTES: Final = itemgetter(2)


class Packer(Protocol):
    """Makes an answer's bytes of its parts, in their order."""

    def begin(self) -> bytes:
        """Return what stands before all others."""

    def plain(self, data: bytes) -> bytes:
        """Return some bytes packed; nothing is kept."""

    def fragments(self, fragments: Sequence[Fragment], *, is_open: bool) -> Iterator[Sequence[bytes]]:
        """Iterate over fragments packed, some at a time; empty sequences say that time went by.

        Args:
            fragments: Which.
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


def prepare(fragments: Iterable[Fragment], coding: Coding) -> None:
    """Pack fragments at once that are new, and keep what came of it."""
    if coding == "gzip":
        _deflate([each for each in fragments if each.deflated is None])
    elif coding == "zstd":
        _freeze([each for each in fragments if each.zstd is None])


class _Identity:
    """No coding: fragments are joined as they are."""

    def begin(self) -> bytes:
        """See `Packer`."""
        return b""

    def plain(self, data: bytes) -> bytes:
        """See `Packer`."""
        return data

    def fragments(self, fragments: Sequence[Fragment], *, is_open: bool) -> Iterator[Sequence[bytes]]:
        """See `Packer`."""
        if is_open:
            yield [each.text if each.open_text is None else each.open_text for each in fragments]
        else:
            yield [each.text for each in fragments]

    def end(self) -> bytes:
        """See `Packer`."""
        return b""


class _Gzip:
    """One member of gzip, however many pieces it is made of."""

    def __init__(self) -> None:
        self._checks: list[tuple[int, int]] = []

    def begin(self) -> bytes:
        """See `Packer`."""
        return _GZIP_HEAD

    def plain(self, data: bytes) -> bytes:
        """See `Packer`."""
        if len(data) > _STORED_BYTES_MAX:
            return self._take(core.deflate([data]))[0]
        self._checks.append((zlib.crc32(data), len(data)))
        return b"\x00%b%b" % (struct.pack("<HH", len(data), len(data) ^ _STORED_BYTES_MAX), data)

    def fragments(self, fragments: Sequence[Fragment], *, is_open: bool) -> Iterator[Sequence[bytes]]:
        """See `Packer`."""
        for batch in _batches([each for each in fragments if each.deflated is None]):
            _deflate(batch)
            yield ()
        if is_open and any(each.open_text is not None for each in fragments):
            for batch in _batches(fragments):
                yield self._take([_open_deflated(each) for each in batch])
            return
        yield self._take([each.deflated for each in fragments if each.deflated is not None])

    def end(self) -> bytes:
        """See `Packer`."""
        n_bytes = sum(map(_SIZE, self._checks))
        return _LAST_BLOCK + struct.pack("<II", core.combine_crc(self._checks), n_bytes & 0xFFFFFFFF)

    def _take(self, pieces: Sequence[Deflated]) -> list[bytes]:
        crc32 = core.combine_crc([piece[1:] for piece in pieces])
        self._checks.append((crc32, sum(map(_N_BYTES, pieces))))
        return [piece[0] for piece in pieces]


class _Zstd:
    """Frames, one behind the other."""

    def begin(self) -> bytes:
        """See `Packer`."""
        return b""

    def plain(self, data: bytes) -> bytes:
        """See `Packer`."""
        return core.zstd_frames([data])[0]

    def fragments(self, fragments: Sequence[Fragment], *, is_open: bool) -> Iterator[Sequence[bytes]]:
        """See `Packer`."""
        for batch in _batches([each for each in fragments if each.zstd is None]):
            _freeze(batch)
            yield ()
        if is_open and any(each.open_text is not None for each in fragments):
            for batch in _batches(fragments):
                yield [_open_frame(each) for each in batch]
            return
        yield [each.zstd for each in fragments if each.zstd is not None]

    def end(self) -> bytes:
        """See `Packer`."""
        return b""


def _deflate(fragments: Sequence[Fragment]) -> None:
    if fragments:
        for fragment, deflated in zip(fragments, core.deflate([each.text for each in fragments]), strict=True):
            fragment.deflated = deflated


def _freeze(fragments: Sequence[Fragment]) -> None:
    if fragments:
        for fragment, frame in zip(fragments, core.zstd_frames([each.text for each in fragments]), strict=True):
            fragment.zstd = frame


def _open_deflated(fragment: Fragment) -> Deflated:
    """Return a fragment's form for OpenMetrics: packed anew where it is another, which is rare."""
    if fragment.open_text is None and fragment.deflated is not None:
        return fragment.deflated
    return core.deflate([fragment.text if fragment.open_text is None else fragment.open_text])[0]


def _open_frame(fragment: Fragment) -> bytes:
    if fragment.open_text is None and fragment.zstd is not None:
        return fragment.zstd
    return core.zstd_frames([fragment.text if fragment.open_text is None else fragment.open_text])[0]


def _batches(fragments: Sequence[Fragment]) -> Iterator[Sequence[Fragment]]:
    """Cut fragments into runs of about BATCH_BYTES of text."""
    begin = n_bytes = 0
    for number, each in enumerate(fragments, 1):
        n_bytes += len(each.text)
        if n_bytes >= BATCH_BYTES:
            yield fragments[begin:number]
            begin, n_bytes = number, 0
    if begin < len(fragments):
        yield fragments[begin:]
