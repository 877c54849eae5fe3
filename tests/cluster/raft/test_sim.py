"""Three nodes on simulated machines, over the real transport: single faults, each with what must follow."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from isopod.cluster.raft.ports import ChangeKind, MemberChange
from isopod.cluster.raft.settings import RaftSettings
from isopod.journal import JournalSettings
from isopod.world import errors
from isopod.world.sim.fabric import LinkQuality
from tests.cluster.raft.sim_support import SimNodes

Run = Callable[..., SimNodes]


@pytest.fixture
def make() -> Iterator[Run]:
    """Make clusters, and close them."""
    made: list[SimNodes] = []

    def start(seed: int = 1, n: int = 3, **more: Any) -> SimNodes:
        journal = more.pop("journal", None)
        made.append(SimNodes(seed, n, **more))
        made[-1].journal = journal
        made[-1].start()
        return made[-1]

    yield start
    for sim in made:
        sim.close()


def run(sim: SimNodes, body: Coroutine[Any, Any, None]) -> None:
    sim.cluster.run(body)


@pytest.mark.row("B12")
@pytest.mark.parametrize("seed", range(5))
def test_the_death_of_the_leader_loses_nothing_and_is_noticed_at_once(make: Run, seed: int) -> None:
    sim = make(seed)

    async def body() -> None:
        leader = await sim.wait_leader()
        await asyncio.sleep(1.0)
        for number in range(20):
            await leader.node.propose(b"%d" % number)
        killed_at = sim.loop.time()
        sim.kill(leader.node.node_id)
        new = await sim.wait_leader()
        assert sim.loop.time() - killed_at < 0.15, "its closed connections say that it is dead"
        await new.node.propose(b"after")
        sim.start(leader.node.node_id)
        await sim.wait(lambda: len(sim.running) == 3)
        assert await sim.equal() == [b"%d" % number for number in range(20)] + [b"after"]

    run(sim, body())


@pytest.mark.row("B13")
def test_all_machines_lose_power_at_once(make: Run) -> None:
    sim = make(2)

    async def body() -> None:
        leader = await sim.wait_leader()
        acknowledged = []
        for number in range(50):
            await leader.node.propose(b"%d" % number)
            acknowledged.append(b"%d" % number)
        for node_id in (1, 2, 3):
            sim.power_cut(node_id)
        await asyncio.sleep(0.5)
        sim.start()
        await sim.wait(lambda: len(sim.running) == 3)
        await (await sim.wait_leader()).node.propose(b"after")
        assert await sim.equal() == [*acknowledged, b"after"]

    run(sim, body())


@pytest.mark.row("B20")
def test_a_leader_that_nobody_hears_steps_down_and_its_writes_are_refused(make: Run) -> None:
    sim = make(3)

    async def body() -> None:
        old = await sim.wait_leader()
        await asyncio.sleep(0.5)
        sim.fabric.isolate(sim.host(old.node.node_id))
        lost = asyncio.ensure_future(old.node.propose(b"lost", timeout_s=3.0))
        await sim.wait(lambda: not old.node.is_leader, 2.0)
        with pytest.raises((errors.LeadershipLost, errors.DeadlineExceeded)):
            await lost
        with pytest.raises(errors.NotLeader):
            await old.node.propose(b"refused")
        with pytest.raises(errors.DeadlineExceeded):
            await old.node.read_barrier(timeout_s=1.0)
        await sim.wait(lambda: sim.leader() not in {None, old})
        new = sim.leader()
        assert new is not None
        await new.node.propose(b"kept")
        sim.fabric.heal()
        assert await sim.equal() == [b"kept"]

    run(sim, body())


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_is_not_heard_but_hears_disturbs_nobody(make: Run, seed: int) -> None:
    sim = make(seed)

    async def body() -> None:
        leader = await sim.wait_leader()
        await asyncio.sleep(1.0)
        term = leader.node.status().term
        deaf = next(node_id for node_id in (1, 2, 3) if node_id != leader.node.node_id)
        sim.fabric.cut(sim.host(leader.node.node_id), sim.host(deaf))  # it hears the leader no more, and stands again and again
        for number in range(20):
            await leader.node.propose(b"%d" % number)
            await asyncio.sleep(0.2)
        assert leader.node.is_leader
        assert leader.node.status().term == term, "pre-votes move no term"
        sim.fabric.heal()
        await sim.equal()
        assert leader.node.status().term == term

    run(sim, body())


def test_no_election_on_a_healthy_cluster_under_load(make: Run) -> None:
    sim = make(4)

    async def body() -> None:
        leader = await sim.wait_leader()
        await asyncio.sleep(0.5)
        term = leader.node.status().term
        ends_at = sim.loop.time() + 8.0

        async def client() -> None:
            while sim.loop.time() < ends_at:
                await leader.node.propose(b"x")
                await asyncio.sleep(0.01)

        await asyncio.gather(*(client() for _ in range(4)))
        assert leader.node.status().term == term
        assert leader.node.is_leader

    run(sim, body())


def test_a_stopped_leader_is_replaced_and_gives_way_when_it_goes_on(make: Run) -> None:
    sim = make(5)

    async def body() -> None:
        old = await sim.wait_leader()
        await asyncio.sleep(0.5)
        sim.handles[old.node.node_id].hang()
        others = {node_id: running for node_id, running in sim.running.items() if running is not old}
        await sim.wait(lambda: any(running.node._driver.is_serving for running in others.values()), 2.0)
        new = next(running for running in others.values() if running.node.is_leader)
        await new.node.propose(b"kept")
        sim.handles[old.node.node_id].resume()
        assert await sim.equal() == [b"kept"]
        assert new.node.is_leader, "the old one does not take its own pause for our silence"

    run(sim, body())


def test_a_stopped_follower_disturbs_nobody_when_it_goes_on(make: Run) -> None:
    sim = make(6)

    async def body() -> None:
        leader = await sim.wait_leader()
        await asyncio.sleep(0.5)
        term = leader.node.status().term
        follower = next(node_id for node_id in (1, 2, 3) if node_id != leader.node.node_id)
        for _ in range(5):
            sim.handles[follower].hang()
            await asyncio.sleep(1.0)
            sim.handles[follower].resume()
            await asyncio.sleep(0.5)
        await leader.node.propose(b"x")
        assert leader.node.status().term == term
        assert await sim.equal() == [b"x"]

    run(sim, body())


def test_slow_disks_slow_down_and_break_nothing(make: Run) -> None:
    sim = make(7)

    async def body() -> None:
        leader = await sim.wait_leader()
        for host in sim.cluster.hosts:
            host.disk.faults.delay_s = (0.05, 0.3)
        term = leader.node.status().term
        await asyncio.gather(*(leader.node.propose(b"%d" % number) for number in range(50)))
        assert leader.node.status().term == term
        assert len(await sim.equal()) == 50

    run(sim, body())


def test_a_slow_lossy_network_breaks_nothing(make: Run) -> None:
    sim = make(8)

    async def body() -> None:
        sim.fabric.set_all(LinkQuality(latency_s=(0.001, 0.02), loss=0.02, reordering=0.1))
        await sim.wait_leader()
        done = 0
        while done < 50:
            leader = await sim.wait_leader()
            try:
                await leader.node.propose(b"%d" % done, timeout_s=5.0)
                done += 1
            except errors.IsopodError:
                await asyncio.sleep(0.05)
        sim.fabric.set_all(LinkQuality())
        assert set(await sim.equal()) == {b"%d" % number for number in range(50)}

    run(sim, body())


def test_a_follower_reads_over_a_line_longer_than_its_patience(make: Run) -> None:
    """Each round takes longer than the pause after which it is asked again: the answer to the first one counts."""
    sim = make(11)

    async def body() -> None:
        leader = await sim.wait_leader()
        follower = next(each for each in sim.running.values() if each.node is not leader.node)
        await leader.node.propose(b"x")
        sim.fabric.set_all(LinkQuality(latency_s=(0.06, 0.1)))
        for _ in range(10):
            began = sim.loop.time()
            assert await follower.node.read_barrier(timeout_s=2.0) >= 2
            assert sim.loop.time() - began < 1.0

    run(sim, body())


@pytest.mark.row("B15")
def test_a_follower_far_behind_catches_up_by_a_streamed_snapshot(make: Run) -> None:
    sim = make(9, settings=RaftSettings(snapshot_log_entries=60, keep_log_entries=10))

    async def body() -> None:
        leader = await sim.wait_leader()
        behind = next(node_id for node_id in (1, 2, 3) if node_id != leader.node.node_id)
        sim.kill(behind)
        for number in range(200):
            await leader.node.propose(b"%d" % number + bytes(5000))
        assert leader.node.status().first_index > 50
        sim.start(behind)
        await sim.wait(lambda: behind in sim.running)
        assert [value[:3].rstrip(b"\0") for value in await sim.equal()] == [b"%d" % number for number in range(200)]
        assert sim.running[behind].machine.n_restores >= 2

    run(sim, body())


def test_a_broken_snapshot_stream_goes_on_where_it_stopped(make: Run) -> None:
    sim = make(10, settings=RaftSettings(snapshot_log_entries=60, keep_log_entries=10))

    async def body() -> None:
        leader = await sim.wait_leader()
        behind = next(node_id for node_id in (1, 2, 3) if node_id != leader.node.node_id)
        sim.kill(behind)
        for number in range(100):
            await leader.node.propose(b"%03d" % number + bytes(100_000))
        a, b = sim.host(leader.node.node_id), sim.host(behind)
        sim.fabric.set_link(a, b, LinkQuality(bytes_per_s=4e6))
        sim.start(behind)
        await sim.wait(lambda: behind in sim.running)
        receiver = sim.running[behind].node._snapshotter
        await sim.wait(lambda: receiver._receiving is not None and receiver._receiving.offset > 1_000_000)
        sim.fabric.reset(a, b)
        await sim.wait(lambda: receiver._receiving is None)
        await sim.wait(lambda: receiver._receiving is not None and receiver._receiving.offset > 0)
        again = receiver._receiving
        assert again is not None
        assert again.offset > 1_000_000, "what came is not sent again"
        assert leader.node.is_leader, "heartbeats do not wait behind a snapshot"
        assert len(await sim.equal()) == 100

    run(sim, body())


@pytest.mark.row("B19")
def test_joining_and_leaving_while_commands_flow(make: Run) -> None:
    sim = make(11, 5, n_first=1)

    async def body() -> None:
        leader = await sim.wait_leader()
        stop = asyncio.Event()

        async def client() -> int:
            n = 0
            while not stop.is_set():
                try:
                    current = await sim.wait_leader()
                    await current.node.propose(b"%d" % n)
                    n += 1
                except errors.IsopodError:
                    await asyncio.sleep(0.01)
            return n

        task = asyncio.ensure_future(client())
        for node_id in (2, 3, 4, 5):
            sim.start(node_id, bootstrap=False)
            await sim.wait(lambda node_id=node_id: node_id in sim.running)  # type: ignore[misc]
            leader = await sim.wait_leader()
            await leader.node.change_member(MemberChange(ChangeKind.ADD_LEARNER, node_id))
            while True:
                try:
                    await leader.node.change_member(MemberChange(ChangeKind.PROMOTE, node_id))
                    break
                except errors.WrongState:
                    await asyncio.sleep(0.05)
        assert leader.node.members().voters == (1, 2, 3, 4, 5)
        await asyncio.sleep(0.5)
        for node_id in (1, 2):
            while True:
                leader = await sim.wait_leader()
                try:
                    await leader.node.change_member(MemberChange(ChangeKind.REMOVE, node_id))
                    break
                except errors.NotLeader:
                    await asyncio.sleep(0.05)
            sim.kill(node_id)
        assert leader.node.members().all() == (3, 4, 5)
        await asyncio.sleep(0.5)
        stop.set()
        n = await task
        values = await sim.equal()
        assert len(values) >= n > 50

    run(sim, body())


@pytest.mark.row("B17")
def test_messages_for_an_absent_peer_wait_and_are_delivered(make: Run) -> None:
    sim = make(12)

    async def body() -> None:
        leader = await sim.wait_leader()
        absent = next(node_id for node_id in (1, 2, 3) if node_id != leader.node.node_id)
        link = leader.transport._links[absent]
        sim.kill(absent)
        await sim.wait(lambda: not link.state().is_connected)
        link.send([b"\x08\x08kept"])
        await asyncio.sleep(0.3)
        assert link.state().n_queued > 0
        sim.start(absent)
        await sim.wait(lambda: link.state().is_connected)
        assert link.state().n_queued == 0

    run(sim, body())


@pytest.mark.parametrize("kind", ["follower", "leader"])
def test_a_full_disk_is_told_and_passes(make: Run, kind: str) -> None:
    sim = make(13, journal=JournalSettings(segment_bytes=3 << 20, compress=False, archive_n_max=0))

    async def body() -> None:
        leader = await sim.wait_leader()
        await asyncio.sleep(0.2)
        follower = next(node_id for node_id in (1, 2, 3) if node_id != leader.node.node_id)
        victim = leader.node.node_id if kind == "leader" else follower
        disk = sim.host(victim).disk
        disk.faults.fill()
        acknowledged: list[bytes] = []
        sizes = bytes(100_000)
        for number in range(100):  # more than the space that is allocated ahead
            command = b"%03d" % number
            while True:
                try:
                    current = await sim.wait_leader()
                    await current.node.propose(command + sizes, timeout_s=5.0)
                    acknowledged.append(command)
                    break
                except errors.DiskFull as error:
                    assert error.hint
                    await asyncio.sleep(0.05)
                except (errors.NotLeader, errors.Exhausted):
                    await asyncio.sleep(0.05)
                except errors.LeadershipLost:
                    break  # it may be there, or not
        assert sim.running[victim].node._driver.log.is_full
        disk.capacity_bytes = 1 << 40
        values = [value[:3] for value in await sim.equal(120.0)]
        assert [value for value in values if value in acknowledged] == acknowledged
        assert len(values) <= len(acknowledged) + 1
        assert not sim.running[victim].node._driver.log.is_full

    run(sim, body())
