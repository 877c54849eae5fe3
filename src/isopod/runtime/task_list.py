"""What the tasks of a loop are doing: the source of `isopod debug tasks`.

Not a profiler: one look, which costs a few microseconds per task and changes nothing. Ages and groups come from the loop, which
writes them down when it makes a task; for a loop of somebody else's they are unknown.
"""

import asyncio
from types import CodeType, FrameType
from typing import Any, Final, Literal, cast

import msgspec

from isopod.world.loops import GroupLoop

TASKS_MAX: Final = 1_000
"""More would hold up the loop for longer than a stall may last."""
AWAITS_MAX: Final = 64
"""How many coroutines deep the innermost one is looked for."""

TaskState = Literal["running", "ready", "waiting", "done"]


class TaskInfo(msgspec.Struct, frozen=True):
    """One task.

    Args:
        name: The task's.
        coroutine: The function it was started with.
        function: The function it is in now: the innermost one of those that await each other.
        location: Where in that function, "FILE:LINE"; "" if it is not known.
        awaits: What that function waits for, by its type ("Future", "Event.wait"); "" if it runs or is ready.
        state: "running" is who asked; "ready" waits for its turn.
        age_s: Since it was made, None if unknown.
        group: Its scheduling group, "" if unknown.
    """

    name: str
    coroutine: str
    function: str
    location: str
    awaits: str
    state: TaskState
    age_s: float | None
    group: str


def list_tasks(loop: asyncio.AbstractEventLoop | None = None, *, n_max: int = TASKS_MAX) -> list[TaskInfo]:
    """Return the tasks that have not ended, oldest first.

    Args:
        loop: The running loop if None; must be called in its thread.
        n_max: How many at most; the oldest.
    """
    loop = loop or asyncio.get_running_loop()
    current = asyncio.current_task(loop)
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: (-_age_s(task, loop), task.get_name()))
    return [describe_task(task, loop, is_running=task is current) for task in tasks[:n_max]]


def describe_task(task: "asyncio.Task[Any]", loop: asyncio.AbstractEventLoop, *, is_running: bool = False) -> TaskInfo:
    """Return what one task is doing."""
    facts = loop.task_facts(task) if isinstance(loop, GroupLoop) else None
    coroutine = task.get_coro()
    inner, awaits = _innermost(coroutine)
    waiter = cast("asyncio.Future[Any] | None", getattr(task, "_fut_waiter", None))
    state: TaskState
    if task.done():
        state = "done"
    elif is_running:
        state = "running"
    else:
        state = "ready" if waiter is None or waiter.done() else "waiting"
    return TaskInfo(
        name=task.get_name(),
        coroutine=_name(coroutine),
        function=_name(inner),
        location=_location(inner),
        awaits=(awaits or (type(waiter).__name__ if waiter is not None else "")) if state == "waiting" else "",
        state=state,
        age_s=None if facts is None else round(facts.age_s, 6),
        group="" if facts is None else facts.group,
    )


def _age_s(task: "asyncio.Task[Any]", loop: asyncio.AbstractEventLoop) -> float:
    facts = loop.task_facts(task) if isinstance(loop, GroupLoop) else None
    return 0.0 if facts is None else facts.age_s


def _innermost(coroutine: object) -> tuple[object, str]:
    """Follow what a coroutine awaits; return the innermost that has a frame of its own, and the type of what that awaits."""
    inner = coroutine
    for _ in range(AWAITS_MAX):
        awaited = next((getattr(inner, name) for name in ("cr_await", "ag_await", "gi_yieldfrom") if hasattr(inner, name)), None)
        if awaited is None:
            return inner, ""
        if _frame(awaited) is None:
            return inner, "" if type(awaited).__name__ in ("FutureIter", "generator") else type(awaited).__name__
        inner = awaited
    return inner, ""


def _frame(suspended: object) -> FrameType | None:
    for name in ("cr_frame", "ag_frame", "gi_frame"):
        frame = getattr(suspended, name, None)
        if isinstance(frame, FrameType):
            return frame
    return None


def _location(suspended: object) -> str:
    frame = _frame(suspended)
    if frame is not None:
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    code = getattr(suspended, "cr_code", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if isinstance(code, CodeType) else ""


def _name(suspended: object) -> str:
    return str(getattr(suspended, "__qualname__", type(suspended).__qualname__))
