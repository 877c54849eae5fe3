"""The frames between host and guest, and between a client and a machine's shim. A codec: bytes in, frames out, no I/O.

Frame = u32 LE n, the length of what follows (5..=65541) | u8 kind | u32 LE stream | payload. Stream 0 is the channel's own; others are
opened by a request. The Rust twin is rust/guest/src/protocol.rs. Neither side trusts the other: what is no frame breaks the channel.
"""

import enum
import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

VERSION: Final = 1
PAYLOAD_BYTES_MAX: Final = 65_536
WINDOW_BYTES: Final = 262_144
"""What a sender may send on a stream before the receiver grants more."""
MAIN_STREAM: Final = 1
_HEAD: Final = struct.Struct("<IBI")
_AFTER_LENGTH: Final = _HEAD.size - 4
_U32: Final = struct.Struct("<I")
_SIZE: Final = struct.Struct("<HH")


class Kind(enum.IntEnum):
    """What a frame is about."""

    HELLO = 1
    REQUEST = 2
    RESPONSE = 3
    STDIN = 4
    STDIN_END = 5
    STDOUT = 6
    STDERR = 7
    RESIZE = 8
    SIGNAL = 9
    EXIT = 10
    CREDIT = 11
    DATA = 12
    DATA_END = 13
    EVENT = 14
    CLOSE = 15
    PING = 16
    PONG = 17


TAKES_CREDIT: Final = (Kind.STDIN, Kind.STDOUT, Kind.STDERR, Kind.DATA)
"""The kinds whose payload counts against the receiver's credit."""


class Frame(NamedTuple):
    """One frame."""

    kind: Kind
    stream: int
    payload: bytes

    def json(self) -> Any:
        """Return the payload as JSON.

        Raises:
            BrokenChannel: It is none.
        """
        try:
            return msgspec.json.decode(self.payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BrokenChannel(f"a frame that should be JSON is not: {error}") from error

    def number(self) -> int:
        """Return the payload of a CREDIT.

        Raises:
            BrokenChannel: It is none.
        """
        if len(self.payload) != _U32.size:
            raise BrokenChannel("a credit of impossible length")
        return int(_U32.unpack(self.payload)[0])


class BrokenChannel(ValueError):
    """The other side sent what is no frame."""


def encode(kind: Kind, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame; `payload` is at most PAYLOAD_BYTES_MAX."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"a payload of {len(payload)} bytes was not cut into pieces")
    return _HEAD.pack(len(payload) + _AFTER_LENGTH, kind, stream) + payload


def encode_json(kind: Kind, stream: int, value: object) -> bytes:
    """Return one frame with JSON in it."""
    return encode(kind, stream, msgspec.json.encode(value))


def encode_credit(stream: int, n_bytes: int) -> bytes:
    """Return a frame that grants so many more bytes."""
    return encode(Kind.CREDIT, stream, _U32.pack(n_bytes))


def encode_size(stream: int, rows: int, columns: int) -> bytes:
    """Return a frame with a terminal's new size; what does not fit is cut."""
    return encode(Kind.RESIZE, stream, _SIZE.pack(min(rows, 0xFFFF), min(columns, 0xFFFF)))


def encode_data(kind: Kind, stream: int, data: bytes) -> Iterator[bytes]:
    """Yield frames that carry `data`, which may be of any length."""
    for start in range(0, len(data), PAYLOAD_BYTES_MAX):
        yield encode(kind, stream, data[start : start + PAYLOAD_BYTES_MAX])


class Decoder:
    """Collects bytes and yields whole frames. Holds at most one frame and what was fed last."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Add bytes, return the frames that are whole.

        Raises:
            BrokenChannel: They are none. The channel is to be closed.
        """
        buffer = self._buffer
        buffer += data
        frames = []
        start = 0
        while len(buffer) - start >= _HEAD.size:
            length, kind, stream = _HEAD.unpack_from(buffer, start)
            if not _AFTER_LENGTH <= length <= PAYLOAD_BYTES_MAX + _AFTER_LENGTH:
                raise BrokenChannel("a frame of impossible length")
            if kind not in _KINDS:
                raise BrokenChannel("a frame of an unknown kind")
            end = start + 4 + length
            if len(buffer) < end:
                break
            frames.append(Frame(_KINDS[kind], stream, bytes(buffer[start + _HEAD.size : end])))
            start = end
        del buffer[:start]
        return frames


_KINDS: Final = {int(kind): kind for kind in Kind}
