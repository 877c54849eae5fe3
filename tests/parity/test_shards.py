"""Shards: share-nothing, smp::submit_to, sharded<>, map_reduce."""

import asyncio
import operator

import pytest

from isopod.runtime.abort import deadline
from isopod.runtime.shards import Sharded, shard_count, submit_to, this_shard_id
from isopod.world.errors import BugError, DeadlineExceeded, InvalidArgument, NotFound
from isopod.world.world import World
from tests.parity import program as p
from tests.parity.kit import WAIT_S, shards

pytestmark = pytest.mark.row("S35")


async def test_every_shard_is_a_process_of_its_own(world: World) -> None:
    async with shards(world, 3):
        found = [await submit_to(shard, p.WHERE, p.Number()) for shard in range(3)]

    assert [each.shard for each in found] == [0, 1, 2]
    assert len({each.pid for each in found}) == 3
    assert found[0].pid == world.processes.own_pid()


async def test_state_of_one_shard_is_not_seen_by_another(host_world: World) -> None:
    """On the host only: simulated shards are one process, whose modules are there once."""
    async with shards(host_world, 2):
        await submit_to(1, p.REMEMBER, p.Number(42))

        assert (await submit_to(1, p.RECALL, p.Number())).value == 42
        assert (await submit_to(0, p.RECALL, p.Number())).value == 0
        assert p.STATE == {"remembered": 0}


async def test_what_is_sent_is_copied(world: World) -> None:
    async with shards(world, 2), await Sharded.start(p.Store, 1) as store:
        assert await store.on(1).put(5) == 2
        assert store.local.values == [1]


async def test_this_shard_id_and_count_hold_where_code_runs(world: World) -> None:
    assert (this_shard_id(), shard_count()) == (0, 1), "without shards"
    async with shards(world, 2):
        assert (this_shard_id(), shard_count()) == (0, 2)
        assert (await submit_to(1, p.WHERE, p.Number())).shard == 1


async def test_an_error_comes_back_as_it_was_raised(world: World) -> None:
    async with shards(world, 2):
        with pytest.raises(NotFound, match="no such number: 7") as caught:
            await submit_to(1, p.FAIL, p.Number(7))
        with pytest.raises(BugError, match="ZeroDivisionError"):
            await submit_to(1, p.CRASH, p.Number(0))
    assert caught.value.hint == "count again"


async def test_a_shard_that_does_not_exist_is_refused(world: World) -> None:
    async with shards(world, 2):
        with pytest.raises(InvalidArgument, match="there are 2"):
            await submit_to(5, p.WHERE, p.Number())


async def test_calls_that_call_back_do_not_deadlock(world: World) -> None:
    """A -> B -> A -> B, with many at once and few credits: Seastar's users must sort such calls into groups by hand."""
    async with shards(world, 2, max_nonlocal_requests=2):
        found = await asyncio.gather(*(submit_to(1, p.PING_PONG, p.Number(4)) for _ in range(50)))

    assert [each.value for each in found] == [5] * 50


async def test_a_deadline_ends_a_call_to_a_shard_that_hangs(world: World) -> None:
    async with shards(world, 2):
        with pytest.raises(DeadlineExceeded):
            await submit_to(1, p.HANG, p.Number(), timeout_s=0.05)
        with pytest.raises(DeadlineExceeded):
            async with deadline(0.05, "asking"):
                await submit_to(1, p.HANG, p.Number())
        assert (await submit_to(1, p.WHERE, p.Number())).shard == 1, "the shard is well"


async def test_cancelling_a_call_cancels_it_on_its_shard(world: World) -> None:
    async def wait_events(number: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while (await submit_to(1, p.HANG_EVENTS, p.Number())).value < number:
                await asyncio.sleep(0.002)

    async with shards(world, 2):
        call = asyncio.create_task(submit_to(1, p.HANG, p.Number()))
        await wait_events(1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await wait_events(2)


async def test_sharded_has_an_instance_on_every_shard(world: World) -> None:
    async with shards(world, 3), await Sharded.start(p.Store, 100) as store:
        assert await store.on_all(lambda each: each.total()) == [100, 100, 100]
        assert await store.invoke_on(2, p.Store.put, 1) == 2
        assert await store.on_others(lambda each: each.put(1)) == [2, 3]
        assert store.local.values == [100]


async def test_map_reduce_folds_the_answers_in_the_order_of_shards(world: World) -> None:
    async with shards(world, 3), await Sharded.start(p.Store, 10) as store:
        await store.on(1).put(1)
        await store.on(2).put(2)

        assert await store.map_reduce(lambda each: each.total(), operator.add, 1000) == 1033
        assert await store.map_reduce(lambda each: each.total(), lambda found, value: [*found, value], list[int]()) == [10, 11, 12]


async def test_an_instance_reaches_its_peers(world: World) -> None:
    async with shards(world, 2), await Sharded.start(p.Store, 10) as store:
        await store.on(0).put(5)
        assert await store.on(1).grand_total() == 25


async def test_a_failure_in_one_part_fails_the_whole(world: World) -> None:
    async with shards(world, 2), await Sharded.start(p.Store, 0) as store:
        with pytest.raises(NotFound, match="no such value: 3"):
            await store.on_all(lambda each: each.refuse(3))
        assert await store.on(1).total() == 0


async def test_instances_are_stopped_with_the_shards(world: World, folder: str) -> None:
    async with shards(world, 2):
        await Sharded.start(p.Store, 0, folder)
        assert list(await world.disk.list(folder)) == []
    assert list(await world.disk.list(folder)) == ["0", "1"]
