"""SimClock: virtual time, read from the loop that advances it.

The wall clock starts at one fixed instant in every run. Room is left for skew and jumps: `step_ns` moves the wall clock alone.
"""

from typing import Final

from isopod.world.sim.loop import SimLoop

EPOCH_NS: Final = 1_767_225_600 * 1_000_000_000
"""2026-01-01T00:00:00Z, the wall time at which every simulation begins."""
BOOT_NS: Final = 1_000 * 1_000_000_000
"""The machine booted this long before the simulation begins, so a monotonic reading is never small by accident."""


class SimClock:
    """The Clock port of the simulation.

    Args:
        loop: The source of time.
    """

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._offset_ns = 0

    def now_ns(self) -> int:
        """Return wall time in nanoseconds since the Unix epoch."""
        return EPOCH_NS + self._loop.elapsed_ns + self._offset_ns

    def monotonic_ns(self) -> int:
        """Return nanoseconds since the simulated boot."""
        return BOOT_NS + self._loop.elapsed_ns

    def step_ns(self, delta_ns: int) -> None:
        """Let the wall clock jump, as an administrator or NTP does; monotonic time goes on as before."""
        self._offset_ns += delta_ns
