"""Links: calls from node to node, over one kept connection for each peer, secured and to the right one.

A connection is to a node, not to an address: whoever answers must prove to be that node (by the name in its certificate). If its address
on record changes, the next call goes to the new one. Raft has connections of its own (`isopod.cluster.raft.transport`), so that a slow
answer here never delays a heartbeat.
"""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from isopod.cluster.members.book import Book
from isopod.cluster.members.config import format_address
from isopod.cluster.members.credentials import Credentials
from isopod.net.rpc import Client, ReconnectingClient, RetryPolicy, RpcLimits, connect
from isopod.wire.service import Method
from isopod.world.errors import DeadlineExceeded, HandshakeFailed, IsopodError, NotStarted
from isopod.world.network import Address, ClientTls, TcpAddress
from isopod.world.world import World

Q = TypeVar("Q")
R = TypeVar("R")
ONCE: Final = RetryPolicy(attempts_max=1)
CALL_TIMEOUT_S: Final = 5.0
LINKS_MAX: Final = 4096
ADDRESSES_MAX: Final = 8
"""Of one name that are tried in one go."""
_CLOCK_WORDS: Final = ("expired", "not yet valid")


class Links:
    """The kept connections.

    Args:
        world: Its network.
        book: Where nodes are.
        credentials: How connections are secured.
        name: What to call ourselves.
    """

    def __init__(self, world: World, book: Book, credentials: Credentials, name: str) -> None:
        self._world = world
        self._book = book
        self._credentials = credentials
        self._name = name
        self._clients: dict[int, tuple[Address, ReconnectingClient]] = {}
        self._ending: dict[int, asyncio.Task[None]] = {}
        self._n_ended = 0

    async def call(self, node_id: int, method: Method[Q, R], request: Q, *, timeout_s: float = CALL_TIMEOUT_S) -> R:
        """Call a method of a node. What is not idempotent is tried once.

        Raises:
            NotStarted: This node does not know where it is.
            HandshakeFailed: Who answers there is not that node, or a certificate is out of date.
            IsopodError: What it answered, or that it did not.
        """
        client = self.client(node_id)
        try:
            return await client.call(method, request, timeout_s=timeout_s)
        except HandshakeFailed as error:
            raise explain_handshake(error) from error

    def address(self, node_id: int) -> str:
        """Return where a node is reached, as text; "" if that is not known."""
        found = self._book.find(node_id)
        return found.address if found is not None else ""

    def client(self, node_id: int) -> ReconnectingClient:
        """Return the client that leads to a node. It is this object's: nobody else closes it.

        Raises:
            NotStarted: This node does not know where the node is.
        """
        address = self._book.address(node_id)
        if address is None:
            raise NotStarted(f"node {node_id}", "this node does not know its address yet", "try again, or ask another member")
        found = self._clients.get(node_id)
        if found is not None and found[0] == address:
            return found[1]
        self.drop(node_id)
        while len(self._clients) >= LINKS_MAX:
            self.drop(next(iter(self._clients)))
        tls = self._credentials.client(node_id)
        client = ReconnectingClient(
            self._world, address, policy=ONCE, peer=self._name, limits=RpcLimits(heartbeat_s=1.0), tls=tls, plaintext=tls is None
        )
        self._clients[node_id] = (address, client)
        return client

    def drop(self, node_id: int) -> None:
        """Close the connection to a node."""
        found = self._clients.pop(node_id, None)
        if found is not None:
            self._n_ended += 1
            number = self._n_ended
            task = asyncio.get_running_loop().create_task(found[1].close(), name="link-close")
            self._ending[number] = task
            task.add_done_callback(self._forget(number))

    async def close(self) -> None:
        """Close all of them."""
        for node_id in list(self._clients):
            self.drop(node_id)
        for task in list(self._ending.values()):
            await asyncio.gather(task, return_exceptions=True)

    def _forget(self, number: int) -> Callable[["asyncio.Task[None]"], None]:
        def forget(_: "asyncio.Task[None]") -> None:
            self._ending.pop(number, None)

        return forget


async def connect_any(world: World, address: TcpAddress, *, name: str, timeout_s: float, tls: ClientTls | None) -> Client:
    """Connect to whoever listens at an address, by each of the addresses of its name in turn.

    Args:
        world: Its network.
        address: Where; a name is resolved anew.
        name: What to call ourselves.
        timeout_s: For each of them, in seconds.
        tls: How to secure it; None for plaintext.

    Raises:
        NotStarted: Nobody listens there, or there is no such name.
        IsopodError: The last failure.
    """
    where = format_address(address)
    try:
        async with asyncio.timeout(timeout_s):
            found = await world.network.resolve(address.host, address.port)
    except TimeoutError:
        raise DeadlineExceeded(f"resolving {address.host}", timeout_s) from None
    except OSError as error:
        raise NotStarted(where, error.filename or error.strerror or str(error), "check the spelling, and the name server") from error
    last: IsopodError = NotStarted(where, "the name has no address")
    for each in found[:ADDRESSES_MAX]:
        try:
            return await connect(world, each, peer=name, timeout_s=timeout_s, tls=tls, plaintext=tls is None)
        except IsopodError as error:
            last = error
    raise last


def explain_handshake(error: HandshakeFailed) -> HandshakeFailed:
    """Return the error with a hint that fits: certificates out of date mostly mean a wrong clock."""
    if any(words in error.message for words in _CLOCK_WORDS):
        error.hint = "compare the clocks of both machines (timedatectl); a node that was away for long is taken out and joins anew"
    return error
