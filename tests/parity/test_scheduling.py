"""Cooperative scheduling and scheduling groups."""

import asyncio
import time
from typing import Any

import pytest

from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import Priority, SchedulingGroup, current_group, default_group, maybe_yield, need_preempt, statistics
from isopod.runtime.stalls import StallDetector
from isopod.world.errors import InvalidArgument
from isopod.world.world import World
from tests.parity.kit import keeping

pytestmark = pytest.mark.row("S35")


async def test_nothing_interrupts_a_step(world: World) -> None:
    seen: list[str] = []

    async def other() -> None:
        seen.append("other")

    task = asyncio.ensure_future(other())
    for number in range(1000):
        seen.append(str(number))
    assert seen == [str(number) for number in range(1000)], "no await, no other task"
    await task
    assert seen[-1] == "other"


async def test_a_long_computation_yields_when_its_time_is_used_up(host_world: World) -> None:
    """On the host, whose turns are half a millisecond of real time."""
    n_beats = 0
    ends = False

    async def beat() -> None:
        nonlocal n_beats
        while not ends:
            n_beats += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(beat())
    n_rounds = 0
    until_s = time.monotonic() + 0.1
    while time.monotonic() < until_s:
        n_rounds += 1
        await maybe_yield()
    ends = True
    await task
    assert 10 <= n_beats < n_rounds, "others ran, but not at every round"
    assert isinstance(need_preempt(), bool)


async def test_tasks_inherit_the_group_of_who_starts_them(world: World) -> None:
    bulk = SchedulingGroup("bulk", 100)

    async def name() -> str:
        return current_group().name

    with bulk.active():
        inside = asyncio.create_task(name())
    assert [await inside, await asyncio.create_task(name())] == ["bulk", "main"]
    assert current_group() is default_group()


async def test_time_is_shared_in_proportion_to_shares(host_world: World) -> None:
    """On the host: the simulation keeps its seeded order whatever the shares."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + 0.4

    async def burn() -> None:
        while loop.time() < until_s:
            for _ in range(500):
                pass
            await asyncio.sleep(0)

    groups = [SchedulingGroup("much", 800), SchedulingGroup("little", 200)]
    await asyncio.gather(*(loop.create_task(burn(), context=group.context()) for group in groups for _ in range(2)))
    used = {each.name: each.run_s for each in statistics()}

    assert 3.0 < used["much"] / used["little"] < 5.3


async def test_no_group_starves(host_world: World) -> None:
    loop = asyncio.get_running_loop()
    n_steps = 0

    async def burn() -> None:
        while not quiet.done():
            await asyncio.sleep(0)

    async def step() -> None:
        nonlocal n_steps
        for _ in range(20):
            n_steps += 1
            await asyncio.sleep(0)

    greedy = SchedulingGroup("greedy", 1000, priority=Priority.CRITICAL)
    modest = SchedulingGroup("modest", 100)
    quiet = loop.create_task(step(), context=modest.context())
    await asyncio.gather(*(loop.create_task(burn(), context=greedy.context()) for _ in range(4)))
    assert n_steps == 20


async def test_a_step_that_holds_up_the_loop_is_named(host_world: World) -> None:
    """On the host, where a thread watches: in the simulation steps take no time."""
    lines: list[dict[str, Any]] = []
    detector = StallDetector(keeping(host_world, lines), host_world.clock, Registry(), threshold_s=0.01)
    detector.start()
    until_s = time.monotonic() + 20
    while not lines and time.monotonic() < until_s:  # no await: that is the point
        pass
    detector.stop()
    assert lines[0]["event"] == "reactor.stalled"
    assert "test_a_step_that_holds_up_the_loop_is_named" in str(lines[0])


def test_levels_and_bounds() -> None:
    assert [level.name for level in Priority] == ["IDLE", "BACKGROUND", "NORMAL", "HIGH", "CRITICAL"]
    assert SchedulingGroup("high", 100, priority=Priority.HIGH).weight == 4 * SchedulingGroup("normal", 100).weight
    for shares in (0, 1001):
        with pytest.raises(InvalidArgument):
            SchedulingGroup("x", shares)
