"""What happens to a cluster's nodes, as told to subscribers on any node (row S19).

Events come from the replicated records, so every node with a replica tells the same ones in the same order; an agent tells what it learns
with its leader's answers. They are delivered in the loop's turn in which this node learned of it; a subscriber must not wait.
Structs, not tuples: two events of one node are equal only if they are of one kind.
"""

from collections.abc import Callable

import msgspec


class NodeJoined(msgspec.Struct, frozen=True):
    """A node became a member."""

    node_id: int
    address: str


class NodeLeft(msgspec.Struct, frozen=True):
    """A node is no member any more: it left, or was taken out."""

    node_id: int


class NodeChanged(msgspec.Struct, frozen=True):
    """A node has another address, or wants to be something else."""

    node_id: int
    address: str
    role: str


class NodeSuspected(msgspec.Struct, frozen=True):
    """The leader has not heard a node for a while."""

    node_id: int


class NodeFailed(msgspec.Struct, frozen=True):
    """The leader takes a node for dead."""

    node_id: int


class NodeRecovered(msgspec.Struct, frozen=True):
    """A node that was suspected or failed lives."""

    node_id: int


class VotersChanged(msgspec.Struct, frozen=True):
    """Who votes and who only replicates."""

    voters: tuple[int, ...]
    learners: tuple[int, ...]


class LeaderChanged(msgspec.Struct, frozen=True):
    """This node sees another leader; 0 for none."""

    leader_id: int
    term: int


Event = NodeJoined | NodeLeft | NodeChanged | NodeSuspected | NodeFailed | NodeRecovered | VotersChanged | LeaderChanged
Subscriber = Callable[[Event], None]
