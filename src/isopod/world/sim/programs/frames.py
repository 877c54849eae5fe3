"""The frames between a microVM's agent, its shim, and the shim's clients, as the simulated shim and the simulated guest speak them.

Frame = u32 LE n, the length of what follows (5..=65541) | u8 kind | u32 LE stream | payload. Written from the protocol's text, apart from
the engine's codec: what is tested and what it is tested against do not share a mistake.
"""

import enum
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

PAYLOAD_BYTES_MAX: Final = 65_536
WINDOW_BYTES: Final = 262_144
MAIN_STREAM: Final = 1
STREAMS_MAX: Final = 256
COMMANDS_MAX: Final = 64
_HEAD: Final = struct.Struct("<IBI")
_LENGTH_BYTES: Final = 4


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


OUTPUTS: Final = (Kind.STDOUT, Kind.STDERR, Kind.DATA)
"""What the guest sends on credit."""
INPUTS: Final = (Kind.STDIN, Kind.DATA)
"""What the host sends on credit."""
_KINDS: Final = {int(kind): kind for kind in Kind}


class BadFrame(Exception):
    """The other side broke the protocol."""


class Frame(NamedTuple):
    """One frame."""

    kind: Kind
    stream: int
    payload: bytes = b""

    def encode(self) -> bytes:
        """Return its bytes."""
        return _HEAD.pack(len(self.payload) + _HEAD.size - _LENGTH_BYTES, self.kind, self.stream) + self.payload

    def object(self) -> dict[str, Any]:
        """Return its JSON object."""
        try:
            value = msgspec.json.decode(self.payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadFrame(f"{self.kind.name} without JSON") from error
        if not isinstance(value, dict):
            raise BadFrame(f"{self.kind.name} without an object")
        return value

    def number(self) -> int:
        """Return the number that a CREDIT carries."""
        if len(self.payload) != _LENGTH_BYTES:
            raise BadFrame("a CREDIT of another length than 4")
        return int.from_bytes(self.payload, "little")


def of_object(kind: Kind, stream: int, value: Mapping[str, object]) -> Frame:
    """Return a frame that carries JSON."""
    return Frame(kind, stream, msgspec.json.encode(value))


def of_credit(stream: int, n_bytes: int) -> Frame:
    """Return a frame that grants more bytes."""
    return Frame(Kind.CREDIT, stream, n_bytes.to_bytes(_LENGTH_BYTES, "little"))


def of_error(stream: int, code: str, message: str) -> Frame:
    """Return the refusal of a request."""
    return of_object(Kind.RESPONSE, stream, {"error": {"code": code, "message": message}})


def of_ok(stream: int, value: Mapping[str, object]) -> Frame:
    """Return the success of a request."""
    return of_object(Kind.RESPONSE, stream, {"ok": value})


class Decoder:
    """Bytes in, frames out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that are whole now.

        Raises:
            BadFrame: What came is none.
        """
        self._buffer += data
        frames: list[Frame] = []
        while len(self._buffer) >= _HEAD.size:
            length, number, stream = _HEAD.unpack_from(self._buffer)
            if not _HEAD.size - _LENGTH_BYTES <= length <= PAYLOAD_BYTES_MAX + _HEAD.size - _LENGTH_BYTES or number not in _KINDS:
                raise BadFrame(f"a frame of {length} bytes and kind {number}")
            end = _LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            frames.append(Frame(_KINDS[number], stream, bytes(self._buffer[_HEAD.size : end])))
            del self._buffer[:end]
        return frames
