"""Book: where nodes are and who speaks for them. What is asked before any connection between nodes is made or accepted.

Sources, the first that knows wins: the replicated records, what the last leader said (agents have nothing else), what is on disk from
before. The disk's copy is for a start of a cluster whose nodes all were down: somebody must be called before anything is replicated.
It implements `AddressBook` of `isopod.cluster.raft.ports`. Host names are resolved with every connection anew, by the Network.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from isopod.cluster.members.config import parse_tcp
from isopod.cluster.members.credentials import bearer_of
from isopod.cluster.members.registry import Registry
from isopod.cluster.members.wire import NodeAddress
from isopod.world.errors import BadRecord, InvalidArgument, from_os_error
from isopod.world.network import Address, PeerIdentity
from isopod.world.world import World

FILE: Final = "peers.json"
FILE_BYTES_MAX: Final = 16 << 20


class Book:
    """Addresses.

    Args:
        world: For its disk.
        folder: The node's data folder.
        secured: Whether peers must show certificates.
    """

    def __init__(self, world: World, folder: str, *, secured: bool) -> None:
        self.cluster_id = ""
        self.registry: Registry | None = None
        self.told: dict[int, NodeAddress] = {}
        """What the last leader said, or the disk."""
        self._world = world
        self._path = f"{folder}/{FILE}"
        self._is_secured = secured
        self._written: bytes = b""

    # --- AddressBook --------------------------------------------------------------------------------------------------

    def address(self, node_id: int) -> Address | None:
        """Return where a node listens, None if that is not known."""
        found = self.find(node_id)
        if found is None:
            return None
        try:
            return parse_tcp("address", found.address)
        except InvalidArgument:
            return None

    def admits(self, node_id: int, identity: PeerIdentity | None) -> bool:
        """Return whether a certificate may speak for a node of this cluster."""
        if not self._is_secured:
            return True
        bearer = bearer_of(identity)
        if bearer is None or bearer.node_id != node_id or bearer.cluster_id != self.cluster_id or bearer.role == "agent":
            return False  # an agent holds no replica
        return self.is_current(node_id, bearer.incarnation)

    def incarnation(self, node_id: int) -> str | None:
        """Return the incarnation on record, None if there is none."""
        found = self.registry.members.get(node_id) if self.registry is not None else None
        return found.incarnation if found is not None else None

    # --- the members' own ---------------------------------------------------------------------------------------------

    def is_current(self, node_id: int, incarnation: str) -> bool:
        """Return whether nothing on record says that this life of the node is over, or another one's turn."""
        if self.registry is None:
            return True
        known = self.incarnation(node_id)
        return (known is None or known == incarnation) and not self.registry.is_removed(node_id, incarnation)

    def find(self, node_id: int) -> NodeAddress | None:
        """Return what is known of a node."""
        record = self.registry.members.get(node_id) if self.registry is not None else None
        if self.registry is not None and record is not None:
            return NodeAddress(node_id, record.address, record.incarnation, record.role, self.registry.health(node_id))
        return self.told.get(node_id)

    def all(self) -> tuple[NodeAddress, ...]:
        """Return all nodes that are known, by id."""
        registry = self.registry
        members, removed = (registry.members, registry.removed) if registry is not None else ({}, {})
        known = sorted({**{node_id: None for node_id in self.told if node_id not in removed}, **members})
        return tuple(found for node_id in known if (found := self.find(node_id)) is not None)

    def tell(self, peers: Iterable[NodeAddress]) -> None:
        """Take over what a leader says: all there are."""
        self.told = {peer.node_id: peer for peer in peers}

    async def load(self) -> None:
        """Read the disk's copy. A damaged one is no loss once a peer is reached; until then it is an error.

        Raises:
            BadRecord: It cannot be read.
            UnavailableError: The disk failed.
        """
        try:
            data = await self._world.disk.read(self._path, n_bytes_max=FILE_BYTES_MAX)
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, "read", self._path) from error
        try:
            self.tell(msgspec.json.decode(data, type=list[NodeAddress]))
        except (msgspec.MsgspecError, ValueError) as error:
            raise BadRecord(self._path, str(error), "remove the file, and name the peers on the command line") from error
        self._written = data

    async def save(self) -> None:
        """Write the disk's copy if it is old: addresses of replicas, and some of everybody else. Raises UnavailableError."""
        data = msgspec.json.encode([msgspec.structs.replace(peer, health="unknown") for peer in self.all()])
        if data == self._written:
            return
        try:
            await self._world.disk.write_atomic(self._path, data)
        except OSError as error:
            raise from_os_error(error, "write", self._path) from error
        self._written = data
