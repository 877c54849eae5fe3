"""The frames between host and guest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.wire.agent import (
    PAYLOAD_BYTES_MAX,
    BrokenChannel,
    Decoder,
    Frame,
    Kind,
    encode,
    encode_credit,
    encode_data,
    encode_json,
    encode_size,
)

FRAMES = st.lists(st.builds(Frame, st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.binary(max_size=300)), max_size=8)


@given(FRAMES, st.lists(st.integers(1, 40), min_size=1))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames: list[Frame], cuts: list[int]) -> None:
    data = b"".join(encode(*frame) for frame in frames)
    decoder, found, turn = Decoder(), [], 0
    while data:
        size = cuts[turn % len(cuts)]
        found += decoder.feed(data[:size])
        data, turn = data[size:], turn + 1
    assert found == frames


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_a_broken_channel(data: bytes) -> None:
    decoder = Decoder()
    try:
        frames = decoder.feed(data)
    except BrokenChannel:
        return
    assert data.startswith(b"".join(encode(*frame) for frame in frames))


@pytest.mark.parametrize(
    "head",
    [b"\4\0\0\0\1", b"\6\0\1\0\1", b"\xff\xff\xff\xff\1", b"\5\0\0\0\0", b"\5\0\0\0\x12"],
    ids=["short", "long", "huge", "kind 0", "kind 18"],
)
def test_what_is_no_frame_breaks_the_channel(head: bytes) -> None:
    with pytest.raises(BrokenChannel):
        Decoder().feed(head + b"\0\0\0\0")


def test_data_is_cut_into_frames() -> None:
    data = bytes(range(256)) * 600
    frames = Decoder().feed(b"".join(encode_data(Kind.STDIN, 3, data)))
    assert [len(frame.payload) for frame in frames] == [PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX, len(data) - 2 * PAYLOAD_BYTES_MAX]
    assert b"".join(frame.payload for frame in frames) == data
    with pytest.raises(ValueError, match="not cut"):
        encode(Kind.STDIN, 3, data)


def test_the_payloads_with_a_form() -> None:
    assert encode_credit(2, 5) == b"\x09\0\0\0\x0b\2\0\0\0\5\0\0\0"
    assert encode_size(1, 24, 70_000) == b"\x09\0\0\0\x08\1\0\0\0\x18\0\xff\xff"
    (frame,) = Decoder().feed(encode_json(Kind.REQUEST, 4, {"op": "sync"}))
    assert frame.json() == {"op": "sync"}
    assert Frame(Kind.CREDIT, 1, b"\1\0\0\0").number() == 1


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff\xfe", b"\0" * 5])
def test_payloads_without_the_form_break_the_channel(payload: bytes) -> None:
    with pytest.raises(BrokenChannel):
        Frame(Kind.RESPONSE, 1, payload).json()
    with pytest.raises(BrokenChannel):
        Frame(Kind.CREDIT, 1, payload).number()
