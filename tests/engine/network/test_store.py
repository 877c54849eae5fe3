"""The file of networks: what is written is read, and damage is an error."""

import pytest

from isopod.engine.network.store import StoredNetwork, load_networks, save_networks
from isopod.world.errors import BadRecord
from isopod.world.world import World

ONE = StoredNetwork("bridge", "10.88.0.0/24", "isopod0", 1)
TWO = StoredNetwork("backend", "10.90.0.0/16", "isopod-b3fa21", 2)


@pytest.mark.row("R10")
@pytest.mark.parametrize("networks", [[], [ONE], [ONE, TWO]])
async def test_what_is_written_is_read(world: World, folder: str, networks: list[StoredNetwork]) -> None:
    path = f"{folder}/net/networks"
    assert await load_networks(world.disk, path) is None
    await save_networks(world.disk, path, networks)
    assert list(await load_networks(world.disk, path) or ()) == networks


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "truncated"),
        (b'{"version": 1}', "networks"),
        (b'{"version": 2, "networks": []}', "version 2"),
        (b'{"version": 1, "networks": [], "more": 1}', "more"),
        (b'{"version": 1, "networks": [{"name": "a", "subnet": "10.0.0.0/33", "bridge": "b", "created_at_ns": 1}]}', "network a"),
        (b"\x00\xff", "malformed"),
    ],
)
async def test_damage_is_an_error_with_a_hint(world: World, folder: str, data: bytes, why: str) -> None:
    await world.disk.write(f"{folder}/networks", data)
    with pytest.raises(BadRecord, match=why) as caught:
        await load_networks(world.disk, f"{folder}/networks")
    assert caught.value.hint


@pytest.mark.parametrize(
    "other",
    [
        StoredNetwork("bridge", "10.99.0.0/24", "x", 1),
        StoredNetwork("a", "10.99.0.0/24", "isopod0", 1),
        StoredNetwork("a", "10.88.0.0/16", "x", 1),
    ],
)
async def test_a_file_that_contradicts_itself_is_damaged(world: World, folder: str, other: StoredNetwork) -> None:
    await save_networks(world.disk, f"{folder}/networks", [ONE, other])
    with pytest.raises(BadRecord):
        await load_networks(world.disk, f"{folder}/networks")
