"""Backups: of one moment, checked, put back whole or not at all."""

import asyncio

import msgspec
import pytest

from isopod.engine import operations as ops
from isopod.engine.backup import Restored, make_backup, read_backup, restore
from isopod.engine.metadata import RESTORED
from isopod.engine.network.store import StoredNetwork, load_networks, save_networks
from isopod.runtime.logger import Logger
from isopod.world.errors import BadRecord, CorruptError, DigestMismatch, InUse
from isopod.world.sim import SimWorld, make_sim_world
from isopod.world.world import World
from tests.engine.test_bundle import RECORD
from tests.engine.test_metadata import contents, opened, record

NETWORK = StoredNetwork("backend", "10.99.0.0/24", "isob1", 5)


async def put_back(world: World, folder: str, data: bytes, *, force: bool = False) -> Restored:
    return await restore(
        world,
        read_backup(data, "x"),
        metadata=f"{folder}/metadata",
        networks=f"{folder}/net/networks",
        containers=f"{folder}/containers",
        force=force,
        logger=Logger(lambda _: None, world.clock),
    )


async def test_a_backup_while_changes_go_on_is_of_one_moment(world: World, folder: str) -> None:
    networks = f"{folder}/net/networks"
    await save_networks(world.disk, networks, [NETWORK])
    async with opened(world, folder) as store:
        await store.commit(*(ops.Create(record(number)) for number in range(600)))

        async def change(number: int) -> None:
            both = [ops.UpdateLabels(f"{box:064x}", {"n": str(number)}) for box in (0, 599)]
            await store.commit(*both)

        changing = [asyncio.ensure_future(change(number)) for number in range(50)]
        backups = [await make_backup(store, world, networks) for _ in range(5)]
        await asyncio.gather(*changing)
        for made in backups:
            found = read_backup(made.data, "x")
            assert found.records[0].labels == found.records[599].labels, "both or neither"
            assert (len(found.records), found.cursor) == (made.facts.containers, made.facts.cursor) == (600, found.cursor)
        await store.commit(ops.Delete(f"{0:064x}"), ops.Create(RECORD))
    done = await put_back(world, folder, backups[-1].data)
    assert (done.containers, done.aside) == (600, f"{folder}/metadata.before-restore-1")
    async with opened(world, folder) as store:
        assert [found.name for found in contents(store)] == [f"box{number}" for number in range(600)]
    assert list(await load_networks(world.disk, networks) or ()) == [NETWORK]
    assert "current.wal" in await world.disk.list(done.aside)


async def test_an_empty_node_is_backed_up_and_restored_on_a_new_disk(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        made = await make_backup(store, world, f"{folder}/net/networks")
    await world.disk.remove_tree(f"{folder}/metadata")
    done = await put_back(world, folder, made.data)
    assert (done.containers, done.aside) == (0, "")
    async with opened(world, folder) as store:
        assert contents(store) == []


async def test_every_cut_and_every_changed_byte_is_noticed(sim_world: SimWorld, folder: str) -> None:
    async with opened(sim_world.world, folder) as store:
        await store.commit(ops.Create(RECORD))
        good = (await make_backup(store, sim_world.world, f"{folder}/none")).data
    whole = read_backup(good, "x")
    for cut in range(0, len(good) - 2, 3):
        with pytest.raises(CorruptError):
            read_backup(good[:cut], "x")
    for at in range(len(good) - 1):
        changed = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
        try:
            assert read_backup(changed, "x") == whole
        except CorruptError:
            continue
        assert changed[: changed.index(b'"data"')] != good[: good.index(b'"data"')], "only what names no data may differ"


@pytest.mark.parametrize(
    "changes,error,words",
    [
        ({"what": "a cake"}, BadRecord, "a cake"),
        ({"version": 9}, BadRecord, "version 9"),
        ({"digest": "sha256:0"}, DigestMismatch, "want sha256:0"),
    ],
)
async def test_what_is_no_backup_is_refused(
    world: World, folder: str, changes: dict[str, object], error: type[Exception], words: str
) -> None:
    async with opened(world, folder) as store:
        made = msgspec.json.decode((await make_backup(store, world, f"{folder}/none")).data)
    with pytest.raises(error, match=words):
        read_backup(msgspec.json.encode(made | changes), "x")


async def test_files_of_containers_that_a_backup_does_not_know_are_not_given_up_lightly(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        made = await make_backup(store, world, f"{folder}/none")
        await store.commit(ops.Create(RECORD))
    await world.disk.make_directory(f"{folder}/containers/{RECORD.id}")
    with pytest.raises(InUse, match="aaaaaaaaaaaa") as refused:
        await put_back(world, folder, made.data)
    assert "--force" in refused.value.hint
    async with opened(world, folder) as store:
        assert len(contents(store)) == 1, "nothing was changed"
    assert (await put_back(world, folder, made.data, force=True)).containers == 0


async def test_a_crash_between_the_two_renamings_is_made_good_by_the_next_start(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
    await world.disk.rename(f"{folder}/metadata", f"{folder}/metadata{RESTORED}")
    async with opened(world, folder) as store:
        assert [found.name for found in contents(store)] == ["box"]
    assert await world.disk.stat(f"{folder}/metadata{RESTORED}") is None


@pytest.mark.parametrize("seed", range(30))
def test_a_crash_while_restoring_leaves_the_one_or_the_other(seed: int) -> None:
    sim = make_sim_world(seed)
    try:
        sim.run(_crash_while_restoring(sim, seed))
    finally:
        sim.close()


async def _crash_while_restoring(sim: SimWorld, seed: int) -> None:
    world, folder = sim.world, "/var/lib/records"
    await world.disk.make_directory(folder)
    async with opened(world, folder) as store:
        await store.commit(*(ops.Create(record(number)) for number in range(40)))
        made = await make_backup(store, world, f"{folder}/none")
        await store.commit(*(ops.Delete(f"{number:064x}") for number in range(20)))
    for parent in ("/var", "/var/lib", folder):
        await world.disk.sync_directory(parent)

    async def work() -> None:
        await put_back(world, folder, made.data)

    handle = sim.spawn_node(work())
    await asyncio.sleep(0.02 + seed * 0.0004)  # around the two renamings
    handle.kill()
    sim.disk.crash()
    async with opened(world, folder) as store:
        assert len(contents(store)) in (20, 40)
