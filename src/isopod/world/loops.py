"""What the runtime asks of an event loop beyond asyncio: to share its turns between scheduling groups, and to be watched.

The group of a step travels in a context variable, so a task's children belong to its group. The host's loops (`world.host.loop`) share
their turns by it; the simulated loop keeps its seeded order and only counts. A loop of somebody else's is none of these: the runtime
then does without.

The user's side is `isopod.runtime.scheduling`; the arithmetic is `world.fair_queue`.
"""

import asyncio
import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from isopod.world.errors import InvalidArgument

SHARES_MAX: Final = 1000
GROUPS_MAX: Final = 64
"""How many groups one loop tells apart."""
_NAME_CHARS_MAX: Final = 64


class Priority(enum.IntEnum):
    """Five levels; each weighs four times the one below it, so none ever starves another."""

    IDLE = 0
    BACKGROUND = 1
    NORMAL = 2
    HIGH = 3
    CRITICAL = 4


class SchedulingGroup:
    """A share of a loop's time, for all tasks that run in its name.

    While several groups have work, each gets time in proportion to its weight: its shares times 4 for every level above NORMAL, or
    divided by 4 for every level below. Shares that nobody uses are divided among the others.

    Args:
        name: For statistics, metrics (label `group`) and stall reports.
        shares: 1 to 1000.
        priority: The level.
        latency_s: Its steps run first in every turn of the loop, and turns are no longer than this; None for none of it. They get at most
            half of each turn that way: what is beyond waits for its share.
    """

    __slots__ = ("latency_s", "name", "priority", "shares", "weight")

    def __init__(self, name: str, shares: int = 100, *, priority: Priority = Priority.NORMAL, latency_s: float | None = None) -> None:
        if not name or len(name) > _NAME_CHARS_MAX or not name.isprintable():
            raise InvalidArgument("scheduling group", name, f"a name has 1 to {_NAME_CHARS_MAX} printable characters")
        if latency_s is not None and not 0 < latency_s <= 1:
            raise InvalidArgument("latency_s", latency_s, "must be above 0 and at most 1")
        self.name: Final = name
        self.priority: Final = Priority(priority)
        self.latency_s: Final = latency_s
        self.set_shares(shares)

    def set_shares(self, shares: int) -> None:
        """Change the shares; counts from the next slice on.

        Raises:
            InvalidArgument: Not 1 to 1000.
        """
        if not 1 <= shares <= SHARES_MAX:
            raise InvalidArgument("shares", shares, f"must be 1 to {SHARES_MAX}")
        self.shares = shares
        self.weight = shares * 4.0 ** (self.priority - Priority.NORMAL)

    def context(self) -> Context:
        """Return a copy of the current context in this group, for `loop.create_task(coroutine, context=...)`.

        Raises:
            Exhausted: The running loop tells 64 groups apart already.
        """
        self._introduce()
        context = copy_context()
        context.run(CURRENT.set, self)
        return context

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make tasks, timers and servers of this group in the block.

        The running task itself stays where it is when it awaits in the block: its steps belong to the context it was made with.

        Raises:
            Exhausted: The running loop tells 64 groups apart already.
        """
        self._introduce()
        token = CURRENT.set(self)
        try:
            yield
        finally:
            CURRENT.reset(token)

    def _introduce(self) -> None:
        loop = asyncio._get_running_loop()
        if isinstance(loop, GroupLoop):
            loop.use_group(self)

    def __repr__(self) -> str:
        latency = "" if self.latency_s is None else f", latency_s={self.latency_s:g}"
        return f"SchedulingGroup({self.name!r}, {self.shares}, {self.priority.name}{latency})"


MAIN: Final = SchedulingGroup("main", SHARES_MAX)
"""The group of everything that has no other."""
CURRENT: Final[ContextVar[SchedulingGroup]] = ContextVar("isopod_scheduling_group", default=MAIN)
"""The group of a context."""


class GroupStatistics(msgspec.Struct, frozen=True):
    """What one group did on one loop. Its three times add up to the time since the loop first saw it.

    Args:
        name: The group's.
        shares: Now.
        priority: Its level's name.
        n_steps: Steps that ran.
        n_queued: Steps that wait now.
        run_s: Time in steps.
        wait_s: Time without any work.
        starve_s: Time with work, while others ran.
    """

    name: str
    shares: int
    priority: str
    n_steps: int
    n_queued: int
    run_s: float
    wait_s: float
    starve_s: float


class Stall(NamedTuple):
    """A callback that holds up its loop.

    Args:
        duration_s: How long by now; in full in the second report.
        task: The task's name, "" for a plain callback.
        group: Its scheduling group.
        stack: Where it is, innermost frame last; empty in the second report.
    """

    duration_s: float
    task: str
    group: str
    stack: tuple[str, ...]


class TaskFacts(NamedTuple):
    """What a loop wrote down when it made a task: its age in seconds, its scheduling group."""

    age_s: float
    group: str


class Watch(Protocol):
    """A watch over a loop."""

    def stop(self) -> None:
        """End it; nothing is reported afterwards. Called in the loop's thread."""


class GroupLoop(asyncio.AbstractEventLoop):
    """A loop that knows scheduling groups. A class to inherit from rather than a protocol: asking a protocol costs microseconds."""

    def use_group(self, group: SchedulingGroup) -> None:
        """Tell this group apart from now on.

        Raises:
            Exhausted: More than 64 groups.
        """
        raise NotImplementedError

    def account(self) -> None:
        """Count turns and steps from now on, also while there is only one group."""
        raise NotImplementedError

    def group_statistics(self) -> tuple[GroupStatistics, ...]:
        """Return a snapshot, in the order in which the loop met the groups; empty while nothing is counted."""
        raise NotImplementedError

    def need_preempt(self) -> bool:
        """Return whether the running step should let others run."""
        raise NotImplementedError

    def n_turns(self) -> int:
        """Return in how many turns steps ran since they are counted."""
        raise NotImplementedError

    def busy_s(self) -> float:
        """Return the CPU time of the loop's thread; asked from that thread."""
        raise NotImplementedError

    def task_facts(self, task: "asyncio.Task[Any]") -> TaskFacts | None:
        """Return what was written down about a task; None for one that was not made by `create_task` of this loop."""
        raise NotImplementedError

    def watch(self, threshold_s: float, on_stall: Callable[[Stall], None], on_end: Callable[[Stall], None]) -> Watch:
        """Report callbacks that take longer than a threshold. Called in the loop's thread, while it runs.

        Args:
            threshold_s: From when on a callback stalls.
            on_stall: Called while it stalls, in another thread.
            on_end: Called after it, in the loop's thread.
        """
        raise NotImplementedError
