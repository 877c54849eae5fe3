"""What the cluster knows of its nodes, as it is replicated: records under keys of the store.

    members/ID      one node: who, where, what it wants to be, whether it is leaving
    health/ID       the leader's judgement, written when it changes; absent means alive
    removed/ID      the incarnations of that id that left or were removed: their certificates open nothing any more
    tokens/ID       join tokens
    cluster         the cluster itself

Who votes is not said here but by Raft's own configuration; the records say what is wanted, and the leader (`steward`) brings the two
together.
"""

from typing import Final

import msgspec

from isopod.api.cluster import Health
from isopod.cluster.members.config import Role

MEMBERS: Final = "members/"
HEALTH: Final = "health/"
REMOVED: Final = "removed/"
TOKENS: Final = "tokens/"
CLUSTER: Final = "cluster"
RESERVED: Final = (MEMBERS, HEALTH, REMOVED, TOKENS, CLUSTER)
"""Beginnings of keys that users may read and not write."""
INCARNATIONS_KEPT: Final = 16
"""Of one id. Certificates of earlier ones have expired long before so many lives are over."""


class MemberRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One node."""

    node_id: int
    incarnation: str
    address: str
    role: Role
    """What it wants to be."""
    version: str = ""
    joined_at_ns: int = 0
    is_leaving: bool = False


class HealthRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The leader's judgement of a node."""

    health: Health
    since_ns: int
    incarnation: str
    judge: int
    """The leader that passed it."""


class RemovedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The lives of an id that are over, the newest last."""

    incarnations: tuple[str, ...]
    removed_at_ns: int
    why: str = ""


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster."""

    cluster_id: str
    founded_at_ns: int
    voters_max: int
    recovered_from: str = ""
    """The cluster whose state it took over, by `recover` or a restored backup."""


def member_key(node_id: int) -> str:
    """Return the key of a node's record."""
    return f"{MEMBERS}{node_id}"


def health_key(node_id: int) -> str:
    """Return the key of the judgement of a node."""
    return f"{HEALTH}{node_id}"


def removed_key(node_id: int) -> str:
    """Return the key of an id's lives that are over."""
    return f"{REMOVED}{node_id}"


def token_record_key(token_id: str) -> str:
    """Return the key of a token."""
    return f"{TOKENS}{token_id}"


def leaving(record: MemberRecord) -> MemberRecord:
    """Return the record of a node that is to leave."""
    return msgspec.structs.replace(record, is_leaving=True)


def wanting(record: MemberRecord, role: Role) -> MemberRecord:
    """Return the record of a node that is to become something else."""
    return msgspec.structs.replace(record, role=role)
