"""The io_uring back end: bounds, cancellation, its end, and kernels that refuse it."""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from typing import Final

import pytest

from isopod import _core
from isopod.world.disk import OpenFlags
from isopod.world.host.disk import FileIoChoice, HostDisk
from isopod.world.host.files_io import all_ended
from isopod.world.host.loop import new_loop
from isopod.world.host.uring import UringIo, refusal
from isopod.world.host.workers import Workers

pytestmark = pytest.mark.host

FORBIDDING: Final = textwrap.dedent(
    """
    import asyncio, ctypes, struct, sys, tempfile

    # A seccomp filter that answers io_uring_setup (425) with EPERM, as container runtimes' default profiles do.
    def statement(code, jt, jf, k):
        return struct.pack("=HBBI", code, jt, jf, k)
    program = statement(0x20, 0, 0, 0) + statement(0x15, 0, 1, 425) + statement(0x06, 0, 0, 0x00050001) + statement(0x06, 0, 0, 0x7FFF0000)
    memory = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(memory)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, header) == 0

    from isopod.world.disk import OpenFlags
    from isopod.world.host.world import make_host_world

    async def main():
        with tempfile.TemporaryDirectory() as folder:
            file = await world.disk.open_file(folder + "/a", OpenFlags.create_new())
            await file.write_at(0, b"hello")
            await file.sync()
            print(world.disk.io_facts().backend, "|", world.disk.io_facts().why, "|", await file.read_at(0, 10))
            file.close()

    world = make_host_world(file_io=sys.argv[1])
    asyncio.run(main())
    world.close()
    """
)


@pytest.fixture(autouse=True)
def _need_io_uring() -> None:
    if why := refusal():
        pytest.skip(f"this kernel has no io_uring for us: {why}")


@pytest.mark.row("S7")
@pytest.mark.parametrize("choice", ["auto", "io_uring"])
def test_a_kernel_that_refuses_is_answered_with_threads(choice: str) -> None:
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDING, choice], capture_output=True, text=True, env=environment, timeout=30, check=False
    )
    assert done.stderr == ""
    assert done.stdout.strip() == "threads | no io_uring: io_uring_setup: Operation not permitted | b'hello'"


async def through_ring(io: UringIo, fd: int, offset: int, target: bytearray) -> int:
    """Read without a look at the page cache first."""
    return await io.read_into(fd, offset, target, is_direct=True)


@pytest.mark.row("S7")
@pytest.mark.parametrize("choice", ["threads", "io_uring"])
async def test_what_is_not_in_the_page_cache_comes_from_the_disk(folder: str, choice: FileIoChoice) -> None:
    """The page cache is emptied of the file before each read, so none of them can be answered at once."""
    data = bytes(range(256)) * 4096
    workers = Workers()
    disk = HostDisk(workers, choice)
    file = await disk.open_file(f"{folder}/a", OpenFlags.create_new())
    try:
        await file.write_at(0, data)
        await file.sync()
        for n_bytes in (10, 5000, 100_000):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert await file.read_at(77, n_bytes) == data[77 : 77 + n_bytes]
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        extents = [(index * 10_000, 5000) for index in range(110)]
        assert await file.read_many(extents) == [data[offset : offset + n_bytes] for offset, n_bytes in extents]
        target = bytearray(1000)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert await file.read_into(1 << 19, target) == 1000
        assert target == data[:1000][-1000:]
        found = disk.io_statistics()
        assert found.n_reads >= 114  # one that the cache had half of (the kernel reads ahead) takes a second
        assert found.n_in_flight == 0
    finally:
        file.close()
        disk.close()
        workers.close()


async def test_more_than_fits_waits_and_is_withdrawn_when_cancelled(folder: str) -> None:
    io = UringIo(4)
    descriptor = os.open(f"{folder}/a", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(descriptor, bytes(range(100)), 0)
        targets = [bytearray(1) for _ in range(100)]
        tasks = [asyncio.ensure_future(through_ring(io, descriptor, index, targets[index])) for index in range(100)]
        await asyncio.sleep(0)
        for task in tasks[50:]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[:50] == [1] * 50
        assert b"".join(targets) == bytes(range(50)) + bytes(50)
        assert all(isinstance(each, asyncio.CancelledError) for each in done[50:])
        assert (io.tally.n_in_flight, io.tally.n_reads) == (0, 50)
        with pytest.raises(OSError, match="Bad file descriptor"):
            await through_ring(io, -1, 0, bytearray(1))
        assert io.tally.n_errors == 1
    finally:
        io.close()
        os.close(descriptor)


async def test_closing_tells_everybody_who_waits(folder: str) -> None:
    """Those in the ring, those before it, and those that were cancelled and wait for the kernel."""
    io = UringIo(2)
    descriptor = os.open(f"{folder}/a", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(descriptor, bytes(100), 0)
        tasks = [asyncio.ensure_future(through_ring(io, descriptor, index, bytearray(1))) for index in range(20)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        io.close()
        async with asyncio.timeout(40):
            done = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in done} == {asyncio.CancelledError}
        assert io.tally.n_in_flight == 0
        assert await through_ring(io, descriptor, 0, bytearray(1)) == 1  # a new ring
    finally:
        io.close()
        os.close(descriptor)


async def test_a_cancelled_batch_ends_when_all_of_its_threads_have() -> None:
    """Its caller closes the descriptor then; a thread that goes on would read somebody else's file."""
    workers = Workers()
    begun, go_on, ended = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)], list[int]()

    def call(number: int) -> None:
        begun[number].set()
        go_on[number].wait(50)
        ended.append(number)

    try:
        task = asyncio.ensure_future(all_ended([workers.quick(call, number) for number in range(3)]))
        while not all(each.is_set() for each in begun):
            await asyncio.sleep(0.001)
        task.cancel()
        for number in range(3):
            await asyncio.sleep(0)
            assert not task.done()
            go_on[number].set()
            while len(ended) == number:
                await asyncio.sleep(0.001)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [0, 1, 2]
    finally:
        for each in go_on:
            each.set()
        workers.close()


async def test_a_cancellation_that_meets_the_completion_is_not_lost(folder: str) -> None:
    """The completion is told in the very turn in which the caller is cancelled: neither may wait for the other for ever."""
    io = UringIo(8)
    descriptor = os.open(f"{folder}/a", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(descriptor, b"x" * 4096, 0)
        for turns in range(6):
            for _ in range(20):
                task = asyncio.ensure_future(through_ring(io, descriptor, 0, bytearray(4096)))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 40)
        assert io.tally.n_in_flight == 0
    finally:
        io.close()
        os.close(descriptor)


def test_the_end_waits_for_the_kernel_and_a_new_loop_gets_a_new_ring(folder: str) -> None:
    workers = Workers()
    disk = HostDisk(workers, "io_uring")

    async def write(name: str) -> None:
        file = await disk.open_file(f"{folder}/{name}", OpenFlags.create_new())
        await file.write_at(0, b"x" * 1000)
        file.close()

    for name in ("a", "b"):
        loop = new_loop("uvloop")
        loop.run_until_complete(write(name))
        loop.close()
    disk.close()
    disk.close()
    workers.close()
    assert sorted(os.listdir(folder)) == ["a", "b"]


def test_memory_in_flight_is_held_until_the_ring_is_closed(folder: str) -> None:
    ring = _core.Uring(8)
    descriptor = os.open(f"{folder}/a", os.O_RDWR | os.O_CREAT)
    target = bytearray(10)
    ring.write(descriptor, 0, b"0123456789", None)
    ring.submit()
    while not ring.reap():
        pass
    ring.read_into(descriptor, 0, target, None)
    with pytest.raises(BufferError):
        target.append(1)
    ring.close()
    target.append(1)
    assert target[:10] in (b"0123456789", bytes(10))
    with pytest.raises(ValueError, match="closed"):
        ring.submit()
    os.close(descriptor)


def test_the_core_refuses_what_it_cannot_do() -> None:
    for n_entries in (0, 3, 8192):
        with pytest.raises(ValueError, match="power of two"):
            _core.Uring(n_entries)
    ring = _core.Uring(8)
    with pytest.raises(BufferError):
        ring.read_into(0, 0, b"read-only", None)
    with pytest.raises(BufferError):
        ring.write(0, 0, memoryview(bytes(10))[::2], None)
    with pytest.raises(ValueError, match="1 GiB"):
        ring.read(0, 0, (1 << 30) + 1, None)
    assert ring.n_in_flight() == 0
    ring.close()
