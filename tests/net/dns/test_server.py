"""The name server, on both Worlds, with dnspython on both sides of it: what it knows, what it passes on, what it bears."""

import asyncio
import errno
from collections.abc import Callable, Sequence

import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.net.dns import DnsClient, DnsServer, Known, RecordType, ServerLimits
from isopod.net.dns.message import (
    MalformedMessage,
    Query,
    Question,
    Record,
    decode,
    decode_query,
    encode_answer,
    encode_query,
    encode_refusal,
    is_question,
)
from isopod.net.dns.server import Room
from isopod.net.tcp import connect_tcp
from isopod.net.udp import UdpSocket, open_udp_socket
from isopod.world.errors import NotFound
from isopod.world.network import TcpAddress, UdpAddress
from isopod.world.world import World
from tests.net.dns.server import NameServer, Zone

pytestmark = pytest.mark.row("V2")
BEHIND: Zone = {
    ("web.example", "A"): ["192.0.2.80"],
    ("big.example", "TXT"): [f'"{number:0250d}"' for number in range(30)],
    ("known", "A"): ["192.0.2.66"],
}
OWN = {
    "known": ("10.0.0.2", "10.0.0.3"),
    "many": tuple(f"10.0.1.{number}" for number in range(60)),
}
ALIVE_S = 20.0


def zone(question: Question) -> Known | None:
    """Answer for two names, and for the names backwards of one network, where only one address is somebody's."""
    if question.name.endswith(".0.0.10.in-addr.arpa"):
        exists = question.name.startswith("2.")
        rows = (Record(question.name, RecordType.PTR, 5, "known"),) if exists and question.kind == RecordType.PTR else ()
        return Known(rows, exists=exists)
    addresses = OWN.get(question.name)
    if addresses is None:
        return None
    return Known(tuple(Record(question.name, RecordType.A, 5, each) for each in addresses) if question.kind == RecordType.A else ())


class Served:
    """A server, and what stands behind it."""

    def __init__(self, world: World, behind: Sequence[UdpAddress], limits: ServerLimits | None = None, *, room: Room | None = None) -> None:
        self.world = world
        self.behind = behind
        self.welcome: Callable[[str], bool] = lambda host: host == "127.0.0.1"
        self.server = DnsServer(world, zone, self._upstreams, is_client=self._is_client, limits=limits, room=room)
        self.address = UdpAddress("127.0.0.1", 0)

    async def start(self) -> "Served":
        self.address = await self.server.listen(UdpAddress("127.0.0.1", 0))
        return self

    def _is_client(self, host: str) -> bool:
        return self.welcome(host)

    async def _upstreams(self) -> Sequence[UdpAddress]:
        return self.behind

    async def ask(self, query: dns.message.Message | bytes, *, tcp: bool = False) -> dns.message.Message:
        """Ask one question; return the answer, which must be well formed."""
        wire = query if isinstance(query, bytes) else query.to_wire()
        async with asyncio.timeout(ALIVE_S):
            return dns.message.from_wire(await (self._ask_tcp(wire) if tcp else self._ask_udp(wire)))

    async def _ask_udp(self, wire: bytes) -> bytes:
        socket = await open_udp_socket(self.world, remote=self.address)
        try:
            socket.send(wire)
            return (await socket.receive()).data
        finally:
            socket.close()

    async def _ask_tcp(self, wire: bytes) -> bytes:
        connection = await connect_tcp(self.world, TcpAddress(*self.address))
        try:
            connection.write(len(wire).to_bytes(2, "big") + wire)
            return await connection.readexactly(int.from_bytes(await connection.readexactly(2), "big"))
        finally:
            connection.close()


def rows(answer: dns.message.Message) -> list[str]:
    return sorted(str(item) for rrset in answer.answer for item in rrset)


@pytest.mark.parametrize("tcp", [False, True])
async def test_what_it_knows_and_what_it_passes_on(world: World, tcp: bool) -> None:
    behind = NameServer(BEHIND)
    served = await Served(world, [await behind.start(world)]).start()
    own = await served.ask(dns.message.make_query("KNOWN", "A"), tcp=tcp)
    assert (own.rcode(), rows(own), own.answer[0].ttl) == (dns.rcode.NOERROR, ["10.0.0.2", "10.0.0.3"], 5)
    assert own.flags & dns.flags.AA and own.flags & dns.flags.RA
    nothing = await served.ask(dns.message.make_query("known", "AAAA"), tcp=tcp)
    assert (nothing.rcode(), rows(nothing)) == (dns.rcode.NOERROR, [])
    assert rows(await served.ask(dns.message.make_query("2.0.0.10.in-addr.arpa", "PTR"), tcp=tcp)) == ["known."]
    assert (await served.ask(dns.message.make_query("9.0.0.10.in-addr.arpa", "PTR"), tcp=tcp)).rcode() == dns.rcode.NXDOMAIN
    assert behind.asked == []
    passed = await served.ask(dns.message.make_query("web.example", "A"), tcp=tcp)
    assert rows(passed) == ["192.0.2.80"]
    assert not passed.flags & dns.flags.AA
    assert (await served.ask(dns.message.make_query("none.example", "A"), tcp=tcp)).rcode() == dns.rcode.NXDOMAIN
    assert [name for name, _ in behind.asked] == ["web.example", "none.example"]
    counts = served.server.statistics()
    assert (counts.n_answered, counts.n_forwarded, counts.n_failed, counts.n_forwarding) == (4, 2, 0, 0)
    await served.server.close()
    await served.server.close()
    await behind.stop()


async def test_the_client_of_our_own_understands_it(world: World) -> None:
    behind = NameServer(BEHIND)
    served = await Served(world, [await behind.start(world)]).start()
    client = DnsClient(world, [served.address])
    assert [record.data for record in (await client.query("known", RecordType.A)).records] == ["10.0.0.2", "10.0.0.3"]
    assert (await client.lookup("web.example")).addresses == ("192.0.2.80",)
    with pytest.raises(NotFound):
        await client.query("known", RecordType.AAAA)
    await served.server.close()
    await behind.stop()


async def test_an_answer_that_is_too_large_by_udp_comes_by_tcp(world: World) -> None:
    behind = NameServer(BEHIND)
    behind.truncates = True
    served = await Served(world, [await behind.start(world)]).start()
    short = await served.ask(dns.message.make_query("many", "A"))
    assert short.flags & dns.flags.TC and rows(short) == []
    assert len(rows(await served.ask(dns.message.make_query("many", "A", use_edns=0, payload=1232)))) == 60
    assert len(rows(await served.ask(dns.message.make_query("many", "A"), tcp=True))) == 60
    assert (await served.ask(dns.message.make_query("big.example", "TXT"))).flags & dns.flags.TC
    assert len(rows(await served.ask(dns.message.make_query("big.example", "TXT"), tcp=True))) == 30
    await served.server.close()
    await behind.stop()


async def test_edns_is_answered_with_edns(world: World) -> None:
    served = await Served(world, []).start()
    assert (await served.ask(dns.message.make_query("known", "A", use_edns=0))).edns == 0
    assert (await served.ask(dns.message.make_query("known", "A"))).edns == -1
    await served.server.close()


@pytest.mark.virtual_time
async def test_a_server_behind_that_fails_costs_one_attempt(world: World) -> None:
    """Silent, refusing and lying ones are passed over; with none left the answer is SERVFAIL, in time."""
    silent, refusing, lying, good = (NameServer(BEHIND) for _ in range(4))
    silent.is_silent = True
    refusing.rcode = dns.rcode.REFUSED
    lying.mangle = lambda wire: [wire[:2] + b"\xff" * 20, bytes([wire[0] ^ 1]) + wire[1:], wire[:2] + bytes(10)]
    addresses = [await each.start(world) for each in (silent, refusing, lying, good)]
    served = await Served(world, addresses, ServerLimits(attempt_s=0.5, forward_s=5.0)).start()
    assert rows(await served.ask(dns.message.make_query("web.example", "A"))) == ["192.0.2.80"]
    served.behind = addresses[:3]
    assert (await served.ask(dns.message.make_query("web.example", "A"))).rcode() in (dns.rcode.REFUSED, dns.rcode.SERVFAIL)
    for behind, ways in ((addresses[:1], [False]), ([], [False, True]), ([UdpAddress("127.0.0.1", 9)], [False, True])):
        served.behind = behind
        for tcp in ways:
            assert (await served.ask(dns.message.make_query("web.example", "A"), tcp=tcp)).rcode() == dns.rcode.SERVFAIL
    served.behind = addresses[:1] * 100
    began = world.clock.monotonic_ns()
    assert (await served.ask(dns.message.make_query("web.example", "A"))).rcode() == dns.rcode.SERVFAIL
    assert world.clock.monotonic_ns() - began < 6e9
    await served.server.close()
    for each in (silent, refusing, lying, good):
        await each.stop()


@pytest.mark.virtual_time
async def test_too_many_questions_are_refused_and_the_others_answered(world: World) -> None:
    silent = NameServer(BEHIND)
    silent.is_silent = True
    served = await Served(world, [await silent.start(world)], ServerLimits(n_forwards_each_max=4)).start()
    answers = await asyncio.gather(*(served.ask(dns.message.make_query(f"{number}.example", "A")) for number in range(40)))
    assert {answer.rcode() for answer in answers} == {dns.rcode.SERVFAIL}
    counts = served.server.statistics()
    assert (counts.n_failed, counts.n_refused, counts.n_forwarding) == (4, 36, 0)  # all of one client
    assert rows(await served.ask(dns.message.make_query("known", "A"))) == ["10.0.0.2", "10.0.0.3"]
    await served.server.close()
    await silent.stop()


@pytest.mark.virtual_time
async def test_servers_that_share_a_room_pass_on_no_more_than_fits(world: World) -> None:
    silent, room = NameServer(BEHIND), Room(3)
    silent.is_silent = True
    behind = [await silent.start(world)]
    servers = [await Served(world, behind, room=room).start() for _ in range(2)]
    for _ in range(2):  # what was taken is given back
        asking = [served.ask(dns.message.make_query("web.example", "A")) for served in servers for _ in range(5)]
        assert {answer.rcode() for answer in await asyncio.gather(*asking)} == {dns.rcode.SERVFAIL}
    counts = [served.server.statistics() for served in servers]
    assert (sum(each.n_failed for each in counts), sum(each.n_refused for each in counts)) == (6, 14)
    for served in servers:
        await served.server.close()
    await silent.stop()


async def test_strangers_are_not_heard(world: World) -> None:
    served = await Served(world, []).start()
    served.welcome = lambda host: False
    socket = await open_udp_socket(world, remote=served.address)
    socket.send(dns.message.make_query("known", "A").to_wire())
    connection = await connect_tcp(world, TcpAddress(*served.address))
    assert await connection.read() == b""
    connection.close()
    async with asyncio.timeout(ALIVE_S):
        while served.server.statistics().n_refused < 2:
            await asyncio.sleep(0.001)
    served.welcome = lambda host: True
    socket.send(dns.message.make_query("2.0.0.10.in-addr.arpa", "PTR").to_wire())
    assert rows(dns.message.from_wire((await socket.receive(timeout_s=ALIVE_S)).data)) == ["known."]  # and no answer to the first
    socket.close()
    await served.server.close()


@pytest.mark.virtual_time
async def test_idle_and_half_sent_connections_end_and_many_are_bounded(world: World) -> None:
    served = await Served(world, [], ServerLimits(n_connections_each_max=3, idle_s=2.0)).start()
    connections = [await connect_tcp(world, TcpAddress(*served.address)) for _ in range(3)]
    connections[1].write(b"\xff\xff" + bytes(100))
    extra = await connect_tcp(world, TcpAddress(*served.address))
    assert await extra.read() == b""
    assert served.server.statistics().n_connections == 3
    began = world.clock.monotonic_ns()
    for connection in connections:
        assert await connection.read() == b""
        connection.close()
    assert 1e9 < world.clock.monotonic_ns() - began < 4e9
    extra.close()
    assert served.server.statistics().n_connections == 0
    await served.server.close()


async def test_questions_on_one_connection_are_answered_in_turn(world: World) -> None:
    served = await Served(world, []).start()
    connection = await connect_tcp(world, TcpAddress(*served.address))
    queries = [dns.message.make_query("known", "A") for _ in range(30)]
    connection.write(b"".join(len(wire).to_bytes(2, "big") + wire for wire in (query.to_wire() for query in queries)))
    for query in queries:
        answer = await connection.readexactly(int.from_bytes(await connection.readexactly(2), "big"))
        assert dns.message.from_wire(answer).id == query.id
    connection.close()
    await served.server.close()


async def test_closing_ends_what_is_under_way(world: World) -> None:
    silent = NameServer(BEHIND)
    silent.is_silent = True
    served = await Served(world, [await silent.start(world)]).start()
    socket = await open_udp_socket(world, remote=served.address)
    socket.send(dns.message.make_query("web.example", "A").to_wire())
    connection = await connect_tcp(world, TcpAddress(*served.address))
    async with asyncio.timeout(ALIVE_S):
        while served.server.statistics().n_forwarding < 1 or served.server.statistics().n_connections < 1:
            await asyncio.sleep(0.001)
    await served.server.close()
    assert served.server.statistics().n_forwarding == 0
    socket.close()
    connection.close()
    await silent.stop()


async def test_a_port_that_is_taken_leaves_nothing_open(world: World) -> None:
    socket = await open_udp_socket(world, UdpAddress("127.0.0.1", 0))
    server = DnsServer(world, zone, Served(world, [])._upstreams, is_client=lambda host: True)
    with pytest.raises(OSError) as failure:
        await server.listen(socket.address)
    assert failure.value.errno == errno.EADDRINUSE
    socket.close()
    for _ in range(3):  # uvloop closes in its next turn
        await asyncio.sleep(0)
    assert await server.listen(socket.address) == socket.address
    await server.close()


# --- hostile bytes --------------------------------------------------------------------------------------------------


async def refusals(served: Served, socket: UdpSocket, wire: bytes) -> int:
    socket.send(wire)
    return dns.message.from_wire((await socket.receive(timeout_s=ALIVE_S)).data).rcode()


async def test_what_is_no_question_is_refused_or_dropped(world: World) -> None:
    served = await Served(world, []).start()
    socket = await open_udp_socket(world, remote=served.address)
    query = dns.message.make_query("known", "A").to_wire()
    update = dns.message.make_query("known", "A")
    update.set_opcode(dns.opcode.NOTIFY)
    assert await refusals(served, socket, query[:20]) == dns.rcode.FORMERR
    assert await refusals(served, socket, query[:4] + b"\0\2" + query[6:] + query[12:]) == dns.rcode.FORMERR  # two questions
    assert await refusals(served, socket, query[:4] + b"\0\0" + query[6:12]) == dns.rcode.FORMERR  # none
    assert await refusals(served, socket, update.to_wire()) == dns.rcode.NOTIMP
    assert await refusals(served, socket, query[:-2] + b"\0\3") == dns.rcode.SERVFAIL  # another class: passed on, to nobody
    for dropped in (b"x", query[:11], query[:2] + b"\x80" + query[3:]):  # an answer is never answered
        socket.send(dropped)
    assert await refusals(served, socket, query) == dns.rcode.NOERROR
    socket.close()
    await served.server.close()


def test_any_bytes_at_all_are_borne() -> None:
    answered: list[bytes] = []

    async def nobody() -> Sequence[UdpAddress]:
        return ()

    class NoWorld:
        """The parts that are asked here need none."""

    server = DnsServer(NoWorld(), zone, nobody, is_client=lambda host: True)  # type: ignore[arg-type]
    server._send = lambda answer, to: answered.append(answer)  # type: ignore[method-assign]
    server._has_room = lambda client: False  # type: ignore[method-assign]

    @given(st.binary(max_size=200) | st.builds(lambda tail: b"\1\2\1\0\0\1\0\0\0\0\0\0" + tail, st.binary(max_size=100)))
    def bears(data: bytes) -> None:
        answered.clear()
        server.on_datagram(data, ("127.0.0.1", 5353))
        assert len(answered) == int(is_question(data))
        for answer in answered:
            assert answer[:2] == data[:2] and not is_question(answer)
            dns.message.from_wire(answer)

    bears()


NAMES = st.from_regex(r"\A[a-z0-9-]{1,20}(\.[a-z0-9-]{1,20}){0,4}\Z").filter(
    lambda name: not name.startswith("xn--") and ".xn--" not in name
)


@given(NAMES, st.integers(0, 65535), st.lists(st.ip_addresses(v=4), max_size=40), st.integers(0, 65535))
def test_answers_are_read_back_by_both(name: str, number: int, addresses: list[object], bytes_max: int) -> None:
    query = decode_query(encode_query(number, Question(name, RecordType.A)))
    assert query == Query(number, 0, True, True, 1, Question(name, RecordType.A))
    records = [Record(name, RecordType.A, 5, str(address)) for address in addresses]
    wire = encode_answer(query, records, authoritative=True, bytes_max=bytes_max)
    read = decode(wire)
    assert read.is_response and read.id == number
    assert read.answers == (() if read.is_truncated else tuple(records))
    assert read.is_truncated or len(wire) <= bytes_max
    other = dns.message.from_wire(wire)
    assert len(rows(other)) == (0 if read.is_truncated else len(dict.fromkeys(map(str, addresses))))
    assert decode(encode_refusal(wire, 2)).code == 2


def test_a_question_needs_exactly_one() -> None:
    wire = encode_query(7, Question("a", RecordType.A), udp_bytes=0)
    with pytest.raises(MalformedMessage, match="0 questions"):
        decode_query(wire[:4] + b"\0\0" + wire[6:12])
