"""`DataFile.write_durable`, on both Worlds and with both back ends: what it returned from is on the disk, as one operation."""

import errno
import os

import pytest
import zstandard

from isopod.world.disk import Disk, OpenFlags
from isopod.world.sim import SimWorld
from isopod.world.world import World


async def test_what_was_written_is_read(disk: Disk, folder: str) -> None:
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_new())
    await file.allocate(0, 8192)
    await file.sync()
    await file.write_durable(10, b"hello")
    await file.write_durable(4090, memoryview(bytearray(b"across a page")))
    await file.write_durable(0, b"")
    assert await file.read_at(8, 9) == bytes(2) + b"hello" + bytes(2)
    assert await file.read_at(4090, 13) == b"across a page"
    assert file.size_bytes() == 8192
    found = disk.io_statistics()
    assert (found.n_errors, found.n_in_flight) == (0, 0) and found.n_bytes_written == 18
    file.close()
    with pytest.raises(ValueError, match="closed"):
        await file.write_durable(0, b"x")


async def test_many_megabytes(disk: Disk, folder: str) -> None:
    data = bytes(range(251)) * 20_000
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_new())
    await file.write_durable(3, data)
    assert await file.read_at(0, len(data) + 10) == bytes(3) + data
    file.close()


async def test_what_cannot_be_written(disk: Disk, folder: str) -> None:
    await disk.write(f"{folder}/a", b"12345678")
    file = await disk.open_file(f"{folder}/a", OpenFlags.read_only())
    with pytest.raises(OSError) as caught:
        await file.write_durable(0, b"x")
    assert caught.value.errno == errno.EBADF
    with pytest.raises(OSError) as caught:
        await file.write_durable(-1, b"x")
    assert caught.value.errno == errno.EINVAL
    file.close()
    assert await disk.read(f"{folder}/a") == b"12345678"


async def test_direct_files_keep_to_their_units(disk: Disk, folder: str) -> None:
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_new(direct=True))
    if not file.alignment.is_direct:
        file.close()
        pytest.skip(f"no direct files here: {file.alignment.why}")
    await file.write_durable(0, b"x" * 8192)
    assert await file.read_at(8190, 10) == b"xx"
    with pytest.raises(OSError) as caught:
        await file.write_durable(1, b"x" * 512)
    assert caught.value.errno == errno.EINVAL
    file.close()


async def test_a_compressed_copy(world: World, folder: str) -> None:
    data = bytes(range(256)) * 20_000
    await world.disk.write(f"{folder}/a", data)
    n_bytes = await world.disk.compress_file(f"{folder}/a", f"{folder}/a.zst")
    packed = await world.disk.read(f"{folder}/a.zst")
    assert len(packed) == n_bytes < len(data) / 10
    assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == data
    with pytest.raises(FileExistsError):
        await world.disk.compress_file(f"{folder}/a", f"{folder}/a.zst")
    with pytest.raises(FileNotFoundError):
        await world.disk.compress_file(f"{folder}/missing", f"{folder}/b.zst")
    assert await world.disk.list(folder) == ["a", "a.zst"]


async def test_a_compressed_copy_is_durable_or_gone(sim_world: SimWorld, folder: str) -> None:
    disk = sim_world.world.disk
    await disk.write(f"{folder}/a", b"x" * 10_000)
    sim_world.disk.faults.fail_next("sync")
    with pytest.raises(OSError):
        await disk.compress_file(f"{folder}/a", f"{folder}/b")
    assert await disk.list(folder) == ["a"]
    n_bytes = await disk.compress_file(f"{folder}/a", f"{folder}/b")
    await disk.sync_directory(folder)
    sim_world.power_cut()
    assert len(await disk.read(f"{folder}/b")) == n_bytes


async def test_a_device_without_space_says_so(host_world: World, folder: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with pytest.raises(OSError):
        await host_world.disk.open_file("/dev/full", OpenFlags.read_write())


async def test_it_survives_a_crash_and_other_writes_may_not(sim_world: SimWorld, folder: str) -> None:
    disk = sim_world.world.disk
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_new())
    await file.allocate(0, 4096)
    await file.sync()
    await disk.sync_directory(folder)
    await file.write_at(0, b"lost")
    await file.write_durable(1024, b"kept")
    file.close()
    sim_world.power_cut()
    data = await disk.read(f"{folder}/a")
    assert data[1024:1028] == b"kept" and data[:4] == bytes(4) and len(data) == 4096


async def test_a_failed_one_says_so(sim_world: SimWorld, folder: str) -> None:
    disk = sim_world.world.disk
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_new())
    await file.allocate(0, 4096)
    for kind in ("write", "sync"):
        sim_world.disk.faults.fail_next("write" if kind == "write" else "sync")
        with pytest.raises(OSError) as caught:
            await file.write_durable(0, b"x")
        assert caught.value.errno == errno.EIO
    file.close()
