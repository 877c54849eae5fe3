"""The registry: which driver a machine gets, and what is said when it gets none."""

import pytest

from isopod.engine.vm.drivers.nix import NixDriverSettings
from isopod.engine.vm.drivers.registry import NAMES, Drivers, DriverSettings, other_drivers
from isopod.engine.vm.machine import Control, Driver, DriverCheck, MachineSpec, Plan
from isopod.world.errors import NotFound, RuntimeFailed, Unsupported
from isopod.world.world import World
from tests.engine.vm.fakes.kit import CLOUD_HYPERVISOR, FIRECRACKER, with_kvm, without_kvm


class Known:
    """A driver that works, or does not.

    Args:
        name: Its name.
        check: What it says.
    """

    def __init__(self, name: str, check: DriverCheck) -> None:
        self.name = name
        self.n_checks = 0
        self.found = check

    async def check(self) -> DriverCheck:
        self.n_checks += 1
        return self.found

    async def plan(self, spec: MachineSpec) -> Plan:
        raise RuntimeFailed("plan", spec.name, "nothing is run here")

    async def connect(self, spec: MachineSpec) -> Control:
        raise RuntimeFailed("connect to", spec.name, "nothing is run here")


WORKS = DriverCheck(usable=True, why="1.0")


def lacks(what: str) -> DriverCheck:
    """Say that something is missing."""
    return DriverCheck(usable=False, why=f"{what} is missing")


def known(*checks: DriverCheck) -> tuple[Drivers, list[Known]]:
    """Return a registry of drivers with all names, of which the first say this and the others work."""
    drivers = [Known(name, checks[number] if number < len(checks) else WORKS) for number, name in enumerate(NAMES)]
    return Drivers(drivers), drivers


def test_all_drivers_have_their_place(sim_world: object) -> None:
    assert NAMES == ("qemu", "cloud-hypervisor", "firecracker", "microvm-nix", "systemd")


async def test_the_others_are_those_beside_qemu(world: World, folder: str) -> None:
    drivers: tuple[Driver, ...] = other_drivers(world, DriverSettings(without_kvm, NixDriverSettings(f"{folder}/microvms")))
    assert tuple(driver.name for driver in drivers) == NAMES[1:]


@pytest.mark.row("B11")
async def test_who_names_none_gets_qemu_or_what_the_configuration_asks_for() -> None:
    drivers, _ = known()
    assert (await drivers.choose()).name == "qemu"
    for config in ("/srv/flake", "/srv/flake#web", "/srv/microvm.nix", "github:me/vms#web"):
        assert (await drivers.choose(config=config)).name == "microvm-nix"
    for config in ("microvm@web", "microvm@web.service", "web"):
        assert (await drivers.choose(config=config)).name == "systemd"


@pytest.mark.row("B11")
async def test_the_next_one_that_works_is_taken_and_asked_once() -> None:
    drivers, each = known(lacks("qemu-system-x86_64"), lacks("cloud-hypervisor"))
    assert (await drivers.choose()).name == "firecracker"
    assert (await drivers.choose()).name == "firecracker"
    assert [driver.n_checks for driver in each] == [2, 2, 1, 0, 0]
    each[0].found = WORKS
    assert (await drivers.choose()).name == "qemu"


@pytest.mark.row("B11")
async def test_when_none_works_each_says_why() -> None:
    drivers, _ = known(lacks("A"), lacks("B"), lacks("C"))
    with pytest.raises(Unsupported, match="qemu: A is missing; cloud-hypervisor: B is missing; firecracker: C is missing") as caught:
        await drivers.choose()
    assert "qemu-system-x86" in caught.value.hint
    assert [name for name, check in await drivers.check_all() if not check.usable] == list(NAMES[:3])


@pytest.mark.row("B11")
async def test_who_names_one_gets_that_one_or_the_reason() -> None:
    drivers, _ = known(WORKS, lacks("cloud-hypervisor"))
    assert (await drivers.choose("qemu")).name == "qemu"
    assert (await drivers.choose("firecracker")).name == "firecracker"
    with pytest.raises(Unsupported, match="cloud-hypervisor is missing"):
        await drivers.choose("cloud-hypervisor")
    with pytest.raises(NotFound, match="xen") as caught:
        await drivers.choose("xen")
    assert "qemu, cloud-hypervisor, firecracker, microvm-nix, systemd" in caught.value.hint
    with pytest.raises(Unsupported, match="only microvm-nix and systemd"):
        await drivers.choose("qemu", config="/srv/flake")
    with pytest.raises(Unsupported, match="without a configuration"):
        await drivers.choose("microvm-nix")
    assert (await drivers.choose("microvm-nix", config="/srv/flake")).name == "microvm-nix"
    assert (await drivers.choose("systemd")).name == "systemd"


@pytest.mark.row("B11")
async def test_what_needs_kvm_is_refused_where_it_does_not_come_up(host_world: World, folder: str) -> None:
    for kvm, works in ((with_kvm, True), (without_kvm, False)):
        settings = DriverSettings(
            kvm, NixDriverSettings(f"{folder}/microvms"), firecracker=FIRECRACKER.fake, cloud_hypervisor=CLOUD_HYPERVISOR.fake
        )
        drivers = Drivers(other_drivers(host_world, settings))
        for name in ("firecracker", "cloud-hypervisor"):
            if works:
                assert (await drivers.choose(name)).name == name
            else:
                with pytest.raises(Unsupported, match="it needs KVM: a probe guest did not come up under KVM"):
                    await drivers.choose(name)
