"""Credits: how many calls may be under way from one shard to another, by service group.

A call takes a credit before it is sent and gives it back when the callee has answered: also one that was withdrawn, so that the bound
holds for what the callee has to keep.

Why A -> B -> A cannot deadlock: each group has a pool of its own for every depth of nesting. A call made while serving a call of depth d
takes its credit from the pool of depth d + 1. Who waits for a credit of depth d waits only for calls of depth d to end; these wait for
credits of greater depths alone, and at the greatest depth no call is made at all (it is refused). So some call can always go on.
Seastar asks its users to keep such cycles in different smp_service_groups; here one group is enough, and more are there to keep one kind of
work from taking another's credits. Source: Seastar, core/smp.hh (smp_service_group, max_nonlocal_requests).
"""

import asyncio
from collections import deque
from typing import Final, NamedTuple

DEPTH_MAX: Final = 8
"""Calls nested in calls between shards; the ninth is refused."""
NONLOCAL_REQUESTS_MAX: Final = 128


class SmpServiceGroup(NamedTuple):
    """A kind of calls with credits of its own.

    Args:
        name: Groups of one name are one group.
        max_nonlocal_requests: Calls under way from one shard to another, at each depth of nesting.
    """

    name: str
    max_nonlocal_requests: int = NONLOCAL_REQUESTS_MAX


DEFAULT_GROUP: Final = SmpServiceGroup("default")
CONTROL_GROUP: Final = SmpServiceGroup("control", 64)
"""For the framework's own calls, which must get through when the users' are many."""


class CreditPool:
    """The credits of one group at one depth towards one shard.

    Args:
        n_credits: At least 1.
    """

    __slots__ = ("_waiters", "n_free")

    def __init__(self, n_credits: int) -> None:
        self.n_free = max(1, n_credits)
        self._waiters: deque[asyncio.Future[object]] = deque()

    @property
    def n_waiting(self) -> int:
        """How many wait for a credit."""
        return sum(not waiter.done() for waiter in self._waiters)

    def try_take(self) -> bool:
        """Take a credit, unless there is none or somebody waits already."""
        if self.n_free > 0:
            self.n_free -= 1
            return True
        return False

    def enqueue(self, waiter: "asyncio.Future[object]") -> None:
        """Let a future be resolved with True when it has a credit. One that was resolved otherwise is skipped."""
        self._waiters.append(waiter)

    def give(self) -> None:
        """Give a credit back: to who waits longest, else to the pool."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(True)
                return
        self.n_free += 1

    def fail(self, error: Exception) -> None:
        """End the wait of all who wait: the shard is gone."""
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(error)
