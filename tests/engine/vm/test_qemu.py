"""The QEMU driver's command line."""

from itertools import pairwise

import pytest

from isopod.engine.vm.drivers.qemu import QemuDriver, arguments, bus_of
from isopod.engine.vm.machine import Disk, MachineSpec, Nic, Share
from isopod.world.errors import Unsupported
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.engine.vm.test_qmp import spec_of

DISKS = (
    Disk("/images/a,b.idx", "l0i", read_only=True),
    Disk("/images/a.tar", "l0t", read_only=True),
    Disk("/c/upper.img", "upper", read_only=False),
)
SPEC = spec_of("/run/b", disks=DISKS, nics=(Nic("iso-t0", "02:00:00:00:00:05"),), cmdline=("console=ttyS0", "quiet"))


def options(spec: MachineSpec, name: str) -> list[str]:
    """Return the values of an option, in their order."""
    words = arguments(spec)
    return [value for option, value in pairwise(words) if option == name]


@pytest.mark.row("V1")
def test_a_machine_on_memory_mapped_transports() -> None:
    assert options(SPEC, "-M") == ["microvm,acpi=on,pit=off,pic=off,rtc=on,pcie=off,isa-serial=on,memory-backend=mem"]
    assert options(SPEC, "-object") == ["memory-backend-ram,id=mem,size=128M"]
    assert (options(SPEC, "-m"), options(SPEC, "-smp")) == (["128M"], ["1"])
    assert options(SPEC, "-accel") == ["tcg,tb-size=32"]
    assert options(SPEC, "-append") == ["console=ttyS0 quiet isopod.channel=serial pci=off"]
    assert options(SPEC, "-device") == [
        "i8042",
        "virtio-serial-device",
        "virtserialport,chardev=agent,name=isopod.agent.0",
        "virtio-rng-device",
        "virtio-balloon-device,deflate-on-oom=on",
        "virtio-blk-device,drive=l0i,serial=l0i",
        "virtio-blk-device,drive=l0t,serial=l0t",
        "virtio-blk-device,drive=upper,serial=upper",
        "virtio-net-device,netdev=n0,mac=02:00:00:00:00:05",
    ]
    assert options(SPEC, "-drive") == [
        "id=l0i,if=none,format=raw,read-only=on,file=/images/a,,b.idx",
        "id=l0t,if=none,format=raw,read-only=on,file=/images/a.tar",
        "id=upper,if=none,format=raw,discard=unmap,detect-zeroes=unmap,file=/c/upper.img",
    ]
    assert options(SPEC, "-netdev") == ["tap,id=n0,fd=6,vhost=off"]
    assert options(SPEC, "-incoming") == []


@pytest.mark.row("V4")
def test_pci_where_it_is_asked_for_and_where_there_is_no_room_else() -> None:
    pci = SPEC._replace(machine="q35")
    assert options(pci, "-M") == ["q35,memory-backend=mem"]
    assert "virtio-net-pci,netdev=n0,mac=02:00:00:00:00:05,romfile=" in options(pci, "-device")
    assert options(pci, "-append") == ["console=ttyS0 quiet isopod.channel=serial"]
    many = tuple(Disk(f"/{number}", f"l{number}i", read_only=True) for number in range(21))
    assert bus_of(SPEC._replace(disks=many)) == "pci"
    assert bus_of(SPEC._replace(disks=many[:20])) == "device"


def test_kvm() -> None:
    kvm = SPEC._replace(accelerator="kvm")
    assert (options(kvm, "-accel"), options(kvm, "-cpu")) == (["kvm"], ["host"])


@pytest.mark.row("V6")
def test_the_memory_of_templates_and_of_shares() -> None:
    making = SPEC._replace(memory_file="/t/memory")
    assert options(making, "-object") == ["memory-backend-file,id=mem,size=128M,mem-path=/t/memory,share=on"]
    going_on = making._replace(restore_from="/t")
    assert options(going_on, "-object") == ["memory-backend-file,id=mem,size=128M,mem-path=/t/memory,share=off"]
    assert options(going_on, "-incoming") == ["defer"]
    sharing = SPEC._replace(shares=(Share("share0", "fs0.sock", read_only=True),))
    assert options(sharing, "-object") == ["memory-backend-memfd,id=mem,size=128M,share=on"]
    assert "vhost-user-fs-device,chardev=f0,tag=share0" in options(sharing, "-device")


async def test_the_plan(world: World) -> None:
    driver = QemuDriver(world)
    if world.processes.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    plan = await driver.plan(SPEC)
    assert [(file.kind, file.target) for file in plan.files] == [
        ("listen", "/run/b/qmp.sock"),
        ("console", ""),
        ("agent", ""),
        ("tap", "iso-t0"),
    ]
    assert (plan.cwd, plan.console, plan.agent, plan.own_network) == ("/run/b", "socket", "socket", True)
    shares = (Share("share0", "fs0.sock", read_only=True),)
    with pytest.raises(Unsupported, match="shared folders"):
        await driver.plan(SPEC._replace(shares=shares, restore_from="/t"))


@pytest.mark.host
async def test_the_check_says_the_version(host_world: World) -> None:
    driver = QemuDriver(host_world)
    if host_world.processes.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    found = await driver.check()
    assert found.usable
    assert found.why.startswith("QEMU emulator version ")
    assert await driver.check() is found


async def test_no_qemu(sim_world: SimWorld) -> None:
    program = sim_world.world.processes.which("qemu-system-x86_64")
    if program is not None:
        await sim_world.world.disk.remove(program)
    driver = QemuDriver(sim_world.world)
    found = await driver.check()
    assert not found.usable
    assert "apt-get install qemu-system-x86" in found.why
    with pytest.raises(Unsupported, match="not installed"):
        await driver.plan(SPEC)
