"""Future and Promise: values that come later, chained by functions or awaited, as one likes.

    answer = make_future(read()).then(parse).map(len).handle_exception(lambda error: 0)
    n = await answer

A `Future` is an asyncio future, so `await`, `asyncio.gather`, `asyncio.shield` and the others take it, and `make_future` takes whatever
can be awaited. Continuations run in the loop, never inside the call that resolves, in the context that chained them.

Cancellation passes on both ways: a cancelled future cancels what was chained to it, and cancelling the end of a chain cancels its
source, unless another chain still wants that. A failure goes down the chain to whoever looks; one that nobody looks at is told once to the
loop's exception handler when the future is forgotten (asyncio's rule, for the end of the chain only).

Source: Seastar's future, promise, when_all, when_all_succeed (future.hh, when_all.hh).
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar, overload

from isopod.world.errors import BrokenPromise, WrongState

T = TypeVar("T")
U = TypeVar("U")


class Future(asyncio.Future[T]):
    """A value, or a failure, that comes later. `make_future`, `Promise` and the chaining methods make them."""

    _source: "asyncio.Future[Any] | None" = None
    _n_wanted = 0
    _sources: "tuple[asyncio.Future[Any], ...]" = ()

    @overload
    def then(self, function: Callable[[T], Awaitable[U]]) -> "Future[U]": ...
    @overload
    def then(self, function: Callable[[T], U]) -> "Future[U]": ...
    def then(self, function: Callable[[T], Any]) -> "Future[Any]":
        """Return the future of `function(value)`; where that is awaitable, of what it becomes. A failure passes by."""

        def go_on(done: asyncio.Future[T], derived: "Future[Any]") -> None:
            _resolve(derived, function(done.result()))

        return self._derive(go_on)

    def map(self, function: Callable[[T], U]) -> "Future[U]":
        """Return the future of `function(value)`, as it is: an awaitable result is not awaited. A failure passes by."""
        return self._derive(lambda done, derived: derived.set_result(function(done.result())))

    @overload
    def then_wrapped(self, function: Callable[["Future[T]"], Awaitable[U]]) -> "Future[U]": ...
    @overload
    def then_wrapped(self, function: Callable[["Future[T]"], U]) -> "Future[U]": ...
    def then_wrapped(self, function: Callable[["Future[T]"], Any]) -> "Future[Any]":
        """Return the future of `function(self)`, called when this is done, however it ended."""
        return self._derive(lambda _, derived: _resolve(derived, function(self)))

    def handle_exception(
        self, function: Callable[[Any], "Awaitable[T] | T"], kind: "type[BaseException] | tuple[type[BaseException], ...]" = Exception
    ) -> "Future[T]":
        """Return a future that puts `function(error)` in the place of a failure.

        Args:
            function: May return an awaitable, which is awaited; may raise.
            kind: The failures meant; others, and cancellation, pass by.
        """

        def go_on(done: asyncio.Future[T], derived: "Future[T]") -> None:
            error = None if done.cancelled() else done.exception()
            if isinstance(error, kind):
                _resolve(derived, function(error))
            else:
                derived.set_result(done.result())

        return self._derive(go_on)

    def finally_(self, function: Callable[[], object]) -> "Future[T]":
        """Return a future with this one's outcome, after `function()` was called (and awaited, where it returns an awaitable).

        It is called after failure and cancellation too, also if the returned future was cancelled. Its own failure is the outcome.
        """
        derived: Future[T] = self._dependant()

        async def after(waited: Awaitable[object]) -> T:
            await waited
            return await self

        def on_done(done: asyncio.Future[T]) -> None:
            waited = function()
            if inspect.isawaitable(waited):
                # It begins whatever becomes of the end of the chain; if that was cancelled before, nobody waits for it.
                work = asyncio.ensure_future(waited, loop=self.get_loop())
                if not derived.done():
                    _follow(derived, after(work))
            elif not derived.done():
                derived.set_result(done.result())

        self.add_done_callback(lambda done: _guarded(on_done, done, derived))
        return derived

    def discard_result(self) -> "Future[None]":
        """Return a future that ends when this does, without its value; a failure passes on."""

        def go_on(done: asyncio.Future[T], derived: "Future[None]") -> None:
            done.result()
            derived.set_result(None)

        return self._derive(go_on)

    def cancel(self, msg: Any | None = None) -> bool:
        """Cancel this and, where nobody else wants it, what it comes from; return False if it is done already."""
        if not super().cancel(msg):
            return False
        source, self._source = self._source, None
        if source is not None:
            _unwant(source, msg)
        sources, self._sources = self._sources, ()
        for each in sources:
            _unwant(each, msg)
        return True

    def _dependant(self) -> "Future[Any]":
        derived: Future[Any] = Future(loop=self.get_loop())
        derived._source = self
        self._n_wanted += 1
        return derived

    def _derive(self, go_on: Callable[[asyncio.Future[T], "Future[U]"], None]) -> "Future[U]":
        derived: Future[U] = self._dependant()

        def on_done(done: asyncio.Future[T]) -> None:
            if not derived.done():
                go_on(done, derived)

        self.add_done_callback(lambda done: _guarded(on_done, done, derived))
        return derived


class Promise(Generic[T]):
    """The other end of a future: who holds it resolves it, once.

    A promise that is forgotten unresolved breaks its future (`BrokenPromise`), so that nobody waits for ever.

    Args:
        loop: The running loop if None.
    """

    __slots__ = ("__weakref__", "_future", "_is_taken")

    def __init__(self, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._future: Future[T] = Future(loop=loop or asyncio.get_running_loop())
        self._is_taken = False

    @property
    def is_resolved(self) -> bool:
        """Whether the future has its value or failure, or was cancelled."""
        return self._future.done()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the value any more."""
        return self._future.cancelled()

    def get_future(self) -> Future[T]:
        """Return the future; the same each time."""
        self._is_taken = True
        return self._future

    def set_value(self, value: T) -> bool:
        """Resolve; return False if the future was cancelled, so that the value reaches nobody.

        Raises:
            WrongState: It is resolved already.
        """
        if not self._check("set_value"):
            return False
        self._future.set_result(value)
        return True

    def set_exception(self, error: BaseException) -> bool:
        """Fail; returns and raises as `set_value`."""
        if not self._check("set_exception"):
            return False
        _fail(self._future, error)
        return True

    def _check(self, wanted: str) -> bool:
        if self._future.cancelled():
            return False
        if self._future.done():
            raise WrongState("promise", "", "resolved", wanted)
        return True

    def __del__(self) -> None:
        future = getattr(self, "_future", None)
        if future is None or future.done() or not self._is_taken or future.get_loop().is_closed():
            return
        # The collector may run in any thread.
        future.get_loop().call_soon_threadsafe(_break, future)


def make_ready_future(value: T) -> Future[T]:
    """Return a future that has its value."""
    future: Future[T] = Future(loop=asyncio.get_running_loop())
    future.set_result(value)
    return future


def make_exception_future(error: BaseException) -> Future[Any]:
    """Return a future that has failed."""
    future: Future[Any] = Future(loop=asyncio.get_running_loop())
    _fail(future, error)
    return future


def make_future(awaitable: Awaitable[T]) -> Future[T]:
    """Return a future of anything that can be awaited: a coroutine starts as a task, a `Future` is returned as it is."""
    if isinstance(awaitable, Future):
        return awaitable
    future: Future[T] = Future(loop=asyncio.get_running_loop())
    _follow(future, awaitable)
    return future


def when_all(*awaitables: Awaitable[Any]) -> Future[list[Future[Any]]]:
    """Return a future of all futures, in the order given, which resolves when every one is done; it never fails itself.

    They run at the same time. Each future then holds its value or its failure. Cancelling the result cancels them all.
    """
    futures = [make_future(each) for each in awaitables]
    return _gather(futures, lambda: futures)


def when_all_succeed(*awaitables: Awaitable[T]) -> Future[list[T]]:
    """Return a future of all values, in the order given. It waits for all, then fails with the first failure in that order, if any.

    They run at the same time. Cancelling the result cancels them all; one that was cancelled cancels the result.
    """
    futures = [make_future(each) for each in awaitables]

    def values() -> list[T]:
        for future in futures:
            if not future.cancelled():
                future.exception()  # seen: the first of them is raised below
        return [future.result() for future in futures]

    return _gather(futures, values)


def _gather(futures: list[Future[Any]], outcome: Callable[[], T]) -> Future[T]:
    gathered: Future[T] = Future(loop=asyncio.get_running_loop())
    pending = len(futures)
    gathered._sources = tuple(futures)

    def finish() -> None:
        if gathered.done():
            return
        gathered._sources = ()
        try:
            gathered.set_result(outcome())
        except asyncio.CancelledError:
            gathered.cancel()
        except BaseException as error:  # noqa: BLE001 - it is the gathered future's outcome
            _fail(gathered, error)

    def on_done(_: asyncio.Future[Any]) -> None:
        nonlocal pending
        pending -= 1
        if not pending:
            finish()

    for future in futures:
        future._n_wanted += 1
        future.add_done_callback(on_done)
    if not futures:
        finish()
    return gathered


def _guarded(on_done: Callable[[asyncio.Future[Any]], None], done: asyncio.Future[Any], derived: Future[Any]) -> None:
    """Run a continuation; what it raises is the derived future's outcome."""
    derived._source = None
    try:
        on_done(done)
    except BaseException as error:
        if derived.done():  # it was cancelled: nobody but the loop's exception handler hears of this
            if not isinstance(error, asyncio.CancelledError):
                raise
            return
        _fail(derived, error)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise


def _resolve(future: Future[T], value: "Awaitable[T] | T") -> None:
    if inspect.isawaitable(value):
        _follow(future, value)
    else:
        future.set_result(value)


def _follow(future: Future[T], awaitable: Awaitable[T]) -> None:
    """Let a future have the outcome of an awaitable, and cancel it when the future is cancelled."""
    source = asyncio.ensure_future(awaitable, loop=future.get_loop())
    future._source = source
    if isinstance(source, Future):
        source._n_wanted += 1

    def on_done(done: asyncio.Future[T]) -> None:
        if future.done():
            return
        future._source = None
        if done.cancelled():
            future.cancel()
        elif (error := done.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(done.result())

    source.add_done_callback(on_done)


def _unwant(source: asyncio.Future[Any], msg: Any | None) -> None:
    """One dependant of a source was cancelled; with the last one the source is."""
    if isinstance(source, Future):
        source._n_wanted -= 1
        if source._n_wanted > 0:
            return
    source.cancel(msg)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if isinstance(error, asyncio.CancelledError):
        future.cancel()
    elif isinstance(error, StopIteration):  # no future may hold one: it would end whoever awaits it
        wrapped = RuntimeError("a continuation raised StopIteration")
        wrapped.__cause__ = error
        future.set_exception(wrapped)
    else:
        future.set_exception(error)


def _break(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(BrokenPromise())
