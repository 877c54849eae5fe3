"""The sequencer: order within a key, none between keys, and no half-done work."""

import asyncio

import pytest

from isopod.engine.network.sequencer import Sequencer
from isopod.runtime.logger import Logger
from isopod.world.world import World


def make(world: World, lines: list[bytes]) -> Sequencer:
    return Sequencer(Logger(lines.append, world.clock, level="debug"))


async def test_one_key_in_order_two_keys_side_by_side(world: World) -> None:
    sequencer, done, gate = make(world, []), [], asyncio.Event()

    async def work(name: str) -> str:
        if name == "first":
            await gate.wait()
        done.append(name)
        return name

    first = sequencer.start("a", lambda: work("first"))
    second = sequencer.start("a", lambda: work("second"))
    assert await sequencer.run("b", lambda: work("other")) == "other"
    assert done == ["other"]
    gate.set()
    assert [await second, await first] == ["second", "first"]
    assert done == ["other", "first", "second"]
    await sequencer.wait("a")
    assert not sequencer.is_busy("a")


async def test_work_ends_though_its_caller_is_gone(world: World) -> None:
    sequencer, done, gate = make(world, []), [], asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.append("worked")

    caller = asyncio.ensure_future(sequencer.run("a", work))
    while not sequencer.is_busy("a"):
        await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert sequencer.is_busy("a") and done == []
    gate.set()
    await sequencer.wait_idle()
    assert done == ["worked"]


async def test_a_failure_reaches_its_caller_or_the_log_and_not_the_next_one(world: World) -> None:
    lines: list[bytes] = []
    sequencer = make(world, lines)

    async def fail() -> None:
        raise ValueError("no")

    async def work() -> int:
        return 7

    sequencer.start("a", fail)
    assert await sequencer.run("a", work) == 7
    with pytest.raises(ValueError, match="no"):
        await sequencer.run("a", fail)
    await sequencer.wait("a")
    assert len(lines) == 2 and b"network_operation_failed" in lines[0]
