"""The RPC stream's bytes: every frame both ways, every cut, and what is refused."""

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.wire import frames as f
from isopod.wire import minipack
from isopod.wire.decoder import StreamDecoder
from tests.wire.strategies import from_type

HELLO = f.encode_hello(f.Hello((1, 1), "test", "raft"))
FRAMES = [f.Request, f.Reply, f.Error, f.Cancel, f.Item, f.End, f.Credit, f.GoAway, f.Ping, f.Pong, f.Notify]
ANY_FRAME = st.one_of(
    st.builds(f.Request, from_type(f.CallId), st.text(max_size=9), st.none() | st.integers(0, 1 << 53), from_type(object)),
    st.builds(f.Reply, from_type(f.CallId), from_type(object), st.integers(0, 1 << 60)),
    st.builds(f.Error, from_type(f.CallId), st.text(max_size=9), st.text(max_size=9), st.text(max_size=9), st.integers(0, 255)),
    st.builds(f.Cancel, from_type(f.CallId)),
    st.builds(f.Item, from_type(f.CallId), from_type(object)),
    st.builds(f.End, from_type(f.CallId)),
    st.builds(f.Credit, from_type(f.CallId), from_type(f.Count)),
    st.builds(f.GoAway, from_type(f.CallId)),
    st.builds(f.Ping, from_type(f.Token)),
    st.builds(f.Pong, from_type(f.Token)),
    st.builds(f.Notify, st.text(max_size=9), st.none() | st.integers(0, 1 << 53), from_type(object)),
)


def plain(frame: object) -> object:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(frame))


def feed(stream: bytes, lengths: list[int]) -> tuple[StreamDecoder, list[tuple[f.Frame, int]]]:
    """Feed a stream in pieces of those lengths, then the rest."""
    decoder = StreamDecoder()
    frames = []
    offset = 0
    for length in [*lengths, len(stream)]:
        frames += decoder.feed(stream[offset : offset + length])
        offset += length
    return decoder, frames


@pytest.mark.row("R12")
@settings(deadline=None)
@given(sent=st.lists(ANY_FRAME, max_size=8), lengths=st.lists(st.integers(0, 30), max_size=40))
def test_frames_survive_any_cut(sent: list[f.OutFrame], lengths: list[int]) -> None:
    stream = HELLO + b"".join(f.encode_frame(frame) for frame in sent)
    for pieces in (lengths, [1] * len(stream), []):
        decoder, received = feed(stream, pieces)
        assert decoder.hello == f.Hello((1, 1), "test", "raft")
        assert [type(frame) for frame, _ in received] == [type(frame) for frame in sent]
        assert [plain(frame) for frame, _ in received] == [plain(frame) for frame in sent]
        assert sum(n_bytes for _, n_bytes in received) == len(stream) - len(HELLO)


def test_the_kinds_on_the_wire_are_those_of_the_protocol() -> None:
    arrays: dict[type[msgspec.Struct], tuple[object, list[object]]] = {
        f.Request: (f.Request(1, "a.b", None, {"x": 1}), [0, 1, "a.b", None, {"x": 1}]),
        f.Reply: (f.Reply(1, {"x": 1}, 9), [1, 1, {"x": 1}, 9]),
        f.Error: (f.Error(1, "bug", "m", "h", 70), [2, 1, "bug", "m", "h", 70, None]),
        f.Cancel: (f.Cancel(3), [3, 3]),
        f.Item: (f.Item(1, b"x"), [4, 1, b"x"]),
        f.End: (f.End(1), [5, 1]),
        f.Credit: (f.Credit(1, 5), [6, 1, 5]),
        f.GoAway: (f.GoAway(4), [7, 4]),
        f.Ping: (f.Ping(8), [8, 8]),
        f.Pong: (f.Pong(9), [9, 9]),
        f.Notify: (f.Notify("a.b", 5, {"x": 1}), [10, "a.b", 5, {"x": 1}]),
    }
    assert list(arrays) == FRAMES
    for frame, array in arrays.values():
        encoded = f.encode_frame(frame)  # type: ignore[arg-type]  # mixed on purpose
        assert int.from_bytes(encoded[:4], "little") == len(encoded) - 4
        assert minipack.decode(encoded[4:]) == array


def test_the_hello_is_a_map_behind_its_magic() -> None:
    assert HELLO[:4] == b"ISO1"
    assert int.from_bytes(HELLO[4:8], "little") == len(HELLO) - 8
    hello = {"versions": [1, 1], "peer": "test", "group": "raft", "features": [], "heartbeat_ms": 0, "table": ""}
    assert minipack.decode(HELLO[8:]) == hello


def test_both_grow_by_what_the_other_ignores() -> None:
    body = minipack.encode({"versions": [1, 4], "peer": "new", "compression": ["zstd"], "deep": {"a": [1, {"b": 2}]}})
    frame = minipack.encode([8, 5, "a later element"])
    stream = b"ISO1" + len(body).to_bytes(4, "little") + body + len(frame).to_bytes(4, "little") + frame
    decoder, received = feed(stream, [])
    assert decoder.hello == f.Hello((1, 4), "new")
    assert received == [(f.Ping(5), len(frame) + 4)]


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP",
        b"ISO2" + bytes(4),
        b"I" + b"X",
        b"ISO1" + (f.HELLO_BYTES_MAX + 1).to_bytes(4, "little"),
        b"ISO1" + (1).to_bytes(4, "little") + b"\xc1",
        b"ISO1" + (1).to_bytes(4, "little") + b"\x80",
        f.encode_hello(f.Hello((3, 2))),
        HELLO + (f.FRAME_BYTES_MAX + 1).to_bytes(4, "little"),
        HELLO + bytes(4),
        HELLO + (3).to_bytes(4, "little") + b"\x92\x03\xff",
        HELLO + (3).to_bytes(4, "little") + b"\x92\x0a\x01",
        HELLO + (2).to_bytes(4, "little") + b"\x91\x03",
        HELLO + (4).to_bytes(4, "little") + b"\x92\x03\x01\x01",
        HELLO + (5).to_bytes(4, "little") + b"\xdd\xff\xff\xff\xff",
        HELLO + (50_000).to_bytes(4, "little") + b"\x93\x04\x01" + b"\x91" * 49_997,
        HELLO + (6).to_bytes(4, "little") + b"\x93\x06\x01\xd1\xff\xff",
    ],
)
@pytest.mark.parametrize("in_bytes", [False, True])
def test_what_is_not_the_protocol_is_refused(stream: bytes, in_bytes: bool) -> None:
    with pytest.raises(f.WireError) as caught:
        feed(stream, [1] * len(stream) if in_bytes else [])
    assert caught.value.why


@settings(deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_random_bytes_end_in_frames_or_in_wire_error(data: bytes, with_hello: bool) -> None:
    framed = (len(data)).to_bytes(4, "little") + data
    for stream in (data, HELLO + data, HELLO + framed):
        with suppress(f.WireError):
            feed(stream, [3, 5])


@settings(deadline=None)
@given(ANY_FRAME, st.integers(0, 60), st.integers(0, 255))
def test_a_changed_byte_ends_in_frames_or_in_wire_error(frame: f.OutFrame, at: int, value: int) -> None:
    data = bytearray(f.encode_frame(frame))
    data[at % len(data)] = value
    with suppress(f.WireError):
        feed(HELLO + bytes(data), [])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(f.TooLarge):
        f.encode_frame(f.Item(1, bytes(f.FRAME_BYTES_MAX)))
    with pytest.raises(f.WireError, match="cannot encode a Item frame"):
        f.encode_frame(f.Item(1, object()))
    with pytest.raises(f.WireError, match="cannot encode a frame of kind 4"):
        f.encode_frame((4, 1, 1 << 70))
    overhead = len(f.encode_frame(f.Item(1, bytes(1 << 19)))) - 4 - (1 << 19)
    assert len(f.encode_frame(f.Item(1, bytes(f.FRAME_BYTES_MAX - overhead)))) == 4 + f.FRAME_BYTES_MAX
    with pytest.raises(f.TooLarge):
        f.encode_frame(f.Item(1, bytes(f.FRAME_BYTES_MAX - overhead + 1)))
    with pytest.raises(f.TooLarge):
        f.encode_hello(f.Hello((1, 1), "x" * f.HELLO_BYTES_MAX))
    with pytest.raises(f.TooLarge):
        f.raw_head((4, 1, None), f.FRAME_BYTES_MAX)
    with pytest.raises(f.TooLarge):
        f.raw_head((0, 1, "x" * (1 << 16), None, None), 9)


def test_a_large_frame_leaves_no_memory_behind() -> None:
    decoder = StreamDecoder()
    decoder.feed(HELLO)
    large = f.encode_frame(f.Item(1, bytes(1 << 20 >> 1)))
    for start in range(0, len(large), 4096):
        decoder.feed(large[start : start + 4096])
    assert decoder._data == b""


@pytest.mark.parametrize(
    "ours,theirs,common",
    [((1, 1), (1, 1), 1), ((1, 3), (2, 9), 3), ((2, 9), (1, 3), 3), ((1, 2), (3, 4), None), ((3, 4), (1, 2), None), ((1, 9), (4, 4), 4)],
)
def test_the_highest_common_version_is_chosen(ours: tuple[int, int], theirs: tuple[int, int], common: int | None) -> None:
    assert f.common_version(ours, theirs) == common
