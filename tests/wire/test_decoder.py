"""Streams with features: raw bodies, compressed frames, lines of JSON; every cut of them, and what is refused."""

from contextlib import suppress

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.wire import frames as f
from isopod.wire.compression import Zstd
from isopod.wire.decoder import TURN_FRAMES, StreamDecoder

HELLO = f.encode_hello(f.Hello((1, 1), "test"))
JSON_HELLO = f.encode_hello(f.Hello((1, 1), "test"), "json")
LIMIT = f.FRAME_BYTES_MAX
CUTS = st.lists(st.integers(0, 40), max_size=30)


def raw(frame: tuple[object, ...], body: bytes) -> bytes:
    head = f.raw_head(frame, len(body))
    return f.pack_length(len(head) + len(body) | f.RAW_FLAG) + head + body


def compressed(payload: bytes, flags: int = 0) -> bytes:
    packed = zstandard.ZstdCompressor().compress(payload)
    return f.pack_length(len(packed) | f.ZSTD_FLAG | flags) + packed


def decode(stream: bytes, lengths: list[int], *, hello: bytes = HELLO) -> list[tuple[f.Frame, int]]:
    decoder = StreamDecoder()
    frames = decoder.feed(hello)
    decoder.allow(raw=True, zstd=Zstd())
    offset = 0
    for length in [*lengths, len(stream)]:
        frames += decoder.feed(stream[offset : offset + length])
        offset += length
    return frames


def plain(frame: f.Frame) -> object:
    if isinstance(frame, f.RawFrame):
        return plain(frame.head), bytes(frame.body)
    return msgspec.to_builtins(frame, builtin_types=(bytes, msgspec.Raw))


@settings(deadline=None)
@given(lengths=CUTS, body=st.binary(max_size=300))
def test_raw_and_compressed_frames_survive_any_cut(lengths: list[int], body: bytes) -> None:
    item = f.encode_frame(f.Item(7, body))
    head = f.raw_head((f.ITEM, 8, None), len(body))
    stream = raw((f.REQUEST, 1, "a.b", 5, None), body) + item + compressed(item[4:]) + compressed(head + body, f.RAW_FLAG)
    for pieces in (lengths, [1] * len(stream), []):
        request, direct, unpacked, both = decode(stream, pieces)
        assert isinstance(request[0], f.RawFrame)
        assert isinstance(request[0].head, f.Request)
        assert (request[0].head.id, request[0].head.method, bytes(request[0].body)) == (1, "a.b", body)
        assert plain(direct[0]) == plain(unpacked[0])
        assert direct[1] == unpacked[1] == len(item), "flow control counts frames before compression"
        assert isinstance(both[0], f.RawFrame)
        assert bytes(both[0].body) == body
        assert both[1] == 4 + len(head) + len(body)


@settings(deadline=None)
@given(lengths=CUTS, texts=st.lists(st.text(max_size=20), max_size=6))
def test_lines_of_json_survive_any_cut(lengths: list[int], texts: list[str]) -> None:
    frames: list[f.OutFrame] = [*(f.Request[object](1, "a.b", None, {"text": text}) for text in texts), f.Ping(3), f.End(1)]
    lines = [f.encode_json(frame) for frame in frames]
    stream = b"\n \r\n".join([*lines, b""])
    for pieces in (lengths, [1] * len(stream), []):
        received = decode(stream, pieces, hello=JSON_HELLO)
        assert [type(frame) for frame, _ in received] == [type(frame) for frame in frames]
        assert [msgspec.json.decode(frame.body)["text"] for frame, _ in received if isinstance(frame, f.Request)] == texts
        assert [n_bytes for _, n_bytes in received] == [len(line) for line in lines]


def test_a_hello_in_json_decides_the_encoding() -> None:
    decoder = StreamDecoder()
    stream = b'{"versions": [1, 4], "later": {"a": [1]}}\n[8, 5, "a later element"]\n'
    assert decoder.feed(stream) == [(f.Ping(5), 26)]
    assert decoder.encoding == "json"
    assert decoder.hello == f.Hello((1, 4))


BOMB = zstandard.ZstdCompressor().compress(bytes(LIMIT + 1))
NO_SIZE = zstandard.ZstdCompressor(write_content_size=False).compress(f.encode_frame(f.Ping(1))[4:])


@pytest.mark.parametrize(
    "stream,why",
    [
        (f.pack_length(len(BOMB) | f.ZSTD_FLAG) + BOMB, "1048577 bytes is over"),
        (f.pack_length(len(NO_SIZE) | f.ZSTD_FLAG) + NO_SIZE, "unknown size is over"),
        (f.pack_length(5 | f.ZSTD_FLAG) + b"nozst", "damaged"),
        (compressed(f.encode_frame(f.Ping(1))[4:])[:4] + b"\x28\xb5\x2f\xfd" + bytes(20), "damaged|not a frame|over"),
        (f.pack_length(LIMIT + 1 | f.RAW_FLAG), "over 1048576"),
        (f.pack_length(f.LENGTH_MASK | f.ZSTD_FLAG), "over 1048576"),
        (f.pack_length(1 | f.RAW_FLAG) + b"x", "without its head"),
        (f.pack_length(2 | f.RAW_FLAG) + b"\x05\x00", "longer than the frame"),
        (raw((8, 1), b"body"), "PING has no body"),
        (f.pack_length(4 | f.RAW_FLAG) + b"\x02\x00zz", "not a frame"),
    ],
    ids=["bomb", "no size", "no zstd", "broken zstd", "raw too long", "zstd too long", "no head", "long head", "ping", "head"],
)
@pytest.mark.parametrize("in_bytes", [False, True])
def test_what_is_hostile_is_refused(stream: bytes, why: str, in_bytes: bool) -> None:
    with pytest.raises(f.WireError, match=why):
        decode(stream, [1] * len(stream) if in_bytes else [])


def test_a_content_size_that_lies_is_refused() -> None:
    honest = zstandard.ZstdCompressor().compress(b"x" * 1000)
    at = honest.index((1000 - 256).to_bytes(2, "little"))
    lying = honest[:at] + (10).to_bytes(2, "little") + honest[at + 2 :]
    assert zstandard.get_frame_parameters(lying).content_size == 266
    with pytest.raises(f.WireError, match="damaged"):
        decode(f.pack_length(len(lying) | f.ZSTD_FLAG) + lying, [])


@pytest.mark.parametrize("stream", [raw((f.ITEM, 1, None), b"x"), compressed(b"\x92\x08\x01")], ids=["raw", "zstd"])
def test_features_that_were_not_agreed_on_are_lengths_over_the_bound(stream: bytes) -> None:
    decoder = StreamDecoder()
    with pytest.raises(f.WireError, match="over 1048576"):
        decoder.feed(HELLO + stream)


@pytest.mark.parametrize(
    "stream",
    [
        b"{}\n",
        b"{" + bytes(f.HELLO_BYTES_MAX),
        b'{"versions": [2, 1]}\n',
        b'{"versions": "1"}\n',
        JSON_HELLO + b"hello\n",
        JSON_HELLO + b"[3]\n",
        JSON_HELLO + b"[99, 1]\n",
        JSON_HELLO + b'[8, "\xff"]\n',
        JSON_HELLO + b"[" * 100_000 + b"\n",
        JSON_HELLO + b"x" * (LIMIT + 1),
        JSON_HELLO + b"[8,1" + b" " * LIMIT + b"]\n",
    ],
)
def test_what_is_no_json_of_ours_is_refused(stream: bytes) -> None:
    for pieces in ([1000] * (len(stream) // 1000), []):
        decoder = StreamDecoder()
        with pytest.raises(f.WireError):
            offset = 0
            for length in [*pieces, len(stream)]:
                decoder.feed(stream[offset : offset + length])
                offset += length


@settings(deadline=None)
@given(st.binary(max_size=120), st.sampled_from([0, f.RAW_FLAG, f.ZSTD_FLAG, f.RAW_FLAG | f.ZSTD_FLAG]), st.booleans())
def test_random_bytes_end_in_frames_or_in_wire_error(data: bytes, flags: int, is_json: bool) -> None:
    with suppress(f.WireError):
        decode(f.pack_length(len(data) | flags) + data, [3, 5])
    with suppress(f.WireError):
        decode(data if not is_json else data.replace(b"\n", b"") + b"\n", [3, 5], hello=JSON_HELLO)


@pytest.mark.parametrize("is_json", [False, True])
def test_a_flood_is_taken_in_turns_and_nothing_is_lost(is_json: bool) -> None:
    encode = f.encode_json if is_json else f.encode_frame
    stream = (JSON_HELLO if is_json else HELLO) + b"".join(encode(f.Ping(number)) for number in range(3 * TURN_FRAMES + 7))
    decoder = StreamDecoder()
    tokens: list[int] = []

    def sink(frame: f.Frame, n_bytes: int) -> bool:
        assert isinstance(frame, f.Ping)
        tokens.append(frame.token)
        return frame.token in (5, 6)

    assert decoder.greet(stream)
    turns = []
    data = b""
    while decoder.take(data, sink):
        turns.append(len(tokens))
        data = encode(f.Ping(9000 + len(turns))) if len(turns) <= 2 else b""
    assert tokens == [*range(3 * TURN_FRAMES + 7), 9001, 9002]
    assert turns[:3] == [6, 7, 7 + TURN_FRAMES]


def test_compressing_what_does_not_shrink_leaves_it() -> None:
    zstd = Zstd()
    noise = bytes(msgspec.msgpack.encode(list(range(0, 1 << 30, 12345677))))[:200]
    assert zstd.compress(noise) is noise
    assert zstd.decompress(zstd.compress(bytes(5000))) == bytes(5000)
