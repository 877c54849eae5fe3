"""Health: named checks, and what they say together: ok, degraded or failing, with reasons.

Two questions are told apart. Live: does the process still do anything? Then it may stay. Ready: may it be given work? A critical check that
fails makes it not ready, one that is not critical makes it degraded, which is still ready. The first step of a shutdown is to stop being
ready (`shut`), so that balancers look elsewhere while what is under way ends.

Rules: a check has a deadline; one that hangs fails. Answers are kept for a moment, so that many askers cost no more than one.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec

from isopod.world.clock import Clock

Status = Literal["ok", "degraded", "failing"]
TIMEOUT_S: Final = 1.0
KEPT_S: Final = 1.0
CHECKS_MAX: Final = 256

Check = Callable[[], "str | Awaitable[str | None] | None"]
"""Returns None if all is well, else the reason in one line; what it raises is a reason too."""


class CheckResult(msgspec.Struct, frozen=True):
    """What one check said."""

    name: str
    status: Status
    reason: str
    critical: bool
    duration_s: float


class Report(msgspec.Struct, frozen=True):
    """What all checks say together."""

    status: Status
    ready: bool
    reasons: tuple[str, ...]
    checks: tuple[CheckResult, ...]


class _Registered(msgspec.Struct, frozen=True):
    name: str
    check: Check
    critical: bool
    timeout_s: float


class HealthRegistry:
    """The checks of one process.

    Args:
        clock: Measures how long checks take.
        kept_s: How long an answer is good.
    """

    def __init__(self, clock: Clock, *, kept_s: float = KEPT_S) -> None:
        self._clock = clock
        self._kept_ns = int(kept_s * 1e9)
        self._checks: dict[str, _Registered] = {}
        self._shut_reason = ""
        self._report: Report | None = None
        self._reported_at_ns = 0
        self._busy = asyncio.Lock()

    def register(self, name: str, check: Check, *, critical: bool = True, timeout_s: float = TIMEOUT_S) -> Callable[[], None]:
        """Add a check.

        Args:
            name: One word.
            check: Called when somebody asks; a plain function must be quick.
            critical: Whether its failure means: no work for this process.
            timeout_s: How long it may take.

        Returns:
            What takes it off again.

        Raises:
            ValueError: The name is taken, or there are too many.
        """
        if name in self._checks or len(self._checks) >= CHECKS_MAX:
            raise ValueError(f"health check {name} is registered already, or there are {CHECKS_MAX}")
        self._checks[name] = _Registered(name, check, critical, timeout_s)
        self._report = None

        def remove() -> None:
            self._checks.pop(name, None)
            self._report = None

        return remove

    def shut(self, reason: str) -> None:
        """Be no longer ready: the first step of a shutdown."""
        self._shut_reason = reason or "shutting down"

    @property
    def is_shut(self) -> bool:
        """Whether a shutdown has begun."""
        return bool(self._shut_reason)

    @property
    def last(self) -> Report | None:
        """The last answer, however old; None if nobody has asked yet."""
        return self._report

    async def report(self) -> Report:
        """Ask all checks, at once, or return the answer of a moment ago."""
        async with self._busy:
            now_ns = self._clock.monotonic_ns()
            if self._report is None or now_ns - self._reported_at_ns >= self._kept_ns:
                results = await asyncio.gather(*(self._ask(each) for each in self._checks.values()))
                self._report = _summary(tuple(results))
                self._reported_at_ns = now_ns
            report = self._report
        if self._shut_reason:
            return Report(report.status, False, (self._shut_reason, *report.reasons), report.checks)
        return report

    async def _ask(self, each: _Registered) -> CheckResult:
        began_ns = self._clock.monotonic_ns()
        try:
            async with asyncio.timeout(each.timeout_s):
                answer = each.check()
                reason = await answer if inspect.isawaitable(answer) else answer
        except TimeoutError:
            reason = f"no answer in {each.timeout_s:g} s"
        except Exception as error:  # noqa: BLE001 - a check may be anybody's; that it fails is its answer
            reason = f"{type(error).__name__}: {error}"
        status: Status = "ok" if reason is None else "failing" if each.critical else "degraded"
        return CheckResult(each.name, status, reason or "", each.critical, (self._clock.monotonic_ns() - began_ns) / 1e9)


def _summary(results: tuple[CheckResult, ...]) -> Report:
    status: Status = "ok"
    for result in results:
        if result.status == "failing" or (result.status == "degraded" and status == "ok"):
            status = result.status
    reasons = tuple(f"{result.name}: {result.reason}" for result in results if result.status != "ok")
    return Report(status, status != "failing", reasons, results)
