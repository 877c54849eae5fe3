"""Intake: from what a shim answered, or a node said, to what the store keeps: the one place where text becomes families.

Reading happens once for each body; a body that is the last one again costs one comparison of hashes, and of another one only families that
say something new are read (`rereading`). A sandbox whose figures cannot be read fails alone. Not here: when shims are asked (`collector`),
what is shown (`store`).
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from isopod.pulse import core
from isopod.pulse.cadvisor import WANTED, shape_without
from isopod.pulse.converter import Converter
from isopod.pulse.model import Families, LocalContainer, Pod, SandboxStats, Target
from isopod.pulse.policy import Policy
from isopod.pulse.rereading import Rereader
from isopod.pulse.settings import PulseSettings
from isopod.pulse.store import Entry, Store
from isopod.runtime.logger import Logger
from isopod.runtime.scheduling import maybe_yield
from isopod.world.clock import Clock

if TYPE_CHECKING:
    from isopod.pulse.base_units import BaseUnits
    from isopod.pulse.histograms import Histograms

REFUSED: Final = "unreadable"
"""The class of failure of a body in which there is not one valid line."""
_LAST_SEEN: Final = "container_last_seen"
_NONE: Final[Mapping[str, tuple[str, ...]]] = {}
_UNKNOWN: Final[Families] = {}
_NOTHING: Final[Mapping[str, int]] = {}
STEP_CONTAINERS: Final = 16
"""After so many containers of a node the loop gets a turn in any case: some 2 ms."""


class Intake:
    """Takes bodies and containers in.

    Args:
        store: Where they go.
        settings: Limits, and what is shown.
        clock: What time it is.
        now: The store's clock.
        logger: Told of sandboxes that begin to fail, once each.
    """

    def __init__(self, store: Store, settings: PulseSettings, *, clock: Clock, now: Callable[[], float], logger: Logger) -> None:
        self.converter = Converter(shape_without(settings.cadvisor_without))
        self._store = store
        self._clock = clock
        self._now = now
        self._settings = settings
        self._logger = logger
        self._policy = Policy()
        self._hashes: dict[str, tuple[int, int]] = {}
        self._local: dict[str, LocalContainer] = {}
        self._n_local = 0
        """How often a node told of its containers."""
        self._wanted = WANTED if is_converted(settings) else _NONE
        rules = core.Rules(line_bytes_max=settings.line_bytes_max, series_max=settings.series_max)
        self._reader = Rereader(rules, self._wanted)
        self._base_units = _base_units() if settings.base_units else None
        self._histograms = store.merged = _histograms() if settings.merge_histograms else None
        self.n_read = 0
        self.read_s = 0.0
        """Time from bodies to what the store keeps."""
        self.n_unchanged = 0

    def accept(self, target: Target, body: bytes, took_s: float) -> None:
        """Take a shim's answer in."""
        entry = self._store.get(target.id)
        if entry is None:  # it went while it was asked
            return
        seen = (hash(body), len(body))
        if self._hashes.get(target.id) == seen and entry.up:
            self.n_unchanged += 1
            self._again(entry, took_s)
            return
        self.n_read += 1
        began_ns = self._clock.monotonic_ns()
        reading = self._reader.read(target.id, body, entry.begun.labels, entry.families if self._is_kept_as_read else _UNKNOWN)
        if not reading.families and reading.dropped:
            self._hashes.pop(target.id, None)
            self.reject(target, REFUSED, "not one valid line", took_s)
            return
        at_s, now_ns = self._now(), self._clock.now_ns()
        containers: Families = {}
        if self._wanted:
            containers = self.converter.take(target, reading.values, entry.pod, at_s=at_s, now_ns=now_ns)
        families, spoiled = reading.families, _NOTHING
        if self._base_units is not None:
            unit_s = self.converter.units.known_s(target.id)
            families, spoiled = self._base_units.convert(families, entry.begun.block, is_rust=target.runtime == "rust", cpu_unit_s=unit_s)
        taken = self._policy.take(target.id, entry.pod, families, containers=containers, before=entry.families, now_s=at_s)
        kept = taken.families
        if self._histograms is not None:
            kept = self._histograms.take(target.id, kept, entry.begun.block)
        self._store.replace(
            target.id,
            kept,
            containers=taken.containers,
            n_bytes=len(body),
            took_s=took_s,
            dropped={**_summed(reading.dropped, spoiled), **taken.dropped},
            raw=body if self._settings.strict_compat else None,
        )
        self._hashes[target.id] = seen
        self._reader.keep(target.id)
        self.read_s += (self._clock.monotonic_ns() - began_ns) / 1e9

    @property
    def _is_kept_as_read(self) -> bool:
        """Whether what the store keeps of a sandbox is what its body said."""
        return self._policy.is_open and self._base_units is None and self._histograms is None

    def reject(self, target: Target, word: str, message: str, took_s: float) -> None:
        """Take in that a shim did not answer.

        Args:
            target: Whose.
            word: The class of failure.
            message: One line.
            took_s: How long that took.
        """
        entry = self._store.get(target.id)
        if entry is None:
            return
        if entry.error != word:
            self._logger.warning("pulse.sandbox_failed", sandbox=target.id, error=word, message=message)
        self._store.fail(target.id, word, took_s)

    def describe(self, identifier: str, pod: Pod) -> bool:
        """Take in whose a sandbox is; return whether its figures should be fetched anew: the policy may think otherwise of it now."""
        entry = self._store.get(identifier)
        if entry is None or entry.pod == pod:
            return False
        self._store.describe(identifier, pod)
        self._hashes.pop(identifier, None)  # what depends on more than the labels is made anew with the next body
        self._reader.forget(identifier)
        return not self._policy.is_open

    def adopt(self, policy: Policy) -> None:
        """Have a policy hold, for each sandbox from its next round on."""
        self._policy = policy
        self._hashes.clear()
        self._reader.clear()
        if self._histograms is not None:
            self._histograms.begin_anew()

    def forget(self, identifier: str) -> None:
        """Let go of what is known of a sandbox that is gone."""
        self._hashes.pop(identifier, None)
        self._reader.forget(identifier)
        self.converter.forget(identifier)
        self._policy.forget(identifier)
        if self._histograms is not None:
            self._histograms.forget(identifier)

    def take_stats(self, stats: SandboxStats | None) -> None:
        """Take in what a runtime says of containers, None if it tells nothing any more. It is shown with the sandboxes' next rounds."""
        changed = self.converter.take_stats(stats, now_ns=self._clock.now_ns())
        if changed is None:
            self._hashes.clear()
            return
        for identifier in changed:
            self._hashes.pop(identifier, None)

    async def local(self, containers: Iterable[LocalContainer]) -> None:
        """Take in the containers of an isopod node, all of them: those not named are gone.

        Others get their turn in between. A call that comes meanwhile has newer figures: the one before it ends where it is.
        """
        self._n_local += 1
        number = self._n_local
        named = {container.id: container for container in containers}
        for step, identifier in enumerate([each for each in self._local if each not in named]):
            await _turn(step)
            if number != self._n_local:
                return
            if self._local.pop(identifier, None) is not None:  # else its shim was found meanwhile
                self.forget(identifier)
                self._store.remove(identifier)
        for step, container in enumerate(named.values()):
            await _turn(step)
            if number != self._n_local:
                return
            self._take_local(container)

    def hand_over(self, identifier: str) -> None:
        """Let go of a machine that a node told of before its shim was found: from now on the shim is asked."""
        if self._local.pop(identifier, None) is not None:
            self.forget(identifier)
            self._store.remove(identifier)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _take_local(self, container: LocalContainer) -> None:
        """Take in one container of a node."""
        identifier = container.id
        known = self._store.get(identifier)
        if known is not None and identifier not in self._local:
            return  # a machine: its shim is asked
        if known is None:
            self._store.add(Target(identifier, "isopod", ""))
        self._local[identifier] = container
        self._store.describe(identifier, container.pod)
        at_s, now_ns = self._now(), self._clock.now_ns()
        families = self.converter.take_local(container, at_s=at_s, now_ns=now_ns)
        taken = self._policy.take(identifier, container.pod, {}, containers=families, before={}, now_s=at_s)
        self._store.replace(identifier, {}, containers=taken.containers, dropped=taken.dropped)

    def _again(self, entry: Entry, took_s: float) -> None:
        """Take in that a shim said the same again: only when it was last seen has changed."""
        self.converter.again(entry.id, self._now())
        if _LAST_SEEN not in entry.containers:
            self._store.touch(entry.id, took_s)
            return
        seen = self.converter.last_seen(entry.id, entry.pod, self._clock.now_ns())
        self._store.replace(
            entry.id,
            entry.families,
            containers={**entry.containers, _LAST_SEEN: seen},
            n_bytes=entry.n_bytes,
            took_s=took_s,
            dropped=entry.tally,
            raw=entry.raw,
        )


def is_converted(settings: PulseSettings) -> bool:
    """Return whether families under cAdvisor's names can be seen at all: kata-monitor has no page for them, nor for what is used."""
    return not settings.strict_compat or (bool(settings.push_url) and settings.view != "kata")


async def _turn(step: int) -> None:
    """Let others run, if it is their turn or so many steps have gone by."""
    if step % STEP_CONTAINERS == STEP_CONTAINERS - 1:
        await asyncio.sleep(0)
    else:
        await maybe_yield()


def _summed(one: Mapping[str, int], other: Mapping[str, int]) -> Mapping[str, int]:
    """Return lines left out by reason, those of two steps together."""
    return {**one, **{reason: one.get(reason, 0) + n for reason, n in other.items()}} if other else one


def _base_units() -> "BaseUnits":
    from isopod.pulse.base_units import BaseUnits  # noqa: PLC0415  only an agent that converts pays for it

    return BaseUnits()


def _histograms() -> "Histograms":
    from isopod.pulse.histograms import Histograms  # noqa: PLC0415  only an agent that merges pays for it

    return Histograms()
