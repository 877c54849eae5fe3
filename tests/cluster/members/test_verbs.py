"""The verbs about members: join, leave, promote, demote, transfer, and what is refused."""

import asyncio

import pytest

from isopod.api import cluster as c
from isopod.cluster.members import events as e
from isopod.world.errors import AlreadyExists, IdentityConflict, InvalidArgument, NotFound, NotStarted, RefusedError, WrongState
from isopod.world.world import World
from tests.cluster.members.rig import TOKEN, rig_of, until


@pytest.mark.row("B4")
async def test_joining_at_a_follower_is_led_to_the_leader(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        await rig.form(3)
        follower = rig.others()[0]
        fourth = await rig.join(4, follower)
        await until(lambda: fourth.status().voters == (1, 2, 3, 4), "it votes")
        assert sorted(peer.node_id for peer in fourth.book.all()) == [1, 2, 3, 4]


@pytest.mark.row("B4")
async def test_ids_and_addresses_are_nobody_elses(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        first = await rig.found()
        with pytest.raises(InvalidArgument, match="must be non-zero"):
            rig.make(0)
        with pytest.raises(InvalidArgument, match="cannot be empty"):
            rig.make(2, bind="")
        await rig.join(2, first)
        with pytest.raises(IdentityConflict, match="Node 2 already exists in cluster"):
            await rig.join(2, first, data_dir=f"{folder}/elsewhere")
        with pytest.raises(AlreadyExists, match="node at already exists"):
            await rig.join(3, first, advertise=first.advertised)


@pytest.mark.row("B5")
@pytest.mark.row("B19")
async def test_leaving_takes_a_node_out_everywhere(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        nodes = await rig.form(3)
        leader, (asked, gone) = rig.leader(), rig.others()
        told: list[e.Event] = []
        leader.members.subscribe(told.append)
        gone_id = gone.config.node_id
        changed = await asked.members.leave(gone_id)
        assert changed.message == f"Node {gone_id} successfully removed from cluster"
        left = [node for node in nodes if node is not gone]
        await until(lambda: all(gone_id not in node.status().voters for node in left), "it votes nowhere any more")
        # The list of members is a record of its own, written after the configuration: a follower learns of it a moment later.
        await until(lambda: all(gone_id not in [entry.id for entry in node.status().nodes] for node in left), "it is listed nowhere")
        assert e.NodeLeft(gone_id) in told
        await left[0].store.put("color", b"red")
        with pytest.raises(IdentityConflict, match="no member any more"):
            await asyncio.wait_for(gone.failed, 20)
        await gone.stop()
        with pytest.raises(IdentityConflict, match="no member any more"):
            await rig.make(gone_id, bind=gone.advertised).start()
        assert (await asked.members.leave(gone_id)).success  # asked for once more


@pytest.mark.row("B5")
async def test_the_leader_itself_can_be_taken_out_by_another(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        nodes = await rig.form(3)
        leader, asked = rig.leader(), rig.others()[0]
        leader_id = leader.config.node_id
        await asked.members.leave(leader_id)
        left = [node for node in nodes if node is not leader]
        await until(lambda: all(leader_id not in node.status().voters for node in left), "it is gone")
        await asked.store.put("color", b"red")


@pytest.mark.row("B5")
async def test_self_the_last_voter_and_strangers_are_not_taken_out(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        first = await rig.found()
        with pytest.raises(RefusedError, match="Cannot remove self from cluster"):
            await first.members.leave(1)
        learner = await rig.join(2, first, role="learner")
        with pytest.raises(RefusedError, match="Cannot remove node 1 - would leave cluster with no voters"):
            await learner.members.leave(1)
        with pytest.raises(RefusedError, match="Cannot demote node 1"):
            await first.members.demote(1)
        with pytest.raises(NotFound, match="Node 7 not found in cluster configuration"):
            await first.members.leave(7)
        with pytest.raises(NotFound, match="Node 7"):
            await first.members.promote(7)


@pytest.mark.row("B5")
async def test_who_is_needed_for_a_quorum_stays(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        await rig.form(3)
        leader, (other, dead) = rig.leader(), rig.others()
        await dead.stop()
        dead_id = dead.config.node_id
        await until(lambda: leader.members.registry.health(dead_id) == "failed", "it is taken for dead")
        with pytest.raises(WrongState, match="short of voters that are alive"):
            await leader.members.leave(other.config.node_id)
        await leader.members.leave(dead_id)
        assert len(leader.status().voters) == 2


@pytest.mark.row("B19")
async def test_learners_are_promoted_and_voters_demoted_on_request(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        first = await rig.found()
        second = await rig.join(2, first, role="learner")
        assert (first.status().voters, first.status().learners) == ((1,), (2,))
        assert (await second.members.promote(2)).message == "Node 2 votes"
        await until(lambda: second.status().voters == (1, 2), "it votes")
        await second.members.transfer(2)
        assert (await second.members.demote(2)).success  # it leads: leadership is handed over first
        await until(lambda: first.status().voters == (1,) and first.status().state == "leader", "node 1 votes alone")
        await second.store.put("color", b"red")
        assert second.status().state == "learner"


@pytest.mark.row("B19")
async def test_there_is_room_for_so_many_voters_only(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        first = await rig.found(voters_max=1)
        await rig.join(2, first)
        third = await rig.join(3, first)
        assert third.status().voters == (1,)
        with pytest.raises(WrongState, match="full: 1 of at most 1 vote"):
            await third.members.promote(3)
        await until(lambda: third.status().learners == (2, 3), "the others learn")


async def test_leadership_is_handed_over(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        nodes = await rig.form(3)
        before = rig.leader()
        target = rig.others()[1].config.node_id
        asked = rig.others()[0]
        assert (await asked.members.transfer(target)).message == f"Node {target} leads"
        await until(lambda: all(node.status().leader_id == target for node in nodes), "all know it")
        assert (await before.members.transfer(target)).success
        with pytest.raises(NotFound, match="voter: 9"):
            await before.members.transfer(9)


@pytest.mark.row("B18")
async def test_without_a_quorum_verbs_end_at_their_deadline(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        await rig.form(3)
        left, (one, two) = rig.leader(), rig.others()
        await one.stop()
        await two.stop()
        await until(lambda: left.status().leader_id == 0, "it sees that nobody leads")
        with pytest.raises(WrongState, match="without a leader"):
            await left.members.transfer(timeout_s=0.5)
        assert left.status().failures_survived == -1
        assert "more than half" in left.status().why


@pytest.mark.row("B33")
async def test_a_node_that_waits_is_told_whom_to_join(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        first = await rig.found()
        waiting = rig.make(2, init="secondary")
        await waiting.start()
        assert "waits to be told" in waiting.status().why
        with pytest.raises(RefusedError, match="knows no such token"):
            await waiting.join_now(first.advertised, "another-secret-0123456789ab", timeout_s=10)
        with pytest.raises(RefusedError, match="it is not 24 to 512"):
            await waiting.join_now(first.advertised, "short", timeout_s=10)
        await waiting.join_now(first.advertised, TOKEN, timeout_s=20)
        assert waiting.cluster_id == first.cluster_id
        with pytest.raises(WrongState, match="a member of cluster"):
            await waiting.join_now(first.advertised, TOKEN, timeout_s=10)


async def test_how_many_vote_is_changed_while_it_runs(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        nodes = await rig.form(3, voters_max=3)
        fourth = await rig.join(4, nodes[0])
        fifth = await rig.join(5, nodes[0])
        assert fourth.status().learners == (4, 5)
        leader = rig.leader()
        with pytest.raises(WrongState, match="full: 3 of at most 3 vote"):
            await leader.members.promote(4)
        changed = await fifth.members.set_voters_max(5)
        assert changed.message == "At most 5 nodes vote"
        await until(lambda: len(leader.status().voters) == 5, "who waited for room votes")
        await leader.members.set_voters_max(1)
        await until(lambda: leader.status().voters == (leader.config.node_id,), "the leader votes alone")
        assert leader.status().voters_max == 1
        with pytest.raises(InvalidArgument, match="1, 3, 5 or 7"):
            await leader.members.set_voters_max(4)
        await leader.store.put("color", b"red")


@pytest.mark.row("B18")
async def test_who_does_not_know_the_leaders_address_says_so_and_not_that_the_node_is_none(world: World, folder: str) -> None:
    """A member that is behind may hear a leader that joined while it was away: it cannot pass on yet."""
    async with rig_of(world, folder) as rig:
        node = await rig.found()
        with pytest.raises(NotStarted, match="does not know its address yet") as caught:
            await node.links.call(77, c.STATUS, c.StatusRequest(), timeout_s=5.0)
        assert caught.value.retryable and caught.value.hint
