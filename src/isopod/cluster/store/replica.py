"""Replica: a node's door to the replicated store.

Writes go through the log: on the leader they are proposed, elsewhere they are handed to the leader, whoever that is, within their
deadline (10 s at most). Reads are answered here: linearizable ones after the log's proof that this node is not behind, stale ones at
once, cached ones at once if the last such proof is young enough. Every answer says how old it may be. Watches are answered here too.

What a command does is decided by the machine; who leads, by Raft. The replica waits, retries and hands on. It repeats a command only
when it was certainly not begun, or when its session makes that safe.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Final, NamedTuple, Self

import msgspec

from isopod.api.messages import Empty
from isopod.api.store import messages as m
from isopod.api.store import methods
from isopod.api.store.messages import ClientOp, Consistency, Get, KvApplied, KvApply, KvChanges, KvPages, KvRead, Page, Range
from isopod.api.store.operations import TIMEOUT_S, Found, StoreOperations
from isopod.api.store.reader import too_much
from isopod.api.store.sender import Sender, SenderSettings, error_of
from isopod.cluster.raft.ports import LeaderChanged, RaftEvent
from isopod.cluster.store.hub import Watcher, WatchHub
from isopod.cluster.store.lessor import Lessor
from isopod.cluster.store.machine import StoreMachine, page_bytes
from isopod.cluster.store.meters import StoreMeters
from isopod.cluster.store.monitor import compare
from isopod.cluster.store.ports import Peers, Raft
from isopod.net.rpc import Later
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.waiters import Waiters
from isopod.world.errors import Disconnected, IsopodError, NotLeader, NotStarted
from isopod.world.world import World

PROPOSAL_S_MAX: Final = 10.0
"""No write waits longer, whatever its caller allows."""
HOPS_MAX: Final = 3
"""So often may a command be handed on: while leaders change, two nodes may believe in each other."""
LOOK_S: Final = 0.05
"""How soon a write that found no leader, or a dead one, looks again; news of a leader wakes it at once."""
PART_BYTES_MAX: Final = 256 << 10
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(m.Outcome).decode


class ReplicaSettings(NamedTuple):
    """How a replica works.

    Args:
        check_s: How often the leader compares the state of all members; 0 for never.
        cached_age_s_max: How old a cached read may be at most, whatever its reader allows; 0 makes all of them linearizable.
        watch_queue_max: Changes that one watcher may leave waiting.
        sender: Bounds of this node's own writes.
    """

    check_s: float = 30.0
    cached_age_s_max: float = 60.0
    watch_queue_max: int = 20_000
    sender: SenderSettings = SenderSettings()


class Replica(StoreOperations):
    """The store on one node. `start` before use, `close` after.

    Args:
        world: Time and chance.
        raft: The log.
        machine: What the log feeds.
        peers: The way to the other nodes; None for a node that is alone.
        settings: How it works.
        logger: Told of what people should know.
        metrics: Where things are counted.
    """

    def __init__(
        self,
        world: World,
        raft: Raft,
        machine: StoreMachine,
        *,
        peers: Peers | None,
        logger: Logger,
        metrics: Registry,
        settings: ReplicaSettings = ReplicaSettings(),  # noqa: B008 - an immutable tuple
    ) -> None:
        self.machine = machine
        self.last_report: m.ConsistencyReport | None = None
        self._world = world
        self._raft = raft
        self._peers = peers
        self._settings = settings
        self._logger = logger
        self._meters = StoreMeters(machine, metrics)
        self._loop = asyncio.get_running_loop()
        status = raft.status(with_digest=False)
        self.node_id = status.node_id
        self._leader = status.leader
        self._leader_changed = Waiters()
        self._proven_s: float | None = None
        """The loop's time when the last proof that this node is not behind was asked for."""
        self._hub = WatchHub(machine, queue_max=settings.watch_queue_max)
        self._lessor = Lessor(machine, self._expire)
        self._sender = Sender(self._send_own, world.random.stream("store.replica").random, settings=settings.sender)
        self._unsubscribe = raft.subscribe(self._on_event)
        self._checking: asyncio.Task[None] | None = None
        self._going_on: dict[_Applying, asyncio.Task[None]] = {}
        self._is_closed = False
        if status.leader == self.node_id:
            self._lessor.lead(is_leading=True)

    @property
    def is_leader(self) -> bool:
        """Whether this node leads, as far as it knows."""
        return self._leader == self.node_id

    @property
    def leader(self) -> int:
        """Who leads, as far as this node knows; 0 for nobody."""
        return self._leader

    async def start(self) -> None:
        """Begin to look after what time brings."""
        if self._settings.check_s > 0:
            self._checking = self._loop.create_task(self._check_forever(), name="store monitor")

    async def close(self) -> None:
        """End: what waits fails, watches end."""
        if self._is_closed:
            return
        self._is_closed = True
        self._unsubscribe()
        self._leader_changed.wake()
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        going_on = list(self._going_on.values())
        for task in going_on:
            task.cancel()
        await asyncio.gather(*going_on, return_exceptions=True)
        self._hub.close(Disconnected("the store", "this node is shutting down", "watch on another node"))
        await self._lessor.close()
        await self._sender.close()
        self._meters.close()

    # --- writing ------------------------------------------------------------------------------------------------------

    def submit(self, op: ClientOp, *, timeout_s: float = TIMEOUT_S) -> Awaitable[Any]:
        """Have one operation done through the log, once, whoever leads; return what waits for its result."""
        return self._sender.submit(op, min(timeout_s, PROPOSAL_S_MAX))

    def apply(self, command: bytes, *, timeout_s: float, n_hops: int = 0) -> Awaitable[KvApplied]:
        """Have a packed command applied.

        Args:
            command: It was checked.
            timeout_s: The deadline, 10 s at most.
            n_hops: How many nodes handed it on before this one.

        Returns:
            The packed outcome, and who leads if that is not this node.

        Raises:
            NotLeader: It was handed on too often; it was not begun.
            DeadlineExceeded: It may be applied, or not, unless no leader was found.
            LeadershipLost: It may be applied, or not.
            IsopodError: What the leader raised.
        """
        timeout_s = min(timeout_s, PROPOSAL_S_MAX)
        if self._leader == self.node_id:
            applying = _Applying(self, command, self._loop.time() + timeout_s, n_hops)
            try:
                self._raft.propose_nowait(command, applying, timeout_s=timeout_s)
            except NotLeader:
                pass
            else:
                return applying.later
        return self._apply_anywhere(command, timeout_s, n_hops)

    async def _apply_anywhere(self, command: bytes, timeout_s: float, n_hops: int) -> KvApplied:
        """Apply here, or hand on to whoever leads by then."""
        expires_at = self._loop.time() + timeout_s
        left_s = timeout_s
        while True:
            try:
                return KvApplied(outcome=await self._raft.propose(command, timeout_s=left_s))
            except NotLeader as error:
                if error.leader:
                    self._leader = error.leader if error.leader != self.node_id else self._leader
                refusal = error
            if n_hops >= HOPS_MAX:
                raise refusal
            leader = self._leader
            if self._peers is not None and leader not in {0, self.node_id}:
                try:
                    return await self._hand_on(leader, command, left_s, n_hops)
                except (NotStarted, NotLeader) as error:
                    self._meters.forward_failures.inc()
                    refusal = error if isinstance(error, NotLeader) else refusal
            left_s = await self._wait_leader(expires_at, refusal)

    def go_on(self, applying: "_Applying") -> None:
        """This node ceased to lead before the command was begun: try again, wherever that leads. For `_Applying`."""

        async def go_on() -> None:
            try:
                left_s = max(0.001, applying.expires_at - self._loop.time())
                applying.later.set_result(await self._apply_anywhere(applying.command, left_s, applying.n_hops))
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - whatever it is, the caller's
                applying.later.set_exception(error)
            finally:
                del self._going_on[applying]

        if self._is_closed:
            applying.later.set_exception(NotLeader(self.node_id, 0))
        else:
            self._going_on[applying] = self._loop.create_task(go_on(), name="store command handed on")

    async def _hand_on(self, leader: int, command: bytes, timeout_s: float, n_hops: int) -> KvApplied:
        assert self._peers is not None
        self._meters.forwards.inc()
        request = KvApply(command=command, n_hops=n_hops + 1)
        applied = await self._peers.call(leader, methods.KV_APPLY, request, timeout_s=timeout_s)
        if applied.leader:
            return applied
        return KvApplied(outcome=applied.outcome, leader=leader, address=self._peers.address(leader))

    async def _wait_leader(self, expires_at: float, refusal: NotLeader) -> float:
        """Wait for news of a leader, or a moment; return the seconds left.

        Raises:
            NotLeader: The time is over; nothing was begun.
        """
        left_s = expires_at - self._loop.time()
        if left_s <= 0 or self._is_closed:
            raise refusal
        try:
            async with asyncio.timeout(min(LOOK_S, left_s)):
                await self._leader_changed.wait()
        except TimeoutError:
            pass
        return max(0.001, expires_at - self._loop.time())

    async def _send_own(self, command: bytes, timeout_s: float) -> bytes:
        return (await self.apply(command, timeout_s=timeout_s)).outcome

    async def _expire(self, leases: tuple[int, ...]) -> None:
        outcome = await self._propose(m.LeaseExpire(leases))
        self._logger.info("store.leases_expired", n_leases=len(leases), first=leases[0], n_keys=getattr(outcome, "count", 0))

    async def _propose(self, op: m.LeaseExpire | m.Checkpoint) -> m.Result:
        """Propose, as the leader, what only nodes may."""
        outcome = _decode(await self._raft.propose(_encode(m.Command(m.LEVEL, 0, 0, 0, [op])), timeout_s=TIMEOUT_S))
        if outcome.refusal is not None:
            raise error_of(outcome.refusal)
        return outcome.results[0]

    # --- reading ------------------------------------------------------------------------------------------------------

    async def read(
        self, op: Get | Range, *, consistency: Consistency = "linearizable", max_age_s: float = 1.0, timeout_s: float = TIMEOUT_S
    ) -> Found:
        """Read; see `StoreOperations.read`."""
        sure = self._look(consistency, max_age_s)
        if sure is None:
            await self.barrier(timeout_s)
        age_s, is_cached = sure or (0.0, False)
        return Found(self._page(op, m.ANSWER_BYTES_MAX), self.machine.revision, age_s, is_cached)

    def read_many(self, request: KvRead, *, timeout_s: float) -> KvPages | Later:
        """Answer several reads from one revision, at once or when it is sure that this node is not behind.

        Raises:
            Exhausted: They are more than one answer holds.
            IsopodError: It could not be made sure in time that this node is not behind.
        """
        sure = self._look(request.consistency, request.max_age_s)
        if sure is not None:
            return self.pages(request, sure[0])
        reading = _Reading(self, request, self._loop.time())
        self._raft.read_barrier_nowait(reading, timeout_s=min(timeout_s, PROPOSAL_S_MAX))
        return reading.later

    def pages(self, request: KvRead, age_s: float | None) -> KvPages:
        """Answer several reads from what is here now.

        Raises:
            Exhausted: They are more than one answer holds.
        """
        entries = self.machine.keys.entries
        left = m.ANSWER_BYTES_MAX
        pages: list[Page] = []
        for op in request.reads:
            if type(op) is Get:
                entry = entries.get(op.key)
                if entry is None:
                    pages.append(_NOTHING)
                    left -= 8
                    continue
                page = Page((entry,))
                left -= len(entry.value) + 4 * len(op.key) + 56
            else:
                page = self._page(op, left)
                left -= page_bytes(page)
            if left < 0:
                raise too_much()
            pages.append(page)
        return KvPages(pages=pages, revision=self.machine.revision, age_s=age_s)

    def age_s(self) -> float | None:
        """Return how old this node's state may be: it holds all that was acknowledged so many seconds ago. None if nothing is known."""
        return None if self._proven_s is None else self._loop.time() - self._proven_s

    def _page(self, op: Get | Range, bytes_max: int) -> Page:
        keys = self.machine.keys
        if isinstance(op, Range):
            return keys.page(op, max(0, min(bytes_max, m.PAGE_BYTES_MAX)))
        entry = keys.entries.get(op.key)
        return _NOTHING if entry is None else Page((entry,))

    def _look(self, consistency: Consistency, max_age_s: float) -> tuple[float | None, bool] | None:
        """Return the age of this node's state, and whether it spared asking somebody; None if its reader wants it made sure of first."""
        if consistency == "stale":
            self._meters.stale_reads.inc()
            return self.age_s(), False
        if consistency == "cached":
            age_s = self.age_s()
            if age_s is not None and age_s <= min(max_age_s, self._settings.cached_age_s_max):
                self._meters.cache_hits.inc()
                return age_s, True
            self._meters.cache_misses.inc()
        else:
            self._meters.linearizable_reads.inc()
        return None

    async def barrier(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until everything that was acknowledged before this call is applied here.

        Raises:
            IsopodError: That could not be made sure of in time.
        """
        began_s = self._loop.time()
        await self._raft.read_barrier(timeout_s=min(timeout_s, PROPOSAL_S_MAX))
        self.note_proof(began_s)

    def note_proof(self, began_s: float) -> None:
        """It was made sure that this node holds all that was acknowledged before that time of the loop."""
        if self._proven_s is None or began_s > self._proven_s:
            self._proven_s = began_s

    # --- watches ------------------------------------------------------------------------------------------------------

    def watch(
        self, prefix: str = "", *, exact: bool = False, from_revision: int = 0, progress_s: float = 10.0, verified: bool = False
    ) -> "LocalWatch":
        """Watch keys; see `StoreOperations.watch`. One that is too slow raises `Exhausted`, and may go on from its `revision`."""
        request = m.KvWatch(prefix=prefix, exact=exact, from_revision=from_revision, progress_s=progress_s, verified=verified)
        return LocalWatch(self, self._hub, request)

    # --- leases -------------------------------------------------------------------------------------------------------

    async def lease_keep(self, leases: Sequence[int], *, timeout_s: float = TIMEOUT_S) -> list[float]:
        """Keep leases alive; see `StoreOperations.lease_keep`."""
        kept = await self.keep(m.LeaseKeep(leases=list(leases)), timeout_s=timeout_s)
        return [ttl_ms / 1000 for ttl_ms in kept.ttl_ms]

    async def keep(self, request: m.LeaseKeep, *, timeout_s: float) -> m.LeasesKept:
        """Keep leases alive here if this node leads, else at the leader.

        Raises:
            NotLeader: No leader was found in time.
            IsopodError: The leader could not prove that it leads.
        """
        timeout_s = min(timeout_s, PROPOSAL_S_MAX)
        expires_at = self._loop.time() + timeout_s
        left_s = timeout_s
        while True:
            leader = self._leader
            refusal = NotLeader(self.node_id, leader)
            if leader == self.node_id:
                await self.barrier(left_s)
                if self._leader == self.node_id:
                    return m.LeasesKept(ttl_ms=[int(self._lessor.keep(number) * 1000) for number in request.leases])
            elif leader and self._peers is not None and request.n_hops < HOPS_MAX:
                forwarded = msgspec.structs.replace(request, n_hops=request.n_hops + 1)
                try:
                    return await self._peers.call(leader, methods.LEASE_KEEP, forwarded, timeout_s=left_s)
                except (NotStarted, NotLeader):
                    self._meters.forward_failures.inc()
            left_s = await self._wait_leader(expires_at, refusal)

    def lease_list(self) -> m.LeaseList:
        """Return all leases, as this node has them."""
        return m.LeaseList(
            leases=[
                m.LeaseInfo(lease=lease.id, ttl_ms=lease.ttl_ms, granted_at_ns=lease.granted_ns, n_keys=len(lease.keys))
                for lease in self.machine.leases.by_id.values()
            ]
        )

    # --- how it is ----------------------------------------------------------------------------------------------------

    def status(self) -> m.StoreStatus:
        """Return how this node sees the store."""
        raft, machine = self._raft.status(with_digest=False), self.machine
        report = self.last_report
        return m.StoreStatus(
            node=self.node_id,
            leader=raft.leader,
            leader_address="" if self._peers is None or not raft.leader else self._peers.address(raft.leader),
            role=raft.role,
            term=raft.term,
            applied=raft.applied,
            revision=machine.revision,
            compacted_revision=machine.keys.compacted,
            n_keys=len(machine.keys.entries),
            n_bytes=machine.keys.n_bytes,
            n_leases=len(machine.leases),
            n_sessions=len(machine.sessions),
            n_watchers=self._hub.statistics().n_watchers,
            digest=machine.digest(),
            age_s=self.age_s(),
            consistent=None if report is None else report.consistent,
        )

    def checkpoint(self, index: int) -> m.CheckpointAnswer:
        """Return what this node noted at a checkpoint."""
        return m.CheckpointAnswer(digest=self.machine.checkpoint_at(index), applied=self._raft.status(with_digest=False).applied)

    async def check_consistency(self, *, timeout_s: float = TIMEOUT_S) -> m.ConsistencyReport:
        """Compare the state of all members, now, wherever the leader is.

        Raises:
            NotLeader: No leader was found.
            IsopodError: The leader could not make a checkpoint.
        """
        leader = self._leader
        if leader not in {0, self.node_id} and self._peers is not None:
            return await self._peers.call(leader, methods.KV_CONSISTENCY, Empty(), timeout_s=timeout_s)
        if leader != self.node_id:
            raise NotLeader(self.node_id, leader)
        return await self._check()

    async def _check(self) -> m.ConsistencyReport:
        index = await self._propose(m.Checkpoint())
        assert isinstance(index, int)
        raft = self._raft.status(with_digest=False)
        members = sorted((*raft.voters, *raft.learners))
        report = await compare(self.machine, self._peers or _NoPeers(), node_id=self.node_id, members=members, index=index)
        report = msgspec.structs.replace(report, checked_at_ns=self._world.clock.now_ns())
        self.last_report = report
        self._meters.on_report(report)
        if report.consistent is False:
            digests = {str(member.node): member.digest for member in report.members}
            self._logger.error("store.diverged", index=index, digests=digests)
        return report

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.check_s)
            if not self.is_leader:
                self.last_report = None
                continue
            try:
                await self._check()
            except IsopodError as error:
                self._logger.debug("store.check_failed", why=error.message)

    def _on_event(self, event: RaftEvent) -> None:
        if isinstance(event, LeaderChanged):
            was_leading = self._leader == self.node_id
            self._leader = event.leader
            if event.is_self or was_leading:
                self._lessor.lead(is_leading=event.is_self)
            self._leader_changed.wake()


class _Applying:
    """Waits for the result of a command that was proposed here.

    Args:
        replica: Which goes on with it if this node ceases to lead first.
        command: It.
        expires_at: The loop's time.
        n_hops: How often it was handed on.
    """

    __slots__ = ("_replica", "command", "expires_at", "later", "n_hops")

    def __init__(self, replica: Replica, command: bytes, expires_at: float, n_hops: int) -> None:
        self._replica = replica
        self.command = command
        self.expires_at = expires_at
        self.n_hops = n_hops
        self.later = Later()

    def done(self) -> bool:
        return self.later.done()

    def set_result(self, outcome: bytes) -> None:
        self.later.set_result(KvApplied(outcome=outcome))

    def set_exception(self, error: BaseException) -> None:
        if isinstance(error, NotLeader) and self.n_hops < HOPS_MAX:
            self._replica.go_on(self)
        else:
            self.later.set_exception(error)


class _Reading:
    """Waits until this node may be read.

    Args:
        replica: It.
        request: What is read.
        began_s: The loop's time.
    """

    __slots__ = ("_began_s", "_replica", "_request", "later")

    def __init__(self, replica: Replica, request: KvRead, began_s: float) -> None:
        self._replica = replica
        self._request = request
        self._began_s = began_s
        self.later = Later()

    def done(self) -> bool:
        return self.later.done()

    def set_result(self, _applied: int) -> None:
        self._replica.note_proof(self._began_s)
        try:
            self.later.set_result(self._replica.pages(self._request, 0.0))
        except Exception as error:  # noqa: BLE001 - the caller's, and not the log's, which called this
            self.later.set_exception(error)

    def set_exception(self, error: BaseException) -> None:
        self.later.set_exception(error)


_NOTHING: Final = Page()


class LocalWatch:
    """A watch on this node; use as `async with replica.watch(...) as watch: async for changes in watch: ...`.

    Args:
        replica: Of which node.
        hub: Its watchers.
        request: What is watched.
    """

    def __init__(self, replica: Replica, hub: WatchHub, request: m.KvWatch) -> None:
        self.revision = max(0, request.from_revision - 1)
        self._replica = replica
        self._hub = hub
        self._request = request
        self._number = -1
        self._watcher: Watcher | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._hub.end(self._number)
            self._watcher = None

    def __aiter__(self) -> Self:
        """Iterate over what changes: first how far the watch is, with what came before that was asked for."""
        return self

    async def __anext__(self) -> KvChanges:
        """Return what changed next, or how far the watch is.

        Raises:
            Exhausted: What was told before was taken too slowly: watch anew, from behind `revision`.
            RevisionCompacted: What would be told next is forgotten.
            IsopodError: This node could not make sure that it is not behind, or shuts down.
        """
        request, replica = self._request, self._replica
        if self._watcher is None:
            if request.verified or not request.from_revision:
                await replica.barrier()
            opened = self._hub.open(request.prefix, exact=request.exact, from_revision=request.from_revision)
            self._number, self._watcher = opened
        elif not await self._watcher.wait(request.progress_s) and request.verified:
            await replica.barrier()
        entries = self._watcher.take(replica.machine.revision)
        self.revision = max(self.revision, replica.machine.revision)
        return KvChanges(revision=self.revision, entries=entries, age_s=replica.age_s())


def in_parts(changes: KvChanges) -> list[KvChanges]:
    """Return changes as pieces that fit into frames: all but the last say that there is more."""
    parts: list[KvChanges] = []
    part: list[m.Entry] = []
    n_bytes = 0
    for entry in changes.entries:
        size = len(entry.value) + 4 * len(entry.key) + 48
        if part and n_bytes + size > PART_BYTES_MAX:
            parts.append(KvChanges(revision=0, entries=part, more=True))
            part, n_bytes = [], 0
        part.append(entry)
        n_bytes += size
    parts.append(msgspec.structs.replace(changes, entries=part))
    return parts


class _NoPeers:
    """The peers of a node that is alone."""

    async def call(self, node_id: int, method: Any, request: Any, *, timeout_s: float) -> Any:  # of whatever the method takes
        """Fail: there is nobody."""
        raise NotStarted(f"node {node_id}", "this node knows no way to others")

    def address(self, node_id: int) -> str:
        """Return that it is not known."""
        return ""
