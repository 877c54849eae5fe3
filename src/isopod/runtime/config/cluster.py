"""ClusterSection: what a node is told about its cluster: the table [cluster] of the configuration file, ISOPOD_CLUSTER_*, and the
short flags of `isopod node`.

Values and their form only; what they mean together, `isopod.cluster.members.config` checks.
"""

from typing import Annotated, Final, Literal, NamedTuple

import msgspec
from msgspec import Meta

NodeRole = Literal["node", "control", "agent"]
"""node: runs containers and holds a replica. control: holds a replica only, and needs no root. agent: runs containers only."""
SECTION: Final = "cluster"


class ClusterRow(NamedTuple):
    """One setting: its field, its flag, and what help says."""

    name: str
    flag: str
    want: str
    help: str


CLUSTER_SETTINGS: Final = (
    ClusterRow("node_id", "--id", "a whole number from 1 on", "this node's id in its cluster, never used twice"),
    ClusterRow("bind", "--bind", "HOST:PORT", "where other nodes reach this one; makes it a node of a cluster"),
    ClusterRow("advertise", "--advertise", "HOST:PORT", "the same as the others see it, if that differs"),
    ClusterRow("data_dir", "--data-dir", "an absolute path", "the cluster's state; without --root the engine's data lies there too"),
    ClusterRow("peers", "--peers", "ID:HOST:PORT, or HOST:PORT, separated by commas", "the nodes that form the cluster together"),
    ClusterRow("join", "--join", "HOST:PORT, separated by commas", "members to join by"),
    ClusterRow(
        "token", "--token", "a join token, or a secret of 24 characters and more", "what lets this node in, or all that form a cluster"
    ),
    ClusterRow("join_cluster", "--join-cluster", "true or false", "join the peers, never found a cluster"),
    ClusterRow("init_primary", "--init-primary", "true or false", "found the cluster, unless a peer is in one already"),
    ClusterRow("init_secondary", "--init-secondary", "true or false", "the same as --join-cluster"),
    ClusterRow("role", "--role", "node, control or agent", "run containers and hold a replica; hold a replica only; run containers only"),
    ClusterRow("voters_max", "--voters-max", "1, 3, 5 or 7", "how many nodes vote at most; said when the cluster is founded"),
)
"""In the order of help. Flags may be repeated where there are several values: --peer is the same as --peers."""


def _meta(name: str, *, is_secret: bool = False) -> Meta:
    row = next(row for row in CLUSTER_SETTINGS if row.name == name)
    return Meta(description=row.help, extra={"want": row.want, "flag": row.flag, "secret": is_secret})


class ClusterSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings. Without `bind` and `join` the node is in no cluster."""

    node_id: Annotated[int, Meta(ge=1, le=2**63 - 1), _meta("node_id")] = 1
    bind: Annotated[str, _meta("bind")] = ""
    advertise: Annotated[str, _meta("advertise")] = ""
    data_dir: Annotated[str, Meta(pattern=r"^(/[^\x00]*)?$"), _meta("data_dir")] = ""
    peers: Annotated[list[str], _meta("peers")] = []
    join: Annotated[list[str], _meta("join")] = []
    token: Annotated[str | None, _meta("token", is_secret=True)] = None
    join_cluster: Annotated[bool, _meta("join_cluster")] = False
    init_primary: Annotated[bool, _meta("init_primary")] = False
    init_secondary: Annotated[bool, _meta("init_secondary")] = False
    role: Annotated[NodeRole, _meta("role")] = "node"
    voters_max: Annotated[Literal[1, 3, 5, 7], _meta("voters_max")] = 5

    @property
    def is_wanted(self) -> bool:
        """Whether the node is to be in a cluster at all."""
        return bool(self.bind or self.join or self.peers) or self.role != "node"
