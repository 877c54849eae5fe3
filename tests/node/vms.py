"""Virtual machines for the tests of a whole node: the rigs they run in, and what may be left when they are over."""

import asyncio
import os
import shutil
import sys
from typing import Any

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.world.sim import SimWorld
from isopod.world.sim.table import SimProcess
from tests.node.rig import Result, Rig, SimBackend, collect

MIB = 1 << 20
HOST_GUEST = f"{sys.prefix}/share/isopod/guest"
VM = m.VmOptions(vcpus=1, memory_bytes=128 * MIB, disk_bytes=64 * MIB)
FOLDERS = ("root/containers", "run/bundles", "run/exits", "run/runtime")


def missing_for_vms() -> str:
    """Return what the host lacks for virtual machines, "" if nothing."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("qemu-system-x86_64", "mke2fs"):
        if shutil.which(program) is None:
            return f"{program} is not installed (make setup-vm)"
    for name in ("vmlinux", "initrd.img", "isopod-shim", "guest.json"):
        if not os.path.exists(f"{HOST_GUEST}/{name}"):
            return f"there is no {HOST_GUEST}/{name} (make setup-vm)"
    return ""


class VmRig(Rig):
    """A rig whose sandboxes are virtual machines unless something else is said."""

    async def run(self, *command: str, **spec: Any) -> Result:
        """Run an attached machine to its end."""
        return await super().run(*command, **_with_vm(spec))

    async def run_detached(self, *command: str, **spec: Any) -> m.Container:
        """Start a machine in the background and return its record."""
        return await super().run_detached(*command, **_with_vm(spec))

    async def status(self, name: str) -> machines.VmState:
        """Return what a machine says of itself."""
        return await self.client.call(methods.VM_STATUS, m.ContainerName(name=name))

    async def start_attached(self, name: str) -> Result:
        """Start a machine that exists, and return what it did."""
        async with self.client.open(methods.CONTAINER_START, m.StartContainer(name=name, attach=True)) as call:
            return await collect(call, None)

    async def template(self) -> None:
        """Have a template made: a machine is booted cold, and the template waited for."""
        await self.run("true", auto_remove=True, network="bridge")
        async with asyncio.timeout(200):
            # A template that is there gives no event; the deadline bounds the asking.
            while not [name for name in await self.world.disk.list(f"{self.folder}/root/vm/templates") if not name.endswith(".part")]:
                await asyncio.sleep(0.1)


def sim_rig(sim: SimWorld, folder: str) -> VmRig:
    """Return a rig in the simulation."""
    return VmRig(SimBackend(sim, folder), "isopodt")


async def leftovers(sim: SimWorld, rig: Rig) -> list[str]:
    """Return what is still there of machines once all of them are removed: processes, taps, groups, sockets, files.

    Namespaces are the pool's, and looked at when the node has stopped.
    """
    found = [f"process {each.argv}" for each in sim.machine.table.live() if not _is_node(each)]
    inventory = await sim.world.kernel.inventory(rig.config.prefix, [f"{rig.folder}/run"])
    found += [f"tap {link.name}" for link in sim.kernel.links.host.links.values() if link.kind == "tap"]
    found += [f"group {path}" for path in inventory.cgroups if path.count("/") > 1]
    for folder in FOLDERS:
        found += [f"{folder}/{name}" for name in await sim.world.disk.list(f"{rig.folder}/{folder}")]
    found += [f"/run/vc/sbs/{name}" for name in await sim.world.disk.list("/run/vc/sbs")]
    found += [f"share {path}" for path in sim.machine.shares]
    templates = await sim.world.disk.list(f"{rig.folder}/root/vm/templates")
    return found + [f"template {name}" for name in templates if name.endswith(".part")]


def _is_node(process: SimProcess) -> bool:
    return process.argv == ("isopod",)


def _with_vm(spec: dict[str, Any]) -> dict[str, Any]:
    return {"isolation": "vm", "vm": VM, **spec}
