"""What a node of a cluster answers to its users, over its own socket: the verbs of `isopod.api.cluster` and those of the store.

Thin: the work is `isopod.cluster`'s. A node that is in no cluster has these verbs too, and says how to bring it into one.
"""

import asyncio
from typing import Any, Final

from isopod.api import cluster as c
from isopod.api import messages as m
from isopod.api.store import methods as store_methods
from isopod.cluster.member import ClusterNode
from isopod.cluster.members import records
from isopod.cluster.members.backup import BackupMaker
from isopod.cluster.members.config import ClusterConfig, Init, PeerSpec, Role, parse_peer, parse_tcp
from isopod.cluster.members.members import Members
from isopod.cluster.store.replica import Replica
from isopod.cluster.store.service import handlers as store_handlers
from isopod.net.rpc import Call, Handler
from isopod.net.rpc.call import AnyHandler, AnyMethod
from isopod.runtime.config import NodeConfig
from isopod.wire.service import Method
from isopod.world.errors import Exhausted, InvalidArgument, NotFound, NotStarted, WrongState
from isopod.world.world import World

AnyCall = Call[Any, Any]
CHUNK_BYTES: Final = 256 << 10
BACKUP_BYTES_MAX: Final = 1 << 30
DEFAULT_BIND: Final = "127.0.0.1:7000"
HOW: Final = "start it with --bind HOST:PORT to found one, or with --join HOST:PORT --token TOKEN"
_ROLES: Final[dict[str, Role]] = {"node": "voter", "control": "voter", "agent": "agent"}


def cluster_config(config: NodeConfig) -> ClusterConfig | None:
    """Return what the cluster's part of a node is told; None for a node that is to be in no cluster.

    Raises:
        InvalidArgument: The settings contradict each other.
    """
    told = config.cluster
    if not told.is_wanted:
        return None
    if told.init_primary and (told.init_secondary or told.join_cluster):
        raise InvalidArgument("--init-primary", "with --init-secondary or --join-cluster", "a node founds or joins, not both")
    init: Init = "primary" if told.init_primary else "secondary" if told.init_secondary or told.join_cluster else "auto"
    peers = tuple(parse_peer(text) for text in told.peers)
    return ClusterConfig(
        data_dir=told.data_dir,
        node_id=_own_id(config, peers),
        bind=told.bind or DEFAULT_BIND,
        advertise=told.advertise,
        peers=peers,
        join=tuple(told.join),
        token=told.token or "",
        init=init,
        role=_ROLES[told.role],
        voters_max=told.voters_max,
    )


def _own_id(config: NodeConfig, peers: tuple[PeerSpec, ...]) -> int:
    """Return the node's id: as it was said, else its own place among peers without ids."""
    told = config.cluster
    own = (told.bind, told.advertise)
    for number, peer in enumerate(peers, 1):
        if told.node_id == 1 and not peer.node_id and peer.address in own:
            return number
    return told.node_id


class ClusterServices:
    """The handlers.

    Args:
        world: For the time.
        node: The cluster's part of this node, None if it is in no cluster.
    """

    def __init__(self, world: World, node: ClusterNode | None) -> None:
        self._world = world
        self._node = node
        self._store: Replica | None = None
        self._store_table: dict[AnyMethod, AnyHandler] = {}

    def handlers(self) -> dict[AnyMethod, AnyHandler]:
        """Return a handler for every verb."""
        table: dict[Method[Any, Any], Handler[Any, Any]] = {
            c.STATUS: self.status,
            c.MEMBERS: self.members,
            c.JOIN: self.join,
            c.LEAVE: self.leave,
            c.PROMOTE: self.promote,
            c.DEMOTE: self.demote,
            c.TRANSFER: self.transfer,
            c.SET: self.set,
            c.TOKEN_CREATE: self.create_token,
            c.TOKEN_LIST: self.tokens,
            c.TOKEN_REVOKE: self.revoke_token,
            c.BACKUP: self.backup,
            c.RESTORE: self.restore,
        }
        return {**table, **{method: self._late(method) for method in store_methods.METHODS}}

    # --- handlers -----------------------------------------------------------------------------------------------------

    async def status(self, _: AnyCall, request: c.StatusRequest) -> c.ClusterStatus:
        """What this node knows, or another one."""
        node = self._cluster()
        if request.at and request.at not in (str(node.config.node_id), node.advertised):
            return await node.links.call(_find(node, request.at), c.STATUS, c.StatusRequest(), timeout_s=request.timeout_s)
        return node.status()

    async def members(self, _: AnyCall, __: c.Nothing) -> c.ClusterMembers:
        """Who there is."""
        return c.ClusterMembers(nodes=self._cluster().status().nodes)

    async def join(self, _: AnyCall, request: c.JoinRequest) -> c.Joined:
        """Bring this node into a cluster."""
        node = self._cluster()
        parse_tcp("address to join", request.address)
        await node.join_now(request.address, request.token, timeout_s=request.timeout_s)
        status = node.status()
        message = f"Node {status.node_id} successfully joined cluster"
        return c.Joined(success=True, message=message, peers=status.nodes, voters=status.voters)

    async def leave(self, _: AnyCall, request: c.NodeRequest) -> c.Changed:
        """Take a node out."""
        return await self._members().leave(request.node_id, timeout_s=request.timeout_s)

    async def promote(self, _: AnyCall, request: c.NodeRequest) -> c.Changed:
        """Have it vote."""
        return await self._members().promote(request.node_id, timeout_s=request.timeout_s)

    async def demote(self, _: AnyCall, request: c.NodeRequest) -> c.Changed:
        """Have it vote no more."""
        return await self._members().demote(request.node_id, timeout_s=request.timeout_s)

    async def transfer(self, _: AnyCall, request: c.TransferRequest) -> c.Changed:
        """Have another node lead."""
        return await self._members().transfer(request.node_id, timeout_s=request.timeout_s)

    async def set(self, _: AnyCall, request: c.SetRequest) -> c.Changed:
        """Change what holds for the whole cluster."""
        return await self._members().set_voters_max(request.voters_max, timeout_s=request.timeout_s)

    async def create_token(self, _: AnyCall, request: c.CreateToken) -> c.CreatedToken:
        """Let somebody in."""
        return await self._members().create_token(request)

    async def tokens(self, _: AnyCall, __: c.Nothing) -> c.TokenList:
        """Who may come in."""
        return self._members().tokens()

    async def revoke_token(self, _: AnyCall, request: c.TokenName) -> c.Changed:
        """Let nobody in by it any more."""
        return await self._members().revoke_token(request.id)

    async def backup(self, call: AnyCall, _: c.Nothing) -> c.BackupInfo:
        """Everything that is replicated, at one revision."""
        node = self._cluster()
        await node.store.barrier()
        node.restorer.refuse_users()
        maker = BackupMaker(node.store.machine, node.cluster_id, self._world.clock.now_ns())
        for piece in maker.pieces():
            await asyncio.sleep(0)  # between the pieces others get their turn
            for start in range(0, len(piece), CHUNK_BYTES):
                await call.send(m.Chunk(data=piece[start : start + CHUNK_BYTES]))
        return maker.info()

    async def restore(self, call: AnyCall, request: c.RestoreRequest) -> c.Restored:
        """The same, back."""
        node = self._cluster()
        parts: list[bytes] = []
        n_bytes = 0
        async for chunk in call:
            n_bytes += len(chunk.data)
            if n_bytes > BACKUP_BYTES_MAX:
                raise Exhausted("backup", f"{BACKUP_BYTES_MAX >> 20} MiB", "it is larger than a store can be")
            parts.append(chunk.data)
        return await node.restorer.restore(b"".join(parts), force=request.force)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _cluster(self) -> ClusterNode:
        if self._node is None:
            raise WrongState("node", "at this socket", "in no cluster", "do that", hint=HOW)
        return self._node

    def _members(self) -> Members:
        return self._cluster().members

    def _late(self, method: AnyMethod) -> AnyHandler:
        """Return the handler of one of the store's verbs, looked for when it is called: there is a store only once the node is a member."""

        def handle(call: AnyCall, request: Any) -> Any:  # of the method's types
            node = self._cluster()
            store = _store_of(node)
            if method in _REFUSED_IN_RESTORE:
                node.restorer.refuse_users()
            if store is not self._store:
                self._store = store
                self._store_table = dict(store_handlers(store, reserved=records.RESERVED))
            return self._store_table[method](call, request)

        return handle


_REFUSED_IN_RESTORE: Final[tuple[AnyMethod, ...]] = (store_methods.KV_APPLY, store_methods.KV_READ, store_methods.KV_TXN)


def _store_of(node: ClusterNode) -> Replica:
    """Return a node's replica.

    Raises:
        NotStarted: It is just being opened: whoever asks may ask again, or another node, by himself.
        WrongState: There is none.
    """
    try:
        return node.store
    except WrongState as error:
        status = node.status()
        if status.state != "joining" or status.why:
            raise
        why, hint = "it is just starting, and has not opened its replica", "ask again in a moment, or ask another node"
        raise NotStarted(f"node {status.node_id}", why, hint) from error


def _find(node: ClusterNode, text: str) -> int:
    """Return the id of the node that is called or reached so."""
    for peer in node.book.all():
        if text in (str(peer.node_id), peer.address):
            return peer.node_id
    raise NotFound("node", text, "see: isopod cluster members")
