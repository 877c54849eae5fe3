"""The verbs between nodes that are about membership. Users' verbs are in `isopod.api.cluster`.

Only `ENROL` is served to who shows no certificate of the cluster; `gate` sees to that. Messages are
maps, which can grow: these are rare.
"""

from typing import Final

import msgspec

from isopod.api.cluster import Health
from isopod.cluster.members.config import Role
from isopod.wire.service import Method


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """Base: keyword-only, unknown fields ignored."""


class NodeAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a node is, and how it does."""

    node_id: int
    address: str
    incarnation: str
    role: Role
    health: Health = "unknown"


class EnrolRequest(Fields, frozen=True, kw_only=True):
    """A node without certificate knocks. First with what it wants, then, with `session` and `proof`, once more the same."""

    token_id: str
    nonce: str
    node_id: int
    incarnation: str
    address: str
    role: Role
    request: bytes
    """Its request for a certificate, PEM."""
    session: str = ""
    """The challenge that is answered, "" to get one."""
    proof: bytes = b""


class EnrolReply(Fields, frozen=True, kw_only=True):
    """A challenge, with the cluster's own proof; or, once the node's proof was seen, its certificate."""

    cluster_id: str
    session: str = ""
    authorities: bytes = b""
    now_ns: int = 0
    """The member's wall time: certificates are judged by clocks."""
    proof: bytes = b""
    certificate: bytes = b""
    ask: tuple[str, ...] = ()
    """Members that can do this, if the one that was asked cannot: nothing else is said then."""


class AdmitRequest(Fields, frozen=True, kw_only=True):
    """An enrolled node wants to be a member. Repeating it does no harm."""

    node_id: int
    incarnation: str
    address: str
    role: Role
    version: str
    cluster_id: str
    """The cluster it means, "" if it does not know one yet (without TLS)."""


class AdmitReply(Fields, frozen=True, kw_only=True):
    """It is one: the others, and who votes. In the reference's words. Or, without success, whom to ask instead: the leader."""

    success: bool
    message: str
    cluster_id: str
    leader_id: int = 0
    peers: tuple[NodeAddress, ...] = ()
    voters: tuple[int, ...] = ()
    ask: tuple[str, ...] = ()


class BeatRequest(Fields, frozen=True, kw_only=True):
    """A sign of life to the leader."""

    node_id: int
    incarnation: str
    address: str
    role: Role
    version: str
    applied: int
    now_ns: int
    book: int
    """The version of the address book that it has."""


class BeatReply(Fields, frozen=True, kw_only=True):
    """The leader heard it; or, with `leader_id` of another, did not, for it is none."""

    leader_id: int
    leader_address: str
    lease_s: float
    """For so long the node counts as alive without another beat."""
    beat_s: float
    """When the next one is wanted: the more nodes there are, the rarer."""
    book: int
    peers: tuple[NodeAddress, ...] | None
    """All members, if the node's book is old."""
    is_member: bool = True


class RenewRequest(Fields, frozen=True, kw_only=True):
    """A member wants its certificate anew."""

    request: bytes


class RenewReply(Fields, frozen=True, kw_only=True):
    """The new one."""

    certificate: bytes
    authorities: bytes


class HandKey(Fields, frozen=True, kw_only=True):
    """The authority's key, for a node that is about to vote."""

    key: bytes


class Done(Fields, frozen=True, kw_only=True):
    """Nothing to add."""


ENROL: Final = Method("member.enrol", EnrolRequest, EnrolReply)
ADMIT: Final = Method("member.admit", AdmitRequest, AdmitReply, idempotent=True)
BEAT: Final = Method("member.beat", BeatRequest, BeatReply, idempotent=True)
RENEW: Final = Method("member.renew", RenewRequest, RenewReply, idempotent=True)
HAND_KEY: Final = Method("member.hand-key", HandKey, Done, idempotent=True)
