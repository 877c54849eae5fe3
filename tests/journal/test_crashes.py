"""Crashes: power cuts and kills at any moment and at every failpoint, simulated over many seeds; nothing acknowledged is lost, no batch is
torn apart, and the journal opens again."""

import asyncio
import contextlib
import random

import pytest

from isopod.journal import JournalSettings
from isopod.world.errors import DiskFull, UnavailableError
from isopod.world.sim import SimWorld
from tests.journal.histories import SMALL
from tests.journal.workload import Model, open_journal, work

PACKING = SMALL._replace(compress=True, archive_n_max=2, snapshots_kept=2)
BARE = SMALL._replace(archive_n_max=0, snapshots_kept=1)
KINDS = (SMALL, PACKING, BARE)
FAILPOINTS = (
    "journal.before_write",
    "journal.after_write",
    "journal.before_allocate",
    "journal.before_seal",
    "journal.before_rotate",
    "journal.in_rotate",
    "journal.after_rotate",
    "journal.before_snapshot",
    "journal.after_snapshot_rename",
    "journal.before_compact",
    "journal.after_compact",
    "journal.before_archive_compress",
    "journal.after_archive_compress",
    "journal.before_archive_remove",
)


def crash_often(seed: int, *, n_crashes: int, settings: JournalSettings, is_power: bool) -> None:
    sim = SimWorld(seed)
    try:
        sim.run(_crash_often(sim, random.Random(seed), n_crashes=n_crashes, settings=settings, is_power=is_power))
    finally:
        sim.close()


async def _crash_often(sim: SimWorld, chance: random.Random, *, n_crashes: int, settings: JournalSettings, is_power: bool) -> None:
    sim.disk.faults.keeps_unsynced = True
    model = Model()
    for _ in range(n_crashes):
        node = sim.spawn_node(work(sim.world, "/j", model, chance, settings=settings))
        await asyncio.sleep(chance.random() ** 2 * 0.3)
        if node.done():
            await node.wait()
        node.kill()
        if is_power:
            sim.power_cut()
    journal = await open_journal(sim.world, "/j", settings)
    await model.recovered(journal)
    await journal.close()


@pytest.mark.row("R19", "R21", "R25", "R27")
@pytest.mark.parametrize("seed", range(40))
def test_power_cuts_at_any_moment(seed: int) -> None:
    crash_often(seed, n_crashes=6, settings=KINDS[seed % 3], is_power=True)


@pytest.mark.row("R19", "R27")
@pytest.mark.parametrize("seed", range(10))
def test_kills_at_any_moment(seed: int) -> None:
    crash_often(1000 + seed, n_crashes=6, settings=KINDS[seed % 3], is_power=False)


@pytest.mark.row("R19", "R26", "R27")
@pytest.mark.parametrize("name", FAILPOINTS)
@pytest.mark.parametrize("is_power", [True, False], ids=["power", "kill"])
def test_a_crash_at_every_failpoint(name: str, is_power: bool) -> None:
    n_hits = 0
    for seed in range(6):
        sim = SimWorld(seed)
        try:
            n_hits += sim.run(_crash_at(sim, name, random.Random(seed), nth=seed + 1, is_power=is_power))
        finally:
            sim.close()
    assert n_hits >= 3, "the place was hardly reached: the workload does not test it"


async def _crash_at(sim: SimWorld, name: str, chance: random.Random, *, nth: int, is_power: bool) -> int:
    sim.disk.faults.keeps_unsynced = True
    model = Model()
    settings = PACKING
    journal = await open_journal(sim.world, "/j", settings)
    await journal.close()
    sim.world.failpoints.set(name, f"nth({nth}):panic")
    node = sim.spawn_node(work(sim.world, "/j", model, chance, settings=settings, n_steps=240))
    while not node.done():
        await asyncio.sleep(0.01)
    is_hit = bool(sim.processes.aborts)
    if not is_hit:
        await node.wait()
    sim.world.failpoints.clear()
    if is_power:
        sim.power_cut()
    journal = await open_journal(sim.world, "/j", settings)
    await model.recovered(journal)
    assert await journal.commit([(1, b"goes on")]) == journal.last_lsn
    await journal.close()
    return is_hit


@pytest.mark.row("R19", "R25", "R27")
@pytest.mark.parametrize("seed", [5113, *range(14)])
def test_failing_devices_full_disks_and_crashes(seed: int) -> None:
    """A failed write or sync ends the process, which starts again on what it left; a full disk only refuses."""
    sim = SimWorld(seed)
    try:
        sim.run(_break_often(sim, random.Random(seed), KINDS[seed % 3]))
    finally:
        sim.close()


async def _break_often(sim: SimWorld, chance: random.Random, settings: JournalSettings) -> None:
    faults = sim.disk.faults
    faults.keeps_unsynced = True
    model = Model()
    for _ in range(8):
        faults.sync_errors = chance.choice([0, 0, 0.02])
        faults.write_errors = chance.choice([0, 0, 0.01])
        if chance.random() < 0.2:
            faults.fill(leaving_bytes=chance.randrange(20_000))
        else:
            sim.disk.capacity_bytes = 1 << 40
        n_aborts = len(sim.processes.aborts)
        node = sim.spawn_node(work(sim.world, "/j", model, chance, settings=settings, n_steps=90))
        await asyncio.sleep(chance.random() ** 2 * 0.4)
        if node.done() and len(sim.processes.aborts) == n_aborts:
            with contextlib.suppress(UnavailableError):  # it could not be opened, on a full or failing disk
                await node.wait()
        node.kill()
        if chance.random() < 0.6:
            sim.power_cut()
    faults.clear()
    sim.disk.capacity_bytes = 1 << 40
    journal = await open_journal(sim.world, "/j", settings)
    await model.recovered(journal)
    await journal.close()


@pytest.mark.row("R19")
@pytest.mark.parametrize("second", ["journal.before_allocate", "journal.in_rotate", "journal.after_rotate"])
async def test_a_recovery_that_is_cut_off_in_its_turn(sim_world: SimWorld, second: str) -> None:
    """A rotation ends in the middle, and then the recovery from it: there is never neither a current segment nor a next one."""
    model = Model()
    sim_world.world.failpoints.set("journal.in_rotate", "nth(2):panic")
    for n, point in enumerate((second, second, "")):
        node = sim_world.spawn_node(work(sim_world.world, "/j", model, random.Random(n), settings=SMALL, n_steps=240))
        while not node.done():
            await asyncio.sleep(0.01)
        assert len(sim_world.processes.aborts) > min(n, 1)
        sim_world.power_cut()
        sim_world.world.failpoints.clear()
        if point:
            sim_world.world.failpoints.set(point, "nth(1):panic")
    journal = await open_journal(sim_world.world, "/j", SMALL)
    await model.recovered(journal)
    await journal.close()


@pytest.mark.row("R19")
async def test_a_recovery_on_a_full_disk_can_be_repeated(sim_world: SimWorld) -> None:
    """A rotation ended in the middle, and there is no space for the next segment: nothing of what is needed later is given up."""
    model = Model()
    sim_world.world.failpoints.set("journal.in_rotate", "nth(2):panic")
    node = sim_world.spawn_node(work(sim_world.world, "/j", model, random.Random(1), settings=SMALL, n_steps=240))
    while not node.done():
        await asyncio.sleep(0.01)
    assert sim_world.processes.aborts
    sim_world.world.failpoints.clear()
    for _ in range(3):
        sim_world.world.failpoints.set("journal.before_allocate", "error(ENOSPC)")
        with pytest.raises(DiskFull):
            await open_journal(sim_world.world, "/j", SMALL)
    sim_world.world.failpoints.clear()
    journal = await open_journal(sim_world.world, "/j", SMALL)
    await model.recovered(journal)
    await journal.close()


def test_the_list_of_failpoints_is_complete(sim_world: SimWorld) -> None:
    async def body() -> None:
        journal = await open_journal(sim_world.world, "/j")
        await journal.close()

    sim_world.run(body())
    assert sorted(FAILPOINTS) == [name for name in sim_world.world.failpoints.names() if name.startswith("journal.")]
