"""The bytes of a segment file: headers, groups, records. Pure functions.

A segment is a file of fixed size, all zeros before it is used::

    segment header (512 bytes) | group | group | ... | zeros

    group  = header (32 bytes) | record | record | ...       one durable write
    record = header (20 bytes) | payload

- A **record** has a sequence number (LSN), one more than the record before it, a kind (the user's) and a payload. Its CRC-32C covers all
  of it and begins with the journal's seed, so that a record of another journal is not taken for one of this.
- A **batch** is what the user appended at once: consecutive records, the last one marked. Recovery takes a batch whole or not at all.
- A **group** is what one durable write took along: whole batches. Group n+1 is written after group n was durable. Its header has a CRC
  of its own, which covers its place too: a misdirected write is not taken for one that belongs there.
- A group without records that says `SEALED` ends a segment: nothing follows. One that says `CLOSED` was written by an orderly end.

**Torn or damaged?** A crash leaves of the last group any of its 512-byte sectors old (zeros: space is never used twice) or new. So a
group that does not check is a torn tail only if it has more zero sectors than it was written with (its header counts those), or if its
header's own sector is missing, and if nothing that was written later follows. Anything else is damage: a disk does not tear a write by
changing a byte. What cannot be told apart: a sector of the last group, or all of it, that turned to zeros long after it was durable.

All numbers are little-endian. What changes here raises `VERSION`.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple

from isopod.journal.crc import crc32c

Data = bytes | bytearray | memoryview

VERSION: Final = 1
MAGIC: Final = b"isopodwl"
GROUP_MAGIC: Final = b"\xf5gRp"
SECTOR_BYTES: Final = 512
SEGMENT_HEADER_BYTES: Final = 512
GROUP_HEADER_BYTES: Final = 32
RECORD_HEADER_BYTES: Final = 20
ID_BYTES: Final = 16
NAME_BYTES_MAX: Final = 64

BATCH_END: Final = 1
"""A record's flag: the last one of its batch."""
SEALED: Final = 1
"""A group's flag: the segment ends here."""
CLOSED: Final = 2
"""A group's flag: the journal was closed here, everything before it was durable."""
SKIPS: Final = 4
"""A group's flag: the LSNs before it were given away for batches that were refused (the disk was full), and stay unused."""

_SEGMENT = Struct("<8sHHI16sQQQQ64s")
_CRC = Struct("<I")
_GROUP = Struct("<4sIIIQII")
_GROUP_REST = Struct("<IIQII")
_PLACE = Struct("<QQ")
_RECORD = Struct("<IIQBBH")
_RECORD_REST = Struct("<IQBBH")
_ZEROS = bytes(SECTOR_BYTES)
_NO_HEADER = b"\xff" * GROUP_HEADER_BYTES


class SegmentHeader(NamedTuple):
    """What a segment says about itself."""

    journal_id: bytes
    """16 bytes by chance; every file of a journal carries them."""
    name: str
    """What the journal holds, in its user's words: "isopod raft log 1"."""
    first_lsn: int
    """The LSN of its first record."""
    floor_lsn: int
    """What was compacted when the segment was begun; the manifest may know more."""
    segment_bytes: int
    """How long the file is."""
    created_at_ns: int
    """Wall time."""


class GroupHeader(NamedTuple):
    """What a group says about itself."""

    n_bytes: int
    """Of its records."""
    n_records: int
    first_lsn: int
    """Of its first record, or of the next one if it has none."""
    n_zero_sectors: int
    """How many of its sectors (their parts that belong to it) are all zeros although they were written."""
    flags: int


class Record(NamedTuple):
    """One record."""

    lsn: int
    kind: int
    """0..255, the user's."""
    payload: bytes


class BadHeader(Exception):
    """A segment header that cannot be used. `is_foreign`: it may well be sound, but it is not ours to read."""

    def __init__(self, why: str, *, is_foreign: bool) -> None:
        super().__init__(why)
        self.why = why
        self.is_foreign = is_foreign


def seed_of(journal_id: bytes) -> int:
    """Return what the checksums of a journal begin with."""
    return crc32c(journal_id)


def pack_segment_header(header: SegmentHeader) -> bytes:
    """Return the first 512 bytes of a segment."""
    name = header.name.encode()
    fixed = _SEGMENT.pack(
        MAGIC,
        VERSION,
        0,
        SEGMENT_HEADER_BYTES,
        header.journal_id,
        header.first_lsn,
        header.floor_lsn,
        header.segment_bytes,
        header.created_at_ns,
        name,
    )
    body = fixed + bytes(SEGMENT_HEADER_BYTES - 4 - len(fixed))
    return body + _CRC.pack(crc32c(body))


def parse_segment_header(data: bytes) -> SegmentHeader:
    """Return what the first 512 bytes of a segment say.

    Raises:
        BadHeader: They are damaged, another program's, or a newer version's.
    """
    if len(data) < SEGMENT_HEADER_BYTES:
        raise BadHeader("shorter than a segment's header", is_foreign=False)
    body = data[: SEGMENT_HEADER_BYTES - 4]
    (found,) = _CRC.unpack_from(data, SEGMENT_HEADER_BYTES - 4)
    if crc32c(body) != found:
        is_foreign = data[: len(MAGIC)] != MAGIC
        raise BadHeader("not a segment of a journal" if is_foreign else "the segment's header is damaged", is_foreign=is_foreign)
    magic, version, _, _, journal_id, first_lsn, floor_lsn, segment_bytes, created_at_ns, name = _SEGMENT.unpack_from(data)
    if magic != MAGIC:
        raise BadHeader("not a segment of a journal", is_foreign=True)
    if version != VERSION:
        raise BadHeader(f"journal version {version}; this isopod reads {VERSION}", is_foreign=True)
    return SegmentHeader(journal_id, name.rstrip(b"\0").decode("utf-8", "replace"), first_lsn, floor_lsn, segment_bytes, created_at_ns)


def pack_group(offset: int, header: GroupHeader, *, seed: int, segment_lsn: int) -> bytes:
    """Return a group's header.

    Args:
        offset: Where it will be in the file.
        header: What it says.
        seed: The journal's.
        segment_lsn: The segment's first LSN.
    """
    rest = _GROUP_REST.pack(*header)
    return GROUP_MAGIC + _CRC.pack(_group_crc(rest, offset, seed=seed, segment_lsn=segment_lsn)) + rest


def parse_group(data: Data, at: int, offset: int, *, seed: int, segment_lsn: int) -> GroupHeader | None:
    """Return the group header at `data[at:]`, None if there is no sound one.

    Args:
        data: Bytes of the file.
        at: Where in them.
        offset: Where that is in the file.
        seed: The journal's.
        segment_lsn: The segment's first LSN.
    """
    if at + GROUP_HEADER_BYTES > len(data):
        return None
    magic, found, *fields = _GROUP.unpack_from(data, at)
    if magic != GROUP_MAGIC:
        return None
    if _group_crc(bytes(data[at + 8 : at + GROUP_HEADER_BYTES]), offset, seed=seed, segment_lsn=segment_lsn) != found:
        return None
    return GroupHeader(*fields)


def pack_batch(records: Sequence[tuple[int, bytes]], first_lsn: int, seed: int) -> bytes:
    """Return the records of one batch as they are stored."""
    pieces: list[bytes] = []
    lsn = first_lsn
    last = first_lsn + len(records) - 1
    for kind, payload in records:
        rest = _RECORD_REST.pack(len(payload), lsn, kind, BATCH_END if lsn == last else 0, 0)
        pieces += (_CRC.pack(crc32c(payload, crc32c(rest, seed))), rest, payload)
        lsn += 1
    return b"".join(pieces)


class Parsed(NamedTuple):
    """A record found in a group."""

    record: Record
    offset: int
    """In the file."""
    ends_batch: bool


class BadRecordAt(Exception):
    """A group's content that does not check.

    Args:
        offset: Where in the file.
        lsn: The record expected there.
        why: What is wrong.
    """

    def __init__(self, offset: int, lsn: int, why: str) -> None:
        super().__init__(why)
        self.offset = offset
        self.lsn = lsn
        self.why = why


def parse_records(body: memoryview, header: GroupHeader, offset: int, seed: int) -> Iterator[Parsed]:
    """Yield the records of a group.

    Args:
        body: The bytes after its header.
        header: What its header says.
        offset: Where `body` is in the file.
        seed: The journal's.

    Raises:
        BadRecordAt: One does not check, after the sound ones before it.
    """
    at = 0
    lsn = header.first_lsn
    end = len(body)
    for index in range(header.n_records):
        if at + RECORD_HEADER_BYTES > end:
            raise BadRecordAt(offset + at, lsn, "a record's header is cut off by the end of its group")
        crc, n_bytes, found_lsn, kind, flags, reserved = _RECORD.unpack_from(body, at)
        stop = at + RECORD_HEADER_BYTES + n_bytes
        if stop > end:
            raise BadRecordAt(offset + at, lsn, "a record is longer than its group")
        if crc32c(body[at + 4 : stop], seed) != crc:
            raise BadRecordAt(offset + at, lsn, "a record's checksum does not fit")
        if found_lsn != lsn or reserved or flags & ~BATCH_END:
            raise BadRecordAt(offset + at, lsn, f"a record of lsn {found_lsn} in the place of {lsn}")
        ends_batch = bool(flags & BATCH_END)
        if not ends_batch and index == header.n_records - 1:
            raise BadRecordAt(offset + at, lsn, "a group ends inside a batch")
        yield Parsed(Record(lsn, kind, bytes(body[at + RECORD_HEADER_BYTES : stop])), offset + at, ends_batch)
        at = stop
        lsn += 1
    if at != end:
        raise BadRecordAt(offset + at, lsn, "a group is longer than its records")


def pack_whole_group(batches: Sequence[bytes], offset: int, header: GroupHeader, *, seed: int, segment_lsn: int) -> bytes:
    """Return a group with its records; its length and its zero sectors are found out here.

    Args:
        batches: Packed batches in order.
        offset: Where the group will be in the file.
        header: What its header says else.
        seed: The journal's.
        segment_lsn: The segment's first LSN.
    """
    body = b"".join((_NO_HEADER, *batches))
    full = header._replace(n_bytes=len(body) - GROUP_HEADER_BYTES, n_zero_sectors=count_zero_sectors(body, offset))
    return b"".join((pack_group(offset, full, seed=seed, segment_lsn=segment_lsn), *batches))


def count_zero_sectors(data: bytes, offset: int) -> int:
    """Return how many sectors, or parts of sectors at the two ends, of bytes that lie at `offset` in a file are all zeros."""
    n_bytes = len(data)
    first = min(SECTOR_BYTES - offset % SECTOR_BYTES, n_bytes)
    last = max(first, n_bytes - (offset + n_bytes) % SECTOR_BYTES)
    n_zero = int(n_bytes > 0 and not any_but_zeros(data[:first])) + int(last < n_bytes and not any_but_zeros(data[last:]))
    if data.find(_ZEROS, first, last) >= 0:  # rare, and told in a fifth of the time of looking at each sector
        n_zero += sum(data.startswith(_ZEROS, start) for start in range(first, last, SECTOR_BYTES))
    return n_zero


def any_but_zeros(data: bytes) -> bool:
    """Return whether there is a byte that is not zero. Much faster than `any`."""
    return data.count(0) != len(data)


def _group_crc(rest: bytes, offset: int, *, seed: int, segment_lsn: int) -> int:
    return crc32c(rest, crc32c(_PLACE.pack(segment_lsn, offset), seed))
