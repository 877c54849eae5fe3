"""Real nodes whose disks are full: a file system of its own for each node, and a file on it that takes what is free.

A log's space is allocated ahead, so a node takes some more after its disk is full; then it says so, and the others go on.
"""

import asyncio
import subprocess

import pytest

from isopod.api.store import StoreClient
from isopod.world.errors import DiskFull, IsopodError
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.cluster.real.load import Load
from tests.cluster.real.rig import COMMAND, Rig

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(180)]
DISK_MB = 160
RIG = {"small_disks_mb": DISK_MB}
WITHIN_S = 45.0
VALUE = bytes(200 << 10)
AT_ONCE = 8


@pytest.mark.row("B13")
@pytest.mark.row("B15")
async def test_a_follower_without_room_says_so_and_catches_up_by_a_snapshot(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=31) as load:
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world)
        follower = leader % 3 + 1
        rig.lab.fill(follower, rig.nodes[follower].folder)
        await _write_until_full(host_world, rig, follower)
        others = [number for number in rig.nodes if number != follower]
        for _ in range(2):  # the second one drops the log that the first one had left for those who are a little behind
            n_before = [_n_logged(rig, number, "raft.snapshot") for number in others]

            async def have_snapshots(n_before: list[int] = n_before) -> bool:
                await _write(host_world, rig)
                return all(_n_logged(rig, number, "raft.snapshot") > n for number, n in zip(others, n_before, strict=True))

            await rig.until(have_snapshots, "the others have made a snapshot", WITHIN_S)
        await load.progress(within_s=WITHIN_S)
        assert await rig.wait_leader(host_world, others) != follower
        n_installed = _n_logged(rig, follower, "raft.snapshot_installed")
        rig.nodes[follower].kill()  # what it could not write down is lost with it, and was promised to nobody
        rig.lab.make_room(follower, rig.nodes[follower].folder)
        rig.nodes[follower].start()
        await load.answers_of(follower, within_s=WITHIN_S)
        await load.finish()
        assert _n_logged(rig, follower, "raft.snapshot_installed") > n_installed


@pytest.mark.row("B12")
async def test_a_leader_without_room_lets_another_lead(host_world: World, rig: Rig) -> None:
    async with Load(host_world, rig, seed=32) as load:
        await load.progress(within_s=WITHIN_S)
        leader = await rig.wait_leader(host_world)
        rig.lab.fill(leader, rig.nodes[leader].folder)
        await _write_until_full(host_world, rig, leader)
        others = [number for number in rig.nodes if number != leader]
        assert await rig.wait_leader(host_world, others) != leader
        await load.progress(within_s=WITHIN_S)
        rig.lab.make_room(leader, rig.nodes[leader].folder)
        await rig.until(lambda: _has_room(host_world, rig, leader), "it has room again", WITHIN_S)
        await load.answers_of(leader, within_s=WITHIN_S)
        await load.finish()


@pytest.mark.row("B18")
async def test_no_node_has_room(host_world: World, rig: Rig) -> None:
    """Nothing can be decided, whoever asks is told in time; with room everything goes on."""
    async with Load(host_world, rig, seed=33) as load:
        await load.progress(within_s=WITHIN_S)
        for node in rig.nodes.values():
            rig.lab.fill(node.number, node.folder)
        await _write_until_full(host_world, rig, *rig.nodes, n=2)  # then nothing reaches the third any more
        async with StoreClient(host_world, [UnixAddress(node.socket) for node in rig.nodes.values()]) as store:
            with pytest.raises(IsopodError):
                await store.put("more", VALUE, timeout_s=2.0)
        for node in rig.nodes.values():
            rig.lab.make_room(node.number, node.folder)
        await load.progress(within_s=WITHIN_S)
        await load.finish()


@pytest.mark.row("B32")
async def test_one_node_alone_answers_disk_full_and_still_reads(host_world: World) -> None:
    rig = Rig(1, small_disks_mb=DISK_MB)
    try:
        await rig.wait_ready(host_world)
        node = rig.nodes[1]
        async with StoreClient(host_world, [UnixAddress(node.socket)]) as store:
            await store.put("kept", b"here")
            rig.lab.fill(1, node.folder)
            await _write_until_full(host_world, rig, 1)
            with pytest.raises(DiskFull, match="no space left on the file system"):
                await store.put("more", VALUE, timeout_s=5.0)
            assert (await store.get("kept")).value == b"here"
            said = _isopod(rig, "kv", "put", "more", "x")
            assert said.returncode == DiskFull.exit_code
            assert said.stderr.startswith(b"error: no space left on the file system of ")
            assert b"\nhint: free some space" in said.stderr
            assert b"no space left on the file system of " in _isopod(rig, "cluster", "status").stdout
            rig.lab.make_room(1, node.folder)
            await rig.until(lambda: _has_room(host_world, rig, 1), "it has room again", WITHIN_S)
            await store.put("more", VALUE)
        node.kill()
        node.start()
        await rig.wait_ready(host_world)
        async with StoreClient(host_world, [UnixAddress(node.socket)]) as store:
            assert ((await store.get("kept")).value, (await store.get("more")).value) == (b"here", VALUE)
    finally:
        rig.close()


async def _write(world: World, rig: Rig) -> None:
    """Write some large values at once; some may fail."""
    async with StoreClient(world, [UnixAddress(node.socket) for node in rig.nodes.values()]) as store:
        await _write_by(store)


async def _write_by(store: StoreClient) -> None:
    writes = [store.put(f"large/{place}", VALUE, timeout_s=1.0) for place in range(AT_ONCE)]
    for result in await asyncio.gather(*writes, return_exceptions=True):
        assert not isinstance(result, BaseException) or isinstance(result, IsopodError), result


async def _write_until_full(world: World, rig: Rig, *numbers: int, n: int = 1) -> None:
    """Write until so many of these nodes say that their disks are full: what their logs had allocated is used up then."""
    async with StoreClient(world, [UnixAddress(node.socket) for node in rig.nodes.values()]) as store:

        async def is_full() -> bool:
            await _write_by(store)
            return sum([not await _has_room(world, rig, number) for number in numbers]) >= n

        await rig.until(is_full, f"{n} of the disks of {numbers} are full", WITHIN_S)


def _n_logged(rig: Rig, number: int, event: str) -> int:
    return rig.nodes[number].log().count(f'"event":"{event}"')


async def _has_room(world: World, rig: Rig, number: int) -> bool:
    status = await rig.status(world, number)
    return status is not None and "no space left" not in status.why


def _isopod(rig: Rig, *words: str) -> "subprocess.CompletedProcess[bytes]":
    argv = [*COMMAND, "--socket", rig.nodes[1].socket, *words]
    return subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=60, check=False)
