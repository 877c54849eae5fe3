"""Nodes: a client's connections to the store's nodes, of which one is in use: the leader's, as far as that is known.

A node that does not answer is left for the next one at once; what it may have done is the caller's business (sessions make that safe). Any
node will do: it hands on what only the leader can do and says who that is, and then the next calls go there directly.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from isopod.net.address import format_address, parse_address
from isopod.net.rpc import Client, connect
from isopod.net.rpc.client_call import ClientCall
from isopod.net.rpc.limits import RpcLimits
from isopod.wire.service import Method
from isopod.world.errors import DeadlineExceeded, Disconnected, HandshakeFailed, InvalidArgument, IsopodError, NotStarted, VersionMismatch
from isopod.world.network import Address
from isopod.world.tls import ClientTls
from isopod.world.world import World

Q = TypeVar("Q")
R = TypeVar("R")

CONNECT_S: Final = 1.0
HEARTBEAT_S: Final = 0.5
"""A node that is silent for three of these is left."""
ADDRESSES_MAX: Final = 64
_LEAVING: Final = (Disconnected, DeadlineExceeded, HandshakeFailed, VersionMismatch)


class Nodes:
    """The way to the store.

    Args:
        world: Network and chance.
        addresses: Of some nodes; more are learned.
        tls: Secures the connections. TCP must have it, unless `plaintext`.
        plaintext: Allow TCP without TLS, on loopback and trusted links.
        peer: What to call ourselves.
        connect_s: How long connecting to one node may take.
    """

    def __init__(
        self,
        world: World,
        addresses: Sequence[Address],
        *,
        tls: ClientTls | None = None,
        plaintext: bool = False,
        peer: str = "isopod-store",
        connect_s: float = CONNECT_S,
    ) -> None:
        if not addresses:
            raise InvalidArgument("addresses", "", "name one node at least")
        self.n_connects = 0
        self._world = world
        self._known: dict[str, Address] = {format_address(address): address for address in addresses}
        self._order = list(self._known)
        self._at = 0
        self._sought = 0
        """The leader that is looked for among the known nodes, and how many of them were not tried."""
        self._n_to_try = 0
        self._tls = tls
        self._plaintext = plaintext
        self._peer = peer
        self._connect_s = connect_s
        self._client: Client | None = None
        self._where = ""
        self._connecting: asyncio.Task[Client] | None = None
        self._dropped: dict[int, tuple[asyncio.Task[None], Client]] = {}
        self._n_dropped = 0
        self._is_closed = False

    @property
    def where(self) -> str:
        """The node in use, "" if none is."""
        return self._where if self._client is not None and self._client.is_usable else ""

    async def call(self, method: Method[Q, R], request: Q, *, timeout_s: float) -> R:
        """Call a method of the node in use; once. After a failure the next call goes to another node.

        Raises:
            DeadlineExceeded: No answer in time.
            NotStarted: No node could be reached.
            IsopodError: What the handler raised.
        """
        client = self._client
        if client is None or not client.is_usable:
            client = await self._connected(timeout_s)
        try:
            return await client.call(method, request, timeout_s=timeout_s)
        except _LEAVING:
            self._leave(client)
            raise

    @asynccontextmanager
    async def open(self, method: Method[Q, R], request: Q, *, timeout_s: float) -> AsyncIterator[ClientCall[R]]:
        """Open a call with streams on the node in use.

        Args:
            method: Which.
            request: Its request.
            timeout_s: How long connecting may take; the call itself has no deadline.
        """
        client = self._client
        if client is None or not client.is_usable:
            client = await self._connected(timeout_s)
        async with client.open(method, request) as call:
            yield call

    def prefer(self, leader: int, address: str) -> None:
        """Use the leader for what comes next. Calls under way have a second to be answered; streams are opened anew.

        Args:
            leader: Its id. If nobody says where it is, or not so that we could go there, the other known nodes are tried, each once.
            address: Where others reach it, "" if that is not known.
        """
        if self._is_closed or self._client is None or address == self._where:
            return
        if address and (address in self._known or ((self._tls is not None or self._plaintext) and len(self._known) < ADDRESSES_MAX)):
            if address not in self._known:
                self._known[address] = parse_address(address)
                self._order.append(address)
            self._at = self._order.index(address)
        else:
            if leader != self._sought:
                self._sought, self._n_to_try = leader, len(self._order) - 1
            if not self._n_to_try:
                return
            self._n_to_try -= 1
            self._at = (self._order.index(self._where) + 1) % len(self._order)
        self._drop(self._client)
        self._client = None

    async def close(self) -> None:
        """End all connections."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._client is not None:
            await self._client.close()
        dropped = list(self._dropped.values())
        for task, _ in dropped:
            task.cancel()
        await asyncio.gather(*(task for task, _ in dropped), return_exceptions=True)
        for _, client in dropped:  # a task that was cancelled before its first step has closed nothing
            await client.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _connected(self, timeout_s: float) -> Client:
        if self._is_closed:
            raise Disconnected("the store", "this client was closed")
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(), name="store connect")
            self._connecting.add_done_callback(self._on_connected)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._connecting)
        except TimeoutError:
            raise NotStarted("the store", f"no node answered within {timeout_s:g} s", "see `isopod cluster status`") from None
        except asyncio.CancelledError:
            if self._is_closed:
                raise Disconnected("the store", "this client was closed") from None
            raise

    async def _connect(self) -> Client:
        """Connect to one node, trying each once."""
        failure: IsopodError | None = None
        for _ in range(len(self._order)):
            where = self._order[self._at]
            try:
                client = await connect(
                    self._world,
                    self._known[where],
                    peer=self._peer,
                    timeout_s=self._connect_s,
                    limits=RpcLimits(heartbeat_s=HEARTBEAT_S),
                    tls=self._tls,
                    plaintext=self._plaintext,
                )
            except IsopodError as error:
                if not isinstance(error, _LEAVING):
                    raise
                failure = error
                self._at = (self._at + 1) % len(self._order)
                continue
            self._client, self._where = client, where
            self.n_connects += 1
            return client
        assert failure is not None
        if isinstance(failure, HandshakeFailed | VersionMismatch):
            raise failure
        raise NotStarted("the store", f"no node of {', '.join(self._order)} answers: {failure.message}", failure.hint)

    def _on_connected(self, task: "asyncio.Task[Client]") -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # whoever waits gets it

    def _leave(self, client: Client) -> None:
        """Use another node from now on."""
        if self._client is not client:
            return
        self._client = None
        self._at = (self._order.index(self._where) + 1) % len(self._order)
        self._drop(client)

    def _drop(self, client: Client) -> None:
        """Close a connection when its last calls had time to be answered."""
        number = self._n_dropped
        self._n_dropped += 1
        task = asyncio.get_running_loop().create_task(_close_later(client), name="store leave")
        self._dropped[number] = task, client
        task.add_done_callback(lambda _: self._dropped.pop(number))


async def _close_later(client: Client) -> None:
    try:
        await asyncio.sleep(CONNECT_S)
    finally:
        await client.close()
