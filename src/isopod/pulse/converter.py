"""Converter: what a shim said, taken in as cAdvisor's families and as a round of rates; remembers of each sandbox what that needs."""

from isopod.pulse.cadvisor import WHOLE, Shape, families_of, measure, measure_local
from isopod.pulse.cpu_units import CpuUnits
from isopod.pulse.model import Families, LocalContainer, Pod, Target, Values
from isopod.pulse.rates import Rates, sample_of


class Converter:
    """Keeps the units and the last rounds of all sandboxes.

    Args:
        shape: How much is shown.
    """

    def __init__(self, shape: Shape = WHOLE) -> None:
        self.units = CpuUnits()
        self.rates = Rates()
        self._shape = shape

    def take(self, target: Target, values: Values, pod: Pod | None, *, at_s: float, now_ns: int) -> Families:
        """Take in what a shim said, and return its container_* families.

        Args:
            target: Whose shim.
            values: What the reader found of `cadvisor.WANTED`.
            pod: Whose it is; None while nobody has said.
            at_s: When that was, by the loop's clock.
            now_ns: The same, since 1970.
        """
        unit_s = self.units.unit_s(target.id, values, pod, runtime=target.runtime, at_s=at_s, now_ns=now_ns)
        figures = measure(values, cpu_unit_s=unit_s)
        self.rates.put(target.id, at_s, sample_of(figures))
        return families_of(figures, target.id, pod, now_ns=now_ns, shape=self._shape)

    def take_local(self, container: LocalContainer, *, at_s: float, now_ns: int) -> Families:
        """Take in the figures of a container that has no shim, and return its families.

        Args:
            container: Its figures.
            at_s: When they came, by the loop's clock.
            now_ns: The same, since 1970.
        """
        figures = measure_local(container)
        self.rates.put(container.id, at_s, sample_of(figures))
        return families_of(figures, container.id, container.pod, now_ns=now_ns, shape=self._shape)

    def again(self, identifier: str, at_s: float) -> None:
        """Take in that a shim said what it said before: nothing was used."""
        self.rates.again(identifier, at_s)

    def forget(self, identifier: str) -> None:
        """Let go of a sandbox that is gone."""
        self.units.forget(identifier)
        self.rates.remove(identifier)
