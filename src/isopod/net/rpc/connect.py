"""Connecting: one connection with a handshake, and a client that connects again and repeats what may be repeated."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple, TypeVar

from isopod.net.rpc.client import CALL_TIMEOUT_S, Client
from isopod.net.rpc.client_call import ClientCall
from isopod.net.rpc.limits import RpcLimits
from isopod.net.rpc.server import refuse_plaintext
from isopod.wire.frames import Encoding
from isopod.wire.service import Method
from isopod.world.errors import DeadlineExceeded, Disconnected, IsopodError, NotStarted
from isopod.world.network import Address, ClientTls, TcpOptions, UnixAddress
from isopod.world.world import World

Q = TypeVar("Q")
R = TypeVar("R")

CONNECT_TIMEOUT_S: Final = 5.0
START_HINT: Final = "start the node: isopod node"


async def connect(
    world: World,
    address: Address,
    *,
    peer: str = "isopod",
    timeout_s: float = CONNECT_TIMEOUT_S,
    limits: RpcLimits = RpcLimits(),  # noqa: B008 - an immutable tuple
    tls: ClientTls | None = None,
    plaintext: bool = False,
    encoding: Encoding = "msgpack",
    group: str = "",
    compression: bool = False,
    options: TcpOptions | None = None,
) -> Client:
    """Connect and shake hands.

    Args:
        world: Whose network.
        address: Where the server listens.
        peer: What to call ourselves.
        timeout_s: Deadline of connecting and of the server's hello together.
        limits: Bounds of our side; `heartbeat_s` above 0 asks for heartbeats.
        tls: Secures the connection. TCP must have it.
        plaintext: Allow TCP without TLS, on loopback and trusted links.
        encoding: "json" for lines of JSON, as a person would type them; slower, and without raw bodies and compression.
        group: The scheduling group to ask for; the server names those it grants.
        compression: Whether to compress large frames: for slow links, it costs more than a fast one.
        options: Of a TCP connection.

    Raises:
        InvalidArgument: TCP without TLS.
        NotStarted: Nobody listens there.
        Disconnected: The connection ended at once.
        HandshakeFailed: The certificates do not fit.
        DeadlineExceeded: No hello in time.
        VersionMismatch: No protocol version in common.
        NotFound: The server grants no such group.
    """
    refuse_plaintext(address, secured=tls is not None, plaintext=plaintext)
    client = Client(peer=peer, limits=limits, encoding=encoding, group=group, compression=compression)
    where = address.path if isinstance(address, UnixAddress) else f"{address.host}:{address.port}"
    try:
        async with asyncio.timeout(timeout_s):
            await world.network.connect(address, lambda: client.connection, tls=tls, options=options)
            await client.wait_ready()
    except TimeoutError:
        client.connection.abort()
        raise DeadlineExceeded(f"connecting to {where}", timeout_s) from None
    except OSError as error:
        raise NotStarted(where, error.strerror or str(error), START_HINT) from error
    except (IsopodError, asyncio.CancelledError):
        client.connection.abort()
        raise
    return client


class RetryPolicy(NamedTuple):
    """How often and how soon to try again. Pauses grow by `factor` and are shortened by up to `jitter` of them, so that many clients of one
    server do not come back at once."""

    attempts_max: int = 4
    pause_first_s: float = 0.05
    pause_max_s: float = 5.0
    factor: float = 2.0
    jitter: float = 0.5

    def pause_s(self, n_failed: int, chance: float) -> float:
        """Return how long to wait after that many failures.

        Args:
            n_failed: At least 1.
            chance: Drawn from 0 to 1.
        """
        full_s = min(self.pause_max_s, self.pause_first_s * self.factor ** (n_failed - 1))
        return full_s * (1 - self.jitter * chance)


def may_repeat(error: IsopodError, *, idempotent: bool) -> bool:
    """Whether a program may repeat a request that failed so.

    Args:
        error: How it failed.
        idempotent: Whether serving it twice does no harm.
    """
    was_not_begun = isinstance(error, NotStarted) or error.retry_after_s is not None
    return error.retryable and (idempotent or was_not_begun)


class ReconnectingClient:
    """A client that connects when it is first used and again when its connection has ended, and that repeats calls that may be repeated.

    What may be is decided by the error and the method (`may_repeat`): a call that the server may have begun is repeated only if its method
    is idempotent. The deadline is that of all attempts together. Calls that come while it connects share the one attempt.

    Args:
        world: Network and chance.
        address: Where the server listens.
        policy: How often and how soon.
        peer: What to call ourselves.
        limits: Bounds, and heartbeats: without them a dead peer is noticed only by deadlines.
        tls: Secures the connection. TCP must have it.
        plaintext: Allow TCP without TLS.
        group: The scheduling group to ask for.
        compression: Whether to compress large frames.
    """

    def __init__(
        self,
        world: World,
        address: Address,
        *,
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 - an immutable tuple
        peer: str = "isopod",
        limits: RpcLimits = RpcLimits(),  # noqa: B008 - an immutable tuple
        tls: ClientTls | None = None,
        plaintext: bool = False,
        group: str = "",
        compression: bool = False,
    ) -> None:
        refuse_plaintext(address, secured=tls is not None, plaintext=plaintext)
        self.n_connects = 0
        """How many connections were opened."""
        self.n_repeats = 0
        """How many calls were sent once more."""
        self._world = world
        self._address = address
        self._policy = policy
        self._peer = peer
        self._limits = limits
        self._tls = tls
        self._plaintext = plaintext
        self._group = group
        self._compression = compression
        self._chance = world.random.stream("rpc.retry")
        self._client: Client | None = None
        self._connecting: asyncio.Task[Client] | None = None
        self._is_closed = False

    async def call(self, method: Method[Q, R], request: Q, *, timeout_s: float = CALL_TIMEOUT_S) -> R:
        """Call a method and wait for its reply, trying again where that is safe.

        Args:
            method: Which.
            request: Its request.
            timeout_s: The deadline of all attempts together.

        Raises:
            DeadlineExceeded: No answer in time.
            IsopodError: The last attempt's failure.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        n_failed = 0
        while True:
            try:
                async with asyncio.timeout_at(ends_at):
                    client = await self._connected()
                return await client.call(method, request, timeout_s=max(0.0, ends_at - loop.time()))
            except TimeoutError:
                raise DeadlineExceeded(method.name, timeout_s) from None
            except IsopodError as error:
                if isinstance(error, DeadlineExceeded) and loop.time() >= ends_at:
                    raise DeadlineExceeded(method.name, timeout_s) from None  # its own words name what was left for the last attempt
                n_failed += 1
                pause_s = error.retry_after_s or self._policy.pause_s(n_failed, self._chance.random())
                is_over = n_failed >= self._policy.attempts_max or loop.time() + pause_s >= ends_at or self._is_closed
                if is_over or not may_repeat(error, idempotent=method.idempotent):
                    raise
            self.n_repeats += 1
            await asyncio.sleep(pause_s)

    @asynccontextmanager
    async def open(self, method: Method[Q, R], request: Q, *, timeout_s: float | None = None) -> AsyncIterator[ClientCall[R]]:
        """Open a call with streams, as `Client.open`, on a connection that stands; a stream that breaks is not begun again.

        Raises:
            IsopodError: No connection, or the call failed.
        """
        client = await self._connected()
        async with client.open(method, request, timeout_s=timeout_s) as call:
            yield call

    async def notify(self, method: Method[Q, R], request: Q) -> None:
        """Have a method called and never hear of it, as `Client.notify`; only connecting is tried, once.

        Raises:
            IsopodError: No connection, or the server takes no notices.
        """
        await (await self._connected()).notify(method, request)

    async def close(self) -> None:
        """End the connection; calls that wait fail, and new ones too."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._client is not None:
            await self._client.close()

    async def _connected(self) -> Client:
        """Return a client whose connection stands, as far as is known."""
        if self._is_closed:
            raise Disconnected(self._peer, "this client was closed")
        client = self._client
        if client is not None and client.is_usable:
            return client
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(), name="rpc connect")
            self._connecting.add_done_callback(self._on_connected)
        # Shielded: others may wait for the same attempt.
        try:
            return await asyncio.shield(self._connecting)
        except asyncio.CancelledError:
            if self._is_closed:
                raise Disconnected(self._peer, "this client was closed") from None
            raise

    async def _connect(self) -> Client:
        if self._client is not None:
            await self._client.close()
        client = await connect(
            self._world,
            self._address,
            peer=self._peer,
            limits=self._limits,
            tls=self._tls,
            plaintext=self._plaintext,
            group=self._group,
            compression=self._compression,
        )
        self._client = client
        self.n_connects += 1
        return client

    def _on_connected(self, task: "asyncio.Task[Client]") -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # whoever waits gets it; if nobody does, it is not a failure to report
