"""Pulse: a node's own signs of life to the leader, which it finds by itself. Agents learn all they know by the answers.

Who leads is known from Raft where there is a replica; an agent asks its last leader, then the replicas it was told of, and follows what
they answer. The leader says how often it wants to hear.
"""

import asyncio
from collections.abc import Callable
from typing import Final

import isopod
from isopod.cluster.members import wire as w
from isopod.cluster.members.book import Book
from isopod.cluster.members.config import ClusterConfig
from isopod.cluster.members.identity import Identity
from isopod.cluster.members.links import Links
from isopod.runtime.logger import Logger
from isopod.world.errors import IdentityConflict, IsopodError
from isopod.world.world import World

TIMEOUT_S: Final = 2.0
CONFLICTS_MAX: Final = 3
"""A replica that is behind knows an earlier life of this node, and refuses it: only who is refused so often in a row is out for good."""
ASK_EVERY: Final = 4
"""A replica without a leader asks another one at every so many looks: who could lead may have joined while this node was away, and is not
answered without an address."""
JITTER: Final = 0.2
"""Beats of many nodes must not come together."""


class Pulse:
    """Shows signs of life.

    Args:
        world: For chance and time.
        config: What the node was told.
        identity: Who it is.
        book: Where the others are.
        links: Ways to them.
        address: Where this node listens.
        leader: Returns who leads by this node's own replica; 0 for nobody, and on an agent.
        applied: Returns how far this node's replica is.
        logger: Told when nobody answers.
    """

    def __init__(
        self,
        world: World,
        config: ClusterConfig,
        identity: Identity,
        *,
        book: Book,
        links: Links,
        address: str,
        leader: Callable[[], int],
        applied: Callable[[], int],
        logger: Logger,
    ) -> None:
        self.reply: w.BeatReply | None = None
        """The last leader's last answer."""
        self.replied_at_s = 0.0
        self.why = ""
        """What the last try failed for."""
        self.on_reply: Callable[[w.BeatReply], None] = lambda _: None
        self._world = world
        self._config = config
        self._identity = identity
        self._book = book
        self._links = links
        self._address = address
        self._leader = leader
        self._applied = applied
        self._logger = logger
        self._random = world.random.stream("cluster.pulse")
        self._hint = 0
        self._asked = 0
        self._n_leaderless = 0

    async def run(self) -> None:
        """Beat until cancelled.

        Raises:
            IdentityConflict: This node is no member any more.
        """
        n_failed = n_conflicts = 0
        while True:
            target = self._target()
            if target == self._config.node_id:
                await asyncio.sleep(self._config.detector.beat_s)
                continue
            try:
                if target:
                    await self.beat(target)
                n_failed, n_conflicts = (0, 0) if target else (n_failed + 1, n_conflicts)
            except IsopodError as error:
                n_failed += 1
                n_conflicts += isinstance(error, IdentityConflict)
                if n_conflicts >= CONFLICTS_MAX and isinstance(error, IdentityConflict):
                    raise
                self._hint = 0
                self.why = error.message
                if n_failed == 3:
                    self._logger.warning("cluster.leader_silent", leader=target, why=error.message)
            await asyncio.sleep(self._pause_s(n_failed))

    async def beat(self, target: int) -> w.BeatReply:
        """Show one sign of life to a node, and take over what it says. Raises what the call raises."""
        reply = await self._links.call(
            target,
            w.BEAT,
            w.BeatRequest(
                node_id=self._config.node_id,
                incarnation=self._identity.incarnation,
                address=self._address,
                role=self._config.role,
                version=isopod.__version__,
                applied=self._applied(),
                now_ns=self._world.clock.now_ns(),
                book=self.reply.book if self.reply is not None else -1,
            ),
            timeout_s=TIMEOUT_S,
        )
        if reply.peers is not None:
            self._book.tell(reply.peers)
        if reply.leader_id and reply.leader_address and self._book.find(reply.leader_id) is None:
            # It joined while this node was away: without its address it is not answered, and the log that has it does not come.
            self._book.told[reply.leader_id] = w.NodeAddress(reply.leader_id, reply.leader_address, "", "voter")
        self._hint = reply.leader_id
        if reply.leader_id == target:
            self.reply = reply
            self.replied_at_s = asyncio.get_running_loop().time()
            self.why = ""
            self.on_reply(reply)
        return reply

    def _target(self) -> int:
        """Return whom to beat to, 0 for nobody."""
        known = self._leader()
        if known and (known == self._config.node_id or self._book.find(known) is not None):
            return known
        if not known and self._config.role != "agent":
            self._n_leaderless += 1
            if self._n_leaderless % ASK_EVERY:
                return 0
        elif self._hint and self._hint != known:
            return self._hint
        replicas = [peer.node_id for peer in self._book.all() if peer.role != "agent" and peer.node_id != self._config.node_id]
        if not replicas:
            return 0
        self._asked += 1
        return replicas[(self._config.node_id + self._asked) % len(replicas)]

    def _pause_s(self, n_failed: int) -> float:
        beat_s = self.reply.beat_s if self.reply is not None and not n_failed else self._config.detector.beat_s
        if not n_failed and self._hint and self._hint != (self.reply.leader_id if self.reply is not None else 0):
            return 0.0  # somebody else leads: go there
        if 0 < n_failed <= 3:
            beat_s = min(beat_s, 0.1 * 2**n_failed)
        return beat_s * (1 - JITTER * self._random.random())
