"""The calls about the cluster: who is in it, who leads, whether this node is well.

They say what the node says: true states and no guesses. A node that is in no cluster answers them with FAILED_PRECONDITION and how to bring
it into one. What the reference answers with `success` false is answered so here, in its words.
"""

from collections.abc import Sequence
from typing import Final, NoReturn

from isopod.api import cluster as c
from isopod.api import messages as m
from isopod.api import methods
from isopod.faces.grpc.node import Asked, Fields, NodeLink
from isopod.faces.grpc.statuses import describe
from isopod.world.errors import (
    DeadlineExceeded,
    Disconnected,
    IsopodError,
    NotFound,
    RefusedError,
    Unsupported,
    WrongState,
)

TOKEN_KEY: Final = "isopod-token"  # noqa: S105  where a token stands, and none itself
"""The request's metadata key for a join token."""
HEALTH_S: Final = 5.0
FREE_BYTES_MIN: Final = 64 << 20
"""With less room than this a node is not well: nothing can be created any more."""
_STATES: Final = {
    "leader": "NODE_STATE_LEADER",
    "follower": "NODE_STATE_FOLLOWER",
    "learner": "NODE_STATE_FOLLOWER",
    "candidate": "NODE_STATE_CANDIDATE",
}
"""A learner follows the log and does not vote; agents hold none, and are UNKNOWN as whoever is not heard of."""


class MemberCalls:
    """The handlers.

    Args:
        node: Whom to ask.
    """

    def __init__(self, node: NodeLink) -> None:
        self._node = node

    async def join_cluster(self, asked: Asked) -> Fields:
        """Bring this very node into the cluster of the member at `bind_address`.

        Others join from their own end, since they have to prove that they may: such a request says how.
        """
        node_id, address = asked.message.node_id, asked.message.bind_address
        if not node_id:
            return _failed("Invalid node ID: must be non-zero")
        if not address:
            return _failed("Bind address cannot be empty")
        status = await self._status(asked)
        if node_id != self._node.node_id or status.state != "joining":
            return await self._join_of_another(status, node_id, address)
        token = asked.metadata.get(TOKEN_KEY, "")
        request = c.JoinRequest(address=address, token=token, timeout_s=asked.left_s)
        try:
            joined = await self._node.call(c.JOIN, request, timeout_s=asked.left_s)
        except IsopodError as error:
            return _failed(f"Failed to join cluster: {describe(error)}")
        return {"success": joined.success, "message": joined.message, "peers": _infos(joined.peers), "voters": list(joined.voters)}

    async def leave_cluster(self, asked: Asked) -> Fields:
        """Take another node out."""
        node_id = asked.message.node_id
        if not node_id:
            return _failed("Invalid node ID: must be non-zero")
        request = c.NodeRequest(node_id=node_id, timeout_s=asked.left_s)
        try:
            changed = await self._node.call(c.LEAVE, request, timeout_s=asked.left_s)
        except NotFound:
            return _failed(f"Node {node_id} not found in cluster configuration")
        except WrongState:
            raise
        except RefusedError as error:
            return _failed(error.message)  # in the reference's words, which end where its hint begins
        return {"success": changed.success, "message": changed.message}

    async def cluster_status(self, asked: Asked) -> Fields:
        """What the answering node sees."""
        status = await self._status(asked)
        return {"leader_id": status.leader_id, "nodes": _infos(status.nodes), "term": status.term}

    async def raft_status(self, asked: Asked) -> Fields:
        """The answering node's part."""
        status = await self._status(asked)
        return {
            "is_leader": status.state == "leader",
            "node_id": status.node_id,
            "leader_id": status.leader_id,
            "term": status.term,
            "state": status.state,
        }

    async def health_check(self, asked: Asked) -> Fields:
        """Whether this node can do what it is for, and if not, why."""
        why = await self._illness(min(HEALTH_S, asked.left_s))
        node = f"Node {self._node.node_id}"
        return {"healthy": not why, "message": f"{node} is unhealthy: {why}" if why else f"{node} is healthy"}

    async def send_raft_message(self, _: Asked) -> NoReturn:
        """Nodes do not talk Raft through this door."""
        raise _no_raft_messages()

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _status(self, asked: Asked) -> c.ClusterStatus:
        return await self._node.call(c.STATUS, c.StatusRequest(), timeout_s=asked.left_s)

    async def _join_of_another(self, status: c.ClusterStatus, node_id: int, address: str) -> Fields:
        if status.state == "joining":
            return _failed(f"Failed to join cluster: this is node {self._node.node_id}, which is in no cluster itself: {status.why}")
        if any(node.id == node_id for node in status.nodes):
            return _failed(f"Node {node_id} already exists in cluster")
        member = status.leader_address or next((node.address for node in status.nodes if node.id == status.node_id), "MEMBER")
        how = f"isopod node --id {node_id} --bind {address} --join {member} --token TOKEN"
        why = "a node joins from its own end, and proves by a token that it may"
        return _failed(f"Failed to join cluster: {why} (make one: isopod cluster token create; then there: {how})")

    async def _illness(self, timeout_s: float) -> str:
        """Return what is wrong, "" if nothing is."""
        try:
            info = await self._node.call(methods.SYSTEM_INFO, m.Empty(), timeout_s=timeout_s)
            if info.cluster is not None:
                status = await self._node.call(c.STATUS, c.StatusRequest(), timeout_s=timeout_s)
                if status.why:
                    return status.why
            if info.runtime.value != "none":
                usage = await self._node.call(methods.SYSTEM_USAGE, m.Empty(), timeout_s=timeout_s)
                if usage.storage.free_bytes < FREE_BYTES_MIN:
                    return f"its disk is full: {usage.storage.free_bytes >> 20} MiB are left"
        except (Disconnected, DeadlineExceeded) as error:
            return f"it does not answer: {error.message}"
        except IsopodError as error:
            return describe(error)
        return ""


class RaftTestCalls:
    """The handlers of RaftConsensusService, which only tests are served.

    Args:
        node: Whom to ask.
    """

    KEY: Final = "isopod/test/proposed"
    """Under it stands what was proposed last."""

    def __init__(self, node: NodeLink) -> None:
        self._node = node

    async def send_raft_message(self, _: Asked) -> NoReturn:
        """As in ClusterService."""
        raise _no_raft_messages()

    async def propose(self, asked: Asked) -> Fields:
        """Have bytes go through the log: success is said when a quorum has them."""
        store = self._node.store
        if store is None:
            return {"success": False, "error_message": f"node {self._node.node_id} holds no replica"}
        try:
            await store.put(self.KEY, asked.message.data, timeout_s=asked.left_s)
        except IsopodError as error:
            return {"success": False, "error_message": describe(error)}
        return {"success": True}

    async def cluster_state(self, asked: Asked) -> Fields:
        """As GetClusterStatus."""
        return await MemberCalls(self._node).cluster_status(asked)


def _failed(message: str) -> Fields:
    return {"success": False, "message": message}


def _infos(nodes: Sequence[c.ClusterNodeEntry]) -> list[Fields]:
    return [{"id": node.id, "address": node.address, "state": _state(node)} for node in nodes]


def _state(node: c.ClusterNodeEntry) -> str:
    return "NODE_STATE_UNKNOWN" if node.health == "failed" else _STATES.get(node.state, "NODE_STATE_UNKNOWN")


def _no_raft_messages() -> Unsupported:
    why = "nodes exchange Raft messages only on their own connections, where certificates say who speaks"
    return Unsupported("SendRaftMessage", why, "join nodes by isopod node --join")
