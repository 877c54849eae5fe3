"""Events: in order, to everybody, without gaps or repetitions for a reader that is slow, was cut, or comes late."""

import asyncio
from contextlib import aclosing

import msgspec
import pytest

from isopod.api.messages import Cursor, Event, EventsRequest, Resources
from isopod.engine import operations as ops
from isopod.engine.events import QUEUE_EVENTS_MAX, STREAMS_MAX, LoggingHandler, MetricsHandler, stream_events, wanted
from isopod.engine.metadata import MetadataStore
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import Exhausted, InvalidArgument, NotFound
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.engine.test_bundle import RECORD
from tests.engine.test_metadata import opened, record

ID = RECORD.id


async def label(store: MetadataStore, number: int) -> None:
    await store.commit(ops.UpdateLabels(ID, {"n": str(number)}))


def numbers(events: list[Event]) -> list[int]:
    return [int((event.labels or {})["n"]) for event in events if event.labels]


@pytest.mark.row("R30")
async def test_every_kind_reaches_a_handler_once_it_is_durable(world: World, folder: str) -> None:
    told: list[Event] = []
    async with opened(world, folder) as store:
        end = store.subscribe(told.append)
        await store.commit(ops.Create(RECORD))
        await store.commit(
            ops.UpdateStatus(ID, "starting"),
            ops.UpdateHealth(ID, "starting"),
            ops.UpdateResources(ID, Resources(cpus=1.0)),
            ops.UpdateEnvironment(ID, {"A": "B"}),
            ops.UpdateLabels(ID, {"a": "b"}),
            ops.AttachNetwork(ID, msgspec.structs.replace(RECORD.network, network="x")),
            ops.DetachNetwork(ID),
        )
        assert [event.kind for event in told] == [
            *("created", "status", "health", "resources", "environment", "labels", "network", "network")
        ]
        assert [event.cursor for event in told] == list(range(1, 9)), "the numbers of their journal records"
        end()
        await store.commit(ops.UpdateHealth(ID, "healthy"))
        assert len(told) == 8


async def test_a_handler_that_fails_keeps_nobody_from_hearing(world: World, folder: str) -> None:
    told: list[Event] = []

    def fail(_: Event) -> None:
        raise ZeroDivisionError

    async with opened(world, folder) as store:
        store.subscribe(fail)
        store.subscribe(told.append)
        await store.commit(ops.Create(RECORD))
        await store.commit(ops.Delete(ID))
    assert [event.kind for event in told] == ["created", "deleted"]


@pytest.mark.row("R36")
async def test_the_ready_made_handlers_log_and_count(world: World, folder: str) -> None:
    lines: list[bytes] = []
    metrics = Registry()
    async with opened(world, folder) as store:
        store.subscribe(LoggingHandler(Logger(lines.append, world.clock)))
        store.subscribe(LoggingHandler(Logger(lines.append, world.clock), "debug"))
        store.subscribe(MetricsHandler(metrics))
        await store.commit(ops.Create(RECORD), ops.UpdateStatus(ID, "starting"), ops.UpdateEnvironment(ID, {"KEY": "hidden"}))
    text = b"".join(lines)
    assert text.count(b'"kind":"status"') == 1
    assert b'"status":"starting","before":"created"' in text
    assert b"hidden" not in text
    page = metrics.render()
    assert 'isopod_container_events_total{kind="created"} 1' in page
    assert 'isopod_container_states_total{status="starting"} 1' in page


@pytest.mark.row("R30")
async def test_a_reader_that_is_slow_loses_nothing(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        seen: list[Event] = []
        async with aclosing(store.follow(store.last_cursor)) as events:
            first = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            for start in range(0, 3 * QUEUE_EVENTS_MAX, 256):
                await asyncio.gather(*(label(store, number) for number in range(start, start + 256)))
            seen.append(await first)
            is_enough = False

            async def go_on() -> None:
                while not is_enough:  # more comes while it catches up
                    await label(store, 0)

            writing = asyncio.ensure_future(go_on())
            async for event in events:
                seen.append(event)
                if len(seen) == 3 * QUEUE_EVENTS_MAX:
                    is_enough = True
                    await writing
                if is_enough and event.cursor == store.last_cursor:
                    break
        assert [event.cursor for event in seen] == list(range(2, store.last_cursor + 1))
        assert sorted(numbers(seen))[-3 * QUEUE_EVENTS_MAX + 1 :] == list(range(1, 3 * QUEUE_EVENTS_MAX))
        assert store.n_streams == 0


@pytest.mark.row("R30")
async def test_a_cursor_goes_on_over_restarts_snapshots_and_the_archive(world: World, folder: str) -> None:
    seen: list[Event] = []
    cursor = 0
    for life in range(4):
        async with opened(world, folder, segment_bytes=64 << 10, snapshot_records=20) as store:
            if not life:
                await store.commit(ops.Create(RECORD))
            for number in range(100):
                await label(store, life * 100 + number)
            target = store.last_cursor - life  # a part of each life is read in the next
            async with aclosing(store.follow(cursor)) as events:
                async for event in events:
                    seen.append(event)
                    cursor = event.cursor
                    if cursor >= target:
                        break
    async with opened(world, folder) as store:
        seen += [event async for event in store.events_after(cursor)]
    assert numbers(seen) == list(range(400))
    assert len({event.cursor for event in seen}) == len(seen) == 401


async def test_a_cursor_from_before_the_archive_is_refused_and_a_time_is_not(world: World, folder: str) -> None:
    small = {"segment_bytes": 8 << 10, "archive_n_max": 0, "snapshot_records": 10}
    async with opened(world, folder, **small) as store:
        await store.commit(ops.Create(RECORD))
        for number in range(300):
            await label(store, number)
            if number % 50 == 0:
                await store.snapshot()
        oldest = await store.oldest_cursor()
        assert oldest > 0
        with pytest.raises(NotFound, match="after record 0") as refused:
            _ = [event async for event in store.events_after(0)]
        assert "--since" in refused.value.hint
        got = [item async for item in stream_events(world, store, EventsRequest(since_ns=0, until_ns=world.clock.now_ns()))]
        assert got[0] == Cursor(oldest)
        assert isinstance(got[-1], Event)
        assert got[-1].labels == {"n": "299"}


async def test_streams_have_a_beginning_an_end_and_filters(sim_world: SimWorld, folder: str) -> None:
    world = sim_world.world
    async with opened(world, folder) as store:
        await store.commit(ops.Create(RECORD))
        await asyncio.sleep(10)
        middle_ns = world.clock.now_ns()
        await store.commit(ops.Create(record(2)))
        await store.commit(ops.UpdateLabels(ID, {"n": "1"}))

        async def names(**request: object) -> list[str]:
            items = [item async for item in stream_events(world, store, msgspec.convert(request, EventsRequest))]
            return [item.name for item in items if isinstance(item, Event)]

        now_ns = world.clock.now_ns()
        assert await names(since_ns=0, until_ns=now_ns) == ["box", "box2", "box"]
        assert await names(since_ns=middle_ns, until_ns=now_ns) == ["box2", "box"]
        assert await names(since_ns=0, until_ns=middle_ns) == ["box"]
        assert await names(cursor=2, until_ns=now_ns) == ["box"]
        assert await names(since_ns=0, until_ns=now_ns, kinds=["created"], containers=["box2"]) == ["box2"]
        assert await names(until_ns=now_ns + 5_000_000_000) == []
        assert world.clock.now_ns() - now_ns > 4_000_000_000, "it waited for its end"
        with pytest.raises(InvalidArgument):
            await names(cursor=99)


async def test_too_many_streams_are_refused(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        queues = [store._hub.open_queue() for _ in range(STREAMS_MAX)]
        with pytest.raises(Exhausted):
            _ = [item async for item in stream_events(world, store, EventsRequest())]
        for queue in queues:
            queue.close()


async def test_a_store_that_closes_ends_its_streams(world: World, folder: str) -> None:
    async with opened(world, folder) as store:
        waiting = asyncio.ensure_future(_last(store))
        await asyncio.sleep(0)
    assert await waiting is None


async def _last(store: MetadataStore) -> Event | None:
    async with aclosing(store.follow(store.last_cursor)) as events:
        return await anext(events, None)


def test_beginnings_of_ids_and_whole_names_choose_events() -> None:
    event = Event(kind="created", id=ID, name="box", at_ns=1)
    assert wanted(event, EventsRequest(containers=("aaaa",)))
    assert wanted(event, EventsRequest(containers=("x", "box")))
    assert not wanted(event, EventsRequest(containers=("bo",)))
    assert not wanted(event, EventsRequest(kinds=("status",)))
