"""Runner: coroutine handlers without a task for each.

Most handlers are done without ever waiting, and a task costs more than all else that a short call needs. So the calls of one turn are
begun one after the other in one task, and the first that waits keeps the task for itself: from then on it *is* that call's task, and the
calls behind it go on in another. So every handler runs in a real task from its first step on (`asyncio.current_task`, `asyncio.timeout`,
task groups and cancelling mean what they always mean), and nothing a handler leaves behind reaches the next: one that changed a context
variable, or was cancelled, is the last of its task.

A method whose last handler had to wait gets a task of its own for the next call at once: otherwise calls that wait would begin one turn
of the loop after the other.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import copy_context
from types import CoroutineType, coroutine
from typing import Any, Final, cast

from isopod.net.rpc.call import AnyCall
from isopod.net.rpc.verbs import Verb
from isopod.runtime.abort import adopt_deadline
from isopod.runtime.scheduling import SchedulingGroup

RUN_MAX: Final = 256
RUN_NS: Final = 1_000_000
"""After so many calls, or so long, the others get a turn."""

Work = tuple[AnyCall, Verb, Any, Awaitable[Any] | None]
"""A call that is to begin: with its request, or with what a plain handler returned instead of a reply."""
Settle = Callable[[AnyCall, Verb, object, BaseException | None], int]
"""Told once how a call ended, its reply or what the handler raised; returns the World's monotonic time, which it needed anyway."""


class Runner:
    """The calls of one connection that are to begin.

    Args:
        loop: Where they run.
        queue_max: How many may wait to begin before `on_full` is told to bring no more for now: a burst is served later, not refused.
        now_ns: The World's monotonic clock.
        on_waiting: Told when a call begins to wait.
        settle: Told when a call has ended.
        on_full: Told when that begins, and when it is over.
        on_idle: Told when a task begins no more calls.
    """

    __slots__ = (
        "_context", "_is_due", "_is_full", "_loop", "_now_ns", "_on_full", "_on_idle", "_on_waiting", "_queue", "_queue_max", "_settle",
        "group",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        queue_max: int,
        now_ns: Callable[[], int],
        on_waiting: Callable[[AnyCall, Verb], None],
        settle: Settle,
        on_full: Callable[[bool], None],
        on_idle: Callable[[], None],
    ) -> None:
        self.group: SchedulingGroup | None = None
        # Of every task: one that handlers left changed, or with their deadlines, must not be what the next is a copy of.
        self._context = copy_context()
        self._is_full = False
        self._queue_max = queue_max
        self._loop = loop
        self._now_ns = now_ns
        self._on_waiting = on_waiting
        self._settle = settle
        self._on_full = on_full
        self._on_idle = on_idle
        self._queue: deque[Work] = deque()
        self._is_due = False

    def use_group(self, group: SchedulingGroup | None) -> None:
        """Use that group's time from now on; None for that of who made the server."""
        self.group = group
        if group is not None:
            self._context = group.context()

    def add(self, call: AnyCall, verb: Verb, request: object, awaitable: Awaitable[Any] | None = None) -> None:
        """Begin a call soon.

        Args:
            call: The call.
            verb: Its verb.
            request: Its request.
            awaitable: What its handler returned already; None if the handler is yet to be called.
        """
        if verb.tends_to_wait:
            self._spawn(deque(((call, verb, request, awaitable),)))
            return
        queue = self._queue
        queue.append((call, verb, request, awaitable))
        if not self._is_due:
            self._spawn(queue)
        if len(queue) >= self._queue_max and not self._is_full:
            self._is_full = True
            self._on_full(True)

    def _spawn(self, queue: deque[Work]) -> None:
        if queue is self._queue:
            self._is_due = True
        work = cast("Coroutine[Any, Any, None]", self._run(queue))
        self._loop.create_task(work, name="rpc", context=self._context.copy())

    @coroutine
    def _run(self, queue: deque[Work]) -> Generator[Any, Any, None]:
        settle = self._settle
        task = asyncio.current_task()
        assert task is not None
        until_ns = self._now_ns() + RUN_NS
        n_left = RUN_MAX
        had_deadline = False
        while queue and not (had_deadline and queue[0][0].expires_at is None):
            call, verb, request, awaitable = queue.popleft()
            if call.ended_by is not None:
                drop(awaitable)
                settle(call, verb, None, asyncio.CancelledError())
                continue
            if call.expires_at is not None:
                adopt_deadline(call.expires_at)
                had_deadline = True
            before = copy_context()
            call.task = task
            try:
                steps = verb.handler(call, request) if awaitable is None else awaitable
                if type(steps) is not CoroutineType:
                    steps = _await(steps)
                waits_for = steps.send(None)
            except StopIteration as stop:
                now_ns = settle(call, verb, stop.value, None)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001 - a task's root
                now_ns = settle(call, verb, None, error)
            else:
                verb.tends_to_wait = True
                self._leave(queue)
                self._on_waiting(call, verb)
                task.set_name(verb.task_name)
                yield from self._finish(call, verb, steps, waits_for)
                return
            verb.tends_to_wait = False
            call.task = None
            n_left -= 1
            if not n_left or now_ns > until_ns or copy_context() != before or task.cancelling():
                break
        self._leave(queue)

    def _leave(self, queue: deque[Work]) -> None:
        """This task begins no more calls."""
        if queue is self._queue:
            self._is_due = False
            if queue:
                self._spawn(queue)
            if self._is_full and len(queue) < self._queue_max:
                self._is_full = False
                self._on_full(False)
        self._on_idle()

    def _finish(self, call: AnyCall, verb: Verb, steps: "Coroutine[Any, Any, Any]", waits_for: object) -> Generator[Any, Any, None]:
        """Run a handler that has begun and waits to its end, in this task."""
        try:
            reply = yield from _rest(steps, waits_for)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a task's root
            self._settle(call, verb, None, error)
        else:
            self._settle(call, verb, reply, None)


@coroutine
def _rest(steps: "Coroutine[Any, Any, Any]", waits_for: object) -> Generator[Any, Any, Any]:
    """Go on with a coroutine whose first step was made: it waits for `waits_for`, which the task has not seen yet."""
    while True:
        try:
            yield waits_for
        except GeneratorExit:
            steps.close()
            raise
        except BaseException as error:  # noqa: BLE001 - the coroutine's to handle
            try:
                waits_for = steps.throw(error)
            except StopIteration as stop:
                return stop.value
        else:
            return (yield from steps)


async def _await(awaitable: Awaitable[Any]) -> Any:  # of whatever the handler promised
    return await awaitable


def drop(awaitable: Awaitable[Any] | None) -> None:
    """End what will not be awaited, so that nobody warns about it."""
    if isinstance(awaitable, CoroutineType):
        awaitable.close()
    elif isinstance(awaitable, asyncio.Future):
        awaitable.cancel()
