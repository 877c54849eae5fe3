"""What the Kernel port promises, as bodies that run on either World. On the host they run enclosed: see tests/world/host/enclosed.py."""

import errno
from collections.abc import Awaitable, Callable
from typing import Final

from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

PREFIX: Final = "isopod-t"


async def overlay_shows_layers_and_keeps_changes_above(world: World, folder: str) -> None:
    for name in ("low", "top", "upper", "work", "merged"):
        await world.disk.make_directory(f"{folder}/{name}", mode=0o755)
    await world.disk.write(f"{folder}/low/a", b"low")
    await world.disk.write(f"{folder}/low/b", b"low")
    await world.disk.write(f"{folder}/top/b", b"top")
    assert world.kernel.overlay_supported()
    await world.kernel.mount_overlay(
        f"{folder}/merged", lowers=[f"{folder}/top", f"{folder}/low"], upper=f"{folder}/upper", work=f"{folder}/work"
    )
    assert (await world.kernel.inventory(PREFIX, [folder])).mounts == (f"{folder}/merged",)
    assert await world.disk.read(f"{folder}/merged/a") == b"low"
    assert await world.disk.read(f"{folder}/merged/b") == b"top"
    await world.disk.write(f"{folder}/merged/c", b"new")
    await world.kernel.unmount(f"{folder}/merged")
    assert await world.disk.list(f"{folder}/merged") == []
    assert await world.disk.read(f"{folder}/upper/c") == b"new"
    assert await world.disk.list(f"{folder}/low") == ["a", "b"]
    assert (await world.kernel.inventory(PREFIX, [folder])).mounts == ()


async def unmount_takes_all_below_and_nothing_is_fine(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/m")
    await world.disk.make_directory(f"{folder}/m2")
    await world.kernel.mount_tmpfs(f"{folder}/m", n_bytes=1 << 20)
    await world.kernel.mount_tmpfs(f"{folder}/m2", n_bytes=1 << 20)
    await world.disk.make_directory(f"{folder}/m/inner")
    await world.kernel.mount_tmpfs(f"{folder}/m/inner", n_bytes=1 << 20)
    await world.disk.write(f"{folder}/m/inner/file", b"x")
    assert len((await world.kernel.inventory(PREFIX, [folder])).mounts) == 3
    await world.kernel.unmount(f"{folder}/m")
    assert (await world.kernel.inventory(PREFIX, [folder])).mounts == (f"{folder}/m2",)
    await world.kernel.unmount(f"{folder}/m")
    await world.kernel.unmount(f"{folder}/m2")
    assert (await world.kernel.inventory(PREFIX, [folder])).mounts == ()


async def a_mounted_tree_is_not_removed(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/tree/m")
    await world.kernel.mount_tmpfs(f"{folder}/tree/m", n_bytes=1 << 20)
    await world.disk.write(f"{folder}/tree/m/precious", b"x")
    try:
        await world.disk.remove_tree(f"{folder}/tree")
    except OSError as error:
        assert error.errno == errno.EBUSY
    else:
        raise AssertionError("the tree was removed across a mount")
    assert await world.disk.read(f"{folder}/tree/m/precious") == b"x"
    await world.kernel.unmount(f"{folder}/tree/m")
    await world.disk.remove_tree(f"{folder}/tree")


async def a_namespace_gets_its_link_and_takes_it_along(world: World, folder: str) -> None:
    kernel = world.kernel
    await kernel.create_bridge(f"{PREFIX}br", "10.199.7.1/24")
    await kernel.create_bridge(f"{PREFIX}br", "10.199.7.1/24")
    await kernel.create_namespace(f"{folder}/net")
    await kernel.create_veth(f"{PREFIX}v1", bridge=f"{PREFIX}br", namespace=f"{folder}/net")
    mac = await kernel.configure_link(f"{folder}/net", "eth0", address="10.199.7.2/24", gateway="10.199.7.1")
    assert len(mac) == 17
    assert mac.count(":") == 5
    assert "10.199.7.0/24" in await kernel.routes()
    found = await kernel.inventory(PREFIX, [folder])
    assert found.links == (f"{PREFIX}br", f"{PREFIX}v1")
    assert found.namespaces == (f"{folder}/net",)
    assert found.mounts == ()
    await kernel.delete_link(f"{PREFIX}v1")
    await kernel.delete_link(f"{PREFIX}v1")
    await kernel.delete_namespace(f"{folder}/net")
    await kernel.delete_namespace(f"{folder}/net")
    await kernel.delete_link(f"{PREFIX}br")
    found = await kernel.inventory(PREFIX, [folder])
    assert (found.links, found.namespaces) == ((), ())
    assert "10.199.7.0/24" not in await kernel.routes()
    assert await world.disk.stat(f"{folder}/net") is None


async def a_namespace_cannot_be_made_twice(world: World, folder: str) -> None:
    await world.kernel.create_namespace(f"{folder}/net")
    try:
        await world.kernel.create_namespace(f"{folder}/net")
    except FileExistsError:
        pass
    else:
        raise AssertionError("a second namespace was pinned over the first")
    await world.kernel.delete_namespace(f"{folder}/net")


async def the_namespace_of_nobody_and_our_own_are_not_pinned(world: World, folder: str) -> None:
    own = world.processes.identify(world.processes.own_pid())  # the simulation's test is no process of it
    later = ProcessIdentity(world.processes.own_pid(), (own.started_ticks if own is not None else 0) + 1)
    for process, number in ((own, errno.EINVAL), (later, errno.ESRCH)):
        if process is None:
            continue
        try:
            await world.kernel.pin_namespace(f"{folder}/net", pid=process.pid, started_ticks=process.started_ticks)
        except OSError as error:
            assert error.errno == number
        else:
            raise AssertionError("it was pinned")
        assert await world.disk.stat(f"{folder}/net") is None


async def a_table_is_applied_replaced_and_deleted(world: World, folder: str) -> None:
    table = f"{PREFIX}-nat"
    rules = "chain post {\n type nat hook postrouting priority srcnat\n ip saddr 10.199.7.0/24 masquerade\n }\n"
    await world.kernel.apply_filter(f"table inet {table} {{\n {rules}}}\n")
    assert (await world.kernel.inventory(PREFIX, [folder])).tables == (table,)
    await world.kernel.delete_table(table)
    await world.kernel.delete_table(table)
    assert (await world.kernel.inventory(PREFIX, [folder])).tables == ()


async def both_families_tables_are_listed_and_deleted(world: World, folder: str) -> None:
    table = f"{PREFIX}-both"
    for family in ("inet", "bridge"):
        await world.kernel.apply_filter(f'table {family} {table} {{\n set s {{\n type ifname\n elements = {{ "lo" }}\n }}\n}}\n')
    assert (await world.kernel.inventory(PREFIX, [folder])).tables == (f"bridge {table}", table)
    await world.kernel.delete_table(table)
    assert (await world.kernel.inventory(PREFIX, [folder])).tables == ()


async def a_tap_is_a_port_of_its_bridge_until_deleted(world: World, folder: str) -> None:
    kernel = world.kernel
    await kernel.create_bridge(f"{PREFIX}br", "10.199.7.1/24")
    await kernel.create_tap(f"{PREFIX}-t1", bridge=f"{PREFIX}br")
    for name, bridge, number in (
        (f"{PREFIX}-t1", f"{PREFIX}br", errno.EEXIST),
        (f"{PREFIX}-t2", "absent", errno.ENODEV),
        (f"{PREFIX}-t" + "x" * 9, f"{PREFIX}br", errno.ERANGE),
    ):
        assert await _refused(kernel.create_tap(name, bridge=bridge)) == number
    assert (await kernel.inventory(PREFIX, [folder])).links == (f"{PREFIX}-t1", f"{PREFIX}br")
    for rate in (1 << 20, 6 << 30, None, None):  # over 4 GiB/s: the kernel's short field is too small
        await kernel.limit_link(f"{PREFIX}-t1", bytes_per_s=rate)
    assert await _refused(kernel.limit_link("absent", bytes_per_s=1 << 20)) == errno.ENODEV
    await kernel.reflect_link(f"{PREFIX}-t1")
    assert await _refused(kernel.reflect_link("absent")) == errno.ENODEV
    assert await _refused(kernel.reflect_link("lo")) == errno.EOPNOTSUPP
    await kernel.delete_link(f"{PREFIX}-t1")
    await kernel.delete_link(f"{PREFIX}br")
    assert (await kernel.inventory(PREFIX, [folder])).links == ()


async def _refused(call: Awaitable[object]) -> int | None:
    try:
        await call
    except OSError as error:
        return error.errno
    raise AssertionError("it was not refused")


async def prepare_twice_is_fine(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/ns")
    await world.kernel.prepare(f"{folder}/ns/mounts")
    await world.kernel.prepare(f"{folder}/ns/mounts")
    await world.kernel.release(f"{folder}/ns/mounts")


async def facts_and_pressure_are_told(world: World, folder: str) -> None:
    machine = world.kernel.host_facts()
    assert machine.n_cpus >= 1
    assert machine.memory_bytes > 1 << 26
    assert all((machine.hostname, machine.kernel, machine.architecture, machine.operating_system))
    groups = world.kernel.cgroup_facts()
    assert groups.mode in ("v1", "hybrid", "v2")
    assert list(groups.controllers) == sorted(groups.controllers)
    assert groups.why
    assert (await world.kernel.pressure())["load1"] >= 0


async def an_unknown_cgroup_has_no_use_and_deletes_quietly(world: World, folder: str) -> None:
    assert world.kernel.cgroup_usage(f"/{PREFIX}-none/x") == (None, None, None, None)
    assert world.kernel.cgroup_figures(f"/{PREFIX}-none/x", None) == (0, 0, 0, 0, 0, 0, 0, 0, (), ())
    await world.kernel.kill_cgroup(f"/{PREFIX}-none/x")
    await world.kernel.delete_cgroup(f"/{PREFIX}-none/x")


Body = Callable[[World, str], Awaitable[None]]
BODIES: Final[dict[str, Body]] = {
    body.__name__: body
    for body in (
        overlay_shows_layers_and_keeps_changes_above,
        unmount_takes_all_below_and_nothing_is_fine,
        a_mounted_tree_is_not_removed,
        a_namespace_gets_its_link_and_takes_it_along,
        a_namespace_cannot_be_made_twice,
        the_namespace_of_nobody_and_our_own_are_not_pinned,
        a_table_is_applied_replaced_and_deleted,
        both_families_tables_are_listed_and_deleted,
        a_tap_is_a_port_of_its_bridge_until_deleted,
        prepare_twice_is_fine,
        facts_and_pressure_are_told,
        an_unknown_cgroup_has_no_use_and_deletes_quietly,
    )
}
