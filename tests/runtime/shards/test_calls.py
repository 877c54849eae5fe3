"""Calls between shards, on both Worlds."""

import asyncio

import pytest

from isopod.runtime.abort import deadline
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.shards import SmpServiceGroup, shard_count, submit_to, submit_to_current, this_shard_id, this_smp
from isopod.wire.service import Method
from isopod.world.errors import (
    BugError,
    DeadlineExceeded,
    Exhausted,
    InvalidArgument,
    NotFound,
    WrongState,
)
from isopod.world.world import World
from tests.runtime.shards import program as p
from tests.runtime.shards.kit import shards


@pytest.mark.row("S4")
async def test_a_call_runs_on_its_shard_and_returns_the_result(world: World) -> None:
    async with shards(world, 3):
        found = [await submit_to(shard, p.WHO, p.Text()) for shard in range(3)]

        assert [each.values[:2] for each in found] == [(0, 3), (1, 3), (2, 3)]
        assert len({each.values[2] for each in found}) == 3, "each in a process of its own"
        assert (this_shard_id(), shard_count()) == (0, 3)
        assert (await submit_to(1, p.ECHO, p.Text("back"))).text == "back"
        assert (await submit_to_current(p.ECHO, p.Text("here"))).text == "here"


async def test_every_shard_reaches_every_other(world: World) -> None:
    async with shards(world, 4):
        found = await submit_to(1, p.RELAY, p.Numbers((2, 3, 1, 3, 2, 0)))

        assert found.values == (1, 2, 3, 1, 3, 2, 0)


async def test_one_shard_is_a_plain_call(world: World) -> None:
    async with shards(world, 1) as rig:
        request = p.Text("same")

        assert await submit_to(0, p.ECHO, request) is request, "nothing is packed"
        assert (await submit_to(0, p.WHO, p.Text())).values == (0, 1, world.processes.own_pid())
        assert rig.service.states() == {0: "up"}
        assert [each.lanes for each in await rig.service.statistics()] == [()]
        with pytest.raises(BugError):
            await submit_to(0, p.BUG, p.Text("x"))
        with pytest.raises(NotFound):
            await submit_to(0, p.FAIL, p.Text("x"))
        with pytest.raises(DeadlineExceeded):
            await submit_to(0, p.SLEEP, p.Text("30"), timeout_s=0.05)


async def test_errors_travel(world: World) -> None:
    async with shards(world, 2) as rig:
        with pytest.raises(NotFound, match="no such thing: key") as caught:
            await submit_to(1, p.FAIL, p.Text("key"))
        assert caught.value.hint == "look elsewhere"
        with pytest.raises(BugError, match="ZeroDivisionError"):
            await submit_to(1, p.BUG, p.Text("nothing"))
        with pytest.raises(BugError, match="cannot be packed"):
            await submit_to(1, p.UNPACKABLE, p.Text())
        with pytest.raises(NotFound, match="nonesuch on shard 1"):
            await submit_to(1, Method("nonesuch", p.Text, p.Text), p.Text())
        with pytest.raises(InvalidArgument, match="request of .who.: Expected"):
            await submit_to(1, Method("who", int, p.Numbers), 5)
        with pytest.raises(InvalidArgument, match="cannot be packed"):
            await submit_to(1, Method("who", object, p.Numbers), object())
        with pytest.raises(InvalidArgument, match="there are 2"):
            await submit_to(2, p.WHO, p.Text())
        assert (await submit_to(1, p.ECHO, p.Text("still there"))).text == "still there"
        assert rig.smp.statistics().lanes[0].calls_in_flight == 0


async def test_errors_that_are_no_utf8_travel_too(world: World) -> None:
    """File names can hold any bytes. Such an error must neither cost the channel nor the caller's credit."""
    async with shards(world, 2) as rig:
        for method in (p.ODD, p.ODD_LATER):
            with pytest.raises(NotFound, match=r"no such file: \\udcff") as caught:
                await submit_to(1, method, p.Text(), timeout_s=5)
            assert caught.value.hint == "\\udcfe"
        assert rig.smp.statistics().lanes[0].calls_in_flight == 0


async def test_a_deadline_ends_the_call_here_and_there(world: World) -> None:
    async with shards(world, 2) as rig:
        with pytest.raises(DeadlineExceeded, match="sleep on shard 1 took longer than 0.1 s"):
            await submit_to(1, p.SLEEP, p.Text("30"), timeout_s=0.1)
        await _until_cancelled(1)
        assert rig.smp.statistics().lanes[0].calls_timed_out == 1


async def test_cancelling_a_call_cancels_it_there(world: World) -> None:
    async with shards(world, 2):
        call = asyncio.ensure_future(submit_to(1, p.SLEEP, p.Text("30")))
        while (await submit_to(1, p.SEEN, p.Text())).values[0] == 0:
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await _until_cancelled(1)


async def test_a_call_cancelled_at_once_gives_its_credit_back(world: World) -> None:
    group = SmpServiceGroup("one", 1)
    async with shards(world, 2):
        for _ in range(50):
            call = asyncio.ensure_future(submit_to(1, p.SLEEP, p.Text("30"), group=group))
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert (await submit_to(1, p.SLEEP, p.Text("0"), group=group)).text == "1"


async def test_nested_calls_inherit_the_deadline(world: World) -> None:
    async with shards(world, 2):
        assert float((await submit_to(1, p.LEFT, p.Text(), timeout_s=5)).text) <= 5
        async with deadline(3.0):
            assert 0 < float((await submit_to(1, p.LEFT, p.Text(), timeout_s=20)).text) <= 3


@pytest.mark.row("S4")
async def test_two_shards_calling_each_other_never_run_out_of_credits(world: World) -> None:
    """64 chains of calls 1 -> 2 -> 1 -> 2 ... at once, on one credit for each pair and depth: each chain holds a credit at every depth."""
    async with shards(world, 3, max_nonlocal_requests=1) as rig:
        calls = [submit_to(1 + n % 2, p.BOUNCE, p.Bounce(5, 1, 2), timeout_s=20) for n in range(64)]
        found = await asyncio.gather(*calls)

        assert [each.values for each in found] == [(1, 2, 1, 2, 1, 2), (2, 1, 2, 1, 2, 1)] * 32
        # The same between shard 0 and another: here both directions start with calls of depth one.
        assert (await submit_to(1, p.BOUNCE, p.Bounce(4, 0, 1))).values == (1, 0, 1, 0, 1)
        assert [lane.calls_waiting for lane in rig.smp.statistics().lanes] == [0, 0]


async def test_calls_nested_too_deep_are_refused(world: World) -> None:
    async with shards(world, 2):
        with pytest.raises(Exhausted, match="8 deep"):
            await submit_to(1, p.BOUNCE, p.Bounce(20, 0, 1))


@pytest.mark.virtual_time
async def test_credits_bound_what_runs_over_there(world: World) -> None:
    few, others = SmpServiceGroup("few", 3), SmpServiceGroup("others", 3)
    async with shards(world, 2) as rig:
        calls = [asyncio.ensure_future(submit_to(1, p.SLEEP, p.Text("0.2"), group=few)) for _ in range(7)]
        while (stats := rig.smp.statistics().lanes[0]).calls_in_flight + stats.calls_waiting < 7:
            await asyncio.sleep(0)
        assert (stats.calls_in_flight, stats.calls_waiting) == (3, 4)
        # Another group's credits are its own.
        assert (await submit_to(1, p.ECHO, p.Text("x"), group=others, timeout_s=0.1)).text == "x"
        # Who waits for a credit too long is told so, and takes nobody's place.
        with pytest.raises(DeadlineExceeded):
            await submit_to(1, p.ECHO, p.Text("x"), group=few, timeout_s=0.05)
        assert [each.text for each in await asyncio.gather(*calls)] == ["1"] * 7


async def test_many_small_calls_arrive_whole_and_in_batches(world: World) -> None:
    n_calls = 2000
    async with shards(world, 2, max_nonlocal_requests=1000) as rig:
        found = await asyncio.gather(*(submit_to(1, p.ECHO, p.Text(str(n))) for n in range(n_calls)))

        assert [each.text for each in found] == [str(n) for n in range(n_calls)]
        mine, theirs = await rig.service.statistics()
        assert mine.lanes[0].calls_sent >= n_calls
        assert theirs.lanes[0].calls_received >= n_calls
        assert mine.lanes[0].flushes < n_calls / 10
        assert mine.lanes[0].bytes_out > n_calls * 8
        total = [each.value for each in rig.metrics.statistics() if each.name == "isopod_smp_calls_sent_total"]
        assert sum(total) >= n_calls


async def test_a_call_runs_in_the_callers_scheduling_group(world: World) -> None:
    async with shards(world, 2, services=[p.serve, p.grouped]):
        assert (await submit_to(1, p.GROUP_OF, p.Text())).text == "main"
        for name, wanted in (("bulk", "bulk"), ("unknown", "main")):
            group = SchedulingGroup(name, 100)
            call = asyncio.get_running_loop().create_task(submit_to(1, p.GROUP_OF, p.Text()), context=group.context())
            assert (await call).text == wanted


async def test_without_shards_there_is_shard_zero(world: World) -> None:
    assert (this_shard_id(), shard_count()) == (0, 1)
    with pytest.raises(WrongState):
        this_smp()
    with pytest.raises(WrongState):
        await submit_to(0, p.WHO, p.Text())


async def test_large_messages_pass_and_too_large_ones_are_refused(world: World) -> None:
    async with shards(world, 2, ring_bytes=4096, message_bytes_max=3 << 20):
        text = "0123456789" * 200_000
        assert (await submit_to(1, p.ECHO, p.Text(text))).text == text, "500 times the ring"
        with pytest.raises(InvalidArgument, match="are over"):
            await submit_to(1, p.ECHO, p.Text("x" * (4 << 20)))
        assert (await submit_to(1, p.ECHO, p.Text("x"))).text == "x"


async def _until_cancelled(n_calls: int) -> None:
    async with asyncio.timeout(40):
        while (await submit_to(1, p.SEEN, p.Text())).values[1] < n_calls:
            await asyncio.sleep(0.01)
