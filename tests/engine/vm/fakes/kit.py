"""What the driver tests share: a machine to run, a driver of each VMM, and its fake."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from isopod.engine.vm.drivers.cloud_hypervisor import CloudHypervisorDriver
from isopod.engine.vm.drivers.firecracker import FirecrackerDriver
from isopod.engine.vm.machine import Disk, Driver, DriverCheck, MachineSpec, Nic
from isopod.world.world import World
from tests.engine.vm.fakes.cloud_hypervisor import CloudHypervisorRules
from tests.engine.vm.fakes.firecracker import FirecrackerRules
from tests.engine.vm.fakes.rules import Rules, WorldFiles

ROOT: Final = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))
MIB: Final = 1 << 20


class Vmm(NamedTuple):
    """One VMM, its driver and its fake."""

    name: str
    driver: Callable[[World], Driver]
    rules: Callable[[World], Rules]
    snapshot_files: tuple[str, ...]

    @property
    def fake(self) -> tuple[str, ...]:
        """The command of the fake as a process of its own."""
        module = f"tests.engine.vm.fakes.{self.name.replace('-', '_')}"
        return (
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = [{ROOT!r}, {ROOT + '/src'!r}]; from {module} import main; sys.exit(main())",
        )


async def with_kvm() -> DriverCheck:
    """Say that KVM comes up."""
    return DriverCheck(usable=True, why="a test says so")


async def without_kvm() -> DriverCheck:
    """Say that it does not."""
    return DriverCheck(usable=False, why="a probe guest did not come up under KVM")


IN_BOTH_WORLDS: Final = ("conmon",)
"""Some program: a test that spawns nothing needs one that exists, and no more."""


def firecracker(world: World, command: Sequence[str] = IN_BOTH_WORLDS) -> Driver:
    """Return the driver."""
    return FirecrackerDriver(world, kvm=with_kvm, command=command)


def cloud_hypervisor(world: World, command: Sequence[str] = IN_BOTH_WORLDS) -> Driver:
    """As `firecracker`."""
    return CloudHypervisorDriver(world, kvm=with_kvm, command=command)


FIRECRACKER: Final = Vmm("firecracker", firecracker, lambda world: FirecrackerRules(WorldFiles(world)), ("memory", "state"))
CLOUD_HYPERVISOR: Final = Vmm(
    "cloud-hypervisor",
    cloud_hypervisor,
    lambda world: CloudHypervisorRules(WorldFiles(world)),
    ("config.json", "memory-ranges", "state.json"),
)
VMMS: Final = (FIRECRACKER, CLOUD_HYPERVISOR)


async def make_spec(world: World, folder: str, name: str = "vm1") -> MachineSpec:
    """Return a machine whose files exist, in a folder of its own below `folder`."""
    own = f"{folder}/{name}"
    await world.disk.make_directory(own)
    for file in ("l0i", "l0t", "upper"):
        await world.disk.write(f"{own}/{file}.img", b"disk")
    for file in ("vmlinux", "initrd.img"):
        await world.disk.write(f"{folder}/{file}", b"kernel")
    return MachineSpec(
        id="ab" * 32,
        name=name,
        vcpus=2,
        memory_bytes=256 * MIB,
        kernel=f"{folder}/vmlinux",
        initrd=f"{folder}/initrd.img",
        cmdline=("console=ttyS0", "quiet", "reboot=t"),
        disks=(
            Disk(f"{own}/l0i.img", "l0i", read_only=True),
            Disk(f"{own}/l0t.img", "l0t", read_only=True),
            Disk(f"{own}/upper.img", "upper", read_only=False),
        ),
        nics=(Nic(f"tap-{name}", "02:00:00:00:00:01"),),
        shares=(),
        folder=own,
        accelerator="kvm",
    )
