"""Shards that die: restarted with a pause, reported, given up at last; and the orderly end."""

import asyncio
from collections.abc import Awaitable, Callable
from signal import SIGKILL

import pytest

from isopod.runtime.shards import RestartPolicy, Sharded, ShardEvent, SmpConfig, SmpService, submit_to, this_smp
from isopod.world.errors import Cancelled, Disconnected, InvalidArgument, IsopodError, NotFound, ShardLost, WrongState
from isopod.world.world import World
from tests.runtime.shards import program as p
from tests.runtime.shards.kit import Rig, shards

QUICK = RestartPolicy(backoff_s=0.02, backoff_max_s=0.1)


async def kill(world: World, shard: int) -> int:
    """kill -9 a shard; return the pid it had."""
    pid = (await submit_to(shard, p.WHO, p.Text())).values[2]
    identity = world.processes.identify(pid)
    assert identity is not None
    assert world.processes.signal(identity, SIGKILL)
    await world.processes.wait_gone(identity)
    return pid


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(40):
        while not await condition():
            await asyncio.sleep(0.01)


@pytest.mark.row("S4")
async def test_a_killed_shard_returns_and_the_others_go_on(world: World) -> None:
    events: list[ShardEvent] = []
    async with shards(world, 3, restart=QUICK, on_event=events.append) as rig:
        before = await submit_to(1, p.WHO, p.Text())
        running = asyncio.ensure_future(submit_to(1, p.SLEEP, p.Text("30")))
        relayed = asyncio.ensure_future(submit_to(2, p.RELAY, p.Numbers((1,))))
        await relayed
        await kill(world, 1)
        with pytest.raises(Disconnected, match="shard 1"):
            await running
        assert (await submit_to(2, p.ECHO, p.Text("on"))).text == "on"

        await until(lambda: _has_state(events, 1, "down"))
        await rig.service.wait_up(1)
        after = await submit_to(1, p.WHO, p.Text())
        assert after.values[:2] == (1, 3)
        assert after.values[2] != before.values[2]
        # The others reach the new one, and it them.
        assert (await submit_to(2, p.RELAY, p.Numbers((1, 2, 1, 0)))).values == (2, 1, 2, 1, 0)
        assert [(each.shard, each.state) for each in events[-2:]] == [(1, "down"), (1, "up")]
        if world.name == "host":
            assert events[-2].status == -SIGKILL
        assert [each.restarts for each in await rig.service.statistics()] == [0, 1, 0]
        assert "smp.shard_down" in [line["event"] for line in rig.lines]
        values = {each.name: each.value for each in rig.metrics.statistics()}
        assert values["isopod_smp_restarts_total"] == 1
        assert values["isopod_smp_shards_up"] == 3


async def test_calls_to_a_shard_that_is_down_fail_at_once(world: World) -> None:
    slow = RestartPolicy(backoff_s=60, jitter=0)
    async with shards(world, 3, restart=slow) as rig:
        await kill(world, 1)
        await until(lambda: _is_state(rig, 1, "down"))
        with pytest.raises(Disconnected, match="not running"):
            await submit_to(1, p.WHO, p.Text())
        with pytest.raises(Disconnected):
            await submit_to(2, p.RELAY, p.Numbers((1,)))
        assert [each.shard for each in await rig.service.statistics()] == [0, 2]


async def test_a_shard_that_keeps_dying_is_given_up(world: World) -> None:
    policy = RestartPolicy(backoff_s=0.01, backoff_max_s=0.02, n_quick_deaths_max=2)
    async with shards(world, 3, restart=policy) as rig:
        lost = asyncio.ensure_future(rig.service.wait_lost())
        for _ in range(3):
            await rig.service.wait_up(1)
            await kill(world, 1)
            await until(lambda: _is_not_state(rig, 1, "up"))
        assert await lost == 1
        with pytest.raises(ShardLost, match="shard 1 is lost"):
            await submit_to(1, p.WHO, p.Text())
        with pytest.raises(ShardLost):
            await rig.service.wait_up(1)
        with pytest.raises(ShardLost):
            await submit_to(2, p.RELAY, p.Numbers((1,)))
        assert rig.service.states() == {0: "up", 1: "lost", 2: "up"}


async def test_the_pause_grows_and_varies(world: World) -> None:
    """Three deaths in a row: pauses of 1, 2 and 4 units, each shortened by chance by up to half."""
    unit_s = 0.2 if world.name == "host" else 10.0
    policy = RestartPolicy(backoff_s=unit_s, backoff_max_s=3 * unit_s, n_quick_deaths_max=3, quick_s=1e6)
    events: list[tuple[str, float]] = []
    loop = asyncio.get_running_loop()
    async with shards(world, 2, restart=policy, on_event=lambda event: events.append((event.state, loop.time()))) as rig:
        for _ in range(2):
            await rig.service.wait_up(1)
            await kill(world, 1)
            await until(lambda: _is_not_state(rig, 1, "up"))
        await rig.service.wait_up(1)
        downs = [at for state, at in events if state == "down"]
        ups = [at for state, at in events if state == "up"][1:]
        pauses = [up - down for down, up in zip(downs, ups, strict=True)]
        start_s = 0.1 if world.name == "sim" else 30.0
        assert unit_s / 2 <= pauses[0] <= unit_s + start_s
        assert unit_s <= pauses[1] <= 2 * unit_s + start_s


async def test_shards_that_die_together_find_each_other_again(world: World) -> None:
    async with shards(world, 4, restart=QUICK) as rig:
        await asyncio.gather(*(kill(world, shard) for shard in (1, 2, 3)))
        for shard in (1, 2, 3):
            await until(lambda shard=shard: _was_restarted(rig, shard))  # type: ignore[misc]
        assert (await submit_to(1, p.RELAY, p.Numbers((2, 3, 1, 3, 2, 1, 0)))).values == (1, 2, 3, 1, 3, 2, 1, 0)


async def test_a_stop_that_is_cancelled_leaves_nothing(world: World) -> None:
    async with shards(world, 3, stop_grace_s=3600) as rig:
        pids = [(await submit_to(shard, p.WHO, p.Text())).values[2] for shard in (1, 2)]
        call = asyncio.ensure_future(submit_to(1, p.SLEEP, p.Text("7200"), timeout_s=7200))
        while not (await submit_to(1, p.SEEN, p.Text())).values[0]:
            await asyncio.sleep(0.001)
        stopping = asyncio.ensure_future(rig.service.stop())
        await asyncio.sleep(0.05)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
        assert [world.processes.identify(pid) for pid in pids] == [None, None]
        with pytest.raises(Disconnected):
            await call


async def test_instances_are_made_anew_on_a_new_shard(world: World) -> None:
    async with shards(world, 3, restart=QUICK) as rig:
        counter = await Sharded.start(p.Counter, p.Add(10), "x")
        assert await counter.on(1).add(p.Add(5)) == 15
        await kill(world, 1)
        await until(lambda: _is_not_state(rig, 1, "up"))
        await rig.service.wait_up(1)
        assert await counter.on(1).value_of() == 10, "made of the same arguments"
        assert await counter.on(2).sum_of_all() == 30, "and known to the others"


async def test_stopping_while_calls_run(world: World) -> None:
    async with shards(world, 3, stop_grace_s=0.1):
        smp = this_smp()
        calls = [asyncio.ensure_future(submit_to(shard, p.SLEEP, p.Text("30"))) for shard in (1, 2) for _ in range(5)]
        relayed = asyncio.ensure_future(submit_to(1, p.BOUNCE, p.Bounce(3, 1, 2)))
        await relayed
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, Disconnected | Cancelled) for outcome in outcomes), outcomes
    with pytest.raises(WrongState):
        await smp.submit_to(1, p.WHO, p.Text())


@pytest.mark.virtual_time
async def test_an_orderly_end_is_no_news_and_all_calls_get_their_grace_at_once(world: World) -> None:
    async with shards(world, 4, stop_grace_s=1.0) as rig:
        calls = [asyncio.ensure_future(submit_to(1, p.RELAY_SLEEP, p.Text("3600"), timeout_s=7200))]
        calls += [asyncio.ensure_future(submit_to(shard, p.RELAY_SLEEP, p.Text("3600"), timeout_s=7200)) for shard in (2, 3)]
        while (await submit_to(1, p.SEEN, p.Text())).values[0] < 3:
            await asyncio.sleep(0.001)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        await rig.service.stop()
        # Shard 1 serves calls of three others: it waits for them together.
        assert loop.time() - began_s < 2.5
        assert not [line for line in rig.lines if line["level"] in ("warning", "error")]
        await asyncio.gather(*calls, return_exceptions=True)


async def test_calls_that_end_soon_are_waited_for(world: World) -> None:
    async with shards(world, 2, stop_grace_s=5):
        call = asyncio.ensure_future(submit_to(1, p.SLEEP, p.Text("0.2")))
        while not (await submit_to(1, p.SEEN, p.Text())).values[0]:
            await asyncio.sleep(0)
    assert (await call).text == "1"


async def test_a_service_that_cannot_start_ends_all(world: World) -> None:
    with pytest.raises(NotFound, match="licence: for shard"):
        async with shards(world, 3, services=[p.serve, p.broken_on_others]):
            pytest.fail("it started")
    with pytest.raises(NotFound, match="no such service"):
        async with shards(world, 2, services=["tests.runtime.shards.program:nothing"]):
            pytest.fail("it started")
    with pytest.raises(InvalidArgument, match="another shard cannot import it"):
        async with shards(world, 2, services=[lambda _: None]):
            pytest.fail("it started")
    with pytest.raises(InvalidArgument, match="number of shards"):
        async with shards(world, 5000):
            pytest.fail("it started")


async def test_a_shard_that_dies_while_it_starts(world: World) -> None:
    with pytest.raises(IsopodError, match="process ended"):
        async with shards(world, 2, services=[p.dies_while_starting]):
            pytest.fail("it started")


async def test_a_shard_that_dies_before_it_joins(world: World) -> None:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    with pytest.raises(Disconnected, match="shard 1.*process ended"):
        async with shards(world, 3, services=[p.dies_when_ready], start_timeout_s=30):
            pytest.fail("it started")
    assert loop.time() - began_s < 15  # not the time-out


async def test_a_failure_of_any_length_is_told(world: World) -> None:
    with pytest.raises(NotFound, match=r"no such \\udcff: xxx"):
        async with shards(world, 2, services=[p.fails_at_length], start_timeout_s=20):
            pytest.fail("it started")


async def test_a_listener_for_events_that_fails_stops_no_supervision(world: World) -> None:
    def on_event(_: ShardEvent) -> None:
        raise ZeroDivisionError

    async with shards(world, 2, restart=QUICK, on_event=on_event) as rig:
        before = await kill(world, 1)
        await until(lambda: _was_restarted(rig, 1))
        assert (await submit_to(1, p.WHO, p.Text())).values[2] != before
        assert "smp.event_failed" in [line["event"] for line in rig.lines]


async def test_a_shard_that_never_gets_ready(world: World) -> None:
    with pytest.raises(IsopodError, match="the start of shard 1 took longer"):
        async with shards(world, 2, services=[p.never_ready], start_timeout_s=1.0, stop_grace_s=0.1):
            pytest.fail("it started")


async def test_it_starts_once(world: World) -> None:
    async with shards(world, 2) as rig:
        with pytest.raises(WrongState):
            await rig.service.start()
    await rig.service.stop()


async def test_the_number_of_shards_by_itself(world: World) -> None:
    from isopod.runtime.logger import Logger

    logger = Logger(lambda _: None, world.clock)
    service = SmpService(world, SmpConfig(n_shards=0), logger=logger)

    assert service.n_shards == sum(len(node.cpus) for node in world.shards.topology())
    assert service.cpus[0] is not None
    assert len(set(service.cpus)) == service.n_shards


async def _has_state(events: list[ShardEvent], shard: int, state: str) -> bool:
    return (shard, state) in [(event.shard, event.state) for event in events]


async def _is_state(rig: Rig, shard: int, state: str) -> bool:
    return rig.service.states()[shard] == state


async def _was_restarted(rig: Rig, shard: int) -> bool:
    stats = {each.shard: each.restarts for each in await rig.service.statistics()}
    return stats.get(shard) == 1 and rig.service.states()[shard] == "up"


async def _is_not_state(rig: Rig, shard: int, state: str) -> bool:
    return rig.service.states()[shard] != state
