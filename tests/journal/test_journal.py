"""A journal from outside: batches, group commit, who is told what, and reading while it goes on."""

import asyncio
import random

import pytest

from isopod.journal import Journal, JournalSettings, Record
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.journal.histories import FORMAT, SMALL, record_history, records_of, reopened


async def open_small(world: World, folder: str, settings: JournalSettings = SMALL) -> Journal:
    return await Journal.open(world, f"{folder}/j", format=FORMAT, settings=settings)


@pytest.mark.row("R19")
async def test_what_was_committed_is_read_again(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    assert (journal.first_lsn, journal.last_lsn, journal.durable_lsn) == (1, 0, 0)
    assert await records_of(journal) == []
    assert await journal.commit([(1, b"one"), (2, b"two")]) == 2
    assert await journal.commit([(255, b"")]) == 3
    expected = [Record(1, 1, b"one"), Record(2, 2, b"two"), Record(3, 255, b"")]
    assert await records_of(journal) == expected
    await journal.close()

    journal = await open_small(world, folder)
    assert (journal.first_lsn, journal.last_lsn, journal.durable_lsn) == (1, 3, 3)
    assert await records_of(journal) == expected
    assert await records_of(journal, 3) == expected[2:]
    assert await journal.commit([(4, b"four")]) == 4
    assert await records_of(journal, 4) == [Record(4, 4, b"four")]
    assert await records_of(journal, 5) == []
    await journal.close()


async def test_payloads_of_any_kind_of_bytes(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    changing = bytearray(b"as it was")
    lsn = journal.append([(1, changing), (1, memoryview(b"view"))])  # type: ignore[list-item]  # bytes-like is taken as well
    changing[:] = b"changed!!"
    await journal.wait_durable(lsn)
    assert [record.payload for record in await records_of(journal)] == [b"as it was", b"view"]
    await journal.close()


@pytest.mark.row("R22")
async def test_many_segments(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    expected = []
    for n in range(1, 101):
        payload = bytes([n]) * (n * 7 % 900)
        expected.append(Record(n, n, payload))
        assert await journal.commit([(n, payload)]) == n
    assert await records_of(journal) == expected
    found = journal.statistics()
    assert found.n_segments == found.n_rotations + 1 > 5 and found.n_archived == 0
    assert (found.n_batches, found.n_records, found.durable_lsn) == (100, 100, 100)
    names = await world.disk.list(f"{folder}/j/archive")
    assert len(names) == found.n_rotations
    assert all(name.startswith("wal-") and name.endswith(".log") for name in names)
    await journal.close()
    assert await reopened(world, f"{folder}/j") == expected


async def test_a_batch_as_large_as_a_segment(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    largest = b"x" * SMALL.payload_bytes_max
    for n in range(3):
        assert await journal.commit([(1, largest)]) == 2 * n + 1
        assert await journal.commit([(1, b"small")]) == 2 * n + 2
    assert [len(record.payload) for record in await records_of(journal)] == [len(largest), 5] * 3
    await journal.close()
    assert len(await reopened(world, f"{folder}/j")) == 6


async def test_what_is_queued_meanwhile_is_one_write(world: World, folder: str) -> None:
    journal = await open_small(world, folder, JournalSettings(segment_bytes=64 << 10))
    await journal.commit([(0, b"")])
    before = journal.statistics().n_writes
    await asyncio.gather(*(journal.commit([(1, bytes([n]))]) for n in range(100)))
    assert journal.statistics().n_writes - before <= 2
    assert sorted(record.payload for record in await records_of(journal, 2)) == [bytes([n]) for n in range(100)]
    await journal.close()


async def test_all_of_one_turn_is_one_write(world: World, folder: str) -> None:
    journal = await open_small(world, folder, JournalSettings(segment_bytes=64 << 10))
    for _ in range(5):
        before = journal.statistics().n_writes
        lsns = [journal.append([(1, bytes([n]))]) for n in range(50)]
        await journal.wait_durable(lsns[-1])
        assert journal.statistics().n_writes - before == 1
    await journal.close()


async def test_the_durable_lsn_is_told_in_order_and_not_too_early(sim_world: SimWorld, folder: str) -> None:
    journal = await open_small(sim_world.world, folder)
    told: list[int] = []
    journal.on_durable(told.append)
    chance = random.Random(1)
    lsn = 0
    for _ in range(40):
        lsn = journal.append([(1, chance.randbytes(50))] * chance.randrange(1, 4))
        assert not told or told[-1] < lsn
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() * 0.002)
    await journal.wait_durable(lsn)
    assert told == sorted(told) and told[-1] == journal.durable_lsn == lsn
    await journal.close()


async def test_waiting_for_earlier_and_durable_records(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    lsns = [journal.append([(1, b"")]) for _ in range(10)]
    waits = [asyncio.ensure_future(journal.wait_durable(lsn)) for lsn in (lsns[9], lsns[2], lsns[5], lsns[2])]
    await asyncio.gather(*waits)
    await journal.wait_durable(0)
    await journal.wait_durable(3)
    await journal.close()


async def test_a_cancelled_commit_leaves_the_others_alone(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    tasks = [asyncio.ensure_future(journal.commit([(1, bytes([n]))])) for n in range(6)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[3].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in found] == [True, False, False, True, False, False]
    assert len(await records_of(journal)) == 6, "it was queued: only the waiting ended"
    await journal.close()


async def test_closing_writes_what_is_queued(world: World, folder: str) -> None:
    journal = await open_small(world, folder)
    for n in range(20):
        journal.append([(1, bytes([n]) * 400)])
    await journal.close()
    assert [record.payload[0] for record in await reopened(world, f"{folder}/j")] == list(range(20))


async def test_reading_while_it_is_written_and_tidied(world: World, folder: str) -> None:
    journal = await open_small(world, folder, SMALL._replace(compress=True, archive_n_max=0))
    for n in range(60):
        await journal.commit([(1, bytes([n]) * 200)])

    async def write() -> None:
        for n in range(60, 120):
            await journal.commit([(1, bytes([n]) * 200)])
        await journal.compact(100)
        await journal.tidy()

    writing = asyncio.ensure_future(write())
    found = []
    async for record in journal.read():
        found.append(record.payload[0])
        await asyncio.sleep(0.0005 if world.name == "sim" else 0)
    assert found == list(range(60)), "all that was durable when the reading began, and no more"
    await writing
    await journal.tidy()
    assert [record.payload[0] for record in await records_of(journal)] == list(range(100, 120))
    await journal.close()


async def test_concurrent_writers(world: World, folder: str) -> None:
    journal = await open_small(world, folder, JournalSettings(segment_bytes=32 << 10, compress=True))
    acknowledged: dict[int, bytes] = {}

    async def write(writer: int) -> None:
        chance = random.Random(writer)
        for n in range(40):
            batch = [(writer, f"{writer} {n} {k}".encode() + bytes(chance.randrange(300))) for k in range(chance.randrange(1, 4))]
            lsn = await journal.commit(batch)
            for k, (_, payload) in enumerate(batch):
                acknowledged[lsn - len(batch) + 1 + k] = payload

    await asyncio.gather(*(write(n) for n in range(25)))
    await journal.close()
    found = await reopened(world, f"{folder}/j", JournalSettings(segment_bytes=32 << 10))
    assert {record.lsn: record.payload for record in found} == acknowledged
    assert [record.lsn for record in found] == list(range(1, len(found) + 1))


async def test_a_segment_is_closed_by_age(sim_world: SimWorld, folder: str) -> None:
    journal = await open_small(sim_world.world, folder, SMALL._replace(segment_age_s=3600.0))
    await journal.commit([(1, b"young")])
    await journal.commit([(1, b"young")])
    assert journal.statistics().n_rotations == 0
    sim_world.clock.step_ns(3601 * 10**9)
    await journal.commit([(1, b"later")])
    assert journal.statistics().n_rotations == 1
    assert len(await records_of(journal)) == 3
    await journal.close()


async def test_a_segment_without_records_is_not_closed(world: World, folder: str) -> None:
    """It has a mark of an orderly end in it; its successor would begin with the same LSN and so have its name."""
    await (await open_small(world, folder)).close()
    journal = await open_small(world, folder)
    await journal.rotate()
    assert journal.statistics().n_rotations == 0
    await journal.commit([(1, b"first")])
    await journal.close()
    assert await reopened(world, f"{folder}/j") == [Record(1, 1, b"first")]


async def test_an_empty_segment_that_is_too_small_is_replaced(world: World, folder: str) -> None:
    await (await open_small(world, folder)).close()
    larger = SMALL._replace(segment_bytes=64 << 10)
    journal = await open_small(world, folder, larger)
    assert await journal.commit([(1, bytes(10_000))]) == 1
    assert await journal.commit([(1, b"small")]) == 2
    await journal.close()
    assert await world.disk.list(f"{folder}/j/archive") == []
    assert [len(record.payload) for record in await reopened(world, f"{folder}/j", larger)] == [10_000, 5]


async def test_segments_of_another_size_go_on(world: World, folder: str) -> None:
    sizes = (4 << 10, 64 << 10, 8 << 10, 4 << 10)
    expected = []
    for n, size in enumerate(sizes):
        settings = SMALL._replace(segment_bytes=size)
        journal = await open_small(world, folder, settings)
        for payload in (bytes([n]) * (settings.payload_bytes_max // 2), bytes([n]) * settings.payload_bytes_max):
            expected.append(Record(await journal.commit([(n, payload)]), n, payload))
        assert await records_of(journal) == expected
        await journal.close()
    assert await reopened(world, f"{folder}/j") == expected


async def test_opening_and_closing_adds_nothing(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", [[(1, b"one")]])
    before = await world.disk.read(f"{folder}/j/current.wal")
    for _ in range(5):
        assert await reopened(world, f"{folder}/j") == history.records
    assert await world.disk.read(f"{folder}/j/current.wal") == before


async def test_what_it_logs_and_counts(world: World, folder: str) -> None:
    class Log:
        def __init__(self) -> None:
            self.events: list[str] = []
            self.written: list[tuple[int, int]] = []
            self.n_rotated = 0

        def info(self, event: str, /, **facts: object) -> None:
            self.events.append(event)

        warning = info

        def journal_wrote(self, n_records: int, n_bytes: int, duration_s: float) -> None:
            assert duration_s >= 0.0
            self.written.append((n_records, n_bytes))

        def journal_rotated(self) -> None:
            self.n_rotated += 1

    log = Log()
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL, log=log, metrics=log)
    await journal.commit([(1, b"12345"), (1, b"")])
    await journal.rotate()
    await journal.rotate()
    await journal.snapshot(b"{}", 2)
    await journal.compact(2)
    await journal.close()
    assert log.events == ["journal.opened", "journal.rotated", "journal.snapshot", "journal.compacted"]
    assert log.written == [(2, 32 + 20 + 5 + 20)] and log.n_rotated == 1
