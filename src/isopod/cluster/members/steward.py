"""Steward: the leader's housekeeping. It listens for signs of life, judges silence, and carries out the plan, one action at a time.

Every node has one; it works while its node leads and forgets everything when that ends: what matters is in the records and in Raft's
configuration, so the next leader goes on from there. An action that fails is tried again after a pause, and logged.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from isopod.cluster.members.config import ClusterConfig
from isopod.cluster.members.detector import FailureDetector
from isopod.cluster.members.plan import Action, View, next_action
from isopod.cluster.members.ports import Raft
from isopod.cluster.members.records import leaving
from isopod.cluster.members.registry import Registry
from isopod.cluster.members.roster import Roster
from isopod.cluster.raft.ports import ChangeKind, MemberChange, RaftStatus
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry as Metrics
from isopod.runtime.tasks import TaskGroup
from isopod.world.clock import Clock
from isopod.world.errors import IsopodError

CHANGE_TIMEOUT_S: Final = 5.0
RETRY_S: Final = 0.5
CATCH_UP_POLL_S: Final = 0.05
BEATS_PER_S_MAX: Final = 500.0
"""How many signs of life a leader asks for, of all nodes together."""
_NS: Final = 1_000_000_000
_KINDS: Final = {
    "add_learner": ChangeKind.ADD_LEARNER,
    "promote": ChangeKind.PROMOTE,
    "demote": ChangeKind.DEMOTE,
    "remove": ChangeKind.REMOVE,
}
HandKey = Callable[[int], Awaitable[None]]
"""Gives a node what it needs to vote."""


class Steward:
    """The housekeeping of one node.

    Args:
        config: What the node was told.
        raft: Its Raft node.
        registry: The records.
        roster: Changes them.
        hand_key: Called before a promotion.
        clock: For silence.
        logger: Told of every action.
        metrics: Counts.
    """

    def __init__(
        self,
        config: ClusterConfig,
        raft: Raft,
        registry: Registry,
        roster: Roster,
        *,
        hand_key: HandKey,
        clock: Clock,
        logger: Logger,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._raft = raft
        self._registry = registry
        self._roster = roster
        self._hand_key = hand_key
        self._clock = clock
        self._logger = logger
        self._detector: FailureDetector | None = None
        self._failed_at_s: dict[int, float] = {}
        self._offsets_s: dict[int, float] = {}
        self._woken = asyncio.Event()
        self._actions = metrics.counter("isopod_cluster_member_actions_total", "Steps of the leader towards the members that are wanted.")
        self._failures = metrics.counter("isopod_cluster_member_action_failures_total", "Those that failed, and are tried again.")
        self._beats = metrics.counter("isopod_cluster_beats_total", "Signs of life that this node heard as the leader.")
        self._suspects = metrics.counter("isopod_cluster_nodes_suspected_total", "Nodes this node suspected as the leader.")
        self._failed = metrics.counter("isopod_cluster_nodes_failed_total", "Nodes this node took for dead as the leader.")

    # --- what others tell it and ask it -------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something changed: look soon."""
        self._woken.set()

    def heard(self, node_id: int, *, its_now_ns: int) -> None:
        """A node showed a sign of life, and told its time."""
        self._beats.inc()
        self._offsets_s[node_id] = (its_now_ns - self._clock.now_ns()) / _NS
        if self._detector is not None and self._detector.heard(node_id, self._now_s()) is not None:
            self.wake()

    def silent_s(self, node_id: int) -> float | None:
        """Return how long a node was not heard; None where nobody listens."""
        return self._detector.silent_s(node_id, self._now_s()) if self._detector is not None else None

    def clock_off_s(self, node_id: int) -> float | None:
        """Return how far a node's clock was ahead when it was last heard; None where nobody listens."""
        return self._offsets_s.get(node_id) if self._detector is not None else None

    def beat_s(self) -> float:
        """Return how often nodes are to show signs of life: rarer, the more there are."""
        return max(self._config.detector.beat_s, len(self._registry.members) / BEATS_PER_S_MAX)

    def lease_s(self) -> float:
        """Return how long a node counts as alive without another sign."""
        return self._config.detector.suspect_s * self._stretch()

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled. Judging goes on while a step is waited for."""
        async with TaskGroup("steward") as group:
            group.create_task(self._judge(), name="cluster-judge")
            group.create_task(self._work(), name="cluster-steward")

    async def _judge(self) -> None:
        while True:
            if self._raft.is_leader:
                self._look()
            else:
                self._forget()
            await asyncio.sleep(self._config.detector.beat_s)

    def _look(self) -> None:
        now_s = self._now_s()
        detector = self._watch(now_s)
        for judgement in detector.look(now_s):
            (self._failed if judgement.health == "failed" else self._suspects).inc()
            self._logger.warning("cluster.node_" + judgement.health, node=judgement.node_id, silent_s=round(judgement.silent_s, 3))
        self.wake()

    async def _work(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            try:
                while (status := self._raft.status(with_digest=False)).role == "leader" and await self._turn(status):
                    pass
                if status.role == "leader" and self._is_somebody_catching_up(status):
                    asyncio.get_running_loop().call_later(CATCH_UP_POLL_S, self.wake)
            except IsopodError as error:
                self._failures.inc()
                self._logger.warning("cluster.steward_failed", why=error.message)
                await asyncio.sleep(RETRY_S)
                self.wake()

    async def _turn(self, status: RaftStatus) -> bool:
        """Do one step; return whether there may be another."""
        now_s = self._now_s()
        await self._publish(status, self._watch(now_s), now_s)
        action = next_action(self.view(status, now_s))
        if action is None:
            return False
        await self._do(action)
        return True

    def _is_somebody_catching_up(self, status: RaftStatus) -> bool:
        members = self._registry.members
        n_max = self._registry.cluster.voters_max if self._registry.cluster is not None else 0
        return len(status.voters) < n_max and any(
            (record := members.get(node_id)) is not None and record.role == "voter" and self._registry.health(node_id) == "alive"
            for node_id in status.learners
        )

    def view(self, status: RaftStatus, now_s: float) -> View:
        """Return what the plan is made from."""
        registry, config = self._registry, self._config
        near = status.last_index - config.raft.caught_up_entries
        return View(
            own_id=status.node_id,
            voters=status.voters,
            learners=status.learners,
            members=registry.members,
            healths={node_id: record.health for node_id, record in registry.healths.items()},
            failed_s={node_id: now_s - at_s for node_id, at_s in self._failed_at_s.items()},
            ready=tuple(peer.node_id for peer in status.peers if peer.is_connected and peer.match and peer.match >= near),
            buried={node_id: record.incarnations for node_id, record in registry.removed.items()},
            voters_max=registry.cluster.voters_max if registry.cluster is not None else config.voters_max,
            settings=config.detector,
        )

    def _watch(self, now_s: float) -> FailureDetector:
        """Return the detector, watching exactly the present members but ourselves."""
        stretch, settings = self._stretch(), self._config.detector
        detector = self._detector = self._detector or FailureDetector(settings, now_s)
        detector.settings = settings._replace(suspect_s=settings.suspect_s * stretch, fail_s=settings.fail_s * stretch)
        others = [node_id for node_id in self._registry.members if node_id != self._config.node_id]
        for node_id in others:
            detector.watch(node_id, now_s, self._registry.health(node_id))
        detector.keep(others)
        return detector

    async def _publish(self, status: RaftStatus, detector: FailureDetector, now_s: float) -> None:
        """Have the records say what the detector says; what fails is done in a later turn."""
        for node_id in list(self._registry.members):
            health = detector.health(node_id) if node_id != status.node_id else "alive"
            if health == "failed":
                self._failed_at_s.setdefault(node_id, now_s)
            else:
                self._failed_at_s.pop(node_id, None)
            if health != self._registry.health(node_id) and health != "unknown":
                await self._roster.judge(node_id, health, status.node_id)
        for node_id in [known for known in self._failed_at_s if known not in self._registry.members]:
            del self._failed_at_s[node_id]

    async def _do(self, action: Action) -> None:
        self._logger.info("cluster.step", verb=action.verb, node=action.node_id, why=action.why)
        self._actions.inc()
        node_id = action.node_id
        if action.verb == "transfer":
            await self._raft.transfer_leadership(None, timeout_s=CHANGE_TIMEOUT_S)
        elif action.verb == "bury":
            await self._roster.bury(node_id, action.why)
        elif action.verb == "let_go":
            await self._roster.change(node_id, leaving)
        else:
            if action.verb == "promote":
                await self._hand_key(node_id)
            await self._raft.change_member(MemberChange(_KINDS[action.verb], node_id), timeout_s=CHANGE_TIMEOUT_S)

    def _forget(self) -> None:
        self._detector = None
        self._failed_at_s.clear()
        self._offsets_s.clear()

    def _stretch(self) -> float:
        """Return by how much times are longer because beats are rarer."""
        return self.beat_s() / self._config.detector.beat_s

    def _now_s(self) -> float:
        return self._clock.monotonic_ns() / _NS
