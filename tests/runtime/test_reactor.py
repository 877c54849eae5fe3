"""Reactor: tasks, timers, a clean end, numbers."""

import asyncio
from typing import Any

import pytest

from isopod.runtime.metrics import Registry
from isopod.runtime.reactor import Reactor, ReactorStats
from isopod.runtime.scheduling import SchedulingGroup, current_group
from isopod.world.errors import WrongState
from isopod.world.host.loop import LoopKind, new_loop
from isopod.world.sim import make_sim_world
from isopod.world.world import World

pytestmark = [pytest.mark.row("S1"), pytest.mark.row("S41")]


@pytest.mark.parametrize("kind", ["uvloop", "asyncio", "polling"])
def test_it_runs_alone_and_closes_its_loop(kind: LoopKind) -> None:
    seen: list[str] = []

    async def serve(name: str) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            seen.append(f"{name} ended")

    async def main(reactor: Reactor) -> int:
        reactor.spawn(serve("one"), name="one")
        reactor.spawn(serve("two"))
        reactor.call_later(1000, seen.append, "never")
        reactor.timer(lambda: seen.append("never")).arm(1000)
        await reactor.sleep(0.001)
        return 7

    loop = new_loop(kind)
    assert Reactor(loop).run(main) == 7
    assert loop.is_closed()
    assert seen == ["one ended", "two ended"]


async def ended(task: asyncio.Task[Any], reactor: Reactor) -> None:
    """Wait for a task, and until the reactor has heard of its end: the simulation may tell us first."""
    await task
    while reactor.statistics().n_tasks:
        await asyncio.sleep(0)


def test_it_runs_in_the_simulation() -> None:
    sim = make_sim_world()

    async def main() -> float:
        reactor = Reactor()
        reactor.spawn(asyncio.sleep(3600))
        await reactor.sleep(1800)
        await reactor.close()
        return reactor.statistics().elapsed_s

    assert 1800 <= sim.run(main()) < 1801
    sim.close()


async def test_tasks_are_counted_by_how_they_ended(world: World) -> None:
    reactor = Reactor()
    unseen: list[Any] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: unseen.append(context["exception"]))

    async def fail() -> None:
        raise ValueError("seen by nobody")

    good, gone = reactor.spawn(asyncio.sleep(0, 5)), reactor.spawn(asyncio.sleep(1000))
    reactor.spawn(fail())
    assert await good == 5
    gone.cancel()
    while reactor.statistics().n_tasks:
        await asyncio.sleep(0)
    stats = reactor.statistics()
    assert (stats.n_tasks_scheduled, stats.n_tasks_completed, stats.n_tasks_failed, stats.n_tasks_cancelled) == (3, 1, 1, 1)
    loop.set_exception_handler(before)
    if world.name == "host":  # the simulation holds on to tasks for longer, and so tells later
        assert [str(error) for error in unseen] == ["seen by nobody"]
    await reactor.close()
    with pytest.raises(WrongState, match="closed"):
        reactor.spawn(asyncio.sleep(0))


async def test_tasks_run_in_their_group(world: World) -> None:
    reactor = Reactor()
    group = SchedulingGroup("mine", 10)

    async def name() -> str:
        return current_group().name

    assert await reactor.spawn(name(), group=group) == "mine"
    assert await reactor.spawn(name()) == "main"
    stats = reactor.statistics()
    assert [account.name for account in stats.groups] == ["main", "mine"]
    assert stats.n_steps >= 3
    assert stats.n_turns >= 2
    await reactor.close()


async def test_timers_are_counted(world: World) -> None:
    reactor = Reactor()
    fired = asyncio.Event()
    timer = reactor.timer(fired.set)
    timer.arm(0.001)
    await fired.wait()
    timer.arm(1000)
    timer.cancel()
    fired.clear()
    reactor.call_later(0.001, fired.set)
    reactor.call_later(1000, fired.set).cancel()
    await fired.wait()
    stats = reactor.statistics()
    assert (stats.n_timers_created, stats.n_timers_fired, stats.n_timers_cancelled) == (4, 2, 2)
    reactor.call_later(1000, fired.set)
    await reactor.close()
    assert reactor.statistics().n_timers_cancelled == 3


@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
def test_stop_ends_it_in_order(kind: LoopKind) -> None:
    seen: list[str] = []

    async def main(reactor: Reactor) -> int:
        reactor.stopping.subscribe(lambda reason: seen.append(f"told {reason}"))
        reactor.spawn(other())
        asyncio.get_running_loop().call_later(0.01, reactor.stop, "enough")
        try:
            await asyncio.sleep(1000)
        finally:
            seen.append("main ended")
        return 1

    async def other() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            seen.append("other ended")

    assert Reactor(new_loop(kind)).run(main) is None
    assert seen == ["told enough", "main ended", "other ended"]


def test_what_main_raises_comes_out_after_everything_has_ended() -> None:
    seen: list[str] = []

    async def other() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            seen.append("other ended")

    async def main(reactor: Reactor) -> None:
        reactor.spawn(other())
        await asyncio.sleep(0.001)
        raise ValueError("out")

    with pytest.raises(ValueError, match="out"):
        Reactor(new_loop()).run(main)
    assert seen == ["other ended"]

    async def interrupted(reactor: Reactor) -> None:
        reactor.spawn(other())
        await asyncio.sleep(0.001)
        raise KeyboardInterrupt

    loop = new_loop()
    with pytest.raises(KeyboardInterrupt):
        Reactor(loop).run(interrupted)
    assert seen == ["other ended", "other ended"]
    assert loop.is_closed()


def test_run_until_leaves_the_rest_running() -> None:
    loop = new_loop()
    reactor = Reactor(loop)
    seen: list[int] = []

    async def count() -> None:
        while True:
            seen.append(1)
            await asyncio.sleep(0.001)

    reactor.spawn(count())
    assert reactor.run_until(asyncio.sleep(0.02, "first")) == "first"
    before = len(seen)
    reactor.run_until(asyncio.sleep(0.02))
    assert len(seen) > before > 0
    reactor.run_until(reactor.close())
    loop.close()


def test_a_task_that_does_not_end_is_named() -> None:
    sim = make_sim_world()

    async def stubborn() -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        reactor = Reactor()
        task = reactor.spawn(stubborn(), name="stubborn")
        await asyncio.sleep(0.001)
        with pytest.raises(WrongState, match="stubborn"):
            await reactor.close()
        released.set()
        await task

    released = asyncio.Event()
    sim.run(main())
    sim.close()


@pytest.mark.parametrize("kind", ["uvloop", "asyncio", "polling"])
def test_an_idle_reactor_turns_only_for_its_timers(kind: LoopKind) -> None:
    async def main(reactor: Reactor) -> ReactorStats:
        fired: list[int] = []
        fifth = asyncio.Event()

        def tick() -> None:
            fired.append(len(fired))
            if len(fired) == 5:
                fifth.set()

        reactor.call_later(100, print)
        await reactor.sleep(0.02)
        before = reactor.statistics()
        reactor.timer(tick).arm_periodic(0.1)
        await fifth.wait()
        after = reactor.statistics()
        assert after.n_timers_fired - before.n_timers_fired == 5
        assert after.n_turns - before.n_turns <= 10  # of half a second and more
        return after

    stats = Reactor(new_loop(kind), metrics=Registry()).run(main)
    assert stats is not None
    assert stats.elapsed_s >= 0.5
    assert stats.idle_share == pytest.approx(1 - stats.busy_s / stats.elapsed_s)


async def test_the_numbers_are_metrics(world: World) -> None:
    registry = Registry()
    reactor = Reactor(metrics=registry)
    group = SchedulingGroup("bulk", 30)
    await ended(reactor.spawn(asyncio.sleep(0.001), group=group), reactor)
    found = {(sample.name, dict(sample.labels).get("group", "")): sample.value for sample in registry.statistics()}
    assert found["isopod_tasks_scheduled_total", ""] == found["isopod_tasks_completed_total", ""] == 1
    assert found["isopod_tasks_failed_total", ""] == 0
    assert found["isopod_reactor_polls_total", ""] >= 1
    assert found["isopod_reactor_events_processed_total", ""] >= found["isopod_scheduler_tasks_processed_total", "bulk"] >= 1
    assert found["isopod_scheduler_shares", "bulk"] == 30
    assert found["isopod_scheduler_waittime_seconds_total", "bulk"] >= 0
    assert "isopod_scheduler_starvetime_seconds_total" in {name for name, _ in found}
    assert "isopod_scheduler_runtime_seconds_total" in {name for name, _ in found}
    await ended(reactor.spawn(asyncio.sleep(0.001), group=group), reactor)
    await reactor.close()
    found = {(sample.name, dict(sample.labels).get("group", "")): sample.value for sample in registry.statistics()}
    assert found["isopod_tasks_completed_total", ""] == 2
