"""Status: what a node says of its cluster, made from what it has: no call, no wait. Pure but for reading the parts."""

import asyncio
from typing import Protocol

import msgspec

import isopod
from isopod.api import cluster as c
from isopod.cluster.members.book import Book
from isopod.cluster.members.config import ClusterConfig
from isopod.cluster.members.members import Members
from isopod.cluster.members.pulse import Pulse
from isopod.cluster.members.registry import Registry
from isopod.cluster.raft.node import RaftNode
from isopod.cluster.raft.ports import RaftStatus


class Parts(Protocol):
    """What is read: `ReplicaStack` has it."""

    raft: RaftNode
    registry: Registry
    members: Members


def joining_status(config: ClusterConfig, cluster_id: str, why: str) -> c.ClusterStatus:
    """Return the status of a node that is no member yet."""
    return c.ClusterStatus(
        cluster_id=cluster_id,
        node_id=config.node_id,
        state="joining",
        leader_id=0,
        leader_address="",
        term=0,
        commit=0,
        applied=0,
        digest="",
        voters=(),
        learners=(),
        voters_max=config.voters_max,
        failures_survived=-1,
        nodes=(),
        why=why,
    )


def agent_status(config: ClusterConfig, cluster_id: str, pulse: Pulse, book: Book) -> c.ClusterStatus:
    """Return the status of an agent: what its leader told it last."""
    reply = pulse.reply
    leader_id = reply.leader_id if reply is not None else 0
    silent_s = asyncio.get_running_loop().time() - pulse.replied_at_s
    nodes = tuple(
        c.ClusterNodeEntry(
            id=peer.node_id,
            address=peer.address,
            role=peer.role,
            state="leader" if peer.node_id == leader_id else "unknown",
            health=peer.health,
            wanted_role=peer.role,
            incarnation=peer.incarnation,
            version="",
            joined_at_ns=0,
            is_leaving=False,
            entries_behind=None,
            silent_s=silent_s if peer.node_id == leader_id else None,
        )
        for peer in book.all()
    )
    leader = book.find(leader_id)
    return msgspec.structs.replace(
        joining_status(config, cluster_id, pulse.why),
        state="agent" if reply is not None else "joining",
        leader_id=leader_id,
        leader_address=leader.address if leader is not None else "",
        voters=tuple(peer.node_id for peer in book.all() if peer.role == "voter"),
        learners=tuple(peer.node_id for peer in book.all() if peer.role == "learner"),
        nodes=nodes,
    )


def replica_status(config: ClusterConfig, cluster_id: str, parts: Parts, book: Book) -> c.ClusterStatus:
    """Return the status of a node with a replica."""
    status = parts.raft.status()
    registry = parts.registry
    leader = book.find(status.leader) if status.leader else None
    ids = sorted({**registry.members, **dict.fromkeys((*status.voters, *status.learners))})
    nodes = tuple(_entry(node_id, status, parts, book) for node_id in ids)
    n_alive = sum(1 for node_id in status.voters if registry.health(node_id) == "alive")
    quorum = len(status.voters) // 2 + 1
    why = ""
    if config.node_id not in (*status.voters, *status.learners):
        why = "the leader has not added this node yet"
    elif not status.leader:
        why = "no leader is known: more than half of the voters must run and reach each other"
    if parts.raft.fault is not None:
        why = "; ".join(each for each in (why, parts.raft.fault.message) if each)
    elif registry.restore is not None and registry.restore.state == "applying":
        why = f"a backup of cluster {registry.restore.source_cluster_id} is being put back"
    return c.ClusterStatus(
        cluster_id=cluster_id,
        node_id=config.node_id,
        state=_own_state(status),
        leader_id=status.leader,
        leader_address=leader.address if leader is not None else "",
        term=status.term,
        commit=status.commit,
        applied=status.applied,
        digest=status.digest,
        voters=status.voters,
        learners=status.learners,
        voters_max=registry.cluster.voters_max if registry.cluster is not None else config.voters_max,
        failures_survived=n_alive - quorum if status.leader and n_alive >= quorum else -1,
        nodes=nodes,
        why=why,
    )


def _own_state(status: RaftStatus) -> c.NodeState:
    if status.node_id in status.learners:
        return "learner"
    if status.node_id not in status.voters:
        return "joining"
    return "candidate" if status.role == "pre_candidate" else status.role


def _entry(node_id: int, status: RaftStatus, parts: Parts, book: Book) -> c.ClusterNodeEntry:
    registry, steward = parts.registry, parts.members.steward
    record = registry.members.get(node_id)
    peer = next((peer for peer in status.peers if peer.node_id == node_id), None)
    is_own = node_id == status.node_id
    role: c.MemberRole = "voter" if node_id in status.voters else "learner" if node_id in status.learners else "agent"
    found = book.find(node_id)
    version = isopod.__version__ if is_own else record.version if record is not None else ""
    return c.ClusterNodeEntry(
        id=node_id,
        address=found.address if found is not None else "",
        role=role,
        state=_state(node_id, status, role),
        health=registry.health(node_id) if record is not None else "unknown",
        wanted_role=record.role if record is not None else role,
        incarnation=record.incarnation if record is not None else "",
        version=version,
        joined_at_ns=record.joined_at_ns if record is not None else 0,
        is_leaving=record.is_leaving if record is not None else False,
        entries_behind=max(0, status.last_index - peer.match) if peer is not None and status.role == "leader" else None,
        silent_s=None if is_own else steward.silent_s(node_id),
        clock_off_s=None if is_own else steward.clock_off_s(node_id),
    )


def _state(node_id: int, status: RaftStatus, role: c.MemberRole) -> c.NodeState:
    if node_id == status.leader:
        return "leader"
    if node_id == status.node_id:
        return _own_state(status)
    return {"voter": "follower", "learner": "learner", "agent": "agent"}[role]  # type: ignore[return-value]  # the table's words
