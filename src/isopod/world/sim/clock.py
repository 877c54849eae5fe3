"""SimClock: a machine's time, read from the loop that advances it.

The wall clock starts at one fixed instant in every run. Legal faults, each only when a test asks for it:

- `step_ns` lets the wall clock jump, forwards or back, as an administrator or NTP does; monotonic time goes on as before.
- `drift_ppm` lets the machine's oscillator run too fast (above 0) or too slow: wall time, monotonic time and the timers of the machine's
  processes all follow it, as they come from one oscillator. Timers that were set before keep their instant.

Time never goes back on the monotonic clock, whatever the drift is set to.
"""

from typing import Final

from isopod.world.errors import InvalidArgument
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.owners import HostTime

EPOCH_NS: Final = 1_767_225_600 * 1_000_000_000
"""2026-01-01T00:00:00Z, the wall time at which every simulation begins."""
BOOT_NS: Final = 1_000 * 1_000_000_000
"""The machine booted this long before the simulation begins, so a monotonic reading is never small by accident."""
DRIFT_PPM_MAX: Final = 200_000
"""A fifth: far beyond any real oscillator, and enough to break what trusts clocks to agree."""


class SimClock:
    """The Clock port of the simulation.

    Args:
        loop: The source of time.
    """

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._offset_ns = 0
        self._drifts = False
        self.time = HostTime()
        """How the machine's time follows from the simulation's."""

    def now_ns(self) -> int:
        """Return wall time in nanoseconds since the Unix epoch."""
        elapsed_ns = self._loop.elapsed_ns
        return EPOCH_NS + (self.time.at(elapsed_ns) if self._drifts else elapsed_ns) + self._offset_ns

    def monotonic_ns(self) -> int:
        """Return nanoseconds since the simulated boot."""
        elapsed_ns = self._loop.elapsed_ns
        return BOOT_NS + (self.time.at(elapsed_ns) if self._drifts else elapsed_ns)

    def step_ns(self, delta_ns: int) -> None:
        """Let the wall clock jump, as an administrator or NTP does; monotonic time goes on as before."""
        self._offset_ns += delta_ns

    @property
    def drift_ppm(self) -> float:
        """By how many millionths the machine's time runs too fast; 0 in the beginning. May be set at any time."""
        return self.time.drift_ppm

    @drift_ppm.setter
    def drift_ppm(self, ppm: float) -> None:
        if not -DRIFT_PPM_MAX <= ppm <= DRIFT_PPM_MAX:
            raise InvalidArgument("drift_ppm", ppm, f"must be between -{DRIFT_PPM_MAX} and {DRIFT_PPM_MAX}")
        self.time.set_drift(ppm, self._loop.elapsed_ns)
        self._loop.follow_drift()
        self._drifts = True
