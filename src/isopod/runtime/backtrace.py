"""Backtraces: where code is right now, as bounded text, without stopping it.

Of the running code, and of any task: the chain of coroutines that wait for each other down to what the last one waits for. For reports
(a stall, a shutdown that hangs, a leak), not for control.
"""

import asyncio
import linecache
import sys
from collections.abc import Sequence
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType
from typing import Any, Final, NamedTuple

FRAMES_MAX: Final = 64
TEXT_BYTES_MAX: Final = 16 << 10
_LINE_CHARACTERS_MAX: Final = 160


class Frame(NamedTuple):
    """One place."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


class Backtrace(NamedTuple):
    """Places from the outermost to the innermost."""

    what: str
    """Whose it is: "running", or the task's name."""
    frames: Sequence[Frame]
    n_left_out: int
    """Outer frames beyond the bound."""
    waits_for: str
    """What the innermost frame awaits, "" if that is unknown or nothing."""

    def __str__(self) -> str:
        """Return it as text of at most 16 KiB: a line for each place, and its source line where there is one."""
        lines = [f"{self.what}:"]
        if self.n_left_out:
            lines.append(f"  ... {self.n_left_out} outer frames")
        for frame in self.frames:
            lines.append(f"  {frame}")
            source = linecache.getline(frame.file, frame.line).strip()
            if source:
                lines.append(f"    {source[:_LINE_CHARACTERS_MAX]}")
        if self.waits_for:
            lines.append(f"  waits for {self.waits_for}")
        text = "\n".join(lines)
        return text if len(text) <= TEXT_BYTES_MAX else text[: TEXT_BYTES_MAX - 4] + "\n..."


def current_backtrace(*, skip: int = 0, frames_max: int = FRAMES_MAX) -> Backtrace:
    """Return where the caller is.

    Args:
        skip: Innermost frames to leave out, besides this function's own.
        frames_max: A bound; outer frames go first.
    """
    frames: list[Frame] = []
    found: FrameType | None = sys._getframe(1 + skip)
    while found is not None:
        frames.append(_place(found.f_code, found.f_lineno))
        found = found.f_back
    return _bounded("running", frames[::-1], frames_max, "")


def task_backtrace(task: "asyncio.Task[Any]", *, frames_max: int = FRAMES_MAX) -> Backtrace:
    """Return where a task is: at its await, if it is suspended. A finished one has no frames.

    Args:
        task: Of any result.
        frames_max: A bound; outer frames go first.
    """
    frames: list[Frame] = []
    waits_for = ""
    awaited: object = task.get_coro()
    while awaited is not None:
        frame, inner = _suspended(awaited)
        if frame is None:
            # The iterator of a future names nothing; the task knows the future itself.
            waits_for = _name(getattr(task, "_fut_waiter", None) or awaited) if frames else ""
            break
        frames.append(_place(frame.f_code, frame.f_lineno))
        awaited = inner
    state = "" if not task.done() else " (cancelled)" if task.cancelled() else " (done)"
    return _bounded(task.get_name() + state, frames, frames_max, waits_for)


def _suspended(awaited: object) -> tuple[FrameType | None, object]:
    """Return the frame of a coroutine or generator, and what it awaits."""
    if isinstance(awaited, CoroutineType):
        return awaited.cr_frame, awaited.cr_await
    if isinstance(awaited, GeneratorType):
        return awaited.gi_frame, awaited.gi_yieldfrom
    if isinstance(awaited, AsyncGeneratorType):
        return awaited.ag_frame, awaited.ag_await
    return None, None


def _place(code: CodeType, line: int | None) -> Frame:
    return Frame(code.co_filename, line or code.co_firstlineno, code.co_qualname)


def _name(awaited: object) -> str:
    """Return a short name of a future, or of whatever else is awaited; its repr may be long or fail."""
    if isinstance(awaited, asyncio.Task):
        return f"task {awaited.get_name()}"
    return type(awaited).__name__


def _bounded(what: str, frames: list[Frame], frames_max: int, waits_for: str) -> Backtrace:
    n_left_out = max(0, len(frames) - frames_max)
    return Backtrace(what, tuple(frames[n_left_out:]), n_left_out, waits_for)
