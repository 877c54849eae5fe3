"""Request heads out, compressed bodies in: the parts of the HTTP client that are pure functions of bytes.

Rules: nothing that could end a field early (CR, LF, NUL) goes out. Decompression gives pieces of bounded size whatever the input claims:
gzip and deflate by zlib's own bound, zstd by feeding it 512 bytes at a time, which at worst become 16 MiB.
Source: RFC 9112 sections 3 to 7; RFC 1950 to 1952; RFC 8878.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

import zstandard

from isopod.net.http.url import Url
from isopod.world.errors import InvalidArgument, ProtocolViolation, Unsupported

ACCEPT_ENCODING: Final = "gzip, zstd, deflate"
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_FRAMING: Final = frozenset({"transfer-encoding", "trailer", "te"})
_PIECE_BYTES: Final = 64 << 10
_ZSTD_SLICE_BYTES: Final = 512
_ZSTD_WINDOW_BYTES_MAX: Final = 8 << 20
_GZIP_MEMBERS_MAX: Final = 1000


class Decompressor(Protocol):
    """Undoes one content coding."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` inflates to, in pieces. Raises ProtocolViolation."""

    def finish(self) -> None:
        """The input has ended. Raises ProtocolViolation if the compressed data has not."""


def new_decompressor(coding: str, peer: str) -> Decompressor | None:
    """Return what undoes a Content-Encoding, None for "identity". Raises Unsupported for what was never asked for."""
    if coding in ("gzip", "x-gzip", "deflate"):
        return _Zlib(peer, is_gzip=coding != "deflate")
    if coding == "zstd":
        return _Zstd(peer)
    if coding == "identity":
        return None
    raise Unsupported(f"content coding {coding!r}", f"{peer} was not told that it is", "ask with decompress=False to get it as it is")


def request_head(method: str, url: Url, headers: Iterable[tuple[str, str]], defaults: Iterable[tuple[str, str]]) -> str:
    """Return the head of a request but for its framing fields and the empty line.

    Args:
        method: A token, sent as it is.
        url: Where to.
        headers: The caller's fields.
        defaults: Fields that are added unless the caller gave one of that name.

    Raises:
        InvalidArgument: The method or a field cannot be sent.
    """
    if not _TOKEN.fullmatch(method):
        raise InvalidArgument("HTTP method", method, "is not a token")
    lines = [f"{method} {url.target} HTTP/1.1"]
    given = []
    for name, value in headers:
        if not _TOKEN.fullmatch(name):
            raise InvalidArgument("header name", name, "is not a token")
        if not _VALUE.fullmatch(value):
            raise InvalidArgument(f"header {name}", value, "holds characters that no field may carry")
        lowered = name.lower()
        if lowered in _FRAMING:
            raise InvalidArgument("header name", name, "the client writes it itself")
        given.append(lowered)
        lines.append(f"{name}: {value}")
    if "host" not in given:
        lines.insert(1, f"host: {url.host_field}")
    elif given.count("host") > 1:
        raise InvalidArgument("header name", "host", "may be given once")
    lines.extend(f"{name}: {value}" for name, value in defaults if name not in given)
    return "\r\n".join(lines) + "\r\n"


def chunk(data: bytes) -> bytes:
    """Return one piece in the chunked coding; an empty one would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK: Final = b"0\r\n\r\n"


class _Zlib:
    def __init__(self, peer: str, *, is_gzip: bool) -> None:
        self._peer = peer
        self._is_gzip = is_gzip
        self._inflater = zlib.decompressobj(31 if is_gzip else 15)
        self._is_fresh = True
        self._held = b""
        self._n_members = 1

    def feed(self, data: bytes) -> Iterator[bytes]:
        data, self._held = self._held + data, b""
        if self._is_fresh and len(data) < 2:  # the wrapper is told by two bytes
            self._held = data
            return
        while data:
            if self._inflater.eof:
                data = self._next_member(data)
            try:
                piece = self._inflater.decompress(data, _PIECE_BYTES)
            except zlib.error as error:
                if not self._is_fresh or self._is_gzip:
                    raise ProtocolViolation(self._peer, f"its compressed body is damaged: {error}") from None
                # Some servers mean raw deflate by "deflate", without the wrapper of RFC 1950.
                self._is_fresh = False
                self._inflater = zlib.decompressobj(-15)
                continue
            self._is_fresh = False
            data = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
            if piece:
                yield piece
        while not self._inflater.eof and (piece := self._flush_some()):
            yield piece

    def finish(self) -> None:
        if not self._inflater.eof and (not self._is_fresh or self._held):
            raise ProtocolViolation(self._peer, "its compressed body ends too early")

    def _flush_some(self) -> bytes:
        """Return what zlib holds back because the bound of the last call was met exactly."""
        return self._inflater.decompress(b"", _PIECE_BYTES)

    def _next_member(self, data: bytes) -> bytes:
        self._n_members += 1
        if not self._is_gzip or self._n_members > _GZIP_MEMBERS_MAX:
            raise ProtocolViolation(self._peer, "its compressed body goes on behind its end")
        self._inflater = zlib.decompressobj(31)
        return data


class _Zstd:
    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._inflater = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES_MAX).decompressobj()
        self._is_fresh = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        for start in range(0, len(data), _ZSTD_SLICE_BYTES):
            if self._inflater.eof:
                raise ProtocolViolation(self._peer, "its compressed body goes on behind its end")
            self._is_fresh = False
            try:
                piece = self._inflater.decompress(data[start : start + _ZSTD_SLICE_BYTES])
            except zstandard.ZstdError as error:
                raise ProtocolViolation(self._peer, f"its compressed body is damaged: {error}") from None
            if piece:
                yield piece
        if self._inflater.unused_data:
            raise ProtocolViolation(self._peer, "its compressed body goes on behind its end")

    def finish(self) -> None:
        if not self._inflater.eof and not self._is_fresh:
            raise ProtocolViolation(self._peer, "its compressed body ends too early")
