"""A whole node with virtual machines in the simulation, killed again and again at random instants while clients use it, each machine with a
chance of each fault. Run as a program it prints the digest of everything that happened. Argument: the seed."""

import asyncio
import random
import sys
from typing import Final

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.world.errors import IsopodError
from isopod.world.sim import SimWorld, make_sim_world
from isopod.world.sim.vm_faults import FAULTS
from tests.node.vms import VmRig, leftovers, sim_rig

FOLDER: Final = "/var/lib/rig"
N_ROUNDS: Final = 3
N_CLIENTS: Final = 5
FAULT_CHANCE: Final = 0.02


async def one_life(rig: VmRig, name: str, chance: random.Random) -> None:
    """Do one of the things that users do; the node may die meanwhile, and the machine too."""
    network = chance.choice(["none", "bridge"])
    kind = chance.randrange(6)
    try:
        if kind == 0:
            await rig.run("sh", "-c", "echo x; exit 3", name=name, network=network)
        elif kind == 1:
            await rig.run("true", name=name, auto_remove=True, network=network)
        else:
            await rig.run_detached("sleep", "1000", name=name, network=network)
        if kind == 3:
            await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name=name, timeout_s=0.01))
        elif kind == 4:
            await rig.exec(name, "echo", "hi")
            await rig.remove(name, force=True)
        elif kind == 5:
            await rig.client.call(methods.VM_SNAPSHOT, machines.VmSnapshotRequest(name=name))
            await rig.client.call(methods.CONTAINER_STOP, m.StopContainer(name=name, timeout_s=0.01))
            await rig.client.call(methods.VM_RESTORE, machines.VmSnapshotRequest(name=name))
    except (IsopodError, OSError):
        return  # what it left behind is looked at afterwards


async def one_round(rig: VmRig, number: int, chance: random.Random) -> None:
    """Let clients work, kill the node at some instant, start it again, and compare what it says with what is."""
    lives = [asyncio.ensure_future(one_life(rig, f"r{number}c{client}", chance)) for client in range(N_CLIENTS)]
    await asyncio.sleep(chance.random() * chance.choice([0.3, 3.0, 6.0]))
    await rig.kill()
    await asyncio.gather(*lives)
    await rig.start()
    for record in await rig.list():
        assert record.status in ("created", "running", "paused", "exited"), record
        assert record.status == "running" or record.pid is None or record.status == "paused", record


async def scenario(sim: SimWorld, *, faults: bool) -> None:
    """Run the rounds; at the end nothing may be left in the kernel, on the disk, or among the processes."""
    await sim.world.disk.make_directory(FOLDER)
    rig = sim_rig(sim, FOLDER)
    if faults:
        sim.machine.vms.rates = dict.fromkeys(FAULTS, FAULT_CHANCE)
    async with rig:
        for number in range(N_ROUNDS):
            await one_round(rig, number, sim.random.stream(f"round {number}"))
        await rig.empty()
    assert await leftovers(sim, rig) == []
    assert [process.argv for process in sim.machine.table.live()] == []


def digest(seed: int, *, faults: bool = True) -> str:
    """Run the scenario; return the digest of its events."""
    sim = make_sim_world(seed)
    try:
        sim.loop.start_trace()
        sim.run(scenario(sim, faults=faults))
        return sim.loop.trace_digest()
    finally:
        sim.close()


if __name__ == "__main__":
    sys.stdout.write(f"digest {digest(int(sys.argv[1]))}")
