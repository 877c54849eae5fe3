"""The simulated kernel: its objects, its errors, and its inventory."""

import errno
from collections.abc import Awaitable

import pytest

from isopod.world.sim import SimWorld


async def refused(attempt: Awaitable[object]) -> int | None:
    """Return the errno that a call fails with."""
    with pytest.raises(OSError) as caught:
        await attempt
    return caught.value.errno


async def test_preparing_and_releasing_are_idempotent(sim_world: SimWorld) -> None:
    kernel = sim_world.world.kernel
    for _ in range(2):
        await kernel.prepare("/run/pin")
    assert await sim_world.world.disk.stat("/run/pin") is not None
    for _ in range(2):
        await kernel.release("/run/pin")
    assert await sim_world.world.disk.stat("/run/pin") is None


async def test_namespaces_live_while_pinned_or_used(sim_world: SimWorld) -> None:
    kernel = sim_world.world.kernel
    await kernel.create_bridge("x0", "10.1.0.1/24")
    await kernel.create_namespace("/run/ns")
    assert await refused(kernel.create_namespace("/run/ns")) == errno.EEXIST
    assert await refused(kernel.create_namespace("/run/absent/ns")) == errno.ENOENT
    await kernel.create_veth("xveth", bridge="x0", namespace="/run/ns")
    namespace = sim_world.kernel.namespace_at("/run/ns")
    namespace.n_processes += 1
    await kernel.delete_namespace("/run/ns")
    await kernel.delete_namespace("/run/ns")
    assert "xveth" in (await kernel.inventory("x", [])).links
    namespace.leave()
    assert (await kernel.inventory("x", [])).links == ("x0",)


async def test_links_have_the_errors_of_netlink(sim_world: SimWorld) -> None:
    kernel = sim_world.world.kernel
    await kernel.create_bridge("x0", "10.1.0.1/24")
    await kernel.create_bridge("x0", "10.1.0.1/24")
    await kernel.create_namespace("/run/ns")
    await kernel.create_veth("xveth", bridge="x0", namespace="/run/ns")
    assert await refused(kernel.create_veth("xveth", bridge="x0", namespace="/run/ns", guest_name="eth1")) == errno.EEXIST
    assert await refused(kernel.create_veth("xveth2", bridge="x0", namespace="/run/ns")) == errno.EEXIST
    assert await refused(kernel.create_veth("xveth2", bridge="absent", namespace="/run/ns")) == errno.ENODEV
    assert await refused(kernel.create_veth("xveth2", bridge="x0", namespace="/run/absent")) == errno.ENOENT
    assert await refused(kernel.create_bridge("a-name-far-too-long", "10.2.0.1/24")) == errno.ERANGE
    assert await refused(kernel.configure_link("/run/ns", "eth9", address="10.1.0.2/24", gateway="10.1.0.1")) == errno.ENODEV
    assert await refused(kernel.configure_link("/run/ns", "eth0", address="10.1.0.2/24", gateway="10.9.0.1")) == errno.ENETUNREACH
    mac = await kernel.configure_link("/run/ns", "eth0", address="10.1.0.2/24", gateway="10.1.0.1")
    assert len(mac.split(":")) == 6
    assert "10.1.0.0/24" in await kernel.routes()
    await kernel.delete_link("xveth")
    await kernel.delete_link("xveth")
    assert await refused(kernel.configure_link("/run/ns", "eth0", address="10.1.0.2/24", gateway="10.1.0.1")) == errno.ENODEV


async def test_filter_scripts_apply_as_a_whole(sim_world: SimWorld) -> None:
    kernel, filters = sim_world.world.kernel, sim_world.kernel.filters
    await kernel.apply_filter("add table inet x\ndelete table inet x\ntable inet x {\n\tmap published {\n\t\ttype a : b\n\t}\n}\n")
    assert "map published" in filters.tables["inet x"]
    assert await refused(kernel.apply_filter("table inet y {\n}\ndelete table inet absent\n")) == errno.ENOENT
    assert await refused(kernel.apply_filter("table inet y {\n")) == errno.EINVAL
    assert await refused(kernel.apply_filter("nonsense")) == errno.EINVAL
    assert list(filters.tables) == ["inet x"]
    await kernel.apply_filter("add element inet x published { 1 : 2 }")
    assert filters.elements("inet x", "published") == {"1": "2"}
    assert await refused(kernel.apply_filter("add element inet x published { 1 : 3 }")) == errno.EEXIST
    assert await refused(kernel.apply_filter("delete element inet x published { 1, 2 }")) == errno.ENOENT
    assert filters.elements("inet x", "published") == {"1": "2"}
    await kernel.apply_filter(
        "delete element inet x published { 1 }\nadd element inet x published { 1 : 3, 02:00:00:00:00:01 . 4 : 5 . 6 }"
    )
    assert filters.elements("inet x", "published") == {"1": "3", "02:00:00:00:00:01 . 4": "5 . 6"}
    await kernel.delete_table("x")
    await kernel.delete_table("x")
    assert filters.tables == {}


async def test_groups_with_processes_are_busy_until_killed(sim_world: SimWorld) -> None:
    kernel, table = sim_world.world.kernel, sim_world.machine.table
    group = sim_world.kernel.make_group("/x/one")
    process = table.add(["thing"], {}, "/")
    group.join(process)
    table.charge_memory(process, 4096)
    assert kernel.cgroup_usage("/x").memory_bytes == 4096
    assert kernel.cgroup_usage("/x/one").n_pids == 1
    assert kernel.cgroup_usage("/absent").n_pids is None
    assert await refused(kernel.delete_cgroup("/x")) == errno.EBUSY
    await kernel.kill_cgroup("/x")
    assert process.status == -9
    assert kernel.cgroup_usage("/x").memory_bytes == 0
    await kernel.delete_cgroup("/x")
    await kernel.delete_cgroup("/x")
    assert kernel.cgroup_usage("/x/one").n_pids is None


async def test_a_frozen_group_cannot_be_emptied(sim_world: SimWorld) -> None:
    kernel, table = sim_world.world.kernel, sim_world.machine.table
    group = sim_world.kernel.make_group("/x")
    process = table.add(["thing"], {}, "/")
    group.join(process)
    sim_world.kernel.freeze(group, frozen=True)
    assert await refused(kernel.kill_cgroup("/x")) == errno.EBUSY
    sim_world.kernel.freeze(group, frozen=False)
    assert process.status == -9


async def test_the_inventory_lists_an_instance_and_nothing_else(sim_world: SimWorld) -> None:
    kernel, disk = sim_world.world.kernel, sim_world.world.disk
    for folder in ("/l", "/u", "/w", "/run/x/m", "/run/y"):
        await disk.make_directory(folder)
    await kernel.mount_overlay("/run/x/m", lowers=["/l"], upper="/u", work="/w")
    await kernel.mount_tmpfs("/run/y", n_bytes=4096)
    await kernel.create_namespace("/run/x/ns")
    for prefix in ("x", "y"):
        await kernel.create_bridge(f"{prefix}0", "10.1.0.1/24")
        await kernel.apply_filter(f"table inet {prefix}t {{\n}}")
        sim_world.kernel.make_group(f"/{prefix}/one")
    found = await kernel.inventory("x", ["/run/x"])
    assert found == (("/run/x/m",), ("/run/x/ns",), ("x0",), ("/x", "/x/one"), ("xt",))
    await kernel.unmount("/run/x")
    assert (await kernel.inventory("x", ["/run/x"])).mounts == ()
