"""Packets on the host's kernel: who reaches whom. All of it stays within namespaces that the test made."""

import subprocess
import sys

import pytest

from isopod.api.messages import NetworkSpec
from isopod.engine.network.networks import Attachment
from isopod.engine.network.pool import Wiring
from tests.engine.network.conftest import Instance

pytestmark = pytest.mark.host

PORT = 4711
LISTEN = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", %d))
s.settimeout(%s)
print("ready", flush=True)
try:
    data, (address, _) = s.recvfrom(100)
    s.sendto(b"answer", (address, _))
    print(address)
except TimeoutError:
    print("nothing")
"""
SEND = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(%s)
s.sendto(b"question", (sys.argv[1], %d))
try:
    print(s.recv(100).decode())
except (TimeoutError, ConnectionRefusedError, OSError):
    print("nothing")
"""


def ask(sender: str, receiver: str, address: str, timeout_s: float = 3.0) -> tuple[str, str]:
    """Send a datagram from one namespace to an address in another; return what the sender got back, and whom the receiver saw."""
    enter = ["nsenter", f"--net={receiver}", sys.executable, "-c", LISTEN % (PORT, timeout_s)]
    with subprocess.Popen(enter, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == "ready\n"
        command = ["nsenter", f"--net={sender}", sys.executable, "-c", SEND % (timeout_s, PORT), address]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
        return answer, listener.stdout.readline().strip()


def place(attachment: Attachment) -> tuple[str, str]:
    assert attachment.namespace and attachment.endpoint.ip_address
    return attachment.namespace, attachment.endpoint.ip_address


async def test_who_reaches_whom(host_instance: Instance) -> None:
    kernel = host_instance.world.kernel
    networks = await host_instance.open(pool_size=0)
    await networks.create(NetworkSpec(name="other"))
    one, two = place(await networks.attach("1" * 64, "bridge")), place(await networks.attach("2" * 64, "bridge"))
    other = place(await networks.attach("3" * 64, "other"))
    outside = await host_instance.free_subnet(30)
    base = outside.removesuffix("/30").rpartition(".")
    gateway, remote = f"{base[0]}.{int(base[2]) + 1}", f"{base[0]}.{int(base[2]) + 2}"
    foreign = Wiring(host_instance.world, folder=host_instance.folder, prefix=host_instance.prefix)
    await kernel.create_bridge(f"{host_instance.prefix}x", f"{gateway}/30")  # the world outside: no bridge of ours
    name = await foreign.make(f"{host_instance.prefix}x")
    await kernel.configure_link(foreign.path(name), "eth0", address=f"{remote}/30", gateway=gateway)

    assert ask(one[0], two[0], two[1]) == ("answer", one[1])  # neighbours see each other's addresses
    assert ask(one[0], foreign.path(name), remote) == ("answer", gateway)  # the outside sees the host's
    assert ask(one[0], other[0], other[1], 0.5) == ("nothing", "nothing")  # networks do not reach each other
    assert ask(other[0], one[0], one[1], 0.5) == ("nothing", "nothing")
    assert ask(foreign.path(name), one[0], one[1], 0.5) == ("nothing", "nothing")  # nor does the outside reach in

    await foreign.remove(name)
    await kernel.delete_link(f"{host_instance.prefix}x")
    for digit in "123":
        await networks.detach(digit * 64)
    await networks.close()
    await networks.dispose()
