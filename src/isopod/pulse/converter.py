"""Converter: what a shim said, taken in as cAdvisor's families and as a round of rates; remembers of each sandbox what that needs.

What a runtime says of containers (`take_stats`) is kept until it says something else, and stands in a sandbox's families from its next
round on. Where a runtime tells such figures, a guest's do not stand in for them: not before the runtime was asked about the sandbox, and
not after it told of it once, for a counter that changes over from one to the other would seem to begin anew.

So a container's counters are decided upon once, when they are first shown: the guest's, if the runtime tells what nobody uses, is given up
on, or tells what others use and says nothing of this one for some rounds; they are then the guest's whatever the runtime tells later.
"""

from typing import Final, NamedTuple

from isopod.pulse.cadvisor import COUNTERS, WHOLE, Blocks, Inner, Shape, blocks_of, families_of, last_seen, measure, measure_local
from isopod.pulse.cpu_units import CpuUnits
from isopod.pulse.figures import measure_container
from isopod.pulse.model import ContainerStats, Families, Fragment, LocalContainer, Pod, SandboxStats, Target, Values
from isopod.pulse.rates import Rates, sample_of

UNTOLD_ROUNDS: Final = 3
"""So many more rounds a container waits for the word of a runtime that tells what others use."""
_GUESTS_MAX: Final = 4
"""Of a sandbox: containers whose counters are known to be the guest's. It has one at a time; one may be out of sight for a while."""


class _Told(NamedTuple):
    """What a runtime says of a sandbox's containers. It is measured when it is shown: for all sandboxes at once it would be a long step.

    Args:
        rows: Its words.
        before: Those of the round before.
        seen_ns: When it said them, since 1970.
        is_whole: Whether it ever said what a container of the sandbox uses.
    """

    rows: tuple[ContainerStats, ...]
    before: tuple[ContainerStats, ...]
    seen_ns: int
    is_whole: bool


class Converter:
    """Keeps the units, the last rounds and the containers' figures of all sandboxes.

    Args:
        shape: How much is shown.
    """

    def __init__(self, shape: Shape = WHOLE) -> None:
        self.units = CpuUnits()
        self.rates = Rates()
        self._shape = shape
        self._has_stats = False
        self._told: dict[str, _Told] = {}
        self._tells = False
        """Whether the runtime ever told what a container uses."""
        self._n_rounds = 0
        self._waiting: dict[str, tuple[str, int]] = {}
        """By sandbox: the only container, of which the runtime says nothing, and in which round that was first so."""
        self._guests: dict[str, tuple[str, ...]] = {}
        """By sandbox: the containers whose counters are the guest's for all of their lives."""
        self._blocks: dict[str, Blocks] = {}

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
        inner, blocks = self._inner(target.id, pod), self._blocks_of(target.id, pod)
        return families_of(figures, target.id, pod, now_ns=now_ns, shape=self._shape, inner=inner, blocks=blocks)

    def take_local(self, container: LocalContainer, *, at_s: float, now_ns: int) -> Families:
        """Take in the figures of a container that has no shim, and return its families.

        Args:
            container: Its figures.
            at_s: When they came, by the loop's clock.
            now_ns: The same, since 1970.
        """
        figures = measure_local(container)
        self.rates.put(container.id, at_s, sample_of(figures))
        blocks = self._blocks_of(container.id, container.pod)
        return families_of(figures, container.id, container.pod, now_ns=now_ns, shape=self._shape, blocks=blocks)

    def again(self, identifier: str, at_s: float) -> None:
        """Take in that a shim said what it said before: nothing was used."""
        self.rates.again(identifier, at_s)

    def last_seen(self, identifier: str, pod: Pod | None, now_ns: int) -> Fragment:
        """Return container_last_seen of a sandbox whose shim said what it said before."""
        inner, blocks = self._inner(identifier, pod), self._blocks_of(identifier, pod)
        return last_seen(identifier, pod, now_ns, shape=self._shape, inner=inner, blocks=blocks)

    def await_stats(self) -> None:
        """Take in that a runtime will be asked what containers use."""
        self._has_stats = True

    def take_stats(self, stats: SandboxStats | None, *, now_ns: int) -> tuple[str, ...] | None:
        """Take in what a runtime says of containers.

        Args:
            stats: Of all sandboxes about which it was asked; None if it tells nothing any more.
            now_ns: When it said so, since 1970.

        Returns:
            The sandboxes whose families will be others now; None if that may be any.
        """
        if stats is None:
            self._has_stats = False
            self._told = {identifier: _Told((), (), 0, is_whole=True) for identifier, told in self._told.items() if told.is_whole}
            return None
        self._has_stats = True
        self._n_rounds += 1
        self._tells = self._tells or any(_is_use(row) for rows in stats.values() for row in rows)
        changed = [identifier for identifier, rows in stats.items() if self._keep(identifier, rows, now_ns)]
        for identifier in [each for each, told in self._told.items() if told.rows and each not in stats]:
            self._keep(identifier, (), now_ns)
            changed.append(identifier)
        waited = [identifier for identifier, (_, since) in self._waiting.items() if self._n_rounds - since == UNTOLD_ROUNDS]
        return tuple(dict.fromkeys([*changed, *waited]))

    def forget(self, identifier: str) -> None:
        """Let go of a sandbox that is gone."""
        self.units.forget(identifier)
        self.rates.remove(identifier)
        self._told.pop(identifier, None)
        self._waiting.pop(identifier, None)
        self._guests.pop(identifier, None)
        self._blocks.pop(identifier, None)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _keep(self, identifier: str, rows: tuple[ContainerStats, ...], now_ns: int) -> bool:
        """Keep what is said of a sandbox; return whether it is something else than before."""
        known = self._told.get(identifier)
        before, is_whole = ((), False) if known is None else (known.rows, known.is_whole)
        is_whole = is_whole or any(_is_use(row) for row in rows)
        if is_whole:
            self._waiting.pop(identifier, None)
        self._told[identifier] = _Told(rows, before, now_ns, is_whole)
        return known is None or before != rows

    def _inner(self, identifier: str, pod: Pod | None) -> Inner | None:
        if pod is None or pod.source != "cri":
            return None
        told = self._told.get(identifier)
        by_guest = len(pod.containers) == 1 and self._is_counted_by_guest(identifier, pod.containers[0].id, told)
        if told is None:
            return Inner({}, not by_guest, by_guest) if self._has_stats else None
        before = {row.id: row for row in told.before}
        figures = {row.id: measure_container(row, before.get(row.id), seen_ns=told.seen_ns) for row in told.rows}
        for each in self._guests.get(identifier, ()):
            if each in figures:
                figures[each] = {name: samples for name, samples in figures[each].items() if name not in COUNTERS}
        return Inner(figures, told.is_whole or not by_guest, by_guest)

    def _is_counted_by_guest(self, identifier: str, only: str, told: _Told | None) -> bool:
        """Tell whether the counters of a sandbox's only container are the guest's: if so, they are for all of its life."""
        known = self._guests.get(identifier, ())
        if only in known:
            return True
        if (told is not None and told.is_whole) or self._is_waiting(identifier, only, told):
            return False
        self._waiting.pop(identifier, None)
        self._guests[identifier] = (*known, only)[-_GUESTS_MAX:]
        return True

    def _is_waiting(self, identifier: str, only: str, told: _Told | None) -> bool:
        """Tell whether the runtime's word about a container may be yet to come."""
        if told is None:
            return self._has_stats
        if not self._tells:
            return False
        container, since = self._waiting.get(identifier, ("", 0))
        if container != only:
            since = self._n_rounds
            self._waiting[identifier] = only, since
        return self._n_rounds - since < UNTOLD_ROUNDS

    def _blocks_of(self, identifier: str, pod: Pod | None) -> Blocks:
        known = self._blocks.get(identifier)
        if known is None or (known.pod is not pod and known.pod != pod):
            known = self._blocks[identifier] = blocks_of(identifier, pod)
        return known


def _is_use(row: ContainerStats) -> bool:
    """Tell whether a runtime says of a container what it uses, and not only what it has written."""
    return row.cpu_ns is not None or row.usage_bytes is not None or row.working_set_bytes is not None
