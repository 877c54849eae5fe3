"""The I/O queue: its decisions, against properties; and running operations, on both Worlds."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.runtime.io_queue import BURST_S, IoProperties, IoQueue, IoScheduler, Ticket
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import Exhausted, InvalidArgument
from isopod.world.world import World

DISK = IoProperties(1e6, 5e5, 1000.0, 500.0)
"""1 MB/s and 1000 operations a second for reading, half of it for writing."""


def test_writes_cost_what_the_disk_takes_for_them() -> None:
    assert DISK.cost_s("read", 1000) == pytest.approx(0.002)
    assert DISK.cost_s("write", 1000) == pytest.approx(0.004)


def serve(fair: IoScheduler, seconds: float, *, step_s: float = 0.001, speed: float = 1.0) -> list[Ticket]:
    """Let a disk of `speed` times the declared one work, one request after the other; return what it did."""
    now_s, free_s = 0.0, 0.0
    working: list[tuple[float, Ticket]] = []
    done: list[Ticket] = []
    while now_s < seconds:
        while working and working[0][0] <= now_s:
            done.append(working[0][1])
            fair.complete(working.pop(0)[1], now_s)
        for ticket in fair.start(now_s):
            free_s = max(free_s, now_s) + ticket.cost_s / speed
            working.append((free_s, ticket))
        now_s += step_s
    return done


@pytest.mark.parametrize(("first_shares", "second_shares"), [(100, 100), (200, 100), (1000, 200), (1000, 10)])
def test_the_disks_time_is_shared_by_shares(first_shares: int, second_shares: int) -> None:
    """One asks for many small reads, the other for large writes: not requests are shared, but what they cost."""
    fair = IoScheduler(DISK)
    first, second = SchedulingGroup("first", first_shares), SchedulingGroup("second", second_shares)
    for _ in range(6_000):
        fair.add(first, "read", 100, now_s=0.0)
        fair.add(second, "write", 2000, now_s=0.0)
    serve(fair, 6.0)
    used = {group.name: group.disk_s for group in fair.statistics().groups}
    assert used["first"] / used["second"] == pytest.approx(first_shares / second_shares, rel=0.05)
    assert sum(used.values()) == pytest.approx(6.0, rel=0.05)


def test_who_is_alone_gets_everything_and_who_slept_has_no_credit() -> None:
    fair = IoScheduler(DISK)
    first, second = SchedulingGroup("first", 100), SchedulingGroup("second", 100)
    for _ in range(4000):
        fair.add(first, "read", 0, now_s=0.0)
    assert len(serve(fair, 2.0)) == pytest.approx(2000, rel=0.05)
    for _ in range(5000):
        fair.add(second, "read", 0, now_s=2.0)
    now_s, before = 2.0, fair.statistics().groups[0].n_reads
    for _ in range(1000):
        now_s += 0.001
        for ticket in fair.start(now_s):
            fair.complete(ticket, now_s)
    n_first, n_second = fair.statistics().groups[0].n_reads - before, fair.statistics().groups[1].n_reads
    assert n_first + n_second == pytest.approx(1000, abs=10)
    assert 0 <= n_second - n_first <= 2 * BURST_S * DISK.read_operations_per_s


def test_a_group_that_runs_dry_for_a_moment_keeps_its_share() -> None:
    """A few callers that each wait for their answer: the line is empty now and then, and that must not cost the group its lead."""
    fair = IoScheduler(DISK, n_in_flight_max=8)
    first, second = SchedulingGroup("first", 1000), SchedulingGroup("second", 200)
    now_s = 0.0
    for group in (first, second):
        for _ in range(8):
            fair.add(group, "read", 0, now_s=now_s)
    flying: list[Ticket] = []
    while now_s < 8.0:
        now_s += 0.0005
        flying += fair.start(now_s)
        for ticket in flying[: len(flying) // 2 + 1]:
            fair.complete(ticket, now_s)
            fair.add(ticket.line.group, "read", 0, now_s=now_s)
        del flying[: len(flying) // 2 + 1]
    found = {group.name: group.n_reads for group in fair.statistics().groups}
    assert found["first"] / found["second"] == pytest.approx(5, rel=0.1)


def test_a_slow_disk_is_seen_and_a_good_one_is_not() -> None:
    for speed, ratio in ((1.0, 1.0), (2.0, 1.0), (0.5, 2.0), (0.1, 10.0)):
        fair = IoScheduler(DISK, n_in_flight_max=8)
        group = SchedulingGroup("all", 100)
        for _ in range(5_000):
            fair.add(group, "read", 0, now_s=0.0)
        serve(fair, 4.0, speed=speed)
        found = fair.statistics()
        assert found.flow_ratio == pytest.approx(ratio, rel=0.2)
        assert found.is_behind == (ratio > 1.5)


def test_a_disk_that_answers_nothing_is_behind() -> None:
    fair = IoScheduler(DISK, n_in_flight_max=2)
    group = SchedulingGroup("all", 100)
    for number in range(100):
        fair.add(group, "read", 0, now_s=number / 10)
        fair.start(number / 10)
    assert fair.statistics().is_behind
    assert fair.statistics().n_in_flight == 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "add", "start", "complete", "withdraw", "wait"]),
            st.integers(0, 2),
            st.integers(0, 5000),
        ),
        max_size=200,
    )
)
def test_nothing_is_lost_started_twice_or_beyond_the_bounds(steps: list[tuple[str, int, int]]) -> None:
    fair = IoScheduler(DISK, n_in_flight_max=5, n_waiting_max=20)
    groups = [SchedulingGroup(name, shares) for name, shares in (("a", 10), ("b", 100), ("c", 1000))]
    now_s, spent_s = 0.0, 0.0
    waiting: list[Ticket] = []
    flying: list[Ticket] = []
    for step, which, amount in steps:
        if step == "add":
            if len(waiting) == 20:
                with pytest.raises(Exhausted):
                    fair.add(groups[which], "read", amount, now_s=now_s)
            else:
                waiting.append(fair.add(groups[which], "write" if amount % 2 else "read", amount, now_s=now_s))
        elif step == "start":
            for ticket in fair.start(now_s):
                assert ticket in waiting
                first = next(each for each in waiting if each.line is ticket.line)
                assert first is ticket  # in order within a group
                waiting.remove(ticket)
                flying.append(ticket)
                spent_s += ticket.cost_s
        elif step == "complete" and flying:
            fair.complete(flying.pop(which % len(flying)), now_s)
        elif step == "withdraw" and waiting:
            fair.withdraw(waiting.pop(which % len(waiting)))
        elif step == "wait":
            now_s += amount / 100_000
        found = fair.statistics()
        assert (found.n_waiting, found.n_in_flight) == (len(waiting), len(flying))
        assert found.n_in_flight <= 5
        # The bucket: no more than the time that passed, one burst, and one request that is larger than a burst.
        assert spent_s <= now_s + BURST_S + DISK.cost_s("write", 5000)
    for ticket in flying:
        fair.complete(ticket, now_s)
    n_left = len(waiting)
    while n_left:
        pause_s = fair.next_in_s()
        assert pause_s is not None
        now_s += pause_s + 1e-9
        started = fair.start(now_s)
        assert started
        for ticket in started:
            fair.complete(ticket, now_s)
        n_left -= len(started)
    assert fair.next_in_s() is None


def test_nonsense_is_refused() -> None:
    for call in (
        lambda: IoScheduler(IoProperties(0, 1, 1, 1)),
        lambda: IoScheduler(DISK, n_in_flight_max=0),
        lambda: IoScheduler(DISK).complete(IoScheduler(DISK).add(SchedulingGroup("a"), "read", 1, now_s=0), 0),
    ):
        with pytest.raises(InvalidArgument):
            call()


async def test_operations_run_in_their_groups_turn_and_all_run(world: World) -> None:
    queue = IoQueue(IoProperties(1e9, 1e9, 20_000, 20_000), n_in_flight_max=4)
    groups = [SchedulingGroup("slow", 10), SchedulingGroup("quick", 1000)]
    n_flying = most = 0
    order: list[str] = []

    async def operation(name: str) -> str:
        nonlocal n_flying, most
        n_flying += 1
        most = max(most, n_flying)
        await asyncio.sleep(0.0001)
        n_flying -= 1
        order.append(name)
        return name

    async def ask(group: SchedulingGroup) -> None:
        assert await queue.run("read", 100, lambda: operation(group.name), group=group) == group.name

    async with TaskGroup() as tasks:
        for _ in range(100):
            for group in groups:
                tasks.create_task(ask(group))
    found = queue.statistics()
    assert (found.n_waiting, found.n_in_flight, most) == (0, 0, 4)
    assert {each.name: (each.n_reads, each.n_bytes_read) for each in found.groups} == {"slow": (100, 10_000), "quick": (100, 10_000)}
    assert order[:100].count("quick") > 85


async def test_failed_and_cancelled_operations_give_their_place_back(world: World) -> None:
    queue = IoQueue(n_in_flight_max=1, n_waiting_max=5)
    release = asyncio.Event()

    async def fail() -> None:
        await release.wait()
        raise OSError("broken")

    async def succeed() -> int:
        return 7

    first = asyncio.ensure_future(queue.run("write", 1, fail))
    await asyncio.sleep(0.001)
    waiting = [asyncio.ensure_future(queue.run("read", 1, succeed)) for _ in range(5)]
    await asyncio.sleep(0.001)
    with pytest.raises(Exhausted):
        await queue.run("read", 1, succeed)
    waiting[0].cancel()
    waiting[3].cancel()
    release.set()
    with pytest.raises(OSError, match="broken"):
        await first
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [result for result in results if not isinstance(result, BaseException)] == [7, 7, 7]
    assert (queue.statistics().n_waiting, queue.statistics().n_in_flight) == (0, 0)
