"""The HTTP/1.1 client: pooled connections, deadlines on everything, redirects, retries, streams both ways.

No cookies, no proxies, no cache. Made once per program and closed at its end::

    client = HttpClient(world)
    answer = await client.get("https://example.org/state", timeout_s=2.0)
    state = await answer.json()
    await client.close()

Rules: a request has one deadline for everything, the body of its answer included; the context's own deadline (`isopod.runtime.abort`) can
only bring it nearer. A request that met a connection which the server had closed meanwhile is sent once more on a fresh one if its method
is idempotent and its body can be sent again. Redirects never take credentials to another origin. Certificates are verified.
Source: RFC 9110 sections 9.2, 10.1.1, 15.4; RFC 9112.
"""

import asyncio
import copy
from collections.abc import AsyncIterable, Iterable, Sequence
from contextlib import nullcontext
from typing import Final, NamedTuple, Protocol

import msgspec

from isopod.net.http.client_codec import ACCEPT_ENCODING, request_head
from isopod.net.http.client_connection import ClientConnection, Exchange
from isopod.net.http.client_messages import IDEMPOTENT, ClientLimits, ClientResponse, RetryPolicy, basic_auth, bearer_auth
from isopod.net.http.client_pool import Key, Pool
from isopod.net.http.messages import HttpError
from isopod.net.http.url import Url, parse_url
from isopod.runtime.abort import AbortSource, deadline, remaining_s
from isopod.runtime.timers import TimerWheel
from isopod.world.errors import Cancelled, DeadlineExceeded, Disconnected, InvalidArgument, IsopodError, PeerError, ProtocolViolation
from isopod.world.network import Address, ClientTls, TcpAddress
from isopod.world.world import World

__all__ = ["ClientLimits", "ClientResponse", "ClientStatistics", "HttpClient", "RetryPolicy", "Upgraded", "basic_auth", "bearer_auth"]

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CREDENTIALS: Final = frozenset({"authorization", "cookie", "proxy-authorization", "host"})
_BODY_FIELDS: Final = frozenset({"content-type", "content-encoding", "content-language", "content-location", "content-length"})
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_SWITCHING: Final = 101
_REFUSAL_BYTES_MAX: Final = 2 << 10
_UPGRADE_SCHEMES: Final = ("http", "https", "ws", "wss")

RequestBody = bytes | str | AsyncIterable[bytes]


class Resolver(Protocol):
    """Finds the numeric addresses of a host; `isopod.net.dns.Resolver` is one."""

    async def resolve(self, host: str) -> Sequence[str]:
        """Return the addresses, the best first. Raises IsopodError."""


class ClientStatistics(NamedTuple):
    """What a client has done so far, and its connections now."""

    n_requests: int
    n_retried: int
    n_redirected: int
    n_failed: int
    n_opened: int
    n_reused: int
    n_open: int
    n_idle: int
    n_waiting: int


class Upgraded(NamedTuple):
    """A connection that has switched protocols. The transport is the caller's: set its protocol, feed it `leftover`, resume reading."""

    response: ClientResponse
    transport: asyncio.Transport
    leftover: bytes


class _Request(NamedTuple):
    """What is sent, apart from where."""

    method: str
    headers: tuple[tuple[str, str], ...]
    body: bytes | AsyncIterable[bytes]
    expects_continue: bool = False
    stops_after_head: bool = False
    withheld: frozenset[str] = frozenset()
    """Which of the client's own fields are not for this server: another one redirected here."""

    @property
    def can_repeat(self) -> bool:
        """Whether it can be sent again as it is."""
        return isinstance(self.body, bytes)


class HttpClient:
    """A pool of connections and the requests on them. Close it after use.

    Args:
        world: Whose network and chance.
        limits: Bounds and times.
        retry: When requests are sent again.
        tls: Whom to trust and what to show; None trusts the machine's roots.
        resolver: Finds addresses; None leaves it to the network.
        headers: Sent with every request that does not say otherwise.
        decompresses: Whether to ask for compressed bodies and undo them.
    """

    def __init__(
        self,
        world: World,
        *,
        limits: ClientLimits = ClientLimits(),  # noqa: B008 - immutable
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - immutable
        tls: ClientTls | None = None,
        resolver: Resolver | None = None,
        headers: Iterable[tuple[str, str]] = (("user-agent", "isopod"),),
        decompresses: bool = True,
    ) -> None:
        self._world = world
        self._limits = limits
        self._retry = retry
        self._tls = tls
        self._resolver = resolver
        self._loop = asyncio.get_running_loop()
        self._wheel = TimerWheel(self._loop)
        self._pool = Pool(limits, self._wheel, self._connect)
        self._decompresses = decompresses
        defaults = [(name.lower(), value) for name, value in headers]
        self._defaults = (*defaults, ("accept-encoding", ACCEPT_ENCODING)) if decompresses else tuple(defaults)
        self._n_requests = 0
        self._n_retried = 0
        self._n_redirected = 0
        self._n_failed = 0

    async def get(self, url: str, *, headers: Iterable[tuple[str, str]] = (), timeout_s: float | None = None) -> ClientResponse:
        """Send a GET. See `request`."""
        return await self.request("GET", url, headers=headers, timeout_s=timeout_s)

    async def post(
        self,
        url: str,
        body: RequestBody = b"",
        *,
        json: object = msgspec.UNSET,
        headers: Iterable[tuple[str, str]] = (),
        timeout_s: float | None = None,
    ) -> ClientResponse:
        """Send a POST. See `request`."""
        return await self.request("POST", url, body=body, json=json, headers=headers, timeout_s=timeout_s)

    async def put(
        self,
        url: str,
        body: RequestBody = b"",
        *,
        json: object = msgspec.UNSET,
        headers: Iterable[tuple[str, str]] = (),
        timeout_s: float | None = None,
    ) -> ClientResponse:
        """Send a PUT. See `request`."""
        return await self.request("PUT", url, body=body, json=json, headers=headers, timeout_s=timeout_s)

    async def delete(self, url: str, *, headers: Iterable[tuple[str, str]] = (), timeout_s: float | None = None) -> ClientResponse:
        """Send a DELETE. See `request`."""
        return await self.request("DELETE", url, headers=headers, timeout_s=timeout_s)

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: RequestBody = b"",
        json: object = msgspec.UNSET,
        timeout_s: float | None = None,
        address: Address | None = None,
        abort: AbortSource | None = None,
        follows_redirects: bool = True,
        expects_continue: bool = False,
        decompresses: bool | None = None,
        retry: RetryPolicy | None = None,
    ) -> ClientResponse:
        """Send a request and return its answer as soon as the head is here, whatever its status.

        Args:
            method: Sent as it is: "GET".
            url: Absolute, http or https.
            headers: Fields, in order.
            body: Bytes, text, or pieces as they come: sent chunked, or with the `content-length` among the headers.
            json: A value to send as the body instead.
            timeout_s: For everything, the answer's body included; None for the client's `total_s`.
            address: Connect there instead of to the URL's host: a `UnixAddress`, mostly.
            abort: Ends the request, body included, when it aborts.
            follows_redirects: Whether up to `redirects_max` redirects are followed. One that cannot be (a streamed body would have to be
                sent again, another host while `address` is given, from https to http) is returned. Another origin gets no credentials,
                the client's own ones neither.
            expects_continue: Hold the body back until the server says 100 Continue, or `continue_s`.
            decompresses: Takes the place of the client's own.
            retry: Takes the place of the client's own.

        Raises:
            InvalidArgument: The URL, a field or the body cannot be sent.
            Disconnected: No connection, or it ended too early.
            DeadlineExceeded: Some time is over.
            ProtocolViolation: The server does not keep to HTTP, or redirects too often.
            HandshakeFailed: No secured connection.
            NotFound: The resolver knows no such host.
            Exhausted: Too many requests wait for a connection.
            Cancelled: `abort`.
            WrongState: The client is closed.
        """
        target = parse_url(url)
        request = self._prepare(method, headers, body, json, expects_continue=expects_continue)
        ends_at = self._loop.time() + self._total_s(timeout_s)
        undoes = self._decompresses if decompresses is None else decompresses
        self._n_requests += 1
        try:
            async with nullcontext() if abort is None else abort.scope():
                exchange, final, n_redirects = await self._follow(
                    request,
                    target,
                    address,
                    ends_at=ends_at,
                    retry=retry or self._retry,
                    redirects_max=self._limits.redirects_max if follows_redirects else 0,
                )
        except BaseException:
            self._n_failed += 1
            raise
        if abort is not None:
            exchange.end_with(abort)
        return ClientResponse(exchange, final, self._limits, decompresses=undoes, n_redirects=n_redirects)

    async def upgrade(
        self,
        url: str,
        protocol: str,
        *,
        method: str = "GET",
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        timeout_s: float | None = None,
        address: Address | None = None,
    ) -> Upgraded:
        """Ask a server to switch to another protocol, and take the connection over.

        Args:
            url: Absolute; ws and wss are fine too.
            protocol: For the Upgrade field: "tcp", "websocket".
            method: Of the request.
            headers: More fields.
            body: Of the request.
            timeout_s: Until the server has switched.
            address: As for `request`.

        Raises:
            HttpError: The server answered with this status (400 to 599) instead; its message holds the beginning of the body.
            ProtocolViolation: It answered with another status. Others as for `request`.
        """
        fields = (*headers, ("connection", "Upgrade"), ("upgrade", protocol))
        request = _Request(method, fields, body, stops_after_head=True)
        target = parse_url(url, schemes=_UPGRADE_SCHEMES)
        ends_at = self._loop.time() + self._total_s(timeout_s)
        self._n_requests += 1
        connection, exchange = await self._send(request, target, _key(target, address), ends_at)
        response = ClientResponse(exchange, target, self._limits, decompresses=self._decompresses)
        if exchange.is_upgraded:
            return Upgraded(response, *connection.hand_over())
        self._n_failed += 1
        try:
            said = (await response.read(_REFUSAL_BYTES_MAX)).decode("utf-8", "replace").strip()
        except IsopodError:
            said = ""
        if exchange.status < 400:
            raise ProtocolViolation(connection.peer, f"it answered {exchange.status} {exchange.reason} instead of switching to {protocol}")
        raise HttpError(
            exchange.status, f"{connection.peer} did not switch to {protocol}: {exchange.status} {exchange.reason} {said}".rstrip()
        )

    def drop_idle(self, url: str, address: Address | None = None) -> None:
        """Cut the connections to a server that nobody uses: the next request to it opens one.

        Args:
            url: Of the server; its path does not matter.
            address: As it was given to `request`.
        """
        self._pool.drop_idle(_key(parse_url(url), address))

    async def close(self) -> None:
        """Cut all connections; requests under way fail. Returns when all is gone."""
        await self._pool.close()
        self._wheel.close()

    def statistics(self) -> ClientStatistics:
        """Return the counts so far and the connections now."""
        pool = self._pool
        return ClientStatistics(
            self._n_requests,
            self._n_retried,
            self._n_redirected,
            self._n_failed,
            pool.n_opened,
            pool.n_reused,
            pool.n_open,
            pool.n_idle,
            pool.n_waiting,
        )

    # --- redirects and retries ----------------------------------------------------------------------------------------

    def _prepare(
        self, method: str, headers: Iterable[tuple[str, str]], body: RequestBody, json: object, *, expects_continue: bool
    ) -> _Request:
        fields = tuple(headers)
        if json is not msgspec.UNSET:
            if not isinstance(body, bytes | str) or body:
                raise InvalidArgument("body", "both", "give either body or json")
            body = msgspec.json.encode(json)
            fields = (*fields, ("content-type", "application/json"))
        elif isinstance(body, str):
            body = body.encode()
        elif isinstance(body, bytearray | memoryview):
            body = bytes(body)
        elif not isinstance(body, bytes) and not hasattr(body, "__aiter__"):
            raise InvalidArgument("body", type(body).__name__, "must be bytes, text or an async iterable of bytes")
        return _Request(method, fields, body, expects_continue)

    def _total_s(self, timeout_s: float | None) -> float:
        total_s = self._limits.total_s if timeout_s is None else timeout_s
        outer_s = remaining_s()
        return total_s if outer_s is None else min(total_s, outer_s)

    async def _follow(
        self, request: _Request, url: Url, address: Address | None, *, ends_at: float, retry: RetryPolicy, redirects_max: int
    ) -> tuple[Exchange, Url, int]:
        n_redirects = 0
        while True:
            exchange = await self._attempt(request, url, _key(url, address), ends_at=ends_at, retry=retry)
            location = _location(exchange) if redirects_max and exchange.status in _REDIRECTS else None
            if location is None:
                return exchange, url, n_redirects
            following = _redirected(request, exchange, url, location)
            if following is None or (address is not None and following[1].origin != url.origin):
                return exchange, url, n_redirects
            exchange.discard()
            n_redirects += 1
            if n_redirects > redirects_max:
                raise ProtocolViolation(exchange.peer, f"more than {redirects_max} redirects, the last one to {location[:200]}")
            self._n_redirected += 1
            request, url = following

    async def _attempt(self, request: _Request, url: Url, key: Key, *, ends_at: float, retry: RetryPolicy) -> Exchange:
        """Send as often as the policy says."""
        may_repeat = request.can_repeat and request.method in retry.methods
        for attempt in range(1, retry.attempts + 1):
            is_last = attempt >= retry.attempts or not may_repeat
            pause_s = self._pause_s(retry, attempt)
            try:
                _, exchange = await self._send(request, url, key, ends_at)
            except (Disconnected, DeadlineExceeded):
                if is_last or self._loop.time() + pause_s >= ends_at:
                    raise
            else:
                if is_last or exchange.status not in retry.statuses:
                    return exchange
                pause_s = max(pause_s, _retry_after_s(exchange))
                if pause_s > retry.backoff_max_s or self._loop.time() + pause_s >= ends_at:
                    return exchange
                exchange.discard()
            self._n_retried += 1
            await asyncio.sleep(pause_s)
        raise InvalidArgument("attempts", retry.attempts, "must be at least 1")

    def _pause_s(self, retry: RetryPolicy, attempt: int) -> float:
        if attempt >= retry.attempts:
            return 0.0
        longest_s = min(retry.backoff_max_s, retry.backoff_s * 2 ** (attempt - 1))
        return float(longest_s * (1 - self._world.random.stream("http-client-backoff").random() / 2))

    # --- one exchange -------------------------------------------------------------------------------------------------

    async def _send(self, request: _Request, url: Url, key: Key, ends_at: float) -> tuple[ClientConnection, Exchange]:
        """Send once, or twice if the first connection was stale; return when the head of the answer is here."""
        head = _head(request, url, self._defaults)
        fresh = request.stops_after_head
        while True:
            connection = await self._acquire(key, ends_at, fresh=fresh)
            total_s = ends_at - self._loop.time()
            exchange = connection.start(request.method, self._limits.first_byte_s, total_s, stops_after_head=request.stops_after_head)
            try:
                await self._run(connection, exchange, request, head)
            except Disconnected:
                if fresh or not exchange.is_reused or exchange.n_overhead or not request.can_repeat or request.method not in IDEMPOTENT:
                    raise
                self._n_retried += 1
                fresh = True
            except BaseException as error:
                connection.fail(exchange, error if isinstance(error, PeerError) else Cancelled(f"request to {connection.peer}"))
                raise
            else:
                return connection, exchange

    async def _acquire(self, key: Key, ends_at: float, *, fresh: bool) -> ClientConnection:
        if not fresh:
            found = self._pool.take_idle(key)
            if found is not None:
                return found
        while True:
            left_s = ends_at - self._loop.time()
            async with deadline(left_s, f"waiting for a connection to {key.host}", wheel=self._wheel):
                found = await self._pool.acquire(key, fresh=fresh)
            if found.is_usable:
                return found
            if found.n_exchanges == 0:
                raise Disconnected(found.peer, "connection closed before a request was sent")

    async def _run(self, connection: ClientConnection, exchange: Exchange, request: _Request, head: bytes) -> None:
        body = request.body
        if not request.expects_continue or body == b"":
            if isinstance(body, bytes):
                connection.send(head + body if len(body) < 4096 else head)
                if len(body) >= 4096:
                    connection.send(body)
                exchange.is_sent = True
            else:
                connection.send(head)
                self._start_upload(connection, exchange, request)
            await exchange.wait_head()
            return
        connection.send(head)
        timer = self._wheel.call_later(self._limits.continue_s, exchange.stop_holding)
        try:
            await exchange.wait_head(or_continue=True)
        finally:
            timer.cancel()
        if not exchange.has_head:
            if isinstance(body, bytes):
                connection.send(body)
                exchange.is_sent = True
            else:
                self._start_upload(connection, exchange, request)
            await exchange.wait_head()

    def _start_upload(self, connection: ClientConnection, exchange: Exchange, request: _Request) -> None:
        assert not isinstance(request.body, bytes)
        work = connection.upload(exchange, request.body, _content_length(request))
        exchange.uploader = self._loop.create_task(work, name=f"upload to {connection.peer}")

    async def _connect(self, key: Key, connection: ClientConnection) -> None:
        """Open a connection for the pool: to the one address, or to the host's, one after the other."""
        tls = self._tls_for(key)
        async with deadline(self._limits.connect_s, f"connecting to {connection.peer}", wheel=self._wheel):
            try:
                addresses = await self._addresses(key)
                for number, address in enumerate(addresses):
                    try:
                        await self._world.network.connect(address, lambda: connection, tls=tls)
                    except OSError:
                        if number == len(addresses) - 1:
                            raise
                    else:
                        return
            except OSError as error:
                raise Disconnected(connection.peer, f"cannot connect: {error.strerror or error}") from error
        raise Disconnected(connection.peer, "the host has no address")

    async def _addresses(self, key: Key) -> Sequence[Address]:
        if key.address is not None:
            return [key.address]
        if self._resolver is None:
            return [TcpAddress(key.host, key.port)]
        return [TcpAddress(each, key.port) for each in await self._resolver.resolve(key.host)]

    def _tls_for(self, key: Key) -> ClientTls | None:
        if key.scheme not in ("https", "wss"):
            return None
        if self._tls is None:
            self._tls = ClientTls()
        if self._tls.server_name is not None or (key.address is None and self._resolver is None):
            return self._tls
        named = copy.copy(self._tls)  # the same context, with the name that must be proved
        named.server_name = key.host
        return named


def _key(url: Url, address: Address | None) -> Key:
    return Key(url.scheme, url.host, url.port, address)


def _head(request: _Request, url: Url, defaults: Iterable[tuple[str, str]]) -> bytes:
    """Return the whole head, framing included. Raises InvalidArgument."""
    if request.withheld:
        defaults = [pair for pair in defaults if pair[0] not in request.withheld]
    head = request_head(request.method, url, request.headers, defaults)
    body = request.body
    length = _content_length(request)
    if isinstance(body, bytes):
        if length is not None and length != len(body):
            raise InvalidArgument("header content-length", length, f"the body has {len(body)} bytes")
        if length is None and (body or request.method in _WITH_BODY):
            head += f"content-length: {len(body)}\r\n"
    elif length is None:
        head += "transfer-encoding: chunked\r\n"
    if request.expects_continue and body != b"":
        head += "expect: 100-continue\r\n"
    return (head + "\r\n").encode("latin-1")


def _content_length(request: _Request) -> int | None:
    """Return what the caller announced. Raises InvalidArgument."""
    found = [value for name, value in request.headers if name.lower() == "content-length"]
    if not found:
        return None
    if len(found) > 1 or not (found[0].isascii() and found[0].isdecimal()):
        raise InvalidArgument("header content-length", ", ".join(found), "must be one number")
    return int(found[0])


def _location(exchange: Exchange) -> str | None:
    return next((value for name, value in exchange.headers if name.lower() == "location"), None)


def _redirected(request: _Request, exchange: Exchange, url: Url, location: str) -> tuple[_Request, Url] | None:
    """Return what a redirect asks to be sent instead, None if it cannot be. Raises ProtocolViolation for a Location that is none."""
    try:
        target = url.join(location)
    except InvalidArgument as error:
        raise ProtocolViolation(exchange.peer, f"it redirects to {location[:200]!r}: {error}") from None
    method, body, dropped = request.method, request.body, frozenset[str]()
    if (exchange.status == 303 and method not in ("GET", "HEAD")) or (exchange.status in (301, 302) and method == "POST"):
        method, body, dropped = "GET", b"", _BODY_FIELDS
    elif not request.can_repeat:
        return None
    if url.is_secure and not target.is_secure:
        return None
    withheld = request.withheld
    if target.origin != url.origin:
        dropped |= _CREDENTIALS
        withheld = _CREDENTIALS
    headers = tuple(pair for pair in request.headers if pair[0].lower() not in dropped)
    return _Request(method, headers, body, request.expects_continue, withheld=withheld), target


def _retry_after_s(exchange: Exchange) -> float:
    value = next((value for name, value in exchange.headers if name.lower() == "retry-after"), "")
    return float(value) if value.isascii() and value.isdecimal() and len(value) < 9 else 0.0
