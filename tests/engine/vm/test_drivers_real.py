"""Firecracker's and Cloud Hypervisor's drivers against the real programs, where a machine has them and KVM.

What is proven is the interface: every verb is taken by the real VMM in every state. No guest needs to come up for that, so it also works
where KVM is there, but so deep inside of other machines that no kernel boots under it.
"""

import os
import shutil
import sys
from typing import Final

import pytest

from isopod.engine.vm.drivers.cloud_hypervisor import CloudHypervisorDriver
from isopod.engine.vm.drivers.firecracker import FirecrackerDriver
from isopod.engine.vm.machine import Control, Disk, MachineSpec
from isopod.world.errors import RuntimeFailed, UnavailableError
from isopod.world.world import World
from tests.engine.vm.fakes.kit import MIB, VMMS, Vmm, make_spec, with_kvm
from tests.engine.vm.fakes.launch import ended, launched

KERNEL: Final = f"{sys.prefix}/share/isopod/guest/vmlinux"
DISK_BYTES: Final = 1 * MIB
both_vmms: Final = pytest.mark.parametrize("vmm", VMMS, ids=[vmm.name for vmm in VMMS])


def need(vmm: Vmm) -> None:
    """Skip a test where there is no such program, no KVM, or no kernel."""
    if shutil.which(vmm.name) is None:
        pytest.skip(f"needs {vmm.name} on PATH (its releases on GitHub)")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm")
    if not os.path.exists(KERNEL):
        pytest.skip(f"needs {KERNEL} (make setup-vm)")


async def machine(world: World, folder: str, name: str = "vm1") -> MachineSpec:
    """Return a machine without a network, with disks of whole sectors."""
    spec = await make_spec(world, folder, name)
    for disk in spec.disks:
        await world.disk.write(disk.path, bytes(DISK_BYTES))
    disks: tuple[Disk, ...] = spec.disks
    return spec._replace(kernel=KERNEL, initrd="", nics=(), disks=disks, cmdline=("console=ttyS0", "panic=-1", "reboot=t"))


@pytest.mark.row("B11")
@pytest.mark.row("V6")
@pytest.mark.host
@both_vmms
async def test_the_real_program_takes_every_verb(host_world: World, folder: str, vmm: Vmm) -> None:
    need(vmm)
    world = host_world
    driver = (FirecrackerDriver if vmm.name == "firecracker" else CloudHypervisorDriver)(world, kvm=with_kvm)
    assert (await driver.check()).usable
    spec, snapshot = await machine(world, folder), f"{folder}/snapshot"
    await world.disk.make_directory(snapshot)
    with launched(await driver.plan(spec), f"{folder}/console") as process:
        control = await driver.connect(spec)
        assert await control.status() == "unknown"
        await control.boot()
        assert await control.status() == "running"
        with pytest.raises(RuntimeFailed, match="already"):
            await control.boot()
        for _ in range(2):
            await control.pause()
        assert await control.status() == "paused"
        can_restore = await saved(control, snapshot)
        for _ in range(2):
            await control.resume()
        assert await control.status() == "running"
        notes = await control.resize(vcpus=4, memory_bytes=512 * MIB)
        assert len(notes) == (2 if vmm.name == "firecracker" else 0)
        await control.power_button()
        await control.quit()
        assert await ended(world, process) in (0, -9)
        with pytest.raises(UnavailableError):
            await control.status()
        await control.quit()
    if not can_restore:
        pytest.skip("this machine's KVM cannot save the state of a processor")
    clone = await machine(world, folder, "vm2")
    for restored in (spec._replace(restore_from=snapshot), clone._replace(restore_from=snapshot)):
        with launched(await driver.plan(restored), f"{folder}/console") as process:
            control = await driver.connect(restored)
            await control.boot()
            assert await control.status() == "running"
            await control.quit()
            assert await ended(world, process) in (0, -9)


async def saved(control: Control, folder: str) -> bool:
    """Make a snapshot; return False if KVM inside of another machine cannot."""
    try:
        await control.snapshot(folder)
    except RuntimeFailed as error:
        if "NestedState" not in error.message:
            raise
        return False
    return True


@pytest.mark.row("B11")
@pytest.mark.host
@both_vmms
async def test_the_real_program_says_why_it_does_not_boot(host_world: World, folder: str, vmm: Vmm) -> None:
    need(vmm)
    driver = (FirecrackerDriver if vmm.name == "firecracker" else CloudHypervisorDriver)(host_world, kvm=with_kvm)
    spec = (await machine(host_world, folder))._replace(kernel="/nowhere/vmlinux")
    with launched(await driver.plan(spec), f"{folder}/console"):
        control = await driver.connect(spec)
        with pytest.raises(RuntimeFailed, match="No such file") as caught:
            await control.boot()
        assert "\n" not in caught.value.message
