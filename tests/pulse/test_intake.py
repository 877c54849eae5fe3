"""Intake: bodies and containers on their way into the store."""

import asyncio
from typing import Any

from isopod.pulse.cadvisor import cadvisor_labels
from isopod.pulse.demo import body
from isopod.pulse.intake import Intake
from isopod.pulse.model import LocalContainer, Pod, Target
from isopod.pulse.settings import PulseSettings
from isopod.pulse.store import Store
from isopod.world.sim import SimWorld
from tests.telemetry.kit import Memo

A = Target("a" * 64, "go", "/run/a")
WEB = Pod("c1", "web", "isopod", source="isopod")


class Kept:
    """A store, its intake, and a clock that is moved by hand."""

    def __init__(self, sim: SimWorld, **told: Any) -> None:
        self.now_s = 100.0
        self.memo = Memo(sim.world.clock)
        self.store = Store(lambda: self.now_s, container_labels=cadvisor_labels)
        settings = PulseSettings(**told)
        self.intake = Intake(self.store, settings, clock=sim.world.clock, now=lambda: self.now_s, logger=self.memo.logger)

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


def test_containers_of_a_node_come_and_go_as_it_says(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    kept.intake.local((local("c1"), local("c2")))
    assert [entry.id for entry in kept.store.entries()] == ["c1", "c2"]
    entry = kept.store.get("c1")
    assert entry is not None
    assert entry.runtime == "isopod"
    assert b'namespace="isopod"' in entry.containers["container_cpu_usage_seconds_total"].text
    kept.intake.local((local("c2", cpu_s=2.0),))
    assert [entry.id for entry in kept.store.entries()] == ["c2"]


def test_a_machine_that_has_a_shim_is_left_to_it(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    kept.store.add(A)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    before = kept.family("container_cpu_usage_seconds_total")
    kept.intake.local((local(A.id, cpu_s=999.0),))
    assert kept.family("container_cpu_usage_seconds_total") == before
    kept.intake.local(())
    assert kept.store.get(A.id) is not None


def test_a_machine_whose_shim_is_found_later_is_handed_over_to_it(sim_world: SimWorld) -> None:
    kept = Kept(sim_world)
    kept.intake.local((local(A.id, cpu_s=999.0),))
    kept.intake.hand_over(A.id)
    kept.store.add(A)
    kept.intake.accept(A, body(1, 60.0), 0.01)
    threads = kept.family("kata_shim_threads")
    kept.intake.local((local(A.id, cpu_s=1000.0),))
    assert kept.family("kata_shim_threads") == threads
    assert "1000" not in kept.family("container_cpu_usage_seconds_total").rsplit(" ", 1)[1]
    kept.intake.hand_over("nobody")


def test_strictly_the_shims_answer_is_kept_as_it_is(sim_world: SimWorld) -> None:
    for strict in (False, True):
        kept = Kept(sim_world, strict_compat=strict)
        kept.store.add(A)
        kept.intake.accept(A, b"kata_x 1\nrubbish\n", 0.01)
        entry = kept.store.get(A.id)
        assert entry is not None
        assert entry.raw == (b"kata_x 1\nrubbish\n" if strict else None)
        assert sum(entry.dropped.values()) == 1
