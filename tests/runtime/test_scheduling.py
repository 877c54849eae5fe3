"""Scheduling groups as a user sees them, on both Worlds."""

import asyncio

import pytest

from isopod.runtime.scheduling import (
    Priority,
    SchedulingGroup,
    current_group,
    default_group,
    maybe_yield,
    need_preempt,
    statistics,
)
from isopod.world.sim import SimWorld
from isopod.world.world import World

pytestmark = [pytest.mark.row("S3"), pytest.mark.row("S41")]


async def test_a_group_is_inherited_by_what_is_started_in_it(world: World) -> None:
    loop = asyncio.get_running_loop()
    group = SchedulingGroup("bulk", 100, priority=Priority.BACKGROUND)
    assert current_group() is default_group()

    async def grandchild() -> str:
        return current_group().name

    async def child() -> str:
        return f"{current_group().name}, {await asyncio.create_task(grandchild())}"

    assert await loop.create_task(child(), context=group.context()) == "bulk, bulk"
    with group.active():
        assert current_group() is group
        task = asyncio.create_task(child())
    assert current_group() is default_group()
    assert await task == "bulk, bulk"
    assert await asyncio.create_task(child()) == "main, main"


async def test_steps_are_counted_by_group(world: World) -> None:
    loop = asyncio.get_running_loop()
    group = SchedulingGroup("counted", 300)

    async def steps() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    await loop.create_task(steps(), context=group.context())
    found = {account.name: account for account in statistics()}
    assert list(found) == ["main", "counted"]
    assert (found["counted"].shares, found["counted"].priority, found["counted"].n_queued) == (300, "normal", 0)
    assert 11 <= found["counted"].n_steps <= 13
    assert found["main"].n_steps >= 1
    assert found["counted"].wait_s >= 0


async def test_a_long_loop_that_yields_lets_others_run(world: World) -> None:
    loop = asyncio.get_running_loop()
    group = SchedulingGroup("long", 100)
    seen: list[str] = []

    async def compute() -> None:
        while len(seen) < 3:
            await maybe_yield()
        seen.append("computed")

    async def beat() -> None:
        for _ in range(3):
            seen.append("beat")
            await asyncio.sleep(0)

    task = loop.create_task(compute(), context=group.context())
    await beat()
    await task
    assert seen == ["beat", "beat", "beat", "computed"]


def test_on_a_strange_loop_groups_only_carry_their_name() -> None:
    async def main() -> None:
        group = SchedulingGroup("strange")
        with group.active():
            assert await asyncio.create_task(name()) == "strange"
        assert need_preempt()
        assert statistics() == ()
        await maybe_yield()

    async def name() -> str:
        return current_group().name

    asyncio.run(main())


async def test_groups_do_not_change_the_order_of_the_simulation(sim_world: SimWorld) -> None:
    loop = asyncio.get_running_loop()
    urgent = SchedulingGroup("urgent", 1000, priority=Priority.CRITICAL, latency_s=0.001)
    seen: list[int] = []

    async def step(number: int) -> None:
        seen.append(number)

    tasks = [loop.create_task(step(number), context=urgent.context() if number % 2 else None) for number in range(40)]
    for task in tasks:
        await task
    assert sorted(seen) == list(range(40))
    assert seen[:20] != sorted(seen[:20], key=lambda number: -(number % 2))


def test_weights() -> None:
    assert SchedulingGroup("a", 1000).weight == 1000
    assert SchedulingGroup("b", 1000, priority=Priority.CRITICAL).weight == 16_000
    assert SchedulingGroup("c", 100, priority=Priority.IDLE).weight == 6.25
    assert [level.name for level in Priority] == ["IDLE", "BACKGROUND", "NORMAL", "HIGH", "CRITICAL"]
    assert repr(SchedulingGroup("d", 5, latency_s=0.001)) == "SchedulingGroup('d', 5, NORMAL, latency_s=0.001)"
