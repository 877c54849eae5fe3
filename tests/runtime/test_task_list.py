"""What tasks are doing, on both Worlds."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.task_list import list_tasks
from isopod.world.world import World

pytestmark = pytest.mark.row("R37")


async def innermost(gate: asyncio.Event) -> None:
    await gate.wait()


async def middle(gate: asyncio.Event) -> None:
    await innermost(gate)


async def test_each_task_is_listed_with_where_it_waits(world: World) -> None:
    loop, gate = asyncio.get_running_loop(), asyncio.Event()
    group = SchedulingGroup("bulk", 10)
    old = loop.create_task(middle(gate), name="old", context=group.context())
    await asyncio.sleep(0.02)
    young = loop.create_task(asyncio.sleep(1000), name="young")
    await asyncio.sleep(0.001)
    ready = loop.create_task(middle(gate), name="ready")

    found = {info.name: info for info in list_tasks()}

    assert [info.name for info in list_tasks() if info.name in ("old", "young", "ready")] == ["old", "young", "ready"]
    info = found["old"]
    assert (info.coroutine, info.group, info.state, info.awaits) == ("middle", "bulk", "waiting", "Future")
    # The frame that waits is asyncio's own; the project's is the one that called it.
    assert info.function == "Event.wait"
    assert ".py:" in info.location
    assert info.age_s is not None
    assert 0.02 <= info.age_s < 20
    assert found["young"].function == "sleep"
    assert (found["ready"].state, found["ready"].function, found["ready"].awaits) == ("ready", "middle", "")
    assert found["ready"].location.rpartition("/")[2].startswith("test_task_list.py:")
    current = asyncio.current_task()
    assert current is not None
    assert found[current.get_name()].state == "running"
    assert [info.name for info in list_tasks(n_max=1)] != []
    young.cancel()
    gate.set()
    await asyncio.gather(old, ready, young, return_exceptions=True)


async def test_generators_and_async_generators_are_followed(world: World) -> None:
    gate = asyncio.Event()

    async def numbers() -> AsyncIterator[int]:
        await innermost(gate)
        yield 1

    async def reader() -> None:
        async for _ in numbers():
            pass

    task = asyncio.create_task(reader(), name="reader")
    await asyncio.sleep(0.001)
    (info,) = [info for info in list_tasks() if info.name == "reader"]
    assert info.state == "waiting"
    assert info.location
    gate.set()
    await task


def test_on_a_strange_loop_age_and_group_are_unknown() -> None:
    async def main() -> None:
        (info,) = list_tasks()
        assert (info.age_s, info.group, info.state) == (None, "", "running")

    asyncio.run(main())
