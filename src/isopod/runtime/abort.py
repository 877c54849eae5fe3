"""AbortSource and deadlines: how "stop this" and "not later than" reach the code that can act on them.

An `AbortSource` is asked once to abort and tells its subscribers, in the order in which they came. A deadline is a point of the loop's
time that is carried in the context, so that whatever a task calls or starts inherits it: an RPC client reads `remaining_s` and sends
it along. Deadlines only ever get nearer: an inner one that is later than the outer one changes nothing.

Neither is a cancel scope: they cancel the task that entered them, as `asyncio.timeout` does, and no other.
Source: Seastar's abort_source and abort_on_expiry; asyncio.timeout for the rules of cancelling oneself.
"""

import asyncio
import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Protocol, Self

from isopod.runtime.timers import TimerWheel
from isopod.runtime.waiters import Waiters
from isopod.world.errors import Cancelled, DeadlineExceeded

_DEADLINE: Final[contextvars.ContextVar[float | None]] = contextvars.ContextVar("isopod_deadline", default=None)


class Subscription:
    """One subscriber of an `AbortSource`."""

    __slots__ = ("_callback", "_source")

    def __init__(self, source: "AbortSource", callback: Callable[[str], object]) -> None:
        self._source = source
        self._callback: Callable[[str], object] | None = callback

    def cancel(self) -> None:
        """Do not call; a second time, or after the abort, nothing happens."""
        self._callback = None
        self._source._subscriptions.pop(self, None)


class AbortSource:
    """Asked once to abort; tells everybody.

    Args:
        name: What is aborted; part of the error's message.
        parent: A source whose abort is this one's too.
    """

    def __init__(self, name: str = "operation", *, parent: "AbortSource | None" = None) -> None:
        self._name = name
        self._reason: str | None = None
        self._error: BaseException | None = None
        self._subscriptions: dict[Subscription, None] = {}
        self._waiters = Waiters()
        self._link = parent.subscribe(self._on_parent) if parent is not None and not parent.abort_requested else None
        self._parent = parent
        if parent is not None and parent.abort_requested:
            self._on_parent(parent.reason or "")

    @property
    def abort_requested(self) -> bool:
        """Whether it was asked."""
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why, None before."""
        return self._reason

    def request_abort(self, reason: str = "aborted", *, error: BaseException | None = None) -> bool:
        """Abort: call the subscribers now, in their order. Only the first request counts.

        Args:
            reason: For messages.
            error: What `check` raises; `Cancelled` if None.

        Returns:
            Whether this was the first request.

        Raises:
            ExceptionGroup: What subscribers raised; all were called.
        """
        if self._reason is not None:
            return False
        self._reason = reason
        self._error = error
        if self._link is not None:
            self._link.cancel()
        failures: list[Exception] = []
        while self._subscriptions:
            subscription = next(iter(self._subscriptions))
            del self._subscriptions[subscription]
            callback, subscription._callback = subscription._callback, None
            if callback is not None:
                try:
                    callback(reason)
                except Exception as failure:  # noqa: BLE001 - raised below, after the others were told
                    failures.append(failure)
        self._waiters.wake()
        if failures:
            raise ExceptionGroup(f"subscribers of the abort of {self._name} failed", failures)
        return True

    def check(self) -> None:
        """Go on, or raise.

        Raises:
            Cancelled: It was asked to abort (or the error given to `request_abort`).
        """
        if self._reason is not None:
            raise self.error()

    def error(self) -> BaseException:
        """Return what `check` raises after the abort."""
        return self._error or Cancelled(f"{self._name} ({self._reason})" if self._reason else self._name)

    def subscribe(self, callback: Callable[[str], object]) -> Subscription:
        """Have `callback(reason)` called at the abort; at once, if it has happened."""
        subscription = Subscription(self, callback)
        if self._reason is not None:
            subscription._callback = None
            callback(self._reason)
        else:
            self._subscriptions[subscription] = None
        return subscription

    async def wait(self) -> str:
        """Wait for the abort and return its reason."""
        while self._reason is None:
            await self._waiters.wait()
        return self._reason

    def child(self, name: str = "") -> "AbortSource":
        """Return a source that aborts with this one, or alone. `close` it when it is no longer needed."""
        return AbortSource(name or self._name, parent=self)

    def close(self) -> None:
        """Forget the subscribers and the parent; an abort then reaches nobody."""
        if self._link is not None:
            self._link.cancel()
        self._subscriptions.clear()

    def scope(self) -> "AbortScope":
        """Return an `async with` block that an abort leaves: its task is cancelled, and the block raises what `check` raises."""
        return AbortScope(self)

    def _on_parent(self, reason: str) -> None:
        assert self._parent is not None
        self.request_abort(reason, error=self._parent._error)


class _Interruption:
    """Cancels the task that is in a block, and tells its own cancellation from anybody else's (asyncio's cancelling counts)."""

    __slots__ = ("_n_cancelling", "_state", "_task")

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._n_cancelling = 0
        self._state = "new"

    def enter(self, what: str) -> None:
        if self._state != "new":
            raise RuntimeError(f"{what} was entered before")
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError(f"{what} is entered outside of a task")
        self._task = task
        self._n_cancelling = task.cancelling()
        self._state = "inside"

    def fire(self) -> None:
        if self._state == "inside" and self._task is not None:
            self._state = "fired"
            self._task.cancel()

    def leave(self, kind: type[BaseException] | None) -> bool:
        """Return whether the block was left because of `fire` alone."""
        fired = self._state == "fired"
        task, self._task, self._state = self._task, None, "left"
        if not fired or task is None:
            return False
        return task.uncancel() <= self._n_cancelling and kind is not None and issubclass(kind, asyncio.CancelledError)


class AbortScope:
    """A block that ends when its source aborts; see `AbortSource.scope`."""

    __slots__ = ("_interruption", "_source", "_subscription")

    def __init__(self, source: AbortSource) -> None:
        self._source = source
        self._interruption = _Interruption()
        self._subscription: Subscription | None = None

    async def __aenter__(self) -> AbortSource:
        self._source.check()
        self._interruption.enter("an abort scope")
        self._subscription = self._source.subscribe(lambda _: self._interruption.fire())
        return self._source

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._subscription is not None:
            self._subscription.cancel()
        if self._interruption.leave(kind):
            raise self._source.error() from error


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


class deadline:  # noqa: N801 - used like a function, as asyncio.timeout is
    """Use as `async with deadline(2.0, "reading the index"): ...`: the block takes at most so long, and what it calls can see it.

    Args:
        timeout_s: From now; an earlier deadline of the context stays in force, None adds none.
        what: For the error's message.
        wheel: Where its timer lies: a wheel is cheaper, and late by up to one tick. The loop's own timer if None.

    Raises:
        DeadlineExceeded: From the block, when its own time is over. If an outer deadline ended it, the outer block raises.
    """

    __slots__ = ("_interruption", "_timeout_s", "_timer", "_token", "_what", "_wheel", "expires_at_s")

    def __init__(self, timeout_s: float | None, what: str = "operation", *, wheel: TimerWheel | None = None) -> None:
        self._timeout_s = timeout_s
        self._what = what
        self._wheel = wheel
        self._interruption = _Interruption()
        self._timer: _Cancellable | None = None
        self._token: contextvars.Token[float | None] | None = None
        self.expires_at_s: float | None = None

    async def __aenter__(self) -> Self:
        self._interruption.enter("a deadline")
        timeout_s = self._timeout_s
        outer_s = _DEADLINE.get()
        self.expires_at_s = outer_s
        if timeout_s is None:
            return self
        loop = asyncio.get_running_loop()
        mine_s = loop.time() + timeout_s
        if outer_s is not None and outer_s <= mine_s:
            return self
        self.expires_at_s = mine_s
        self._token = _DEADLINE.set(mine_s)
        fire = self._interruption.fire
        self._timer = loop.call_at(mine_s, fire) if self._wheel is None else self._wheel.call_later(timeout_s, fire)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._token is not None:
            _DEADLINE.reset(self._token)
            self._token = None
        if self._interruption.leave(kind):
            raise DeadlineExceeded(self._what, self._timeout_s or 0.0) from error


def current_deadline() -> float | None:
    """Return the context's deadline in the loop's time (`loop.time()`), None if there is none."""
    return _DEADLINE.get()


def remaining_s() -> float | None:
    """Return the seconds that the context's deadline leaves, not below 0; None if there is none."""
    expires_at_s = _DEADLINE.get()
    return None if expires_at_s is None else max(0.0, expires_at_s - asyncio.get_running_loop().time())


def check_deadline(what: str = "operation") -> None:
    """Go on, or raise: for loops that compute for long without awaiting.

    Raises:
        DeadlineExceeded: The context's deadline is over.
    """
    expires_at_s = _DEADLINE.get()
    if expires_at_s is not None and asyncio.get_running_loop().time() >= expires_at_s:
        raise DeadlineExceeded(what, 0.0)


@contextmanager
def carry_deadline(timeout_s: float | None) -> Iterator[None]:
    """Let the context have a deadline that nothing enforces here: a server does this with what a client sent, around `create_task`."""
    if timeout_s is None:
        yield
        return
    outer_s = _DEADLINE.get()
    mine_s = asyncio.get_running_loop().time() + timeout_s
    token = _DEADLINE.set(mine_s if outer_s is None else min(outer_s, mine_s))
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def adopt_deadline(expires_at_s: float) -> None:
    """Let the rest of this context have that deadline (in the loop's time): for a server that makes a context for each call."""
    _DEADLINE.set(expires_at_s)


class AbortOnExpiry(AbortSource):
    """An abort source that aborts by itself after a time; `close` it before, or it stays until then.

    Args:
        timeout_s: From now.
        name: For the error, a `DeadlineExceeded`.
        loop: The running loop if None.
    """

    def __init__(self, timeout_s: float, name: str = "operation", *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__(name)
        expired = DeadlineExceeded(name, timeout_s)
        self._timer = (loop or asyncio.get_running_loop()).call_later(timeout_s, lambda: self.request_abort("expired", error=expired))

    def close(self) -> None:
        """Stop the timer and forget the subscribers."""
        self._timer.cancel()
        super().close()
