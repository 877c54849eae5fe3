"""FairQueue on a clock moved by hand: shares, starvation, latency, accounts."""

from collections import deque
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.world.errors import Exhausted, InvalidArgument
from isopod.world.fair_queue import BURST_NS, QUOTA_NS, STARVED_NS, STEPS_PER_LOOK, FairQueue
from isopod.world.loops import GROUPS_MAX, MAIN, GroupStatistics, Priority, SchedulingGroup

Step = Callable[[], int]
"""Runs, and returns how many nanoseconds it took."""


class Bench:
    """A queue whose steps take the time they say."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000
        self.queue: FairQueue[Step] = FairQueue(lambda: self.now_ns, self.run_steps)

    def run_steps(self, items: deque[Step], n_steps: int) -> None:
        for _ in range(n_steps):
            self.now_ns += items.popleft()()

    def push(self, group: SchedulingGroup, step: Step) -> None:
        self.queue.push(self.queue.add(group), step)

    def spin(self, group: SchedulingGroup, took_ns: int) -> None:
        """Keep a group busy for ever."""

        def step() -> int:
            self.push(group, step)
            return took_ns

        self.push(group, step)

    def turns(self, until_ns: int, *, outside_ns: int = 2_000) -> None:
        while self.now_ns < until_ns:
            self.queue.turn()
            self.now_ns += outside_ns

    def account(self, name: str) -> GroupStatistics:
        (found,) = [each for each in self.queue.statistics() if each.name == name]
        return found


groups = st.lists(
    st.tuples(st.integers(20, 1000), st.sampled_from(list(Priority)[1:4]), st.integers(10_000, 60_000), st.integers(1, 40), st.booleans()),
    min_size=2,
    max_size=5,
)


@pytest.mark.row("S3")
@settings(max_examples=15, deadline=None)
@given(groups)
def test_busy_groups_get_time_by_weight_whatever_their_steps_and_their_number(
    plans: list[tuple[int, Priority, int, int, bool]],
) -> None:
    bench = Bench()
    made = []
    for number, (shares, priority, took_ns, n_tasks, is_urgent) in enumerate(plans):
        group = SchedulingGroup(f"g{number}", shares, priority=priority, latency_s=0.001 if is_urgent else None)
        made.append(group)
        for _ in range(n_tasks):
            bench.spin(group, took_ns)
    began_ns = bench.now_ns
    bench.turns(began_ns + 1_500_000_000, outside_ns=0)
    elapsed_s = (bench.now_ns - began_ns) / 1e9
    total = sum(group.weight for group in made)
    for group in made:
        account = bench.account(group.name)
        # A batch of the longest steps may come at the wrong end of the measured time, a latency group may be a burst ahead.
        slack_s = 0.02 * elapsed_s
        assert account.run_s == pytest.approx(elapsed_s * group.weight / total, abs=slack_s)
        assert account.run_s + account.wait_s + account.starve_s == pytest.approx(elapsed_s, abs=0.001)
        assert account.n_queued > 0


@pytest.mark.row("S3")
def test_the_idle_level_never_starves() -> None:
    bench = Bench()
    idle = SchedulingGroup("idle", 1, priority=Priority.IDLE)
    bench.spin(SchedulingGroup("critical", 1000, priority=Priority.CRITICAL), 20_000)
    ran_at_ns: list[int] = []

    def step() -> int:
        ran_at_ns.append(bench.now_ns)
        bench.push(idle, step)
        return 20_000

    bench.push(idle, step)
    bench.turns(bench.now_ns + 10_000_000_000)
    gaps = [after - before for before, after in pairwise(ran_at_ns)]
    assert len(gaps) >= 15
    assert max(gaps) <= STARVED_NS + 5 * QUOTA_NS
    assert bench.account("idle").starve_s > 9


def test_a_group_that_slept_gets_no_credit() -> None:
    bench = Bench()
    busy, sleeper = SchedulingGroup("busy", 100), SchedulingGroup("sleeper", 100)
    bench.queue.add(sleeper)
    bench.spin(busy, 10_000)
    bench.turns(bench.now_ns + 4_000_000_000)
    before = bench.account("busy").run_s
    bench.spin(sleeper, 10_000)
    bench.turns(bench.now_ns + 1_000_000_000)
    assert bench.account("busy").run_s - before == pytest.approx(0.5, abs=0.05)


def test_a_latency_group_runs_next_even_in_the_middle_of_a_turn() -> None:
    bench = Bench()
    bulk, urgent = SchedulingGroup("bulk", 1000), SchedulingGroup("urgent", 10, latency_s=0.0003)
    bench.queue.add(urgent)
    delays_ns: list[int] = []
    for _ in range(400):
        bench.spin(bulk, 5_000)

    def wake() -> int:
        woken_ns = bench.now_ns

        def beat() -> int:
            delays_ns.append(bench.now_ns - woken_ns)
            return 1_000

        bench.push(urgent, beat)
        bench.push(bulk, wake)
        return 5_000

    bench.push(bulk, wake)
    bench.turns(bench.now_ns + 1_000_000_000)
    assert len(delays_ns) > 100
    assert max(delays_ns) <= (STEPS_PER_LOOK + 1) * 5_000


def test_turns_are_no_longer_than_the_most_urgent_group_asks() -> None:
    bench = Bench()
    for number, latency_s in enumerate((0.1, 0.0002)):
        bench.queue.add(SchedulingGroup(f"l{number}", latency_s=latency_s))
    for _ in range(1000):
        bench.spin(MAIN, 1_000)
    began_ns = bench.now_ns
    bench.queue.turn()
    assert 200_000 <= bench.now_ns - began_ns <= 200_000 + STEPS_PER_LOOK * 1_000


def test_a_busy_latency_group_keeps_only_its_share() -> None:
    bench = Bench()
    bench.spin(SchedulingGroup("urgent", 100, latency_s=0.001), 10_000)
    bench.spin(SchedulingGroup("bulk", 300), 10_000)
    bench.turns(bench.now_ns + 4_000_000_000, outside_ns=0)
    assert bench.account("urgent").run_s == pytest.approx(1.0, abs=0.05 + BURST_NS / 1e9)


def test_steps_run_in_their_order_and_new_ones_in_the_next_turn() -> None:
    bench = Bench()
    seen: list[int] = []

    def step(number: int) -> Step:
        def run() -> int:
            seen.append(number)
            if number < 10:
                bench.push(MAIN, step(number + 10))
            return 100

        return run

    for number in range(10):
        bench.push(MAIN, step(number))
    bench.queue.turn()
    assert seen == list(range(10))
    assert bench.queue.has_work
    bench.queue.turn()
    assert seen == list(range(20))
    assert not bench.queue.has_work


def test_what_a_step_raises_ends_the_turn_and_loses_nothing() -> None:
    bench = Bench()
    seen: list[str] = []

    def bad() -> int:
        bench.now_ns += 500
        raise KeyboardInterrupt

    def good() -> int:
        seen.append("good")
        return 500

    bench.push(MAIN, bad)
    bench.push(MAIN, good)
    with pytest.raises(KeyboardInterrupt):
        bench.queue.turn()
    assert bench.queue.has_work
    assert (bench.queue.current, bench.queue.slice_end_ns) == (None, 0)
    bench.queue.turn()
    assert (seen, bench.queue.has_work) == (["good"], False)
    assert bench.account("main").run_s == pytest.approx(1e-6)


def test_shares_can_change() -> None:
    bench = Bench()
    one, other = SchedulingGroup("one", 100), SchedulingGroup("other", 100)
    bench.spin(one, 10_000)
    bench.spin(other, 10_000)
    bench.turns(bench.now_ns + 1_000_000_000)
    one.set_shares(900)
    before = bench.account("one").run_s
    bench.turns(bench.now_ns + 1_000_000_000, outside_ns=0)
    assert bench.account("one").run_s - before == pytest.approx(0.9, abs=0.05)


def test_refusals() -> None:
    for shares in (0, 1001, -5):
        with pytest.raises(InvalidArgument):
            SchedulingGroup("x", shares)
    for name in ("", "x" * 65, "a\nb"):
        with pytest.raises(InvalidArgument):
            SchedulingGroup(name)
    for latency_s in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(InvalidArgument):
            SchedulingGroup("x", latency_s=latency_s)
    bench = Bench()
    for number in range(GROUPS_MAX - 1):
        bench.queue.add(SchedulingGroup(f"g{number}"))
    with pytest.raises(Exhausted, match="64 on one loop"):
        bench.queue.add(SchedulingGroup("one too many"))


def test_dropped_steps_do_not_run() -> None:
    bench = Bench()
    bench.spin(MAIN, 100)
    bench.queue.clear()
    assert not bench.queue.has_work
    bench.queue.turn()
    assert bench.account("main").n_steps == 0
