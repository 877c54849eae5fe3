"""PollingSelector: a selector that does not sleep while there was work lately.

Sleeping in epoll_wait(2) costs a context switch and, on an idle core, some tens of microseconds until the answer to an event begins. A
shard that has a core to itself may spend it: for `spin_s` after the last work it asks again and again, with a time-out of zero (the
interpreter's lock is let go each time, so other threads go on). Then it sleeps like any other: an idle loop costs nothing.
"""

import selectors
import time
from collections.abc import Callable
from typing import Final

SPIN_S: Final = 0.001


class PollingSelector(selectors.DefaultSelector):
    """The system's best selector, spinning.

    Args:
        spin_s: How long after the last work it begins to sleep.
        clock_s: What the spinning is measured with; the sleep is the kernel's.
    """

    def __init__(self, spin_s: float = SPIN_S, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._spin_s = spin_s
        self._clock_s = clock_s
        self._worked_s = clock_s()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, waiting up to `timeout` seconds (None: for ever; 0: the loop has work, and only looks)."""
        events: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        now_s = self._clock_s()
        if events or (timeout is not None and timeout <= 0):
            self._worked_s = now_s
            return events
        due_s = None if timeout is None else now_s + timeout
        spin_until_s = self._worked_s + self._spin_s
        while now_s < spin_until_s and (due_s is None or now_s < due_s):
            events = super().select(0)
            now_s = self._clock_s()
            if events:
                self._worked_s = now_s
                return events
        if due_s is not None and now_s >= due_s:
            self._worked_s = now_s
            return events
        events = super().select(None if due_s is None else due_s - now_s)
        self._worked_s = self._clock_s()
        return events
