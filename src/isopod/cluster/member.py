"""ClusterNode: the whole cluster stack of one node, without the engine. The same class runs on the host and in the simulation.

    node = ClusterNode(world, ClusterConfig(data_dir="/var/lib/isopod/cluster"), logger, metrics)
    await node.start()                  # opens its disk; founds, resumes, or begins to join
    await node.wait_ready(10.0)         # it is a member, and knows a leader (an agent: was heard by it)
    await node.store.put("color", b"red")
    await node.stop("done")

`start` returns as soon as the node serves, or, for one that joins, as soon as it tries: `status().state` is "joining" then, and `failed`
tells if it is refused for good. It raises what the disk and its identity say (another id than asked, a foreign folder, a damaged log).

What is opened in which order, and closed in the opposite one: identity and lock · credentials · the replica (log, machine, store) · the
listener · the members' tasks. How a node begins is `members.founding`'s to say, how it joins `members.joining`'s.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec

from isopod.api.cluster import ClusterStatus
from isopod.cluster.members.book import Book
from isopod.cluster.members.config import ClusterConfig, check_config, format_address, parse_tcp
from isopod.cluster.members.credentials import Bearer, Credentials
from isopod.cluster.members.founding import Start, choose_start
from isopod.cluster.members.gate import Gate, removed_error
from isopod.cluster.members.identity import Identity, IdentityFile, new_cluster_id, refuse_half_recovered
from isopod.cluster.members.joining import Admission, Joiner, Unreachable
from isopod.cluster.members.links import Links
from isopod.cluster.members.members import Members
from isopod.cluster.members.pulse import Pulse
from isopod.cluster.members.replica import ClusterParts, ReplicaStack
from isopod.cluster.members.restoring import Restorer
from isopod.cluster.members.status import agent_status, joining_status, replica_status
from isopod.cluster.members.tokens import check_token
from isopod.cluster.members.upkeep import Upkeep
from isopod.cluster.messaging import Messenger
from isopod.cluster.raft.driver import RAFT
from isopod.cluster.raft.node import RaftNode
from isopod.cluster.store.replica import Replica
from isopod.net.rpc import RpcLimits, Server
from isopod.net.rpc.call import AnyHandler, AnyMethod
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import (
    BadRecord,
    DeadlineExceeded,
    IdentityConflict,
    InvalidArgument,
    IsopodError,
    NotStarted,
    WrongState,
    from_os_error,
)
from isopod.world.network import TcpAddress
from isopod.world.world import World

__all__ = ["ClusterConfig", "ClusterNode", "ClusterParts"]

CONNECTIONS_MAX: Final = 16_384
POLL_S: Final = 0.01
ASK_ROUNDS: Final = 2
"""How often the node that may found asks its peers, all of them silent, before it does."""
WAITING: Final = "it waits to be told whom to join: isopod cluster join HOST:PORT --token TOKEN"
ANY_HOSTS: Final = ("0.0.0.0", "::", "")  # noqa: S104 - what binding to all is called


class _Open(NamedTuple):
    """What stands once a node has a cluster."""

    links: Links
    pulse: Pulse
    server: Server
    replica: ReplicaStack | None


class ClusterNode:
    """One node of a cluster.

    Args:
        world: What it runs on.
        config: What it was told.
        logger: Where it reports.
        metrics: Where it counts.
        parts: What it is made of, where tests put something else.

    Raises:
        InvalidArgument: The configuration makes no sense.
    """

    def __init__(
        self,
        world: World,
        config: ClusterConfig,
        logger: Logger,
        metrics: Registry,
        *,
        parts: ClusterParts = ClusterParts(),  # noqa: B008 - an immutable tuple
    ) -> None:
        check_config(config)
        self.config = config
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the error that ends this node's membership for good: it was refused, or removed. Ends without one when it is stopped."""
        self._world = world
        self._logger = logger.bind(node=config.node_id)
        self._metrics = metrics
        self._parts = parts
        self._is_secured = config.security == "tls"
        self._file: IdentityFile | None = None
        self._credentials = Credentials(world, config.data_dir, config.security)
        self._book = Book(world, config.data_dir, secured=self._is_secured)
        self._gate = Gate(self._book, secured=self._is_secured)
        self._address = TcpAddress("", 0)
        self._joiner: Joiner | None = None
        self._open: _Open | None = None  # once it has a cluster
        self._task: asyncio.Task[None] | None = None
        self._state = "new"
        self._more: dict[AnyMethod, AnyHandler] = {}
        self.messages = Messenger(world, config.node_id, lambda: self.links, logger=self._logger, metrics=metrics)
        """Messages to other nodes, and from them."""

    # --- what it has --------------------------------------------------------------------------------------------------

    @property
    def raft(self) -> RaftNode:
        """Its Raft node. WrongState before it is a member, and on an agent."""
        return self._replica("raft").raft

    @property
    def store(self) -> Replica:
        """Its replica of the store. WrongState before it is a member, and on an agent."""
        return self._replica("store").store

    @property
    def members(self) -> Members:
        """The verbs about members. WrongState before it is a member, and on an agent."""
        return self._replica("members").members

    @property
    def restorer(self) -> Restorer:
        """What puts backups back. WrongState before it is a member, and on an agent."""
        return self._replica("restorer").restorer

    @property
    def links(self) -> Links:
        """Ways to the other nodes. WrongState before it has a cluster."""
        if self._open is None:
            raise self._not_yet("links")
        return self._open.links

    @property
    def pulse(self) -> Pulse:
        """Its signs of life. WrongState before it has a cluster."""
        if self._open is None:
            raise self._not_yet("pulse")
        return self._open.pulse

    @property
    def book(self) -> Book:
        """Where the others are."""
        return self._book

    @property
    def address(self) -> TcpAddress:
        """Where it listens, with the real port."""
        return self._address

    @property
    def advertised(self) -> str:
        """The same as the others are told."""
        return self.config.advertise or format_address(self._address)

    @property
    def identity(self) -> Identity:
        """Who it is. WrongState before `start`."""
        if self._file is None:
            raise self._not_yet("identity")
        return self._file.identity

    @property
    def cluster_id(self) -> str:
        """Its cluster, "" before it has one."""
        return self._file.identity.cluster_id if self._file is not None else ""

    def serve_too(self, handlers: Mapping[AnyMethod, AnyHandler]) -> None:
        """Serve further verbs to members on the cluster's port. Before `start`."""
        self._more.update(handlers)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the disk, serve, and found, resume or begin to join.

        Raises:
            AlreadyServing: Another process has the folder.
            IdentityConflict: The folder is another node's, or the cluster removed this one.
            CorruptError: What is on disk is damaged.
            TokenRefused: It needs a join token, and got none that could be one.
            UnavailableError: The disk failed, or the address is taken.
        """
        if self._state != "new":
            raise WrongState("cluster node", str(self.config.node_id), self._state, "start it")
        self._state = "starting"
        try:
            await self._begin()
        except BaseException:
            await self.stop("start failed")
            raise

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until this node is a member and knows a leader.

        Raises:
            DeadlineExceeded: Not in time; what it waits for is in the message.
            IsopodError: It never will: it was refused.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self._is_ready():
                    if self.failed.done():
                        self.failed.result()
                        raise self._not_yet("membership")
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            why = self.status().why
            raise DeadlineExceeded(f"becoming a member as node {self.config.node_id}" + (f" ({why})" if why else ""), timeout_s) from None

    async def join_now(self, address: str, token: str, *, timeout_s: float) -> None:
        """Join the cluster of a member, as a node that was started to join and waits, or tries elsewhere in vain.

        Args:
            address: "HOST:PORT" of any member.
            token: The join token.
            timeout_s: How long to wait for membership.

        Raises:
            WrongState: It is a member already.
            TokenRefused: The token lets nobody in.
            NotStarted: Nobody listens there.
            DeadlineExceeded: It was admitted, and is no member yet; it goes on.
        """
        if self._open is not None or self._state != "running" or self._joiner is None:
            hint = "to move it to another cluster: stop it, empty its data folder, start it with --join and --token"
            raise WrongState("node", str(self.config.node_id), f"a member of cluster {self.cluster_id}", "join another", hint=hint)
        if self._is_secured and not self._credentials.is_ready:
            check_token(token)
        await self._end_task()
        self.config = self.config._replace(join=(address,), token=token)
        self._joiner = Joiner(self._world, self.config, self.identity, self._credentials, address=self.advertised, logger=self._logger)
        try:
            admitted = await self._ask_once(address)
        except BaseException as error:
            self._joiner.why = str(error)
            self._spawn(self._wait)
            raise
        self._spawn(lambda: self._enter(admitted))
        await self.wait_ready(timeout_s)

    async def _end_task(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def stop(self, reason: str = "stop") -> None:
        """Close everything; a leader hands over first. A second call does nothing."""
        if self._state == "stopped":
            return
        self._state = "stopped"
        self._logger.info("cluster.stopping", reason=reason)
        await self._end_task()
        await self.messages.close()
        opened, self._open = self._open, None
        if opened is not None:
            if opened.replica is not None:
                await opened.replica.close()
            await opened.links.close()
            await opened.server.close()
        if self._file is not None:
            self._file.close()
        if not self.failed.done():
            self.failed.set_result(None)

    def status(self) -> ClusterStatus:
        """Return what this node knows of the cluster, at once."""
        opened = self._open
        if opened is None or (opened.replica is None and self.config.role != "agent"):
            return joining_status(self.config, self.cluster_id, self._joiner.why if self._joiner is not None else "")
        if opened.replica is None:
            status = agent_status(self.config, self.cluster_id, opened.pulse, self._book)
        else:
            status = replica_status(self.config, self.cluster_id, opened.replica, self._book)
        error = self.failed.exception() if self.failed.done() and not self.failed.cancelled() else None
        if isinstance(error, IsopodError):
            return msgspec.structs.replace(status, why=f"{error.message}; {error.hint}" if error.hint else error.message)
        return status

    # --- the beginning ------------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        config = self.config
        await refuse_half_recovered(self._world, config.data_dir)
        self._file = file = await IdentityFile.open(self._world, config.data_dir, config.node_id)
        identity = file.identity
        if identity.phase == "removed":
            raise removed_error(config.node_id)
        if identity.phase == "lost":
            raise _lost(config.node_id, "its disk lost part of the log that the others count on, and with it what it promised them")
        self._address = await self._reserve()
        if identity.cluster_id:
            self._book.cluster_id = identity.cluster_id
        await self._book.load()
        self._joiner = Joiner(self._world, config, identity, self._credentials, address=self.advertised, logger=self._logger)
        is_enrolled = bool(identity.cluster_id) and await self._credentials.load(identity.cluster_id)
        if identity.phase == "member":
            await self._resume(is_enrolled)
        elif identity.phase == "founding":
            await self._found()
            self._spawn(self._run)
        else:
            if is_enrolled:
                await self._renew_expired()
            start = choose_start(config, self.advertised)
            if identity.phase == "enrolled":  # it has a cluster: whatever it is told now, it founds no other under that name
                addresses = tuple(dict.fromkeys((*start.addresses, *self._known_addresses())))
                start = Start("join" if addresses else "wait", addresses)
            if start.way == "found":
                await self._found()
                self._spawn(self._run)
            elif start.way == "wait":
                self._joiner.why = WAITING
                self._logger.info("cluster.waiting", why=WAITING)
                self._spawn(self._wait)
            else:
                self._check_token(start.addresses)
                self._spawn(lambda: self._come_in(start.addresses, may_found=start.way == "ask_first"))

    async def _reserve(self) -> TcpAddress:
        """Find out the real address, and whether it is free, before anybody is told of it."""
        wanted = parse_tcp("bind address", self.config.bind)
        if wanted.host in ANY_HOSTS and not self.config.advertise:
            raise InvalidArgument(
                "bind address", self.config.bind, "it is no address to call", "say how others reach it: --advertise HOST:PORT"
            )
        try:
            listener = await self._world.network.listen(wanted, asyncio.Protocol)
        except OSError as error:
            raise from_os_error(error, "listen on", self.config.bind) from error
        address = listener.address
        await listener.close()
        assert isinstance(address, TcpAddress)
        return address

    def _check_token(self, addresses: tuple[str, ...]) -> None:
        if self._is_secured and addresses and not self._credentials.is_ready:
            check_token(self.config.token)

    async def _found(self) -> None:
        """Make a cluster of this node alone."""
        assert self._file is not None
        cluster_id = self.cluster_id or new_cluster_id(self._world)
        await self._file.set_phase("founding", cluster_id)
        self._book.cluster_id = cluster_id
        if not self._credentials.is_ready:
            bearer = Bearer(cluster_id, "voter", self.config.node_id, self.identity.incarnation)
            await self._credentials.found(bearer, valid_s=self.config.certificate_s)
        await self._serve(bootstrap=True)
        await self._file.set_phase("member")
        self._logger.info("cluster.founded", cluster=cluster_id, address=self.advertised)

    async def _resume(self, is_enrolled: bool) -> None:
        """Go on as the member it was."""
        config = self.config
        if not is_enrolled:
            raise BadRecord(f"{config.data_dir}/tls", "the certificate is gone", "put it back, or empty the data folder and join anew")
        if config.role != "agent" and not await self._world.disk.list(f"{config.data_dir}/raft/log"):
            raise _lost(config.node_id, "its replica is gone: its disk was wiped, and with it what it promised the others")
        await self._renew_expired()
        await self._serve(bootstrap=False)
        self._spawn(self._run)

    async def _renew_expired(self) -> None:
        """Get a new certificate where the present one is out of date: a voter signs it itself, others need a token."""
        if self._credentials.remaining_s() > 0 or self._joiner is None:
            return
        if self._credentials.authority is not None:
            links = Links(self._world, self._book, self._credentials, self._name())
            upkeep = Upkeep(self.config, self._credentials, book=self._book, links=links, logger=self._logger, metrics=self._metrics)
            await upkeep.renew()
            return
        if not self.config.token:
            hint = "pass a join token, made on a member: ISOPOD_CLUSTER_TOKEN=$(isopod cluster token create); and compare the clocks"
            raise WrongState("the certificate of node", str(self.config.node_id), "expired", "reach the cluster", hint=hint)
        await self._joiner.enrol(self._known_addresses(), tries=3)

    async def _come_in(self, addresses: tuple[str, ...], *, may_found: bool) -> None:
        """Join; or found, if that is this node's part and nobody has."""
        assert self._joiner is not None
        assert self._file is not None
        tries = ASK_ROUNDS if may_found else None
        if not self._credentials.is_ready:
            enrolled = await self._joiner.enrol(addresses, tries=tries, is_patient=True)
            if isinstance(enrolled, Unreachable):
                await self._found()
                await self._run()
                return
            await self._note_cluster(enrolled.cluster_id)
        admitted = await self._joiner.admit(addresses, self.cluster_id, tries=tries if not self.cluster_id else None, is_patient=True)
        if isinstance(admitted, Unreachable):
            await self._found()
            await self._run()
            return
        await self._enter(admitted)

    async def _enter(self, admitted: Admission) -> None:
        """Take part: the others know this node now."""
        assert self._file is not None
        await self._note_cluster(admitted.cluster_id)
        self._book.tell(admitted.reply.peers)
        await self._book.save()
        await self._serve(bootstrap=False, is_quiet=True)
        self._logger.info("cluster.joined", cluster=self.cluster_id, leader=admitted.reply.leader_id, message=admitted.reply.message)
        if self._open is not None and self._open.replica is not None:
            await self._open.replica.wait_known()
        await self._file.set_phase("member")
        await self._run()

    async def _wait(self) -> None:
        """Wait to be told whom to join."""
        await asyncio.get_running_loop().create_future()

    async def _ask_once(self, address: str) -> Admission:
        """Enrol and be admitted at one address, now or not at all."""
        assert self._joiner is not None
        if not self._credentials.is_ready:
            enrolled = await self._joiner.enrol((address,), tries=3)
            if isinstance(enrolled, Unreachable):
                raise NotStarted(address, enrolled.why, "is a member of the cluster listening there?")
            await self._note_cluster(enrolled.cluster_id)
        admitted = await self._joiner.admit((address,), self.cluster_id, tries=3)
        if isinstance(admitted, Unreachable):
            raise NotStarted(address, admitted.why, "is a member of the cluster listening there?")
        return admitted

    async def _note_cluster(self, cluster_id: str) -> None:
        assert self._file is not None
        if self.identity.phase == "new":
            await self._file.set_phase("enrolled", cluster_id)
        self._book.cluster_id = cluster_id

    # --- serving ------------------------------------------------------------------------------------------------------

    async def _serve(self, *, bootstrap: bool, is_quiet: bool = False) -> None:
        """Open the replica (an agent has none; see `RaftNode.open` for quiet ones), the ways to others, and the listener."""
        config = self.config
        links = Links(self._world, self._book, self._credentials, self._name())
        replica: ReplicaStack | None = None
        handlers = {**self._more, **self.messages.handlers()}
        try:
            if config.role != "agent":
                replica = await ReplicaStack.open(
                    self._world,
                    config,
                    self.identity,
                    book=self._book,
                    credentials=self._credentials,
                    links=links,
                    parts=self._parts,
                    bootstrap=bootstrap,
                    is_quiet=is_quiet,
                    advertised=self.advertised,
                    logger=self._logger,
                    metrics=self._metrics,
                )
                handlers.update(replica.handlers())
            server = await self._listen(handlers)
        except BaseException:
            if replica is not None:
                await replica.close()
            await links.close()
            raise
        self._open = _Open(links, self._make_pulse(links, replica), server, replica)
        if replica is not None:
            await replica.start()

    async def _listen(self, handlers: Mapping[AnyMethod, AnyHandler]) -> Server:
        server = Server(
            self._world,
            self._gate.wrap(handlers),
            logger=self._logger,
            metrics=self._metrics,
            limits=RpcLimits(connections_max=CONNECTIONS_MAX),
            peer=self._name(),
            groups=(RAFT,),
            reflection=False,
        )
        tls = self._credentials.server
        try:
            listener = await server.listen(self._address, tls=tls, plaintext=tls is None)
        except OSError as error:
            await server.close()
            raise from_os_error(error, "listen on", format_address(self._address)) from error
        self._logger.info("cluster.listening", address=str(listener.address), advertised=self.advertised, security=self.config.security)
        return server

    def _make_pulse(self, links: Links, replica: ReplicaStack | None) -> Pulse:
        return Pulse(
            self._world,
            self.config,
            self.identity,
            book=self._book,
            links=links,
            address=self.advertised,
            leader=(lambda: replica.raft.leader) if replica is not None else lambda: 0,
            applied=(lambda: replica.raft.applied_index) if replica is not None else lambda: 0,
            logger=self._logger,
        )

    async def _run(self) -> None:
        """Do what is to be done as long as it is a member."""
        opened = self._open
        assert opened is not None
        upkeep = Upkeep(self.config, self._credentials, book=self._book, links=opened.links, logger=self._logger, metrics=self._metrics)
        async with TaskGroup("cluster-node") as group:
            group.create_task(opened.pulse.run(), name="cluster-pulse")
            group.create_task(upkeep.run(), name="cluster-upkeep")
            if opened.replica is not None:
                group.create_task(opened.replica.run(), name="cluster-steward")

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watched(work), name="cluster-node")
        self._state = "running"

    async def _watched(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run the node's own task; what ends it ends the membership."""
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - a task's root
            await self._fail(_first(error))

    async def _fail(self, error: BaseException) -> None:
        replica = self._open.replica if self._open is not None else None
        is_lost = replica is not None and replica.lost.done() and not replica.lost.cancelled()
        if (is_lost or isinstance(error, IdentityConflict)) and self._file is not None and self.identity.phase == "member":
            with suppress(IsopodError):  # it is refused again after the next start
                await self._file.set_phase("lost" if is_lost else "removed")
        self._logger.error("cluster.failed", why=str(error))
        if not self.failed.done():
            self.failed.set_exception(error)
            self.failed.exception()  # whoever asks gets it; nobody has to

    # --- small things -------------------------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        opened = self._open
        if opened is None or self.identity.phase != "member":
            return False
        if opened.replica is None:
            return opened.pulse.reply is not None
        raft = opened.replica.raft
        return bool(raft.leader) and self.config.node_id in raft.members().all() and opened.replica.is_known

    def _known_addresses(self) -> tuple[str, ...]:
        known = [peer.address for peer in self._book.all() if peer.node_id != self.config.node_id and peer.role != "agent"]
        return tuple(dict.fromkeys((*self.config.join, *known, *(peer.address for peer in self.config.peers))))

    def _replica(self, what: str) -> ReplicaStack:
        if self._open is None or self._open.replica is None:
            raise self._not_yet(what)
        return self._open.replica

    def _name(self) -> str:
        return f"isopod-node-{self.config.node_id}"

    def _not_yet(self, what: str) -> WrongState:
        why = self._joiner.why if self._joiner is not None and self._joiner.why else "see the node's log"
        state = "an agent" if self.config.role == "agent" else "no member yet"
        return WrongState("node", str(self.config.node_id), state, f"use its {what}", hint=why)


def _lost(node_id: int, why: str) -> IdentityConflict:
    """Return the error of a node that has forgotten what it promised."""
    hint = f"take it out on another member (isopod cluster leave {node_id}), empty the data folder, and join with a new token"
    return IdentityConflict(node_id, why, hint)


def _first(error: BaseException) -> BaseException:
    """Return what went wrong first, out of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
