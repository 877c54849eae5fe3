"""Virtual machines on the networks: taps on the same bridges and the same addresses as containers, guarded, published, limited (row V2)."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from isopod.api.messages import Endpoint, NetworkSpec, PortMapping
from isopod.engine.network import names
from isopod.engine.network.networks import Networks, TapAttachment, Wants
from isopod.world.errors import AlreadyExists, Exhausted, KernelError, NotFound, Unsupported
from tests.engine.network.conftest import Instance
from tests.engine.network.faults import with_refusing_kernel
from tests.engine.network.test_ports import call, lines_of, serving

pytestmark = pytest.mark.row("V2")
ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64
GUEST = Path(__file__).with_name("guest.py")
SOURCES = Path(__file__).parents[3] / "src"


async def end(networks: Networks, *attached: str) -> None:
    for container_id in attached:
        await networks.detach(container_id)
    await networks.close()
    await networks.dispose()


@contextmanager
def guest(place: TapAttachment) -> Iterator[str]:
    """Play the guest behind a tap; return its network namespace."""
    endpoint = place.endpoint
    assert place.tap is not None
    words = [place.tap, str(endpoint.mac_address), f"{endpoint.ip_address}/{endpoint.prefix_length}", str(endpoint.gateway)]
    with subprocess.Popen([sys.executable, str(GUEST), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"/proc/{int(lines_of(process).readline())}/ns/net"
        finally:
            process.kill()


# --- on both Worlds -------------------------------------------------------------------------------------------------


async def test_a_machine_gets_a_tap_an_address_and_a_mac_of_its_own(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    before = await instance.left()
    one, two = await networks.attach_tap(ONE, "bridge"), await networks.attach_tap(TWO, "bridge")
    container = await networks.attach(THREE, "bridge")
    assert one.tap is not None and names.owns_tap(instance.prefix, one.tap)
    assert len({place.endpoint.ip_address for place in (one, two, container)}) == 3
    mac = str(one.endpoint.mac_address)
    assert mac != two.endpoint.mac_address
    assert int(mac[:2], 16) & 3 == 2  # locally administered, one receiver
    left = await instance.left()
    assert {one.tap, two.tap} < set(left["links"])
    assert left["tables"] == (f"bridge {instance.prefix}", instance.prefix)
    with pytest.raises(AlreadyExists):
        await networks.attach_tap(ONE, "bridge")
    for container_id in (ONE, TWO, THREE):
        await networks.detach(container_id)
    await networks.wait_idle()
    assert await instance.left() == before  # the guard goes with the last that needs it
    assert (await networks.attach_tap(ONE, "bridge")).endpoint.mac_address == mac  # the same at each start
    await end(networks, ONE)


async def test_none_has_no_card_and_host_is_refused(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    before = await instance.left()
    assert await networks.attach_tap(ONE, "none") == TapAttachment(None, Endpoint(network="none"))
    with pytest.raises(Unsupported, match="kernel") as failure:
        await networks.attach_tap(ONE, "host")
    assert "bridge" in failure.value.hint
    with pytest.raises(NotFound):
        await networks.attach_tap(ONE, "absent")
    await networks.detach(ONE)
    assert await instance.left() == before
    await end(networks)


@pytest.mark.parametrize("method", ["create_tap", "apply_filter", "limit_link", "reflect_link"])
async def test_a_failed_attach_leaves_nothing(instance: Instance, method: str) -> None:
    instance.world, kernel = with_refusing_kernel(instance.world)
    networks = await instance.open(pool_size=0)
    before = await instance.left()
    wants = Wants(ports=(PortMapping(port=80),), bytes_per_s_in=1 << 20, bytes_per_s_out=1 << 20)
    kernel.refuse = lambda called: called == method
    with pytest.raises(KernelError):
        await networks.attach_tap(ONE, "bridge", wants=wants)
    kernel.refuse = lambda called: False
    await networks.wait_idle()
    assert await instance.left() == before
    assert networks.get("bridge").addresses_used == 1
    await networks.attach_tap(ONE, "bridge", wants=wants)
    await end(networks, ONE)


async def test_taps_share_the_addresses_with_containers(instance: Instance) -> None:
    networks = await instance.open(pool_size=0, length=29)
    for number in range(5):
        attach = networks.attach_tap if number % 2 else networks.attach
        await attach(f"{number:064x}", "bridge")
    for attach in (networks.attach_tap, networks.attach):
        with pytest.raises(Exhausted):
            await attach(ONE, "bridge")
    await networks.detach(f"{1:064x}")
    await networks.attach_tap(ONE, "bridge")  # waits until the tap before it is gone
    await end(networks, ONE, *(f"{number:064x}" for number in (0, 2, 3, 4)))


async def test_a_node_that_starts_anew_takes_over_what_runs_and_removes_the_rest(instance: Instance) -> None:
    first = await instance.open(pool_size=0)
    one = await first.attach_tap(ONE, "bridge", wants=Wants(names=("vm1",), ports=(PortMapping(port=22),)))
    two = await first.attach_tap(TWO, "bridge")
    await instance.kill(first)
    second = await instance.open(pool_size=0, adopt=False)
    await second.adopt({ONE: one.endpoint})
    left = await instance.left()
    assert one.tap in left["links"]
    assert two.tap not in left["links"]
    assert second.get("bridge").addresses_used == 2
    assert (await second.attach_tap(TWO, "bridge")).endpoint.mac_address == two.endpoint.mac_address
    await end(second, ONE, TWO)
    assert await instance.left() == {}


async def test_a_stray_tap_and_a_guard_without_anybody_are_removed(instance: Instance) -> None:
    first = await instance.open(pool_size=0)
    await first.attach_tap(ONE, "bridge")
    await instance.kill(first)
    await instance.world.disk.remove_tree(f"{instance.namespaces}-owners")  # as after a start that was cut short
    second = await instance.open(pool_size=0)
    assert await instance.left() == {"links": (f"{instance.prefix}0",), "tables": (instance.prefix,)}
    await end(second)


# --- packets --------------------------------------------------------------------------------------------------------


@pytest.mark.host
async def test_a_guest_reaches_its_gateway_and_neighbours_and_is_reached(host_instance: Instance) -> None:
    networks = await host_instance.open(pool_size=0)
    await networks.create(NetworkSpec(name="other"))
    port = PortMapping(port=80)
    machine = await networks.attach_tap(ONE, "bridge", wants=Wants(ports=(port,)))
    container, apart = await networks.attach(TWO, "bridge"), await networks.attach(THREE, "other")
    gateway, address = networks.get("bridge").gateway, str(machine.endpoint.ip_address)
    published = machine.endpoint.published[0].host_port
    assert container.namespace and apart.namespace and container.endpoint.ip_address
    with guest(machine) as inside, serving(inside), serving(container.namespace):
        assert ping(inside, gateway)
        assert call(inside, container.endpoint.ip_address, 80) == address
        assert call(container.namespace, address, 80) == container.endpoint.ip_address
        assert call(None, "127.0.0.1", published) == gateway
        assert call(apart.namespace, networks.get("other").gateway, published) == gateway
        assert call(container.namespace, gateway, published) == gateway
        assert call(inside, gateway, published) == gateway  # itself
        assert call(apart.namespace, address, 80, 0.5).startswith("nothing")
        assert call(inside, str(apart.endpoint.ip_address), 80, 0.5).startswith("nothing")
    await end(networks, ONE, TWO, THREE)


def ping(namespace: str, address: str) -> bool:
    command = ["nsenter", f"--net={namespace}", "busybox", "ping", "-c", "1", "-W", "5", address]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


SNIFF = """
import socket, struct, sys, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("eth0", 0))
s.settimeout(10)
print("ready", flush=True)
while True:
    frame, (_, _, direction, *_) = s.recvfrom(2000)
    if b"isopod-" in frame and direction != 4:  # what it sends itself repeats what it refuses
        tag = frame[frame.index(b"isopod-"):][:20].rstrip(b"\\0").decode()
        print(tag, flush=True)
        if tag == "isopod-last":
            break
"""
SPOOF = """
import socket, struct, sys
mac, other_mac, address, other_address, there_mac, there = sys.argv[1:]
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
raw = lambda text: bytes.fromhex(text.replace(":", ""))
ip = socket.inet_aton
def checksum(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
def udp(tag, source_mac, source, kind=b"\\x08\\x00"):
    body = tag.encode().ljust(20, b"\\0")
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 48, 1, 0, 64, 17, 0, ip(source), ip(there))
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    s.send(raw(there_mac) + raw(source_mac) + kind + head + struct.pack("!HHHH", 9, 9, 28, 0) + body)
def arp(tag, source_mac, sender_mac, sender):
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + raw(sender_mac) + ip(sender) + bytes(6) + ip(there)
    s.send(b"\\xff" * 6 + raw(source_mac) + b"\\x08\\x06" + body + tag.encode().ljust(20, b"\\0"))
udp("isopod-right", mac, address)
arp("isopod-right-arp", mac, mac, address)
udp("isopod-mac", other_mac, address)
udp("isopod-ip", mac, other_address)
udp("isopod-both", other_mac, other_address)
udp("isopod-vlan-ip", mac, other_address, b"\\x81\\x00\\x00\\x05\\x08\\x00")
udp("isopod-ipv6", mac, address, b"\\x86\\xdd")
udp("isopod-other", mac, address, b"\\x88\\xb5")
arp("isopod-arp-ip", mac, mac, other_address)
arp("isopod-arp-mac", mac, other_mac, address)
arp("isopod-arp-frame", other_mac, mac, address)
udp("isopod-last", mac, address)
"""


@pytest.mark.host
async def test_what_a_guest_sends_under_another_s_name_is_dropped(host_instance: Instance) -> None:
    """Somebody else's MAC, IPv4 address and ARP answers, inside a VLAN's tag too, and all that is neither IPv4 nor ARP."""
    networks = await host_instance.open(pool_size=0)
    machine, container = await networks.attach_tap(ONE, "bridge"), await networks.attach(TWO, "bridge")
    own, there = machine.endpoint, container.endpoint
    victim = str(networks.get("bridge").gateway)
    with guest(machine) as inside:
        sniffer = ["nsenter", f"--net={container.namespace}", sys.executable, "-c", SNIFF]
        with subprocess.Popen(sniffer, stdout=subprocess.PIPE, text=True) as listener:
            assert lines_of(listener).readline() == "ready\n"
            words = [str(own.mac_address), "0a:99:99:99:99:99", str(own.ip_address), victim, str(there.mac_address), str(there.ip_address)]
            subprocess.run(["nsenter", f"--net={inside}", sys.executable, "-c", SPOOF, *words], check=True, timeout=20)
            seen = lines_of(listener).read().split()
        assert seen == ["isopod-right", "isopod-right-arp", "isopod-last"]
        # A container's link is not guarded: the same frames arrive, which shows that they can.
        with subprocess.Popen(
            ["nsenter", f"--net={container.namespace}", sys.executable, "-c", SNIFF], stdout=subprocess.PIPE, text=True
        ) as listener:
            assert lines_of(listener).readline() == "ready\n"
            other = await networks.attach(THREE, "bridge")
            words = [str(other.endpoint.mac_address), "0a:99:99:99:99:99", str(other.endpoint.ip_address), victim, *words[4:]]
            subprocess.run(["nsenter", f"--net={other.namespace}", sys.executable, "-c", SPOOF, *words], check=True, timeout=20)
            assert "isopod-arp-ip" in lines_of(listener).read().split()
    await end(networks, ONE, TWO, THREE)


@pytest.mark.host
async def test_a_tap_that_nobody_admitted_gets_nothing_through(host_instance: Instance) -> None:
    networks = await host_instance.open(pool_size=0)
    machine = await networks.attach_tap(ONE, "bridge")  # one that makes the guard
    tap = f"{host_instance.prefix}-tfffff"
    await host_instance.world.kernel.create_tap(tap, bridge=f"{host_instance.prefix}0")
    stranger = TapAttachment(
        tap,
        Endpoint(
            network="bridge",
            ip_address=str(machine.endpoint.ip_address),
            prefix_length=24,
            gateway=machine.endpoint.gateway,
            mac_address="0a:00:00:00:00:01",
        ),
    )
    with guest(stranger) as inside:
        command = ["nsenter", f"--net={inside}", "busybox", "ping", "-c", "1", "-W", "1", str(machine.endpoint.gateway)]
        assert subprocess.run(command, capture_output=True, timeout=20, check=False).returncode != 0
    await host_instance.world.kernel.delete_link(tap)
    await end(networks, ONE)


# --- rates ----------------------------------------------------------------------------------------------------------

SINK = """
import socket, sys, time
s = socket.create_server(("0.0.0.0", 90))
print("ready", flush=True)
c, _ = s.accept()
c.settimeout(30)
n, began = 0, time.monotonic()
while data := c.recv(1 << 16):
    n += len(data)
print(n, time.monotonic() - began, flush=True)
"""
SOURCE = """
import socket, sys, time
c = socket.create_connection((sys.argv[1], 90), 10)
ends = time.monotonic() + float(sys.argv[2])
piece = bytes(1 << 16)
while time.monotonic() < ends:
    c.sendall(piece)
c.close()
"""


class Measured(NamedTuple):
    """What arrived, and in how long."""

    n_bytes: int
    seconds: float

    def holds(self, rate: int) -> bool:
        """Return whether it was never more than the rate and what may be saved up: a second's worth and two large pieces, at both ends."""
        return 0.3 * rate * self.seconds < self.n_bytes < rate * (self.seconds + 1) + (256 << 10)


def measure(sender: Sequence[str], receiver: Sequence[str], address: str, seconds: float) -> Measured:
    """Send as fast as it goes; return what arrived."""
    with subprocess.Popen([*receiver, sys.executable, "-c", SINK], stdout=subprocess.PIPE, text=True) as sink:
        assert lines_of(sink).readline() == "ready\n"
        subprocess.run([*sender, sys.executable, "-c", SOURCE, address, str(seconds)], check=True, timeout=60)
        n_bytes, took_s = lines_of(sink).readline().split()
        return Measured(int(n_bytes), float(took_s))


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["container", "machine"])
async def test_rates_hold_in_both_directions(host_instance: Instance, kind: str) -> None:
    networks = await host_instance.open(pool_size=0)
    rate = 2_000_000
    wants = Wants(bytes_per_s_in=rate, bytes_per_s_out=rate)
    if kind == "machine":
        machine = await networks.attach_tap(ONE, "bridge", wants=wants)
        endpoint = machine.endpoint
        with guest(machine) as inside:
            measured = await _both_ways(networks, inside, endpoint)
    else:
        attached = await networks.attach(ONE, "bridge", wants=wants)
        assert attached.namespace
        measured = await _both_ways(networks, attached.namespace, attached.endpoint)
    for direction, found in measured.items():
        assert found.holds(rate), (direction, measured)
    await end(networks, ONE, TWO)


async def _both_ways(networks: Networks, inside: str, endpoint: Endpoint) -> dict[str, Measured]:
    neighbour = await networks.attach(TWO, "bridge")
    limited, free = ["nsenter", f"--net={inside}"], ["nsenter", f"--net={neighbour.namespace}"]
    return {
        "in": measure(free, limited, str(endpoint.ip_address), 2.5),
        "out": measure(limited, free, str(neighbour.endpoint.ip_address), 2.5),
    }


@pytest.mark.host
async def test_a_limit_is_gone_with_its_container(host_instance: Instance) -> None:
    networks = await host_instance.open(pool_size=1)
    await networks.attach(ONE, "bridge", wants=Wants(bytes_per_s_in=1 << 20, bytes_per_s_out=1 << 20))
    assert (await host_instance.left())["tables"] == (f"bridge {host_instance.prefix}", host_instance.prefix)
    await networks.detach(ONE)
    attached = await networks.attach(TWO, "bridge")
    await networks.wait_idle()  # the guard goes when the link has gone
    assert (await host_instance.left())["tables"] == (host_instance.prefix,)
    assert attached.namespace
    free = measure([], ["nsenter", f"--net={attached.namespace}"], str(attached.endpoint.ip_address), 0.5)
    assert not free.holds(1 << 20)
    await end(networks, TWO)
