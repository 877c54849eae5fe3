"""Who founds when several nodes are started with the same line; and names with several addresses."""

import asyncio

import pytest

from isopod.cluster.members.config import ClusterConfig, PeerSpec, format_address, parse_peer, parse_tcp
from isopod.cluster.members.founding import choose_start
from isopod.cluster.members.links import connect_any
from isopod.net.rpc import Server
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import InvalidArgument, NotStarted
from isopod.world.network import TcpAddress
from isopod.world.sim import SimWorld

LISTED = (PeerSpec(1, "a:1"), PeerSpec(2, "b:1"), PeerSpec(3, "c:1"))
NAMELESS = (PeerSpec(0, "a:1"), PeerSpec(0, "b:1"))


@pytest.mark.row("B33")
@pytest.mark.parametrize(
    "fields,way,addresses",
    [
        ({}, "found", ()),
        ({"peers": (PeerSpec(1, "a:1"),)}, "found", ()),
        ({"peers": LISTED}, "ask_first", ("b:1", "c:1")),
        ({"peers": LISTED, "node_id": 2, "bind": "b:1"}, "join", ("a:1", "c:1")),
        ({"peers": LISTED[1:]}, "ask_first", ("b:1", "c:1")),
        ({"peers": LISTED, "node_id": 2, "bind": "b:1", "init": "primary"}, "ask_first", ("a:1", "c:1")),
        ({"peers": LISTED, "init": "secondary"}, "join", ("b:1", "c:1")),
        ({"init": "secondary"}, "wait", ()),
        ({"init": "primary"}, "found", ()),
        ({"peers": NAMELESS}, "ask_first", ("b:1",)),
        ({"peers": NAMELESS, "bind": "b:1", "node_id": 2}, "join", ("a:1",)),
        ({"peers": NAMELESS, "bind": "x:1"}, "join", ("a:1", "b:1")),
        ({"peers": NAMELESS, "bind": "0.0.0.0:1", "advertise": "a:1"}, "ask_first", ("b:1",)),
        ({"join": ("j:1",)}, "join", ("j:1",)),
        ({"join": ("j:1",), "peers": LISTED}, "join", ("j:1", "b:1", "c:1")),
        ({"role": "agent", "peers": LISTED}, "join", ("b:1", "c:1")),
    ],
)
def test_who_founds(fields: dict[str, object], way: str, addresses: tuple[str, ...]) -> None:
    config = ClusterConfig(data_dir="/x", bind="a:1")._replace(**fields)  # type: ignore[arg-type]
    assert choose_start(config, config.advertise or config.bind) == (way, addresses)


def test_exactly_one_of_those_that_are_listed_founds() -> None:
    for peers in (LISTED, (PeerSpec(0, "a:1"), PeerSpec(0, "b:1"), PeerSpec(0, "c:1"))):
        ways = []
        for node_id, bind in ((1, "a:1"), (2, "b:1"), (3, "c:1")):
            ways.append(choose_start(ClusterConfig(data_dir="/x", node_id=node_id, bind=bind, peers=peers), bind).way)
        assert sorted(ways) == ["ask_first", "join", "join"]


@pytest.mark.parametrize(
    "text,peer",
    [
        ("1:a:7000", PeerSpec(1, "a:7000")),
        ("a:7000", PeerSpec(0, "a:7000")),
        ("12:10.0.0.1:7000", PeerSpec(12, "10.0.0.1:7000")),
        ("2:[::1]:7000", PeerSpec(2, "[::1]:7000")),
        ("[::1]:7000", PeerSpec(0, "[::1]:7000")),
    ],
)
def test_peers_as_they_are_written(text: str, peer: PeerSpec) -> None:
    assert parse_peer(text) == peer


@pytest.mark.parametrize("text", ["", "a", "a:b", "1:a", "0:a:1", "1:a:99999", "unix:/x", "1:2:3:4", "-1:a:1"])
def test_what_is_no_peer(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_peer(text)


def test_addresses_there_and_back() -> None:
    for text in ("a:1", "[::1]:1", "10.0.0.1:65535"):
        assert format_address(parse_tcp("address", text)) == text


async def test_a_names_addresses_are_tried_in_turn_and_looked_up_each_time(sim_world: SimWorld) -> None:
    world = sim_world.world
    server = Server(world, {}, logger=Logger(lambda _: None, world.clock), metrics=Registry())
    listener = await server.listen(TcpAddress("127.0.0.1", 7123), plaintext=True)
    sim_world.network.names.set("cluster.example", ["127.0.0.9", "127.0.0.1"])
    client = await connect_any(world, TcpAddress("cluster.example", 7123), name="x", timeout_s=1.0, tls=None)
    await client.close()
    sim_world.network.names.set("cluster.example", ["127.0.0.9"])
    with pytest.raises(NotStarted):
        await connect_any(world, TcpAddress("cluster.example", 7123), name="x", timeout_s=1.0, tls=None)
    with pytest.raises(NotStarted, match="no such name"):
        await connect_any(world, TcpAddress("nowhere.example", 7123), name="x", timeout_s=1.0, tls=None)
    await listener.close()
    await server.close()
    await asyncio.sleep(0)
