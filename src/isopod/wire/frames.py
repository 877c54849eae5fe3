"""The RPC stream as data: the hello, the frames, and the two pure directions between them and bytes.

Not a connection: nothing here reads, writes, waits or knows who is server. Layout and meaning are in docs/protocol.md.

Rules: a frame is decoded in one pass with its body left as `msgspec.Raw`, so that the body is decoded once, into the type of
its method. Whatever a peer sends ends in frames or in `WireError`, never in another exception, and never holds more memory
than one frame. Elements after the known ones of a frame, and unknown keys of a hello, are ignored: that is how both grow.
"""

from struct import Struct as Layout
from typing import Annotated, Final, Generic, TypeVar

import msgspec

MAGIC: Final = b"ISO1"
VERSION_LOWEST: Final = 1
VERSION_HIGHEST: Final = 1
HELLO_BYTES_MAX: Final = 64 << 10
FRAME_BYTES_MAX: Final = 1 << 20
LENGTH_BYTES: Final = 4

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


class Hello(msgspec.Struct, frozen=True, gc=False):
    """What each side says first. `versions` is [lowest, highest] spoken."""

    versions: tuple[Version, Version]
    peer: str = ""
    group: str = ""


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
    """End a call (id 0: the connection) with an error of the tree."""

    id: CallId
    code: str
    message: str
    hint: str
    exit_code: int


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


RawBody = msgspec.Raw
Frame = Request[RawBody] | Reply[RawBody] | Error | Cancel | Item[RawBody] | End | Credit | GoAway | Ping | Pong
"""A frame as received: bodies still packed."""
OutFrame = Request[object] | Reply[object] | Error | Cancel | Item[object] | End | Credit | GoAway | Ping | Pong
"""A frame to send: bodies are structs (or already packed `Raw`)."""

_LENGTH: Final = Layout("<I")
_ENCODER: Final = msgspec.msgpack.Encoder()
_FRAMES: "Final[msgspec.msgpack.Decoder[Frame]]" = msgspec.msgpack.Decoder(Frame)
_HELLO: Final = msgspec.msgpack.Decoder(Hello)


def common_version(ours: tuple[int, int], theirs: tuple[int, int]) -> int | None:
    """Return the highest version that both ranges hold, or None."""
    highest = min(ours[1], theirs[1])
    return highest if highest >= max(ours[0], theirs[0]) else None


def encode_hello(hello: Hello) -> bytes:
    """Return the bytes of a hello.

    Raises:
        TooLarge: It is over 64 KiB.
    """
    packed = _ENCODER.encode(hello)
    if len(packed) > HELLO_BYTES_MAX:
        raise TooLarge(f"hello of {len(packed)} bytes is over {HELLO_BYTES_MAX}")
    return MAGIC + _LENGTH.pack(len(packed)) + packed


def append_frame(out: bytearray, frame: OutFrame) -> int:
    """Append a frame to `out`, which keeps its contents if this fails.

    Returns:
        The bytes appended, the length included.

    Raises:
        TooLarge: The frame is over 1 MiB.
        WireError: Its body cannot be packed.
    """
    start = len(out)
    out += b"\0\0\0\0"
    try:
        # Into the connection's own buffer: no bytes object per frame, and the frames of one loop turn are joined for free.
        _ENCODER.encode_into(frame, out, start + LENGTH_BYTES)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        del out[start:]
        raise WireError(f"cannot encode a {type(frame).__name__} frame: {error}") from error
    n_bytes = len(out) - start
    if n_bytes - LENGTH_BYTES > FRAME_BYTES_MAX:
        del out[start:]
        raise TooLarge(f"a frame of {n_bytes - LENGTH_BYTES} bytes is over {FRAME_BYTES_MAX}")
    _LENGTH.pack_into(out, start, n_bytes - LENGTH_BYTES)
    return n_bytes


def encode_frame(frame: OutFrame) -> bytes:
    """Return the bytes of one frame.

    Raises:
        TooLarge: The frame is over 1 MiB.
        WireError: Its body cannot be packed.
    """
    out = bytearray()
    append_frame(out, frame)
    return bytes(out)


def decode_frame(payload: bytes | memoryview) -> Frame:
    """Return the frame whose array is `payload` (what follows the length).

    Raises:
        WireError: It is not one frame.
    """
    try:
        return _FRAMES.decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"not a frame: {error}") from None


class StreamDecoder:
    """Bytes in, the hello and then frames out, however the bytes are cut.

    Holds at most one incomplete frame. After a `WireError` it must not be fed again.
    """

    __slots__ = ("_n_wanted", "_partial", "hello")

    def __init__(self) -> None:
        self.hello: Hello | None = None
        """The peer's hello, once it is complete."""
        self._partial = bytearray()
        self._n_wanted = 0  # do not look at _partial again before it holds so many bytes

    def feed(self, data: bytes) -> list[tuple[Frame, int]]:
        """Take the next bytes of the stream.

        Args:
            data: Any cut of it. Bodies of returned frames refer to this object: decode them soon, or copy.

        Returns:
            The frames completed by `data`, in order, each with its length on the wire (the u32 included).

        Raises:
            WireError: The stream is not this protocol.
        """
        if self._partial:
            self._partial += data
            if len(self._partial) < self._n_wanted:
                return []
            data = bytes(self._partial)
        offset = self._take_hello(data) if self.hello is None else 0
        frames: list[tuple[Frame, int]] = []
        if self.hello is not None:
            offset = self._take_frames(data, offset, frames)
        self._keep(data, offset)
        return frames

    def _keep(self, data: bytes, offset: int) -> None:
        """Keep the incomplete rest; a new buffer, so that a large frame's memory goes with it."""
        if offset < len(data) or self._partial:
            self._partial = bytearray(memoryview(data)[offset:])

    def _take_hello(self, data: bytes) -> int:
        """Decode the hello if all of it is there; return where the frames begin."""
        if not MAGIC.startswith(data[: len(MAGIC)]):
            raise WireError("the stream does not begin with ISO1")
        n_head = len(MAGIC) + LENGTH_BYTES
        if len(data) < n_head:
            self._n_wanted = len(data) + 1  # look at every byte: a peer of another protocol may wait for our answer
            return 0
        (n_payload,) = _LENGTH.unpack_from(data, len(MAGIC))
        if n_payload > HELLO_BYTES_MAX:
            raise WireError(f"hello of {n_payload} bytes is over {HELLO_BYTES_MAX}")
        end = n_head + int(n_payload)
        self._n_wanted = end
        if len(data) < end:
            return 0
        try:
            hello = _HELLO.decode(memoryview(data)[n_head:end])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise WireError(f"bad hello: {error}") from None
        if hello.versions[0] > hello.versions[1]:
            raise WireError("bad hello: the lowest version is above the highest")
        self.hello = hello
        return end

    def _take_frames(self, data: bytes, offset: int, frames: list[tuple[Frame, int]]) -> int:
        """Decode the complete frames from `offset` on; return where the incomplete rest begins."""
        view = memoryview(data)
        n_data = len(data)
        unpack = _LENGTH.unpack_from
        while n_data - offset >= LENGTH_BYTES:
            (n_payload,) = unpack(data, offset)
            if n_payload > FRAME_BYTES_MAX:
                raise WireError(f"a frame of {n_payload} bytes is over {FRAME_BYTES_MAX}")
            start = offset + LENGTH_BYTES
            end = start + n_payload
            if end > n_data:
                self._n_wanted = LENGTH_BYTES + n_payload
                return offset
            frames.append((decode_frame(view[start:end]), end - offset))
            offset = end
        self._n_wanted = LENGTH_BYTES
        return offset
