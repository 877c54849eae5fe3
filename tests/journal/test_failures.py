"""A failed write or sync is final; a full disk is not, and loses nothing; the archive's troubles are the archive's."""

import asyncio
import errno

import pytest

from isopod.journal import Journal, JournalSettings, Record
from isopod.world.errors import DiskFull, IsopodError, JournalFailed, KernelError, UnavailableError
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.journal.histories import FORMAT, SMALL, records_of, reopened
from tests.journal.workload import Model, open_journal


@pytest.mark.parametrize("kind", ["write", "sync"])
@pytest.mark.row("R19")
async def test_after_a_failed_sync_nothing_is_taken(sim_world: SimWorld, folder: str, kind: str) -> None:
    world = sim_world.world
    fatal: list[str] = []
    told: list[tuple[int, IsopodError]] = []
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL, on_fatal=fatal.append)
    journal.on_refused(lambda lsn, error: told.append((lsn, error)))
    assert await journal.commit([(1, b"before")]) == 1
    sim_world.disk.faults.fail_next("write" if kind == "write" else "sync")

    outcomes = await asyncio.gather(*(journal.commit([(1, bytes([n]))]) for n in range(5)), return_exceptions=True)
    assert all(isinstance(each, JournalFailed) for each in outcomes)
    assert len(fatal) == 1 and "Input/output error" in fatal[0]
    assert [(lsn, type(error)) for lsn, error in told] == [(2, JournalFailed)]
    for _ in range(3):
        with pytest.raises(JournalFailed):
            journal.append([(1, b"after")])
        with pytest.raises(JournalFailed):
            await journal.wait_durable(2)
    with pytest.raises(JournalFailed):
        await journal.compact(1)
    await journal.wait_durable(1)
    assert journal.durable_lsn == 1
    await journal.close()
    sim_world.power_cut()
    assert (await reopened(world, f"{folder}/j"))[0] == Record(1, 1, b"before")


@pytest.mark.row("R19")
@pytest.mark.parametrize("n_before", [0, 1, 9])
@pytest.mark.parametrize("what", ["commit", "rotate", "close"])
async def test_what_only_the_page_cache_had_is_written_again(sim_world: SimWorld, folder: str, what: str, n_before: int) -> None:
    """A flush fails and the process ends; the next one reads the pages, which count as clean, and appends behind them; the power fails."""
    world = sim_world.world
    for seed in range(12):  # whether the pages are dropped at once is a matter of chance
        path = f"{folder}/{seed}"
        journal = await Journal.open(world, path, format=FORMAT, settings=SMALL, on_fatal=lambda why: None)
        for n in range(n_before):
            await journal.commit([(n, bytes([n]) * 200)])
        sim_world.disk.faults.fail_next("sync")
        failing = {"commit": journal.commit([(77, b"x" * 700)]), "rotate": journal.rotate(), "close": journal.close()}
        for name, call in failing.items():
            if name == what:
                await asyncio.gather(call, return_exceptions=True)
            else:
                call.close()
        sim_world.disk.faults.clear()
        await journal.close()

        node = sim_world.spawn_node(_go_on(world, path))
        expected = await node.wait()
        assert len(expected) >= n_before + 2
        sim_world.power_cut()
        assert await reopened(world, path) == expected


async def _go_on(world: World, path: str) -> list[Record]:
    """Open a journal and append to it; leave it open, return what is in it."""
    journal = await open_journal(world, path)
    await journal.commit([(88, b"behind it")])
    await journal.rotate()
    await journal.commit([(99, b"and more")])
    return await records_of(journal)


async def test_the_process_ends_by_default(sim_world: SimWorld) -> None:
    async def node() -> None:
        journal = await open_journal(sim_world.world, "/j")
        await journal.commit([(1, b"")])
        sim_world.world.failpoints.set("journal.before_write", "error(EIO)")
        await journal.commit([(1, b"")])

    handle = sim_world.spawn_node(node())
    while handle.is_alive:
        await asyncio.sleep(0.01)
    assert "journal /j: a write or sync failed" in sim_world.processes.aborts[0].why


@pytest.mark.parametrize("number", ["EIO", "ENOSPC", "EDQUOT"])
async def test_any_error_of_a_write_is_final(world: World, folder: str, number: str) -> None:
    """ENOSPC in allocated space is no full disk: nobody can tell what was written."""
    fatal: list[str] = []
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL, on_fatal=fatal.append)
    world.failpoints.set("journal.before_write", f"error({number})")
    with pytest.raises(JournalFailed):
        await journal.commit([(1, b"")])
    world.failpoints.clear()
    with pytest.raises(JournalFailed):
        await journal.commit([(1, b"")])
    assert len(fatal) == 1
    await journal.close()


async def test_a_failing_rotation_is_final(world: World, folder: str) -> None:
    fatal: list[str] = []
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL, on_fatal=fatal.append)
    await journal.commit([(1, b"kept")])
    world.failpoints.set("journal.before_rotate", "error")
    with pytest.raises(JournalFailed):
        await journal.rotate()
    assert len(fatal) == 1
    await journal.close()
    world.failpoints.clear()
    assert await reopened(world, f"{folder}/j") == [Record(1, 1, b"kept")]


@pytest.mark.parametrize("seed", range(5))
async def test_a_full_disk_refuses_and_loses_nothing(sim_world: SimWorld, folder: str, seed: int) -> None:
    world = sim_world.world
    settings = SMALL._replace(archive_n_max=0)
    journal = await open_journal(world, f"{folder}/j", settings)
    expected: list[Record] = []
    refused: list[int] = []
    journal.on_refused(lambda lsn, error: refused.append(lsn))
    sim_world.disk.faults.fill(leaving_bytes=(seed + 1) * 3000)
    n_refused = 0
    for n in range(60):
        payload = bytes([n]) * 300
        try:
            lsn = await journal.commit([(n, payload)])
        except DiskFull as error:
            assert "free some space" in error.hint
            n_refused += 1
        else:
            expected.append(Record(lsn, n, payload))
    assert n_refused > 10 and len(expected) >= 9, "what was allocated was used to its end"
    assert journal.failure is None
    assert await records_of(journal) == expected

    sim_world.disk.capacity_bytes = 1 << 30
    last = 0
    for n in range(5):  # the first ones may be refused still: they are what starts the next attempt
        try:
            last = await journal.commit([(n, b"again")])
            expected.append(Record(last, n, b"again"))
        except DiskFull:
            await asyncio.sleep(0.01)
    assert last > 0 and journal.last_lsn == last
    assert await records_of(journal) == expected
    await journal.close()
    assert await reopened(world, f"{folder}/j") == expected


async def test_a_late_waiter_for_a_refused_batch_is_told(sim_world: SimWorld, folder: str) -> None:
    journal = await open_journal(sim_world.world, f"{folder}/j")
    sim_world.disk.faults.fill()
    lsns = [journal.append([(1, bytes(1000))]) for _ in range(6)]
    await journal.wait_durable(lsns[2])
    await asyncio.sleep(0.1)
    refused = lsns[-1]
    assert journal.durable_lsn == lsns[2] and journal.failure is None
    with pytest.raises(DiskFull):
        await journal.wait_durable(refused)
    sim_world.disk.capacity_bytes = 1 << 30
    await asyncio.sleep(0.1)
    later = 0
    while not later:
        try:
            later = await journal.commit([(2, b"later")])
        except DiskFull:
            await asyncio.sleep(0.01)
    assert later > refused
    with pytest.raises(DiskFull):
        await journal.wait_durable(refused)
    await journal.wait_durable(later)
    found = await records_of(journal)
    assert refused not in [record.lsn for record in found] and found[-1] == Record(later, 2, b"later")
    await journal.close()
    assert await reopened(sim_world.world, f"{folder}/j") == found


async def test_a_snapshot_on_a_full_disk(sim_world: SimWorld, folder: str) -> None:
    journal = await open_journal(sim_world.world, f"{folder}/j")
    await journal.commit([(1, b"")])
    await journal.snapshot(b"[1]", 1)
    sim_world.disk.faults.fill()
    with pytest.raises(DiskFull):
        await journal.snapshot(b"[2]" + b" " * 10_000, 1)
    assert await journal.load_snapshot() == (1, b"[1]")
    await journal.close()


async def test_an_archive_that_cannot_be_compressed_stays_plain(world: World, folder: str) -> None:
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL._replace(compress=True))
    world.failpoints.set("journal.before_archive_compress", "error(ENOSPC)")
    await journal.commit([(1, b"kept")])
    await journal.rotate()
    with pytest.raises(DiskFull):
        await journal.tidy()
    assert await records_of(journal) == [Record(1, 1, b"kept")]
    world.failpoints.clear()
    await journal.tidy()
    assert [name[-8:] for name in await world.disk.list(f"{folder}/j/archive")] == [".log.zst"]
    assert await records_of(journal) == [Record(1, 1, b"kept")]
    await journal.close()


@pytest.mark.parametrize("point", ["journal.before_compact", "journal.before_snapshot"])
async def test_a_failed_snapshot_or_compaction_is_not_final(world: World, folder: str, point: str) -> None:
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    await journal.commit([(1, b"")])
    world.failpoints.set(point, "error")
    call = journal.compact if point.endswith("compact") else (lambda lsn: journal.snapshot(b"{}", lsn))
    with pytest.raises(KernelError):
        await call(1)
    world.failpoints.clear()
    assert journal.first_lsn == 1
    await call(1)
    assert await journal.commit([(1, b"")]) == 2
    await journal.close()


async def test_an_open_that_fails_lets_the_folder_go(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    sim_world.disk.faults.fill()
    with pytest.raises(UnavailableError):
        await open_journal(world, f"{folder}/j")
    sim_world.disk.capacity_bytes = 1 << 30
    for _ in range(30):
        sim_world.disk.faults.fail_next("sync", number=errno.EIO)
        try:
            journal = await open_journal(world, f"{folder}/j")
        except UnavailableError:
            continue
        await journal.close()
    sim_world.disk.faults.clear()
    journal = await open_journal(world, f"{folder}/j")
    assert await journal.commit([(1, b"")]) >= 1
    await journal.close()


def test_the_model_of_refusals_is_used() -> None:
    model = Model()
    model.appended(1, [(1, b"")])
    model.refused(1, DiskFull("/j"))
    assert model.batches == []


def test_default_settings_are_sound() -> None:
    assert JournalSettings().checked() == JournalSettings()
