"""What is to be seen on a machine with nothing but cgroup v2. Runs inside the guest: pytest collects it by its name only."""

import asyncio
import os
from collections.abc import Iterator
from typing import Final

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.world.world import World
from tests.node.rig import HostBackend, Rig

TOP: Final = "/sys/fs/cgroup"
MIB: Final = 1 << 20
OOM_DEADLINE_S: Final = 60.0
pytestmark = pytest.mark.host


@pytest.fixture
def rig(host_world: World, folder: str) -> Iterator[Rig]:
    """A node that is not started yet. After it, nothing of it may be left in the one hierarchy."""
    yield Rig(HostBackend(host_world, folder), "isopodtv")
    assert [name for name in os.listdir(TOP) if name.startswith("isopodtv")] == []


async def test_the_node_says_v2_and_what_it_can_limit(rig: Rig) -> None:
    async with rig:
        info = await rig.client.call(methods.SYSTEM_INFO, m.Empty())
        assert info.cgroup_mode.value == "v2"
        assert f"one cgroup2 hierarchy at {TOP}" in info.cgroup_mode.why
        assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(rig.world.kernel.cgroup_facts().controllers)


async def test_limits_are_the_kernel_s_own_files(rig: Rig) -> None:
    async with rig:
        wanted = m.Resources(memory_bytes_max=64 * MIB, cpus=0.5, pids_max=20)
        record = await rig.run_detached("sleep", "1000", resources=wanted)
        cgroup = f"/{rig.config.prefix}/{record.id}"
        assert (read(cgroup, "memory.max"), read(cgroup, "memory.swap.max")) == (str(64 * MIB), "0")
        assert (read(cgroup, "cpu.max"), read(cgroup, "pids.max")) == ("50000 100000", "20")
        assert str(record.pid) in read(cgroup, "cgroup.procs").split()
        # The runtime enables what it needs on the way: nobody had done it before.
        for above in ("", f"/{rig.config.prefix}"):
            assert {"cpu", "memory", "pids"} <= set(read(above, "cgroup.subtree_control").split())


async def test_a_group_s_use_is_measured_before_and_after_the_node_s_death(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sleep", "1000", name="survivor", resources=m.Resources(memory_bytes_max=64 * MIB))
        cgroup = f"/{rig.config.prefix}/{record.id}"
        await rig.kill()
        await rig.start()
        again = await rig.inspect("survivor")
        assert (again.status, again.pid) == ("running", record.pid)
        used = rig.world.kernel.cgroup_usage(cgroup)
        assert (used.n_pids, used.n_oom_kills) == (1, 0)
        assert used.memory_bytes is not None
        assert 0 < used.memory_bytes < 64 * MIB
        assert used.cpu_usage_ns is not None
        assert used.cpu_usage_ns > 0
        await rig.remove("survivor", force=True)
        assert (await rig.world.kernel.inventory(rig.config.prefix, [])).cgroups == (f"/{rig.config.prefix}",)
        assert rig.world.kernel.cgroup_usage(cgroup) == (None, None, None, None)


async def test_a_kill_by_the_kernel_is_counted_while_the_container_lives_on(rig: Rig) -> None:
    async with rig:
        hog = "awk 'BEGIN { for (i = 0; i < 4000000; i++) a[i] = i }'; sleep 1000"
        record = await rig.run_detached("sh", "-c", hog, resources=m.Resources(memory_bytes_max=32 * MIB))
        cgroup = f"/{rig.config.prefix}/{record.id}"
        async with asyncio.timeout(OOM_DEADLINE_S):
            while not rig.world.kernel.cgroup_usage(cgroup).n_oom_kills:
                await asyncio.sleep(0.05)  # the kernel tells nobody outside the group; the deadline bounds the asking
        assert (await rig.inspect(record.name)).status == "running"


async def test_a_container_sees_its_own_group_and_cannot_change_it(rig: Rig) -> None:
    async with rig:
        reads = "cat /proc/self/cgroup; cat /sys/fs/cgroup/memory.max; grep ' /sys/fs/cgroup ' /proc/mounts"
        script = f"{reads}; echo max > /sys/fs/cgroup/memory.max"
        ran = await rig.run("sh", "-c", script, resources=m.Resources(memory_bytes_max=64 * MIB))
        own, limit, mount = ran.stdout.decode().splitlines()
        assert (own, limit) == ("0::/", str(64 * MIB))
        assert mount.split()[2] == "cgroup2"
        assert "ro" in mount.split()[3].split(",")
        assert b"Read-only" in ran.stderr


async def test_the_processes_of_a_group_end_by_one_kill(rig: Rig) -> None:
    async with rig:
        record = await rig.run_detached("sh", "-c", "for i in $(seq 8); do sleep 1000 & done; wait")
        cgroup = f"/{rig.config.prefix}/{record.id}"
        assert "cgroup.kill" in os.listdir(TOP + cgroup)
        async with asyncio.timeout(OOM_DEADLINE_S):
            while len(pids := read(cgroup, "cgroup.procs").split()) < 9:
                await asyncio.sleep(0.05)  # until the shell has started them all
        await rig.world.kernel.kill_cgroup(cgroup)
        assert [pid for pid in pids if rig.world.processes.identify(int(pid)) is not None] == []
        assert (await rig.wait(record.name)).exit_code == 137


def read(cgroup: str, name: str) -> str:
    """Return a file of a group."""
    with open(f"{TOP}{cgroup}/{name}", encoding="ascii") as file:
        return file.read().strip()
