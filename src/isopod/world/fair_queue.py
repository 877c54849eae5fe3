"""FairQueue: which scheduling group runs next, and for how long. Pure: the clock and the running of steps are given to it.

Each group has a queue and a virtual time, which grows by (time its steps took / its weight). The group whose virtual time is least runs
next. One that wakes up starts at the virtual time of the last one picked, so that sleeping earns no credit.

A turn is what happens between two looks at the outside (I/O, timers). Its rules:

- It ends after the quota (0.5 ms, less where a latency group asks for less). A slice of it is the quota divided by the groups that have
  work; the clock is read every 8 steps, and one step is never interrupted.
- Only steps that were queued when it began run in it, as asyncio promises: `sleep(0)` lets I/O happen. If the group to run next has none
  of these left, the turn ends early.
- Groups with a latency go first, the most urgent before the others, also when they wake up in the middle of a turn. That privilege ends
  where such a group is 5 ms of run time ahead of its share: a busy one gets its share and starves nobody.
- A group that has had work and not run for half a second gets one look's worth of steps, whatever its weight.

Source: Seastar's reactor (vruntime, activation at max(own, last)), Linux's CFS; the latency rule is borrowed virtual time with a limit.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from isopod.world.errors import Exhausted
from isopod.world.loops import GROUPS_MAX, MAIN, GroupStatistics, SchedulingGroup

T = TypeVar("T")

QUOTA_NS: Final = 500_000
STEPS_PER_LOOK: Final = 8
"""Steps between two readings of the clock."""
BURST_NS: Final = 5_000_000
"""How far ahead of its share a latency group may run with its privilege."""
STARVED_NS: Final = 500_000_000


class GroupQueue(Generic[T]):
    """One group's steps on one loop, and its account. Its `FairQueue` owns everything but the appending to `items`."""

    __slots__ = (
        "group",
        "is_active",
        "is_fresh",
        "is_urgent",
        "items",
        "n_due",
        "n_steps",
        "run_ns",
        "since_ns",
        "starve_ns",
        "vruntime",
        "wait_ns",
    )

    def __init__(self, group: SchedulingGroup, now_ns: int, vruntime: float) -> None:
        self.group = group
        self.items: deque[T] = deque()
        self.vruntime = vruntime
        self.is_urgent: Final = group.latency_s is not None
        self.is_active = False  # has work
        self.is_fresh = False  # got it outside of a turn; the next turn takes the time
        self.n_due = 0  # steps of this turn that are left
        self.n_steps = 0
        self.run_ns = 0
        self.wait_ns = 0
        self.starve_ns = 0
        self.since_ns = now_ns  # when it last changed between running, waiting and starving


class FairQueue(Generic[T]):
    """The queues of a loop's groups.

    Args:
        clock_ns: A clock that never goes back.
        run_steps: `run_steps(items, n)` takes the first n items out and runs them. What it raises ends the turn.
        quota_ns: The length of a turn.
    """

    def __init__(self, clock_ns: Callable[[], int], run_steps: Callable[[deque[T], int], None], *, quota_ns: int = QUOTA_NS) -> None:
        self._clock_ns = clock_ns
        self._run_steps = run_steps
        self._quota_ns = quota_ns
        self._active: list[GroupQueue[T]] = []
        self._urgent: list[GroupQueue[T]] = []
        self._now_ns = 0  # of the last look
        self._last_vruntime = 0.0
        self.current: GroupQueue[T] | None = None
        """The queue whose steps run."""
        self.slice_end_ns = 0
        """Until when they may; 0 outside of turns, and when something urgent came."""
        self.n_turns = 0
        self.main: GroupQueue[T] = GroupQueue(MAIN, clock_ns(), 0.0)
        self.queues: dict[SchedulingGroup, GroupQueue[T]] = {MAIN: self.main}

    def add(self, group: SchedulingGroup) -> GroupQueue[T]:
        """Return the queue of a group, made on first sight.

        Raises:
            Exhausted: Too many groups.
        """
        found = self.queues.get(group)
        if found is not None:
            return found
        if len(self.queues) >= GROUPS_MAX:
            raise Exhausted("scheduling groups", f"{GROUPS_MAX} on one loop", "make groups once, not per connection or per call")
        queue: GroupQueue[T] = GroupQueue(group, self._clock_ns(), self._last_vruntime)
        self.queues[group] = queue
        if group.latency_s is not None:
            self._urgent.append(queue)
            self._urgent.sort(key=lambda each: each.group.latency_s or 0.0)
            self._quota_ns = min(self._quota_ns, round(group.latency_s * 1e9))
        return queue

    @property
    def has_work(self) -> bool:
        """Whether any step waits."""
        return bool(self._active)

    def push(self, queue: GroupQueue[T], item: T) -> None:
        """Add a step to a queue. (The host's loop does this in place.)"""
        queue.items.append(item)
        if not queue.is_active:
            self.activate(queue)

    def activate(self, queue: GroupQueue[T]) -> None:
        """Let a queue that got its first step take part."""
        queue.is_active = True
        queue.n_due = 0
        queue.vruntime = max(queue.vruntime, self._last_vruntime)
        self._active.append(queue)
        if self.current is None:
            queue.is_fresh = True
            return
        now_ns = max(self._now_ns, queue.since_ns)  # a queue may be newer than the last look
        queue.wait_ns += now_ns - queue.since_ns
        queue.since_ns = now_ns
        if queue.is_urgent:
            self.slice_end_ns = 0

    def turn(self) -> None:
        """Run steps for one turn."""
        self.n_turns += 1
        active = self._active
        if len(active) == 1 and len(active[0].items) <= STEPS_PER_LOOK:
            self._run_few(active[0])
            return
        now_ns = self._clock_ns()
        end_ns = now_ns + self._quota_ns
        starved = self._begin(now_ns)
        if starved is not None:
            now_ns = self._run(starved, now_ns, now_ns)
        while active and now_ns < end_ns:
            queue = active[0] if len(active) == 1 else self._pick()
            if not (queue.is_urgent and self._is_privileged(queue)):
                if not queue.n_due:
                    break
                self._last_vruntime = max(self._last_vruntime, queue.vruntime)
            now_ns = self._run(queue, now_ns, min(end_ns, now_ns + self._quota_ns // len(active)))

    def statistics(self) -> tuple[GroupStatistics, ...]:
        """Return every group's account now, in the order of `add`."""
        now_ns = self._clock_ns()
        return tuple(self._account(queue, now_ns) for queue in self.queues.values())

    def clear(self) -> None:
        """Drop every step."""
        for queue in self.queues.values():
            queue.items.clear()
            queue.is_active = False
        self._active.clear()

    def _begin(self, now_ns: int) -> GroupQueue[T] | None:
        """Note which steps belong to this turn; return the queue that has starved for longest, if any has for too long."""
        starved: GroupQueue[T] | None = None
        for queue in self._active:
            queue.n_due = len(queue.items)
            if queue.is_fresh:
                queue.is_fresh = False
                queue.wait_ns += now_ns - queue.since_ns
                queue.since_ns = now_ns
            elif now_ns - queue.since_ns > STARVED_NS and (starved is None or queue.since_ns < starved.since_ns):
                starved = queue
        return starved

    def _pick(self) -> GroupQueue[T]:
        """Return the queue to run next."""
        for queue in self._urgent:
            if queue.is_active and self._is_privileged(queue):
                return queue
        picked = self._active[0]
        for queue in self._active:
            if queue.vruntime < picked.vruntime:
                picked = queue
        return picked

    def _is_privileged(self, queue: GroupQueue[T]) -> bool:
        """Whether a latency group may go first; then its newest steps belong to this turn too."""
        if queue.vruntime > self._last_vruntime + BURST_NS / queue.group.weight:
            return False
        queue.n_due = len(queue.items)
        return True

    def _run_few(self, queue: GroupQueue[T]) -> None:
        """Run the steps of the only queue that has any, when they are no more than one look's worth: a loop that is not busy."""
        began_ns = self._now_ns = self._clock_ns()
        if queue.is_fresh:
            queue.is_fresh = False
            queue.wait_ns += began_ns - queue.since_ns
        else:
            queue.starve_ns += began_ns - queue.since_ns
        queue.since_ns = began_ns
        if queue.vruntime > self._last_vruntime:  # noqa: PLR1730 - max() costs a call in every turn
            self._last_vruntime = queue.vruntime
        items = queue.items
        n_steps = len(items)
        queue.n_steps += n_steps
        self.current = queue
        self.slice_end_ns = began_ns + self._quota_ns
        try:
            self._run_steps(items, n_steps)
        finally:
            now_ns = self._clock_ns()
            self.current = None
            self.slice_end_ns = 0
            queue.run_ns += now_ns - began_ns
            queue.vruntime += (now_ns - began_ns) / queue.group.weight
            queue.since_ns = now_ns
            if not items:
                queue.is_active = False
                self._active.remove(queue)

    def _run(self, queue: GroupQueue[T], now_ns: int, end_ns: int) -> int:
        """Run a queue until `end_ns` or until it has no step left that may run now; return the time."""
        began_ns = now_ns
        queue.starve_ns += now_ns - queue.since_ns
        queue.since_ns = now_ns
        self._now_ns = now_ns
        self.current = queue
        self.slice_end_ns = end_ns
        run_steps, items = self._run_steps, queue.items
        try:
            while queue.n_due:
                n_steps = min(queue.n_due, STEPS_PER_LOOK)
                queue.n_due -= n_steps
                queue.n_steps += n_steps
                run_steps(items, n_steps)
                self._now_ns = now_ns = self._clock_ns()
                if now_ns >= self.slice_end_ns:
                    break
        except BaseException:
            now_ns = self._clock_ns()
            raise
        finally:
            self.current = None
            self.slice_end_ns = 0
            queue.run_ns += now_ns - began_ns
            queue.vruntime += (now_ns - began_ns) / queue.group.weight
            queue.since_ns = now_ns
            if not items:
                queue.is_active = False
                self._active.remove(queue)
        return now_ns

    def _account(self, queue: GroupQueue[T], now_ns: int) -> GroupStatistics:
        rest_ns = now_ns - queue.since_ns
        is_running, is_starving = queue is self.current, queue.is_active and not queue.is_fresh
        return GroupStatistics(
            name=queue.group.name,
            shares=queue.group.shares,
            priority=queue.group.priority.name.lower(),
            n_steps=queue.n_steps,
            n_queued=len(queue.items),
            run_s=(queue.run_ns + (rest_ns if is_running else 0)) / 1e9,
            wait_s=(queue.wait_ns + (0 if is_running or is_starving else rest_ns)) / 1e9,
            starve_s=(queue.starve_ns + (rest_ns if is_starving and not is_running else 0)) / 1e9,
        )
