"""Real nodes that are killed, or stopped and let go on: what was answered stays, and the others go on."""

import pytest

from isopod.api.cluster import LEAVE, NodeRequest
from isopod.world.world import World
from tests.cluster.real.load import Load
from tests.cluster.real.rig import Rig

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(180)]
WITHIN_S = 45.0
"""How soon writes must be answered again: far more than an election takes, for machines that do much else."""


@pytest.mark.row("B3")
@pytest.mark.row("B12")
@pytest.mark.row("B13")
async def test_kill_of_the_leader(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=1) as load:
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world)
        rig.nodes[leader].kill()
        others = [number for number in rig.nodes if number != leader]
        await load.progress(within_s=WITHIN_S)
        assert await rig.wait_leader(host_world, others) != leader
        rig.nodes[leader].start()
        await load.answers_of(leader, within_s=WITHIN_S)
        said = await load.finish()
    assert said.n_answered > 50
    assert "wrong_state" not in said.errors, "a node that is just starting sends its clients elsewhere"


@pytest.mark.row("B13")
async def test_kill_of_a_follower_again_and_again(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=2) as load:
        leader = await rig.wait_leader(host_world)
        follower = leader % 3 + 1
        for _ in range(2):
            rig.nodes[follower].kill()
            await load.progress(within_s=WITHIN_S)
            rig.nodes[follower].start()
            await load.answers_of(follower, within_s=WITHIN_S)
        await load.finish()


@pytest.mark.row("B13")
async def test_kill_of_all(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=3) as load:
        await load.progress(within_s=WITHIN_S)
        for node in rig.nodes.values():
            node.kill()
        for node in rig.nodes.values():
            node.start()
        await load.progress(within_s=WITHIN_S)
        await load.finish()


@pytest.mark.row("B20")
async def test_a_leader_that_is_stopped_and_goes_on_answers_nothing_old(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=4) as load:
        for _ in range(2):
            await load.progress(within_s=WITHIN_S)
            leader = await rig.wait_leader(host_world)
            others = [number for number in rig.nodes if number != leader]
            rig.nodes[leader].pause()
            new = await rig.wait_leader(host_world, others)
            await load.progress(within_s=WITHIN_S)
            rig.nodes[leader].resume()
            await load.answers_of(leader, within_s=WITHIN_S)
            assert new != leader
        await load.finish()


@pytest.mark.row("B20")
async def test_a_follower_that_is_stopped_catches_up(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=5) as load:
        leader = await rig.wait_leader(host_world)
        follower = leader % 3 + 1
        rig.nodes[follower].pause()
        await load.progress(100, within_s=WITHIN_S)
        rig.nodes[follower].resume()
        await load.answers_of(follower, within_s=WITHIN_S)
        await load.finish()


@pytest.mark.row("B5")
@pytest.mark.row("B19")
async def test_a_fourth_joins_votes_and_leaves_while_writes_go_on(host_world: World, rig: Rig) -> None:
    assert rig.spare is not None
    async with Load(host_world, rig, seed=6) as load:
        await load.progress(within_s=WITHIN_S)
        rig.spare.start()
        four = (*rig.nodes, rig.spare.number)
        await rig.until(lambda: _votes(host_world, rig, four), "a fourth votes", WITHIN_S)
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world, four)
        assert (await rig.status(host_world, rig.spare.number)) is not None
        asked = rig.nodes[leader if leader in rig.nodes else 1]
        await rig.ask(host_world, asked, LEAVE, NodeRequest(node_id=rig.spare.number), timeout_s=WITHIN_S)
        await rig.until(lambda: not rig.spare or not rig.spare.is_running, "the one that left ends", WITHIN_S)
        await load.progress(within_s=WITHIN_S)
        said = await load.finish()
    assert set(said.errors) <= {"deadline_exceeded"}, "nobody is refused"


async def _votes(world: World, rig: Rig, voters: tuple[int, ...]) -> bool:
    """Whether all nodes, the spare one too, say that these vote, and hold the same wherever they have applied the same."""
    found = await rig.statuses(world, voters)
    digests: dict[int, set[str]] = {}
    for each in found:
        if each is None or each.voters != voters:
            return False
        digests.setdefault(each.applied, set()).add(each.digest)
    assert all(len(each) == 1 for each in digests.values()), found
    return True
