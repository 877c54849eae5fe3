"""Owners: who a task, a connection, an open file or a lock belongs to.

A process of the simulation is one owner; the code of a test is the first one. The owner travels in a context variable, so whatever a
task of an owner starts belongs to the same owner. When a process dies its tasks end and what it held is released, as the kernel does it.

How an owner dies: from that instant every port refuses it with `CancelledError` (a dead process has no more effects), its tasks are
cancelled in the order of their creation, and what it holds is released in the order of its taking. `finally` blocks still run, because
Python has no other way to end a coroutine, but they can change nothing outside the process. Once all tasks have ended the owner is
buried: timers and callbacks it left behind are dropped unseen.

How an owner hangs (SIGSTOP): the loop lays everything aside that would run in its name (steps of tasks, timers, deliveries), and runs it in
that order once the owner goes on. What others do to it goes on meanwhile, as the kernel does it: connections are accepted into the
backlog, bytes wait in buffers, locks stay taken. A kill reaches it as it is.

This is not supervision: tasks of a live owner end by themselves.
"""

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Final

OWNER: Final[ContextVar["Owner"]] = ContextVar("isopod_sim_owner")
_PRUNE_TASKS_MIN: Final = 64
_UNWIND_TURNS_MAX: Final = 1000


class HostTime:
    """One machine's time as a function of the simulation's: `at(elapsed)` = base + (elapsed - since) * rate."""

    __slots__ = ("_base_ns", "_rate", "_since_ns", "drift_ppm")

    def __init__(self) -> None:
        self.drift_ppm = 0.0
        self._rate = 1.0
        self._base_ns = 0
        self._since_ns = 0

    def set_drift(self, ppm: float, elapsed_ns: int) -> None:
        """Run at another rate from now on."""
        self._base_ns, self._since_ns = self.at(elapsed_ns), elapsed_ns
        self.drift_ppm = ppm
        self._rate = 1.0 + ppm / 1e6

    def at(self, elapsed_ns: int) -> int:
        """Return the machine's nanoseconds since the simulation began."""
        if self._base_ns == self._since_ns and self._rate == 1.0:
            return elapsed_ns
        return self._base_ns + round((elapsed_ns - self._since_ns) * self._rate)

    def when_s(self, host_s: float) -> float:
        """Return the simulation's seconds at which the machine's clock shows `host_s`."""
        return (self._since_ns + (host_s * 1e9 - self._base_ns) / self._rate) / 1e9


class Owner:
    """One process as the simulation's resources see it.

    Args:
        pid: Its number.
        name: For messages.
        outside: Whether it is a program beside the code under test: its tasks are then not among `asyncio.all_tasks()`.
        host: The name of its machine, "" where there is only one.
        time: Its machine's time; None for the simulation's own.
    """

    def __init__(self, pid: int, name: str, *, outside: bool = False, host: str = "", time: HostTime | None = None) -> None:
        self.pid = pid
        self.name = name
        self.outside = outside
        self.host = host
        self.time = time
        self.alive = True
        self.buried = False
        self.is_hung = False
        self.parked: list[asyncio.Handle] = []
        """What would have run while it hung."""
        self._tasks: list[asyncio.Task[Any]] = []
        self._prune_at = _PRUNE_TASKS_MIN
        self._held: dict[int, Callable[[], None]] = {}
        self._n_held = 0

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Remember a task until it is done."""
        if self.outside:
            asyncio.tasks._unregister_task(task)
        self._tasks.append(task)
        if len(self._tasks) >= self._prune_at:
            self._tasks = [each for each in self._tasks if not each.done()]
            self._prune_at = max(_PRUNE_TASKS_MIN, 2 * len(self._tasks))

    def pending(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that have not ended, oldest first."""
        return [task for task in self._tasks if not task.done()]

    def hold(self, release: Callable[[], None]) -> int:
        """Remember what must be released if the owner dies; returns the number to `forget` it by."""
        self._n_held += 1
        self._held[self._n_held] = release
        return self._n_held

    def forget(self, number: int) -> None:
        """Forget something held: it was released in the ordinary way."""
        self._held.pop(number, None)

    def check(self) -> None:
        """Raise `CancelledError` if the owner is dead: its calls have no effect any more."""
        if not self.alive:
            raise asyncio.CancelledError(f"process {self.pid} ({self.name}) is dead")

    def die(self) -> None:
        """End: no more effects, what it held is released, its tasks are cancelled."""
        if not self.alive:
            return
        self.alive = False
        held, self._held = self._held, {}
        for release in held.values():
            release()
        for task in self.pending():
            task.cancel()

    async def unwound(self) -> None:
        """Wait until every task of the dead owner has ended, then bury it. Called from a task of another owner."""
        for _ in range(_UNWIND_TURNS_MAX):
            pending = self.pending()
            if not pending:
                break
            for task in pending:
                task.cancel()
            await asyncio.sleep(0)
        self.buried = True
