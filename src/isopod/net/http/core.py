"""Core: what all connections of one server share: its handler, clocks, caches and counts, and how a failure becomes an answer.

Counts are kept as plain numbers and handed to the metrics registry once a second while there is traffic: an addition per request instead of
a call. `statistics` is always exact.
"""

import asyncio
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

import msgspec

from isopod.net.http.encode import Blocks, http_date
from isopod.net.http.failures import answer_error
from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import Handler, Request, Response, Upgrade
from isopod.net.http.status import status_line
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.timers import TimerWheel, WheelTimer
from isopod.world.errors import IsopodError
from isopod.world.world import World

PUBLISH_S: Final = 1.0
LOOK_S: Final = 0.05
"""How often a full server looks whether upgraded connections have ended."""
STATUS_CLASSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")
DURATION_BOUNDS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_QUICK_NS: Final = 100_000
"""The first of the bounds: what most requests of plain functions stay below."""
_SECOND_NS: Final = 1_000_000_000


class HttpStatistics(msgspec.Struct, frozen=True):
    """What a listener, or all of a server's, did so far."""

    n_connections: int
    """Open now, upgraded ones included."""
    n_accepted: int
    n_rejected: int
    """Connections over `connections_max`."""
    n_refused: int
    """Requests that broke the protocol, a bound or a time-out."""
    n_upgrades: int
    responses: dict[str, int]
    """By status class, "2xx"."""
    n_bytes_received: int
    n_bytes_sent: int
    """Upgraded connections are not counted in bytes."""


class Peer(Protocol):
    """What the server wants of a connection."""

    def begin_drain(self) -> None:
        """Close now if idle, else after the response under way."""

    def cancel(self) -> None:
        """Cancel the handler."""

    def force(self) -> None:
        """Cancel the handler and cut the connection."""


class Tally:
    """The counts of one listener.

    Args:
        registry: Where they are published.
        listener: The label.
    """

    __slots__ = (
        "_counters",
        "_durations",
        "_gauge",
        "_published",
        "by_class",
        "n_accepted",
        "n_bytes_received",
        "n_bytes_sent",
        "n_connections",
        "n_quick",
        "n_quick_ns",
        "n_refused",
        "n_rejected",
        "n_upgrades",
    )

    def __init__(self, registry: Registry, listener: str) -> None:
        self.by_class = [0] * (len(STATUS_CLASSES) + 1)
        self.n_connections = self.n_accepted = self.n_rejected = self.n_refused = self.n_upgrades = 0
        self.n_bytes_received = self.n_bytes_sent = 0
        self.n_quick = self.n_quick_ns = 0  # requests within the first bound
        self._durations = registry.histogram(
            "isopod_http_request_duration_seconds", "From a request's head to its response.", DURATION_BOUNDS_S, listener=listener
        )
        self._gauge = registry.gauge("isopod_http_connections", "Open HTTP connections.", listener=listener)
        responses = [
            registry.counter("isopod_http_responses_total", "Responses by status class.", listener=listener, status=name)
            for name in STATUS_CLASSES
        ]
        self._counters = [
            *responses,
            registry.counter("isopod_http_connections_accepted_total", "Connections accepted.", listener=listener),
            registry.counter("isopod_http_connections_rejected_total", "Connections over the limit.", listener=listener),
            registry.counter(
                "isopod_http_requests_refused_total", "Requests that broke the protocol, a bound or a time-out.", listener=listener
            ),
            registry.counter("isopod_http_upgrades_total", "Connections handed to another protocol.", listener=listener),
            registry.counter("isopod_http_received_bytes_total", "Bytes received.", listener=listener),
            registry.counter("isopod_http_sent_bytes_total", "Bytes sent.", listener=listener),
        ]
        self._published = [0] * len(self._counters)

    def observe(self, duration_ns: int) -> None:
        """Count a request's duration."""
        if duration_ns <= _QUICK_NS:
            self.n_quick += 1
            self.n_quick_ns += duration_ns
        else:
            self._durations.observe(duration_ns * 1e-9)

    def publish(self) -> bool:
        """Bring the registry up to date; return whether anything had changed."""
        if self.n_quick:
            self._durations.observe_many(DURATION_BOUNDS_S[0], self.n_quick, self.n_quick_ns * 1e-9)
            self.n_quick = self.n_quick_ns = 0
        values = self._values()
        changed = values != self._published
        if changed:
            for counter, value, before in zip(self._counters, values, self._published, strict=True):
                counter.inc(value - before)
            self._published = values
        self._gauge.set(self.n_connections)
        return changed

    def statistics(self) -> HttpStatistics:
        """Return the counts now."""
        return HttpStatistics(
            self.n_connections,
            self.n_accepted,
            self.n_rejected,
            self.n_refused,
            self.n_upgrades,
            dict(zip(STATUS_CLASSES, self.by_class[1:], strict=True)),
            self.n_bytes_received,
            self.n_bytes_sent,
        )

    def _values(self) -> list[int]:
        return [
            *self.by_class[1:],
            self.n_accepted,
            self.n_rejected,
            self.n_refused,
            self.n_upgrades,
            self.n_bytes_received,
            self.n_bytes_sent,
        ]


def total(statistics: Sequence[HttpStatistics]) -> HttpStatistics:
    """Return the sum of several listeners' counts."""
    responses = {name: sum(each.responses[name] for each in statistics) for name in STATUS_CLASSES}
    names = [name for name in HttpStatistics.__struct_fields__ if name != "responses"]
    return HttpStatistics(**{name: sum(getattr(each, name) for each in statistics) for name in names}, responses=responses)


class Core:
    """One server's shared state. Made in the loop's thread.

    Args:
        world: For clocks and chance.
        handler: Answers requests.
        logger: For failures.
        limits: The bounds.
        group: In which tasks of handlers run, or None for the caller's own.
    """

    def __init__(self, world: World, handler: Handler, *, logger: Logger, limits: HttpLimits, group: SchedulingGroup | None) -> None:
        self.handler = handler
        self.limits = limits
        self.looked_bytes = min(limits.target_bytes_max, limits.head_bytes_max)
        self.logger = logger
        self.loop = asyncio.get_running_loop()
        self.time = self.loop.time
        self.now_ns = world.clock.monotonic_ns
        self.wheel = TimerWheel(self.loop)
        self.blocks = Blocks()
        self.plain_lines = self.blocks.plain
        self.is_draining = False
        self.is_closed = False
        self.connections: dict[int, Peer] = {}
        self.upgraded: dict[int, tuple[asyncio.Transport, Upgrade, Tally]] = {}
        self.tasks: dict[int, tuple[Peer, asyncio.Task[None]]] = {}
        self.tallies: list[Tally] = []
        self.on_gone: Callable[[], None] = _nothing
        self.prefixes: dict[int, bytes] = {}
        self.date_until_s = 0.0
        self._wall_ns = world.clock.now_ns
        self._token_hex = world.random.token_hex
        self._group = group
        self._date = b""
        self._publishing: WheelTimer | None = None
        self._look_at_s = 0.0
        self._n_given = 0

    # -- time ------------------------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Begin another second of wall time.

        Args:
            now_s: The loop's time; until `date_until_s` the date stays as it is.
        """
        seconds, rest_ns = divmod(self._wall_ns(), _SECOND_NS)
        self._date = f"date: {http_date(seconds)}\r\n".encode("ascii")
        self.prefixes.clear()
        self.date_until_s = now_s + (_SECOND_NS - rest_ns) / _SECOND_NS
        if self._publishing is None and not self.is_closed:
            self._publishing = self.wheel.call_later(PUBLISH_S, self._on_publish)

    def prefix(self, status: int) -> bytes:
        """Return the status line and the Date line."""
        now_s = self.time()
        if now_s >= self.date_until_s:
            self.tick(now_s)
        found = self.prefixes.get(status)
        if found is None:
            found = self.prefixes[status] = status_line(status) + self._date
        return found

    def publish(self) -> bool:
        """Bring the metrics up to date; return whether anything had changed."""
        changed = [tally.publish() for tally in self.tallies]
        return any(changed)

    # -- connections -----------------------------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """Return a number for a connection."""
        self._n_given += 1
        return self._n_given

    @property
    def is_full(self) -> bool:
        """Whether one more connection would be too many."""
        n_max = self.limits.connections_max
        if len(self.connections) + len(self.upgraded) >= n_max and self.time() >= self._look_at_s:
            # Not for each connection of a flood: looking at ten thousand takes a millisecond.
            self._look_at_s = self.time() + LOOK_S
            self.forget_closed()
        return len(self.connections) + len(self.upgraded) >= n_max

    def forget_closed(self) -> None:
        """Drop the upgraded connections that have ended: their protocols owe the server nothing, so it looks."""
        for number, (transport, _, tally) in list(self.upgraded.items()):
            if transport.is_closing():
                del self.upgraded[number]
                tally.n_connections -= 1

    def spawn(self, number: int, peer: Peer, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start the task of a connection in the server's scheduling group; it takes itself out of `tasks`."""
        group = self._group
        task = self.loop.create_task(coroutine) if group is None else self.loop.create_task(coroutine, context=group.context())
        self.tasks[number] = (peer, task)
        return task

    # -- failures --------------------------------------------------------------------------------------------------------------------

    def failure(self, request: Request | None, error: BaseException) -> Response:
        """Return the answer to a failure; one that is not the peer's business is logged, and the peer gets its id."""
        if isinstance(error, IsopodError):
            known = answer_error(error, self.limits.retry_after_s)
            if known is not None:
                return known
        number = self.report(request, error)
        return Response.error(500, "internal server error", f"the server's log knows more under the id {number}", code="internal")

    def report(self, request: Request | None, error: BaseException) -> str:
        """Log a failure that nobody but us can mend; return the id it is found under."""
        number = self._token_hex(8)
        self.logger.error(
            "http.handler_failed",
            id=number,
            method=request.method if request else "",
            path=request.raw_path if request else "",
            error=f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
        )
        return number

    def _on_publish(self) -> None:
        self.forget_closed()
        changed = self.publish()
        self._publishing = None
        if changed or self.upgraded:
            self._publishing = self.wheel.call_later(PUBLISH_S, self._on_publish)
        else:
            self.date_until_s = 0.0  # so that the next request ticks, and publishing begins again


def _nothing() -> None:
    """Nobody waits for the end of connections."""
