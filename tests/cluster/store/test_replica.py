"""Replica: reads and how old they are, writes handed to the leader, deadlines, leases, and the comparison of all members."""

import asyncio

import pytest

from isopod.api.store import messages as m
from isopod.api.store.messages import Condition, Delete, Get, KvRead, Put, Range, Txn
from isopod.cluster.store.service import StoreService, check_unreserved
from isopod.net.rpc import Later
from isopod.runtime.metrics import PrometheusText
from isopod.world.errors import (
    DeadlineExceeded,
    Exhausted,
    InvalidArgument,
    LeadershipLost,
    NotFound,
    NotLeader,
    RefusedError,
    SessionExpired,
)
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.cluster.store.rig import FakeLog, command, encode

pytestmark = pytest.mark.row("B18")


async def test_what_is_written_on_any_node_is_read_on_every_node(world: World) -> None:
    async with FakeLog(world, 3) as log:
        for number, replica in log.replicas.items():
            assert await replica.put(f"k{number}", b"v") == number
        for replica in log.replicas.values():
            found = await replica.range("k")
            assert [entry.key for entry in found.entries] == ["k1", "k2", "k3"]
            assert (found.revision, found.age_s) == (3, 0.0)
        result = await log.replicas[2].txn(Txn((Condition("k1", "version", "=", 1),), (Delete("k1"), Get("k2"))))
        assert result.succeeded
        assert await log.replicas[3].put_if("k2", b"w", revision=2) == 5
        assert await log.replicas[3].put_if("k2", b"x", revision=2) is None
        assert await log.replicas[1].delete("k1") is False
        assert await log.replicas[1].delete_prefix("k") == 2
        assert await log.replicas[2].list_all() == ([], 6)


async def test_refusals_are_the_errors_they_stand_for(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        with pytest.raises(NotFound, match="no such lease: 9"):
            await log.replicas[2].put("a", b"", lease=9)
        with pytest.raises(InvalidArgument):
            log.replicas[2].put("", b"")
        with pytest.raises(InvalidArgument):
            log.replicas[2].put("a", bytes(m.VALUE_BYTES_MAX + 1))
        with pytest.raises(InvalidArgument):
            log.replicas[2].put("a\udc80", b"")
        assert log.batches[-1].commands


# --- forwarding -------------------------------------------------------------------------------------------------------


async def test_a_write_waits_for_a_leader_and_no_longer_than_its_deadline(sim_world: SimWorld) -> None:
    loop = asyncio.get_running_loop()
    async with FakeLog(sim_world.world, 2) as log:
        await log.replicas[2].put("a", b"1")
        log.elect(0)
        began = loop.time()
        with pytest.raises(DeadlineExceeded):
            await log.replicas[2].put("a", b"2", timeout_s=3)
        assert 2.5 < loop.time() - began <= 3.1
        began = loop.time()
        with pytest.raises(DeadlineExceeded):
            await log.replicas[2].put("a", b"2", timeout_s=60)
        assert loop.time() - began <= 10.1, "no proposal waits longer than ten seconds"
        waiting = asyncio.ensure_future(log.replicas[2].put("a", b"3"))
        await asyncio.sleep(1)
        log.elect(2)
        assert await waiting == 2


async def test_a_leader_that_is_dead_or_wrong_is_found_out(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 3) as log:
        await log.replicas[2].put("a", b"1")
        log.dead[1] = None
        waiting = asyncio.ensure_future(log.replicas[2].put("a", b"2"))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        log.elect(3)
        assert await waiting == 2


async def test_a_command_is_not_handed_round_for_ever(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        # Both believe that the other leads; nobody does.
        for number, replica in log.replicas.items():
            replica._leader = 3 - number
        log.leader = 0
        with pytest.raises(NotLeader):
            await log.replicas[1].apply(command(Put("a", b"1")), timeout_s=0.3)
        assert log.n_calls < 200
        with pytest.raises(NotLeader):
            await log.replicas[1].apply(command(Put("a", b"1")), timeout_s=0.3, n_hops=3)


@pytest.mark.parametrize("lost", ["request", "reply"])
async def test_a_write_whose_fate_is_unknown_is_done_once(sim_world: SimWorld, lost: str) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        await log.replicas[2].put("n", b"0")
        if lost == "request":
            log.rafts[1].lose_requests = 2
        else:
            log.rafts[1].lose_replies = 2
        revision = await log.replicas[2].put("n", b"1")
        entry = log.rafts[1].machine.keys.entries["n"]
        assert (entry.version, entry.mod_revision) == (2, revision)


async def test_without_a_session_it_is_not_sent_again(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        log.rafts[1].lose_replies = 1
        with pytest.raises(LeadershipLost):
            await log.replicas[1].apply(command(Put("n", b"1")), timeout_s=1)
        assert log.rafts[1].machine.revision == 1


async def test_a_forgotten_session_is_opened_anew_but_never_where_that_could_double(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        replica, machine = log.replicas[1], log.rafts[1].machine
        await replica.put("n", b"1")
        machine.sessions.expire(1 << 62)
        assert len(machine.sessions) == 0
        assert await replica.put("n", b"2") == 2, "nothing was sent in the old one"
        machine.sessions.expire(1 << 62)
        log.rafts[1].lose_requests = 1
        with pytest.raises(SessionExpired):
            await replica.put("n", b"3")
        assert machine.keys.entries["n"].version == 2


async def test_verbs_of_nodes_are_not_for_clients(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        service = StoreService(log.replicas[1])
        for data in (command(m.LeaseExpire((1,))), command(m.Checkpoint()), b"", b"\xc1", bytes(m.COMMAND_BYTES_MAX + 1), encode([1])):
            with pytest.raises(InvalidArgument):
                service.apply(None, m.KvApply(command=data))  # type: ignore[arg-type]  # refused before the call matters
        assert log.batches == []


@pytest.mark.parametrize(
    "op",
    [Put("members/1", b""), Delete("members/1"), m.DeletePrefix("mem"), m.DeletePrefix("members/1"), Txn((), (), (Put("members/1", b""),))],
)
async def test_the_clusters_own_records_are_not_for_users(sim_world: SimWorld, op: m.ClientOp) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        service = StoreService(log.replicas[1], ("members/", "cluster"))
        with pytest.raises(RefusedError, match="the cluster's own"):
            service.apply(None, m.KvApply(command=command(Put("a", b""), op)))  # type: ignore[arg-type]  # refused before the call matters
        if isinstance(op, Txn):
            with pytest.raises(RefusedError):
                await service.txn(None, m.KvTxn(txn=op))  # type: ignore[arg-type]  # the same
        check_unreserved([Put("member", b""), Get("members/1"), m.DeletePrefix("x"), m.LeaseGrant(1000)], ("members/", "cluster"))
        assert log.batches == []


# --- reads ------------------------------------------------------------------------------------------------------------


@pytest.mark.row("B45")
async def test_reads_say_how_old_they_may_be(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        follower = log.replicas[2]
        await log.replicas[1].put("a", b"1")
        assert (await follower.get("a", consistency="stale")).age_s is None, "nothing is known yet"
        assert (await follower.get("a")).age_s == 0.0
        log.rafts[2].is_lagging = True
        await log.replicas[1].put("a", b"2")
        await asyncio.sleep(3)
        found = await follower.get("a", consistency="stale")
        assert found.value == b"1"
        assert found.age_s is not None
        assert 3 <= found.age_s < 3.5
        assert found.revision == 1
        with pytest.raises(DeadlineExceeded):
            await follower.get("a", timeout_s=0.5)
        log.rafts[2].is_lagging = False
        log.rafts[2].catch_up()
        assert (await follower.get("a")).value == b"2"


@pytest.mark.row("B45")
async def test_cached_reads_ask_once_for_as_long_as_is_allowed(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        follower = log.replicas[2]
        await log.replicas[1].put("a", b"1")
        for _ in range(10):
            found = await follower.get("a", consistency="cached", max_age_s=1.0)
            assert found.age_s is not None
            assert found.age_s <= 1.0
            await asyncio.sleep(0.2)
        assert log.rafts[2].n_barriers == 2
        hits, misses = follower._meters.cache_hits.value, follower._meters.cache_misses.value
        assert (hits, misses) == (8, 2)
        assert 'isopod_store_cache_hit_ratio{place="node"} 0.8' in PrometheusText().render(log.metrics[2].snapshot())


@pytest.mark.row("B45")
async def test_a_node_may_be_told_to_cache_less(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1, cached_age_s_max=0.0) as log:
        for _ in range(3):
            found = await log.replicas[1].get("a", consistency="cached", max_age_s=100)
            assert (found.age_s, found.is_cached) == (0.0, False)
            await asyncio.sleep(0.1)
        assert log.rafts[1].n_barriers == 3


async def sure(pages: m.KvPages | Later) -> m.KvPages:
    """Return the answer of a linearizable read, which is never there at once."""
    assert isinstance(pages, Later)
    found: m.KvPages = await pages
    return found


async def test_many_reads_are_answered_from_one_revision_and_within_a_frame(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        replica = log.replicas[1]
        for key in "abc":
            await replica.put(key, bytes(m.VALUE_BYTES_MAX))
        pages = await sure(replica.read_many(KvRead(reads=[Get("a"), Get("x"), Range("", keys_only=True)]), timeout_s=1))
        assert [len(page.entries) for page in pages.pages] == [1, 0, 3]
        with pytest.raises(Exhausted):
            await sure(replica.read_many(KvRead(reads=[Get("a"), Get("b"), Get("c")]), timeout_s=1))
        entries, revision = await replica.list_all()
        assert ([entry.key for entry in entries], revision) == (["a", "b", "c"], 3)


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_a_lease_lives_as_long_as_it_is_kept(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        follower, machine = log.replicas[2], log.rafts[2].machine
        lease = await follower.lease_grant(2.0)
        await follower.put("a", b"1", lease=lease)
        for _ in range(5):
            await asyncio.sleep(1.5)
            assert await follower.lease_keep([lease, 99]) == [2.0, 0.0]
        assert "a" in machine.keys.entries
        await asyncio.sleep(1.9)
        assert "a" in machine.keys.entries
        await asyncio.sleep(0.3)
        assert "a" not in machine.keys.entries
        assert await follower.lease_keep([lease]) == [0.0]
        assert log.replicas[1].lease_list().leases == []


async def test_a_new_leader_gives_leases_their_full_time_again(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 2) as log:
        lease = await log.replicas[1].lease_grant(2.0)
        await log.replicas[1].put("a", b"1", lease=lease)
        await asyncio.sleep(1.8)
        log.elect(2)
        await asyncio.sleep(1.8)
        assert "a" in log.rafts[2].machine.keys.entries
        assert log.rafts[1].n_proposed == 3, "the old leader does not speak for leases any more"
        await asyncio.sleep(0.4)
        assert "a" not in log.rafts[1].machine.keys.entries


async def test_keeping_alive_needs_proof_of_leadership(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        lease = await log.replicas[1].lease_grant(1.0)
        log.rafts[1].barrier_error = DeadlineExceeded("a read", 1)
        with pytest.raises(DeadlineExceeded):
            await log.replicas[1].lease_keep([lease])
        log.rafts[1].barrier_error = None
        await asyncio.sleep(1.2)
        assert await log.replicas[1].lease_keep([lease]) == [0.0]


async def test_an_end_that_could_not_be_written_is_tried_again(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        lease = await log.replicas[1].lease_grant(1.0)
        await log.replicas[1].put("a", b"1", lease=lease)
        log.rafts[1].lose_requests = 2
        await asyncio.sleep(1.2)
        assert "a" in log.rafts[1].machine.keys.entries
        assert await log.replicas[1].lease_keep([lease]) == [0.0], "what is about to end is not promised any more"
        await asyncio.sleep(1.5)
        assert "a" not in log.rafts[1].machine.keys.entries


async def test_a_lease_whose_end_may_still_come_is_not_promised_again(sim_world: SimWorld) -> None:
    """The command that ends it is written, and nobody heard of it: it is applied later, whatever was promised meanwhile."""
    async with FakeLog(sim_world.world, 1) as log:
        lease = await log.replicas[1].lease_grant(1.0)
        await log.replicas[1].put("a", b"1", lease=lease)
        raft = log.rafts[1]
        raft.lose_requests = 1000
        for _ in range(40):
            await asyncio.sleep(0.1)
            if raft.n_proposed > 3:
                assert await log.replicas[1].lease_keep([lease]) == [0.0]
        assert raft.n_proposed > 5, "it was tried again and again"
        # Only another term makes it whole again: all that was written before it is applied by then.
        raft.lose_requests = 0
        log.elect(1)
        assert await log.replicas[1].lease_keep([lease]) == [1.0]
        await asyncio.sleep(1.2)
        assert "a" not in raft.machine.keys.entries


async def test_revoking_takes_the_keys_at_once(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 1) as log:
        replica = log.replicas[1]
        lease = await replica.lease_grant(60)
        await replica.put("a", b"1", lease=lease)
        assert [(info.lease, info.n_keys) for info in replica.lease_list().leases] == [(lease, 1)]
        assert await replica.lease_revoke(lease) == 1
        with pytest.raises(NotFound):
            await replica.lease_revoke(lease)
        with pytest.raises(InvalidArgument):
            await replica.lease_grant(0.5)


# --- consistency ------------------------------------------------------------------------------------------------------


@pytest.mark.row("B35")
async def test_members_with_equal_state_are_said_to_be(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 3) as log:
        await log.replicas[1].put("a", b"1")
        report = await log.replicas[3].check_consistency()
        assert report.consistent is True
        assert [(member.node, member.state) for member in report.members] == [(1, "equal"), (2, "equal"), (3, "equal")]
        assert log.replicas[1].status().consistent is True
        assert log.replicas[1]._meters._consistent.value == 1


@pytest.mark.row("B35")
async def test_a_member_that_differs_is_named_with_the_index(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 3, check_s=5.0) as log:
        await log.replicas[1].put("a", b"1")
        log.rafts[2].machine.keys.put(Put("a", b"2"), 1)  # a state that no log made
        await asyncio.sleep(7)
        report = log.replicas[1].last_report
        assert report is not None
        assert report.consistent is False
        assert [member.node for member in report.members if member.state == "different"] == [2]
        assert report.index == len(log.batches)
        assert log.replicas[1].status().consistent is False
        assert any(b"store.diverged" in line for line in log.lines)
        assert log.replicas[1]._meters._consistent.value == 0


@pytest.mark.row("B35")
async def test_members_that_cannot_be_compared_are_told_apart(sim_world: SimWorld) -> None:
    async with FakeLog(sim_world.world, 4) as log:
        log.dead[2] = None
        log.rafts[3].is_lagging = True
        report = await log.replicas[1].check_consistency()
        assert [(member.node, member.state) for member in report.members] == [(1, "equal"), (2, "unreachable"), (3, "behind"), (4, "equal")]
        assert report.consistent is True
        log.rafts[4].machine.checkpoints.clear()  # as after a snapshot
        report = await log.replicas[1]._check()
        log.dead[4] = None
        report = await log.replicas[1]._check()
        assert report.consistent is None
        log.elect(0)
        with pytest.raises(NotLeader):
            await log.replicas[1].check_consistency()
