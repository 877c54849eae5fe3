"""RpcTransport: Raft's messages over the node's RPC, one connection per peer and direction.

Who is who: before anything else a connection says hello, both ways. A foreign cluster, a node that is not the one that was called, a
certificate that does not speak for the node, and a known node with another disk are refused, typed, counted, and never heard. Frames are
taken only under the session that the hello of the same connection was given, and only messages of that very sender to this very node; who
sends others loses its connection. (A member that just ceased to lead passes on what others asked it: that is dropped, they ask again.)

Snapshots go over a connection of their own, so that no heartbeat waits behind them; a stream that broke goes on where it stopped.

The server is the node's: its table gets `handlers()`. What this is not: it finds no addresses (`AddressBook`) and trusts nothing by itself.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from isopod.cluster.raft.codec import FORWARDED, FRAME_HEAD, SNAPSHOT_START, address_of, split_frame
from isopod.cluster.raft.link import Connected, Link, LinkSettings
from isopod.cluster.raft.ports import AddressBook, NodeId, PeerLink, SnapshotOffer, TransportIdentity, TransportSink
from isopod.cluster.raft.wire import (
    HELLO,
    MESSAGES,
    NOTHING,
    SNAPSHOT,
    Nothing,
    Purpose,
    RaftHello,
    RaftWelcome,
    SnapshotDone,
    SnapshotRequest,
    SnapshotResume,
)
from isopod.net.rpc import Call, Client, RpcLimits, connect
from isopod.net.rpc.call import AnyHandler, AnyMethod, Caller
from isopod.net.rpc.session import Session
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import (
    DeadlineExceeded,
    Disconnected,
    ForeignCluster,
    IdentityConflict,
    InvalidArgument,
    IsopodError,
    NotStarted,
    ProtocolViolation,
    RefusedError,
    UnavailableError,
)
from isopod.world.network import ClientTls, PeerIdentity, TcpOptions
from isopod.world.world import World

LINKS_MAX: Final = 4096
SESSIONS_KEPT: Final = 8
"""Of one peer: on a slow network the hello of an attempt that was given up may come after that of the connection in use."""
CHUNK_BYTES: Final = 256 << 10
REJOIN: Final = "remove it with `isopod cluster leave`, and let it join again under a new id"
REFUSALS: Final = ("foreign_cluster", "identity_conflict", "not_started")


class _Admitted(NamedTuple):
    """A connection whose hello was good."""

    node_id: NodeId
    caller: Caller
    address: bytes
    """How its messages begin, behind their kind."""
    purpose: Purpose


class RpcTransport:
    """The transport of one node; `Transport`. Made before the node, started and closed by it.

    Args:
        world: Network and chance.
        book: Where nodes are, and who may speak for them.
        logger: Told of refusals and snapshots.
        metrics: Counts.
        tls: How to secure the connection to a node; None for plaintext, on loopback and in tests.
        settings: Bounds and times.
    """

    def __init__(
        self,
        world: World,
        book: AddressBook,
        *,
        logger: Logger,
        metrics: Registry,
        tls: Callable[[NodeId], ClientTls | None] | None = None,
        settings: LinkSettings = LinkSettings(),  # noqa: B008 - an immutable tuple
    ) -> None:
        self._world = world
        self._book = book
        self._logger = logger
        self._tls = tls
        self._settings = settings
        self._chance = world.random.stream("raft.transport")
        self._before_send = world.failpoints.point("network.before_send", is_synchronous=True)
        self._identity: TransportIdentity | None = None
        self._sink: TransportSink | None = None
        self._links: dict[NodeId, Link] = {}
        self._admitted: dict[int, _Admitted] = {}
        self._sessions_of: dict[tuple[NodeId, Purpose], deque[int]] = {}
        self._ending: dict[int, asyncio.Task[None]] = {}
        self._n_ended = 0
        self._streams: dict[NodeId, asyncio.Task[None]] = {}
        counter = metrics.counter
        self.n_frames = 0
        self.n_messages = 0
        self._frames = counter("isopod_raft_frames_received_total", "Frames of messages taken in.")
        self._messages = counter("isopod_raft_messages_received_total", "Messages taken in.")
        self.violations = counter("isopod_raft_transport_violations_total", "Frames dropped: no session, another sender, or no frame.")
        self.refusals = {
            code: counter("isopod_raft_refused_peers_total", "Hellos refused, ours or theirs.", reason=code) for code in REFUSALS
        }

        self._remove_hook = metrics.before_snapshot(self._publish)

    def handlers(self) -> list[tuple[AnyMethod, AnyHandler]]:
        """Return what the node's RPC server has to serve for Raft."""
        return [(HELLO, self._on_hello), (MESSAGES, self._on_frame), (SNAPSHOT, self._on_snapshot)]

    # --- Transport ----------------------------------------------------------------------------------------------------

    async def start(self, identity: TransportIdentity, sink: TransportSink) -> None:
        """See `Transport.start`."""
        self._identity, self._sink = identity, sink
        for link in self._links.values():
            link.start()

    async def close(self) -> None:
        """See `Transport.close`."""
        self._sink = None
        self._remove_hook()
        self._remove_hook = _nothing
        self._admitted.clear()
        self._sessions_of.clear()
        links, self._links = list(self._links.values()), {}
        for link in links:
            await link.close()
        tasks = [*self._streams.values(), *self._ending.values()]
        for task in self._streams.values():
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def set_peers(self, node_ids: Sequence[NodeId]) -> None:
        """See `Transport.set_peers`."""
        for node_id in [known for known in self._links if known not in node_ids]:
            self._end(self._links.pop(node_id))
        for node_id in node_ids:
            self._link_to(node_id)

    def send(self, to: NodeId, messages: Sequence[bytes]) -> None:
        """See `Transport.send`."""
        link = self._links.get(to) or self._link_to(to)
        if link is not None:
            link.send(messages)

    def send_snapshot(self, to: NodeId, message: bytes, *, index: int, term: int) -> None:
        """See `Transport.send_snapshot`."""
        if to not in self._streams and self._sink is not None:
            task = asyncio.get_running_loop().create_task(self._stream(to, message, index, term), name=f"raft snapshot to {to}")
            self._streams[to] = task

    def link(self, node_id: NodeId) -> PeerLink:
        """See `Transport.link`."""
        link = self._links.get(node_id)
        return PeerLink() if link is None else link.state()

    # --- what peers call ----------------------------------------------------------------------------------------------

    def _on_hello(self, call: Call[Any, Any], hello: RaftHello) -> RaftWelcome:
        identity, sink = self._identity, self._sink
        if identity is None or sink is None:
            raise NotStarted("the raft node", "it is not running yet")
        try:
            self._check(hello.cluster_id, hello.node_id, hello.incarnation, call.identity)
            if hello.to != identity.node_id:
                raise IdentityConflict(hello.to, f"this is node {identity.node_id}", "check the addresses of the peers")
        except IsopodError as error:
            self._count_refusal(error)
            self._logger.warning("raft.peer_refused", peer=call.peer, node=hello.node_id, why=error.message)
            raise
        session = self._chance.getrandbits(63)
        key = hello.node_id, hello.purpose
        sessions = self._sessions_of.setdefault(key, deque())
        sessions.append(session)
        while len(sessions) > SESSIONS_KEPT:
            self._admitted.pop(sessions.popleft(), None)
        address = address_of(hello.node_id, identity.node_id)
        self._admitted[session] = _Admitted(hello.node_id, call.caller, address, hello.purpose)
        link = self._links.get(hello.node_id)
        if link is not None:
            link.hurry()
        return RaftWelcome(identity.cluster_id, identity.node_id, identity.incarnation, session)

    def _on_frame(self, call: Call[Any, Any], frame: bytes) -> Nothing:
        try:
            admitted = self._admitted.get(FRAME_HEAD.unpack_from(frame)[0])
            if admitted is None or admitted.caller is not call.caller:
                self.violations.inc()
                return NOTHING
            messages = split_frame(frame)
        except (ValueError, struct.error):
            self.violations.inc()
            return NOTHING
        address = admitted.address
        for message in messages:
            if not message.startswith(address, 2) or message.startswith(SNAPSHOT_START):
                if any(not _is_own(each, address) and not each.startswith(FORWARDED) for each in messages):
                    self._expel(admitted)
                    return NOTHING
                messages = [each for each in messages if _is_own(each, address)]
                break
        self.n_frames += 1
        self.n_messages += len(messages)
        if self._sink is not None:
            self._sink.on_messages(admitted.node_id, messages)
        return NOTHING

    async def _on_snapshot(self, call: Call[bytes, SnapshotResume], request: SnapshotRequest) -> SnapshotDone:
        admitted = self._admitted.get(request.session)
        sink = self._sink
        if sink is None or admitted is None or admitted.caller is not call.caller:
            self.violations.inc()
            raise RefusedError("a snapshot without a session", "say hello on this connection first")
        offer = request.offer
        if not offer.message.startswith(SNAPSHOT_START) or not offer.message.startswith(admitted.address, 2):
            self._expel(admitted)
            raise InvalidArgument("snapshot", offer.index, "its message is another one")
        receiver = await sink.open_receiver(admitted.node_id, offer)
        try:
            await call.send(SnapshotResume(receiver.offset))
            while receiver.offset < offer.n_bytes:
                async with asyncio.timeout(self._settings.snapshot_stall_s):
                    chunk = await call.receive()
                if chunk is None:
                    raise Disconnected(call.peer, f"snapshot {offer.index} ended at {receiver.offset} of {offer.n_bytes} bytes")
                await receiver.write(chunk)
            await receiver.finish()
        except TimeoutError:
            raise DeadlineExceeded(f"a piece of snapshot {offer.index}", self._settings.snapshot_stall_s) from None
        finally:
            receiver.abandon()
        return SnapshotDone()

    # --- connections --------------------------------------------------------------------------------------------------

    def _link_to(self, node_id: NodeId) -> Link | None:
        link = self._links.get(node_id)
        if link is not None or len(self._links) >= LINKS_MAX:
            return link
        link = self._links[node_id] = Link(
            node_id,
            self._settings,
            partial(self._connect, purpose="messages"),
            chance=self._chance.random,
            on_up=self._on_up,
            on_lost=self._on_lost,
            on_dropped=self._on_dropped,
            before_send=self._before_send,
        )
        if self._sink is not None:
            link.start()
        return link

    async def _connect(self, node_id: NodeId, *, purpose: Purpose) -> Connected:
        """Open a connection to a node and say hello.

        Raises:
            IsopodError: It is not there, refuses us, or is not the one.
        """
        identity = self._identity
        assert identity is not None
        address = self._book.address(node_id)
        if address is None:
            raise NotStarted(f"node {node_id}", "its address is not known")
        tls = None if self._tls is None else self._tls(node_id)
        settings = self._settings
        client = await connect(
            self._world,
            address,
            peer=f"node {identity.node_id}",
            timeout_s=settings.connect_s,
            limits=RpcLimits(hello_timeout_s=settings.connect_s),
            tls=tls,
            plaintext=tls is None,
            options=TcpOptions(user_timeout_s=settings.user_timeout_s),
        )
        try:
            hello = RaftHello(identity.cluster_id, identity.node_id, identity.incarnation, node_id, purpose)
            welcome = await client.call(HELLO, hello, timeout_s=settings.connect_s)
            self._check(welcome.cluster_id, welcome.node_id, welcome.incarnation, client.identity)
            if welcome.node_id != node_id:
                raise IdentityConflict(node_id, f"node {welcome.node_id} answers there", "check the addresses of the peers")
        except BaseException as error:
            if isinstance(error, RefusedError):
                self._count_refusal(error)
                self._logger.warning("raft.peer_refused", peer=str(address), node=node_id, why=error.message)
            client.connection.abort()
            raise
        return Connected(client, welcome.session)

    def _check(self, cluster_id: str, node_id: NodeId, incarnation: str, certificate: PeerIdentity | None) -> None:
        """Refuse who is not a peer.

        Raises:
            ForeignCluster: It is of another cluster.
            IdentityConflict: It is not the node it says it is, or no longer.
        """
        identity, sink = self._identity, self._sink
        if identity is None or sink is None:
            raise NotStarted("the raft node", "it is not running")
        if cluster_id != identity.cluster_id:
            raise ForeignCluster(f"node {node_id}", cluster_id, identity.cluster_id)
        if node_id == identity.node_id or node_id < 1:
            raise IdentityConflict(node_id, "a peer has the id of this node", "every node needs an id of its own")
        if not self._book.admits(node_id, certificate):
            raise IdentityConflict(node_id, "its certificate does not speak for it", "let it join again")
        known = self._book.incarnation(node_id) or sink.known_incarnation(node_id)
        if known is not None and known != incarnation:
            raise IdentityConflict(node_id, "it is known with another disk: it may have forgotten votes and records", REJOIN)
        if known is None and node_id in self._links:
            sink.learn_incarnation(node_id, incarnation)

    def _expel(self, admitted: _Admitted) -> None:
        """A peer sent what is not its own to send: end that connection."""
        self.violations.inc()
        for session in self._sessions_of.pop((admitted.node_id, admitted.purpose), ()):
            self._admitted.pop(session, None)
        self._logger.warning("raft.peer_lies", node=admitted.node_id, why="a message of another sender, or for another node")
        if isinstance(admitted.caller, Session):
            admitted.caller.connection.fail(ProtocolViolation(f"node {admitted.node_id}", "a message that is not its own to send"))

    def _publish(self) -> None:
        """Hand over what was added up."""
        self._frames.inc(self.n_frames - self._frames.value)
        self._messages.inc(self.n_messages - self._messages.value)

    def _count_refusal(self, error: IsopodError) -> None:
        if error.code in self.refusals:
            self.refusals[error.code].inc()

    def _end(self, link: Link) -> None:
        number = self._n_ended = self._n_ended + 1
        task = asyncio.get_running_loop().create_task(link.close(), name=f"raft link to {link.node_id} ends")
        self._ending[number] = task
        task.add_done_callback(lambda _: self._ending.pop(number, None))

    def _on_up(self, node_id: NodeId) -> None:
        if self._sink is not None:
            self._sink.on_peer_up(node_id)

    def _on_lost(self, node_id: NodeId) -> None:
        if self._sink is not None:
            self._sink.on_peer_lost(node_id)

    def _on_dropped(self, node_id: NodeId) -> None:
        if self._sink is not None:
            self._sink.on_unreachable(node_id)

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def _stream(self, to: NodeId, message: bytes, index: int, term: int) -> None:
        """Send a snapshot, taking the stream up again when it broke, and tell the core."""
        ok = False
        settings = self._settings
        why = ""
        try:
            for attempt in range(settings.snapshot_attempts):
                try:
                    await self._stream_once(to, message, index, term)
                    ok = True
                    break
                except (RefusedError, UnavailableError) as error:
                    why = error.message
                    break
                except (IsopodError, OSError, TimeoutError) as error:
                    why = str(error)
                    await asyncio.sleep(settings.pause_s(attempt + 1, is_refused=False, chance=self._chance.random()))
        finally:
            del self._streams[to]
            if self._sink is not None:
                self._logger.info("raft.snapshot_sent" if ok else "raft.snapshot_not_sent", to=to, index=index, why=why)
                self._sink.on_snapshot_sent(to, ok=ok)

    async def _stream_once(self, to: NodeId, message: bytes, index: int, term: int) -> None:
        assert self._sink is not None
        source = await self._sink.open_source(index, term)
        client: Client | None = None
        try:
            client, session = await self._connect(to, purpose="snapshot")
            offer = SnapshotOffer(message, index, term, source.n_bytes, source.crc)
            stall_s = self._settings.snapshot_stall_s
            async with client.open(SNAPSHOT, SnapshotRequest(session, offer)) as call:
                async with asyncio.timeout(stall_s):
                    resume = await call.receive()
                offset = resume.offset if isinstance(resume, SnapshotResume) else source.n_bytes
                while offset < source.n_bytes:
                    chunk = await source.read(offset, CHUNK_BYTES)
                    if not chunk:
                        raise UnavailableError(f"snapshot {index} is shorter than it was")
                    async with asyncio.timeout(stall_s):
                        await call.send(chunk)
                    offset += len(chunk)
                call.end()
                async with asyncio.timeout(stall_s + source.n_bytes / (8 << 20)):  # it is synced and read again there
                    await call.reply()
        finally:
            source.close()
            if client is not None:
                client.connection.abort()


def _is_own(message: bytes, address: bytes) -> bool:
    return message.startswith(address, 2) and not message.startswith(SNAPSHOT_START)


def _nothing() -> None:
    """The hook was taken off."""
