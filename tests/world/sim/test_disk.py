"""The simulated disk: what a crash keeps, how it fills up, and what mounts forbid."""

import errno

import pytest

from isopod.world.sim import SimWorld


async def test_a_crash_keeps_what_was_made_durable_and_nothing_else(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.make_directory("/var/lib/x")
    await disk.write_atomic("/var/lib/x/kept", b"new")
    await disk.write("/var/lib/x/lost", b"never synced")
    file = await disk.open_append("/var/lib/x/log")
    await file.append(b"one\n")
    await file.sync()
    await disk.sync_directory("/var/lib/x")
    await file.append(b"two\n")
    await disk.write("/var/lib/x/after", b"after the sync")
    sim_world.disk.crash()
    assert await disk.list("/var/lib/x") == ["kept", "log", "lost"]
    assert await disk.read("/var/lib/x/kept") == b"new"
    assert await disk.read("/var/lib/x/log") == b"one\n"
    assert await disk.read("/var/lib/x/lost") == b""  # its name was synced with the folder, its bytes never


async def test_a_crash_undoes_a_rename_and_a_removal_that_were_not_synced(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    for name in ("a", "b"):
        await disk.write_atomic(f"/home/{name}", name.encode())
    await disk.rename("/home/a", "/home/c")
    await disk.remove("/home/b")
    sim_world.disk.crash()
    assert await disk.list("/home") == ["a", "b"]


async def test_a_lock_is_not_taken_through_a_link(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.write("/home/precious", b"kept")
    sim_world.machine.view.symlink("precious", "/home/lock")
    with pytest.raises(OSError) as refused:
        await disk.lock("/home/lock", b"1")
    assert refused.value.errno == errno.ELOOP
    assert await disk.read("/home/precious") == b"kept"


async def test_stat_tells_the_owner(sim_world: SimWorld) -> None:
    sim_world.machine.view.write("/home/f", b"").uid = 4711
    found = await sim_world.world.disk.stat("/home/f")
    assert found is not None
    assert found.uid == 4711


async def test_a_crash_of_an_atomic_write_leaves_the_old_one(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.write_atomic("/home/f", b"old")
    node = sim_world.spawn_node(disk.write_atomic("/home/f", b"new"))
    node.kill()
    sim_world.disk.crash()
    assert await disk.read("/home/f") == b"old"


async def test_used_bytes_survive_a_crash_in_step_with_the_files(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    before = sim_world.disk.used_bytes
    await disk.write_atomic("/home/f", b"x" * 1000)
    await disk.write("/home/g", b"x" * 5000)
    assert sim_world.disk.used_bytes == before + 6000
    sim_world.disk.crash()
    assert sim_world.disk.used_bytes == before + 1000
    await disk.remove("/home/f")
    assert sim_world.disk.used_bytes == before


async def test_a_full_disk_refuses_and_changes_nothing(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.write("/home/f", b"x" * 100)
    sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + 50
    assert await disk.free_bytes("/home") == 50
    for attempt in (disk.write("/home/f", b"y" * 151), disk.write_atomic("/home/g", b"y" * 51)):
        with pytest.raises(OSError) as refused:
            await attempt
        assert refused.value.errno == errno.ENOSPC
    file = await disk.open_append("/home/f")
    with pytest.raises(OSError):
        await file.append(b"y" * 51)
    file.close()
    assert await disk.read("/home/f") == b"x" * 100
    assert await disk.list("/home") == ["f"]
    await disk.write("/home/g", b"y" * 50)


async def test_a_small_tmpfs_fills_up_alone(sim_world: SimWorld) -> None:
    disk, kernel = sim_world.world.disk, sim_world.world.kernel
    await disk.make_directory("/mnt/small")
    await kernel.mount_tmpfs("/mnt/small", n_bytes=4096)
    with pytest.raises(OSError) as refused:
        await disk.write("/mnt/small/f", bytes(4097))
    assert refused.value.errno == errno.ENOSPC
    await disk.write("/mnt/f", bytes(4097))
    with pytest.raises(OSError) as across:
        await disk.rename("/mnt/f", "/mnt/small/f")
    assert across.value.errno == errno.EXDEV


async def test_trees_with_a_mount_are_not_removed(sim_world: SimWorld) -> None:
    disk, kernel = sim_world.world.disk, sim_world.world.kernel
    await disk.make_directory("/mnt/a/b")
    await disk.write("/mnt/a/f", b"stays")
    await kernel.mount_tmpfs("/mnt/a/b", n_bytes=4096)
    for attempt in (disk.remove_tree("/mnt/a"), disk.remove_tree("/mnt/a/b"), disk.remove("/mnt/a/b")):
        with pytest.raises(OSError) as refused:
            await attempt
        assert refused.value.errno == errno.EBUSY
    assert await disk.list("/mnt/a") == ["b", "f"]
    await kernel.unmount("/mnt/a")
    await disk.remove_tree("/mnt/a")
    assert await disk.list("/mnt") == []


async def test_a_flood_of_changes_becomes_a_call_to_look_at_all(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    async with disk.watch("/home") as watch:
        for number in range(2000):
            sim_world.machine.view.write(f"/home/{number % 7}", b"x")
        names = aiter(watch)
        assert await anext(names) == ""


async def test_links_that_lead_in_circles(sim_world: SimWorld) -> None:
    view = sim_world.machine.view
    view.symlink("b", "/home/a")
    view.symlink("a", "/home/b")
    view.symlink("../../etc/hostname", "/home/up")
    with pytest.raises(OSError) as refused:
        await sim_world.world.disk.read("/home/a")
    assert refused.value.errno == errno.ELOOP
    assert await sim_world.world.disk.read("/home/up") == b"simulated\n"


async def test_folders_are_not_replaced_by_files(sim_world: SimWorld) -> None:
    disk = sim_world.world.disk
    await disk.make_directory("/home/d/inner")
    await disk.write("/home/f", b"")
    for source, target, number in (
        ("/home/f", "/home/d", errno.EISDIR),
        ("/home/d", "/home/f", errno.ENOTDIR),
        ("/home/d", "/home/d/inner/x", errno.EINVAL),
        ("/home/absent", "/home/x", errno.ENOENT),
    ):
        with pytest.raises(OSError) as refused:
            await disk.rename(source, target)
        assert refused.value.errno == number
