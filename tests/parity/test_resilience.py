"""Shards that die, connections and work that are spread over shards."""

import asyncio
from signal import SIGKILL

import pytest

from isopod.net.tcp import Connection, connect_tcp
from isopod.runtime.shards import RestartPolicy, Sharded, submit_to
from isopod.world.errors import IsopodError
from isopod.world.world import World
from tests.parity import program as p
from tests.parity.kit import LOOPBACK, shards, until

pytestmark = pytest.mark.row("S35")


async def kill(world: World, shard: int) -> int:
    """Kill a shard's process; return the pid it had."""
    pid = (await submit_to(shard, p.WHERE, p.Number())).pid
    identity = world.processes.identify(pid)
    assert identity is not None
    assert world.processes.signal(identity, SIGKILL)
    await world.processes.wait_gone(identity)
    return pid


async def test_calls_to_a_shard_that_dies_fail_and_the_others_go_on(world: World) -> None:
    async with shards(world, 3, restart=RestartPolicy(backoff_s=60)):
        hanging = asyncio.ensure_future(submit_to(1, p.HANG, p.Number()))
        await submit_to(1, p.WHERE, p.Number())
        await kill(world, 1)
        with pytest.raises(IsopodError) as caught:
            await hanging
        assert caught.value.retryable
        assert (await submit_to(2, p.WHERE, p.Number())).shard == 2


async def test_a_shard_that_died_returns_without_what_it_held(world: World) -> None:
    async with shards(world, 2, restart=RestartPolicy(backoff_s=0.01)) as service:
        store = await Sharded.start(p.Store, 10)
        await store.on(1).put(5)
        before = await kill(world, 1)
        await until(lambda: service.states()[1] == "down")
        await service.wait_up(1)
        assert (await submit_to(1, p.WHERE, p.Number())).pid != before
        assert await store.on(1).total() == 10, "made anew of the same arguments"


async def test_connections_go_to_the_shard_with_the_fewest(world: World) -> None:
    async with shards(world, 3, p.greet) as service:
        listener = await service.listen(LOOPBACK, "greet")
        connections: list[Connection] = []
        greeted: list[bytes] = []
        for _ in range(6):
            connections.append(await connect_tcp(world, listener.address))
            greeted.append(await connections[-1].readexactly(1))
        assert sorted(greeted) == [b"0", b"0", b"1", b"1", b"2", b"2"]
        for connection in connections:
            await connection.wait_closed()
        await until(lambda: sum(listener.n_open().values()) == 0)


async def test_movable_work_goes_to_shards_that_have_time(world: World) -> None:
    async with shards(world, 2, p.work):
        done = await asyncio.gather(*(p.QUEUES[0].submit(p.WORK, p.Number()) for _ in range(12)))
    assert {each.shard for each in done} == {0, 1}, "all were given to shard 0"
