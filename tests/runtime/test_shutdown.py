"""ShutdownCoordinator: order, deadlines, failures, force."""

import asyncio
from typing import Any

import msgspec
import pytest

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shutdown import DUMPED_PER_LINE, ShutdownCoordinator, ShutdownPhase, ShutdownResource, ShutdownSignals
from isopod.world.errors import AlreadyExists, WrongState
from isopod.world.world import World

pytestmark = [pytest.mark.row("S6"), pytest.mark.row("S41")]


class Stage:
    """A coordinator, and what its resources did."""

    def __init__(self, world: World, **options: Any) -> None:
        self.lines: list[bytes] = []
        self.log: list[str] = []
        self.coordinator = ShutdownCoordinator(Logger(self.lines.append, world.clock, level="debug"), world.clock, **options)

    def add(
        self,
        name: str,
        phase: ShutdownPhase,
        *,
        takes_s: float = 0.0,
        error: Exception | None = None,
        timeout_s: float = 30.0,
        forces: bool = False,
    ) -> None:
        """Register a resource that logs what happens to it."""

        async def close() -> None:
            self.log.append(f"begin {name}")
            await asyncio.sleep(takes_s)
            if error is not None:
                raise error
            self.log.append(f"end {name}")

        force = (lambda: self.log.append(f"force {name}")) if forces else None
        self.coordinator.register(ShutdownResource(name, phase, close, timeout_s=timeout_s, force=force))

    def warnings(self) -> list[dict[str, object]]:
        """Return the log's warnings."""
        return [line for line in map(msgspec.json.decode, self.lines) if line["level"] == "warning"]


async def test_phases_follow_each_other_and_are_concurrent_inside(world: World) -> None:
    stage = Stage(world)
    stage.add("files", ShutdownPhase.FINAL_CLEANUP)
    stage.add("rpc", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=0.02)
    stage.add("http", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=0.01)
    stage.add("listener", ShutdownPhase.STOP_ACCEPTING, takes_s=0.01)
    assert stage.coordinator.current_phase is None
    report = await stage.coordinator.shutdown("SIGTERM")
    assert stage.log.index("end listener") < stage.log.index("begin rpc")
    assert sorted(stage.log[2:4]) == ["begin http", "begin rpc"]
    assert stage.log[4:] == ["end http", "end rpc", "begin files", "end files"]
    assert report.outcomes == (("listener", "closed"), ("rpc", "closed"), ("http", "closed"), ("files", "closed"))
    assert report.is_clean
    assert 0.03 <= report.duration_s < 5
    assert stage.coordinator.current_phase is None


async def test_all_six_phases_run_in_order(world: World) -> None:
    stage = Stage(world)
    for phase in reversed(ShutdownPhase):
        stage.add(phase.name, phase)
    await stage.coordinator.shutdown("test")
    assert [line.removeprefix("begin ") for line in stage.log[::2]] == [
        "STOP_ACCEPTING", "DRAIN_CONNECTIONS", "STOP_TIMERS", "STOP_METRICS", "STOP_REACTORS", "FINAL_CLEANUP",
    ]  # fmt: skip


async def test_a_failure_is_logged_and_stops_nobody(world: World) -> None:
    stage = Stage(world)
    stage.add("bad", ShutdownPhase.STOP_TIMERS, error=OSError(5, "broken"))
    stage.add("good", ShutdownPhase.STOP_TIMERS, takes_s=0.01)
    stage.add("last", ShutdownPhase.FINAL_CLEANUP)
    report = await stage.coordinator.shutdown("test")
    assert report.outcomes == (("bad", "failed"), ("good", "closed"), ("last", "closed"))
    assert not report.is_clean
    (line,) = stage.warnings()
    assert (line["resource"], line["outcome"]) == ("bad", "failed")
    assert "broken" in str(line["why"])


@pytest.mark.virtual_time
async def test_a_late_resource_is_cancelled_and_forced(world: World) -> None:
    stage = Stage(world)
    stage.add("slow", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=100, timeout_s=0.02, forces=True)
    stage.add("last", ShutdownPhase.FINAL_CLEANUP)
    report = await stage.coordinator.shutdown("test")
    assert report.outcomes == (("slow", "late"), ("last", "closed"))
    assert stage.log == ["begin slow", "force slow", "begin last", "end last"]


async def test_a_close_that_times_out_by_itself_has_failed_not_been_late(world: World) -> None:
    stage = Stage(world)
    stage.add("picky", ShutdownPhase.DRAIN_CONNECTIONS, error=TimeoutError("its own"))
    report = await stage.coordinator.shutdown("test")
    assert report.outcomes == (("picky", "failed"),)


async def test_force_stops_waiting(world: World) -> None:
    stage = Stage(world)
    stage.add("slow", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=100, forces=True)
    stage.add("later", ShutdownPhase.STOP_TIMERS, takes_s=100, forces=True)
    stage.add("last", ShutdownPhase.FINAL_CLEANUP, takes_s=100)
    task = asyncio.create_task(stage.coordinator.shutdown("SIGTERM"))
    while not stage.log:
        await asyncio.sleep(0)
    assert stage.coordinator.current_phase is ShutdownPhase.DRAIN_CONNECTIONS
    stage.coordinator.force()
    report = await task
    assert [outcome for _, outcome in report.outcomes] == ["forced"] * 3
    assert stage.log == ["begin slow", "force slow", "force later"]
    assert report.duration_s < 50


async def test_the_whole_has_a_deadline(world: World) -> None:
    stage = Stage(world, timeout_s=0.02)
    stage.add("slow", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=100)
    stage.add("last", ShutdownPhase.FINAL_CLEANUP, forces=True)
    report = await stage.coordinator.shutdown("test")
    assert [outcome for _, outcome in report.outcomes] == ["forced", "forced"]
    assert stage.log[-1] == "force last"


async def test_a_force_that_fails_is_logged(world: World) -> None:
    stage = Stage(world)

    def broken() -> None:
        raise ValueError("no force")

    async def close() -> None:
        await asyncio.sleep(100)

    stage.coordinator.register(ShutdownResource("odd", ShutdownPhase.STOP_TIMERS, close, timeout_s=0.01, force=broken))
    report = await stage.coordinator.shutdown("test")
    assert report.outcomes == (("odd", "late"),)
    assert "no force" in str(stage.warnings()[0]["why"])


async def test_calling_twice_is_one_way_down(world: World) -> None:
    stage = Stage(world)
    stage.add("rpc", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=0.01)
    first, second = await asyncio.gather(stage.coordinator.shutdown("one"), stage.coordinator.shutdown("two"))
    assert first is second
    assert first.reason in ("one", "two")  # the simulation starts them in its own order
    assert stage.log == ["begin rpc", "end rpc"]


async def test_cancelling_the_way_down_forces_the_rest(world: World) -> None:
    stage = Stage(world)
    stage.add("slow", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=100)
    stage.add("last", ShutdownPhase.FINAL_CLEANUP, forces=True)
    task = asyncio.create_task(stage.coordinator.shutdown("SIGTERM"))
    while not stage.log:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stage.log == ["begin slow", "force last"]


async def test_names_are_unique_and_the_way_down_takes_none(world: World) -> None:
    stage = Stage(world)
    stage.add("rpc", ShutdownPhase.DRAIN_CONNECTIONS)
    with pytest.raises(AlreadyExists, match="shutdown resource already exists: rpc"):
        stage.add("rpc", ShutdownPhase.FINAL_CLEANUP)
    stage.coordinator.unregister("rpc")
    stage.add("rpc", ShutdownPhase.FINAL_CLEANUP)
    await stage.coordinator.shutdown("test")
    assert stage.coordinator.has_begun
    with pytest.raises(WrongState, match="under way"):
        stage.add("late", ShutdownPhase.FINAL_CLEANUP)


@pytest.mark.virtual_time
async def test_a_close_that_will_not_even_be_cancelled_is_left_behind(world: World) -> None:
    stage = Stage(world)
    release = asyncio.Event()

    async def close() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                stage.log.append("not me")

    stage.coordinator.register(ShutdownResource("mule", ShutdownPhase.DRAIN_CONNECTIONS, close, timeout_s=0.01))
    stage.add("last", ShutdownPhase.FINAL_CLEANUP)
    report = await stage.coordinator.shutdown("test")
    assert report.outcomes == (("mule", "late"), ("last", "closed"))
    assert stage.log == ["not me", "begin last", "end last"]
    assert any(b"shutdown.stuck" in line for line in stage.lines)
    release.set()
    await asyncio.sleep(0.001)


@pytest.mark.virtual_time
async def test_a_phase_has_a_deadline_of_its_own(world: World) -> None:
    stage = Stage(world, phase_timeouts_s={ShutdownPhase.DRAIN_CONNECTIONS: 0.02})
    stage.add("quick", ShutdownPhase.DRAIN_CONNECTIONS)
    stage.add("slow", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=100, forces=True)
    stage.add("next", ShutdownPhase.STOP_TIMERS, takes_s=0.05)
    stage.add("last", ShutdownPhase.FINAL_CLEANUP)
    report = await stage.coordinator.shutdown("test")
    # The phases after it are not forced: they have their own time.
    assert report.outcomes == (("quick", "closed"), ("slow", "late"), ("next", "closed"), ("last", "closed"))
    assert report.duration_s < 50
    assert [line["event"] for line in stage.warnings()] == ["shutdown.phase_late", "shutdown.resource"]
    assert "drain_connections is over" in str(stage.warnings()[1]["why"])


async def test_an_abort_source_tells_that_the_way_down_begins(world: World) -> None:
    stage = Stage(world)
    source = stage.coordinator.stopping
    source.subscribe(lambda reason: stage.log.append(f"told {reason}"))
    source.subscribe(lambda _: 1 // 0)
    child = source.child("request")
    stage.add("listener", ShutdownPhase.STOP_ACCEPTING)
    assert not source.abort_requested
    await stage.coordinator.shutdown("SIGTERM")
    assert stage.log == ["told SIGTERM", "begin listener", "end listener"]
    assert child.reason == "SIGTERM"
    assert any("ZeroDivisionError" in str(line) for line in stage.lines)


async def test_signals_begin_force_and_describe_the_way_down(world: World) -> None:
    stage = Stage(world)
    metrics = Registry()
    for number in range(DUMPED_PER_LINE + 1):
        metrics.counter("isopod_things_total", "Things.", kind=f"k{number}").inc(number)
    logger = Logger(stage.lines.append, world.clock)
    signals = ShutdownSignals(stage.coordinator, logger, metrics)
    stage.add("slow", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=100, forces=True)
    stage.add("last", ShutdownPhase.FINAL_CLEANUP, takes_s=100)
    signals.status("SIGUSR1")
    signals.dump("SIGUSR2")
    signals.stop("SIGTERM")
    signals.stop("SIGINT")
    assert await signals.wait() == "SIGTERM"
    task = asyncio.create_task(stage.coordinator.shutdown("SIGTERM"))
    while not stage.log:
        await asyncio.sleep(0)
    signals.status("SIGUSR1")
    signals.force("SIGTERM")
    report = await task
    assert [outcome for _, outcome in report.outcomes] == ["forced", "forced"]
    assert stage.log == ["begin slow", "force slow"]
    assert stage.coordinator.is_forced
    lines = [msgspec.json.decode(line) for line in stage.lines]
    before, during = [line for line in lines if line["event"] == "signal.status"]
    assert (before["begun"], before["registered"], before["phase"]) == (False, ["slow", "last"], None)
    assert (during["begun"], during["closing"], during["phase"], during["forced"]) == (True, ["slow"], "drain_connections", False)
    dumped = [line for line in lines if line["event"] == "signal.metrics"]
    assert [(line["part"], line["parts"], len(line["values"])) for line in dumped] == [(1, 2, DUMPED_PER_LINE), (2, 2, 1)]
    assert dumped[0]["values"]['isopod_things_total{kind="k7"}'] == 7


async def test_a_forced_stop_before_any_other(world: World) -> None:
    stage = Stage(world)
    signals = ShutdownSignals(stage.coordinator, Logger(stage.lines.append, world.clock))
    stage.add("slow", ShutdownPhase.DRAIN_CONNECTIONS, takes_s=100, forces=True)
    signals.force("SIGQUIT")
    report = await stage.coordinator.shutdown(await signals.wait())
    assert (report.reason, report.outcomes, stage.log) == ("SIGQUIT", (("slow", "forced"),), ["force slow"])


async def test_forced_in_the_turn_in_which_a_phase_begins(world: World) -> None:
    stage = Stage(world)
    stage.add("store", ShutdownPhase.FINAL_CLEANUP, takes_s=3600, forces=True)
    stage.coordinator.stopping.subscribe(lambda _: asyncio.get_running_loop().call_soon(stage.coordinator.force))

    report = await stage.coordinator.shutdown("test")

    assert report.outcomes == (("store", "forced"),)
    assert "force store" in stage.log
