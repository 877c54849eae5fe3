"""Meter: progress of long work, told on the loop's thread and not too often."""

import asyncio
from collections.abc import Callable
from typing import Final

from isopod.world.clock import Clock

ImageProgress = Callable[[int, int, str], None]
"""progress(done_bytes, total_bytes, what): `total_bytes` is 0 while unknown; `what` is "receive" or "unpack"."""

INTERVAL_NS: Final = 50_000_000


class Meter:
    """Counts one phase of an operation.

    Args:
        clock: To tell at most every 50 ms.
        progress: Whom to tell; None for nobody.
        what: The phase.
        total_bytes: Its end, 0 if unknown.
    """

    def __init__(self, clock: Clock, progress: ImageProgress | None, what: str, *, total_bytes: int = 0) -> None:
        self._clock = clock
        self._progress = progress
        self._what = what
        self._total_bytes = total_bytes
        self._base_bytes = 0
        self._told_at_ns = clock.monotonic_ns() - INTERVAL_NS
        self._loop = asyncio.get_running_loop()

    def advance(self, n_bytes: int) -> None:
        """Count bytes of a part that is done."""
        self._base_bytes += n_bytes
        self._tell(0)

    def within_threadsafe(self, n_bytes: int) -> None:
        """Tell how far the present part is; from any thread."""
        if self._progress is not None:
            self._loop.call_soon_threadsafe(self._tell, n_bytes)

    def end(self) -> None:
        """Tell the end of the phase, whatever was told before."""
        if self._progress is not None:
            self._progress(self._base_bytes, self._total_bytes or self._base_bytes, self._what)

    def _tell(self, n_bytes: int) -> None:
        now_ns = self._clock.monotonic_ns()
        if self._progress is not None and now_ns - self._told_at_ns >= INTERVAL_NS:
            self._told_at_ns = now_ns
            self._progress(self._base_bytes + n_bytes, self._total_bytes, self._what)
