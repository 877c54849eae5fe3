"""Disk, on both Worlds: files, folders, locks and watches. Archives have their own tests beside the Rust core's."""

import asyncio
import errno
from collections.abc import AsyncIterator

import pytest

from isopod.world.disk import UnpackLimits
from isopod.world.world import World


async def test_write_then_read(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"one")
    assert await world.disk.read(f"{folder}/a") == b"one"
    await world.disk.write(f"{folder}/a", b"2")
    assert await world.disk.read(f"{folder}/a") == b"2"


async def test_a_large_file_comes_back_whole(world: World, folder: str) -> None:
    data = bytes(range(256)) * 8192
    await world.disk.write(f"{folder}/a", data)
    assert await world.disk.read(f"{folder}/a") == data
    await world.disk.write_atomic(f"{folder}/a", data[1:])
    assert await world.disk.read(f"{folder}/a") == data[1:]


async def test_reading_is_bounded(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"12345")
    assert await world.disk.read(f"{folder}/a", n_bytes_max=5) == b"12345"
    with pytest.raises(OSError) as caught:
        await world.disk.read(f"{folder}/a", n_bytes_max=4)
    assert caught.value.errno == errno.EFBIG


async def test_reading_nothing_and_a_folder(world: World, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        await world.disk.read(f"{folder}/missing")
    with pytest.raises(IsADirectoryError):
        await world.disk.read(folder)


@pytest.mark.row("R38")
async def test_an_atomic_write_replaces_and_leaves_no_other_name(world: World, folder: str) -> None:
    await world.disk.write_atomic(f"{folder}/a", b"one", mode=0o640)
    await world.disk.write_atomic(f"{folder}/a", b"two", mode=0o640)
    assert await world.disk.read(f"{folder}/a") == b"two"
    assert await world.disk.list(folder) == ["a"]
    found = await world.disk.stat(f"{folder}/a")
    assert found is not None
    assert (found.mode, found.size_bytes) == (0o640, 3)


async def test_an_atomic_write_into_a_missing_folder_or_onto_a_folder(world: World, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        await world.disk.write_atomic(f"{folder}/missing/a", b"one")
    await world.disk.make_directory(f"{folder}/d")
    with pytest.raises(OSError):
        await world.disk.write_atomic(f"{folder}/d", b"one")
    assert await world.disk.list(folder) == ["d"]


async def test_many_atomic_writes_at_once(world: World, folder: str) -> None:
    await asyncio.gather(*(world.disk.write_atomic(f"{folder}/{index % 5}", str(index).encode()) for index in range(40)))
    assert await world.disk.list(folder) == ["0", "1", "2", "3", "4"]
    for name in "01234":
        assert int(await world.disk.read(f"{folder}/{name}")) % 5 == int(name)


async def test_lists_are_sorted_and_a_missing_folder_is_empty(world: World, folder: str) -> None:
    for name in ("b", "a10", "a9", "ä"):
        await world.disk.write(f"{folder}/{name}", b"")
    assert await world.disk.list(folder) == ["a10", "a9", "b", "ä"]
    assert await world.disk.list(f"{folder}/missing") == []


async def test_stat_tells_kinds_and_sizes(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"12345", mode=0o604)
    await world.disk.make_directory(f"{folder}/d", mode=0o750)
    file, directory = await world.disk.stat(f"{folder}/a"), await world.disk.stat(f"{folder}/d")
    assert file is not None
    assert directory is not None
    assert (file.size_bytes, file.mode, file.is_directory, file.is_symlink) == (5, 0o604, False, False)
    assert (directory.mode, directory.is_directory) == (0o750, True)
    assert file.inode != directory.inode
    assert abs(file.modified_at_ns - world.clock.now_ns()) < 60_000_000_000
    assert await world.disk.stat(f"{folder}/missing") is None


async def test_folders_are_made_with_their_parents(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/a/b/c", mode=0o711)
    for path in ("a", "a/b", "a/b/c"):
        found = await world.disk.stat(f"{folder}/{path}")
        assert found is not None
        assert (found.is_directory, found.mode) == (True, 0o711)
    await world.disk.make_directory(f"{folder}/a", mode=0o700)
    found = await world.disk.stat(f"{folder}/a")
    assert found is not None
    assert found.mode == 0o711
    await world.disk.make_directory(f"{folder}/open/wide", mode=0o777)
    modes = [await world.disk.stat(f"{folder}/{path}") for path in ("open", "open/wide")]
    assert [each.mode for each in modes if each is not None] == [0o755, 0o777]
    await world.disk.write(f"{folder}/file", b"")
    with pytest.raises(FileExistsError):
        await world.disk.make_directory(f"{folder}/file")


async def test_rename_replaces_a_file(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"new")
    await world.disk.write(f"{folder}/b", b"old")
    await world.disk.rename(f"{folder}/a", f"{folder}/b")
    assert await world.disk.list(folder) == ["b"]
    assert await world.disk.read(f"{folder}/b") == b"new"
    with pytest.raises(FileNotFoundError):
        await world.disk.rename(f"{folder}/a", f"{folder}/b")


async def test_remove_takes_files_and_empty_folders_only(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"")
    await world.disk.make_directory(f"{folder}/d")
    await world.disk.write(f"{folder}/d/x", b"")
    await world.disk.remove(f"{folder}/a")
    await world.disk.remove(f"{folder}/a")
    with pytest.raises(OSError) as caught:
        await world.disk.remove(f"{folder}/d")
    assert caught.value.errno == errno.ENOTEMPTY
    await world.disk.remove(f"{folder}/d/x")
    await world.disk.remove(f"{folder}/d")
    assert await world.disk.list(folder) == []


async def test_remove_tree_takes_all(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/d/e/f")
    await world.disk.write(f"{folder}/d/e/x", b"1")
    await world.disk.remove_tree(f"{folder}/d")
    await world.disk.remove_tree(f"{folder}/d")
    assert await world.disk.list(folder) == []


async def test_appending_and_reading_at_an_offset(world: World, folder: str) -> None:
    file = await world.disk.open_append(f"{folder}/log")
    await file.append(b"hello ")
    await file.append(b"world")
    await file.sync()
    assert file.size_bytes() == 11
    file.close()
    again = await world.disk.open_append(f"{folder}/log")
    await again.append(b"!")
    again.close()
    reader = await world.disk.open_read(f"{folder}/log")
    assert await reader.read_at(6, 3) == b"wor"
    assert await reader.read_at(6, 100) == b"world!"
    assert await reader.read_at(100, 10) == b""
    reader.close()
    with pytest.raises(FileNotFoundError):
        await world.disk.open_read(f"{folder}/missing")


async def test_a_closed_file_refuses(world: World, folder: str) -> None:
    file = await world.disk.open_append(f"{folder}/log")
    file.close()
    with pytest.raises(ValueError):
        await file.append(b"x")
    with pytest.raises(ValueError):
        await file.read_at(0, 1)
    with pytest.raises(ValueError):
        await file.sync()
    with pytest.raises(ValueError):
        file.size_bytes()


async def test_a_lock_is_held_until_its_file_is_closed(world: World, folder: str) -> None:
    held = await world.disk.lock(f"{folder}/lock", b"4711")
    assert held is not None
    assert await world.disk.read(f"{folder}/lock") == b"4711"
    assert await world.disk.lock(f"{folder}/lock", b"42") is None
    assert await world.disk.read(f"{folder}/lock") == b"4711"
    held.close()
    again = await world.disk.lock(f"{folder}/lock", b"42")
    assert again is not None
    assert await world.disk.read(f"{folder}/lock") == b"42"
    again.close()


async def test_a_shared_lock_keeps_out_who_wants_it_alone_and_writes_nothing(world: World, folder: str) -> None:
    path = f"{folder}/lock"
    with pytest.raises(FileNotFoundError):
        await world.disk.lock_shared(path)
    assert await world.disk.stat(path) is None
    await world.disk.write(path, b"4711")
    first, second = await world.disk.lock_shared(path), await world.disk.lock_shared(path)
    assert first is not None
    assert second is not None
    first.close()
    assert await world.disk.lock(path, b"42") is None
    second.close()
    assert await world.disk.read(path) == b"4711"
    alone = await world.disk.lock(path, b"42")
    assert alone is not None
    assert await world.disk.lock_shared(path) is None
    alone.close()


async def test_a_watch_names_what_is_created_written_moved_and_removed(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/old", b"")
    async with world.disk.watch(folder) as watch:
        names = aiter(watch)
        await world.disk.write(f"{folder}/new", b"x")
        await expect(names, "new")
        await world.disk.rename(f"{folder}/new", f"{folder}/moved")
        await expect(names, "moved")
        file = await world.disk.open_append(f"{folder}/old")
        await file.append(b"x")
        await expect(names, "old")
        file.close()
        await world.disk.remove(f"{folder}/moved")
        await expect(names, "moved")


async def test_a_watch_wakes_who_waits(world: World, folder: str) -> None:
    async with world.disk.watch(folder) as watch:
        names = aiter(watch)
        waiting = asyncio.ensure_future(expect(names, "exit"))
        await asyncio.sleep(0.01)
        await world.disk.write_atomic(f"{folder}/exit", b"0")
        await waiting


async def test_watching_a_missing_folder(world: World, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        async with world.disk.watch(f"{folder}/missing"):
            pass


async def test_free_and_used_bytes(world: World, folder: str) -> None:
    assert await world.disk.free_bytes(folder) > 0
    await world.disk.write(f"{folder}/a", b"x" * 100_000)
    assert 100_000 <= await world.disk.tree_bytes(folder) < 200_000


async def test_digest_of_a_known_text(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"abc")
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert await world.disk.digest(f"{folder}/a") == expected


async def test_reading_beneath_a_root(world: World, folder: str) -> None:
    await world.disk.make_directory(f"{folder}/root/etc")
    await world.disk.write(f"{folder}/root/etc/passwd", b"root:x:0:0")
    await world.disk.write(f"{folder}/secret", b"host")
    assert await world.disk.read_beneath(f"{folder}/root", "/etc/passwd") == b"root:x:0:0"
    for path in ("/etc/shadow", "/../secret", "/etc"):
        with pytest.raises(FileNotFoundError):
            await world.disk.read_beneath(f"{folder}/root", path)
    with pytest.raises(OSError) as caught:
        await world.disk.read_beneath(f"{folder}/root", "/etc/passwd", n_bytes_max=3)
    assert caught.value.errno == errno.EFBIG


async def expect(names: AsyncIterator[str], wanted: str) -> None:
    """Consume names until `wanted` comes."""
    async with asyncio.timeout(40):
        while await anext(names) != wanted:
            pass


@pytest.mark.parametrize(
    "limits, name",
    [
        (UnpackLimits(entry_bytes_max=(1 << 16) - 1), "large"),
        (UnpackLimits(unpacked_bytes_max=1 << 16), "large"),
        (UnpackLimits(unpacked_bytes_max=100), ""),
    ],
)
async def test_a_layer_over_a_limit_is_not_packed(world: World, folder: str, limits: UnpackLimits, name: str) -> None:
    await world.disk.make_directory(f"{folder}/d")
    await world.disk.write(f"{folder}/d/large", b"x" * (1 << 16))
    with pytest.raises(OSError) as caught:
        await world.disk.pack_layer(f"{folder}/d", f"{folder}/tar", limits=limits)
    assert caught.value.errno == errno.EFBIG
    assert str(caught.value.filename).endswith(name)
    assert await world.disk.list(folder) == ["d"]
    packed = await world.disk.pack_layer(f"{folder}/d", f"{folder}/tar", limits=UnpackLimits(entry_bytes_max=1 << 16))
    assert packed.n_bytes > 1 << 16


async def test_opening_beneath_a_root_follows_no_link(world: World, folder: str) -> None:
    for path in (f"{folder}/root/sub", f"{folder}/outside"):
        await world.disk.make_directory(path)
    await world.disk.write(f"{folder}/root/sub/file", b"inside")
    await world.disk.write(f"{folder}/outside/file", b"secret")
    file = await world.disk.open_file_beneath(f"{folder}/root", "sub/file")
    assert (await file.read_at(0, 10), file.path) == (b"inside", f"{folder}/root/sub/file")
    file.close()
    refused = [("../outside/file", errno.EXDEV), ("/etc/passwd", errno.EXDEV), ("none", errno.ENOENT), ("sub", errno.EISDIR)]
    for path, number in refused:
        with pytest.raises(OSError) as caught:
            await world.disk.open_file_beneath(f"{folder}/root", path)
        assert caught.value.errno == number, path
