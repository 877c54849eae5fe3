"""The three verbs between Raft nodes, and what they carry.

raft.hello      who calls, who is called; answered with a session, under which frames are taken on this connection
raft.messages   a notice: one frame of messages (`isopod.cluster.raft.codec`), never answered
raft.snapshot   a stream: the receiver says where to go on, the sender streams the file from there, the answer means it is durable
"""

from typing import Final, Literal

import msgspec

from isopod.cluster.raft.ports import SnapshotOffer
from isopod.wire.service import Method

Purpose = Literal["messages", "snapshot"]


class RaftHello(msgspec.Struct, frozen=True):
    """Who calls."""

    cluster_id: str
    node_id: int
    incarnation: str
    to: int
    """Whom the caller believes to have reached."""
    purpose: Purpose = "messages"


class RaftWelcome(msgspec.Struct, frozen=True):
    """Who was reached."""

    cluster_id: str
    node_id: int
    incarnation: str
    session: int


class SnapshotRequest(msgspec.Struct, frozen=True):
    """A snapshot is coming."""

    session: int
    offer: SnapshotOffer


class SnapshotResume(msgspec.Struct, frozen=True):
    """Where to go on."""

    offset: int


class SnapshotDone(msgspec.Struct, frozen=True):
    """All of it is durable, and Raft knows."""


class Nothing(msgspec.Struct, frozen=True):
    """What a notice is answered with: nobody sees it."""


NOTHING: Final = Nothing()
HELLO: Final = Method("raft.hello", RaftHello, RaftWelcome, idempotent=True)
MESSAGES: Final = Method("raft.messages", bytes, Nothing)
SNAPSHOT: Final = Method("raft.snapshot", SnapshotRequest, SnapshotDone, sends=bytes, receives=SnapshotResume)
