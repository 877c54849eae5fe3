"""What the cluster knows of its nodes, as it is replicated: records under keys of the store.

    members/ID      one node: who, where, what it wants to be, whether it is leaving
    health/ID       the leader's judgement, written when it changes; absent means alive
    removed/ID      the incarnations of that id that left or were removed: their certificates open nothing any more
    tokens/ID       join tokens
    cluster         the cluster itself
    restore/state   a backup that is being put back
    restore/part/N  its file, in pieces

Who votes is not said here but by Raft's own configuration; the records say what is wanted, and the leader (`steward`) brings the two
together.
"""

from typing import Final, Literal

import msgspec

from isopod.api.cluster import Health
from isopod.cluster.members.config import Role

MEMBERS: Final = "members/"
HEALTH: Final = "health/"
REMOVED: Final = "removed/"
TOKENS: Final = "tokens/"
CLUSTER: Final = "cluster"
RESTORE: Final = "restore/"
RESTORE_STATE: Final = "restore/state"
RESTORE_PARTS: Final = "restore/part/"
RESERVED: Final = (MEMBERS, HEALTH, REMOVED, TOKENS, CLUSTER, RESTORE)
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


class RestoreRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that is being put back."""

    id: str
    """Drawn anew for each."""
    state: Literal["staging", "applying", "failed"]
    """staging: its pieces are being written down, nothing else was changed · applying: all are there, the leader makes the state that of
    the backup, and whoever leads next goes on · failed: the pieces make no backup; nothing was changed."""
    digest: str
    """SHA-256 of the file."""
    n_parts: int
    began_at_ns: int
    source_cluster_id: str
    source_revision: int
    why: str = ""


def member_key(node_id: int) -> str:
    """Return the key of a node's record."""
    return f"{MEMBERS}{node_id}"


def health_key(node_id: int) -> str:
    """Return the key of the judgement of a node."""
    return f"{HEALTH}{node_id}"


def removed_key(node_id: int) -> str:
    """Return the key of an id's lives that are over."""
    return f"{REMOVED}{node_id}"


def restore_part_key(number: int) -> str:
    """Return the key of a piece of the backup that is being put back."""
    return f"{RESTORE_PARTS}{number:06d}"


def token_record_key(token_id: str) -> str:
    """Return the key of a token."""
    return f"{TOKENS}{token_id}"


def leaving(record: MemberRecord) -> MemberRecord:
    """Return the record of a node that is to leave."""
    return msgspec.structs.replace(record, is_leaving=True)


def wanting(record: MemberRecord, role: Role) -> MemberRecord:
    """Return the record of a node that is to become something else."""
    return msgspec.structs.replace(record, role=role)
