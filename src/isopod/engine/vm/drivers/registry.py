"""Registry: the drivers beside QEMU's, which of them takes a configuration, and which of them work here.

Whether a driver works here it says itself (`Driver.check`); who names one gets it or is told why not, never another one.
"""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from isopod.api.messages import DriverFacts
from isopod.engine.vm.drivers import nix, systemd
from isopod.engine.vm.drivers.cloud_hypervisor import CloudHypervisorDriver
from isopod.engine.vm.drivers.firecracker import FirecrackerDriver
from isopod.engine.vm.drivers.nix import NixDriver, NixDriverSettings
from isopod.engine.vm.drivers.nix_build import OnLine
from isopod.engine.vm.drivers.programs import KvmProbe
from isopod.engine.vm.drivers.systemd import TEMPLATE, SystemdDriver
from isopod.engine.vm.machine import Driver
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import IsopodError
from isopod.world.world import World

LOOK_TIMEOUT_S: Final = 2.0
"""How long a driver may take to say whether it works: `isopod info` waits for it."""
REMEMBERED_NS: Final = 60 * 10**9
"""How long what was found counts: programs are started to find it out."""


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


class Survey:
    """Says of each driver whether it works here. Nothing is booted for it.

    Args:
        world: The machine.
        drivers: In the order in which they are told. Those that need KVM must be made with a probe that boots nothing.
    """

    def __init__(self, world: World, drivers: Sequence[Driver]) -> None:
        self._world = world
        self._drivers = drivers
        self._lock = asyncio.Lock()
        self._found: tuple[DriverFacts, ...] = ()
        self._found_ns = 0

    async def look(self) -> tuple[DriverFacts, ...]:
        """Return what was found within the last minute, else look: at all of them side by side."""
        async with self._lock:
            now_ns = self._world.clock.monotonic_ns()
            if not self._found or now_ns - self._found_ns > REMEMBERED_NS:
                async with TaskGroup("drivers") as group:
                    looks = [group.create_task(_look(driver)) for driver in self._drivers]
                self._found, self._found_ns = tuple(look.result() for look in looks), now_ns
            return self._found


async def _look(driver: Driver) -> DriverFacts:
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            found = await driver.check()
    except TimeoutError:
        return DriverFacts(name=driver.name, works=None, why=f"its program does not answer within {LOOK_TIMEOUT_S:g} s")
    except IsopodError as error:
        return DriverFacts(name=driver.name, works=None, why=str(error))
    return DriverFacts(name=driver.name, works=found.usable, why=found.why)
