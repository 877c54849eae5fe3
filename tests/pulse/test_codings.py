"""Pieces of compressed answers: joined in any order they are one stream that others' decoders read."""

import gzip
import io
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse.codings import BATCH_BYTES, KEPT, packer, prepare
from isopod.pulse.formats import Coding
from isopod.pulse.model import Fragment

TEXTS = st.lists(st.binary(max_size=300), max_size=8)


def made(texts: list[bytes]) -> list[Fragment]:
    return [Fragment("gauge", b"", text, 1) for text in texts]


def packed(coding: Coding, plain: bytes, fragments: list[Fragment], *, is_open: bool = False) -> bytes:
    pack = packer(coding)
    found = [pack.begin(), pack.plain(plain)]
    for batch in pack.fragments(fragments, is_open=is_open):
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
@given(TEXTS, st.binary(max_size=100))
def test_pieces_that_were_packed_alone_are_one_stream(coding: Coding, texts: list[bytes], plain: bytes) -> None:
    fragments = made(texts)
    for _ in range(2):
        assert unpacked(coding, packed(coding, plain, fragments)) == plain + b"".join(texts)
    assert unpacked(coding, packed(coding, plain, fragments[::-1])) == plain + b"".join(texts[::-1])


@pytest.mark.parametrize("n_bytes", [0, 1, 65_535, 65_536, 200_000])
def test_a_header_of_any_length_can_be_packed(n_bytes: int) -> None:
    for coding in KEPT:
        assert unpacked(coding, packed(coding, b"h" * n_bytes, [])) == b"h" * n_bytes


def test_a_gzip_answer_is_one_member_with_the_right_length_and_sum() -> None:
    texts = [b"abc" * n for n in range(1, 200)]
    data = packed("gzip", b"head\n", made(texts))
    decoder = zlib.decompressobj(31)
    assert decoder.decompress(data) == b"head\n" + b"".join(texts)
    assert decoder.eof and decoder.unused_data == b""
    damaged = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
    with pytest.raises(gzip.BadGzipFile, match="CRC"):
        gzip.decompress(damaged)


@pytest.mark.parametrize("coding", KEPT)
def test_packing_goes_on_in_batches_with_turns_between_them(coding: Coding) -> None:
    fragments = made([b"x" * (BATCH_BYTES // 2)] * 9)
    batches = list(packer(coding).fragments(fragments, is_open=False))
    assert [len(batch) for batch in batches] == [0, 0, 0, 0, 0, 9]
    again = list(packer(coding).fragments(fragments, is_open=False))
    assert [len(batch) for batch in again] == [9]


@pytest.mark.parametrize("coding", KEPT)
def test_what_was_prepared_is_not_packed_again(coding: Coding) -> None:
    fragments = made([b"a\n", b"b\n"])
    prepare(fragments, coding)
    before = [(each.deflated, each.zstd) for each in fragments]
    prepare(fragments, coding)
    assert unpacked(coding, packed(coding, b"", fragments)) == b"a\nb\n"
    assert all(each.deflated is deflated and each.zstd is frame for each, (deflated, frame) in zip(fragments, before, strict=True))
    prepare(fragments, "identity")


@pytest.mark.parametrize("coding", ["identity", *KEPT])
def test_forms_for_openmetrics_are_packed_where_they_differ(coding: Coding) -> None:
    fragments = [Fragment("counter", b"", b"a 1\n", 1, b"a 1 # {} 1\n"), Fragment("gauge", b"", b"b 1\n", 1)]
    for _ in range(2):
        assert unpacked(coding, packed(coding, b"", fragments, is_open=True)) == b"a 1 # {} 1\nb 1\n"
        assert unpacked(coding, packed(coding, b"", fragments)) == b"a 1\nb 1\n"
