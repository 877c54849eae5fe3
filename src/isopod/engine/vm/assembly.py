"""Assembly: the isolation of virtual machines with all its drivers, put together as the engine is told."""

from typing import NamedTuple

from isopod.engine.images.store import ImageStore
from isopod.engine.layout import Layout
from isopod.engine.network.names import default_bridge
from isopod.engine.network.networks import Networks
from isopod.engine.vm.drivers.nix import NixDriverSettings
from isopod.engine.vm.drivers.qemu import QemuDriver
from isopod.engine.vm.drivers.registry import DriverSettings, Survey, other_drivers
from isopod.engine.vm.isolation import VmIsolation
from isopod.engine.vm.machine import DriverCheck
from isopod.engine.vm.settings import VmSetup
from isopod.runtime.logger import Logger
from isopod.world.world import World


class VmTold(NamedTuple):
    """What the engine is told about virtual machines beside its folders."""

    setup: VmSetup
    microvm_nix: str
    """Where microvm.nix comes from, for a bare module."""


async def open_vm_isolation(
    world: World, layout: Layout, images: ImageStore, networks: Networks, *, told: VmTold, logger: Logger
) -> tuple[VmIsolation, Survey]:
    """Return the isolation, and what says which drivers work here.

    The drivers that need KVM ask the isolation whether KVM comes up, which is found out only then. The survey's boot nothing: they are
    drivers of their own, who ask what is known by now.

    Args:
        world: Where machines run.
        layout: The engine's folders.
        images: Where layers come from.
        networks: Where taps and addresses come from.
        told: The settings.
        logger: Told of what happens.
    """
    made: list[VmIsolation] = []

    async def kvm() -> DriverCheck:
        return await made[0].check_kvm()

    async def known_kvm() -> DriverCheck:
        return await made[0].known_kvm()

    nix = NixDriverSettings(folder=layout.containers, bridge=default_bridge(told.setup.cgroup_root), microvm=told.microvm_nix)
    drivers = {driver.name: driver for driver in other_drivers(world, DriverSettings(kvm=kvm, nix=nix))}
    made.append(await VmIsolation.open(world, layout, images, networks, setup=told.setup, drivers=drivers, logger=logger))
    looked_at = (QemuDriver(world), *other_drivers(world, DriverSettings(kvm=known_kvm, nix=nix)))
    return made[0], Survey(world, looked_at)
