"""The plan: what the leader does next so that who votes becomes what is wanted. A pure function of what it sees; one action at a time.

In this order, the first that applies:

    a leaving node       hand leadership over if it is the leader; demote it; remove it; write down that this life of it is over
    a stranger in Raft   a replica whose record says that it left: remove it
    a demoted voter      (a person wished it, or there are too many) demote it; first hand leadership over if it is the leader
    a new replica        add it as learner: learners cost no quorum
    a failed voter       with a spare learner ready: demote it, so that the spare has room
    a ready learner      promote it, if it wants to vote, is alive, has caught up, and there is room
    a long failed node   let it leave, if those that live are a quorum with and without it

One change at a time, learner first, demoted before removed: so a quorum of the old configuration always is one of the new, and no step
needs the node that is its object (raft-rs takes configurations when they are applied; etcd-io/etcd#12359 is what happens otherwise).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from isopod.api.cluster import Health
from isopod.cluster.members.config import DetectorSettings
from isopod.cluster.members.records import MemberRecord

Verb = Literal["add_learner", "promote", "demote", "remove", "transfer", "bury", "let_go"]
"""bury: write down that a life is over, and drop the records. let_go: mark a dead node as leaving."""


class Action(NamedTuple):
    """What to do next."""

    verb: Verb
    node_id: int
    why: str


class View(NamedTuple):
    """What the leader sees."""

    own_id: int
    voters: tuple[int, ...]
    learners: tuple[int, ...]
    members: Mapping[int, MemberRecord]
    healths: Mapping[int, Health]
    """Of those that are not alive."""
    failed_s: Mapping[int, float]
    """Since when those that failed have done so, in seconds."""
    ready: tuple[int, ...]
    """Learners that have caught up and are connected."""
    buried: Mapping[int, tuple[str, ...]]
    """Lives that are over, by id."""
    voters_max: int
    settings: DetectorSettings

    def is_alive(self, node_id: int) -> bool:
        """Return whether nothing is held against a node."""
        return self.healths.get(node_id, "alive") == "alive"

    @property
    def n_alive(self) -> int:
        """Voters that are alive."""
        return sum(1 for node_id in self.voters if self.is_alive(node_id))


def next_action(view: View) -> Action | None:
    """Return what to do next, None if all is as wanted."""
    for look in (_leave, _strangers, _step_down, _add, _replace, _promote, _clean):
        action = look(view)
        if action is not None:
            return action
    return None


def survives_without(view: View, node_id: int) -> bool:
    """Return whether the voters can decide to go on without one of them, and go on then: those alive are a quorum before and after."""
    n_others = len(view.voters) - 1
    n_others_alive = view.n_alive - (1 if view.is_alive(node_id) else 0)
    return n_others >= 1 and view.n_alive >= len(view.voters) // 2 + 1 and n_others_alive >= n_others // 2 + 1


def _leave(view: View) -> Action | None:
    for node_id, record in sorted(view.members.items()):
        if not record.is_leaving:
            continue
        if node_id in view.voters:
            if len(view.voters) == 1:
                continue  # nobody would be left; the verb refuses it, this one slipped in between
            if node_id == view.own_id:
                return Action("transfer", 0, f"node {node_id} leaves")
            return Action("demote", node_id, "it leaves")
        if node_id in view.learners:
            return Action("remove", node_id, "it leaves")
        return Action("bury", node_id, "it left")
    return None


def _strangers(view: View) -> Action | None:
    for node_id in (*view.learners, *view.voters):
        if node_id in view.members or node_id not in view.buried or node_id == view.own_id:
            continue
        if node_id in view.voters and len(view.voters) > 1:
            return Action("demote", node_id, "it left")
        if node_id in view.learners:
            return Action("remove", node_id, "it left")
    return None


def _step_down(view: View) -> Action | None:
    if len(view.voters) < 2:
        return None
    unwanted = [
        node_id
        for node_id in view.voters
        if (record := view.members.get(node_id)) is not None and not record.is_leaving and record.role != "voter"
    ]
    if not unwanted and len(view.voters) > view.voters_max:
        dead_first = sorted(view.voters, key=lambda node_id: (view.is_alive(node_id), node_id == view.own_id, -node_id))
        unwanted = dead_first[:1]
    for node_id in unwanted:
        if node_id == view.own_id:
            return Action("transfer", 0, f"node {node_id} stops voting")
        return Action("demote", node_id, "it is to vote no more")
    return None


def _add(view: View) -> Action | None:
    for node_id, record in sorted(view.members.items()):
        is_replica = node_id in view.voters or node_id in view.learners
        if not is_replica and record.role != "agent" and not record.is_leaving:
            return Action("add_learner", node_id, "it joined")
    return None


def _replace(view: View) -> Action | None:
    if len(view.voters) < view.voters_max or not _spare(view):
        return None
    for node_id in view.voters:
        is_long_dead = view.failed_s.get(node_id, 0.0) >= view.settings.replace_s
        if view.healths.get(node_id) == "failed" and is_long_dead and node_id != view.own_id and survives_without(view, node_id):
            return Action("demote", node_id, "it failed, and another is ready to vote in its place")
    return None


def _promote(view: View) -> Action | None:
    spare = _spare(view)
    if spare and len(view.voters) < view.voters_max:
        return Action("promote", spare, "it has caught up")
    return None


def _spare(view: View) -> int:
    """Return a learner that may vote, 0 if there is none."""
    for node_id in view.learners:
        record = view.members.get(node_id)
        wants = record is not None and record.role == "voter" and not record.is_leaving
        if wants and node_id in view.ready and view.is_alive(node_id):
            return node_id
    return 0


def _clean(view: View) -> Action | None:
    for node_id, record in sorted(view.members.items()):
        limit_s = view.settings.agent_cleanup_s if record.role == "agent" else view.settings.cleanup_s
        is_due = 0 < limit_s <= view.failed_s.get(node_id, 0.0)
        if record.is_leaving or not is_due or node_id == view.own_id:
            continue
        if node_id not in view.voters or survives_without(view, node_id):
            return Action("let_go", node_id, f"it has not been heard for {view.failed_s[node_id]:.0f} s")
    return None
