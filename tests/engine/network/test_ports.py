"""Published ports: who reaches a container through them, that nobody else has them, and that they outlive the node (row V2)."""

import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from isopod.api.messages import NetworkSpec, PortMapping
from isopod.engine.network.networks import Networks, Wants
from isopod.engine.network.pool import Wiring
from isopod.engine.network.ports import check_ports
from isopod.world.errors import Exhausted, InUse, InvalidArgument, KernelError
from isopod.world.network import TcpAddress, UdpAddress
from tests.engine.network.conftest import Instance
from tests.engine.network.faults import with_refusing_kernel

pytestmark = pytest.mark.row("V2")
ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64
SOURCES = Path(__file__).parents[3] / "src"
SERVE = """
import socket
listener = socket.create_server(("0.0.0.0", 80))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(("0.0.0.0", 80))
import threading
def echo():
    while True:
        data, sender = datagrams.recvfrom(100)
        datagrams.sendto(sender[0].encode(), sender)
threading.Thread(target=echo, daemon=True).start()
print("ready", flush=True)
while True:
    connection, peer = listener.accept()
    connection.sendall(peer[0].encode())
    connection.close()
"""
CALL = """
import socket, sys
address, port, timeout_s, kind = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
try:
    if kind == "tcp":
        connection = socket.create_connection((address, port), timeout_s)
    else:
        connection = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        connection.settimeout(timeout_s)
        connection.sendto(b"x", (address, port))
    connection.settimeout(timeout_s)
    print(connection.recv(100).decode() or "closed")
except OSError as error:
    print("nothing", error.errno or "in time")
"""


def call(namespace: str | None, address: str, port: int, timeout_s: float = 5.0, kind: str = "tcp") -> str:
    """Connect from a namespace, None for the host's; return whom the server saw."""
    enter = [] if namespace is None else ["nsenter", f"--net={namespace}"]
    command = [*enter, sys.executable, "-c", CALL, address, str(port), str(timeout_s), kind]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()


@contextmanager
def serving(namespace: str) -> Iterator[None]:
    """Serve port 80 in a namespace: whoever connects is told its address."""
    command = ["nsenter", f"--net={namespace}", sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert lines_of(server).readline() == "ready\n"
            yield
        finally:
            server.kill()


def lines_of(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def wants(*ports: PortMapping) -> Wants:
    return Wants(ports=ports)


async def end(networks: Networks, *attached: str) -> None:
    for container_id in attached:
        await networks.detach(container_id)
    await networks.close()
    await networks.dispose()


# --- what is checked before anything is done ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mapping",
    [
        PortMapping(port=0),
        PortMapping(port=65536),
        PortMapping(port=80, host_port=-1),
        PortMapping(port=80, host_port=70000),
        PortMapping(port=80, host_ip="::1"),
        PortMapping(port=80, host_ip="nonsense"),
        PortMapping(port=80, host_ip="0.0.0.0"),
        PortMapping(port=80, host_ip="224.0.0.1"),
    ],
)
def test_what_no_port_can_be_is_refused(mapping: PortMapping) -> None:
    with pytest.raises(InvalidArgument):
        check_ports([mapping], "bridge")


@pytest.mark.parametrize(
    "one, other, is_twice",
    [
        (PortMapping(port=80, host_port=8080), PortMapping(port=81, host_port=8080), True),
        (PortMapping(port=80, host_port=8080), PortMapping(port=80, host_port=8080, host_ip="127.0.0.1"), True),
        (PortMapping(port=80, host_port=8080), PortMapping(port=80, host_port=8080, protocol="udp"), False),
        (PortMapping(port=80, host_port=80, host_ip="192.0.2.1"), PortMapping(port=80, host_port=80, host_ip="192.0.2.2"), False),
        (PortMapping(port=80), PortMapping(port=80), False),
    ],
)
def test_a_port_of_the_host_is_named_once(one: PortMapping, other: PortMapping, is_twice: bool) -> None:
    if not is_twice:
        check_ports([one, other], "bridge")
        return
    with pytest.raises(InvalidArgument, match="twice"):
        check_ports([one, other], "bridge")


@pytest.mark.parametrize("network", ["none", "host"])
def test_networks_without_ports_refuse_them(network: str) -> None:
    check_ports([], network)
    with pytest.raises(InvalidArgument, match=network):
        check_ports([PortMapping(port=80)], network)


def test_there_is_a_bound() -> None:
    with pytest.raises(InvalidArgument, match="at most"):
        check_ports([PortMapping(port=80)] * 513, "bridge")


# --- who has a port -------------------------------------------------------------------------------------------------


async def test_a_free_port_is_chosen_and_a_taken_one_refused(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    endpoint = (await networks.attach(ONE, "bridge", wants=wants(PortMapping(port=80), PortMapping(port=53, protocol="udp")))).endpoint
    tcp, udp = endpoint.published
    assert (tcp.port, tcp.protocol, udp.port, udp.protocol) == (80, "tcp", 53, "udp")
    assert tcp.host_port and udp.host_port
    assert endpoint.ports == {tcp.host_port: 80}
    before = await instance.left()
    for mapping in (tcp, udp):
        for taken in (mapping, PortMapping(port=1, host_port=mapping.host_port, protocol=mapping.protocol, host_ip="127.0.0.1")):
            with pytest.raises(InUse, match=f"container {ONE[:12]}"):
                await networks.attach(TWO, "bridge", wants=wants(PortMapping(port=9), taken))
    await networks.wait_idle()
    assert await instance.left() == before
    await networks.detach(ONE)
    again = await networks.attach(TWO, "bridge", wants=wants(tcp, udp))
    assert again.endpoint.published == (tcp, udp)
    await end(networks, TWO)


async def test_another_program_s_port_is_refused(instance: Instance) -> None:
    import asyncio

    networks = await instance.open(pool_size=0)
    network = instance.world.network
    listener = await network.listen(TcpAddress("127.0.0.1", 0), asyncio.Protocol)
    transport, _ = await network.open_udp(UdpAddress("127.0.0.1", 0), asyncio.DatagramProtocol)
    assert isinstance(listener.address, TcpAddress)
    for number, protocol in ((listener.address.port, "tcp"), (int(transport.get_extra_info("sockname")[1]), "udp")):
        mapping = PortMapping(port=80, host_port=number, protocol="udp" if protocol == "udp" else "tcp")
        with pytest.raises(InUse, match="another program") as failure:
            await networks.attach(ONE, "bridge", wants=wants(mapping))
        assert "-p PORT" in failure.value.hint
    await listener.close()
    transport.close()
    await end(networks)


@pytest.mark.host
async def test_an_address_that_is_not_this_machine_s_is_refused(host_instance: Instance) -> None:
    networks = await host_instance.open(pool_size=0)
    with pytest.raises(InvalidArgument, match=r"192\.0\.2\.77"):
        await networks.attach(ONE, "bridge", wants=wants(PortMapping(port=80, host_port=0, host_ip="192.0.2.77")))
    assert networks.get("bridge").addresses_used == 1
    await end(networks)


async def test_a_full_network_gives_the_ports_back(instance: Instance) -> None:
    networks = await instance.open(pool_size=0, length=30)
    got = await networks.attach(ONE, "bridge", wants=wants(PortMapping(port=80)))
    with pytest.raises(Exhausted):
        await networks.attach(TWO, "bridge", wants=wants(PortMapping(port=80, host_ip="127.0.0.1")))
    await networks.detach(ONE)
    again = await networks.attach(TWO, "bridge", wants=wants(*got.endpoint.published))
    assert again.endpoint.published == got.endpoint.published
    await end(networks, TWO)


async def test_a_filter_that_refuses_fails_the_attach_and_leaves_nothing(instance: Instance) -> None:
    instance.world, kernel = with_refusing_kernel(instance.world)
    networks = await instance.open(pool_size=0)
    before = await instance.left()
    kernel.refuse = lambda called: called == "apply_filter"
    with pytest.raises(KernelError):
        await networks.attach(ONE, "bridge", wants=wants(PortMapping(port=80)))
    kernel.refuse = lambda called: False
    await networks.wait_idle()
    assert await instance.left() == before
    got = await networks.attach(ONE, "bridge", wants=wants(PortMapping(port=80)))
    kernel.refuse = lambda called: called == "apply_filter"
    with pytest.raises(KernelError):
        await networks.detach(ONE)
    kernel.refuse = lambda called: False
    await networks.detach(ONE)
    await networks.wait_idle()
    assert await instance.left() == before
    again = await networks.attach(ONE, "bridge", wants=wants(*got.endpoint.published))
    assert again.endpoint.published == got.endpoint.published
    await end(networks, ONE)


async def test_a_filter_that_somebody_flushed_is_made_anew(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    await networks.attach(ONE, "bridge", wants=wants(PortMapping(port=80)))
    await instance.world.kernel.delete_table(instance.prefix)
    await networks.attach(TWO, "bridge", wants=wants(PortMapping(port=80)))
    assert (await instance.left())["tables"] == (instance.prefix,)
    await instance.world.kernel.delete_table(instance.prefix)
    await networks.detach(ONE)
    await end(networks, TWO)


async def test_a_node_that_starts_anew_has_the_ports_of_those_that_run(instance: Instance) -> None:
    first = await instance.open(pool_size=0)
    one = (await first.attach(ONE, "bridge", wants=wants(PortMapping(port=80)))).endpoint
    two = (await first.attach(TWO, "bridge", wants=wants(PortMapping(port=80)))).endpoint
    await instance.kill(first)
    second = await instance.open(pool_size=0, adopt=False)
    await second.adopt({ONE: one})  # the other one has ended meanwhile
    with pytest.raises(InUse, match=f"container {ONE[:12]}"):
        await second.attach(THREE, "bridge", wants=wants(*one.published))
    await second.attach(THREE, "bridge", wants=wants(*two.published))
    await end(second, ONE, THREE)


async def test_a_port_that_was_taken_meanwhile_is_told_of(instance: Instance) -> None:
    import asyncio

    first = await instance.open(pool_size=0)
    one = (await first.attach(ONE, "bridge", wants=wants(PortMapping(port=80)))).endpoint
    await instance.kill(first)
    listener = await instance.world.network.listen(TcpAddress("127.0.0.1", one.published[0].host_port), asyncio.Protocol)
    second = await instance.open(pool_size=0, adopt=False)
    await second.adopt({ONE: one})
    assert "network_port_not_held" in instance.events()
    await listener.close()
    await end(second, ONE)


# --- who reaches it -------------------------------------------------------------------------------------------------


@pytest.mark.host
async def test_who_reaches_a_published_port(host_instance: Instance) -> None:
    kernel = host_instance.world.kernel
    networks = await host_instance.open(pool_size=0)
    await networks.create(NetworkSpec(name="other"))
    ports = wants(PortMapping(port=80), PortMapping(port=80, protocol="udp"), PortMapping(port=80, host_ip="127.0.0.1"))
    web = await networks.attach(ONE, "bridge", wants=ports)
    neighbour, stranger = await networks.attach(TWO, "bridge"), await networks.attach(THREE, "other")
    everywhere, datagrams, only_here = (port.host_port for port in web.endpoint.published)
    gateway, web_address = networks.get("bridge").gateway, str(web.endpoint.ip_address)
    outside = await host_instance.free_subnet(30)
    base = outside.removesuffix("/30").rpartition(".")
    host_address, remote = f"{base[0]}.{int(base[2]) + 1}", f"{base[0]}.{int(base[2]) + 2}"
    foreign = Wiring(host_instance.world, folder=host_instance.folder, prefix=host_instance.prefix)
    await kernel.create_bridge(f"{host_instance.prefix}x", f"{host_address}/30")
    name = await foreign.make(f"{host_instance.prefix}x")
    await kernel.configure_link(foreign.path(name), "eth0", address=f"{remote}/30", gateway=host_address)
    assert web.namespace and neighbour.namespace and stranger.namespace

    with serving(web.namespace):
        assert call(foreign.path(name), host_address, everywhere) == remote  # from outside, under its own address
        assert call(foreign.path(name), host_address, datagrams, kind="udp") == remote
        assert call(None, "127.0.0.1", everywhere) == gateway  # the host's loopback is the bridge's address to the container
        assert call(None, "127.0.0.1", only_here) == gateway
        assert call(None, "127.0.0.1", datagrams, kind="udp") == gateway
        assert call(None, host_address, everywhere) in (host_address, gateway)  # the host by another of its addresses
        assert call(stranger.namespace, host_address, everywhere) == gateway  # from another network, which may not know this one
        assert call(neighbour.namespace, gateway, everywhere) == gateway  # from its own, by a hair-pin
        assert call(neighbour.namespace, host_address, datagrams, kind="udp") == gateway
        assert call(web.namespace, gateway, everywhere) == gateway  # and from itself
        assert call(foreign.path(name), host_address, only_here, 0.5).startswith("nothing")
        assert call(foreign.path(name), web_address, 80, 0.5).startswith("nothing")  # not around the published port
        assert call(stranger.namespace, web_address, 80, 0.5).startswith("nothing")
        await networks.detach(ONE)
        assert call(None, "127.0.0.1", everywhere, 1.0) == f"nothing {errno.ECONNREFUSED}"

    await foreign.remove(name)
    await kernel.delete_link(f"{host_instance.prefix}x")
    await end(networks, TWO, THREE)


LISTEN_LOOPBACK = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("127.0.0.1", 0))
s.settimeout(2)
print(s.getsockname()[1], flush=True)
try:
    print(s.recv(99))
except TimeoutError:
    print("nothing")
"""
SEND_TO_LOOPBACK = """
import socket, struct, sys
there_mac, mac, address, port = sys.argv[1:]
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
raw = lambda text: bytes.fromhex(text.replace(":", ""))
head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 32, 1, 0, 64, 17, 0, socket.inet_aton(address), socket.inet_aton("127.0.0.1"))
total = sum(struct.unpack("!10H", head))
total = (total & 0xFFFF) + (total >> 16)
head = head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
for _ in range(3):
    s.send(raw(there_mac) + raw(mac) + b"\\x08\\x00" + head + struct.pack("!HHHH", 9, int(port), 12, 0) + b"evil")
"""


@pytest.mark.host
async def test_a_container_does_not_reach_the_host_s_loopback(host_instance: Instance) -> None:
    """The bridges route 127.0.0.0/8 so that the host's loopback reaches published ports; the filter keeps the way back shut."""
    networks = await host_instance.open(pool_size=0)
    one = await networks.attach(ONE, "bridge")
    assert one.namespace
    bridge = f"/sys/class/net/{host_instance.prefix}0/address"
    with subprocess.Popen([sys.executable, "-c", LISTEN_LOOPBACK], stdout=subprocess.PIPE, text=True) as receiver:
        port = lines_of(receiver).readline().strip()
        words = [Path(bridge).read_text().strip(), str(one.endpoint.mac_address), str(one.endpoint.ip_address), port]
        subprocess.run(["nsenter", f"--net={one.namespace}", sys.executable, "-c", SEND_TO_LOOPBACK, *words], timeout=30, check=True)
        assert lines_of(receiver).read() == "nothing\n"
    await end(networks, ONE)


DAEMON = """
import asyncio, sys
from isopod.api.messages import PortMapping
from isopod.engine.network.networks import Networks, Wants
from isopod.runtime.logger import Logger
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world

async def main(world, folder, prefix, subnet):
    networks = await Networks.open(world, file=f"{folder}/net/networks", namespaces=f"{folder}/netns", prefix=prefix,
                                   default_subnet=subnet, pool_size=0, logger=Logger(lambda line: None, world.clock))
    await networks.adopt({})
    wants = Wants(names=("web",), ports=(PortMapping(port=80), PortMapping(port=80, protocol="udp")))
    attached = await networks.attach("1" * 64, "bridge", wants=wants)
    print(attached.namespace, *(port.host_port for port in attached.endpoint.published), flush=True)
    await asyncio.Event().wait()

loop = new_loop("uvloop")
loop.run_until_complete(main(make_host_world(), *sys.argv[1:]))
"""


@pytest.mark.host
async def test_ports_outlive_a_killed_node_and_come_back_to_the_next(host_instance: Instance) -> None:
    host_instance.subnet = await host_instance.free_subnet()
    command = [sys.executable, "-c", DAEMON, host_instance.folder, host_instance.prefix, host_instance.subnet]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(SOURCES)}) as daemon:
        namespace, tcp, udp = lines_of(daemon).readline().split()
        with serving(namespace):
            assert call(None, "127.0.0.1", int(tcp)).count(".") == 3
            daemon.kill()
            daemon.wait(timeout=10)
            assert call(None, "127.0.0.1", int(tcp)).count(".") == 3  # nobody is there, and it goes on
            networks = await host_instance.open(pool_size=0, adopt=False)
            assert call(None, "127.0.0.1", int(tcp)).count(".") == 3
            from isopod.api.messages import Endpoint

            await networks.adopt({ONE: Endpoint(network="bridge", ip_address="x")})
            assert call(None, "127.0.0.1", int(tcp)).count(".") == 3
            assert call(None, "127.0.0.1", int(udp), kind="udp").count(".") == 3
            with pytest.raises(InUse):
                await networks.attach(TWO, "bridge", wants=wants(PortMapping(port=1, host_port=int(tcp))))
            await networks.detach(ONE)
            assert call(None, "127.0.0.1", int(tcp), 1.0) == f"nothing {errno.ECONNREFUSED}"
    await end(networks)
