"""CpuUnits: in what a guest counts the time of its CPUs.

Kata's agent says milliseconds since 2.4, clock ticks in some builds of 2.4, seconds before, and nowhere which of them. A CPU is always in
some state, if only idle, so that the sum of one CPU's figures grows by one second each second in whatever unit it is: that tells.

Two things are compared with that sum: the sandbox's age (at the first look already), and the time between two looks. What is decided stays
decided: a sandbox's agent does not change. Ranges are narrow, since a machine that was paused for a long time has a sum smaller than its
age: between them nothing is decided, and milliseconds are taken for the time being.

Source: the history of src/agent/src/metrics.rs in Kata Containers.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from isopod.pulse.model import Pod, Runtime, Values

Unit = Literal["milliseconds", "ticks", "seconds"]

UNIT_S: Final[Mapping[Unit, float]] = {"milliseconds": 0.001, "ticks": 0.01, "seconds": 1.0}
"""Ticks are those of x86 and Arm, a hundred a second."""
LEAST: Final = 0.5
MOST: Final = 1.1
"""A sum that is so many seconds for each second that passed is believed."""
AGE_MIN_S: Final = 10.0
"""A guest needs a second or two from the sandbox's beginning to its kernel's."""
APART_MIN_S: Final = 4.0
_STATES: Final = frozenset(("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"))
"""A CPU is in one of these; what guests of its own did is in the first two already."""


class _Look(NamedTuple):
    at_s: float
    sums: dict[str, float]


class CpuUnits:
    """The units of all sandboxes. Forgets one only when it is told to."""

    def __init__(self) -> None:
        self._decided: dict[str, Unit] = {}
        self._looks: dict[str, _Look] = {}

    def unit_s(self, identifier: str, values: Values, pod: Pod | None, *, runtime: Runtime, at_s: float, now_ns: int) -> float:
        """Return a sandbox's unit in seconds.

        Args:
            identifier: The sandbox.
            values: What its shim said of `figures.WANTED`.
            pod: Whose it is; None while nobody has said.
            runtime: Who serves the figures: only shims in Go may be so old.
            at_s: When that was, by a clock that never goes back.
            now_ns: The same, since 1970.
        """
        if runtime != "go" or "kata_shim_agent_answers" in values:  # isopod's own shim says the latter, and milliseconds
            return UNIT_S["milliseconds"]
        unit = self._decided.get(identifier)
        if unit is None:
            unit = self._look(identifier, _sums(values), at_s=at_s, age_s=_age_s(values, pod, now_ns))
        return UNIT_S[unit or "milliseconds"]

    def known_s(self, identifier: str) -> float:
        """Return a sandbox's unit in seconds, as `unit_s` said it last: milliseconds until it is known."""
        return UNIT_S[self._decided.get(identifier, "milliseconds")]

    def forget(self, identifier: str) -> None:
        """Let go of a sandbox that is gone."""
        self._decided.pop(identifier, None)
        self._looks.pop(identifier, None)

    def statistics(self) -> dict[str, int]:
        """Return how many sandboxes count in which unit; "undecided" are those of which it cannot be told yet."""
        counts = dict.fromkeys((*UNIT_S, "undecided"), 0)
        for unit in self._decided.values():
            counts[unit] += 1
        counts["undecided"] = len(self._looks)
        return counts

    def _look(self, identifier: str, sums: dict[str, float], *, at_s: float, age_s: float) -> Unit | None:
        if not sums:
            return None
        unit = _unit(max(sums.values()), age_s) if age_s >= AGE_MIN_S else None
        before = self._looks.get(identifier)
        if unit is None and before is not None:
            if at_s - before.at_s < APART_MIN_S:
                return None
            grown = max((sums[cpu] - before.sums[cpu] for cpu in sums if cpu in before.sums), default=0.0)
            unit = _unit(grown, at_s - before.at_s)
        if unit is None:
            self._looks[identifier] = _Look(at_s, sums)
        else:
            self._decided[identifier] = unit
            self._looks.pop(identifier, None)
        return unit


def _unit(grown: float, passed_s: float) -> Unit | None:
    for unit, unit_s in UNIT_S.items():
        if LEAST <= grown * unit_s / passed_s <= MOST:
            return unit
    return None


def _sums(values: Values) -> dict[str, float]:
    """Return the sum of each CPU's figures. Of all CPUs together it is not known how many they are."""
    sums: dict[str, float] = {}
    for (cpu, item), value in values.get("kata_guest_cpu_time", ()):
        if cpu != "total" and item in _STATES and 0 <= value < 1e18:
            sums[cpu] = sums.get(cpu, 0.0) + value
    return sums


def _age_s(values: Values, pod: Pod | None, now_ns: int) -> float:
    """Return how long ago the sandbox began, 0 if nobody says."""
    if pod is not None and pod.created_ns:
        return (now_ns - pod.created_ns) / 1e9
    started = values.get("kata_shim_process_start_time_seconds")
    return now_ns / 1e9 - started[0][1] if started else 0.0
