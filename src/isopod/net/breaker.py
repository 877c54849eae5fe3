"""CircuitBreaker: stops asking a service that fails, and lets one question through now and then to see whether it is back.

    state      event      next
    CLOSED     trip       OPEN         the rate of failures in the window is over the bound
    OPEN       wait       HALF_OPEN    `open_s` have passed
    HALF_OPEN  succeed    CLOSED       after `n_successes` questions in a row went well
    HALF_OPEN  fail       OPEN

Time is looked at when somebody asks; there are no timers. Calls that end after the state has changed count for nothing: they tell about the
service as it was. Source: Nygard, "Release It!", stability patterns.
"""

import enum
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeVar

import msgspec

from isopod.world.errors import InvalidArgument, IsopodError, UnavailableError
from isopod.world.world import World

T = TypeVar("T")
N_BUCKETS: Final = 10
"""The window moves in steps of a tenth of its length."""


class BreakerState(enum.Enum):
    """Whether questions are let through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class BreakerEvent(enum.Enum):
    """What changes the state."""

    TRIP = "trip"
    WAIT = "wait"
    SUCCEED = "succeed"
    FAIL = "fail"


TRANSITIONS: Final = {
    (BreakerState.CLOSED, BreakerEvent.TRIP): BreakerState.OPEN,
    (BreakerState.OPEN, BreakerEvent.WAIT): BreakerState.HALF_OPEN,
    (BreakerState.HALF_OPEN, BreakerEvent.SUCCEED): BreakerState.CLOSED,
    (BreakerState.HALF_OPEN, BreakerEvent.FAIL): BreakerState.OPEN,
}
"""Every other pair leaves the state as it is."""


class BreakerLimits(msgspec.Struct, frozen=True):
    """When to trip and when to try again; times in seconds.

    Args:
        window_s: Over which failures are counted.
        n_calls_min: Calls in the window before their rate says anything.
        failure_rate: The share of failures (0 to 1] at which it trips.
        open_s: How long nothing is let through.
        n_successes: Good answers in a row that close it again.
    """

    window_s: float = 10.0
    n_calls_min: int = 10
    failure_rate: float = 0.5
    open_s: float = 5.0
    n_successes: int = 1


class BreakerStatistics(NamedTuple):
    """The state, the window now, and counts since the beginning."""

    state: BreakerState
    n_calls: int
    n_failures: int
    n_refused: int
    n_trips: int


class CircuitBreaker:
    """Guards the calls to one service.

    Args:
        world: For the time.
        name: Of the service, for messages.
        limits: When to trip.
        counts: Whether an exception is the service's failure; by default all but cancellation and the caller's own mistakes.

    Raises:
        InvalidArgument: The limits make no sense.
    """

    def __init__(
        self, world: World, name: str, *, limits: BreakerLimits | None = None, counts: Callable[[BaseException], bool] | None = None
    ) -> None:
        self._limits = limits or BreakerLimits()
        if not 0 < self._limits.failure_rate <= 1 or self._limits.window_s <= 0 or self._limits.open_s <= 0:
            raise InvalidArgument("breaker limits", self._limits, "want a rate above 0 and at most 1, and positive times")
        self._world = world
        self._name = name
        self._counts = counts or _is_failure
        self._state = BreakerState.CLOSED
        self._epoch = 0
        self._buckets: deque[list[int]] = deque()  # [number of the bucket, calls, failures]
        self._opened_at_ns = 0
        self._n_good = 0
        self._is_probing = False
        self._n_refused = 0
        self._n_trips = 0

    @property
    def state(self) -> BreakerState:
        """The state now."""
        self._look_at_clock()
        return self._state

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Let a call through, for the length of a `with` block (which may await); what it raises is counted and raised.

        Raises:
            UnavailableError: The service fails at present; nothing was asked.
        """
        epoch = self._enter()
        try:
            yield
        except BaseException as error:
            self._leave(epoch, is_failure=self._counts(error), is_answer=isinstance(error, Exception))
            raise
        self._leave(epoch, is_failure=False, is_answer=True)

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Await `function()` under the guard. Raises as `guard`, and what the function raises."""
        with self.guard():
            return await function()

    def statistics(self) -> BreakerStatistics:
        """Return the state and the counts."""
        self._look_at_clock()
        n_calls, n_failures = self._window()
        return BreakerStatistics(self._state, n_calls, n_failures, self._n_refused, self._n_trips)

    def _enter(self) -> int:
        self._look_at_clock()
        if self._state is BreakerState.OPEN or (self._state is BreakerState.HALF_OPEN and self._is_probing):
            self._n_refused += 1
            raise UnavailableError(f"{self._name} fails at present and is not asked", f"try again in {self._limits.open_s:g} s")
        self._is_probing = self._state is BreakerState.HALF_OPEN
        return self._epoch

    def _leave(self, epoch: int, *, is_failure: bool, is_answer: bool) -> None:
        if epoch != self._epoch:
            return
        if self._state is BreakerState.HALF_OPEN:
            self._is_probing = False
            if is_failure:
                self._happen(BreakerEvent.FAIL)
            elif is_answer:
                self._n_good += 1
                if self._n_good >= self._limits.n_successes:
                    self._happen(BreakerEvent.SUCCEED)
            return
        if not is_answer:
            return
        self._count(is_failure)
        n_calls, n_failures = self._window()
        if is_failure and n_calls >= self._limits.n_calls_min and n_failures >= self._limits.failure_rate * n_calls:
            self._happen(BreakerEvent.TRIP)

    def _look_at_clock(self) -> None:
        if self._state is BreakerState.OPEN and self._now_ns() - self._opened_at_ns >= self._limits.open_s * 1e9:
            self._happen(BreakerEvent.WAIT)

    def _happen(self, event: BreakerEvent) -> None:
        self._state = TRANSITIONS.get((self._state, event), self._state)
        self._epoch += 1
        self._buckets.clear()
        self._n_good = 0
        self._is_probing = False
        if self._state is BreakerState.OPEN:
            self._opened_at_ns = self._now_ns()
            self._n_trips += 1

    def _count(self, is_failure: bool) -> None:
        number = self._bucket()
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append([number, 0, 0])
        self._buckets[-1][1] += 1
        self._buckets[-1][2] += is_failure

    def _window(self) -> tuple[int, int]:
        oldest = self._bucket() - N_BUCKETS
        while self._buckets and self._buckets[0][0] <= oldest:
            self._buckets.popleft()
        return sum(bucket[1] for bucket in self._buckets), sum(bucket[2] for bucket in self._buckets)

    def _bucket(self) -> int:
        return int(self._now_ns() // (self._limits.window_s * 1e9 / N_BUCKETS))

    def _now_ns(self) -> int:
        return self._world.clock.monotonic_ns()


def _is_failure(error: BaseException) -> bool:
    """Peers, the machine and bugs are failures of the service; usage and refusals are answers."""
    if isinstance(error, IsopodError):
        return error.exit_code >= 3
    return isinstance(error, Exception)
