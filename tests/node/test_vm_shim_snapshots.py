"""What of a simulated microVM is on a disk: what it wrote and when that is safe, its snapshots, and what goes wrong with both."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from isopod.engine.vm.disks import copy_sparse
from isopod.engine.vm.shim import MachineEnd
from isopod.world.errors import IsopodError, RuntimeFailed
from isopod.world.sim import SimWorld, make_sim_world
from isopod.world.sim.programs import GUEST_FOLDER
from tests.node.machines import MIB, Machine, Machines

MEMORY = "/vms/template/memory"


def machines(sim: SimWorld) -> Machines:
    sim.machine.view.make_folders("/vms/template")
    return Machines(sim.world, GUEST_FOLDER, "/vms")


async def save(machine: Machine, folder: str = "/vms/template") -> None:
    """Write a machine down; it is paused then."""
    control = await machine.control()
    try:
        await machine.client.request("hold", paused=True)
        await control.pause()
        await control.snapshot(folder)
    finally:
        control.close()


async def template(vms: Machines) -> None:
    """Make a template as the engine does: a machine whose memory is a file, booted, its layers mounted, and saved."""
    machine = await vms.launch("first", memory_file=MEMORY)
    await machine.client.ready(60)
    await machine.client.request("prepare", layers=[["l0i", "l0t"]])
    control = await machine.control()
    await machine.client.request("hold", paused=True)
    await control.snapshot("/vms/template")
    control.close()
    await kill(machine)


async def clone(vms: Machines, name: str, entropy: str) -> Machine:
    """Start a machine from the template."""
    machine = await vms.launch(name, memory_file=MEMORY, restore_from="/vms/template")
    control = await machine.control()
    await control.boot()
    control.close()
    await machine.configure(hostname=name, entropy=entropy)
    return machine


async def kill(machine: Machine) -> MachineEnd:
    await machine.client.request("stop", timeout_s=0.0)
    return await machine.end()


async def read_again(vms: Machines, *command: str) -> bytes:
    """Start the machine again on the disk it has, and run a command in it."""
    machine = await vms.booted()
    ran = await machine.exec(*command)
    await kill(machine)
    return ran.stdout


@pytest.mark.row("V5")
async def test_what_it_wrote_is_on_its_disk_after_a_clean_end(sim_world: SimWorld) -> None:
    vms = machines(sim_world)
    machine = await vms.booted()
    await machine.run("sh", "-c", "mkdir /data; echo kept > /data/file; rm /etc/notes")
    await machine.end()
    assert await read_again(vms, "sh", "-c", "cat /data/file; ls /etc") == b"kept\ngroup\nhosts\npasswd\nresolv.conf\n"


async def test_what_it_had_not_synced_dies_with_it(sim_world: SimWorld) -> None:
    vms = machines(sim_world)
    machine = await vms.booted()
    await machine.exec("sh", "-c", "echo one > /one; sync; echo two > /two")
    await kill(machine)
    assert await read_again(vms, "sh", "-c", "cat /one; cat /two") == b"one\n"


async def test_what_it_has_written_back_by_itself_lives(sim_world: SimWorld) -> None:
    vms = machines(sim_world)
    machine = await vms.booted()
    await machine.exec("sh", "-c", "echo one > /one")
    await asyncio.sleep(6)
    await kill(machine)
    assert await read_again(vms, "cat", "/one") == b"one\n"


@pytest.mark.parametrize("keeps_unsynced", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_power_cut_takes_what_was_not_synced_and_nothing_else(seed: int, keeps_unsynced: bool) -> None:
    async def scenario(sim: SimWorld) -> None:
        vms = machines(sim)
        machine = await vms.booted()
        sim.disk.view.root.inode.sync_below()
        sim.disk.faults.keeps_unsynced = keeps_unsynced
        await machine.exec("sh", "-c", "echo one > /one; sync; echo two > /two")
        boot_id = sim.world.processes.boot_id()
        sim.power_cut()
        assert sim.world.processes.boot_id() != boot_id
        assert [each.argv[0] for each in sim.machine.table.live() if each.pid_namespace is not None] == []
        for name in sim.machine.view.node("/vms/vm1").list_names():
            if name != "upper.img":
                sim.machine.view.remove(f"/vms/vm1/{name}")
        assert await read_again(vms, "sh", "-c", "cat /one; cat /two 2>/dev/null") == b"one\n"

    sim = make_sim_world(seed)
    try:
        sim.run(scenario(sim))
    finally:
        sim.close()


@pytest.mark.row("V6")
async def test_clones_of_a_template_are_told_apart(sim_world: SimWorld) -> None:
    vms = machines(sim_world)
    await template(vms)
    started = sim_world.loop.time()
    clones = [await clone(vms, f"c{number}", f"{number:02d}" * 32) for number in range(3)]
    assert (sim_world.loop.time() - started) / 3 < 0.5
    said = [[(await each.exec(*command)).stdout for each in clones] for command in (("hostname",), ("head", "-c", "8", "/dev/urandom"))]
    assert said[0] == [b"c0\n", b"c1\n", b"c2\n"]
    assert len(set(said[1])) == 3
    assert {(await each.client.ready(1)).boot_id for each in clones} == {(await clones[0].client.ready(1)).boot_id}
    await clones[0].exec("sh", "-c", "echo mine > /mine; sync")
    assert (await clones[1].exec("cat", "/mine")).exit_code == 1
    for each in clones:
        assert (await each.run("true")).exit_code == 0
        assert (await each.end()).kind == "command"


async def test_clones_that_get_the_same_entropy_are_alike(sim_world: SimWorld) -> None:
    """The fault that fresh entropy is for: without it the guests of a template draw the same numbers."""
    vms = machines(sim_world)
    await template(vms)
    clones = [await clone(vms, f"c{number}", "77" * 32) for number in range(2)]
    said = [(await each.exec("head", "-c", "8", "/dev/urandom")).stdout for each in clones]
    assert said[0] == said[1]


async def test_a_clone_has_the_time_it_is_told(sim_world: SimWorld) -> None:
    vms = machines(sim_world)
    await template(vms)
    await asyncio.sleep(86_400)
    machine = await clone(vms, "late", "00" * 32)
    now = int((await machine.exec("date", "+%s")).stdout)
    assert abs(now - sim_world.world.clock.now_ns() // 10**9) <= 1


@pytest.mark.row("V6")
async def test_a_running_machine_goes_on_from_its_snapshot(sim_world: SimWorld) -> None:
    vms = machines(sim_world)
    machine = await vms.booted()
    attached = await machine.start("sh", "-c", "sleep 1000; exit 4")
    await machine.exec("sh", "-c", "echo unsynced > /file")
    await save(machine)
    upper = f"{machine.folder}/upper.img"
    await copy_sparse(sim_world.world, upper, "/vms/template/upper.img")
    await kill(machine)
    attached.close()
    again = await vms.launch("vm1", restore_from="/vms/template")
    control = await again.control()
    await control.boot()
    control.close()
    await again.client.ready(60)
    assert (await again.client.status()).main == "running"
    renewed: dict[str, Any] = {"hostname": "newer", "time_ns": 1, "entropy": "00", "network": None, "hosts": "h\n", "resolv": "r\n"}
    await again.client.request("renew", **renewed)
    assert (await again.exec("sh", "-c", "cat /file; hostname; cat /etc/hosts")).stdout == b"unsynced\nnewer\nh\n"
    follower = await again.client.attach(stdin=False)
    assert await follower.exit_code() == 4
    follower.close()
    assert (await again.end()).code == 4


@pytest.mark.row("V6")
@pytest.mark.parametrize("where", ["head", "memory"])
async def test_a_damaged_template_is_refused_or_a_guest_that_says_nothing(sim_world: SimWorld, where: str) -> None:
    vms = machines(sim_world)
    await template(vms)
    if where == "head":
        sim_world.disk.faults.bit_rot("/vms/template/state", n_bits=3)
    else:
        sim_world.disk.faults.bit_rot(MEMORY, n_bits=3, offset=MIB + 8, n_bytes=64)
    machine = await vms.launch("bad", memory_file=MEMORY, restore_from="/vms/template", settings={"boot_timeout_s": 10.0})
    control = await machine.control()
    await control.boot()
    control.close()
    with pytest.raises(RuntimeFailed):
        await machine.client.ready(60)
    end = await machine.end()
    assert end.kind == ("vmm_failed" if where == "head" else "boot_timeout")
    assert where == "memory" or "load of migration failed" in end.why


async def test_a_snapshot_of_another_machine_is_refused(sim_world: SimWorld) -> None:
    vms = machines(sim_world)
    machine = await vms.booted()
    await save(machine)
    other = await vms.launch("other", memory_mib=256, restore_from="/vms/template")
    control = await other.control()
    with pytest.raises(IsopodError):
        await control.boot()
    control.close()
    assert "Size mismatch" in (await other.end()).why or (await other.end()).kind == "vmm_failed"


@pytest.mark.parametrize("fault", ["migration_fails", "dies_migrating"])
async def test_a_snapshot_that_fails_leaves_none(sim_world: SimWorld, fault: str) -> None:
    sim_world.machine.vms.next(fault)  # type: ignore[arg-type]  # a name of the tuple above
    machine = await machines(sim_world).booted()
    with pytest.raises(RuntimeFailed):
        await save(machine)
    assert "state" not in await sim_world.world.disk.list("/vms/template")
    if fault == "migration_fails":
        control = await machine.control()
        await control.resume()
        control.close()
        await machine.client.request("hold", paused=False)
        assert (await machine.exec("echo", "lives")).stdout == b"lives\n"
    else:
        assert (await machine.end()).kind == "vmm_killed"


async def test_a_full_disk_is_a_snapshot_that_fails(sim_world: SimWorld) -> None:
    machine = await machines(sim_world).booted()
    sim_world.disk.faults.fail_next("write", path="/vms/template", number=28)
    with pytest.raises(RuntimeFailed):
        await save(machine)
    assert "state" not in await sim_world.world.disk.list("/vms/template")


def test_one_seed_one_history() -> None:
    def history(seed: int) -> Sequence[object]:
        seen: list[object] = []

        async def scenario(sim: SimWorld) -> None:
            vms = machines(sim)
            await template(vms)
            machine = await clone(vms, "c", "00" * 32)
            seen.append((await machine.run("sh", "-c", "head -c 8 /dev/urandom; exit 3")).stdout)
            seen.append((await machine.end()).kind)
            seen.append(sim.loop.elapsed_ns)

        sim = make_sim_world(seed)
        try:
            sim.loop.start_trace()
            sim.run(scenario(sim))
            return [*seen, sim.loop.trace_digest()]
        finally:
            sim.close()

    assert history(1) == history(1)
    assert history(1) != history(2)
