"""Pace and Alarm: whether a peer keeps up a least rate, and when to look next."""

from collections.abc import Callable
from math import inf

from isopod.runtime.timers import TimerWheel, WheelTimer


class Pace:
    """Compares how far something has come with how far it was at the last look. Times are the loop's, in seconds."""

    __slots__ = ("_mark", "is_on", "since")

    def __init__(self) -> None:
        self.is_on = False
        self.since = 0.0
        self._mark = 0

    def begin(self, now: float, n_bytes: int) -> None:
        """Look from now on."""
        self.is_on = True
        self.since = now
        self._mark = n_bytes

    def end(self) -> None:
        """Look no more."""
        self.is_on = False

    def look(self, now: float, n_bytes: int, rate: float) -> bool:
        """Return whether at least `rate` bytes a second came since the last look; if so, the next one counts from now."""
        is_fast = n_bytes - self._mark >= rate * (now - self.since)
        if is_fast:
            self.begin(now, n_bytes)
        return is_fast


class Alarm:
    """One timer on a wheel that fires at the earliest time it was asked for, and forgets the later ones: who is called looks what is due.

    Args:
        wheel: Where it lives.
        time: The loop's clock.
        fire: Called without arguments.
    """

    __slots__ = ("_due", "_fire", "_time", "_timer", "_wheel")

    def __init__(self, wheel: TimerWheel, time: Callable[[], float], fire: Callable[[], None]) -> None:
        self._wheel = wheel
        self._time = time
        self._fire = fire
        self._due = inf
        self._timer: WheelTimer | None = None

    def arm(self, due: float) -> None:
        """See that it fires no later than `due`."""
        if self._due <= due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._wheel.call_later(due - self._time(), self._on_timer)

    def cancel(self) -> None:
        """Do not fire any more."""
        self._due = -inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        self._timer = None
        self._due = inf
        self._fire()
