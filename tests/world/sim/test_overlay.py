"""Overlays in the simulation: what is seen, and where writes go."""

import errno

import pytest

from isopod.world.sim import SimWorld


async def mount(sim: SimWorld) -> None:
    """Mount two layers: /low2 above /low1."""
    disk = sim.world.disk
    for folder in ("/low1/etc", "/low1/gone", "/low1/covered", "/low2/etc", "/up", "/work", "/merged"):
        await disk.make_directory(folder)
    await disk.write("/low1/etc/a", b"low1")
    await disk.write("/low1/etc/b", b"low1")
    await disk.write("/low1/covered/x", b"low1")
    await disk.write("/low2/etc/b", b"low2")
    sim.machine.view.create("/low2/gone", "device", 0)
    sim.machine.view.make_folders("/low2/covered").xattrs["trusted.overlay.opaque"] = b"y"
    await sim.world.kernel.mount_overlay("/merged", lowers=["/low2", "/low1"], upper="/up", work="/work")


async def test_layers_are_seen_as_one(sim_world: SimWorld) -> None:
    await mount(sim_world)
    disk = sim_world.world.disk
    assert await disk.list("/merged") == ["covered", "etc"]
    assert await disk.list("/merged/etc") == ["a", "b"]
    assert await disk.list("/merged/covered") == []
    assert await disk.read("/merged/etc/a") == b"low1"
    assert await disk.read("/merged/etc/b") == b"low2"
    assert await disk.stat("/merged/gone") is None


async def test_writes_go_to_the_upper_layer_only(sim_world: SimWorld) -> None:
    await mount(sim_world)
    disk = sim_world.world.disk
    file = await disk.open_append("/merged/etc/a")
    await file.append(b" and more")
    file.close()
    await disk.write("/merged/new", b"new")
    assert await disk.read("/merged/etc/a") == b"low1 and more"
    assert await disk.read("/low1/etc/a") == b"low1"
    assert await disk.read("/up/etc/a") == b"low1 and more"
    assert await disk.list("/up") == ["etc", "new"]


async def test_removal_leaves_a_whiteout_where_a_lower_layer_has_the_name(sim_world: SimWorld) -> None:
    await mount(sim_world)
    disk = sim_world.world.disk
    await disk.write("/merged/etc/own", b"")
    await disk.remove("/merged/etc/own")
    await disk.remove("/merged/etc/b")
    assert await disk.list("/merged/etc") == ["a"]
    assert await disk.list("/up/etc") == ["b"]
    assert sim_world.machine.view.node("/up/etc/b").inode.is_whiteout
    await disk.write("/merged/etc/b", b"again")
    assert await disk.read("/merged/etc/b") == b"again"


async def test_a_folder_made_anew_does_not_show_the_old_one(sim_world: SimWorld) -> None:
    await mount(sim_world)
    disk = sim_world.world.disk
    await disk.remove_tree("/merged/etc")
    assert await disk.list("/merged") == ["covered"]
    await disk.make_directory("/merged/etc")
    assert await disk.list("/merged/etc") == []


async def test_renaming_a_folder_of_a_lower_layer_is_refused(sim_world: SimWorld) -> None:
    await mount(sim_world)
    with pytest.raises(OSError) as refused:
        await sim_world.world.disk.rename("/merged/etc", "/merged/other")
    assert refused.value.errno == errno.EXDEV
    await sim_world.world.disk.rename("/merged/etc/a", "/merged/moved")
    assert await sim_world.world.disk.read("/merged/moved") == b"low1"
    assert await sim_world.world.disk.list("/merged/etc") == ["b"]


async def test_an_overlay_needs_its_folders(sim_world: SimWorld) -> None:
    kernel, disk = sim_world.world.kernel, sim_world.world.disk
    for folder in ("/l", "/u", "/w"):
        await disk.make_directory(folder)
    for lowers, target, number in ((["/absent"], "/l", errno.ENOENT), ([], "/l", errno.EINVAL), (["/l"], "/absent", errno.ENOENT)):
        with pytest.raises(OSError) as refused:
            await kernel.mount_overlay(target, lowers=lowers, upper="/u", work="/w")
        assert refused.value.errno == number
