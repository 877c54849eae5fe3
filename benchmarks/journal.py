"""The journal beside its floor and its peers: durable commits of 256-byte records, one at a time, by the batch, by many at once.

    python -m benchmarks.journal [--quick]

Everything is written below the project's `build` folder, on its real file system. The device's own rate of durable writes is the
peer called "bare": blocking calls (pwritev2 with RWF_DSYNC in an allocated file, no checksum, no loop), which nothing can beat that
does something else meanwhile. "SQLite" is the standard library's, write-ahead log, synchronous=FULL, a blocking call too. CPU is the
whole process's. Each measurement is a process of its own; medians of rounds in turns.
"""

import argparse
import asyncio
import os
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row, measure, spawn, wait, write_results
from isopod.journal import Journal, JournalSettings
from isopod.world.host.disk import FileIoChoice
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world

RECORD_BYTES: Final = 256
SETTINGS: Final = JournalSettings(compress=False, archive_n_max=0)
FILE_BYTES: Final = 64 << 20
PEERS: Final = ("threads", "bare", "SQLite")
FOLDER: Final = PROJECT / "build" / "bench-journal"


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the measurements."""
    n_runs = 3 if quick else 7
    scale = 1 if quick else 3
    for n_tasks, n_records, n in ((1, 1, 2000), (1, 100, 500), (16, 1, 6000), (256, 1, 20_000)):
        what = f"{n_tasks} at once" if n_tasks > 1 else "one at a time"
        peers = PEERS if n_tasks == 1 else PEERS[:1]
        for unit, of in (("1/s", "records"), ("us", "CPU a record")):
            name = f"commit {n_records} x {RECORD_BYTES} B, {what}: {of}"
            yield _row(name, unit, n_tasks, n_records, n=n * scale, n_runs=n_runs, peers=peers)
    yield _row("append 100 and wait once: CPU a record", "us", 0, 1, n=20_000 * scale, n_runs=n_runs, peers=PEERS[:1])
    yield _row("read back: records", "1/s", -1, 1, n=20_000 * scale, n_runs=n_runs, peers=())


def main(argv: Sequence[str]) -> int:
    """Measure everything; returns 1 if something of isopod's own could not be measured."""
    parser = argparse.ArgumentParser(prog="bench-journal", description="isopod's journal beside its floor and its peers")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: to see that it works")
    arguments = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        results = measure(rows(quick=arguments.quick))
    finally:
        shutil.rmtree(FOLDER)
    print(f"wrote {write_results('journal', results).relative_to(PROJECT)}")
    return 1 if not results or any(result.ours is None for result in results) else 0


def _row(name: str, unit: str, n_tasks: int, n_records: int, *, n: int, n_runs: int, peers: tuple[str, ...]) -> Row:
    def contender(who: str) -> Contender:
        return Contender(who, lambda: _sample(who, unit, n_tasks, n_records, n=n))

    return Row(name, unit, [contender(OURS), *(contender(peer) for peer in peers)], n_runs)


def _sample(who: str, unit: str, n_tasks: int, n_records: int, *, n: int) -> float:
    """Measure in a process of its own, in a folder of its own."""
    folder = tempfile.mkdtemp(dir=FOLDER)
    code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); from benchmarks.journal import child; child(sys.argv[1:])"
    argv = [sys.executable, "-c", code, who, unit, str(n_tasks), str(n_records), str(n), folder]
    try:
        with tempfile.TemporaryFile() as output:
            wait(argv, spawn(argv, output=output.fileno()))
            output.seek(0)
            text = output.read().decode()
    finally:
        shutil.rmtree(folder)
    try:
        return float(text)
    except ValueError as error:
        raise CommandFailed(argv, 0, text) from error


# -- in the measured process ---------------------------------------------------------------------------------------------------------------


def child(argv: list[str]) -> None:
    """Measure one case and print the number."""
    who, unit, *numbers, folder = argv
    n_tasks, n_records, n = map(int, numbers)
    if who in (OURS, "threads"):
        wall_s, cpu_s = _journal(folder, "threads" if who == "threads" else "auto", n_tasks, n_records, n=n)
    else:
        wall_s, cpu_s = _blocking(_bare(folder) if who == "bare" else _sqlite(folder), n_records, n=n)
    total = n * n_records
    print({"1/s": total / wall_s, "us": cpu_s * 1e6 / total}[unit])


def _journal(folder: str, choice: FileIoChoice, n_tasks: int, n_records: int, *, n: int) -> tuple[float, float]:
    world = make_host_world(file_io=choice)
    loop = new_loop("uvloop")

    async def body() -> tuple[float, float]:
        journal = await Journal.open(world, f"{folder}/j", format="benchmark 1", settings=SETTINGS)
        batch = [(1, os.urandom(RECORD_BYTES)) for _ in range(n_records)]

        async def commits(number: int) -> None:
            for _ in range(number):
                await journal.commit(batch)

        async def turns(number: int) -> None:
            for _ in range(number // 100):
                for _ in range(99):
                    journal.append(batch)
                await journal.commit(batch)

        await (turns if n_tasks <= 0 else commits)(max(200, n if n_tasks < 0 else 0))
        began = _now()
        if n_tasks < 0:
            async for _ in journal.read():
                pass
        elif n_tasks == 0:
            await turns(n)
        else:
            await asyncio.gather(*(commits(n // n_tasks) for _ in range(n_tasks)))
        took = _since(began)
        await journal.close()
        return took

    try:
        return loop.run_until_complete(body())
    finally:
        world.close()
        loop.close()


def _blocking(commit: Callable[[list[bytes]], None], n_records: int, *, n: int) -> tuple[float, float]:
    batch = [os.urandom(RECORD_BYTES) for _ in range(n_records)]
    for _ in range(200):
        commit(batch)
    began = _now()
    for _ in range(n):
        commit(batch)
    return _since(began)


def _bare(folder: str) -> Callable[[list[bytes]], None]:
    fd = os.open(str(Path(folder) / "bare"), os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(fd, 0, FILE_BYTES)
    os.fsync(fd)
    offset = 0

    def commit(batch: list[bytes]) -> None:
        nonlocal offset
        data = b"".join(batch)
        if offset + len(data) > FILE_BYTES:
            offset = 0
        os.pwritev(fd, [data], offset, os.RWF_DSYNC)
        offset += len(data)

    return commit


def _sqlite(folder: str) -> Callable[[list[bytes]], None]:
    base = sqlite3.connect(str(Path(folder) / "base"), isolation_level=None)
    base.execute("pragma journal_mode=wal")
    base.execute("pragma synchronous=full")
    base.execute("create table log (lsn integer primary key, payload blob)")

    def commit(batch: list[bytes]) -> None:
        base.execute("begin")
        base.executemany("insert into log (payload) values (?)", [(payload,) for payload in batch])
        base.execute("commit")

    return commit


def _now() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def _since(began: tuple[float, float]) -> tuple[float, float]:
    now = _now()
    return now[0] - began[0], now[1] - began[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
