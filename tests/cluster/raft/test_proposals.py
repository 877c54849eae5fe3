"""Proposals and reads by themselves, with a core that only counts: bounds, deadlines, and who is told what."""

import asyncio
from typing import Any

import pytest

from isopod.cluster.raft.codec import READ_CONTEXT, decode_envelope
from isopod.cluster.raft.core import ProposalDropped
from isopod.cluster.raft.proposals import Proposals
from isopod.cluster.raft.reads import ROUNDS_MAX, Reads
from isopod.cluster.raft.settings import RaftSettings
from isopod.world import errors
from isopod.world.world import World


class Counting:
    """As much of a core as is needed."""

    def __init__(self) -> None:
        self.last_index = 10
        self.entries: list[bytes] = []
        self.refuse = ""
        self.contexts: list[bytes] = []

    def propose_many(self, data: list[bytes]) -> int:
        if self.refuse:
            raise ProposalDropped(self.refuse)
        self.entries += data
        self.last_index += len(data)
        return self.last_index

    def read_index(self, context: bytes) -> None:
        self.contexts.append(context)


def proposals(**settings: Any) -> Proposals:
    return Proposals(asyncio.get_running_loop(), RaftSettings(**settings))


def added(to: Proposals | Reads, *what: Any) -> "asyncio.Future[Any]":
    """Add a proposal or a read; return what waits for it."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    to.add(*what, future)  # type: ignore[call-arg]
    return future


async def test_all_that_waits_shares_an_entry(world: World) -> None:
    core: Any = Counting()
    box = proposals()
    futures = [added(box, b"%d" % number, 5.0) for number in range(3)]
    assert box.propose(core, 4, 1000)
    assert [decode_envelope(entry) for entry in core.entries] == [(1000, [b"0", b"1", b"2"])]
    box.applied(11, 4, ["a", "b", "c"])
    assert [future.result() for future in futures] == ["a", "b", "c"]
    assert len(box) == 0


async def test_much_is_cut_into_entries_and_rounds_are_bounded(world: World) -> None:
    core: Any = Counting()
    box = proposals(entry_bytes_max=1000, rounds_max=2)
    futures = [added(box, bytes(400), 5.0) for _ in range(5)]
    assert box.propose(core, 4, 1) == 13
    assert [len(decode_envelope(entry)[1]) for entry in core.entries] == [2, 2, 1]
    second = added(box, b"x", 5.0)
    assert box.propose(core, 4, 1)
    waiting = added(box, b"y", 5.0)
    assert bool(box.has_waiting) is False, "two rounds are under way"
    for index in (11, 12, 13):
        box.applied(index, 4, range(len(decode_envelope(core.entries[index - 11])[1])))
    assert all(future.done() for future in futures)
    assert box.has_waiting
    box.close(errors.NotStarted("x"))
    assert isinstance(waiting.exception(), errors.NotStarted)
    assert isinstance(second.exception(), errors.NotStarted)


async def test_bounds_are_kept_and_told(world: World) -> None:
    box = proposals(proposals_max=2, proposal_bytes_max=100, command_bytes_max=60)
    with pytest.raises(errors.TooLarge):
        added(box, bytes(61), 1.0)
    first = added(box, bytes(60), 1.0)
    with pytest.raises(errors.Exhausted) as failure:
        added(box, bytes(60), 1.0)
    assert failure.value.retry_after_s
    second = added(box, b"", 1.0)
    with pytest.raises(errors.Exhausted):
        added(box, b"", 1.0)
    box.close(errors.NotStarted("x"))
    assert isinstance(first.exception(), errors.NotStarted)
    assert isinstance(second.exception(), errors.NotStarted)


@pytest.mark.row("B18")
async def test_no_proposal_waits_longer_than_its_deadline(world: World) -> None:
    core: Any = Counting()
    box = proposals()
    loop = asyncio.get_running_loop()
    began = loop.time()
    waiting, under_way = added(box, b"a", 0.05), added(box, b"b", 0.1)
    box.propose(core, 1, 1)
    late = added(box, b"c", 0.03)
    for future in (late, waiting, under_way):
        with pytest.raises(errors.DeadlineExceeded):
            await future
    assert loop.time() - began < 5.0
    box.applied(11, 1, [1, 2])  # nobody waits any more
    assert len(box) == 0
    box.propose(core, 1, 1)
    assert len(core.entries) == 1, "who gave up is not proposed"


async def test_who_loses_the_lead_is_told_what_is_known(world: World) -> None:
    core: Any = Counting()
    box = proposals()
    under_way = added(box, b"a", 5.0)
    box.propose(core, 1, 1)
    waiting = added(box, b"b", 5.0)
    box.lose(errors.LeadershipLost(1, 1), errors.NotLeader(1, 2))
    assert isinstance(under_way.exception(), errors.LeadershipLost)
    assert isinstance(waiting.exception(), errors.NotLeader)
    assert len(box) == 0


async def test_an_entry_of_a_later_term_under_our_index_answers_nobody(world: World) -> None:
    core: Any = Counting()
    box = proposals()
    future = added(box, b"a", 5.0)
    box.propose(core, 1, 1)
    box.applied(11, 2, ["another's"])
    assert not future.done()
    box.close(errors.NotStarted("x"))
    assert future.exception()


@pytest.mark.parametrize("why", ["transferring", "too_much_uncommitted"])
async def test_what_the_core_does_not_take_now_waits(world: World, why: str) -> None:
    core: Any = Counting()
    box = proposals()
    future = added(box, b"a", 5.0)
    core.refuse = why
    assert not box.propose(core, 1, 1)
    core.refuse = ""
    assert box.propose(core, 1, 1)
    box.applied(11, 1, ["done"])
    assert future.result() == "done"
    core.refuse = "not_leader"
    added(box, b"b", 5.0).cancel()
    with pytest.raises(ProposalDropped):
        box.propose(core, 1, 1)
    box.close(errors.NotStarted("x"))


async def test_reads_of_a_turn_share_a_round_and_contexts_never_repeat(world: World) -> None:
    core: Any = Counting()
    reads = Reads(asyncio.get_running_loop(), RaftSettings(), node_id=3, boot=9)
    futures = [added(reads, 5.0) for _ in range(3)]
    reads.ask(core)
    later = added(reads, 5.0)
    assert len(core.contexts) == 1
    assert READ_CONTEXT.unpack(core.contexts[0]) == (3, 9, 1)
    reads.answered(core.contexts[0], 50)
    reads.release(49)
    assert not futures[0].done()
    reads.release(50)
    assert [future.result() for future in futures] == [50, 50, 50]
    assert not later.done(), "it came after the question"
    reads.retry_all()
    reads.ask(core)
    reads.retry_all()
    reads.ask(core)
    assert len(set(core.contexts)) == len(core.contexts) == 3
    reads.answered(core.contexts[1], 60)
    reads.release(60)
    assert not later.done(), "that round was given up"
    reads.answered(core.contexts[2], 60)
    reads.release(60)
    assert later.result() == 60


@pytest.mark.virtual_time
async def test_lost_rounds_are_asked_again_and_rounds_are_bounded(world: World) -> None:
    core: Any = Counting()
    loop = asyncio.get_running_loop()
    reads = Reads(loop, RaftSettings(reads_max=10, heartbeat_s=0.01), node_id=1, boot=1)
    futures = []
    for _ in range(ROUNDS_MAX):
        futures.append(added(reads, 5.0))
        reads.ask(core)
    futures.append(added(reads, 0.2))
    assert bool(reads.has_waiting) is False
    await asyncio.sleep(0.05)
    reads.retry_lost()
    assert reads.has_waiting
    reads.ask(core)
    reads.answered(core.contexts[-1], 1)
    reads.release(1)
    assert all(future.done() for future in futures)
    with pytest.raises(errors.DeadlineExceeded):
        await added(reads, 0.01)
    more = [added(reads, 5.0) for _ in range(10)]
    with pytest.raises(errors.Exhausted):
        added(reads, 5.0)
    reads.close(errors.NotStarted("x"))
    assert all(isinstance(future.exception(), errors.NotStarted) for future in more)
