"""Timers: one shot, periodic, cancel, rearm; a wheel for deadlines."""

import asyncio

import pytest

from isopod.runtime.timers import Timer, TimerWheel
from isopod.world.errors import WrongState
from isopod.world.world import World
from tests.parity.kit import until

pytestmark = pytest.mark.row("S35")


async def test_a_timer_fires_once_and_not_early(world: World) -> None:
    loop = asyncio.get_running_loop()
    fired: list[float] = []
    timer = Timer(lambda: fired.append(loop.time()))
    began_s = loop.time()
    timer.arm(0.02)
    assert timer.is_armed
    await until(lambda: fired)
    await asyncio.sleep(0.05)
    assert len(fired) == 1
    assert fired[0] - began_s >= 0.0199  # uvloop counts in whole milliseconds of its own
    assert not timer.is_armed


async def test_a_periodic_timer_fires_until_it_is_cancelled(world: World) -> None:
    fired: list[int] = []
    timer = Timer(lambda: fired.append(len(fired)))
    timer.arm_periodic(0.005)
    await until(lambda: len(fired) >= 3)
    assert timer.cancel()
    n_fired = len(fired)
    await asyncio.sleep(0.02)
    assert len(fired) == n_fired


async def test_a_cancelled_timer_does_not_fire(world: World) -> None:
    fired: list[int] = []
    timer = Timer(lambda: fired.append(1))
    timer.arm(0.005)
    assert timer.cancel()
    assert not timer.cancel(), "it was not armed any more"
    await asyncio.sleep(0.02)
    assert fired == []


async def test_arming_twice_is_refused_and_rearming_is_not(world: World) -> None:
    loop = asyncio.get_running_loop()
    fired: list[float] = []
    timer = Timer(lambda: fired.append(loop.time()))
    timer.arm(3600)
    with pytest.raises(WrongState):
        timer.arm(3600)
    timer.rearm(0.001)
    await until(lambda: fired)
    assert timer.remaining_s is None


async def test_a_callback_may_rearm_its_timer(world: World) -> None:
    fired: list[int] = []

    def again() -> None:
        fired.append(len(fired))
        if len(fired) < 3:
            timer.arm(0.001)

    timer = Timer(again)
    timer.arm(0.001)
    await until(lambda: len(fired) == 3)
    assert not timer.is_armed


async def test_deadlines_on_a_wheel_fire_in_order_and_cost_one_timer(world: World) -> None:
    loop = asyncio.get_running_loop()
    wheel = TimerWheel(loop)
    fired: list[str] = []
    wheel.call_later(0.06, fired.append, "second")
    wheel.call_later(0.02, fired.append, "first")
    cancelled = [wheel.call_later(0.03, fired.append, "never") for _ in range(1000)]
    assert len(wheel) == 1002
    for timer in cancelled:
        timer.cancel()
    assert len(wheel) == 2
    await until(lambda: len(fired) == 2)
    assert fired == ["first", "second"]
    wheel.close()
