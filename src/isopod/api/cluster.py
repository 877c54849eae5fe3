"""The contract's part about the cluster: what `isopod cluster` and programs ask of a node, over its own socket.

Nodes talk to each other by other verbs (`isopod.cluster.members.wire`); here is only what users see. Times are nanoseconds since 1970 as
the names say, ids of nodes are numbers from 1 on.
"""

from typing import Final, Literal

import msgspec

from isopod.api import messages as m
from isopod.wire.service import Method

NodeState = Literal["leader", "follower", "candidate", "learner", "agent", "joining", "unknown"]
Health = Literal["alive", "suspected", "failed", "unknown"]
MemberRole = Literal["voter", "learner", "agent"]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages: frozen, keyword-only, unknown fields ignored (an older node understands a newer client)."""


class Nothing(Message, frozen=True, kw_only=True):
    """No fields."""


class StatusRequest(Message, frozen=True, kw_only=True):
    """Whose view is wanted."""

    at: str = ""
    """The id or the address of another node, which is asked then; "" for the answering one."""
    timeout_s: float = 5.0


class ClusterNodeEntry(Message, frozen=True, kw_only=True):
    """One node, as the answering one knows it."""

    id: int
    address: str
    role: MemberRole
    state: NodeState
    health: Health
    wanted_role: MemberRole
    """What it becomes once there is room among the voters and it has caught up."""
    incarnation: str
    version: str
    joined_at_ns: int
    is_leaving: bool
    entries_behind: int | None
    """How far its log is behind the leader's; None where the answering node is not the leader."""
    silent_s: float | None
    """Since when nothing was heard of it; None where nobody here listens to it."""
    clock_off_s: float | None = None
    """How far its clock is ahead of the leader's; None where the answering node is not the leader."""


class ClusterStatus(Message, frozen=True, kw_only=True):
    """A cluster, as the answering node sees it."""

    cluster_id: str
    node_id: int
    state: NodeState
    leader_id: int
    """0 if none is known."""
    leader_address: str
    term: int
    commit: int
    applied: int
    digest: str
    """Of the replicated state at `applied`."""
    voters: tuple[int, ...]
    learners: tuple[int, ...]
    voters_max: int
    failures_survived: int
    """How many more voters may fail before nothing can be decided any more; -1 if that is so already."""
    nodes: tuple[ClusterNodeEntry, ...]
    why: str = ""
    """What keeps this node from being a member, or from taking its part (no leader is known, its disk is full); "" if nothing does."""


class ClusterMembers(Message, frozen=True, kw_only=True):
    """The nodes alone."""

    nodes: tuple[ClusterNodeEntry, ...]


class JoinRequest(Message, frozen=True, kw_only=True):
    """Bring the answering node, which is in no cluster yet, into one."""

    address: str
    token: str
    timeout_s: float = 60.0


class Joined(Message, frozen=True, kw_only=True):
    """Answer to joining: in the reference's words, and who there is."""

    success: bool
    message: str
    peers: tuple[ClusterNodeEntry, ...]
    voters: tuple[int, ...]


class NodeRequest(Message, frozen=True, kw_only=True):
    """A request about one node."""

    node_id: int
    timeout_s: float = 30.0


class Changed(Message, frozen=True, kw_only=True):
    """Answer to a change of members."""

    success: bool
    message: str


class TransferRequest(Message, frozen=True, kw_only=True):
    """Hand leadership over; to node 0 for whoever is most fit."""

    node_id: int = 0
    timeout_s: float = 10.0


class SetRequest(Message, frozen=True, kw_only=True):
    """Change what holds for the whole cluster."""

    voters_max: int
    timeout_s: float = 5.0


class CreateToken(Message, frozen=True, kw_only=True):
    """Make a join token."""

    valid_s: float = 3600.0
    uses: int = 1
    role: MemberRole = "voter"


class TokenEntry(Message, frozen=True, kw_only=True):
    """A token, without its secret."""

    id: str
    created_at_ns: int
    expires_at_ns: int
    uses_left: int
    uses: int
    role: MemberRole
    is_revoked: bool
    is_usable: bool


class CreatedToken(Message, frozen=True, kw_only=True):
    """A new token: its text is told this one time."""

    token: str
    entry: TokenEntry


class TokenList(Message, frozen=True, kw_only=True):
    """All tokens that were not forgotten yet."""

    tokens: tuple[TokenEntry, ...]


class TokenName(Message, frozen=True, kw_only=True):
    """A token's id."""

    id: str


class BackupInfo(Message, frozen=True, kw_only=True):
    """What a backup is of; the last thing a backup's stream says."""

    cluster_id: str
    revision: int
    index: int
    n_bytes: int
    digest: str
    """SHA-256 of the streamed bytes, in hexadecimal."""


class RestoreRequest(Message, frozen=True, kw_only=True):
    """Replace the replicated state by a backup's."""

    force: bool = False
    """Also if the cluster holds something."""


class Restored(Message, frozen=True, kw_only=True):
    """Answer to a restore."""

    n_keys: int
    source_cluster_id: str
    source_revision: int


STATUS: Final = Method("cluster.status", StatusRequest, ClusterStatus, idempotent=True)
MEMBERS: Final = Method("cluster.members", Nothing, ClusterMembers, idempotent=True)
JOIN: Final = Method("cluster.join", JoinRequest, Joined)
LEAVE: Final = Method("cluster.leave", NodeRequest, Changed)
PROMOTE: Final = Method("cluster.promote", NodeRequest, Changed)
DEMOTE: Final = Method("cluster.demote", NodeRequest, Changed)
TRANSFER: Final = Method("cluster.transfer", TransferRequest, Changed)
SET: Final = Method("cluster.set", SetRequest, Changed, idempotent=True)
TOKEN_CREATE: Final = Method("cluster.token-create", CreateToken, CreatedToken)
TOKEN_LIST: Final = Method("cluster.token-list", Nothing, TokenList, idempotent=True)
TOKEN_REVOKE: Final = Method("cluster.token-revoke", TokenName, Changed)
BACKUP: Final = Method("cluster.backup", Nothing, BackupInfo, receives=m.Chunk)
RESTORE: Final = Method("cluster.restore", RestoreRequest, Restored, sends=m.Chunk)

METHODS: Final = tuple(value for name, value in sorted(globals().items()) if isinstance(value, Method))
