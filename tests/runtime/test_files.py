"""The File facade, on both Worlds."""

import asyncio

import pytest

from isopod.runtime.buffers import BufferPool
from isopod.runtime.files import (
    File,
    OpenFlags,
    calibrate,
    copy_file,
    file_exists,
    file_size,
    list_directory,
    open_file_dma,
    remove_file,
)
from isopod.runtime.io_queue import IoQueue
from isopod.runtime.scheduling import SchedulingGroup
from isopod.world.errors import AlreadyExists, DiskFull, InvalidArgument, KernelError, NotFound, WrongState
from isopod.world.sim import SimWorld
from isopod.world.world import World


@pytest.mark.row("S8")
async def test_written_aligned_and_read_anyhow(world: World, folder: str) -> None:
    file = await open_file_dma(world, f"{folder}/a", OpenFlags.create_new(direct=True))
    unit = max(file.alignment.offset_bytes, 512)
    data = bytes(range(256)) * (4 * unit // 256)
    assert await file.dma_write(0, data) == len(data)
    await file.flush()
    assert await file.dma_read(100, 200) == data[100:300]
    assert await file.dma_read_exactly(0, len(data)) == data
    assert await file.dma_read_many([(0, 10), (unit, 10)]) == [data[:10], data[unit : unit + 10]]
    await file.dma_write_many([(4 * unit, data), (8 * unit, data)])
    with BufferPool().lease(unit) as lease, lease.buffer.view[:unit] as target:
        assert await file.dma_read_into(8 * unit, target) == unit
        assert target == data[:unit]
    await file.truncate(100)
    assert file.size() == 100
    with pytest.raises(InvalidArgument):
        await file.dma_read_exactly(50, 51)
    await file.allocate(0, 10_000)
    assert file.size() == 10_000
    assert file.statistics() == (6, 3, 1, 200 + len(data) + 20 + unit + 50, 3 * len(data))
    await file.close()
    await file.close()


@pytest.mark.row("S8")
async def test_what_is_not_aligned_is_refused_with_the_reason(world: World, folder: str) -> None:
    async with await open_file_dma(world, f"{folder}/a", OpenFlags.create_new(direct=True)) as file:
        if not file.alignment.is_direct:
            pytest.skip(f"no direct files here: {file.alignment.why}")
        with pytest.raises(KernelError):
            await file.dma_write(1, b"x" * 512)
        assert file.size() == 0


async def test_failures_are_errors_of_the_tree(world: World, folder: str) -> None:
    with pytest.raises(NotFound):
        await open_file_dma(world, f"{folder}/a")
    with pytest.raises(NotFound):
        await file_size(world, f"{folder}/a")
    with pytest.raises(KernelError):
        await open_file_dma(world, folder)
    file = await open_file_dma(world, f"{folder}/a", OpenFlags.create_new())
    with pytest.raises(AlreadyExists):
        await open_file_dma(world, f"{folder}/a", OpenFlags.create_new())
    with pytest.raises(KernelError):
        await file.dma_read(-1, 1)
    await file.close()
    with pytest.raises(WrongState):
        await file.dma_read(0, 1)


async def test_a_full_disk_is_told_and_changes_nothing(sim_world: SimWorld, folder: str) -> None:
    sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + 10_000
    async with await open_file_dma(sim_world.world, f"{folder}/a", OpenFlags.create_new()) as file:
        await file.dma_write(0, b"x" * 9000)
        with pytest.raises(DiskFull):
            await file.dma_write(9000, b"y" * 9000)
        assert file.size() == 9000
        with pytest.raises(DiskFull):
            await file.allocate(0, 20_000)
        with pytest.raises(DiskFull):
            await copy_file(sim_world.world, f"{folder}/a", f"{folder}/b")
    assert await list_directory(sim_world.world, folder) == ["a"]


async def test_closing_waits_for_what_is_under_way(world: World, folder: str) -> None:
    file = await open_file_dma(world, f"{folder}/a", OpenFlags.create_new())
    writes = [asyncio.ensure_future(file.dma_write(index * 1000, b"x" * 1000)) for index in range(20)]
    for _ in range(3):
        await asyncio.sleep(0)
    await file.close()
    assert all(write.done() for write in writes)
    assert await file_size(world, f"{folder}/a") == 20_000
    await asyncio.gather(*writes)


async def test_helpers(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"12345")
    assert await copy_file(world, f"{folder}/a", f"{folder}/b") == 5
    with pytest.raises(AlreadyExists):
        await copy_file(world, f"{folder}/a", f"{folder}/b")
    assert await list_directory(world, folder) == ["a", "b"]
    assert await file_size(world, f"{folder}/b") == 5
    await remove_file(world, f"{folder}/a")
    await remove_file(world, f"{folder}/a")
    assert [await file_exists(world, f"{folder}/{name}") for name in "ab"] == [False, True]


async def test_operations_are_accounted_to_their_group(world: World, folder: str) -> None:
    queue = IoQueue()
    group = SchedulingGroup("bulk", 100)
    async with await open_file_dma(world, f"{folder}/a", OpenFlags.create_new(), queue=queue, group=group) as file:
        await file.dma_write(0, b"12345")
        await file.dma_read(0, 3)
        await file.flush()
    async with File(await world.disk.open_file(f"{folder}/a"), queue=queue) as file:
        await file.dma_read(0, 5)
    found = {each.name: (each.n_reads, each.n_writes, each.n_bytes_read, each.n_bytes_written) for each in queue.statistics().groups}
    assert found == {"bulk": (1, 2, 3, 5), "main": (1, 0, 5, 0)}


async def test_calibration_measures_and_leaves_nothing(world: World, folder: str) -> None:
    found = await calibrate(world, folder, n_bytes=1 << 20)
    assert min(found) > 0
    assert await list_directory(world, folder) == []
    IoQueue(found)
