"""Watching many folders at once: the same promises in both Worlds."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator

import pytest

from isopod.world.disk import FolderChange
from isopod.world.network import UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World

TIMEOUT_S = 30.0


async def expect(changes: AsyncIterator[FolderChange], folder: str, name: str) -> None:
    """Read changes up to this one."""
    async with asyncio.timeout(TIMEOUT_S):
        while await anext(changes) != (folder, name):
            pass


async def test_entries_of_several_folders_are_told_apart(world: World, folder: str) -> None:
    disk = world.disk
    for name in ("a", "b"):
        await disk.make_directory(f"{folder}/{name}")
    async with disk.watch_folders() as watches:
        changes = aiter(watches)
        for name in ("a", "b", "a"):
            watches.add(f"{folder}/{name}")
        await disk.make_directory(f"{folder}/a/new")
        await expect(changes, f"{folder}/a", "new")
        await disk.write(f"{folder}/b/file", b"")
        await expect(changes, f"{folder}/b", "file")
        await disk.rename(f"{folder}/b/file", f"{folder}/a/moved")
        async with asyncio.timeout(TIMEOUT_S):
            told = [await anext(changes), await anext(changes)]
        assert sorted(told) == [(f"{folder}/a", "moved"), (f"{folder}/b", "file")]
        watches.remove(f"{folder}/a")
        watches.remove(f"{folder}/never")
        await disk.remove(f"{folder}/a/moved")
        await disk.write(f"{folder}/b/last", b"")
        assert await anext(changes) == (f"{folder}/b", "last")


async def test_a_socket_that_appears_is_told(world: World, folder: str) -> None:
    async with world.disk.watch_folders() as watches:
        watches.add(folder)
        listener = await world.network.listen(UnixAddress(f"{folder}/s.sock"), asyncio.Protocol)
        await expect(aiter(watches), folder, "s.sock")
        await listener.close()
        await expect(aiter(watches), folder, "s.sock")


async def test_the_end_of_a_folder_ends_its_watch(world: World, folder: str) -> None:
    path = f"{folder}/a"
    await world.disk.make_directory(path)
    async with world.disk.watch_folders() as watches:
        changes = aiter(watches)
        watches.add(path)
        await world.disk.remove(path)
        await expect(changes, path, "")
        await world.disk.make_directory(path)
        await world.disk.write(f"{path}/unseen", b"")
        watches.add(path)
        await world.disk.write(f"{path}/seen", b"")
        assert await anext(changes) == (path, "seen")


async def test_a_watch_of_one_folder_is_told_its_end_too(world: World, folder: str) -> None:
    path = f"{folder}/a"
    await world.disk.make_directory(path)
    async with world.disk.watch(path) as names:
        await world.disk.remove(path)
        async with asyncio.timeout(TIMEOUT_S):
            while await anext(aiter(names)) != "":
                pass


async def test_a_path_that_leads_to_another_folder_is_watched_anew(world: World, folder: str) -> None:
    path = f"{folder}/a"
    await world.disk.make_directory(path)
    async with world.disk.watch_folders() as watches:
        changes = aiter(watches)
        watches.add(path)
        await world.disk.rename(path, f"{folder}/old")
        await world.disk.make_directory(path)
        watches.add(path)
        await world.disk.write(f"{folder}/old/unseen", b"")
        await world.disk.write(f"{path}/seen", b"")
        assert await anext(changes) == (path, "seen")


async def test_what_cannot_be_watched(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/file", b"")
    async with world.disk.watch_folders() as watches:
        for name, number in (("missing", errno.ENOENT), ("file", errno.ENOTDIR)):
            with pytest.raises(OSError) as refused:
                watches.add(f"{folder}/{name}")
            assert refused.value.errno == number


async def test_a_folder_of_two_names_is_told_under_both(host_world: World, folder: str) -> None:
    await host_world.disk.make_directory(f"{folder}/a")
    os.symlink(f"{folder}/a", f"{folder}/b")
    async with host_world.disk.watch_folders() as watches:
        changes = aiter(watches)
        watches.add(f"{folder}/a")
        watches.add(f"{folder}/b")
        await host_world.disk.write(f"{folder}/a/x", b"")
        assert [await anext(changes), await anext(changes)] == [(f"{folder}/a", "x"), (f"{folder}/b", "x")]
        watches.remove(f"{folder}/a")
        await host_world.disk.write(f"{folder}/a/y", b"")
        assert await anext(changes) == (f"{folder}/b", "y")


async def test_a_flood_becomes_a_call_to_look_at_all(world: World, folder: str) -> None:
    async with world.disk.watch_folders() as watches:
        watches.add(folder)
        for number in range(20_000):
            await world.disk.write(f"{folder}/{number}", b"")
        changes = aiter(watches)
        async with asyncio.timeout(TIMEOUT_S):
            while await anext(changes) != ("", ""):
                pass


async def test_the_simulation_loses_changes_and_refuses_watches_when_told_to(sim_world: SimWorld) -> None:
    disk = sim_world.disk
    async with disk.watch_folders() as watches:
        changes = aiter(watches)
        watches.add("/home")
        await disk.write("/home/a", b"")
        disk.lose_changes()
        assert await anext(changes) == ("", "")
        disk.watches_max = 1
        with pytest.raises(OSError) as refused:
            watches.add("/tmp")
        assert refused.value.errno == errno.ENOSPC
    assert disk.n_watches == 0
