"""permessage-deflate: the compression extension of WebSocket, with a bound on what it may inflate to.

Off unless a route or client asks for it: it costs 300 KiB per connection with both contexts kept, and mixing secrets with a stranger's
text in one compression context leaks their length (CRIME). The parameters are parsed strictly: an offer that is malformed, or that asks
for what is not done here, is declined, which the RFC allows. Source: RFC 7692.
"""

import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

NAME: Final = "permessage-deflate"
_TAIL: Final = b"\x00\x00\xff\xff"
_WINDOW_MAX: Final = 15
_MEMORY_LEVEL: Final = 6
_LEVEL: Final = 3
_FLAGS: Final = ("server_no_context_takeover", "client_no_context_takeover")
_WINDOWS: Final = ("server_max_window_bits", "client_max_window_bits")


class TooLong(Exception):
    """The message inflates to more than it may."""


class DeflateParameters(NamedTuple):
    """What the two sides agreed on. Windows are in bits, 9 to 15."""

    server_no_context_takeover: bool = False
    client_no_context_takeover: bool = False
    server_window_bits: int = _WINDOW_MAX
    client_window_bits: int = _WINDOW_MAX

    def header(self) -> str:
        """Return the `Sec-WebSocket-Extensions` value that says so."""
        words = [NAME]
        words += [name for name, is_set in zip(_FLAGS, self[:2], strict=True) if is_set]
        words += [f"{name}={bits}" for name, bits in zip(_WINDOWS, self[2:], strict=True) if bits != _WINDOW_MAX]
        return "; ".join(words)


class Deflate:
    """Both directions of one connection.

    Args:
        parameters: What was agreed.
        is_client: Which side this is.
    """

    __slots__ = ("_deflater", "_inflater", "_keeps_in", "_keeps_out", "_window_in", "_window_out")

    def __init__(self, parameters: DeflateParameters, *, is_client: bool) -> None:
        no_in, no_out = parameters.server_no_context_takeover, parameters.client_no_context_takeover
        bits_in, bits_out = parameters.server_window_bits, parameters.client_window_bits
        if not is_client:
            no_in, no_out, bits_in, bits_out = no_out, no_in, bits_out, bits_in
        self._keeps_in, self._keeps_out = not no_in, not no_out
        self._window_in, self._window_out = bits_in, bits_out
        self._inflater = zlib.decompressobj(-bits_in)
        self._deflater = self._new_deflater()

    def deflate(self, payload: bytes) -> bytes:
        """Compress one message."""
        data = self._deflater.compress(payload) + self._deflater.flush(zlib.Z_SYNC_FLUSH)
        if not self._keeps_out:
            self._deflater = self._new_deflater()
        return data.removesuffix(_TAIL)

    def inflate(self, payload: bytes, n_bytes_max: int, *, is_last: bool) -> bytes:
        """Inflate one frame of a message.

        Args:
            payload: The frame's content.
            n_bytes_max: The most it may become.
            is_last: Whether the message ends here.

        Raises:
            TooLong: It would become more.
            ValueError: It is not deflated data.
        """
        if is_last:
            payload += _TAIL
        try:
            data = self._inflater.decompress(payload, n_bytes_max + 1)
        except zlib.error as error:
            raise ValueError(f"a compressed message is damaged: {error}") from None
        if len(data) > n_bytes_max:
            raise TooLong
        # Behind a final block (BFINAL) comes a zero byte, and our tail; zlib would keep whatever else a peer sends there, without bound.
        if len(self._inflater.unused_data) > 1 + len(_TAIL):
            raise ValueError("a compressed message goes on behind its end")
        if is_last and (not self._keeps_in or self._inflater.eof):
            self._inflater = zlib.decompressobj(-self._window_in)
        return data

    def _new_deflater(self) -> "zlib._Compress":
        return zlib.compressobj(_LEVEL, zlib.DEFLATED, -self._window_out, _MEMORY_LEVEL)


def accept_offer(offers: str) -> DeflateParameters | None:
    """Choose the first offer of a client that a server can honour; None if there is none."""
    for offer in offers.split(","):
        name, parameters = _split(offer)
        if name == NAME:
            found = _read(parameters, is_offer=True)
            if found is not None:
                return found
    return None


def read_answer(answer: str) -> DeflateParameters | None:
    """Read what a server chose; None if it is not an answer to our offer (`permessage-deflate; client_max_window_bits`)."""
    name, parameters = _split(answer)
    return _read(parameters, is_offer=False) if name == NAME and "," not in answer else None


def _split(text: str) -> tuple[str, Sequence[str]]:
    name, *parameters = (part.strip() for part in text.split(";"))
    return name.lower(), parameters


def _read(parameters: Sequence[str], *, is_offer: bool) -> DeflateParameters | None:
    seen: dict[str, int] = {}
    for parameter in parameters:
        name, separator, value = (part.strip() for part in parameter.partition("="))
        value = value.strip('"')
        if name in seen or (name in _FLAGS and separator):
            return None
        if name in _FLAGS:
            seen[name] = 1
        elif name == "client_max_window_bits" and not separator and is_offer:
            seen[name] = _WINDOW_MAX
        elif name in _WINDOWS and value in ("9", "10", "11", "12", "13", "14", "15"):
            seen[name] = int(value)
        else:
            return None  # unknown, malformed, or a window of 8 bits, which zlib does not make
    flags, windows = (name in seen for name in _FLAGS), (seen.get(name, _WINDOW_MAX) for name in _WINDOWS)
    return DeflateParameters(*flags, *windows)
