"""What goes wrong around virtual machines: each fault ends in a clear state with its reason, and leaves no process, tap, socket or file.

All of it in the simulation, where each fault can be asked for; the bodies look at what the host of the machines has left.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.world.errors import IsopodError
from isopod.world.sim import SimWorld
from isopod.world.sim.programs import GUEST_FOLDER
from isopod.world.sim.vm_faults import Fault
from tests.node import vm_node
from tests.node.vms import MIB, VM, VmRig, leftovers, sim_rig

POINTS = ("vm.after_prepare", "vm.after_launch", "vm.after_boot", "vm.after_configure")
DURABLE = ("root/containers/", "run/exits/")
"""What a machine that has ended keeps: its files, and its exit code until the record goes."""
TEMPLATE_S = 200.0
"""In what time a template has been made or given up."""
SHIM = f"{GUEST_FOLDER}/isopod-shim"
QEMU = "/usr/bin/qemu-system-x86_64"


@pytest.fixture
def rig(sim_world: SimWorld, folder: str) -> VmRig:
    """A node in the simulation."""
    return sim_rig(sim_world, folder)


async def ended(rig: VmRig, name: str) -> m.Container:
    """Return a machine's record once it does not run."""
    async with asyncio.timeout(300):
        while (record := await rig.inspect(name)).status not in ("exited", "unknown"):
            await asyncio.sleep(0.5)  # a call that waits has a deadline of its own
    return record


async def assert_clean(sim: SimWorld, rig: VmRig) -> None:
    """Remove every machine; nothing of them may be left, once a template that is being made is there."""
    await rig.empty()
    await assert_gone(sim, rig)


async def assert_gone(sim: SimWorld, rig: VmRig, *beside: str) -> None:
    """Wait until nothing of machines is left but what begins as `beside` does."""
    deadline = sim.loop.time() + TEMPLATE_S
    while left := [each for each in await leftovers(sim, rig) if not each.startswith(beside or ("-",))]:
        assert sim.loop.time() < deadline, left
        await asyncio.sleep(0.5)


@pytest.mark.row("V5", "V8")
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("point", POINTS)
async def test_a_daemon_killed_at_any_step_of_a_start_leaves_a_clear_state(sim_world: SimWorld, rig: VmRig, point: str, warm: bool) -> None:
    async with rig:
        if warm:
            await rig.template()
        sim_world.world.failpoints.set(point, "1*panic")
        with pytest.raises((IsopodError, OSError)):
            await rig.run_detached("sleep", "1000", name="box", network="bridge")
        assert not rig.backend.is_running()
        await rig.kill()
        await rig.start()
        record = await rig.inspect("box")
        assert record.status in ("created", "exited", "running")
        if record.status != "running":
            assert sim_world.world.processes.find(SHIM) == []
            assert sim_world.world.processes.find(QEMU) == []
            assert record.error or record.status == "created"
            await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
        assert await rig.exec("box", "echo", "runs") == (0, b"runs\n", b"")
        await assert_clean(sim_world, rig)


@pytest.mark.row("V8")
@pytest.mark.parametrize("point", POINTS)
async def test_a_start_that_fails_at_any_step_is_undone(sim_world: SimWorld, rig: VmRig, point: str) -> None:
    async with rig:
        sim_world.world.failpoints.set(point, "1*error(EIO)")
        with pytest.raises(IsopodError):
            await rig.run_detached("sleep", "1000", name="box", network="bridge")
        record = await rig.inspect("box")
        assert record.status == "exited"
        assert record.error
        assert sim_world.world.processes.find(SHIM) == []
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
        assert (await rig.inspect("box")).status == "running"
        await assert_clean(sim_world, rig)


@pytest.mark.row("V5")
@pytest.mark.parametrize("seed", range(8))
def test_a_node_killed_at_any_instant_among_faulty_machines_loses_and_leaks_nothing(seed: int) -> None:
    assert len(vm_node.digest(seed)) == 64


def test_a_node_with_machines_is_as_deterministic_as_its_world() -> None:
    def digest(hash_seed: int) -> str:
        env = {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"]}
        argv = [sys.executable, str(Path(vm_node.__file__)), "3"]
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=100).stdout.rpartition(" ")[2]

    assert digest(1) == digest(2)


@pytest.mark.row("V5")
async def test_after_a_power_cut_the_records_are_true_and_the_machines_start_again(sim_world: SimWorld, rig: VmRig) -> None:
    async with rig:
        await rig.template()
        await rig.run_detached("sleep", "1000", name="box", network="bridge")
        await rig.exec("box", "sh", "-c", "echo one > /one; sync; echo two > /two")
        await rig.run("sh", "-c", "exit 3", name="done")
        boot_id = sim_world.world.processes.boot_id()
        sim_world.power_cut()
        assert sim_world.world.processes.boot_id() != boot_id
        assert await rig.world.disk.list(f"{rig.folder}/run") == []
        await rig.start()
        record = await rig.inspect("box")
        assert (record.status, record.pid) == ("unknown", None)
        assert record.error
        assert ((await rig.inspect("done")).status, (await rig.inspect("done")).exit_code) == ("exited", 3)
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
        assert (await rig.inspect("box")).origin == "cold", "a template is good for the boot in which it was made"
        assert (await rig.exec("box", "sh", "-c", "cat /one; cat /two")).stdout == b"one\n"
        await assert_clean(sim_world, rig)


@pytest.mark.row("V8")
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("panic_at_boot", "the guest's kernel panicked: VFS: Unable to mount root fs"),
        ("no_hello", "did not answer within 60"),
        ("no_memory", "Cannot allocate memory"),
    ],
)
async def test_a_machine_that_never_comes_up_is_refused_with_the_reason(sim_world: SimWorld, rig: VmRig, fault: Fault, why: str) -> None:
    async with rig:
        sim_world.machine.vms.next(fault)
        with pytest.raises(IsopodError) as refused:
            await rig.run_detached("sleep", "1000", name="box", network="bridge")
        assert why in refused.value.message
        record = await rig.inspect("box")
        assert (record.status, record.pid) == ("exited", None)
        assert why in record.error
        await assert_gone(sim_world, rig, *DURABLE)
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
        assert (await rig.inspect("box")).error == ""
        await assert_clean(sim_world, rig)


@pytest.mark.row("V8")
@pytest.mark.parametrize(
    ("fault", "code", "why"),
    [
        ("panic_later", 255, "the guest's kernel panicked: Fatal exception in interrupt"),
        ("silent", 137, "the guest did not answer for 60"),
        ("breaks_frames", 137, "the guest broke the protocol"),
        ("false_streams", 137, "the guest broke the protocol"),
        ("dies", 137, "killed by signal 9"),
    ],
)
async def test_a_machine_that_breaks_down_ends_with_the_reason(sim_world: SimWorld, rig: VmRig, fault: Fault, code: int, why: str) -> None:
    async with rig:
        sim_world.machine.vms.after_s = (5.0, 9.0)
        sim_world.machine.vms.next(fault)
        await rig.run_detached("sleep", "1000", name="box", network="bridge")
        record = await ended(rig, "box")
        assert (record.status, record.exit_code) == ("exited", code)
        assert why in record.error
        await assert_gone(sim_world, rig, *DURABLE)
        await assert_clean(sim_world, rig)


@pytest.mark.row("V8")
async def test_a_silent_guest_is_said_to_be_silent_before_it_is_ended(sim_world: SimWorld, rig: VmRig) -> None:
    async with rig:
        sim_world.machine.vms.next("silent")
        await rig.run_detached("sleep", "1000", name="box")
        await asyncio.sleep(45)
        state = await rig.status("box")
        assert state.silent_s is not None
        assert state.silent_s > 30
        assert state.why.startswith("silent")
        assert state.container.status == "running"
        with pytest.raises(IsopodError):
            await rig.exec("box", "true")
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=1.0))
        assert stopped.status == "exited"
        await assert_clean(sim_world, rig)


@pytest.mark.row("V8")
async def test_a_guest_that_ignores_poweroff_is_ended_within_the_deadline(sim_world: SimWorld, rig: VmRig) -> None:
    async with rig:
        sim_world.machine.vms.next("ignores_poweroff")
        await rig.run_detached("sleep", "1000", name="box")
        started = sim_world.loop.time()
        stopped = await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box", timeout_s=1.0))
        assert stopped.status == "exited"
        assert sim_world.loop.time() - started < 12
        sim_world.machine.vms.next("ignores_poweroff")
        assert (await rig.run("sh", "-c", "exit 6", name="other")).exit_code == 6
        await assert_clean(sim_world, rig)


@pytest.mark.row("V8")
async def test_a_flooded_console_and_a_full_disk_harm_only_their_guest(sim_world: SimWorld, rig: VmRig) -> None:
    async with rig:
        sim_world.machine.vms.next("floods_console")
        flooded = await rig.run_detached("sleep", "1000", name="flooded")
        sim_world.machine.vms.next("small_disk")
        await rig.run_detached("sleep", "1000", name="full")
        sim_world.machine.vms.next("read_only")
        await rig.run_detached("sleep", "1000", name="broken")
        await asyncio.sleep(10)
        assert (await rig.exec("flooded", "echo", "fine")).stdout == b"fine\n"
        files = [name for name in await rig.world.disk.list(f"{rig.folder}/root/containers/{flooded.id}") if name.startswith("console.log")]
        sizes = [await rig.world.disk.stat(f"{rig.folder}/root/containers/{flooded.id}/{name}") for name in files]
        assert sum(each.size_bytes for each in sizes if each is not None) < 3 * MIB
        ran = await rig.exec("full", "sh", "-c", "head -c 100000 /dev/zero > /big")
        assert (ran.exit_code, b"No space left" in ran.stderr) == (1, True)
        assert "readonly" in (await rig.status("broken")).why
        assert (await rig.exec("broken", "touch", "/x")).exit_code == 1
        await assert_clean(sim_world, rig)


@pytest.mark.row("V6", "V8")
@pytest.mark.parametrize("fault", ["migration_fails", "dies_migrating", "qmp_silent", "qmp_errors", "qmp_garbage"])
async def test_a_snapshot_that_fails_says_so_and_leaves_none(sim_world: SimWorld, rig: VmRig, fault: Fault) -> None:
    async with rig:
        sim_world.machine.vms.next(fault)
        await rig.run_detached("sleep", "1000", name="box", vm=m.VmOptions(memory_bytes=VM.memory_bytes, cold=True))
        with pytest.raises(IsopodError):
            await rig.client.call(methods.VM_SNAPSHOT, machines.VmSnapshotRequest(name="box"))
        assert (await rig.status("box")).snapshots == ()
        if fault == "migration_fails":
            assert (await rig.exec("box", "echo", "lives")).stdout == b"lives\n"
        elif fault == "dies_migrating":
            assert (await ended(rig, "box")).exit_code == 137
        await assert_clean(sim_world, rig)


@pytest.mark.row("V6", "V8")
@pytest.mark.parametrize("file", ["state", "memory"])
async def test_a_damaged_template_is_found_and_the_machine_boots(sim_world: SimWorld, rig: VmRig, file: str) -> None:
    async with rig:
        await rig.template()
        folder = f"{rig.folder}/root/vm/templates"
        (name,) = await rig.world.disk.list(folder)
        sim_world.disk.faults.bit_rot(f"{folder}/{name}/{file}", n_bits=5, n_bytes=64)
        record = await rig.run_detached("sleep", "1000", name="box", network="bridge")
        assert (record.status, record.origin) == ("running", "cold")
        assert (await rig.exec("box", "echo", "fine")).stdout == b"fine\n"
        await assert_clean(sim_world, rig)


@pytest.mark.row("V6", "V8")
async def test_memory_damaged_where_nobody_looked_is_a_start_that_fails_once(sim_world: SimWorld, rig: VmRig) -> None:
    async with rig:
        await rig.template()
        folder = f"{rig.folder}/root/vm/templates"
        (name,) = await rig.world.disk.list(folder)
        sim_world.disk.faults.bit_rot(f"{folder}/{name}/memory", n_bits=5, offset=MIB + 8, n_bytes=64)
        try:
            record = await rig.run_detached("sleep", "1000", name="box", network="bridge")
        except IsopodError as error:
            assert "did not answer" in error.message or "no answer" in error.message
            await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
            record = await rig.inspect("box")
        assert (record.status, record.origin) == ("running", "cold")
        await assert_clean(sim_world, rig)


@pytest.mark.row("V8")
async def test_what_is_not_installed_is_named_and_containers_run_without_it(sim_world: SimWorld, rig: VmRig) -> None:
    async with rig:
        for path, why in ((QEMU, "qemu-system-x86_64"), (f"{GUEST_FOLDER}/vmlinux", "vmlinux"), ("/usr/sbin/mke2fs", "mke2fs")):
            kept = sim_world.machine.view.node(path).inode
            sim_world.machine.view.remove(path)
            with pytest.raises(IsopodError, match=why):
                await rig.run("true", auto_remove=True)
            assert (await rig.run("true", isolation="container")).exit_code == 0
            sim_world.machine.view.link(kept, path)
        await assert_clean(sim_world, rig)


@pytest.mark.row("V5")
async def test_a_shim_that_is_killed_takes_its_machine_along_and_is_noticed(sim_world: SimWorld, rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box", network="bridge")
        ((shim, _),) = sim_world.world.processes.find(SHIM)  # before there is one of a template
        sim_world.world.processes.signal(shim, 9)
        record = await ended(rig, "box")
        assert record.exit_code in (137, 255)
        assert record.error
        assert [argv for _, argv in sim_world.world.processes.find(QEMU) if "box" in argv] == []
        await assert_clean(sim_world, rig)
