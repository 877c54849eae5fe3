"""WorkQueue: work that may run on any shard, and goes where there is time for it.

An item is a method and its request, as for `submit_to`, without saying where. It runs where it was submitted while that shard has a
free place (`n_at_once`); else it waits there. A shard with free places and nothing waiting tells the others so, once; who has items
waiting gives them away, oldest first. Nobody asks again and again: idle shards cost nothing, and an item moves at most once. A shard is
given two items more than it has places, so that it has something to do while who gives is busy with an item of its own.

Rules: a queue is made on every shard, in a service; its methods do not rely on what their shard has seen before. If the shard that runs an
item dies, the caller hears `Disconnected`, or, where the queue is `idempotent`, the item runs again elsewhere.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from isopod.runtime.shards.credits import SmpServiceGroup
from isopod.runtime.shards.smp import QueueStats, Smp
from isopod.runtime.shards.verbs import AnyMethod, Handler, Verb
from isopod.wire.service import Method
from isopod.world.errors import Disconnected, Exhausted, InvalidArgument, IsopodError, NotFound

Q = TypeVar("Q")
R = TypeVar("R")

ITEMS_MAX: Final = 100_000
NOTICE_TIMEOUT_S: Final = 5.0
AHEAD: Final = 2
"""Items that wait on a shard that took them, beyond those that run there."""


class Hungry(msgspec.Struct, frozen=True, array_like=True):
    """A shard takes so many items; 0: none any more."""

    shard: int
    n_free: int


class WorkQueue:
    """One queue; make it in a service, under the same name on every shard.

    Args:
        smp: This shard.
        name: Of the queue.
        handlers: What can be submitted, and who does it.
        n_at_once: Items that one shard runs at the same time: 1 for work that computes, more for work that waits.
        n_items_max: Items that may wait on one shard.
        idempotent: Whether an item may run again after the shard that ran it died.
    """

    def __init__(
        self,
        smp: Smp,
        name: str,
        handlers: Mapping[AnyMethod, Handler],
        *,
        n_at_once: int = 1,
        n_items_max: int = ITEMS_MAX,
        idempotent: bool = False,
    ) -> None:
        if n_at_once < 1:
            raise InvalidArgument("n_at_once", n_at_once, "must be at least 1")
        self.name = name
        self._smp = smp
        self._methods = {method.name: method for method in handlers}
        self._verbs = {method.name: Verb(method.name, handler, method.request) for method, handler in handlers.items()}
        self._n_at_once = n_at_once
        self._n_items_max = n_items_max
        self._idempotent = idempotent
        self._n_busy = 0
        self._own: deque[asyncio.Future[int]] = deque()
        """Items submitted here that wait: each is resolved with the shard it runs on."""
        self._arrived: deque[asyncio.Future[int]] = deque()
        """Items of other shards that wait for a place here."""
        self._hungry: dict[int, int] = {}
        self._n_announced = n_at_once + AHEAD
        self._is_closed = False
        self._notices: dict[int, asyncio.Task[None]] = {}
        self._n_submitted = self._n_run = self._n_given = self._n_taken = 0
        self._group = SmpServiceGroup(f"work {name}", n_at_once + AHEAD)
        self._notice_group = SmpServiceGroup(f"work notices {name}", 1)
        self._hungry_method = Method(f"work.hungry {name}", Hungry, type(None))
        smp.serve({method: self._arriving(self._verbs[method.name]) for method in handlers})
        smp.serve({self._hungry_method: self._on_hungry})
        smp.queues.append(self)
        smp.on_attached.append(self._announce_to)
        smp.on_closed.append(self._close)

    async def submit(self, method: Method[Q, R], request: Q, *, timeout_s: float | None = None) -> R:
        """Run an item somewhere and return its reply.

        Args:
            method: One of the queue's.
            request: What it gets; copied if it moves.
            timeout_s: From the moment it is its turn; None for the default. Its wait is bounded by the caller's own deadline.

        Raises:
            NotFound: Not a method of this queue.
            Exhausted: Too many items wait here.
            Disconnected: The shard that ran it died, or this one stops.
            IsopodError: What the item raised.
        """
        if self._methods.get(method.name) is not method:
            raise NotFound("work", method.name, f"it is not in queue {self.name}")
        self._n_submitted += 1
        while True:
            shard = await self._wait_turn()
            try:
                return await self._run_on(shard, method, request, timeout_s)
            except Disconnected:
                if not self._idempotent or shard == self._smp.shard or self._is_closed:
                    raise

    def statistics(self) -> QueueStats:
        """Return this shard's numbers."""
        return QueueStats(self.name, self._n_submitted, self._n_run, self._n_given, self._n_taken, len(self._own) + len(self._arrived))

    # --- whose turn it is ---------------------------------------------------------------------------------------------

    async def _wait_turn(self) -> int:
        """Return where an item of ours runs; if here, it has a place."""
        if self._n_busy < self._n_at_once and not self._own:
            self._n_busy += 1
            return self._smp.shard
        peer = self._find_hungry()
        if peer is not None:
            return peer
        if len(self._own) >= self._n_items_max:
            raise Exhausted(f"work queue {self.name}", f"{self._n_items_max} items wait", "submit more slowly")
        return await self._wait(self._own)

    async def _wait(self, waiting: "deque[asyncio.Future[int]]") -> int:
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        self._announce()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn in waiting:
                waiting.remove(turn)
                self._announce()
            elif not turn.cancelled() and turn.exception() is None:
                self._return_turn(turn.result())  # it came in the same turn as the cancellation
            raise

    def _return_turn(self, shard: int) -> None:
        """A place that was given out, here or on another shard, is not used."""
        if shard == self._smp.shard:
            self._free_place()
            return
        # It still thinks that we know of that place. If it does not, it says what holds when it has a place next.
        self._hungry[shard] = self._hungry.get(shard, 0) + 1
        self._share()

    def _find_hungry(self) -> int | None:
        """Return a shard that waits for work, and count one place there as taken."""
        peers = self._smp.peers() if self._hungry else []
        self._hungry = {peer: n_free for peer, n_free in self._hungry.items() if n_free > 0 and peer in peers}
        if not self._hungry:
            return None
        peer = max(self._hungry, key=lambda each: (self._hungry[each], -each))
        self._hungry[peer] -= 1
        return peer

    def _share(self) -> None:
        """Give waiting items to shards that wait for work."""
        while self._own:
            turn = self._own[0]
            if not turn.done():
                peer = self._find_hungry()
                if peer is None:
                    return
                turn.set_result(peer)
            self._own.popleft()

    def _free_place(self) -> None:
        """A place is free: for who waits longest here, those first who came from elsewhere."""
        self._n_busy -= 1
        turn = self._pop(self._arrived) or self._pop(self._own)
        if turn is not None:
            self._n_busy += 1
            turn.set_result(self._smp.shard)
        self._announce()

    def _pop(self, waiting: "deque[asyncio.Future[int]]") -> "asyncio.Future[int] | None":
        """Take out the first that still waits."""
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                return turn
        return None

    # --- running ------------------------------------------------------------------------------------------------------

    async def _run_on(self, shard: int, method: Method[Q, R], request: Q, timeout_s: float | None) -> R:
        if shard != self._smp.shard:
            self._n_given += 1
            try:
                return await self._smp.submit_to(shard, method, request, timeout_s=timeout_s, group=self._group)
            except BaseException:
                self._return_turn(shard)  # it may not have arrived: not packed, no credit, withdrawn
                raise
        try:
            await _give_way()
            reply: R = await self._smp.run_here(self._verbs[method.name], request, timeout_s)
            return reply
        finally:
            self._n_run += 1
            self._free_place()

    def _arriving(self, verb: Verb) -> Handler:
        """Return the function that other shards call: it waits for a place."""

        async def arrive(request: Any) -> Any:  # of the method
            self._n_taken += 1
            self._n_announced = max(0, self._n_announced - 1)
            if self._n_busy < self._n_at_once:
                self._n_busy += 1
            else:
                await self._wait(self._arrived)
            try:
                await _give_way()
                found = verb.function(request)
                return await found if verb.is_async else found
            finally:
                self._n_run += 1
                self._free_place()

        return arrive

    # --- who waits for work -------------------------------------------------------------------------------------------

    def _on_hungry(self, notice: Hungry) -> None:
        self._hungry[notice.shard] = notice.n_free
        self._share()

    def _announce(self) -> None:
        """Let the others know how many items we would take, if they think that it is fewer, or if it is none any more."""
        n_free = 0 if self._own else max(0, self._n_at_once + AHEAD - self._n_busy - len(self._arrived))
        if n_free > self._n_announced or (n_free == 0 and self._n_announced > 0):
            self._n_announced = n_free
            for peer in self._smp.peers():
                self._announce_to(peer)

    def _announce_to(self, peer: int) -> None:
        if peer not in self._notices and not self._is_closed:
            task = asyncio.get_running_loop().create_task(self._notify(peer), name=f"work {self.name} notice to {peer}")
            self._notices[peer] = task
            task.add_done_callback(lambda _: self._notices.pop(peer, None))

    async def _notify(self, peer: int) -> None:
        """Tell a shard our state until it is what it knows."""
        told = -1
        while told != self._n_announced and not self._is_closed:
            told = self._n_announced
            notice = Hungry(self._smp.shard, told)
            try:
                await self._smp.submit_to(peer, self._hungry_method, notice, timeout_s=NOTICE_TIMEOUT_S, group=self._notice_group)
            except IsopodError:
                return  # it is gone, or very busy: it hears of us when it is attached again, or at the next change

    def _close(self) -> None:
        self._is_closed = True
        for waiting in (self._own, self._arrived):
            for turn in waiting:
                if not turn.done():
                    turn.set_exception(Disconnected(f"work queue {self.name}", "the shards are shutting down"))
            waiting.clear()


async def _give_way() -> None:
    """Let the loop have a turn before an item takes the processor: for items submitted in the same breath to be known, and for answers and
    notices of the one before to go out. Without it, items that never wait would all run where they are before anybody hears of them."""
    await asyncio.sleep(0)
