"""LoopWatch: a thread that notices when its loop is held up, while it is held up.

The thread looks at the loop's thread every few milliseconds (`sys._current_frames`), ten times a second after half a second of idleness.
While the loop sleeps nothing else happens: it is not woken. If it is inside a callback, the thread sends it one beat by
`call_soon_threadsafe`; a beat that is not answered for as long as the threshold, with the loop inside the same callback all the time, is
a stall.

What it cannot see: a callback that is a C function and no Python frame, and one that never lets go of the interpreter's lock (then the
thread itself does not run; such a stall is seen after its end, or not at all). A turn of many short callbacks of the same function
can look like one long one.

Rules: no frame is kept between two looks, since its variables would then die in this thread; source files are not read for the stack.
"""

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

from isopod.world.loops import Stall

LOOKS_PER_THRESHOLD: Final = 4
"""While the loop is busy; half as many while it was lately."""
DROWSY_LOOK_S: Final = 0.1
"""Between two looks at a loop that has been idle for long: what a stall may be missed by in exchange for hardly any CPU time."""
DROWSY_AFTER: Final = 40
"""Looks in a row at an idle loop before they become that rare."""
FRAMES_MAX: Final = 24
"""The innermost frames of a reported stack."""
_JOIN_S: Final = 5.0
_MACHINERY: Final = ("asyncio/base_events.py", "asyncio/events.py", "isopod/world/host/loop.py", "isopod/world/fair_queue.py")
_WAITING: Final = ("selectors.py", "isopod/world/host/polling.py")
Mark = tuple[int, str]
"""What tells one callback from another: the frame's address and the task's name."""


class LoopWatch:
    """Watches the loop in whose thread it is made, until `stop`.

    Args:
        loop: The running loop.
        threshold_s: From when on a callback stalls.
        on_stall: Called in the watching thread, while the loop stalls; what it raises is dropped.
        on_end: Called in the loop's thread, afterwards.
        group: Says which scheduling group's step runs.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        threshold_s: float,
        on_stall: Callable[[Stall], None],
        *,
        on_end: Callable[[Stall], None],
        group: Callable[[], str],
    ) -> None:
        self._loop = loop
        self._threshold_s = threshold_s
        self._on_stall = on_stall
        self._on_end = on_end
        self._group = group
        self._loop_thread = threading.get_ident()
        self._stopped = False
        self._stop = threading.Lock()  # held until the end; waiting for it with a time-out is the cheapest way to sleep and be woken
        self._stop.acquire()
        self._n_sent = 0
        self._n_answered = 0
        self._thread = threading.Thread(target=self._run, name="isopod-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        if not self._stopped:
            self._stopped = True
            self._stop.release()
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        look_s = self._threshold_s / LOOKS_PER_THRESHOLD
        n_idle = 0
        while not self._stop.acquire(timeout=2 * look_s if n_idle < DROWSY_AFTER else max(2 * look_s, DROWSY_LOOK_S)):
            mark, _ = self._look()
            if mark is None:
                n_idle += 1
                continue
            n_idle = 0
            if not self._follow(mark, look_s):
                return

    def _follow(self, mark: Mark, look_s: float) -> bool:
        """Send a beat and look on until it is answered; return whether the loop is still there."""
        self._n_sent += 1
        if not self._call(self._answer, self._n_sent):
            return False
        began_s = time.monotonic()
        stall: Stall | None = None
        while self._n_answered != self._n_sent and not self._stopped:
            if self._stop.acquire(timeout=look_s):
                return False
            now_s = time.monotonic()
            is_late = stall is None and now_s - began_s >= self._threshold_s
            seen, stack = self._look(with_stack=is_late)
            if seen != mark:
                if not self._end(stall, now_s - began_s):
                    return False
                stall = None
                mark, began_s = seen or mark, now_s
            elif is_late:
                stall = Stall(now_s - began_s, mark[1], self._group(), stack)
                with contextlib.suppress(Exception):
                    self._on_stall(stall)
        return self._end(stall, time.monotonic() - began_s)

    def _look(self, *, with_stack: bool = False) -> tuple[Mark | None, tuple[str, ...]]:
        """Return what the loop is in (None if it waits), and its stack."""
        innermost = sys._current_frames().get(self._loop_thread)
        frame, root = innermost, None
        while frame is not None:
            name = frame.f_code.co_filename
            if name.endswith(_WAITING):
                return None, ()
            if name.endswith(_MACHINERY):
                break
            root = frame
            frame = frame.f_back
        if root is None or frame is None:
            return None, ()
        task = asyncio.current_task(self._loop)
        return (id(root), "" if task is None else task.get_name()), _stack(innermost) if with_stack else ()

    def _end(self, stall: Stall | None, duration_s: float) -> bool:
        if stall is None or self._stopped:
            return True
        return self._call(self._report_end, Stall(duration_s, stall.task, stall.group, ()))

    def _call(self, function: Callable[..., None], *args: object) -> bool:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # closed
            return False
        return True

    def _answer(self, number: int) -> None:
        self._n_answered = number

    def _report_end(self, stall: Stall) -> None:
        if not self._stopped:
            self._on_end(stall)


def _stack(frame: FrameType | None) -> tuple[str, ...]:
    """Return the innermost frames, the last one innermost."""
    lines: list[str] = []
    while frame is not None and len(lines) < FRAMES_MAX and not frame.f_code.co_filename.endswith(_MACHINERY):
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}")
        frame = frame.f_back
    return tuple(reversed(lines))
