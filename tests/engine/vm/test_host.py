"""Virtual machines on the real kernel: QEMU, the real shim and guest, under TCG. Few boots, with generous deadlines."""

import asyncio
import os

import pytest

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.engine.vm.shares import PROGRAM as VIRTIOFSD
from isopod.world.world import World
from tests.node.rig import HostBackend
from tests.node.vms import MIB, VmRig, missing_for_vms

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(400)]
CALL_TIMEOUT_S = 120.0


@pytest.fixture
def rig(host_world: World, folder: str) -> VmRig:
    """A node whose machines run under TCG."""
    if missing := missing_for_vms():
        pytest.skip(missing)
    backend = HostBackend(host_world, folder)
    backend.more_environment = {"ISOPOD_VM_MONITOR_ROOT": f"{folder}/sbs", "ISOPOD_VM_ACCELERATOR": "tcg"}
    return VmRig(backend, "isopodw")


async def said(rig: VmRig, name: str, *command: str) -> str:
    """Return what a command in a machine says."""
    return (await rig.exec(name, *command)).stdout.decode().strip()


def proportional_bytes(pid: int) -> int:
    """Return a process's memory, pages shared with others counted in parts."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))


@pytest.mark.row("V1", "V2", "V6")
async def test_machines_from_one_template_are_told_apart_and_share_its_pages(rig: VmRig) -> None:
    async with rig:
        await rig.template()
        records = [await rig.run_detached("sleep", "1000", name=name, network="bridge") for name in ("one", "two")]
        assert [record.origin for record in records] == ["template", "template"]
        one, two = records
        assert one.pid is not None
        assert two.pid is not None
        assert proportional_bytes(two.pid) < 100 * MIB, "a machine of 128 MiB has pages of its own only where it wrote"
        for record in records:
            assert record.network.ip_address is not None
            assert await said(rig, record.name, "cat", "/sys/class/net/eth0/address") == record.network.mac_address
            assert record.network.ip_address in await said(rig, record.name, "cat", "/etc/hosts")
            assert abs(int(await said(rig, record.name, "date", "+%s")) - rig.world.clock.now_ns() // 10**9) <= 5
        for command in (("hostname",), ("head", "-c", "16", "/dev/urandom"), ("cat", "/etc/hosts")):
            assert (await rig.exec("one", *command)).stdout != (await rig.exec("two", *command)).stdout
        await rig.exec("one", "sh", "-c", "echo mine > /file; sync")
        assert (await rig.exec("two", "cat", "/file")).exit_code == 1
        gateway = str(one.network.gateway)
        assert (await rig.exec("one", "ping", "-c", "1", "-w", "20", gateway)).exit_code == 0
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="one"))
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="one"), timeout_s=CALL_TIMEOUT_S)
        assert (await rig.inspect("one")).origin == "cold", "a template's disk is empty"
        assert await said(rig, "one", "cat", "/file") == "mine"


@pytest.mark.row("V6")
async def test_a_snapshot_goes_on_where_it_was(rig: VmRig) -> None:
    async with rig:
        count = "i=0; while true; do i=$((i+1)); echo $i > /count; echo line $i; sleep 0.2; done"
        await rig.run_detached("sh", "-c", count, name="box", network="bridge")
        while not await said(rig, "box", "cat", "/count"):
            pass
        await rig.exec("box", "sh", "-c", "echo before > /file")
        taken = await rig.client.call(methods.VM_SNAPSHOT, machines.VmSnapshotRequest(name="box", snapshot="one"), timeout_s=CALL_TIMEOUT_S)
        assert 0 < taken.disk_bytes < 64 * MIB
        assert 0 < taken.memory_bytes < 128 * MIB
        at = int(await said(rig, "box", "cat", "/count"))
        await rig.exec("box", "sh", "-c", "echo after > /file; sync")
        for _ in range(2):  # it can be gone back to again
            back = await rig.client.call(
                methods.VM_RESTORE, machines.VmSnapshotRequest(name="box", snapshot="one"), timeout_s=CALL_TIMEOUT_S
            )
            assert (back.status, back.origin) == ("running", "snapshot one")
            assert await said(rig, "box", "cat", "/file") == "before"
            assert abs(int(await said(rig, "box", "date", "+%s")) - rig.world.clock.now_ns() // 10**9) <= 5
            while int(await said(rig, "box", "cat", "/count") or 0) <= at + 1:
                pass
        await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        assert (await rig.status("box")).machine == "paused"
        await rig.client.call(methods.VM_SNAPSHOT, machines.VmSnapshotRequest(name="box", snapshot="two"), timeout_s=CALL_TIMEOUT_S)
        assert (await rig.inspect("box")).status == "paused"
        await rig.client.call(methods.CONTAINER_UNPAUSE, m.ContainerName(name="box"))
        resized = await rig.client.call(methods.VM_RESIZE, machines.ResizeVm(name="box", memory_bytes=192 * MIB, vcpus=2))
        assert len(resized.notes) == 2
        assert await said(rig, "box", "nproc") == "1"


@pytest.mark.row("V8")
async def test_machines_that_break_down_end_with_the_reason(rig: VmRig) -> None:
    async with rig:
        await rig.template()
        for name in ("panics", "dies", "deaf", "full"):
            await rig.run_detached("sh", "-c", "trap '' TERM; while true; do sleep 1; done", name=name, network="bridge")
        filled = await rig.exec("full", "sh", "-c", "cat /dev/zero > /big")
        assert filled.exit_code == 1
        assert b"No space" in filled.stderr
        assert await said(rig, "full", "sh", "-c", "rm /big; echo fine") == "fine"
        dies = await rig.inspect("dies")
        assert dies.pid is not None
        os.kill(dies.pid, 9)
        await rig.wait("dies")
        dead = await rig.inspect("dies")
        assert (dead.status, dead.exit_code) == ("exited", 137)
        assert dead.error
        await asyncio.gather(rig.exec("panics", "sh", "-c", "echo c > /proc/sysrq-trigger"), rig.wait("panics"), return_exceptions=True)
        assert "panic" in (await rig.inspect("panics")).error
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="deaf", timeout_s=1.0))
        assert (await rig.inspect("deaf")).exit_code == 137


@pytest.mark.row("V4")
async def test_folders_and_files_of_the_host(rig: VmRig) -> None:
    if not os.path.exists(VIRTIOFSD):
        pytest.skip("virtiofsd is not installed (qemu-system-common)")
    async with rig:
        data = f"{rig.folder}/data"
        await rig.world.disk.make_directory(data)
        await rig.world.disk.write(f"{data}/file", b"from the host\n")
        mounts = (
            m.Mount(source=data, destination="/data"),
            m.Mount(source=data, destination="/fixed", read_only=True),
            m.Mount(source=f"{data}/file", destination="/etc/one", read_only=True),
            m.Mount(source="", destination="/scratch", kind="tmpfs"),
        )
        script = """
            cat /data/file /fixed/file /etc/one
            echo back > /data/new
            echo x > /scratch/x && echo scratch
            echo no 2>/dev/null > /fixed/new || echo fixed
            mount -o remount,rw /fixed 2>/dev/null; (echo no > /fixed/new) 2>/dev/null || echo fixed still
            ls /etc/one
        """
        result = await rig.run("sh", "-c", script, name="box", mounts=mounts, stdin=None)
        assert result.stdout == b"from the host\n" * 3 + b"scratch\nfixed\nfixed still\n/etc/one\n"
        assert await rig.world.disk.read(f"{data}/new") == b"back\n"
        assert [argv for _, argv in rig.world.processes.find(VIRTIOFSD) if any(rig.folder in word for word in argv)] == []
        assert (await rig.inspect("box")).origin == "cold"


@pytest.mark.row("V3")
async def test_much_input_and_a_terminal(rig: VmRig) -> None:
    async with rig:
        data = b"line\n" * 200_000
        result = await rig.run("cat", stdin=data)
        assert (result.exit_code, result.stdout == data) == (0, True)
        wanted = m.ContainerSpec(
            image="isopod/busybox",
            command=("stty", "size"),
            isolation="vm",
            network="none",
            terminal=True,
            vm=m.VmOptions(memory_bytes=128 * MIB),
        )
        async with rig.client.open(methods.CONTAINER_RUN, m.RunContainer(spec=wanted, rows=33, columns=77)) as call:
            out = b"".join([item.data async for item in call if isinstance(item, m.Stdout)])
        assert out == b"33 77\r\n"
