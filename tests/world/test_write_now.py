"""Durable writes in the loop's own thread: only where they are quick, and with the promise of `write_durable`."""

import pytest

from isopod.world.disk import Disk, OpenFlags
from isopod.world.host.files_data import GOOD_WRITES, NOW_BYTES_MAX, QUICK_NS, QUICK_WRITES, QUICK_WRITES_MAX, STALL_NS, Pace
from isopod.world.sim import SimWorld
from isopod.world.world import World


def is_quick(pace: Pace) -> bool:
    return pace.is_quick


def quick_after(pace: Pace, took_ns: int = QUICK_NS // 2) -> int:
    """Return after how many writes off the loop a file is trusted."""
    for number in range(1, QUICK_WRITES_MAX + 2):
        assert not is_quick(pace)
        pace.note(took_ns)
        if is_quick(pace):
            return number
    raise AssertionError("never")


def test_a_file_is_trusted_after_some_quick_writes() -> None:
    pace = Pace()
    assert quick_after(pace) == QUICK_WRITES
    pace.note_now(2 * QUICK_NS)
    assert is_quick(pace), "one that is slower does not change the mean"
    for _ in range(20):
        pace.note_now(2 * QUICK_NS)
    assert not is_quick(pace)
    assert quick_after(pace, 0) == QUICK_WRITES
    slow = Pace()
    for _ in range(10_000):
        slow.note(QUICK_NS + QUICK_NS // 10)
    assert not is_quick(slow)


def test_a_stall_ends_it_at_once_and_the_disk_is_trusted_later_each_time() -> None:
    pace = Pace()
    found: list[int] = []
    for _ in range(6):
        found.append(quick_after(pace, 0))
        pace.note_now(STALL_NS)
    assert found == [QUICK_WRITES, QUICK_WRITES * 4, QUICK_WRITES * 16, QUICK_WRITES * 64, QUICK_WRITES_MAX, QUICK_WRITES_MAX]
    pace.note(STALL_NS)
    quick_after(pace, 0)
    for _ in range(GOOD_WRITES):
        pace.note_now(0)
    pace.note_now(STALL_NS)
    assert quick_after(pace, 0) == QUICK_WRITES * 4, "long ago"


def test_a_stall_off_the_loop_starts_the_count_anew() -> None:
    pace = Pace()
    for _ in range(QUICK_WRITES - 1):
        pace.note(0)
    pace.note(STALL_NS)
    assert quick_after(pace, 0) >= QUICK_WRITES


async def test_what_was_written_now_is_there(world: World, folder: str) -> None:
    file = await world.disk.open_file(f"{folder}/a", OpenFlags.create_new())
    await file.allocate(0, 8192)
    await file.sync()
    n_inline = world.disk.io_statistics().n_inline
    file.write_durable_now(10, b"hello")
    file.write_durable_now(4090, memoryview(bytearray(b"across a page")))
    assert await file.read_at(8, 9) == bytes(2) + b"hello" + bytes(2)
    assert await file.read_at(4090, 13) == b"across a page"
    assert world.disk.io_statistics().n_inline >= n_inline + 2
    assert not file.may_write_now(NOW_BYTES_MAX + 1)
    file.close()
    assert not file.may_write_now(1)
    with pytest.raises(ValueError, match="closed"):
        file.write_durable_now(0, b"x")


async def test_a_file_for_reading_is_not_written(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/a", b"data")
    file = await world.disk.open_file(f"{folder}/a", OpenFlags.read_only())
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.write_durable_now(0, b"x")
    file.close()


async def test_it_survives_a_power_cut(sim_world: SimWorld, folder: str) -> None:
    disk: Disk = sim_world.world.disk
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_new())
    await file.allocate(0, 4096)
    await file.sync()
    await disk.sync_directory(folder)
    file.write_durable_now(0, b"durable")
    sim_world.power_cut()
    file = await disk.open_file(f"{folder}/a", OpenFlags.read_only())
    assert await file.read_at(0, 7) == b"durable"
    file.close()


async def test_a_slow_disk_of_the_simulation_says_no(sim_world: SimWorld, folder: str) -> None:
    file = await sim_world.world.disk.open_file(f"{folder}/a", OpenFlags.create_new())
    found = [file.may_write_now(1) for _ in range(50)]
    assert True in found and False in found
    sim_world.disk.faults.sync_delay_s = (0.1, 0.2)
    assert not any(file.may_write_now(1) for _ in range(50))
    file.close()
