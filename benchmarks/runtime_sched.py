"""The scheduler: how exactly shares are kept, how long a heartbeat waits, and what steps and timers cost, beside the loops without groups.

What is measured is our scheduler and not the kernel's, so the process asks the kernel for preference (nice -20) while it is measured, the
peers' loops as well; without root it goes without. Costs are CPU time of this thread. The heartbeat is late by wall time, which on a busy
machine contains the time in which the kernel ran something else; so its delay in CPU time of the loop stands beside it. Peers are the
loops of uvloop and asyncio as they come: they have no groups, which is what the first rows show.
"""

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import uvloop

from benchmarks._harness import OURS, Contender, Row
from isopod.runtime.abort import deadline
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.timers import TimerWheel
from isopod.world.host.loop import new_loop

STEP_S: Final = 20e-6
SHARES: Final = (1000, 200)
BUSY_TASKS: Final = 400
BEAT_S: Final = 0.005
NICE: Final = -20
MakeLoop = Callable[[], asyncio.AbstractEventLoop]


def rows(*, quick: bool) -> Iterator[Row]:
    """Yield the rows; in a quick run each measures for a fifth of the time."""
    part = 0.2 if quick else 1.0
    n_runs = 3 if quick else 7
    yield Row("two groups 1000:200, off from 5:1", "ratio", _each(lambda loop: _off_from_shares(loop, 2.0 * part)), n_runs)
    n_beats = 100 if quick else 200
    n_beat_runs = 1 if quick else 3  # behind 400 tasks of a loop without groups a beat takes a tenth of a second
    wall = _each(lambda loop: _heartbeat_p99(loop, n_beats, clock=time.monotonic))
    yield Row("heartbeat p99 behind 400 tasks", "ms", wall, n_beat_runs)
    own = _each(lambda loop: _heartbeat_p99(loop, n_beats, clock=time.thread_time))
    yield Row("the same, in CPU time of the loop", "ms", own, n_beat_runs)
    n_steps = round(200_000 * part)
    yield Row("task step, 100 tasks, no groups", "us", _each(lambda _: _steps(n_steps, 100)), n_runs)
    yield Row("task step, 100 tasks, groups on", "us", _each(lambda loop: _steps(n_steps, 100, grouped=loop)), n_runs)
    yield Row("task step, one task, groups on", "us", _each(lambda loop: _steps(n_steps, 1, grouped=loop)), n_runs)
    yield Row("task made, run and awaited", "us", _each(lambda _: _tasks(n_steps // 4)), n_runs)
    yield Row(
        "timer set and cancelled", "us", [*_each(_timers, n_steps), Contender("asyncio.timeout on uvloop", _timeouts(n_steps))], n_runs
    )
    blocks = [
        Contender(OURS, lambda: _run(new_loop, lambda loop: _deadlines(loop, n_steps // 4))),
        Contender("asyncio.timeout on uvloop", _timeouts(n_steps // 4)),
    ]
    yield Row("deadline block entered and left", "us", blocks, n_runs)


def _each(measure: Callable[..., Coroutine[Any, Any, float]], *args: object) -> list[Contender]:
    """Return contenders that run `measure(loop, *args)` on a fresh loop of each kind."""
    makers: list[tuple[str, MakeLoop]] = [
        (OURS, new_loop),
        ("uvloop", uvloop.new_event_loop),
        ("asyncio", asyncio.SelectorEventLoop),
    ]
    return [Contender(name, lambda make=make: _run(make, lambda loop: measure(loop, *args))) for name, make in makers]  # type: ignore[misc]


def _run(make: MakeLoop, measure: Callable[[asyncio.AbstractEventLoop], Coroutine[Any, Any, float]]) -> float:
    loop = make()
    try:
        with _preferred():
            return loop.run_until_complete(measure(loop))
    finally:
        loop.close()


@contextmanager
def _preferred() -> Iterator[None]:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


def _timeouts(n_times: int) -> Callable[[], float]:
    async def measure(_: asyncio.AbstractEventLoop) -> float:
        began_s = time.thread_time()
        for _number in range(n_times):
            async with asyncio.timeout(30):  # noqa: ASYNC100 - entering and leaving is what is measured
                pass
        return (time.thread_time() - began_s) / n_times * 1e6

    return lambda: _run(uvloop.new_event_loop, measure)


async def _off_from_shares(loop: asyncio.AbstractEventLoop, for_s: float) -> float:
    """Return how far from 5:1 two groups of 50 busy tasks are, 1 being exact."""
    stop = asyncio.Event()
    groups = [SchedulingGroup(f"g{shares}", shares) for shares in SHARES]
    tasks = [[loop.create_task(_spin(stop), context=group.context()) for _ in range(50)] for group in groups]
    await asyncio.sleep(for_s)
    stop.set()
    big, small = [sum([await task for task in mine]) for mine in tasks]
    ratio = (big / small) / (SHARES[0] / SHARES[1])
    return max(ratio, 1 / ratio)


async def _heartbeat_p99(loop: asyncio.AbstractEventLoop, n_beats: int, *, clock: Callable[[], float]) -> float:
    """Return the 99th percentile of the milliseconds from the wake-up of a latency group's task to its step."""
    stop = asyncio.Event()
    bulk, urgent = SchedulingGroup("bulk", 1000), SchedulingGroup("urgent", 1000, latency_s=0.001)
    tasks = [loop.create_task(_spin(stop), context=bulk.context()) for _ in range(BUSY_TASKS)]

    def wake(woken: "asyncio.Future[float]") -> None:
        woken.set_result(clock())

    async def beat() -> list[float]:
        late_s = []
        for _ in range(n_beats):
            woken: asyncio.Future[float] = loop.create_future()
            due_s = time.monotonic() + BEAT_S
            loop.call_later(BEAT_S, wake, woken)
            at_s = await woken
            late_s.append(clock() - (due_s if clock is time.monotonic else at_s))
        return late_s

    late_s = sorted(await loop.create_task(beat(), context=urgent.context()))
    stop.set()
    for task in tasks:
        await task
    return max(0.0, late_s[int(len(late_s) * 0.99)]) * 1e3


async def _spin(stop: asyncio.Event) -> int:
    n_steps = 0
    while not stop.is_set():
        until_s = time.thread_time() + STEP_S
        while time.thread_time() < until_s:
            pass
        n_steps += 1
        await asyncio.sleep(0)
    return n_steps


async def _steps(n_steps: int, n_tasks: int, *, grouped: asyncio.AbstractEventLoop | None = None) -> float:
    if grouped is not None:
        SchedulingGroup("other").context()  # from now on the loop tells groups apart, if it can

    async def step() -> None:
        for _ in range(n_steps // n_tasks):
            await asyncio.sleep(0)

    began_s = time.thread_time()
    await asyncio.gather(*(step() for _ in range(n_tasks)))
    return (time.thread_time() - began_s) / n_steps * 1e6


async def _tasks(n_tasks: int) -> float:
    async def nothing() -> None:
        return

    loop = asyncio.get_running_loop()
    began_s = time.thread_time()
    for _ in range(n_tasks):
        await loop.create_task(nothing())
    return (time.thread_time() - began_s) / n_tasks * 1e6


async def _timers(loop: asyncio.AbstractEventLoop, n_timers: int) -> float:
    """Set and cancel thirty-second timers: on a wheel for isopod's loop, as the loop's own for the others."""
    is_ours = hasattr(loop, "use_group")
    wheel = TimerWheel(loop) if is_ours else None
    call_later: Callable[..., Any] = loop.call_later if wheel is None else wheel.call_later
    other = call_later(60, print)  # a server has more than one
    began_s = time.thread_time()
    for _ in range(n_timers):
        call_later(30, print).cancel()
    took_s = time.thread_time() - began_s
    other.cancel()
    if wheel is not None:
        wheel.close()
    return took_s / n_timers * 1e6


async def _deadlines(loop: asyncio.AbstractEventLoop, n_times: int) -> float:
    wheel = TimerWheel(loop)
    other = wheel.call_later(60, print)
    began_s = time.thread_time()
    for _ in range(n_times):
        async with deadline(30, wheel=wheel):
            pass
    took_s = time.thread_time() - began_s
    other.cancel()
    wheel.close()
    return took_s / n_times * 1e6
