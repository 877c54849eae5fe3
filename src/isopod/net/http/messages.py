"""Messages: what a handler takes (`Request`) and what it gives (`Response`, `Upgrade`, or raises: `HttpError`).

Not the wire: parsing, framing, limits and time-outs are the connection's (`connection`). A handler sees only requests that were found
sound, and never writes bytes itself.

Rules: a plain function is answered at once, without a task; who needs the body of a request, or to wait, is a coroutine function. A body
may be read once, by `read` or by `stream`. What a handler does not read is thrown away. Header names and values of a response are checked
when it is written: what would break the message (CR, LF, NUL) is refused, and the peer gets a 500.
Source: RFC 9110, RFC 9112.
"""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec

from isopod.net.http.headers import Headers
from isopod.net.http.status import code_of, reason
from isopod.world.errors import InvalidArgument, IsopodError

HeaderPairs = tuple[tuple[str, str], ...]
Body = bytes | AsyncIterable[bytes]
"""A whole body, or its pieces as they come: pulled only as fast as the peer takes them."""

QUERY_FIELDS_MAX: Final = 1000
TEXT: Final[HeaderPairs] = (("content-type", "text/plain; charset=utf-8"),)
HTML: Final[HeaderPairs] = (("content-type", "text/html; charset=utf-8"),)
JSON: Final[HeaderPairs] = (("content-type", "application/json"),)

T = TypeVar("T")
_encode_json = msgspec.json.Encoder().encode
_NO_PARAMS: Final[Mapping[str, str]] = {}
_NO_HEADERS: Final = Headers()


class BodySource(Protocol):
    """Where a request's body comes from."""

    async def read(self, n_bytes_max: int | None) -> bytes:
        """Return all of it."""

    def stream(self, n_bytes_max: int | None) -> AsyncIterator[bytes]:
        """Iterate over it."""


class HasInfo(Protocol):
    """A transport, as far as `Request.transport_info` needs one."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return a fact by its name."""


class HttpError(IsopodError):
    """Raised by a handler to be answered with a status and the JSON body {"code", "message", "hint"}.

    Args:
        status: 400 to 599.
        message: One line for the peer; the status' reason phrase if empty.
        hint: What to do next, or "".
        code: A stable word for programs; made of the reason phrase if empty ("not_found").
        headers: Added to the answer.
    """

    code = "http"
    status = 500
    headers: HeaderPairs = ()

    def __init__(self, status: int, message: str = "", hint: str = "", *, code: str = "", headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message or reason(status), hint)
        self.status = status
        self.code = code or code_of(status)
        self.headers = tuple(headers)


class Request:
    """One request.

    Args:
        method: GET, POST, ...
        target: As it was sent: "/a%20b?c=d"; in absolute form only what follows the authority.
        headers: Its fields.
        version: "1.1" or "1.0".
        body: All of it, or where it comes from.
        peer: The client's address: (host, port, ...) or the path of a Unix socket, "" mostly.
        scheme: "http" or "https".
        transport: What the connection is made of, for `transport_info`.
    """

    __slots__ = ("_body", "_path", "_state", "_transport", "headers", "method", "params", "peer", "scheme", "target", "version")

    def __init__(  # noqa: PLR0917 - made once per request, on the hot path; others name the arguments
        self,
        method: str,
        target: str,
        headers: Headers = _NO_HEADERS,
        version: str = "1.1",
        body: bytes | BodySource = b"",
        peer: Any = "",  # what the socket's family calls an address
        scheme: str = "http",
        transport: HasInfo | None = None,
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.version = version
        self.peer = peer
        self.scheme = scheme
        self.params = _NO_PARAMS
        self._body = body
        self._path: str | None = None
        self._state: dict[str, object] | None = None
        self._transport = transport

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.target}>"

    @property
    def raw_path(self) -> str:
        """The target's path as it was sent, percent-encoded."""
        return self.target.partition("?")[0]

    @property
    def path(self) -> str:
        """The target's path, percent-decoded once.

        Raises:
            HttpError: 400: it is not well encoded UTF-8, or holds a NUL.
        """
        path = self._path
        if path is None:
            path = self._path = decode_path(self.target.partition("?")[0])
        return path

    @property
    def query(self) -> str:
        """What follows the "?", as it was sent; "" if nothing does."""
        return self.target.partition("?")[2]

    def query_pairs(self) -> list[tuple[str, str]]:
        """Return the query's NAME=VALUE fields decoded, in order.

        Raises:
            HttpError: 400: more than QUERY_FIELDS_MAX fields, or not UTF-8.
        """
        try:
            return parse_qsl(self.query, keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS_MAX)
        except ValueError as error:
            raise HttpError(400, "the query of the URL is malformed") from error

    @property
    def state(self) -> dict[str, object]:
        """What middleware leaves for those after it, "request_id" for one."""
        if self._state is None:
            self._state = {}
        return self._state

    @property
    def has_body(self) -> bool:
        """Whether a body was announced, be it empty."""
        return self._body != b""

    async def read(self, n_bytes_max: int | None = None) -> bytes:
        """Return the whole body.

        Args:
            n_bytes_max: Takes the place of the server's limit (`HttpLimits.body_bytes_max`).

        Raises:
            HttpError: 413 too large, 408 too slow, 400 broken in itself.
            Disconnected: The peer went away.
            WrongState: The body was streamed before.
        """
        body = self._body
        if isinstance(body, bytes):
            return body
        return await body.read(n_bytes_max)

    def stream(self, n_bytes_max: int | None = None) -> AsyncIterator[bytes]:
        """Iterate over the body as it comes; the peer is slowed down to the pace it is taken at. Args and Raises as `read`."""
        body = self._body
        return _once(body) if isinstance(body, bytes) else body.stream(n_bytes_max)

    async def json(self, type: type[T]) -> T:  # noqa: A002 - msgspec's name for it
        """Return the body decoded from JSON and checked against a type.

        Args:
            type: What msgspec can decode: a Struct, `dict[str, int]`, `object` for anything.

        Raises:
            HttpError: 400: it is not JSON; 422: it is not what `type` wants; else as `read`.
        """
        data = await self.read()
        try:
            return msgspec.json.decode(data, type=type)
        except msgspec.ValidationError as error:
            raise HttpError(422, f"the body does not fit: {error}") from error
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # not UTF-8; nested without end
            raise HttpError(400, f"the body is not JSON: {error}") from error

    def transport_info(self, name: str) -> Any:
        """Return what the transport knows by that name ("ssl_object", "sockname"), None without one."""
        return None if self._transport is None else self._transport.get_extra_info(name)


class Response:
    """One response.

    Args:
        status: 200 to 599.
        headers: Fields added to those the server writes itself (date, content-length or transfer-encoding, connection).
        body: All of it; text is encoded in UTF-8; or an asynchronous iterable of pieces, sent as they come.
    """

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int = 200, headers: Iterable[tuple[str, str]] = (), body: str | Body = b"") -> None:
        self.status = status
        self.headers: HeaderPairs = headers if type(headers) is tuple else tuple(headers)
        self.body: Body = body.encode() if isinstance(body, str) else body

    def __repr__(self) -> str:
        return f"<Response {self.status}>"

    @staticmethod
    def text(content: str, status: int = 200, headers: HeaderPairs = ()) -> "Response":
        """Return plain text."""
        return Response(status, TEXT + headers if headers else TEXT, content.encode())

    @staticmethod
    def html(content: str, status: int = 200, headers: HeaderPairs = ()) -> "Response":
        """Return a page."""
        return Response(status, HTML + headers if headers else HTML, content.encode())

    @staticmethod
    def json(value: object, status: int = 200, headers: HeaderPairs = ()) -> "Response":
        """Return anything msgspec can encode, as JSON."""
        return Response(status, JSON + headers if headers else JSON, _encode_json(value))

    @staticmethod
    def redirect(location: str, status: int = 302) -> "Response":
        """Send the client elsewhere.

        Args:
            location: A URI reference; characters a header cannot carry must be percent-encoded.
            status: 301, 302, 303, 307 or 308.

        Raises:
            InvalidArgument: Another status.
        """
        if status not in (301, 302, 303, 307, 308):
            raise InvalidArgument("redirect status", status, "must be 301, 302, 303, 307 or 308")
        return Response(status, (("location", location),))

    @staticmethod
    def error(status: int, message: str = "", hint: str = "", *, code: str = "", headers: HeaderPairs = ()) -> "Response":
        """Return what an HttpError of those arguments is answered with."""
        facts = {"code": code or code_of(status), "message": message or reason(status), "hint": hint}
        return Response.json(facts, status, headers)

    def header(self, name: str) -> str | None:
        """Return the first value of a field set so far, or None."""
        lowered = name.lower()
        return next((value for key, value in self.headers if key.lower() == lowered), None)

    def add_header(self, name: str, value: str) -> None:
        """Add a field after the others."""
        self.headers = (*self.headers, (name, value))

    def set_header(self, name: str, value: str) -> None:
        """Add a field in place of all of that name."""
        lowered = name.lower()
        self.headers = (*(pair for pair in self.headers if pair[0].lower() != lowered), (name, value))

    def remove_header(self, name: str) -> None:
        """Take away all fields of that name."""
        lowered = name.lower()
        self.headers = tuple(pair for pair in self.headers if pair[0].lower() != lowered)

    def vary(self, name: str) -> None:
        """Say that the answer depends on a request field, once."""
        listed = [word.strip().lower() for key, value in self.headers if key.lower() == "vary" for word in value.split(",")]
        if name.lower() not in listed and "*" not in listed:
            self.add_header("vary", name)


Takeover = Callable[[asyncio.Transport, bytes], asyncio.Protocol]
"""Called after the 101 was written, with the transport and what the peer sent after its request; returns who owns the transport now."""


@dataclass(slots=True, eq=False)
class Upgrade:
    """Switch the connection to another protocol. `protocol` goes into the 101's Upgrade field.

    `takeover`'s protocol gets no `connection_made` from the server, and every event after it; it closes the transport. `on_drain` is called
    once when the server drains: tell the peer to go; it may be set as late as inside `takeover`.
    """

    protocol: str
    takeover: Takeover
    headers: Iterable[tuple[str, str]] = ()
    on_drain: Callable[[], None] | None = None


Answer = Response | Upgrade
Handler = Callable[[Request], Answer | Awaitable[Answer]]
"""A plain function (the fast path) or a coroutine function."""


def decode_path(raw: str) -> str:
    """Percent-decode a path, or one segment of it, once.

    Raises:
        HttpError: 400: a "%" without two hexadecimal digits, bytes that are not UTF-8, or a NUL.
    """
    if "%" not in raw:
        return raw
    for piece in raw.split("%")[1:]:
        if len(piece) < 2 or not _HEX.issuperset(piece[:2]):
            raise HttpError(400, "the path of the URL is badly percent-encoded")
    try:
        path = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise HttpError(400, "the path of the URL is not UTF-8") from error
    if "\0" in path:
        raise HttpError(400, "the path of the URL holds a NUL")
    return path


_HEX: Final = frozenset("0123456789abcdefABCDEF")


async def _once(body: bytes) -> AsyncIterator[bytes]:
    if body:
        yield body
