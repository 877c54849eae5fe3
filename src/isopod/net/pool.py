"""ConnectionPool: a bounded number of connections to one service, used by one at a time and used again.

It knows nothing about what a connection is: the caller says how one is opened, closed and looked at. The service may have several
endpoints: the first that works is used, one that failed is left alone for a while. Rules:

- never more than `n_max` open, those being opened or probed included; never one connection to two users;
- who waits gets the next free one in the order of asking, for at most `acquire_s`; over `n_waiting_max` waiters are refused at once;
- a connection whose user failed, that is no longer usable, or that fails its probe is closed, never given out;
- cancelling a waiter or a user at any point gives its place back.

A place is a permit; a connection is open only while it lies idle or somebody holds a permit for it. Whoever holds a permit takes an idle
connection first, so `idle + permits` cannot exceed the bound. Opening costs the user who needs it; only `n_idle_min` are opened ahead.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Generic, NamedTuple, TypeVar

import msgspec

from isopod.runtime.waiters import Waiters
from isopod.world.errors import DeadlineExceeded, Exhausted, InvalidArgument, UnavailableError, WrongState
from isopod.world.world import World

C = TypeVar("C")
E = TypeVar("E")
BACKOFF_FACTOR: Final = 2.0
MAINTENANCE_S_MIN: Final = 0.01
MAINTENANCE_S_MAX: Final = 10.0


class PoolLimits(msgspec.Struct, frozen=True):
    """Bounds and times, in seconds.

    Args:
        n_max: Connections open at a time.
        n_idle_min: Idle ones that maintenance keeps ready.
        n_waiting_max: Users who may wait.
        acquire_s: How long they wait, opening included.
        connect_s: For one attempt to open.
        idle_s: After which an unused connection is closed, beyond `n_idle_min`.
        health_s: An idle connection is probed this often; one idle for longer is probed before it is used.
        n_attempts: How often all endpoints are tried before opening fails.
        backoff_s: Between the first two attempts; doubles, and is jittered.
        down_s: How long an endpoint that failed is tried last.
    """

    n_max: int = 100
    n_idle_min: int = 0
    n_waiting_max: int = 1024
    acquire_s: float = 10.0
    connect_s: float = 30.0
    idle_s: float = 300.0
    health_s: float = 60.0
    n_attempts: int = 3
    backoff_s: float = 0.1
    down_s: float = 5.0


class PoolStatistics(NamedTuple):
    """What there is now, then counts since the beginning."""

    n_open: int
    n_idle: int
    n_used: int
    n_waiting: int
    n_opened: int
    n_reused: int
    n_discarded: int
    n_expired: int
    n_open_failures: int
    n_failovers: int
    n_acquire_timeouts: int


class _Slot(Generic[C, E]):
    """An open connection."""

    __slots__ = ("checked_at_ns", "connection", "endpoint", "idle_since_ns")

    def __init__(self, connection: C, endpoint: E, now_ns: int) -> None:
        self.connection = connection
        self.endpoint = endpoint
        self.idle_since_ns = now_ns
        self.checked_at_ns = now_ns


class Lease(Generic[C, E]):
    """A connection in use. Give it back by `release` or, if it may be broken, by `discard`; the second time nothing happens."""

    def __init__(self, pool: "ConnectionPool[C, E]", slot: "_Slot[C, E]") -> None:
        self._pool = pool
        self._slot = slot
        self._is_over = False

    @property
    def connection(self) -> C:
        """The connection."""
        return self._slot.connection

    @property
    def endpoint(self) -> E:
        """Where it leads."""
        return self._slot.endpoint

    def release(self) -> None:
        """Give it back for others to use."""
        if not self._is_over:
            self._is_over = True
            self._pool._give_back(self, self._slot, is_good=True)

    def discard(self) -> None:
        """Close it."""
        if not self._is_over:
            self._is_over = True
            self._pool._give_back(self, self._slot, is_good=False)


class ConnectionPool(Generic[C, E]):
    """The pool. Who made it closes it.

    Args:
        world: The ports.
        endpoints: Where connections may lead, the preferred first.
        connect: Opens one; what it raises counts as a failure of the endpoint.
        close: Closes one, without waiting.
        is_usable: A look at a connection before it is given out, without waiting.
        probe: Asks over an idle connection whether the service still answers; None for no such question.
        limits: Bounds and times.
        name: For messages.

    Raises:
        InvalidArgument: No endpoint, or limits that contradict each other.
    """

    def __init__(
        self,
        world: World,
        endpoints: Sequence[E],
        *,
        connect: Callable[[E], Awaitable[C]],
        close: Callable[[C], None],
        is_usable: Callable[[C], bool] = lambda _: True,
        probe: Callable[[C], Awaitable[bool]] | None = None,
        limits: PoolLimits | None = None,
        name: str = "pool",
    ) -> None:
        self._limits = limits or PoolLimits()
        if not endpoints:
            raise InvalidArgument("endpoints", "", "a pool needs at least one")
        if not 0 <= self._limits.n_idle_min <= self._limits.n_max or self._limits.n_max < 1:
            raise InvalidArgument("n_max", self._limits.n_max, "must be at least 1, and at least n_idle_min")
        self._world = world
        self._endpoints = tuple(endpoints)
        self._down_until_ns = [0] * len(self._endpoints)
        self._connect = connect
        self._close = close
        self._is_usable = is_usable
        self._probe = probe
        self._name = name
        self._chance = world.random.stream("net.pool")
        self._idle: deque[_Slot[C, E]] = deque()
        self._leases: dict[Lease[C, E], None] = {}
        self._n_permits = 0
        self._n_open = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._emptied = Waiters()
        self._maintenance: asyncio.Task[None] | None = None
        self._is_closed = False
        self._counts = dict.fromkeys(("opened", "reused", "discarded", "expired", "failures", "failovers", "timeouts"), 0)

    async def acquire(self) -> Lease[C, E]:
        """Take a connection: an idle one, or a new one.

        Returns:
            The lease, which must be released or discarded.

        Raises:
            WrongState: The pool is closed.
            Exhausted: Too many wait already.
            DeadlineExceeded: None was free, and none opened, in `acquire_s`.
            UnavailableError: No endpoint could be connected to.
        """
        if self._is_closed:
            raise WrongState("pool", self._name, "closed", "acquire a connection")
        self._start_maintenance()
        try:
            async with asyncio.timeout(self._limits.acquire_s):
                await self._take_permit()
                try:
                    slot = await self._find()
                except BaseException:
                    self._return_permit()
                    raise
        except TimeoutError as error:
            self._counts["timeouts"] += 1
            raise DeadlineExceeded(f"waiting for a connection of {self._name}", self._limits.acquire_s) from error
        lease = Lease(self, slot)
        self._leases[lease] = None
        return lease

    @asynccontextmanager
    async def use(self) -> AsyncIterator[C]:
        """Use a connection for the length of an `async with` block; a block that fails or is cancelled discards it. Raises as `acquire`."""
        lease = await self.acquire()
        try:
            yield lease.connection
        except BaseException:
            lease.discard()
            raise
        lease.release()

    def statistics(self) -> PoolStatistics:
        """Return the counts."""
        counts = self._counts
        return PoolStatistics(
            self._n_open,
            len(self._idle),
            len(self._leases),
            sum(not future.done() for future in self._waiting),
            counts["opened"],
            counts["reused"],
            counts["discarded"],
            counts["expired"],
            counts["failures"],
            counts["failovers"],
            counts["timeouts"],
        )

    async def close(self, deadline_s: float = 0.0) -> bool:
        """Refuse new users, close what is idle, and wait for those who have a connection.

        Args:
            deadline_s: How long they have; then their connections are closed under them.

        Returns:
            Whether all were given back in time.
        """
        self._is_closed = True
        task, self._maintenance = self._maintenance, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for future in self._waiting:
            if not future.done():
                future.set_exception(WrongState("pool", self._name, "closed", "acquire a connection"))
        while self._idle:
            self._drop(self._idle.pop())
        try:
            async with asyncio.timeout(deadline_s):
                while self._leases:
                    await self._emptied.wait()
        except TimeoutError:
            for lease in list(self._leases):
                lease.discard()
            return False
        return True

    # -- permits -----------------------------------------------------------------------------------------------------------------------

    async def _take_permit(self) -> None:
        if self._n_permits < self._limits.n_max and not self._waiting:
            self._n_permits += 1
            return
        if len(self._waiting) >= self._limits.n_waiting_max:
            raise Exhausted(
                f"connections of {self._name}", f"{self._limits.n_max} are in use and {len(self._waiting)} wait", "try again later"
            )
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        try:
            await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._return_permit()  # it was handed over while we were being cancelled
            raise
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def _return_permit(self) -> None:
        """Hand the permit to who waits longest, else put it back."""
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                return
        self._n_permits -= 1

    # -- connections -------------------------------------------------------------------------------------------------------------------

    async def _find(self) -> "_Slot[C, E]":
        """Return a good idle connection, the one used last first, or a new one. The caller holds a permit."""
        while self._idle:
            slot = self._idle.pop()
            if await self._is_good(slot):
                self._counts["reused"] += 1
                return slot
        return await self._open()

    async def _is_good(self, slot: "_Slot[C, E]") -> bool:
        """Look at a connection that was idle; a bad one is closed."""
        try:
            good = self._is_usable(slot.connection)
            if good and self._probe is not None and self._age_s(slot.checked_at_ns) >= self._limits.health_s:
                async with asyncio.timeout(self._limits.connect_s):
                    good = await self._probe(slot.connection)
                slot.checked_at_ns = self._world.clock.monotonic_ns()
        except Exception:  # noqa: BLE001 - whatever a probe raises means no, and must not end the maintenance
            good = False
        except BaseException:
            self._discard(slot)
            raise
        if not good:
            self._discard(slot)
        return good

    async def _open(self) -> "_Slot[C, E]":
        """Open a connection. The caller holds a permit."""
        self._n_open += 1
        try:
            connection, endpoint = await self._try_endpoints()
        except BaseException:
            self._n_open -= 1
            raise
        self._counts["opened"] += 1
        return _Slot(connection, endpoint, self._world.clock.monotonic_ns())

    async def _try_endpoints(self) -> tuple[C, E]:
        failure: Exception | None = None
        backoff_s = self._limits.backoff_s
        for attempt in range(self._limits.n_attempts):
            if attempt:
                await asyncio.sleep(backoff_s * self._chance.uniform(0.5, 1.0))
                backoff_s *= BACKOFF_FACTOR
            for index in self._order():
                try:
                    async with asyncio.timeout(self._limits.connect_s):
                        connection = await self._connect(self._endpoints[index])
                except Exception as error:  # noqa: BLE001 - whatever it raises counts, and must not end the maintenance
                    failure = error
                    self._counts["failures"] += 1
                    self._down_until_ns[index] = self._world.clock.monotonic_ns() + round(self._limits.down_s * 1e9)
                else:
                    self._down_until_ns[index] = 0
                    self._counts["failovers"] += index > 0
                    return connection, self._endpoints[index]
        why = str(failure) or "no answer in time"
        raise UnavailableError(f"{self._name}: no connection after {self._limits.n_attempts} attempts: {why}") from failure

    def _order(self) -> list[int]:
        """Return the endpoints, those that failed lately last."""
        now_ns = self._world.clock.monotonic_ns()
        return sorted(range(len(self._endpoints)), key=lambda index: (self._down_until_ns[index] > now_ns, index))

    def _give_back(self, lease: Lease[C, E], slot: "_Slot[C, E]", *, is_good: bool) -> None:
        del self._leases[lease]
        if not self._leases:
            self._emptied.wake()
        if is_good and not self._is_closed and self._is_usable(slot.connection):
            slot.idle_since_ns = slot.checked_at_ns = self._world.clock.monotonic_ns()
            self._idle.append(slot)
        else:
            self._discard(slot)
        self._return_permit()

    def _discard(self, slot: "_Slot[C, E]") -> None:
        self._counts["discarded"] += 1
        self._drop(slot)

    def _drop(self, slot: "_Slot[C, E]") -> None:
        self._n_open -= 1
        self._close(slot.connection)

    def _age_s(self, since_ns: int) -> float:
        return (self._world.clock.monotonic_ns() - since_ns) / 1e9

    # -- maintenance -------------------------------------------------------------------------------------------------------------------

    def _start_maintenance(self) -> None:
        if self._maintenance is None:
            self._maintenance = asyncio.get_running_loop().create_task(self._maintain(), name=f"{self._name}-maintenance")

    async def _maintain(self) -> None:
        shortest_s = min(self._limits.idle_s, self._limits.health_s) / 2
        pause_s = min(max(shortest_s, MAINTENANCE_S_MIN), MAINTENANCE_S_MAX)
        while True:
            await asyncio.sleep(pause_s)
            self._expire()
            await self._probe_idle()
            await self._fill()

    def _expire(self) -> None:
        """Close what was unused for too long, the longest unused first."""
        while len(self._idle) > self._limits.n_idle_min and self._age_s(self._idle[0].idle_since_ns) >= self._limits.idle_s:
            self._counts["expired"] += 1
            self._drop(self._idle.popleft())

    async def _probe_idle(self) -> None:
        """Probe what has not been looked at for long; each under a permit, so that the bound holds."""
        for _ in range(len(self._idle)):
            if not self._idle or self._n_permits >= self._limits.n_max or self._waiting:
                return
            slot = self._idle.popleft()
            self._n_permits += 1
            try:
                if await self._is_good(slot):
                    self._idle.append(slot)
            finally:
                self._return_permit()

    async def _fill(self) -> None:
        """Open ahead of need, as far as the bound allows; failures are counted, and tried again next time."""
        while (
            len(self._idle) < self._limits.n_idle_min
            and self._n_open < self._limits.n_max
            and self._n_permits < self._limits.n_max
            and not self._waiting
        ):
            self._n_permits += 1
            try:
                self._idle.append(await self._open())
            except UnavailableError:
                return
            finally:
                self._return_permit()
