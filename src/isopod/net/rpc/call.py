"""Call: one call, as its handler sees it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any, Generic, Protocol, TypeVar

from isopod.net.rpc.streams import Inbox, Outbox
from isopod.wire import frames as f
from isopod.wire.service import Method
from isopod.world.errors import BugError, IsopodError, ProtocolViolation
from isopod.world.network import PeerIdentity

In = TypeVar("In")
Out = TypeVar("Out")


class Caller(Protocol):
    """Where a call came from."""

    @property
    def peer(self) -> str:
        """What the caller calls itself."""

    @property
    def identity(self) -> PeerIdentity | None:
        """What its certificate says."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Whose time counts."""

    @property
    def arrived_s(self) -> float:
        """The loop's time when the bytes came that are being looked at."""

    @property
    def arrived_ns(self) -> int:
        """The same by the World's clock."""


class Later:
    """A reply that comes later, without a task: what a plain handler may return instead of it. Settled like a future, by whoever has the
    reply; who asked hears of it in that very moment, not in a later turn of the loop. In the own process it can be awaited.
    """

    __slots__ = ("_error", "_is_done", "_result", "_then")

    def __init__(self) -> None:
        self._is_done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._then: Callable[[Any, BaseException | None], object] | None = None

    def done(self) -> bool:
        """Return whether it is settled, or nobody waits any more."""
        return self._is_done

    def set_result(self, result: Any) -> None:  # of whatever the method replies
        """Reply. Ignored once it is done."""
        self._settle(result, None)

    def set_exception(self, error: BaseException) -> None:
        """Fail. Ignored once it is done."""
        self._settle(None, error)

    def cancel(self) -> None:
        """Note that nobody waits any more."""
        self._settle(None, asyncio.CancelledError())

    def then(self, callback: Callable[[Any, BaseException | None], object]) -> None:
        """Have the one callback called with the reply or the failure; at once if it is done. It must not raise."""
        if self._is_done:
            callback(self._result, self._error)
        else:
            self._then = callback

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the reply."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            elif isinstance(error, asyncio.CancelledError):
                future.cancel()
            else:
                future.set_exception(error)

        self.then(settle)
        return (yield from future)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self._is_done:
            return
        self._is_done = True
        self._result, self._error = result, error
        then, self._then = self._then, None
        if then is not None:
            then(result, error)


class Call(Generic[In, Out]):
    """One call, as its handler sees it. `In` are the items the caller streams, `Out` those it gets."""

    # Made for every call, also for those that are answered at once: what few calls need are the class's defaults until then.
    expires_at: float | None = None
    """The loop's time at which the caller stops waiting, None if it waits for ever."""
    task: "asyncio.Task[Any] | None" = None
    later: Later | None = None
    ended_by: IsopodError | None = None
    is_answered = False
    is_waiting = False
    n_bytes = 0
    _inbox: Inbox[In] | None = None
    _outbox: Outbox | None = None

    def __init__(self, caller: Caller, call_id: int, method: str, deadline_ms: int | None) -> None:
        self.id = call_id
        """Unique on its connection; below 0 if the caller wants no answer."""
        self.method = method
        self.caller = caller
        self.arrived_s = caller.arrived_s
        self.started_ns = caller.arrived_ns
        if deadline_ms is not None:
            self.expires_at = caller.arrived_s + deadline_ms / 1000

    @property
    def peer(self) -> str:
        """What the caller calls itself. Anybody may call himself anything: to decide by is `identity`."""
        return self.caller.peer

    @property
    def identity(self) -> PeerIdentity | None:
        """Who the caller's certificate says it is; None where none was shown."""
        return self.caller.identity

    @property
    def deadline_s(self) -> float | None:
        """Seconds left until the caller stops waiting (not below 0), None if it waits for ever."""
        return None if self.expires_at is None else max(0.0, self.expires_at - self.caller.loop.time())

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
        """Cancel the handler; `error` says why. Only the first reason counts. One that did not begin will see `ended_by`."""
        if self.ended_by is not None:
            return
        self.ended_by = error
        if self._outbox is not None:
            self._outbox.fail(error)
        if self.task is not None:
            self.task.cancel()
        elif self.later is not None:
            self.later.cancel()

    def on_frame(self, frame: f.Frame, n_bytes: int) -> int:
        """Take a frame of this call's streams; return how many bytes it keeps.

        Raises:
            ProtocolViolation: The peer broke a rule of streams.
        """
        if isinstance(frame, f.Credit):
            if self._outbox is not None:
                self._outbox.on_credit(frame.n_bytes)
        elif isinstance(frame, f.ITEM_FRAMES):
            if self._inbox is None:
                raise ProtocolViolation(self.peer, f"{self.method} takes no items")
            self._inbox.on_item(frame.body, n_bytes)
            return n_bytes
        elif self._inbox is not None:
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
AnyHandler = Callable[[AnyCall, Any], Any]
"""An `async def`, or a plain function: one that returns its reply is the fast path, without a task; it may return a `Later`, or any other
awaitable, instead."""
AnyMethod = Method[Any, Any]
