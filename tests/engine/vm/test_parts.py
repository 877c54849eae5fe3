"""The small parts: the guest's files, the accelerator, disks, the lease, shares."""

import asyncio
import json

import pytest

from isopod.api.messages import Mount
from isopod.engine.images.layers import LayerDisk
from isopod.engine.vm import shares
from isopod.engine.vm.accelerator import Accelerators, probe_argv
from isopod.engine.vm.disks import as_disks, copy_sparse, layer_serials, make_upper
from isopod.engine.vm.drivers.qemu import QemuDriver
from isopod.engine.vm.guest import GuestFiles, find_guest, kernel_words
from isopod.engine.vm.lease import Lease
from isopod.runtime.logger import Logger
from isopod.world.errors import BadRecord, InUse, RuntimeFailed, Unsupported
from isopod.world.processes import Process
from isopod.world.sim import SimWorld
from isopod.world.sim.processes import SimProcesses
from isopod.world.world import World

GUEST = GuestFiles("/g/vmlinux", "/g/initrd.img", "/g/isopod-shim", "6.12", "0.1.0", "d" * 64)
FACTS = {"kernel": "6.12", "agent": "0.1.0", "digest": "d" * 64}


async def test_the_guests_files(world: World, folder: str) -> None:
    for name in ("vmlinux", "initrd.img", "isopod-shim"):
        with pytest.raises(Unsupported, match="there is no") as caught:
            await find_guest(world, folder)
        assert "make setup-vm" in caught.value.hint
        await world.disk.write(f"{folder}/{name}", b"x")
    await world.disk.write(f"{folder}/guest.json", json.dumps(FACTS).encode())
    assert await find_guest(world, folder) == GuestFiles(
        f"{folder}/vmlinux", f"{folder}/initrd.img", f"{folder}/isopod-shim", "6.12", "0.1.0", "d" * 64
    )
    for text in (b"{}", b"{", b"\xff"):
        await world.disk.write(f"{folder}/guest.json", text)
        with pytest.raises(BadRecord):
            await find_guest(world, folder)


def test_the_kernels_words() -> None:
    assert "tsc_early_khz=2700000" in kernel_words("tcg", 2_700_000)
    assert not any(word.startswith("tsc") for word in kernel_words("kvm", 2_700_000))
    assert not any(word.startswith("tsc_early") for word in kernel_words("tcg", 0))


def accelerators(world: World, folder: str, choice: str = "auto") -> Accelerators:
    logger = Logger(lambda _: None, world.clock)
    assert choice in ("auto", "kvm", "tcg")
    return Accelerators(world, f"{folder}/vm/accelerator.json", choice, qemu=QemuDriver(world), logger=logger)  # type: ignore[arg-type]


async def test_what_is_chosen_is_known_at_once(world: World, folder: str) -> None:
    first = accelerators(world, folder, "tcg")
    known = await first.known()
    assert (known.value, known.why) == ("tcg", "chosen by the configuration")
    assert (await first.find(GUEST)).name == "tcg"
    assert await world.disk.stat(f"{folder}/vm/accelerator.json") is None  # what is chosen was not found out


async def test_a_machine_without_kvm(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    first = accelerators(world, folder)
    assert (await first.known()).value == "unknown"
    found = await first.find(GUEST)
    assert (found.name, "there is no /dev/kvm" in found.why) == ("tcg", True)
    assert (await first.known()).value == "tcg"
    remembered = await accelerators(world, folder).known()
    assert (remembered.value, "remembered" in remembered.why) == ("tcg", True)
    await world.disk.write(f"{folder}/vm/accelerator.json", b"{")
    assert (await accelerators(world, folder).find(GUEST)).name == "tcg"


def test_the_probe_boots_a_kernel_that_ends_by_itself() -> None:
    argv = probe_argv("/usr/bin/qemu-system-x86_64", GUEST)
    assert argv[argv.index("-accel") + 1] == "kvm"
    assert "panic=-1" in argv[argv.index("-append") + 1]
    assert "-no-reboot" in argv
    assert "-initrd" not in argv


@pytest.mark.host
async def test_a_disk_is_made_once_and_small(host_world: World, folder: str) -> None:
    path = f"{folder}/upper.img"
    await make_upper(host_world, path, 10 << 30)
    found = await host_world.disk.stat(path)
    assert found is not None
    assert found.size_bytes == 10 << 30
    assert await host_world.disk.tree_bytes(folder) < 1 << 20
    await make_upper(host_world, path, 1 << 30)  # it is there: nothing of what was written is lost
    assert await host_world.disk.stat(path) == found
    await copy_sparse(host_world, path, f"{folder}/copy.img")
    assert await host_world.disk.tree_bytes(folder) < 2 << 20
    with pytest.raises(RuntimeFailed):
        await make_upper(host_world, f"{folder}/tiny.img", 4096)
    assert await host_world.disk.list(folder) == ["copy.img", "upper.img"]


def test_how_a_guest_finds_its_layers() -> None:
    disks = as_disks((LayerDisk("/a.idx", "/a.tar"), LayerDisk("/b.erofs", None)), "/u")
    assert [(disk.path, disk.serial, disk.read_only) for disk in disks] == [
        ("/a.idx", "l0i", True),
        ("/a.tar", "l0t", True),
        ("/b.erofs", "l1i", True),
        ("/u", "upper", False),
    ]
    assert layer_serials(disks) == [["l0i", "l0t"], ["l1i", None]]


async def sleeper(world: World) -> Process:
    """Start a process that lives for a minute."""
    program = world.processes.which("sleep")
    if program is None:
        program = "/bin/sleep"
        assert isinstance(world.processes, SimProcesses)
        world.processes.install(program, lambda *_: asyncio.sleep(60, 0))
    return await world.processes.spawn([program, "60"], env={})


@pytest.mark.row("V7")
async def test_a_machine_runs_once(world: World, folder: str) -> None:
    ours = Lease(world, f"{folder}/lease", "box")
    assert await ours.holder() is None
    await ours.take()
    await ours.take()  # a start that failed is tried again
    child = await sleeper(world)
    try:
        await ours.hand_over(child.identity)
        assert await ours.holder() == child.identity
        with pytest.raises(InUse, match=f"process {child.identity.pid}"):
            await Lease(world, f"{folder}/lease", "box").take()
    finally:
        await child.end()
    assert await ours.holder() is None
    await ours.take()


@pytest.mark.row("V7")
async def test_a_lease_of_another_boot_or_process_is_void(world: World, folder: str) -> None:
    lease = Lease(world, f"{folder}/lease", "box")
    child = await sleeper(world)
    own = child.identity
    for holder in (
        {"pid": own.pid, "started_ticks": own.started_ticks, "boot_id": "another"},
        {"pid": own.pid, "started_ticks": own.started_ticks + 1, "boot_id": world.processes.boot_id()},
    ):
        await world.disk.write(f"{folder}/lease", json.dumps(holder).encode())
        assert await lease.holder() is None
    for text in (b"", b"{", b"\xff"):
        await world.disk.write(f"{folder}/lease", text)
        assert await lease.holder() is None
    await lease.hand_over(own)
    assert await lease.holder() == own
    await child.end()


@pytest.mark.row("V4")
async def test_what_is_shared(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/data")
    await world.disk.write(f"{folder}/one.conf", b"x")
    mounts = (
        Mount(source=f"{folder}/data", destination="/data"),
        Mount(source="", destination="/tmp/x", kind="tmpfs"),
        Mount(source=f"{folder}/one.conf", destination="/etc/one.conf", read_only=True),
    )
    plans = await shares.plan_shares(world, mounts, "/run/b")
    assert [(plan.share.tag, plan.place, plan.file) for plan in plans] == [
        ("share0", "/run/b/share0", ""),
        ("share1", "/run/b/share1", "one.conf"),
    ]
    found = shares.guest_mounts(mounts, plans)
    assert [(each["kind"], each["path"], each["tag"], each["file"], each["read_only"]) for each in found] == [
        ("virtiofs", "/data", "share0", None, False),
        ("tmpfs", "/tmp/x", "", None, False),
        ("virtiofs", "/etc/one.conf", "share1", "one.conf", True),
    ]


@pytest.mark.host
@pytest.mark.row("V4")
async def test_a_share_is_served_and_ended(host_world: World, folder: str) -> None:
    if await host_world.disk.stat(shares.PROGRAM) is None:
        pytest.skip("virtiofsd is not installed (qemu-system-common)")
    identifier = "c" * 64
    bundle = f"{folder}/bundles/{identifier}"
    await host_world.disk.make_directory(bundle)
    await host_world.disk.write(f"{folder}/one.conf", b"x")
    mounts = (Mount(source=folder, destination="/data"), Mount(source=f"{folder}/one.conf", destination="/etc/one.conf", read_only=True))
    plans = await shares.plan_shares(host_world, mounts, bundle)
    try:
        for plan in plans:
            await shares.serve(host_world, plan, bundle)
        assert {owner for owner, _ in shares.servers(host_world, f"{folder}/bundles")} == {identifier}
        assert await host_world.disk.list(plans[1].place) == []  # nothing is mounted on the host
    finally:
        await shares.end(host_world, f"{folder}/bundles", identifier)
    assert shares.servers(host_world, f"{folder}/bundles") == []
