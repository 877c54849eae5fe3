"""What the HTTP client's callers hold: limits, the retry policy, the response, and the fields that say who asks.

Not the wire (`client_connection`), not the pool (`client_pool`). Source: RFC 9110; RFC 7617 (Basic), RFC 6750 (Bearer).
"""

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, overload

import msgspec

from isopod.net.http.client_codec import Decompressor, new_decompressor
from isopod.net.http.headers import Headers
from isopod.net.http.url import Url
from isopod.world.errors import BadRecord, Exhausted, WrongState

if TYPE_CHECKING:
    from isopod.net.http.client_connection import Exchange

T = TypeVar("T")
IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""Methods that may be sent twice (RFC 9110 section 9.2.2)."""


class ClientLimits(msgspec.Struct, frozen=True):
    """Bounds of one `HttpClient`. Times are in seconds.

    Attributes:
        connections_max: Open connections, over all hosts.
        connections_per_host_max: Of these, to one scheme, host and port.
        waiting_max: Requests that may wait for a connection; one more is refused.
        idle_s: How long an unused connection is kept.
        connect_s: Time for connecting, TLS included.
        first_byte_s: From the sent request to the head of the answer.
        total_s: The whole exchange, body and redirects included; `timeout_s` of a request takes its place.
        continue_s: How long a body is held back for a 100 Continue.
        header_bytes_max: Of an answer's head, its trailers, or the framing between two pieces of its body.
        headers_max: Fields of an answer.
        body_bytes_max: What `read` takes, after decompression. `stream` has no such bound.
        buffer_bytes_max: Of an answer not yet read, before the server is slowed down.
        drain_bytes_max: How much of an answer that nobody wants is read to keep its connection.
        redirects_max: How many redirects are followed.
    """

    connections_max: int = 100
    connections_per_host_max: int = 100
    waiting_max: int = 10_000
    idle_s: float = 30.0
    connect_s: float = 5.0
    first_byte_s: float = 30.0
    total_s: float = 60.0
    continue_s: float = 1.0
    header_bytes_max: int = 64 << 10
    headers_max: int = 256
    body_bytes_max: int = 64 << 20
    buffer_bytes_max: int = 256 << 10
    drain_bytes_max: int = 64 << 10
    redirects_max: int = 5


class RetryPolicy(msgspec.Struct, frozen=True):
    """When a request is sent again. The default never does (a connection found stale is replaced in any case, once).

    Attributes:
        attempts: How often it is sent at most.
        statuses: Answers that are worth another attempt.
        methods: Methods that may be repeated.
        backoff_s: Pause before the second attempt; it doubles from then on, and a random part of up to a half is taken off.
        backoff_max_s: The longest pause. A longer `Retry-After` of the server ends the attempts.
    """

    attempts: int = 1
    statuses: frozenset[int] = frozenset({502, 503, 504})
    methods: frozenset[str] = IDEMPOTENT
    backoff_s: float = 0.1
    backoff_max_s: float = 5.0


class ClientResponse:
    """An answer whose head is here; its body may still be under way.

    Its connection goes back to the pool by itself when the body has come, also unread if it is small. A longer body must be read,
    streamed, or given up with `close` (or by `async with`); at the latest the request's deadline ends it.

    Args:
        exchange: Where the body comes from.
        url: What was asked last, after redirects.
        limits: Bounds.
        decompresses: Whether to undo Content-Encoding.
    """

    __slots__ = ("_decompresses", "_exchange", "_is_taken", "_limits", "headers", "n_redirects", "reason", "status", "url", "version")

    def __init__(self, exchange: "Exchange", url: Url, limits: ClientLimits, *, decompresses: bool, n_redirects: int = 0) -> None:
        self.status: Final = exchange.status
        self.reason: Final = exchange.reason
        self.headers: Final = Headers(exchange.headers)
        self.version: Final = exchange.version
        self.url: Final = url
        self.n_redirects: Final = n_redirects
        self._exchange = exchange
        self._limits = limits
        self._decompresses = decompresses
        self._is_taken = False

    def __repr__(self) -> str:
        return f"<ClientResponse {self.status} {self.url}>"

    @property
    def is_success(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    async def read(self, n_bytes_max: int | None = None) -> bytes:
        """Return the whole body.

        Args:
            n_bytes_max: Takes the place of `body_bytes_max`.

        Raises:
            Exhausted: It is longer.
            Disconnected: The connection ended before the body did.
            ProtocolViolation: The framing or the compression is broken.
            DeadlineExceeded: The request's time is over.
            WrongState: The body was taken before.
        """
        limit = self._limits.body_bytes_max if n_bytes_max is None else n_bytes_max
        if not self._is_taken and not (self._decompresses and self._exchange.coding):
            whole = self._exchange.take_whole()
            if whole is not None and len(whole) <= limit:
                self._is_taken = True
                return whole
        pieces: list[bytes] = []
        n_bytes = 0
        async with aclosing(self.stream()) as stream:
            async for piece in stream:
                n_bytes += len(piece)
                if n_bytes > limit:
                    raise Exhausted(f"body of {self.url}", f"more than {limit} bytes", "stream it, or ask for less")
                pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Iterate over the body as it comes, slowing the server down to this pace. Raises as `read`, but for Exhausted.

        Who leaves early closes the response (`async with` does).
        """
        if self._is_taken:
            raise WrongState("body of", str(self.url), "taken", "read it twice")
        self._is_taken = True
        exchange = self._exchange
        decompressor = self._decompressor()
        try:
            while (piece := await exchange.next_piece()) is not None:
                if decompressor is None:
                    yield piece
                else:
                    for part in decompressor.feed(piece):
                        yield part
            if decompressor is not None:
                decompressor.finish()
        finally:
            exchange.discard()

    async def text(self) -> str:
        """Return the body as UTF-8 text; damaged characters become U+FFFD. Raises as `read`."""
        return (await self.read()).decode("utf-8", "replace")

    @overload
    async def json(self) -> Any: ...  # whatever JSON says
    @overload
    async def json(self, kind: type[T]) -> T: ...
    async def json(self, kind: Any = Any) -> Any:
        """Return the body's JSON value.

        Args:
            kind: What msgspec shall make of it; anything by default.

        Raises:
            BadRecord: It is no JSON, or of another shape. Others as `read`.
        """
        try:
            return msgspec.json.decode(await self.read(), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRecord(str(self.url), f"not the JSON that was expected: {error}") from error

    def close(self) -> None:
        """Give up the rest of the body. A short rest is read away to keep the connection; a long one ends it."""
        self._is_taken = True
        self._exchange.discard()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _decompressor(self) -> Decompressor | None:
        exchange = self._exchange
        if not self._decompresses or not exchange.coding or exchange.is_bodiless:
            return None
        return new_decompressor(exchange.coding, exchange.peer)


def basic_auth(user: str, password: str) -> tuple[str, str]:
    """Return the header field that proves a user by password; over TLS or a Unix socket only, please."""
    return "authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


def bearer_auth(token: str) -> tuple[str, str]:
    """Return the header field that carries a token."""
    return "authorization", f"Bearer {token}"
