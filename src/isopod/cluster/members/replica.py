"""ReplicaStack: what a node has that holds a replica: log, machine, store, records, and the leader's work on them. Agents have none of it.

Only wiring: what each part is, its own file says. Opened and closed by `ClusterNode`.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from isopod.api import cluster as c
from isopod.api.store.messages import Entry
from isopod.cluster.members import wire as w
from isopod.cluster.members.book import Book
from isopod.cluster.members.config import ClusterConfig
from isopod.cluster.members.credentials import Credentials
from isopod.cluster.members.identity import Identity
from isopod.cluster.members.links import Links
from isopod.cluster.members.members import Members
from isopod.cluster.members.reception import Reception
from isopod.cluster.members.records import ClusterRecord, MemberRecord
from isopod.cluster.members.registry import Registry
from isopod.cluster.members.restoring import Restorer
from isopod.cluster.members.roster import Roster
from isopod.cluster.members.status import replica_status
from isopod.cluster.members.steward import Steward
from isopod.cluster.members.tokens import SHARED_USES, SHARED_VALID_S, token_record
from isopod.cluster.raft.core import CoreConfig, RaftCore, open_core
from isopod.cluster.raft.link import LinkSettings
from isopod.cluster.raft.node import RaftNode
from isopod.cluster.raft.ports import Applied, LeaderChanged, LogLost, MembersChanged, RaftEvent, Restored, StateMachine
from isopod.cluster.raft.transport import RpcTransport
from isopod.cluster.store.machine import StoreMachine
from isopod.cluster.store.replica import Replica, ReplicaSettings
from isopod.cluster.store.service import handlers as store_handlers
from isopod.net.rpc.call import AnyCall, AnyHandler, AnyMethod
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry as Metrics
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import IsopodError, NotFound
from isopod.world.world import World

FOLDER: Final = "raft"
RETRY_S: Final = 0.2


class ClusterParts(NamedTuple):
    """What a node is made of, where tests put something else.

    Args:
        open_core: Opens the consensus.
        machine: Makes the state machine: a `StoreMachine`, or what wraps one as its attribute `machine`.
        store: Settings of the replica.
        links: Bounds and times of Raft's connections.
    """

    open_core: Callable[[CoreConfig], RaftCore] = open_core
    machine: Callable[[], StateMachine] = StoreMachine
    store: ReplicaSettings = ReplicaSettings()
    links: LinkSettings = LinkSettings()


class MachineSource:
    """The store's machine as the registry sees it."""

    def __init__(self, machine: StoreMachine) -> None:
        self._machine = machine

    def listen(self, listener: Registry) -> None:
        """See `Source`."""
        self._machine.listen(listener)

    def unlisten(self, listener: Registry) -> None:
        """See `Source`."""
        self._machine.unlisten(listener)

    def entries(self, prefix: str) -> Sequence[Entry]:
        """See `Source`."""
        keys = self._machine.keys
        return [keys.entries[key] for key in keys.keys(prefix)]


class ReplicaStack:
    """The parts. Made by `open`."""

    def __init__(
        self,
        world: World,
        config: ClusterConfig,
        identity: Identity,
        *,
        raft: RaftNode,
        machine: StoreMachine,
        store: Replica,
        book: Book,
        credentials: Credentials,
        links: Links,
        advertised: str,
        logger: Logger,
        metrics: Metrics,
    ) -> None:
        self.raft = raft
        self.machine = machine
        self.store = store
        self.registry = registry = Registry(MachineSource(machine), logger)
        self._world = world
        self._config = config
        self._identity = identity
        self._credentials = credentials
        self._links = links
        self._advertised = advertised
        self._logger = logger
        self._has_entry = asyncio.Event()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the error when the leader says that this node's disk has lost part of its log: it takes part no more."""
        self._demoted = asyncio.Event()
        self._votes = config.node_id in raft.members().voters
        self._book = book
        book.registry = registry
        self._roster = Roster(world, store, registry)
        self._steward = Steward(
            config,
            raft,
            registry,
            self._roster,
            hand_key=self._hand_key,
            clock=world.clock,
            logger=logger,
            metrics=metrics,
        )
        self.members = Members(
            world,
            raft,
            registry,
            own_id=config.node_id,
            roster=self._roster,
            links=links,
            steward=self._steward,
            logger=logger,
        )
        self.restorer = Restorer(world, raft, store, registry, logger=logger)
        self._reception = Reception(
            world,
            config,
            raft,
            registry,
            roster=self._roster,
            book=book,
            credentials=credentials,
            steward=self._steward,
            cluster_id=identity.cluster_id,
            logger=logger,
        )
        self._unsubscribe = raft.subscribe(self._on_raft)
        self._transport_handlers: dict[AnyMethod, AnyHandler] = {}

    @classmethod
    async def open(
        cls,
        world: World,
        config: ClusterConfig,
        identity: Identity,
        *,
        book: Book,
        credentials: Credentials,
        links: Links,
        parts: ClusterParts,
        bootstrap: bool,
        advertised: str,
        is_quiet: bool,
        logger: Logger,
        metrics: Metrics,
    ) -> "ReplicaStack":
        """Open the log and what stands on it. Nothing is sent before `start`. Raises what `RaftNode.open` raises."""
        made = parts.machine()
        machine = _store_machine(made)
        tls = credentials.client if config.security == "tls" else None
        transport = RpcTransport(world, book, logger=logger, metrics=metrics, tls=tls, settings=parts.links)
        raft = await RaftNode.open(
            world,
            f"{config.data_dir}/{FOLDER}",
            node_id=config.node_id,
            cluster_id=identity.cluster_id,
            machine=made,
            transport=transport,
            settings=config.raft,
            bootstrap=[config.node_id] if bootstrap else None,
            logger=logger,
            metrics=metrics,
            incarnation=identity.incarnation,
            is_quiet=is_quiet,
            open_core=parts.open_core,
        )
        store = Replica(world, raft, machine, peers=links, logger=logger, metrics=metrics, settings=parts.store)
        stack = cls(
            world,
            config,
            identity,
            raft=raft,
            machine=machine,
            store=store,
            book=book,
            credentials=credentials,
            links=links,
            advertised=advertised,
            logger=logger,
            metrics=metrics,
        )
        stack._transport_handlers = dict(transport.handlers())
        return stack

    def handlers(self) -> dict[AnyMethod, AnyHandler]:
        """Return a handler for every verb that other nodes may call."""
        members = self.members
        table: dict[AnyMethod, AnyHandler] = {
            **self._transport_handlers,
            **dict(store_handlers(self.store)),
            **self._reception.handlers(),
        }

        async def leave(_: AnyCall, request: c.NodeRequest) -> c.Changed:
            return await members.leave_here(request.node_id, request.timeout_s)

        async def promote(_: AnyCall, request: c.NodeRequest) -> c.Changed:
            return await members.promote_here(request.node_id, request.timeout_s)

        async def demote(_: AnyCall, request: c.NodeRequest) -> c.Changed:
            return await members.demote_here(request.node_id, request.timeout_s)

        async def transfer(_: AnyCall, request: c.TransferRequest) -> c.Changed:
            return await members.transfer_here(request.node_id, request.timeout_s)

        async def status(_: AnyCall, __: c.StatusRequest) -> c.ClusterStatus:
            return replica_status(self._config, self._identity.cluster_id, self, self._book)

        table |= {c.STATUS: status, c.LEAVE: leave, c.PROMOTE: promote, c.DEMOTE: demote, c.TRANSFER: transfer}
        return table

    async def start(self) -> None:
        """Begin to take part."""
        await self.raft.start()
        await self.store.start()

    async def run(self) -> None:
        """Do the leader's work while this node leads, until cancelled."""
        async with TaskGroup("replica") as group:
            group.create_task(self._wait_lost(), name="cluster-log-lost")
            group.create_task(self.restorer.run(), name="cluster-restore")
            group.create_task(self._steward.run(), name="cluster-steward")
            group.create_task(self._write_first_records(), name="cluster-first-records")
            group.create_task(self._forget_key(), name="cluster-forget-key")
            group.create_task(self._look_for_old_key(), name="cluster-old-key")

    async def close(self) -> None:
        """Close everything, the newest first."""
        self.members.close()
        self._unsubscribe()
        await self.store.close()
        await self.raft.close()
        self.registry.close()
        self.lost.cancel()

    @property
    def is_known(self) -> bool:
        """Whether this node has its own record: whoever asks it about members gets an answer."""
        return self._config.node_id in self.registry.members

    async def wait_known(self) -> None:
        """Return when the log has told this node of its own admission: from now on it may vote, and a missing replica means a lost one.

        Raises:
            UnavailableError: The disk failed or is full.
        """
        while not self._is_admitted:
            self._has_entry.clear()
            await self._has_entry.wait()
        if not self.lost.done():
            await self.raft.trust()

    @property
    def _is_admitted(self) -> bool:
        known = self.registry.members.get(self._config.node_id)
        return self.lost.done() or (known is not None and known.incarnation == self._identity.incarnation)

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _write_first_records(self) -> None:
        """As the leader of a cluster that has no records yet, write them: who founded, by which token others come."""
        while self.registry.cluster is None:
            try:
                if self.raft.is_leader:
                    await self._found()
            except IsopodError as error:
                self._logger.warning("cluster.first_records_failed", why=error.message)
            await asyncio.sleep(RETRY_S)

    async def _forget_key(self) -> None:
        """Remove the authority's key when this node votes no more."""
        while True:
            await self._demoted.wait()
            self._demoted.clear()
            if not self._votes:
                try:
                    await self._credentials.forget_authority()
                except IsopodError as error:
                    self._logger.warning("cluster.key_not_removed", why=error.message)

    async def _look_for_old_key(self) -> None:
        """See to it that who votes no more has no key, also if it was stopped before it could remove it."""
        while self._credentials.authority is not None:
            try:
                await self.store.barrier()  # what this node knows from before may be old
            except IsopodError:
                await asyncio.sleep(RETRY_S)
                continue
            record = self.registry.members.get(self._config.node_id)
            if not self._votes and record is not None and record.role != "voter":  # who is to vote was given it for that
                self._demoted.set()
            return

    async def _found(self) -> None:
        config, now_ns = self._config, self._world.clock.now_ns()
        cluster = ClusterRecord(cluster_id=self._identity.cluster_id, founded_at_ns=now_ns, voters_max=config.voters_max)
        member = MemberRecord(
            node_id=config.node_id,
            incarnation=self._identity.incarnation,
            address=self._advertised,
            role="voter",
            joined_at_ns=now_ns,
        )
        token = None
        if config.token:
            token = token_record(config.token, now_ns=now_ns, valid_s=SHARED_VALID_S, uses=SHARED_USES, role="voter")
        await self._roster.found(cluster, member, token)

    async def _wait_lost(self) -> None:
        await asyncio.shield(self.lost)

    async def _hand_key(self, node_id: int) -> None:
        """Give a node that is about to vote the authority's key. Raises what the call raises: then it does not vote yet."""
        if self._config.security != "tls":
            return
        authority = self._credentials.authority
        if authority is None:
            raise NotFound("key of the cluster's authority", f"{self._config.data_dir}/tls/ca.key", "copy it from another voter, mode 0600")
        await self._links.call(node_id, w.HAND_KEY, w.HandKey(key=authority.issued.key))

    def _on_raft(self, event: RaftEvent) -> None:
        if isinstance(event, Applied | Restored):
            self._has_entry.set()
        if isinstance(event, LeaderChanged):
            self.restorer.wake()
        if isinstance(event, LogLost) and not self.lost.done():
            self.lost.set_exception(event.error)
            self.lost.exception()  # whoever waits gets it; before a node runs, nobody does
            self._has_entry.set()
        if isinstance(event, MembersChanged):
            voted, self._votes = self._votes, self._config.node_id in event.members.voters
            if voted and not self._votes:
                self._demoted.set()


def _store_machine(made: Any) -> StoreMachine:  # a machine, or what wraps one
    while not isinstance(made, StoreMachine):
        made = made.machine
    return made
