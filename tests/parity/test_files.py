"""Files, streams over them, and the memory they go through."""

import asyncio

import pytest

from isopod.runtime.buffers import AlignedBuffer, BufferPool, ScatterGatherBuffer
from isopod.runtime.file_streams import make_file_input_stream, make_file_output_stream
from isopod.runtime.files import OpenFlags, file_size, open_file_dma
from isopod.runtime.io_queue import IoProperties, IoQueue
from isopod.runtime.memory import MemoryLedger
from isopod.runtime.scheduling import SchedulingGroup
from isopod.world.errors import DiskFull, Exhausted, KernelError, NotFound, WrongState
from isopod.world.sim import SimWorld
from isopod.world.world import World

pytestmark = pytest.mark.row("S35")
UNIT = 4096


async def test_what_was_written_is_read_whatever_the_offset(world: World, folder: str) -> None:
    data = bytes(range(256)) * (2 * UNIT // 256)
    async with await open_file_dma(world, f"{folder}/a", OpenFlags.create_new(direct=True)) as file:
        assert await file.dma_write(0, data) == len(data)
        await file.flush()
        assert await file.dma_read(UNIT - 3, 10) == data[UNIT - 3 : UNIT + 7]
        assert await file.dma_read(2 * UNIT - 1, 100) == data[-1:], "fewer at the end"


async def test_a_direct_file_says_what_must_be_aligned_and_refuses_the_rest(world: World, folder: str) -> None:
    async with await open_file_dma(world, f"{folder}/a", OpenFlags.create_new(direct=True)) as file:
        if not file.alignment.is_direct:
            assert file.alignment.why
            pytest.skip(f"no direct files here: {file.alignment.why}")
        with pytest.raises(KernelError):
            await file.dma_write(1, b"x" * UNIT)
        with pytest.raises(KernelError):
            await file.dma_write(0, b"x")
        assert file.size() == 0


async def test_operations_run_at_the_same_time_and_close_waits_for_them(world: World, folder: str) -> None:
    file = await open_file_dma(world, f"{folder}/a", OpenFlags.create_new())
    writes = [asyncio.ensure_future(file.dma_write(place * UNIT, bytes([place]) * UNIT)) for place in range(16)]
    await asyncio.sleep(0)
    await file.close()
    assert all(write.done() for write in writes)
    assert await file_size(world, f"{folder}/a") == 16 * UNIT
    with pytest.raises(WrongState):
        await file.dma_read(0, 1)


async def test_failures_are_typed(world: World, folder: str) -> None:
    with pytest.raises(NotFound) as caught:
        await open_file_dma(world, f"{folder}/nothing")
    assert not caught.value.retryable


async def test_a_full_disk_is_an_error_and_no_hang(sim_world: SimWorld, folder: str) -> None:
    sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + UNIT
    async with await open_file_dma(sim_world.world, f"{folder}/a", OpenFlags.create_new()) as file:
        with pytest.raises(DiskFull):
            await file.dma_write(0, b"x" * (2 * UNIT))


@pytest.mark.parametrize("n_bytes", [0, 1, UNIT, 3 * UNIT + 17])
async def test_streams_keep_every_byte_of_a_direct_file(n_bytes: int, world: World, folder: str) -> None:
    data = (bytes(range(251)) * (n_bytes // 251 + 1))[:n_bytes]
    async with await open_file_dma(world, f"{folder}/a", OpenFlags.create_new(direct=True)) as file:
        async with make_file_output_stream(file, buffer_bytes=UNIT) as out:
            for place in range(0, n_bytes, 700):
                await out.write(data[place : place + 700])
        assert file.size() == n_bytes
        async with make_file_input_stream(file, buffer_bytes=UNIT) as stream:
            assert b"".join([piece async for piece in stream]) == data


async def test_an_input_stream_reads_exactly_skips_and_ends(world: World, folder: str) -> None:
    async with await open_file_dma(world, f"{folder}/a", OpenFlags.create_new()) as file:
        await file.dma_write(0, b"0123456789")
        async with make_file_input_stream(file, 1, 8) as stream:
            assert await stream.read_exactly(2) == b"12"
            await stream.skip(3)
            assert await stream.read_exactly(100) == b"678"
            assert await stream.read() == b""


async def test_the_disks_time_is_shared_by_groups(world: World, folder: str) -> None:
    queue = IoQueue(IoProperties(1e6, 1e6, 1000.0, 1000.0), n_in_flight_max=4)
    groups = [SchedulingGroup("log", 800), SchedulingGroup("bulk", 200)]
    done: list[str] = []
    async with await open_file_dma(world, f"{folder}/a", OpenFlags.create_new(), queue=queue) as file:

        async def write(group: SchedulingGroup, place: int) -> None:
            await file.dma_write(place * 512, b"x" * 512)
            done.append(group.name)

        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.create_task(write(group, place), context=group.context()) for place in range(50) for group in groups))
    assert 35 <= done[:50].count("log") <= 45, "four fifths, while both wait"
    assert {each.name: each.n_writes for each in queue.statistics().groups} == {"log": 50, "bulk": 50}


def test_buffers_are_aligned() -> None:
    import ctypes

    for alignment in (512, 4096):
        buffer = AlignedBuffer(1000, alignment)
        with buffer.view as view:
            address = ctypes.addressof(ctypes.c_char.from_buffer(view))
            assert address % alignment == 0
        buffer.release()
        with pytest.raises(WrongState):
            _ = buffer.view


def test_a_pool_recycles_and_has_a_bound() -> None:
    ledger = MemoryLedger()
    pool = BufferPool(64 << 10, ledger=ledger)
    for _ in range(10):
        with pool.lease(10_000):
            pass
    assert pool.statistics().hit_ratio == 0.9
    first = pool.lease(60_000)
    with pytest.raises(Exhausted):
        pool.lease(60_000)
    first.give_back()
    pool.shrink()
    assert ledger.statistics().active == 0
    assert ledger.statistics().allocated == ledger.statistics().freed > 0


def test_a_message_of_pieces_is_not_copied() -> None:
    body = bytearray(b"body")
    message = ScatterGatherBuffer([body])
    message.prepend(b"head ")
    body[0] = ord("B")
    assert (message.gather(), len(message), message.n_pieces) == (b"head Body", 9, 2)
