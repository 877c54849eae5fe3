"""The WebSocket codec against the RFC's cases, itself, and wsproto: the same bytes must give the same events."""

import struct
import zlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, TextMessage
from wsproto.events import Ping as TheirPing
from wsproto.events import Pong as TheirPong

from isopod.net.http.websocket import codec as c
from isopod.net.http.websocket.deflate import Deflate, DeflateParameters, accept_offer, read_answer
from isopod.world.errors import InvalidArgument

KEY = b"\x37\xfa\x21\x3d"
MAX = 1 << 16

pytestmark = pytest.mark.row("S14")


def decode(data: bytes, *, expects_mask: bool = True, step: int = 0, **limits: int) -> list[c.Event]:
    """Decode all of `data`, `step` bytes at a time."""
    decoder = c.Decoder(expects_mask=expects_mask, message_bytes_max=limits.get("message", MAX), frame_bytes_max=limits.get("frame"))
    if not step:
        return decoder.feed(data)
    return [event for start in range(0, len(data), step) for event in decoder.feed(data[start : start + step])]


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, key: bytes | None = KEY) -> bytes:
    """Build a frame by hand, sound or not."""
    length = len(payload)
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    masked = 0 if key is None else 0x80
    if length < 126:
        head = bytes((first, masked | length))
    elif length < 1 << 16:
        head = struct.pack("!BBH", first, masked | 126, length)
    else:
        head = struct.pack("!BBQ", first, masked | 127, length)
    if key is None:
        return head + payload
    return head + key + bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))


def failure(events: Sequence[c.Event]) -> int:
    """Return the code of the failure that ends `events`."""
    assert isinstance(events[-1], c.Failure), events
    return events[-1].code


EURO = "κόσμε €".encode()

GOOD: list[tuple[str, bytes, list[c.Event]]] = [
    ("the RFC's masked Hello", bytes.fromhex("818537fa213d7f9f4d5158"), ["Hello"]),
    ("empty text", frame(1), [""]),
    ("empty binary", frame(2), [b""]),
    ("125 bytes", frame(2, b"a" * 125), [b"a" * 125]),
    ("126 bytes", frame(2, b"a" * 126), [b"a" * 126]),
    ("127 bytes", frame(2, b"a" * 127), [b"a" * 127]),
    ("65535 bytes", frame(2, b"a" * 65535), [b"a" * 65535]),
    ("65536 bytes", frame(2, b"a" * 65536), [b"a" * 65536]),
    ("two messages", frame(1, b"a") + frame(1, b"b"), ["a", "b"]),
    ("fragments", frame(1, b"a", fin=False) + frame(0, b"b", fin=False) + frame(0, b"c"), ["abc"]),
    ("empty fragments", frame(1, fin=False) + frame(0, fin=False) + frame(0), [""]),
    ("empty last fragment", frame(2, b"ab", fin=False) + frame(0), [b"ab"]),
    ("a ping between fragments", frame(1, b"a", fin=False) + frame(9, b"p") + frame(0, b"b"), [c.Ping(b"p"), "ab"]),
    ("pings of 0 and 125 bytes", frame(9) + frame(9, b"p" * 125), [c.Ping(b""), c.Ping(b"p" * 125)]),
    ("an unasked pong", frame(10, b"x"), [c.Pong(b"x")]),
    ("text cut inside a character", frame(1, EURO[:-2], fin=False) + frame(0, EURO[-2:]), [EURO.decode()]),
    ("text byte by byte", b"".join(frame(bool(not i), EURO[i : i + 1], fin=i == len(EURO) - 1) for i in range(len(EURO))), ["κόσμε €"]),
    ("the last code point", frame(1, "\U0010ffff".encode()), ["\U0010ffff"]),
    ("a NUL and a non-character", frame(1, "\0\ufffe".encode()), ["\0\ufffe"]),
    ("close without a code", frame(8), [c.Close(1005, "")]),
    ("close with a reason", frame(8, b"\x03\xe8" + b"r" * 123), [c.Close(1000, "r" * 123)]),
    ("nothing after close", frame(8) + frame(1, b"a") + frame(9), [c.Close(1005, "")]),
    ("close amid fragments", frame(1, b"a", fin=False) + frame(8, b"\x03\xe9"), [c.Close(1001, "")]),
]  # fmt: skip

BAD_CODES = (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
BAD: list[tuple[str, bytes, int]] = [
    *((f"reserved opcode {opcode}", frame(opcode), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)),
    *((f"reserved bits {rsv} on text", frame(1, b"a", rsv=rsv), 1002) for rsv in range(1, 8)),
    *((f"reserved bits {rsv} on ping", frame(9, b"a", rsv=rsv), 1002) for rsv in range(1, 8)),
    ("reserved bit on close", frame(8, rsv=4), 1002),
    ("reserved bit on a continuation", frame(1, b"a", fin=False) + frame(0, b"b", rsv=4), 1002),
    ("not masked", frame(1, b"a", key=None), 1002),
    ("a ping not masked", frame(9, key=None), 1002),
    ("a long ping", frame(9, b"p" * 126), 1002),
    ("a long close", frame(8, b"\x03\xe8" + b"r" * 124), 1002),
    ("a fragmented ping", frame(9, fin=False), 1002),
    ("a fragmented pong", frame(10, fin=False), 1002),
    ("a fragmented close", frame(8, fin=False), 1002),
    ("a continuation of nothing", frame(0, b"a"), 1002),
    ("an unfinished continuation of nothing", frame(0, b"a", fin=False), 1002),
    ("a continuation behind the end", frame(1, b"a", fin=False) + frame(0, b"b") + frame(0, b"c"), 1002),
    ("a message in a message", frame(1, b"a", fin=False) + frame(1, b"b"), 1002),
    ("a binary message in a text", frame(1, b"a", fin=False) + frame(2, b"b", fin=False), 1002),
    ("a length not minimal, 16 bits", b"\x82\xfe\x00\x7d" + KEY, 1002),
    ("a length not minimal, 64 bits", b"\x82\xff" + (65535).to_bytes(8, "big") + KEY, 1002),
    ("the highest bit of a length", b"\x82\xff" + (1 << 63).to_bytes(8, "big") + KEY, 1002),
    ("half a close code", frame(8, b"\x03"), 1002),
    *((f"close code {code}", frame(8, code.to_bytes(2, "big")), 1002) for code in BAD_CODES),
    ("a reason that is no text", frame(8, b"\x03\xe8\xff"), 1007),
    ("a lone continuation byte", frame(1, b"\x80"), 1007),
    ("a surrogate", frame(1, b"\xed\xa0\x80"), 1007),
    ("an overlong slash", frame(1, b"\xc0\xaf"), 1007),
    ("beyond the last code point", frame(1, b"\xf4\x90\x80\x80"), 1007),
    ("a character cut off", frame(1, b"\xe2\x82"), 1007),
    ("a fragment that can be no text, at once", frame(1, b"ok\xf4\x90", fin=False), 1007),
    ("a message that ends inside a character", frame(1, b"\xe2", fin=False) + frame(0, b"\x82"), 1007),
    ("a frame over the limit", b"\x82\xff" + (MAX + 1).to_bytes(8, "big"), 1009),
    ("a message over the limit", frame(2, b"a" * 65000, fin=False) + b"\x00\xfe\x02\x19", 1009),
]  # fmt: skip


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize(("data", "wanted"), [case[1:] for case in GOOD], ids=[case[0] for case in GOOD])
def test_sound_bytes_give_their_events(data: bytes, wanted: list[c.Event], step: int) -> None:
    assert decode(data, step=step) == wanted


@pytest.mark.parametrize("step", [0, 1, 3])
@pytest.mark.parametrize(("data", "code"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_violations_give_the_right_code(data: bytes, code: int, step: int) -> None:
    events = decode(frame(1, b"before") + data + frame(1, b"after"), step=step)

    assert events[0] == "before"
    assert failure(events) == code
    assert "after" not in events


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999])
def test_allowed_close_codes(code: int) -> None:
    assert decode(c.encode_close(code, "why", key=KEY)) == [c.Close(code, "why")]


@pytest.mark.parametrize("code", [0, 999, 1004, 1006, 1015, 2999, 5000])
def test_close_codes_that_must_not_be_sent(code: int) -> None:
    with pytest.raises(InvalidArgument, match="close code"):
        c.encode_close(code)


def test_a_long_reason_is_cut_at_a_character() -> None:
    built = c.encode_close(1000, "€" * 100)

    assert decode(built, expects_mask=False) == [c.Close(1000, "€" * 41)]


def test_a_client_refuses_masked_frames() -> None:
    assert failure(decode(frame(1, b"a"), expects_mask=False)) == 1002


def test_an_announced_size_costs_no_memory() -> None:
    decoder = c.Decoder(expects_mask=True, message_bytes_max=100)

    assert failure(decoder.feed(b"\x82\xff" + (1 << 40).to_bytes(8, "big"))) == 1009
    assert decoder.feed(b"x" * 100_000) == []
    assert decoder.n_buffered == 0


def test_control_frames_count_against_no_limit() -> None:
    assert decode(frame(2, b"abc", fin=False) + frame(9, b"p" * 125) + frame(0, b"d"), message=4, frame=3) == [c.Ping(b"p" * 125), b"abcd"]


def test_the_frame_limit_is_its_own() -> None:
    assert failure(decode(frame(2, b"abcd"), message=100, frame=3)) == 1009


# --- the same bytes, the same events --------------------------------------------------------------------------------------------------

FRAMES = st.lists(
    st.builds(
        frame,
        st.sampled_from([0, 1, 2, 8, 9, 10]) | st.integers(0, 15),
        st.binary(max_size=12) | st.text(max_size=8).map(str.encode) | st.sampled_from([b"\x03\xe8", b"\x03\xed", b"\x0b\xb8"]),
        fin=st.booleans() | st.just(True),
        rsv=st.sampled_from([0, 0, 0, 0, 4]),
        key=st.sampled_from([KEY, KEY, KEY, KEY, None]),
    ),
    max_size=8,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(FRAMES | st.lists(st.binary(max_size=40), max_size=3), st.integers(1, 50))
def test_same_events_as_wsproto(frames: list[bytes], step: int) -> None:
    # wsproto judges a header only when it is whole; the zeros complete any.
    data = b"".join(frames) + bytes(16)

    ours, theirs = _ours(data, step), _theirs(data, step)

    # Text that can be none is found by wsproto inside a frame, by us at the frame's end.
    assert ours == theirs or (_is_incomplete(data) and [*ours, ("ends", 1007)] == theirs)


def _is_incomplete(data: bytes) -> bool:
    decoder = c.Decoder(expects_mask=True, message_bytes_max=MAX)
    decoder.feed(data)
    return decoder.n_buffered > 0


def _ours(data: bytes, step: int) -> list[object]:
    found: list[object] = []
    for event in decode(data, step=step):
        if isinstance(event, c.Failure | c.Close):
            found.append(("ends", event.code))
        else:
            found.append(event if isinstance(event, str | bytes) else (type(event).__name__, event.payload))
    return found


def _theirs(data: bytes, step: int) -> list[object]:
    connection = Connection(ConnectionType.SERVER)
    found: list[object] = []
    parts: list[str | bytes] = []
    for start in range(0, len(data), step):
        connection.receive_data(data[start : start + step])
        for event in connection.events():
            if isinstance(event, TextMessage | BytesMessage):
                parts.append(event.data if isinstance(event.data, str) else bytes(event.data))
                if event.message_finished:
                    found.append(type(parts[0])().join(parts))  # type: ignore[arg-type]  # all of one type
                    parts = []
            elif isinstance(event, TheirPing | TheirPong):
                found.append((type(event).__name__, bytes(event.payload)))
            elif isinstance(event, CloseConnection):
                found.append(("ends", int(event.code)))  # a failure too: wsproto makes its own close frame of it
                return found
    return found


@given(st.lists(st.text(max_size=40) | st.binary(max_size=40), max_size=6), st.booleans())
def test_wsproto_reads_what_we_write(messages: list[str | bytes], is_client: bool) -> None:
    key = KEY if is_client else None
    data = b"".join(
        c.encode_frame(c.TEXT if isinstance(m, str) else c.BINARY, m.encode() if isinstance(m, str) else m, key=key) for m in messages
    )
    connection = Connection(ConnectionType.SERVER if is_client else ConnectionType.CLIENT)
    connection.receive_data(data + c.encode_close(1001, "bye", key=key))

    events = list(connection.events())
    got = [
        event.data if isinstance(event.data, str) else bytes(event.data)
        for event in events
        if isinstance(event, TextMessage | BytesMessage)
    ]
    assert got == messages
    assert isinstance(events[-1], CloseConnection)
    assert (events[-1].code, events[-1].reason) == (1001, "bye")


# --- permessage-deflate -----------------------------------------------------------------------------------------------------------------

PARAMETERS = [
    DeflateParameters(),
    DeflateParameters(server_no_context_takeover=True, client_no_context_takeover=True),
    DeflateParameters(server_window_bits=9, client_window_bits=10),
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda parameters: parameters.header())
def test_deflate_round_trip(parameters: DeflateParameters) -> None:
    client, server = Deflate(parameters, is_client=True), Deflate(parameters, is_client=False)
    decoder = c.Decoder(expects_mask=True, message_bytes_max=MAX, deflate=server)
    messages = ["", "hello hello hello", "€" * 500, "hello hello hello"]

    data = b"".join(c.encode_frame(c.TEXT, client.deflate(m.encode()), key=KEY, is_compressed=True) for m in messages)
    plain = c.encode_frame(c.TEXT, b"not compressed", key=KEY)

    assert decoder.feed(data + plain) == [*messages, "not compressed"]
    assert server.inflate(client.deflate(b"again"), 100, is_last=True) == b"again"


def test_deflated_fragments_with_a_ping_between() -> None:
    deflated = Deflate(DeflateParameters(), is_client=True).deflate(b"x" * 1000)
    decoder = c.Decoder(expects_mask=True, message_bytes_max=MAX, deflate=Deflate(DeflateParameters(), is_client=False))
    data = frame(2, deflated[:3], fin=False, rsv=4) + frame(9) + frame(0, deflated[3:])

    assert decoder.feed(data) == [c.Ping(b""), b"x" * 1000]


def test_a_bomb_is_refused_at_the_limit() -> None:
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = squeezer.compress(bytes(50_000_000)) + squeezer.flush(zlib.Z_SYNC_FLUSH)
    decoder = c.Decoder(expects_mask=True, message_bytes_max=MAX, deflate=Deflate(DeflateParameters(), is_client=False))

    assert len(bomb) < MAX
    assert failure(decoder.feed(frame(2, bomb, rsv=4))) == 1009


def test_damaged_deflate_is_invalid_data() -> None:
    decoder = c.Decoder(expects_mask=True, message_bytes_max=MAX, deflate=Deflate(DeflateParameters(), is_client=False))

    assert failure(decoder.feed(frame(2, b"\xff\xff\xff", rsv=4))) == 1007


@pytest.mark.parametrize(
    ("offer", "wanted"),
    [
        ("permessage-deflate", DeflateParameters()),
        ("permessage-deflate; client_max_window_bits", DeflateParameters()),
        ('foo, permessage-deflate; server_max_window_bits="10"', DeflateParameters(server_window_bits=10)),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", DeflateParameters()),
        ("permessage-deflate; client_no_context_takeover; server_no_context_takeover", DeflateParameters(True, True)),
        ("permessage-deflate; server_max_window_bits", None),
        ("permessage-deflate; client_max_window_bits=016", None),
        ("permessage-deflate; client_no_context_takeover=1", None),
        ("permessage-deflate; client_no_context_takeover; client_no_context_takeover", None),
        ("permessage-deflate; surprise", None),
        ("x-webkit-deflate-frame", None),
        ("", None),
    ],
)
def test_deflate_offers(offer: str, wanted: DeflateParameters | None) -> None:
    assert accept_offer(offer) == wanted


def test_deflate_answers() -> None:
    assert read_answer(DeflateParameters(True, False, 12, 9).header()) == DeflateParameters(True, False, 12, 9)
    assert read_answer("permessage-deflate; client_max_window_bits") is None
    assert read_answer("permessage-deflate, foo") is None


def final_block(data: bytes) -> bytes:
    """Return deflated data that ends with a final block, and RFC 7692's zero byte behind it (section 7.2.3.4)."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush() + b"\0"


def test_a_final_block_ends_a_message() -> None:
    decoder = c.Decoder(expects_mask=True, message_bytes_max=MAX, deflate=Deflate(DeflateParameters(), is_client=False))
    packed = final_block(b"hello")
    assert decoder.feed(frame(1, packed, rsv=4)) == ["hello"]
    assert decoder.feed(frame(1, packed, rsv=4, fin=False) + frame(0)) == ["hello"]
    assert decoder.feed(frame(1, packed[:-1], rsv=4, fin=False) + frame(0, b"\0")) == ["hello"]


def test_what_follows_a_final_block_is_not_kept() -> None:
    """zlib would collect it, in fragment after fragment, outside of every bound."""
    decoder = c.Decoder(expects_mask=True, message_bytes_max=MAX, deflate=Deflate(DeflateParameters(), is_client=False))
    assert decoder.feed(frame(1, final_block(b"hello"), rsv=4, fin=False)) == []
    assert failure(decoder.feed(frame(0, b"x" * 60_000, fin=False))) == c.INVALID_DATA
