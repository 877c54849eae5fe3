"""Compression of responses: gzip or zstd, as the client's Accept-Encoding wants it.

Left alone: small bodies, types that do not shrink, what is encoded already, parts of something (206, Content-Range), `no-transform`, and
what the client did not ask for. Whole bodies over `SLICE_BYTES` are compressed in slices with turns of the loop in between, and so go out
as a stream; a stream is flushed after each of its pieces, so that none is held back. Source: RFC 9110 sections 8.4, 12.5.3 and 12.5.5,
RFC 8878.
"""

import zlib
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Sequence
from typing import Final, Literal, Protocol

import zstandard

from isopod.net.http.messages import Answer, Handler, Request, Response
from isopod.net.http.middleware import Middleware, finish
from isopod.runtime.scheduling import maybe_yield

Coding = Literal["zstd", "gzip"]

LEAST_BYTES: Final = 1 << 10
SLICE_BYTES: Final = 64 << 10
_GZIP_LEVEL: Final = 6
_ZSTD_LEVEL: Final = 3
_GZIP_WINDOW: Final = 31  # zlib's word for a gzip wrapper
_TYPES: Final = frozenset(
    "application/json application/javascript application/xml application/wasm application/manifest+json application/x-ndjson "
    "application/openmetrics-text image/svg+xml font/ttf font/otf".split()
)
_SUFFIXES: Final = ("+json", "+xml", "+text")


class _Compressor(Protocol):
    def compress(self, data: bytes) -> bytes: ...

    def sync(self) -> bytes: ...

    def end(self) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._object = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)

    def compress(self, data: bytes) -> bytes:
        return self._object.compress(data)

    def sync(self) -> bytes:
        return self._object.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        return self._object.flush(zlib.Z_FINISH)


class _Zstd:
    def __init__(self) -> None:
        self._object = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()

    def compress(self, data: bytes) -> bytes:
        return self._object.compress(data)

    def sync(self) -> bytes:
        return self._object.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)

    def end(self) -> bytes:
        return self._object.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)


def compress(*, codings: Sequence[Coding] = ("zstd", "gzip"), least_bytes: int = LEAST_BYTES) -> Middleware:
    """Return the middleware.

    Args:
        codings: What may be used, the best first.
        least_bytes: Smaller bodies are left alone.
    """

    def middleware(request: Request, handler: Handler) -> Answer | Awaitable[Answer]:
        def apply(response: Response) -> Response:
            if not _is_suitable(response, least_bytes):
                return response
            response.vary("accept-encoding")
            coding = choose_coding(request.headers.combined("accept-encoding"), codings)
            if coding is not None:
                _encode(response, coding)
            return response

        return finish(handler(request), apply)

    return middleware


def choose_coding(accepted: str, codings: Sequence[Coding]) -> Coding | None:
    """Return the best coding a client takes, None for none.

    Args:
        accepted: Its Accept-Encoding; "" takes nothing.
        codings: Ours, the best first; it wins among equal weights.
    """
    weights: dict[str, float] = {}
    for item in accepted.split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        weights[name] = next((_weight(each) for each in parameters if each.startswith("q=")), 1.0)
    others = weights.get("*", 0.0)
    plain = weights.get("identity", 0.0)
    best: Coding | None = None
    best_weight = 0.0
    for coding in codings:
        weight = weights.get("x-gzip", others) if coding == "gzip" and "gzip" not in weights else weights.get(coding, others)
        if weight > best_weight and weight >= plain:
            best, best_weight = coding, weight
    return best


def _weight(parameter: str) -> float:
    try:
        weight = float(parameter[2:])
    except ValueError:
        return 0.0
    return weight if 0.0 <= weight <= 1.0 else 0.0


def _is_suitable(response: Response, least_bytes: int) -> bool:
    if response.status in {204, 206, 304} or (isinstance(response.body, bytes) and len(response.body) < least_bytes):
        return False
    if response.header("content-encoding") is not None or response.header("content-range") is not None:
        return False
    if "no-transform" in (response.header("cache-control") or "").lower():
        return False
    length = response.header("content-length")
    if length is not None and length.isdigit() and int(length) < least_bytes:
        return False
    kind = (response.header("content-type") or "").partition(";")[0].strip().lower()
    return kind.startswith("text/") or kind in _TYPES or kind.endswith(_SUFFIXES)


def _encode(response: Response, coding: Coding) -> None:
    body = response.body
    if isinstance(body, bytes):
        if len(body) <= SLICE_BYTES:
            compressor = _compressor(coding)
            packed = compressor.compress(body) + compressor.end()
            if len(packed) >= len(body):
                return
            response.body = packed
        else:
            response.body = _stream(_slices(body), coding, is_live=False)
    else:
        response.body = _stream(body, coding, is_live=True)
    response.remove_header("content-length")
    response.remove_header("accept-ranges")
    response.add_header("content-encoding", coding)
    tag = response.header("etag")
    if tag is not None and not tag.startswith("W/"):
        response.set_header("etag", f"W/{tag}")  # other bytes, the same meaning


def _compressor(coding: Coding) -> _Compressor:
    return _Gzip() if coding == "gzip" else _Zstd()


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), SLICE_BYTES):
        yield body[start : start + SLICE_BYTES]
        await maybe_yield()


async def _stream(pieces: AsyncIterable[bytes], coding: Coding, *, is_live: bool) -> AsyncIterator[bytes]:
    compressor = _compressor(coding)
    source = aiter(pieces)
    try:
        async for piece in source:
            if not piece:
                continue
            packed = compressor.compress(bytes(piece))
            if is_live:
                packed += compressor.sync()
            if packed:
                yield packed
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
    yield compressor.end()
