"""What can be asked of virtual machines and what is refused, through a whole node in the simulation."""

import io
import tarfile

import pytest

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.world.errors import InUse, InvalidArgument, NotFound, RuntimeFailed, Unsupported
from isopod.world.sim import SimWorld
from tests.node.vms import MIB, VM, VmRig, sim_rig


@pytest.fixture
def rig(sim_world: SimWorld, folder: str) -> VmRig:
    """A node in the simulation."""
    return sim_rig(sim_world, folder)


def archive(**files: bytes) -> bytes:
    """Return a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.row("V2")
async def test_what_cannot_be_a_machine_is_refused_before_anything_exists(rig: VmRig) -> None:
    async with rig:
        with pytest.raises(Unsupported, match="network host"):
            await rig.run_detached("true", network="host")
        with pytest.raises(InvalidArgument, match="takes a configuration"):
            await rig.run_detached("true", vm=m.VmOptions(driver="systemd"))
        with pytest.raises(InvalidArgument, match="configuration"):
            await rig.run_detached("true", vm=m.VmOptions(driver="qemu", config="/flake"))
        with pytest.raises(Unsupported, match="driver firecracker"):
            await rig.run_detached("true", vm=m.VmOptions(driver="firecracker"))
        assert await rig.list() == []


@pytest.mark.row("V1")
async def test_limits_change_and_say_what_waits_for_the_next_start(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box", vm=m.VmOptions(memory_bytes=256 * MIB))
        done = await rig.client.call(methods.CONTAINER_UPDATE, m.UpdateContainer(name="box", cpus=0.5, pids_max=50))
        assert (done.container.resources.cpus, done.container.resources.pids_max) == (0.5, 50)
        assert any("processes" in note for note in done.notes)
        done = await rig.client.call(methods.VM_RESIZE, machines.ResizeVm(name="box", memory_bytes=128 * MIB))
        assert done.notes == ()
        done = await rig.client.call(methods.VM_RESIZE, machines.ResizeVm(name="box", memory_bytes=512 * MIB, vcpus=2))
        assert len(done.notes) == 2
        assert done.container.vm is not None
        assert (done.container.vm.memory_bytes, done.container.vm.vcpus) == (512 * MIB, 2)


async def test_what_a_machine_that_runs_cannot_do(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        with pytest.raises(Unsupported, match="disk"):
            await rig.client.call(methods.CONTAINER_COMMIT, m.CommitContainer(name="box", image="new"))
        with pytest.raises(Unsupported, match="network of a virtual machine"):
            await rig.client.call(methods.NETWORK_CONNECT, m.ConnectNetwork(network="bridge", name="box"))


@pytest.mark.row("V3")
async def test_files_are_copied_in_and_out(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        async with rig.client.open(methods.CONTAINER_COPY_TO, machines.CopyTo(name="box", path="/tmp")) as call:
            await call.send(m.Chunk(data=archive(one=b"1" * 100_000, two=b"2")))
            call.end()
            await call.reply()
        assert (await rig.exec("box", "cat", "/tmp/two")).stdout == b"2"
        async with rig.client.open(methods.CONTAINER_COPY_FROM, machines.CopyFrom(name="box", path="/tmp/one")) as call:
            data = b"".join([chunk.data async for chunk in call])
            await call.reply()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            member = tar.extractfile("one")
            assert member is not None
            assert member.read() == b"1" * 100_000
        for path in ("/tmp/nothing", "/nowhere/at/all"):
            async with rig.client.open(methods.CONTAINER_COPY_FROM, machines.CopyFrom(name="box", path=path)) as call:
                with pytest.raises(NotFound):
                    _ = [chunk async for chunk in call]


@pytest.mark.row("V7")
async def test_a_machine_whose_disk_is_in_use_is_not_started_twice(rig: VmRig, sim_world: SimWorld) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="box")
        path = f"{rig.folder}/root/containers/{record.id}/lease"
        lease = await rig.world.disk.read(path)
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box"))
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
        other = await rig.run_detached("sleep", "1000", name="other")
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box"))
        theirs = await rig.world.disk.read(f"{rig.folder}/root/containers/{other.id}/lease")
        await rig.world.disk.write(path, theirs)  # as if another daemon's machine had it
        with pytest.raises(InUse, match="runs it"):
            await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
        assert "in use" in (await rig.inspect("box")).error
        assert (await rig.exec("other", "echo", "alive")).stdout == b"alive\n"
        await rig.world.disk.write(path, lease)  # whose holder is gone
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
        assert (await rig.inspect("box")).status == "running"


@pytest.mark.row("V6")
async def test_snapshots_fit_what_they_were_made_of(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        await rig.client.call(methods.VM_SNAPSHOT, machines.VmSnapshotRequest(name="box", snapshot="one"))
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box"))
        await rig.client.call(
            methods.VM_RESIZE, machines.ResizeVm(name="box", memory_bytes=2 * VM.memory_bytes if VM.memory_bytes else None)
        )
        with pytest.raises(Unsupported, match="another memory_bytes"):
            await rig.client.call(methods.VM_RESTORE, machines.VmSnapshotRequest(name="box", snapshot="one"))
        assert (await rig.inspect("box")).status == "exited"
        await rig.client.call(methods.VM_RESIZE, machines.ResizeVm(name="box", memory_bytes=VM.memory_bytes))
        back = await rig.client.call(methods.VM_RESTORE, machines.VmSnapshotRequest(name="box", snapshot="one"))
        assert back.origin == "snapshot one"
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box"))
        await rig.client.call(methods.CONTAINER_START, m.StartContainer(name="box"))
        assert (await rig.inspect("box")).origin == "cold"


async def test_a_machine_without_a_command_is_up_until_it_is_stopped(rig: VmRig) -> None:
    async with rig:
        await rig.run_detached(name="box")
        assert (await rig.exec("box", "echo", "hi")).stdout == b"hi\n"
        await rig.kill()
        await rig.start()
        assert (await rig.inspect("box")).status == "running"
        assert (await rig.status("box")).agent
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box"))
        assert (await rig.inspect("box")).status == "exited"


async def test_an_unknown_guest_folder_is_said(rig: VmRig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="box")
        await rig.world.disk.remove(f"{rig.folder}/run/bundles/{record.id}/machine.json")
        await rig.kill()
        await rig.start()
        with pytest.raises(RuntimeFailed, match=r"machine\.json"):
            await rig.client.call(methods.CONTAINER_PAUSE, m.ContainerName(name="box"))
        assert (await rig.status("box")).machine == "unknown"
        await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name="box"))
        assert (await rig.inspect("box")).exit_code == 143
