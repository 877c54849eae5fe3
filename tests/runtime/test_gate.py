"""Gate and Waiters."""

import asyncio

import pytest

from isopod.runtime.gate import Gate
from isopod.runtime.waiters import Waiters
from isopod.world.errors import WrongState
from isopod.world.world import World


async def test_closing_waits_for_all_inside_and_refuses_newcomers(world: World) -> None:
    gate = Gate("store")
    gate.enter()
    with gate.hold():
        closers = [asyncio.create_task(gate.close()) for _ in range(2)]
        await asyncio.sleep(0.001)
        assert gate.n_inside == 2
        with pytest.raises(WrongState, match="gate store is closed: cannot enter"):
            gate.enter()
        with pytest.raises(WrongState), gate.hold():
            pass
    await asyncio.sleep(0.001)
    assert not any(closer.done() for closer in closers)
    gate.leave()
    await asyncio.gather(*closers)
    assert gate.n_inside == 0
    await gate.close()


async def test_an_unused_gate_closes_at_once(world: World) -> None:
    gate = Gate("empty")
    assert not gate.is_closed
    async with asyncio.timeout(0):
        await gate.close()
    assert gate.is_closed


async def test_a_holder_that_fails_leaves(world: World) -> None:
    gate = Gate("store")
    with pytest.raises(ValueError), gate.hold():
        raise ValueError
    assert gate.n_inside == 0


async def test_giving_up_the_wait_leaves_it_closed(world: World) -> None:
    gate = Gate("store")
    gate.enter()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await gate.close()
    assert gate.is_closed
    gate.leave()
    await gate.close()


async def test_leaving_more_often_than_entering_is_a_bug() -> None:
    gate = Gate("store")
    with pytest.raises(RuntimeError, match="more often"):
        gate.leave()


async def test_waiters_wake_in_their_order(world: World) -> None:
    waiters = Waiters()
    log: list[int] = []

    async def wait(number: int) -> None:
        await waiters.wait()
        log.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(5)]
    await asyncio.sleep(0.001)
    tasks[2].cancel()
    await asyncio.sleep(0.001)
    assert len(waiters) == 4
    waiters.wake()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (sorted(log) if world.name == "sim" else log) == [0, 1, 3, 4]  # the simulation shuffles who is woken together
    assert len(waiters) == 0


async def test_trying_to_enter_says_whether_the_gate_was_open(world: World) -> None:
    gate = Gate("store")
    assert gate.try_enter()
    closing = asyncio.create_task(gate.close())
    await asyncio.sleep(0.001)
    assert not gate.try_enter()
    assert not closing.done()
    gate.leave()
    await closing
    assert (gate.n_inside, gate.is_closed) == (0, True)
