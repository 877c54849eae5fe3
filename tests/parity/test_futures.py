"""Futures and promises: then, when_all, exceptions, cancellation, broken promises."""

import asyncio

import pytest

from isopod.runtime.future import (
    Future,
    Promise,
    make_exception_future,
    make_future,
    make_ready_future,
    when_all,
    when_all_succeed,
)
from isopod.world.errors import BrokenPromise, NotFound, WrongState
from isopod.world.world import World

pytestmark = pytest.mark.row("S35")


async def later(value: int, delay_s: float = 0.001) -> int:
    """A value after a while."""
    await asyncio.sleep(delay_s)
    return value


async def test_then_chains_values_and_futures(world: World) -> None:
    assert await make_ready_future(1).then(lambda n: n + 1).then(later).map(str) == "2"


async def test_then_runs_later_and_not_inside_the_resolving_call(world: World) -> None:
    seen: list[int] = []
    promise: Promise[int] = Promise()
    chained = promise.get_future().then(seen.append)
    promise.set_value(7)
    assert seen == []
    await chained
    assert seen == [7]


async def test_a_future_is_awaited_like_any_other(world: World) -> None:
    future = make_future(later(5))
    assert isinstance(future, asyncio.Future)
    assert list(await asyncio.gather(future, later(6))) == [5, 6]


async def test_an_exception_passes_down_the_chain_to_its_handler(world: World) -> None:
    failed: Future[int] = make_exception_future(NotFound("key", "x"))
    seen: list[int] = []
    assert await failed.then(lambda n: n + 1).then(seen.append).map(lambda _: 1).handle_exception(lambda error: -1, NotFound) == -1
    assert seen == [], "what comes between is passed by"


async def test_what_a_continuation_raises_is_the_outcome(world: World) -> None:
    with pytest.raises(ZeroDivisionError):
        await make_ready_future(0).then(lambda n: 1 // n)


async def test_then_wrapped_sees_both_outcomes(world: World) -> None:
    assert await make_ready_future(1).then_wrapped(lambda done: done.exception()) is None
    failed: Future[int] = make_exception_future(NotFound("key", "x"))
    assert isinstance(await failed.then_wrapped(lambda done: done.exception()), NotFound)


async def test_finally_runs_after_success_failure_and_cancellation(world: World) -> None:
    seen: list[str] = []
    assert await make_ready_future(3).finally_(lambda: seen.append("success")) == 3
    with pytest.raises(NotFound):
        await make_exception_future(NotFound("key", "x")).finally_(lambda: seen.append("failure"))
    cancelled = make_future(later(1, 3600)).finally_(lambda: seen.append("cancellation"))
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    async with asyncio.timeout(40):
        while len(seen) < 3:
            await asyncio.sleep(0)
    assert seen == ["success", "failure", "cancellation"]


async def test_when_all_runs_at_the_same_time_and_keeps_the_order(world: World) -> None:
    begun = [asyncio.Event(), asyncio.Event()]

    async def meet(own: int) -> int:
        begun[own].set()
        await begun[1 - own].wait()  # one after the other they would wait for ever
        return own + 1

    async with asyncio.timeout(40):
        done = await when_all(meet(0), meet(1), make_exception_future(NotFound("key", "x")))
    assert [done[0].result(), done[1].result()] == [1, 2]
    assert isinstance(done[2].exception(), NotFound)


async def test_when_all_succeed_waits_for_all_and_fails_with_the_first(world: World) -> None:
    slow = make_future(later(1, 0.02))
    with pytest.raises(NotFound):
        await when_all_succeed(slow, make_exception_future(NotFound("key", "x")))
    assert slow.done()
    assert await when_all_succeed(later(1), later(2)) == [1, 2]


async def test_cancelling_the_end_of_a_chain_cancels_its_source(world: World) -> None:
    seen: list[str] = []

    async def work() -> int:
        try:
            return await later(1, 3600)
        except asyncio.CancelledError:
            seen.append("work was cancelled")
            raise

    end = make_future(work()).then(lambda n: n + 1)
    await asyncio.sleep(0.001)
    end.cancel()
    with pytest.raises(asyncio.CancelledError):
        await end
    await asyncio.sleep(0.001)
    assert seen == ["work was cancelled"]


async def test_a_source_that_others_want_is_not_cancelled(world: World) -> None:
    source = make_future(later(1, 0.01))
    one, two = source.then(lambda n: n + 1), source.then(lambda n: n + 2)
    one.cancel()
    assert await two == 3


async def test_a_promise_resolves_once(world: World) -> None:
    promise: Promise[str] = Promise()
    assert promise.set_value("first")
    with pytest.raises(WrongState):
        promise.set_value("second")
    assert await promise.get_future() == "first"


async def test_a_forgotten_promise_breaks_its_future(world: World) -> None:
    promise: Promise[int] = Promise()
    future = promise.get_future()
    del promise
    with pytest.raises(BrokenPromise):
        await future
