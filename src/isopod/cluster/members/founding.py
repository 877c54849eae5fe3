"""Founding: who makes the cluster when several nodes are started with the same line, so that one of them does and the others join it.

    what it was told                               what it does
    --join                                         joins
    --init-secondary, --join-cluster               joins the peers; without any waits for `isopod cluster join`
    no peers                                       founds at once
    --init-primary                                 asks the peers, founds if none is in a cluster
    peers with ids, its own is the lowest          the same
    peers without ids, it stands first             the same
    else                                           joins the peers

The one that may found asks first, because a wiped disk looks like a new one: if a peer answers, there is a cluster, and this node can only
join it. If none can be reached it founds another cluster, with an id and an authority of its own: the first one's nodes never take it
for theirs, and it never takes them for its own.
"""

from typing import Literal, NamedTuple

from isopod.cluster.members.config import ClusterConfig
from isopod.world.errors import InvalidArgument

Way = Literal["found", "ask_first", "join", "wait"]


class Start(NamedTuple):
    """How a node without a cluster begins."""

    way: Way
    addresses: tuple[str, ...]
    """Of the others, in the order in which they are asked."""


def choose_start(config: ClusterConfig, own_address: str) -> Start:
    """Return how to begin.

    Args:
        config: What the node was told.
        own_address: Where it listens, as the others know it: it may stand among the peers.

    Raises:
        InvalidArgument: It is an agent, and was told nobody to join.
    """
    own = (own_address, config.bind, config.advertise)
    others = tuple(peer for peer in config.peers if peer.node_id != config.node_id and peer.address not in own)
    addresses = tuple(dict.fromkeys((*config.join, *(peer.address for peer in others))))
    if config.join or config.init == "secondary" or config.role == "agent":
        if not addresses and config.role != "agent":
            return Start("wait", ())
        if not addresses:
            raise InvalidArgument("peers", "", "there is nobody to join", "name a member: --join HOST:PORT, or --peer ID:HOST:PORT")
        return Start("join", addresses)
    if not addresses:
        return Start("found", ())
    return Start("ask_first" if _is_first(config, own) else "join", addresses)


def _is_first(config: ClusterConfig, own: tuple[str, ...]) -> bool:
    """Return whether this node founds if nobody has."""
    if config.init == "primary":
        return True
    if all(peer.node_id for peer in config.peers):
        return config.node_id <= min(peer.node_id for peer in config.peers)
    return config.peers[0].address in own or config.peers[0].node_id == config.node_id
