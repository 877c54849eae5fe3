"""RpcPeers: connections to the other nodes' verbs, made when they are needed, one for each node and kept."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from isopod.cluster.raft.ports import NodeId
from isopod.net.address import format_address
from isopod.net.rpc import Client, connect
from isopod.net.rpc.limits import RpcLimits
from isopod.wire.service import Method
from isopod.world.errors import Disconnected, NotStarted
from isopod.world.network import Address
from isopod.world.tls import ClientTls
from isopod.world.world import World

Q = TypeVar("Q")
R = TypeVar("R")

CONNECT_S = 1.0
HEARTBEAT_S = 0.5


class RpcPeers:
    """Close after use.

    Args:
        world: Network.
        address_of: Where a node listens, None if that is not known.
        tls_for: What secures the connection to a node; None for links where nobody else listens.
        peer: What to call ourselves.
    """

    def __init__(
        self,
        world: World,
        address_of: Callable[[NodeId], Address | None],
        *,
        tls_for: Callable[[NodeId], ClientTls] | None = None,
        peer: str = "isopod-node",
    ) -> None:
        self._world = world
        self._address_of = address_of
        self._tls_for = tls_for
        self._peer = peer
        self._clients: dict[NodeId, tuple[Address, Client]] = {}
        self._connecting: dict[NodeId, asyncio.Task[Client]] = {}
        self._is_closed = False

    async def call(self, node_id: NodeId, method: Method[Q, R], request: Q, *, timeout_s: float) -> R:
        """Call a method of a node, once.

        Raises:
            NotStarted: It could not be reached; nothing was begun.
            IsopodError: What the connection or the handler raised.
        """
        address = self._address_of(node_id)
        if address is None:
            raise NotStarted(f"node {node_id}", "its address is not known")
        known = self._clients.get(node_id)
        if known is not None and known[0] == address and known[1].is_usable:
            return await known[1].call(method, request, timeout_s=timeout_s)
        client = await self._connected(node_id, address, timeout_s)
        return await client.call(method, request, timeout_s=timeout_s)

    def address(self, node_id: NodeId) -> str:
        """Return where clients reach a node, as text; "" if that is not known."""
        address = self._address_of(node_id)
        return "" if address is None else format_address(address)

    async def close(self) -> None:
        """End all connections."""
        self._is_closed = True
        tasks = list(self._connecting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, client in list(self._clients.values()):
            await client.close()

    async def _connected(self, node_id: NodeId, address: Address, timeout_s: float) -> Client:
        if self._is_closed:
            raise Disconnected(self._peer, "this node is shutting down")
        task = self._connecting.get(node_id)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._connect(node_id, address), name="store peer")
            self._connecting[node_id] = task
            task.add_done_callback(lambda ended: self._on_connected(node_id, ended))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(task)
        except TimeoutError:
            raise NotStarted(f"node {node_id}", f"no connection within {timeout_s:g} s") from None
        except asyncio.CancelledError:
            if self._is_closed:
                raise Disconnected(self._peer, "this node is shutting down") from None
            raise

    async def _connect(self, node_id: NodeId, address: Address) -> Client:
        known = self._clients.pop(node_id, None)
        if known is not None:
            await known[1].close()
        tls = None if self._tls_for is None else self._tls_for(node_id)
        client = await connect(
            self._world,
            address,
            peer=self._peer,
            timeout_s=CONNECT_S,
            limits=RpcLimits(heartbeat_s=HEARTBEAT_S),
            tls=tls,
            plaintext=tls is None,
        )
        self._clients[node_id] = (address, client)
        return client

    def _on_connected(self, node_id: NodeId, task: "asyncio.Task[Client]") -> None:
        del self._connecting[node_id]
        if not task.cancelled():
            task.exception()  # whoever waits gets it
