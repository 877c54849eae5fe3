"""Registry: the drivers beside QEMU's, and which of them takes a configuration.

Whether a driver works here it says itself (`Driver.check`); who names one gets it or is told why not, never another one.
"""

from typing import NamedTuple

from isopod.engine.vm.drivers import nix, systemd
from isopod.engine.vm.drivers.cloud_hypervisor import CloudHypervisorDriver
from isopod.engine.vm.drivers.firecracker import FirecrackerDriver
from isopod.engine.vm.drivers.nix import NixDriver, NixDriverSettings
from isopod.engine.vm.drivers.nix_build import OnLine
from isopod.engine.vm.drivers.programs import KvmProbe
from isopod.engine.vm.drivers.systemd import TEMPLATE, SystemdDriver
from isopod.engine.vm.machine import Driver
from isopod.world.world import World


class DriverSettings(NamedTuple):
    """How the drivers beside QEMU's find what they run.

    Args:
        kvm: Whether KVM comes up here.
        nix: Where microVMs of Nix are kept, and how they are built.
        firecracker: Its program, and arguments before all others.
        cloud_hypervisor: The same.
        systemctl: The same.
        on_line: Told of the progress of builds.
    """

    kvm: KvmProbe
    nix: NixDriverSettings
    firecracker: tuple[str, ...] = ("firecracker",)
    cloud_hypervisor: tuple[str, ...] = ("cloud-hypervisor",)
    systemctl: tuple[str, ...] = ("systemctl",)
    on_line: OnLine | None = None


def other_drivers(world: World, settings: DriverSettings) -> tuple[Driver, ...]:
    """Return the drivers beside QEMU's."""
    return (
        CloudHypervisorDriver(world, kvm=settings.kvm, command=settings.cloud_hypervisor),
        FirecrackerDriver(world, kvm=settings.kvm, command=settings.firecracker),
        NixDriver(world, settings.nix, on_line=settings.on_line),
        SystemdDriver(world, command=settings.systemctl),
    )


def name_for_config(config: str) -> str:
    """Return the name of the driver that takes a configuration: a unit's name is neither a path nor a flake's reference."""
    is_unit = config.startswith(TEMPLATE) or not any(mark in config for mark in "/:#")
    return systemd.NAME if is_unit else nix.NAME
