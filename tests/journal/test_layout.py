"""The bytes of a segment: checksums by their published vectors, and that what is packed is what is parsed, at any place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.journal import layout
from isopod.journal.crc import crc32c
from isopod.journal.layout import (
    GROUP_HEADER_BYTES,
    SECTOR_BYTES,
    SEGMENT_HEADER_BYTES,
    BadHeader,
    BadRecordAt,
    GroupHeader,
    Record,
    SegmentHeader,
)

HEADER = SegmentHeader(bytes(range(16)), "test 1", 7, 6, 4096, 1_700_000_000_000_000_000)
SEED = layout.seed_of(HEADER.journal_id)
BATCHES = st.lists(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=700)), min_size=1, max_size=4), min_size=1, max_size=4)


def reference(data: bytes) -> int:
    """CRC-32C by its definition, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_published_vectors() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


@given(st.binary(max_size=300), st.integers(0, 300))
def test_the_checksum_is_the_definitions_and_can_go_on(data: bytes, cut: int) -> None:
    assert crc32c(data) == reference(data)
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)
    assert crc32c(memoryview(bytearray(data))) == crc32c(data)


def pack(batches: list[list[tuple[int, bytes]]], offset: int, lsn: int) -> tuple[bytes, list[Record]]:
    records: list[Record] = []
    packed = []
    for batch in batches:
        packed.append(layout.pack_batch(batch, lsn, SEED))
        records += [Record(lsn + n, kind, payload) for n, (kind, payload) in enumerate(batch)]
        lsn += len(batch)
    header = GroupHeader(0, len(records), records[0].lsn, 0, 0)
    return layout.pack_whole_group(packed, offset, header, seed=SEED, segment_lsn=7), records


@given(BATCHES, st.integers(SEGMENT_HEADER_BYTES, 10_000), st.integers(1, 1 << 60))
def test_a_group_is_parsed_as_it_was_packed(batches: list[list[tuple[int, bytes]]], offset: int, lsn: int) -> None:
    data, records = pack(batches, offset, lsn)
    header = layout.parse_group(b"xx" + data, 2, offset, seed=SEED, segment_lsn=7)
    assert header is not None
    assert header == GroupHeader(len(data) - GROUP_HEADER_BYTES, len(records), lsn, layout.count_zero_sectors(data, offset), 0)
    found = list(layout.parse_records(memoryview(data)[GROUP_HEADER_BYTES:], header, offset + GROUP_HEADER_BYTES, SEED))
    assert [parsed.record for parsed in found] == records
    assert [parsed.record.lsn for parsed in found if parsed.ends_batch][-1] == records[-1].lsn
    assert sum(parsed.ends_batch for parsed in found) == len(batches)
    for wrong in ({"offset": offset + 1}, {"segment_lsn": 8}, {"seed": SEED ^ 1}):
        arguments = {"offset": offset, "segment_lsn": 7, "seed": SEED} | wrong
        assert layout.parse_group(data, 0, arguments["offset"], seed=arguments["seed"], segment_lsn=arguments["segment_lsn"]) is None


@given(BATCHES, st.data())
def test_any_changed_byte_of_a_group_is_seen(batches: list[list[tuple[int, bytes]]], draw: st.DataObject) -> None:
    data, records = pack(batches, 600, 9)
    changed = bytearray(data)
    changed[draw.draw(st.integers(0, len(data) - 1))] ^= draw.draw(st.integers(1, 255))
    header = layout.parse_group(changed, 0, 600, seed=SEED, segment_lsn=7)
    if header is None:
        return
    found: list[Record] = []
    with pytest.raises(BadRecordAt) as caught:
        for parsed in layout.parse_records(memoryview(bytes(changed))[GROUP_HEADER_BYTES:], header, 632, SEED):
            found.append(parsed.record)
    assert found == records[: len(found)]
    assert caught.value.lsn == records[len(found)].lsn


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1200)), max_size=8), st.integers(0, 2000))
def test_zero_sectors_are_counted(parts: list[tuple[bool, int]], offset: int) -> None:
    data = b"".join(bytes(n) if is_zero else b"\x01" * n for is_zero, n in parts)
    expected = 0
    at = offset
    while at < offset + len(data):
        end = min(offset + len(data), (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
        expected += not any(data[at - offset : end - offset])
        at = end
    assert layout.count_zero_sectors(data, offset) == expected


def test_a_segments_header() -> None:
    data = layout.pack_segment_header(HEADER)
    assert len(data) == SEGMENT_HEADER_BYTES and layout.parse_segment_header(data) == HEADER
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x10
        with pytest.raises(BadHeader) as caught:
            layout.parse_segment_header(bytes(changed))
        assert caught.value.is_foreign == (at < 8)
    with pytest.raises(BadHeader, match="shorter"):
        layout.parse_segment_header(data[:-1])
