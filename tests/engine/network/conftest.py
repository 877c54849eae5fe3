"""Networks under test: instances with prefixes of their own on free ranges, and proof that nothing of them is left.

`instance` works on both Worlds. On the host it leaves the machine as it was: the range is chosen by what is routed, forwarding is switched
back, and after each test the kernel is asked for everything that bears the prefix.
"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from isopod.engine.network import ipam
from isopod.engine.network.networks import Networks
from isopod.runtime.logger import Logger
from isopod.world.world import World
from tests.conftest import STAGE

HERE = Path(__file__).parent
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what makes links on the host."""
    for item in items:
        if not isinstance(item, pytest.Function) or not item.path.is_relative_to(HERE) or "instance" not in item.fixturenames:
            continue
        if item.callspec.params["world"] != "sim":
            item.add_marker(pytest.mark.host)


class Instance:
    """One node's networks: opened, killed and opened again at will."""

    def __init__(self, world: World, folder: str, prefix: str) -> None:
        self.world = world
        self.folder = folder
        self.prefix = prefix
        self.file = f"{folder}/net/networks"
        self.namespaces = f"{folder}/netns"
        self.lines: list[bytes] = []
        self.logger = Logger(self.lines.append, world.clock, level="debug")
        self.subnet = ""
        self.opened: list[Networks] = []

    async def open(self, *, pool_size: int = 2, adopt: bool = True, subnet: str = "", length: int = 24) -> Networks:
        """Open with no container running."""
        if not self.subnet:
            self.subnet = subnet or await self.free_subnet(length)
        networks = await Networks.open(
            self.world,
            file=self.file,
            namespaces=self.namespaces,
            prefix=self.prefix,
            default_subnet=self.subnet,
            pool_size=pool_size,
            logger=self.logger,
        )
        self.opened.append(networks)
        if adopt:
            await networks.adopt({})
        return networks

    async def free_subnet(self, length: int = 24) -> str:
        """Return a range nothing uses, different from run to run on the host."""
        avoid = [*await self.world.kernel.routes(), "10.88.0.0/15"]
        if self.world.name == "host":
            avoid.append(f"10.90.0.0/{24 - secrets.randbelow(5)}")
        return ipam.choose_subnet(avoid, prefix_length=length)

    async def left(self) -> dict[str, Any]:
        """Return what the kernel has of this instance, by kind, without the empty kinds."""
        inventory = await self.world.kernel.inventory(self.prefix, [self.folder])
        return {kind: names for kind, names in inventory._asdict().items() if names}

    def events(self) -> list[str]:
        """Return the events that were logged."""
        return [line.split(b'"event":"')[1].split(b'"')[0].decode() for line in self.lines]

    async def kill(self, networks: Networks) -> None:
        """Let go as a killed daemon does: whatever it was doing in the kernel ends, its memory is lost."""
        await networks.wait_idle()
        await networks._directory.close()  # its sockets end with a process
        await networks._ports.close()
        self.opened.remove(networks)

    async def clear(self) -> None:
        """Remove everything, whatever the test did."""
        kernel = self.world.kernel
        for networks in self.opened:
            await networks.wait_idle()
            await networks._directory.close()
            await networks._ports.close()
        inventory = await kernel.inventory(self.prefix, [self.folder])
        for link in inventory.links:
            await kernel.delete_link(link)
        for name in await self.world.disk.list(self.namespaces):
            await kernel.delete_namespace(f"{self.namespaces}/{name}")
        await kernel.delete_table(self.prefix)


@pytest.fixture
def instance(world: World, folder: str, request: pytest.FixtureRequest) -> Iterator[Instance]:
    """An instance on the World in use; the test closes what it opens, then nothing may be left."""
    with open_instance(world, folder, request) as made:
        yield made


@pytest.fixture
def host_instance(host_world: World, folder: str, request: pytest.FixtureRequest) -> Iterator[Instance]:
    """The same for what only the host can show."""
    with open_instance(host_world, folder, request) as made:
        yield made


@contextmanager
def open_instance(world: World, folder: str, request: pytest.FixtureRequest) -> Iterator[Instance]:
    loop = request.node.stash[STAGE].loop
    was_forwarding = IP_FORWARD.read_text() if world.name == "host" else ""
    made = Instance(world, folder, f"it{secrets.token_hex(3)}" if world.name == "host" else "itsim")
    try:
        yield made
        left = loop.run_until_complete(made.left())
    finally:
        loop.run_until_complete(made.clear())
        if was_forwarding and IP_FORWARD.read_text() != was_forwarding:
            IP_FORWARD.write_text(was_forwarding)
    assert left == {}, "the test left objects in the kernel"
