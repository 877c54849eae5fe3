"""Control groups: reading the three layouts, and real groups of this machine."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from isopod.world.host import cgroups
from isopod.world.host.machine import parse_pressure
from isopod.world.host.mountinfo import parse
from isopod.world.world import World

PROC_CGROUPS = """#subsys_name	hierarchy	num_cgroups	enabled
cpuset	3	3	1
cpu	1	3	1
cpuacct	2	3	1
memory	4	21	1
net_cls	0	1	0
pids	8	3	1
"""
V1 = """24 1 0:22 / /sys rw - sysfs sysfs rw
31 24 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 31 0:31 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
35 31 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
"""
HYBRID = V1 + "36 31 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
V2 = "36 24 0:33 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"


def layout(mountinfo: str, controllers: str = "") -> cgroups.Layout:
    return cgroups.find_layout(parse(mountinfo), cgroups.parse_proc_cgroups(PROC_CGROUPS), controllers.split())


def test_v1_is_told_by_its_controllers() -> None:
    found = layout(V1)
    assert (found.mode, found.controllers) == ("v1", ("cpu", "memory", "pids"))
    assert found.mount_of("cpuacct") == "/sys/fs/cgroup/cpu,cpuacct"
    assert found.mount_of("blkio") is None
    assert found.hierarchies() == tuple(f"/sys/fs/cgroup/{name}" for name in ("cpu,cpuacct", "memory", "pids", "systemd"))
    assert "no cgroup2 hierarchy" in found.why


def test_hybrid_is_v1_beside_a_unified_hierarchy() -> None:
    found = layout(HYBRID, "hugetlb")
    assert (found.mode, found.controllers) == ("hybrid", ("cpu", "memory", "pids"))
    assert found.unified == "/sys/fs/cgroup/unified"
    assert "/sys/fs/cgroup/unified" in found.hierarchies()
    assert "beside a cgroup2 hierarchy at /sys/fs/cgroup/unified" in found.why


def test_v2_is_one_hierarchy_whatever_the_kernel_could_do() -> None:
    found = layout(V2, "cpuset cpu io memory hugetlb pids rdma misc")
    assert (found.mode, found.controllers) == ("v2", ("cpu", "cpuset", "hugetlb", "io", "memory", "pids"))
    assert found.hierarchies() == ("/sys/fs/cgroup",)


def test_v2_with_only_systemd_s_own_v1_hierarchy_is_not_hybrid() -> None:
    named = "35 31 0:32 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
    assert layout(V2 + named, "memory").mode == "v2"


def test_nothing_mounted_is_said() -> None:
    found = layout("24 1 0:22 / /sys rw - sysfs sysfs rw\n")
    assert (found.mode, found.controllers, found.hierarchies()) == ("v1", (), ())
    assert "no cgroup file system" in found.why


def test_counters_are_found_by_their_whole_key() -> None:
    assert cgroups.parse_counter("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "oom_kill") == 3
    assert cgroups.parse_counter("low 0\noom 5\noom_kill 2\noom_group_kill 0\n", "oom_kill") == 2
    assert cgroups.parse_counter("usage_usec 12\nuser_usec 9\n", "usage_usec") == 12
    assert cgroups.parse_counter("", "oom_kill") is None


def test_pressure_is_read_by_name() -> None:
    text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=12\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=3\n"
    assert parse_pressure("io", text) == {
        "io_some_avg10": 1.5,
        "io_some_avg60": 0.25,
        "io_some_avg300": 0.0,
        "io_full_avg10": 0.5,
        "io_full_avg60": 0.0,
        "io_full_avg300": 0.0,
    }


@pytest.mark.parametrize("cgroup", ["", "/", "/.", "//", "/..", "/../other", "/a/../.."])
def test_the_root_is_no_group(cgroup: str) -> None:
    """Asked of the pure function, not of kill_cgroup: a failure must not end every process of the machine."""
    with pytest.raises(OSError, match="below the root"):
        cgroups.group_folder("/sys/fs/cgroup/memory", cgroup)


def test_a_group_s_folder_is_below_its_hierarchy() -> None:
    assert cgroups.group_folder("/sys/fs/cgroup/memory", "/isopod-x/ID") == "/sys/fs/cgroup/memory/isopod-x/ID"
    assert cgroups.group_folder("/sys/fs/cgroup", "isopod-x/a/../b/") == "/sys/fs/cgroup/isopod-x/b"


@asynccontextmanager
async def real_group(*below: str) -> AsyncIterator[str]:
    """Make a group with children in every hierarchy, and remove what the test left of it."""
    name = f"/isopod-test-{secrets.token_hex(4)}"
    hierarchies = cgroups.read_layout().hierarchies()
    for hierarchy in hierarchies:
        for path in ("", *below):
            os.makedirs(f"{hierarchy}{name}{path}", exist_ok=True)
    try:
        yield name
    finally:
        found = cgroups.read_layout()
        await cgroups.kill(found, name)
        await cgroups.delete(found, name)


def enter(pid: int, cgroup: str) -> None:
    """Move a process into a group of every hierarchy that limits something."""
    found = cgroups.read_layout()
    for hierarchy in [found.unified or ""] if found.mode == "v2" else [mount for _, mount in found.v1]:
        folder = hierarchy
        for name in cgroup.strip("/").split("/"):
            if found.mode != "v2":
                inherit_cpuset(folder, f"{folder}/{name}")
            folder = f"{folder}/{name}"
        with open(f"{folder}/cgroup.procs", "w", encoding="ascii") as file:
            file.write(str(pid))


def inherit_cpuset(parent: str, child: str) -> None:
    """Give a v1 cpuset what its parent has: it takes no process before."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if os.path.exists(f"{parent}/{name}"):
            with open(f"{parent}/{name}", encoding="ascii") as source:
                words = source.read()
            with open(f"{child}/{name}", "w", encoding="ascii") as file:
                file.write(words)


@pytest.mark.host
async def test_a_real_group_is_measured_killed_and_deleted(host_world: World) -> None:
    async with real_group("/child", "/child/grandchild") as name:
        children = [await host_world.processes.spawn(["/bin/sleep", "300"], env={}) for _ in range(3)]
        enter(children[0].identity.pid, name)
        enter(children[1].identity.pid, f"{name}/child")
        enter(children[2].identity.pid, f"{name}/child/grandchild")
        used = host_world.kernel.cgroup_usage(name)
        assert used.n_pids == 3
        assert used.n_oom_kills == 0
        assert used.memory_bytes is not None
        assert used.cpu_usage_ns is not None
        figures = host_world.kernel.cgroup_figures(name, children[0].identity.pid)
        assert figures.n_oom_kills == 0
        assert sorted(each.name for each in figures.interfaces) == sorted(name for name in os.listdir("/sys/class/net") if name != "lo")
        assert (await host_world.kernel.inventory(name[1:], [])).cgroups == (name, f"{name}/child", f"{name}/child/grandchild")
        await host_world.kernel.kill_cgroup(name)
        assert await asyncio.gather(*(child.wait() for child in children)) == [-9, -9, -9]
        await host_world.kernel.delete_cgroup(name)
        await host_world.kernel.delete_cgroup(name)
        assert (await host_world.kernel.inventory(name[1:], [])).cgroups == ()
        assert host_world.kernel.cgroup_usage(name) == (None, None, None, None)


@pytest.mark.host
async def test_a_group_with_a_process_is_not_deleted(host_world: World) -> None:
    async with real_group() as name:
        child = await host_world.processes.spawn(["/bin/sleep", "300"], env={})
        enter(child.identity.pid, name)
        with pytest.raises(OSError, match="busy"):
            await host_world.kernel.delete_cgroup(name)
        await host_world.kernel.kill_cgroup(name)
        assert await child.wait() == -9
        await host_world.kernel.delete_cgroup(name)
