"""Real processes on the real disk: killed at every failpoint and at any moment; what they had acknowledged is there."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

from isopod.journal import Record
from isopod.world.world import World
from tests.journal.histories import records_of
from tests.journal.test_crashes import FAILPOINTS
from tests.journal.workload import open_journal

CHILD = """
import asyncio, sys
from isopod.journal import Journal, JournalSettings
from isopod.world.host.world import make_host_world

SETTINGS = JournalSettings(segment_bytes=4096, compress=True, archive_n_max=1, snapshots_kept=1)

async def write(journal, writer):
    n = 0
    while True:
        payload = f"{writer} {n}".encode().ljust(150, b".")
        lsn = await journal.commit([(writer, payload), (writer, payload[:10])])
        sys.stdout.write(f"{lsn} {writer} {n}\\n")
        n += 1
        if n % 20 == 0 and writer == 0:
            done = journal.durable_lsn
            await journal.snapshot(b"[%d]" % done, done)
            sys.stdout.write(f"snapshot {done}\\n")
            await journal.compact(max(0, done - 30))
            sys.stdout.write(f"floor {max(0, done - 30)}\\n")
        sys.stdout.flush()

async def tell_pause(world):
    points = [world.failpoints.point(name) for name in world.failpoints.armed_names()]
    while not any(point.n_paused for point in points):
        await asyncio.sleep(0.005)
    sys.stdout.write("paused\\n")
    sys.stdout.flush()

async def main():
    world = make_host_world()
    telling = asyncio.create_task(tell_pause(world))
    journal = await Journal.open(world, sys.argv[1], format="test 1", settings=SETTINGS)
    sys.stdout.write("open\\n")
    sys.stdout.flush()
    await asyncio.gather(*(write(journal, n) for n in range(3)))

asyncio.run(main())
"""
LINES_MAX = 3000
ENDED_S = 20.0


class Child:
    """A process that writes to a journal until it ends or is killed.

    Args:
        folder: The journal's.
        failpoints: ISOPOD_FAILPOINTS of it.
    """

    def __init__(self, folder: str, failpoints: str = "") -> None:
        source = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "src")
        environment = {"PYTHONPATH": source, "PATH": "/usr/bin:/bin", "ISOPOD_FAILPOINTS": failpoints}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def read(self, n_lines: int) -> list[str]:
        """Return the next lines, fewer if it ended."""
        assert self.process.stdout is not None
        found = []
        for _ in range(n_lines):
            line = self.process.stdout.readline()
            if not line:
                break
            found.append(line.rstrip("\n"))
        return found

    def kill(self) -> list[str]:
        """End it as kill -9 does; return what it had still said."""
        self.process.send_signal(signal.SIGKILL)
        return self.rest()

    def rest(self) -> list[str]:
        """Wait for its end; return what it had still said, whole lines only."""
        stdout, self.errors = self.process.communicate(timeout=ENDED_S)
        return stdout.split("\n")[:-1]


async def check(world: World, folder: str, said: Sequence[str]) -> None:
    """Compare what is in the journal with what was acknowledged in all runs."""
    acknowledged: dict[int, Record] = {}
    floor = snapshot = 0
    for line in said:
        words = line.split()
        if words[0] == "floor":
            floor = max(floor, int(words[1]))
        elif words[0] == "snapshot":
            snapshot = max(snapshot, int(words[1]))
        elif words[0] not in ("open", "paused"):
            lsn, writer, n = map(int, words)
            payload = f"{writer} {n}".encode().ljust(150, b".")
            acknowledged[lsn - 1] = Record(lsn - 1, writer, payload)
            acknowledged[lsn] = Record(lsn, writer, payload[:10])
    journal = await open_journal(world, folder)
    try:
        found = {record.lsn: record for record in await records_of(journal)}
        assert journal.last_lsn >= max(acknowledged, default=0)
        assert journal.last_lsn % 2 == 0, "half a batch"
        assert list(found) == list(range(journal.first_lsn, journal.last_lsn + 1))
        for lsn, record in acknowledged.items():
            assert lsn < journal.first_lsn or found[lsn] == record
        taken = await journal.load_snapshot()
        assert (taken[0] if taken else 0) >= snapshot
        assert floor <= journal.first_lsn - 1 <= max(0, journal.last_lsn - 30)
    finally:
        await journal.close()


@pytest.mark.slow
@pytest.mark.row("R19", "R26", "R27")
@pytest.mark.parametrize("point", FAILPOINTS)
async def test_a_process_that_ends_at_a_failpoint(host_world: World, folder: str, point: str) -> None:
    said: list[str] = []
    for nth in (1, 3):
        child = Child(f"{folder}/j", f"{point}=nth({nth}):panic")
        said += child.rest()
        assert child.process.returncode == 70, child.errors
        assert f"failpoint {point}" in child.errors and "Traceback" not in child.errors
        await check(host_world, f"{folder}/j", said)


@pytest.mark.slow
@pytest.mark.row("R19", "R27")
@pytest.mark.parametrize("point", ["journal.before_write", "journal.after_write", "journal.in_rotate"])
async def test_a_process_that_is_killed_at_a_failpoint(host_world: World, folder: str, point: str) -> None:
    child = Child(f"{folder}/j", f"{point}=nth(4):pause")
    said: list[str] = []
    while "paused" not in said:
        said += child.read(1) or pytest.fail(f"it ended before the failpoint: {said}")
    said += child.kill()
    assert child.process.returncode == -signal.SIGKILL
    await check(host_world, f"{folder}/j", said)


@pytest.mark.slow
@pytest.mark.row("R19", "R27")
async def test_a_process_that_is_killed_at_any_moment(host_world: World, folder: str) -> None:
    chance = random.Random(7)
    said: list[str] = []
    for _ in range(8):
        child = Child(f"{folder}/j")
        said += child.read(chance.randrange(1, 120))
        said += child.kill()
        assert child.process.returncode == -signal.SIGKILL, child.errors
        await check(host_world, f"{folder}/j", said)
    assert sum(line[0].isdigit() for line in said) > 100
