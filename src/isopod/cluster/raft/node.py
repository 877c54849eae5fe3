"""RaftNode: one member of a replicated log, for the code above it.

    node = await RaftNode.open(world, "/var/lib/isopod/raft", node_id=1, cluster_id="c1", machine=machine, transport=transport,
                               settings=RaftSettings(), bootstrap=[1, 2, 3], logger=logger, metrics=metrics)
    await node.start()
    result = await node.propose(b"command")         # on the leader; NotLeader elsewhere
    await node.read_barrier()                       # on any node: what is read from the machine now is not stale
    await node.close()

What it is not: it forwards nothing (a follower says who leads) and knows no addresses; that is the store's and the members' business.

Rules: what a caller waits for ends at its deadline; the outcome of a proposal is unknown after `DeadlineExceeded` and `LeadershipLost`, and
nothing happened after `NotLeader`, `TooLarge` and `Exhausted`. Membership changes go one at a time, learners first; a voter that is to be
removed is demoted before, and a leader hands over before it is.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, cast

from isopod.cluster.raft.changes import Changes
from isopod.cluster.raft.core import (
    ConfState,
    CoreConfig,
    CoreStatus,
    PeerProgress,
    RaftCore,
    open_core,
)
from isopod.cluster.raft.driver import Driver, closed
from isopod.cluster.raft.log import RaftLog
from isopod.cluster.raft.metrics import RaftMetrics
from isopod.cluster.raft.ports import (
    MemberChange,
    Members,
    NodeId,
    PeerStatus,
    RaftStatus,
    Role,
    SnapshotOffer,
    SnapshotReceiver,
    SnapshotSource,
    StateMachine,
    Subscriber,
    Transport,
    TransportIdentity,
    Waiter,
)
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.raft.snapshotter import Snapshotter
from isopod.journal import JournalSettings
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import (
    BadRecord,
    InvalidArgument,
    IsopodError,
    NotLeader,
    WrongState,
)
from isopod.world.world import World

PROPOSE_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 5.0
CHANGE_TIMEOUT_S: Final = 10.0
HAND_OVER_S: Final = 1.0
"""How long a leader that is closed tries to hand over."""


class RaftNode:
    """One member. Made by `open`; who opened it closes it."""

    def __init__(self, world: World, driver: Driver, snapshotter: Snapshotter, *, transport: Transport, metrics: RaftMetrics) -> None:
        self.node_id = driver.node_id
        self.cluster_id = driver.log.identity.cluster_id
        self.incarnation = driver.log.identity.incarnation
        """Drawn when the folder was first used: another one means another disk."""
        self._world = world
        self._driver = driver
        self._snapshotter = snapshotter
        self._transport = transport
        self._metrics = metrics
        self._changes = Changes(driver)
        self._state = "opened"
        self._fault: IsopodError | None = None

    @classmethod
    async def open(
        cls,
        world: World,
        folder: str,
        *,
        node_id: NodeId,
        cluster_id: str,
        machine: StateMachine,
        transport: Transport,
        settings: RaftSettings,
        bootstrap: Sequence[NodeId] | None,
        logger: Logger,
        metrics: Registry,
        incarnation: str | None = None,
        journal_settings: JournalSettings | None = None,
        is_quiet: bool = False,
        open_core: Callable[[CoreConfig], RaftCore] = open_core,
    ) -> "RaftNode":
        """Open a member, or make one: recover its log, bring the machine to its snapshot. Nothing is sent before `start`.

        Args:
            world: Disk, time, chance.
            folder: Its own; made if missing.
            node_id: 1 or more; another disk may have had it before, see `is_quiet`.
            cluster_id: Of all members.
            machine: Empty. The node owns it: nobody else changes it.
            transport: Not started; the node starts and closes it.
            settings: Times and bounds.
            bootstrap: The first voters of a new cluster, equal on all of them; None for a node that will be added to one. Counts only
                while the folder is empty.
            logger: Told of what people should know.
            metrics: Where it counts.
            incarnation: What this disk is called, if others named it; drawn otherwise.
            journal_settings: Other than the defaults.
            is_quiet: Whether it neither stands nor votes until `trust`. For a node whose id another disk had before: until the log has told
                it of its own admission, it may be shown members among whom the old disk was one, or the only one.
            open_core: Makes the core: a test may look, or break something, between core and driver.

        Raises:
            InvalidArgument: An id or a setting makes no sense.
            ForeignCluster: The folder belongs to another cluster.
            IdentityConflict: The folder belongs to another node, or to another incarnation.
            CorruptError: What is on disk is damaged.
            UnavailableError: The disk failed, or another process has the folder.
        """
        settings.check()
        _check_ids(node_id, cluster_id, bootstrap)
        counts = RaftMetrics(metrics)
        first = None if bootstrap is None else (ConfState(voters=tuple(sorted(bootstrap))), machine.snapshot())
        log, found = await RaftLog.open(
            world,
            folder,
            cluster_id=cluster_id,
            node_id=node_id,
            bootstrap=first,
            incarnation=incarnation,
            log=logger,
            journal_settings=journal_settings,
        )
        try:
            header = None if found.snapshot is None else found.snapshot.header
            core = open_core(_core_config(world, node_id, settings)._replace(
                applied=header.index if header else 0,
                hard_state=found.hard_state,
                conf_state=header.conf_state if header else ConfState(),
                snapshot_index=header.index if header else 0,
                snapshot_term=header.term if header else 0,
                records=found.records,
            ))  # fmt: skip
            if found.snapshot is not None:
                machine.restore(found.snapshot.machine)
        except ValueError as error:
            await log.close()
            raise BadRecord(folder, f"the log does not fit together: {error}", "let the node join again under a new id") from error
        except BaseException:
            await log.close()
            raise
        driver = Driver(
            world,
            core,
            log,
            machine,
            transport=transport,
            settings=settings,
            snapshot=header,
            logger=logger,
            metrics=counts,
            is_quiet=is_quiet,
        )
        point = world.failpoints.point("raft.before_snapshot")
        snapshotter = Snapshotter(driver, logger=logger, metrics=counts, before_snapshot=point)
        return cls(world, driver, snapshotter, transport=transport, metrics=counts)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to take part.

        Raises:
            WrongState: It was started before.
            IsopodError: The transport cannot begin.
        """
        if self._state != "opened":
            raise WrongState("raft node", str(self.node_id), self._state, "start it")
        self._state = "started"
        driver = self._driver
        await self._transport.start(driver.log.identity, _Sink(self, driver, self._snapshotter))
        driver.on_slice = self._snapshotter.look
        driver.on_wanted = self._snapshotter.want
        driver.log.on_full(self._on_full)
        driver.open()
        self._metrics.watch_peers(lambda: [(peer, self._transport.link(peer)) for peer in self.members().all() if peer != self.node_id])

    async def trust(self) -> None:
        """Make durable what is applied here, so that no start finds less; from now on this node stands and votes.

        Raises:
            UnavailableError: The disk failed or is full; it stays quiet.
        """
        await self._driver.log.save_state()
        self._driver.is_quiet = False
        self._driver.wake()

    async def close(self, *, hand_over: bool = True) -> None:
        """Stop for good: hand the lead over, write what waits, give the folder's lock back. Callers that wait get `NotStarted`.

        Args:
            hand_over: Whether a leader tries to hand over first, for up to a second.
        """
        if self._state == "closed":
            return
        was, self._state = self._state, "closed"
        driver = self._driver
        if was == "started":
            if hand_over and driver.role == "leader" and len(driver.conf_state.voters) > 1:
                with suppress(IsopodError):  # if it fails, the others will notice that it is gone
                    await self._changes.hand_over(None, HAND_OVER_S)
            driver.close(closed(self.node_id))
            await self._snapshotter.close()
            await self._transport.close()
        self._metrics.close()
        await driver.log.close()

    # --- commands and reads -------------------------------------------------------------------------------------------

    async def propose(self, command: bytes, *, timeout_s: float = PROPOSE_TIMEOUT_S) -> Any:  # of whatever the machine returns
        """Have a command applied on all members; return what the own machine answered.

        Args:
            command: At most `command_bytes_max`.
            timeout_s: After which the outcome is unknown.

        Raises:
            NotLeader: Another node leads, or none; nothing happened.
            TooLarge: It is over the limit; nothing happened.
            Exhausted: Too much is under way; nothing happened.
            DiskFull: This node's disk is full; nothing happened.
            LeadershipLost: The outcome is unknown.
            DeadlineExceeded: The outcome is unknown.
            NotStarted: The node is closed.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.propose_nowait(command, future, timeout_s=timeout_s)
        return await future

    def propose_nowait(self, command: bytes, waiter: Waiter, *, timeout_s: float = PROPOSE_TIMEOUT_S) -> None:
        """Do as `propose`, but tell the waiter. What is known at once is raised at once."""
        driver = self._driver
        if driver.role != "leader" or self._fault is not None or not driver.is_open:
            self._check_open()
            if driver.role != "leader":
                raise NotLeader(self.node_id, driver.leader)
            if self._fault is not None:
                raise self._fault
        proposals = driver.proposals
        proposals.add(command, timeout_s, waiter)
        if proposals.has_waiting:  # else a round that ends begins the next
            driver.begin(proposals.n_alone)

    async def read_barrier(self, *, timeout_s: float = READ_TIMEOUT_S) -> int:
        """Wait until whatever was acknowledged anywhere before this call is applied here; return the applied index. On any member.

        Raises:
            DeadlineExceeded: No leader answered in time.
            Exhausted: Too many wait.
            NotStarted: The node is closed.
        """
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.read_barrier_nowait(future, timeout_s=timeout_s)
        return await future

    def read_barrier_nowait(self, waiter: Waiter, *, timeout_s: float = READ_TIMEOUT_S) -> None:
        """Do as `read_barrier`, but tell the waiter, in the moment in which the machine may be read."""
        self._check_open()
        reads = self._driver.reads
        reads.add(timeout_s, waiter)
        if reads.has_waiting:
            self._driver.begin(reads.n_alone)

    async def wait_applied(self, index: int, *, timeout_s: float = READ_TIMEOUT_S) -> None:
        """Wait until the own machine has applied an index.

        Raises:
            DeadlineExceeded: Not in time.
        """
        await self._driver.wait(lambda: self._driver.applied >= index, timeout_s, f"applying entry {index}", is_polled=True)

    async def wait_leader(self, *, timeout_s: float = CHANGE_TIMEOUT_S) -> NodeId:
        """Wait until this node knows a leader, and return it.

        Raises:
            DeadlineExceeded: None in time.
        """
        await self._driver.wait(lambda: bool(self._driver.leader), timeout_s, "the election of a leader")
        return self._driver.leader

    # --- members ------------------------------------------------------------------------------------------------------

    async def change_member(self, change: MemberChange, *, timeout_s: float = CHANGE_TIMEOUT_S) -> Members:
        """Change one member, on the leader; return the members after it.

        Raises:
            NotLeader: Another node leads; also when this one was to be removed or demoted: it has handed over, ask the next.
            InUse: Another change is under way.
            NotFound: No such member.
            AlreadyExists: It is that already.
            WrongState: A learner is behind; or the rest could not agree on anything any more.
            LeadershipLost: The outcome is unknown.
            DeadlineExceeded: The outcome is unknown.
        """
        self._check_open()
        return await self._changes.change(change, timeout_s)

    async def transfer_leadership(self, to: NodeId | None = None, *, timeout_s: float = CHANGE_TIMEOUT_S) -> NodeId:
        """Hand the lead over, on the leader; return who leads then.

        Args:
            to: A voter; None for the one that is furthest.
            timeout_s: For all tries together.

        Raises:
            NotLeader: Another node leads already.
            NotFound: `to` is no voter.
            WrongState: It, or every other voter, is not heard of.
            DeadlineExceeded: It did not take over; this node still leads, or somebody will.
        """
        self._check_open()
        self._changes.check_leader()
        return await self._changes.hand_over(to, timeout_s)

    def members(self) -> Members:
        """Return who replicates the log, as of what is applied here."""
        return self._driver.members

    # --- looking ------------------------------------------------------------------------------------------------------

    @property
    def is_leader(self) -> bool:
        """Whether this node believes to lead."""
        return self._driver.role == "leader"

    @property
    def leader(self) -> NodeId:
        """Who leads, as far as this node knows; 0 for nobody."""
        return self._driver.leader

    @property
    def applied_index(self) -> int:
        """How far the own machine is."""
        return self._driver.applied

    @property
    def fault(self) -> IsopodError | None:
        """What keeps this node from taking commands: its full disk; None if nothing does."""
        return self._fault

    def status(self, *, with_digest: bool = True) -> RaftStatus:
        """Return what this node knows now.

        Args:
            with_digest: Whether to ask the machine for its digest.
        """
        driver = self._driver
        core: CoreStatus = driver.core.status()
        progress = {peer.id: peer for peer in core.progress}
        members = driver.members
        others = [peer for peer in members.all() if peer != self.node_id]
        return RaftStatus(
            node_id=self.node_id,
            cluster_id=self.cluster_id,
            role=cast("Role", core.role),
            term=core.term,
            leader=core.leader,
            commit=core.commit,
            applied=driver.applied,
            first_index=core.first_index,
            last_index=core.last_index,
            snapshot_index=driver.log.snapshot.index,
            voters=members.voters,
            learners=members.learners,
            peers=tuple(self._peer_status(peer, progress.get(peer)) for peer in others),
            digest=driver.machine.digest() if with_digest else "",
        )

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Tell a callback of every event (`isopod.cluster.raft.ports`), from within the turn: it must be quick and must not raise.

        Returns:
            What takes it off again.
        """
        return self._driver.subscribe(callback)

    async def make_snapshot(self) -> int:
        """Make a snapshot now, whatever the settings say; return the index that counts then."""
        self._check_open()
        await asyncio.shield(self._snapshotter.start())
        return self._driver.log.snapshot.index

    # --- inside -------------------------------------------------------------------------------------------------------

    def _peer_status(self, peer: NodeId, progress: PeerProgress | None) -> PeerStatus:
        link = self._transport.link(peer)
        return PeerStatus(
            node_id=peer,
            match=progress.match if progress else 0,
            next=progress.next if progress else 0,
            state=progress.state if progress else "",
            is_active=self._driver.is_heard(peer),
            is_connected=link.is_connected,
            rtt_s=link.rtt_s,
            n_queued=link.n_queued,
        )

    def _on_full(self, error: IsopodError | None) -> None:
        """The own disk is full: take no more commands, and let somebody lead who has room."""
        self._fault = error
        driver = self._driver
        if error is not None and driver.is_open and driver.role == "leader":
            with suppress(IsopodError):  # nobody else may be there
                driver.core.transfer_leader(self._changes.heir(None))
                driver.wake()

    def _check_open(self) -> None:
        if self._state != "started" or not self._driver.is_open:
            raise closed(self.node_id)


class _Sink:
    """What the transport calls: `TransportSink`."""

    def __init__(self, node: RaftNode, driver: Driver, snapshotter: Snapshotter) -> None:
        self._node = node
        self._driver = driver
        self._snapshotter = snapshotter

    def on_messages(self, sender: NodeId, messages: Sequence[bytes]) -> None:
        self._driver.take(sender, messages)

    def on_unreachable(self, node_id: NodeId) -> None:
        if self._driver.is_open:
            self._driver.core.report_unreachable(node_id)

    def on_peer_up(self, node_id: NodeId) -> None:
        self._driver.changed.wake()

    def on_peer_lost(self, node_id: NodeId) -> None:
        self.on_unreachable(node_id)
        self._driver.on_peer_lost(node_id)

    async def open_source(self, index: int, term: int) -> SnapshotSource:
        return await self._driver.log.snapshots.open_source(index, term)

    async def open_receiver(self, sender: NodeId, offer: SnapshotOffer) -> SnapshotReceiver:
        if not self._driver.is_open:
            raise closed(self._driver.node_id)
        return await self._snapshotter.receive(sender, offer)

    def on_snapshot_sent(self, node_id: NodeId, *, ok: bool) -> None:
        if ok:
            self._node._metrics.snapshots_sent.inc()
        if self._driver.is_open:
            self._driver.core.report_snapshot(node_id, ok=ok)
            self._driver.wake()

    def known_incarnation(self, node_id: NodeId) -> str | None:
        return self._driver.log.incarnation_of(node_id)

    def learn_incarnation(self, node_id: NodeId, incarnation: str) -> None:
        self._driver.log.learn_peer(node_id, incarnation)


def _core_config(world: World, node_id: NodeId, settings: RaftSettings) -> CoreConfig:
    seed = world.random.stream("raft.elections").getrandbits(63)
    return CoreConfig(
        id=node_id,
        seed=seed,
        election_ticks=settings.election_ticks,
        heartbeat_ticks=settings.heartbeat_ticks,
        max_inflight=settings.inflight_max,
        bytes_per_message_max=settings.message_bytes_max,
        uncommitted_bytes_max=settings.uncommitted_bytes_max,
    )


def _check_ids(node_id: NodeId, cluster_id: str, bootstrap: Sequence[NodeId] | None) -> None:
    if node_id < 1:
        raise InvalidArgument("node id", node_id, "must be 1 or more")
    if not cluster_id:
        raise InvalidArgument("cluster id", cluster_id, "must not be empty")
    if bootstrap is not None and (node_id not in bootstrap or len(set(bootstrap)) != len(bootstrap) or min(bootstrap) < 1):
        raise InvalidArgument("bootstrap", list(bootstrap), f"want distinct ids from 1 on, node {node_id} among them")


__all__ = ["RaftNode", "TransportIdentity"]
