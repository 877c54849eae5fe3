"""ShutdownCoordinator: everything that must be closed, closed in phases.

Phases run one after the other in the order below; within a phase all resources close at the same time, each under a deadline
of its own. A resource that fails or is late is logged and does not stop the others: the way down always reaches the end.

    STOP_ACCEPTING -> DRAIN_CONNECTIONS -> STOP_TIMERS -> STOP_METRICS -> STOP_REACTORS -> FINAL_CLEANUP

Three deadlines bound it: a resource's, a phase's (what is left of the phase is late, and the next one begins), and that of the whole (all
that is left is forced). `force` does the last at once. Code that only wants to know that the way down has begun asks `stopping`.

Source: the phases of the reference framework (row S6). Signals are not handled here: `ShutdownSignals` says what each one means, and
`world.host.daemon` receives them.
"""

import asyncio
import enum
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from isopod.runtime.abort import AbortSource
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.tasks import TaskGroup
from isopod.world.clock import Clock
from isopod.world.errors import AlreadyExists, WrongState

RESOURCE_TIMEOUT_S: Final = 30.0
PHASE_TIMEOUT_S: Final = 60.0
GLOBAL_TIMEOUT_S: Final = 300.0
CANCEL_GRACE_S: Final = 1.0
"""How long a cancelled close may take to clean up."""


class ShutdownPhase(enum.IntEnum):
    """The order of the way down."""

    STOP_ACCEPTING = 0
    DRAIN_CONNECTIONS = 1
    STOP_TIMERS = 2
    STOP_METRICS = 3
    STOP_REACTORS = 4
    FINAL_CLEANUP = 5


DUMPED_PER_LINE: Final = 48
"""Metrics in one log line, which is bounded."""
Outcome = Literal["closed", "failed", "late", "forced"]


@dataclass(frozen=True, slots=True)
class ShutdownResource:
    """One thing to close.

    Args:
        name: Unique among all.
        phase: When.
        close: Closes it; cancelled when its deadline is over.
        timeout_s: That deadline.
        force: What to do instead when there is no time (after a late or forced `close`); must not block.
    """

    name: str
    phase: ShutdownPhase
    close: Callable[[], Awaitable[object]]
    timeout_s: float = RESOURCE_TIMEOUT_S
    force: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """How it went: (name, outcome) in the order of phases and, within one, of registration."""

    reason: str
    duration_s: float
    outcomes: tuple[tuple[str, Outcome], ...]

    @property
    def is_clean(self) -> bool:
        """Whether everything closed by itself."""
        return all(outcome == "closed" for _, outcome in self.outcomes)


@dataclass(frozen=True, slots=True)
class ShutdownStatus:
    """Where the way down is.

    Args:
        phase: The phase under way, None before and after.
        begun: Whether it has begun.
        forced: Whether nothing is waited for any more.
        registered: Names of all resources, in the order of registration.
        closing: Those being closed.
        finished: Those that are done, with their outcomes.
    """

    phase: str | None
    begun: bool
    forced: bool
    registered: tuple[str, ...]
    closing: tuple[str, ...]
    finished: tuple[tuple[str, Outcome], ...]


class ShutdownCoordinator:
    """Keeps the resources and leads them down once.

    Args:
        logger: Gets one line per resource and one at the end.
        clock: For durations.
        timeout_s: Deadline of the whole; after it the rest is forced.
        phase_timeouts_s: Deadlines of phases; 60 s for those not named.
    """

    def __init__(
        self,
        logger: Logger,
        clock: Clock,
        *,
        timeout_s: float = GLOBAL_TIMEOUT_S,
        phase_timeouts_s: Mapping[ShutdownPhase, float] | None = None,
    ) -> None:
        self._logger = logger
        self._clock = clock
        self._timeout_s = timeout_s
        self._phase_timeouts_s = dict(phase_timeouts_s or {})
        self._is_phase_late = False
        self._stopping = AbortSource("shutdown")
        self._resources: dict[str, ShutdownResource] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._closing: dict[str, asyncio.Task[None]] = {}
        self._left_behind: list[asyncio.Task[None]] = []
        self._phase: ShutdownPhase | None = None
        self._begun = False
        self._forced = False
        self._report: asyncio.Future[ShutdownReport] | None = None

    @property
    def current_phase(self) -> ShutdownPhase | None:
        """The phase under way; None before and after."""
        return self._phase

    @property
    def has_begun(self) -> bool:
        """Whether `shutdown` was called."""
        return self._begun

    @property
    def is_forced(self) -> bool:
        """Whether nothing is waited for any more."""
        return self._forced

    @property
    def stopping(self) -> AbortSource:
        """Aborts when the way down begins, before its first phase; its reason is that of `shutdown`."""
        return self._stopping

    def status(self) -> ShutdownStatus:
        """Return what is registered, and how far the way down is."""
        return ShutdownStatus(
            phase=None if self._phase is None else self._phase.name.lower(),
            begun=self._begun,
            forced=self._forced,
            registered=tuple(self._resources),
            closing=tuple(self._closing),
            finished=tuple(self._outcomes.items()),
        )

    def register(self, resource: ShutdownResource) -> None:
        """Add something to close.

        Raises:
            AlreadyExists: The name is taken.
            WrongState: The way down has begun.
        """
        if self._begun:
            raise WrongState("shutdown", resource.name, "under way", "register")
        if resource.name in self._resources:
            raise AlreadyExists("shutdown resource", resource.name)
        self._resources[resource.name] = resource

    def unregister(self, name: str) -> None:
        """Forget a resource that was closed otherwise; unknown names are fine."""
        if not self._begun:
            self._resources.pop(name, None)

    async def shutdown(self, reason: str) -> ShutdownReport:
        """Close everything.

        Whoever calls second waits for the first call's end. Cancelling the first call forces what is left.

        Args:
            reason: For the log ("SIGTERM").
        """
        if self._report is not None:
            return await asyncio.shield(self._report)
        self._begun = True
        self._report = asyncio.get_running_loop().create_future()
        started_ns = self._clock.monotonic_ns()
        self._tell(reason)
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self.force)
        try:
            await self._run_phases()
        except asyncio.CancelledError:
            self.force()
            await self._run_phases()  # every close is now forced: this does not wait
            raise
        finally:
            timer.cancel()
            self._phase = None
            report = self._make_report(reason, started_ns)
            self._report.set_result(report)
        return report

    def force(self) -> None:
        """Stop waiting: cancel every close under way, and call only `force` of what comes after."""
        self._forced = True
        for task in list(self._closing.values()):
            task.cancel()

    async def _run_phases(self) -> None:
        for phase in ShutdownPhase:
            due = [r for r in self._resources.values() if r.phase is phase and r.name not in self._outcomes]
            if not due:
                continue
            self._phase = phase
            if self._forced:
                for resource in due:
                    self._finish(resource, "forced", "")
                continue
            self._is_phase_late = False
            timeout_s = self._phase_timeouts_s.get(phase, PHASE_TIMEOUT_S)
            timer = asyncio.get_running_loop().call_later(timeout_s, self._end_phase)
            try:
                async with TaskGroup(f"shutdown-{phase.name.lower()}") as group:
                    for resource in due:
                        self._closing[resource.name] = group.create_task(self._close(resource), name=f"close-{resource.name}")
            finally:
                timer.cancel()
            for resource in due:
                if resource.name not in self._outcomes:  # its task was cancelled before the first step, and never saw that
                    self._closing.pop(resource.name, None)
                    self._finish(resource, self._cut(), "cancelled before it began")

    def _end_phase(self) -> None:
        """Stop waiting for what is left of the present phase."""
        self._is_phase_late = True
        self._logger.warning("shutdown.phase_late", phase=None if self._phase is None else self._phase.name.lower())
        for task in list(self._closing.values()):
            task.cancel()

    def _cut(self) -> Outcome:
        """Return what became of a close that was cancelled."""
        return "late" if self._is_phase_late and not self._forced else "forced"

    def _tell(self, reason: str) -> None:
        try:
            self._stopping.request_abort(reason)
        except ExceptionGroup as failures:
            for failure in failures.exceptions:
                self._logger.error("shutdown.subscriber_failed", why=f"{type(failure).__name__}: {failure}")

    async def _close(self, resource: ShutdownResource) -> None:
        """Close one resource; the root of its task, so no failure leaves it."""
        outcome: Outcome = "closed"
        why = ""
        timer = asyncio.timeout(resource.timeout_s)
        # A task of its own, so that one that swallows its cancellation cannot hold up the way down.
        work = asyncio.get_running_loop().create_task(_await(resource.close), name=f"shut-{resource.name}")
        try:
            async with timer:
                await asyncio.shield(work)
        except asyncio.CancelledError:
            outcome = self._cut()
            why = f"phase {resource.phase.name.lower()} is over" if outcome == "late" else ""
            own = asyncio.current_task()
            assert own is not None
            own.uncancel()  # it ends here; a time-out below would take it for its own
        except Exception as error:  # noqa: BLE001 - a task's root
            outcome = "late" if timer.expired() else "failed"
            why = f"{type(error).__name__}: {error}"
        finally:
            self._closing.pop(resource.name, None)
        if not work.done():
            await self._cancel(resource, work)
        self._finish(resource, outcome, why)

    async def _cancel(self, resource: ShutdownResource, work: asyncio.Task[None]) -> None:
        """Cancel a close that takes too long; one that does not even end then is left behind, and logged."""
        ended = asyncio.Event()
        work.add_done_callback(lambda _: ended.set())
        work.cancel()
        try:
            async with asyncio.timeout(CANCEL_GRACE_S):
                await ended.wait()
        except TimeoutError:
            self._left_behind.append(work)
            self._logger.error("shutdown.stuck", resource=resource.name, grace_s=CANCEL_GRACE_S)

    def _finish(self, resource: ShutdownResource, outcome: Outcome, why: str) -> None:
        if outcome in ("late", "forced") and resource.force is not None:
            try:
                resource.force()
            except Exception as error:  # noqa: BLE001 - the way down goes on
                why = f"{type(error).__name__}: {error}"
        self._outcomes[resource.name] = outcome
        facts = {"resource": resource.name, "phase": resource.phase.name.lower(), "outcome": outcome}
        if outcome == "closed":
            self._logger.debug("shutdown.resource", **facts)
        else:
            self._logger.warning("shutdown.resource", **facts, why=why, timeout_s=resource.timeout_s)

    def _make_report(self, reason: str, started_ns: int) -> ShutdownReport:
        order = sorted(self._resources.values(), key=lambda resource: resource.phase)
        outcomes = tuple((r.name, self._outcomes.get(r.name, "forced")) for r in order)
        duration_s = (self._clock.monotonic_ns() - started_ns) / 1e9
        report = ShutdownReport(reason, duration_s, outcomes)
        write = self._logger.info if outcomes else self._logger.debug  # nothing had been started: the error says all
        write("shutdown.finished", reason=reason, clean=report.is_clean, duration_s=round(duration_s, 6))
        return report


async def _await(close: Callable[[], Awaitable[object]]) -> None:
    await close()


class ShutdownSignals:
    """What the signals to a daemon mean; `world.host.daemon.handle_signals` calls these methods.

    Args:
        coordinator: Whose way down begins.
        logger: Gets the status and the metrics.
        metrics: What is dumped, None for nothing.
    """

    def __init__(self, coordinator: ShutdownCoordinator, logger: Logger, metrics: Registry | None = None) -> None:
        self._coordinator = coordinator
        self._logger = logger
        self._metrics = metrics
        self._came: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def wait(self) -> str:
        """Return the name of the signal with which the way down is to begin."""
        return await asyncio.shield(self._came)

    def stop(self, name: str) -> None:
        """Begin the way down (SIGTERM, SIGINT)."""
        self._logger.info("signal.stop", signal=name)
        if not self._came.done():
            self._came.set_result(name)

    def force(self, name: str) -> None:
        """Begin it if it has not, and wait for nothing (SIGQUIT, or a second SIGTERM or SIGINT)."""
        self._logger.warning("signal.force", signal=name)
        self._coordinator.force()
        if not self._came.done():
            self._came.set_result(name)

    def status(self, name: str) -> None:
        """Log how far the way down is (SIGUSR1)."""
        status = self._coordinator.status()
        self._logger.info(
            "signal.status",
            signal=name,
            phase=status.phase,
            begun=status.begun,
            forced=status.forced,
            registered=status.registered,
            closing=status.closing,
            finished=dict(status.finished),
            n_tasks=len(asyncio.all_tasks()),
        )

    def dump(self, name: str) -> None:
        """Log every metric, a few dozen to a line (SIGUSR2)."""
        values = [] if self._metrics is None else list(_rendered(self._metrics))
        parts = [values[first : first + DUMPED_PER_LINE] for first in range(0, len(values), DUMPED_PER_LINE)]
        for number, part in enumerate(parts, start=1):
            self._logger.info("signal.metrics", signal=name, part=number, parts=len(parts), values=dict(part))


def _rendered(metrics: Registry) -> Iterator[tuple[str, float]]:
    for sample in metrics.statistics():
        labels = ",".join(f'{name}="{value}"' for name, value in sample.labels)
        yield (f"{sample.name}{{{labels}}}" if labels else sample.name), sample.value
