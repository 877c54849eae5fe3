"""Intake: from what a shim answered, or a node said, to what the store keeps: the one place where text becomes families.

Reading happens once for each body; a body that is the last one again costs one comparison of hashes. A sandbox whose figures cannot be read
fails alone. Not here: when shims are asked (`collector`), what is shown (`store`).
"""

from collections.abc import Callable, Iterable
from typing import Final

from isopod.pulse import core
from isopod.pulse.cadvisor import WANTED, last_seen, shape_without
from isopod.pulse.converter import Converter
from isopod.pulse.labels import kata_labels
from isopod.pulse.model import LocalContainer, Pod, Target
from isopod.pulse.policy import Policy
from isopod.pulse.settings import PulseSettings
from isopod.pulse.store import Entry, Store
from isopod.runtime.logger import Logger
from isopod.world.clock import Clock

REFUSED: Final = "unreadable"
"""The class of failure of a body in which there is not one valid line."""
_LAST_SEEN: Final = "container_last_seen"


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
        self._rules = core.Rules(line_bytes_max=settings.line_bytes_max, series_max=settings.series_max)
        self._policy = Policy()
        self._hashes: dict[str, tuple[int, int]] = {}
        self._local: dict[str, LocalContainer] = {}
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
        reading = core.read(body, kata_labels(target.id, entry.pod), self._rules, WANTED)
        if not reading.families and reading.dropped:
            self._hashes.pop(target.id, None)
            self.reject(target, REFUSED, "not one valid line", took_s)
            return
        at_s, now_ns = self._now(), self._clock.now_ns()
        containers = self.converter.take(target, reading.values, entry.pod, at_s=at_s, now_ns=now_ns)
        taken = self._policy.take(target.id, entry.pod, reading.families, containers=containers, before=entry.families, now_s=at_s)
        self._store.replace(
            target.id,
            taken.families,
            containers=taken.containers,
            n_bytes=len(body),
            took_s=took_s,
            dropped={**reading.dropped, **taken.dropped},
            raw=body if self._settings.strict_compat else None,
        )
        self._hashes[target.id] = seen
        self.read_s += (self._clock.monotonic_ns() - began_ns) / 1e9

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
        return not self._policy.is_open

    def adopt(self, policy: Policy) -> None:
        """Have a policy hold, for each sandbox from its next round on."""
        self._policy = policy
        self._hashes.clear()

    def forget(self, identifier: str) -> None:
        """Let go of what is known of a sandbox that is gone."""
        self._hashes.pop(identifier, None)
        self.converter.forget(identifier)
        self._policy.forget(identifier)

    def local(self, containers: Iterable[LocalContainer]) -> None:
        """Take in the containers of an isopod node, all of them: those not named are gone."""
        named = {container.id: container for container in containers}
        for identifier in [each for each in self._local if each not in named]:
            del self._local[identifier]
            self.forget(identifier)
            self._store.remove(identifier)
        for identifier, container in named.items():
            known = self._store.get(identifier)
            if known is not None and identifier not in self._local:
                continue  # a machine: its shim is asked
            if known is None:
                self._store.add(Target(identifier, "isopod", ""))
            self._local[identifier] = container
            self._store.describe(identifier, container.pod)
            at_s, now_ns = self._now(), self._clock.now_ns()
            containers_families = self.converter.take_local(container, at_s=at_s, now_ns=now_ns)
            taken = self._policy.take(identifier, container.pod, {}, containers=containers_families, before={}, now_s=at_s)
            self._store.replace(identifier, {}, containers=taken.containers, dropped=taken.dropped)

    def hand_over(self, identifier: str) -> None:
        """Let go of a machine that a node told of before its shim was found: from now on the shim is asked."""
        if self._local.pop(identifier, None) is not None:
            self.forget(identifier)
            self._store.remove(identifier)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _again(self, entry: Entry, took_s: float) -> None:
        """Take in that a shim said the same again: only when it was last seen has changed."""
        self.converter.again(entry.id, self._now())
        if _LAST_SEEN not in entry.containers:
            self._store.touch(entry.id, took_s)
            return
        seen = last_seen(entry.id, entry.pod, self._clock.now_ns())
        self._store.replace(
            entry.id,
            entry.families,
            containers={**entry.containers, _LAST_SEEN: seen},
            n_bytes=entry.n_bytes,
            took_s=took_s,
            dropped=entry.tally,
            raw=entry.raw,
        )
