"""Cooperative scheduling and scheduling groups."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import Priority, SchedulingGroup, current_group, default_group, maybe_yield, need_preempt, statistics
from isopod.runtime.stalls import StallDetector
from isopod.world.errors import InvalidArgument
from isopod.world.host.loop import new_loop
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


class StepClock:
    """Time that passes only where a step says how long it took."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@contextmanager
def host_loop(clock_ns: Callable[[], int]) -> Iterator[asyncio.AbstractEventLoop]:
    """Open a loop of the host, whose turns are half a millisecond, with a clock of ours: in the simulation steps take no time."""
    loop = new_loop(clock_ns=clock_ns)
    try:
        yield loop
    finally:
        loop.close()


def test_a_long_computation_yields_when_its_time_is_used_up() -> None:
    async def beat() -> int:
        n_beats = 0
        while not ends.is_set():
            n_beats += 1
            await asyncio.sleep(0)
        return n_beats

    async def main() -> None:
        task = asyncio.ensure_future(beat())
        for _ in range(1000):
            clock.now_ns += 50_000
            await maybe_yield()
        ends.set()
        assert await task == pytest.approx(100, rel=0.05), "others ran at every tenth round"
        assert not need_preempt()
        clock.now_ns += 500_000
        assert need_preempt()

    clock, ends = StepClock(), asyncio.Event()
    with host_loop(clock) as loop:
        loop.run_until_complete(main())


async def test_tasks_inherit_the_group_of_who_starts_them(world: World) -> None:
    bulk = SchedulingGroup("bulk", 100)

    async def name() -> str:
        return current_group().name

    with bulk.active():
        inside = asyncio.create_task(name())
    assert [await inside, await asyncio.create_task(name())] == ["bulk", "main"]
    assert current_group() is default_group()


def test_time_is_shared_in_proportion_to_shares() -> None:
    """On the host: the simulation keeps its seeded order whatever the shares."""

    async def busy() -> None:
        while clock.now_ns < 1_000_000_000:
            clock.now_ns += 20_000
            await asyncio.sleep(0)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        groups = [SchedulingGroup("much", 800), SchedulingGroup("little", 200)]
        await asyncio.gather(*(loop.create_task(busy(), context=group.context()) for group in groups for _ in range(20)))
        used = {each.name: each.run_s for each in statistics()}
        assert used["much"] / used["little"] == pytest.approx(4, rel=0.05)

    clock = StepClock()
    with host_loop(clock) as loop:
        loop.run_until_complete(main())


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
