"""StoreClient over RPC: everything that can be done, nodes that die, leaders that change, and deadlines."""

import asyncio
import queue
import threading

import pytest

from isopod.api.messages import Empty
from isopod.api.store import BlockingStore, Condition, Delete, Get, HeldLease, Put, Range, StoreClient, Txn, methods
from isopod.api.store import messages as m
from isopod.api.store.client import ClientSettings
from isopod.api.store.nodes import Nodes
from isopod.net.rpc import connect
from isopod.world.errors import (
    DeadlineExceeded,
    Disconnected,
    Exhausted,
    InvalidArgument,
    LeadershipLost,
    NotFound,
    NotStarted,
    RevisionCompacted,
)
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.network import TcpAddress, UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.cluster.store.rig import FakeLog

pytestmark = pytest.mark.row("B18")


async def test_everything_a_store_can_do_from_afar(world: World) -> None:
    async with FakeLog(world, 2) as log, StoreClient(world, [await log.serve(1)], plaintext=True) as store:
        assert await store.put("a/1", b"1") == 1
        assert sorted(await asyncio.gather(*(store.put(f"b/{number}", b"2") for number in range(300)))) == list(range(2, 302))
        assert (await store.get("a/1")).value == b"1"
        assert (await store.get("none")).entry is None
        assert len((await store.range("b/", limit=7)).entries) == 7
        entries, revision = await store.list_all("b/")
        assert (len(entries), revision) == (300, 301)
        result = await store.txn(
            Txn((Condition("a/1", "value", "=", value=b"1"),), (Put("c", b"3"), Get("a/1"), Range("b/", 1), Delete("no")))
        )
        assert result.succeeded
        assert [type(part).__name__ for part in result.results] == ["int", "Page", "Page", "Deleted"]
        assert await store.put_if("c", b"4", revision=1) is None
        assert await store.delete("c") is True
        assert await store.delete_prefix("b/") == 300
        lease = await store.lease_grant(30)
        await store.put("l", b"", lease=lease)
        assert await store.lease_keep([lease, 7]) == [30.0, 0.0]
        assert [info.n_keys for info in await store.lease_list()] == [1]
        assert await store.lease_revoke(lease) == 1
        with pytest.raises(NotFound):
            await store.lease_revoke(lease)
        assert await store.compact(5) > 0
        status = await store.status()
        assert (status.role, status.n_keys, status.n_sessions) == ("leader", 1, 1)
        assert (await store.consistency()).consistent is True
    assert len(log.rafts[1].machine.sessions) == 0, "a client that is closed gives its session back"


async def test_what_is_asked_for_in_one_turn_travels_together(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True) as store:
        await store.put("a", b"")
        n_batches, n_barriers = len(log.batches), log.rafts[1].n_barriers
        await asyncio.gather(*(store.put(f"k{number}", b"") for number in range(256)))
        await asyncio.gather(*(store.get(f"k{number}") for number in range(256)))
        assert len(log.batches) - n_batches == 1
        assert log.rafts[1].n_barriers - n_barriers == 1


async def test_a_connection_that_was_just_left_is_closed_as_well(world: World) -> None:
    async with FakeLog(world, 2) as log:
        nodes = Nodes(world, [await log.serve(1), await log.serve(2)], plaintext=True)
        await nodes.call(methods.KV_STATUS, Empty(), timeout_s=5.0)
        client = nodes._client
        assert client is not None
        nodes.prefer(2, log.addresses[2])
        await nodes.close()
        assert client.connection.is_gone


@pytest.mark.row("B12")
async def test_the_leader_dies_and_nothing_is_lost_or_done_twice(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 3) as log:
        addresses = [await log.serve(number) for number in (1, 2, 3)]
        async with StoreClient(world, addresses, plaintext=True) as store:
            acknowledged: list[int] = []

            async def write() -> None:
                for number in range(200):
                    await store.put(f"n{number}", b"")
                    acknowledged.append(number)
                    await asyncio.sleep(0.01)

            log.rafts[1].delay_s = 0.2
            writing = asyncio.ensure_future(write())
            await asyncio.sleep(0.5)
            await log.kill(1)
            await asyncio.sleep(0.3)
            log.elect(2)
            await writing
            assert acknowledged == list(range(200))
            entries, _ = await store.list_all("n")
            assert sorted(entry.version for entry in entries) == [1] * 200
            assert store.n_repeats > 0


async def test_a_reply_that_is_lost_is_answered_from_the_session(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 2) as log:
        addresses = [await log.serve(1), await log.serve(2)]
        async with StoreClient(world, addresses, plaintext=True) as store:
            await store.put("n", b"0")
            log.rafts[1].lose_replies = 3
            await store.put("n", b"1")
            await store.put("n", b"2")
            assert (await store.get("n")).entry == m.Entry("n", b"2", 1, 3, 3)


async def test_without_a_session_a_doubtful_write_fails_and_is_not_sent_again(sim_world: SimWorld) -> None:
    world = sim_world.world
    settings = ClientSettings(with_session=False)
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True, settings=settings) as store:
        log.rafts[1].lose_replies = 1
        with pytest.raises(LeadershipLost):
            await store.put("n", b"1")
        assert log.rafts[1].machine.keys.entries["n"].version == 1
        log.elect(0)
        waiting = asyncio.ensure_future(store.put("n", b"2"))
        await asyncio.sleep(0.5)
        log.elect(1)
        assert await waiting == 2, "what was certainly not begun is tried again"
        assert len(log.rafts[1].machine.sessions) == 0


async def test_a_client_finds_the_leader(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 3) as log:
        for number in (1, 2, 3):
            await log.serve(number)
        port = int(log.addresses[3].rpartition(":")[2])
        async with StoreClient(world, [TcpAddress("127.0.0.1", port)], plaintext=True) as store:
            for _ in range(2):
                await store.put("a", b"")
            assert store._nodes.where == log.addresses[1]
            log.elect(2)
            for _ in range(2):
                await store.put("a", b"")
            assert store._nodes.where == log.addresses[2]


async def test_a_client_of_local_sockets_tries_each_for_the_leader_and_then_stays(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 4) as log:
        sockets = [UnixAddress(f"/run/n{number}.sock") for number in (1, 2, 3)]
        for number, address in enumerate(sockets, 1):
            await log.serve(number, address)
            log.addresses[number] = f"10.0.0.{number}:7000"  # which such a client cannot use
        log.elect(3)
        async with StoreClient(world, sockets) as store:
            for _ in range(4):
                await store.put("a", b"")
            assert store._nodes.where == "unix:/run/n3.sock"
            n_connects = store._nodes.n_connects
            await log.serve(4)
            log.elect(4)
            for _ in range(10):
                await store.put("a", b"")
            assert store._nodes.n_connects - n_connects == 2, "the leader has no socket here"


@pytest.mark.row("B32")
async def test_a_call_ends_after_five_seconds(sim_world: SimWorld) -> None:
    world = sim_world.world
    loop = asyncio.get_running_loop()
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True) as store:
        await store.put("a", b"")
        log.elect(0)
        log.rafts[1].barrier_error = DeadlineExceeded("a read", 5)
        for what in (lambda: store.put("a", b""), lambda: store.get("a"), lambda: store.lease_keep([1])):
            began = loop.time()
            with pytest.raises(DeadlineExceeded) as caught:
                await what()
            assert 4 < loop.time() - began < 5.5
            assert "5 s" in caught.value.message


@pytest.mark.row("B32")
async def test_nobody_there_is_said_in_time(sim_world: SimWorld) -> None:
    async with StoreClient(sim_world.world, [TcpAddress("127.0.0.1", 1)], plaintext=True) as store:
        with pytest.raises(DeadlineExceeded) as caught:
            await store.put("a", b"", timeout_s=0.5)
        assert "no node of 127.0.0.1:1 answers" in caught.value.hint
        with pytest.raises(DeadlineExceeded):
            await store.get("a", timeout_s=0.5)
        with pytest.raises(NotStarted):
            await store.status(timeout_s=0.5)


async def test_a_hung_node_is_left_for_another(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 2) as log:
        addresses = [await log.serve(1), await log.serve(2)]
        async with StoreClient(world, addresses, plaintext=True) as store:
            await store.put("a", b"")
            log.rafts[1].delay_s = 60.0
            waiting = asyncio.ensure_future(store.put("a", b""))
            await asyncio.sleep(0.1)
            log.elect(2)
            assert await waiting == 2


async def test_bad_arguments_are_refused_here(sim_world: SimWorld) -> None:
    async with StoreClient(sim_world.world, [TcpAddress("127.0.0.1", 1)], plaintext=True) as store:
        for wrong in (
            lambda: store.put("", b""),
            lambda: store.put("k" * 1025, b""),
            lambda: store.put("k", bytes(m.VALUE_BYTES_MAX + 1)),
            lambda: store.put("k", b"", lease=-1),
            lambda: store.put("k\udc80", b""),
            lambda: store.put("k", "text"),  # type: ignore[arg-type]  # what an untyped program may pass
            lambda: store.get(""),
            lambda: store.range("", limit=0),
            lambda: store.submit(Txn((), tuple(Put("k", b"") for _ in range(129)))),
        ):
            with pytest.raises(InvalidArgument):
                await wrong()
        with pytest.raises(InvalidArgument):
            StoreClient(sim_world.world, [], plaintext=True)


async def test_reads_that_do_not_fit_into_one_answer_are_asked_for_in_smaller_groups(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True) as store:
        for number in range(8):
            await store.put(f"k{number}", bytes(200_000))
        found = await asyncio.gather(*(store.get(f"k{number}") for number in range(8)))
        assert [len(item.value or b"") for item in found] == [200_000] * 8
        entries, _ = await store.list_all()
        assert len(entries) == 8
        lot = Txn((), tuple(Get(f"k{number}") for number in range(8)))
        result = await store.txn(lot)
        assert isinstance(result.results[-1], m.Refusal)


async def test_a_closed_client_fails_what_waits(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 1) as log:
        store = StoreClient(world, [await log.serve(1)], plaintext=True)
        log.elect(0)
        waiting = [asyncio.ensure_future(store.put("a", b"")), asyncio.ensure_future(store.get("a"))]
        await asyncio.sleep(0)
        await store.close()
        await store.close()
        for task in waiting:
            with pytest.raises(Disconnected):
                await task
        with pytest.raises(Disconnected):
            store.put("a", b"")


async def test_what_waits_is_bounded(sim_world: SimWorld) -> None:
    world = sim_world.world
    settings = ClientSettings(
        sender=ClientSettings().sender._replace(waiting_max=10), reader=ClientSettings().reader._replace(waiting_max=10)
    )
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True, settings=settings) as store:
        writes = [store.put(f"k{number}", b"") for number in range(10)]
        with pytest.raises(Exhausted):
            store.put("k", b"")
        reads = [store.get(f"k{number}") for number in range(10)]
        with pytest.raises(Exhausted):
            store.get("k")
        await asyncio.gather(*writes, *reads)


@pytest.mark.row("B32")
async def test_what_waits_for_its_turn_keeps_its_own_deadline(sim_world: SimWorld) -> None:
    world = sim_world.world
    loop = asyncio.get_running_loop()
    settings = ClientSettings(sender=ClientSettings().sender._replace(commands_max=1))
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True, settings=settings) as store:
        await store.put("a", b"")
        log.elect(0)
        slow = store.put("a", b"", timeout_s=8.0)
        await asyncio.sleep(0.1)
        given_up = asyncio.ensure_future(store.put("b", b"", timeout_s=30.0))
        await asyncio.sleep(0.1)
        given_up.cancel()
        began = loop.time()
        with pytest.raises(DeadlineExceeded, match="1 s"):
            await store.put("c", b"", timeout_s=1.0)
        assert loop.time() - began < 1.5
        with pytest.raises(DeadlineExceeded, match="8 s"):
            await slow
        log.elect(1)
        await store.put("d", b"")
        assert [entry.key for entry in (await store.list_all())[0]] == ["a", "d"], "nothing of what failed or was given up is done later"


async def test_a_read_that_waits_for_its_turn_keeps_its_own_deadline(sim_world: SimWorld) -> None:
    world = sim_world.world
    loop = asyncio.get_running_loop()
    settings = ClientSettings(reader=ClientSettings().reader._replace(requests_max=1))
    async with FakeLog(world, 2) as log, StoreClient(world, [await log.serve(2)], plaintext=True, settings=settings) as store:
        await store.get("a")
        log.rafts[2].is_lagging = True
        await log.replicas[1].put("a", b"1")
        slow = asyncio.ensure_future(store.get("a", timeout_s=8.0))
        await asyncio.sleep(0.1)
        began = loop.time()
        with pytest.raises(DeadlineExceeded, match="1 s"):
            await store.get("b", timeout_s=1.0)
        assert loop.time() - began < 1.5
        with pytest.raises(DeadlineExceeded, match="8 s"):
            await slow
        log.rafts[2].is_lagging = False
        log.rafts[2].catch_up()
        assert (await store.get("a")).value == b"1"


async def test_a_watch_survives_its_node_and_misses_nothing(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 3) as log:
        addresses = [await log.serve(number) for number in (1, 2, 3)]
        async with StoreClient(world, addresses, plaintext=True) as store:
            seen: list[int] = []
            ready = asyncio.Event()

            async def follow() -> None:
                async with store.watch("n/", progress_s=0.2) as watch:
                    async for changes in watch:
                        ready.set()
                        seen.extend(entry.mod_revision for entry in changes.entries)
                        if len(seen) >= 100:
                            return

            following = asyncio.ensure_future(follow())
            await ready.wait()
            for number in range(100):
                if number == 30:
                    await log.kill(1)
                    log.elect(2)
                if number == 60:
                    await log.kill(2)
                    log.elect(3)
                await store.put(f"n/{number}", b"")
            await following
            assert seen == list(range(1, 101))


async def test_a_watch_whose_past_is_forgotten_says_so(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True) as store:
        await store.put("a", b"")
        await store.put("a", b"")
        await store.compact(1)
        with pytest.raises(RevisionCompacted):
            async with store.watch("a", from_revision=1) as watch:
                await anext(watch)


async def test_a_large_change_comes_in_one_piece(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True) as store:
        for number in range(40):
            await store.put(f"k{number:02d}", bytes(50_000))
        async with store.watch("k", from_revision=1) as watch:
            first = await anext(watch)
            assert [entry.mod_revision for entry in first.entries] == list(range(1, 41))
            await store.delete_prefix("k")
            assert {entry.mod_revision for entry in (await anext(watch)).entries} == {41}


async def test_the_verbs_for_others_than_this_client(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with FakeLog(world, 1) as log:
        client = await connect(world, await log.serve(1), plaintext=True, encoding="json")
        result = await client.call(methods.KV_TXN, m.KvTxn(txn=Txn((), (Put("a", b"1"),))))
        assert (result.result.succeeded, result.result.revision) == (True, 1)
        with pytest.raises(NotFound):
            await client.call(methods.KV_TXN, m.KvTxn(txn=Txn((), (Put("a", b"1", 9),))))
        with pytest.raises(InvalidArgument):
            await client.call(methods.KV_APPLY, m.KvApply(command=b"nonsense"))
        with pytest.raises(InvalidArgument):
            await client.call(methods.KV_READ, m.KvRead(reads=[]))
        answer = await client.call(methods.KV_CHECKPOINT, m.CheckpointQuery(index=3))
        assert (answer.digest, answer.applied) == ("", 2)
        assert (await client.call(methods.LEASE_LIST, Empty())).leases == []
        await client.close()


async def test_a_reader_that_sleeps_is_cut_off_and_still_misses_nothing(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with (
        FakeLog(world, 1, watch_queue_max=20) as log,
        StoreClient(world, [await log.serve(1)], plaintext=True) as store,
        store.watch("k", progress_s=30) as watch,
    ):
        await anext(watch)
        for number in range(100):
            await log.replicas[1].put(f"k{number}", bytes(60_000))
        await asyncio.sleep(1)
        assert log.replicas[1]._hub.statistics().n_cut == 1
        seen: list[int] = []
        while len(seen) < 100:
            seen += [entry.mod_revision for entry in (await anext(watch)).entries]
        assert seen == list(range(1, 101))
        assert watch.n_resumed > 0


@pytest.mark.row("B12")
async def test_a_held_lease_is_kept_and_its_loss_is_noticed_first_by_its_holder(sim_world: SimWorld) -> None:
    world = sim_world.world
    loop = asyncio.get_running_loop()
    async with FakeLog(world, 1) as log, StoreClient(world, [await log.serve(1)], plaintext=True) as store:
        async with HeldLease(store, ttl_s=2.0) as held:
            await store.put("a", b"", lease=held.lease)
            await asyncio.sleep(10)
            assert held.is_held
            log.elect(0)
            cut_at = loop.time()
            await held.lost.wait()
            assert held.left_s == 0
            assert 1.0 < loop.time() - cut_at <= 2.0
            assert "a" in log.rafts[1].machine.keys.entries, "the holder knows before the store does"
            log.elect(1)
            await asyncio.sleep(2.2)
            assert "a" not in log.rafts[1].machine.keys.entries
        async with HeldLease(store, ttl_s=2.0) as held:
            await store.put("b", b"", lease=held.lease)
            await store.lease_revoke(held.lease)
            await held.lost.wait()
        async with HeldLease(store, ttl_s=2.0) as held:
            await store.put("c", b"", lease=held.lease)
        assert (await store.get("c")).entry is None, "leaving gives it back"


def test_a_program_without_a_loop_uses_it_too() -> None:
    """The client's loop is the caller's only while a call runs, so the server gets a loop and a thread of its own."""
    ready: queue.Queue[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = queue.Queue()

    async def serve() -> None:
        world = make_host_world()
        stop = asyncio.Event()
        async with FakeLog(world, 1) as log:
            address = await log.serve(1)
            ready.put((f"{address.host}:{address.port}", asyncio.get_running_loop(), stop))
            await stop.wait()
        world.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    address, loop, stop = ready.get(timeout=10)
    world = make_host_world()
    try:
        with BlockingStore(world, [address], loop_factory=lambda: new_loop("uvloop"), plaintext=True) as store:
            assert store.put("a", b"1") == 1
            assert store.get("a").value == b"1"
            assert store.txn(Txn((), (Put("b", b"2"),))).succeeded
            assert [entry.key for entry in store.list_all()[0]] == ["a", "b"]
            assert store.delete("a") is True
            with pytest.raises(NotFound):
                store.put("a", b"", lease=9)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        world.close()
