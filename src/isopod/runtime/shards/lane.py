"""Lane: the calls between this shard and one other, both ways, over one channel.

What goes out: `call` takes a credit, sends the request, and waits for the answer until the deadline; cancelling it, or the deadline, tells
the other side. What comes in runs in a context of its own, which carries the caller's deadline, depth and scheduling group; a coroutine in
a task, which is cancelled when the caller withdraws, its deadline is well over, or the channel ends.

Rules: each request is answered exactly once, also after it was withdrawn: that brings the credit back. Late answers are dropped. A message
that is none of ours, or an answer nobody asked for, ends the channel. Everything is bounded by the credits of the two sides.
"""

import asyncio
import traceback
from contextvars import Context, ContextVar
from typing import Any, Final, Protocol

import msgspec

from isopod.runtime.abort import adopt_deadline
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shards.credits import DEPTH_MAX, CreditPool, SmpServiceGroup
from isopod.runtime.shards.messages import ENCODER, MESSAGES, Answer, Ask, Failed, Withdraw, sayable
from isopod.runtime.shards.verbs import Verb
from isopod.runtime.timers import TimerWheel
from isopod.world.errors import (
    BugError,
    Cancelled,
    DeadlineExceeded,
    Disconnected,
    Exhausted,
    InvalidArgument,
    IsopodError,
    ProtocolViolation,
    from_code,
)
from isopod.world.shards import Channel

OVERDUE_S: Final = 1.0
"""How often calls being served are compared with their deadlines. The caller withdraws on time; this is for one that is too busy to."""
DEPTH: Final[ContextVar[int]] = ContextVar("isopod_smp_depth", default=0)
"""How many calls between shards the running code is nested in."""


class LaneCounts(msgspec.Struct):
    """What one lane did."""

    calls_sent: int = 0
    calls_received: int = 0
    calls_failed: int = 0
    """Calls sent that ended in an error."""
    calls_timed_out: int = 0


class Host(Protocol):
    """What a lane asks of its shard."""

    wheel: TimerWheel
    logger: Logger
    metrics: Registry
    contexts: dict[str, Context]
    """A context for each scheduling group known here; "" for all others."""

    def find(self, instance: int, name: str) -> Verb:
        """Return a verb, or raise NotFound."""

    def on_lane_lost(self, peer: int, lane: "Lane", error: IsopodError) -> None:
        """The channel is over."""


class _Call:
    """A call of ours that is under way."""

    __slots__ = ("future", "pool")

    def __init__(self, future: "asyncio.Future[object]", pool: CreditPool) -> None:
        self.future = future
        """Resolved with True (a credit), the packed answer, or an error to raise."""
        self.pool = pool


class _Served:
    """A call of the other side's that runs here in a task."""

    __slots__ = ("expires_at_s", "is_started", "task", "withdrawn")

    def __init__(self, expires_at_s: float) -> None:
        self.expires_at_s = expires_at_s
        self.is_started = False
        self.task: asyncio.Task[None] | None = None
        self.withdrawn: IsopodError | None = None


class Lane:
    """The calls to and from one shard.

    Args:
        host: Our shard.
        peer: The other shard's number.
        own: Our number.
        channel: Carries the messages; the lane owns it.
    """

    def __init__(self, host: Host, peer: int, own: int, channel: Channel) -> None:
        self.peer = peer
        self.channel = channel
        self.counts = LaneCounts()
        self._host = host
        self._loop = asyncio.get_running_loop()
        self._name = f"shard {peer}"
        self._error: IsopodError | None = None
        self._is_closing = False
        self._n_calls = 0
        self._calls: dict[int, _Call] = {}
        self._served: dict[int, _Served] = {}
        self._pools: dict[str, list[CreditPool | None]] = {}
        self._overdue: asyncio.TimerHandle | None = None
        self._on_idle: asyncio.Future[None] | None = None
        self._sent = host.metrics.counter("isopod_smp_calls_sent_total", "Calls sent to another shard.", shard=str(own), peer=str(peer))
        self._received = host.metrics.counter(
            "isopod_smp_calls_received_total", "Calls received from another shard.", shard=str(own), peer=str(peer)
        )
        self._n_published = (0, 0)

    def start(self) -> None:
        """Begin to receive."""
        self.channel.start(self._on_messages, self._on_closed)

    # --- our calls ----------------------------------------------------------------------------------------------------

    @property
    def error(self) -> IsopodError | None:
        """Why the lane is over; None while it stands."""
        return self._error

    @property
    def n_in_flight(self) -> int:
        """Calls of ours that are not answered yet, the withdrawn among them."""
        return len(self._calls)

    @property
    def n_waiting(self) -> int:
        """Calls of ours that wait for a credit."""
        return sum(pool.n_waiting for pools in self._pools.values() for pool in pools if pool is not None)

    @property
    def n_serving(self) -> int:
        """Calls of theirs that run here now."""
        return len(self._served)

    async def call(
        self, name: str, request: object, *, instance: int, timeout_s: float, group: SmpServiceGroup, scheduling: str
    ) -> msgspec.Raw:
        """Call a verb of the other shard; return its packed reply.

        Args:
            name: The verb's.
            request: What it is asked, None for one that takes nothing.
            instance: The `Sharded` it belongs to, 0 for the shard's own verbs.
            timeout_s: How long to wait in all.
            group: Whose credits to use.
            scheduling: The scheduling group it shall run in, if the other shard has one of that name.

        Raises:
            IsopodError: What the verb raised, or why there is no answer.
        """
        depth = DEPTH.get() + 1
        pool = self._pool(group, depth)
        loop = self._loop
        future: asyncio.Future[object] = loop.create_future()
        call = _Call(future, pool)
        expires_at_s = loop.time() + timeout_s
        timer = self._host.wheel.call_later(timeout_s, self._expire, call, name, timeout_s)
        number = 0
        try:
            if self._error is not None:
                raise self._error_now()
            if not pool.try_take():
                await self._wait_credit(call)
                call.future = future = loop.create_future()
            number = self._send_ask(call, name, request, (instance, depth, expires_at_s, scheduling))
            outcome = await future
        except asyncio.CancelledError:
            if number:
                self._withdraw(number)
            raise
        finally:
            timer.cancel()
        if isinstance(outcome, msgspec.Raw):
            return outcome
        self.counts.calls_failed += 1
        if isinstance(outcome, DeadlineExceeded) and number in self._calls:
            self._withdraw(number)
        assert isinstance(outcome, IsopodError)
        raise outcome

    def _send_ask(self, call: _Call, name: str, request: object, about: tuple[int, int, float, str]) -> int:
        """Send a request that has its credit; return its number. The credit goes back if it cannot be packed."""
        number = self._n_calls + 1
        instance, depth, expires_at_s, scheduling = about
        try:
            self.channel.send(ENCODER.encode(Ask(number, name, instance, depth, expires_at_s, scheduling, request)))
        except InvalidArgument:
            call.pool.give()
            raise
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            call.pool.give()
            raise InvalidArgument("request of", name, f"it cannot be packed: {error}") from error
        self._n_calls = number
        self._calls[number] = call
        self.counts.calls_sent += 1
        return number

    async def _wait_credit(self, call: _Call) -> None:
        call.pool.enqueue(call.future)
        try:
            outcome = await call.future
        except asyncio.CancelledError:
            # The credit may have come in the same turn as the cancellation: it goes to the next.
            if call.future.done() and not call.future.cancelled() and call.future.result() is True:
                call.pool.give()
            raise
        if isinstance(outcome, IsopodError):
            self.counts.calls_failed += 1
            raise outcome
        if self._error is not None:  # in the same turn as the credit
            raise self._error_now()

    def _pool(self, group: SmpServiceGroup, depth: int) -> CreditPool:
        if depth > DEPTH_MAX:
            raise Exhausted("nested calls between shards", f"{DEPTH_MAX} deep", "let the first caller make the calls in turn")
        pools = self._pools.get(group.name)
        if pools is None:
            pools = self._pools[group.name] = [None] * (DEPTH_MAX + 1)
        pool = pools[depth]
        if pool is None:
            pool = pools[depth] = CreditPool(group.max_nonlocal_requests)
        return pool

    def _expire(self, call: _Call, name: str, timeout_s: float) -> None:
        if not call.future.done():
            self.counts.calls_timed_out += 1
            call.future.set_result(DeadlineExceeded(f"{name} on {self._name}", timeout_s))

    def _withdraw(self, number: int) -> None:
        if number in self._calls:
            self.channel.send(ENCODER.encode(Withdraw(number)))

    def _error_now(self) -> IsopodError:
        """Return a fresh error: one object raised in many places would collect all their tracebacks."""
        assert self._error is not None
        return from_code(self._error.code, self._error.message, self._error.hint)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls of theirs, and wait until those that run have ended; then cancel the rest."""
        self._is_closing = True
        if self._served:
            self._on_idle = self._loop.create_future()
            timer = self._loop.call_later(grace_s, self._cancel_served, Cancelled("a call to a shard that stops"))
            try:
                await self._on_idle
            finally:
                timer.cancel()

    def close(self, error: IsopodError) -> None:
        """End the lane: calls of ours raise `error`, theirs are cancelled."""
        if self._error is None:
            self.channel.close()
            self._fail(error)

    def _on_closed(self, error: IsopodError) -> None:
        if self._error is None:
            self._fail(error)
            self._host.on_lane_lost(self.peer, self, error)

    def _fail(self, error: IsopodError) -> None:
        self._error = error
        if self._overdue is not None:
            self._overdue.cancel()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.future.done():
                call.future.set_result(self._error_now())
        for pools in self._pools.values():
            for pool in pools:
                if pool is not None:
                    pool.fail(self._error_now())
        self._cancel_served(Cancelled(f"a call by {self._name}, which is gone"))

    # --- their calls --------------------------------------------------------------------------------------------------

    def _on_messages(self, messages: list[bytes]) -> None:
        decode = MESSAGES.decode
        try:
            for packed in messages:
                message = decode(packed)
                if isinstance(message, Answer):
                    self._on_answer(message.id, message.body)
                elif isinstance(message, Ask):
                    self._on_ask(message)
                elif isinstance(message, Failed):
                    self._on_answer(message.id, from_code(message.code, message.message, message.hint, message.exit_code))
                else:
                    self._on_withdraw(message.id)
        except (msgspec.MsgspecError, ValueError, RecursionError, ProtocolViolation) as error:
            if self._error is None:
                self.channel.close()
                self._on_closed(ProtocolViolation(self._name, str(error)))
        self._publish()

    def _publish(self) -> None:
        """Bring the metrics up to date: once for a batch, not for each call."""
        sent, received = self._n_published
        counts = self.counts
        self._n_published = counts.calls_sent, counts.calls_received
        if counts.calls_sent > sent:
            self._sent.inc(counts.calls_sent - sent)
        if counts.calls_received > received:
            self._received.inc(counts.calls_received - received)

    def _on_answer(self, number: int, outcome: object) -> None:
        call = self._calls.pop(number, None)
        if call is None:
            raise ProtocolViolation(self._name, f"an answer to call {number}, which was not made")
        call.pool.give()
        if not call.future.done():
            call.future.set_result(outcome)

    def _on_withdraw(self, number: int) -> None:
        served = self._served.get(number)
        if served is not None:
            _cancel(served, Cancelled("the call"))

    def _on_ask(self, ask: Ask[msgspec.Raw]) -> None:
        self.counts.calls_received += 1
        try:
            if self._is_closing:
                raise Disconnected(f"shard {self.peer}'s peer", "it is shutting down")
            verb = self._host.find(ask.instance, ask.verb)
            request = _decode(verb, ask.body)
            context = (self._host.contexts.get(ask.group) or self._host.contexts[""]).copy()
            context.run(_enter, ask.depth, ask.expires_at_s)
            if not verb.is_async:
                self._answer(ask.id, verb.name, context.run(verb.function, *request))
                return
        except Exception as error:  # noqa: BLE001 - the root of a call: the caller is told, a bug is logged
            self._refuse(ask.id, ask.verb, error)
            return
        served = self._served[ask.id] = _Served(ask.expires_at_s)
        served.task = self._loop.create_task(self._serve(ask.id, served, verb, request), context=context, name=f"smp {ask.verb}")
        if self._overdue is None:
            self._overdue = self._loop.call_later(OVERDUE_S, self._cancel_overdue)

    async def _serve(self, number: int, served: _Served, verb: Verb, request: tuple[Any, ...]) -> None:
        served.is_started = True
        try:
            if served.withdrawn is not None:
                raise served.withdrawn
            reply = await verb.function(*request)
        except asyncio.CancelledError:
            self._refuse(number, verb.name, served.withdrawn or Cancelled("the call"))
        except Exception as error:  # noqa: BLE001 - the root of a call's task
            self._refuse(number, verb.name, error)
        else:
            self._answer(number, verb.name, reply)
        finally:
            del self._served[number]
            if self._on_idle is not None and not self._served and not self._on_idle.done():
                self._on_idle.set_result(None)

    def _answer(self, number: int, name: str, reply: object) -> None:
        try:
            self.channel.send(ENCODER.encode(Answer(number, reply)))
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            self._refuse(number, name, BugError(f"the reply of {name} cannot be packed: {error}"))
        except InvalidArgument as error:  # too long
            self._refuse(number, name, error)

    def _refuse(self, number: int, name: str, error: Exception) -> None:
        told = as_told(error, name, self._host.logger)
        self.channel.send(ENCODER.encode(Failed(number, told.code, sayable(told.message), sayable(told.hint), told.exit_code)))

    def _cancel_served(self, error: IsopodError) -> None:
        for served in list(self._served.values()):
            _cancel(served, error)

    def _cancel_overdue(self) -> None:
        """Cancel what runs although its caller's deadline is well over."""
        self._overdue = None
        late_s = self._loop.time() - OVERDUE_S
        for served in list(self._served.values()):
            if served.expires_at_s < late_s:
                _cancel(served, DeadlineExceeded("the call", 0.0))
        if self._served and self._error is None:
            self._overdue = self._loop.call_later(OVERDUE_S, self._cancel_overdue)


def as_told(error: Exception, name: str, logger: Logger) -> IsopodError:
    """Return what the caller of a verb is told: an error of the tree as it is, anything else as a bug, which is logged here."""
    if isinstance(error, IsopodError):
        return error
    logger.error("smp.verb_failed", verb=name, error=repr(error), traceback="".join(traceback.format_exception(error)))
    return BugError(f"{name} failed: {type(error).__name__}: {error}")


def _decode(verb: Verb, body: msgspec.Raw) -> tuple[Any, ...]:
    try:
        request = verb.decode_request(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidArgument("request of", verb.name, str(error)) from None
    return (request,) if verb.takes_request else ()


def _enter(depth: int, expires_at_s: float) -> None:
    """Let the code that serves a call know where it stands. Runs in the call's own context."""
    DEPTH.set(depth)
    adopt_deadline(expires_at_s)


def _cancel(served: _Served, error: IsopodError) -> None:
    """Cancel a call being served; only the first reason counts. A task that has not begun yet must begin, or nobody would answer."""
    if served.withdrawn is None:
        served.withdrawn = error
        if served.is_started and served.task is not None:
            served.task.cancel()
