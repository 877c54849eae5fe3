"""microvm.nix's driver: flakes, modules and runners; built offline by a real Nix with a store of its own, where there is one."""

import asyncio
import errno
import os
import shlex
from typing import Final

import pytest

from isopod.engine.vm.drivers.nix import NAME, NixDriver, NixDriverSettings, NixState
from isopod.engine.vm.drivers.nix_build import LOG_BYTES_MAX, last_words
from isopod.engine.vm.machine import DriverCheck, MachineSpec
from isopod.world.errors import InvalidArgument, RuntimeFailed, ToolMissing, UnavailableError, Unsupported
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.engine.vm.fakes.flakes import derivation, microvm_flake, need_nix, nix_driver, pid_in_bundle, runner, write_flake
from tests.engine.vm.fakes.launch import ended, launched

PLACE: Final = f"microvms/{b'vm1'.hex()}/microvm"
"""The folder of the machine called vm1."""
HOSTILE: Final = ('"; touch /tmp/owned; "', "$(touch /tmp/owned)", "a b", "-rf", "../x", "a/b", "", "a\nb", "x" * 64, "vm1\"'${1}")


def machine(folder: str, config: str, name: str = "vm1") -> MachineSpec:
    """Return a machine that a configuration describes."""
    return MachineSpec(
        id=name.encode().hex()[:64] or "0",
        name=name,
        vcpus=1,
        memory_bytes=128 << 20,
        kernel="",
        initrd="",
        cmdline=(),
        disks=(),
        nics=(),
        shares=(),
        folder=folder,
        accelerator="tcg",
        config=config,
    )


async def write_runner(world: World, folder: str, **lists: str) -> str:
    """Write a runner's folder and return it. `lists` are the files of share/microvm, - for _."""
    for file in ("microvm-run", "microvm-shutdown"):
        await world.disk.make_directory(f"{folder}/bin")
        await world.disk.write(f"{folder}/bin/{file}", b"#!/bin/sh\n", mode=0o755)
    await world.disk.make_directory(f"{folder}/share/microvm")
    for name, text in lists.items():
        await world.disk.write(f"{folder}/share/microvm/{name.replace('_', '-')}", text.encode())
    return folder


def without_nix(world: World, folder: str, bridge: str = "") -> NixDriver:
    """Return a driver of which nothing is built."""
    return NixDriver(world, NixDriverSettings(f"{folder}/microvms", bridge=bridge), find_pid=pid_in_bundle)


# --- a runner's folder: no Nix needed ---------------------------------------------------------------------------------


@pytest.mark.row("B11")
async def test_a_runner_is_used_as_it_is(world: World, folder: str) -> None:
    where = await write_runner(world, f"{folder}/runner")
    driver, spec = without_nix(world, folder), machine(folder, where)
    plan = await driver.plan(spec)
    assert plan.argv == (f"{where}/bin/microvm-run",)
    assert plan.stop_argv == (f"{where}/bin/microvm-shutdown",)
    assert (plan.cwd, plan.console, plan.agent, plan.files) == (f"{folder}/{PLACE}", "stdio", "none", ())
    assert await driver.describe(spec) == NixState(where, where, where)
    assert await driver.describe(machine(folder, where, "vm2")) is None


async def test_a_runner_without_shutdown_is_ended_by_force(world: World, folder: str) -> None:
    where = await write_runner(world, f"{folder}/runner")
    await world.disk.remove(f"{where}/bin/microvm-shutdown")
    driver, spec = without_nix(world, folder), machine(folder, where)
    assert (await driver.plan(spec)).stop_argv == ()
    control = await driver.connect(spec)
    with pytest.raises(RuntimeFailed, match=r"microvm\.socket is not set"):
        await control.power_button()


@pytest.mark.parametrize(
    ("entry", "text", "what"),
    [("macvtap_interfaces", "mv0 02:00:00:00:00:01 eth0 bridge\n", "macvtap"), ("pci_devices", "0000:00:02.0\n", "PCI")],
)
async def test_what_is_not_made_here_is_refused(world: World, folder: str, entry: str, text: str, what: str) -> None:
    where = await write_runner(world, f"{folder}/runner", **{entry: text})
    with pytest.raises(Unsupported, match=what) as caught:
        await without_nix(world, folder).plan(machine(folder, where))
    assert "--driver systemd" in caught.value.hint
    await world.disk.write(f"{where}/share/microvm/{entry.replace('_', '-')}", b"")
    await without_nix(world, folder).plan(machine(folder, where))


async def test_virtiofs_is_refused(world: World, folder: str) -> None:
    where = await write_runner(world, f"{folder}/runner")
    await world.disk.make_directory(f"{where}/share/microvm/virtiofs/ro-store")
    with pytest.raises(Unsupported, match="virtiofs"):
        await without_nix(world, folder).plan(machine(folder, where))


async def test_taps_need_a_bridge_and_one_queue(world: World, folder: str) -> None:
    where = await write_runner(world, f"{folder}/runner", tap_interfaces="vm-a\n", tap_flags="vnet_hdr\n")
    with pytest.raises(Unsupported, match="no bridge"):
        await without_nix(world, folder).plan(machine(folder, where))
    await world.disk.write(f"{where}/share/microvm/tap-flags", b"vnet_hdr multi_queue\n")
    with pytest.raises(Unsupported, match="several queues"):
        await without_nix(world, folder, "br0").plan(machine(folder, where))
    await world.disk.write(f"{where}/share/microvm/tap-flags", b"vnet_hdr\n")
    await world.disk.write(f"{where}/share/microvm/tap-interfaces", b"a name with spaces\n")
    with pytest.raises(RuntimeFailed, match="no interface's name"):
        await without_nix(world, folder, "br0").plan(machine(folder, where))


async def test_taps_are_made_once_and_removed(sim_world: SimWorld) -> None:
    world = sim_world.world
    await world.kernel.create_bridge("br0", "10.88.0.1/24")
    await world.kernel.create_tap("theirs", bridge="br0")
    where = await write_runner(world, "/tmp/runner", tap_interfaces="vm-a\nvm-b\ntheirs\n", tap_flags="vnet_hdr\n")
    driver, spec = without_nix(world, "/tmp", "br0"), machine("/tmp", where)
    for _ in range(2):
        await driver.plan(spec)
        state = await driver.describe(spec)
        assert state is not None
        assert state.taps == ("vm-a", "vm-b")
    for tap in ("vm-a", "vm-b"):
        with pytest.raises(FileExistsError):
            await world.kernel.create_tap(tap, bridge="br0")
    await driver.clear(spec)
    await driver.clear(spec)
    for tap in ("vm-a", "vm-b"):
        await world.kernel.create_tap(tap, bridge="br0")
    with pytest.raises(FileExistsError):
        await world.kernel.create_tap("theirs", bridge="br0")


async def test_taps_that_cannot_all_be_made_are_none(sim_world: SimWorld) -> None:
    world = sim_world.world
    where = await write_runner(world, "/tmp/runner", tap_interfaces="vm-a\n")
    with pytest.raises(UnavailableError, match="vm-a"):
        await without_nix(world, "/tmp", "no-bridge").plan(machine("/tmp", where))
    await world.kernel.create_bridge("br0", "10.88.0.1/24")
    await write_runner(world, "/tmp/runner", tap_interfaces="vm-a\nvm-b\nvm-c\n")
    sim_world.kernel.delay_s = 1.0
    planning = asyncio.get_running_loop().create_task(without_nix(world, "/tmp", "br0").plan(machine("/tmp", where)))
    await asyncio.sleep(1.5)  # virtual: the first tap is made, the second is being made
    sim_world.kernel.fail_next(errno.ENOSPC)
    with pytest.raises(UnavailableError, match="vm-b"):
        await planning
    sim_world.kernel.delay_s = 0.0
    for tap in ("vm-a", "vm-b", "vm-c"):
        await world.kernel.create_tap(tap, bridge="br0")


# --- names and configurations that make no sense ----------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_name_reaches_nobody(world: World, folder: str, name: str) -> None:
    where = await write_runner(world, f"{folder}/runner")
    with pytest.raises(InvalidArgument, match="name"):
        await without_nix(world, folder).plan(machine(folder, where, name))
    if name:
        with pytest.raises(InvalidArgument, match="configuration"):
            await without_nix(world, folder).plan(machine(folder, f"{folder}#{name}"))


async def test_a_configuration_that_is_none(world: World, folder: str) -> None:
    driver = without_nix(world, folder)
    for odd in ("a flake", "a?dir=b"):
        await world.disk.make_directory(f"{folder}/{odd}")
        await world.disk.write(f"{folder}/{odd}/flake.nix", b"{ }")
    for config, why in (
        ("", "absolute path"),
        ("flake", "absolute path"),
        ("./flake", "absolute path"),
        (f"{folder}/none", "there is nothing"),
        (f"{folder}/none#vm1", "there is nothing"),
        (folder, "no flake"),
        (f"{folder}#vm1", "no flake"),
        ("/a\0b", "absolute path"),
        (f"{folder}/a flake", "Nix takes"),
        (f"{folder}/a?dir=b", "Nix takes"),
    ):
        with pytest.raises(InvalidArgument, match=why):
            await driver.plan(machine(folder, config))
    with pytest.raises(RuntimeFailed, match="no runner was started"):
        await driver.connect(machine(folder, folder))


async def test_a_damaged_record_is_no_crash(world: World, folder: str) -> None:
    driver, where = without_nix(world, folder), await write_runner(world, f"{folder}/runner")
    await driver.plan(machine(folder, where))
    await world.disk.write(f"{folder}/{PLACE}/state.json", b"{")
    with pytest.raises(RuntimeFailed, match="damaged"):
        await driver.plan(machine(folder, where))


async def test_without_nix_it_says_so(sim_world: SimWorld) -> None:
    world = sim_world.world
    await world.disk.make_directory("/tmp/flake")
    await world.disk.write("/tmp/flake/flake.nix", b"{ }")
    driver = without_nix(world, "/tmp")
    assert driver.name == NAME
    assert await driver.check() == DriverCheck(usable=True, why="runners' folders only: nix is not installed (apt-get install nix-bin)")
    with pytest.raises(ToolMissing, match="nix is not installed"):
        await driver.plan(machine("/tmp", "/tmp/flake"))


def test_last_words() -> None:
    assert last_words(b"") == ""
    assert last_words(b"building...\nerror: one\nwarning: x\nerror: two\n       at /f:1\n(use '--show-trace' to show)\n") == "two at /f:1"
    assert last_words(b"a\nb\nc\nd\n") == "b c d"
    assert len(last_words(b"error: " + b"x" * 10_000)) == 600


# --- what a runner's machine can be asked -----------------------------------------------------------------------------


@pytest.mark.row("B11")
async def test_a_running_runner_is_steered_by_its_process(host_world: World, folder: str) -> None:
    world = host_world
    where = await write_runner(world, f"{folder}/runner")
    await world.disk.write(f"{where}/bin/microvm-run", b"#!/bin/bash\nexec -a microvm@vm1 sleep 300\n", mode=0o755)
    script = b'#!/bin/bash\necho "$MAINPID $PWD" > asked\nkill -TERM "$MAINPID"\n'
    await world.disk.write(f"{where}/bin/microvm-shutdown", script, mode=0o755)
    driver, spec = without_nix(world, folder), machine(f"{folder}/bundle", where)
    await world.disk.make_directory(spec.folder)
    plan = await driver.plan(spec)
    with launched(plan, f"{folder}/console") as process:
        await world.disk.write(f"{spec.folder}/pid", b"%d\n" % process.pid)
        control = await driver.connect(spec)
        await control.boot()
        assert await control.status() == "running"
        for verb in (control.pause, control.resume, lambda: control.snapshot(folder)):
            with pytest.raises(RuntimeFailed):
                await verb()
        assert len(await control.resize(vcpus=2, memory_bytes=None)) == 1
        await control.power_button()
        assert await ended(world, process) == -15
        assert (await world.disk.read(f"{plan.cwd}/asked")).decode() == f"{process.pid} {plan.cwd}\n"
        assert await control.status() == "shutdown"
        await control.quit()
    with launched(plan, f"{folder}/console") as process:
        await world.disk.write(f"{spec.folder}/pid", b"%d" % process.pid)
        await control.quit()
        assert await ended(world, process) == -9
    await world.disk.write(f"{where}/bin/microvm-shutdown", b"#!/bin/bash\nexit 3\n", mode=0o755)
    with pytest.raises(RuntimeFailed, match="status 3"):
        await control.power_button()


# --- built by Nix -----------------------------------------------------------------------------------------------------


@pytest.mark.row("B11")
async def test_a_flake_is_built_run_and_updated(host_world: World, folder: str) -> None:
    need_nix()
    driver = nix_driver(host_world, folder)
    assert (await driver.check()).usable
    flake = write_flake(f"{folder}/flake", {"vm1": runner(), "web.2": runner("microvm-other")})
    spec = machine(folder, flake)
    plan = await driver.plan(spec)
    state = f"{folder}/{PLACE}"
    built = os.path.realpath(f"{state}/current")
    assert plan.argv == (f"{built}/bin/microvm-run",)
    assert os.path.realpath(f"{state}/booted") == built
    assert os.path.isfile(plan.argv[0])
    roots = [os.readlink(entry.path) for entry in os.scandir(f"{folder}/nix/state/gcroots/auto")]
    assert sorted(roots) == [f"{state}/booted", f"{state}/current"]
    with open(f"{state}/build.log", encoding="utf-8") as file:
        assert "making microvm-qemu-vm1" in file.read()

    write_flake(flake, {"vm1": runner(run="#!/bin/bash\nexec sleep 1\n"), "web.2": runner("microvm-other")})
    assert (await driver.plan(spec)).argv == plan.argv  # a start takes what is built
    after = await driver.update(spec)
    assert after.is_outdated
    assert (after.current != built, after.booted) == (True, built)
    assert os.path.realpath(f"{state}/booted") == built
    again = await driver.plan(spec)
    assert again.argv == (f"{after.current}/bin/microvm-run",)
    assert await driver.describe(spec) == NixState(flake, after.current, after.current)

    other = await driver.plan(machine(folder, f"{flake}#web.2", "vm2"))
    assert "microvm-other" in other.argv[0]
    changed = await driver.plan(machine(folder, f"{flake}#web.2"))  # another configuration is built by the start
    assert changed.argv == other.argv


async def test_a_built_runner_runs_in_the_machines_folder(host_world: World, folder: str) -> None:
    need_nix()
    driver = nix_driver(host_world, folder)
    spec = machine(f"{folder}/bundle", write_flake(f"{folder}/flake", {"vm1": runner()}))
    await host_world.disk.make_directory(spec.folder)
    plan = await driver.plan(spec)
    with launched(plan, f"{folder}/console") as process:
        await host_world.disk.write(f"{spec.folder}/pid", b"%d" % process.pid)
        await wait_for_text(host_world, f"{folder}/console", f"runs in {folder}/{PLACE}")
        control = await driver.connect(spec)
        assert await control.status() == "running"
        await control.power_button()
        assert await ended(host_world, process) == -15
        assert await control.status() == "shutdown"


async def wait_for_text(world: World, path: str, text: str) -> None:
    """Return when a file holds a text."""
    folder, _, name = path.rpartition("/")
    async with asyncio.timeout(120), world.disk.watch(folder) as changes:
        if text in (await world.disk.read(path)).decode(errors="replace"):
            return
        async for changed in changes:
            if changed in (name, "") and text in (await world.disk.read(path)).decode(errors="replace"):
                return


@pytest.mark.row("B11")
async def test_a_module_is_wrapped_into_a_flake(host_world: World, folder: str) -> None:
    need_nix()
    driver = nix_driver(host_world, folder, microvm=microvm_flake(f"{folder}/inputs"))
    module = f"{folder}/my microvm.nix"
    await host_world.disk.write(module, b'{ microvm.hypervisor = "qemu"; microvm.mem = 512; }\n')
    spec = machine(folder, module)
    plan = await driver.plan(spec)
    assert plan.argv[0].endswith("-microvm-qemu-vm1/bin/microvm-run")
    await host_world.disk.write(module, b'{ config, ... }: { microvm.hypervisor = "firecracker"; }\n')
    assert (await driver.update(spec)).current.endswith("-microvm-firecracker-vm1")
    await host_world.disk.write(module, b"{ microvm = ")
    with pytest.raises(RuntimeFailed, match="syntax error"):
        await driver.update(spec)
    state = await driver.describe(spec)
    assert state is not None
    assert state.current.endswith("-microvm-firecracker-vm1")


@pytest.mark.row("B11")
async def test_a_module_without_its_input_says_what_is_missing(host_world: World, folder: str) -> None:
    need_nix()
    module = f"{folder}/microvm.nix"
    await host_world.disk.write(module, b"{ }\n")
    with pytest.raises(RuntimeFailed, match=r"build vm1: unable to download .*astro/microvm\.nix"):
        await nix_driver(host_world, folder).plan(machine(folder, module))


BROKEN: Final = {
    "syntax": ("{ outputs = ", "syntax error"),
    "no attribute": ("{ outputs = { self }: { }; }", "does not provide attribute"),
    "evaluation": ('{ outputs = { self }: { nixosConfigurations.vm1 = throw "out of paper"; }; }', "out of paper"),
    "build": (
        "{ outputs = { self }: { nixosConfigurations.vm1.config.microvm.declaredRunner = "
        + derivation("broken", "echo no such compiler >&2\nexit 3\n")
        + "; }; }",
        "failed with exit code 3",
    ),
    "no runner": (
        "{ outputs = { self }: { nixosConfigurations.vm1.config.microvm.declaredRunner = " + derivation("empty", "mkdir $out\n") + "; }; }",
        "no microvm.nix runner",
    ),
    "not a derivation": ("{ outputs = { self }: { nixosConfigurations.vm1.config.microvm.declaredRunner = 3; }; }", "build vm1"),
}


@pytest.mark.row("B11")
@pytest.mark.parametrize(("text", "why"), BROKEN.values(), ids=BROKEN.keys())
async def test_a_flake_that_fails_says_why_in_one_line(host_world: World, folder: str, text: str, why: str) -> None:
    need_nix()
    os.makedirs(f"{folder}/flake")
    with open(f"{folder}/flake/flake.nix", "w", encoding="utf-8") as file:
        file.write(text)
    driver = nix_driver(host_world, folder)
    spec = machine(folder, f"{folder}/flake")
    with pytest.raises(RuntimeFailed, match=why) as caught:
        await driver.plan(spec)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 800
    assert await driver.describe(spec) is None


async def test_a_build_that_never_ends_is_ended(host_world: World, folder: str) -> None:
    need_nix()
    driver = nix_driver(host_world, folder, timeout_s=2.0)
    mark = f"{folder}/builder.pid"
    script = f"echo $$ > {shlex.quote(mark)}\nexec sleep 300\n"
    flake = f"{folder}/flake"
    write_flake(flake, {"vm1": derivation("slow", script)})
    with pytest.raises(RuntimeFailed, match=r"longer than 2 s"):
        await driver.plan(machine(folder, flake))
    builder = int((await host_world.disk.read(mark)).decode())
    identity = host_world.processes.identify(builder)
    if identity is not None:
        async with asyncio.timeout(20):
            await host_world.processes.wait_gone(identity)


async def test_a_build_that_talks_without_end_fills_no_disk(host_world: World, folder: str) -> None:
    need_nix()
    driver = nix_driver(host_world, folder)
    script = "head -c 20000000 /dev/zero | tr '\\0' 'a' | fold -w 99 >&2\nexit 1\n"
    flake = write_flake(f"{folder}/flake", {"vm1": derivation("loud", script)})
    with pytest.raises(RuntimeFailed, match="build vm1"):
        await driver.plan(machine(folder, flake))
    assert os.path.getsize(f"{folder}/{PLACE}/build.log") <= LOG_BYTES_MAX
