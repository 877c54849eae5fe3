"""The host's event loops: uvloop's, asyncio's own, and a polling one; each shares its turns between scheduling groups.

uvloop is looked for when a loop is made, never at import: a machine without it (or with one that cannot be loaded) gets
asyncio's selector loop, and `loop_facts` says why, for `isopod info`.

How groups get their shares: until a second group is met, a loop is exactly uvloop's or asyncio's. From then on `call_soon` (through which
every step of a task and every callback of a future passes) puts the step into the queue of its context's group, and one callback in each
turn of the loop runs a turn of the `FairQueue`. What the loops call directly stays first come, first served: I/O callbacks, timers,
`call_soon_threadsafe`. These are short, and what they wake up belongs to a group again.
"""

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from importlib import metadata
from typing import Any, Final, Literal, TypeVar, TypeVarTuple, Unpack

from isopod.world.fair_queue import QUOTA_NS, FairQueue
from isopod.world.host.polling import SPIN_S, PollingSelector
from isopod.world.host.watchdog import LoopWatch
from isopod.world.loops import CURRENT, MAIN, GroupLoop, GroupStatistics, SchedulingGroup, Stall, TaskFacts

LoopKind = Literal["uvloop", "asyncio", "polling"]

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
_log: Final = logging.getLogger("asyncio")


def loop_facts() -> tuple[Literal["uvloop", "asyncio"], str]:
    """Return the kind of loop that `new_loop("uvloop")` gives here, and why."""
    try:
        import uvloop
    except ImportError as error:
        return "asyncio", f"uvloop cannot be imported: {error}"
    return "uvloop", f"{uvloop.__name__} {metadata.version('uvloop')} is installed"


def new_loop(
    kind: LoopKind = "uvloop", *, spin_s: float = SPIN_S, clock_ns: Callable[[], int] = time.monotonic_ns
) -> asyncio.AbstractEventLoop:
    """Return a new event loop, not yet set as the current one; who asked for it closes it.

    Args:
        kind: Which one. "uvloop" falls back to asyncio where it is missing; "asyncio" is always asyncio's selector loop; "polling" is
            that too, but it asks the kernel again and again instead of sleeping while there was work lately.
        spin_s: For "polling": how long after the last work it sleeps.
        clock_ns: What the turns of groups, their accounts and `need_preempt` are measured with, a clock that never goes back. Timers and
            the ages of tasks keep the machine's time.
    """
    loop: GroupLoopMixin
    if kind == "polling":
        loop = AsyncioLoop(PollingSelector(spin_s))
    elif kind == "asyncio" or loop_facts()[0] == "asyncio":
        loop = AsyncioLoop()
    else:
        loop = _uvloop_class()()
    loop._clock_ns = clock_ns
    return loop


class _Step(asyncio.Handle):
    """A handle that is cheap to make: no check whether the loop is in debug mode."""

    __slots__ = ()

    def __init__(self, callback: Callable[..., object], args: tuple[object, ...], loop: "GroupLoopMixin", context: Context) -> None:
        self._callback = callback
        self._args = args
        self._loop = loop
        self._context = context
        self._cancelled = False
        self._source_traceback = None
        self._repr = None


class GroupLoopMixin(GroupLoop):
    """What makes a loop class a `GroupLoop`; stands before it in the bases."""

    _fair: FairQueue[asyncio.Handle] | None = None
    _is_turn_due = False
    _preempt_at_ns = 0
    _checks = False
    _has_factory = False
    _thread: int | None = None
    _clock_ns: Callable[[], int] = staticmethod(time.monotonic_ns)

    # -- GroupLoop -------------------------------------------------------------------------------------------------------------------

    def use_group(self, group: SchedulingGroup) -> None:
        """See `GroupLoop.use_group`."""
        if group is not MAIN:
            self.account()
            assert self._fair is not None
            self._fair.add(group)

    def account(self) -> None:
        """See `GroupLoop.account`."""
        if self._fair is None:
            self._begin()

    def group_statistics(self) -> tuple[GroupStatistics, ...]:
        """See `GroupLoop.group_statistics`; empty while nothing is counted."""
        return () if self._fair is None else self._fair.statistics()

    def n_turns(self) -> int:
        """See `GroupLoop.n_turns`."""
        return 0 if self._fair is None else self._fair.n_turns

    def busy_s(self) -> float:
        """See `GroupLoop.busy_s`."""
        return time.thread_time()

    def need_preempt(self) -> bool:
        """See `GroupLoop.need_preempt`."""
        now_ns = self._clock_ns()
        if self._fair is not None:
            return now_ns >= self._fair.slice_end_ns
        if now_ns < self._preempt_at_ns:
            return False
        self._preempt_at_ns = now_ns + QUOTA_NS
        return True

    def task_facts(self, task: asyncio.Task[Any]) -> TaskFacts | None:
        """See `GroupLoop.task_facts`."""
        born: tuple[int, SchedulingGroup] | None = getattr(task, "_isopod_born", None)
        return None if born is None else TaskFacts((time.monotonic_ns() - born[0]) / 1e9, born[1].name)

    def watch(self, threshold_s: float, on_stall: Callable[[Stall], None], on_end: Callable[[Stall], None]) -> LoopWatch:
        """See `GroupLoop.watch`."""
        return LoopWatch(self, threshold_s, on_stall, on_end=on_end, group=self._running_group)

    # -- asyncio ---------------------------------------------------------------------------------------------------------------------

    def create_task(
        self, coro: Coroutine[Any, Any, _T] | Generator[Any, None, _T], *, name: object = None, context: Context | None = None
    ) -> asyncio.Task[_T]:
        """Start a task, and write down when and in which group; a context's group counts also if it was entered where no loop ran."""
        group = CURRENT.get() if context is None else context.get(CURRENT, MAIN)
        if group is not MAIN and (self._fair is None or group not in self._fair.queues):
            self.use_group(group)
        if self._has_factory or self._checks or self.is_closed():
            task: asyncio.Task[_T] = super().create_task(coro, name=name, context=context)  # type: ignore[arg-type]
        else:
            task = asyncio.Task(coro, loop=self, name=name, context=context)  # type: ignore[arg-type]
        try:  # noqa: SIM105 - suppress() costs more than all the rest here
            task._isopod_born = (time.monotonic_ns(), group)  # type: ignore[attr-defined]
        except AttributeError:  # a factory may make tasks that take no attributes
            pass
        return task

    def set_task_factory(self, factory: Any) -> None:  # as asyncio's: a callable, or None
        """Have tasks made by somebody else."""
        super().set_task_factory(factory)
        self._has_factory = factory is not None

    def run_forever(self) -> None:
        """Run until `stop`."""
        before, self._thread = self._thread, threading.get_ident()
        try:
            super().run_forever()
        finally:
            self._thread = before

    def set_debug(self, enabled: bool) -> None:
        """Switch asyncio's checks."""
        super().set_debug(enabled)
        self._checks = enabled

    def close(self) -> None:
        """Close; steps that wait are dropped."""
        super().close()
        if self._fair is not None:
            self._fair.clear()
            vars(self).pop("call_soon", None)  # the class's own refuses on a closed loop

    # -- turns -----------------------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Tell groups apart from now on."""
        self._checks = self.get_debug()
        self._fair = FairQueue(self._clock_ns, self._run_steps)
        self._queues = self._fair.queues
        self._turn_context = Context()
        self._turn_callback = self._turn
        self._native_call_soon = super().call_soon
        # On the instance, not in the class: a loop without groups so pays nothing, and asyncio's and uvloop's tasks look it up here.
        vars(self)["call_soon"] = self._call_soon_grouped

    def _call_soon_grouped(self, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None) -> asyncio.Handle:
        """Queue a step with its group."""
        if context is None:
            context = copy_context()
        fair = self._fair
        assert fair is not None
        handle: asyncio.Handle
        if self._checks:
            self._check(callback)
            handle = asyncio.Handle(callback, args, self, context)
        else:
            handle = _Step(callback, args, self, context)
        queue = self._queues.get(context.get(CURRENT, MAIN)) or fair.main
        queue.items.append(handle)
        if not queue.is_active:
            fair.activate(queue)
            if not self._is_turn_due:
                self._is_turn_due = True
                self._native_call_soon(self._turn_callback, context=self._turn_context)
        return handle

    def _turn(self) -> None:
        fair = self._fair
        assert fair is not None
        try:
            fair.turn()
        finally:
            self._is_turn_due = fair.has_work
            if self._is_turn_due:
                self._native_call_soon(self._turn_callback, context=self._turn_context)

    def _run_steps(self, items: deque[asyncio.Handle], n_steps: int) -> None:
        if self._checks:
            self._run_checked(items, n_steps)
            return
        take = items.popleft
        for _ in range(n_steps):
            handle = take()
            if handle._cancelled:
                continue
            try:
                handle._context.run(handle._callback, *handle._args)  # type: ignore[attr-defined]
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 - as asyncio.Handle: a callback's failure is the exception handler's
                self._report(handle, error)

    def _run_checked(self, items: deque[asyncio.Handle], n_steps: int) -> None:
        """Run steps in debug mode, naming the slow ones as asyncio does."""
        for _ in range(n_steps):
            handle = items.popleft()
            if handle.cancelled():
                continue
            began_s = time.monotonic()
            handle._run()
            took_s = time.monotonic() - began_s
            if took_s >= self.slow_callback_duration:
                _log.warning("Executing %r took %.3f seconds", handle, took_s)

    def _report(self, handle: asyncio.Handle, error: BaseException) -> None:
        callback = getattr(handle._callback, "__qualname__", repr(handle._callback))  # type: ignore[attr-defined]
        self.call_exception_handler({"message": f"Exception in callback {callback}", "exception": error, "handle": handle})

    def _check(self, callback: object) -> None:
        """Refuse in debug mode what asyncio refuses."""
        if self._thread is not None and self._thread != threading.get_ident():
            raise RuntimeError("Non-thread-safe operation invoked on an event loop other than the current one")
        if asyncio.iscoroutine(callback) or asyncio.iscoroutinefunction(callback):
            raise TypeError("coroutines cannot be used with call_soon()")
        if not callable(callback):
            raise TypeError(f"a callable object was expected by call_soon(), got {callback!r}")

    def _running_group(self) -> str:
        """Return the group whose step runs, for the watch's thread."""
        queue = self._fair.current if self._fair is not None else None
        return MAIN.name if queue is None else queue.group.name


class AsyncioLoop(GroupLoopMixin, asyncio.SelectorEventLoop):
    """asyncio's selector loop with groups."""


@functools.cache
def _uvloop_class() -> type[GroupLoopMixin]:
    """Return uvloop's loop with groups."""
    import uvloop

    return type("UvLoop", (GroupLoopMixin, uvloop.Loop), {})
