"""Movable work: a skewed load evens out, and the numbers show it."""

import asyncio
from collections import Counter

import pytest

from isopod.runtime.abort import deadline
from isopod.runtime.shards import RestartPolicy, ShardStats, WorkQueue
from isopod.wire.service import Method
from isopod.world.errors import DeadlineExceeded, Disconnected, Exhausted, InvalidArgument, NotFound
from isopod.world.world import World
from tests.runtime.shards import program as p
from tests.runtime.shards.kit import shards
from tests.runtime.shards.test_supervision import kill


def shares(stats: list[ShardStats], name: str = "slow") -> list[int]:
    return [queue.run for each in stats for queue in each.queues if queue.name == name]


@pytest.mark.row("S4")
async def test_a_skewed_load_evens_out(world: World) -> None:
    n_items = 120
    async with shards(world, 3, services=[p.serve, p.work]) as rig:
        queue = p.QUEUES[0]
        found = await asyncio.gather(*(queue.submit(p.COMPUTE, p.Text("0.005")) for _ in range(n_items)))
        stats = await rig.service.statistics()

    ran = shares(stats)
    assert sum(ran) == n_items
    assert [sum(each.values[0] == shard for each in found) for shard in range(3)] == ran
    # All were submitted on shard 0; each shard does a fair part. On the host the machine says who gets on how fast.
    if world.name == "sim":
        assert min(ran) >= n_items // 5, ran
    mine = stats[0].queues[0]
    assert (mine.submitted, mine.given, mine.waiting) == (n_items, n_items - ran[0], 0)
    assert [each.queues[0].taken for each in stats] == [0, ran[1], ran[2]]


@pytest.mark.host
async def test_work_that_computes_evens_out(host_world: World) -> None:
    """Handlers that never wait: each shard is deaf while it runs one."""
    async with shards(host_world, 2, services=[p.serve, p.work_computing]) as rig:
        await asyncio.gather(*(p.QUEUES[0].submit(p.COMPUTE, p.Text("0.1")) for _ in range(30)))
        ran = shares(await rig.service.statistics(), "computing")

    assert sum(ran) == 30
    assert min(ran) >= 1, ran  # work for three seconds: also one that stands still for two of them comes in time for some


async def test_little_work_stays_where_it_is(world: World) -> None:
    async with shards(world, 3, services=[p.serve, p.work]) as rig:
        for _ in range(10):
            assert (await p.QUEUES[0].submit(p.COMPUTE, p.Text("0"))).values == (0,)
        assert shares(await rig.service.statistics()) == [10, 0, 0]


async def test_one_shard_runs_its_work_alone_and_bounded(world: World) -> None:
    async with shards(world, 1, services=[p.work_counted]) as rig:
        queue = p.QUEUES[0]
        await asyncio.gather(*(queue.submit(p.COMPUTE, p.Text("0.001")) for _ in range(20)))
        assert shares(await rig.service.statistics(), "counted") == [20]
        assert p.MOST_AT_ONCE == [2]


@pytest.mark.virtual_time
async def test_cancelled_items_do_not_run_and_take_no_place(world: World) -> None:
    async with shards(world, 1, services=[p.work]) as rig:
        queue = p.QUEUES[0]
        running = [asyncio.ensure_future(queue.submit(p.COMPUTE, p.Text("0.05"))) for _ in range(2)]
        await asyncio.sleep(0)
        waiting = [asyncio.ensure_future(queue.submit(p.COMPUTE, p.Text("0.05"))) for _ in range(4)]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        with pytest.raises(DeadlineExceeded):
            async with deadline(0.01):
                await waiting[1]
        await asyncio.gather(*running, waiting[2], waiting[3])
        await asyncio.gather(*waiting, return_exceptions=True)
        assert shares(await rig.service.statistics()) == [4]
        assert (await queue.submit(p.COMPUTE, p.Text("0"))).values == (0,)


@pytest.mark.virtual_time
async def test_cancelled_items_do_not_count_as_waiting(world: World) -> None:
    async with shards(world, 1, services=[p.work_short]) as rig:
        queue = p.QUEUES[0]
        running = [asyncio.ensure_future(queue.submit(p.COMPUTE, p.Text("0.2"))) for _ in range(2)]
        await asyncio.sleep(0.005)
        for _ in range(3):  # one may wait
            item = asyncio.ensure_future(queue.submit(p.COMPUTE, p.Text("0.01")))
            await asyncio.sleep(0.005)
            item.cancel()
            with pytest.raises(asyncio.CancelledError):
                await item
        assert queue.statistics().waiting == 0
        assert (await queue.submit(p.COMPUTE, p.Text("0.01"))).values == (0,)
        await asyncio.gather(*running)
        assert shares(await rig.service.statistics(), "short") == [3]


@pytest.mark.virtual_time
async def test_items_that_never_arrive_leave_a_shard_hungry(world: World) -> None:
    """What fails on the way, or is cancelled before it leaves, must not use up the places that the other shard offered."""
    async with shards(world, 2, services=[p.serve, p.work]) as rig:
        queue = p.QUEUES[0]
        await asyncio.sleep(0.05)  # the offers have come
        running = [asyncio.ensure_future(queue.submit(p.COMPUTE, p.Text("1"))) for _ in range(2)]
        await asyncio.sleep(0.005)
        for _ in range(8):
            with pytest.raises(InvalidArgument, match="cannot be packed"):
                await queue.submit(p.COMPUTE, p.Text(object()))  # type: ignore[arg-type]
        for _ in range(8):
            item = asyncio.ensure_future(queue.submit(p.COMPUTE, p.Text("0.01")))
            await asyncio.sleep(0.005)
            item.cancel()
            await asyncio.gather(item, return_exceptions=True)
        assert (await queue.submit(p.COMPUTE, p.Text("0.01"))).values == (1,)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert rig.smp.peers() == [1]


async def test_the_queue_is_bounded_and_knows_its_methods(world: World) -> None:
    async with shards(world, 1) as rig:
        queue = WorkQueue(rig.smp, "short", {p.COMPUTE: lambda request: p.Numbers()}, n_items_max=1)
        hold = asyncio.Event()
        blocking = WorkQueue(rig.smp, "blocking", {Method("hold", p.Text, p.Text): lambda _: hold.wait()}, n_items_max=1)
        assert blocking.statistics().run == 0
        assert (await queue.submit(p.COMPUTE, p.Text())) == p.Numbers()
        with pytest.raises(NotFound, match="no such work"):
            await queue.submit(p.ECHO, p.Text())
        with pytest.raises(InvalidArgument):
            WorkQueue(rig.smp, "none", {}, n_at_once=0)
    async with shards(world, 1, services=[p.work_short]):
        items = [asyncio.ensure_future(p.QUEUES[0].submit(p.COMPUTE, p.Text("0.01"))) for _ in range(5)]
        outcomes = await asyncio.gather(*items, return_exceptions=True)
        assert Counter(map(type, outcomes)) == {p.Numbers: 3, Exhausted: 2}


@pytest.mark.virtual_time
async def test_a_shard_that_dies_with_work(world: World) -> None:
    """Without the queue's word that items may run twice, the caller is told; with it, they run elsewhere."""
    policy = RestartPolicy(backoff_s=60)
    for service, wanted in ((p.work, Disconnected), (p.work_again, p.Numbers)):
        async with shards(world, 2, services=[p.serve, service], restart=policy) as rig:
            queue = p.QUEUES[0]
            items = [asyncio.ensure_future(queue.submit(p.COMPUTE, p.Text("0.5"))) for _ in range(4)]
            async with asyncio.timeout(40):
                while queue.statistics().given < 2:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            await kill(world, 1)
            outcomes = await asyncio.gather(*items, return_exceptions=True)
            assert Counter(map(type, outcomes)) == Counter([p.Numbers, p.Numbers, wanted, wanted])
            assert rig.smp.peers() == []


@pytest.mark.virtual_time
async def test_work_that_waits_when_all_stops_is_told(world: World) -> None:
    async with shards(world, 1, services=[p.work], stop_grace_s=0.05):
        items = [asyncio.ensure_future(p.QUEUES[0].submit(p.COMPUTE, p.Text("0.01"))) for _ in range(6)]
        while p.QUEUES[0].statistics().waiting < 4:
            await asyncio.sleep(0)
        for _ in range(3):  # the two that have a place give way once before they run
            await asyncio.sleep(0)
    outcomes = await asyncio.gather(*items, return_exceptions=True)
    assert Counter(map(type, outcomes)) == {p.Numbers: 2, Disconnected: 4}
