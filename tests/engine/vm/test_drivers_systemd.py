"""systemd's driver, against a systemctl that keeps its units in a folder."""

import os
import sys
from typing import Final

import pytest

from isopod.engine.vm.drivers.systemd import NAME, UNIT_STATES, SystemdDriver, UnitState, unit_name
from isopod.world.errors import InvalidArgument, NotFound, RuntimeFailed, Unsupported
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.engine.vm.fakes.launch import ended, launched
from tests.engine.vm.test_drivers_nix import machine

FAKE: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fakes", "systemctl.py")
UNIT: Final = "microvm@vm1.service"


def systemd(world: World, folder: str) -> SystemdDriver:
    """Return a driver whose units lie in a folder."""
    os.makedirs(f"{folder}/units", exist_ok=True)
    return SystemdDriver(world, command=(sys.executable, FAKE, f"{folder}/units"))


def write_unit(folder: str, *, load: str = "loaded", active: str = "inactive", result: str = "success", status: int = 0) -> None:
    """Make a unit of a state."""
    with open(f"{folder}/units/{UNIT}", "w", encoding="utf-8") as file:
        file.write(f"LoadState={load}\nActiveState={active}\nSubState=sub\nResult={result}\nMainPID=0\nExecMainStatus={status}\n")


@pytest.mark.row("B11")
async def test_a_unit_is_started_watched_and_stopped(host_world: World, folder: str) -> None:
    driver, spec = systemd(host_world, folder), machine(folder, "")
    write_unit(folder)
    assert driver.name == NAME
    assert (await driver.check()).usable
    plan = await driver.plan(spec)
    assert plan.argv[-4:] == ("start", "--wait", "--", UNIT)
    assert plan.stop_argv[-3:] == ("stop", "--", UNIT)
    assert (plan.console, plan.agent, plan.files, plan.own_network) == ("stdio", "none", (), False)
    control = await driver.connect(spec)
    assert await control.status() == "shutdown"
    with launched(plan, f"{folder}/console") as process:
        while await control.status() != "running":  # each look starts a program: no busy loop
            assert process.poll() is None
        for verb in (control.pause, control.resume, lambda: control.snapshot(folder)):
            with pytest.raises(RuntimeFailed, match="no way"):
                await verb()
        assert len(await control.resize(vcpus=2, memory_bytes=1 << 30)) == 2
        await control.boot()
        await control.power_button()
        assert await ended(host_world, process) == 0
        assert await control.status() == "shutdown"
        await control.quit()
        control.close()
    with launched(plan, f"{folder}/console") as process:
        while await control.status() != "running":
            assert process.poll() is None
        await control.quit()
        assert await ended(host_world, process) == 1
    described = await driver.control(spec).describe()
    assert described == UnitState("failed", "sub", "signal", 0, 9)
    assert described.why == "the unit is failed (signal), its process ended with status 9"


@pytest.mark.row("B11")
@pytest.mark.parametrize(("active", "status"), sorted(UNIT_STATES.items()))
async def test_states(host_world: World, folder: str, active: str, status: str) -> None:
    driver = systemd(host_world, folder)
    write_unit(folder, active=active, result="exit-code" if active == "failed" else "success", status=3)
    control = driver.control(machine(folder, "vm1"))
    assert await control.status() == status
    assert (await control.describe()).why == (
        "the unit is failed (exit-code), its process ended with status 3" if active == "failed" else ""
    )


async def test_a_word_that_nobody_knows_is_unknown(host_world: World, folder: str) -> None:
    driver = systemd(host_world, folder)
    write_unit(folder, active="hibernating")
    assert await (await driver.connect(machine(folder, "vm1"))).status() == "unknown"


@pytest.mark.row("B11")
async def test_a_unit_that_cannot_be_started_says_why(host_world: World, folder: str) -> None:
    driver = systemd(host_world, folder)
    with pytest.raises(NotFound, match=UNIT):
        await driver.plan(machine(folder, "vm1"))
    write_unit(folder, load="masked")
    with pytest.raises(NotFound, match=UNIT) as caught:
        await driver.plan(machine(folder, "vm1"))
    assert "masked" in caught.value.hint
    broken = SystemdDriver(host_world, command=("false",))
    with pytest.raises(RuntimeFailed, match="status 1"):
        await broken.plan(machine(folder, "vm1"))
    assert not (await broken.check()).usable
    with pytest.raises(RuntimeFailed, match="status 1"):
        await (await broken.connect(machine(folder, "vm1"))).status()


async def test_without_systemd(sim_world: SimWorld) -> None:
    driver = SystemdDriver(sim_world.world)
    assert "no systemd" in (await driver.check()).why
    with pytest.raises(Unsupported, match="not installed"):
        await driver.plan(machine("/tmp", "vm1"))


async def test_a_machine_with_another_init(host_world: World, folder: str) -> None:
    driver = systemd(host_world, folder)
    with open(f"{folder}/units/.offline", "w", encoding="utf-8"):
        pass
    found = await driver.check()
    assert not found.usable
    assert "not this machine's init" in found.why


@pytest.mark.parametrize(
    ("config", "unit"),
    [
        ("", "microvm@vm1.service"),
        ("web", "microvm@web.service"),
        ("microvm@web", "microvm@web.service"),
        ("microvm@web.service", "microvm@web.service"),
        ("other@web-1.a", "other@web-1.a.service"),
    ],
)
def test_unit_names(config: str, unit: str) -> None:
    assert unit_name(machine("/tmp", config)) == unit


@pytest.mark.parametrize("config", ["-H root@elsewhere", "--now", "a b", "a;b", "$(x)", "../x", "a/b", "a@", "@a", "x" * 201, "a\n"])
def test_what_is_no_units_name(config: str) -> None:
    with pytest.raises(InvalidArgument, match="unit"):
        unit_name(machine("/tmp", config))
