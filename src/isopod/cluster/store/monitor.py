"""Monitor: whether all members hold the same state.

A checkpoint goes through the log, so every node notes its digest at the same place of it. The leader then asks each member what it
noted. Two digests that differ mean that a node's state is not what the log says: that is reported with the index and the nodes, loudly,
and left to people; which of them is right, the majority shows.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, Literal

from isopod.api.store import methods
from isopod.api.store.messages import CheckpointAnswer, CheckpointQuery, ConsistencyReport, MemberDigest
from isopod.cluster.raft.ports import NodeId
from isopod.cluster.store.machine import StoreMachine
from isopod.cluster.store.ports import Peers
from isopod.world.errors import IsopodError

BEHIND_S: Final = 1.0
"""How long a member may take to come to the checkpoint."""
LOOK_S: Final = 0.1
ASK_S: Final = 1.0


async def compare(machine: StoreMachine, peers: Peers, *, node_id: NodeId, members: Sequence[NodeId], index: int) -> ConsistencyReport:
    """Ask all members for their digest at a checkpoint that this node has passed.

    Args:
        machine: This node's.
        peers: The way to the others.
        node_id: This node.
        members: All that hold a replica.
        index: The checkpoint's place in the log.
    """
    own = machine.checkpoint_at(index)
    others = [member for member in members if member != node_id]
    answers = await asyncio.gather(*(_ask(peers, member, index) for member in others))
    found = [MemberDigest(node=node_id, state="equal", digest=own, applied=machine.index)]
    for member, answer in zip(others, answers, strict=True):
        if answer is None:
            found.append(MemberDigest(node=member, state="unreachable"))
        else:
            found.append(MemberDigest(node=member, state=_state(answer, own, index), digest=answer.digest, applied=answer.applied))
    known = [member.digest for member in found if member.digest]
    consistent = None if len(known) < 2 and len(members) > 1 else all(digest == known[0] for digest in known)
    return ConsistencyReport(index=index, consistent=consistent, members=found)


def _state(answer: CheckpointAnswer, own: str, index: int) -> Literal["equal", "different", "behind", "skipped"]:
    if answer.digest:
        return "equal" if answer.digest == own else "different"
    return "skipped" if answer.applied >= index else "behind"


async def _ask(peers: Peers, member: NodeId, index: int) -> CheckpointAnswer | None:
    """Return what a member noted; None if it does not answer."""
    loop = asyncio.get_running_loop()
    until = loop.time() + BEHIND_S
    while True:
        try:
            answer = await peers.call(member, methods.KV_CHECKPOINT, CheckpointQuery(index=index), timeout_s=ASK_S)
        except IsopodError:
            return None
        if answer.digest or answer.applied >= index or loop.time() >= until:
            return answer
        await asyncio.sleep(LOOK_S)
