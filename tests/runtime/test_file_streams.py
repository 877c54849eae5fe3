"""Streams over files, on both Worlds: equal bytes for every buffer size and number of operations under way."""

import asyncio

import pytest

from isopod.runtime.file_streams import make_file_input_stream, make_file_output_stream
from isopod.runtime.files import File, OpenFlags, open_file_dma
from isopod.world.errors import DiskFull, InvalidArgument, WrongState
from isopod.world.sim import SimWorld
from isopod.world.world import World

DATA = bytes(range(251)) * 400


async def opened(world: World, path: str, data: bytes = b"", *, direct: bool = False) -> File:
    await world.disk.write(path, data)
    return await open_file_dma(world, path, OpenFlags.read_write(direct=direct))


@pytest.mark.row("S8")
@pytest.mark.parametrize("n_ahead", [0, 1, 5])
@pytest.mark.parametrize("buffer_bytes", [1000, 4096, 1 << 20])
async def test_reading_ahead_gives_the_file(world: World, folder: str, n_ahead: int, buffer_bytes: int) -> None:
    async with await opened(world, f"{folder}/a", DATA) as file:
        async with make_file_input_stream(file, buffer_bytes=buffer_bytes, n_ahead=n_ahead) as stream:
            assert b"".join([piece async for piece in stream]) == DATA
            assert await stream.read() == b""
        async with make_file_input_stream(file, 10, 5000, buffer_bytes=buffer_bytes, n_ahead=n_ahead) as stream:
            assert await stream.read_exactly(3) == DATA[10:13]
            await stream.skip(1990)
            assert await stream.read_up_to(7) == DATA[2003:2010]
            assert await stream.read_exactly(1 << 20) == DATA[2010:5010]
            assert await stream.read_exactly(1) == b""
        with pytest.raises(WrongState):
            await stream.read()


async def test_leaving_in_the_middle_ends_the_reads(world: World, folder: str) -> None:
    async with await opened(world, f"{folder}/a", DATA) as file:
        stream = make_file_input_stream(file, buffer_bytes=512, n_ahead=20)
        await stream.read()
        reading = asyncio.ensure_future(stream.read_exactly(100_000))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await stream.close()
        await stream.close()


@pytest.mark.row("S8")
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("n_behind", [0, 1, 5])
async def test_writing_behind_makes_the_file(world: World, folder: str, n_behind: int, direct: bool) -> None:
    """Pieces of all sizes, flushed at odd places: a direct file is padded to its unit and cut again each time."""
    file = await opened(world, f"{folder}/a", direct=direct)
    stream = make_file_output_stream(file, buffer_bytes=8192, n_behind=n_behind)
    place = 0
    for number, n_bytes in enumerate((1, 4095, 4096, 8192, 20_000, 3, 0, 511, 30_000)):
        await stream.write(memoryview(DATA)[place : place + n_bytes])
        place += n_bytes
        assert stream.position == place
        if number % 2:
            await stream.flush()
            assert file.size() == place
            assert await world.disk.read(f"{folder}/a") == DATA[:place]
    await stream.close()
    await stream.close()
    await file.close()
    assert await world.disk.read(f"{folder}/a") == DATA[:place]
    with pytest.raises(WrongState):
        await stream.write(b"x")


async def test_a_full_disk_ends_the_stream_with_its_error(sim_world: SimWorld, folder: str) -> None:
    async with await opened(sim_world.world, f"{folder}/a") as file:
        sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + 10_000
        stream = make_file_output_stream(file, buffer_bytes=4096, n_behind=2)
        with pytest.raises(DiskFull):
            await stream.write(DATA)
        with pytest.raises(DiskFull):
            await stream.write(b"x")
        with pytest.raises(DiskFull):
            await stream.close()


async def test_what_was_flushed_survives_a_crash(sim_world: SimWorld) -> None:
    world = sim_world.world
    await world.disk.make_directory("/d")
    file = await open_file_dma(world, "/d/a", OpenFlags.create_new(direct=True))
    await world.disk.sync_directory("/d")
    stream = make_file_output_stream(file, buffer_bytes=512)
    await stream.write(DATA[:1000])
    await stream.flush()
    await stream.write(DATA[1000:5000])
    await stream.close()
    await file.close()
    sim_world.disk.crash()
    assert await world.disk.read("/d/a") == DATA[:1000]


async def test_options_are_checked(world: World, folder: str) -> None:
    async with await opened(world, f"{folder}/a", direct=True) as file:
        for buffer_bytes, n_under_way in ((0, 1), (1 << 30, 1), (4096, -1), (4096, 1000)):
            with pytest.raises(InvalidArgument):
                make_file_input_stream(file, buffer_bytes=buffer_bytes, n_ahead=n_under_way)
        with pytest.raises(InvalidArgument):
            make_file_input_stream(file, 0, -1)
        if file.alignment.is_direct:
            with pytest.raises(InvalidArgument):
                make_file_output_stream(file, 1)
