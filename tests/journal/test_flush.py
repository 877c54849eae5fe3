"""`Journal.flush`: what is queued is written in the loop's own thread where the disk is quick, with the same promises."""

import asyncio

import pytest

from isopod.journal import Journal, Record
from isopod.world.errors import JournalFailed
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.journal.histories import FORMAT, SMALL, records_of, reopened


@pytest.mark.row("R20")
async def test_what_was_flushed_is_durable_and_all_are_told(world: World, folder: str) -> None:
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    told: list[int] = []
    journal.on_durable(told.append)
    expected: list[Record] = []
    n_at_once = 0
    for number in range(200):
        lsn = journal.append([(1, bytes([number])), (2, b"same batch")], begin=False)
        lsn = journal.append([(3, b"another batch")], begin=False)
        expected += [Record(lsn - 2, 1, bytes([number])), Record(lsn - 1, 2, b"same batch"), Record(lsn, 3, b"another batch")]
        if journal.flush():
            n_at_once += 1
            assert journal.durable_lsn == lsn == told[-1]
        else:
            await journal.wait_durable(lsn)
    if world.name == "sim":  # whether the host's disk is quick is not ours to say
        assert 0 < n_at_once < 200
    assert told == sorted(told) and told[-1] == 600
    assert await records_of(journal) == expected
    await journal.close()
    assert await reopened(world, f"{folder}/j") == expected


async def test_nothing_is_flushed_twice_or_out_of_order(world: World, folder: str) -> None:
    """Some of it goes through the task, which is busy while more is flushed."""
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    lsn = 0
    for number in range(0, 120, 3):
        journal.append([(1, bytes([number]))])
        journal.append([(1, bytes([number + 1]))], begin=False)
        journal.flush()
        lsn = journal.append([(1, bytes([number + 2]))], begin=False)
        journal.flush()
        if number % 2:
            await journal.wait_durable(lsn)
        else:
            await asyncio.sleep(0)
    await journal.wait_durable(lsn)
    await journal.close()
    assert [record.payload for record in await reopened(world, f"{folder}/j")] == [bytes([number]) for number in range(120)]


@pytest.mark.row("R19")
@pytest.mark.parametrize("kind", ["write", "sync"])
async def test_a_failure_is_final(sim_world: SimWorld, folder: str, kind: str) -> None:
    fatal: list[str] = []
    journal = await Journal.open(sim_world.world, f"{folder}/j", format=FORMAT, settings=SMALL, on_fatal=fatal.append)
    assert await journal.commit([(1, b"before")]) == 1
    sim_world.disk.faults.fail_next("write" if kind == "write" else "sync")
    for _ in range(50):
        if fatal:
            break
        lsn = journal.append([(1, b"lost")], begin=False)
        if not journal.flush() and journal.failure is None:
            await asyncio.gather(journal.wait_durable(lsn), return_exceptions=True)
    assert len(fatal) == 1 and journal.durable_lsn == 1
    with pytest.raises(JournalFailed):
        journal.append([(1, b"after")], begin=False)
    assert not journal.flush()
    await journal.close()


async def test_a_failpoint_is_not_passed_by(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    world.failpoints.set("journal.before_write", "pause")
    lsn = journal.append([(1, b"x")], begin=False)
    assert not journal.flush()
    await asyncio.sleep(1.0)
    assert journal.durable_lsn == 0
    world.failpoints.clear()
    await journal.wait_durable(lsn)
    await journal.close()
