"""Mapped files, on both Worlds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.runtime.files import OpenFlags, open_file_dma
from isopod.runtime.mmap_files import LINE_BYTES_MAX, WINDOW_BYTES, MappedFile, MappedFileMut
from isopod.world.errors import AlreadyExists, DiskFull, InvalidArgument, KernelError, NotFound
from isopod.world.sim import SimWorld, make_sim_world
from isopod.world.world import World


@pytest.mark.row("S8")
async def test_a_file_is_searched(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"one two\nthree two\n\ntwotwo")
    async with await MappedFile.open(world, f"{folder}/a") as file:
        assert (len(file), file.read(4, 3), file.read(20)) == (25, b"two", b"wotwo")
        assert await file.find(b"two") == 4
        assert await file.find(b"two", 5, 16) is None
        assert await file.find(b"two", 5, 17) == 14
        assert [offset async for offset in file.find_all(b"two")] == [4, 14, 19, 22]
        assert await file.count(b"o") == 5
        assert [line async for line in file.lines()] == [b"one two", b"three two", b"", b"twotwo"]
        assert file.starts_with(b"one")
        assert not file.starts_with(b"two")
        for offset, n_bytes in ((-1, None), (0, -1)):
            with pytest.raises(InvalidArgument):
                file.read(offset, n_bytes)
        with pytest.raises(InvalidArgument):
            await file.find(b"")


async def test_what_lies_over_a_window_is_found_once(world: World, folder: str) -> None:
    data = bytearray(WINDOW_BYTES + 1000)
    data[WINDOW_BYTES - 3 : WINDOW_BYTES + 3] = b"needle"
    await world.disk.write(f"{folder}/a", bytes(data))
    async with await MappedFile.open(world, f"{folder}/a") as file:
        assert [offset async for offset in file.find_all(b"needle")] == [WINDOW_BYTES - 3]
        assert [len(line) async for line in file.lines()] == [LINE_BYTES_MAX] * (WINDOW_BYTES // LINE_BYTES_MAX) + [1000]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"b", b"\n", b"ab"]), min_size=1, max_size=60), st.sampled_from([b"a", b"ab", b"aba", b"\n"]))
def test_searching_agrees_with_bytes(pieces: list[bytes], needle: bytes) -> None:
    data = b"".join(pieces)
    sim = make_sim_world()

    async def body() -> None:
        await sim.world.disk.write("/a", data)
        async with await MappedFile.open(sim.world, "/a") as file:
            found = [offset async for offset in file.find_all(needle)]
            assert found == [offset for offset in range(len(data)) if data[offset:].startswith(needle)]
            assert [line async for line in file.lines()] == (data[:-1] if data.endswith(b"\n") else data).split(b"\n")

    try:
        sim.run(body())
    finally:
        sim.close()


@pytest.mark.row("S8")
async def test_a_file_is_made_changed_and_flushed(world: World, folder: str) -> None:
    async with await MappedFileMut.create(world, f"{folder}/a", 10_000) as file:
        file.write_at(5, b"hello")
        file.fill(255, 9_990)
        file.fill(7, 20, 3)
        file.copy_within(5, 100, 5)
        file.copy_within(100, 102, 5)
        await file.flush_range(100, 10)
        await file.flush()
        with pytest.raises(KernelError):
            file.write_at(9_999, b"xy")
        for value, offset, n_bytes in ((256, 0, None), (0, 9_000, 2_000), (0, -1, None)):
            with pytest.raises(InvalidArgument):
                file.fill(value, offset, n_bytes)
    data = await world.disk.read(f"{folder}/a")
    expected = bytearray(10_000)
    expected[5:10], expected[20:23], expected[100:107], expected[-10:] = b"hello", b"\7\7\7", b"hehello", b"\xff" * 10
    assert data == expected
    async with await MappedFileMut.open(world, f"{folder}/a") as file:
        file.write_at(0, b"x")
    assert (await world.disk.read(f"{folder}/a"))[:1] == b"x"


async def test_failures_are_errors_of_the_tree(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"")
    with pytest.raises(NotFound):
        await MappedFile.open(world, f"{folder}/missing")
    for kind in (MappedFile, MappedFileMut):
        with pytest.raises(KernelError):
            await kind.open(world, f"{folder}/a")
    with pytest.raises(AlreadyExists):
        await MappedFileMut.create(world, f"{folder}/a", 1)
    with pytest.raises(InvalidArgument):
        await MappedFileMut.create(world, f"{folder}/b", 0)
    assert await world.disk.list(folder) == ["a"]


@pytest.mark.row("S8")
async def test_a_file_cut_under_its_map_is_an_error(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"x" * 100_000)
    async with await MappedFileMut.open(world, f"{folder}/a") as mapped:
        async with await open_file_dma(world, f"{folder}/a", OpenFlags.read_write()) as file:
            await file.truncate(10)
        with pytest.raises(KernelError):
            mapped.write_at(50_000, b"y")
        with pytest.raises(KernelError):
            mapped.fill(0)
        with pytest.raises(KernelError):
            mapped.copy_within(90_000, 0, 10)
        with pytest.raises(KernelError):
            await mapped.find(b"y")
        with pytest.raises(KernelError):
            mapped.read()
        assert mapped.read(0, 10) == b"x" * 10


async def test_a_full_disk_leaves_no_file(sim_world: SimWorld, folder: str) -> None:
    sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + 1000
    with pytest.raises(DiskFull):
        await MappedFileMut.create(sim_world.world, f"{folder}/a", 10_000)
    assert await sim_world.disk.list(folder) == []


@pytest.mark.row("S8")
async def test_what_was_flushed_survives_a_crash(sim_world: SimWorld) -> None:
    world = sim_world.world
    await world.disk.make_directory("/d")
    file = await MappedFileMut.create(world, "/d/a", 8)
    await world.disk.sync_directory("/d")
    file.write_at(0, b"kept")
    await file.flush()
    file.write_at(4, b"lost")
    file.close()
    sim_world.disk.crash()
    assert await world.disk.read("/d/a") == b"kept" + bytes(4)
