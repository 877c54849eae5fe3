"""Repair: what it says, what it does, and that the old files stay. A damaged journal is refused with the command that would help."""

import pytest

from isopod.journal import Journal, Record
from isopod.journal.repair import plan, repair
from isopod.journal.verify import verify
from isopod.world.errors import InUse, IsopodError, JournalDamaged
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.journal.histories import FORMAT, SMALL, Batch, History, files_in, put_files, record_history, records_of, reopened

BATCHES: list[Batch] = [[(n, bytes([n]) * (40 + n * 37 % 360)), (n, b"pair")] for n in range(1, 30)]


async def damaged(world: World, folder: str, history: History, lsn: int) -> str:
    """Make a journal whose record `lsn` is damaged; return the file that it is in."""
    payload = history.records[lsn - 1].payload
    assert len(payload) > 30
    name = next(name for name, data in history.files.items() if payload in data)
    changed = bytearray(history.files[name])
    changed[changed.find(payload) + 3] ^= 4
    await put_files(world, folder, history.files | {name: bytes(changed)})
    return name


async def test_a_sound_or_torn_journal_needs_none(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", BATCHES)
    made = await plan(world, f"{folder}/j")
    assert (made.way, made.moved, made.n_lost) == ("nothing", [], 0)
    assert (await repair(world, f"{folder}/j")).way == "nothing"
    assert await reopened(world, f"{folder}/j") == history.records


@pytest.mark.row("B13")
async def test_a_segment_whose_header_is_damaged_is_not_taken_for_an_empty_one(world: World, folder: str) -> None:
    """Nothing tells how much it held: who is told that nothing is lost would go on with a journal that forgot everything."""
    history = await record_history(world, f"{folder}/a", BATCHES[:1])
    changed = bytearray(history.files["current.wal"])
    changed[90] ^= 4
    await put_files(world, f"{folder}/j", history.files | {"current.wal": bytes(changed)})
    with pytest.raises(JournalDamaged, match="the segment's header is damaged"):
        await reopened(world, f"{folder}/j")

    made = await plan(world, f"{folder}/j")

    assert (made.way, made.last_lsn, made.lost_lsns) == ("cut", 0, (1, 1))


@pytest.mark.parametrize("lsn", [9, 21, 39, 57])
async def test_the_damage_is_cut_off(world: World, folder: str, lsn: int) -> None:
    history = await record_history(world, f"{folder}/a", BATCHES)
    name = await damaged(world, f"{folder}/j", history, lsn)
    before = await files_in(world, f"{folder}/j")
    with pytest.raises(JournalDamaged, match=f"lsn {lsn}") as caught:
        await reopened(world, f"{folder}/j")
    assert caught.value.path.endswith(name) and caught.value.lsn == lsn
    assert "isopod journal repair" in caught.value.hint

    kept = lsn - 1 - (1 - lsn % 2)  # its whole batch goes
    made = await plan(world, f"{folder}/j")
    assert (made.way, made.base_lsn, made.last_lsn) == ("cut", 0, kept)
    assert made.lost_lsns == (kept + 1, 58) and made.n_lost == 58 - kept
    assert name in made.moved
    assert {key: value for key, value in (await files_in(world, f"{folder}/j")).items() if key != "lock"} == {
        key: value for key, value in before.items() if key != "lock"
    }, "a plan changes nothing"

    assert await repair(world, f"{folder}/j") == made
    assert await reopened(world, f"{folder}/j") == history.records[:kept]
    aside = f"{folder}/j/damaged-1"
    assert await world.disk.read(f"{aside}/{name.replace('/', '-')}") == before[name]
    assert (await verify(world, f"{folder}/j")).is_valid
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    assert await journal.commit([(1, b"goes on")]) == kept + 1
    await journal.close()


async def test_every_record_can_be_the_damaged_one(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    history = await record_history(world, f"{folder}/a", BATCHES)
    for lsn, record in enumerate(history.records, start=1):
        if len(record.payload) <= 30:
            continue
        await damaged(world, f"{folder}/j", history, lsn)
        made = await repair(world, f"{folder}/j")
        assert await reopened(world, f"{folder}/j") == history.records[: made.last_lsn]
        assert made.last_lsn == lsn - 1


async def test_a_snapshot_behind_the_damage_saves_everything(world: World, folder: str) -> None:
    journal = await Journal.open(world, f"{folder}/a", format=FORMAT, settings=SMALL)
    for batch in BATCHES:
        await journal.commit(batch)
    await journal.snapshot(b'{"n": 30}', 30)
    await journal.close()
    files = await files_in(world, f"{folder}/a")
    expected = [Record(2 * n - 1 + k, n, p) for n, batch in enumerate(BATCHES, 1) for k, (_, p) in enumerate(batch)]
    name = await damaged(world, f"{folder}/j", History(files, expected), 21)
    with pytest.raises(JournalDamaged):
        await reopened(world, f"{folder}/j")

    made = await repair(world, f"{folder}/j")
    assert (made.way, made.base_lsn, made.last_lsn, made.lost_lsns) == ("snapshot", 30, 58, None)
    assert name in made.moved
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    assert await journal.load_snapshot() == (30, b'{"n": 30}')
    assert await records_of(journal, 31) == expected[30:]
    assert await journal.commit([(1, b"goes on")]) == 59
    await journal.close()


async def test_a_lost_manifest_is_made_again(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", BATCHES)
    await world.disk.remove(f"{folder}/j/journal.json")
    with pytest.raises(JournalDamaged, match="manifest is missing"):
        await reopened(world, f"{folder}/j")
    made = await repair(world, f"{folder}/j")
    assert (made.last_lsn, made.lost_lsns) == (58, None)
    assert await reopened(world, f"{folder}/j") == history.records


async def test_a_missing_segment_is_told_and_cut(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", BATCHES)
    names = sorted(name for name in history.files if name.startswith("archive/"))
    first = int(names[1][len("archive/wal-") :].partition(".")[0])
    await world.disk.remove(f"{folder}/j/{names[1]}")
    with pytest.raises(JournalDamaged, match="ends before"):
        await reopened(world, f"{folder}/j")
    made = await repair(world, f"{folder}/j")
    assert made.last_lsn == first - 1 and made.lost_lsns == (first, 58)
    assert await reopened(world, f"{folder}/j") == history.records[: first - 1]


async def test_a_missing_current_segment_is_told(world: World, folder: str) -> None:
    history = await record_history(world, f"{folder}/j", BATCHES)
    await world.disk.remove(f"{folder}/j/current.wal")
    with pytest.raises(JournalDamaged, match="written to last is missing"):
        await reopened(world, f"{folder}/j")
    made = await repair(world, f"{folder}/j")
    found = await reopened(world, f"{folder}/j")
    assert found == history.records[: made.last_lsn] and made.last_lsn > 30
    assert made.lost_lsns is not None


async def test_with_nothing_readable_it_says_so(world: World, folder: str) -> None:
    await record_history(world, f"{folder}/j", [])
    await world.disk.write(f"{folder}/j/current.wal", b"\xff" * 4096)
    await world.disk.write(f"{folder}/j/journal.json", b"{}")
    with pytest.raises(JournalDamaged, match="neither the manifest nor any segment") as caught:
        await repair(world, f"{folder}/j")
    assert caught.value.hint


async def test_a_journal_in_use_is_left_alone(world: World, folder: str) -> None:
    journal = await Journal.open(world, f"{folder}/j", format=FORMAT, settings=SMALL)
    for call in (plan, repair):
        with pytest.raises(InUse):
            await call(world, f"{folder}/j")
    await journal.close()


async def test_a_repair_that_is_killed_can_be_repeated(sim_world: SimWorld, folder: str) -> None:
    """Cut the power after each of its operations on the disk: a repair after that keeps the same records."""
    world = sim_world.world
    history = await record_history(world, f"{folder}/a", BATCHES)
    for step in range(1, 200):
        await damaged(world, f"{folder}/j", history, 21)
        await _sync(world, f"{folder}/j")
        node = sim_world.spawn_node(repair(world, f"{folder}/j"))
        for _ in range(step):
            if node.done():
                break
            await _one_event(sim_world)
        was_done = node.done()
        sim_world.power_cut()
        try:
            await repair(world, f"{folder}/j")
            assert await reopened(world, f"{folder}/j") == history.records[:20]
        except IsopodError as error:
            raise AssertionError(f"step {step}: {error}") from error
        if was_done:
            return
    raise AssertionError("the repair never ended")


async def _sync(world: World, folder: str) -> None:
    from isopod.world.disk import OpenFlags

    for name in await files_in(world, folder):
        file = await world.disk.open_file(f"{folder}/{name}", OpenFlags.read_write())
        await file.sync()
        file.close()
    for child in ("", "/archive", "/snapshots"):
        await world.disk.sync_directory(folder + child)


async def _one_event(sim: SimWorld) -> None:
    import asyncio

    await asyncio.sleep(0.0003)
