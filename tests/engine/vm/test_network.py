"""A machine on its network: reached through its published port, and by its names from a container and from another machine (row V2).

The node has a network namespace of its own; "the host" below is that one. Two boots.
"""

import asyncio
import sys
from typing import Final

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.world.world import World
from tests.node.rig import HostBackend, Result
from tests.node.vms import VmRig, missing_for_vms

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.row("V2")]
LISTENS_S: Final = 60.0
GET: Final = """
import sys, urllib.request
try:
    print(urllib.request.urlopen(f"http://{sys.argv[1]}/", timeout=10).read().decode(), end="")
except OSError as error:
    print(error)
"""


@pytest.fixture
def rig(host_world: World, folder: str) -> VmRig:
    """A node whose machines run under TCG, and which boots none for templates."""
    if missing := missing_for_vms():
        pytest.skip(missing)
    backend = HostBackend(host_world, folder)
    backend.more_environment = {
        "ISOPOD_VM_MONITOR_ROOT": f"{folder}/sbs",
        "ISOPOD_VM_ACCELERATOR": "tcg",
        "ISOPOD_VM_TEMPLATES_MAX": "0",
    }
    return VmRig(backend, "isopodx")


def serving(page: str) -> tuple[str, ...]:
    """Return a command that serves a page at port 80."""
    return ("sh", "-c", f"mkdir -p /tmp/www; echo {page} > /tmp/www/index.html; exec busybox httpd -f -h /tmp/www")


def got_by_host(rig: VmRig, where: str) -> str:
    """Return the page that the host gets, or why it gets none."""
    assert isinstance(rig.backend, HostBackend)
    return rig.backend.inside(sys.executable, "-c", GET, where)


async def in_container(rig: VmRig, *command: str) -> Result:
    """Run a container, not a machine, on the same network."""
    return await rig.run(*command, isolation="container", vm=m.VmOptions(), network="bridge")


def wget(name: str) -> tuple[str, ...]:
    """Return a command that gets a page by a name. Without -T: Debian's static busybox crashes with it."""
    return ("busybox", "wget", "-q", "-O", "-", f"http://{name}/")


async def test_a_machine_is_reached_by_its_port_and_by_its_names(rig: VmRig) -> None:
    async with rig:
        web = await rig.run_detached(*serving("guest"), name="web", hostname="shop", network="bridge", ports=(m.PortMapping(port=80),))
        address, [port] = str(web.network.ip_address), web.network.published
        assert web.network.ports == {port.host_port: 80}
        published = f"127.0.0.1:{port.host_port}"
        async with asyncio.timeout(LISTENS_S):
            while got_by_host(rig, published) != "guest\n":  # nobody is told when it begins to listen; the deadline bounds the asking
                await asyncio.sleep(0.1)
        for where in (f"{web.network.gateway}:{port.host_port}", address):
            assert got_by_host(rig, where) == "guest\n", where

        for name in ("web", "shop", web.id[:12]):
            got = await in_container(rig, *wget(name))
            assert (got.exit_code, got.stdout) == (0, b"guest\n"), (name, got.stderr)
        assert b"web" in (await in_container(rig, "busybox", "nslookup", address)).stdout

        await rig.run_detached(*serving("container"), name="box", isolation="container", vm=m.VmOptions(), network="bridge")
        both = " && ".join(" ".join(wget(name)) for name in ("web", "box"))
        other = await rig.run("sh", "-c", f"cat /etc/resolv.conf; {both}", name="other", network="bridge")
        assert (other.exit_code, other.stderr) == (0, b"")
        assert other.stdout.decode().splitlines()[-2:] == ["guest", "container"]
        assert f"nameserver {web.network.gateway}" in other.stdout.decode()

        await rig.kill()
        assert got_by_host(rig, published) == "guest\n", "no daemon is in the way of a packet"
        await rig.start()
        assert (await rig.inspect("web")).network == web.network
        got = await in_container(rig, *wget("web"))
        assert (got.exit_code, got.stdout) == (0, b"guest\n")

        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="web", timeout_s=1.0))
        assert "refused" in got_by_host(rig, published)
        assert (await in_container(rig, *wget("web"))).exit_code != 0
