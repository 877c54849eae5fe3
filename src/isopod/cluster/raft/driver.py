"""Driver: the loop around one core. It gives the core its disk, its clock and its peers, and the machine its commands.

One turn, always in this order: ticks that passed · what peers sent · what callers propose and ask · every Ready · what is committed. A turn
is a plain callback of the event loop, begun by whatever happened first; all that happens until then shares it. No message has a task.

The disk is not waited for: the journal tells when a Ready is durable, and meanwhile the next one is made. `messages` leave at once,
`persisted_messages` when their Ready is durable. Committed entries are applied in slices, so that heartbeats pass between them.

Time is ticked lazily: one timer, set for the next thing the core would do by itself. A driver that was stopped for longer than two ticks
does not take its own pause for the leader's silence: before the decisive tick it first gives the sockets a look.

What ends the process (`world.processes.abort`): a core that panicked, a machine that raised, a journal that failed. Memory and disk would
no longer say the same, and the disk is what counts.

Source: the header of `isopod.cluster.raft.core`; Ongaro 2014, sections 4.2.3 (pre-vote), 6.4 (reads), 10.2 (writing to the leader's disk in
parallel).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, NoReturn

from isopod.cluster.raft.codec import APPEND_START, ELECTION_STARTS, decode_envelope, decode_hard_state, is_sign_of_life, only_commits
from isopod.cluster.raft.core import CONF_CHANGE, ConfState, CorePanicked, ProposalDropped, RaftCore, Ready, SoftState
from isopod.cluster.raft.log import RaftLog, SnapshotRecord, members_of
from isopod.cluster.raft.metrics import RaftMetrics
from isopod.cluster.raft.ports import (
    Applied,
    Batch,
    LeaderChanged,
    LogLost,
    Members,
    MembersChanged,
    NodeId,
    RaftEvent,
    Restored,
    StateMachine,
    Subscriber,
    Transport,
)
from isopod.cluster.raft.proposals import Proposals
from isopod.cluster.raft.reads import Reads
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.raft.snapshots import Snapshot, SnapshotHeader
from isopod.runtime.logger import Logger
from isopod.runtime.scheduling import SchedulingGroup
from isopod.runtime.waiters import Waiters
from isopod.world.errors import BadRecord, DeadlineExceeded, InvalidArgument, IsopodError, LeadershipLost, NotLeader, NotStarted
from isopod.world.failpoints import Failpoint
from isopod.world.world import World

RAFT: Final = SchedulingGroup("raft", 1000, latency_s=0.001)
LATE_TICKS: Final = 2
STAND_FIRST_S: Final = 0.002
STAND_STEP_S: Final = 0.02
"""Followers that saw the leader's connection close stand one after the other: the second only if the first did not win meanwhile."""
STAND_AGAIN_S: Final = 0.03
STANDS_MAX: Final = 6
HOLD_S: Final = 0.005
"""How long the news that something is committed waits for something to travel with: alone it costs every member a turn."""
FEW: Final = 1
"""With more proposals and reads under way, what peers send waits for the end of the loop's turn, to share one of the driver's."""
INBOX_BYTES_MAX: Final = 64 << 20
ALONE: Final = 4
"""After so many proposals or reads in a row that came one at a time, the next is not kept waiting for company."""
_EPSILON: Final = 1e-6
_LONG_AGO: Final = -1e9


class _Points(NamedTuple):
    """The failpoints, each named "raft." and its field."""

    before_step: Failpoint
    before_propose: Failpoint
    before_append: Failpoint
    before_send: Failpoint
    before_apply: Failpoint


class Driver:
    """The loop around one core. Made by `RaftNode`.

    Args:
        world: Time and the process's end.
        core: The consensus.
        log: Its disk.
        machine: What commands are for; it stands at the log's snapshot.
        transport: Its peers.
        settings: Times and bounds.
        snapshot: Where the machine stands, None for an empty one.
        logger: Told of what people should know.
        metrics: Counts.
        is_quiet: Whether to neither stand nor vote, until told otherwise.
    """

    # CPython keeps no more than 30 attributes of an object in place; the rest of the hot path would look all of them up in a dictionary.
    __slots__ = (
        "_changes", "_context", "_has_appended", "_heard_at", "_held", "_held_at", "_inbox", "_inbox_bytes", "_installed_by", "_is_due",
        "_is_holding", "_is_in_turn", "_is_open", "_is_watching_reads", "_logger", "_metrics", "_n_stands", "_points", "_round_began",
        "_ticked_at", "_timer", "_timer_at", "_to_apply", "_transport", "_unsaved", "_world", "applied", "applied_term", "changed",
        "commit", "conf_state", "core", "is_quiet", "last_stamp_ns", "leader", "led_since", "log", "loop", "machine", "n_turns",
        "node_id", "on_slice", "on_wanted", "proposals", "reads", "received", "role", "settings", "subscribers", "term",
    )  # fmt: skip

    def __init__(  # noqa: PLR0915 - as many lines as it has attributes
        self,
        world: World,
        core: RaftCore,
        log: RaftLog,
        machine: StateMachine,
        *,
        transport: Transport,
        settings: RaftSettings,
        snapshot: SnapshotHeader | None,
        logger: Logger,
        metrics: RaftMetrics,
        is_quiet: bool = False,
    ) -> None:
        self.term = 0
        self.role = "follower"
        self.led_since = 0.0
        """The loop's time at which the role changed."""
        self.leader: NodeId = 0
        self.commit = 0
        self.n_turns = 0
        self._inbox_bytes = 0
        self._is_due = False
        self._is_in_turn = False
        self._has_appended = False
        self._is_open = False
        self._is_holding = False
        self._is_watching_reads = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._n_stands = 0
        self._installed_by = 0
        self.is_quiet = is_quiet
        self.core = core
        self.log = log
        self.machine = machine
        self.settings = settings
        self.node_id = log.identity.node_id
        self.applied = 0 if snapshot is None else snapshot.index
        self.applied_term = 0 if snapshot is None else snapshot.term
        self.conf_state = ConfState() if snapshot is None else snapshot.conf_state
        self.last_stamp_ns = 0 if snapshot is None else snapshot.stamp_ns
        self.loop = asyncio.get_running_loop()
        self.proposals = Proposals(self.loop, settings, round_bytes_max=log.turn_bytes_max)
        self.reads = Reads(self.loop, settings, node_id=self.node_id, boot=log.boot)
        self.changed = Waiters()
        """Woken when leader, term or members changed."""
        self.on_slice: Callable[[], None] = _nothing
        """Called after a slice of entries was applied."""
        self.on_wanted: Callable[[], None] = _nothing
        """Called while a peer waits for a newer snapshot than there is: it became a member after the last one was made."""
        self.subscribers: list[Subscriber] = []
        self.received: dict[tuple[int, int], Snapshot] = {}
        """Snapshots whose message is in the inbox."""
        self._world = world
        self._transport = transport
        self._logger = logger
        self._metrics = metrics
        self._inbox: list[bytes] = []
        self._heard_at: dict[NodeId, float] = {}
        self._held: dict[NodeId, bytes] = {}
        self._held_at: dict[NodeId, float] = {}
        self._to_apply: deque[tuple[int, int, int, bytes]] = deque()
        self._unsaved: deque[tuple[int, int, list[tuple[NodeId, bytes]], float]] = deque()
        self._changes: dict[int, tuple[int, asyncio.Future[ConfState]]] = {}
        self._context = RAFT.context()
        self._ticked_at = self.loop.time()
        self._round_began: deque[tuple[int, float]] = deque()
        self._points = _Points(*(world.failpoints.point(f"raft.{name}", is_synchronous=True) for name in _Points._fields))

    # --- life ---------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Begin: from now on turns happen."""
        self._is_open = True
        self._ticked_at = self.loop.time()
        self.log.on_durable(self._on_durable)
        self.wake()

    def close(self, error: IsopodError) -> None:
        """End: no turn happens any more, and whoever waits gets `error`."""
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.proposals.close(error)
        self.reads.close(error)
        self._fail_changes(error)
        self.changed.wake()

    @property
    def is_open(self) -> bool:
        """Whether turns happen."""
        return self._is_open

    @property
    def is_serving(self) -> bool:
        """Whether this node leads and has applied everything of earlier terms: it may propose."""
        return self.role == "leader" and self.applied_term == self.term

    @property
    def members(self) -> Members:
        """Who replicates the log, as of what is applied."""
        return Members(tuple(sorted(self.conf_state.voters)), tuple(sorted(self.conf_state.learners)))

    def wake(self) -> None:
        """Have a turn soon."""
        if not self._is_due:
            self._is_due = True
            self.loop.call_soon(self._turn, context=self._context)

    def begin(self, n_alone: int) -> None:
        """Have a turn for what was just added: soon, so that others can share it; at once if so many in a row had nobody to share with.

        Never inside a task, which is somebody's: what ends the turn would end it too.
        """
        if n_alone >= ALONE and not self._is_in_turn and not self._unsaved and self._is_open and asyncio.current_task() is None:
            self._turn()
        else:
            self.wake()

    def fatal(self, why: str) -> NoReturn:
        """End the process: memory and disk would no longer say the same."""
        self._is_open = False
        self._logger.error("raft.fatal", node=self.node_id, why=why)
        self._world.processes.abort(f"raft node {self.node_id}: {why}")

    # --- what happens -------------------------------------------------------------------------------------------------

    def take(self, sender: NodeId, messages: Sequence[bytes]) -> None:
        """Messages came from a peer."""
        if self._is_open:
            self._heard_at[sender] = self.loop.time()
            n_bytes = sum(map(len, messages))
            if self._inbox_bytes + n_bytes > INBOX_BYTES_MAX:
                self._metrics.refused_messages.inc(len(messages))
                return  # as if the network had lost them
            self._inbox += messages
            self._inbox_bytes += n_bytes
            if not self._is_due:
                self._begin_turn(messages)

    def _begin_turn(self, messages: Sequence[bytes]) -> None:
        """Have a turn for messages that came: soon if others may share it, at once if hardly anything else goes on."""
        n_waiting = len(self.proposals) + len(self.reads)
        if n_waiting > FEW or self._unsaved or self._to_apply or self._is_in_turn:
            self.wake()
        elif n_waiting or self.role != "leader" or self._changes or not all(map(is_sign_of_life, messages)):
            self._turn()
        # Else an idle leader was told that its peers are alive. The next turn, a heartbeat away at most, is early enough for that.

    def is_heard(self, node_id: NodeId) -> bool:
        """Whether a peer said anything within the longest election timeout."""
        return self.loop.time() - self._heard_at.get(node_id, _LONG_AGO) < 2 * self.settings.election_s

    def step_snapshot(self, sender: NodeId, snapshot: Snapshot, message: bytes) -> None:
        """A snapshot is durable here: let the core decide what becomes of it."""
        header = snapshot.header
        self.received[header.index, header.term] = snapshot
        self.take(sender, (message,))

    def await_change(self, index: int) -> "asyncio.Future[ConfState]":
        """Return what becomes of the change of members that was proposed under that index in the present term."""
        future: asyncio.Future[ConfState] = self.loop.create_future()
        self._changes[index] = (self.term, future)
        return future

    def on_peer_lost(self, node_id: NodeId) -> None:
        """The connection to a peer closed. If it was the leader's, its process may be dead: ask at once whether others think so too."""
        if (
            not self._is_open
            or self.is_quiet
            or node_id != self.leader
            or self.role != "follower"
            or self.node_id not in self.conf_state.voters
        ):
            return
        self.core.forget_leader()
        rivals = sorted(voter for voter in self.conf_state.voters if voter != node_id)
        rank = rivals.index(self.node_id)
        self._n_stands += 1
        self.loop.call_later(STAND_FIRST_S + STAND_STEP_S * rank, self._stand, self._n_stands, rank, STANDS_MAX)
        self.wake()

    async def wait(self, condition: Callable[[], bool], timeout_s: float, what: str, *, is_polled: bool = False) -> None:
        """Wait until a condition holds that `changed` tells of; one that is polled is looked at every tick.

        Raises:
            DeadlineExceeded: Not in time.
            NotStarted: The driver was closed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    if not self._is_open:
                        raise closed(self.node_id)
                    if is_polled:
                        await asyncio.sleep(self.settings.tick_s)
                    else:
                        await self.changed.wait()
        except TimeoutError:
            raise DeadlineExceeded(what, timeout_s) from None

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Tell a callback of every event; returns what takes it off again."""
        self.subscribers.append(callback)
        return lambda: self.subscribers.remove(callback) if callback in self.subscribers else None

    # --- the turn -----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._is_due = False
        if not self._is_open:
            return
        self._is_in_turn = True
        self.n_turns += 1
        try:
            self._run()
        except CorePanicked as error:
            self.fatal(f"the core panicked: {error}")
        except OSError as error:
            self.fatal(f"an injected failure: {error}")
        except (IsopodError, ValueError) as error:
            self.fatal(str(error))
        finally:
            self._is_in_turn = False

    def _run(self) -> None:
        core = self.core
        now = self.loop.time()
        has_ticked = now - self._ticked_at >= self.settings.tick_s - _EPSILON
        must_arm, tick_last = self._tick(now) if has_ticked else (False, False)
        if self._inbox:
            self._step()
            if not self._is_open:
                return
        if tick_last:
            core.tick(1)
        if not self.proposals.waiting:
            pass
        elif self.role == "leader":
            self._lead()
        else:
            error = NotLeader(self.node_id, self.leader)
            self.proposals.lose(error, error)
        if self.reads.waiting and self.reads.has_waiting:
            self._ask()
        was = self.role, self.leader
        while True:
            while (ready := core.ready()) is not None:
                self._on_ready(ready)
            if not self._has_appended:
                break
            self._has_appended = False
            if not self.log.flush():
                break  # `_on_durable` will be called, and have a turn
        if self._to_apply:
            self._apply()
        if self.received and not self._inbox:
            self.received.clear()  # those that the core had no use for
        if has_ticked and self.role == "leader" and core.snapshot_wanted():
            self.on_wanted()
        if must_arm or self._timer is None or was != (self.role, self.leader):
            self._arm(core.ticks_until_event())

    def _tick(self, now: float) -> tuple[bool, bool]:
        """Tick what passed, but for a tick that would start something.

        Returns:
            Whether the timer has to be set anew, and whether that last tick is due after the messages.
        """
        if self.is_quiet:  # a follower's ticks do nothing but bring its candidacy about
            self._ticked_at = now
            return True, False
        tick_s = self.settings.tick_s
        n = int((now - self._ticked_at) / tick_s + _EPSILON)
        if self._timer is not None and now < self._timer_at - _EPSILON:  # which is never later than what the core would do next
            self.core.tick(n)
            self._ticked_at += n * tick_s
            return False, False
        until = self.core.ticks_until_event()
        if n < until:
            self.core.tick(n)
            self._ticked_at += n * tick_s
            return True, False
        if until > 1:
            self.core.tick(until - 1)
        self._ticked_at = now
        is_late = n - until >= LATE_TICKS and self.role != "leader"
        if is_late:
            self._metrics.late_ticks.inc()
        return True, not is_late

    def _step(self) -> None:
        inbox, self._inbox = self._inbox, []
        if self._inbox_bytes > self.log.turn_bytes_max:
            inbox = self._cut_inbox(inbox)
        else:
            self._inbox_bytes = 0
        if self._points.before_step.armed:
            self._points.before_step.hit_now()
        if self.is_quiet:
            inbox = [message for message in inbox if not message.startswith(ELECTION_STARTS)]
        for refusal in self.core.step_many(inbox):
            self._metrics.refused_messages.inc()
            self._logger.warning("raft.message_refused", node=self.node_id, sender=refusal.sender, why=refusal.why)
            if refusal.why == "log_lost" and self._is_open:
                self._end_without_log(refusal.sender)

    def _end_without_log(self, leader: NodeId) -> None:
        """Take part no more: what this disk forgot may be a vote, so it must give none."""
        why = f"node {leader} leads and counts on entries that are not in it: this disk lost its end, or is an older copy"
        hint = f"on another member: isopod cluster leave {self.node_id}; then empty this node's data folder, and join with a new token"
        error = BadRecord("of the Raft log", why, hint)
        self._logger.error("raft.log_lost", node=self.node_id, leader=leader)
        self.close(error)
        self._tell(LogLost(error))

    def _cut_inbox(self, inbox: list[bytes]) -> list[bytes]:
        """Return what this turn takes of very much that came; one turn becomes one write of the journal."""
        n_bytes = 0
        for position, message in enumerate(inbox):
            n_bytes += len(message)
            if n_bytes >= self.log.turn_bytes_max:
                inbox, self._inbox = inbox[: position + 1], inbox[position + 1 :]
                self._inbox_bytes -= n_bytes
                self.wake()
                return inbox
        self._inbox_bytes = 0
        return inbox

    def _lead(self) -> None:
        """Propose what waits."""
        if not self.proposals.has_waiting or self.applied_term != self.term:
            return
        if self._points.before_propose.armed:
            self._points.before_propose.hit_now()
        stamp_ns = max(self._world.clock.now_ns(), self.last_stamp_ns)
        before = self.proposals.n_proposed
        try:
            last_index = self.proposals.propose(self.core, self.term, stamp_ns)
        except ProposalDropped:
            return  # the soft state of the next Ready says so too
        if last_index:
            self._round_began.append((last_index, self.loop.time()))
            self.last_stamp_ns = stamp_ns
            self._metrics.rounds.inc()
            self._metrics.proposals.inc(self.proposals.n_proposed - before)

    def _ask(self) -> None:
        """Ask for a read index, where an answer may come."""
        if self.leader and (self.role != "leader" or self.applied_term == self.term):
            self.reads.ask(self.core)
            self._metrics.reads.inc()
            if not self._is_watching_reads:
                self._is_watching_reads = True
                self._watch_reads()

    def _watch_reads(self) -> None:
        """Look at the questions under way when the oldest one would be lost."""
        retry_at = self.reads.retry_at
        if retry_at is None:
            self._is_watching_reads = False
        else:
            self.loop.call_at(max(retry_at, self.loop.time()) + _EPSILON, self._retry_reads, context=self._context)

    def _retry_reads(self) -> None:
        if self._is_open:
            self.reads.retry_lost()
            if self.reads.has_waiting:
                self.wake()
            self._watch_reads()

    def _stand(self, number: int, rank: int, n_left: int) -> None:
        """Stand for election, if nobody else won meanwhile; and again soon, unless votes for us may still be on their way."""
        if not self._is_open or number != self._n_stands or self.leader or self.role == "leader" or not n_left:
            return
        if self.role != "candidate" or n_left % 2 == 0:
            self._metrics.campaigns.inc()
            self.core.campaign()
        self.loop.call_later(STAND_AGAIN_S + STAND_STEP_S * rank, self._stand, number, rank, n_left - 1)
        self._turn()

    def _arm(self, n_ticks: int) -> None:
        """Have a turn when the core would do something by itself."""
        due = self._ticked_at + n_ticks * self.settings.tick_s
        if self._timer is not None:
            if self._timer_at <= due + _EPSILON and not self._timer.cancelled():
                return  # it looks again, and finds that it was early
            self._timer.cancel()
        self._timer_at = due
        self._timer = self.loop.call_at(due, self._on_timer, context=self._context)

    def _on_timer(self) -> None:
        self._timer = None
        self._turn()

    # --- a Ready ------------------------------------------------------------------------------------------------------

    def _on_ready(self, ready: Ready) -> None:
        hard_state = ready.hard_state
        if hard_state:
            self._on_hard_state(hard_state)
        if ready.soft_state is not None:
            self._on_soft_state(ready.soft_state)
        ticket = self._save(ready)
        if ready.messages:
            self._send(ready.messages)
        for snapshot in ready.snapshots_to_send:
            self._transport.send_snapshot(snapshot.to, snapshot.message, index=snapshot.index, term=snapshot.term)
        if ticket or self._unsaved:
            self._unsaved.append((ticket or self._unsaved[-1][0], ready.number, ready.persisted_messages, self.loop.time()))
        else:
            if ready.persisted_messages:
                self._send(ready.persisted_messages)
            self.core.on_persisted(ready.number)
        if ready.committed:
            self._metrics.committed_entries.inc(len(ready.committed))
            self._to_apply += ready.committed
        if ready.read_states:
            for context, index in ready.read_states:
                self.reads.answered(context, index)
            self.reads.release(self.applied)
            if self.reads.has_waiting:
                self.wake()

    def _save(self, ready: Ready) -> int:
        """Queue what must be durable; return the ticket that says when, 0 if nothing must be."""
        if ready.snapshot is not None:
            return self._install(ready)
        if ready.must_sync or ready.records:
            if self._points.before_append.armed:
                self._points.before_append.hit_now()
            self._has_appended = True
            return self.log.append(ready.records, ready.first_index, ready.last_index, hard_state=ready.hard_state)
        if ready.hard_state:
            self.log.defer(ready.hard_state)
        return 0

    def _on_durable(self, ticket: int) -> None:
        """Everything up to this ticket is durable: say so, and go on."""
        unsaved = self._unsaved
        if not unsaved or unsaved[0][0] > ticket or not self._is_open:
            return
        number = 0
        now = self.loop.time()
        messages: list[tuple[NodeId, bytes]] = []
        while unsaved and unsaved[0][0] <= ticket:
            _, number, persisted_messages, began = unsaved.popleft()
            messages += persisted_messages
            self._metrics.append_duration.observe(now - began)
        if messages:
            self._send(messages)
        try:
            self.core.on_persisted(number)
            if self._installed_by and self._installed_by <= ticket:
                self._installed_by = 0
                self.core.applied_to(self.applied)
                self.core.snapshot_made(self.log.snapshot.index, b"")
        except (CorePanicked, ValueError) as error:
            self.fatal(f"the core panicked: {error}")
        if not self._is_in_turn:
            self._turn()

    def _send(self, messages: list[tuple[NodeId, bytes]]) -> None:
        if self._points.before_send.armed:
            try:
                self._points.before_send.hit_now()
            except OSError:
                return  # as if the network had lost them
        by_peer: dict[NodeId, list[bytes]] = {}
        held = self._held
        for to, message in messages:
            if message.startswith(APPEND_START):
                if only_commits(message):
                    self._hold(to, message)
                    continue
                held.pop(to, None)
            found = by_peer.get(to)
            if found is None:
                by_peer[to] = [message]
            else:
                found.append(message)
        for to, several in by_peer.items():
            if held and to in held:  # never before what it was held for: an older index is no news
                several.append(held.pop(to))
            self._transport.send(to, several)

    def _hold(self, to: NodeId, message: bytes) -> None:
        """Keep a message that only tells the commit index: under load the next entries tell it too, and it need not be sent."""
        if to not in self._held:
            now = self.loop.time()
            self._held_at[to] = now
            if not self._is_holding:
                self._is_holding = True
                self.loop.call_at(now + HOLD_S, self._send_held, context=self._context)
        self._held[to] = message

    def _send_held(self) -> None:
        """Send what was held for long enough, and look again when the rest will have been."""
        self._is_holding = False
        if not self._is_open or not self._held:
            return
        due = self.loop.time() - HOLD_S + _EPSILON
        for to in [to for to in self._held if self._held_at[to] <= due]:
            self._transport.send(to, (self._held.pop(to),))
        if self._held:
            self._is_holding = True
            self.loop.call_at(min(self._held_at[to] for to in self._held) + HOLD_S, self._send_held, context=self._context)

    def _on_hard_state(self, data: bytes) -> None:
        state = decode_hard_state(data)
        self.commit = state.commit
        if state.term != self.term:
            if self.role == "leader":
                self._lose_lead()
            self.term = state.term
            self._metrics.term.set(state.term)
            self.changed.wake()

    def _on_soft_state(self, state: SoftState) -> None:
        was, self.role = self.role, state.role
        if was == "leader" and self.role != "leader":
            self._lose_lead()
        if was != self.role:
            self.led_since = self.loop.time()
            self._metrics.is_leader.set(float(self.role == "leader"))
        if state.leader != self.leader:
            self.leader = state.leader
            self._metrics.leader_changes.inc()
            self._logger.info("raft.leader", node=self.node_id, term=self.term, leader=self.leader)
            self.reads.retry_all()
            if self.reads.has_waiting:
                self.wake()
            self._tell(LeaderChanged(self.term, self.leader, self.leader == self.node_id))
        self.changed.wake()

    def _lose_lead(self) -> None:
        """Whoever waits for an entry of ours learns that nobody knows what becomes of it."""
        unknown = LeadershipLost(self.node_id, self.term)
        n_open = len(self.proposals)
        self.proposals.lose(unknown, NotLeader(self.node_id, 0))
        self._metrics.proposals_failed.inc(n_open)
        self._fail_changes(unknown)
        self._round_began.clear()

    def _fail_changes(self, error: IsopodError) -> None:
        changes, self._changes = self._changes, {}
        for _, future in changes.values():
            if not future.done():
                future.set_exception(error)

    def _install(self, ready: Ready) -> int:
        """Become a received snapshot, whose file is durable; return when the log says so durably."""
        found = ready.snapshot
        assert found is not None
        snapshot = self.received.pop((found.index, found.term), None)
        if snapshot is None:
            self.fatal(f"the core took snapshot {found.index}, whose file was not received")
        self._to_apply.clear()
        self.machine.restore(snapshot.machine)
        self.applied, self.applied_term = found.index, found.term
        self.last_stamp_ns = snapshot.header.stamp_ns
        self._metrics.snapshots_received.inc()
        self._metrics.applied.set(self.applied)
        record = SnapshotRecord(found.index, found.term, len(snapshot.machine))
        ticket = self.log.install(record, ready.records, hard_state=ready.hard_state)
        self._logger.info("raft.snapshot_installed", node=self.node_id, index=found.index, term=found.term)
        self._tell(Restored(found.index, found.term))
        self._set_members(found.conf_state)
        self._installed_by = ticket
        return ticket

    # --- applying -----------------------------------------------------------------------------------------------------

    def _apply(self) -> None:
        """Apply a slice of what is committed."""
        if self._points.before_apply.armed:
            self._points.before_apply.hit_now()
        queue = self._to_apply
        budget = self.settings.apply_commands_max
        n_entries = 0
        n_commands = 0
        while queue and budget > 0:
            entry = queue.popleft()
            index, term, kind, data = entry
            if kind == CONF_CHANGE:
                self._apply_change(index, term, data)
            elif data:
                n_commands += self._apply_commands(index, term, data)
                budget = self.settings.apply_commands_max - n_commands
            elif term == self.term and self.role == "leader":
                self._logger.info("raft.leading", node=self.node_id, term=term)
            self.applied, self.applied_term = index, term
            n_entries += 1
            budget -= 1
            if self.subscribers:
                self._tell(Applied(*entry))
        if not self._installed_by:
            self.core.applied_to(self.applied)
        metrics = self._metrics
        metrics.applied_entries.inc(n_entries)
        metrics.applied_commands.inc(n_commands)
        metrics.applied.set(self.applied)
        metrics.commit.set(self.commit)
        while self._round_began and self._round_began[0][0] <= self.applied:
            metrics.round_duration.observe(self.loop.time() - self._round_began.popleft()[1])
        self.reads.release(self.applied)
        if queue or (self.proposals.waiting and self.proposals.has_waiting) or (self.reads.waiting and self.reads.has_waiting):
            self.wake()
        self.on_slice()

    def _apply_commands(self, index: int, term: int, data: bytes) -> int:
        try:
            stamp_ns, commands = decode_envelope(data)
        except ValueError as error:  # msgspec's are of this kind
            self.fatal(f"entry {index} cannot be read: {error}")
        try:
            results: Sequence[Any] = self.machine.apply(Batch(index, term, stamp_ns, commands))
        except Exception as error:  # noqa: BLE001 - whatever it is, this machine is no longer what the others are
            self.fatal(f"the machine raised at entry {index}: {error!r}")
        if len(results) != len(commands):
            self.fatal(f"the machine gave {len(results)} results for {len(commands)} commands at entry {index}")
        self.last_stamp_ns = max(self.last_stamp_ns, stamp_ns)
        self.proposals.applied(index, term, results)
        return len(commands)

    def _apply_change(self, index: int, term: int, data: bytes) -> None:
        refused: InvalidArgument | None = None
        try:
            conf_state = self.core.apply_conf_change(data)
        except ValueError as error:  # equal on all members, and nothing changed anywhere
            refused = InvalidArgument("change of members", index, str(error))
            self._logger.error("raft.change_refused", node=self.node_id, index=index, why=str(error))
            conf_state = self.conf_state
        self.applied = index
        self._set_members(conf_state)
        own_term, future = self._changes.pop(index, (0, None))
        if future is None or future.done():
            return
        if own_term != term:
            future.set_exception(LeadershipLost(self.node_id, own_term))
        elif refused is not None:
            future.set_exception(refused)
        else:
            future.set_result(conf_state)

    def _set_members(self, conf_state: ConfState) -> None:
        self.conf_state = conf_state
        self._transport.set_peers([node_id for node_id in members_of(conf_state) if node_id != self.node_id])
        members = self.members
        self._logger.info("raft.members", node=self.node_id, voters=list(members.voters), learners=list(members.learners))
        self._tell(MembersChanged(self.applied, members))
        self.changed.wake()

    def _tell(self, event: RaftEvent) -> None:
        for callback in tuple(self.subscribers):
            callback(event)


def closed(node_id: NodeId) -> NotStarted:
    """Return what callers of a node that does not run are told."""
    return NotStarted(f"raft node {node_id}", "it is not running", "start the node")


def _nothing() -> None:
    """Nobody makes snapshots."""
