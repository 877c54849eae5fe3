"""Lessor: watches the time for leases, on the leader.

A lease ends when nobody kept it alive for its whole time by the leader's own monotonic clock; the end goes through the log. Keeping
alive does not: it moves the end, after the log's proof that this node still leads. So it costs no write, and a deposed leader cannot
promise what its successor does not know of: a new leader gives every lease its full time again, counted from when it began to lead,
which is later than anything the old one could still promise.

The holder counts from when it sent its request, so it never believes in a lease that has ended.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Final

from isopod.api.store.messages import COMMAND_OPS_MAX, Entry
from isopod.cluster.store.leases import Lease
from isopod.cluster.store.machine import StoreMachine
from isopod.world.errors import IsopodError

DRIFT: Final = 0.002
"""How much longer a lease lives: the clocks of holder and leader may differ in speed, a kernel corrects each by 500 ppm at most."""
GRAIN_S: Final = 0.05
"""Ends that are so near together share one command."""
RETRY_S: Final = 0.5

Expire = Callable[[tuple[int, ...]], Awaitable[None]]
"""Has leases ended through the log."""


class Lessor:
    """The leases' clock.

    Args:
        machine: Whose leases.
        expire: Ends some.
    """

    def __init__(self, machine: StoreMachine, expire: Expire) -> None:
        self.n_expired = 0
        self._machine = machine
        self._leases = machine.leases
        self._expire = expire
        self._loop = asyncio.get_running_loop()
        self._is_leading = False
        self._ends: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._ending: dict[int, None] = {}
        """Whose end was proposed: it may come at any time, also if that failed: nobody keeps them alive while this node leads."""
        self._task: asyncio.Task[None] | None = None
        machine.listen(self)

    def lead(self, *, is_leading: bool) -> None:
        """This node leads from now on, or does no more; a new leader gives every lease its full time."""
        self._is_leading = is_leading
        self._ends.clear()
        self._ending.clear()
        self._heap.clear()
        self._leases.fresh.clear()
        if is_leading:
            now = self._loop.time()
            for lease in self._leases.by_id.values():
                self._ends[lease.id] = now + _life_s(lease)
            self._heap = [(end, number) for number, end in self._ends.items()]
            heapify(self._heap)
        self._arm()

    def keep(self, number: int) -> float:
        """Give a lease its full time again; return that in seconds, 0 if it has ended or is about to.

        Only after a read barrier of this node, which leads.
        """
        lease = self._leases.by_id.get(number)
        if lease is None or number in self._ending or not self._is_leading:
            return 0.0
        ttl_s = lease.ttl_ms / 1000
        self._ends[number] = self._loop.time() + _life_s(lease)
        return ttl_s

    async def close(self) -> None:
        """Stop."""
        self._machine.unlisten(self)
        self._is_leading = False
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- the machine's listener ---------------------------------------------------------------------------------------

    def on_changes(self, _changes: Sequence[Entry]) -> None:
        """Note what was granted."""
        fresh = self._leases.fresh
        if not fresh:
            return
        if self._is_leading:
            now = self._loop.time()
            for number in fresh:
                lease = self._leases.by_id.get(number)
                if lease is not None:
                    end = self._ends[number] = now + _life_s(lease)
                    heappush(self._heap, (end, number))
            self._arm()
        fresh.clear()

    def on_restored(self) -> None:
        """The state was replaced."""
        self.lead(is_leading=self._is_leading)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Set the timer for the next end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_leading and self._heap and self._task is None:
            self._timer = self._loop.call_at(max(self._heap[0][0], self._loop.time()) + GRAIN_S, self._on_time)

    def _on_time(self) -> None:
        """End what nobody kept alive."""
        self._timer = None
        now = self._loop.time()
        over: list[int] = []
        while self._heap and self._heap[0][0] <= now and len(over) < COMMAND_OPS_MAX:
            _, number = heappop(self._heap)
            end = self._ends.get(number)
            if end is None or number not in self._leases.by_id:
                self._ends.pop(number, None)
            elif end > now:
                heappush(self._heap, (end, number))
            else:
                over.append(number)
        if over:
            self._ending |= dict.fromkeys(over)
            self._task = self._loop.create_task(self._end(tuple(over)), name="store leases")
        else:
            self._arm()

    async def _end(self, numbers: tuple[int, ...]) -> None:
        try:
            await self._expire(numbers)
            self.n_expired += len(numbers)
        except IsopodError:
            # Whoever leads then looks again. They may be gone or not: asking twice does no harm.
            await asyncio.sleep(RETRY_S)
        finally:
            self._task = None
            for number in numbers:
                if number not in self._leases.by_id:
                    self._ending.pop(number, None)
                    self._ends.pop(number, None)
                elif number in self._ending:  # else another term began meanwhile
                    heappush(self._heap, (self._ends[number], number))
            self._arm()


def _life_s(lease: Lease) -> float:
    """Return for how long by the leader's clock a lease certainly lives by its holder's."""
    return lease.ttl_ms / 1000 * (1 + DRIFT)
