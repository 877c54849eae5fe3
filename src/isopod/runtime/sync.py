"""Waiting for each other on one loop: semaphore with units, shared mutex, condition variable, barrier, latch.

asyncio has a semaphore and a lock; these have units, sharing and a strict order besides: who waits first is served first, also if a later
one asks for less, so nobody starves. A waiter that is cancelled leaves without a trace, and what it was given in that very moment goes on
to the next. All of them may be ended by `broken`, which fails everybody who waits. Nothing here is for threads.

Source: Seastar (semaphore.hh, shared_mutex.hh, condition-variable.hh), boost latch and barrier.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from isopod.world.errors import BugError, Exhausted, InvalidArgument, WrongState

WAITERS_MAX: Final = 1 << 16


class _Line:
    """People who wait in order, each for some units.

    Args:
        name: For messages.
        waiters_max: More are refused.
    """

    __slots__ = ("_name", "_waiters_max", "queue")

    def __init__(self, name: str, waiters_max: int) -> None:
        self._name = name
        self._waiters_max = waiters_max
        self.queue: deque[tuple[asyncio.Future[None], int]] = deque()

    async def wait(self, units: int, give_back: Callable[[int], None], retry: Callable[[], None]) -> None:
        """Stand in line; `give_back` undoes a grant that came together with a cancellation, `retry` serves those behind one who left."""
        if len(self.queue) >= self._waiters_max:
            raise Exhausted(self._name, f"{len(self.queue)} wait already")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (future, units)
        self.queue.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                give_back(units)
            elif entry in self.queue:
                self.queue.remove(entry)
                retry()
            raise

    def serve(self) -> None:
        """Let the first one go."""
        future, _ = self.queue.popleft()
        if not future.done():
            future.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Fail everybody."""
        waiting, self.queue = self.queue, deque()
        for future, _ in waiting:
            if not future.done():
                future.set_exception(error)


class Semaphore:
    """Counts units; who wants more than there are waits, first come first served.

    Args:
        units: How many there are at first.
        name: For messages.
        waiters_max: Bound on those who wait.
    """

    def __init__(self, units: int, name: str = "semaphore", *, waiters_max: int = WAITERS_MAX) -> None:
        if units < 0:
            raise InvalidArgument("semaphore units", units, "it must not be negative")
        self._units = units
        self._name = name
        self._line = _Line(name, waiters_max)
        self._broken: BaseException | None = None

    @property
    def available_units(self) -> int:
        """Units that may be taken now."""
        return self._units

    @property
    def n_waiting(self) -> int:
        """How many wait."""
        return len(self._line.queue)

    async def wait(self, units: int = 1) -> None:
        """Take units; waits behind those who came before.

        Raises:
            Exhausted: Too many wait already.
            WrongState: It was broken, or what `broken` was given.
        """
        if not self.try_wait(units):
            await self._line.wait(units, self.signal, self._serve)

    def try_wait(self, units: int = 1) -> bool:
        """Take units if that is possible at once; False if not."""
        if units < 0:
            raise InvalidArgument("semaphore units", units, "it must not be negative")
        if self._broken is not None:
            raise self._broken
        if self._line.queue or units > self._units:
            return False
        self._units -= units
        return True

    def signal(self, units: int = 1) -> None:
        """Give units back, or add them."""
        self._units += units
        self._serve()

    def consume(self, units: int) -> None:
        """Take units that were used without asking; the count may become negative."""
        self._units -= units

    @asynccontextmanager
    async def units(self, units: int = 1) -> AsyncIterator[None]:
        """Hold units for the length of an `async with` block."""
        await self.wait(units)
        try:
            yield
        finally:
            self.signal(units)

    def broken(self, error: BaseException | None = None) -> None:
        """Fail everybody who waits, and who comes later, with `error`."""
        self._broken = error or WrongState("semaphore", self._name, "broken", "wait for it")
        self._line.fail(self._broken)

    def _serve(self) -> None:
        queue = self._line.queue
        while queue and (queue[0][0].done() or queue[0][1] <= self._units):
            if not queue[0][0].done():
                self._units -= queue[0][1]
            self._line.serve()


_EXCLUSIVE: Final = 1 << 30


class SharedMutex:
    """Many readers or one writer; in the order they came, so that neither starves the other.

    Args:
        name: For messages.
    """

    def __init__(self, name: str = "shared mutex") -> None:
        self._units = Semaphore(_EXCLUSIVE, name)

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold it together with other readers."""
        async with self._units.units(1):
            yield

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold it alone."""
        async with self._units.units(_EXCLUSIVE):
            yield

    def try_lock_shared(self) -> bool:
        """Become a reader at once, or return False. `unlock_shared` must follow."""
        return self._units.try_wait(1)

    def unlock_shared(self) -> None:
        """Stop being a reader."""
        self._units.signal(1)

    def try_lock(self) -> bool:
        """Become the writer at once, or return False. `unlock` must follow."""
        return self._units.try_wait(_EXCLUSIVE)

    def unlock(self) -> None:
        """Stop being the writer."""
        self._units.signal(_EXCLUSIVE)


class ConditionVariable:
    """Wakes those who wait for something to become true.

    Args:
        name: For messages.
    """

    def __init__(self, name: str = "condition") -> None:
        self._name = name
        self._line = _Line(name, WAITERS_MAX)
        self._broken: BaseException | None = None

    @property
    def n_waiting(self) -> int:
        """How many wait."""
        return len(self._line.queue)

    async def wait(self, until: Callable[[], bool] | None = None) -> None:
        """Wait for the next `signal`, or, with `until`, until that is true (at once, if it is)."""
        if until is None:
            await self._wait_once()
            return
        while not until():
            await self._wait_once()

    def signal(self) -> None:
        """Wake the one who waits longest."""
        while self._line.queue:
            is_waiting = not self._line.queue[0][0].done()
            self._line.serve()
            if is_waiting:
                return

    def broadcast(self) -> None:
        """Wake all who wait now."""
        for _ in range(len(self._line.queue)):
            self._line.serve()

    def broken(self, error: BaseException | None = None) -> None:
        """Fail everybody who waits, and who comes later."""
        self._broken = error or WrongState("condition", self._name, "broken", "wait for it")
        self._line.fail(self._broken)

    async def _wait_once(self) -> None:
        if self._broken is not None:
            raise self._broken
        # A wake-up that met a cancelled waiter is passed on: it may have been the only one.
        await self._line.wait(1, lambda _: self.signal(), lambda: None)


class Latch:
    """Counts down to zero once; then it stays open.

    Args:
        count: From where.
    """

    def __init__(self, count: int) -> None:
        if count < 0:
            raise InvalidArgument("latch count", count, "it must not be negative")
        self._count = count
        self._line = _Line("latch", WAITERS_MAX)

    @property
    def count(self) -> int:
        """What is left."""
        return self._count

    def count_down(self, n: int = 1) -> None:
        """Take `n` off; at zero all who wait go on.

        Raises:
            BugError: It would fall below zero.
        """
        if n > self._count:
            raise BugError(f"a latch at {self._count} was counted down by {n}")
        self._count -= n
        if self._count == 0:
            for _ in range(len(self._line.queue)):
                self._line.serve()

    async def wait(self) -> None:
        """Wait for zero."""
        if self._count:
            await self._line.wait(0, lambda _: None, lambda: None)

    async def arrive_and_wait(self) -> None:
        """Take one off and wait for zero."""
        self.count_down()
        await self.wait()


class Barrier:
    """Lets a party of `n` go on together, again and again.

    A member that is cancelled while it waits has not arrived: the others wait for another one.

    Args:
        n: How many belong to it.
    """

    def __init__(self, n: int) -> None:
        if n < 1:
            raise InvalidArgument("barrier size", n, "it must be at least 1")
        self._n = n
        self._line = _Line("barrier", WAITERS_MAX)
        self._n_rounds = 0

    @property
    def n_waiting(self) -> int:
        """How many have arrived in this round."""
        return sum(not future.done() for future, _ in self._line.queue)

    async def arrive_and_wait(self) -> int:
        """Wait until all have arrived; return the number of this round, from 0."""
        n_round = self._n_rounds
        if self.n_waiting + 1 == self._n:
            self._n_rounds += 1
            for _ in range(len(self._line.queue)):
                self._line.serve()
            return n_round
        await self._line.wait(1, lambda _: None, lambda: None)
        return n_round
