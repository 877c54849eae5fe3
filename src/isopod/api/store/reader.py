"""Reader: reads of one turn of the loop as one request.

Reads of equal consistency that are asked for in one turn travel together and are answered from one revision, for the price of one round
of the leader's proof that it leads. What did not fit into one answer is asked for again in smaller groups. Reading may always be
repeated.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, NamedTuple

from isopod.api.store.messages import ANSWER_BYTES_MAX, Consistency, Get, KvPages, KvRead, Range
from isopod.api.store.operations import Found
from isopod.api.store.sender import closed, late
from isopod.world.errors import Exhausted, IsopodError, ProtocolViolation

Ask = Callable[[KvRead, float], Awaitable[KvPages]]
"""Asks a node within so many seconds."""
PAUSE_FIRST_S: Final = 0.01
PAUSE_MAX_S: Final = 0.25
SWEEP_S: Final = 0.25
"""How often reads that wait are looked at for deadlines."""
_READ: Final = "a read of the store"


class ReaderSettings(NamedTuple):
    """Bounds of a reader: requests under way, reads of one, reads that wait, and how long one attempt may take."""

    requests_max: int = 8
    reads_max: int = 256
    waiting_max: int = 65_536
    attempt_s: float = 2.0


_Group = tuple[Consistency, float, float]
"""Consistency, age and deadline: reads that may travel together are equal in these."""
_Waiting = tuple[Get | Range, _Group, "asyncio.Future[Found]", float]
"""What, with whom, who waits, and until when."""


class Reader:
    """Carries reads to a node.

    Args:
        ask: How a request gets there.
        chance: Draws from 0 to 1, for pauses.
        settings: Bounds.
    """

    def __init__(self, ask: Ask, chance: Callable[[], float], *, settings: ReaderSettings = ReaderSettings()) -> None:  # noqa: B008
        self._ask = ask
        self._chance = chance
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Waiting] = []
        self._is_due = False
        self._sweeping: asyncio.TimerHandle | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._n_tasks = 0
        self._is_closed = False

    def submit(self, op: Get | Range, consistency: Consistency, max_age_s: float, *, timeout_s: float) -> "asyncio.Future[Found]":
        """Take a read; what it found comes in the future.

        Raises:
            Exhausted: Too much waits.
            Disconnected: The reader was closed.
        """
        if self._is_closed:
            raise closed()
        if len(self._waiting) >= self._settings.waiting_max:
            raise Exhausted("reads that wait", str(self._settings.waiting_max), retry_after_s=0.1)
        loop = self._loop
        future: asyncio.Future[Found] = loop.create_future()
        self._waiting.append((op, (consistency, max_age_s, timeout_s), future, loop.time() + timeout_s))
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._flush)
        return future

    async def close(self) -> None:
        """Fail what waits."""
        self._is_closed = True
        _fail_all(self._waiting, closed())
        self._waiting = []
        if self._sweeping is not None:
            self._sweeping.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _flush(self) -> None:
        self._is_due = False
        while self._waiting and len(self._tasks) < self._settings.requests_max:
            group = self._waiting[0][1]
            n_reads = 1
            for item in self._waiting[1 : self._settings.reads_max]:
                if item[1] != group:
                    break
                n_reads += 1
            self._start(self._waiting[:n_reads])
            del self._waiting[:n_reads]
        if self._waiting and self._sweeping is None:
            self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Fail what waited too long for its turn."""
        now_s = self._loop.time()
        over = [item for item in self._waiting if item[3] <= now_s or item[2].done()]
        if over:
            self._waiting = [item for item in self._waiting if item[3] > now_s and not item[2].done()]
        for item in over:
            _fail_all([item], late(_READ, item[1][2], None))
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep) if self._waiting else None

    def _start(self, batch: list[_Waiting]) -> None:
        number = self._n_tasks
        self._n_tasks += 1
        task = self._loop.create_task(self._deliver(batch), name="store read")
        self._tasks[number] = task
        task.add_done_callback(partial(self._on_done, number, batch))

    def _on_done(self, number: int, batch: list[_Waiting], task: "asyncio.Task[None]") -> None:
        del self._tasks[number]
        if task.cancelled():  # perhaps before its first step
            _fail_all(batch, closed())
        if self._waiting and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._flush)

    async def _deliver(self, batch: list[_Waiting]) -> None:
        try:
            pages = await self._repeat(batch)
        except Exhausted as error:
            if len(batch) == 1 or error.retry_after_s is not None:
                _fail_all(batch, error)
                return
            # Together they are more than an answer holds.
            half = len(batch) // 2
            await self._deliver(batch[:half])
            await self._deliver(batch[half:])
        except IsopodError as error:
            _fail_all(batch, error)
        else:
            revision, age_s = pages.revision, pages.age_s
            for item, page in zip(batch, pages.pages, strict=True):
                if not item[2].done():
                    item[2].set_result(Found(page, revision, age_s))

    async def _repeat(self, batch: list[_Waiting]) -> KvPages:
        consistency, max_age_s, timeout_s = batch[0][1]
        expires_at = batch[0][3]
        request = KvRead(reads=[item[0] for item in batch], consistency=consistency, max_age_s=max_age_s)
        n_failed = 0
        failure: IsopodError | None = None
        while True:
            left_s = expires_at - self._loop.time()
            if left_s <= 0:
                raise late(_READ, timeout_s, failure)
            try:
                pages = await self._ask(request, min(left_s, self._settings.attempt_s))
            except IsopodError as error:
                n_failed += 1
                pause_s = error.retry_after_s or min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** (n_failed - 1))
                if not error.retryable or (isinstance(error, Exhausted) and error.retry_after_s is None):
                    raise
                if self._loop.time() + pause_s >= expires_at:
                    raise late(_READ, timeout_s, error) from error
                failure = error
                await asyncio.sleep(pause_s * (1 - 0.5 * self._chance()))
            else:
                if len(pages.pages) != len(batch):
                    raise ProtocolViolation("the store", f"{len(pages.pages)} pages for {len(batch)} reads")
                return pages


def too_much() -> Exhausted:
    """Return the error of reads that are more than one answer holds."""
    return Exhausted("the answer", f"it would be over {ANSWER_BYTES_MAX} bytes", "read less at once")


def _fail_all(batch: list[_Waiting], error: IsopodError) -> None:
    for item in batch:
        if not item[2].done():
            item[2].set_exception(error)
