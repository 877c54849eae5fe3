"""Balancing: which of several backends gets the next request, and which gets none at present.

A `Balancer` keeps backends with their state; a `Strategy` picks one of those that may be asked. Health, from what requests and probes
report:

    state       a request or probe fails               a request succeeds    a probe succeeds
    HEALTHY     DEGRADED                               HEALTHY               HEALTHY
    DEGRADED    UNHEALTHY after `n_failures` in a row  HEALTHY               HEALTHY
    UNHEALTHY   UNHEALTHY                              UNHEALTHY             HEALTHY after `n_successes` in a row

DEGRADED backends are still asked, so that one lost packet empties nothing. UNHEALTHY ones are asked by the probe only: requests of users
that were under way when a backend fell do not bring it back. Backends come and go while in use.
"""

import asyncio
import enum
import hashlib
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from isopod.world.errors import AlreadyExists, InvalidArgument, IsopodError, NotFound, UnavailableError
from isopod.world.world import World

T = TypeVar("T")
EWMA_SHARE: Final = 0.2
"""How much the newest response time counts."""
_HASH_BYTES: Final = 8


class BackendState(enum.Enum):
    """Whether a backend is asked."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


class HealthLimits(msgspec.Struct, frozen=True):
    """When a backend leaves and returns; times in seconds.

    Args:
        n_failures: Failures in a row until it leaves.
        n_successes: Successful probes in a row until it returns.
        probe_interval_s: Between two probes of one backend.
        probe_s: How long one probe may take.
        n_active_max: Requests under way at one backend before it is passed over.
    """

    n_failures: int = 3
    n_successes: int = 2
    probe_interval_s: float = 5.0
    probe_s: float = 2.0
    n_active_max: int = 100


class BackendStatistics(NamedTuple):
    """One backend's facts."""

    name: str
    state: BackendState
    weight: int
    n_active: int
    n_requests: int
    n_failures: int
    response_s: float | None
    """Smoothed; None before the first."""


class Backend(Generic[T]):
    """One backend. Made by `Balancer.add`.

    Args:
        name: Its name; what it is hashed by.
        target: What a user needs to reach it.
        weight: Its share with the weighted strategies, at least 1.
    """

    def __init__(self, name: str, target: T, weight: int) -> None:
        self.name = name
        self.target = target
        self.weight = weight
        self.state = BackendState.HEALTHY
        self.n_active = 0
        self.n_requests = 0
        self.n_failures = 0
        self.response_s: float | None = None
        self.credit = 0
        """Of the weighted round robin."""
        self.n_failures_in_row = 0
        self.n_successes_in_row = 0

    def statistics(self) -> BackendStatistics:
        """Return its facts."""
        return BackendStatistics(self.name, self.state, self.weight, self.n_active, self.n_requests, self.n_failures, self.response_s)


class Strategy(Protocol):
    """Picks a backend."""

    def pick(self, backends: Sequence[Backend[T]], key: bytes) -> Backend[T]:
        """Return one of `backends` (never empty), all of which may be asked; `key` says who asks."""


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, backends: Sequence[Backend[T]], key: bytes) -> Backend[T]:
        """See `Strategy.pick`."""
        self._turn += 1
        return backends[(self._turn - 1) % len(backends)]


class LeastConnections:
    """The one with the fewest requests under way, by weight; of equals, one after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, backends: Sequence[Backend[T]], key: bytes) -> Backend[T]:
        """See `Strategy.pick`."""
        self._turn += 1
        start = self._turn % len(backends)
        rotated = [*backends[start:], *backends[:start]]
        return min(rotated, key=lambda backend: backend.n_active / backend.weight)


class IpHash:
    """The same one for the same key, as long as it may be asked; when one leaves, only its own keys move (weighted rendezvous hashing)."""

    def pick(self, backends: Sequence[Backend[T]], key: bytes) -> Backend[T]:
        """See `Strategy.pick`."""
        return max(backends, key=lambda backend: _score(backend, key))


class ResponseTime:
    """The one that answered fastest of late, its load counted in; one that was never asked comes first."""

    def pick(self, backends: Sequence[Backend[T]], key: bytes) -> Backend[T]:
        """See `Strategy.pick`."""
        return min(backends, key=lambda backend: (backend.response_s or 0.0, 0.0) if backend.n_active == 0 else _expected_s(backend))


class Weighted:
    """By weight, evenly spread (smooth weighted round robin): 5:1 gives a a a b a a, not a a a a a b."""

    def pick(self, backends: Sequence[Backend[T]], key: bytes) -> Backend[T]:
        """See `Strategy.pick`."""
        for backend in backends:
            backend.credit += backend.weight
        picked = max(backends, key=lambda backend: backend.credit)
        picked.credit -= sum(backend.weight for backend in backends)
        return picked


class RandomChoice:
    """Any, by weight.

    Args:
        world: For chance.
    """

    def __init__(self, world: World) -> None:
        self._chance = world.random.stream("net.balancer")

    def pick(self, backends: Sequence[Backend[T]], key: bytes) -> Backend[T]:
        """See `Strategy.pick`."""
        return self._chance.choices(backends, [backend.weight for backend in backends])[0]


class RandomOfTwo:
    """The less busy of two picked at random: nearly as even as the least busy of all, without a herd running to it.

    Args:
        world: For chance.
    """

    def __init__(self, world: World) -> None:
        self._chance = world.random.stream("net.balancer")

    def pick(self, backends: Sequence[Backend[T]], key: bytes) -> Backend[T]:
        """See `Strategy.pick`."""
        pair = self._chance.sample(backends, min(2, len(backends)))
        return min(pair, key=lambda backend: backend.n_active / backend.weight)


class Balancer(Generic[T]):
    """Backends, their health and who gets the next request. With a probe, `start` it and `close` it.

    Args:
        world: The ports.
        strategy: Picks one.
        probe: Asks a backend whether it is well: False and what it raises mean no. Without one, a backend that left never returns.
        limits: When backends leave and return.
    """

    def __init__(
        self,
        world: World,
        strategy: Strategy,
        *,
        probe: Callable[[T], Awaitable[bool]] | None = None,
        limits: HealthLimits | None = None,
    ) -> None:
        self._world = world
        self._strategy = strategy
        self._probe = probe
        self._limits = limits or HealthLimits()
        self._backends: dict[str, Backend[T]] = {}
        self._probing: asyncio.Task[None] | None = None

    def add(self, name: str, target: T, *, weight: int = 1) -> Backend[T]:
        """Add a backend; it is asked from now on.

        Raises:
            AlreadyExists: There is one of that name.
            InvalidArgument: The weight is below 1.
        """
        if name in self._backends:
            raise AlreadyExists("backend", name)
        if weight < 1:
            raise InvalidArgument("weight", weight, "must be at least 1")
        backend = self._backends[name] = Backend(name, target, weight)
        return backend

    def remove(self, name: str) -> None:
        """Ask a backend no more; requests under way go on.

        Raises:
            NotFound: There is none of that name.
        """
        if name not in self._backends:
            raise NotFound("backend", name)
        del self._backends[name]

    def backends(self) -> tuple[Backend[T], ...]:
        """Return all backends, oldest first."""
        return tuple(self._backends.values())

    def pick(self, key: bytes = b"") -> Backend[T]:
        """Return who gets the next request. Report how it went by `report`, or use `request`, which does both.

        Args:
            key: Who asks, for `IpHash`: the address of the client.

        Raises:
            UnavailableError: No backend may be asked at present.
        """
        usable = [
            backend
            for backend in self._backends.values()
            if backend.state is not BackendState.UNHEALTHY and backend.n_active < self._limits.n_active_max
        ]
        if not usable:
            raise UnavailableError(f"none of {len(self._backends)} backends can be asked at present", "look at their health")
        return self._strategy.pick(usable, key)

    @contextmanager
    def request(self, key: bytes = b"") -> Iterator[Backend[T]]:
        """Pick a backend for the length of a `with` block, which may await; how long it took and whether it failed is reported.

        Cancellation and the caller's own mistakes (errors with an exit code below 3) are no failures of the backend.

        Raises:
            UnavailableError: No backend may be asked at present.
        """
        backend = self.pick(key)
        backend.n_active += 1
        began_ns = self._world.clock.monotonic_ns()
        try:
            yield backend
        except Exception as error:
            backend.n_active -= 1
            self.report(backend, ok=isinstance(error, IsopodError) and error.exit_code < 3)
            raise
        except BaseException:
            backend.n_active -= 1
            raise
        backend.n_active -= 1
        self.report(backend, ok=True, response_s=(self._world.clock.monotonic_ns() - began_ns) / 1e9)

    def report(self, backend: Backend[T], *, ok: bool, response_s: float | None = None) -> None:
        """Count a finished request.

        Args:
            backend: Who was asked.
            ok: Whether it answered as it should.
            response_s: How long it took.
        """
        backend.n_requests += 1
        if response_s is not None:
            known = backend.response_s
            backend.response_s = response_s if known is None else known + EWMA_SHARE * (response_s - known)
        if not ok:
            backend.n_failures += 1
            self._on_failure(backend)
        elif backend.state is not BackendState.UNHEALTHY:
            backend.n_failures_in_row = 0
            backend.state = BackendState.HEALTHY

    def statistics(self) -> tuple[BackendStatistics, ...]:
        """Return every backend's facts, oldest first."""
        return tuple(backend.statistics() for backend in self._backends.values())

    def start(self) -> None:
        """Begin to probe, if there is a probe."""
        if self._probe is not None and self._probing is None:
            self._probing = asyncio.get_running_loop().create_task(self._probe_for_ever(), name="balancer-probe")

    async def close(self) -> None:
        """Stop probing."""
        task, self._probing = self._probing, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def probe_all(self) -> None:
        """Probe every backend once, all at the same time."""
        await asyncio.gather(*(self._probe_one(backend) for backend in self.backends()))

    async def _probe_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._limits.probe_interval_s)
            await self.probe_all()

    async def _probe_one(self, backend: Backend[T]) -> None:
        assert self._probe is not None
        try:
            async with asyncio.timeout(self._limits.probe_s):
                ok = await self._probe(backend.target)
        except Exception:  # noqa: BLE001 - whatever it raises means no, and must not end the probing of the others
            ok = False
        if not ok:
            self._on_failure(backend)
            return
        backend.n_failures_in_row = 0
        backend.n_successes_in_row += 1
        if backend.state is not BackendState.UNHEALTHY or backend.n_successes_in_row >= self._limits.n_successes:
            backend.state = BackendState.HEALTHY

    def _on_failure(self, backend: Backend[T]) -> None:
        backend.n_failures_in_row += 1
        backend.n_successes_in_row = 0
        if backend.n_failures_in_row >= self._limits.n_failures:
            backend.state = BackendState.UNHEALTHY
        elif backend.state is BackendState.HEALTHY:
            backend.state = BackendState.DEGRADED


def _expected_s(backend: Backend[T]) -> tuple[float, float]:
    """Return what the next request is likely to take behind those under way."""
    known = backend.response_s
    return (0.0, backend.n_active) if known is None else (known * (backend.n_active + 1), 0.0)


def _score(backend: Backend[T], key: bytes) -> float:
    """Return a backend's claim on a key: the highest wins (weighted rendezvous hashing)."""
    digest = hashlib.blake2b(key + b"\0" + backend.name.encode(), digest_size=_HASH_BYTES).digest()
    fraction = (int.from_bytes(digest, "big") + 1) / (1 << (8 * _HASH_BYTES))
    return -backend.weight / math.log(fraction) if fraction < 1 else math.inf
