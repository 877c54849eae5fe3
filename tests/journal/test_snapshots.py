"""Snapshots, compaction, the archive and its bounds: what is kept, for how long, and that recovery gives the same state."""

import asyncio
import json

import pytest

from isopod.journal import Journal, JournalSettings, Record, SnapshotSchedule
from isopod.world.errors import JournalDamaged
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.journal.histories import FORMAT, SMALL, put_file, records_of


async def open_small(world: World, folder: str, settings: JournalSettings = SMALL) -> Journal:
    return await Journal.open(world, f"{folder}/j", format=FORMAT, settings=settings)


async def fill(journal: Journal, n: int, *, n_bytes: int = 200) -> None:
    for _ in range(n):
        lsn = journal.last_lsn + 1
        await journal.commit([(1, str(lsn).encode().ljust(n_bytes, b"."))])


@pytest.mark.row("R24")
async def test_a_snapshot_is_json_that_a_person_can_read(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    await fill(journal, 3)
    state = '{"containers": [{"name": "wëb", "pid": 12}],\n "n": 1.50}'.encode()
    await journal.snapshot(state, 3)
    assert await world.disk.list(f"{folder}/j/snapshots") == ["snapshot-00000000000000000003.json"]
    text = (await world.disk.read(f"{folder}/j/snapshots/snapshot-00000000000000000003.json")).decode()
    found = json.loads(text)
    assert found["data"] == json.loads(state)
    assert (found["format"], found["version"], found["of"], found["lsn"]) == ("isopod snapshot", 1, FORMAT, 3)
    assert text.count("\n") > 8
    assert await journal.load_snapshot() == (3, state), "byte for byte"
    await journal.close()
    journal = await open_small(world, folder)
    assert await journal.load_snapshot() == (3, state)
    await journal.close()


@pytest.mark.parametrize("data", [b"", b"\xff\x00binary", b" [1] ", b"[1,", b"null", b"0", b'"\xff"', b'{"a": 1}\n'])
async def test_a_snapshot_may_hold_anything(world: World, folder: str, data: bytes) -> None:
    journal = await open_small(world, folder)
    await fill(journal, 1)
    assert await journal.load_snapshot() is None
    await journal.snapshot(data, 1)
    assert await journal.load_snapshot() == (1, data)
    json.loads(await world.disk.read(f"{folder}/j/snapshots/snapshot-00000000000000000001.json"))
    await journal.close()


@pytest.mark.row("R24")
async def test_so_many_snapshots_are_kept(world: World, folder: str) -> None:
    journal = await open_small(world, folder, SMALL._replace(snapshots_kept=2))
    for n in range(1, 6):
        await fill(journal, 1)
        await journal.snapshot(str(n).encode(), n)
    assert await journal.snapshot_lsns() == [5, 4]
    assert await journal.load_snapshot() == (5, b"5")
    await journal.close()


@pytest.mark.row("R25", "R26")
async def test_a_snapshot_and_the_records_after_it(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    await fill(journal, 50)
    await journal.snapshot(b"50", 50)
    await journal.compact(50)
    assert (journal.first_lsn, journal.last_lsn) == (51, 50)
    assert await records_of(journal) == []
    await fill(journal, 7)
    await journal.close()

    journal = await open_small(world, folder)
    found = await journal.load_snapshot()
    assert found == (50, b"50")
    assert [record.lsn for record in await records_of(journal, found[0] + 1)] == list(range(51, 58)), "each once, none twice"
    assert (journal.first_lsn, journal.last_lsn) == (51, 57)
    await journal.compact(10)
    assert journal.first_lsn == 51, "it never goes back"
    await journal.close()


@pytest.mark.row("R23")
@pytest.mark.parametrize("compress", [True, False])
async def test_the_archive_can_be_read(world: World, folder: str, compress: bool) -> None:
    journal = await open_small(world, folder, SMALL._replace(compress=compress, archive_n_max=100))
    await fill(journal, 80)
    everything = await records_of(journal)
    await journal.compact(70)
    await journal.tidy()
    names = await world.disk.list(f"{folder}/j/archive")
    assert len(names) > 3 and all(name.endswith(".log.zst" if compress else ".log") for name in names)
    assert await records_of(journal) == everything[70:]
    assert await records_of(journal, archived=True) == everything
    assert await records_of(journal, 33, archived=True) == everything[32:]
    await journal.close()

    journal = await open_small(world, folder, SMALL._replace(compress=compress, archive_n_max=100))
    assert await records_of(journal, archived=True) == everything
    await journal.close()


@pytest.mark.row("R23")
async def test_recovery_reads_compressed_segments(world: World, folder: str) -> None:
    settings = SMALL._replace(compress=True)
    journal = await open_small(world, folder, settings)
    await fill(journal, 80)
    everything = await records_of(journal)
    await journal.tidy()
    assert all(name.endswith(".zst") for name in await world.disk.list(f"{folder}/j/archive"))
    await journal.close()
    journal = await open_small(world, folder, settings)
    assert await records_of(journal) == everything
    await journal.close()


@pytest.mark.row("R22")
async def test_the_archive_is_bounded_by_number(world: World, folder: str) -> None:
    journal = await open_small(world, folder, SMALL._replace(archive_n_max=3))
    await fill(journal, 100)
    n_before = len(await world.disk.list(f"{folder}/j/archive"))
    await journal.tidy()
    assert len(await world.disk.list(f"{folder}/j/archive")) == n_before > 5, "what recovery needs is not history"
    await journal.compact(100)
    await journal.tidy()
    assert len(await world.disk.list(f"{folder}/j/archive")) == 3
    assert journal.statistics().n_archived == 3
    oldest = (await records_of(journal, archived=True))[0].lsn
    assert oldest > 50, "the oldest went"
    await journal.close()


@pytest.mark.row("R22")
async def test_the_archive_is_bounded_by_size_and_age(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    journal = await open_small(world, folder, SMALL._replace(archive_bytes_max=10_000, archive_age_s_max=86400.0))
    await fill(journal, 100)
    await journal.compact(100)
    await journal.tidy()
    found = journal.statistics()
    assert 0 < found.archived_bytes <= 10_000 and found.n_archived == 2
    sim_world.clock.step_ns(2 * 86400 * 10**9)
    await fill(journal, 1)
    await journal.tidy()
    assert journal.statistics().n_archived == 0
    assert [record.lsn for record in await records_of(journal, archived=True)][-1] == 101
    await journal.close()


@pytest.mark.row("R26")
@pytest.mark.parametrize("lsn", [1, 13, 14, 15, 40, 59])
async def test_what_is_needed_stays_however_little_is_kept(world: World, folder: str, lsn: int) -> None:
    """A segment goes only if all of it was compacted, wherever in a segment the compaction ends."""
    journal = await open_small(world, folder, SMALL._replace(archive_n_max=0))
    await fill(journal, 60)
    everything = await records_of(journal)
    await journal.compact(lsn)
    await journal.tidy()
    assert await records_of(journal) == everything[lsn:]
    await journal.close()
    journal = await open_small(world, folder)
    assert await records_of(journal) == everything[lsn:]
    await journal.close()


async def test_nothing_is_kept_if_nothing_is_wanted(world: World, folder: str) -> None:
    journal = await open_small(world, folder, SMALL._replace(archive_n_max=0))
    await fill(journal, 60)
    await journal.compact(60)
    await journal.rotate()
    await journal.tidy()
    assert await world.disk.list(f"{folder}/j/archive") == []
    assert await records_of(journal, archived=True) == []
    await fill(journal, 1)
    await journal.close()
    journal = await open_small(world, folder)
    assert [record.lsn for record in await records_of(journal)] == [61]
    await journal.close()


async def test_a_damaged_snapshot_falls_back_if_the_records_are_there(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    await fill(journal, 4)
    await journal.snapshot(b"[2]", 2)
    await journal.compact(2)
    await journal.snapshot(b"[4]", 4)
    newest = f"{folder}/j/snapshots/snapshot-00000000000000000004.json"
    data = await world.disk.read(newest)
    await put_file(world, newest, data.replace(b"[4]", b"[5]"))
    assert await journal.load_snapshot() == (2, b"[2]")
    await journal.compact(3)
    with pytest.raises(JournalDamaged, match="checksum does not fit") as caught:
        await journal.load_snapshot()
    assert "isopod journal repair" in caught.value.hint
    await journal.close()


async def test_no_whole_snapshot_is_told(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    await fill(journal, 1)
    await journal.snapshot(b"[1]", 1)
    await put_file(world, f"{folder}/j/snapshots/snapshot-00000000000000000001.json", b"{}")
    with pytest.raises(JournalDamaged, match="no snapshot is whole"):
        await journal.load_snapshot()
    await journal.close()


@pytest.mark.row("R24")
async def test_the_schedule_goes_by_time_and_by_number(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    settings = SMALL._replace(snapshot_interval_s=60.0, snapshot_records=10, snapshots_kept=2)
    journal = await open_small(world, folder, settings)
    schedule = SnapshotSchedule(world, journal)
    await asyncio.sleep(61)
    assert not schedule.is_due(), "nothing was written"
    await fill(journal, 1)
    assert schedule.is_due()
    await schedule.take(b"1", 1)
    assert not schedule.is_due()
    await fill(journal, 9)
    assert not schedule.is_due()
    await fill(journal, 1)
    assert schedule.is_due()
    await schedule.take(b"11", 11)
    assert journal.first_lsn == 2, "the older snapshot has its records"
    await fill(journal, 1)
    await asyncio.sleep(61)
    assert schedule.is_due()
    await schedule.take(b"12", 12)
    assert await journal.snapshot_lsns() == [12, 11] and journal.first_lsn == 12
    assert await records_of(journal) == [Record(12, 1, b"12".ljust(200, b"."))]
    await journal.close()
