"""Limits of control groups: on a folder tree that looks like v2, on v1 as this machine has it, and on what has no controller."""

import asyncio
import errno
import os
import secrets
import sys
from pathlib import Path

import pytest

from isopod.world.host import cgroup_limits
from isopod.world.host.cgroup_limits import Limits
from isopod.world.host.cgroups import Layout
from isopod.world.world import World

MIB = 1 << 20


@pytest.fixture
def v2(tmp_path: Path) -> Layout:
    """A folder that looks like the root of a v2 hierarchy. What the kernel would put into a new group is not there: see `grown`."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids rdma\n")
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    return Layout("v2", (), str(tmp_path), ("cpu", "cpuset", "hugetlb", "io", "memory", "pids"), "")


def grown(folder: Path) -> None:
    """Put what the kernel would into a group's folder."""
    folder.mkdir(exist_ok=True)
    (folder / "cgroup.controllers").write_text("cpu io memory pids\n")
    for name in ("cgroup.subtree_control", "memory.max", "memory.swap.max", "cpu.max", "pids.max", "cgroup.procs"):
        (folder / name).write_text("")


def test_on_v2_controllers_are_handed_down_and_limits_set(v2: Layout, tmp_path: Path) -> None:
    grown(tmp_path / "isopod-x")
    grown(tmp_path / "isopod-x" / "ID")
    found = cgroup_limits.create(v2, "/isopod-x/ID", Limits(1.5, 64 * MIB, 100))
    assert found == (f"{tmp_path}/isopod-x/ID/cgroup.procs",)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +io +pids"  # memory was handed down already
    assert (tmp_path / "isopod-x" / "cgroup.subtree_control").read_text() == "+cpu +io +memory +pids"
    group = tmp_path / "isopod-x" / "ID"
    assert (group / "cgroup.subtree_control").read_text() == ""  # a group with processes hands nothing down
    assert (group / "cpu.max").read_text() == "150000 100000"
    assert (group / "memory.max").read_text() == str(64 * MIB)
    assert (group / "memory.swap.max").read_text() == "0"
    assert (group / "pids.max").read_text() == "100"
    cgroup_limits.create(v2, "/isopod-x/ID", Limits())
    assert [(group / name).read_text() for name in ("cpu.max", "memory.max", "memory.swap.max", "pids.max")] == [
        "max 100000",
        "max",
        "max",
        "max",
    ]


def test_a_failure_on_v2_leaves_no_group(v2: Layout, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="controllers"):  # a new folder has no cgroup.controllers here
        cgroup_limits.create(v2, "/isopod-x/ID", Limits(1.5, 64 * MIB, 100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cgroup.controllers", "cgroup.subtree_control"]


@pytest.mark.parametrize("limits", [Limits(cpus=1), Limits(memory_bytes_max=MIB), Limits(pids_max=1)])
@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_a_limit_that_nothing_can_keep_is_refused(mode: str, limits: Limits, tmp_path: Path) -> None:
    layout = Layout("v2" if mode == "v2" else "v1", (), str(tmp_path) if mode == "v2" else None, (), "")
    with pytest.raises(OSError, match="controller is not mounted") as failure:
        cgroup_limits.create(layout, "/isopod-x", limits)
    assert failure.value.errno == errno.EOPNOTSUPP
    assert list(tmp_path.iterdir()) == []


def test_the_root_is_no_group_to_make(v2: Layout) -> None:
    with pytest.raises(OSError, match="below the root"):
        cgroup_limits.create(v2, "/a/..", Limits())


@pytest.mark.host
async def test_a_process_that_writes_itself_in_is_limited_and_killed(host_world: World) -> None:
    kernel, name = host_world.kernel, f"/isopod-test-{secrets.token_hex(4)}"
    try:
        files = await kernel.create_cgroup(f"{name}/one", cpus=0.5, memory_bytes_max=32 * MIB, pids_max=3)
        await kernel.create_cgroup(f"{name}/one", cpus=0.25, memory_bytes_max=64 * MIB, pids_max=2)  # up and down again
        await kernel.create_cgroup(f"{name}/one", cpus=0.5, memory_bytes_max=32 * MIB, pids_max=2)
        assert files and all(os.path.exists(file) for file in files)
        joins = "".join(f"echo $$ > {file}; " for file in files)
        # What is beyond the limit of processes cannot be forked; what is beyond that of memory is killed.
        child = await host_world.processes.spawn(["/bin/sh", "-c", f"{joins} exec sleep 300"], env={})
        async with asyncio.timeout(20):
            while kernel.cgroup_usage(f"{name}/one").n_pids != 1:
                await asyncio.sleep(0.01)
        forks = await host_world.processes.run(["/bin/sh", "-c", f"{joins} sleep 0 | sleep 0 | sleep 0"], timeout_s=20)
        assert b"fork" in forks.stderr.lower()
        await kernel.kill_cgroup(f"{name}/one")
        assert await child.wait() == -9
        hungry = f"{joins} exec {sys.executable} -c 'bytearray(100 << 20)'"
        assert (await host_world.processes.run(["/bin/sh", "-c", hungry], timeout_s=20)).returncode == -9
        used = kernel.cgroup_usage(f"{name}/one")
        assert used.n_oom_kills
        assert used.cpu_usage_ns
    finally:
        await kernel.kill_cgroup(name)
        await kernel.delete_cgroup(name)
    assert (await kernel.inventory(name[1:], [])).cgroups == ()
