"""BlockingStore: the store for programs without an event loop.

    with BlockingStore(world, ["10.0.0.1:7000"], loop_factory=new_loop) as store:
        store.put("greeting", b"hello")

Each call runs the client's loop until it is answered, so calls go one after the other; programs that want many at once use `StoreClient`.
Not to be used where a loop runs already.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Self, TypeVar

from isopod.api.store.client import StoreClient
from isopod.api.store.messages import Consistency, Entry, Txn, TxnResult
from isopod.api.store.operations import TIMEOUT_S, Found
from isopod.net.address import parse_address
from isopod.world.tls import ClientTls
from isopod.world.world import World

T = TypeVar("T")


class BlockingStore:
    """Use in `with`.

    Args:
        world: Network and chance.
        addresses: Of some nodes: "HOST:PORT", "unix:/PATH".
        loop_factory: Makes the loop; the World's own.
        tls: Secures the connections. TCP must have it, unless `plaintext`.
        plaintext: Allow TCP without TLS, on loopback and trusted links.
    """

    def __init__(
        self,
        world: World,
        addresses: Sequence[str],
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop],
        tls: ClientTls | None = None,
        plaintext: bool = False,
    ) -> None:
        self._runner = asyncio.Runner(loop_factory=loop_factory)
        where = [parse_address(text) for text in addresses]
        self._make: Callable[[], StoreClient] = partial(StoreClient, world, where, tls=tls, plaintext=plaintext)
        self._client: StoreClient | None = None

    def __enter__(self) -> Self:
        self._runner.run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the session back and end the connection; once more is fine."""
        client, self._client = self._client, None
        if client is not None:
            self._runner.run(client.close())
        self._runner.close()

    def put(self, key: str, value: bytes, *, lease: int = 0, timeout_s: float = TIMEOUT_S) -> int:
        """Set a key; return the revision."""
        return self._run(lambda store: store.put(key, value, lease=lease, timeout_s=timeout_s))

    def get(self, key: str, *, consistency: Consistency = "linearizable", timeout_s: float = TIMEOUT_S) -> Found:
        """Read a key."""
        return self._run(lambda store: store.get(key, consistency=consistency, timeout_s=timeout_s))

    def delete(self, key: str, *, timeout_s: float = TIMEOUT_S) -> bool:
        """Remove a key; return whether it was there."""
        return self._run(lambda store: store.delete(key, timeout_s=timeout_s))

    def txn(self, txn: Txn, *, timeout_s: float = TIMEOUT_S) -> TxnResult:
        """Do one branch of a transaction, with nothing in between."""
        return self._run(lambda store: store.txn(txn, timeout_s=timeout_s))

    def list_all(self, prefix: str = "", *, timeout_s: float = TIMEOUT_S) -> tuple[list[Entry], int]:
        """Read all keys that begin so; return them and the revision of the first page."""
        return self._run(lambda store: store.list_all(prefix, timeout_s=timeout_s))

    async def _open(self) -> None:
        self._client = self._make()

    def _run(self, call: Callable[[StoreClient], Awaitable[T]]) -> T:
        assert self._client is not None, "use it in a `with` block"
        return self._runner.run(_wait(call, self._client))


def _wait(call: Callable[[StoreClient], Awaitable[T]], client: StoreClient) -> Coroutine[Any, Any, T]:
    async def wait() -> T:
        return await call(client)

    return wait()
