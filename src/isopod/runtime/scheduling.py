"""Scheduling groups: who gets how much of the loop's time.

    raft = SchedulingGroup("raft", 1000, latency_s=0.001)
    bulk = SchedulingGroup("bulk", 100, priority=Priority.BACKGROUND)
    loop.create_task(copy(), context=bulk.context())

A group is carried by the context, so every task, timer and connection that is made inside belongs to it too. Scheduling is cooperative:
nothing interrupts a step, so long ones `await maybe_yield()` now and then. A loop that never met a second group pays nothing.

The host's loops obey groups; the simulated loop keeps its seeded order and counts; on any other loop they only carry their name.
Source: Seastar (scheduling_group, shares, need_preempt, maybe_yield), Glommio (Latency::Matters).
"""

import asyncio

from isopod.world.loops import CURRENT, MAIN, GroupLoop, GroupStatistics, Priority, SchedulingGroup

__all__ = [
    "GroupStatistics",
    "Priority",
    "SchedulingGroup",
    "current_group",
    "default_group",
    "maybe_yield",
    "need_preempt",
    "statistics",
]


def default_group() -> SchedulingGroup:
    """Return the group "main" of everything that has no other: 1000 shares, NORMAL."""
    return MAIN


def current_group() -> SchedulingGroup:
    """Return the context's group."""
    return CURRENT.get()


def need_preempt() -> bool:
    """Return whether the running step has used up its time, or a latency group waits; True on a loop without groups."""
    loop = asyncio.get_running_loop()
    return loop.need_preempt() if isinstance(loop, GroupLoop) else True


async def maybe_yield() -> None:
    """Let others run if it is their turn: for loops that compute for long, every few hundred microseconds."""
    if need_preempt():
        await asyncio.sleep(0)


def statistics(loop: asyncio.AbstractEventLoop | None = None) -> tuple[GroupStatistics, ...]:
    """Return what each group did on a loop (the running one if None); nothing on a loop without groups."""
    loop = loop or asyncio.get_running_loop()
    return loop.group_statistics() if isinstance(loop, GroupLoop) else ()
