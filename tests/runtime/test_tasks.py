"""TaskGroup: nobody is left, the first failure cancels the others, and everything in one order."""

import asyncio
from collections.abc import Awaitable

import pytest

from isopod.runtime.tasks import TaskGroup
from isopod.world.world import World


async def forever(log: list[str], name: str) -> None:
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        log.append(name)


async def fail(error: BaseException, *, after_s: float = 0.0) -> None:
    await asyncio.sleep(after_s)
    raise error


def in_order(world: World, log: list[str]) -> list[str]:
    """Return the log as it is where tasks that are woken together run in that order, sorted where the simulation shuffles them."""
    return sorted(log, key=lambda entry: (len(entry), entry)) if world.name == "sim" else log


async def cancelled(work: Awaitable[object]) -> bool:
    """Return whether awaiting `work` ends in cancellation."""
    try:
        await work
    except asyncio.CancelledError:
        return True
    return False


async def test_it_waits_for_all_children(world: World) -> None:
    async with TaskGroup() as group:
        tasks = [group.create_task(asyncio.sleep(0.001 * (5 - number), number)) for number in range(5)]
        assert len(group) == 5
    assert [task.result() for task in tasks] == [0, 1, 2, 3, 4]
    assert len(group) == 0


async def test_a_child_may_start_others_while_the_group_ends(world: World) -> None:
    log: list[str] = []

    async def child(depth: int) -> None:
        await asyncio.sleep(0)
        log.append(str(depth))
        if depth:
            group.create_task(child(depth - 1))

    async with TaskGroup() as group:
        group.create_task(child(3))
    assert log == ["3", "2", "1", "0"]


async def test_a_failure_cancels_the_others_in_their_order(world: World) -> None:
    log: list[str] = []

    async def work() -> None:
        async with TaskGroup("work") as group:
            for number in range(50):
                group.create_task(forever(log, str(number)))
            group.create_task(fail(ValueError("first"), after_s=0.001))
            await asyncio.get_running_loop().create_future()

    with pytest.raises(ExceptionGroup) as caught:
        await work()
    assert [repr(error) for error in caught.value.exceptions] == ["ValueError('first')"]
    assert in_order(world, log) == [str(number) for number in range(50)]
    own = asyncio.current_task()
    assert own is not None
    assert own.cancelling() == 0  # the group took its own interruption back


async def test_failures_are_reported_in_the_order_of_creation(world: World) -> None:
    async def fail_when_cancelled(name: str) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            raise ValueError(name) from None

    async def work() -> None:
        async with TaskGroup() as group:
            for number in range(5):
                group.create_task(fail_when_cancelled(str(number)))
            group.create_task(fail(ValueError("5"), after_s=0.001))

    with pytest.raises(ExceptionGroup) as caught:
        await work()
    assert [str(error) for error in caught.value.exceptions] == ["0", "1", "2", "3", "4", "5"]


async def test_a_failure_of_the_block_cancels_the_children_and_comes_first(world: World) -> None:
    log: list[str] = []

    async def work() -> None:
        async with TaskGroup() as group:
            group.create_task(forever(log, "child"))
            await asyncio.sleep(0.001)
            raise KeyError("block")

    with pytest.raises(ExceptionGroup) as caught:
        await work()
    assert [repr(error) for error in caught.value.exceptions] == ["KeyError('block')"]
    assert log == ["child"]


async def test_cancelling_from_outside_cancels_the_children_and_goes_on(world: World) -> None:
    log: list[str] = []

    async def work() -> None:
        async with TaskGroup() as group:
            group.create_task(forever(log, "a"))
            group.create_task(forever(log, "b"))

    task = asyncio.create_task(work())
    await asyncio.sleep(0.001)
    task.cancel()
    assert await cancelled(task)
    assert in_order(world, log) == ["a", "b"]


async def test_a_failure_interrupts_the_block(world: World) -> None:
    async def work() -> None:
        async with TaskGroup() as group:
            group.create_task(fail(ValueError("inside")))
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(work())
    await asyncio.sleep(0.001)
    with pytest.raises(ExceptionGroup):  # it ended before anybody outside could cancel it
        await task


async def test_cancelled_from_inside_and_outside_at_once(world: World) -> None:
    """The group takes back its own interruption only: the one from outside is not swallowed."""
    seen: list[str] = []

    async def work() -> None:
        own = asyncio.current_task()
        assert own is not None
        try:
            async with TaskGroup() as group:
                child = group.create_task(fail(ValueError("inside")))
                # In the very step in which the failure interrupts the block, someone outside cancels too.
                child.add_done_callback(lambda _: own.cancel())
                await asyncio.get_running_loop().create_future()
        except ExceptionGroup:
            seen.append(f"group, cancelling {own.cancelling()}")
            raise

    with pytest.raises(ExceptionGroup):
        await asyncio.create_task(work())
    assert seen == ["group, cancelling 1"]


async def test_a_cancelled_child_is_no_failure(world: World) -> None:
    log: list[str] = []
    async with TaskGroup() as group:
        lost = group.create_task(forever(log, "lost"))
        kept = group.create_task(asyncio.sleep(0.002, "kept"))
        await asyncio.sleep(0.001)
        lost.cancel()
    assert kept.result() == "kept"
    assert lost.cancelled()


async def test_cancel_ends_all_without_an_error(world: World) -> None:
    log: list[str] = []
    async with TaskGroup() as group:
        for name in "abc":
            group.create_task(forever(log, name))
        await asyncio.sleep(0.001)
        group.cancel()
        with pytest.raises(RuntimeError, match="takes no more"):
            group.create_task(asyncio.sleep(0))
    assert in_order(world, log) == ["a", "b", "c"]


async def test_it_takes_no_tasks_before_or_after(world: World) -> None:
    group = TaskGroup("once")
    with pytest.raises(RuntimeError):
        group.create_task(asyncio.sleep(0))
    async with group:
        pass
    with pytest.raises(RuntimeError):
        group.create_task(asyncio.sleep(0))
    with pytest.raises(RuntimeError, match="entered before"):
        await group.__aenter__()


async def test_groups_nest(world: World) -> None:
    log: list[str] = []

    async def inner() -> None:
        async with TaskGroup("inner") as group:
            group.create_task(forever(log, "deep"))

    async def work() -> None:
        async with TaskGroup("outer") as group:
            group.create_task(inner())
            group.create_task(forever(log, "flat"))
            group.create_task(fail(OSError(5, "x"), after_s=0.001))

    with pytest.raises(ExceptionGroup) as caught:
        await work()
    assert [type(error) for error in caught.value.exceptions] == [OSError]
    assert sorted(log) == ["deep", "flat"]


async def test_a_timeout_around_the_block_works(world: World) -> None:
    log: list[str] = []

    async def work() -> None:
        async with asyncio.timeout(0.01), TaskGroup() as group:
            group.create_task(forever(log, "late"))

    with pytest.raises(TimeoutError):
        await work()
    assert log == ["late"]
