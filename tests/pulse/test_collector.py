"""Collector: rounds that keep their time whatever single shims do (K11, K12, K17, T3, T6). Virtual time makes the figures exact."""

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from isopod.pulse.collector import (
    BACK_OFF_INTERVALS_MAX,
    DURATION_BOUNDS_S,
    FIRST_RETRY_S,
    JITTER,
    SPREAD,
    STEPS,
    SUSPECTS_PART,
    Collector,
)
from isopod.pulse.discovery import Discovery
from isopod.pulse.model import Root, Target
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import ShimClient
from isopod.runtime.logger import Logger
from isopod.world.sim import SimWorld, make_sim_world
from isopod.world.world import World
from tests.pulse.shims import GOOD, HUNG, SLOW, SMALL, Behaviour, FakeShim, FakeShims

INTERVAL_S = 60.0
REQUEST_S = 3.0
EXACT_S = 0.02
"""What the simulation's own small delays may amount to."""
GRACE_S = 30.0
BROKEN = Behaviour(status=500)


class Rig:
    """A collector, shims, and what was taken in."""

    def __init__(self, world: World, shims: FakeShims, settings: PulseSettings) -> None:
        self.world = world
        self.shims = shims
        self.loop = asyncio.get_running_loop()
        self.accepted: list[tuple[float, str, bytes]] = []
        self.rejected: list[tuple[float, str, str, str, float]] = []
        self.intake_fails = False
        self.log: list[dict[str, Any]] = []
        self.client = ShimClient(world, settings)
        self.collector = Collector(
            world,
            settings,
            self.client,
            accept=self.accept,
            reject=self.reject,
            logger=Logger(lambda line: self.log.append(msgspec.json.decode(line)), world.clock),
        )

    def accept(self, target: Target, body: bytes, took_s: float) -> None:
        self.accepted.append((self.loop.time(), target.id, body))
        assert took_s >= 0
        if self.intake_fails:
            raise RuntimeError("a fault of the intake")

    def reject(self, target: Target, word: str, message: str, took_s: float) -> None:
        self.rejected.append((self.loop.time(), target.id, word, message, took_s))
        if self.intake_fails:
            raise RuntimeError("a fault of the intake")

    async def add(self, identifier: str, behaviour: Behaviour = GOOD, *, body: bytes = SMALL) -> FakeShim:
        """Make a sandbox and have it asked."""
        shim = await self.shims.add(identifier, behaviour=behaviour, body=body)
        self.collector.add(target_of(shim))
        return shim

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a condition."""
        async with asyncio.timeout(GRACE_S):
            while not is_so():
                await asyncio.sleep(0.005)


def target_of(shim: FakeShim) -> Target:
    return Target(shim.id, "go", shim.socket)


def gaps(times_s: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times_s)]


@asynccontextmanager
async def rigged(
    world: World, folder: str, *, interval_s: float = INTERVAL_S, in_flight_max: int = 64, request_s: float = REQUEST_S, **told: Any
) -> AsyncIterator[Rig]:
    """Yield a rig whose collector runs, and see that it still runs in the end and leaves nothing."""
    settings = PulseSettings(interval_s=interval_s, in_flight_max=in_flight_max, request_s=request_s, **told)
    async with FakeShims(world, f"{folder}/sbs") as shims:
        rig = Rig(world, shims, settings)
        running = asyncio.ensure_future(rig.collector.run())
        try:
            yield rig
            assert not running.done()
            # Who is given up hears of it a moment after the next one is asked: then the shims see one more than there are.
            assert shims.n_in_flight_peak <= in_flight_max or any(word == "timeout" for _, _, word, *_ in rig.rejected)
            assert rig.collector.statistics().n_in_flight_peak <= in_flight_max
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await rig.client.close()
        assert rig.collector.statistics().n_in_flight == 0


@pytest.mark.row("K11")
async def test_a_sandbox_is_asked_at_once_and_again(world: World, folder: str) -> None:
    async with rigged(world, folder, interval_s=0.05) as rig:
        shim = await rig.add("a", body=b"x 1\n")
        await rig.until(lambda: len(rig.accepted) >= 3)
        assert {(name, body) for _, name, body in rig.accepted} == {("a", b"x 1\n")}
        assert len(shim.asked_s) >= 3
        statistics = rig.collector.statistics()
        assert statistics.requests["ok"] == sum(statistics.durations) >= 3
        assert len(statistics.durations) == len(DURATION_BOUNDS_S) + 1
        assert statistics.n_bytes == len(rig.accepted) * 4


@pytest.mark.row("K11")
@pytest.mark.virtual_time
async def test_each_sandbox_has_its_time_in_each_interval(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        began_s = rig.loop.time()
        added = [await rig.add(f"{number}") for number in range(20)]
        await asyncio.sleep(INTERVAL_S * 10)
        for shim in added:
            assert shim.asked_s[0] - began_s < 1.0
            first, *others = gaps(shim.asked_s)
            step_s = INTERVAL_S / STEPS
            assert SPREAD[0] * INTERVAL_S - step_s <= first <= SPREAD[1] * INTERVAL_S + step_s
            assert others == pytest.approx([INTERVAL_S] * len(others), abs=EXACT_S)
            assert 10 <= len(shim.asked_s) <= 11
        assert rig.collector.statistics().n_missed == 0


@pytest.mark.row("K11")
@pytest.mark.virtual_time
async def test_collections_run_side_by_side(world: World, folder: str) -> None:
    async with rigged(world, folder, in_flight_max=40) as rig:
        began_s = rig.loop.time()
        for number in range(80):
            await rig.add(f"{number}", Behaviour(delay_s=1.0))
        await rig.until(lambda: len(rig.accepted) == 80)
        assert rig.loop.time() - began_s == pytest.approx(2.0, abs=0.1)
        assert rig.shims.n_in_flight_peak == 40


@pytest.mark.row("T2")
@pytest.mark.virtual_time
async def test_requests_are_spread_over_the_interval(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        for number in range(1000):
            await rig.add(f"{number}")
        await asyncio.sleep(INTERVAL_S * 2)
        rig.shims.requests.clear()
        began_s = rig.loop.time()
        await asyncio.sleep(INTERVAL_S)
        slices = Counter(int((at_s - began_s) / 3.0) for at_s, _, _ in rig.shims.requests)
        assert len(rig.shims.requests) in (999, 1000, 1001)
        assert len(slices) >= 16  # of 20; none lie in the part of the interval before the spread begins
        assert max(slices.values()) <= 100  # an even spread would be 62
        assert rig.collector.statistics().n_in_flight_peak <= 64
        step_s = INTERVAL_S / STEPS
        off_s = [abs(at_s - round(at_s / step_s) * step_s) for at_s, _, _ in rig.shims.requests]
        assert max(off_s) < step_s / 4  # some together, so that each costs less


@pytest.mark.virtual_time
async def test_a_new_one_is_asked_at_once_among_many(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        for number in range(100):
            await rig.add(f"{number}")
        await asyncio.sleep(INTERVAL_S * 1.5)
        shim = await rig.add("new")
        added_s = rig.loop.time()
        await asyncio.sleep(1.0)
        assert shim.asked_s[0] - added_s < EXACT_S


@pytest.mark.row("T6")
@pytest.mark.virtual_time
async def test_one_that_fails_is_asked_less_often_until_it_answers(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        shim = await rig.add("a")
        await rig.until(lambda: bool(rig.accepted))
        shim.behaviour = BROKEN
        await asyncio.sleep(INTERVAL_S * 50)
        waits = gaps([at_s for at_s, *_ in rig.rejected])
        assert len(waits) >= 6
        for wait, intervals in zip(waits, (1, 2, 4, 8, *[BACK_OFF_INTERVALS_MAX] * 10), strict=False):
            assert JITTER[0] * intervals * INTERVAL_S - EXACT_S <= wait <= JITTER[1] * intervals * INTERVAL_S + EXACT_S
        assert {(word, took_s < 1.0) for _, _, word, _, took_s in rig.rejected} == {("status", True)}
        assert "500" in rig.rejected[0][3]
        assert rig.collector.statistics().n_failing == 1
        shim.behaviour = GOOD
        n_before = len(rig.accepted)
        await asyncio.sleep(INTERVAL_S * (BACK_OFF_INTERVALS_MAX + 4))
        recovered = [at_s for at_s, *_ in rig.accepted[n_before:]]
        assert len(recovered) >= 3
        assert gaps(recovered)[1:] == pytest.approx([INTERVAL_S] * (len(recovered) - 2), abs=EXACT_S)
        assert rig.collector.statistics().n_failing == 0


@pytest.mark.virtual_time
async def test_one_that_never_answered_is_tried_again_soon(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        shim = await rig.shims.add("a", late=True)
        rig.collector.add(target_of(shim))
        await asyncio.sleep(20.0)
        waits = gaps([at_s for at_s, *_ in rig.rejected])
        for wait, seconds in zip(waits, (1, 2, 4, 8), strict=True):
            assert JITTER[0] * seconds * FIRST_RETRY_S <= wait <= seconds * FIRST_RETRY_S + EXACT_S
        assert {word for _, _, word, _, _ in rig.rejected} == {"gone"}
        await rig.shims.listen(shim)
        rig.collector.add(target_of(shim))  # its socket came: it is asked at once
        await asyncio.sleep(EXACT_S)
        assert len(rig.accepted) == 1


@pytest.mark.row("K12")
@pytest.mark.virtual_time
async def test_one_that_hangs_fails_after_its_time_and_disturbs_nobody(world: World, folder: str) -> None:
    async with rigged(world, folder, interval_s=5.0) as rig:
        others = [await rig.add(f"{number}") for number in range(10)]
        hung = await rig.add("hung", HUNG)
        await asyncio.sleep(60.0)
        assert {word for _, _, word, _, _ in rig.rejected} == {"timeout"}
        assert [took_s for *_, took_s in rig.rejected] == pytest.approx([REQUEST_S] * len(rig.rejected), abs=EXACT_S)
        assert rig.rejected[0][0] - hung.asked_s[0] == pytest.approx(REQUEST_S, abs=EXACT_S)
        for shim in others:
            assert max(gaps(shim.asked_s)) <= 5.0 + EXACT_S


@pytest.mark.row("T6")
@pytest.mark.slow
@pytest.mark.virtual_time
@pytest.mark.parametrize("first", ["hung", "good"])
async def test_hung_and_slow_ones_among_a_thousand(world: World, folder: str, first: str) -> None:
    """20 hung and 20 slow shims of 1,000: each of the others is asked within its interval, always, and at once in the beginning."""
    behaviours = [HUNG] * 20 + [SLOW] * 20 + [GOOD] * 960
    async with rigged(world, folder) as rig:
        shims = [await rig.shims.add(f"{number:04}", behaviour=each) for number, each in enumerate(behaviours)]
        began_s = rig.loop.time()
        for shim in shims if first == "hung" else reversed(shims):
            rig.collector.add(target_of(shim))
        await asyncio.sleep(INTERVAL_S * 4)
        for shim in shims[40:]:
            assert shim.asked_s[0] - began_s < 1.0
            assert max(gaps(shim.asked_s)) <= INTERVAL_S + EXACT_S
            assert len(shim.asked_s) >= 4
        failed = Counter(name for _, name, *_ in rig.rejected)
        assert sorted(failed) == [shim.id for shim in shims[:40]]
        assert {word for _, _, word, _, _ in rig.rejected} == {"timeout"}
        assert rig.collector.statistics().n_missed == 0


@pytest.mark.row("T6")
@pytest.mark.virtual_time
async def test_however_many_hang_most_places_are_for_the_others(world: World, folder: str) -> None:
    """Half of all hang, with few places: once they are known to, at most a quarter of the places is theirs."""
    async with rigged(world, folder, interval_s=10.0, in_flight_max=8) as rig:
        good = [await rig.add(f"good{number}") for number in range(100)]
        hung = [await rig.add(f"hung{number}") for number in range(100)]
        await asyncio.sleep(30.0)
        for shim in hung:
            shim.behaviour = HUNG
        await asyncio.sleep(100.0)
        for shim in good:
            shim.asked_s.clear()
        peak = 0
        for _ in range(600):
            await asyncio.sleep(0.1)
            busy = sum(shim.n_in_flight for shim in hung)
            peak = max(peak, busy)
        assert 0 < peak <= 8 // SUSPECTS_PART
        for shim in good:
            assert max(gaps(shim.asked_s)) <= 10.0 + 0.1
        for shim in hung:
            shim.behaviour = GOOD
        accepted = len(rig.accepted)
        await asyncio.sleep(10.0 * BACK_OFF_INTERVALS_MAX + 20.0)
        assert {name for _, name, _ in rig.accepted[accepted:]} == {shim.id for shim in (*good, *hung)}


@pytest.mark.virtual_time
async def test_an_interval_shorter_than_a_request_leaves_rounds_out(world: World, folder: str) -> None:
    async with rigged(world, folder, interval_s=1.0) as rig:
        shim = await rig.add("a", Behaviour(delay_s=2.5))
        await asyncio.sleep(30.0)
        assert gaps(shim.asked_s)[1:] == pytest.approx([3.0] * (len(shim.asked_s) - 2), abs=EXACT_S)
        assert rig.collector.statistics().n_missed >= 2 * (len(shim.asked_s) - 3)


@pytest.mark.row("K17")
@pytest.mark.virtual_time
async def test_an_intake_that_fails_ends_nothing(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        rig.intake_fails = True
        good, bad = await rig.add("good"), await rig.add("bad", BROKEN)
        await asyncio.sleep(INTERVAL_S * 3)
        assert len(good.asked_s) >= 3
        assert len(bad.asked_s) >= 3
        failures = [line for line in rig.log if line["event"] == "pulse.intake_failed"]
        assert len(failures) == rig.collector.statistics().n_intake_failures == len(rig.accepted) + len(rig.rejected)
        rig.intake_fails = False
        n_accepted = len(rig.accepted)
        await asyncio.sleep(INTERVAL_S)
        assert len(rig.accepted) > n_accepted


@pytest.mark.row("K17")
async def test_a_socket_nobody_can_ask_for_is_a_failure_like_others(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        rig.collector.add(Target("odd", "go", f"{folder}/{'x' * 300}/s"))
        rig.collector.add(Target("null", "go", "\0"))
        await rig.until(lambda: len(rig.rejected) >= 2)
        assert {name for _, name, *_ in rig.rejected} == {"odd", "null"}
        assert {word for _, _, word, _, _ in rig.rejected} <= {"refused", "gone", "failed"}
        await rig.add("good")
        await rig.until(lambda: len(rig.accepted) == 1)


@pytest.mark.parametrize("behaviour", [HUNG, GOOD], ids=["in flight", "between rounds"])
async def test_nothing_is_told_of_one_that_was_removed(world: World, folder: str, behaviour: Behaviour) -> None:
    async with rigged(world, folder, interval_s=0.05) as rig:
        shim = await rig.add("a", behaviour)
        await rig.until(lambda: bool(shim.asked_s))
        rig.collector.remove("a")
        rig.collector.remove("a")
        told = len(rig.accepted) + len(rig.rejected)
        await rig.until(lambda: not shim.open)
        await rig.add("b")
        await rig.until(lambda: any(name == "b" for _, name, _ in rig.accepted))
        assert sum(name == "a" for _, name, *_ in rig.accepted) + len(rig.rejected) == told
        assert rig.collector.statistics().n_sandboxes == 1


async def test_one_that_waits_for_a_place_can_be_removed(world: World, folder: str) -> None:
    async with rigged(world, folder, in_flight_max=1) as rig:
        hung = await rig.add("hung", HUNG)
        await rig.until(lambda: bool(hung.asked_s))
        waiting = await rig.add("waiting")
        assert rig.collector.statistics().n_queued == 1
        rig.collector.remove("waiting")
        rig.collector.remove("hung")
        await rig.add("last")
        await rig.until(lambda: [name for _, name, _ in rig.accepted] == ["last"])
        assert waiting.asked_s == []


async def test_another_socket_takes_the_place_of_the_first(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        first = await rig.add("a", body=b"first 1\n")
        await rig.until(lambda: len(rig.accepted) == 1)
        second = await rig.shims.add("other", body=b"second 1\n")
        rig.collector.add(Target("a", "rust", second.socket))
        await rig.until(lambda: len(rig.accepted) == 2)
        assert [(name, body) for _, name, body in rig.accepted] == [("a", b"first 1\n"), ("a", b"second 1\n")]
        await rig.until(lambda: not first.open)


@pytest.mark.virtual_time
async def test_a_refresh_is_out_of_turn(world: World, folder: str) -> None:
    async with rigged(world, folder) as rig:
        shim = await rig.add("a")
        await asyncio.sleep(INTERVAL_S * 3)
        due_s = shim.asked_s[-1] + INTERVAL_S
        rig.collector.refresh("a")
        rig.collector.refresh("a")
        rig.collector.refresh("unknown")
        now_s = rig.loop.time()
        await asyncio.sleep(INTERVAL_S)
        assert shim.asked_s[-2:] == pytest.approx([now_s, due_s], abs=EXACT_S)


@pytest.mark.row("T4")
@pytest.mark.virtual_time
async def test_while_nobody_asks_for_figures_shims_are_left_alone(world: World, folder: str) -> None:
    async with rigged(world, folder, pause_after_s=5 * INTERVAL_S) as rig:
        shims = [await rig.add(f"{number}") for number in range(20)]
        await asyncio.sleep(20 * INTERVAL_S)
        assert all(5 <= len(shim.asked_s) <= 6 for shim in shims)
        shims.append(await rig.add("new"))
        await asyncio.sleep(20 * INTERVAL_S)
        assert len(shims[-1].asked_s) == 1  # once, to have figures to show
        rig.accepted.clear()
        await asyncio.gather(rig.collector.attend(), rig.collector.attend())
        assert Counter(identifier for _, identifier, _ in rig.accepted) == {each.id: 1 for each in shims}
        await asyncio.sleep(2.5 * INTERVAL_S)
        assert all(shim.asked_s[-1] > rig.loop.time() - INTERVAL_S - EXACT_S for shim in shims)


@pytest.mark.row("T4")
@pytest.mark.virtual_time
async def test_one_that_hangs_or_goes_keeps_nobody_waiting_who_asks_again(world: World, folder: str) -> None:
    async with rigged(world, folder, pause_after_s=INTERVAL_S) as rig:
        hung, gone, _ = await rig.add("hung"), await rig.add("gone"), await rig.add("good")
        await asyncio.sleep(10 * INTERVAL_S)
        hung.behaviour = gone.behaviour = HUNG
        began_s = rig.loop.time()
        rig.accepted.clear()
        waiting = asyncio.ensure_future(rig.collector.attend())
        await rig.collector.attend(0.25)
        await asyncio.sleep(0.25)
        assert not waiting.done()
        assert rig.loop.time() - began_s == pytest.approx(0.5, abs=EXACT_S)
        rig.collector.remove("gone")
        await waiting
        assert rig.loop.time() - began_s == pytest.approx(REQUEST_S, abs=EXACT_S)
        assert [identifier for _, identifier, _ in rig.accepted] == ["good"]
        await asyncio.sleep(10 * INTERVAL_S)
        rig.collector.remove("hung")
        began_s = rig.loop.time()
        await rig.collector.attend()
        assert rig.loop.time() - began_s < EXACT_S * 5
        assert rig.collector.statistics().n_missed == 0
        rig.collector.refresh("good")
        await rig.collector.attend()


async def test_what_is_added_before_the_run_waits_for_it_and_a_second_run_goes_on(world: World, folder: str) -> None:
    settings = PulseSettings(interval_s=0.05)
    async with FakeShims(world, f"{folder}/sbs") as shims:
        rig = Rig(world, shims, settings)
        shim = await rig.add("a")
        assert rig.collector.statistics().n_queued == 1
        for n_rounds in (2, 4):
            running = asyncio.ensure_future(rig.collector.run())
            while len(rig.accepted) < n_rounds:
                await asyncio.sleep(0.005)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert rig.collector.statistics().n_in_flight == 0
        await rig.client.close()
        await rig.until(lambda: not shim.open)


@pytest.mark.row("T3")
@pytest.mark.slow
async def test_thousands_that_come_and_go_leave_nothing(sim_world: SimWorld, folder: str) -> None:
    """Discovery and collector together: no task, timer, connection, watch or entry of 3,000 sandboxes is left."""
    world = sim_world.world
    behaviours = (GOOD, GOOD, HUNG, BROKEN, Behaviour(framing="chunked"), Behaviour(keeps=False))
    async with rigged(world, folder, interval_s=5.0) as rig:
        discovery = Discovery(
            world,
            (Root(rig.shims.root, "go"),),
            on_found=rig.collector.add,
            on_gone=rig.collector.remove,
            logger=Logger(lambda _: None, world.clock),
        )
        watching = asyncio.ensure_future(discovery.run())
        await rig.until(lambda: discovery.available()[rig.shims.root])
        n_tasks, n_watches = len(asyncio.all_tasks()), sim_world.disk.n_watches
        for number in range(3000):
            await rig.shims.add(f"{number}", behaviour=behaviours[number % len(behaviours)])
            await asyncio.sleep(0.05)
            if number >= 100:
                await rig.shims.remove(f"{number - 100}")
        for number in range(2900, 3000):
            await rig.shims.remove(f"{number}")
        await rig.until(lambda: discovery.statistics().n_sandboxes == 0 and rig.collector.statistics().n_in_flight == 0)
        statistics = rig.collector.statistics()
        assert (statistics.n_sandboxes, statistics.n_queued, statistics.n_failing) == (0, 0, 0)
        assert len({name for _, name, _ in rig.accepted}) == 2000
        assert rig.client.n_connections == 0
        assert rig.client._kept == {}
        await asyncio.sleep(100.0)
        assert (len(asyncio.all_tasks()), sim_world.disk.n_watches) == (n_tasks, n_watches)
        assert len(rig.log) == 0
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


@pytest.mark.row("T3")
async def test_hundreds_that_come_and_go_leave_no_descriptor(host_world: World, folder: str) -> None:
    async with rigged(host_world, folder, interval_s=0.5, request_s=20.0) as rig:
        discovery = Discovery(
            host_world,
            (Root(rig.shims.root, "go"),),
            on_found=rig.collector.add,
            on_gone=rig.collector.remove,
            logger=Logger(lambda _: None, host_world.clock),
        )
        watching = asyncio.ensure_future(discovery.run())
        await rig.until(lambda: discovery.available()[rig.shims.root])
        n_before = 0
        for batch in range(8):
            names = [f"{batch}-{number}" for number in range(50)]
            for number, name in enumerate(names):
                await rig.shims.add(name, behaviour=HUNG if number % 10 == 0 else GOOD)
            await rig.until(lambda: rig.collector.statistics().n_sandboxes == 50)
            for name in names:
                await rig.shims.remove(name)
            await rig.until(lambda: rig.collector.statistics().n_sandboxes == 0 and rig.client.n_connections == 0)
            n_before = n_before or len(os.listdir("/proc/self/fd"))  # the loop keeps a descriptor of its own from the first listener on
        await rig.until(lambda: len(os.listdir("/proc/self/fd")) == n_before)
        assert discovery.statistics().n_found == discovery.statistics().n_gone == 400
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def history(seed: int) -> tuple[str, list[tuple[float, str, str]]]:
    """Return the digest and the requests of a run with a bit of everything."""
    sim = make_sim_world(seed)

    async def body() -> list[tuple[float, str, str]]:
        await sim.disk.make_directory("/tmp/folder")
        async with rigged(sim.world, "/tmp/folder", interval_s=5.0, in_flight_max=4) as rig:
            for number in range(30):
                await rig.add(f"{number}", (GOOD, HUNG, BROKEN)[number % 3])
            await asyncio.sleep(60.0)
            return list(rig.shims.requests)

    try:
        sim.loop.start_trace()
        requests = sim.run(body())
        assert sim.loop.trace is not None
        return sim.loop.trace.digest(), requests
    finally:
        sim.close()


@pytest.mark.row("B22")
def test_one_seed_one_history() -> None:
    assert history(7) == history(7)
    assert history(7) != history(8)
