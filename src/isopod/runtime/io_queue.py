"""IoQueue: the disk's time shared fairly between scheduling groups.

A disk that is given all requests at once serves them in an order of its own, and whoever asks most gets most. So requests wait here, one
line per group, and only as many go to the disk as it can work on. Two parts:

- `IoScheduler` decides. It is pure: requests and the time in, requests to start out. A request costs a part of the disk's second: one
  operation's share plus its bytes' share, dearer for writes where the disk is slower at them. One token bucket over that cost keeps the
  disk's queue short; between groups the one that used least in relation to its weight goes first (min-vruntime); a group that slept gets
  no credit for it, beyond the length of a burst.
- `IoQueue` runs operations when their turn comes.

Whether the disk keeps up with what was declared is seen from the flow ratio: what the bucket let out, or would have, over what was
completed. 1 is as declared; 2 is a disk half as fast. It is reported, nothing is slowed down by it: what is in flight is bounded anyway.

Source: Seastar (doc/io-scheduler.md, fair_queue, io-properties.yaml).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Literal, NamedTuple, TypeVar

from isopod.runtime.scheduling import SchedulingGroup, current_group
from isopod.world.errors import Exhausted, InvalidArgument

T = TypeVar("T")
Direction = Literal["read", "write"]

N_IN_FLIGHT_MAX: Final = 64
N_WAITING_MAX: Final = 1 << 16
BURST_S: Final = 0.005
"""How much of the disk's time may be asked of it ahead."""
PERIOD_S: Final = 0.25
"""After each the flow ratio is worked out."""
BEHIND_RATIO: Final = 1.25
_SMOOTHING: Final = 0.5
_RATIO_MAX: Final = 1000.0


class IoProperties(NamedTuple):
    """What a disk can do when it does nothing else; see `calibrate`. The defaults are a modest SSD's."""

    read_bytes_per_s: float = 400e6
    write_bytes_per_s: float = 250e6
    read_operations_per_s: float = 40_000.0
    write_operations_per_s: float = 20_000.0

    def cost_s(self, direction: Direction, n_bytes: int) -> float:
        """Return how many seconds of the disk a request takes."""
        if direction == "read":
            return 1 / self.read_operations_per_s + n_bytes / self.read_bytes_per_s
        return 1 / self.write_operations_per_s + n_bytes / self.write_bytes_per_s


class GroupIoStatistics(NamedTuple):
    """What one group did."""

    name: str
    shares: int
    n_reads: int
    n_writes: int
    n_bytes_read: int
    n_bytes_written: int
    disk_s: float
    """Its part of the disk's time, as cost."""
    wait_s: float
    """What its requests waited here, added up."""
    n_waiting: int
    n_in_flight: int


class IoQueueStatistics(NamedTuple):
    """What a queue did."""

    groups: tuple[GroupIoStatistics, ...]
    n_waiting: int
    n_in_flight: int
    flow_ratio: float
    is_behind: bool
    """Whether the disk is a good deal slower than its properties say."""


class Ticket:
    """One request. Made by `IoScheduler.add`."""

    __slots__ = ("added_s", "cost_s", "direction", "future", "line", "n_bytes", "state")

    def __init__(self, line: "_Line", direction: Direction, n_bytes: int, *, cost_s: float, added_s: float) -> None:
        self.line = line
        self.direction: Direction = direction
        self.n_bytes = n_bytes
        self.cost_s = cost_s
        self.added_s = added_s
        self.state: Literal["waiting", "started", "ended"] = "waiting"
        self.future: asyncio.Future[None] | None = None


class _Line:
    """The requests of one group that wait, and its account."""

    __slots__ = ("disk_s", "group", "n_bytes", "n_in_flight", "n_operations", "vruntime", "wait_s", "waiting")

    def __init__(self, group: SchedulingGroup) -> None:
        self.group = group
        self.waiting: deque[Ticket] = deque()
        self.vruntime = 0.0
        self.disk_s = self.wait_s = 0.0
        self.n_in_flight = 0
        self.n_operations: dict[Direction, int] = {"read": 0, "write": 0}
        self.n_bytes: dict[Direction, int] = {"read": 0, "write": 0}


class IoScheduler:
    """Decides which request is started when. Times are in seconds of any clock that does not go back.

    Args:
        properties: What the disk can do.
        n_in_flight_max: Requests that the disk works on at once.
        n_waiting_max: Requests that may wait.
        burst_s: How much of the disk's time may be asked of it ahead.
        now_s: The time at the beginning.
    """

    def __init__(
        self,
        properties: IoProperties,
        *,
        n_in_flight_max: int = N_IN_FLIGHT_MAX,
        n_waiting_max: int = N_WAITING_MAX,
        burst_s: float = BURST_S,
        now_s: float = 0.0,
    ) -> None:
        if min(properties) <= 0 or n_in_flight_max < 1 or burst_s <= 0:
            raise InvalidArgument("disk properties", properties, "rates and bounds must be positive")
        self._properties = properties
        self._n_in_flight_max = n_in_flight_max
        self._n_waiting_max = n_waiting_max
        self._burst_s = burst_s
        self._lines: dict[str, _Line] = {}
        self._tokens_s = burst_s
        self._filled_s = now_s
        self._last_vruntime = 0.0
        self._n_waiting = self._n_in_flight = 0
        self._period_s = now_s
        self._let_out_s = self._completed_s = 0.0
        self._flow_ratio = 1.0

    def add(self, group: SchedulingGroup, direction: Direction, n_bytes: int, *, now_s: float) -> Ticket:
        """Put a request in its group's line.

        Raises:
            Exhausted: Too many wait.
        """
        if self._n_waiting >= self._n_waiting_max:
            raise Exhausted("I/O queue", f"{self._n_waiting} requests wait")
        line = self._lines.get(group.name)
        if line is None:
            line = self._lines[group.name] = _Line(group)
        if not line.waiting:
            # A line that is empty for a moment keeps its place; one that slept has at most a burst's worth of credit.
            line.vruntime = max(line.vruntime, self._last_vruntime - self._burst_s / line.group.weight)
        self._fill(now_s)
        ticket = Ticket(line, direction, n_bytes, cost_s=self._properties.cost_s(direction, n_bytes), added_s=now_s)
        line.waiting.append(ticket)
        self._n_waiting += 1
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Forget a request that was not started."""
        if ticket.state == "waiting":
            ticket.state = "ended"
            ticket.line.waiting.remove(ticket)
            self._n_waiting -= 1

    def start(self, now_s: float) -> list[Ticket]:
        """Return the requests to start now, in order."""
        self._fill(now_s)
        started: list[Ticket] = []
        while self._n_waiting and self._n_in_flight < self._n_in_flight_max:
            line = min((line for line in self._lines.values() if line.waiting), key=lambda line: line.vruntime)
            if self._tokens_s < min(line.waiting[0].cost_s, self._burst_s):
                break
            started.append(self._start_first(line, now_s))
        return started

    def complete(self, ticket: Ticket, now_s: float) -> None:
        """Note that a started request has ended, well or not."""
        if ticket.state != "started":
            raise InvalidArgument("ticket", ticket.state, "only a started one can complete")
        ticket.state = "ended"
        self._fill(now_s)
        self._n_in_flight -= 1
        ticket.line.n_in_flight -= 1
        self._completed_s += ticket.cost_s

    def next_in_s(self) -> float | None:
        """Return in how many seconds from the last call tokens suffice for the next request; None if it waits for none, or for room."""
        if not self._n_waiting or self._n_in_flight >= self._n_in_flight_max:
            return None
        line = min((line for line in self._lines.values() if line.waiting), key=lambda line: line.vruntime)
        return max(0.0, min(line.waiting[0].cost_s, self._burst_s) - self._tokens_s)

    def statistics(self) -> IoQueueStatistics:
        """Return what each group did, in the order of their first requests."""
        groups = tuple(
            GroupIoStatistics(
                name=line.group.name,
                shares=line.group.shares,
                n_reads=line.n_operations["read"],
                n_writes=line.n_operations["write"],
                n_bytes_read=line.n_bytes["read"],
                n_bytes_written=line.n_bytes["write"],
                disk_s=line.disk_s,
                wait_s=line.wait_s,
                n_waiting=len(line.waiting),
                n_in_flight=line.n_in_flight,
            )
            for line in self._lines.values()
        )
        return IoQueueStatistics(groups, self._n_waiting, self._n_in_flight, self._flow_ratio, self._flow_ratio > BEHIND_RATIO)

    def _start_first(self, line: _Line, now_s: float) -> Ticket:
        ticket = line.waiting.popleft()
        ticket.state = "started"
        self._n_waiting -= 1
        self._n_in_flight += 1
        self._tokens_s -= ticket.cost_s
        self._let_out_s += ticket.cost_s
        self._last_vruntime = line.vruntime
        line.vruntime += ticket.cost_s / line.group.weight
        line.n_in_flight += 1
        line.n_operations[ticket.direction] += 1
        line.n_bytes[ticket.direction] += ticket.n_bytes
        line.disk_s += ticket.cost_s
        line.wait_s += now_s - ticket.added_s
        return ticket

    def _fill(self, now_s: float) -> None:
        """Refill the bucket: a second of time is a second of the disk."""
        tokens_s = self._tokens_s + max(0.0, now_s - self._filled_s)
        self._filled_s = max(now_s, self._filled_s)
        self._tokens_s = min(tokens_s, self._burst_s)
        if self._n_waiting and self._n_in_flight >= self._n_in_flight_max:
            self._let_out_s += tokens_s - self._tokens_s  # the bucket would have let it out, the disk was not ready
        if now_s - self._period_s >= PERIOD_S:
            self._observe(now_s)

    def _observe(self, now_s: float) -> None:
        if self._let_out_s > 0:
            ratio = min(self._let_out_s / self._completed_s, _RATIO_MAX) if self._completed_s else _RATIO_MAX
            self._flow_ratio += _SMOOTHING * (max(ratio, 1.0) - self._flow_ratio)
        self._let_out_s = self._completed_s = 0.0
        self._period_s = now_s


class IoQueue:
    """Runs operations on a disk, each when its group's turn comes. One per disk and shard, on one loop.

    Args:
        properties: What this shard may ask of the disk; the defaults if None.
        n_in_flight_max: Requests that the disk works on at once.
        n_waiting_max: Requests that may wait; more are refused.
    """

    def __init__(
        self, properties: IoProperties | None = None, *, n_in_flight_max: int = N_IN_FLIGHT_MAX, n_waiting_max: int = N_WAITING_MAX
    ) -> None:
        self._loop = asyncio.get_running_loop()
        properties = properties or IoProperties()
        self._fair = IoScheduler(properties, n_in_flight_max=n_in_flight_max, n_waiting_max=n_waiting_max, now_s=self._loop.time())
        self._timer: asyncio.TimerHandle | None = None

    async def run(
        self, direction: Direction, n_bytes: int, operation: Callable[[], Awaitable[T]], *, group: SchedulingGroup | None = None
    ) -> T:
        """Run an operation when its turn comes, and return its result.

        Args:
            direction: "read" or "write" (a sync is a write of no bytes).
            n_bytes: How much it moves.
            operation: Called once, when it may go to the disk.
            group: Whose request it is; the context's if None.

        Raises:
            Exhausted: Too many wait.
        """
        ticket = self._fair.add(group or current_group(), direction, n_bytes, now_s=self._loop.time())
        self._start()
        if ticket.state == "waiting":
            await self._wait(ticket)
        try:
            return await operation()
        finally:
            self._fair.complete(ticket, self._loop.time())
            self._start()

    def statistics(self) -> IoQueueStatistics:
        """Return what each group did."""
        return self._fair.statistics()

    async def _wait(self, ticket: Ticket) -> None:
        ticket.future = self._loop.create_future()
        try:
            await ticket.future
        except asyncio.CancelledError:
            if ticket.state == "started":
                self._fair.complete(ticket, self._loop.time())
            else:
                self._fair.withdraw(ticket)
            self._start()
            raise

    def _start(self) -> None:
        """Wake the requests whose turn it is, and come back when tokens suffice for the next one."""
        for ticket in self._fair.start(self._loop.time()):
            if ticket.future is not None and not ticket.future.done():
                ticket.future.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pause_s = self._fair.next_in_s()
        if pause_s is not None:
            self._timer = self._loop.call_later(pause_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._start()
