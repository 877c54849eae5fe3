"""Maps of files, on both Worlds (S8)."""

import asyncio
import errno
import os
from collections.abc import Callable

import pytest

from isopod.world.disk import OpenFlags
from isopod.world.sim import SimWorld
from isopod.world.world import World


@pytest.mark.row("S8")
async def test_what_is_written_to_a_map_is_in_the_file(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"0123456789")
    mapped = await world.disk.map_file(f"{folder}/a", write=True)
    mapped.write(3, b"abc")
    assert await world.disk.read(f"{folder}/a") == b"012abc6789"
    mapped.move(5, 3, 4)
    assert mapped.read(0, 100) == b"012ababc69"
    assert (mapped.read(8, 100), mapped.read(10, 1), mapped.read(2, 0), mapped.size_bytes) == (b"69", b"", b"", 10)
    await mapped.sync(4, 2)
    mapped.close()
    mapped.close()
    assert await world.disk.read(f"{folder}/a") == b"012ababc69"
    with pytest.raises(ValueError, match="closed"):
        mapped.read(0, 1)


async def test_searching_crosses_every_boundary(world: World, folder: str) -> None:
    data = bytearray(3 << 20)
    data[(1 << 20) - 2 : (1 << 20) + 2] = b"wxyz"
    data[-4:] = b"wxyz"
    await world.disk.write(f"{folder}/a", bytes(data))
    mapped = await world.disk.map_file(f"{folder}/a")
    await mapped.prefetch(0, 10 << 20)
    first = mapped.find(b"wxyz", 0, len(data))
    assert first == (1 << 20) - 2
    assert mapped.find(b"wxyz", first + 1, 1 << 30) == len(data) - 4
    assert mapped.find(b"wxyz", first + 1, len(data) - 1) == -1
    assert (mapped.find(b"", 0, 10), mapped.find(b"w", 10, 5)) == (-1, -1)
    mapped.close()


async def test_what_cannot_be_mapped_or_changed_is_refused(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/empty", b"")
    await world.disk.write(f"{folder}/a", b"abc")
    for path, number in ((f"{folder}/empty", errno.EINVAL), (f"{folder}/missing", errno.ENOENT)):
        with pytest.raises(OSError) as caught:
            await world.disk.map_file(path)
        assert caught.value.errno == number
    mapped = await world.disk.map_file(f"{folder}/a")
    with pytest.raises(OSError) as caught:
        mapped.write(0, b"x")
    assert caught.value.errno == errno.EBADF
    mapped.close()
    mapped = await world.disk.map_file(f"{folder}/a", write=True)
    calls: list[Callable[[], object]] = [
        lambda: mapped.write(1, b"xyz"),
        lambda: mapped.write(-1, b"x"),
        lambda: mapped.move(0, 2, 2),
    ]
    for call in calls:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    mapped.close()
    assert await world.disk.read(f"{folder}/a") == b"abc"


@pytest.mark.row("S8")
async def test_a_file_cut_under_its_map_is_an_error_and_no_signal(world: World, folder: str) -> None:
    """On the host the bare memory would end the whole test run here, with SIGBUS."""
    await world.disk.write(f"{folder}/a", b"x" * (64 << 10))
    mapped = await world.disk.map_file(f"{folder}/a", write=True)
    file = await world.disk.open_file(f"{folder}/a", OpenFlags.read_write())
    await file.truncate(100)
    calls: list[Callable[[], object]] = [
        lambda: mapped.read(50_000, 10),
        lambda: mapped.find(b"y", 0, mapped.size_bytes),
        lambda: mapped.write(50_000, b"abc"),
        lambda: mapped.move(0, 50_000, 10),
    ]
    for call in calls:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ESTALE
    assert mapped.read(10, 20) == b"x" * 20
    assert mapped.find(b"x", 0, 100) == 0
    mapped.close()
    file.close()


async def test_closing_during_a_sync_lets_it_end(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", bytes(1 << 20))
    mapped = await world.disk.map_file(f"{folder}/a", write=True)
    mapped.write(0, b"abc")
    sync = asyncio.ensure_future(mapped.sync(0, 1 << 20))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    mapped.close()
    await sync
    assert await world.disk.read(f"{folder}/a") == b"abc" + bytes((1 << 20) - 3)


async def test_a_synced_map_survives_a_crash_and_an_unsynced_one_does_not(sim_world: SimWorld) -> None:
    disk = sim_world.disk
    await disk.make_directory("/d")
    await disk.write_atomic("/d/a", b"old!")
    await disk.sync_directory("/")
    mapped = await disk.map_file("/d/a", write=True)
    mapped.write(0, b"new")
    await mapped.sync(0, 3)
    mapped.write(3, b"?")
    disk.crash()
    assert await disk.read("/d/a") == b"new!"


@pytest.mark.host
async def test_a_map_sees_what_others_write(host_world: World, folder: str) -> None:
    await host_world.disk.write(f"{folder}/a", b"abcdef")
    mapped = await host_world.disk.map_file(f"{folder}/a")
    descriptor = os.open(f"{folder}/a", os.O_WRONLY)
    os.pwrite(descriptor, b"XY", 2)
    os.close(descriptor)
    assert (mapped.read(0, 6), mapped.find(b"XY", 0, 6)) == (b"abXYef", 2)
    mapped.close()
