"""FailureDetector: who is alive, by when they were heard. A pure state machine: times come in, judgements go out.

    state       event                                       next
    alive       silent for suspect_s                        suspected
    suspected   silent for fail_s                           failed
    suspected   recover_beats signs of life in a row        alive
    failed      recover_beats signs of life in a row        alive

A sign of life is in a row if it came within suspect_s of the one before. So neither one lost beat nor one lucky beat changes anything,
and a node at the edge does not flap. Silence is measured by the judge's monotonic clock alone. Only the leader judges: when a node begins
to lead it takes everybody as just heard, so a change of leaders makes nobody look dead. A judge that was itself asleep (stopped, swapped
out, busy) notices by the gap between its own looks and gives everybody that time back.
"""

from collections.abc import Iterable
from typing import NamedTuple

from isopod.api.cluster import Health
from isopod.cluster.members.config import DetectorSettings


class Judgement(NamedTuple):
    """A node's health changed."""

    node_id: int
    health: Health
    silent_s: float


class _Watched:
    """What is known of one node."""

    __slots__ = ("health", "heard_at_s", "n_in_a_row")

    def __init__(self, heard_at_s: float, health: Health) -> None:
        self.heard_at_s = heard_at_s
        self.health: Health = health
        self.n_in_a_row = 0


class FailureDetector:
    """Watches nodes.

    Args:
        settings: The times.
        now_s: The judge's monotonic clock, in seconds.
    """

    def __init__(self, settings: DetectorSettings, now_s: float) -> None:
        self.settings = settings
        """May be replaced: with more nodes beats are rarer."""
        self._nodes: dict[int, _Watched] = {}
        self._looked_at_s = now_s

    def watch(self, node_id: int, now_s: float, health: Health = "alive") -> None:
        """Begin to watch a node, as just heard; one that is watched already goes on as it is.

        Args:
            node_id: The node.
            now_s: The time.
            health: What was thought of it before.
        """
        if node_id not in self._nodes:
            self._nodes[node_id] = _Watched(now_s, health)

    def keep(self, node_ids: Iterable[int]) -> None:
        """Forget all nodes but these."""
        wanted = dict.fromkeys(node_ids)
        for node_id in [known for known in self._nodes if known not in wanted]:
            del self._nodes[node_id]

    def forget(self, node_id: int) -> None:
        """Watch a node no more."""
        self._nodes.pop(node_id, None)

    def heard(self, node_id: int, now_s: float) -> Judgement | None:
        """Take note of a sign of life; return the new judgement, if it brought the node back."""
        node = self._nodes.get(node_id)
        if node is None:
            return None
        node.n_in_a_row = node.n_in_a_row + 1 if now_s - node.heard_at_s < self.settings.suspect_s else 1
        node.heard_at_s = now_s
        if node.health == "alive" or node.n_in_a_row < self.settings.recover_beats:
            return None
        node.health = "alive"
        return Judgement(node_id, "alive", 0.0)

    def look(self, now_s: float) -> list[Judgement]:
        """Judge everybody; return who became suspected or failed, in the order in which they came."""
        gap_s, self._looked_at_s = now_s - self._looked_at_s, now_s
        asleep_s = gap_s - self.settings.beat_s if gap_s > 2 * self.settings.beat_s else 0.0
        judgements = []
        for node_id, node in self._nodes.items():
            if asleep_s > 0:
                node.heard_at_s = min(now_s, node.heard_at_s + asleep_s)
            silent_s = now_s - node.heard_at_s
            health = self._judge(node.health, silent_s)
            if health != node.health:
                node.health = health
                node.n_in_a_row = 0
                judgements.append(Judgement(node_id, health, silent_s))
        return judgements

    def health(self, node_id: int) -> Health:
        """Return what is thought of a node."""
        node = self._nodes.get(node_id)
        return node.health if node is not None else "unknown"

    def silent_s(self, node_id: int, now_s: float) -> float | None:
        """Return how long a node was not heard, None if it is not watched."""
        node = self._nodes.get(node_id)
        return max(0.0, now_s - node.heard_at_s) if node is not None else None

    def _judge(self, before: Health, silent_s: float) -> Health:
        if before == "failed" or silent_s >= self.settings.fail_s:
            return "failed"
        if before == "suspected" or silent_s >= self.settings.suspect_s:
            return "suspected"
        return before
