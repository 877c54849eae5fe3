"""Encoding: the bytes of a response's head and of its chunks.

Header blocks are cached by their tuple of fields: most responses of a server share a few. Refused here, because it would let a value end
the head or contradict the framing: names that are no token; CR, LF, NUL and what latin-1 lacks in values; Transfer-Encoding, Keep-Alive,
Upgrade (but in a 426, which must name the protocol), and Connection other than "close".
Source: RFC 9110 sections 5.1, 5.5 and 6.6.1 (Date), RFC 9112 sections 6 and 7.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple

from isopod.net.http.messages import HeaderPairs
from isopod.world.errors import InvalidArgument

LAST_CHUNK: Final = b"0\r\n\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
LENGTH_LINES: Final = tuple(b"content-length: %d\r\n" % n for n in range(1024))
"""The lines of small bodies."""
CACHED_BLOCKS_MAX: Final = 1024
CACHED_BLOCK_BYTES_MAX: Final = 1 << 10
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BAD_VALUE: Final = re.compile("[^\t\x20-\x7e\x80-\xff]")
_FRAMING: Final = frozenset(("transfer-encoding", "keep-alive", "upgrade", "te", "trailer", "proxy-connection"))
_DAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Block(NamedTuple):
    """A response's own fields, ready to be sent."""

    lines: bytes
    content_length: int | None
    """What the handler announced, None if it left that to the server."""
    has_date: bool
    wants_close: bool


class Blocks:
    """Encodes fields, and remembers."""

    def __init__(self) -> None:
        self._known: dict[HeaderPairs, Block] = {}
        self._plain: dict[HeaderPairs, bytes] = {}

    @property
    def plain(self) -> Mapping[HeaderPairs, bytes]:
        """The lines of what was encoded lately, and the empty one, where there is nothing else to know about them."""
        return self._plain

    def encode(self, headers: HeaderPairs) -> Block:
        """Return the block of these fields.

        Raises:
            InvalidArgument: A field must not be sent.
        """
        found = self._known.get(headers)
        if found is None:
            found = encode_block(headers)
            if len(found.lines) <= CACHED_BLOCK_BYTES_MAX:
                if len(self._known) >= CACHED_BLOCKS_MAX:
                    self._known.clear()
                    self._plain.clear()
                self._known[headers] = found
                if found.content_length is None and not found.has_date and not found.wants_close:
                    self._plain[headers] = found.lines + b"\r\n"
        return found


def take_upgrade(headers: HeaderPairs) -> tuple[HeaderPairs, bytes]:
    """Return the fields of a 426 without Upgrade, and the lines that say it (RFC 9110 sections 7.8 and 15.5.22).

    Raises:
        InvalidArgument: A value cannot be sent.
    """
    protocols = [value for name, value in headers if name.lower() == "upgrade"]
    if not protocols:
        return headers, b""
    wanted = ", ".join(protocols)
    check_field("x", wanted)
    others = tuple(pair for pair in headers if pair[0].lower() != "upgrade")
    return others, f"connection: upgrade\r\nupgrade: {wanted}\r\n".encode("latin-1")


def encode_block(headers: HeaderPairs) -> Block:
    """Return the block of these fields.

    Raises:
        InvalidArgument: A field must not be sent.
    """
    content_length, has_date, wants_close = None, False, False
    lines: list[str] = []
    for name, value in headers:
        lowered = name.lower()
        if lowered == "connection":
            if value.strip().lower() != "close":
                raise InvalidArgument("response header connection", value, "the server writes it; only close may be asked for")
            wants_close = True
            continue
        if lowered == "content-length":
            if content_length is not None or not (value.isascii() and value.isdigit()):
                raise InvalidArgument("response header content-length", value, "must be one number of bytes")
            content_length = int(value)
            continue
        has_date = has_date or lowered == "date"
        check_field(name, value)
        lines.append(f"{name}: {value}\r\n")
    return Block("".join(lines).encode("latin-1"), content_length, has_date, wants_close)


def check_field(name: str, value: str) -> None:
    """Refuse a field that must not be sent.

    Raises:
        InvalidArgument: The name is no token or belongs to the framing, or the value holds what a header cannot carry.
    """
    if not _TOKEN.fullmatch(name) or name.lower() in _FRAMING:
        raise InvalidArgument("response header", name, "is no field name that a handler may set")
    if _BAD_VALUE.search(value):
        raise InvalidArgument(f"value of the response header {name}", value[:64], "holds a control character, or what latin-1 lacks")


def http_date(seconds: int) -> str:
    """Return a time as "Sun, 06 Nov 1994 08:49:37 GMT".

    Args:
        seconds: Since the Unix epoch.
    """
    t = datetime.fromtimestamp(seconds, UTC)
    return f"{_DAYS[t.weekday()]}, {t.day:02d} {_MONTHS[t.month - 1]} {t.year:04d} {t.hour:02d}:{t.minute:02d}:{t.second:02d} GMT"


def parse_http_date(text: str) -> int | None:
    """Return the seconds since the Unix epoch of an HTTP date in the form that senders use (RFC 9110 section 5.6.7), None for others."""
    found = _DATE.fullmatch(text)
    if found is None or found[2] not in _MONTHS:
        return None
    try:
        t = datetime(int(found[3]), _MONTHS.index(found[2]) + 1, int(found[1]), int(found[4]), int(found[5]), int(found[6]), tzinfo=UTC)
    except ValueError:
        return None
    return int(t.timestamp())


_DATE: Final = re.compile(r"[A-Z][a-z]{2}, ([0-9]{2}) ([A-Z][a-z]{2}) ([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT")
