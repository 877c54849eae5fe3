"""Reactor: an event loop with an owner: what runs on it is counted, and ends when it ends.

    async def main(reactor: Reactor) -> None:
        reactor.spawn(serve(), name="serve")
        await reactor.sleep(1)

    Reactor(new_loop()).run(main)

It is a thin face of asyncio's loop: everything asyncio can do goes on working inside. What it adds: tasks that belong to it (and are
cancelled, oldest first, and waited for at the end), a wheel for deadlines, scheduling groups at `spawn`, and numbers.

Rules: one reactor per loop, used in the loop's thread only; an idle one sleeps.
"""

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

import msgspec

from isopod.runtime.abort import AbortSource
from isopod.runtime.metrics import Registry
from isopod.runtime.timers import Timer, TimerTally, TimerWheel, WheelTimer
from isopod.runtime.waiters import Waiters
from isopod.world.errors import Cancelled, WrongState
from isopod.world.loops import GroupLoop, GroupStatistics, SchedulingGroup

END_GRACE_S: Final = 10.0
"""How long cancelled tasks may take to end when the reactor ends."""
COLLECT_S: Final = 1.0
"""How often metrics are written where another process may read them."""

T = TypeVar("T")
_Ts = TypeVarTuple("_Ts")


class ReactorStats(msgspec.Struct, frozen=True):
    """What a reactor did since it was made.

    Args:
        n_turns: Turns of the loop in which steps ran.
        n_steps: Steps in these.
        queue_depth: Steps that wait now.
        n_tasks_scheduled: Tasks by `spawn`.
        n_tasks_completed: Those that returned.
        n_tasks_failed: Those that raised.
        n_tasks_cancelled: Those that were cancelled.
        busy_s: CPU time of the loop's thread.
        elapsed_s: Wall time.
        n_timers_created: Timers made through the reactor.
        n_timers_fired: How often they fired.
        n_timers_cancelled: Those cancelled before.
        groups: What each scheduling group did.
    """

    n_turns: int
    n_steps: int
    queue_depth: int
    n_tasks_scheduled: int
    n_tasks_completed: int
    n_tasks_failed: int
    n_tasks_cancelled: int
    busy_s: float
    elapsed_s: float
    n_timers_created: int
    n_timers_fired: int
    n_timers_cancelled: int
    groups: tuple[GroupStatistics, ...]

    @property
    def n_tasks(self) -> int:
        """How many have not ended."""
        return self.n_tasks_scheduled - self.n_tasks_completed - self.n_tasks_failed - self.n_tasks_cancelled

    @property
    def idle_share(self) -> float:
        """The part of the time in which the loop's thread used no CPU, 0 to 1."""
        return 1.0 if self.elapsed_s <= 0 else min(1.0, max(0.0, 1 - self.busy_s / self.elapsed_s))


class Reactor:
    """An event loop's owner.

    Args:
        loop: The loop; the running one if None. `run` closes one that it was given, nobody else does.
        metrics: Where the numbers go, None for nowhere.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None, *, metrics: Registry | None = None) -> None:
        self._loop = loop or asyncio.get_running_loop()
        if isinstance(self._loop, GroupLoop):
            self._loop.account()
        self._wheel = TimerWheel(self._loop)
        self._tasks: dict[int, asyncio.Task[Any]] = {}
        self._timers: weakref.WeakValueDictionary[int, Timer] = weakref.WeakValueDictionary()
        self._n_timers = 0
        self._tally = TimerTally()
        self._n_scheduled = 0
        self._n_completed = 0
        self._n_failed = 0
        self._n_cancelled = 0
        self._began_s = self._loop.time()
        self._busy_before_s = self._busy_s()
        self._stopping = AbortSource("reactor")
        self._ended = Waiters()
        self._is_closed = False
        self._main: asyncio.Task[Any] | None = None
        self._collector = ReactorMetrics(self, metrics) if metrics is not None else None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop."""
        return self._loop

    @property
    def wheel(self) -> TimerWheel:
        """The wheel for deadlines."""
        return self._wheel

    @property
    def stopping(self) -> AbortSource:
        """Aborts when `stop` is called."""
        return self._stopping

    def spawn(self, coroutine: Coroutine[Any, Any, T], *, group: SchedulingGroup | None = None, name: str | None = None) -> asyncio.Task[T]:
        """Start a task that belongs to the reactor. A failure that nobody awaits goes to the loop's exception handler.

        Args:
            coroutine: What it runs.
            group: Its scheduling group; that of who spawns if None.
            name: For listings; "reactor-NUMBER" if None.

        Raises:
            WrongState: The reactor is ending.
            Exhausted: Too many groups.
        """
        if self._is_closed:
            coroutine.close()
            raise WrongState("reactor", "", "closed", "spawn")
        number = self._n_scheduled
        context = None if group is None else group.context()
        task = self._loop.create_task(coroutine, name=name or f"reactor-{number}", context=context)
        self._n_scheduled += 1
        self._tasks[number] = task
        task.add_done_callback(lambda ended: self._on_done(number, ended))
        return task

    def call_later(self, delay_s: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts) -> WheelTimer:
        """Call `callback(*args)` on the reactor's wheel: at most 10 ms late. See `TimerWheel.call_later`."""
        return self._wheel.call_later(delay_s, callback, *args)

    def timer(self, callback: Callable[[], object]) -> Timer:
        """Return a punctual timer, which is cancelled when the reactor ends."""
        timer = Timer(callback, loop=self._loop, tally=self._tally)
        self._timers[self._n_timers] = timer
        self._n_timers += 1
        return timer

    async def sleep(self, delay_s: float) -> None:
        """Let the loop do other things for so long."""
        await asyncio.sleep(delay_s)

    def run(self, main: Callable[["Reactor"], Coroutine[Any, Any, T]]) -> T | None:
        """Run `main(reactor)`, end everything that was spawned, close the loop.

        Returns:
            What main returns; None if `stop` ended it.

        Raises:
            BaseException: What main raises.
        """
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            task = loop.create_task(self._run(main), name="reactor-main")
            try:
                return loop.run_until_complete(task)
            finally:
                if not task.done():  # KeyboardInterrupt or SystemExit left the loop
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        loop.run_until_complete(task)
                loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    def run_until(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the loop until a coroutine ends, and leave everything else as it is."""
        return self._loop.run_until_complete(coroutine)

    def stop(self, reason: str = "stopped") -> None:
        """Let `run` end: `stopping` aborts, then main is cancelled. What was spawned is cancelled when main has ended."""
        if self._stopping.request_abort(reason) and self._main is not None:
            self._main.cancel()

    async def close(self) -> None:
        """Cancel what was spawned, oldest first, and wait for it, ten seconds at most; then drop the timers."""
        self._is_closed = True
        if self._collector is not None:
            self._collector.close()
        own = asyncio.current_task()
        deadline_s = self._loop.time() + END_GRACE_S
        for task in list(self._tasks.values()):
            if task is not own:
                task.cancel()
        late = self._loop.call_at(deadline_s, self._ended.wake)
        try:
            while any(task is not own for task in self._tasks.values()) and self._loop.time() < deadline_s:
                await self._ended.wait()
        finally:
            late.cancel()
        left = [task.get_name() for task in self._tasks.values() if task is not own]
        for timer in list(self._timers.values()):
            timer.cancel()
        self._wheel.close()
        if left:
            raise WrongState("reactor", "", f"still running {', '.join(left[:8])}", "end them within ten seconds")

    def statistics(self) -> ReactorStats:
        """Return a snapshot; in the loop's thread."""
        groups: tuple[GroupStatistics, ...] = ()
        n_turns = 0
        if isinstance(self._loop, GroupLoop):
            groups, n_turns = self._loop.group_statistics(), self._loop.n_turns()
        wheel, tally = self._wheel.statistics(), self._tally
        return ReactorStats(
            n_turns=n_turns,
            n_steps=sum(group.n_steps for group in groups),
            queue_depth=sum(group.n_queued for group in groups),
            n_tasks_scheduled=self._n_scheduled,
            n_tasks_completed=self._n_completed,
            n_tasks_failed=self._n_failed,
            n_tasks_cancelled=self._n_cancelled,
            busy_s=self._busy_s() - self._busy_before_s,
            elapsed_s=self._loop.time() - self._began_s,
            n_timers_created=wheel.n_created + tally.n_created,
            n_timers_fired=wheel.n_fired + tally.n_fired,
            n_timers_cancelled=wheel.n_cancelled + tally.n_cancelled,
            groups=groups,
        )

    async def _run(self, main: Callable[["Reactor"], Coroutine[Any, Any, T]]) -> T | None:
        own = self._main = asyncio.current_task()
        assert own is not None
        if self._collector is not None:
            self._collector.start()
        try:
            self._stopping.check()
            return await main(self)
        except (asyncio.CancelledError, Cancelled):
            if not self._stopping.abort_requested:
                raise
            while own.cancelling():
                own.uncancel()
            return None
        finally:
            self._main = None
            await self.close()

    def _busy_s(self) -> float:
        return self._loop.busy_s() if isinstance(self._loop, GroupLoop) else 0.0

    def _on_done(self, number: int, task: asyncio.Task[Any]) -> None:
        del self._tasks[number]
        if task.cancelled():
            self._n_cancelled += 1
        elif task._exception is None:  # exception() would mark a failure as seen
            self._n_completed += 1
        else:
            self._n_failed += 1
        self._ended.wake()


class ReactorMetrics:
    """Writes a reactor's numbers into a registry: before each snapshot, and once a second for other processes that read the pages.

    Args:
        reactor: Whose.
        metrics: Where to.
    """

    def __init__(self, reactor: Reactor, metrics: Registry) -> None:
        self._reactor = reactor
        self._metrics = metrics
        self._last: dict[tuple[str, str], float] = {}
        self._timer = Timer(self.collect, loop=reactor.loop)
        self._unhook = metrics.before_snapshot(self.collect)
        if reactor.loop.is_running():
            self.start()

    def start(self) -> None:
        """Begin to write once a second."""
        if not self._timer.is_armed:
            self._timer.arm_periodic(COLLECT_S)

    def close(self) -> None:
        """Write a last time, and no more."""
        self.collect()
        if self._timer.cancel():
            self._unhook()

    def collect(self) -> None:
        """Write what is so now."""
        stats = self._reactor.statistics()
        count, gauge = self._count, self._metrics.gauge
        count("isopod_tasks_scheduled_total", "Tasks that were spawned.", stats.n_tasks_scheduled)
        count("isopod_tasks_completed_total", "Tasks that returned.", stats.n_tasks_completed)
        count("isopod_tasks_failed_total", "Tasks that raised.", stats.n_tasks_failed)
        count("isopod_tasks_cancelled_total", "Tasks that were cancelled.", stats.n_tasks_cancelled)
        gauge("isopod_task_queue_depth", "Steps of tasks that wait for their turn.").set(stats.queue_depth)
        count("isopod_reactor_polls_total", "Turns of the event loop in which steps ran.", stats.n_turns)
        count("isopod_reactor_events_processed_total", "Steps that ran.", stats.n_steps)
        count("isopod_reactor_busy_seconds_total", "CPU time of the event loop's thread.", stats.busy_s)
        count("isopod_timers_created_total", "Timers that were set.", stats.n_timers_created)
        count("isopod_timers_fired_total", "Timers that fired.", stats.n_timers_fired)
        count("isopod_timers_cancelled_total", "Timers that were cancelled before.", stats.n_timers_cancelled)
        for group in stats.groups:
            name = group.name
            count("isopod_scheduler_runtime_seconds_total", "Time in a group's steps.", group.run_s, group=name)
            count("isopod_scheduler_waittime_seconds_total", "Time in which a group had no work.", group.wait_s, group=name)
            count("isopod_scheduler_starvetime_seconds_total", "Time in which a group had work and others ran.", group.starve_s, group=name)
            count("isopod_scheduler_tasks_processed_total", "Steps of a group that ran.", group.n_steps, group=name)
            gauge("isopod_scheduler_queue_length", "Steps of a group that wait for their turn.", group=name).set(group.n_queued)
            gauge("isopod_scheduler_shares", "A group's shares.", group=name).set(group.shares)

    def _count(self, name: str, help_text: str, value: float, **labels: str) -> None:
        key = (name, labels.get("group", ""))
        grown = value - self._last.get(key, 0.0)
        self._last[key] = value
        self._metrics.counter(name, help_text, **labels).inc(max(0.0, grown))
