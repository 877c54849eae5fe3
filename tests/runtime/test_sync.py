"""Semaphore, shared mutex, condition, latch and barrier: order, cancellation, and seeded stress on both Worlds."""

import asyncio

import pytest

from isopod.runtime.sync import Barrier, ConditionVariable, Latch, Semaphore, SharedMutex
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import BugError, Exhausted, InvalidArgument, WrongState
from isopod.world.world import World


async def turns(n: int = 5) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_units_are_given_in_order_also_when_a_later_one_asks_for_less() -> None:
    semaphore = Semaphore(3)
    done: list[str] = []

    async def take(name: str, units: int) -> None:
        await semaphore.wait(units)
        done.append(name)

    await semaphore.wait(2)
    async with TaskGroup() as group:
        group.create_task(take("large", 3))
        await turns()
        group.create_task(take("small", 1))
        await turns()
        assert (done, semaphore.n_waiting, semaphore.available_units) == ([], 2, 1)
        assert not semaphore.try_wait(1)
        semaphore.signal(2)
        await turns()
        assert done == ["large"]
        semaphore.signal(3)
    assert done == ["large", "small"]
    assert semaphore.available_units == 2


async def test_a_cancelled_waiter_leaves_no_trace() -> None:
    semaphore = Semaphore(0)
    first = asyncio.ensure_future(semaphore.wait(5))
    second = asyncio.ensure_future(semaphore.wait(1))
    await turns()
    semaphore.signal(1)
    first.cancel()
    await second
    assert (semaphore.available_units, semaphore.n_waiting) == (0, 0)
    third = asyncio.ensure_future(semaphore.wait(1))
    await turns()
    semaphore.signal(1)
    third.cancel()  # in the moment in which it was given its unit
    with pytest.raises(asyncio.CancelledError):
        await third
    assert semaphore.available_units == 1
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_semaphore_is_bounded_breaks_and_refuses_nonsense() -> None:
    semaphore = Semaphore(0, "disk", waiters_max=1)
    waiting = asyncio.ensure_future(semaphore.wait())
    await turns()
    with pytest.raises(Exhausted):
        await semaphore.wait()
    semaphore.broken()
    with pytest.raises(WrongState):
        await waiting
    with pytest.raises(WrongState):
        await semaphore.wait()
    for call in (lambda: Semaphore(-1), lambda: Semaphore(1).try_wait(-1), lambda: Latch(-1), lambda: Barrier(0)):
        with pytest.raises(InvalidArgument):
            call()
    semaphore = Semaphore(1)
    semaphore.consume(3)
    semaphore.signal(2)
    assert semaphore.available_units == 0


@pytest.mark.row("S29")
async def test_a_semaphore_under_stress_never_gives_more_than_it_has(world: World) -> None:
    semaphore = Semaphore(10)
    chance = world.random.stream("test")
    used = n_done = 0

    async def work(units: int, pause_s: float, limit_s: float) -> None:
        nonlocal used, n_done
        try:
            async with asyncio.timeout(limit_s), semaphore.units(units):
                used += units
                assert used <= 10
                try:
                    await asyncio.sleep(pause_s)
                finally:
                    used -= units
            n_done += 1
        except TimeoutError:
            return

    async with TaskGroup() as group:
        for _ in range(300):
            group.create_task(work(chance.randrange(1, 11), chance.random() / 1000, 0.0001 + chance.random() / 2))
    assert (used, semaphore.available_units, semaphore.n_waiting) == (0, 10, 0)
    assert n_done > 0


@pytest.mark.row("S29")
async def test_a_shared_mutex_lets_readers_together_and_writers_alone(world: World) -> None:
    mutex = SharedMutex()
    chance = world.random.stream("test")
    readers = writers = most = n_written = 0

    async def read() -> None:
        nonlocal readers, most
        async with mutex.shared():
            readers += 1
            most = max(most, readers)
            assert writers == 0
            await asyncio.sleep(chance.random() / 2000)
            readers -= 1

    async def write() -> None:
        nonlocal writers, n_written
        async with mutex.exclusive():
            writers += 1
            assert (writers, readers) == (1, 0)
            await asyncio.sleep(chance.random() / 2000)
            writers -= 1
            n_written += 1

    async with TaskGroup() as group:
        for _ in range(40):
            for _ in range(4):
                group.create_task(read())
            group.create_task(write())
    assert (n_written, readers, writers) == (40, 0, 0)
    assert most >= 2


async def test_readers_that_keep_coming_do_not_starve_a_writer() -> None:
    mutex = SharedMutex()
    assert mutex.try_lock_shared()
    order: list[str] = []

    async def write() -> None:
        async with mutex.exclusive():
            order.append("writer")

    async def read() -> None:
        async with mutex.shared():
            order.append("reader")

    async with TaskGroup() as group:
        group.create_task(write())
        await turns()
        assert not mutex.try_lock_shared()
        group.create_task(read())
        await turns()
        mutex.unlock_shared()
    assert order == ["writer", "reader"]
    assert mutex.try_lock()
    assert not mutex.try_lock_shared()
    mutex.unlock()


@pytest.mark.row("S29")
async def test_a_condition_wakes_one_or_all_and_no_wake_up_is_lost() -> None:
    condition = ConditionVariable()
    items: list[int] = []
    got: list[int] = []

    async def take() -> None:
        await condition.wait(lambda: bool(items))
        got.append(items.pop())

    tasks = [asyncio.ensure_future(take()) for _ in range(20)]
    await turns()
    for number in range(10):
        items.append(number)
        condition.signal()
        tasks[number].cancel()  # some of them in the moment in which they were woken
        await turns()
    items.extend(range(10, 20))
    condition.broadcast()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(got + items) == list(range(20))
    assert len(got) >= 10
    assert condition.n_waiting == 0
    waiting = asyncio.ensure_future(condition.wait())
    await turns()
    condition.broken()
    with pytest.raises(WrongState):
        await waiting
    with pytest.raises(WrongState):
        await condition.wait()


@pytest.mark.row("S29")
async def test_a_latch_opens_once_for_all() -> None:
    latch = Latch(3)
    waiting = [asyncio.ensure_future(latch.wait()) for _ in range(50)]
    waiting[7].cancel()
    await turns()
    latch.count_down(2)
    await turns()
    assert (latch.count, [task.done() for task in waiting].count(True)) == (1, 1)
    await latch.arrive_and_wait()
    await asyncio.gather(*waiting, return_exceptions=True)
    await latch.wait()
    with pytest.raises(BugError):
        latch.count_down()


@pytest.mark.row("S29")
async def test_a_barrier_holds_every_round_together(world: World) -> None:
    barrier = Barrier(8)
    chance = world.random.stream("test")
    rounds: list[int] = []

    async def march() -> None:
        for number in range(20):
            await asyncio.sleep(chance.random() / 5000)
            assert await barrier.arrive_and_wait() == number
            rounds.append(number)

    async with TaskGroup() as group:
        for _ in range(8):
            group.create_task(march())
    assert rounds == sorted(rounds)
    assert len(rounds) == 160


async def test_a_member_that_left_the_barrier_does_not_count() -> None:
    barrier = Barrier(2)
    first = asyncio.ensure_future(barrier.arrive_and_wait())
    await turns()
    first.cancel()
    second = asyncio.ensure_future(barrier.arrive_and_wait())
    await turns()
    assert not second.done()
    assert barrier.n_waiting == 1
    assert await barrier.arrive_and_wait() == 0
    assert await second == 0
    with pytest.raises(asyncio.CancelledError):
        await first
