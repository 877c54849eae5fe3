"""Registry: the drivers by name, and which one a machine gets.

Rules: who names a driver gets it or is told why not, never another one. Who names none gets the one that the configuration asks for (a path
or a flake's reference: microvm-nix; a unit: systemd), else the first that works here, QEMU before all others. What a configuration needs is
found out by planning it: a runner's folder needs no Nix.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from isopod.engine.vm.drivers import cloud_hypervisor, firecracker, nix, systemd
from isopod.engine.vm.drivers.cloud_hypervisor import CloudHypervisorDriver
from isopod.engine.vm.drivers.firecracker import FirecrackerDriver
from isopod.engine.vm.drivers.nix import NixDriver, NixDriverSettings
from isopod.engine.vm.drivers.nix_build import OnLine
from isopod.engine.vm.drivers.programs import KvmProbe
from isopod.engine.vm.drivers.systemd import TEMPLATE, SystemdDriver
from isopod.engine.vm.machine import Driver, DriverCheck
from isopod.world.errors import NotFound, Unsupported
from isopod.world.world import World

QEMU: Final = "qemu"
NAMES: Final = (QEMU, cloud_hypervisor.NAME, firecracker.NAME, nix.NAME, systemd.NAME)
"""All that there are, in the order in which they are tried."""
_BY_CONFIG: Final = frozenset((nix.NAME, systemd.NAME))


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
    """Return the drivers beside QEMU's, in the order of NAMES."""
    return (
        CloudHypervisorDriver(world, kvm=settings.kvm, command=settings.cloud_hypervisor),
        FirecrackerDriver(world, kvm=settings.kvm, command=settings.firecracker),
        NixDriver(world, settings.nix, on_line=settings.on_line),
        SystemdDriver(world, command=settings.systemctl),
    )


class Drivers:
    """The drivers there are. What was found to work is not asked again.

    Args:
        drivers: In the order in which they are tried.
    """

    def __init__(self, drivers: Sequence[Driver]) -> None:
        self._drivers = {driver.name: driver for driver in drivers}
        self._usable: dict[str, DriverCheck] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """What they are called."""
        return tuple(self._drivers)

    def get(self, name: str) -> Driver:
        """Return a driver, whether it works or not. Raises NotFound."""
        try:
            return self._drivers[name]
        except KeyError:
            raise NotFound("driver", name, f"there are {', '.join(self._drivers)}") from None

    async def check(self, name: str) -> DriverCheck:
        """Say whether a driver can work here. Raises NotFound."""
        driver = self.get(name)
        found = self._usable.get(name)
        if found is None:
            found = await driver.check()
            if found.usable:
                self._usable[name] = found
        return found

    async def check_all(self) -> tuple[tuple[str, DriverCheck], ...]:
        """Return each driver's name, and whether it can work here."""
        return tuple([(name, await self.check(name)) for name in self._drivers])

    async def choose(self, name: str = "", *, config: str = "") -> Driver:
        """Return the driver of a new machine.

        Args:
            name: The one the user wants, "" for any.
            config: A flake, a module, a runner or a unit; "" for an image's machine.

        Raises:
            NotFound: There is no driver of that name.
            Unsupported: It cannot work here, or takes no such configuration; or none works.
        """
        if name:
            return await self._named(name, config)
        if config:
            return self.get(name_for_config(config))
        reasons = []
        for each in self._drivers:
            if each in _BY_CONFIG:
                continue
            found = await self.check(each)
            if found.usable:
                return self._drivers[each]
            reasons.append(f"{each}: {found.why}")
        raise Unsupported("a virtual machine", "; ".join(reasons) or "there is no driver", "apt-get install qemu-system-x86")

    async def _named(self, name: str, config: str) -> Driver:
        driver = self.get(name)
        if name in _BY_CONFIG:
            if not config and name == nix.NAME:
                raise Unsupported(f"{name} without a configuration", "it runs what a flake or a module describes", "give --config PATH")
            return driver
        if config:
            raise Unsupported(f"a configuration with {name}", f"only {nix.NAME} and {systemd.NAME} take one", "leave --driver out")
        found = await self.check(name)
        if not found.usable:
            raise Unsupported(f"the driver {name}", found.why, "see `isopod info`, or choose another --driver")
        return driver


def name_for_config(config: str) -> str:
    """Return the name of the driver that takes a configuration: a unit's name is neither a path nor a flake's reference."""
    is_unit = config.startswith(TEMPLATE) or not any(mark in config for mark in "/:#")
    return systemd.NAME if is_unit else nix.NAME
