"""Every byte of a recorded history, cut and changed: what is read is exact, or the damage is told; nothing acknowledged is lost in silence.

The last group of a history is the hard case: it looks like a write that a crash tore. The histories here end in groups within one sector,
over several, and with sectors of zeros in them, closed in order and killed.
"""

import itertools

import pytest

from isopod.journal.layout import GROUP_HEADER_BYTES, GROUP_MAGIC, SECTOR_BYTES, SEGMENT_HEADER_BYTES
from isopod.world.errors import JournalDamaged, JournalForeign
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.journal.histories import Batch, History, put_files, record_history, reopened

SHORT: list[Batch] = [[(1, b"first")], [(2, b"second"), (3, b"and third")], [(4, b"x" * 40)]]
LONG: list[Batch] = [[(1, b"a")], [(2, b"b" * 700)], [(3, b"c" * 300), (4, bytes(1200)), (5, b"e")], [(6, b"d" * 900)]]
ZEROS: list[Batch] = [[(1, b"a")], [(2, b"b" * 100 + bytes(1500))]]
SEGMENTS: list[Batch] = [[(n, bytes([n]) * (n * 37 % 400))] for n in range(1, 40)]
HISTORIES = {"short": SHORT, "long": LONG, "zeros": ZEROS}


async def outcome(world: World, folder: str, history: History) -> str:
    """Recover, and check that nothing was lost unsaid."""
    try:
        found = await reopened(world, folder)
    except (JournalDamaged, JournalForeign):
        return "refused"
    assert found == history.records
    return "exact"


@pytest.mark.slow
@pytest.mark.row("R20")
@pytest.mark.parametrize("close", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("name", HISTORIES)
async def test_a_changed_byte_is_told_or_harmless(sim_world: SimWorld, folder: str, name: str, close: bool) -> None:
    world = sim_world.world
    history = await record_history(world, f"{folder}/a", HISTORIES[name], close=close)
    data = history.files["current.wal"]
    end = len(data.rstrip(b"\0"))
    outcomes: dict[str, int] = {}

    await put_files(world, f"{folder}/b", history.files)
    for offset in range(end + 40):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << offset % 8
        await put_files(world, f"{folder}/b", history.files | {"current.wal": bytes(flipped)})
        what = await outcome(world, f"{folder}/b", history)
        outcomes[what] = outcomes.get(what, 0) + 1
        if SEGMENT_HEADER_BYTES <= offset < end - GROUP_HEADER_BYTES * close:
            assert what == "refused", f"byte {offset}"
    assert outcomes["refused"] > end - 2 * GROUP_HEADER_BYTES


@pytest.mark.slow
@pytest.mark.row("R21")
@pytest.mark.parametrize("name", HISTORIES)
async def test_a_file_cut_short_at_any_byte_is_refused(sim_world: SimWorld, folder: str, name: str) -> None:
    world = sim_world.world
    history = await record_history(world, f"{folder}/a", HISTORIES[name], close=False)
    data = history.files["current.wal"]

    for n_bytes in [*range(len(data.rstrip(b"\0")) + 10), len(data) - 1]:
        await put_files(world, f"{folder}/b", history.files | {"current.wal": data[:n_bytes]})
        assert await outcome(world, f"{folder}/b", history) == "refused", n_bytes


@pytest.mark.row("R21", "R27")
@pytest.mark.parametrize("name", HISTORIES)
async def test_any_sectors_of_the_last_write_missing_is_a_torn_tail(sim_world: SimWorld, folder: str, name: str) -> None:
    world = sim_world.world
    batches = HISTORIES[name]
    before = await record_history(world, f"{folder}/a", batches[:-1], close=False)
    journal_before = before.files["current.wal"]
    await put_files(world, f"{folder}/a", before.files)
    after = await record_history(world, f"{folder}/a", batches[-1:], close=False)
    journal_after = after.files["current.wal"]
    changed = [
        start
        for start in range(0, len(journal_after), SECTOR_BYTES)
        if journal_after[start : start + SECTOR_BYTES] != journal_before[start : start + SECTOR_BYTES]
    ]
    assert changed

    for subset in range(1 << len(changed)):
        mixed = bytearray(journal_before)
        for index, start in enumerate(changed):
            if subset >> index & 1:
                mixed[start : start + SECTOR_BYTES] = journal_after[start : start + SECTOR_BYTES]
        await put_files(world, f"{folder}/b", before.files | {"current.wal": bytes(mixed)})
        is_whole = subset + 1 == 1 << len(changed)
        expected = before.records + (after.records if is_whole else [])
        assert await reopened(world, f"{folder}/b") == expected, f"sectors {subset:b}"
        assert await reopened(world, f"{folder}/b") == expected


@pytest.mark.row("R21")
@pytest.mark.parametrize("batches", [LONG, SEGMENTS[:8]], ids=["long", "many"])
async def test_a_sector_missing_before_the_last_write_is_damage(sim_world: SimWorld, folder: str, batches: list[Batch]) -> None:
    """It looks like a torn write, but what was written after it is there: so it had been durable."""
    world = sim_world.world
    history = await record_history(world, f"{folder}/a", batches, close=False)
    data = history.files["current.wal"]
    last = data.rfind(GROUP_MAGIC)
    starts = [SEGMENT_HEADER_BYTES]
    while (start := data.find(GROUP_MAGIC, starts[-1] + 1)) >= 0:
        starts.append(start)
    assert starts[-1] == last and len(starts) == len(batches)

    for low, high in itertools.pairwise(starts):  # one whole write, then each of its sectors
        for begin in [low, *range(low, high, SECTOR_BYTES), *range(-(-low // SECTOR_BYTES) * SECTOR_BYTES, high, SECTOR_BYTES)]:
            end = high if begin == low else min(high, (begin // SECTOR_BYTES + 1) * SECTOR_BYTES)
            changed = data[:begin] + bytes(end - begin) + data[end:]
            if changed == data:
                continue
            await put_files(world, f"{folder}/b", history.files | {"current.wal": changed})
            assert await outcome(world, f"{folder}/b", history) == "refused", (begin, end)


@pytest.mark.row("R20")
async def test_a_last_write_that_went_elsewhere_is_damage(sim_world: SimWorld, folder: str) -> None:
    """What should be at the end lies further on: it was acknowledged, and the device put it there."""
    world = sim_world.world
    before = await record_history(world, f"{folder}/a", SHORT, close=False)
    end = len(before.files["current.wal"].rstrip(b"\0"))
    await put_files(world, f"{folder}/a", before.files)
    after = await record_history(world, f"{folder}/a", [[(9, b"y" * 60)]], close=False)
    group = after.files["current.wal"][end:].rstrip(b"\0")
    whole = before._replace(records=[*before.records, *after.records])
    for shift in (SECTOR_BYTES, 3 * SECTOR_BYTES):
        changed = bytearray(before.files["current.wal"])
        changed[end + shift : end + shift + len(group)] = group
        await put_files(world, f"{folder}/b", before.files | {"current.wal": bytes(changed)})
        assert await outcome(world, f"{folder}/b", whole) == "refused"
