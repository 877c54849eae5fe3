"""Records as files: what was acknowledged is there, what is damaged is set aside."""

import msgspec

from isopod.engine.records import FileRecords
from isopod.runtime.logger import Logger
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.engine.test_bundle import RECORD


def store(world: World, folder: str, lines: list[bytes]) -> FileRecords:
    return FileRecords(world, f"{folder}/records", Logger(lines.append, world.clock))


async def test_what_was_put_is_loaded(world: World, folder: str) -> None:
    records = store(world, folder, [])
    assert await records.load() == ([], [])
    other = msgspec.structs.replace(RECORD, id="b" * 64, name="other")
    await records.put(other)
    await records.put(RECORD)
    await records.put(msgspec.structs.replace(RECORD, exit_code=3))
    assert await store(world, folder, []).load() == ([msgspec.structs.replace(RECORD, exit_code=3), other], [])
    await records.remove(other.id)
    await records.remove(other.id)
    assert [record.id for record in (await store(world, folder, []).load()).records] == [RECORD.id]


async def test_a_damaged_file_is_set_aside_and_said(world: World, folder: str) -> None:
    lines: list[bytes] = []
    records = store(world, folder, lines)
    await records.load()
    await records.put(RECORD)
    await world.disk.write(f"{folder}/records/{'c' * 64}.json", b'{"id": ')
    await world.disk.write(f"{folder}/records/half.tmp", b"x")
    assert await records.load() == ([RECORD], ["c" * 64])
    assert await records.load() == ([RECORD], ["c" * 64])
    assert b"record.damaged" in b"".join(lines)
    assert await world.disk.list(f"{folder}/records") == [f"{RECORD.id}.json", f"{'c' * 64}.damaged"]


async def test_a_put_survives_a_power_cut(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    await world.disk.sync_directory(folder.rpartition("/")[0])
    records = store(world, folder, [])
    await records.load()
    await records.put(RECORD)
    sim_world.disk.crash()
    assert await store(world, folder, []).load() == ([RECORD], [])
