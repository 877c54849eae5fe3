"""The client's protocol against the daemon's codec, bytes cut anywhere, and hostile servers."""

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.cli import protocol as p
from isopod.wire import frames
from isopod.wire.decoder import StreamDecoder
from isopod.world.errors import IsopodError, NotFound, ProtocolViolation, VersionMismatch

HELLO = frames.encode_hello(frames.Hello((1, 1), "node"))


def greeted() -> p.Protocol:
    protocol = p.Protocol("node", "0")
    assert protocol.feed(HELLO) == []
    return protocol


def packed(*frame: object) -> bytes:
    data = msgspec.msgpack.encode(frame)
    return len(data).to_bytes(4, "little") + data


def test_numbers_are_those_of_the_codec() -> None:
    assert (p.MAGIC, p.HELLO_BYTES_MAX, p.FRAME_BYTES_MAX) == (frames.MAGIC, frames.HELLO_BYTES_MAX, frames.FRAME_BYTES_MAX)
    assert frames.VERSION_LOWEST <= p.VERSION <= frames.VERSION_HIGHEST
    kinds = [frames.Request, frames.Reply, frames.Error, frames.Cancel, frames.Item, frames.End, frames.Credit]
    kinds += [frames.GoAway, frames.Ping, frames.Pong]
    ours = [p.REQUEST, p.REPLY, p.ERROR, p.CANCEL, p.ITEM, p.END, p.CREDIT, p.GOAWAY, p.PING, p.PONG]
    assert [kind.__struct_config__.tag for kind in kinds] == ours


def test_the_daemons_codec_reads_what_we_send() -> None:
    protocol = p.Protocol("node", "9.9")
    call = protocol.request("container.run", {"spec": {"image": "x"}}, 1500)
    protocol.send_item(call, {"type": "stdin", "data": b"a\0b"})
    protocol.send_end(call)
    protocol.cancel(call)
    decoder = StreamDecoder()
    got = [frame for frame, _ in decoder.feed(bytes(protocol.outbox))]
    assert decoder.hello == frames.Hello((1, 1), "isopod-cli/9.9", "")
    assert isinstance(got[0], frames.Request)
    assert (got[0].id, got[0].method, got[0].deadline_ms) == (1, "container.run", 1500)
    assert isinstance(got[1], frames.Item)
    assert msgspec.msgpack.decode(got[1].body) == {"type": "stdin", "data": b"a\0b"}
    assert got[2:] == [frames.End(1), frames.Cancel(1)]


@given(st.lists(st.integers(0, 400), max_size=12))
def test_cuts_do_not_matter(cuts: list[int]) -> None:
    stream = (
        HELLO + packed(8, 77) + packed(4, 1, {"type": "stdout", "data": b"x" * 90}) + packed(1, 1, {"id": "c"}, 5) + packed(1, 1, {}, 5)
    )
    protocol = p.Protocol("node", "0")
    protocol.request("m", {}, None)
    protocol.outbox.clear()
    events = []
    start = 0
    for end in [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]:
        events += protocol.feed(stream[start:end])
        start = end
    assert [(kind, call) for kind, call, _, _ in events] == [(p.ITEM, 1), (p.REPLY, 1)]
    assert bytes(protocol.outbox) == packed(9, 77), "a ping is answered"


def test_error_is_rebuilt_and_made_one_line() -> None:
    protocol = greeted()
    call = protocol.request("m", {}, None)
    [(kind, _, error, _)] = protocol.feed(packed(2, call, "not_found", "no such\nthing\x1b[2J", "look", 7))
    assert kind == p.ERROR
    assert isinstance(error, NotFound)
    assert (error.message, error.hint, error.exit_code) == ("no such thing [2J", "look", 7)


def test_windows() -> None:
    protocol = greeted()
    call = protocol.request("m", {}, None)
    protocol.send_item(call, {"type": "chunk", "data": bytes(1000)})
    sent = p.WINDOW_BYTES - protocol.room(call)
    assert 1000 < sent < 1064
    protocol.feed(packed(6, call, sent))
    assert protocol.room(call) == p.WINDOW_BYTES
    protocol.feed(packed(6, call, 1 << 30))
    assert protocol.room(call) == p.WINDOW_BYTES, "credit never exceeds the window"
    protocol.outbox.clear()
    protocol.consumed(call, p.CREDIT_STEP_BYTES - 1)
    assert not protocol.outbox
    protocol.consumed(call, 1)
    assert bytes(protocol.outbox) == packed(6, call, p.CREDIT_STEP_BYTES)
    protocol.feed(packed(1, call, {}, 1))
    assert protocol.room(call) == 0
    protocol.consumed(call, 1 << 20)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"ISO1\xff\xff\xff\xff",
        b"ISO1\x01\x00\x00\x00\xc1",
        b"ISO1\x01\x00\x00\x00\x80",
        HELLO + b"\xff\xff\xff\xff",
        HELLO + (p.FRAME_BYTES_MAX + 1).to_bytes(4, "little"),
        HELLO + b"\x00\x00\x00\x00",
        HELLO + b"\x01\x00\x00\x00\xc1",
        HELLO + packed("x", 1),
        HELLO + packed(4),
        HELLO + packed(77, 1),
        HELLO + packed(1, 1),
        HELLO + packed(2, 1, 5, 5),
        HELLO + packed(6, 1, "x"),
    ],
)
def test_hostile_bytes(data: bytes) -> None:
    protocol = p.Protocol("node", "0")
    protocol.request("m", {}, None)
    with pytest.raises(ProtocolViolation):
        protocol.feed(data)


def test_a_server_that_ignores_the_window() -> None:
    protocol = greeted()
    call = protocol.request("m", {}, None)
    item = packed(4, call, {"type": "stdout", "data": bytes(1 << 19)})
    with pytest.raises(ProtocolViolation, match="window"):
        for _ in range(5):
            protocol.feed(item)


def test_versions() -> None:
    protocol = p.Protocol("node", "0")
    with pytest.raises(VersionMismatch, match="2-3"):
        protocol.feed(frames.encode_hello(frames.Hello((2, 3), "node")))
    with pytest.raises(VersionMismatch):
        greeted().feed(packed(2, 0, "version_mismatch", "no version in common", "", 3))


def test_late_answers_are_dropped() -> None:
    protocol = greeted()
    assert protocol.feed(packed(1, 9, {}, 1) + packed(4, 9, {}) + packed(2, 9, "x", "y", "", 1) + packed(5, 9)) == []


@given(st.binary(max_size=300))
def test_any_bytes_end_in_events_or_an_error(data: bytes) -> None:
    protocol = greeted()
    protocol.request("m", {}, None)
    with suppress(IsopodError):
        protocol.feed(len(data).to_bytes(4, "little") + data)
