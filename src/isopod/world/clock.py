"""Clock and Random: the ports to time and chance."""

import random
from typing import Protocol


class Clock(Protocol):
    """Wall and monotonic time. Timers are the event loop's own (`asyncio.sleep`, `loop.call_later`): virtual in the simulation."""

    def now_ns(self) -> int:
        """Return wall time in nanoseconds since the Unix epoch; it may jump."""

    def monotonic_ns(self) -> int:
        """Return nanoseconds since an arbitrary point; it never goes back."""


class Random(Protocol):
    """Chance, split by name, so that one more draw in one place changes nothing in another."""

    def stream(self, name: str) -> random.Random:
        """Return the generator of that name: the same object for the same name."""

    def token_hex(self, n_bytes: int) -> str:
        """Return `2 * n_bytes` hexadecimal digits fit for identifiers."""
