"""Pieces of compressed answers: joined in any order they are one stream that others' decoders read."""

import gzip
import io
import random
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse import core
from isopod.pulse.codings import BATCH_BYTES, GATHERED_BYTES, KEPT, packer, prepare
from isopod.pulse.formats import Coding
from isopod.pulse.merge import Part, Run
from isopod.pulse.model import Fragment, Row

TEXTS = st.lists(st.binary(max_size=300), max_size=8)


def made(texts: list[bytes]) -> list[Fragment]:
    return [Fragment("gauge", b"", text, 1) for text in texts]


def rows(texts: list[bytes]) -> Run:
    """Return texts as the second family of as many sandboxes."""
    return Run([Row((Fragment("gauge", b"", b"other", 1), each)) for each in made(texts)], 1)


def packed(coding: Coding, plain: bytes, parts: list[Part], *, is_open: bool = False) -> bytes:
    pack = packer(coding)
    found = [pack.begin(), pack.plain(plain)]
    for batch in pack.family(parts, is_open=is_open):
        found += batch
    return b"".join([*found, pack.end()])


def unpacked(coding: Coding, data: bytes) -> bytes:
    if coding == "gzip":
        return gzip.decompress(data)
    if coding == "zstd":
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
            return reader.read()
    return data


@pytest.mark.parametrize("coding", ["identity", "gzip", "zstd"])
@given(TEXTS, TEXTS, st.binary(max_size=100))
def test_pieces_that_were_packed_alone_are_one_stream(coding: Coding, texts: list[bytes], others: list[bytes], plain: bytes) -> None:
    run, loose = rows(texts), made(others)
    for _ in range(2):
        assert unpacked(coding, packed(coding, plain, [run, *loose])) == plain + b"".join(texts + others)
    backwards = Run(run.rows[::-1], 1)
    parts: list[Part] = [*loose[:1], backwards, *loose[1:], Run(run.rows, 0)]
    expected = b"".join([plain, *others[:1], *texts[::-1], *others[1:], b"other" * len(texts)])
    assert unpacked(coding, packed(coding, plain, parts)) == expected


@pytest.mark.parametrize("n_bytes", [0, 1, 65_535, 65_536, 200_000])
def test_a_header_of_any_length_can_be_packed(n_bytes: int) -> None:
    for coding in KEPT:
        assert unpacked(coding, packed(coding, b"h" * n_bytes, [])) == b"h" * n_bytes


def test_a_gzip_answer_is_one_member_with_the_right_length_and_sum() -> None:
    texts = [b"abc" * n for n in range(1, 200)]
    data = packed("gzip", b"head\n", [rows(texts), *made(texts)])
    decoder = zlib.decompressobj(31)
    assert decoder.decompress(data) == b"head\n" + b"".join(texts) * 2
    assert decoder.eof and decoder.unused_data == b""
    damaged = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
    with pytest.raises(gzip.BadGzipFile, match="CRC"):
        gzip.decompress(damaged)


@pytest.mark.parametrize("coding", KEPT)
def test_packing_goes_on_sandbox_by_sandbox_with_turns_between_them(coding: Coding) -> None:
    run = rows([b"x" * (BATCH_BYTES // 2)] * 9)
    assert [len(batch) for batch in packer(coding).family([run], is_open=False)] == [0] * 9 + [1]
    assert [len(batch) for batch in packer(coding).family([run], is_open=False)] == [1]
    loose = made([b"x" * (BATCH_BYTES // 2)] * 9)
    assert [len(batch) for batch in packer(coding).family(loose, is_open=False)] == [1] * 5


@pytest.mark.parametrize("coding", KEPT)
def test_a_large_family_is_joined_some_at_a_time(coding: Coding) -> None:
    texts = [random.Random(number).randbytes(GATHERED_BYTES // 4) for number in range(9)]
    run = rows(texts)
    found = [batch[0] for batch in packer(coding).family([run], is_open=False) if batch]
    assert len(found) == 3
    assert all(len(each) < 1.3 * GATHERED_BYTES for each in found)
    assert unpacked(coding, packed(coding, b"", [run])) == b"".join(texts)


@pytest.mark.parametrize("coding", KEPT)
def test_what_was_prepared_is_not_packed_again(coding: Coding) -> None:
    run = rows([b"a\n", b"b\n"])
    for row in run.rows:
        prepare(row, coding)
    before = [row.packs[coding] for row in run.rows]
    for row in run.rows:
        prepare(row, coding)
    assert unpacked(coding, packed(coding, b"", [run])) == b"a\nb\n"
    assert all(row.packs[coding] is pack for row, pack in zip(run.rows, before, strict=True))
    prepare(run.rows[0], "identity")
    prepare(Row(()), coding)
    assert list(run.rows[0].packs) == [coding]


@pytest.mark.parametrize("coding", KEPT)
def test_what_a_row_has_of_the_one_before_is_not_packed_again(coding: Coding) -> None:
    a, b, c, other = made([b"a" * 50, b"b" * 50, b"c" * 50, b"B" * 50])
    before = Row((a, b, c))
    prepare(before, coding)
    damaged = before.packs[coding] = before.packs[coding][:-1] + b"?"  # shows that c is taken from here
    for fragments in ((a, other, c), (c,), (other, c, a, b)):
        row = Row(fragments)
        prepare(row, coding, before)
        column = fragments.index(c)
        kept, *_ = core.gather([row.packs[coding]], column, 0, 1)
        assert kept == core.gather([damaged], 2, 0, 1)[0]
        runs: list[Part] = [Run([row], number) for number in range(len(fragments)) if number != column]
        assert unpacked(coding, packed(coding, b"", runs)) == b"".join([each.text for each in fragments if each is not c])


@pytest.mark.parametrize("coding", ["identity", *KEPT])
def test_forms_for_openmetrics_are_packed_where_they_differ(coding: Coding) -> None:
    fragments = [Fragment("counter", b"", b"a 1\n", 1, b"a 1 # {} 1\n"), Fragment("gauge", b"", b"b 1\n", 1)]
    run = Run([Row((each,)) for each in (*fragments, fragments[1])], 0)
    for _ in range(2):
        assert unpacked(coding, packed(coding, b"", [run, *fragments], is_open=True)) == b"a 1 # {} 1\nb 1\nb 1\na 1 # {} 1\nb 1\n"
        assert unpacked(coding, packed(coding, b"", [run, *fragments])) == b"a 1\nb 1\nb 1\na 1\nb 1\n"
