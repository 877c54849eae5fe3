"""Session: one connection of a server, the `Side` that knows its calls.

The path of most requests is short on purpose: one look-up, one decode, the handler, one encode. A plain function is answered while the
received piece is still being taken apart; a coroutine goes to the `Runner`. Only a call that waits gets a deadline's timer and a gauge.

Rules: calls are kept in dicts, in their order; everything a peer can make grow has a bound in `RpcLimits`.
"""

import asyncio
import traceback
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any, Final

from isopod.net.rpc.call import AnyCall, Call, Later
from isopod.net.rpc.codec import DECODE_ERRORS
from isopod.net.rpc.connection import Connection, error_frame
from isopod.net.rpc.deadlines import Deadlines
from isopod.net.rpc.runner import Runner, drop
from isopod.net.rpc.streams import Inbox, Outbox
from isopod.net.rpc.verbs import FAST_NS, Verb
from isopod.runtime.scheduling import SchedulingGroup
from isopod.wire import frames as f
from isopod.world.errors import (
    BugError,
    Cancelled,
    DeadlineExceeded,
    Disconnected,
    Exhausted,
    InvalidArgument,
    IsopodError,
    MethodNotFound,
    NotFound,
    ProtocolViolation,
)
from isopod.world.network import PeerIdentity

if TYPE_CHECKING:
    from isopod.net.rpc.server import Server

METHOD_CHARS_MAX: Final = 80
_REQUEST: Final = f.Request
_NOTIFY: Final = f.Notify
AnyRequest = f.Request[Any]  # bodies: msgspec.Raw, or a memoryview of a raw one


class Session:
    """One connection of a server.

    Args:
        server: Whose.
        group: Of the listener, None for none.
    """

    def __init__(self, server: "Server", group: SchedulingGroup | None) -> None:
        self.connection = Connection(self, limits=server.limits, is_server=True)
        self.calls: dict[int, AnyCall] = {}
        self.loop = self.connection.loop
        self.arrived_s = 0.0
        """The loop's time when the bytes came that are being looked at."""
        self.arrived_ns = 0
        """The same by the World's clock."""
        self.in_flight_bytes = 0
        self._server = server
        self._limits = server.limits
        self._number = -1
        self._now_ns = server.world.clock.monotonic_ns
        self._verbs: dict[str, Verb] = server.verbs
        self._last_id = 0
        self._n_notices = 0
        self._unread_bytes = 0
        self._is_going_away = False
        self._is_lost = False
        self._is_logging = False
        self._refusal: IsopodError | None = None
        self._deadlines = Deadlines(self.loop, self._open_deadlines, self._on_expired)
        self._runner = Runner(
            self.loop,
            queue_max=max(1, server.limits.calls_max // 2),
            now_ns=self._now_ns,
            on_waiting=self._on_waiting,
            settle=self._settle,
            on_full=self.connection.set_full,
            on_idle=self.connection.flush,
        )
        self._runner.use_group(group)

    @property
    def peer(self) -> str:
        """What the client calls itself."""
        return self.connection.peer

    @property
    def identity(self) -> PeerIdentity | None:
        """Who the client's certificate says it is."""
        return self.connection.identity

    @property
    def group(self) -> SchedulingGroup | None:
        """In which its handlers run."""
        return self._runner.group

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
        self.connection.close(shutting_down(self._server.peer))

    # --- what the connection calls ------------------------------------------------------------------------------------

    def on_made(self) -> None:
        """The connection stands."""
        self._number = self._server.admit(self)

    def greeting(self, theirs: f.Hello | None) -> f.Hello:
        """Return the server's hello, as an answer to the client's."""
        return self._server.greeting(theirs)

    def on_hello(self, hello: f.Hello) -> None:
        """The peer has introduced itself."""
        if self.connection.encoding == "json":
            self._verbs = self._server.json_verbs()
        if self._refusal is None and hello.group:
            group = self._server.groups.get(hello.group)
            if group is None:
                self._refusal = NotFound("scheduling group", hello.group[:METHOD_CHARS_MAX], "the server names those it lets clients use")
            self._runner.use_group(group)
        if self._refusal is not None:
            self.connection.fail(self._refusal)

    def on_bytes(self) -> None:
        """Something came: calls in it are counted from now."""
        self.arrived_s = self.loop.time()
        self.arrived_ns = self._now_ns()
        self._is_logging = self._server.logger.is_enabled("debug")

    def on_frame(self, frame: f.Frame, n_bytes: int) -> bool:
        """Take a frame of a client."""
        if type(frame) is _REQUEST:
            self._on_request(frame, n_bytes)
        elif type(frame) is _NOTIFY:
            self._on_notice(frame, n_bytes)
        else:
            self._on_other_frame(frame, n_bytes)
        return self.connection.must_pause

    def on_writable(self) -> None:
        """The peer reads again."""
        for call in list(self.calls.values()):
            call.wake()

    def on_unread(self, n_bytes: int) -> bool:
        """Account for what the peer has not read."""
        server = self._server
        server.held_bytes += n_bytes - self._unread_bytes
        self._unread_bytes = n_bytes
        return n_bytes <= server.limits.unread_bytes_max and server.held_bytes <= server.limits.server_bytes_max

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

    # --- requests -----------------------------------------------------------------------------------------------------

    def _on_request(self, frame: AnyRequest, n_bytes: int) -> None:
        call_id = frame.id
        verb = self._verbs.get(frame.method)
        if verb is None or call_id <= self._last_id or self._is_going_away:
            self._refuse_request(frame)
            return
        self._last_id = call_id
        if verb.is_plain:
            try:
                request = verb.decode(frame.body)
            except DECODE_ERRORS as error:
                self._on_misfit(frame, verb, error)
                return
            call: AnyCall = Call(self, call_id, verb.name, frame.deadline_ms)
            self._serve_now(call, verb, request, n_bytes)
        else:
            self._serve_soon(frame, verb, n_bytes)

    def _refuse_request(self, frame: AnyRequest) -> None:
        if frame.id <= self._last_id:
            raise f.WireError("request ids must rise")
        if not self._is_going_away:  # else GOAWAY told the peer that this one was not taken
            self._last_id = frame.id
            self._answer_error(frame.id, MethodNotFound(frame.method[:METHOD_CHARS_MAX]))

    def _on_misfit(self, frame: AnyRequest, verb: Verb, error: Exception) -> None:
        """A request is none of its method."""
        verb.meter.calls["error"].inc()
        self._answer_error(frame.id, verb.codec.explain(error))

    def _serve_now(self, call: AnyCall, verb: Verb, request: object, n_bytes: int) -> None:
        """Call a plain function."""
        try:
            reply = verb.handler(call, request)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever a handler raises is told to its caller, or logged
            self._reply_error(call, verb, error)
            return
        if type(reply) is verb.method.reply or not isinstance(reply, Awaitable):
            self._reply(call, verb, reply)
        elif type(reply) is Later:
            self._serve_later(call, verb, reply, n_bytes)
        elif (refusal := self._excess(n_bytes)) is not None:
            drop(reply)
            refusal.retry_after_s = None  # it was begun
            self._reply_error(call, verb, refusal)
        else:
            self._enter(call, n_bytes)
            self._runner.add(call, verb, None, reply)

    def _serve_later(self, call: AnyCall, verb: Verb, later: Later, n_bytes: int) -> None:
        """Answer when a plain function's reply comes."""
        refusal = self._excess(n_bytes)
        if refusal is not None:
            later.cancel()
            refusal.retry_after_s = None  # it was begun
            self._reply_error(call, verb, refusal)
            return
        self._enter(call, n_bytes)
        call.later = later
        self._on_waiting(call, verb)

        def settle(reply: object, error: BaseException | None) -> None:
            is_last = len(self.calls) == 1
            if is_last:
                self.connection.hold()  # nothing else would travel with it
            self._settle(call, verb, reply, error)
            if is_last:
                self.connection.flush()

        later.then(settle)

    def _serve_soon(self, frame: AnyRequest, verb: Verb, n_bytes: int) -> None:
        """Have a coroutine called."""
        server, calls = self._server, self.calls
        limits = self._limits
        in_flight_bytes = self.in_flight_bytes + n_bytes
        held_bytes = server.held_bytes + n_bytes
        if len(calls) >= limits.calls_max or in_flight_bytes > limits.in_flight_bytes_max or held_bytes > limits.server_bytes_max:
            refusal = self._excess(n_bytes)
            assert refusal is not None
            verb.meter.calls["error"].inc()
            self._answer_error(frame.id, refusal)
            return
        try:
            request = verb.decode(frame.body)
        except DECODE_ERRORS as error:
            self._on_misfit(frame, verb, error)
            return
        call: AnyCall = Call(self, frame.id, verb.name, frame.deadline_ms)
        if verb.has_streams:
            self._attach(call, verb)
        if not calls:
            server.gate.enter()
        # As `_enter` does, for which there is no time here.
        call.n_bytes = n_bytes
        self.in_flight_bytes = in_flight_bytes
        server.held_bytes = held_bytes
        calls[frame.id] = call
        self._runner.add(call, verb, request)

    def _attach(self, call: AnyCall, verb: Verb) -> None:
        """Give a call the streams of its method."""
        inbox: Inbox[Any] | None = None
        if verb.codec.sends is not None:
            inbox = Inbox(self.connection, call.id, decoder=verb.codec.sends, method=verb.name, on_taken=self._release)
        outbox = None if verb.method.receives is None else Outbox(self.connection, call.id, method=verb.name)
        call.attach(inbox, outbox)

    def _excess(self, n_bytes: int) -> Exhausted | None:
        """Return which bound a request of so many bytes would pass."""
        limits, held = self._server.limits, self._server.held_bytes
        if len(self.calls) >= limits.calls_max:
            return Exhausted("open calls", f"{limits.calls_max} per connection", retry_after_s=limits.retry_after_s)
        if self.in_flight_bytes + n_bytes > limits.in_flight_bytes_max:
            return Exhausted("bytes in flight", f"{limits.in_flight_bytes_max} per connection", retry_after_s=limits.retry_after_s)
        if held + n_bytes > limits.server_bytes_max:
            return Exhausted("bytes in flight", f"{limits.server_bytes_max} per server", retry_after_s=limits.retry_after_s)
        return None

    def _enter(self, call: AnyCall, n_bytes: int) -> None:
        """A call is open until `_settle`."""
        if not self.calls:
            self._server.gate.enter()  # once for all calls of a connection
        call.n_bytes = n_bytes
        self.in_flight_bytes += n_bytes
        self._server.held_bytes += n_bytes
        self.calls[call.id] = call

    def _on_waiting(self, call: AnyCall, verb: Verb) -> None:
        """A handler did not end in its first step."""
        call.is_waiting = True
        self._server.calls_open.inc()
        if call.expires_at is not None:
            self._deadlines.note(call.expires_at)

    def _settle(self, call: AnyCall, verb: Verb, reply: object, error: BaseException | None) -> int:
        """A handler has ended: answer, and let go of its call."""
        now_ns = self._reply(call, verb, reply) if error is None else self._reply_error(call, verb, error)
        del self.calls[call.id]
        n_bytes = call.n_bytes
        self.in_flight_bytes -= n_bytes
        self._server.held_bytes -= n_bytes
        if verb.has_streams:
            call.discard()
        if call.is_waiting:
            self._server.calls_open.dec()
        if not self.calls:
            self._server.gate.leave()
            self._end_if_idle()
        return now_ns

    # --- answers ------------------------------------------------------------------------------------------------------

    def _reply(self, call: AnyCall, verb: Verb, reply: Any) -> int:  # of whatever the method replies
        """Send a handler's reply; return the time."""
        now_ns = self._now_ns()
        duration_ns = now_ns - call.started_ns
        call_id = call.id
        if call.is_answered:
            return self._count(call, verb, "cancelled", now_ns)
        call.is_answered = True
        if call_id > 0:
            connection = self.connection
            try:
                if verb.is_raw and len(reply) >= connection.raw_bytes_min:
                    connection.send_raw((f.REPLY, call_id, None, duration_ns // 1000), reply)
                else:
                    connection.send((f.REPLY, call_id, reply, duration_ns // 1000))
            except f.TooLarge as error:
                call.is_answered = False
                return self._reply_error(call, verb, Exhausted(f"reply of {verb.name}", error.why, "ask for less"))
            except (f.WireError, TypeError) as error:
                call.is_answered = False
                return self._reply_error(call, verb, error)
        meter = verb.meter
        if duration_ns >= FAST_NS or self._is_logging:
            return self._count(call, verb, "ok", now_ns)
        meter.n_fast += 1
        meter.fast_ns += duration_ns
        if not meter.is_noted:
            self._server.note(meter)
        return now_ns

    def _reply_error(self, call: AnyCall, verb: Verb, error: BaseException) -> int:
        """Tell the caller, or log, what a handler raised; return the time."""
        outcome, told = "error", error
        if isinstance(error, asyncio.CancelledError):
            outcome, told = "cancelled", call.ended_by or Cancelled(call.method)
        elif isinstance(error, BugError):
            outcome = "bug"
        elif not isinstance(error, IsopodError):
            outcome, told = "bug", BugError(f"{call.method} failed")
            self._log_bug(call, error)
        assert isinstance(told, IsopodError)
        if not call.is_answered:
            call.is_answered = True
            self._answer_error(call.id, told)
        return self._count(call, verb, outcome, self._now_ns())

    def _count(self, call: AnyCall, verb: Verb, outcome: str, now_ns: int) -> int:
        duration_ns = now_ns - call.started_ns
        verb.meter.count(outcome, duration_ns)
        if self._is_logging:
            facts = {"method": call.method, "peer": call.peer, "outcome": outcome, "duration_us": duration_ns // 1000}
            self._server.logger.debug("rpc.call", **facts)
        return now_ns

    def _answer_error(self, call_id: int, error: IsopodError) -> None:
        if call_id > 0 and not self._is_lost:
            self.connection.send(error_frame(call_id, error))

    def _log_bug(self, call: AnyCall, error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))
        self._server.logger.error("rpc.bug", method=call.method, peer=call.peer, error=repr(error), traceback=trace)

    # --- deadlines ----------------------------------------------------------------------------------------------------

    def _open_deadlines(self) -> Iterator[tuple[int, float | None]]:
        return ((call.id, call.expires_at) for call in self.calls.values() if not call.is_answered and call.ended_by is None)

    def _on_expired(self, call_id: int) -> None:
        """A deadline is over: the caller gets its answer now, however long the handler takes to clean up."""
        call = self.calls.get(call_id)
        if call is None or call.expires_at is None:
            return
        error = DeadlineExceeded(call.method, call.expires_at - call.arrived_s)
        call.is_answered = True
        self._answer_error(call_id, error)
        call.withdraw(error)

    # --- other frames -------------------------------------------------------------------------------------------------

    def _on_other_frame(self, frame: f.Frame, n_bytes: int) -> None:
        if isinstance(frame, f.RawFrame):
            self._on_raw_frame(frame, n_bytes)
        elif isinstance(frame, f.STREAM_FRAMES):
            self._on_stream_frame(frame.id, frame, n_bytes)
        elif isinstance(frame, f.Cancel) or (isinstance(frame, f.Error) and frame.id):
            call = self.calls.get(frame.id)
            if call is not None:
                call.withdraw(Cancelled(call.method))
        elif isinstance(frame, f.GoAway):
            raise f.WireError("GOAWAY from a client")
        else:
            self.connection.on_frame(frame)

    def _on_raw_frame(self, frame: f.RawFrame, n_bytes: int) -> None:
        """Take a frame whose body came behind it: the same frame with that body, if the method has such bodies."""
        head = frame.head
        if isinstance(head, f.Item):
            self._on_stream_frame(head.id, frame, n_bytes)
        elif isinstance(head, (f.Request, f.Notify)):
            verb = self._verbs.get(head.method)
            fits = verb is None or verb.method.request is bytes
            if isinstance(head, f.Notify):
                if fits:
                    self._on_notice(f.Notify(head.method, head.deadline_ms, frame.body), n_bytes)
            elif fits:
                self._on_request(f.Request(head.id, head.method, head.deadline_ms, frame.body), n_bytes)
            else:
                self._check_id(head.id)
                self._answer_error(head.id, InvalidArgument("request of", head.method, "it takes no raw body"))

    def _check_id(self, call_id: int) -> None:
        if call_id <= self._last_id:
            raise f.WireError("request ids must rise")
        self._last_id = call_id

    def _on_stream_frame(self, call_id: int, frame: f.Frame, n_bytes: int) -> None:
        call = self.calls.get(call_id)
        if call is not None and not call.is_answered:
            self._hold(call.on_frame(frame, n_bytes), call)

    def _on_notice(self, frame: f.Notify[Any], n_bytes: int) -> None:
        """Serve a call that nobody waits for; one that cannot be served is counted."""
        verb = self._verbs.get(frame.method)
        if verb is None or verb.has_streams or self._is_going_away or self._excess(n_bytes) is not None:
            self._server.notices_dropped.inc()
            return
        self._n_notices += 1
        try:
            request = verb.decode(frame.body)
        except DECODE_ERRORS:
            verb.meter.calls["error"].inc()
            return
        call: AnyCall = Call(self, -self._n_notices, verb.name, frame.deadline_ms)
        if not verb.is_plain:
            self._enter(call, n_bytes)
            self._runner.add(call, verb, request)
            return
        try:
            reply = verb.handler(call, request)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever a handler raises is logged
            self._reply_error(call, verb, error)
            return
        if type(reply) is not verb.method.reply and isinstance(reply, Awaitable):
            self._enter(call, n_bytes)
            self._runner.add(call, verb, None, reply)
        else:
            self._reply(call, verb, reply)

    def _hold(self, n_bytes: int, call: AnyCall) -> None:
        """Account for a queued item; one that is too much ends its call, not the connection."""
        self.in_flight_bytes += n_bytes
        self._server.held_bytes += n_bytes
        limits = self._server.limits
        if self.in_flight_bytes > limits.in_flight_bytes_max or self._server.held_bytes > limits.server_bytes_max:
            limit = min(limits.in_flight_bytes_max, limits.server_bytes_max)
            error = Exhausted("bytes in flight", f"{limit} per connection", "use one connection for fewer streams")
            if not call.is_answered:
                call.is_answered = True
                self._answer_error(call.id, error)
            call.withdraw(error)
            call.discard()

    def _release(self, n_bytes: int) -> None:
        self.in_flight_bytes -= n_bytes
        self._server.held_bytes -= n_bytes


def shutting_down(name: str) -> Disconnected:
    """Return what clients of a server that stops are told."""
    return Disconnected(name, "shutting down", "try again when it is up")
