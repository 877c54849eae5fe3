"""The registry: which drivers there are beside QEMU's, which takes a configuration, and what is said where one cannot work."""

import pytest

from isopod.engine.vm.drivers.nix import NixDriverSettings
from isopod.engine.vm.drivers.registry import DriverSettings, name_for_config, other_drivers
from isopod.world.world import World
from tests.engine.vm.fakes.kit import CLOUD_HYPERVISOR, FIRECRACKER, with_kvm, without_kvm


async def test_the_others_are_those_beside_qemu(world: World, folder: str) -> None:
    drivers = other_drivers(world, DriverSettings(without_kvm, NixDriverSettings(f"{folder}/microvms")))
    assert tuple(driver.name for driver in drivers) == ("cloud-hypervisor", "firecracker", "microvm-nix", "systemd")


@pytest.mark.row("B11")
@pytest.mark.parametrize(
    "config,name",
    [
        ("/srv/vms", "microvm-nix"),
        ("/srv/vms#front", "microvm-nix"),
        ("github:me/machines#web", "microvm-nix"),
        ("microvm@web", "systemd"),
        ("web", "systemd"),
    ],
)
def test_a_configuration_says_what_takes_it(config: str, name: str) -> None:
    assert name_for_config(config) == name


@pytest.mark.row("B11")
async def test_what_needs_kvm_says_where_it_does_not_come_up(host_world: World, folder: str) -> None:
    for kvm, usable in ((with_kvm, True), (without_kvm, False)):
        settings = DriverSettings(
            kvm, NixDriverSettings(f"{folder}/microvms"), firecracker=FIRECRACKER.fake, cloud_hypervisor=CLOUD_HYPERVISOR.fake
        )
        for driver in other_drivers(host_world, settings)[:2]:
            found = await driver.check()
            assert found.usable is usable, found.why
            assert usable or "it needs KVM" in found.why
