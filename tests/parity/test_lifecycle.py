"""Reactor, gates, abort sources, and the way down in phases."""

import asyncio
import signal
from typing import Any

import pytest

from isopod.runtime.abort import AbortOnExpiry, AbortSource, deadline
from isopod.runtime.gate import Gate
from isopod.runtime.reactor import Reactor
from isopod.runtime.shutdown import ShutdownCoordinator, ShutdownPhase, ShutdownResource, ShutdownSignals
from isopod.world.errors import AlreadyExists, Cancelled, DeadlineExceeded, WrongState
from isopod.world.host.daemon import handle_signals
from isopod.world.host.loop import new_loop
from isopod.world.world import World
from tests.parity.kit import keeping, until

pytestmark = pytest.mark.row("S35")


def test_a_reactor_runs_its_main_and_ends_what_was_spawned() -> None:
    seen: list[str] = []

    async def background() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append("background ended")

    async def main(reactor: Reactor) -> int:
        reactor.spawn(background())
        await reactor.sleep(0.001)
        return 5

    assert Reactor(new_loop()).run(main) == 5
    assert seen == ["background ended"]


def test_a_reactor_can_be_stopped_from_within() -> None:
    async def main(reactor: Reactor) -> int:
        reactor.call_later(0.01, reactor.stop, "enough")
        await asyncio.sleep(3600)
        return 5

    reactor = Reactor(new_loop())
    assert reactor.run(main) is None
    assert reactor.stopping.reason == "enough"


async def test_closing_a_gate_waits_for_those_inside(world: World) -> None:
    gate = Gate("store")
    seen: list[str] = []

    async def work() -> None:
        with gate.hold():
            await asyncio.sleep(0.01)
            seen.append("work ended")

    task = asyncio.create_task(work())
    await until(lambda: gate.n_inside)
    await gate.close()
    seen.append("gate closed")
    await task
    assert seen == ["work ended", "gate closed"]


async def test_a_closed_gate_refuses_newcomers(world: World) -> None:
    gate = Gate("store")
    await gate.close()
    with pytest.raises(WrongState, match="closed"), gate.hold():
        pass


async def test_an_abort_source_tells_its_subscribers_once_in_order(world: World) -> None:
    source = AbortSource("copy")
    seen: list[str] = []
    source.subscribe(lambda reason: seen.append(f"first: {reason}"))
    unwanted = source.subscribe(lambda reason: seen.append("unwanted"))
    source.subscribe(lambda reason: seen.append(f"second: {reason}"))
    unwanted.cancel()
    source.check()
    assert source.request_abort("asked to")
    assert not source.request_abort("again")
    assert seen == ["first: asked to", "second: asked to"]
    with pytest.raises(Cancelled, match="asked to"):
        source.check()


async def test_an_abort_leaves_the_block_that_waits_for_it(world: World) -> None:
    source = AbortSource("copy")
    asyncio.get_running_loop().call_later(0.01, source.request_abort, "enough")
    with pytest.raises(Cancelled):
        async with source.scope():
            await asyncio.sleep(3600)


async def test_an_abort_reaches_children_and_expiry_aborts(world: World) -> None:
    parent = AbortSource("node")
    child = parent.child("request")
    parent.request_abort("going down")
    assert child.reason == "going down"
    expiring = AbortOnExpiry(0.01, "question")
    assert await expiring.wait() == "expired"
    with pytest.raises(DeadlineExceeded):
        expiring.check()


async def test_a_deadline_ends_a_block(world: World) -> None:
    with pytest.raises(DeadlineExceeded, match="reading"):
        async with deadline(0.01, "reading"):
            await asyncio.sleep(3600)


async def test_the_way_down_keeps_the_order_of_phases(world: World) -> None:
    coordinator = ShutdownCoordinator(keeping(world), world.clock)
    seen: list[str] = []

    def closing(name: str, phase: ShutdownPhase) -> ShutdownResource:
        async def close() -> None:
            await asyncio.sleep(0.001)
            seen.append(name)

        return ShutdownResource(name, phase, close)

    for phase in reversed(ShutdownPhase):
        coordinator.register(closing(phase.name, phase))
    with pytest.raises(AlreadyExists):
        coordinator.register(closing("STOP_TIMERS", ShutdownPhase.STOP_TIMERS))
    report = await coordinator.shutdown("asked to")

    assert seen == ["STOP_ACCEPTING", "DRAIN_CONNECTIONS", "STOP_TIMERS", "STOP_METRICS", "STOP_REACTORS", "FINAL_CLEANUP"]
    assert report.is_clean


async def test_resources_of_a_phase_close_at_the_same_time(world: World) -> None:
    coordinator = ShutdownCoordinator(keeping(world), world.clock)
    other_began = asyncio.Event()

    async def first() -> None:
        await other_began.wait()

    async def second() -> None:
        other_began.set()

    coordinator.register(ShutdownResource("first", ShutdownPhase.STOP_TIMERS, first))
    coordinator.register(ShutdownResource("second", ShutdownPhase.STOP_TIMERS, second))
    assert (await coordinator.shutdown("asked to")).is_clean


async def test_one_that_hangs_or_fails_does_not_stop_the_others(world: World) -> None:
    lines: list[dict[str, Any]] = []
    coordinator = ShutdownCoordinator(keeping(world, lines), world.clock)
    seen: list[str] = []

    async def hang() -> None:
        await asyncio.sleep(3600)

    async def fail() -> None:
        raise OSError("no")

    async def close() -> None:
        seen.append("last")

    coordinator.register(ShutdownResource("hangs", ShutdownPhase.STOP_ACCEPTING, hang, timeout_s=0.05))
    coordinator.register(ShutdownResource("fails", ShutdownPhase.STOP_ACCEPTING, fail))
    coordinator.register(ShutdownResource("last", ShutdownPhase.FINAL_CLEANUP, close))
    report = await coordinator.shutdown("asked to")

    assert dict(report.outcomes) == {"hangs": "late", "fails": "failed", "last": "closed"}
    assert seen == ["last"]


async def test_force_waits_for_nothing(world: World) -> None:
    coordinator = ShutdownCoordinator(keeping(world), world.clock)
    seen: list[str] = []

    async def hang() -> None:
        seen.append("closing")
        await asyncio.sleep(3600)

    resource = ShutdownResource("hangs", ShutdownPhase.DRAIN_CONNECTIONS, hang, timeout_s=3600, force=lambda: seen.append("cut"))
    coordinator.register(resource)
    going_down = asyncio.create_task(coordinator.shutdown("asked to"))
    await until(lambda: seen)
    coordinator.force()
    assert dict((await going_down).outcomes) == {"hangs": "forced"}
    assert seen == ["closing", "cut"]


async def test_a_signal_begins_the_way_down(host_world: World) -> None:
    coordinator = ShutdownCoordinator(keeping(host_world), host_world.clock)
    signals = ShutdownSignals(coordinator, keeping(host_world))
    with handle_signals(signals):
        signal.raise_signal(signal.SIGTERM)
        assert await signals.wait() == "SIGTERM"
        assert (await coordinator.shutdown("SIGTERM")).is_clean
    assert coordinator.stopping.reason == "SIGTERM"
