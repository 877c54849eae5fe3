"""The stall detector: what it says while the loop is held up, and how often."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.stalls import StallDetector
from isopod.world.errors import InvalidArgument
from isopod.world.host.clock import HostClock
from isopod.world.host.loop import LoopKind, new_loop
from isopod.world.loops import GroupLoop, Stall, Watch
from isopod.world.sim import SimWorld

pytestmark = pytest.mark.row("S3")
WAIT_S = 20.0


def hold_up(until: Callable[[], bool]) -> None:
    """Compute until a condition, or for twenty seconds."""
    give_up_s = time.monotonic() + WAIT_S
    while not until() and time.monotonic() < give_up_s:
        sum(range(1000))


class Report:
    """A detector and what it said."""

    def __init__(self, **options: Any) -> None:
        self.lines: list[dict[str, Any]] = []
        self.on_line: Callable[[dict[str, Any]], None] = lambda _: None
        self.metrics = Registry()
        self.detector = StallDetector(Logger(self._write, HostClock()), HostClock(), self.metrics, **options)

    def _write(self, line: bytes) -> None:
        self.lines.append(msgspec.json.decode(line))
        self.on_line(self.lines[-1])

    def sample(self, name: str, group: str) -> float:
        found = {(each.name, dict(each.labels).get("group")): each.value for each in self.metrics.statistics()}
        return found.get((name, group), 0.0)


@pytest.mark.parametrize("kind", ["uvloop", "asyncio", "polling"])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_stall_is_named_while_it_lasts(kind: LoopKind, grouped: bool) -> None:
    report = Report(threshold_s=0.02)
    group = "bulk" if grouped else "main"
    seen_inside: list[bool] = []

    def is_told() -> bool:
        return any(line["task"] == "the-hog" for line in report.lines)

    async def hog() -> None:
        hold_up(is_told)
        seen_inside.append(is_told())

    async def main() -> None:
        loop = asyncio.get_running_loop()
        report.detector.start()
        assert report.detector.is_watching
        await asyncio.sleep(0.05)
        context = SchedulingGroup("bulk", 100).context() if grouped else None
        await loop.create_task(hog(), name="the-hog", context=context)
        while not report.sample("isopod_stall_duration_seconds_count", group):
            await asyncio.sleep(0.005)
        report.detector.stop()
        report.detector.stop()

    loop = new_loop(kind)
    loop.run_until_complete(main())
    loop.close()
    # A machine that stands still makes other steps stall too; of this one there is one line, written before the stall ended.
    (line,) = [each for each in report.lines if each["task"] == "the-hog"]
    assert seen_inside == [True]
    assert (line["event"], line["group"], line["level"]) == ("reactor.stalled", group, "warning")
    assert 0.02 <= line["so_far_s"] < WAIT_S
    assert any("hold_up" in frame and "test_stalls.py:" in frame for frame in line["stack"])
    assert any("hog" in frame for frame in line["stack"])
    assert report.sample("isopod_stalls_total", group) >= 1
    assert report.sample("isopod_stall_duration_seconds_sum", group) >= 0.02
    assert [thread.name for thread in threading.enumerate() if thread.name == "isopod-watch"] == []


@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
def test_a_plain_callback_and_a_blocking_call_are_seen(kind: LoopKind) -> None:
    report = Report(threshold_s=0.02)

    told, ended = threading.Event(), asyncio.Event()
    report.on_line = lambda line: told.set() if "blocking" in str(line["stack"]) else None

    def blocking() -> None:
        told.wait(WAIT_S)
        ended.set()

    async def main() -> None:
        report.detector.start()
        asyncio.get_running_loop().call_later(0.001, blocking)
        await ended.wait()
        report.detector.stop()

    loop = new_loop(kind)
    loop.run_until_complete(main())
    loop.close()
    (line,) = [each for each in report.lines if "blocking" in str(each["stack"])]
    assert line["task"] == ""


@pytest.mark.parametrize("kind", ["uvloop", "asyncio"])
def test_a_busy_loop_of_short_steps_does_not_stall_and_an_idle_one_is_not_woken(kind: LoopKind) -> None:
    report = Report(threshold_s=0.05)
    longest_s = [0.0]  # of what the machine made of a step

    async def short() -> None:
        ends_s = before_s = time.monotonic()
        ends_s += 0.5
        while before_s < ends_s:
            hold_up(lambda until_s=before_s + 0.0005: time.monotonic() >= until_s)  # type: ignore[misc]
            await asyncio.sleep(0)
            now_s = time.monotonic()
            longest_s[0] = max(longest_s[0], now_s - before_s)
            before_s = now_s

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, GroupLoop)
        report.detector.start()
        tasks = [loop.create_task(short(), context=SchedulingGroup(f"g{n}").context()) for n in range(3)]
        for task in tasks:
            await task
        turns = loop.n_turns()
        await asyncio.sleep(0.3)
        assert loop.n_turns() - turns <= 2
        report.detector.stop()

    loop = new_loop(kind)
    loop.run_until_complete(main())
    loop.close()
    # A machine that gives us no CPU for 50 ms looks like a stall; then at least a round of the three tasks took as long.
    assert longest_s[0] >= 0.05 or not [line for line in report.lines if "in short" in str(line["stack"])]


class FakeWatch:
    def stop(self) -> None:
        """Nothing runs."""


class FakeLoop(GroupLoop):
    """Hands out the callbacks it was given."""

    def __init__(self) -> None:
        self.on_stall: Callable[[Stall], None] = lambda _: None
        self.on_end: Callable[[Stall], None] = lambda _: None

    def watch(self, threshold_s: float, on_stall: Callable[[Stall], None], on_end: Callable[[Stall], None]) -> Watch:
        self.on_stall, self.on_end = on_stall, on_end
        return FakeWatch()


class FakeClock:
    now = 0

    def now_ns(self) -> int:
        return self.now

    def monotonic_ns(self) -> int:
        return self.now


def test_five_lines_a_minute_and_all_counted() -> None:
    lines: list[dict[str, Any]] = []
    clock, metrics = FakeClock(), Registry()
    loop = FakeLoop()  # type: ignore[abstract]  # of a loop's methods it has the one that is called
    detector = StallDetector(Logger(lambda line: lines.append(msgspec.json.decode(line)), clock), clock, metrics)
    asyncio._set_running_loop(loop)
    try:
        detector.start()
    finally:
        asyncio._set_running_loop(None)
    stall = Stall(0.03, "hog", "bulk", ("a.py:1 in f",))
    for second in range(20):
        clock.now = second * 1_000_000_000
        loop.on_stall(stall)
        loop.on_end(stall._replace(duration_s=0.04))
    assert [line["left_out"] for line in lines] == [0] * 5
    clock.now = 61_000_000_000
    loop.on_stall(stall)
    assert [line["left_out"] for line in lines] == [0] * 5 + [15]
    assert detector.n_stalls == 20
    (count,) = [each.value for each in metrics.statistics() if each.name == "isopod_stalls_total"]
    assert count == 20


async def test_in_the_simulation_nothing_watches(sim_world: SimWorld) -> None:
    n_threads = threading.active_count()
    report = Report()
    report.detector.start()
    assert threading.active_count() == n_threads
    await asyncio.sleep(3600)
    report.detector.stop()
    assert report.lines == []


def test_a_strange_loop_is_not_watched() -> None:
    async def main() -> None:
        report = Report()
        report.detector.start()
        assert not report.detector.is_watching

    asyncio.run(main())


def test_a_threshold_has_a_least_value() -> None:
    with pytest.raises(InvalidArgument):
        Report(threshold_s=0.0001)
    with pytest.raises(InvalidArgument):
        Report(threshold_s=float("nan"))
