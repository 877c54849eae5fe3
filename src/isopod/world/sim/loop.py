"""SimLoop: an asyncio event loop with virtual time, a seeded order and no outside.

Legal behaviours, all drawn from one stream of the world's seed:

- Time stands still while something is ready, but for one microsecond a turn; when nothing is ready it jumps to the next timer.
- Tasks that are ready in the same turn run in a seeded order. Plain callbacks (`call_soon`, timers) keep their order among themselves,
  which asyncio promises and protocols rely on; only their place between the tasks varies.
- Scheduling groups change nothing in that order: the loop counts their steps, and `need_preempt` says yes at every eighth question.
- `run_in_executor` runs the function in the loop's thread, a seeded delay later. There are no threads, sockets, signals or children.
- What a process does that hangs (`hang`) is laid aside until it goes on (`resume`), in order; what a buried one left is dropped.
- The clock of `time` and of timers is that of the machine whose process asks: it may drift (`world.sim.clock`).

It refuses to hang: with nothing ready and no timer left it raises `Deadlock`, and over `n_events_max` events `Runaway`.
Nothing here iterates a set or orders by `id()`. Sources: asyncio's `BaseEventLoop`, whose `_run_once` is replaced (Python 3.11 to 3.13).

One event costs one to two microseconds: handles are made without asyncio's debugging, one ready handle is not shuffled, owners are only
looked at once one of them has hung or died, and nothing is formatted unless the run is traced.
"""

import asyncio
import heapq
import random
from asyncio import events, format_helpers
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any, Final, TypeVar, TypeVarTuple, Unpack

from isopod.world.errors import Exhausted
from isopod.world.loops import CURRENT, GROUPS_MAX, MAIN, GroupLoop, GroupStatistics, SchedulingGroup, Stall, TaskFacts
from isopod.world.sim.owners import OWNER, Owner
from isopod.world.sim.trace import LineSink, Trace

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
TURN_NS: Final = 1_000
"""What one turn of the loop costs: without it a task that polls with `sleep(0)` would never see time pass."""
EVENTS_MAX: Final = 10_000_000
_FOREVER_S: Final = 1e10
"""Later than any timer; `asyncio.sleep(math.inf)` waits as long."""
_EXECUTOR_DELAY_S_MAX: Final = 0.001
_CANCELLED_TIMERS_MIN: Final = 128
_ROOT_PID: Final = 4242
_PREEMPT_EVERY: Final = 8
_Task: Final = asyncio.Task
_new: Final = object.__new__
_heappush: Final = heapq.heappush
_heappop: Final = heapq.heappop


class Deadlock(RuntimeError):
    """Nothing is ready, no timer remains, and something is still awaited."""


class Runaway(RuntimeError):
    """More events ran than any honest scenario needs."""


class _Handle(events.Handle):
    """asyncio's, made by the loop, which fills it in: without a call of `__init__`, and without looking whether it is being debugged."""

    __slots__ = ()
    _source_traceback = None
    _repr = None

    def cancel(self) -> None:
        """Never run."""
        self._cancelled = True
        self._callback = None
        self._args = ()


class _TimerHandle(events.TimerHandle):
    """The same for a timer."""

    __slots__ = ()
    _source_traceback = None
    _repr = None

    def cancel(self) -> None:
        """Never run; the loop is told while it still holds it."""
        if not self._cancelled:
            self._cancelled = True
            self._callback = None
            self._args = ()
            if self._scheduled:  # type: ignore[attr-defined]
                self._loop._timer_handle_cancelled(self)  # type: ignore[attr-defined]


class _NoWatch:
    """The watch over a loop whose steps take no time."""

    def stop(self) -> None:
        """Nothing runs."""


class SimLoop(GroupLoop, asyncio.BaseEventLoop):
    """The loop.

    Args:
        chance: The stream that orders ready tasks.
        n_events_max: Bound on events run before `Runaway`.
    """

    # With asyncio's own they would be more names than CPython keeps inside an object, and each look at one would go through a dictionary.
    __slots__ = (
        "_chance",
        "_group_steps",
        "_groups_since_ns",
        "_has_drift",
        "_is_watched",
        "_n_cancelled_timers",
        "_n_preempt_asked",
        "_n_timers",
        "_n_turns",
        "_owners",
        "_timers",
        "elapsed_ns",
        "looks_at_owners",
        "n_events",
        "n_events_max",
        "outside",
        "root",
        "trace",
        "undertaker",
    )
    _ready: deque[asyncio.Handle]
    _stopping: bool
    _closed: bool

    def __init__(self, chance: random.Random, *, n_events_max: int = EVENTS_MAX) -> None:
        super().__init__()
        self.elapsed_ns = 0
        self.n_events = 0
        self.n_events_max = n_events_max
        self.root = Owner(_ROOT_PID, "root")
        self.undertaker = Owner(0, "undertaker", outside=True)
        self.trace: Trace | None = None
        """Where events are written down; None while nobody asked for it."""
        self.outside = Context()
        """The context of events that belong to no process: what is on its way between machines."""
        self.outside.run(OWNER.set, self.undertaker)
        self._chance = chance
        self._timers: list[tuple[int, int, asyncio.TimerHandle]] = []
        self._n_timers = 0
        self._n_cancelled_timers = 0
        self._owners: list[Owner] = [self.root]
        self.looks_at_owners = False
        """Whether a process ever hung or ended: only then who would run is looked at."""
        self._is_watched = False
        self._has_drift = False
        self._n_turns = 0
        self._n_preempt_asked = 0
        self._group_steps: dict[SchedulingGroup, int] = {}
        self._groups_since_ns: dict[SchedulingGroup, int] = {}

    # -- time and owners -------------------------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Return virtual seconds since the simulation began, by the clock of the machine whose process asks."""
        if self._has_drift:
            time = OWNER.get(self.root).time
            if time is not None:
                return time.at(self.elapsed_ns) / 1e9
        return self.elapsed_ns / 1e9

    def follow_drift(self) -> None:
        """Look at machines' own clocks from now on. Called when the first of them drifts."""
        self._has_drift = True

    def owner(self) -> Owner:
        """Return the process whose code is running."""
        return OWNER.get(self.root)

    def add_owner(self, owner: Owner) -> None:
        """Know an owner, so that its tasks are named in a `Deadlock`. The buried ones are forgotten."""
        self._owners = [each for each in self._owners if not each.buried]
        self._owners.append(owner)

    def owners(self) -> list[Owner]:
        """Return the owners that are not buried, oldest first."""
        return [each for each in self._owners if not each.buried]

    def watch_owners(self) -> None:
        """Look from now on whether who would run hangs or is buried. Called when the first process ends."""
        self.looks_at_owners = self._is_watched = True

    def hang(self, owner: Owner) -> None:
        """Let nothing run any more in the name of a process, until `resume`."""
        self.looks_at_owners = self._is_watched = True
        owner.is_hung = True

    def resume(self, owner: Owner) -> None:
        """Let a process go on: what was laid aside runs now, in the order in which it would have."""
        owner.is_hung = False
        parked, owner.parked = owner.parked, []
        self._ready.extend(parked)

    # -- scheduling groups -----------------------------------------------------------------------------------------------------------

    def use_group(self, group: SchedulingGroup) -> None:
        """See `GroupLoop.use_group`."""
        if group is MAIN:
            return
        self.account()
        if group not in self._group_steps:
            if len(self._group_steps) >= GROUPS_MAX:
                raise Exhausted("scheduling groups", f"{GROUPS_MAX} on one loop", "make groups once, not per connection or per call")
            self._group_steps[group] = 0
            self._groups_since_ns[group] = self.elapsed_ns

    def account(self) -> None:
        """See `GroupLoop.account`."""
        if not self._group_steps:
            self._group_steps[MAIN] = 0
            self._groups_since_ns[MAIN] = self.elapsed_ns

    def group_statistics(self) -> tuple[GroupStatistics, ...]:
        """See `GroupLoop.group_statistics`: steps take no virtual time, so all of it is time without work."""
        queued = [handle._context.get(CURRENT, MAIN) for handle in self._ready]  # type: ignore[attr-defined]
        return tuple(
            GroupStatistics(
                name=group.name,
                shares=group.shares,
                priority=group.priority.name.lower(),
                n_steps=n_steps,
                n_queued=queued.count(group),
                run_s=0.0,
                wait_s=(self.elapsed_ns - self._groups_since_ns[group]) / 1e9,
                starve_s=0.0,
            )
            for group, n_steps in self._group_steps.items()
        )

    def need_preempt(self) -> bool:
        """See `GroupLoop.need_preempt`."""
        self._n_preempt_asked += 1
        return self._n_preempt_asked % _PREEMPT_EVERY == 0

    def busy_s(self) -> float:
        """See `GroupLoop.busy_s`: turns are all that takes time."""
        return self._n_turns * TURN_NS / 1e9

    def n_turns(self) -> int:
        """See `GroupLoop.n_turns`."""
        return self._n_turns

    def task_facts(self, task: asyncio.Task[Any]) -> TaskFacts | None:
        """See `GroupLoop.task_facts`."""
        born: tuple[int, SchedulingGroup] | None = getattr(task, "_isopod_born", None)
        return None if born is None else TaskFacts((self.elapsed_ns - born[0]) / 1e9, born[1].name)

    def watch(self, threshold_s: float, on_stall: Callable[[Stall], None], on_end: Callable[[Stall], None]) -> _NoWatch:
        """See `GroupLoop.watch`: nothing can stall where steps take no time, and there is no other thread to notice."""
        return _NoWatch()

    # -- trace -----------------------------------------------------------------------------------------------------------------------

    def start_trace(self, write: LineSink | None = None) -> None:
        """Begin to hash every event: its time, its machine and what runs; and what is sent and stored, where ports note that.

        Args:
            write: Gets the lines too, in batches; see `world.sim.trace`.
        """
        self.trace = Trace(write)
        self._is_watched = True

    def trace_digest(self) -> str:
        """Return the digest of the events since `start_trace`: equal for equal seeds, in any process."""
        if self.trace is None:
            raise RuntimeError("no trace was started")
        return self.trace.digest()

    # -- scheduling ------------------------------------------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None) -> asyncio.Handle:
        """Run a callback in the next turn."""
        if self._closed:
            raise RuntimeError("Event loop is closed")
        handle: Any = _new(_Handle)  # filled in here: the stubs do not know its slots
        made: asyncio.Handle = handle
        handle._context = copy_context() if context is None else context
        handle._callback = callback
        handle._args = args
        handle._cancelled = False
        self._ready.append(handle)
        return made

    def call_at(
        self, when: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Schedule a callback; those of equal time keep the order of scheduling."""
        at_s = when
        if self._has_drift:
            time = OWNER.get(self.root).time
            if time is not None:
                at_s = time.when_s(when)
        return self._schedule(round((at_s if at_s < _FOREVER_S else _FOREVER_S) * 1e9), when, callback, args, context=context)

    def call_later(
        self, delay: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Schedule a callback after `delay` virtual seconds."""
        if self._has_drift:
            return self.call_at(self.time() + delay, callback, *args, context=context)
        at_ns = self.elapsed_ns + round((delay if delay < _FOREVER_S else _FOREVER_S) * 1e9)
        return self._schedule(at_ns, at_ns / 1e9, callback, args, context=context)

    def call_at_ns(self, at_ns: int, callback: Callable[..., object], *args: object, context: Context | None = None) -> asyncio.TimerHandle:
        """Schedule a callback at an instant of the simulation, whatever a machine's clock says. For the World's own events."""
        return self._schedule(at_ns, at_ns / 1e9, callback, args, context=context)

    def push(self, at_ns: int, timer: asyncio.TimerHandle) -> None:
        """Schedule a timer of `call_at_ns` once more; it has run, and nobody cancelled it."""
        timer._scheduled = True  # type: ignore[attr-defined]
        self._n_timers = number = self._n_timers + 1
        _heappush(self._timers, (at_ns, number, timer))

    def _schedule(
        self, at_ns: int, when: float, callback: Callable[..., object], args: tuple[Any, ...], *, context: Context | None
    ) -> asyncio.TimerHandle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        timer: Any = _new(_TimerHandle)
        made: asyncio.TimerHandle = timer
        timer._context = copy_context() if context is None else context
        timer._loop = self
        timer._callback = callback
        timer._args = args
        timer._cancelled = False
        timer._when = when
        timer._scheduled = True
        self._n_timers = number = self._n_timers + 1
        _heappush(self._timers, (at_ns, number, timer))
        return made

    def create_task(
        self,
        coro: Coroutine[Any, Any, _T] | Generator[Any, None, _T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[_T]:
        """Start a task, and write it down with its owner."""
        task: asyncio.Task[_T]
        if self.get_task_factory() is None and not self._closed:
            task = _Task(coro, loop=self, name=name, context=context)  # type: ignore[arg-type]  # a name is anything with a text
        else:
            task = super().create_task(coro, name=name, context=context)
        if context is None:
            owner, group = OWNER.get(self.root), CURRENT.get()
        else:
            owner, group = context.get(OWNER, self.root), context.get(CURRENT, MAIN)
        owner.adopt(task)
        task._isopod_born = (self.elapsed_ns, group)  # type: ignore[attr-defined]
        if group is not MAIN and group not in self._group_steps:
            self.use_group(group)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:  # type: ignore[override]
        """Run `func` inline at a seeded later instant."""
        future: asyncio.Future[_T] = self.create_future()
        self.call_later(self._chance.random() * _EXECUTOR_DELAY_S_MAX, _fulfil, future, func, args)
        return future

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """There are no other threads here: the same as `call_soon`."""
        return self.call_soon(callback, *args, context=context)

    async def getaddrinfo(self, *args: object, **kwargs: object) -> list[Any]:
        """Refuse: names are resolved by the Network port."""
        raise RuntimeError("the simulation has no resolver: use the Network port")

    # -- the turn --------------------------------------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        """Run turns until somebody stops the loop: what asyncio does between two turns is only to look for that."""
        ready, timers = self._ready, self._timers
        while True:
            if not ready and not self._stopping:
                if timers and not timers[0][2]._cancelled and not self.looks_at_owners:
                    self.elapsed_ns = max(self.elapsed_ns, timers[0][0])
                else:
                    self._jump()
            limit = self.elapsed_ns = self.elapsed_ns + TURN_NS
            self._n_turns += 1
            while timers and timers[0][0] <= limit:
                timer = _heappop(timers)[2]
                timer._scheduled = False  # type: ignore[attr-defined]
                if timer._cancelled:
                    self._n_cancelled_timers -= 1
                else:
                    ready.append(timer)
            if len(ready) == 1:
                self._run_handle(ready.popleft())
            elif ready:
                self._run_batch()
            if self._stopping:
                return

    def _run_batch(self) -> None:
        ready = self._ready
        batch = list(ready)
        ready.clear()
        self._order(batch)
        n_begun = 0
        try:
            for handle in batch:
                n_begun += 1
                self._run_handle(handle)
        finally:
            if n_begun < len(batch):
                ready.extendleft(reversed(batch[n_begun:]))

    def _run_handle(self, handle: asyncio.Handle) -> None:
        if handle._cancelled:
            return
        context: Context = handle._context  # type: ignore[attr-defined]
        if self._is_watched and not self._may_run(handle, context):
            return
        self.n_events = n_events = self.n_events + 1
        if n_events > self.n_events_max:
            raise Runaway(f"{self.n_events_max} events ran; last: {_describe(handle)}; virtual time {self.elapsed_ns / 1e9:.6f} s")
        steps = self._group_steps
        if steps:
            group = context.get(CURRENT, MAIN)
            steps[group if group in steps else MAIN] += 1
        args = handle._args
        try:
            if args:
                context.run(handle._callback, *args)  # type: ignore[attr-defined]
            else:
                context.run(handle._callback)  # type: ignore[attr-defined]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - the root of every callback, as in asyncio's Handle
            what = format_helpers._format_callback_source(handle._callback, handle._args)  # type: ignore[attr-defined]
            self.call_exception_handler({"message": f"Exception in callback {what}", "exception": error, "handle": handle})

    def _may_run(self, handle: asyncio.Handle, context: Context) -> bool:
        """Look whether who would run hangs or is buried, and write the event down."""
        owner = context.get(OWNER, self.root)
        if self.looks_at_owners:
            if owner.buried:
                return False
            if owner.is_hung:
                owner.parked.append(handle)
                return False
        if self.trace is not None:
            self.trace.add(self.elapsed_ns, owner.host, _describe(handle))
        return True

    def _order(self, batch: list[asyncio.Handle]) -> None:
        """Shuffle the ready batch, then put the plain callbacks back into their own order."""
        plain = [handle for handle in batch if not isinstance(getattr(handle._callback, "__self__", None), _Task)]  # type: ignore[attr-defined]
        if len(plain) == len(batch):
            return
        chance = self._chance.random
        for last in range(len(batch) - 1, 0, -1):
            other = int(chance() * (last + 1))
            batch[last], batch[other] = batch[other], batch[last]
        if plain:
            rest = iter(plain)
            batch[:] = [handle if _task_of(handle) is not None else next(rest) for handle in batch]

    def _jump(self) -> None:
        """Move time to the next timer that still counts."""
        timers = self._timers
        while timers:
            at_ns, _, timer = timers[0]
            if not timer._cancelled and not (self.looks_at_owners and _owner_of(timer, self.root).buried):
                self.elapsed_ns = max(self.elapsed_ns, at_ns)
                return
            _heappop(timers)
            timer._scheduled = False  # type: ignore[attr-defined]
            self._n_cancelled_timers -= timer._cancelled
        raise Deadlock(self._explain())

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Called by `TimerHandle.cancel`, also for a timer that ran; sweeps when half the heap is dead."""
        if not handle._scheduled:  # type: ignore[attr-defined]
            return
        self._n_cancelled_timers += 1
        if self._n_cancelled_timers > _CANCELLED_TIMERS_MIN and 2 * self._n_cancelled_timers > len(self._timers):
            self._timers[:] = [entry for entry in self._timers if not entry[2]._cancelled]  # in place: the turn holds it too
            heapq.heapify(self._timers)
            self._n_cancelled_timers = 0

    def _explain(self) -> str:
        lines = [f"deadlock at virtual time {self.elapsed_ns / 1e9:.6f} s: nothing is ready, no timer remains; pending tasks:"]
        for owner in self.owners():
            where = f"{owner.host}:" * bool(owner.host) + f"{owner.name}[{owner.pid}]" + " (hung)" * owner.is_hung
            lines += [f"  {where}: {_describe_task(task)}" for task in owner.pending()]
        return "\n".join(lines)

    def _write_to_self(self) -> None:
        """Nothing sleeps outside the loop that would have to be woken."""

    def _process_events(self, event_list: object) -> None:
        raise NotImplementedError("the simulation has no selector")

    def close(self) -> None:
        """Close, dropping every timer."""
        self._timers.clear()
        if self.trace is not None:
            self.trace.flush()
        super().close()


def _fulfil(future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.cancelled():
        return
    try:
        result = func(*args)
    except Exception as error:  # noqa: BLE001 - what the function raised belongs to whoever awaits it
        future.set_exception(error)
    else:
        future.set_result(result)


def _task_of(handle: asyncio.Handle) -> "asyncio.Task[Any] | None":
    """Return the task a handle steps or wakes, or None for a plain callback."""
    owner = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    return owner if isinstance(owner, _Task) else None


def _owner_of(handle: asyncio.Handle, root: Owner) -> Owner:
    found: Owner = handle._context.get(OWNER, root)  # type: ignore[attr-defined]
    return found


def _describe(handle: asyncio.Handle) -> str:
    task = _task_of(handle)
    if task is not None:
        return getattr(task.get_coro(), "__qualname__", "task")
    callback = handle._callback  # type: ignore[attr-defined]
    return getattr(callback, "__qualname__", None) or type(callback).__qualname__


def _describe_task(task: "asyncio.Task[Any]") -> str:
    frames = task.get_stack(limit=1)
    where = f" at {frames[0].f_code.co_filename.rpartition('/')[2]}:{frames[0].f_lineno}" if frames else ""
    return f"{task.get_name()} {getattr(task.get_coro(), '__qualname__', '?')}{where}"
