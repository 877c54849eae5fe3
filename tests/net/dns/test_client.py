"""The DNS client against an independent server, on both Worlds: records, aliases, TCP, lies, silence."""

import asyncio

import dns.rcode
import pytest

from isopod.net.dns import DnsClient, RecordType
from isopod.net.dns.client import server_from
from isopod.net.dns.message import Mail, Service
from isopod.world.errors import DeadlineExceeded, InvalidArgument, NotFound, UnavailableError
from isopod.world.network import UdpAddress
from isopod.world.world import World
from tests.net.dns.server import NameServer, Zone

pytestmark = pytest.mark.row("S16")
ZONE: Zone = {
    ("web.example", "A"): ["10.0.0.1", "10.0.0.2"],
    ("web.example", "AAAA"): ["fd00::1"],
    ("www.example", "CNAME"): ["alias.example."],
    ("alias.example", "CNAME"): ["web.example."],
    ("away.example", "CNAME"): ["web.elsewhere."],
    ("web.elsewhere", "A"): ["10.9.9.9"],
    ("loop.example", "CNAME"): ["loop.example."],
    ("example", "MX"): ["10 mail.example.", "20 spare.example."],
    ("example", "TXT"): ['"v=spf1" "-all"'],
    ("_http._tcp.example", "SRV"): ["1 5 8080 web.example."],
    ("big.example", "TXT"): [f'"{number:0250d}"' for number in range(30)],
}


async def test_every_kind_of_record(world: World) -> None:
    server = NameServer(ZONE)
    client = DnsClient(world, [await server.start(world)])
    answer = await client.query("WEB.example.", RecordType.A)
    assert (answer.name, answer.ttl_s) == ("web.example", 300)
    assert sorted(str(record.data) for record in answer.records) == ["10.0.0.1", "10.0.0.2"]  # dnspython shuffles
    assert [record.data for record in (await client.query("web.example", RecordType.AAAA)).records] == ["fd00::1"]
    mails = (await client.query("example", RecordType.MX)).records
    assert sorted(str(record.data) for record in mails) == [str(Mail(10, "mail.example")), str(Mail(20, "spare.example"))]
    assert (await client.query("example", RecordType.TXT)).records[0].data == (b"v=spf1", b"-all")
    assert (await client.query("_http._tcp.example", RecordType.SRV)).records[0].data == Service(1, 5, 8080, "web.example")
    assert (await client.query("www.example", RecordType.CNAME)).records[0].data == "alias.example"
    found = await client.lookup("web.example")
    assert (sorted(found.addresses), found.ttl_s) == (["10.0.0.1", "10.0.0.2", "fd00::1"], 300)
    await server.stop()


async def test_aliases_are_followed_also_out_of_the_answer(world: World) -> None:
    server = NameServer(ZONE)
    client = DnsClient(world, [await server.start(world)])
    answer = await client.query("www.example", RecordType.A)
    assert (answer.name, len(answer.records)) == ("web.example", 2)
    assert len(server.asked) == 1
    assert (await client.query("away.example", RecordType.A)).records[0].data == "10.9.9.9"
    assert server.asked[-2:] == [("away.example", "A"), ("web.elsewhere", "A")]
    with pytest.raises(UnavailableError, match="aliases in a row"):
        await client.query("loop.example", RecordType.A)
    await server.stop()


async def test_an_answer_too_large_for_udp_comes_by_tcp(world: World) -> None:
    server = NameServer(ZONE)
    server.truncates = True
    client = DnsClient(world, [await server.start(world)])
    assert len((await client.query("big.example", RecordType.TXT)).records) == 30
    assert server.n_tcp == 1
    await server.stop()


async def test_no_such_name_and_no_such_record(world: World) -> None:
    server = NameServer(ZONE)
    client = DnsClient(world, [await server.start(world)])
    for name, kind in (("none.example", RecordType.A), ("example", RecordType.A)):
        with pytest.raises(NotFound, match=f"A record: {name}"):
            await client.query(name, kind)
    assert await client.lookup("none.example") == ((), 60)  # the SOA's minimum
    with pytest.raises(InvalidArgument):
        await client.query("a..b", RecordType.A)
    await server.stop()


@pytest.mark.virtual_time
async def test_servers_that_are_silent_absent_or_fail_cost_an_attempt_each(world: World) -> None:
    silent, failing, good = NameServer(ZONE), NameServer(ZONE), NameServer(ZONE)
    silent.is_silent, failing.rcode = True, dns.rcode.SERVFAIL
    gone = NameServer(ZONE)
    addresses = [await server.start(world) for server in (gone, silent, failing, good)]
    await gone.stop()
    client = DnsClient(world, addresses, attempt_s=0.5, n_attempts=4)
    assert (await client.query("web.example", RecordType.A)).records
    assert [len(server.asked) for server in (silent, failing, good)] == [0, 1, 1]
    with pytest.raises(DeadlineExceeded):
        await DnsClient(world, addresses[:2], attempt_s=0.05, n_attempts=2).query("web.example", RecordType.A)
    with pytest.raises(UnavailableError, match="SERVFAIL"):
        await DnsClient(world, addresses[2:3]).query("web.example", RecordType.A)
    for server in (silent, failing, good):
        await server.stop()


async def test_lies_and_rubbish_are_ignored(world: World) -> None:
    server = NameServer(ZONE)

    def mangle(wire: bytes) -> list[bytes]:
        wrong_id = bytes([wire[0] ^ 1]) + wire[1:]
        no_response = wire[:2] + bytes([wire[2] & 0x7F]) + wire[3:]
        other_question = wire.replace(b"\x03web", b"\x03wub", 1)
        return [b"", b"rubbish", wire[:20], wrong_id, no_response, other_question, wire]

    server.mangle = mangle
    client = DnsClient(world, [await server.start(world)])
    assert len((await client.query("web.example", RecordType.A)).records) == 2
    server.mangle = lambda wire: mangle(wire)[:-1]
    with pytest.raises(DeadlineExceeded):
        await DnsClient(world, [client._servers[0]], attempt_s=0.05, n_attempts=1).query("web.example", RecordType.A)
    await server.stop()


async def test_questions_at_the_same_time_do_not_mix(world: World) -> None:
    server = NameServer({(f"n{number}.example", "A"): [f"10.0.0.{number}"] for number in range(50)})
    client = DnsClient(world, [await server.start(world)])
    answers = await asyncio.gather(*(client.query(f"n{number}.example", RecordType.A) for number in range(50)))
    assert [answer.records[0].data for answer in answers] == [f"10.0.0.{number}" for number in range(50)]
    await server.stop()


async def test_a_cancelled_question_leaves_nothing(world: World) -> None:
    server = NameServer(ZONE)
    server.is_silent = True
    client = DnsClient(world, [await server.start(world)])
    asking = asyncio.ensure_future(client.lookup("web.example"))
    await asyncio.sleep(0.02)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await server.stop()


def test_server_addresses() -> None:
    assert server_from("10.0.0.1") == UdpAddress("10.0.0.1", 53)
    assert server_from("10.0.0.1:5353") == UdpAddress("10.0.0.1", 5353)
    assert server_from("fd00::1") == UdpAddress("fd00::1", 53)
    assert server_from("[fd00::1]:5353") == UdpAddress("fd00::1", 5353)
    for text in ("", "localhost", "10.0.0.1:x"):
        with pytest.raises(InvalidArgument):
            server_from(text)


async def test_a_client_needs_a_server(world: World) -> None:
    with pytest.raises(InvalidArgument):
        DnsClient(world, [])
