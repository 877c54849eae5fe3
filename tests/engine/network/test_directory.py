"""Names on networks: what is answered on which, to whom, and that a node that starts anew knows them again (row V2)."""

import asyncio

import dns.message
import dns.rcode
import pytest

from isopod.api.messages import Container, Endpoint, NetworkSpec, PortMapping, Resources
from isopod.engine.network.directory import TTL_S, Zone, nameservers
from isopod.engine.network.networks import Networks, Wants, wants_of
from isopod.net.dns.message import Question, RecordType
from isopod.net.udp import open_udp_socket
from isopod.world.network import UdpAddress
from isopod.world.world import World
from tests.engine.network.conftest import Instance

pytestmark = pytest.mark.row("V2")
ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64
DEADLINE_S = 20.0


def zone() -> Zone:
    made = Zone("10.88.0.0/24", "10.88.0.1")
    made.add("10.88.0.2", ["web", "WEB", "shop.example", "x" * 64, "", "1" * 12])
    made.add("10.88.0.3", ["db", "web"])
    return made


@pytest.mark.parametrize(
    "name, addresses",
    [("web", ["10.88.0.2", "10.88.0.3"]), ("db", ["10.88.0.3"]), ("shop.example", ["10.88.0.2"]), ("111111111111", ["10.88.0.2"])],
)
def test_a_name_has_the_addresses_of_all_who_bear_it(name: str, addresses: list[str]) -> None:
    known = zone().answer(Question(name, RecordType.A))
    assert known is not None and known.exists
    assert [record.data for record in known.records] == addresses
    assert {record.ttl_s for record in known.records} == {TTL_S}
    other = zone().answer(Question(name, RecordType.AAAA))
    assert other is not None and (other.exists, other.records) == (True, ())


@pytest.mark.parametrize(
    "name, found",
    [("2.0.88.10", "web"), ("3.0.88.10", "db"), ("1.0.88.10", ""), ("9.0.88.10", "")],
)
def test_addresses_of_the_network_are_answered_for_good(name: str, found: str) -> None:
    known = zone().answer(Question(f"{name}.in-addr.arpa", RecordType.PTR))
    assert known is not None
    assert (known.exists, [record.data for record in known.records]) == (bool(found), [found] if found else [])


@pytest.mark.parametrize(
    "name",
    ["", "other", "web.example", "in-addr.arpa", "2.0.89.10.in-addr.arpa", "0.88.10.in-addr.arpa", "x.0.88.10.in-addr.arpa",
     "300.0.88.10.in-addr.arpa", "0002.0.88.10.in-addr.arpa"],
)  # fmt: skip
def test_everything_else_is_somebody_else_s(name: str) -> None:
    assert zone().answer(Question(name, RecordType.A)) is None
    assert zone().answer(Question(name, RecordType.PTR)) is None


def test_what_went_is_forgotten() -> None:
    known = zone()
    for _ in range(2):
        known.remove("10.88.0.2")
    answer = known.answer(Question("web", RecordType.A))
    assert answer is not None and [record.data for record in answer.records] == ["10.88.0.3"]
    assert known.answer(Question("shop.example", RecordType.A)) is None
    known.remove("10.88.0.3")
    assert known.answer(Question("web", RecordType.A)) is None


def test_a_resolv_conf_names_servers() -> None:
    text = (
        "# x\nnameserver 127.0.0.53\nsearch example\nnameserver\nnameserver nonsense\nnameserver 2001:db8::1\n nameserver 192.0.2.1 # y\n"
    )
    assert nameservers(text) == [UdpAddress("127.0.0.53", 53), UdpAddress("2001:db8::1", 53), UdpAddress("192.0.2.1", 53)]


async def ask(world: World, networks: Networks, network: str, name: str, kind: str = "A") -> list[str]:
    """Ask a network's server from one of its addresses; return the answers, or why there are none."""
    gateway = networks.get(network).gateway
    socket = await open_udp_socket(world, UdpAddress(gateway, 0), remote=UdpAddress(str(networks.nameserver(network)), 53))
    try:
        socket.send(dns.message.make_query(name, kind).to_wire())
        answer = dns.message.from_wire((await socket.receive(timeout_s=DEADLINE_S)).data)
    finally:
        socket.close()
        for _ in range(3):
            await asyncio.sleep(0)
    found = [str(item) for rrset in answer.answer for item in rrset]
    return sorted(found) or [dns.rcode.to_text(answer.rcode())]


async def test_each_network_answers_for_those_on_it(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    await networks.create(NetworkSpec(name="other"))
    world = instance.world
    one = await networks.attach(ONE, "bridge", wants=Wants(names=("web", "shop")))
    two = await networks.attach_tap(TWO, "bridge", wants=Wants(names=("vm1", "shop")))
    three = await networks.attach(THREE, "other", wants=Wants(names=("db",)))
    first, second = str(one.endpoint.ip_address), str(two.endpoint.ip_address)
    assert await ask(world, networks, "bridge", "web") == [first]
    assert await ask(world, networks, "bridge", "VM1.") == [second]
    assert await ask(world, networks, "bridge", "shop") == sorted([first, second])
    assert await ask(world, networks, "bridge", "web", "AAAA") == ["NOERROR"]
    reverse = ".".join(reversed(first.split("."))) + ".in-addr.arpa"
    assert await ask(world, networks, "bridge", reverse, "PTR") == ["web."]
    assert await ask(world, networks, "other", "db") == [three.endpoint.ip_address]
    await networks.detach(ONE)
    assert await ask(world, networks, "bridge", "shop") == [second]
    assert await ask(world, networks, "bridge", reverse, "PTR") == ["NXDOMAIN"]
    await networks.detach(THREE)
    await networks.remove("other")
    assert networks.nameserver("other") is None
    await networks.detach(TWO)
    await networks.close()
    await networks.dispose()


async def test_a_node_that_starts_anew_knows_the_names_again(instance: Instance) -> None:
    first = await instance.open(pool_size=0)
    one = (await first.attach(ONE, "bridge", wants=Wants(names=("web",)))).endpoint
    two = (await first.attach_tap(TWO, "bridge", wants=Wants(names=("vm1",)))).endpoint
    await instance.kill(first)
    second = await instance.open(pool_size=0, adopt=False)
    await second.adopt({ONE: one}, spared=[TWO])
    assert await ask(instance.world, second, "bridge", "web") == [one.ip_address]
    assert await ask(instance.world, second, "bridge", "vm1") == [two.ip_address]
    for container_id in (ONE, TWO):
        await second.detach(container_id)
    await second.close()
    await second.dispose()


async def test_where_port_53_is_taken_there_are_no_names_but_all_else(instance: Instance) -> None:
    instance.subnet = await instance.free_subnet()
    gateway = instance.subnet.rpartition(".")[0] + ".1"
    await instance.world.kernel.create_bridge(f"{instance.prefix}0", f"{gateway}/24")
    socket = await open_udp_socket(instance.world, UdpAddress(gateway, 53))
    networks = await instance.open(pool_size=0)
    assert networks.nameserver("bridge") is None
    assert "network_names_not_served" in instance.events()
    await networks.attach(ONE, "bridge", wants=Wants(names=("web",)))
    await networks.detach(ONE)
    socket.close()
    await networks.close()
    await networks.dispose()


async def test_networks_without_a_bridge_have_no_name_server(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    assert (networks.nameserver("none"), networks.nameserver("host")) == (None, None)
    assert networks.nameserver("bridge") == networks.get("bridge").gateway
    await networks.close()
    assert networks.nameserver("bridge") is None
    await networks.dispose()


def test_a_record_s_names_are_its_own_its_host_name_s_and_its_short_id() -> None:
    made = Container(
        id="a" * 64,
        name="web",
        hostname="shop",
        created_at_ns=0,
        updated_at_ns=0,
        image="i",
        image_id="sha256:0",
        command=("true",),
        working_dir="/",
        user="",
        network=Endpoint(network="bridge"),
        ports=(PortMapping(port=80),),
        resources=Resources(network_in_bytes_per_s=1, network_out_bytes_per_s=2),
    )
    assert wants_of(made) == Wants(("web", "shop", "a" * 12), (PortMapping(port=80),), 1, 2)
