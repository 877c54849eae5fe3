"""A node that dies at any failpoint comes back with everything it had promised (B26)."""

import asyncio

import pytest

from isopod.cluster.raft.settings import RaftSettings
from isopod.world import errors
from tests.cluster.raft.sim_support import SimNodes

RAFT = ("raft.before_step", "raft.before_append", "raft.before_send", "raft.before_apply", "raft.before_snapshot", "network.before_send")
JOURNAL = ("journal.before_write", "journal.after_write", "journal.before_compact", "journal.after_compact", "journal.before_rotate")
SETTINGS = RaftSettings(snapshot_log_entries=40, keep_log_entries=10)
pytestmark = [pytest.mark.row("B26"), pytest.mark.row("B13")]


async def load(sim: SimNodes, n: int, first: int = 0, size: int = 0) -> list[bytes]:
    """Propose until so many are acknowledged; return those."""
    done: list[bytes] = []
    number = first
    while len(done) < n:
        leader = await sim.wait_leader()
        command = b"%d" % number
        number += 1
        try:
            await leader.node.propose(command + bytes(size), timeout_s=3.0)
            done.append(command)
        except (errors.IsopodError, asyncio.CancelledError):
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            await asyncio.sleep(0.02)
    return done


@pytest.mark.parametrize("name", [*RAFT, *JOURNAL, "raft.before_propose"])
@pytest.mark.parametrize("hit", [1, 7])
def test_death_at_a_failpoint_loses_nothing(name: str, hit: int) -> None:
    sim = SimNodes(hit, 3, settings=SETTINGS)
    rare = name in {"raft.before_snapshot", "journal.before_compact", "journal.after_compact", "journal.before_rotate"}
    size = 100_000 if name == "journal.before_rotate" else 100 if rare else 0

    async def body() -> None:
        sim.start()
        leader = await sim.wait_leader()
        await sim.wait(lambda: len(sim.running) == 3)
        victim = leader.node.node_id if hit == 1 or name == "raft.before_propose" else 1 + leader.node.node_id % 3
        done = await load(sim, 10, size=size)
        handle = sim.handles[victim]
        sim.host(victim).failpoints.set(name, f"nth({1 if rare else hit}):panic")
        task = asyncio.ensure_future(load(sim, 250 if rare else 60, first=100, size=size))
        await sim.wait(lambda: not handle.is_alive, 60.0)
        assert handle.aborted is not None
        assert name in handle.aborted
        sim.host(victim).failpoints.clear()
        sim.kill(victim)
        await asyncio.sleep(0.3)
        sim.start(victim)
        await sim.wait(lambda: victim in sim.running)
        if rare:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            done += await task
        await load(sim, 1, first=10_000)
        values = [value.rstrip(b"\0") for value in await sim.equal()]
        assert len(values) == len(set(values))
        assert [value for value in values if value in done] == done

    try:
        sim.cluster.run(body())
    finally:
        sim.close()


@pytest.mark.parametrize("name", ["raft.before_append", "raft.before_apply"])
def test_a_failure_between_core_and_disk_ends_the_process(name: str) -> None:
    sim = SimNodes(1, 1)

    async def body() -> None:
        sim.start()
        leader = await sim.wait_leader()
        handle = sim.handles[1]
        sim.host(1).failpoints.set(name, "error(EIO)")
        await asyncio.gather(leader.node.propose(b"x", timeout_s=1.0), return_exceptions=True)
        await sim.wait(lambda: not handle.is_alive)
        assert handle.aborted is not None
        assert "injected" in handle.aborted

    try:
        sim.cluster.run(body())
    finally:
        sim.close()


def test_a_failing_sync_ends_the_process_and_nothing_acknowledged_is_lost() -> None:
    sim = SimNodes(5, 3)

    async def body() -> None:
        sim.start()
        leader = await sim.wait_leader()
        done = await load(sim, 20)
        victim = leader.node.node_id
        handle = sim.handles[victim]
        sim.host(victim).disk.faults.fail_next("sync")
        sim.host(victim).disk.faults.fail_next("write")
        more = asyncio.ensure_future(load(sim, 20, first=100))
        await sim.wait(lambda: not handle.is_alive)
        assert handle.aborted is not None
        assert "journal" in handle.aborted
        sim.host(victim).disk.faults.clear()
        sim.kill(victim)
        sim.start(victim)
        done += await more
        await sim.wait(lambda: victim in sim.running)
        values = await sim.equal()
        assert [value for value in values if value in done] == done

    try:
        sim.cluster.run(body())
    finally:
        sim.close()


def test_a_snapshot_that_cannot_be_made_is_tried_again() -> None:
    sim = SimNodes(6, 1, settings=SETTINGS)

    async def body() -> None:
        sim.start()
        leader = await sim.wait_leader()
        sim.host(1).failpoints.set("raft.before_snapshot", "nth(1):error(ENOSPC)")
        await load(sim, 100)
        assert any(b"raft.snapshot_failed" in line for line in sim.lines)
        assert leader.node.status().snapshot_index == 1
        await asyncio.sleep(10.0)
        await load(sim, 5, first=1000)
        await sim.wait(lambda: leader.node.status(with_digest=False).snapshot_index > 1)

    try:
        sim.cluster.run(body())
    finally:
        sim.close()
