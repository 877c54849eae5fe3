"""AbortSource and deadlines on both Worlds."""

import asyncio

import pytest

from isopod.runtime.abort import (
    AbortOnExpiry,
    AbortSource,
    carry_deadline,
    check_deadline,
    current_deadline,
    deadline,
    remaining_s,
)
from isopod.runtime.timers import TimerWheel
from isopod.world.errors import Cancelled, DeadlineExceeded
from isopod.world.world import World

pytestmark = pytest.mark.row("S6")


def test_subscribers_are_told_once_in_their_order() -> None:
    source = AbortSource("copy")
    seen: list[str] = []
    source.check()
    source.subscribe(lambda reason: seen.append(f"1 {reason}"))
    gone = source.subscribe(lambda reason: seen.append("never"))
    source.subscribe(lambda reason: seen.append(f"2 {reason}"))
    gone.cancel()
    gone.cancel()
    assert source.request_abort("user")
    assert not source.request_abort("again")
    source.subscribe(lambda reason: seen.append(f"late {reason}"))
    assert seen == ["1 user", "2 user", "late user"]
    assert (source.abort_requested, source.reason) == (True, "user")
    with pytest.raises(Cancelled, match="copy"):
        source.check()


def test_a_failing_subscriber_does_not_hide_the_abort_from_others() -> None:
    source = AbortSource()
    seen: list[str] = []
    source.subscribe(lambda _: 1 // 0)
    source.subscribe(seen.append)
    with pytest.raises(ExceptionGroup) as caught:
        source.request_abort("x")
    assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]
    assert seen == ["x"]


def test_children_abort_with_their_parent_or_alone() -> None:
    parent = AbortSource("parent")
    one, other = parent.child("one"), parent.child()
    one.request_abort("alone")
    assert not parent.abort_requested
    closed = parent.child()
    closed.close()
    parent.request_abort("all", error=ValueError("special"))
    assert (one.reason, other.reason, closed.reason) == ("alone", "all", None)
    with pytest.raises(ValueError, match="special"):
        other.check()
    assert parent.child().abort_requested


async def test_a_scope_ends_when_its_source_aborts(world: World) -> None:
    source = AbortSource("wait")
    asyncio.get_running_loop().call_later(0.01, source.request_abort, "enough")
    with pytest.raises(Cancelled, match="enough"):
        async with source.scope():
            await asyncio.sleep(1000)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # nothing is left of it
    with pytest.raises(Cancelled):
        async with source.scope():
            pytest.fail("an aborted source lets nobody in")
    assert await source.wait() == "enough"


async def test_a_scope_that_ends_first_is_left_alone(world: World) -> None:
    source = AbortSource()
    async with source.scope() as inside:
        assert inside is source
    source.request_abort()
    await asyncio.sleep(0)
    other = AbortSource()
    with pytest.raises(ValueError, match="own"):
        async with other.scope():
            raise ValueError("own")


async def test_a_cancellation_from_outside_stays_one(world: World) -> None:
    source = AbortSource()
    began = asyncio.Event()

    async def inside() -> None:
        async with source.scope():
            began.set()
            await asyncio.sleep(1000)

    task = asyncio.create_task(inside())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    began.clear()
    task = asyncio.create_task(inside())
    await began.wait()
    task.cancel()
    source.request_abort()  # both at once: the outside one is not lost
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_waiters_are_woken(world: World) -> None:
    source = AbortSource()
    waiting = [asyncio.create_task(source.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    source.request_abort("now")
    assert [await task for task in waiting] == ["now"] * 3


async def test_it_aborts_by_itself_when_time_is_over(world: World) -> None:
    source = AbortOnExpiry(0.01, "fetch")
    with pytest.raises(DeadlineExceeded, match="fetch"):
        async with source.scope():
            await asyncio.sleep(1000)
    closed = AbortOnExpiry(0.01)
    closed.close()
    await asyncio.sleep(0.05)
    assert not closed.abort_requested


@pytest.mark.parametrize("wheeled", [False, True])
async def test_a_deadline_ends_its_block(world: World, wheeled: bool) -> None:
    loop = asyncio.get_running_loop()
    wheel = TimerWheel(loop) if wheeled else None
    began_s = loop.time()
    with pytest.raises(DeadlineExceeded, match="reading took longer than 0.02 s"):
        async with deadline(0.02, "reading", wheel=wheel):
            await asyncio.sleep(1000)
    assert 0.019 <= loop.time() - began_s < 5
    async with deadline(1000, wheel=wheel):
        await asyncio.sleep(0)
    assert wheel is None or len(wheel) == 0
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_the_context_carries_the_nearest_deadline(world: World) -> None:
    loop = asyncio.get_running_loop()
    assert (current_deadline(), remaining_s()) == (None, None)
    check_deadline()
    async with deadline(100) as outer:
        async with deadline(1000) as inner:
            assert inner.expires_at_s == outer.expires_at_s == current_deadline()
        async with deadline(50):
            assert 40 < (remaining_s() or 0) <= 50

            async def child() -> float | None:
                return remaining_s()

            assert 40 < (await asyncio.create_task(child()) or 0) <= 50
        async with deadline(None):
            assert 90 < (remaining_s() or 0) <= 100
    assert current_deadline() is None
    with carry_deadline(-1):
        assert remaining_s() == 0
        with pytest.raises(DeadlineExceeded):
            check_deadline("sum")
        with carry_deadline(5), carry_deadline(None):
            assert remaining_s() == 0
    assert loop.time() >= 0


async def test_the_outer_deadline_is_the_outer_blocks(world: World) -> None:
    with pytest.raises(DeadlineExceeded, match="outer"):
        async with deadline(0.02, "outer"), deadline(0.5, "inner"):
            await asyncio.sleep(1000)


async def test_a_deadline_that_is_over_before_the_block_awaits(world: World) -> None:
    with pytest.raises(DeadlineExceeded):
        async with deadline(0):
            await asyncio.sleep(1000)
    with pytest.raises(RuntimeError, match="before"):
        limit = deadline(1)
        async with limit:
            pass
        async with limit:
            pass


async def test_a_block_that_swallows_its_end_is_not_failed_twice(world: World) -> None:
    done = False
    async with deadline(0.01):
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            done = True
    assert done
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
