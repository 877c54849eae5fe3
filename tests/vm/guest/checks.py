"""What is to be seen on a machine with nothing but cgroup v2. Runs inside the guest: pytest collects it by its name only.

Starting a node takes seconds there, so what can be looked at side by side is.
"""

import asyncio
import os
from collections.abc import Iterator
from typing import Final

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.api import usage as u
from isopod.world.world import World
from tests.node.rig import HostBackend, Rig

TOP: Final = "/sys/fs/cgroup"
MIB: Final = 1 << 20
DEADLINE_S: Final = 60.0
pytestmark = pytest.mark.host


@pytest.fixture
def rig(host_world: World, folder: str) -> Iterator[Rig]:
    """A node that is not started yet. After it, nothing of it may be left in the one hierarchy."""
    yield Rig(HostBackend(host_world, folder), "isopodtv")
    assert [name for name in os.listdir(TOP) if name.startswith("isopodtv")] == []


async def test_limits_are_the_kernel_s_own_files_and_can_be_changed(rig: Rig) -> None:
    async with rig:
        info = await rig.client.call(methods.SYSTEM_INFO, m.Empty())
        assert info.cgroup_mode.value == "v2"
        assert f"one cgroup2 hierarchy at {TOP}" in info.cgroup_mode.why
        assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(rig.world.kernel.cgroup_facts().controllers)

        wanted = m.Resources(memory_bytes_max=64 * MIB, cpus=0.5, pids_max=20)
        record = await rig.run_detached("sleep", "1000", name="box", resources=wanted)
        assert record.resources == wanted
        cgroup = f"/{rig.config.prefix}/{record.id}"
        assert (read(cgroup, "memory.max"), read(cgroup, "memory.swap.max")) == (str(64 * MIB), "0")
        assert (read(cgroup, "cpu.max"), read(cgroup, "pids.max")) == ("50000 100000", "20")
        assert str(record.pid) in read(cgroup, "cgroup.procs").split()
        # The runtime enables what it needs on the way: nobody had done it before.
        for above in ("", f"/{rig.config.prefix}"):
            assert {"cpu", "memory", "pids"} <= set(read(above, "cgroup.subtree_control").split())

        seen = "cat /proc/self/cgroup; cat /sys/fs/cgroup/memory.max; grep ' /sys/fs/cgroup ' /proc/mounts"
        inside = await rig.exec("box", "sh", "-c", f"{seen}; echo max > /sys/fs/cgroup/memory.max")
        own, limit, mount = inside.stdout.decode().splitlines()
        assert (own, limit) == ("0::/", str(64 * MIB))
        assert mount.split()[2] == "cgroup2"
        assert "ro" in mount.split()[3].split(",")
        assert b"Read-only" in inside.stderr

        await rig.client.call(methods.CONTAINER_UPDATE, m.UpdateContainer(name="box", memory_bytes_max=48 * MIB, cpus=0.25, pids_max=10))
        assert (read(cgroup, "memory.max"), read(cgroup, "memory.swap.max")) == (str(48 * MIB), "0")
        assert (read(cgroup, "cpu.max"), read(cgroup, "pids.max")) == ("25000 100000", "10")


async def test_a_group_s_use_is_measured_before_and_after_the_node_s_death(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="survivor", resources=m.Resources(memory_bytes_max=64 * MIB))
        cgroup = f"/{rig.config.prefix}/{record.id}"
        await rig.kill()
        await rig.start()
        again = await rig.inspect("survivor")
        assert (again.status, again.pid) == ("running", record.pid)
        (used,) = (await rig.client.call(methods.CONTAINER_STATS, u.StatsRequest(names=("survivor",)))).containers
        assert (used.n_pids, used.memory_bytes_max) == (1, 64 * MIB)
        assert used.memory_bytes is not None
        assert 0 < used.memory_bytes < 64 * MIB
        assert used.cpu_ns is not None
        assert used.cpu_ns > 0
        assert rig.world.kernel.cgroup_usage(cgroup).n_oom_kills == 0
        assert (await rig.exec("survivor", "echo", "still")).stdout == b"still\n"
        await rig.remove("survivor", force=True)
        assert (await rig.world.kernel.inventory(rig.config.prefix, [])).cgroups == (f"/{rig.config.prefix}",)
        assert rig.world.kernel.cgroup_usage(cgroup) == (None, None, None, None)


async def test_kills_are_counted_and_a_group_ends_by_one(rig: Rig) -> None:
    rig.flags["--runtime"] = "runc"  # the other tests have crun
    async with rig:
        hog = "dd if=/dev/zero of=/dev/null bs=100M count=1; for i in $(seq 8); do sleep 1000 & done; wait"
        record = await rig.run_detached("sh", "-c", hog, resources=m.Resources(memory_bytes_max=32 * MIB))
        cgroup = f"/{rig.config.prefix}/{record.id}"
        async with asyncio.timeout(DEADLINE_S):
            while not rig.world.kernel.cgroup_usage(cgroup).n_oom_kills:
                await asyncio.sleep(0.05)  # the kernel tells nobody outside the group; the deadline bounds the asking
            while len(pids := read(cgroup, "cgroup.procs").split()) < 9:
                await asyncio.sleep(0.05)  # until the shell has started them all
        assert (await rig.inspect(record.name)).status == "running", "the kill ended one process only"
        assert "cgroup.kill" in os.listdir(TOP + cgroup)
        await rig.world.kernel.kill_cgroup(cgroup)
        assert [pid for pid in pids if rig.world.processes.identify(int(pid)) is not None] == []
        assert (await rig.wait(record.name)).exit_code == 137


def read(cgroup: str, name: str) -> str:
    """Return a file of a group."""
    with open(f"{TOP}{cgroup}/{name}", encoding="ascii") as file:
        return file.read().strip()
