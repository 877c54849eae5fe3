"""Intake: bodies and containers on their way into the store."""

import asyncio
import itertools
from typing import Any

import pytest

from isopod.pulse.cadvisor import cadvisor_labels
from isopod.pulse.demo import body
from isopod.pulse.intake import STEP_CONTAINERS, Intake
from isopod.pulse.model import LocalContainer, Pod, Query, Target
from isopod.pulse.settings import PulseSettings
from isopod.pulse.store import Store
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.telemetry.kit import Memo

A = Target("a" * 64, "go", "/run/a")
N_MANY = 1000
WEB = Pod("c1", "web", "isopod", source="isopod")


class Kept:
    """A store, its intake, and a clock that is moved by hand."""

    def __init__(self, sim: SimWorld | World, **told: Any) -> None:
        world = sim.world if isinstance(sim, SimWorld) else sim
        self.now_s = 100.0
        self.memo = Memo(world.clock)
        self.store = Store(lambda: self.now_s, container_labels=cadvisor_labels)
        settings = PulseSettings(**told)
        self.intake = Intake(self.store, settings, clock=world.clock, now=lambda: self.now_s, logger=self.memo.logger)

    def family(self, name: str) -> str:
        entry = self.store.get(A.id)
        assert entry is not None
        return {**entry.families, **entry.containers}[name].text.decode()


def local(identifier: str = "c1", *, cpu_s: float = 1.0) -> LocalContainer:
    return LocalContainer(id=identifier, pod=WEB, started_ns=1, cpu_s=cpu_s, memory_bytes=1 << 20, memory_limit_bytes=0, n_processes=2)


def test_a_body_that_comes_again_is_read_once(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    kept.store.add(A)
    for _ in range(3):
        kept.intake.accept(A, body(1, 60.0), 0.01)
        kept.now_s += 60.0
    assert (kept.intake.n_read, kept.intake.n_unchanged) == (1, 2)
    entry = kept.store.get(A.id)
    assert entry is not None
    assert entry.collected_s == 220.0, "its figures are confirmed all the same"
    kept.intake.accept(A, body(1, 70.0), 0.01)
    assert kept.intake.n_read == 2


async def test_when_a_sandbox_was_last_seen_moves_with_each_answer(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    kept.store.add(A)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    before, threads = kept.family("container_last_seen"), kept.family("kata_shim_threads")
    await asyncio.sleep(30.0)  # in virtual time
    kept.intake.accept(A, body(1, 60.0), 0.01)
    after = kept.family("container_last_seen")
    assert after.split("} ")[0] == before.split("} ")[0]
    assert float(after.split("} ")[1]) - float(before.split("} ")[1]) == 30.0
    assert kept.family("kata_shim_threads") == threads


def test_after_a_failure_the_same_body_counts_again(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    kept.store.add(A)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    kept.intake.reject(A, "timeout", "it took too long", 3.0)
    assert [entry.up for entry in kept.store.entries()] == [False]
    kept.intake.accept(A, body(1, 60.0), 0.01)
    assert [entry.up for entry in kept.store.entries()] == [True]
    kept.intake.reject(A, "timeout", "it took too long", 3.0)
    kept.intake.reject(A, "timeout", "it took too long", 3.0)
    assert kept.memo.events().count("pulse.sandbox_failed") == 2, "said once for each time it begins to fail"


def test_what_comes_for_a_sandbox_that_is_gone_is_dropped(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    kept.intake.reject(A, "timeout", "it took too long", 3.0)
    assert not kept.intake.describe(A.id, WEB)
    assert kept.store.entries() == ()


async def test_containers_of_a_node_come_and_go_as_it_says(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    await kept.intake.local((local("c1"), local("c2")))
    assert [entry.id for entry in kept.store.entries()] == ["c1", "c2"]
    entry = kept.store.get("c1")
    assert entry is not None
    assert entry.runtime == "isopod"
    assert b'namespace="isopod"' in entry.containers["container_cpu_usage_seconds_total"].text
    await kept.intake.local((local("c2", cpu_s=2.0),))
    assert [entry.id for entry in kept.store.entries()] == ["c2"]


async def test_a_machine_that_has_a_shim_is_left_to_it(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    kept.store.add(A)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    before = kept.family("container_cpu_usage_seconds_total")
    await kept.intake.local((local(A.id, cpu_s=999.0),))
    assert kept.family("container_cpu_usage_seconds_total") == before
    await kept.intake.local(())
    assert kept.store.get(A.id) is not None


async def test_a_machine_whose_shim_is_found_later_is_handed_over_to_it(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    await kept.intake.local((local(A.id, cpu_s=999.0),))
    kept.intake.hand_over(A.id)
    kept.store.add(A)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    threads = kept.family("kata_shim_threads")
    await kept.intake.local((local(A.id, cpu_s=1000.0),))
    assert kept.family("kata_shim_threads") == threads
    assert "1000" not in kept.family("container_cpu_usage_seconds_total").rsplit(" ", 1)[1]
    kept.intake.hand_over("nobody")


async def test_others_have_their_turns_while_a_thousand_containers_are_taken_in(world: World) -> None:
    """Counted in turns of the loop: how long one takes is the machine's matter."""
    kept = Kept(world)
    seen: list[int] = []

    async def look() -> None:
        while len(kept.store.entries()) < N_MANY:
            seen.append(kept.store.view(Query()).n_sandboxes)
            await asyncio.sleep(0)

    looking = asyncio.get_running_loop().create_task(look())
    await kept.intake.local([local(f"c{number:04}") for number in range(N_MANY)])
    await looking
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert max(steps) <= STEP_CONTAINERS
    assert len(seen) >= N_MANY // STEP_CONTAINERS
    seen.clear()
    looking = asyncio.get_running_loop().create_task(look_until_empty(kept, seen))
    await kept.intake.local(())
    await looking
    assert len(seen) >= N_MANY // STEP_CONTAINERS, "they go as they came"


async def look_until_empty(kept: Kept, seen: list[int]) -> None:
    while kept.store.entries():
        seen.append(len(kept.store.entries()))
        await asyncio.sleep(0)


async def test_of_two_lists_under_way_the_newer_one_counts(world: World) -> None:
    kept = Kept(world)
    old = [local(f"c{number:04}", cpu_s=1.0) for number in range(100)]
    new = [local(f"c{number:04}", cpu_s=2.0) for number in range(50, 100)]
    await asyncio.gather(kept.intake.local(old), kept.intake.local(new))
    assert [entry.id for entry in kept.store.entries()] == [each.id for each in new]
    for entry in kept.store.entries():
        assert entry.containers["container_cpu_usage_seconds_total"].text.splitlines()[0].endswith(b" 2")


async def test_a_shim_that_is_found_while_containers_are_taken_in_keeps_its_sandbox(world: World) -> None:
    kept = Kept(world)
    many = [local(f"b{number:04}") for number in range(100)]
    taking = asyncio.get_running_loop().create_task(kept.intake.local([*many, local(A.id, cpu_s=999.0)]))
    while not kept.store.entries():
        await asyncio.sleep(0)
    kept.intake.hand_over(A.id)
    kept.store.add(A)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    before = kept.family("container_cpu_usage_seconds_total")
    await taking
    assert kept.family("container_cpu_usage_seconds_total") == before


@pytest.mark.row("K14")
@pytest.mark.parametrize(
    ("told", "is_made"),
    [
        ({}, True),
        ({"view": "kata"}, True),
        ({"strict_compat": True}, False),
        ({"strict_compat": True, "push_url": "http://r/api/v1/write"}, True),
        ({"strict_compat": True, "push_url": "http://r/api/v1/write", "view": "kata"}, False),
    ],
)
def test_families_that_nobody_can_see_are_not_made(sim_world: SimWorld, told: dict[str, Any], is_made: bool) -> None:
    """`--view kata` leaves /metrics/cadvisor, /metrics/resource and /top, which kata-monitor's face has not."""
    kept = Kept(sim_world, **told)
    kept.store.add(A)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    (entry,) = kept.store.entries()
    assert bool(entry.containers) is is_made
    assert len(kept.intake.converter.rates) == is_made
    assert entry.families


def test_strictly_the_shims_answer_is_kept_as_it_is(sim_world: SimWorld) -> None:
    for strict in (False, True):
        kept = Kept(sim_world, strict_compat=strict)
        kept.store.add(A)
        kept.intake.accept(A, b"kata_x 1\nrubbish\n", 0.01)
        entry = kept.store.get(A.id)
        assert entry is not None
        assert entry.raw == (b"kata_x 1\nrubbish\n" if strict else None)
        assert sum(entry.dropped.values()) == 1


@pytest.mark.row("T7")
def test_what_a_refused_body_said_is_not_taken_for_known(sim_world: SimWorld) -> None:
    kept = Kept(sim_world, keep_rounds=100)
    kept.store.add(A)
    kept.intake.accept(A, b"# HELP f1 h\n# TYPE f1 gauge\nf1 1\n# HELP f2 h\n# TYPE f2 gauge\nf2 5\n", 0.1)
    bare = b"# HELP f1 h\n# TYPE f1 gauge\nf1 %b\n# HELP f2 h\n# TYPE f2 gauge\n"
    kept.intake.accept(A, bare % b"0x1", 0.1)
    entry = kept.store.get(A.id)
    assert entry is not None and (entry.error, "f2" in entry.families) == ("unreadable", True)
    for figure in (b"2", b"3"):
        kept.intake.accept(A, bare % figure, 0.1)
        assert list(entry.families) == ["f1"]
