"""The registry: which drivers there are beside QEMU's, which takes a configuration, and what is said where one cannot work."""

import asyncio

import msgspec
import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.engine.vm.drivers.nix import NixDriverSettings
from isopod.engine.vm.drivers.registry import LOOK_TIMEOUT_S, REMEMBERED_NS, DriverSettings, Survey, name_for_config, other_drivers
from isopod.engine.vm.machine import Control, DriverCheck, MachineSpec, Plan
from isopod.world.errors import UnavailableError
from isopod.world.sim import SimWorld
from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.stdio import write_out
from isopod.world.sim.table import SimProcess
from isopod.world.world import World
from tests.engine.vm.fakes.kit import CLOUD_HYPERVISOR, FIRECRACKER, with_kvm, without_kvm
from tests.node.vms import VmRig, sim_rig


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


class Told:
    """A driver that says what it is told to say, late or never if told so."""

    name = "told"

    def __init__(self, *, usable: bool = True, delay_s: float = 0.0, failure: Exception | None = None) -> None:
        self.usable = usable
        self.delay_s = delay_s
        self.failure = failure
        self.n_asked = 0

    async def check(self) -> DriverCheck:
        """Say it."""
        self.n_asked += 1
        await asyncio.sleep(self.delay_s)
        if self.failure is not None:
            raise self.failure
        return DriverCheck(usable=self.usable, why=f"asked {self.n_asked} times")

    async def plan(self, spec: MachineSpec) -> Plan:
        """Not asked here."""
        raise AssertionError(spec)

    async def connect(self, spec: MachineSpec) -> Control:
        """Not asked here."""
        raise AssertionError(spec)


async def test_a_survey_waits_for_no_program_that_hangs(sim_world: SimWorld) -> None:
    slow, broken = Told(delay_s=3600), Told(failure=UnavailableError("systemctl does not run"))
    began_ns = sim_world.world.clock.monotonic_ns()
    found = await Survey(sim_world.world, (slow, broken, Told(usable=False), Told())).look()
    assert (sim_world.world.clock.monotonic_ns() - began_ns) / 1e9 == pytest.approx(LOOK_TIMEOUT_S, abs=0.1)
    assert [(each.works, each.why) for each in found] == [
        (None, "its program does not answer within 2 s"),
        (None, "systemctl does not run"),
        (False, "asked 1 times"),
        (True, "asked 1 times"),
    ]


async def test_what_was_found_counts_for_a_minute(sim_world: SimWorld) -> None:
    driver = Told(delay_s=0.5)
    survey = Survey(sim_world.world, (driver,))
    both = await asyncio.gather(survey.look(), survey.look())
    assert (both[0], driver.n_asked) == (both[1], 1)
    await asyncio.sleep(REMEMBERED_NS / 1e9 - 1)
    assert (await survey.look(), driver.n_asked) == (both[0], 1)
    await asyncio.sleep(2)
    assert (await survey.look())[0].why == "asked 2 times"


@pytest.mark.row("B11")
async def test_info_lists_the_drivers_and_boots_nothing(sim_world: SimWorld, folder: str) -> None:
    async with sim_rig(sim_world, folder) as rig:
        found = await drivers_of(rig)
        assert list(found) == ["qemu", "cloud-hypervisor", "firecracker", "microvm-nix", "systemd"]
        assert (found["qemu"].works, found["firecracker"].works, found["systemd"].works) == (True, False, False)
        assert found["qemu"].why.startswith("QEMU emulator version")
        assert "firecracker is not installed" in found["firecracker"].why
        table = (await rig.client.call(methods.SYSTEM_RENDER, m.RenderRequest(method="system.info", body=msgspec.Raw(b"\x80")))).text
        assert f"drivers:\n  qemu: works ({found['qemu'].why})\n  cloud-hypervisor: does not work here (" in table
        assert (await rig.client.call(methods.SYSTEM_INFO, m.Empty())).accelerator.value == "unknown"


@pytest.mark.row("B11")
@pytest.mark.parametrize("kvm,works", [("works", True), ("hangs", False)])
async def test_what_needs_kvm_is_not_known_before_a_machine_was_started(sim_world: SimWorld, folder: str, kvm: str, works: bool) -> None:
    sim_world.machine.vms.kvm = kvm  # type: ignore[assignment]
    sim_world.machine.processes.install("/usr/bin/firecracker", firecracker)
    async with sim_rig(sim_world, folder) as rig:
        before = (await drivers_of(rig))["firecracker"]
        assert before.works is None
        assert "found out when the first virtual machine starts" in before.why
        await rig.run("true")
        await asyncio.sleep(REMEMBERED_NS / 1e9 + 1)
        after = (await drivers_of(rig))["firecracker"]
        assert after.works is works, after.why


async def firecracker(_: Machine, process: SimProcess) -> int:
    """Be a program that knows its version and nothing else."""
    await write_out(process, b"Firecracker v1.7.0\n")
    return 0


async def drivers_of(rig: VmRig) -> dict[str, m.DriverFacts]:
    """Return what a node says of its drivers, by name."""
    return {driver.name: driver for driver in (await rig.client.call(methods.SYSTEM_INFO, m.Empty())).drivers}
