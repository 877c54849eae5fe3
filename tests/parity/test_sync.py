"""Fibres that wait for each other: semaphores, shared mutexes, condition variables."""

import asyncio

import pytest

from isopod.runtime.sync import ConditionVariable, Semaphore, SharedMutex
from isopod.world.errors import IsopodError
from isopod.world.world import World
from tests.parity.kit import until

pytestmark = pytest.mark.row("S35")


async def test_a_semaphore_hands_out_units_in_the_order_they_were_asked_for(world: World) -> None:
    semaphore = Semaphore(2)
    seen: list[str] = []

    async def take(name: str, units: int) -> None:
        async with semaphore.units(units):
            seen.append(name)
            await asyncio.sleep(0.001)

    tasks = []
    for name, units in (("first", 2), ("large", 2), ("small", 1)):
        tasks.append(asyncio.create_task(take(name, units)))
        await asyncio.sleep(0.0001)
    await asyncio.gather(*tasks)
    assert seen == ["first", "large", "small"], "a small one does not overtake"
    assert semaphore.available_units == 2


async def test_a_cancelled_waiter_leaves_nothing_behind(world: World) -> None:
    semaphore = Semaphore(0)
    waiting = asyncio.create_task(semaphore.wait())
    await until(lambda: semaphore.n_waiting)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    semaphore.signal()
    assert semaphore.try_wait()


async def test_a_broken_semaphore_fails_who_waits(world: World) -> None:
    semaphore = Semaphore(0)
    waiting = asyncio.create_task(semaphore.wait())
    await until(lambda: semaphore.n_waiting)
    semaphore.broken()
    with pytest.raises(IsopodError):
        await waiting


async def test_readers_share_and_a_writer_is_alone(world: World) -> None:
    mutex = SharedMutex()
    n_readers = most_readers = 0

    async def read() -> None:
        nonlocal n_readers, most_readers
        async with mutex.shared():
            n_readers += 1
            most_readers = max(most_readers, n_readers)
            await asyncio.sleep(0.001)
            n_readers -= 1

    async def write() -> None:
        async with mutex.exclusive():
            assert n_readers == 0
            await asyncio.sleep(0.001)
            assert n_readers == 0

    await asyncio.gather(*(part() for part in (read, read, read, write, read, write, read)))
    assert most_readers >= 2


async def test_a_condition_variable_wakes_who_waits_for_the_condition(world: World) -> None:
    condition = ConditionVariable()
    items: list[int] = []
    waiting = asyncio.create_task(condition.wait(lambda: len(items) == 2))
    for number in range(2):
        await asyncio.sleep(0.001)
        assert not waiting.done()
        items.append(number)
        condition.signal()
    await waiting
