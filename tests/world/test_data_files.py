"""Data files, on both Worlds and with both back ends of the host: the same bodies, the same results (S7)."""

import asyncio
import errno
import mmap
from contextlib import suppress

import pytest

from isopod.world.disk import BATCH_MAX, DataFile, Disk, OpenFlags


async def make(disk: Disk, path: str, data: bytes = b"", *, direct: bool = False) -> DataFile:
    await disk.write(path, data)
    return await disk.open_file(path, OpenFlags.read_write(direct=direct))


@pytest.mark.row("S7")
async def test_what_is_written_at_a_place_is_read_there(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a", b"0123456789")
    await file.write_at(3, b"abc")
    await file.write_at(20, memoryview(b"end"))
    assert await file.read_at(0, 100) == b"012abc6789" + bytes(10) + b"end"
    assert await file.read_at(4, 2) == b"bc"
    assert await file.read_at(22, 100) == b"d"
    assert await file.read_at(23, 100) == b""
    assert await file.read_at(5, 0) == b""
    assert file.size_bytes() == 23
    file.close()
    file.close()


@pytest.mark.row("S7")
async def test_many_megabytes_and_odd_lengths_are_whole(disk: Disk, folder: str) -> None:
    data = bytes(range(251)) * 20_000
    file = await make(disk, f"{folder}/a")
    await file.write_at(0, data)
    assert await file.read_at(0, len(data) + 1000) == data
    target = bytearray(len(data) + 1000)
    assert await file.read_into(0, target) == len(data)
    assert target[: len(data)] == data
    assert target[len(data) :] == bytes(1000)
    file.close()


@pytest.mark.row("S7")
async def test_batches_are_answered_in_order(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a")
    pieces = [(1000 * index, bytes([index % 256]) * 1000) for index in range(BATCH_MAX)]
    await file.write_many(pieces)
    extents = [(offset, len(data)) for offset, data in reversed(pieces)]
    assert await file.read_many(extents) == [data for _, data in reversed(pieces)]
    assert await file.read_many([(0, 10), (len(pieces) * 1000 - 5, 10), (10**9, 10)]) == [b"\0" * 10, b"\xff" * 5, b""]
    assert await file.read_many([]) == []
    with pytest.raises(OSError) as caught:
        await file.read_many([(0, 1)] * (BATCH_MAX + 1))
    assert caught.value.errno == errno.EINVAL
    file.close()


@pytest.mark.row("S7")
async def test_a_thousand_operations_at_once(disk: Disk, folder: str) -> None:
    """More than fit into a ring: what waits for room is done too, and in no order is anything lost."""
    file = await make(disk, f"{folder}/a", bytes(1500 * 8))
    await asyncio.gather(*(file.write_at(index * 8, index.to_bytes(8)) for index in range(1500)))
    found = await asyncio.gather(*(file.read_at(index * 8, 8) for index in range(1500)))
    assert [int.from_bytes(each) for each in found] == list(range(1500))
    assert disk.io_statistics().n_in_flight == 0
    file.close()


async def test_truncate_allocate_and_size(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a", b"0123456789")
    await file.truncate(4)
    assert await file.read_at(0, 10) == b"0123"
    await file.truncate(6)
    assert await file.read_at(0, 10) == b"0123\0\0"
    await file.allocate(0, 100_000)
    assert file.size_bytes() == 100_000
    await file.append(b"x")
    assert file.size_bytes() == 100_001
    await file.sync()
    file.close()


async def test_open_flags_say_what_may_be_there(disk: Disk, folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        await disk.open_file(f"{folder}/a", OpenFlags.read_write())
    (await disk.open_file(f"{folder}/a", OpenFlags.create_new())).close()
    with pytest.raises(FileExistsError):
        await disk.open_file(f"{folder}/a", OpenFlags.create_new())
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_or_open())
    await file.write_at(0, b"abc")
    file.close()
    file = await disk.open_file(f"{folder}/a", OpenFlags(write=True, truncate=True))
    assert (file.size_bytes(), file.path) == (0, f"{folder}/a")
    file.close()
    with pytest.raises(IsADirectoryError):
        await disk.open_file(folder)
    file = await disk.open_file(f"{folder}/a")
    with pytest.raises(OSError) as caught:
        await file.write_at(0, b"x")
    assert caught.value.errno == errno.EBADF
    file.close()


async def test_out_of_range_is_refused_and_a_closed_file_says_so(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a", b"abc")
    for offset, n_bytes in ((-1, 1), (0, -1), (0, (1 << 30) + 1)):
        with pytest.raises(OSError) as caught:
            await file.read_at(offset, n_bytes)
        assert caught.value.errno == errno.EINVAL
    file.close()
    with pytest.raises(ValueError, match="closed"):
        await file.read_at(0, 1)
    with pytest.raises(ValueError, match="closed"):
        await file.sync()
    with pytest.raises(ValueError, match="closed"):
        file.size_bytes()


async def test_closing_during_operations_lets_them_end(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a", bytes(1 << 20))
    reads = [asyncio.ensure_future(file.read_at(index << 10, 1 << 10)) for index in range(50)]
    sync = asyncio.ensure_future(file.sync())
    for _ in range(3):  # all have begun
        await asyncio.sleep(0)
    file.close()
    assert await asyncio.gather(*reads) == [bytes(1 << 10)] * 50
    await sync


@pytest.mark.row("S7")
async def test_a_cancelled_operation_has_let_go_of_its_buffer(disk: Disk, folder: str) -> None:
    """After the cancellation is told, the buffer is the caller's again: nothing is written into it later, and it can be resized."""
    file = await make(disk, f"{folder}/a", b"x" * (4 << 20))
    for turns in range(4):
        target = bytearray(4 << 20)
        read = asyncio.ensure_future(file.read_into(0, target))
        for _ in range(turns):
            await asyncio.sleep(0)
        read.cancel()
        with suppress(asyncio.CancelledError):
            await read
        seen = bytes(target)
        target.extend(b"!")
        assert target[:-1] == seen
    assert await file.read_at(0, 3) == b"xxx"
    assert disk.io_statistics().n_in_flight == 0
    file.close()


async def test_cancelled_batches_and_syncs_leave_nothing_in_flight(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a", bytes(1 << 20))
    for turns in range(3):
        works = [
            asyncio.ensure_future(file.read_many([(index << 12, 4096) for index in range(200)])),
            asyncio.ensure_future(file.write_many([(index << 12, bytes(4096)) for index in range(200)])),
            asyncio.ensure_future(file.sync()),
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        assert disk.io_statistics().n_in_flight == 0
    file.close()


@pytest.mark.row("S8")
async def test_a_direct_file_has_its_units(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a", direct=True)
    unit = file.alignment.offset_bytes
    if not file.alignment.is_direct:
        pytest.skip(f"no direct files here: {file.alignment.why}")
    memory = mmap.mmap(-1, 8 * unit if unit >= 512 else 4096)
    view = memoryview(memory)
    view[:] = bytes(range(256)) * (len(view) // 256)
    await file.write_at(0, view)
    await file.write_at(len(view), bytes(view))  # memory that is not aligned is copied
    assert await file.read_at(0, 10 * len(view)) == bytes(view) * 2
    assert await file.read_at(300, 700) == (bytes(view) * 2)[300:1000]
    assert await file.read_many([(1, 1), (len(view) - 1, 2), (10 * len(view), 5)]) == [b"\x01", b"\xff\0", b""]
    view[:] = bytes(len(view))
    assert await file.read_into(len(view), view) == len(view)
    assert bytes(view) == bytes(range(256)) * (len(view) // 256)
    for offset, n_bytes in ((1, unit), (0, unit - 1)):
        with pytest.raises(OSError) as caught:
            await file.write_at(offset, bytes(n_bytes))
        assert caught.value.errno == errno.EINVAL
    await file.truncate(unit + 10)
    assert await file.read_at(0, 10 * unit) == (bytes(view) * 2)[: unit + 10]
    view.release()
    memory.close()
    file.close()


async def test_a_file_that_is_not_direct_says_why(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a")
    assert file.alignment == (False, 1, 1, "not asked for")
    file.close()


async def test_statistics_count(disk: Disk, folder: str) -> None:
    file = await make(disk, f"{folder}/a")
    before = disk.io_statistics()
    await file.write_at(0, b"12345")
    await file.read_at(0, 3)
    await file.sync()
    after = disk.io_statistics()
    assert (after.n_writes - before.n_writes, after.n_bytes_written - before.n_bytes_written) == (1, 5)
    assert (after.n_reads - before.n_reads, after.n_bytes_read - before.n_bytes_read) == (1, 3)
    assert (after.n_syncs - before.n_syncs, after.n_in_flight) == (1, 0)
    file.close()


async def test_a_copy_is_equal_and_never_replaces(disk: Disk, folder: str) -> None:
    data = bytes(range(256)) * 10_000
    await disk.write(f"{folder}/a", data)
    assert await disk.copy_file(f"{folder}/a", f"{folder}/b") == len(data)
    assert await disk.read(f"{folder}/b") == data
    with pytest.raises(FileExistsError):
        await disk.copy_file(f"{folder}/a", f"{folder}/b")
    with pytest.raises(FileNotFoundError):
        await disk.copy_file(f"{folder}/missing", f"{folder}/c")
    assert await disk.list(folder) == ["a", "b"]
