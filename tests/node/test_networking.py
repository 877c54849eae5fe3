"""Published ports, names and rates of containers through a whole node: what is recorded, on both Worlds, and what is reached (row V2)."""

import sys

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.world.errors import InUse, InvalidArgument
from tests.node.rig import HostBackend, Rig

pytestmark = pytest.mark.row("V2")
WEB = ("sh", "-c", "mkdir -p /tmp/www; echo hello > /tmp/www/index.html; exec busybox httpd -f -h /tmp/www")


async def test_ports_are_recorded_while_it_runs_and_asked_for_at_each_start(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="web", network="bridge", ports=(m.PortMapping(port=80),))
        [port] = record.network.published
        assert (port.port, port.protocol) == (80, "tcp")
        assert record.network.ports == {port.host_port: 80}
        with pytest.raises(InUse, match=record.id[:12]):
            await rig.run_detached("sleep", "1000", name="other", network="bridge", ports=(port,))
        await rig.kill()
        await rig.start()
        assert (await rig.inspect("web")).network.published == (port,)
        with pytest.raises(InUse):
            await rig.run_detached("sleep", "1000", name="third", network="bridge", ports=(port,))
        await rig.remove("web", force=True)
        again = await rig.run_detached("sleep", "1000", name="fourth", network="bridge", ports=(port,))
        assert again.network.published == (port,)
        with pytest.raises(InvalidArgument):
            await rig.run_detached("sleep", "1", network="host", ports=(port,))


@pytest.mark.host
async def test_names_are_resolved_and_ports_reached_and_both_outlive_the_node(host_rig: Rig) -> None:
    async with host_rig as rig:
        web = await rig.run_detached(*WEB, name="web", hostname="shop", network="bridge", ports=(m.PortMapping(port=80),))
        address = str(web.network.ip_address)
        for name in ("web", "shop", web.id[:12]):
            got = await rig.run("busybox", "wget", "-q", "-O", "-", f"http://{name}/", network="bridge")
            assert (got.exit_code, got.stdout) == (0, b"hello\n"), name
        looked = await rig.run("busybox", "nslookup", "web", network="bridge")
        assert address.encode() in looked.stdout
        backwards = await rig.run("busybox", "nslookup", address, network="bridge")
        assert b"web" in backwards.stdout
        resolv = (await rig.run("cat", "/etc/resolv.conf", network="bridge")).stdout.decode().splitlines()
        assert resolv[0] == f"nameserver {web.network.gateway}"
        port = web.network.published[0].host_port
        assert fetch(rig, port) == "hello\n"
        await rig.kill()
        assert fetch(rig, port) == "hello\n"
        await rig.start()
        assert fetch(rig, port) == "hello\n"
        again = await rig.run("busybox", "wget", "-q", "-O", "-", "http://web/", network="bridge")
        assert (again.exit_code, again.stdout) == (0, b"hello\n")
        await rig.remove("web", force=True)
        gone = await rig.run("busybox", "nslookup", "web", str(web.network.gateway), network="bridge")
        assert address.encode() not in gone.stdout
        assert "refused" in fetch(rig, port)


@pytest.mark.host
async def test_a_container_that_joins_a_network_finds_its_names(host_rig: Rig) -> None:
    async with host_rig as rig:
        await rig.run_detached(*WEB, name="web", network="bridge")
        alone = await rig.run_detached("sleep", "1000", name="alone", network="none")
        assert (await rig.exec("alone", "busybox", "wget", "-q", "-O", "-", "http://web/")).exit_code != 0
        await rig.client.call(methods.NETWORK_CONNECT, m.ConnectNetwork(network="bridge", name=alone.name))
        got = await rig.exec("alone", "busybox", "wget", "-q", "-O", "-", "http://web/")
        assert (got.exit_code, got.stdout) == (0, b"hello\n")


@pytest.mark.host
async def test_a_container_s_rate_holds(host_rig: Rig) -> None:
    async with host_rig as rig:
        rate = 1 << 20
        serve = "busybox dd if=/dev/zero bs=64k count=65 2>/dev/null | busybox nc -l -p 90 >/dev/null"
        limits = m.Resources(network_out_bytes_per_s=rate)
        record = await rig.run_detached("sh", "-c", f"while :; do {serve}; done", network="bridge", resources=limits)
        program = (
            "import socket, sys, time\n"
            "while True:\n"
            "    try:\n"
            "        s = socket.create_connection((sys.argv[1], 90), 10)\n"
            "        break\n"
            "    except ConnectionRefusedError:\n"
            "        time.sleep(0.05)\n"
            "s.settimeout(20)\n"
            "began, n = time.monotonic(), 0\n"
            "while n < 4 << 20:\n"
            "    n += len(s.recv(1 << 16))\n"
            "print(time.monotonic() - began)\n"
        )
        assert isinstance(rig.backend, HostBackend)
        seconds = rig.backend.inside(sys.executable, "-c", program, str(record.network.ip_address))
        assert float(seconds) > 2.5  # 4 MiB, of which a second's worth may go at once


GET = """
import sys, urllib.request
try:
    print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/", timeout=10).read().decode(), end="")
except OSError as error:
    print(error)
"""


def fetch(rig: Rig, port: int) -> str:
    """Get the page by the loopback of the node's network, or why that failed."""
    assert isinstance(rig.backend, HostBackend)
    return rig.backend.inside(sys.executable, "-c", GET, str(port))
