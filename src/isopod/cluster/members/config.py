"""ClusterConfig: what a node of a cluster is told, and how addresses of peers are written.

Plain values, checked when they are made; nothing is read or resolved here. `isopod node` makes one from its flags
(`isopod.runtime.config.node`), tests and the simulation make them by hand.
"""

from typing import Final, Literal, NamedTuple

from isopod.cluster.raft.settings import RaftSettings
from isopod.world.errors import InvalidArgument
from isopod.world.network import TcpAddress, parse_address

Role = Literal["voter", "learner", "agent"]
"""voter: replicates and votes, as soon as there is room among the voters. learner: replicates, never votes. agent: holds no replica."""
Init = Literal["auto", "primary", "secondary"]
"""Who founds a cluster among peers: by the rule of `isopod.cluster.members.founding`, this node, or certainly not this node."""
Security = Literal["tls", "plaintext"]
"""tls: mutual TLS from the cluster's own authority. plaintext: nothing is secured: for simulations and tests on loopback."""

NODE_ID_MAX: Final = 2**63 - 1
VOTERS_MAX_CHOICES: Final = (1, 3, 5, 7)
DEFAULT_PORT: Final = 7000
TOKEN_CHARS_MIN: Final = 24
TOKEN_CHARS_MAX: Final = 512
PEERS_MAX: Final = 64


class PeerSpec(NamedTuple):
    """A peer that was named on the command line.

    Args:
        node_id: Its id; 0 if it was not said.
        address: "HOST:PORT"; the host may be a name with several addresses.
    """

    node_id: int
    address: str


class DetectorSettings(NamedTuple):
    """When a silent node is suspected, taken for failed, and cleaned up. Times are seconds.

    Args:
        beat_s: How often nodes without a Raft connection to the leader say that they live, and how often judgement is passed.
        suspect_s: After so long a silence a node is Suspected.
        fail_s: After so long it is Failed.
        recover_beats: So many signs of life in a row bring it back: one lucky packet does not.
        cleanup_s: A Failed voter or learner is removed after so long, if the others are a quorum without it; 0 never removes any.
        agent_cleanup_s: The same for agents.
        replace_s: A Failed voter gives its vote to a learner that is ready, after so long.
    """

    beat_s: float = 1.0
    suspect_s: float = 3.0
    fail_s: float = 10.0
    recover_beats: int = 2
    cleanup_s: float = 72 * 3600.0
    agent_cleanup_s: float = 24 * 3600.0
    replace_s: float = 60.0


class ClusterConfig(NamedTuple):
    """What a node of a cluster is told.

    Args:
        data_dir: Its folder, absolute; nobody else's.
        node_id: Its id, from 1 on, never used twice in a cluster.
        bind: "HOST:PORT" to listen on; port 0 takes a free one.
        advertise: "HOST:PORT" that the others are told; "" for what it is bound to.
        peers: The other nodes that were named, and perhaps itself.
        join: Addresses of members to join by; never founds a cluster.
        token: The join token, or the secret shared by all nodes that form a cluster together.
        init: Who founds.
        role: What it wants to be.
        voters_max: How many vote at most: 1, 3, 5 or 7. For a cluster that it founds, which then holds it (`isopod cluster set`).
        security: How connections are secured.
        detector: Failure detection.
        certificate_s: How long certificates are valid, in seconds; renewed when a third is left.
        raft: Times and bounds of Raft.
    """

    data_dir: str
    node_id: int = 1
    bind: str = f"127.0.0.1:{DEFAULT_PORT}"
    advertise: str = ""
    peers: tuple[PeerSpec, ...] = ()
    join: tuple[str, ...] = ()
    token: str = ""
    init: Init = "auto"
    role: Role = "voter"
    voters_max: int = 5
    security: Security = "tls"
    detector: DetectorSettings = DetectorSettings()
    certificate_s: float = 30 * 86_400.0
    raft: RaftSettings = RaftSettings()


def check_config(config: ClusterConfig) -> None:
    """Look at a configuration as a whole.

    Raises:
        InvalidArgument: Something in it makes no sense.
    """
    check_node_id(config.node_id)
    config.raft.check()
    parse_tcp("bind address", config.bind)
    if config.advertise:
        parse_tcp("advertised address", config.advertise)
    if not config.data_dir.startswith("/"):
        raise InvalidArgument("data folder", config.data_dir, "want an absolute path")
    check_voters_max(config.voters_max)
    if len(config.peers) > PEERS_MAX:
        raise InvalidArgument("peers", len(config.peers), f"name at most {PEERS_MAX}; the others are learned from these")
    for peer in config.peers:
        parse_tcp("peer", peer.address)
    for address in config.join:
        parse_tcp("address to join", address)
    named = [peer.node_id for peer in config.peers if peer.node_id]
    if len(named) != len(dict.fromkeys(named)):
        raise InvalidArgument("peers", ",".join(map(str, named)), "an id stands there twice")
    if config.init == "primary" and config.join:
        raise InvalidArgument("--init-primary", "with --join", "who founds a cluster does not join one", "leave one of them out")
    if config.role == "agent" and config.init == "primary":
        raise InvalidArgument("role", config.role, "an agent holds no replica: it cannot found a cluster")


def check_node_id(node_id: int) -> int:
    """Return an id that may be one.

    Raises:
        InvalidArgument: It is not.
    """
    if not 1 <= node_id <= NODE_ID_MAX:
        raise InvalidArgument("node id", node_id, "must be non-zero" if node_id == 0 else f"want a number from 1 to {NODE_ID_MAX}")
    return node_id


def parse_tcp(what: str, text: str) -> TcpAddress:
    """Return the address that "HOST:PORT" stands for.

    Args:
        what: What it is, for the error.
        text: The address.

    Raises:
        InvalidArgument: It stands for none.
    """
    if not text:
        raise InvalidArgument(what, text, "cannot be empty", "want HOST:PORT")
    try:
        address = parse_address(text)
    except ValueError as error:
        raise InvalidArgument(what, text, "want HOST:PORT", str(error)) from error
    if not isinstance(address, TcpAddress):
        raise InvalidArgument(what, text, "want HOST:PORT")
    return address


def check_voters_max(voters_max: int) -> None:
    """Refuse a bound of voters that makes no sense.

    Raises:
        InvalidArgument: It does not.
    """
    if voters_max not in VOTERS_MAX_CHOICES:
        raise InvalidArgument("number of voters", voters_max, "want 1, 3, 5 or 7", "an even number survives no more failures")


def format_address(address: TcpAddress) -> str:
    """Return "HOST:PORT", with brackets around an IPv6 address."""
    return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"


def parse_peer(text: str) -> PeerSpec:
    """Return the peer that "ID:HOST:PORT" or "HOST:PORT" describes.

    Raises:
        InvalidArgument: It describes none.
    """
    head, colon, rest = text.partition(":")
    if colon and head.isascii() and head.isdigit() and (rest.startswith("[") or ":" in rest):
        return PeerSpec(check_node_id(int(head[:20])), format_address(parse_tcp("peer", rest)))
    return PeerSpec(0, format_address(parse_tcp("peer", text)))
