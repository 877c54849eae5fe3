"""What may befall a simulated microVM: each fault is seen by the shim, ends in the words that it is for, and leaves nothing that runs."""

import asyncio

import pytest

from isopod.engine.vm.shim import MachineEnd
from isopod.world.errors import IsopodError, RuntimeFailed
from isopod.world.sim import SimWorld
from isopod.world.sim.programs import GUEST_FOLDER
from isopod.world.sim.vm_faults import FAULTS, Fault, Kvm
from tests.node.machines import Machine, Machines, process


def machines(sim: SimWorld) -> Machines:
    sim.machine.view.make_folders("/vms")
    return Machines(sim.world, GUEST_FOLDER, "/vms")


def assert_nothing_runs(sim: SimWorld) -> None:
    assert [each.argv[0] for each in sim.machine.table.live()] == []
    assert [name for name in sim.machine.view.node("/vms/vm1").list_names() if name.endswith(".sock")] == []


async def ended(sim: SimWorld, machine: Machine) -> MachineEnd:
    end = await machine.end()
    assert await machine.exit_file() == str(255 if end.code is None else end.code).encode()
    assert_nothing_runs(sim)
    return end


async def running(sim: SimWorld, *faults: Fault) -> Machine:
    """A machine whose main command sleeps."""
    for fault in faults:
        sim.machine.vms.next(fault)
    machine = await machines(sim).booted()
    (await machine.start("sleep", "1000")).close()
    return machine


@pytest.mark.row("V8")
async def test_a_panic_at_boot(sim_world: SimWorld) -> None:
    sim_world.machine.vms.next("panic_at_boot")
    machine = await machines(sim_world).launch()
    with pytest.raises(RuntimeFailed):
        await machine.client.ready(60)
    end = await ended(sim_world, machine)
    assert (end.kind, end.code) == ("panic", None)
    assert end.why == "the guest's kernel panicked: VFS: Unable to mount root fs on unknown-block(0,0)"


@pytest.mark.row("V8")
async def test_a_panic_later(sim_world: SimWorld) -> None:
    machine = await running(sim_world, "panic_later")
    watching = asyncio.ensure_future(machine.events())
    end = await ended(sim_world, machine)
    assert end.kind == "panic"
    assert "Fatal exception in interrupt" in end.why
    assert [event["event"] for event in await watching] == ["panic"]
    assert sim_world.machine.vms.counts == {"panic_later": 1}


@pytest.mark.row("V8")
async def test_an_agent_that_never_speaks(sim_world: SimWorld) -> None:
    sim_world.machine.vms.next("no_hello")
    machine = await machines(sim_world).launch(settings={"boot_timeout_s": 12.0})
    with pytest.raises(RuntimeFailed, match="did not answer within 12"):
        await machine.client.ready(60)
    end = await ended(sim_world, machine)
    assert (end.kind, end.code) == ("boot_timeout", 137)


@pytest.mark.row("V8")
async def test_a_guest_that_falls_silent(sim_world: SimWorld) -> None:
    machine = await running(sim_world, "silent")
    watching = asyncio.ensure_future(machine.events())
    end = await ended(sim_world, machine)
    assert (end.kind, end.code, end.why) == ("silent", 137, "the guest did not answer for 30.0 s")
    assert [event["event"] for event in await watching] == ["silent"]


async def test_a_guest_that_is_paused_is_not_silent(sim_world: SimWorld) -> None:
    machine = await running(sim_world)
    control = await machine.control()
    await machine.client.request("hold", paused=True)
    await control.pause()
    await asyncio.sleep(500)
    await control.resume()
    await machine.client.request("hold", paused=False)
    control.close()
    assert (await machine.exec("echo", "awake")).stdout == b"awake\n"


@pytest.mark.row("V8")
async def test_a_flooded_console_is_bounded_and_stops_nobody(sim_world: SimWorld) -> None:
    sim_world.machine.vms.next("floods_console")
    machine = await machines(sim_world).booted(settings={"console_bytes_max": 100_000})
    assert (await machine.run("sh", "-c", "sleep 5; echo fine")).stdout == b"fine\n"
    assert (await ended(sim_world, machine)).code == 0
    for name in ("console.log", "console.log.1"):
        stat = await sim_world.world.disk.stat(f"/vms/vm1/{name}")
        assert stat is not None
        assert stat.size_bytes <= 100_000


@pytest.mark.row("V8")
@pytest.mark.parametrize("fault", ["breaks_frames", "false_streams", "over_credit"])
async def test_a_guest_that_lies(sim_world: SimWorld, fault: Fault) -> None:
    machine = await running(sim_world, fault)
    unread = await machine.client.exec(process("head", "-c", "9000000", "/dev/zero"))
    end = await ended(sim_world, machine)
    assert (end.kind, end.code) == ("vmm_killed", 137)
    assert end.why.startswith("the guest broke the protocol: ")
    unread.close()


@pytest.mark.row("V8")
async def test_a_guest_that_ignores_poweroff(sim_world: SimWorld) -> None:
    sim_world.machine.vms.next("ignores_poweroff")
    machine = await machines(sim_world).booted()
    started = sim_world.loop.time()
    assert (await machine.run("sh", "-c", "exit 3")).exit_code == 3
    end = await ended(sim_world, machine)
    assert (end.kind, end.code) == ("command", 3)
    assert 5.0 <= sim_world.loop.time() - started < 6.0


@pytest.mark.row("V8")
async def test_a_disk_that_is_full_or_broken(sim_world: SimWorld) -> None:
    sim_world.machine.vms.next("small_disk")
    vms = machines(sim_world)
    machine = await vms.booted()
    ran = await machine.exec("sh", "-c", "head -c 100000 /dev/zero > /big")
    assert (ran.exit_code, ran.stderr) == (1, b"head: write error: No space left on device\n")
    machine = await vms.booted("vm2")
    watching = asyncio.ensure_future(machine.client.watch().__anext__())
    sim_world.disk.faults.fail_next("write", path="/vms/vm2")
    await machine.exec("sh", "-c", "echo x > /x; sync")
    async with asyncio.timeout(60):
        assert await watching == {"event": "readonly", "path": "/"}
    assert (await machine.exec("touch", "/y")).exit_code == 1


async def test_a_monitor_without_memory(sim_world: SimWorld) -> None:
    sim_world.machine.vms.next("no_memory")
    vms = machines(sim_world)
    for machine in (await vms.launch("vm1"), await vms.launch("vm2", memory_mib=9000)):
        end = await machine.end()
        assert end.kind == "vmm_failed"
        assert end.why.endswith("cannot set up guest memory 'ram': Cannot allocate memory")
    assert_nothing_runs(sim_world)


async def test_a_monitor_that_is_killed(sim_world: SimWorld) -> None:
    sim_world.machine.vms.after_s = (5.0, 6.0)
    machine = await running(sim_world, "dies")
    end = await ended(sim_world, machine)
    assert (end.kind, end.code, end.why) == ("vmm_killed", 137, "the machine's process was killed by signal 9")


async def test_what_is_missing_is_named(sim_world: SimWorld) -> None:
    vms = machines(sim_world)
    for machine, why in (
        (await vms.launch("vm1", kernel="/nowhere/vmlinux"), "could not open kernel file '/nowhere/vmlinux'"),
        (await vms.launch("vm2", accelerator="kvm"), "failed to initialize kvm"),
    ):
        end = await machine.end()
        assert (end.kind, end.code) == ("vmm_failed", None)
        assert why in end.why
    refused = await vms.launch("vm3", settings={"argv": ["/usr/bin/nothing"]})
    assert refused.message["data"] == -1
    assert (await refused.end()).kind == "vmm_failed"
    assert_nothing_runs(sim_world)


@pytest.mark.parametrize("fault", ["qmp_slow", "qmp_silent", "qmp_errors", "qmp_garbage"])
async def test_a_monitor_whose_socket_fails(sim_world: SimWorld, fault: Fault) -> None:
    machine = await running(sim_world, fault)
    control = await machine.control()
    started = sim_world.loop.time()
    if fault == "qmp_slow":
        await control.pause()
        assert sim_world.loop.time() - started >= 2.0
    else:
        with pytest.raises(IsopodError):
            await control.pause()
    control.close()


@pytest.mark.parametrize(("kvm", "accelerator"), [("absent", "tcg"), ("hangs", "tcg"), ("works", "kvm")])
async def test_kvm_is_a_switch_of_the_machine(sim_world: SimWorld, kvm: Kvm, accelerator: str) -> None:
    from isopod.engine.vm.accelerator import Accelerators
    from isopod.engine.vm.drivers.qemu import QemuDriver
    from isopod.engine.vm.guest import find_guest
    from isopod.runtime.logger import Logger

    sim_world.machine.vms.kvm = kvm
    world = sim_world.world
    logger = Logger(lambda _: None, world.clock)
    accelerators = Accelerators(world, "/vms/accelerator.json", "auto", qemu=QemuDriver(world), logger=logger)
    assert (await accelerators.find(await find_guest(world, GUEST_FOLDER))).name == accelerator
    assert [each.argv[0] for each in sim_world.machine.table.live()] == []


async def test_faults_by_chance_are_a_matter_of_the_seed(sim_world: SimWorld) -> None:
    sim_world.machine.vms.rates = dict.fromkeys(FAULTS, 0.2)
    vms = machines(sim_world)
    ends = []
    for number in range(12):
        machine = await vms.launch(f"vm{number}", settings={"boot_timeout_s": 30.0})
        try:
            await machine.configure()
            ends.append(str((await machine.run("true")).exit_code))
        except IsopodError:
            ends.append("failed")
        sim_world.world.processes.signal(machine.shim.identity, 9)
        await machine.shim.wait()
    assert set(ends) > {"0"}
    assert len(sim_world.machine.vms.counts) > 5
    await asyncio.sleep(0.1)
    assert [each.argv[0] for each in sim_world.machine.table.live()] == []
