"""StallDetector: says which task holds up the loop, while it does.

The loop's own watch notices (on the host a thread; nothing in the simulation, where steps take no time): this turns its reports into log
lines and metrics. A stall is logged while it lasts, as "reactor.stalled" with task, scheduling group and Python stack, and its whole
length is counted when it ends.

Rules: at most five lines a minute, the next one says how many were left out; counters are moved in the loop's thread only.
Source: Seastar's blocked-reactor-notify-ms (25 ms, 5 reports a minute).
"""

import asyncio
from typing import Final

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.clock import Clock
from isopod.world.errors import InvalidArgument
from isopod.world.loops import GroupLoop, Stall, Watch

THRESHOLD_S: Final = 0.025
THRESHOLD_S_MIN: Final = 0.001
REPORTS_PER_MINUTE: Final = 5
BUCKETS_S: Final = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_MINUTE_NS: Final = 60_000_000_000


class StallDetector:
    """Watches one loop from `start` to `stop`.

    Args:
        logger: Gets the lines, also from the watching thread.
        clock: For the limit of lines.
        metrics: Gets `isopod_stalls_total` and `isopod_stall_duration_seconds`, both by group.
        threshold_s: From when on a callback stalls; 1 ms and more.
        reports_per_minute: How many lines.

    Raises:
        InvalidArgument: The threshold is too small.
    """

    def __init__(
        self,
        logger: Logger,
        clock: Clock,
        metrics: Registry,
        *,
        threshold_s: float = THRESHOLD_S,
        reports_per_minute: int = REPORTS_PER_MINUTE,
    ) -> None:
        if not threshold_s >= THRESHOLD_S_MIN:
            raise InvalidArgument("threshold_s", threshold_s, f"must be at least {THRESHOLD_S_MIN}")
        self._logger = logger
        self._clock = clock
        self._metrics = metrics
        self._threshold_s = threshold_s
        self._reports_max = reports_per_minute
        self._minute_began_ns = 0
        self._n_reports = 0
        self._n_left_out = 0
        self._n_stalls = 0
        self._watch: Watch | None = None

    @property
    def is_watching(self) -> bool:
        """Whether it was started on a loop that can be watched, and not stopped."""
        return self._watch is not None

    @property
    def n_stalls(self) -> int:
        """How many have ended."""
        return self._n_stalls

    def start(self) -> None:
        """Begin, in the running loop; on a loop of somebody else's nothing happens."""
        loop = asyncio.get_running_loop()
        if self._watch is None and isinstance(loop, GroupLoop):
            self._watch = loop.watch(self._threshold_s, self._on_stall, self._on_end)

    def stop(self) -> None:
        """End; may be called again."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    def _on_stall(self, stall: Stall) -> None:
        """Log a stall that goes on; called in the watching thread, the only one that moves these numbers."""
        now_ns = self._clock.monotonic_ns()
        if now_ns - self._minute_began_ns >= _MINUTE_NS or not self._n_reports:
            self._minute_began_ns = now_ns
            self._n_reports = 0
        self._n_reports += 1
        if self._n_reports > self._reports_max:
            self._n_left_out += 1
            return
        left_out, self._n_left_out = self._n_left_out, 0
        self._logger.warning(
            "reactor.stalled",
            task=stall.task,
            group=stall.group,
            so_far_s=round(stall.duration_s, 6),
            stack=stall.stack,
            left_out=left_out,
        )

    def _on_end(self, stall: Stall) -> None:
        self._n_stalls += 1
        self._metrics.counter("isopod_stalls_total", "Callbacks that held up the loop.", group=stall.group).inc()
        self._metrics.histogram(
            "isopod_stall_duration_seconds", "How long callbacks held up the loop.", bounds=BUCKETS_S, group=stall.group
        ).observe(stall.duration_s)
