"""Futures and promises: chaining, failures, cancellation, and that they are asyncio's too."""

import asyncio
import gc
from collections.abc import Awaitable
from typing import Any

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
from isopod.world.errors import BrokenPromise, WrongState
from isopod.world.world import World

pytestmark = [pytest.mark.row("S2"), pytest.mark.row("S41")]


async def after(delay_s: float, value: Any) -> Any:
    await asyncio.sleep(delay_s)
    if isinstance(value, BaseException):
        raise value
    return value


async def test_then_takes_plain_functions_coroutines_and_futures(world: World) -> None:
    promise: Promise[int] = Promise()
    future = promise.get_future()
    doubled = future.then(lambda n: n * 2)
    later = doubled.then(lambda n: after(0.01, n + 1))
    chained = later.then(lambda n: make_ready_future(f"{n}!"))
    assert not promise.is_resolved
    assert promise.set_value(20)
    assert not doubled.done()  # never inside the call that resolves
    assert await chained == "41!"
    assert [await future, await doubled, await later] == [20, 40, 41]
    assert promise.is_resolved


async def test_map_does_not_await(world: World) -> None:
    inner = make_ready_future(1)
    mapped = make_ready_future(2).map(lambda _: inner)
    assert await mapped is inner


async def test_failures_pass_down_the_chain_to_who_handles_them(world: World) -> None:
    skipped: list[str] = []
    chain = (
        make_ready_future(0)
        .then(lambda n: 1 // n)
        .map(lambda _: skipped.append("map"))
        .then(lambda _: skipped.append("then"))
        .handle_exception(lambda error: skipped.append("value error"), ValueError)
    )
    with pytest.raises(ZeroDivisionError):
        await chain
    assert skipped == []
    assert await make_exception_future(ValueError("x")).handle_exception(lambda error: f"had {error}") == "had x"
    assert await make_exception_future(ValueError("x")).handle_exception(lambda error: after(0.001, 5)) == 5
    assert await make_ready_future(1).handle_exception(lambda error: 2) == 1

    def worse(error: Exception) -> int:
        raise TypeError("worse") from error

    with pytest.raises(TypeError, match="worse"):
        await make_exception_future(ValueError("x")).handle_exception(worse)


async def test_finally_runs_whatever_happens(world: World) -> None:
    seen: list[str] = []
    assert await make_ready_future(1).finally_(lambda: seen.append("value")) == 1
    with pytest.raises(ValueError, match="x"):
        await make_exception_future(ValueError("x")).finally_(lambda: seen.append("failure"))
    assert await make_ready_future(2).finally_(lambda: make_future(after(0.01, "awaited")).map(seen.append)) == 2
    with pytest.raises(KeyError):
        await make_ready_future(3).finally_(lambda: after(0.01, KeyError("clean-up")))
    with pytest.raises(ZeroDivisionError):
        await make_ready_future(4).finally_(lambda: 1 // 0)

    promise: Promise[int] = Promise()
    end = promise.get_future().finally_(lambda: seen.append("cancelled"))
    end.cancel()
    while "cancelled" not in seen:
        await asyncio.sleep(0)
    assert promise.is_cancelled
    assert seen == ["value", "failure", "awaited", "cancelled"]


async def test_then_wrapped_sees_how_it_ended(world: World) -> None:
    assert await make_exception_future(ValueError("x")).then_wrapped(lambda done: str(done.exception())) == "x"
    assert await make_ready_future(1).then_wrapped(lambda done: done.result() + 1) == 2


async def test_discard_result(world: World) -> None:
    discarded: object = await make_ready_future(1).discard_result()  # type: ignore[func-returns-value]
    assert discarded is None
    with pytest.raises(ValueError, match="x"):
        await make_exception_future(ValueError("x")).discard_result()


async def test_it_is_an_asyncio_future(world: World) -> None:
    ready = make_ready_future(1)
    assert isinstance(ready, asyncio.Future)
    assert list(await asyncio.gather(ready, make_future(after(0.001, 2)), after(0.001, 3))) == [1, 2, 3]
    assert await asyncio.wait_for(make_future(after(0.001, 4)), 5) == 4
    assert await asyncio.shield(make_ready_future(5)) == 5
    plain: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    wrapped = make_future(plain)
    plain.set_result(6)
    assert await wrapped == 6
    assert make_future(ready) is ready
    task = asyncio.create_task(after(0.001, 7))
    assert await make_future(task).map(lambda n: n + 1) == 8


async def test_cancelling_the_end_cancels_the_source(world: World) -> None:
    seen: list[str] = []

    async def work() -> int:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return 1

    source = make_future(work())
    end = source.then(lambda n: n).map(lambda n: n)
    await asyncio.sleep(0.001)
    end.cancel()
    while not seen:
        await asyncio.sleep(0)
    assert source.cancelled()

    awaiting = asyncio.create_task(_wait(make_future(work()).map(lambda n: n)))
    await asyncio.sleep(0.001)
    awaiting.cancel()
    while len(seen) < 2:
        await asyncio.sleep(0)
    assert awaiting.cancelled() or awaiting.cancelling()

    inner = make_ready_future(0).then(lambda _: work())
    await asyncio.sleep(0.001)
    inner.cancel()
    while len(seen) < 3:
        await asyncio.sleep(0)


async def _wait(future: Future[Any]) -> Any:
    return await future


async def test_a_source_that_others_want_is_not_cancelled(world: World) -> None:
    promise: Promise[int] = Promise()
    source = promise.get_future()
    one, other = source.map(lambda n: n + 1), source.map(lambda n: n + 2)
    one.cancel()
    await asyncio.sleep(0)
    assert not source.cancelled()
    assert promise.set_value(1)
    assert await other == 3
    assert one.cancelled()


async def test_a_cancelled_source_cancels_its_chain(world: World) -> None:
    promise: Promise[int] = Promise()
    source = promise.get_future()
    end = source.then(lambda n: n).handle_exception(lambda error: 0)
    source.cancel()
    with pytest.raises(asyncio.CancelledError):
        await end
    assert end.cancelled()
    assert promise.is_cancelled
    assert not promise.set_value(1)
    assert not promise.set_exception(ValueError("nobody hears"))


async def test_a_promise_is_kept_once(world: World) -> None:
    promise: Promise[int] = Promise()
    assert promise.get_future() is promise.get_future()
    promise.set_value(1)
    with pytest.raises(WrongState, match="resolved"):
        promise.set_value(2)
    with pytest.raises(WrongState, match="resolved"):
        promise.set_exception(ValueError("x"))
    assert await promise.get_future() == 1


async def test_a_forgotten_promise_breaks_its_future(world: World) -> None:
    promise: Promise[int] | None = Promise()
    assert promise is not None
    end = promise.get_future().map(lambda n: n)
    promise = None
    gc.collect()
    with pytest.raises(BrokenPromise, match="forgotten"):
        await end


async def test_when_all_runs_together_and_keeps_each_outcome(world: World) -> None:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    n_inside = most = 0

    async def counted(delay_s: float, value: Any) -> Any:
        nonlocal n_inside, most
        n_inside += 1
        most = max(most, n_inside)
        try:
            return await after(delay_s, value)
        finally:
            n_inside -= 1

    cancelled: Promise[int] = Promise()
    cancelled.get_future().cancel()
    futures = await when_all(
        counted(0.03, "a"), counted(0.01, ValueError("b")), counted(0.02, "c"), make_ready_future("d"), cancelled.get_future()
    )
    assert most == 3
    assert loop.time() - began_s < 5
    assert [futures[0].result(), futures[2].result(), futures[3].result()] == ["a", "c", "d"]
    assert isinstance(futures[1].exception(), ValueError)
    assert futures[4].cancelled()
    assert await when_all() == []


async def test_when_all_succeed_fails_with_the_first_in_order_after_all_have_ended(world: World) -> None:
    assert await when_all_succeed(after(0.02, 1), after(0.01, 2), make_ready_future(3)) == [1, 2, 3]
    assert await when_all_succeed() == []
    ended: list[str] = []
    slow = make_future(after(0.03, 1)).finally_(lambda: ended.append("slow"))
    with pytest.raises(ValueError, match="first in order"):
        await when_all_succeed(after(0.02, ValueError("first in order")), slow, after(0.01, TypeError("first in time")))
    assert ended == ["slow"]


async def test_cancelling_a_group_cancels_its_members(world: World) -> None:
    ended: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(number)

    everything = when_all(*(work(number) for number in range(3)))
    succeeded = when_all_succeed(*(work(number) for number in range(3)))
    await asyncio.sleep(0.001)
    everything.cancel()
    succeeded.cancel()
    while len(ended) < 6:
        await asyncio.sleep(0)
    assert sorted(ended) == [0, 0, 1, 1, 2, 2]


async def test_an_unobserved_failure_is_told_once_and_only_at_the_end_of_the_chain(world: World) -> None:
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    try:
        end: Any = make_exception_future(ValueError("unseen")).map(lambda n: n).then(lambda n: n)
        while not end.done():
            await asyncio.sleep(0)
        assert told == []
        del end
        gc.collect()
        await asyncio.sleep(0)
        seen: Any = make_exception_future(ValueError("seen")).map(lambda n: n)
        with pytest.raises(ValueError, match="seen"):
            await seen
        del seen
        gc.collect()
        await asyncio.sleep(0)
    finally:
        loop.set_exception_handler(before)
    assert [str(context["exception"]) for context in told] == ["unseen"]


async def test_a_stop_iteration_becomes_a_failure_that_can_be_held(world: World) -> None:
    def stop(_: int) -> int:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        await make_ready_future(1).then(stop)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await make_exception_future(StopIteration())
    with pytest.raises(asyncio.CancelledError):
        await make_exception_future(asyncio.CancelledError())


async def test_a_chain_of_thousands_uses_no_stack(world: World) -> None:
    promise: Promise[int] = Promise()
    future = promise.get_future()
    for _ in range(2000):
        future = future.map(lambda n: n + 1)
    promise.set_value(0)
    assert await future == 2000


async def test_a_clean_up_that_was_called_begins_although_nobody_waits_any_more() -> None:
    begun: list[int] = []

    async def clean() -> None:
        begun.append(1)

    def called() -> Awaitable[None]:
        asyncio.get_running_loop().call_soon(chain.cancel)  # before any task made now has its first step
        return clean()

    chain: Future[int] = make_ready_future(1).finally_(called)
    with pytest.raises(asyncio.CancelledError):
        await chain
    await asyncio.sleep(0)
    assert begun == [1]
