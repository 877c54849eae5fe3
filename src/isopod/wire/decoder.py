"""StreamDecoder: bytes in, the hello and then frames out, however the bytes are cut.

The first byte decides the encoding: `I` begins the magic of the binary stream, `{` a hello in JSON, after which every frame is a line.
Frames behind raw or compressed lengths are understood only once `allow` said that they were agreed on.

Rules: holds at most one incomplete frame, and what was not taken yet of one piece fed to it. After a `WireError` it must not be fed again.
"""

from collections.abc import Callable
from struct import Struct as Layout
from typing import Final

import msgspec

from isopod.wire.compression import Zstd
from isopod.wire.frames import (
    FRAME_BYTES_MAX,
    HEAD_BYTES,
    HELLO_BYTES_MAX,
    LENGTH_BYTES,
    LENGTH_MASK,
    MAGIC,
    RAW_FLAG,
    WITH_BODY,
    ZSTD_FLAG,
    Encoding,
    Frame,
    Hello,
    PlainFrame,
    RawFrame,
    WireError,
)

TURN_FRAMES: Final = 256
"""After so many frames `take` lets others have a turn: of the smallest requests, half a millisecond."""
_UNPACK_LENGTH: Final = Layout("<I").unpack_from
_UNPACK_HEAD: Final = Layout("<H").unpack_from
_DECODE_ERRORS: Final = (msgspec.MsgspecError, ValueError, RecursionError)
_MSGPACK: "Final[Callable[[bytes | memoryview], PlainFrame]]" = msgspec.msgpack.Decoder(PlainFrame).decode
_JSON: "Final[Callable[[bytes | memoryview], PlainFrame]]" = msgspec.json.Decoder(PlainFrame).decode
_HELLO: Final = msgspec.msgpack.Decoder(Hello)
_JSON_HELLO: Final = msgspec.json.Decoder(Hello)

Sink = Callable[[Frame, int], object]
"""Takes a frame and its length on the wire, before compression and with all that surrounds it. What it returns is true to pause."""


def decode_frame(payload: bytes | memoryview) -> PlainFrame:
    """Return the frame whose array is `payload` (what follows a plain length).

    Raises:
        WireError: It is not one frame.
    """
    try:
        return _MSGPACK(payload)
    except _DECODE_ERRORS as error:
        raise WireError(f"not a frame: {error}") from None


class StreamDecoder:
    """One direction of one connection."""

    __slots__ = ("_at", "_data", "_is_own", "_n_wanted", "_raw", "_zstd", "encoding", "hello")

    def __init__(self) -> None:
        self.hello: Hello | None = None
        """The peer's hello, once it is complete."""
        self.encoding: Encoding | None = None
        """What the stream is in, once its first byte is there."""
        self._data: bytes | bytearray = b""
        self._at = 0
        self._is_own = False  # whether _data may be added to: nobody refers to it
        self._n_wanted = 0  # do not look at _data again before it holds so many bytes from _at on
        self._raw = False
        self._zstd: Zstd | None = None

    def allow(self, *, raw: bool, zstd: Zstd | None) -> None:
        """Say what was agreed on in the hellos."""
        self._raw = raw
        self._zstd = zstd

    def feed(self, data: bytes) -> list[tuple[Frame, int]]:
        """Take the next bytes of the stream.

        Args:
            data: Any cut of it. Bodies of returned frames refer to this object: decode them soon, or copy.

        Returns:
            The frames completed by `data`, in order, each with its length on the wire (the u32 included).

        Raises:
            WireError: The stream is not this protocol.
        """
        frames: list[tuple[Frame, int]] = []
        if self.hello is None:
            if not self.greet(data):
                return frames
            data = b""

        def keep(frame: Frame, n_bytes: int) -> None:
            frames.append((frame, n_bytes))

        while self.take(data, keep):
            data = b""
        return frames

    def greet(self, data: bytes) -> bool:
        """Take bytes of the hello; return whether it is complete now. What follows it waits for `take`.

        Raises:
            WireError: The stream is not this protocol.
        """
        self.put(data)
        if len(self._data) < self._n_wanted or not self._data:
            return False
        if self.encoding is None:
            self.encoding = "json" if self._data[0] == 0x7B else "msgpack"
        found = self._take_json_hello() if self.encoding == "json" else self._take_hello()
        if found is None:
            return False
        if found.versions[0] > found.versions[1]:
            raise WireError("bad hello: the lowest version is above the highest")
        self._n_wanted = 0
        self.hello = found
        return True

    def take(self, data: bytes, sink: Sink) -> bool:
        """Take the next bytes after the hello.

        Args:
            data: Any cut of the stream, also none: to go on after a pause.
            sink: Gets each complete frame; may ask for a pause.

        Returns:
            Whether it paused (because the sink asked, or for the others' sake) with bytes left that may hold a whole frame.

        Raises:
            WireError: The stream is not this protocol.
        """
        if self.encoding == "json":
            return self._take_lines(data, sink)
        at = 0
        if not self._data and len(data) > LENGTH_BYTES:
            (n_payload,) = _UNPACK_LENGTH(data, 0)
            if n_payload == len(data) - LENGTH_BYTES and n_payload <= FRAME_BYTES_MAX:  # one whole frame and nothing else
                try:
                    only = _MSGPACK(memoryview(data)[LENGTH_BYTES:])
                except _DECODE_ERRORS as error:
                    raise WireError(f"not a frame: {error}") from None
                sink(only, len(data))
                return False
        if self._data:
            self.put(data)
            at = self._at
            if len(self._data) - at < self._n_wanted:
                return False
            stream = self._data
        else:
            stream = data  # the usual case: nothing left over, so nothing copied
        view = memoryview(stream)
        n_stream = len(stream)
        n_left = TURN_FRAMES
        while n_stream - at >= LENGTH_BYTES:
            (n_payload,) = _UNPACK_LENGTH(stream, at)
            start = at + LENGTH_BYTES
            if n_payload > FRAME_BYTES_MAX:
                end = start + self._check_length(n_payload)
                if end > n_stream:
                    return self._keep(stream, at, n_wanted=end - at)
                frame, n_bytes = self._unwrap(view[start:end], n_payload)
                at = end
                n_left -= 1
                if sink(frame, n_bytes) or not n_left:
                    return self._pause(stream, at)
                continue
            end = start + n_payload
            if end > n_stream:
                return self._keep(stream, at, n_wanted=end - at)
            try:
                plain = _MSGPACK(view[start:end])
            except _DECODE_ERRORS as error:
                raise WireError(f"not a frame: {error}") from None
            at = end
            n_left -= 1
            if sink(plain, n_payload + LENGTH_BYTES) or not n_left:
                return self._pause(stream, at)
        return self._keep(stream, at, n_wanted=LENGTH_BYTES)

    # --- what is left over --------------------------------------------------------------------------------------------

    def put(self, data: bytes) -> None:
        """Append to what is left over, to be taken later; in place where nobody refers to it."""
        if not data:
            return
        if not self._data:
            self._data, self._at, self._is_own = data, 0, False
        elif self._is_own and isinstance(self._data, bytearray):
            self._data += data
        else:
            fresh = bytearray(memoryview(self._data)[self._at :])
            fresh += data
            self._data, self._at, self._is_own = fresh, 0, True

    def _keep(self, stream: bytes | bytearray, at: int, *, n_wanted: int) -> bool:
        """Keep the beginning of an incomplete frame; a copy, so that a large frame's memory goes with it."""
        self._n_wanted = n_wanted
        if at == len(stream):
            self._data, self._at = b"", 0
        elif at or stream is not self._data or not self._is_own:
            self._data, self._at, self._is_own = bytearray(memoryview(stream)[at:]), 0, True
        return False

    def _pause(self, stream: bytes | bytearray, at: int) -> bool:
        """Keep whole frames as they are: frames already given out may refer to these bytes."""
        self._n_wanted = 0
        self._data, self._at, self._is_own = (stream, at, False) if at < len(stream) else (b"", 0, False)
        return bool(self._data)

    # --- the binary stream --------------------------------------------------------------------------------------------

    def _take_hello(self) -> Hello | None:
        data = self._data
        if not MAGIC.startswith(data[: len(MAGIC)]):
            raise WireError("the stream does not begin with ISO1")
        n_head = len(MAGIC) + LENGTH_BYTES
        if len(data) < n_head:
            self._n_wanted = len(data) + 1  # look at every byte: a peer of another protocol may wait for our answer
            return None
        (n_payload,) = _UNPACK_LENGTH(data, len(MAGIC))
        if n_payload > HELLO_BYTES_MAX:
            raise WireError(f"hello of {n_payload} bytes is over {HELLO_BYTES_MAX}")
        end = n_head + n_payload
        self._n_wanted = end
        if len(data) < end:
            return None
        try:
            hello = _HELLO.decode(memoryview(data)[n_head:end])
        except _DECODE_ERRORS as error:
            raise WireError(f"bad hello: {error}") from None
        self._pause(data, end)
        return hello

    def _check_length(self, word: int) -> int:
        """Return the length that stands in a word with flags.

        Raises:
            WireError: It is too long, or says what was not agreed on.
        """
        n_payload = word & LENGTH_MASK
        flags = word - n_payload
        is_allowed = flags and (self._raw or not flags & RAW_FLAG) and (self._zstd is not None or not flags & ZSTD_FLAG)
        if not is_allowed or n_payload > FRAME_BYTES_MAX:
            raise WireError(f"a frame of {word} bytes is over {FRAME_BYTES_MAX}")
        return n_payload

    def _unwrap(self, payload: memoryview, word: int) -> tuple[Frame, int]:
        """Return a frame that is raw or compressed, and its length before compression.

        Raises:
            WireError: It is neither.
        """
        if word & ZSTD_FLAG:
            assert self._zstd is not None  # see _check_length
            payload = memoryview(self._zstd.decompress(payload))
        n_bytes = LENGTH_BYTES + len(payload)
        if not word & RAW_FLAG:
            return decode_frame(payload), n_bytes
        if len(payload) < HEAD_BYTES:
            raise WireError("a raw frame without its head")
        end = HEAD_BYTES + _UNPACK_HEAD(payload, 0)[0]
        if end > len(payload):
            raise WireError("a raw frame's head is longer than the frame")
        head = decode_frame(payload[HEAD_BYTES:end])
        if not isinstance(head, WITH_BODY):
            raise WireError(f"{type(head).__name__.upper()} has no body")
        return RawFrame(head, payload[end:]), n_bytes

    # --- lines of JSON ------------------------------------------------------------------------------------------------

    def _take_json_hello(self) -> Hello | None:
        end = self._data.find(b"\n")
        if max(end, len(self._data) if end < 0 else 0) > HELLO_BYTES_MAX:
            raise WireError(f"hello of more than {HELLO_BYTES_MAX} bytes")
        if end < 0:
            return None
        try:
            hello = _JSON_HELLO.decode(memoryview(self._data)[:end])
        except _DECODE_ERRORS as error:
            raise WireError(f"bad hello: {error}") from None
        self._pause(self._data, end + 1)
        return hello

    def _take_lines(self, data: bytes, sink: Sink) -> bool:
        n_known = len(self._data) - self._at if self._is_own else 0
        self.put(data)
        stream, at = self._data, self._at
        n_taken = 0
        searched = at + n_known  # these hold no line break
        while (end := stream.find(b"\n", max(at, searched))) >= 0:
            n_bytes = end + 1 - at
            line = bytes(stream[at:end]).strip()
            at = end + 1
            if n_bytes > FRAME_BYTES_MAX:
                break
            n_taken += 1
            if not line:
                continue
            try:
                frame = _JSON(line)
            except _DECODE_ERRORS as error:
                raise WireError(f"not a frame: {error}") from None
            if sink(frame, n_bytes) or n_taken >= TURN_FRAMES:
                return self._pause(stream, at)
        else:
            if len(stream) - at <= FRAME_BYTES_MAX:
                return self._keep(stream, at, n_wanted=0)
        raise WireError(f"a line is over {FRAME_BYTES_MAX} bytes")
