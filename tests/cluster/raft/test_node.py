"""RaftNode on both Worlds, over a transport in memory."""

import asyncio
from collections.abc import Iterator

import pytest

from isopod.cluster.raft.core import ConfState
from isopod.cluster.raft.node import RaftNode
from isopod.cluster.raft.ports import Applied, ChangeKind, LeaderChanged, MemberChange, MembersChanged, SnapshotOffer
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.raft.snapshots import Snapshot, SnapshotHeader, crc_of, pack_snapshot
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world import errors
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.cluster.raft.core import wire
from tests.cluster.raft.support import CLUSTER, Cluster, Tally, until


@pytest.mark.row("B2")
async def test_a_single_node_leads_itself_and_takes_commands(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1)
    leader = await cluster.leader()
    assert await leader.node.propose(b"a") == 0
    assert await leader.node.propose(b"b") == 1
    assert leader.machine.values() == [b"a", b"b"]
    assert await leader.node.read_barrier() == leader.node.applied_index
    await cluster.close()


@pytest.mark.row("B3")
async def test_three_nodes_agree(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    leader = await cluster.leader()
    results = await asyncio.gather(*(leader.node.propose(b"%d" % number) for number in range(100)))
    assert sorted(results) == list(range(100))
    values = await cluster.equal()
    assert [values[result] for result in results] == [b"%d" % number for number in range(100)]
    statuses = [member.node.status() for member in cluster.members.values()]
    assert {(status.leader, status.term, status.voters, status.digest) for status in statuses} == {
        (leader.node.node_id, statuses[0].term, (1, 2, 3), leader.machine.digest())
    }
    await cluster.close()


@pytest.mark.row("B13")
async def test_a_restart_keeps_everything_and_applies_nothing_twice(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    for number in range(20):
        await cluster.propose(b"%d" % number)
    boots = cluster.members[1].node._driver.log.boot
    await cluster.equal()
    await cluster.close()
    await cluster.start(1, 2, 3)
    await cluster.propose(b"last")
    assert await cluster.equal() == [b"%d" % number for number in range(20)] + [b"last"]
    assert cluster.members[1].node._driver.log.boot == boots + 1
    await cluster.close()


@pytest.mark.row("B15")
async def test_a_lagging_follower_gets_a_snapshot(world: World, folder: str) -> None:
    settings = RaftSettings(snapshot_log_entries=50, keep_log_entries=10)
    cluster = Cluster(world, folder, settings=settings)
    await cluster.start(1, 2, 3)
    leader = await cluster.leader()
    behind = next(node_id for node_id in (1, 2, 3) if node_id != leader.node.node_id)
    await cluster.stop(behind)
    for number in range(200):
        await cluster.propose(b"%d" % number)
    await until(lambda: leader.node.status().first_index > 100)
    member = await cluster.add(behind, bootstrap=None)
    assert await cluster.equal() == [b"%d" % number for number in range(200)]
    assert member.machine.n_restores == 2  # its own, and the leader's
    await cluster.propose(b"after")
    assert (await cluster.equal())[-1] == b"after"
    await cluster.close()
    await cluster.start(1, 2, 3)
    assert (await cluster.equal())[-1] == b"after"
    await cluster.close()


@pytest.mark.row("B19")
async def test_members_come_and_go_one_at_a_time(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1)
    leader = await cluster.leader()
    await leader.node.propose(b"a")
    for node_id in (2, 3):
        await cluster.add(node_id, bootstrap=None)
        members = await leader.node.change_member(MemberChange(ChangeKind.ADD_LEARNER, node_id))
        assert node_id in members.learners
        await until(lambda: leader.node.status().peers[-1].match >= leader.node.applied_index)
        members = await leader.node.change_member(MemberChange(ChangeKind.PROMOTE, node_id))
        assert node_id in members.voters
        await leader.node.propose(b"%d" % node_id)
    assert await cluster.equal() == [b"a", b"2", b"3"]
    members = await leader.node.change_member(MemberChange(ChangeKind.REMOVE, 3))
    assert members.all() == (1, 2)
    await cluster.stop(3)
    await leader.node.propose(b"after")
    assert (await cluster.equal())[-1] == b"after"
    await cluster.close()


async def test_what_makes_no_sense_is_refused(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1)
    node = (await cluster.leader()).node
    with pytest.raises(errors.AlreadyExists):
        await node.change_member(MemberChange(ChangeKind.ADD_LEARNER, 1))
    with pytest.raises(errors.NotFound):
        await node.change_member(MemberChange(ChangeKind.PROMOTE, 7))
    with pytest.raises(errors.RefusedError, match="last voter"):
        await node.change_member(MemberChange(ChangeKind.REMOVE, 1))
    with pytest.raises(errors.NotFound):
        await node.transfer_leadership(5)
    with pytest.raises(errors.TooLarge):
        await node.propose(bytes(600 << 10))
    await node.change_member(MemberChange(ChangeKind.ADD_LEARNER, 2))
    with pytest.raises(errors.WrongState, match="not heard of"):
        await node.change_member(MemberChange(ChangeKind.PROMOTE, 2))
    await cluster.close()
    with pytest.raises(errors.NotStarted):
        await node.propose(b"x")
    with pytest.raises(errors.NotStarted):
        await node.read_barrier()


async def test_a_folder_belongs_to_one_node_of_one_cluster(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1)
    with pytest.raises(errors.InUse):
        await cluster.add(1, bootstrap=[1])
    await cluster.close()
    with pytest.raises(errors.IdentityConflict):
        await _open_as(cluster, f"{folder}/n1", 2, CLUSTER)
    with pytest.raises(errors.ForeignCluster):
        await _open_as(cluster, f"{folder}/n1", 1, "another")


@pytest.mark.row("B14")
async def test_a_node_that_does_not_run_says_so_and_lets_go_of_its_folder(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1)
    node = (await cluster.leader()).node
    with pytest.raises(errors.WrongState):
        await node.start()
    waiting = asyncio.ensure_future(node.propose(b"x"))
    await asyncio.sleep(0)
    await cluster.stop(1)
    await asyncio.gather(waiting, return_exceptions=True)
    await node.close()  # once more is fine
    for attempt in (
        node.propose(b"x"),
        node.read_barrier(),
        node.change_member(MemberChange(ChangeKind.ADD_LEARNER, 2)),
        node.transfer_leadership(),
        node.make_snapshot(),
    ):
        with pytest.raises(errors.NotStarted):
            await attempt
    await cluster.start(1)
    assert (await cluster.leader()).machine.values() in ([], [b"x"])
    await cluster.close()


async def test_the_lead_is_handed_over(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    old = await cluster.leader()
    events: list[object] = []
    old.node.subscribe(events.append)
    target = 1 + old.node.node_id % 3
    began = asyncio.get_running_loop().time()
    assert await old.node.transfer_leadership(target) == target
    assert asyncio.get_running_loop().time() - began < 1.0
    assert (await cluster.leader()).node.node_id == target
    assert any(isinstance(event, LeaderChanged) and event.leader == target for event in events)
    with pytest.raises(errors.NotLeader) as failure:
        await old.node.propose(b"x")
    assert failure.value.leader == target
    await cluster.close()


@pytest.mark.row("B20")
async def test_a_minority_commits_nothing_and_gives_way(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    old = await cluster.leader()
    await old.node.propose(b"before")
    cluster.network.isolate(old.node.node_id)
    lost = asyncio.ensure_future(old.node.propose(b"lost", timeout_s=5.0))
    rest = Cluster(world, folder, network=cluster.network)
    rest.members = {node_id: member for node_id, member in cluster.members.items() if member is not old}
    new = await rest.leader()
    assert new is not old
    await new.node.propose(b"kept")
    with pytest.raises((errors.LeadershipLost, errors.DeadlineExceeded)):
        await lost
    cluster.network.heal()
    assert await cluster.equal() == [b"before", b"kept"]
    await cluster.close()


async def test_reads_on_every_node_see_what_was_acknowledged(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    for number in range(10):
        await cluster.propose(b"%d" % number)
        for member in cluster.members.values():
            await member.node.read_barrier()
            assert member.machine.values()[-1] == b"%d" % number
    cluster.network.isolate(1)
    cluster.network.isolate(2)
    with pytest.raises(errors.DeadlineExceeded):
        await cluster.members[3].node.read_barrier(timeout_s=0.5)
    await cluster.close()


@pytest.mark.row("B16")
async def test_members_are_rebuilt_from_snapshot_and_log(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1)
    leader = (await cluster.leader()).node
    await leader.make_snapshot()
    at = leader.status().snapshot_index
    await leader.change_member(MemberChange(ChangeKind.ADD_LEARNER, 8))
    await leader.change_member(MemberChange(ChangeKind.ADD_LEARNER, 9))
    await leader.change_member(MemberChange(ChangeKind.REMOVE, 8))
    assert leader.status().snapshot_index == at, "nothing but the log knows of the changes"
    await cluster.close()
    await cluster.start(1)
    leader = (await cluster.leader()).node
    assert (leader.members().voters, leader.members().learners) == ((1,), (9,))
    await leader.make_snapshot()
    await cluster.close()
    await cluster.start(1)
    assert cluster.members[1].node.members().learners == (9,), "and now the snapshot"
    await cluster.close()


@pytest.mark.row("B5")
async def test_a_leader_that_is_to_go_hands_over_first(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    old = await cluster.leader()
    with pytest.raises(errors.NotLeader) as failure:
        await old.node.change_member(MemberChange(ChangeKind.REMOVE, old.node.node_id))
    new = await cluster.leader()
    assert failure.value.leader == new.node.node_id != old.node.node_id
    members = await new.node.change_member(MemberChange(ChangeKind.REMOVE, old.node.node_id))
    assert old.node.node_id not in members.all()
    await cluster.stop(old.node.node_id)
    await new.node.propose(b"after")
    await cluster.close()


@pytest.mark.row("B19")
async def test_one_change_at_a_time_and_none_that_ends_the_quorum(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    leader = (await cluster.leader()).node
    await leader.propose(b"a")
    others = [node_id for node_id in (1, 2, 3) if node_id != leader.node_id]
    both = [leader.change_member(MemberChange(ChangeKind.ADD_LEARNER, node_id)) for node_id in (4, 5)]
    found = await asyncio.gather(*both, return_exceptions=True)
    [refused] = [each for each in found if isinstance(each, BaseException)]
    assert isinstance(refused, errors.InUse)
    [learner] = leader.members().learners
    await cluster.stop(others[0])
    await asyncio.sleep(0.5)
    with pytest.raises(errors.WrongState, match="1 of the 2 other voters"):
        await leader.change_member(MemberChange(ChangeKind.REMOVE, others[1]))
    with pytest.raises(errors.WrongState, match="not heard of"):
        await leader.transfer_leadership(others[0])
    members = await leader.change_member(MemberChange(ChangeKind.REMOVE, others[0]))
    assert others[0] not in members.all(), "the dead one may go"
    with pytest.raises(errors.AlreadyExists):
        await leader.change_member(MemberChange(ChangeKind.PROMOTE, others[1]))
    with pytest.raises(errors.AlreadyExists):
        await leader.change_member(MemberChange(ChangeKind.DEMOTE, learner))
    await cluster.close()


async def test_a_learner_that_is_behind_is_not_promoted(world: World, folder: str) -> None:
    cluster = Cluster(world, folder, settings=RaftSettings(caught_up_entries=5))
    await cluster.start(1)
    leader = (await cluster.leader()).node
    await leader.change_member(MemberChange(ChangeKind.ADD_LEARNER, 2))
    await cluster.add(2, bootstrap=None)
    await cluster.equal()
    cluster.network.cut(1, 2)  # it hears nothing, and is still heard
    for number in range(20):
        await leader.propose(b"%d" % number)
    with pytest.raises(errors.WrongState):
        await leader.change_member(MemberChange(ChangeKind.PROMOTE, 2))
    cluster.network.heal()
    await cluster.equal()
    await until(
        lambda: [peer.match for peer in leader.status().peers] == [leader.status().last_index]
    )  # the leader has heard that it caught up
    assert (await leader.change_member(MemberChange(ChangeKind.PROMOTE, 2))).voters == (1, 2)
    await cluster.close()


async def test_a_change_that_cannot_be_agreed_on_ends_at_its_deadline(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    leader = (await cluster.leader()).node
    await leader.propose(b"a")
    cluster.network.isolate(leader.node_id)
    with pytest.raises((errors.DeadlineExceeded, errors.LeadershipLost)):
        await leader.change_member(MemberChange(ChangeKind.ADD_LEARNER, 4), timeout_s=0.05)
    cluster.network.heal()
    await cluster.close()


async def test_events_tell_all_that_is_applied(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1)
    leader = (await cluster.leader()).node
    events: list[object] = []
    stop = leader.subscribe(events.append)
    await leader.propose(b"a")
    await leader.change_member(MemberChange(ChangeKind.ADD_LEARNER, 2))
    stop()
    await leader.propose(b"b")
    applied = [event for event in events if isinstance(event, Applied)]
    assert [event.kind for event in applied] == [0, 1]
    assert [event.index for event in applied] == [applied[0].index, applied[0].index + 1]
    assert any(isinstance(event, MembersChanged) and event.members.learners == (2,) for event in events)
    await cluster.close()


async def test_settings_that_cannot_work_are_refused(world: World, folder: str) -> None:
    for settings in (
        RaftSettings(heartbeat_s=0.2),
        RaftSettings(command_bytes_max=1 << 20),
        RaftSettings(message_bytes_max=1 << 20),
        RaftSettings(entry_bytes_max=300 << 10),
        RaftSettings(proposals_max=0),
    ):
        with pytest.raises(errors.InvalidArgument):
            settings.check()
    RaftSettings().check()
    cluster = Cluster(world, folder)
    for node_id, bootstrap in ((0, [0]), (1, [2]), (1, [1, 1]), (1, [])):
        with pytest.raises(errors.InvalidArgument):
            await cluster.add(node_id, bootstrap=bootstrap)


async def _open_as(cluster: Cluster, path: str, node_id: int, cluster_id: str) -> None:
    await RaftNode.open(
        cluster.world,
        path,
        node_id=node_id,
        cluster_id=cluster_id,
        machine=Tally(),
        transport=cluster.network.transport(),
        settings=RaftSettings(),
        bootstrap=[node_id],
        logger=Logger(cluster.lines.append, cluster.world.clock),
        metrics=Registry(),
    )


async def test_a_snapshot_that_the_core_has_no_use_for_is_not_kept(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1, 2, 3)
    await cluster.propose(b"a")
    await cluster.equal()
    driver = cluster.members[1].node._driver
    old = Snapshot(SnapshotHeader(CLUSTER, 1, 1, driver.conf_state, 0), bytes(1000))
    driver.step_snapshot(2, old, wire.snapshot(2, 1, term=1, index=1, voters=bytes((1, 2, 3))))
    await until(lambda: not driver.received)
    await cluster.propose(b"b")
    await cluster.close()


async def test_a_snapshot_whose_message_says_another_index_is_not_received(world: World, folder: str) -> None:
    """The core would take what nobody received, and that ends the process."""
    cluster = Cluster(world, folder)
    await cluster.start(1)
    await cluster.leader()
    snapshotter = cluster.members[1].node._snapshotter
    lie = wire.snapshot(2, 1, term=9, index=99, voters=bytes((1, 2)))
    for offer in (SnapshotOffer(lie, 1, 1, 100, 0), SnapshotOffer(lie, 98, 9, 100, 0), SnapshotOffer(b"\xff", 99, 9, 100, 0)):
        with pytest.raises(errors.InvalidArgument, match="its message"):
            await snapshotter.receive(2, offer)
    with pytest.raises(errors.InvalidArgument, match="by node 2"):
        await snapshotter.receive(3, SnapshotOffer(lie, 99, 9, 100, 0))
    # What it is of is looked at again when the file is there.
    file = pack_snapshot(Snapshot(SnapshotHeader(CLUSTER, 99, 8, ConfState(voters=(1, 2)), 0), b"x"))
    receiver = await snapshotter.receive(2, SnapshotOffer(lie, 99, 9, len(file), crc_of(file)))
    await receiver.write(file)
    with pytest.raises(errors.InvalidArgument, match="its file is of"):
        await receiver.finish()
    assert await cluster.propose(b"a") == 0
    await cluster.close()


async def test_a_machine_that_cannot_be_restored_lets_go_of_the_folder(world: World, folder: str) -> None:
    cluster = Cluster(world, folder)
    await cluster.start(1)
    await cluster.propose(b"a")
    await cluster.close()

    class Broken(Tally):
        def restore(self, data: bytes) -> None:
            raise errors.BadRecord("snapshot", "it is of other limits")

    async def open_with(machine: Tally) -> RaftNode:
        return await RaftNode.open(
            world,
            f"{folder}/n1",
            node_id=1,
            cluster_id=CLUSTER,
            machine=machine,
            transport=cluster.network.transport(),
            settings=RaftSettings(),
            bootstrap=None,
            logger=Logger(cluster.lines.append, world.clock),
            metrics=Registry(),
        )

    with pytest.raises(errors.BadRecord, match="other limits"):
        await open_with(Broken())
    node = await open_with(Tally())
    await node.close()


async def test_a_large_machine_is_packed_between_other_things(sim_world: SimWorld, folder: str) -> None:
    """Each piece is a turn of the loop in which heartbeats are answered."""
    cluster = Cluster(sim_world.world, folder)
    await cluster.start(1)
    await cluster.leader()
    node = cluster.members[1].node
    turns = [0]

    class Large(Tally):
        def capture(self) -> Iterator[bytes]:
            whole = self.snapshot()
            for _ in range(50):
                seen.append(turns[0])
                yield b""
            yield whole

    seen: list[int] = []

    async def count() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    node._driver.machine = Large()
    counting = asyncio.create_task(count())
    await node.propose(b"a")
    index = await node.make_snapshot()
    counting.cancel()
    assert index == node.applied_index
    assert len(dict.fromkeys(seen)) > 25, "others had their turn in between"
    await cluster.close()
    await cluster.start(1)
    assert cluster.members[1].machine.values() == [b"a"]
    await cluster.close()


@pytest.mark.row("B19")
async def test_a_quiet_node_does_not_lead_alone(sim_world: SimWorld, folder: str) -> None:
    """As a joiner may be shown a snapshot of the days in which its id was the only voter: it must not believe that it still is."""
    cluster = Cluster(sim_world.world, folder)
    node = (await cluster.add(1, bootstrap=(1,), is_quiet=True)).node
    await asyncio.sleep(10.0)
    assert (node.is_leader, node.status(with_digest=False).term) == (False, 1)
    await node.trust()
    await cluster.leader()
    await cluster.close()


@pytest.mark.row("B19")
async def test_a_quiet_node_gives_no_vote(sim_world: SimWorld, folder: str) -> None:
    cluster = Cluster(sim_world.world, folder)
    for node_id in (1, 2, 3):
        await cluster.add(node_id, bootstrap=(1, 2, 3), is_quiet=node_id != 1)
    await asyncio.sleep(10.0)
    assert [member.node.leader for member in cluster.members.values()] == [0, 0, 0]
    await cluster.members[3].node.trust()
    leader = (await cluster.leader()).node
    await leader.propose(b"also without votes the log is followed")
    assert await cluster.equal() == [b"also without votes the log is followed"]
    await cluster.close()
