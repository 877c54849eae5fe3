"""Server: typed handlers behind the methods of a contract.

A handler is `async def handler(call, request) -> reply`. It runs in a task, which is cancelled when the caller withdraws, its deadline is
over, or the connection ends; whatever it starts must end with it. A plain `def` is the fast path for what needs no waiting: it is called as
soon as its request is there, without a task (and may still return an awaitable). An `IsopodError` it raises reaches the caller as it is;
anything else is a bug: logged with its traceback, told to the caller without.

Rules: sessions are kept in dicts, in their order; everything a peer can make grow has a bound in `RpcLimits`.
"""

import asyncio
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Final

import msgspec

from isopod.net.rpc.call import AnyCall, AnyHandler, AnyMethod, Call, Handler
from isopod.net.rpc.codec import Codec
from isopod.net.rpc.connection import VERSIONS
from isopod.net.rpc.limits import HEARTBEAT_S_MIN, RpcLimits
from isopod.net.rpc.reflection import REFLECT, Reflector
from isopod.net.rpc.session import METHOD_CHARS_MAX, Session, shutting_down
from isopod.net.rpc.verbs import Meter, Verb
from isopod.runtime.gate import Gate
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import SchedulingGroup
from isopod.wire import frames as f
from isopod.world.errors import Exhausted, InvalidArgument, MethodNotFound, NotStarted, UsageError
from isopod.world.network import Address, Listener, PeerIdentity, ServerTls, TcpAddress
from isopod.world.world import World

__all__ = ["Call", "Handler", "Server"]

PUBLISH_S: Final = 1.0
"""What other processes see of the metrics is at most so old."""


class Server:
    """Serves methods to many connections.

    Args:
        world: Network and clock.
        handlers: A handler for each method.
        logger: Gets violations, bugs and (at debug) calls.
        metrics: Where calls and connections are counted.
        limits: Bounds.
        peer: What to call ourselves in our hello.
        groups: The scheduling groups that clients may ask for by name; nobody gets another.
        compression: Whether to offer zstd.
        reflection: Whether to serve `rpc.reflect`.
    """

    def __init__(
        self,
        world: World,
        handlers: Mapping[AnyMethod, AnyHandler] | Iterable[tuple[AnyMethod, AnyHandler]],
        *,
        logger: Logger,
        metrics: Registry,
        limits: RpcLimits = RpcLimits(),  # noqa: B008 - an immutable tuple
        peer: str = "isopod-node",
        groups: Iterable[SchedulingGroup] = (),
        compression: bool = True,
        reflection: bool = True,
    ) -> None:
        self.world = world
        self.logger = logger
        self.limits = limits
        self.peer = peer
        self.gate = Gate("rpc server")
        self.groups = {group.name: group for group in groups}
        self.features = tuple(
            feature for feature in f.FEATURES if (compression or feature != "zstd") and (reflection or feature != "reflect")
        )
        table = dict(handlers)
        self.reflector = Reflector(peer, tuple(table), self.features)
        if reflection:
            table[REFLECT] = self.reflector.reflect
        self.verbs = {method.name: Verb(method, handler, Codec(method), Meter(method.name, metrics)) for method, handler in table.items()}
        self._json_verbs: dict[str, Verb] = {}
        self.connections = metrics.gauge("isopod_rpc_connections", "Open connections.")
        self.calls_open = metrics.gauge("isopod_rpc_calls_open", "Handlers that wait for something.")
        self.violations = metrics.counter("isopod_rpc_protocol_violations_total", "Connections ended for breaking the protocol.")
        self.refusals = metrics.counter("isopod_rpc_refused_connections_total", "Connections refused because too many were open.")
        self.notices_dropped = metrics.counter("isopod_rpc_dropped_notices_total", "One-way calls that could not be served.")
        self.held_bytes = 0
        """Of all connections: requests being served, items not taken, and what was written but not read by its peer."""
        self._meters: list[Meter] = []
        self._publishing: asyncio.TimerHandle | None = None
        self._remove_hook = metrics.before_snapshot(self._publish)
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[int, Session] = {}
        self._n_sessions = 0
        self._listeners: list[Listener] = []
        self._is_closed = False

    async def listen(
        self,
        address: Address,
        *,
        mode: int = 0o660,
        gid: int | None = None,
        tls: ServerTls | None = None,
        group: SchedulingGroup | None = None,
        plaintext: bool = False,
    ) -> Listener:
        """Serve on one more address; the server closes the listener too.

        Args:
            address: Where.
            mode: Permission bits of a Unix socket's file.
            gid: Its group, or None.
            tls: Secures the connections. TCP must have it.
            group: In which handlers of its connections run, unless a client asks for one of `groups`.
            plaintext: Allow TCP without TLS: for loopback and trusted links only, anybody there can call anything.

        Raises:
            InvalidArgument: TCP without TLS.
            OSError: The address cannot be bound.
        """
        refuse_plaintext(address, secured=tls is not None, plaintext=plaintext)
        listener = await self.world.network.listen(address, partial(self._accept, group), mode=mode, gid=gid, tls=tls)
        self._listeners.append(listener)
        return listener

    async def invoke(self, method_name: str, body: msgspec.Raw | bytes) -> object:
        """Call a unary handler from within the process.

        Args:
            method_name: "container.list".
            body: The packed request.

        Returns:
            The reply, unpacked.

        Raises:
            MethodNotFound: No such method.
            UsageError: The method streams.
            InvalidArgument: The body is not its request.
            IsopodError: What the handler raised.
        """
        verb = self.verbs.get(method_name)
        if verb is None:
            raise MethodNotFound(method_name[:METHOD_CHARS_MAX])
        if verb.has_streams:
            raise UsageError(f"{method_name} streams: call it on a connection")
        request = verb.codec.decode_request(body)
        call: AnyCall = Call(_OwnProcess(self.peer, self._loop, self.world.clock.monotonic_ns()), 0, method_name, None)
        with self.gate.hold():
            reply = verb.handler(call, request)
            return await reply if inspect.isawaitable(reply) else reply

    async def drain(self, deadline_s: float) -> None:
        """Accept nothing more, say GOAWAY, wait for open calls, and cancel those that are left at the deadline."""
        await self._close_listeners()
        self.gate.close_nowait()
        for session in list(self._sessions.values()):
            session.go_away()
        try:
            async with asyncio.timeout(deadline_s):
                await self.gate.close()
        except TimeoutError:
            self._cancel_all()
            await self._wait_handlers()

    async def close(self) -> None:
        """Cancel what runs, end all connections, and wait until they are gone; bounded by the limits' graces."""
        await self._close_listeners()
        self.gate.close_nowait()
        self._cancel_all()
        await self._wait_handlers()
        self._is_closed = True
        for session in list(self._sessions.values()):
            session.close()
        for session in list(self._sessions.values()):
            await session.connection.wait_gone()
        self._publish()
        self._remove_hook()
        self._remove_hook = _nothing

    # --- what sessions call -------------------------------------------------------------------------------------------

    def admit(self, session: Session) -> int:
        """Count a session whose connection stands, or have it refused; return its number."""
        number = self._n_sessions
        self._n_sessions += 1
        if len(self._sessions) >= self.limits.connections_max:
            limit = str(self.limits.connections_max)
            error = Exhausted("connections", limit, "close some clients", retry_after_s=self.limits.retry_after_s)
            session.refuse(error, at_once=len(self._sessions) >= 2 * self.limits.connections_max)
            self.refusals.inc()
        elif self.gate.is_closed:  # a handshake that ended after `close` is answered nothing: nobody would wait for its end
            session.refuse(NotStarted(self.peer, "shutting down", "try again when it is up"), at_once=self._is_closed)
        self._sessions[number] = session
        self.connections.inc()
        return number

    def greeting(self, theirs: f.Hello | None) -> f.Hello:
        """Return the answer to a client's hello, None if it never came."""
        if theirs is None:
            return f.Hello(VERSIONS, self.peer)
        least_ms = round(max(self.limits.heartbeat_s, HEARTBEAT_S_MIN) * 1000)
        heartbeat_ms = max(theirs.heartbeat_ms, least_ms) if theirs.heartbeat_ms else 0
        table = self.reflector.table if "reflect" in self.features and "reflect" in theirs.features else ""
        return f.Hello(VERSIONS, self.peer, "", self.features, heartbeat_ms, table)

    def json_verbs(self) -> dict[str, Verb]:
        """Return the methods with decoders of JSON; made when the first such client comes."""
        if not self._json_verbs:
            self._json_verbs = {
                name: Verb(verb.method, verb.handler, Codec(verb.method, "json"), verb.meter) for name, verb in self.verbs.items()
            }
        return self._json_verbs

    def note(self, meter: Meter) -> None:
        """Publish what a meter added up: when somebody looks, or soon."""
        meter.is_noted = True
        self._meters.append(meter)
        if self._publishing is None:
            self._publishing = self._loop.call_later(PUBLISH_S, self._publish)

    def forget(self, number: int) -> None:
        """A session is over, and none of its handlers runs."""
        if self._sessions.pop(number, None) is not None:
            self.connections.dec()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        meters, self._meters = self._meters, []
        for meter in meters:
            meter.publish()

    def _accept(self, group: SchedulingGroup | None) -> asyncio.Protocol:
        return Session(self, group).connection

    async def _close_listeners(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.close()

    def _cancel_all(self) -> None:
        for session in list(self._sessions.values()):
            session.cancel_calls(shutting_down(self.peer))

    async def _wait_handlers(self) -> None:
        """Wait until cancelled handlers have cleaned up, for a bounded time."""
        try:
            async with asyncio.timeout(self.limits.cancel_grace_s):
                await self.gate.close()
        except TimeoutError:
            stuck = [call.method for session in self._sessions.values() for call in session.calls.values()]
            self.logger.error("rpc.handlers_stuck", methods=stuck)


def refuse_plaintext(address: Address, *, secured: bool, plaintext: bool) -> None:
    """Let TCP only be used with TLS, unless that was asked for.

    Raises:
        InvalidArgument: Neither.
    """
    if isinstance(address, TcpAddress) and not secured and not plaintext:
        hint = "pass tls=..., or plaintext=True on a link where nobody else listens"
        raise InvalidArgument("address", f"{address.host}:{address.port}", "RPC over TCP needs TLS", hint)


def _nothing() -> None:
    """The hook was taken off."""


class _OwnProcess:
    """The caller of `invoke`."""

    identity: PeerIdentity | None = None

    def __init__(self, peer: str, loop: asyncio.AbstractEventLoop, arrived_ns: int) -> None:
        self.peer = peer
        self.loop = loop
        self.arrived_s = loop.time()
        self.arrived_ns = arrived_ns
