"""Data files beside their peers: random reads, writes made durable, and a file sent over a connection.

Every measurement is a process of its own, which prints one number: CPU microseconds (or milliseconds) per operation, threads and kernel
workers included, or operations a second. Floors are loops of plain blocking calls: no loop can be cheaper, none of them can do anything
else meanwhile. Direct reads go to the disk below the project's `build` folder, so rates say something about that disk only.
"""

import asyncio
import mmap
import os
import random
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row, spawn, wait
from isopod.world.disk import OpenFlags
from isopod.world.host.disk import FileIoChoice
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World

FILE_BYTES: Final = 64 << 20
BLOCK_BYTES: Final = 4096
N_BLOCKS: Final = FILE_BYTES // BLOCK_BYTES
DEPTH: Final = 32
WRITERS: Final = 8

Operation = Callable[[int], Awaitable[object]]


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the measurements."""
    n_runs = 3 if quick else 7
    scale = 1 if quick else 4
    folder = PROJECT / "build" / "bench-files"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "data"
    try:
        _make_file(path)
        yield _row("read 4 KiB cached, one at a time", "us", "cached", path, n=5000 * scale, n_runs=n_runs)
        yield _row("read 4 KiB cached, 32 at once", "us", "cached-many", path, n=5000 * scale, n_runs=n_runs)
        yield _row("read 4 KiB direct, one at a time", "us", "direct-one", path, n=1000 * scale, n_runs=n_runs)
        yield _row("read 4 KiB direct, 32 at once", "us", "direct", path, n=2500 * scale, n_runs=n_runs)
        yield _row("read 4 KiB direct, 32 at once: rate", "1/s", "direct", path, n=2500 * scale, n_runs=n_runs)
        yield _row("write 4 KiB and sync, 8 at once", "us", "durable", path, n=100 * scale, n_runs=n_runs)
        yield _row("write 4 KiB and sync, 8 at once: rate", "1/s", "durable", path, n=100 * scale, n_runs=n_runs)
        peers = ("read and write", "blocking sendfile")
        yield _row("send 64 MiB over TCP, sender's CPU", "ms", "send", path, n=1, n_runs=n_runs, peers=peers)
    finally:
        path.unlink(missing_ok=True)
        folder.rmdir()


def _row(
    name: str, unit: str, case: str, path: Path, *, n: int, n_runs: int, peers: tuple[str, ...] = ("threads", "to_thread", "blocking")
) -> Row:
    def contender(who: str) -> Contender:
        return Contender(who, lambda: _sample(case, who, path, n=n, unit=unit))

    return Row(name, unit, [contender(OURS), *(contender(peer) for peer in peers)], n_runs)


def _sample(case: str, who: str, path: Path, *, n: int, unit: str) -> float:
    """Measure in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from benchmarks.runtime_files import child; child(sys.argv[1:])"
    argv = [sys.executable, "-c", code, case, who, str(path), str(n), unit]
    with tempfile.TemporaryFile() as output:
        wait(argv, spawn(argv, output=output.fileno()))
        output.seek(0)
        text = output.read().decode()
    try:
        return float(text)
    except ValueError as error:
        raise CommandFailed(argv, 0, text) from error


def _make_file(path: Path) -> None:
    block = random.Random(1).randbytes(1 << 20)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES >> 20):
            file.write(block)
        os.fsync(file.fileno())


# -- in the measured process ---------------------------------------------------------------------------------------------------------------


def child(argv: list[str]) -> None:
    """Measure one case and print the number."""
    case, who, path, n, unit = argv
    took = _send(who, path) if case == "send" else _files(case, who, path, int(n))
    wall_s, cpu_s = took
    print({"us": cpu_s * 1e6 / int(n), "ms": cpu_s * 1e3, "1/s": int(n) / wall_s}[unit])


def _files(case: str, who: str, path: str, n: int) -> tuple[float, float]:
    if who == "blocking":
        return _blocking(case, path, n)
    choice: FileIoChoice = "threads" if who == "threads" else "auto"
    world = make_host_world(file_io=choice)
    loop = new_loop("uvloop")
    try:
        return loop.run_until_complete(_measure(world, case, who, path, n=n))
    finally:
        world.close()
        loop.close()


async def _measure(world: World, case: str, who: str, path: str, *, n: int) -> tuple[float, float]:
    operation, close = await (_by_to_thread(case, path) if who == "to_thread" else _by_isopod(world, case, path))
    n_tasks = {"cached": 1, "direct-one": 1, "durable": WRITERS}.get(case, DEPTH)
    try:
        await _work(operation, n_tasks, n_tasks * 2)
        began = _now()
        await _work(operation, n_tasks, n)
        return _since(began)
    finally:
        close()


async def _work(operation: Operation, n_tasks: int, n: int) -> None:
    async def one(number: int) -> None:
        chance = random.Random(number)
        for _ in range(n // n_tasks):
            await operation(chance.randrange(N_BLOCKS) * BLOCK_BYTES)

    await asyncio.gather(*(one(number) for number in range(n_tasks)))


async def _by_isopod(world: World, case: str, path: str) -> tuple[Operation, Callable[[], None]]:
    file = await world.disk.open_file(path, OpenFlags.read_write(direct=case.startswith("direct")))
    memory = [memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(DEPTH)]

    async def read_direct(offset: int) -> None:
        target = memory.pop()
        await file.read_into(offset, target)
        memory.append(target)

    async def write(offset: int) -> None:
        await file.write_at(offset, bytes(BLOCK_BYTES))
        await file.sync()

    if case == "durable":
        return write, file.close
    if case.startswith("direct"):
        return read_direct, file.close
    return lambda offset: file.read_at(offset, BLOCK_BYTES), file.close


async def _by_to_thread(case: str, path: str) -> tuple[Operation, Callable[[], None]]:
    fd = _open(case, path)
    memory = [memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(DEPTH)]

    async def operation(offset: int) -> None:
        target = memory.pop()
        await asyncio.to_thread(_block, case, fd, offset, target)
        memory.append(target)

    return operation, lambda: os.close(fd)


def _blocking(case: str, path: str, n: int) -> tuple[float, float]:
    fd = _open(case, path)
    target = memoryview(mmap.mmap(-1, BLOCK_BYTES))
    chance = random.Random(0)
    began = _now()
    for _ in range(n):
        _block(case, fd, chance.randrange(N_BLOCKS) * BLOCK_BYTES, target)
    took = _since(began)
    os.close(fd)
    return took


def _open(case: str, path: str) -> int:
    return os.open(path, os.O_RDWR | (os.O_DIRECT if case.startswith("direct") else 0))


def _block(case: str, fd: int, offset: int, target: memoryview) -> None:
    if case == "durable":
        os.pwrite(fd, bytes(BLOCK_BYTES), offset)
        os.fdatasync(fd)
    elif case.startswith("direct"):
        os.preadv(fd, [target], offset)
    else:
        os.pread(fd, BLOCK_BYTES, offset)


def _send(who: str, path: str) -> tuple[float, float]:
    listener = socket.create_server(("127.0.0.1", 0))
    reader = os.fork()
    if reader == 0:
        _drain(listener)
    own = socket.create_connection(listener.getsockname())
    listener.close()
    if who == "blocking sendfile":
        began = _now()
        with Path(path).open("rb") as file:
            own.sendfile(file)
        took = _since(began)
        own.close()
    else:
        own.setblocking(False)
        world, loop = make_host_world(), new_loop("uvloop")
        took = loop.run_until_complete(_send_async(world, who, path, own))
        world.close()
        loop.close()
    if os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) != 0:
        raise CommandFailed([who], 1, "the reader got something else")
    return took


async def _send_async(world: World, who: str, path: str, own: socket.socket) -> tuple[float, float]:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), sock=own)
    file = await world.disk.open_read(path)
    began = _now()
    if who == OURS:
        await world.disk.send_file(file, transport, offset=0, n_bytes=FILE_BYTES)
    else:
        writer = asyncio.StreamWriter(transport, protocol, None, loop)
        for offset in range(0, FILE_BYTES, 256 << 10):
            writer.write(await file.read_at(offset, 256 << 10))
            await writer.drain()
    took = _since(began)
    file.close()
    transport.close()
    await asyncio.sleep(0)
    return took


def _drain(listener: socket.socket) -> None:
    """Be the reading process: end with 0 if all came."""
    connection, _ = listener.accept()
    target = bytearray(1 << 20)
    n_bytes = 0
    while n_more := connection.recv_into(target):
        n_bytes += n_more
    os._exit(0 if n_bytes == FILE_BYTES else 1)


def _now() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def _since(began: tuple[float, float]) -> tuple[float, float]:
    wall_s, cpu_s = _now()
    return wall_s - began[0], cpu_s - began[1]
