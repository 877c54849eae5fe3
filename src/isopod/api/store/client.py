"""StoreClient: the replicated store from anywhere, through the nodes' RPC.

    async with StoreClient(world, [parse_address("10.0.0.1:7000"), parse_address("10.0.0.2:7000")], tls=tls) as store:
        await store.put("greeting", b"hello")
        print((await store.get("greeting")).value)

One connection, to the leader as soon as it is known. Operations submitted in one turn of the loop travel together. A write is sent
again when a node dies, and applied once; a call ends at its deadline (5 s unless said otherwise), whatever happens.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, NamedTuple, Self

import msgspec

from isopod.api.messages import Empty
from isopod.api.store import messages as m
from isopod.api.store import methods
from isopod.api.store.cache import CacheSettings, CacheStatistics, ReadCache
from isopod.api.store.messages import ClientOp, Consistency, Get, KvApply, KvWatch, LeaseKeep, Range
from isopod.api.store.nodes import Nodes
from isopod.api.store.operations import TIMEOUT_S, Found, StoreOperations
from isopod.api.store.reader import Reader, ReaderSettings
from isopod.api.store.sender import Sender, SenderSettings, late
from isopod.api.store.watches import ClientWatch
from isopod.runtime.metrics import Registry
from isopod.world.errors import InvalidArgument, IsopodError, RevisionCompacted
from isopod.world.network import Address
from isopod.world.tls import ClientTls
from isopod.world.world import World


class ClientSettings(NamedTuple):
    """How a client works.

    Args:
        sender: Bounds of writes.
        reader: Bounds of reads.
        cache: Keep what was read, None for not at all.
        with_session: Whether writes whose fate is unknown are sent again, safely; the first write opens a session.
    """

    sender: SenderSettings = SenderSettings()
    reader: ReaderSettings = ReaderSettings()
    cache: CacheSettings | None = None
    with_session: bool = True


class StoreClient(StoreOperations):
    """Close after use, or use in `async with`.

    Args:
        world: Network and chance.
        addresses: Of some nodes; the leader is found through them.
        tls: Secures the connections. TCP must have it, unless `plaintext`.
        plaintext: Allow TCP without TLS, on loopback and trusted links.
        settings: How it works.
        metrics: Where the cache's look-ups are counted; None for nowhere.
    """

    def __init__(
        self,
        world: World,
        addresses: Sequence[Address],
        *,
        tls: ClientTls | None = None,
        plaintext: bool = False,
        settings: ClientSettings = ClientSettings(),  # noqa: B008 - an immutable tuple
        metrics: Registry | None = None,
    ) -> None:
        self._chance = world.random.stream("store.client").random
        self._loop = asyncio.get_running_loop()
        self._nodes = Nodes(world, addresses, tls=tls, plaintext=plaintext)
        self._sender = Sender(self._send, self._chance, settings=settings.sender, with_session=settings.with_session)
        self._reader = Reader(self._ask, self._chance, settings=settings.reader)
        self._cache = None if settings.cache is None else ReadCache(settings.cache, metrics)
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End everything; what is open fails."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._reader.close()
        await self._sender.close()
        await self._nodes.close()

    @property
    def n_repeats(self) -> int:
        """How many commands were sent once more."""
        return self._sender.n_repeats

    def submit(self, op: ClientOp, *, timeout_s: float = TIMEOUT_S) -> Awaitable[Any]:
        """Have one operation done; return what waits for its result."""
        return self._sender.submit(op, timeout_s)

    def read(
        self, op: Get | Range, *, consistency: Consistency = "linearizable", max_age_s: float = 1.0, timeout_s: float = TIMEOUT_S
    ) -> Awaitable[Found]:
        """Read without writing to the log; a cached read asks a node only if what is kept is too old."""
        _check_read(op)
        cache = self._cache
        if consistency != "cached" or cache is None or type(op) is not Get:
            return self._reader.submit(op, consistency, max_age_s, timeout_s=timeout_s)
        if self._watching is None and cache.settings.by == "watch":
            self._watching = self._loop.create_task(self._watch_for(cache), name="store cache")
        found = cache.get(op.key, max_age_s)
        if found is None:
            return self._read_and_keep(cache, op, timeout_s)
        done: asyncio.Future[Found] = self._loop.create_future()
        done.set_result(found)
        return done

    def watch(
        self, prefix: str = "", *, exact: bool = False, from_revision: int = 0, progress_s: float = 10.0, verified: bool = False
    ) -> ClientWatch:
        """Watch keys; the stream goes on over lost connections and changed leaders."""
        request = KvWatch(prefix=prefix, exact=exact, from_revision=from_revision, progress_s=progress_s, verified=verified)
        return ClientWatch(self._nodes, request, self._chance)

    async def lease_keep(self, leases: Sequence[int], *, timeout_s: float = TIMEOUT_S) -> list[float]:
        """Keep leases alive; return the seconds each has, counted from when this was called; 0 for one that is no more."""
        request = LeaseKeep(leases=list(leases))
        expires_at = self._loop.time() + timeout_s
        pause_s = 0.02
        while True:
            left_s = expires_at - self._loop.time()
            try:
                kept = await self._nodes.call(methods.LEASE_KEEP, request, timeout_s=max(0.0, min(left_s, timeout_s / 2)))
                return [ttl_ms / 1000 for ttl_ms in kept.ttl_ms]
            except IsopodError as error:
                pause_s = min(0.25, error.retry_after_s or 2 * pause_s)
                if not error.retryable:
                    raise
                if self._loop.time() + pause_s >= expires_at:
                    raise late("keeping leases alive", timeout_s, error) from error
            await asyncio.sleep(pause_s)

    async def lease_list(self, *, timeout_s: float = TIMEOUT_S) -> list[m.LeaseInfo]:
        """Return all leases, as the asked node has them."""
        return (await self._nodes.call(methods.LEASE_LIST, Empty(), timeout_s=timeout_s)).leases

    async def status(self, *, timeout_s: float = TIMEOUT_S) -> m.StoreStatus:
        """Return how the asked node sees the store."""
        return await self._nodes.call(methods.KV_STATUS, Empty(), timeout_s=timeout_s)

    async def consistency(self, *, timeout_s: float = TIMEOUT_S) -> m.ConsistencyReport:
        """Compare the state of all members, now."""
        return await self._nodes.call(methods.KV_CONSISTENCY, Empty(), timeout_s=timeout_s)

    def cache_statistics(self) -> CacheStatistics:
        """Return what the cache did and holds."""
        return CacheStatistics(0, 0, 0, 0) if self._cache is None else self._cache.statistics()

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _send(self, command: bytes, timeout_s: float) -> bytes:
        applied = await self._nodes.call(methods.KV_APPLY, KvApply(command=command), timeout_s=timeout_s)
        if applied.leader:
            self._nodes.prefer(applied.leader, applied.address)
        return applied.outcome

    async def _ask(self, request: m.KvRead, timeout_s: float) -> m.KvPages:
        return await self._nodes.call(methods.KV_READ, request, timeout_s=timeout_s)

    async def _read_and_keep(self, cache: ReadCache, op: Get, timeout_s: float) -> Found:
        asked_s = self._loop.time()
        found = await self._reader.submit(op, "linearizable", 0.0, timeout_s=timeout_s)
        cache.keep(op.key, found, asked_s)
        return found

    async def _watch_for(self, cache: ReadCache) -> None:
        """Keep the cache up to date, for as long as the client lives."""
        settings = cache.settings
        while True:
            try:
                async with self.watch(settings.prefix, progress_s=settings.progress_s, verified=True) as watch:
                    async for changes in watch:
                        cache.on_changes(changes)
            except RevisionCompacted:
                cache.on_gap()
            except IsopodError:
                # It cannot be watched now: entries grow old by themselves.
                cache.on_gap()
                await asyncio.sleep(settings.progress_s)


def _check_read(op: Get | Range) -> None:
    """Refuse what no node would take.

    Raises:
        InvalidArgument: A key or bound is over its limit.
    """
    if type(op) is Get:
        if not 0 < len(op.key) <= m.KEY_CHARS_MAX:
            raise InvalidArgument("key", op.key[:80], f"want 1 to {m.KEY_CHARS_MAX} characters")
        return
    try:
        msgspec.convert(msgspec.to_builtins(op), type(op))
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        why, _, _ = str(error).partition(" - at `$")
        raise InvalidArgument("range", str(op)[:80], why) from None
