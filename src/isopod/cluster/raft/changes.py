"""Changes: who is a member, and who leads, changed on the leader's word.

One change at a time, learners first. A learner is promoted when it is hardly behind, a voter is demoted before it is removed, a leader
hands over before it is demoted or removed, and no voter goes if the others alone could not agree.

Source: Ongaro 2014, sections 3.10 (hand-over) and 4.1 to 4.4 (changes of members).
"""

import asyncio
from collections.abc import Callable
from typing import Final, TypeVar

from isopod.cluster.raft.core import Change, ConfChange, CoreStatus, ProposalDropped
from isopod.cluster.raft.driver import Driver
from isopod.cluster.raft.ports import ChangeKind, MemberChange, Members, NodeId
from isopod.world.errors import AlreadyExists, DeadlineExceeded, InUse, InvalidArgument, NotFound, NotLeader, RefusedError, WrongState

T = TypeVar("T")
HEARD_ELECTIONS: Final = 4
"""Election timeouts after which a new leader has heard of everybody who is there."""
_WHAT: Final = {
    ChangeKind.ADD_LEARNER: "add_learner",
    ChangeKind.PROMOTE: "add_voter",
    ChangeKind.DEMOTE: "add_learner",
    ChangeKind.REMOVE: "remove",
}


class Changes:
    """The changes of one node.

    Args:
        driver: Whose core.
    """

    def __init__(self, driver: Driver) -> None:
        self.node_id = driver.node_id
        self.cluster_id = driver.log.identity.cluster_id
        self._driver = driver
        self._is_changing = False

    async def change(self, change: MemberChange, timeout_s: float) -> Members:
        """See `RaftNode.change_member`."""
        self.check_leader()
        if self._is_changing:
            raise InUse("the membership of cluster", self.cluster_id, "another change", "one at a time: try again")
        self._is_changing = True
        try:
            async with asyncio.timeout(timeout_s):
                return await self._change(change, timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"the change of member {change.node_id}", timeout_s) from None
        finally:
            self._is_changing = False

    async def hand_over(self, to: NodeId | None, timeout_s: float) -> NodeId:
        """See `RaftNode.transfer_leadership`."""
        driver = self._driver
        ends_at = driver.loop.time() + timeout_s
        term = driver.term
        if to == self.node_id:
            return to
        while True:
            target = await self._patiently(lambda: self.heir(to))
            driver.core.transfer_leader(target)
            driver.wake()
            left_s = ends_at - driver.loop.time()
            try:
                await driver.wait(lambda: _is_over(driver, term), min(left_s, driver.settings.transfer_s), "the hand-over")
            except DeadlineExceeded:
                if driver.loop.time() >= ends_at:
                    raise DeadlineExceeded(f"the hand-over to node {target}", timeout_s) from None
                if driver.role == "leader" and driver.term == term:
                    continue
                await driver.wait(lambda: _is_over(driver, term), ends_at - driver.loop.time(), "the hand-over")
            return driver.leader

    def heir(self, to: NodeId | None) -> NodeId:
        """Return to whom to hand over. Raises as `RaftNode.transfer_leadership`."""
        status = self._driver.core.status()
        voters = [peer for peer in status.progress if peer.id in self._driver.conf_state.voters and peer.id != self.node_id]
        if to is not None:
            voters = [peer for peer in voters if peer.id == to]
            if not voters:
                raise NotFound("voter", str(to), "only a voter can lead: see `isopod cluster members`")
        heard = sorted((-peer.match, peer.id) for peer in voters if self._driver.is_heard(peer.id))
        if not heard:
            who = "every other voter" if to is None else f"node {to}"
            raise WrongState("cluster", self.cluster_id, f"such that {who} is not heard of", "hand over", hint="is it running?")
        return heard[0][1]

    def check_leader(self) -> None:
        """Refuse what only a leader may do. Raises NotLeader."""
        if self._driver.role != "leader":
            raise NotLeader(self.node_id, self._driver.leader)

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _patiently(self, check: Callable[[], T]) -> T:
        """Return what a check returns; a leader that has just begun waits until it had time to hear of everybody."""
        driver = self._driver
        while True:
            try:
                return check()
            except WrongState:
                if driver.role != "leader" or driver.loop.time() - driver.led_since >= HEARD_ELECTIONS * driver.settings.election_s:
                    raise
            await asyncio.sleep(driver.settings.tick_s)

    async def _change(self, change: MemberChange, timeout_s: float) -> Members:
        driver = self._driver
        first = "the first entry of the term"
        await driver.wait(lambda: driver.is_serving or driver.role != "leader", timeout_s, first, is_polled=True)
        self.check_leader()
        kind, node_id = change
        await self._patiently(lambda: self._check_change(kind, node_id))
        if kind in {ChangeKind.DEMOTE, ChangeKind.REMOVE} and node_id == self.node_id:
            raise NotLeader(self.node_id, await self.hand_over(None, timeout_s))
        if kind is ChangeKind.REMOVE and node_id in driver.conf_state.voters:
            await self._propose_change(ChangeKind.DEMOTE, node_id)
        return await self._propose_change(kind, node_id)

    async def _propose_change(self, kind: ChangeKind, node_id: NodeId) -> Members:
        driver = self._driver
        try:
            index = driver.core.propose_conf_change(ConfChange((Change(_WHAT[kind], node_id),)))
        except ProposalDropped as error:
            if error.why == "conf_change_pending":
                raise InUse("the membership of cluster", self.cluster_id, "another change", "one at a time: try again") from None
            raise NotLeader(self.node_id, driver.leader if driver.leader != self.node_id else 0) from None
        future = driver.await_change(index)
        driver.wake()
        await future
        return driver.members

    def _check_change(self, kind: ChangeKind, node_id: NodeId) -> None:
        """Refuse a change that makes no sense, or after which the cluster could not go on."""
        members = self._driver.members
        name = str(node_id)
        if kind is ChangeKind.ADD_LEARNER:
            if node_id < 1:
                raise InvalidArgument("node id", node_id, "must be 1 or more")
            if node_id in members.all():
                raise AlreadyExists("member", name)
            return
        if node_id not in members.all():
            raise NotFound("member", name, "see `isopod cluster members`")
        if kind is ChangeKind.PROMOTE:
            if node_id in members.voters:
                raise AlreadyExists("voter", name)
            self._check_caught_up(self._driver.core.status(), node_id)
            return
        if kind is ChangeKind.DEMOTE and node_id in members.learners:
            raise AlreadyExists("learner", name)
        if node_id in members.voters:
            self._check_rest([voter for voter in members.voters if voter != node_id], name)

    def _check_caught_up(self, status: CoreStatus, node_id: NodeId) -> None:
        behind = next(
            (status.last_index - peer.match for peer in status.progress if peer.id == node_id and self._driver.is_heard(node_id)), None
        )
        if behind is None:
            raise WrongState("learner", str(node_id), "not heard of", "promote it", hint="is it running, and reachable from the leader?")
        if behind > self._driver.settings.caught_up_entries:
            raise WrongState("learner", str(node_id), f"{behind} entries behind", "promote it", hint="try again when it has caught up")

    def _check_rest(self, rest: list[NodeId], name: str) -> None:
        """Refuse to take a voter away if the others alone could not agree."""
        if not rest:
            raise RefusedError(f"member {name} is the last voter", "add another one first, or stop the cluster")
        n_alive = sum(voter == self.node_id or self._driver.is_heard(voter) for voter in rest)
        if n_alive <= len(rest) // 2:
            n_voters = len(rest)
            why = f"{n_alive} of the {n_voters} other voters are heard of"
            raise WrongState("cluster", self.cluster_id, why, f"spare member {name}", hint="bring the others back first")


def _is_over(driver: Driver, term: int) -> bool:
    """Whether somebody else leads, or this node again in a later term."""
    return bool(driver.leader) and (driver.leader != driver.node_id or driver.term != term)
