"""The WebSocket wire format as a pure state machine: bytes in, events out; frames built as bytes.

It knows neither sockets nor time. Both roles: a server reads masked frames and writes plain ones, a client the other way round.
Messages come out whole (their size is bounded), control frames as they arrive between fragments, in the order of the wire::

    str | bytes      a text or binary message
    Ping, Pong       with their payload
    Close            the peer's close frame; nothing follows
    Failure          the peer broke the protocol: the close code to answer with; nothing follows

Rules: a frame's header is judged before its payload is awaited, so that an announced gigabyte costs nothing. Text is checked as UTF-8
fragment by fragment. After Close or Failure the decoder is deaf.

Source: RFC 6455 sections 5 to 8; RFC 7692 for compressed messages.
"""

import codecs
from collections.abc import Callable
from typing import Final, NamedTuple

from isopod.net.http.websocket.deflate import Deflate, TooLong
from isopod.wire.mask import apply_mask
from isopod.world.errors import InvalidArgument

CONTINUATION: Final = 0x0
TEXT: Final = 0x1
BINARY: Final = 0x2
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

NORMAL: Final = 1000
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
NO_STATUS: Final = 1005
ABNORMAL: Final = 1006
INVALID_DATA: Final = 1007
POLICY_VIOLATION: Final = 1008
TOO_BIG: Final = 1009
INTERNAL_ERROR: Final = 1011
TRY_AGAIN_LATER: Final = 1013

CONTROL_BYTES_MAX: Final = 125
KEY_BYTES: Final = 4
_FIN: Final = 0x80
_WHOLE_TEXT: Final = _FIN | TEXT
_WHOLE_BINARY: Final = _FIN | BINARY
_RSV1: Final = 0x40
_RSV23: Final = 0x30
_MASKED: Final = 0x80
_LENGTH_16: Final = 126
_LENGTH_64: Final = 127
_WIRE_CODES: Final = frozenset({*range(1000, 1004), *range(1007, 1015)})
_EMPTY: Final = b""


class Ping(NamedTuple):
    """The peer asks for a Pong with the same payload."""

    payload: bytes


class Pong(NamedTuple):
    """An answer to a Ping, or an unasked sign of life."""

    payload: bytes


class Close(NamedTuple):
    """The peer's close frame; `code` is 1005 if it named none."""

    code: int
    reason: str


class Failure(NamedTuple):
    """The peer broke the protocol or a limit; `code` is what our close frame says."""

    code: int
    why: str


Event = str | bytes | Ping | Pong | Close | Failure


class Decoder:
    """Reads one direction of one connection.

    Args:
        expects_mask: True on a server, False on a client.
        message_bytes_max: Longest message, after joining and inflating.
        frame_bytes_max: Longest frame on the wire; None for `message_bytes_max`.
        deflate: The negotiated permessage-deflate, if any.
    """

    __slots__ = (
        "_buffer",
        "_deflate",
        "_expects_mask",
        "_frame_bytes_max",
        "_is_compressed",
        "_is_over",
        "_message_bytes",
        "_message_bytes_max",
        "_need",
        "_opcode",
        "_parts",
        "_utf8",
    )

    def __init__(
        self, *, expects_mask: bool, message_bytes_max: int, frame_bytes_max: int | None = None, deflate: Deflate | None = None
    ) -> None:
        self._expects_mask = _MASKED if expects_mask else 0
        self._message_bytes_max = message_bytes_max
        self._frame_bytes_max = message_bytes_max if frame_bytes_max is None else frame_bytes_max
        self._deflate = deflate
        self._buffer = bytearray()
        self._need = 2
        self._opcode = CONTINUATION  # of the message whose fragments are being collected
        self._parts: list[bytes | str] = []
        self._message_bytes = 0
        self._is_compressed = False
        self._utf8: codecs.IncrementalDecoder | None = None
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether Close or Failure came out: nothing more will."""
        return self._is_over

    @property
    def n_buffered(self) -> int:
        """The bytes held of an incomplete frame and message."""
        return len(self._buffer) + self._message_bytes

    def feed(self, data: bytes) -> list[Event]:
        """Take what was received and return what it completes, in order."""
        events: list[Event] = []
        if self._is_over:
            return events
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._need:
                return events
            data = bytes(self._buffer)
            self._buffer.clear()
        try:
            used = self._parse(data, events)
        except _Violation as violation:
            self._give_up()
            events.append(Failure(violation.code, violation.why))
            return events
        if self.is_over:
            self._give_up()
        elif used < len(data):
            self._buffer += memoryview(data)[used:]
        return events

    def _parse(self, data: bytes, events: list[Event]) -> int:
        """Parse all whole frames; return how many bytes they took. Sets `_need` to what the next step takes."""
        position, end = 0, len(data)
        masked = self._expects_mask
        while True:
            self._need = 2
            start = position + 2
            if start > end:
                return position
            first, second = data[position], data[position + 1]
            length = second & 0x7F
            if (first != _WHOLE_TEXT and first != _WHOLE_BINARY) or second & _MASKED != masked or self._opcode:  # noqa: PLR1714 - twice as fast
                self._check_header(first, second, length)
            if length >= _LENGTH_16:
                n_extra = 2 if length == _LENGTH_16 else 8
                if start + n_extra > end:
                    self._need = 2 + n_extra
                    return position
                length = _extended_length(data, start, n_extra)
                start += n_extra
            if length > self._frame_bytes_max or length + self._message_bytes > self._message_bytes_max:
                self._check_length(first, length)
            payload_start = start + KEY_BYTES if masked else start
            payload_end = payload_start + length
            if payload_end > end:
                self._need = payload_end - position
                return position
            payload = data[payload_start:payload_end]
            if masked and length:
                payload = apply_mask(payload, data[start:payload_start])
            position = payload_end
            opcode = first & 0x0F
            if opcode >= CLOSE:
                events.append(self._on_control(opcode, payload))
                if self._is_over:
                    return position
            elif first == _WHOLE_TEXT:
                events.append(_decode_text(payload))
            elif first == _WHOLE_BINARY:
                events.append(payload)
            else:
                self._on_fragment(first, payload, events)

    def _check_header(self, first: int, second: int, length: int) -> None:
        """Judge the first two bytes of a frame. Raises _Violation."""
        opcode = first & 0x0F
        if second & _MASKED != self._expects_mask:
            raise _Violation(PROTOCOL_ERROR, "a frame of a client is not masked" if self._expects_mask else "a server masks its frames")
        if opcode >= CLOSE:
            if opcode > PONG:
                raise _Violation(PROTOCOL_ERROR, f"unknown opcode {opcode}")
            if first & (_RSV1 | _RSV23):
                raise _Violation(PROTOCOL_ERROR, "a reserved bit is set on a control frame")
            if not first & _FIN:
                raise _Violation(PROTOCOL_ERROR, "a control frame is fragmented")
            if length > CONTROL_BYTES_MAX:
                raise _Violation(PROTOCOL_ERROR, "a control frame is longer than 125 bytes")
            return
        if opcode > BINARY:
            raise _Violation(PROTOCOL_ERROR, f"unknown opcode {opcode}")
        if first & _RSV23 or (first & _RSV1 and (self._deflate is None or opcode == CONTINUATION)):
            raise _Violation(PROTOCOL_ERROR, "a reserved bit is set")
        if (opcode == CONTINUATION) != (self._opcode != CONTINUATION):
            raise _Violation(
                PROTOCOL_ERROR, "a continuation without a beginning" if opcode == CONTINUATION else "a message inside a message"
            )

    def _check_length(self, first: int, length: int) -> None:
        """Judge a length that is over a limit: a control frame's counts against none. Raises _Violation."""
        if first & 0x0F >= CLOSE:
            return
        if length > self._frame_bytes_max:
            raise _Violation(TOO_BIG, f"a frame of {length} bytes, at most {self._frame_bytes_max} are taken")
        raise _Violation(TOO_BIG, f"a message of more than {self._message_bytes_max} bytes")

    def _on_control(self, opcode: int, payload: bytes) -> Ping | Pong | Close:
        if opcode == PING:
            return Ping(payload)
        if opcode == PONG:
            return Pong(payload)
        self._is_over = True
        return _parse_close(payload)

    def _on_fragment(self, first: int, payload: bytes, events: list[Event]) -> None:
        """Take a frame of a fragmented or compressed message; the last one completes it."""
        opcode = first & 0x0F
        if opcode != CONTINUATION:
            self._opcode = opcode
            self._is_compressed = bool(first & _RSV1)
            if opcode == TEXT:
                self._utf8 = codecs.getincrementaldecoder("utf-8")()
        is_last = bool(first & _FIN)
        if self._is_compressed:
            payload = self._inflate(payload, is_last=is_last)
        self._message_bytes += len(payload)
        if self._utf8 is not None:
            try:
                text = self._utf8.decode(payload, is_last)
            except UnicodeDecodeError:
                raise _Violation(INVALID_DATA, "a text message is not UTF-8") from None
            if text:
                self._parts.append(text)
        elif payload:
            self._parts.append(payload)
        if is_last:
            events.append(self._take_message())

    def _inflate(self, payload: bytes, *, is_last: bool) -> bytes:
        assert self._deflate is not None
        try:
            return self._deflate.inflate(payload, self._message_bytes_max - self._message_bytes, is_last=is_last)
        except TooLong:
            raise _Violation(TOO_BIG, f"a message of more than {self._message_bytes_max} bytes") from None
        except ValueError as error:
            raise _Violation(INVALID_DATA, str(error)) from None

    def _take_message(self) -> str | bytes:
        joiner: Callable[..., str | bytes] = "".join if self._utf8 is not None else _EMPTY.join
        message = joiner(self._parts)
        self._opcode = CONTINUATION
        self._parts = []
        self._message_bytes = 0
        self._utf8 = None
        return message

    def _give_up(self) -> None:
        self._is_over = True
        self._buffer = bytearray()
        self._parts = []
        self._message_bytes = 0


def encode_frame(opcode: int, payload: bytes, *, key: bytes | None = None, is_last: bool = True, is_compressed: bool = False) -> bytes:
    """Build one frame.

    Args:
        opcode: What it is.
        payload: Its content, not yet masked.
        key: The 4 bytes of a client's mask; None on a server.
        is_last: False if fragments follow.
        is_compressed: Whether the message is deflated (first frame only).
    """
    length = len(payload)
    if key is None and length < _LENGTH_16 and is_last and not is_compressed:
        return _SHORT_HEADS[opcode << 7 | length] + payload
    first = opcode | (_FIN if is_last else 0) | (_RSV1 if is_compressed else 0)
    masked = 0 if key is None else _MASKED
    if length < _LENGTH_16:
        head = bytes((first, masked | length))
    elif length < 1 << 16:
        head = bytes((first, masked | _LENGTH_16, length >> 8, length & 0xFF))
    else:
        head = bytes((first, masked | _LENGTH_64)) + length.to_bytes(8, "big")
    if key is None:
        return head + payload
    return head + key + (apply_mask(payload, key) if length else payload)


def encode_close(code: int = NORMAL, reason: str = "", *, key: bytes | None = None) -> bytes:
    """Build a close frame; 1005 builds one without a code. A reason that is too long is cut at a character.

    Raises:
        InvalidArgument: The code must not be sent.
    """
    if code == NO_STATUS:
        return encode_frame(CLOSE, _EMPTY, key=key)
    if not is_wire_code(code):
        raise InvalidArgument("close code", code, "not one that a frame may carry", "1000, 1001, 1007 to 1014 or 3000 to 4999")
    text = reason.encode("utf-8", "replace")[: CONTROL_BYTES_MAX - 2].decode("utf-8", "ignore").encode()
    return encode_frame(CLOSE, code.to_bytes(2, "big") + text, key=key)


def is_wire_code(code: int) -> bool:
    """Return whether a close frame may carry this code (RFC 6455 section 7.4 and the IANA registry)."""
    return code in _WIRE_CODES or 3000 <= code <= 4999


class _Violation(Exception):
    """Leaves the parser; becomes a Failure event."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why


def _extended_length(data: bytes, start: int, n_bytes: int) -> int:
    length = int.from_bytes(data[start : start + n_bytes], "big")
    if length >> 63:
        raise _Violation(PROTOCOL_ERROR, "the highest bit of a length is set")
    if length < _LENGTH_16 or (n_bytes == 8 and length < 1 << 16):
        raise _Violation(PROTOCOL_ERROR, "a length is not written in the shortest form")
    return length


def _decode_text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise _Violation(INVALID_DATA, "a text message is not UTF-8") from None


def _parse_close(payload: bytes) -> Close:
    if not payload:
        return Close(NO_STATUS, "")
    code = int.from_bytes(payload[:2], "big")
    if len(payload) == 1 or not is_wire_code(code):
        raise _Violation(PROTOCOL_ERROR, "a close frame with half a code" if len(payload) == 1 else f"close code {code} is not allowed")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError:
        raise _Violation(INVALID_DATA, "the reason of a close frame is not UTF-8") from None


_SHORT_HEADS: Final = tuple(bytes((_FIN | opcode, length)) for opcode in range(16) for length in range(128))
