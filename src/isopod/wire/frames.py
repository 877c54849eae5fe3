"""The RPC stream as data: the hello, the frames, and how they become bytes.

Not a connection: nothing here reads, writes, waits or knows who is server. Bytes become frames in `isopod.wire.decoder`. Layout and
meaning are in docs/protocol.md.

Rules: a frame is decoded in one pass with its body left as `msgspec.Raw`, so that the body is decoded once, into the type of
its method. Whatever a peer sends ends in frames or in `WireError`, never in another exception, and never holds more memory
than one frame. Elements after the known ones of a frame, and unknown keys of a hello, are ignored: that is how both grow.
"""

from collections.abc import Callable
from struct import Struct as Layout
from typing import Annotated, Final, Generic, Literal, NamedTuple, TypeVar

import msgspec

MAGIC: Final = b"ISO1"
VERSION_LOWEST: Final = 1
VERSION_HIGHEST: Final = 1
HELLO_BYTES_MAX: Final = 64 << 10
FRAME_BYTES_MAX: Final = 1 << 20
LENGTH_BYTES: Final = 4
HEAD_BYTES: Final = 2
"""Before the array of a frame whose body follows it: the array's length."""

RAW_FLAG: Final = 1 << 30
"""In a length: the body stands as it is behind the array, not in it."""
ZSTD_FLAG: Final = 1 << 31
"""In a length: what follows is compressed."""
LENGTH_MASK: Final = RAW_FLAG - 1

Encoding = Literal["msgpack", "json"]
Feature = Literal["notify", "raw", "reflect", "zstd"]
FEATURES: "Final[tuple[Feature, ...]]" = ("notify", "raw", "reflect", "zstd")

Body_co = TypeVar("Body_co", covariant=True)
CallId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Version = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=(1 << 40))]
Token = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class WireError(Exception):
    """The bytes are not this protocol, or a message does not fit it. `why` is one line."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class TooLarge(WireError):
    """A message does not fit into one frame."""


class Hello(msgspec.Struct, frozen=True):
    """What each side says first. `versions` is [lowest, highest] spoken."""

    versions: tuple[Version, Version]
    peer: str = ""
    group: str = ""
    """The scheduling group a client asks for; "" for the listener's own."""
    features: tuple[str, ...] = ()
    """What this side offers; what both offer is used."""
    heartbeat_ms: Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)] = 0
    """The longest silence this side wants; 0 for any. The server's word counts."""
    table: str = ""
    """Of a server that offers "reflect": the hash of its table of methods."""


class Request(msgspec.Struct, Generic[Body_co], frozen=True, array_like=True, tag=0, gc=False):
    """Start a call. `deadline_ms` is the time left, None for no deadline."""

    id: CallId
    method: str
    deadline_ms: Annotated[int, msgspec.Meta(ge=0, le=(1 << 53))] | None
    body: Body_co


class Reply(msgspec.Struct, Generic[Body_co], frozen=True, array_like=True, tag=1, gc=False):
    """End a call with its answer, `duration_us` after the request was read."""

    id: CallId
    body: Body_co
    duration_us: int


class Error(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """End a call (id 0: the connection) with an error of the tree. With `retry_after_ms` the call was not begun."""

    id: CallId
    code: str
    message: str
    hint: str
    exit_code: int
    retry_after_ms: Annotated[int, msgspec.Meta(ge=0, le=(1 << 53))] | None = None


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """The caller withdrew."""

    id: CallId


class Item(msgspec.Struct, Generic[Body_co], frozen=True, array_like=True, tag=4, gc=False):
    """One item of a call's stream."""

    id: CallId
    body: Body_co


class End(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """No more items from this side."""

    id: CallId


class Credit(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """The receiver consumed so many bytes of item frames."""

    id: CallId
    n_bytes: Count


class GoAway(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """Shutting down: requests above `last_id` were not taken."""

    last_id: CallId


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=8, gc=False):
    """Answer with PONG."""

    token: Token


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=9, gc=False):
    """The answer to PING."""

    token: Token


class Notify(msgspec.Struct, Generic[Body_co], frozen=True, array_like=True, tag=10, gc=False):
    """Start a call that nobody waits for: it is never answered."""

    method: str
    deadline_ms: Annotated[int, msgspec.Meta(ge=0, le=(1 << 53))] | None
    body: Body_co


class RawFrame(msgspec.Struct, frozen=True, gc=False):
    """A frame whose body came behind its array. `head.body` is nil; `body` refers to the received bytes: copy what is kept."""

    head: "Request[RawBody] | Reply[RawBody] | Item[RawBody] | Notify[RawBody]"
    body: memoryview


RawBody = msgspec.Raw
PlainFrame = Request[RawBody] | Reply[RawBody] | Error | Cancel | Item[RawBody] | End | Credit | GoAway | Ping | Pong | Notify[RawBody]
"""A frame as it stands in the stream: bodies still packed."""
Frame = PlainFrame | RawFrame
"""A frame as received."""
OutFrame = (
    Request[object]
    | Reply[object]
    | Error
    | Cancel
    | Item[object]
    | End
    | Credit
    | GoAway
    | Ping
    | Pong
    | Notify[object]
    | tuple[object, ...]
)
"""A frame to send: bodies are structs (or already packed `Raw`). Hot paths write the array itself, as a tuple: a struct costs more."""
WITH_BODY: Final = (Request, Reply, Item, Notify)
"""The frames that may carry their body behind them."""
STREAM_FRAMES: Final = (Item, End, Credit)
ITEM_FRAMES: Final = (Item, RawFrame)
"""Tuples, because a union written in place is built anew at each `isinstance`."""

REQUEST: Final = 0
REPLY: Final = 1
ITEM: Final = 4
NOTIFY: Final = 10

_LENGTH: Final = Layout("<I")
_HEAD: Final = Layout("<H")
_BIN8: Final = Layout("BB")
_BIN16: Final = Layout(">BH")
pack_length: "Final[Callable[[int], bytes]]" = _LENGTH.pack
encode_msgpack: "Final[Callable[[object], bytes]]" = msgspec.msgpack.Encoder().encode
_encode_json: "Final[Callable[[object], bytes]]" = msgspec.json.Encoder().encode
ENCODE_ERRORS: Final = (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)


def encode_json(value: object) -> bytes:
    """Return a line of a JSON connection, its end included; text never holds a line break of its own in JSON."""
    return _encode_json(value) + b"\n"


def common_version(ours: tuple[int, int], theirs: tuple[int, int]) -> int | None:
    """Return the highest version that both ranges hold, or None."""
    highest = min(ours[1], theirs[1])
    return highest if highest >= max(ours[0], theirs[0]) else None


def encode_hello(hello: Hello, encoding: Encoding = "msgpack") -> bytes:
    """Return the bytes of a hello.

    Raises:
        TooLarge: It is over 64 KiB.
    """
    packed = encode_msgpack(hello) if encoding == "msgpack" else encode_json(hello)
    if len(packed) > HELLO_BYTES_MAX:
        raise TooLarge(f"hello of {len(packed)} bytes is over {HELLO_BYTES_MAX}")
    return MAGIC + pack_length(len(packed)) + packed if encoding == "msgpack" else packed


def encode_frame(frame: OutFrame) -> bytes:
    """Return the bytes of one frame, its body in it.

    Raises:
        TooLarge: The frame is over 1 MiB.
        WireError: Its body cannot be packed.
    """
    packed = encode_with(encode_msgpack, frame)
    return pack_length(len(packed)) + packed


def encode_with(encode: Callable[[object], bytes], frame: OutFrame) -> bytes:
    """Return what follows a frame's length (or, as JSON, its line).

    Raises:
        TooLarge: It is over 1 MiB.
        WireError: Its body cannot be packed.
    """
    try:
        packed = encode(frame)
    except ENCODE_ERRORS as error:
        raise WireError(f"cannot encode {kind_name(frame)}: {error}") from error
    if len(packed) > FRAME_BYTES_MAX:
        raise TooLarge(f"a frame of {len(packed)} bytes is over {FRAME_BYTES_MAX}")
    return packed


def raw_head(frame: tuple[object, ...], n_body: int) -> bytes:
    """Return what stands before the body in the payload of a frame whose body follows its array.

    Args:
        frame: The array, with None for the body.
        n_body: The body's length.

    Raises:
        TooLarge: The whole is over 1 MiB, or the array over 64 KiB.
    """
    packed = encode_msgpack(frame)
    n_payload = HEAD_BYTES + len(packed) + n_body
    if n_payload > FRAME_BYTES_MAX or len(packed) >= 1 << 16:
        raise TooLarge(f"a frame of {n_payload} bytes is over {FRAME_BYTES_MAX}")
    return _HEAD.pack(len(packed)) + packed


class Prefix(NamedTuple):
    """A frame that is sent again and again, each time with another body of bytes at its end."""

    frame: tuple[object, ...]
    """Its array, without the body."""
    packed: bytes
    """The same in MessagePack."""


def prefix_of(frame: tuple[object, ...]) -> Prefix:
    """Return what stands before the body in every such frame.

    Args:
        frame: The array without the body, of at most 14 items.
    """
    packed = encode_msgpack(frame)
    return Prefix(frame, bytes((packed[0] + 1,)) + packed[1:])


def bytes_head(n_bytes: int) -> bytes:
    """Return what stands before so many bytes in MessagePack (less than 64 KiB): formats bin 8 and bin 16 of its specification."""
    return _BIN8.pack(0xC4, n_bytes) if n_bytes < 1 << 8 else _BIN16.pack(0xC5, n_bytes)


def kind_name(frame: OutFrame) -> str:
    """Return what to call a frame in an error."""
    return f"a {type(frame).__name__} frame" if isinstance(frame, msgspec.Struct) else f"a frame of kind {frame[0]}"
