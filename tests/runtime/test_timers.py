"""The timer wheel against a model and in both Worlds; Timer's shots and periods."""

import asyncio
import heapq
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple, Unpack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.runtime.timers import DELAY_S_MAX, FIRED_PER_TURN_MAX, TICK_S, Timer, TimerCounts, TimerWheel, WheelTimer
from isopod.world.errors import InvalidArgument, WrongState
from isopod.world.sim import SimWorld
from isopod.world.world import World

_Ts = TypeVarTuple("_Ts")


class HandLoop(asyncio.AbstractEventLoop):
    """A loop whose time is moved by hand, punctual to the nanosecond; counts its timers."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.n_armed = 0
        self.failures: list[dict[str, Any]] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._n_timers = 0

    def time(self) -> float:
        return self.now_s

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.failures.append(context)

    def call_at(
        self, when: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._n_timers += 1
        self.n_armed += 1
        heapq.heappush(self._timers, (when, self._n_timers, handle))
        return handle

    def call_soon(self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None) -> asyncio.Handle:
        return self.call_at(self.now_s, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self.n_armed -= 1
        self._timers = [entry for entry in self._timers if entry[2] is not handle]
        heapq.heapify(self._timers)

    def advance(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self._timers and self._timers[0][0] <= until_s:
            when, _, handle = heapq.heappop(self._timers)
            self.n_armed -= 1
            self.now_s = max(self.now_s, when)
            handle._run()
        self.now_s = max(self.now_s, until_s)


def hand_loop() -> HandLoop:
    """Return one; of asyncio's methods it has those that timers need."""
    return HandLoop()  # type: ignore[abstract]


delays = st.one_of(st.floats(0, 0.05), st.floats(0, 2), st.floats(0, 100), st.floats(0, 100_000), st.floats(-1, 0))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), delays),
        st.tuples(st.just("cancel"), st.integers(0, 1 << 16)),
        st.tuples(st.just("advance"), st.one_of(st.floats(0, 0.1), st.floats(0, 50), st.floats(0, 50_000))),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(actions)
def test_each_timer_fires_once_never_early_and_at_most_a_tick_late(steps: list[tuple[str, float]]) -> None:
    loop = hand_loop()
    wheel = TimerWheel(loop)
    due: dict[int, float] = {}
    fired: dict[int, float] = {}
    timers: list[WheelTimer] = []

    def note(number: int) -> None:
        fired[number] = loop.now_s

    for what, value in steps:
        if what == "add":
            number = len(timers)
            due[number] = loop.now_s + max(0.0, value)
            timers.append(wheel.call_later(value, note, number))
        elif what == "cancel" and timers:
            number = int(value) % len(timers)
            timers[number].cancel()
            if number not in fired:
                due.pop(number, None)
        elif what == "advance":
            loop.advance(value)
        assert len(wheel) == len([number for number in due if number not in fired])
        assert loop.n_armed <= 1
    loop.advance(200_000)
    assert sorted(fired) == sorted(due)
    for number, at_s in fired.items():
        assert due[number] - 1e-6 <= at_s <= due[number] + TICK_S + 1e-6
    assert (len(wheel), loop.n_armed, loop.failures) == (0, 0, [])
    counts = wheel.statistics()
    assert (counts.n_created, counts.n_fired, counts.n_cancelled) == (len(timers), len(fired), len(timers) - len(fired))


def test_a_wheel_with_far_timers_sleeps() -> None:
    loop = hand_loop()
    wheel = TimerWheel(loop)
    wheel.call_later(3600, lambda: None)
    before = loop._n_timers
    loop.advance(3599)
    assert loop._n_timers - before < 10  # the first look, and one for each level it comes down


def test_one_timer_at_a_time_costs_one_loop_timer_a_second() -> None:
    loop = hand_loop()
    wheel = TimerWheel(loop)
    for _ in range(1000):
        wheel.call_later(30, lambda: None).cancel()
        loop.advance(0.001)
    assert loop._n_timers <= 2
    loop.advance(1.1)
    assert loop.n_armed == 0


def test_an_empty_wheel_runs_no_timer() -> None:
    loop = hand_loop()
    wheel = TimerWheel(loop)
    far = wheel.call_later(50, lambda: None)
    loop.advance(2)
    assert loop.n_armed == 1
    far.cancel()
    assert (len(wheel), loop.n_armed) == (0, 0)


def test_a_callback_may_add_and_cancel() -> None:
    loop = hand_loop()
    wheel = TimerWheel(loop)
    seen: list[str] = []
    victim = wheel.call_later(0.5, seen.append, "victim")

    def first() -> None:
        seen.append("first")
        victim.cancel()
        wheel.call_later(0, seen.append, "second")

    wheel.call_later(0.5, first)
    wheel.call_later(0.5, lambda: seen.append("third"))
    loop.advance(0.6)
    assert seen in (["first", "third", "second"], ["victim", "first", "third", "second"])
    assert not victim.is_pending


def test_a_failing_callback_disturbs_nobody() -> None:
    loop = hand_loop()
    wheel = TimerWheel(loop)
    seen: list[int] = []
    wheel.call_later(0.1, divmod, 1, 0)
    wheel.call_later(0.1, seen.append, 1)
    wheel.call_later(0.3, seen.append, 2)
    loop.advance(1)
    assert seen == [1, 2]
    assert [type(failure["exception"]) for failure in loop.failures] == [ZeroDivisionError]


def test_refusals() -> None:
    loop = hand_loop()
    with pytest.raises(InvalidArgument):
        TimerWheel(loop, tick_s=0)
    wheel = TimerWheel(loop)
    for bad in (float("nan"), float("inf"), DELAY_S_MAX * 2):
        with pytest.raises(InvalidArgument):
            wheel.call_later(bad, print)
    timer = wheel.call_later(1, print)
    wheel.close()
    wheel.close()
    assert (timer.is_pending, len(wheel), loop.n_armed) == (False, 0, 0)
    with pytest.raises(WrongState):
        wheel.call_later(1, print)


async def test_a_thousand_deadlines_leave_the_loop_its_turns(world: World) -> None:
    wheel = TimerWheel(asyncio.get_running_loop())
    fired: list[int] = []
    for number in range(FIRED_PER_TURN_MAX * 2 + 1):
        wheel.call_later(0.001, fired.append, number)
    while not fired:
        await asyncio.sleep(0.001)
    while len(fired) < FIRED_PER_TURN_MAX * 2 + 1:
        await asyncio.sleep(0)
    assert len(wheel) == 0


async def test_the_wheel_runs_on_both_worlds(world: World) -> None:
    loop = asyncio.get_running_loop()
    wheel = TimerWheel(loop)
    began_s = loop.time()
    done = asyncio.Event()
    seen: list[float] = []
    never = wheel.call_later(0.03, seen.append, -1.0)
    wheel.call_later(0.02, lambda: seen.append(loop.time() - began_s))
    wheel.call_later(0.7, lambda: seen.append(loop.time() - began_s))
    wheel.call_later(0.75, done.set)
    never.cancel()
    await done.wait()
    assert len(seen) == 2
    assert 0.019 <= seen[0] < 0.6
    assert 0.699 <= seen[1] < 5
    wheel.close()


async def test_virtual_time_jumps_over_a_wheel(sim_world: SimWorld) -> None:
    loop = asyncio.get_running_loop()
    wheel = TimerWheel(loop)
    ended = asyncio.Event()
    wheel.call_later(86_400, ended.set)
    began_s, n_before = loop.time(), sim_world.loop.n_events
    await ended.wait()
    assert 86_400 <= loop.time() - began_s < 86_400.02
    assert sim_world.loop.n_events - n_before < 20


async def test_a_timer_fires_once_and_again(world: World) -> None:
    fired = asyncio.Event()
    timer = Timer(fired.set)
    assert (timer.is_armed, timer.remaining_s, timer.cancel()) == (False, None, False)
    timer.arm(0.01)
    assert timer.remaining_s is not None
    assert 0 < timer.remaining_s <= 0.0101
    await fired.wait()
    assert not timer.is_armed
    fired.clear()
    timer.arm(50)
    with pytest.raises(WrongState, match="armed"):
        timer.arm(1)
    timer.rearm(0.01)
    await fired.wait()
    timer.arm(50)
    assert timer.cancel()
    assert timer.statistics() == TimerCounts(4, 2, 2)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument):
            timer.arm(bad)
    with pytest.raises(InvalidArgument):
        timer.arm_periodic(0)


def test_a_period_does_not_drift_and_does_not_catch_up() -> None:
    loop = hand_loop()
    shots: list[float] = []

    def slow() -> None:
        shots.append(round(loop.now_s - 1000, 3))
        loop.now_s += 0.35 if len(shots) == 2 else 0.03  # the callback takes its time

    timer = Timer(slow, loop=loop)
    timer.arm_periodic(0.1)
    while loop.now_s < 1000.99:
        loop.advance(0.001)
    # The second took until 0.55: what was due at 0.3, 0.4 and 0.5 becomes one late shot, then the grid goes on.
    assert shots[:2] == [0.1, 0.2]
    assert shots[2] == pytest.approx(0.551, abs=0.003)
    assert shots[3:] == [0.6, 0.7, 0.8, 0.9]
    timer.cancel()


def test_a_periodic_timer_survives_failure_and_can_stop_itself() -> None:
    loop = hand_loop()
    n_shots = 0

    def shot() -> None:
        nonlocal n_shots
        n_shots += 1
        if n_shots == 3:
            timer.cancel()
        raise ValueError(n_shots)

    timer = Timer(shot, loop=loop)
    timer.arm_periodic(0.1, delay_s=0)
    loop.advance(2)
    assert (n_shots, len(loop.failures), timer.is_armed, loop.n_armed) == (3, 3, False, 0)
