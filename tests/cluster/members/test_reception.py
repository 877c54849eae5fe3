"""Reception alone: a member that is behind refuses nobody for good by what it has; whoever is up to date may."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isopod.cluster.members import wire as w
from isopod.cluster.members.config import ClusterConfig
from isopod.cluster.members.reception import Reception
from isopod.cluster.members.records import MemberRecord
from isopod.runtime.logger import Logger
from isopod.world.errors import IdentityConflict, NotLeader
from isopod.world.sim import SimWorld
from isopod.world.world import World


def member(incarnation: str) -> MemberRecord:
    return MemberRecord(node_id=2, incarnation=incarnation, address="10.0.0.2:7000", role="voter", joined_at_ns=0)


@dataclass
class Roster:
    """What the cluster has agreed on, whatever the asked member has."""

    record: MemberRecord | None
    asked: list[int] = field(default_factory=list)

    async def find_member(self, node_id: int) -> MemberRecord | None:
        self.asked.append(node_id)
        return self.record


def reception_of(world: World, roster: Roster) -> Reception:
    """Return that of a follower without a leader, which knows node 2 as it was before it lost its disk."""
    registry = SimpleNamespace(members={2: member("lost")}, is_removed=lambda *_: False)
    return Reception(
        world,
        ClusterConfig(data_dir="/node", node_id=3),
        cast(Any, SimpleNamespace(is_leader=False, leader=0)),
        cast(Any, registry),
        roster=cast(Any, roster),
        book=cast(Any, None),
        credentials=cast(Any, None),
        steward=cast(Any, None),
        cluster_id="c",
        logger=Logger(lambda _: None, world.clock),
    )


REQUEST = w.AdmitRequest(node_id=2, incarnation="new", address="10.0.0.2:7000", role="voter", version="1", cluster_id="c")
CALL = cast(Any, SimpleNamespace(identity=None))


@pytest.mark.row("B18")
async def test_a_member_that_has_not_heard_that_a_node_was_taken_out_does_not_refuse_it_for_good(sim_world: SimWorld) -> None:
    roster = Roster(None)

    with pytest.raises(NotLeader):  # which whoever joins tries again
        await reception_of(sim_world.world, roster).admit(CALL, REQUEST)

    assert roster.asked == [2]


@pytest.mark.row("B18")
async def test_a_known_id_with_another_disk_is_refused(sim_world: SimWorld) -> None:
    with pytest.raises(IdentityConflict, match="with another disk than this one"):
        await reception_of(sim_world.world, Roster(member("lost"))).admit(CALL, REQUEST)
