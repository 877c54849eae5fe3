"""Sharded: one instance on every shard."""

import operator

import pytest

from isopod.runtime.shards import Sharded, SmpServiceGroup, submit_to, verb
from isopod.world.errors import InvalidArgument, NotFound, WrongState
from isopod.world.world import World
from tests.runtime.shards import program as p
from tests.runtime.shards.kit import shards


@pytest.mark.row("S4")
async def test_an_instance_on_every_shard(world: World) -> None:
    async with shards(world, 3):
        counter = await Sharded.start(p.Counter, p.Add(100), "label")

        assert await counter.on(1).add(p.Add(5)) == 105
        assert await counter.on(0).add(p.Add(1)) == 101
        assert await counter.invoke_on(2, p.Counter.add, p.Add(7)) == 107
        assert counter.local.value == 101
        assert await counter.on_all(lambda each: each.value_of()) == [101, 105, 107]
        assert await counter.on_others(lambda each: each.add(p.Add(1))) == [106, 108]
        assert await counter.map_reduce(lambda each: each.value_of(), operator.add, 1000) == 1000 + 101 + 106 + 108
        assert await counter.on_all(lambda each: each.where()) == [(0, "label"), (1, "label"), (2, "label")]
        assert await counter.on(2).sum_of_all() == 101 + 106 + 108, "an instance reaches the others"
        assert await counter.on(1, timeout_s=50, group=SmpServiceGroup("own", 1)).value_of() == 106
        await counter.stop()
        await counter.stop()
        with pytest.raises(NotFound):
            await counter.on(1).value_of()
        with pytest.raises(WrongState):
            counter.local.hidden()


async def test_only_verbs_can_be_called(world: World) -> None:
    async with shards(world, 2), await Sharded.start(p.Counter, p.Add(1)) as counter:
        with pytest.raises(AttributeError, match="only verbs"):
            counter.on(1).hidden()
        with pytest.raises(InvalidArgument):
            await counter.on(1).add("text")  # type: ignore[arg-type]


async def test_two_classes_side_by_side_and_by_name(world: World) -> None:
    async with shards(world, 2):
        first = await Sharded.start(p.Counter, p.Add(1))
        second: Sharded[p.Counter] = await Sharded.start("tests.runtime.shards.program:Counter", p.Add(2))

        assert [await each.on(1).value_of() for each in (first, second)] == [1, 2]
        await first.stop()
        assert await second.on(1).value_of() == 2


async def test_what_cannot_be_started(world: World) -> None:
    class Local:
        """Nobody else can import it."""

    async with shards(world, 2):
        with pytest.raises(InvalidArgument, match="another shard cannot import it"):
            await Sharded.start(Local)
        with pytest.raises(InvalidArgument, match="cannot be packed"):
            await Sharded.start(p.Counter, object())
        with pytest.raises(InvalidArgument, match="arguments of 'Counter'"):
            await Sharded.start(p.Counter, "text")
        with pytest.raises(NotFound, match="firm"):
            await Sharded.start(p.Failing, 1)
        # What was made on shard 0 before shard 1 failed is stopped again: the number of instances is what it was.
        working = await Sharded.start(p.Failing, 7)
        assert await working.on_all(lambda each: each.ping()) == [0, 1]
    with pytest.raises(WrongState):
        await Sharded.start(p.Counter, p.Add(1))


async def test_instances_stop_in_reverse_order_of_their_start(world: World) -> None:
    async with shards(world, 2) as rig:
        for name in ("first", "second", "third"):
            await Sharded.start(p.Stopping, name, "")
    assert [line["name"] for line in rig.lines if line["event"] == "stopped"] == ["third", "second", "first"]


async def test_verbs_are_checked_when_a_class_is_started(world: World) -> None:
    async with shards(world, 1):
        with pytest.raises(InvalidArgument, match="more than one request"):
            await Sharded.start(TwoArguments)
        with pytest.raises(InvalidArgument, match="no annotation"):
            await Sharded.start(NoAnnotation)
        with pytest.raises(InvalidArgument, match="it is no class"):
            await Sharded.start("tests.runtime.shards.program:serve")


async def test_sharded_starts_on_shard_zero_only(world: World) -> None:
    async with shards(world, 2, services=[p.serve, p.starter]):
        with pytest.raises(WrongState, match="not the first"):
            await submit_to(1, p.START_THERE, p.Text())


class TwoArguments:
    @verb
    async def add(self, one: int, two: int) -> int:
        return one + two


class NoAnnotation:
    @verb
    async def add(self, one):  # type: ignore[no-untyped-def]
        return one
