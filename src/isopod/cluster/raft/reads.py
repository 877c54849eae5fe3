"""Reads: barriers that wait until a linearizable read may be served from the own machine (ReadIndex).

A round is one question to the leader, with a context that is never used twice: (node, boot, counter). All that wait in one turn share it.
The answer is an index; who has applied that may read. Rounds get lost (no leader, a lost message, a leader that has not committed in its
term): they are asked again, under a new context, until the waiting give up. The answer to an earlier context is as good, if it comes after
all: where the way to the leader takes longer than the pause, it is the only one that ever comes in time.

Rules: a barrier only joins a round that was not begun when it came; nothing here awaits; what waits is bounded.
Source: Ongaro 2014, section 6.4.
"""

import asyncio
from collections.abc import Iterator
from typing import Final

from isopod.cluster.raft.codec import READ_CONTEXT
from isopod.cluster.raft.core import RaftCore
from isopod.cluster.raft.ports import Waiter
from isopod.cluster.raft.settings import RaftSettings
from isopod.net.rpc.deadlines import Deadlines
from isopod.world.errors import DeadlineExceeded, Exhausted, IsopodError

ROUNDS_MAX: Final = 4
"""Under way at once; what comes meanwhile shares the next."""
RETRY_HEARTBEATS: Final = 3
RETRY_AFTER_S: Final = 0.05
LATE_MAX: Final = 32
"""Rounds taken for lost whose answer is still good."""


class Reads:
    """The read barriers of one node.

    Args:
        loop: Whose time counts.
        settings: Bounds and times.
        node_id: Of this node.
        boot: Of this start.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: RaftSettings, *, node_id: int, boot: int) -> None:
        self.n_rounds = 0
        self.n_alone = 0
        """How many in a row came while none was under way."""
        self._loop = loop
        self._settings = settings
        self._node_id = node_id
        self._boot = boot
        self._retry_s = RETRY_HEARTBEATS * settings.heartbeat_s
        self._open: dict[int, tuple[Waiter, float, float]] = {}
        self._n_ids = 0
        self.waiting: list[int] = []
        """Who was not asked for yet; to be looked at only."""
        self._asked: dict[bytes, tuple[float, list[int]]] = {}
        self._late: dict[bytes, list[int]] = {}
        self._answered: list[tuple[int, list[int]]] = []
        self._deadlines = Deadlines(loop, self._open_deadlines, self._on_expired)

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._open)

    @property
    def has_waiting(self) -> bool:
        """Whether a round could begin."""
        return bool(self.waiting) and len(self._asked) < ROUNDS_MAX

    @property
    def retry_at(self) -> float | None:
        """The loop's time at which the oldest round is taken for lost; None without one."""
        for asked_at, _ in self._asked.values():
            return asked_at + self._retry_s
        return None

    def add(self, timeout_s: float, waiter: Waiter) -> None:
        """Queue a barrier; the waiter gets the index that was applied.

        Raises:
            Exhausted: Too many wait.
        """
        if len(self._open) >= self._settings.reads_max:
            raise Exhausted("reads under way", str(self._settings.reads_max), retry_after_s=RETRY_AFTER_S)
        now = self._loop.time()
        self.n_alone = 0 if self._open else self.n_alone + 1
        self._n_ids = number = self._n_ids + 1
        self._open[number] = (waiter, now + timeout_s, now)
        self.waiting.append(number)
        self._deadlines.note(now + timeout_s)

    def ask(self, core: RaftCore) -> None:
        """Begin a round for all that wait."""
        waiting, self.waiting = [number for number in self.waiting if number in self._open], []
        if waiting:
            self.n_rounds += 1
            context = READ_CONTEXT.pack(self._node_id, self._boot, self.n_rounds)
            self._asked[context] = (self._loop.time(), waiting)
            core.read_index(context)

    def answered(self, context: bytes, index: int) -> None:
        """A round has its index. Whoever waits for it began before it was asked, so it is good however late it comes."""
        found = self._asked.pop(context, None)
        numbers = found[1] if found is not None else self._late.pop(context, None)
        if numbers is not None:
            self._answered.append((index, numbers))

    def release(self, applied: int) -> None:
        """Let go on whoever waited for an index that is applied now."""
        if not self._answered:
            return
        later: list[tuple[int, list[int]]] = []
        for index, numbers in self._answered:
            if index > applied:
                later.append((index, numbers))
                continue
            for number in numbers:
                entry = self._open.pop(number, None)
                if entry is not None and not entry[0].done():
                    entry[0].set_result(applied)
        self._answered = later

    def retry_lost(self) -> None:
        """Put the waiters of rounds that are taken for lost back in front."""
        limit = self._loop.time() - self._retry_s
        lost = [context for context, (asked_at, _) in self._asked.items() if asked_at <= limit]
        for context in lost:
            self._late[context] = self._asked[context][1]
        while len(self._late) > LATE_MAX:
            del self._late[next(iter(self._late))]
        self._put_back(lost)

    def retry_all(self) -> None:
        """The leader changed: nothing that was asked will be answered."""
        self._late.clear()
        self._put_back(list(self._asked))

    def close(self, error: IsopodError) -> None:
        """Fail what waits."""
        self._deadlines.close()
        left, self._open = self._open, {}
        for waiter, _, _ in left.values():
            if not waiter.done():
                waiter.set_exception(error)
        self.waiting.clear()
        self._asked.clear()
        self._late.clear()
        self._answered.clear()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _put_back(self, contexts: list[bytes]) -> None:
        numbers: list[int] = []
        for context in contexts:
            numbers += self._asked.pop(context)[1]
        self.waiting[:0] = numbers

    def _open_deadlines(self) -> Iterator[tuple[int, float | None]]:
        for number, entry in self._open.items():
            yield number, entry[1]

    def _on_expired(self, number: int) -> None:
        waiter, expires_at, began = self._open.pop(number)
        if not waiter.done():
            waiter.set_exception(DeadlineExceeded("the read barrier", expires_at - began))
