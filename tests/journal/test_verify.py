"""The integrity report: each changed byte is found, with the record it belongs to (R20), in plain and in compressed segments (R23)."""

import pytest

from isopod.journal import Journal
from isopod.journal.layout import RECORD_HEADER_BYTES
from isopod.journal.repair import plan
from isopod.journal.verify import reading, verify
from isopod.world.errors import InUse, InvalidArgument, JournalForeign
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.journal.histories import FORMAT, SMALL, Batch, files_in, put_files, record_history

BATCHES: list[Batch] = [[(n, bytes([n]) * (40 + n * 97 % 400)), (n, b"pair")] for n in range(1, 20)]


@pytest.mark.row("R20")
async def test_a_sound_journal(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", BATCHES)
    report = await verify(world, f"{folder}/j")

    assert report.problems == []
    assert (report.is_valid, report.error_count, report.success_rate) == (True, 0, 1.0)
    assert (report.n_records, report.n_batches, report.first_lsn, report.last_lsn) == (38, 19, 1, 38)
    assert report.was_closed and report.torn_bytes == 0
    assert [segment.how for segment in report.segments] == ["sealed"] * (len(report.segments) - 1) + ["open"]
    assert len(report.segments) >= 2
    found = await files_in(world, f"{folder}/j")
    assert {name: found[name] for name in history.files} == history.files, "looking changes nothing"


@pytest.mark.row("R20")
async def test_an_empty_journal_is_wholly_sound(world: World, folder: str) -> None:
    await record_history(world, f"{folder}/j", [])
    report = await verify(world, f"{folder}/j")

    assert (report.is_valid, report.n_records, report.success_rate) == (True, 0, 1.0)


@pytest.mark.slow
@pytest.mark.row("R20", "R23")
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
async def test_every_changed_byte_is_reported(sim_world: SimWorld, folder: str, compress: bool) -> None:
    world = sim_world.world
    history = await record_history(world, f"{folder}/a", BATCHES, settings=SMALL._replace(compress=compress))
    await put_files(world, f"{folder}/j", history.files)
    for name, data in history.files.items():
        end = len(data.rstrip(b"\0")) if name == "current.wal" else len(data)
        for offset in range(0, end, 1 if name.startswith("archive/") else 3):
            changed = bytearray(data)
            changed[offset] ^= 0x55
            await world.disk.write(f"{folder}/j/{name}", bytes(changed))
            report = await verify(world, f"{folder}/j")
            assert report.problems or _is_harmless(name, data, offset), f"{name} at byte {offset}"
        await world.disk.write(f"{folder}/j/{name}", data)


@pytest.mark.row("R20")
async def test_the_report_names_the_record(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    history = await record_history(world, f"{folder}/a", BATCHES)
    lsns = {}
    for name, data in history.files.items():
        for record in history.records:
            at = data.find(record.payload) if len(record.payload) > 60 else -1
            if at >= 0:
                lsns[record.lsn] = (name, at)
    assert len(lsns) > 15
    for lsn, (name, at) in lsns.items():
        changed = bytearray(history.files[name])
        changed[at + 30] ^= 1
        await put_files(world, f"{folder}/j", history.files | {name: bytes(changed)})
        report = await verify(world, f"{folder}/j")
        problem = report.problems[0]
        assert (problem.path, problem.offset, problem.lsn, problem.record_index) == (name, at - RECORD_HEADER_BYTES, lsn, lsn - 1)
        assert report.error_count == 1
        assert report.n_records == len(history.records) - 2, "its batch, and nothing else"
        assert report.success_rate == (len(history.records) - 2) / len(history.records)


async def test_what_is_no_journal_is_told(world: World, folder: str) -> None:
    with pytest.raises(JournalForeign, match="no journal in it"):
        await verify(world, folder)
    with pytest.raises(InvalidArgument, match="no such folder"):
        await verify(world, f"{folder}/missing")


@pytest.mark.row("R20")
async def test_looking_leaves_no_trace_and_needs_no_lock_of_its_own(world: World, folder: str) -> None:
    await record_history(world, f"{folder}/j", BATCHES)
    await world.disk.remove(f"{folder}/j/lock")
    before = await files_in(world, f"{folder}/j")
    async with reading(world, f"{folder}/j"):
        assert (await verify(world, f"{folder}/j")).is_valid
    assert (await plan(world, f"{folder}/j")).way == "nothing"
    assert await files_in(world, f"{folder}/j") == before
    assert await world.disk.stat(f"{folder}/j/lock") is None


async def test_who_looks_keeps_out_who_writes_and_nobody_who_looks(world: World, folder: str) -> None:
    await record_history(world, f"{folder}/j", BATCHES)
    async with reading(world, f"{folder}/j"):
        assert (await verify(world, f"{folder}/j")).is_valid
        with pytest.raises(InUse):
            await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)


async def test_a_journal_in_use_is_left_alone(world: World, folder: str) -> None:
    journal = await Journal.open(world, f"{folder}/j", format="test 1", settings=SMALL)
    with pytest.raises(InUse, match="in use by process") as caught:
        await verify(world, f"{folder}/j")
    assert "stop" in caught.value.hint
    await journal.close()


def _is_harmless(name: str, data: bytes, offset: int) -> bool:
    """Blanks of the manifest's JSON may change into other blanks; a JSON number may not."""
    return name == "journal.json" and data[offset : offset + 1] in b" \n"
