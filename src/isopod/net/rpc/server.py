"""Server: typed handlers behind the methods of a contract.

A handler is `async def handler(call, request) -> reply`. It runs in a task of its own, which is cancelled when the caller withdraws,
its deadline is over, or the connection ends; whatever it starts must end with it. An `IsopodError` it raises reaches the caller
as it is; anything else is a bug: logged with its traceback, told to the caller without.

Rules: sessions and calls are kept in dicts, in their order; everything a peer can make grow has a bound in `RpcLimits`.
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Generic, TypeVar

import msgspec

from isopod.net.rpc.codec import Codec
from isopod.net.rpc.connection import Connection, RpcLimits, error_frame
from isopod.net.rpc.deadlines import Deadlines
from isopod.net.rpc.streams import Inbox, Outbox
from isopod.runtime.gate import Gate
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Counter, Histogram, Registry
from isopod.wire import frames as f
from isopod.wire.service import Method
from isopod.world.errors import (
    BugError,
    Cancelled,
    DeadlineExceeded,
    Disconnected,
    Exhausted,
    IsopodError,
    NotFound,
    ProtocolViolation,
    UsageError,
)
from isopod.world.network import Address, Listener
from isopod.world.world import World

In = TypeVar("In")
Out = TypeVar("Out")

METHOD_CHARS_MAX: Final = 80
_STREAM_FRAMES: Final = (f.Item, f.End, f.Credit)  # a union in place would be built anew at each isinstance


class Call(Generic[In, Out]):
    """One call, as its handler sees it. `In` are the items the caller streams, `Out` those it gets."""

    __slots__ = (
        "_inbox", "_loop", "_outbox", "ended_at_ns", "ended_by", "expires_at", "id", "is_answered", "is_started", "method", "n_bytes",
        "peer", "started_ns", "task", "timeout_s",
    )  # fmt: skip

    def __init__(self, call_id: int, method: str, *, peer: str, loop: asyncio.AbstractEventLoop, timeout_s: float | None) -> None:
        self.id = call_id
        self.method = method
        self.peer = peer
        """What the caller calls itself."""
        self.expires_at = None if timeout_s is None else loop.time() + timeout_s
        """The loop's time at which the caller stops waiting, None if it waits for ever."""
        self.task: asyncio.Task[None] | None = None
        self.ended_by: IsopodError | None = None
        self.is_answered = False
        self.is_started = False
        self.n_bytes = 0
        self.started_ns = 0
        self.ended_at_ns = 0
        self.timeout_s = timeout_s
        self._loop = loop
        self._inbox: Inbox[In] | None = None
        self._outbox: Outbox | None = None

    @property
    def deadline_s(self) -> float | None:
        """Seconds left until the caller stops waiting (not below 0), None if it waits for ever."""
        return None if self.expires_at is None else max(0.0, self.expires_at - self._loop.time())

    async def receive(self) -> In | None:
        """Return the next item of the caller's stream; None at its end, or if the method has no such stream."""
        return None if self._inbox is None else await self._inbox.receive()

    def __aiter__(self) -> AsyncIterator[In]:
        """Iterate over the caller's stream."""
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[In]:
        while (item := await self.receive()) is not None:
            yield item

    async def send(self, item: Out) -> None:
        """Stream one item to the caller, waiting for its credit.

        Raises:
            BugError: The method streams nothing to callers, or after `end`.
            InvalidArgument: The item is over 1 MiB.
            IsopodError: The caller is gone (the handler is being cancelled too).
        """
        if self._outbox is None:
            raise BugError(f"{self.method} streams nothing to its callers")
        await self._outbox.send(item)

    def end(self) -> None:
        """Say that nothing more will be streamed; the reply says so too."""
        if self._outbox is not None:
            self._outbox.end()

    # --- for the session ----------------------------------------------------------------------------------------------

    def attach(self, inbox: Inbox[In] | None, outbox: Outbox | None) -> None:
        """Give the call its streams."""
        self._inbox = inbox
        self._outbox = outbox

    def withdraw(self, error: IsopodError) -> None:
        """Cancel the handler; `error` says why. Only the first reason counts."""
        if self.ended_by is not None:
            return
        self.ended_by = error
        if self._outbox is not None:
            self._outbox.fail(error)
        # A task that is cancelled before its first step never runs, not even its clean-up: let it begin and see `ended_by`.
        if self.task is not None and self.is_started:
            self.task.cancel()

    def on_frame(self, frame: f.Frame, n_bytes: int) -> int:
        """Take a frame of this call's streams; return how many bytes it keeps.

        Raises:
            ProtocolViolation: The peer broke a rule of streams.
        """
        if isinstance(frame, f.Credit):
            if self._outbox is not None:
                self._outbox.on_credit(frame.n_bytes)
        elif self._inbox is None:
            if isinstance(frame, f.Item):
                raise ProtocolViolation(self.peer, f"{self.method} takes no items")
        elif isinstance(frame, f.Item):
            self._inbox.on_item(frame.body, n_bytes)
            return n_bytes
        else:
            self._inbox.end()
        return 0

    def wake(self) -> None:
        """The peer reads again."""
        if self._outbox is not None:
            self._outbox.wake()

    def discard(self) -> None:
        """The handler is done: let go of what it did not take."""
        if self._inbox is not None:
            self._inbox.end()
            self._inbox.discard()


AnyCall = Call[Any, Any]  # of whatever its method streams
Handler = Callable[[Call[In, Out], Any], Awaitable[Any]]
"""`async def handler(call, request) -> reply`, with the types of its method."""
AnyHandler = Callable[[AnyCall, Any], Awaitable[Any]]
AnyMethod = Method[Any, Any]


class _Verb:
    """A method with its handler and metrics."""

    __slots__ = ("calls", "codec", "duration", "handler", "method", "task_name")

    def __init__(self, method: AnyMethod, handler: AnyHandler, metrics: Registry) -> None:
        self.method = method
        self.handler = handler
        self.codec = Codec(method)
        self.task_name = f"rpc {method.name}"
        self.calls: dict[str, Counter] = {
            outcome: metrics.counter("isopod_rpc_calls_total", "Calls answered.", method=method.name, outcome=outcome)
            for outcome in ("ok", "error", "cancelled", "bug")
        }
        self.duration: Histogram = metrics.histogram(
            "isopod_rpc_call_duration_seconds", "From a request's arrival to its answer.", method=method.name
        )

    @property
    def is_unary(self) -> bool:
        """Whether nothing is streamed."""
        return self.method.sends is None and self.method.receives is None


class Server:
    """Serves methods to many connections.

    Args:
        world: Network and clock.
        handlers: A handler for each method.
        logger: Gets violations, bugs and (at debug) calls.
        metrics: Where calls and connections are counted.
        limits: Bounds.
        peer: What to call ourselves in our hello.
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
    ) -> None:
        self.world = world
        self.logger = logger
        self.limits = limits
        self.peer = peer
        self.gate = Gate("rpc server")
        self.verbs = {method.name: _Verb(method, handler, metrics) for method, handler in dict(handlers).items()}
        self.connections = metrics.gauge("isopod_rpc_connections", "Open connections.")
        self.calls_open = metrics.gauge("isopod_rpc_calls_open", "Calls being served.")
        self.violations = metrics.counter("isopod_rpc_protocol_violations_total", "Connections ended for breaking the protocol.")
        self.refusals = metrics.counter("isopod_rpc_refused_connections_total", "Connections refused because too many were open.")
        self._sessions: dict[int, _Session] = {}
        self._n_sessions = 0
        self._listeners: list[Listener] = []

    async def listen(self, address: Address, *, mode: int = 0o660, gid: int | None = None) -> Listener:
        """Serve on one more address; the server closes the listener too.

        Raises:
            OSError: The address cannot be bound.
        """
        listener = await self.world.network.listen(address, self._accept, mode=mode, gid=gid)
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
            NotFound: No such method.
            UsageError: The method streams.
            InvalidArgument: The body is not its request.
            IsopodError: What the handler raised.
        """
        verb = self.verbs.get(method_name)
        if verb is None:
            raise NotFound("method", method_name[:METHOD_CHARS_MAX])
        if not verb.is_unary:
            raise UsageError(f"{method_name} streams: call it on a connection")
        request = verb.codec.decode_request(body)
        call: AnyCall = Call(0, method_name, peer=self.peer, loop=asyncio.get_running_loop(), timeout_s=None)
        with self.gate.hold():
            return await verb.handler(call, request)

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
        for session in list(self._sessions.values()):
            session.close()
        for session in list(self._sessions.values()):
            await session.connection.wait_gone()

    def forget(self, number: int) -> None:
        """A session is over, and none of its handlers runs."""
        if self._sessions.pop(number, None) is not None:
            self.connections.dec()

    def _accept(self) -> asyncio.Protocol:
        number = self._n_sessions
        self._n_sessions += 1
        session = _Session(self, number)
        if len(self._sessions) >= self.limits.connections_max:
            limit = str(self.limits.connections_max)
            session.refuse(
                Exhausted("connections", limit, "close some clients"), at_once=len(self._sessions) >= 2 * self.limits.connections_max
            )
            self.refusals.inc()
        elif self.gate.is_closed:
            session.refuse(_shutting_down(self.peer))
        self._sessions[number] = session
        self.connections.inc()
        return session.connection

    async def _close_listeners(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.close()

    def _cancel_all(self) -> None:
        for session in list(self._sessions.values()):
            session.cancel_calls(_shutting_down(self.peer))

    async def _wait_handlers(self) -> None:
        """Wait until cancelled handlers have cleaned up, for a bounded time."""
        try:
            async with asyncio.timeout(self.limits.cancel_grace_s):
                await self.gate.close()
        except TimeoutError:
            stuck = [call.method for session in self._sessions.values() for call in session.calls.values()]
            self.logger.error("rpc.handlers_stuck", methods=stuck)


class _Session:
    """One connection of the server: the `Side` that knows its calls."""

    def __init__(self, server: Server, number: int) -> None:
        self.connection = Connection(self, peer=server.peer, limits=server.limits, stops_reading=True)
        self.calls: dict[int, AnyCall] = {}
        self._server = server
        self._number = number
        self._last_id = 0
        self._in_flight_bytes = 0
        self._is_going_away = False
        self._is_lost = False
        self._refusal: IsopodError | None = None
        self._deadlines = Deadlines(self.connection.loop, self._on_expired)

    # --- what the server calls ----------------------------------------------------------------------------------------

    def refuse(self, error: IsopodError, *, at_once: bool = False) -> None:
        """End the connection as soon as the peer's hello is there (so that it can read why), or without a word."""
        self._refusal = error
        if at_once:
            self.connection.close(error)

    def go_away(self) -> None:
        """Take no more requests."""
        if not self._is_going_away:
            self._is_going_away = True
            self.connection.send(f.GoAway(self._last_id))

    def cancel_calls(self, error: IsopodError) -> None:
        """Cancel every handler."""
        for call in list(self.calls.values()):
            call.withdraw(error)

    def close(self) -> None:
        """End the connection."""
        self.connection.close(_shutting_down(self._server.peer))

    # --- what the connection calls ------------------------------------------------------------------------------------

    def on_hello(self, hello: f.Hello) -> None:
        """The peer has introduced itself."""
        if self._refusal is not None:
            self.connection.fail(self._refusal)

    def on_frame(self, frame: f.Frame, n_bytes: int) -> None:
        """Take a frame of a client."""
        if isinstance(frame, f.Request):
            self._on_request(frame, n_bytes)
        elif isinstance(frame, _STREAM_FRAMES):
            call = self.calls.get(frame.id)
            if call is not None and not call.is_answered:
                self._take(call.on_frame(frame, n_bytes), call)
        elif isinstance(frame, f.Cancel | f.Error):
            call = self.calls.get(frame.id)
            if call is not None:
                call.withdraw(Cancelled(call.method))
        elif isinstance(frame, f.GoAway):
            raise f.WireError("GOAWAY from a client")

    def on_writable(self) -> None:
        """The peer reads again."""
        for call in list(self.calls.values()):
            call.wake()

    def on_lost(self, error: IsopodError) -> None:
        """The connection has ended."""
        if isinstance(error, ProtocolViolation):
            self._server.violations.inc()
            self._server.logger.warning("rpc.violation", peer=self.connection.peer, why=error.message)
        self._is_lost = True
        self._deadlines.close()
        self.cancel_calls(error)

    def on_gone(self) -> None:
        """The transport has handed over, or dropped, our last words."""
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        """Forget the session when its transport is gone and its handlers have ended."""
        if self.connection.is_gone and not self.calls:
            self._server.forget(self._number)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _on_request(self, frame: f.Request[msgspec.Raw], n_bytes: int) -> None:
        if frame.id <= self._last_id:
            raise f.WireError("request ids must rise")
        if self._is_going_away:
            return  # GOAWAY told the peer that this one was not taken
        self._last_id = frame.id
        verb = self._server.verbs.get(frame.method)
        if verb is None:
            self._answer_error(frame.id, NotFound("method", frame.method[:METHOD_CHARS_MAX], "is the node older than the client?"))
            return
        limits = self._server.limits
        if len(self.calls) >= limits.calls_max:
            self._answer_error(frame.id, Exhausted("open calls", f"{limits.calls_max} per connection"))
            return
        if self._in_flight_bytes + n_bytes > limits.in_flight_bytes_max:
            self._answer_error(frame.id, Exhausted("bytes in flight", f"{limits.in_flight_bytes_max} per connection"))
            return
        try:
            request = verb.codec.decode_request(frame.body)
        except UsageError as error:
            verb.calls["error"].inc()
            self._answer_error(frame.id, error)
            return
        self._start(verb, frame, request, n_bytes=n_bytes)

    def _start(self, verb: _Verb, frame: f.Request[msgspec.Raw], request: object, *, n_bytes: int) -> None:
        timeout_s = None if frame.deadline_ms is None else frame.deadline_ms / 1000
        connection = self.connection
        call: AnyCall = Call(frame.id, frame.method, peer=connection.peer, loop=connection.loop, timeout_s=timeout_s)
        if not verb.is_unary:
            decoder = verb.codec.sends
            inbox: Inbox[Any] | None = None
            if decoder is not None:
                inbox = Inbox(connection, frame.id, decoder=decoder, method=frame.method, on_taken=self._release)
            outbox = None if verb.method.receives is None else Outbox(connection, frame.id, method=frame.method)
            call.attach(inbox, outbox)
        call.n_bytes = n_bytes
        call.started_ns = self._server.world.clock.monotonic_ns()
        self._in_flight_bytes += n_bytes
        self._server.gate.enter()
        self._server.calls_open.inc()
        self.calls[frame.id] = call
        if timeout_s is not None:
            self._deadlines.add(frame.id, timeout_s)
        call.task = connection.loop.create_task(self._serve(call, verb, request), name=verb.task_name)

    async def _serve(self, call: AnyCall, verb: _Verb, request: object) -> None:
        """Run a handler: the root of its task, so nothing but the loop's own exceptions leaves it."""
        outcome = "error"
        call.is_started = True
        try:
            if call.ended_by is not None:
                raise asyncio.CancelledError  # withdrawn before the first step
            reply = await verb.handler(call, request)
            outcome = self._answer(call, reply)
        except asyncio.CancelledError:
            outcome = "cancelled"
            self._answer_call(call, call.ended_by or Cancelled(call.method))
        except IsopodError as error:
            outcome = "bug" if isinstance(error, BugError) else "error"
            self._answer_call(call, error)
        except Exception as error:  # noqa: BLE001 - a task's root
            outcome = "bug"
            self._log_bug(call, error)
            self._answer_call(call, BugError(f"{call.method} failed"))
        finally:
            self._finish(call, verb, outcome)

    def _finish(self, call: AnyCall, verb: _Verb, outcome: str) -> None:
        del self.calls[call.id]
        self._deadlines.discard(call.id)
        call.discard()
        self._in_flight_bytes -= call.n_bytes
        duration_ns = (call.ended_at_ns or self._server.world.clock.monotonic_ns()) - call.started_ns
        verb.calls[outcome].inc()
        verb.duration.observe(duration_ns / 1e9)
        self._server.calls_open.dec()
        logger = self._server.logger
        if logger.is_enabled("debug"):
            logger.debug("rpc.call", method=call.method, peer=call.peer, outcome=outcome, duration_us=duration_ns // 1000)
        self._server.gate.leave()
        self._end_if_idle()

    def _answer(self, call: AnyCall, reply: object) -> str:
        """Send a handler's reply; return the outcome."""
        if call.is_answered:
            return "cancelled"
        call.ended_at_ns = self._server.world.clock.monotonic_ns()
        try:
            self.connection.send(f.Reply(call.id, reply, (call.ended_at_ns - call.started_ns) // 1000))
        except f.TooLarge as error:
            self._answer_call(call, Exhausted(f"reply of {call.method}", error.why, "ask for less"))
            return "error"
        call.is_answered = True
        return "ok"

    def _answer_call(self, call: AnyCall, error: IsopodError) -> None:
        if not call.is_answered:
            call.is_answered = True
            self._answer_error(call.id, error)

    def _answer_error(self, call_id: int, error: IsopodError) -> None:
        if not self._is_lost:
            self.connection.send(error_frame(call_id, error))

    def _on_expired(self, call_id: int) -> None:
        """A deadline is over: the caller gets its answer now, however long the handler takes to clean up."""
        call = self.calls.get(call_id)
        if call is not None and call.expires_at is not None:
            error = DeadlineExceeded(call.method, call.timeout_s or 0.0)
            self._answer_call(call, error)
            call.withdraw(error)

    def _take(self, n_bytes: int, call: AnyCall) -> None:
        """Account for a queued item; one that is too much ends its call, not the connection."""
        self._in_flight_bytes += n_bytes
        limit = self._server.limits.in_flight_bytes_max
        if self._in_flight_bytes > limit:
            error = Exhausted("bytes in flight", f"{limit} per connection", "use one connection for fewer streams")
            self._answer_call(call, error)
            call.withdraw(error)
            call.discard()

    def _release(self, n_bytes: int) -> None:
        self._in_flight_bytes -= n_bytes

    def _log_bug(self, call: AnyCall, error: Exception) -> None:
        trace = "".join(traceback.format_exception(error))
        self._server.logger.error("rpc.bug", method=call.method, peer=call.peer, error=repr(error), traceback=trace)


def _shutting_down(name: str) -> Disconnected:
    return Disconnected(name, "shutting down", "try again when it is up")
