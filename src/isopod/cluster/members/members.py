"""Members: the verbs about a cluster's members, on a node that holds a replica. What `isopod cluster` asks for, and what programs call.

A verb may be called on any node: what only the leader can do is handed to it, and to the next one if leadership moves meanwhile, until the
caller's deadline. All of them are safe to repeat: each says what is wanted, and returns when it is so.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from isopod.api import cluster as c
from isopod.cluster.members import events as e
from isopod.cluster.members.config import check_voters_max
from isopod.cluster.members.links import Links
from isopod.cluster.members.plan import survives_without
from isopod.cluster.members.ports import Raft
from isopod.cluster.members.records import HealthRecord, MemberRecord, leaving, wanting
from isopod.cluster.members.registry import Registry
from isopod.cluster.members.roster import Roster, not_found
from isopod.cluster.members.steward import Steward
from isopod.cluster.members.tokens import TokenRecord, new_token, token_record
from isopod.cluster.raft.ports import LeaderChanged, MembersChanged, RaftEvent
from isopod.runtime.logger import Logger
from isopod.wire.service import Method
from isopod.world.errors import DeadlineExceeded, Disconnected, IsopodError, NotLeader, RefusedError, WrongState
from isopod.world.world import World

Q = TypeVar("Q")
R = TypeVar("R")
TIMEOUT_S: Final = 30.0
FORWARD_S: Final = 10.0
POLL_S: Final = 0.02
RETRY_S: Final = 0.1


class Members:
    """The verbs.

    Args:
        world: For tokens and the time.
        own_id: This node.
        raft: Its Raft node.
        registry: The records.
        roster: Changes them.
        links: Ways to other nodes.
        steward: The leader's work.
        logger: Told of what people did.
    """

    def __init__(
        self,
        world: World,
        raft: Raft,
        registry: Registry,
        *,
        own_id: int,
        roster: Roster,
        links: Links,
        steward: Steward,
        logger: Logger,
    ) -> None:
        self.registry = registry
        self.steward = steward
        self._world = world
        self._own_id = own_id
        self._raft = raft
        self._roster = roster
        self._links = links
        self._logger = logger
        self._subscribers: list[e.Subscriber] = []
        registry.on_member = self._on_member
        registry.on_health = self._on_health
        self._unsubscribe = raft.subscribe(self._on_raft)

    def close(self) -> None:
        """Tell and hear nothing more."""
        self._unsubscribe()
        self.registry.on_member = self.registry.on_health = None
        self._subscribers.clear()

    # --- events -------------------------------------------------------------------------------------------------------

    def subscribe(self, callback: e.Subscriber) -> Callable[[], None]:
        """Tell a callback of every event from now on, in the turn in which this node learns of it; it must not wait and must not raise.

        Returns:
            What takes it off again.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    def _tell(self, event: e.Event) -> None:
        for subscriber in list(self._subscribers):
            try:
                subscriber(event)
            except Exception as error:  # noqa: BLE001 - one subscriber's bug is not the others' loss
                self._logger.error("cluster.subscriber_failed", told=type(event).__name__, why=repr(error))

    def _on_member(self, _: str, old: MemberRecord | None, new: MemberRecord | None) -> None:
        self.steward.wake()
        if new is None:
            if old is not None:
                self._links.drop(old.node_id)
                self._tell(e.NodeLeft(old.node_id))
        elif old is None:
            self._tell(e.NodeJoined(new.node_id, new.address))
        elif (old.address, old.role) != (new.address, new.role):
            self._tell(e.NodeChanged(new.node_id, new.address, new.role))

    def _on_health(self, node_id: int, record: HealthRecord | None) -> None:
        if record is None:
            if node_id in self.registry.members:
                self._tell(e.NodeRecovered(node_id))
        else:
            self._tell(e.NodeSuspected(node_id) if record.health == "suspected" else e.NodeFailed(node_id))

    def _on_raft(self, event: RaftEvent) -> None:
        if isinstance(event, LeaderChanged):
            self._tell(e.LeaderChanged(event.leader, event.term))
            self.steward.wake()
        elif isinstance(event, MembersChanged):
            self._tell(e.VotersChanged(event.members.voters, event.members.learners))
            self.steward.wake()

    # --- verbs --------------------------------------------------------------------------------------------------------

    async def leave(self, node_id: int, *, timeout_s: float = TIMEOUT_S) -> c.Changed:
        """Take another node out: demoted first, then removed; its certificate opens nothing any more. Returns when that is done.

        Args:
            node_id: Which; not this one, and not the last that votes.
            timeout_s: How long to try.

        Raises:
            RefusedError: It is this node, the last voter, or the others could not go on without it.
            NotFound: It is no member.
            DeadlineExceeded: It is not done yet; it goes on.
        """
        if node_id == self._own_id:
            raise RefusedError(
                "Cannot remove self from cluster. Use shutdown instead.",
                f"on another member: isopod cluster leave {node_id}; to come back later: stop the node, it stays a member",
            )
        return await self._at_leader(
            c.LEAVE, c.NodeRequest(node_id=node_id, timeout_s=timeout_s), lambda: self.leave_here(node_id, timeout_s), timeout_s
        )

    async def leave_here(self, node_id: int, timeout_s: float = TIMEOUT_S) -> c.Changed:
        """Do `leave` as the leader. Raises as it does, and NotLeader."""
        message = f"Node {node_id} successfully removed from cluster"
        self._check_leader()
        if node_id not in self.registry.members:
            if node_id in self.registry.removed and node_id not in self._raft.members().all():
                return c.Changed(success=True, message=message)  # asked for once more
            raise not_found(node_id)
        if not self.registry.members[node_id].is_leaving:
            self._check_rest(node_id, f"Cannot remove node {node_id} - would leave cluster with no voters", "leave")
            await self._roster.change(node_id, leaving)
        await self._wait(
            lambda: node_id not in self.registry.members and node_id not in self._raft.members().all(), timeout_s, "the removal"
        )
        return c.Changed(success=True, message=message)

    async def promote(self, node_id: int, *, timeout_s: float = TIMEOUT_S) -> c.Changed:
        """Have a learner vote, as soon as it has caught up. Returns when it does.

        Raises:
            NotFound: It is no member.
            WrongState: It is an agent, or there is no room among the voters.
            DeadlineExceeded: Not yet; it will.
        """
        request = c.NodeRequest(node_id=node_id, timeout_s=timeout_s)
        return await self._at_leader(c.PROMOTE, request, lambda: self.promote_here(node_id, timeout_s), timeout_s)

    async def promote_here(self, node_id: int, timeout_s: float = TIMEOUT_S) -> c.Changed:
        """Do `promote` as the leader."""
        self._check_leader()
        record = self.registry.members.get(node_id)
        if record is None:
            raise not_found(node_id)
        if record.role == "agent":
            raise WrongState("node", str(node_id), "an agent", "vote", hint="let it leave and join again with --role node")
        voters, n_max = self._raft.members().voters, self._voters_max()
        if node_id not in voters and len(voters) >= n_max:
            hint = "demote one first: isopod cluster demote ID"
            raise WrongState(
                "cluster", self._cluster_id(), f"full: {len(voters)} of at most {n_max} vote", f"promote node {node_id}", hint=hint
            )
        await self._roster.change(node_id, lambda old: wanting(old, "voter"))
        self.steward.wake()
        await self._wait(lambda: node_id in self._raft.members().voters, timeout_s, "the promotion")
        return c.Changed(success=True, message=f"Node {node_id} votes")

    async def demote(self, node_id: int, *, timeout_s: float = TIMEOUT_S) -> c.Changed:
        """Have a voter only replicate. If it leads, leadership is handed over first. Returns when it votes no more.

        Raises:
            NotFound: It is no member.
            RefusedError: It is the last voter, or the others could not go on without it.
            DeadlineExceeded: Not yet; it goes on.
        """
        request = c.NodeRequest(node_id=node_id, timeout_s=timeout_s)
        return await self._at_leader(c.DEMOTE, request, lambda: self.demote_here(node_id, timeout_s), timeout_s)

    async def demote_here(self, node_id: int, timeout_s: float = TIMEOUT_S) -> c.Changed:
        """Do `demote` as the leader."""
        self._check_leader()
        if node_id not in self.registry.members:
            raise not_found(node_id)
        if node_id in self._raft.members().voters:
            self._check_rest(node_id, f"Cannot demote node {node_id} - would leave cluster with no voters", "demote")
        await self._roster.change(node_id, lambda old: wanting(old, "learner"))
        self.steward.wake()
        await self._wait(lambda: node_id not in self._raft.members().voters, timeout_s, "the demotion")
        return c.Changed(success=True, message=f"Node {node_id} votes no more")

    async def transfer(self, node_id: int = 0, *, timeout_s: float = FORWARD_S) -> c.Changed:
        """Hand leadership over.

        Args:
            node_id: To whom; 0 for who is most fit.
            timeout_s: How long to try.

        Raises:
            NotFound: It does not vote.
            WrongState: It is not heard of.
            DeadlineExceeded: It did not take over.
        """
        request = c.TransferRequest(node_id=node_id, timeout_s=timeout_s)
        return await self._at_leader(c.TRANSFER, request, lambda: self.transfer_here(node_id, timeout_s), timeout_s)

    async def transfer_here(self, node_id: int, timeout_s: float = FORWARD_S) -> c.Changed:
        """Do `transfer` as the leader."""
        self._check_leader()
        if node_id == self._own_id:
            return c.Changed(success=True, message=f"Node {node_id} leads")
        await self._raft.transfer_leadership(node_id or None, timeout_s=timeout_s)
        return c.Changed(success=True, message=f"Node {self._raft.leader} leads")

    async def set_voters_max(self, voters_max: int, *, timeout_s: float = FORWARD_S) -> c.Changed:
        """Change how many nodes vote at most. The leader promotes who waits for room, or demotes who is too many, the dead first.

        Args:
            voters_max: 1, 3, 5 or 7.
            timeout_s: How long to try.

        Raises:
            InvalidArgument: It is none of these.
        """
        check_voters_max(voters_max)
        record = await self._roster.set_voters_max(voters_max, timeout_s=timeout_s)
        self.steward.wake()
        self._logger.info("cluster.voters_max", voters_max=record.voters_max)
        return c.Changed(success=True, message=f"At most {record.voters_max} nodes vote")

    # --- tokens -------------------------------------------------------------------------------------------------------

    async def create_token(self, request: c.CreateToken) -> c.CreatedToken:
        """Make a join token; its text is returned here and kept nowhere."""
        text = new_token(self._world)
        record = token_record(text, now_ns=self._world.clock.now_ns(), valid_s=request.valid_s, uses=request.uses, role=request.role)
        await self._roster.add_token(record)
        self._logger.info("cluster.token_created", token=record.id, uses=record.uses, role=record.role)
        return c.CreatedToken(token=text, entry=self._token_entry(record))

    def tokens(self) -> c.TokenList:
        """Return all tokens, the newest last."""
        known = sorted(self.registry.tokens.values(), key=lambda record: (record.created_at_ns, record.id))
        return c.TokenList(tokens=tuple(self._token_entry(record) for record in known))

    async def revoke_token(self, token_id: str) -> c.Changed:
        """Let nobody in by a token any more.

        Raises:
            NotFound: There is no such token.
        """
        record = await self._roster.revoke_token(token_id)
        self._logger.info("cluster.token_revoked", token=record.id)
        return c.Changed(success=True, message=f"Token {record.id} lets nobody in any more")

    # --- inside -------------------------------------------------------------------------------------------------------

    def _token_entry(self, record: TokenRecord) -> c.TokenEntry:
        return c.TokenEntry(
            id=record.id,
            created_at_ns=record.created_at_ns,
            expires_at_ns=record.expires_at_ns,
            uses_left=record.uses_left,
            uses=record.uses,
            role=record.role,
            is_revoked=record.is_revoked,
            is_usable=record.is_usable(self._world.clock.now_ns()),
        )

    def _check_leader(self) -> None:
        if not self._raft.is_leader:
            raise NotLeader(self._own_id, self._raft.leader)

    def _check_rest(self, node_id: int, last: str, verb: str) -> None:
        """Refuse to take a voter away if nobody or no quorum would be left."""
        status = self._raft.status(with_digest=False)
        if node_id not in status.voters:
            return
        if len(status.voters) == 1:
            raise RefusedError(last, "add and promote another node first; to end the cluster, stop the node")
        if not survives_without(self.steward.view(status, 0.0), node_id):
            hint = "bring the failed nodes back first, or take those out: isopod cluster members"
            raise WrongState("cluster", self._cluster_id(), "short of voters that are alive", f"let node {node_id} {verb}", hint=hint)

    def _voters_max(self) -> int:
        return self.registry.cluster.voters_max if self.registry.cluster is not None else 1

    def _cluster_id(self) -> str:
        return self.registry.cluster.cluster_id if self.registry.cluster is not None else ""

    async def _at_leader(self, method: Method[Q, R], request: Q, act: Callable[[], Awaitable[R]], timeout_s: float) -> R:
        """Do something where the leader is, and again where the next one is, until the deadline."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        last: IsopodError = NotLeader(self._own_id, 0)
        while (left_s := ends_at - loop.time()) > 0:
            try:
                leader = self._raft.leader
                if leader == self._own_id:
                    return await act()
                if leader:
                    return await self._links.call(leader, method, request, timeout_s=left_s)
            except (NotLeader, Disconnected) as error:  # leadership moved, or the leader died: the next one does what is left
                last = error
            await asyncio.sleep(RETRY_S)
        if isinstance(last, NotLeader):
            raise WrongState("cluster", self._cluster_id(), "without a leader", method.name.partition(".")[2], hint=_NO_QUORUM)
        raise DeadlineExceeded(f"{method.name} ({last.message})", timeout_s)

    async def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._check_leader()
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise DeadlineExceeded(what, timeout_s) from None


_NO_QUORUM: Final = (
    "more than half of the voters must run and reach each other: isopod cluster members; if they are lost for good: isopod cluster recover"
)
