"""The simulated disk's faults: each happens when it is asked for, not otherwise, and by seed."""

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from isopod.world.disk import OpenFlags
from isopod.world.errors import InvalidArgument
from isopod.world.sim import SimWorld, make_sim_world
from isopod.world.sim.data_files import SimDataFile

pytestmark = pytest.mark.row("B21")

Body = Callable[[SimWorld], Awaitable[object]]


def after(seed: int, body: Body) -> object:
    """Return what a body returns in a simulation whose crashes keep a part."""
    sim = make_sim_world(seed)
    sim.disk.faults.keeps_unsynced = True

    async def run() -> object:
        return await body(sim)

    found = sim.run(run())
    sim.close()
    return found


def outcomes(body: Body, n_seeds: int = 60) -> list[object]:
    return [after(seed, body) for seed in range(n_seeds)]


async def opened(sim: SimWorld, path: str = "/home/f", n_bytes: int = 4096) -> SimDataFile:
    """Return a file of zeros, durable, open for writing."""
    file = await sim.world.disk.open_file(path, OpenFlags.create_or_open())
    await file.truncate(n_bytes)
    await file.sync()
    await sim.world.disk.sync_directory("/home")
    assert isinstance(file, SimDataFile)
    return file


async def errno_of(awaitable: Awaitable[object]) -> int | None:
    with pytest.raises(OSError) as caught:
        await awaitable
    return caught.value.errno


async def torn(sim: SimWorld) -> bytes:
    file = await opened(sim)
    await file.write_at(0, b"a" * 2048)
    sim.disk.crash()
    return bytes((await sim.world.disk.read("/home/f"))[:2048])


def test_an_unsynced_write_survives_in_part_torn_at_sectors() -> None:
    found = [bytes(each) for each in outcomes(torn) if isinstance(each, bytes)]
    for each in found:
        for sector in range(0, 2048, 512):
            assert each[sector : sector + 512] in (b"a" * 512, bytes(512))
    kinds = {each[::512] for each in found}
    assert {b"aaaa", bytes(4)} < kinds
    assert len(kinds) > 5
    assert found == [bytes(each) for each in outcomes(torn) if isinstance(each, bytes)]


def test_without_the_switch_all_of_it_is_lost() -> None:
    for seed in range(20):
        sim = make_sim_world(seed)
        assert sim.run(torn(sim)) == bytes(2048)
        sim.close()


def test_a_sector_never_holds_what_was_never_written_together() -> None:
    async def body(sim: SimWorld) -> bytes:
        file = await opened(sim)
        await file.write_at(0, b"1" * 100)
        await file.write_at(100, b"2" * 100)
        await file.write_at(50, b"3" * 100)
        sim.disk.crash()
        return bytes((await sim.world.disk.read("/home/f"))[:200:50])

    assert set(outcomes(body)) == {bytes(4), b"11\0\0", b"1122", b"1332"}


def test_the_size_is_one_that_the_file_had() -> None:
    async def body(sim: SimWorld) -> tuple[int, bytes]:
        file = await sim.world.disk.open_append("/home/log")
        await file.append(b"x" * 600)
        await file.sync()
        await sim.world.disk.sync_directory("/home")
        await file.append(b"y" * 600)
        await file.append(b"z" * 600)
        sim.disk.crash()
        data = await sim.world.disk.read("/home/log")
        assert data[:600] == b"x" * 600
        return len(data), data[600:]

    found = outcomes(body, 100)
    assert {each[0] for each in found if isinstance(each, tuple)} == {600, 1200, 1800}
    rests = [each[1] for each in found if isinstance(each, tuple) and each[0] == 1800]
    assert any(rest.startswith(b"\0" * 100) for rest in rests)  # a hole: later bytes came, earlier ones did not
    assert any(rest == b"y" * 600 + b"z" * 600 for rest in rests)


def test_after_a_cut_bytes_survive_in_order() -> None:
    async def body(sim: SimWorld) -> bytes:
        file = await opened(sim, n_bytes=0)
        await file.write_at(0, b"old")
        await file.truncate(0)
        await file.write_at(0, b"new")
        sim.disk.crash()
        return await sim.world.disk.read("/home/f")

    assert set(outcomes(body)) == {b"", b"old", b"new"}


def test_write_durable_holds_its_promise_and_no_more() -> None:
    async def body(sim: SimWorld) -> bytes:
        file = await opened(sim)
        await file.write_at(1024, b"b" * 10)
        await file.write_at(5, b"c")
        await file.write_durable(0, b"d" * 3)
        await file.write_at(2048, b"e")
        await file.write_durable(512, b"f")
        sim.disk.crash()
        data = await sim.world.disk.read("/home/f")
        assert data[:4] == b"ddd\0"
        assert data[5:6] == b"c"  # of the same sector
        assert data[512:513] == b"f"
        return data[1024:1025] + data[2048:2049]

    assert set(outcomes(body)) == {b"\0\0", b"b\0", b"\0e", b"be"}


def test_write_durable_promises_no_size() -> None:
    sim = make_sim_world(1)

    async def body() -> None:
        file = await opened(sim, n_bytes=0)
        await file.allocate(0, 8192)
        await file.write_durable(0, b"x" * 100)
        sim.disk.crash()
        assert await sim.world.disk.read("/home/f") == b""
        file = await opened(sim, n_bytes=8192)
        await file.write_durable(0, b"x" * 100)
        sim.disk.crash()
        assert (await sim.world.disk.read("/home/f"))[:101] == b"x" * 100 + b"\0"

    sim.run(body())
    sim.close()


def test_a_crash_during_write_durable_tears_it() -> None:
    async def body(sim: SimWorld) -> bytes:
        async def node() -> None:
            file = await opened(sim)
            sim.disk.faults.sync_delay_s = (10.0, 10.0)
            await file.write_durable(0, b"a" * 2048)

        handle = sim.spawn_node(node())
        await asyncio.sleep(5)
        sim.power_cut()
        assert handle.done()
        return (await sim.world.disk.read("/home/f"))[:2048:512]

    assert len(set(outcomes(body, 30))) > 3


def test_a_kill_during_write_durable_leaves_it_to_the_kernel() -> None:
    sim = make_sim_world(1)

    async def node() -> None:
        file = await opened(sim)
        sim.disk.faults.stall()
        await file.write_durable(0, b"a" * 2048)

    async def body() -> None:
        handle = sim.spawn_node(node())
        await asyncio.sleep(1)
        handle.kill()
        sim.disk.faults.go_on()
        assert (await sim.world.disk.read("/home/f"))[:3] == b"aaa"
        sim.disk.crash()
        assert (await sim.world.disk.read("/home/f"))[:3] == bytes(3)

    sim.run(body())
    sim.close()


def test_a_failed_sync_may_lose_what_later_syncs_do_not_bring_back() -> None:
    async def body(sim: SimWorld) -> bool:
        file = await opened(sim)
        sim.disk.faults.fail_next("sync")
        await file.write_at(0, b"lost")
        assert await errno_of(file.sync()) == errno.EIO
        is_seen = await file.read_at(0, 4) == b"lost"
        await file.write_at(1024, b"kept")
        await file.sync()
        assert await file.read_at(1024, 4) == b"kept"
        sim.disk.crash()
        data = await sim.world.disk.read("/home/f")
        assert data[:4] == bytes(4)
        assert data[1024:1028] == b"kept"
        return is_seen

    assert set(outcomes(body, 20)) == {True, False}


def test_operations_fail_by_chance_or_next_and_change_nothing() -> None:
    sim = make_sim_world(4)

    async def body() -> None:
        disk, faults = sim.world.disk, sim.disk.faults
        await disk.write_atomic("/home/f", b"old")
        file = await disk.open_file("/home/f", OpenFlags.read_write())
        faults.fail_next("write", number=errno.ENOSPC, times=2)
        assert await errno_of(file.write_at(0, b"new")) == errno.ENOSPC
        assert await errno_of(disk.write_atomic("/home/f", b"new")) == errno.ENOSPC
        faults.fail_next("sync")
        assert await errno_of(disk.write_atomic("/home/f", b"new")) == errno.EIO
        faults.fail_next("sync")
        assert await errno_of(disk.sync_directory("/home")) == errno.EIO
        faults.fail_next("read", times=2)
        assert await errno_of(disk.read("/home/f")) == errno.EIO
        assert await errno_of(file.read_at(0, 1)) == errno.EIO
        faults.fail_next("write")
        assert await errno_of(file.write_durable(0, b"new")) == errno.EIO
        assert await disk.read("/home/f") == b"old"
        faults.fail_next("read", path="/home/other")
        assert await file.read_at(0, 3) == b"old"
        faults.fail_next("read", path="/home")
        assert await errno_of(file.read_at(0, 1)) == errno.EIO
        faults.read_errors = 0.5
        n_failed = 0
        for _ in range(100):
            try:
                await file.read_at(0, 3)
            except OSError:
                n_failed += 1
        assert 25 < n_failed < 75
        faults.clear()
        for _ in range(100):
            await file.read_at(0, 3)
        assert faults.counts == {"write_error": 3, "sync_error": 2, "read_error": 3 + n_failed}

    sim.run(body())
    sim.close()


def test_bits_rot_and_sectors_break() -> None:
    def run(seed: int) -> list[int]:
        sim = make_sim_world(seed)
        places: list[int] = []

        async def body() -> None:
            disk, faults = sim.world.disk, sim.disk.faults
            await disk.write_atomic("/home/f", bytes(10_000))
            places.extend(faults.bit_rot("/home/f", n_bits=3, offset=1000, n_bytes=5000))
            data = await disk.read("/home/f")
            assert [place for place, byte in enumerate(data) if byte] == sorted(dict.fromkeys(places))
            assert all(1000 <= place < 6000 for place in places)
            sim.disk.crash()
            assert await disk.read("/home/f") == data
            faults.break_sectors("/home/f", 512, 512)
            file = await disk.open_file("/home/f")
            assert await errno_of(file.read_at(0, 513)) == errno.EIO
            assert len(await file.read_at(0, 512)) == 512
            assert len(await file.read_at(1024, 512)) == 512
            faults.mend_sectors()
            assert len(await file.read_at(512, 1)) == 1
            with pytest.raises(InvalidArgument):
                faults.bit_rot("/home/f", offset=10_000)

        sim.run(body())
        sim.close()
        return places

    assert run(1) == run(1) != run(2)


def test_a_misdirected_write_lands_elsewhere_and_its_own_place_keeps_the_old() -> None:
    async def body(sim: SimWorld) -> str:
        await sim.world.disk.write_atomic("/home/other", bytes(4096))
        file = await opened(sim)
        await file.write_durable(0, b"first" * 100)
        sim.disk.faults.misdirect_next()
        await file.write_durable(1024, b"stray" * 100)
        assert await file.read_at(1024, 5) == b"stray"
        sim.disk.crash()
        own, other = await sim.world.disk.read("/home/f"), await sim.world.disk.read("/home/other")
        assert (len(own), len(other)) == (4096, 4096)
        assert sim.disk.faults.counts == {"misdirected": 1}
        return "other" if b"stray" in other else "own" if b"stray" in own else "gone"

    found = outcomes(body, 40)
    assert {"own", "other"} <= set(found)


def test_slow_stalled_and_full_devices() -> None:
    sim = make_sim_world(1)

    async def body() -> None:
        disk, faults = sim.world.disk, sim.disk.faults
        file = await opened(sim)
        faults.sync_delay_s = (2.0, 3.0)
        began = sim.loop.time()
        await file.write_durable(0, b"x")
        assert 2.0 < sim.loop.time() - began < 3.1
        began = sim.loop.time()
        await file.read_at(0, 1)
        assert sim.loop.time() - began < 0.01
        faults.delay_s = (1.0, 1.0)
        await file.read_at(0, 1)
        assert sim.loop.time() - began > 1.0
        faults.clear()
        faults.stall()
        task = asyncio.create_task(file.read_at(0, 1))
        await asyncio.sleep(1000)
        assert not task.done()
        faults.go_on()
        assert await task == b"x"
        faults.fill(leaving_bytes=10)
        assert await errno_of(disk.write("/home/g", b"x" * 11)) == errno.ENOSPC
        assert await errno_of(file.write_durable(4096, b"x" * 11)) == errno.ENOSPC
        await disk.write("/home/g", b"x" * 10)

    sim.run(body())
    sim.close()


def test_names_survive_in_their_order_and_a_rename_as_a_whole() -> None:
    async def body(sim: SimWorld) -> tuple[str, ...]:
        disk = sim.world.disk
        await disk.write_atomic("/home/a", b"a")
        await disk.write("/home/b", b"")
        await disk.rename("/home/a", "/home/c")
        await disk.write("/home/d", b"")
        sim.disk.crash()
        return tuple(await disk.list("/home"))

    assert set(outcomes(body)) == {("a",), ("a", "b"), ("b", "c"), ("b", "c", "d")}


def test_a_synced_folder_keeps_both_halves_of_a_rename() -> None:
    async def body(sim: SimWorld) -> tuple[tuple[str, ...], ...]:
        disk = sim.world.disk
        await disk.write_atomic("/home/a", b"a")
        await disk.write("/opt/before", b"")
        await disk.rename("/home/a", "/opt/a")
        await disk.sync_directory("/opt")
        sim.disk.crash()
        return tuple(await disk.list("/home")), tuple(await disk.list("/opt"))

    assert set(outcomes(body, 20)) == {((), ("a", "before"))}


def test_write_atomic_leaves_the_old_or_the_new() -> None:
    async def body(sim: SimWorld) -> bytes:
        disk = sim.world.disk
        await disk.write_atomic("/home/f", b"o" * 5000)
        sim.spawn_node(disk.write_atomic("/home/f", b"n" * 6000))
        await asyncio.sleep(0.001)
        sim.power_cut()
        return await disk.read("/home/f")

    assert set(outcomes(body, 60)) == {b"o" * 5000, b"n" * 6000}


def test_reserved_space_costs_no_memory_and_reads_as_zeros() -> None:
    sim = make_sim_world(1)

    async def body() -> None:
        file = await opened(sim, n_bytes=0)
        await file.allocate(0, 1 << 30)
        await file.sync()
        assert file.size_bytes() == 1 << 30
        await file.write_durable(100, b"x")
        assert await file.read_at(98, 4) == b"\0\0x\0"
        assert await file.read_at((1 << 30) - 2, 10) == b"\0\0"
        sim.disk.crash()
        again = await sim.world.disk.open_file("/home/f")
        assert again.size_bytes() == 1 << 30
        assert await again.read_at(98, 4) == b"\0\0x\0"

    sim.run(body())
    sim.close()
