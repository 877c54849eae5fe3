"""RpcTransport on both Worlds: who is let in, what waits, what is dropped, and what a lying peer gets."""

import asyncio
from collections.abc import Sequence

import pytest

from isopod.cluster.raft.codec import FRAME_HEAD, SNAPSHOT_START, address_of, pack_length
from isopod.cluster.raft.link import LinkSettings
from isopod.cluster.raft.ports import NodeId, SnapshotOffer, SnapshotReceiver, SnapshotSource, TransportIdentity
from isopod.cluster.raft.transport import RpcTransport
from isopod.cluster.raft.wire import HELLO, MESSAGES, SNAPSHOT, RaftHello, SnapshotRequest
from isopod.net.rpc import Client, Server, connect
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world import errors
from isopod.world.network import Address, TcpAddress
from isopod.world.world import World
from tests.cluster.raft.sim_support import Book
from tests.cluster.raft.support import until

QUICK = LinkSettings(pause_first_s=0.01, pause_max_s=0.05, refused_pause_s=0.1, connect_s=1.0)


def message(sender: int, to: int, text: bytes = b"", kind: int = 3) -> bytes:
    """Return what looks like a core's message."""
    return bytes((8, kind)) + address_of(sender, to) + text


class Sink:
    """A driver that writes down what it is told."""

    def __init__(self) -> None:
        self.messages: list[tuple[NodeId, bytes]] = []
        self.told: list[tuple[str, NodeId]] = []
        self.incarnations: dict[NodeId, str] = {}

    def on_messages(self, sender: NodeId, messages: Sequence[bytes]) -> None:
        self.messages += [(sender, each) for each in messages]

    def on_unreachable(self, node_id: NodeId) -> None:
        self.told.append(("unreachable", node_id))

    def on_peer_up(self, node_id: NodeId) -> None:
        self.told.append(("up", node_id))

    def on_peer_lost(self, node_id: NodeId) -> None:
        self.told.append(("lost", node_id))

    async def open_source(self, index: int, term: int) -> SnapshotSource:
        raise errors.NotFound("snapshot", str(index))

    async def open_receiver(self, sender: NodeId, offer: SnapshotOffer) -> SnapshotReceiver:
        raise errors.InUse("the snapshot receiver", str(offer.index), "a test")

    def on_snapshot_sent(self, node_id: NodeId, *, ok: bool) -> None:
        self.told.append(("sent" if ok else "not sent", node_id))

    def known_incarnation(self, node_id: NodeId) -> str | None:
        return self.incarnations.get(node_id)

    def learn_incarnation(self, node_id: NodeId, incarnation: str) -> None:
        self.incarnations[node_id] = incarnation


class End:
    """A transport with a server and a sink."""

    def __init__(self, world: World, node_id: NodeId, book: Book, *, cluster_id: str = "c", incarnation: str = "") -> None:
        self.node_id = node_id
        self.lines: list[bytes] = []
        self.metrics = Registry()
        self.sink = Sink()
        self.book = book
        self.world = world
        logger = Logger(self.lines.append, world.clock)
        self.transport = RpcTransport(world, book, logger=logger, metrics=self.metrics, settings=QUICK)
        self.server = Server(world, self.transport.handlers(), logger=logger, metrics=self.metrics)
        self.identity = TransportIdentity(cluster_id, node_id, incarnation or f"disk{node_id}")
        self.address: Address = TcpAddress("127.0.0.1", 0)

    async def start(self) -> "End":
        listener = await self.server.listen(self.address, plaintext=True)
        self.address = self.book.addresses[self.node_id] = listener.address
        await self.transport.start(self.identity, self.sink)
        return self

    async def close(self) -> None:
        await self.transport.close()
        await self.server.close()

    def texts(self) -> list[bytes]:
        return [each.split(b"|")[-1] for _, each in self.sink.messages]


async def call(end: End) -> Client:
    return await connect(end.world, end.address, plaintext=True)


async def test_messages_arrive_in_order_in_one_frame_or_many(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book).start()
    one.transport.set_peers([2])
    await until(lambda: one.transport.link(2).is_connected)
    one.transport.send(2, [message(1, 2, b"|%d" % number) for number in range(50)])
    one.transport.send(2, [message(1, 2, b"x" * 500_000 + b"|%d" % number) for number in range(50, 56)])
    await until(lambda: len(two.sink.messages) == 56)
    assert two.texts() == [b"%d" % number for number in range(56)]
    assert {sender for sender, _ in two.sink.messages} == {1}
    await one.close()
    await two.close()


@pytest.mark.row("B17")
async def test_what_is_sent_before_the_peer_is_there_waits_and_the_oldest_is_dropped(world: World) -> None:
    book = Book({})
    one = await End(world, 1, book).start()
    one.transport.set_peers([2])
    for number in range(150):
        one.transport.send(2, [message(1, 2, b"|%d" % number)])
    link = one.transport.link(2)
    assert (link.n_queued, link.n_dropped) == (100, 50)
    assert ("unreachable", 2) in one.sink.told
    two = await End(world, 2, book).start()
    await until(lambda: len(two.sink.messages) == 100)
    assert two.texts() == [b"%d" % number for number in range(50, 150)]
    await one.close()
    await two.close()


@pytest.mark.row("B17")
async def test_the_breaker_opens_and_closes_and_the_connection_comes_back(world: World) -> None:
    book = Book({2: TcpAddress("127.0.0.1", 1)})
    one = await End(world, 1, book).start()
    one.transport.set_peers([2])
    one.transport.send(2, [message(1, 2)])
    await until(lambda: one.transport.link(2).is_broken)
    one.transport.send(2, [message(1, 2)])
    assert one.transport.link(2).n_queued == 0
    assert "1" in one.transport.link(2).why
    two = await End(world, 2, book).start()
    await until(lambda: one.transport.link(2).is_connected)
    assert not one.transport.link(2).is_broken
    await two.close()
    await until(lambda: not one.transport.link(2).is_connected)
    assert ("lost", 2) in one.sink.told
    await one.close()


async def test_a_foreign_cluster_is_refused_and_counted_on_both_sides(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book, cluster_id="another").start()
    one.transport.set_peers([2])
    await until(lambda: "another" in one.transport.link(2).why)
    assert not one.transport.link(2).is_connected
    for end in (one, two):
        assert (
            end.metrics.counter("isopod_raft_refused_peers_total", "Hellos refused, ours or theirs.", reason="foreign_cluster").value >= 1
        )
    await one.close()
    await two.close()


async def test_a_wiped_disk_under_a_known_id_is_refused(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book).start()
    one.transport.set_peers([2])
    two.transport.set_peers([1])
    await until(lambda: one.transport.link(2).is_connected and two.transport.link(1).is_connected)
    assert one.sink.incarnations == {2: "disk2"}
    await two.close()
    wiped = End(world, 2, book, incarnation="new disk")
    wiped.address = two.address
    await wiped.start()
    wiped.transport.set_peers([1])
    await until(lambda: "another disk" in one.transport.link(2).why and "another disk" in wiped.transport.link(1).why)
    wiped.transport.send(1, [message(2, 1)])
    assert not one.sink.messages
    await one.close()
    await wiped.close()


async def test_who_is_called_by_another_name_refuses(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book).start()
    book.addresses[3] = book.addresses[2]
    one.transport.set_peers([3])
    await until(lambda: "this is node 2" in one.transport.link(3).why)
    client = await call(two)
    with pytest.raises(errors.IdentityConflict):
        await client.call(HELLO, RaftHello("c", 2, "x", 2))
    await client.close()
    await one.close()
    await two.close()


async def test_a_hello_before_the_node_runs_is_answered_that_it_will(world: World) -> None:
    end = End(world, 1, Book({}))
    listener = await end.server.listen(end.address, plaintext=True)
    end.address = listener.address
    client = await call(end)
    with pytest.raises(errors.NotStarted):
        await client.call(HELLO, RaftHello("c", 2, "x", 1))
    await client.close()
    await end.close()


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\0\0\0",
        FRAME_HEAD.pack(12345) + pack_length(4) + b"abcd",
        b"S" + pack_length(100) + b"short",
        b"S" + pack_length(0),
        b"S" + b"\1\0",
        b"S" + pack_length(0xFFFFFFFF) + b"x",
        b"S" + pack_length(len(message(3, 1))) + message(3, 1),
        b"S" + pack_length(len(message(2, 3))) + message(2, 3),
        b"S" + pack_length(len(SNAPSHOT_START + address_of(2, 1))) + SNAPSHOT_START + address_of(2, 1),
        b"S" + pack_length(3) + b"\xff\xff\xff",
    ],
)
async def test_frames_that_are_none_or_another_senders_are_dropped(world: World, frame: bytes) -> None:
    end = await End(world, 1, Book({})).start()
    client = await call(end)
    welcome = await client.call(HELLO, RaftHello("c", 2, "x", 1))
    head = FRAME_HEAD.pack(welcome.session)
    await client.notify(MESSAGES, head + frame[1:] if frame.startswith(b"S") else frame)
    await until(lambda: end.transport.violations.value > 0)
    assert end.sink.messages == []
    assert end.transport.violations.value == 1
    await client.close()
    await end.close()


async def test_a_liar_loses_its_connection_and_is_called_again_later(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book).start()
    one.transport.set_peers([2])
    await until(lambda: one.transport.link(2).is_connected)
    one.transport.send(2, [message(3, 2)])
    await until(lambda: "not its own" in one.transport.link(2).why)
    await until(lambda: one.transport.link(2).is_connected)
    one.transport.send(2, [message(1, 2, b"|honest")])
    await until(lambda: two.texts() == [b"honest"])
    await one.close()
    await two.close()


async def test_a_question_that_a_former_leader_passes_on_costs_nobody_anything(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book).start()
    one.transport.set_peers([2])
    await until(lambda: one.transport.link(2).is_connected)
    one.transport.send(2, [message(1, 2, b"|a"), message(3, 2, kind=15), message(1, 2, b"|b")])
    await until(lambda: two.texts() == [b"a", b"b"])
    assert one.transport.link(2).is_connected
    assert two.transport.violations.value == 0
    await one.close()
    await two.close()


async def test_a_session_is_of_its_connection_only(world: World) -> None:
    end = await End(world, 1, Book({})).start()
    honest, thief = await call(end), await call(end)
    welcome = await honest.call(HELLO, RaftHello("c", 2, "x", 1))
    frame = FRAME_HEAD.pack(welcome.session) + pack_length(len(message(2, 1))) + message(2, 1)
    await thief.notify(MESSAGES, frame)
    await thief.ping()
    assert end.sink.messages == []
    with pytest.raises(errors.RefusedError):
        async with thief.open(SNAPSHOT, SnapshotRequest(welcome.session, SnapshotOffer(message(2, 1, kind=7), 1, 1, 10, 0))) as stream:
            await stream.reply()
    await honest.notify(MESSAGES, frame)
    await until(lambda: len(end.sink.messages) == 1)
    await honest.close()
    await thief.close()
    await end.close()


async def test_the_late_hello_of_an_attempt_that_was_given_up_does_not_end_the_session_in_use(world: World) -> None:
    """On a slow network it may come after that of the next attempt, which succeeded."""
    end = await End(world, 1, Book({})).start()
    used, given_up = await call(end), await call(end)
    session = (await used.call(HELLO, RaftHello("c", 2, "x", 1))).session
    await given_up.call(HELLO, RaftHello("c", 2, "x", 1))

    await used.notify(MESSAGES, FRAME_HEAD.pack(session) + pack_length(len(message(2, 1))) + message(2, 1))

    await until(lambda: len(end.sink.messages) == 1)
    assert end.transport.violations.value == 0
    await used.close()
    await given_up.close()
    await end.close()


async def test_a_snapshot_whose_message_is_another_ones_is_refused(world: World) -> None:
    end = await End(world, 1, Book({})).start()
    client = await call(end)
    welcome = await client.call(HELLO, RaftHello("c", 2, "x", 1, "snapshot"))
    with pytest.raises((errors.InvalidArgument, errors.ProtocolViolation)):
        async with client.open(SNAPSHOT, SnapshotRequest(welcome.session, SnapshotOffer(message(3, 1, kind=7), 1, 1, 10, 0))) as stream:
            await stream.reply()
    await client.close()
    await end.close()


async def test_a_snapshot_that_is_gone_is_told_to_the_core(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book).start()
    one.transport.send_snapshot(2, message(1, 2, kind=7), index=5, term=1)
    await until(lambda: ("not sent", 2) in one.sink.told)
    await one.close()
    await two.close()


async def test_a_peer_that_is_no_member_any_more_loses_its_connection(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book).start()
    one.transport.set_peers([2])
    await until(lambda: one.transport.link(2).is_connected)
    one.transport.set_peers([])
    assert not one.transport.link(2).is_connected
    await asyncio.sleep(0.05)
    await one.close()
    await two.close()


async def test_a_failpoint_stands_for_the_network(world: World) -> None:
    book = Book({})
    one, two = await End(world, 1, book).start(), await End(world, 2, book).start()
    one.transport.set_peers([2])
    await until(lambda: one.transport.link(2).is_connected)
    world.failpoints.set("network.before_send", "nth(1):error")
    one.transport.send(2, [message(1, 2, b"|lost")])
    one.transport.send(2, [message(1, 2, b"|kept")])
    await until(lambda: len(two.sink.messages) == 1)
    assert two.texts() == [b"kept"]
    assert one.transport.link(2).n_dropped == 1
    world.failpoints.clear()
    await one.close()
    await two.close()
