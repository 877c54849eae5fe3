"""A node's identity on its disk: what is refused, and how it says so."""

import json
from typing import Any

import pytest

from isopod.cluster.members.identity import IdentityFile, read_identity
from isopod.world.errors import AlreadyServing, BadRecord, IdentityConflict, InvalidArgument, Unsupported
from isopod.world.world import World
from tests.cluster.members.rig import TOKEN, rig_of, until


async def test_an_incarnation_is_chosen_once(world: World, folder: str) -> None:
    first = await IdentityFile.open(world, folder, 3)
    incarnation = first.identity.incarnation
    assert len(incarnation) == 16
    await first.set_phase("enrolled", "0011223344556677")
    first.close()
    again = await IdentityFile.open(world, folder, 3)
    assert (again.identity.incarnation, again.identity.phase, again.identity.cluster_id) == (incarnation, "enrolled", "0011223344556677")
    again.close()


async def test_a_folder_has_one_process(world: World, folder: str) -> None:
    first = await IdentityFile.open(world, folder, 3)
    with pytest.raises(AlreadyServing):
        await IdentityFile.open(world, folder, 3)
    first.close()
    (await IdentityFile.open(world, folder, 3)).close()


async def test_a_folder_is_one_nodes(world: World, folder: str) -> None:
    (await IdentityFile.open(world, folder, 3)).close()
    with pytest.raises(IdentityConflict, match="is that of node 3") as caught:
        await IdentityFile.open(world, folder, 4)
    assert "--id 3" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"node_id": 3}',
        b'{"format": 1, "node_id": 3, "incarnation": "", "phase": "new"}',
        b'{"format": 1, "node_id": 0, "incarnation": "aa", "phase": "new"}',
        b'{"format": 1, "node_id": 3, "incarnation": "aa", "phase": "member"}',
        b'{"format": 1, "node_id": 3, "incarnation": "aa", "phase": "member", "cluster_id": "../../x"}',
        b'{"format": 1, "node_id": 3, "incarnation": "aa", "phase": "married", "cluster_id": "0011223344556677"}',
    ],
)
async def test_a_damaged_identity_is_refused(world: World, folder: str, text: bytes) -> None:
    await world.disk.write(f"{folder}/identity.json", text)
    with pytest.raises(BadRecord) as caught:
        await IdentityFile.open(world, folder, 3)
    assert caught.value.hint
    lock = await world.disk.lock(f"{folder}/cluster.lock", b"")
    assert lock is not None, "the folder is let go of"
    lock.close()


async def test_a_newer_isopods_identity_is_refused(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/identity.json", json.dumps({"format": 2, "node": "three"}).encode())
    with pytest.raises(Unsupported, match="newer than this isopod"):
        await read_identity(world, folder)


async def test_an_identity_that_is_gone_is_told_from_a_new_folder(world: World, folder: str) -> None:
    assert await read_identity(world, folder) is None
    await world.disk.make_directory(f"{folder}/raft/log")
    with pytest.raises(BadRecord, match="it is gone, but a replica is there"):
        await read_identity(world, folder)


async def test_a_wiped_disk_under_a_known_id_is_refused_with_the_way_back(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        nodes = await rig.form(3)
        third = nodes[2]
        await third.stop()
        # The whole folder is gone: the id is known to the cluster, the incarnation is not.
        await world.disk.remove_tree(third.config.data_dir)
        with pytest.raises(IdentityConflict, match="Node 3 already exists in cluster") as caught:
            await rig.join(3, nodes[0])
        assert "isopod cluster leave 3" in caught.value.hint
        # The way back that the hint names.
        leader = rig.leader()
        await leader.members.leave(3)
        await world.disk.remove_tree(third.config.data_dir)
        again = await rig.join(3, nodes[0], bind="127.0.0.1:0")
        await until(lambda: again.status().voters == (1, 2, 3), "it votes again")
        await again.store.put("color", b"red")


async def test_a_replica_that_is_gone_is_refused(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        nodes = await rig.form(3)
        await nodes[2].stop()
        await world.disk.remove_tree(f"{nodes[2].config.data_dir}/raft")
        with pytest.raises(IdentityConflict, match="its disk was wiped") as caught:
            await rig.make(3, bind=nodes[2].advertised).start()
        assert "isopod cluster leave 3" in caught.value.hint


async def test_a_wiped_founder_does_not_found_again_beside_its_cluster(world: World, folder: str) -> None:
    async with rig_of(world, folder, "tls") as rig:
        nodes = await rig.form(3)
        first = nodes[0]
        peers = tuple(peer for node in nodes for peer in ((node.config.node_id, node.advertised),))
        await first.stop()
        await world.disk.remove_tree(first.config.data_dir)
        from isopod.cluster.members.config import PeerSpec

        again = rig.make(1, bind=first.advertised, peers=tuple(PeerSpec(*peer) for peer in peers), token=TOKEN)
        await again.start()
        with pytest.raises(IdentityConflict, match="Node 1 already exists in cluster"):
            await again.wait_ready(20.0)


async def test_the_configuration_is_looked_at_as_a_whole(world: World, folder: str) -> None:
    async with rig_of(world, folder) as rig:
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"voters_max": 4}, "want 1, 3, 5 or 7"),
            ({"data_dir": "relative"}, "want an absolute path"),
            ({"bind": "nowhere"}, "bind address"),
            ({"advertise": "x:y"}, "advertised address"),
            ({"join": ("",)}, "address to join"),
            ({"init": "primary", "join": ("127.0.0.1:1",)}, "who founds a cluster does not join one"),
            ({"init": "primary", "role": "agent"}, "an agent holds no replica"),
            ({"role": "agent"}, "there is nobody to join"),
            ({"bind": "0.0.0.0:0"}, "it is no address to call"),
        ]
        for fields, match in wrong:
            with pytest.raises(InvalidArgument, match=match):
                await rig.make(5, **fields).start()
