"""Failpoints: named places in the code where a test can make things go wrong.

A place asks for its point once and looks at one attribute whenever it passes; that is all a failpoint costs while nobody set it::

    self._before_sync = world.failpoints.point("journal.before_sync")     # at construction
    ...
    if self._before_sync.armed:                                           # tens of nanoseconds
        await self._before_sync.hit()

What a point does is said by a line of text, in a test by `Failpoints.set`, on the host by the environment when the program starts::

    ISOPOD_FAILPOINTS="journal.before_sync=panic;raft.before_send=10%error(EIO)"

Actions, and how they combine:

- `off` does nothing, and counts; `error` raises OSError(EIO), `error(ENOSPC)` that one; `pause` waits until `release`, `set` or `clear`;
  `panic` ends the process at once (`Processes.abort`).
- `10%error`: on every tenth hit, by chance; the chance of each point is a stream of the World's Random, so a seed decides it.
- `3*error`: on the first three hits. `nth(3):error`: on the third hit and no other.
- `A->B`: a hit that A leaves alone (out of luck, used up, not its turn) is B's.

Points that were never set count nothing: counting would be a cost. `clear` switches all of them off, their counts stay.
Not a means against outsiders: who can set a program's environment can end it anyway. Source of the idea: the fail(9) interface of FreeBSD.
"""

import asyncio
import errno
import os
import re
from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple

from isopod.world.clock import Random
from isopod.world.errors import InvalidArgument
from isopod.world.processes import Processes

ENVIRONMENT_NAME: Final = "ISOPOD_FAILPOINTS"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
_STEP: Final = re.compile(
    r"(?:nth\((?P<nth>[0-9]{1,9})\):)?"
    r"(?:(?P<percent>[0-9]{1,3}(?:\.[0-9]{1,6})?)%)?"
    r"(?:(?P<times>[0-9]{1,9})\*)?"
    r"(?P<task>off|error|pause|panic)(?:\((?P<code>[A-Z0-9]+)\))?"
)
_HOW: Final = "say off, error, error(ENOSPC), 10%error, 3*error, nth(3):error, pause or panic, several with -> between them"
_CODES: Final = {name: number for number, name in sorted(errno.errorcode.items())}
_PERCENT: Final = 100.0

Task = Literal["off", "error", "pause", "panic"]


class _Step(NamedTuple):
    """One part of an action."""

    task: Task
    number: int
    """The errno of `error`."""
    chance: float
    times_max: int | None
    nth: int | None


class Failpoint:
    """One place. Made by `Failpoints.point`."""

    __slots__ = ("_all", "_chance", "_is_synchronous", "_steps", "_used", "_waiters", "armed", "n_hits", "n_hits_since_set", "name")

    def __init__(self, name: str, points: "Failpoints") -> None:
        self.name = name
        self.armed = False
        """Whether a hit has to be reported: look here before calling `hit`."""
        self.n_hits = 0
        """How often it was passed while armed."""
        self.n_hits_since_set = 0
        self._all = points
        self._chance: Callable[[], float] | None = None
        self._is_synchronous = False
        self._steps: tuple[_Step, ...] = ()
        self._used: list[int] = []
        self._waiters: list[asyncio.Future[None]] = []

    async def hit(self) -> None:
        """Do what was set for this place.

        Raises:
            OSError: The action says so.
        """
        step = self._next()
        if step is None:
            return
        if step.task == "pause":
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        else:
            self._act(step)

    def hit_now(self) -> None:
        """The same for a place that cannot wait.

        Raises:
            OSError: The action says so.
            InvalidArgument: The action is `pause`.
        """
        step = self._next()
        if step is None:
            return
        if step.task == "pause":
            raise _not_here(self.name)
        self._act(step)

    # -- for Failpoints --------------------------------------------------------------------------------------------------------------

    def be_synchronous(self) -> None:
        """Refuse `pause` from now on."""
        if any(step.task == "pause" for step in self._steps):
            raise _not_here(self.name)
        self._is_synchronous = True

    def arm(self, steps: tuple[_Step, ...]) -> None:
        """Do this from now on; who is paused goes on."""
        if self._is_synchronous and any(step.task == "pause" for step in steps):
            raise _not_here(self.name)
        self._steps, self._used, self.n_hits_since_set = steps, [0] * len(steps), 0
        self.armed = bool(steps)
        self.release()

    def release(self) -> int:
        """Let go on whoever is paused here; returns how many that were."""
        waiters, self._waiters = self._waiters, []
        waiting = [waiter for waiter in waiters if not waiter.done()]
        for waiter in waiting:
            waiter.set_result(None)
        return len(waiting)

    @property
    def n_paused(self) -> int:
        """How many wait here now."""
        return sum(not waiter.done() for waiter in self._waiters)

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    def _next(self) -> _Step | None:
        """Count a hit, and return the step whose turn it is."""
        if not self.armed:
            return None
        self.n_hits += 1
        self.n_hits_since_set += 1
        for index, step in enumerate(self._steps):
            if step.nth is not None and step.nth != self.n_hits_since_set:
                continue
            if step.times_max is not None and self._used[index] >= step.times_max:
                continue
            if step.chance < 1.0 and self._draw() >= step.chance:
                continue
            self._used[index] += 1
            return step
        return None

    def _draw(self) -> float:
        if self._chance is None:
            self._chance = self._all.random.stream(f"failpoint {self.name}").random
        return self._chance()

    def _act(self, step: _Step) -> None:
        if step.task == "error":
            raise OSError(step.number, os.strerror(step.number), f"failpoint {self.name}")
        if step.task == "panic":
            self._all.processes.abort(f"failpoint {self.name}")


class Failpoints:
    """All points of a World.

    Args:
        random: Where their chances come from.
        processes: What `panic` ends the process by.
        settings: "NAME=ACTION;NAME=ACTION", as in the environment.

    Raises:
        InvalidArgument: `settings` cannot be read.
    """

    def __init__(self, random: Random, processes: Processes, settings: str = "") -> None:
        self.random = random
        self.processes = processes
        self._points: dict[str, Failpoint] = {}
        for name, action in _split(settings):
            self.set(name, action)

    def point(self, name: str, *, is_synchronous: bool = False) -> Failpoint:
        """Return the point of that name: the same object for the same name.

        Args:
            name: Letters, digits, '.', '_' and '-': "journal.before_sync".
            is_synchronous: The place calls `hit_now`: `pause` is refused when it is set.

        Raises:
            InvalidArgument: No name, or `pause` is set already for a place that cannot wait.
        """
        found = self._points.get(name)
        if found is None:
            if not _NAME.fullmatch(name):
                raise InvalidArgument("failpoint", name, "a name has up to 100 of a-z, 0-9, '.', '_' and '-'")
            found = self._points[name] = Failpoint(name, self)
        if is_synchronous:
            found.be_synchronous()
        return found

    def set(self, name: str, action: str) -> None:
        """Say what a point does from now on. Hits are counted anew for `nth`, and who is paused there goes on.

        Raises:
            InvalidArgument: The action cannot be read, or the place cannot do it.
        """
        self.point(name).arm(_parse(action))

    def release(self, name: str) -> int:
        """Let go on whoever is paused at a point now; returns how many. Later hits pause again."""
        return self.point(name).release()

    def clear(self) -> None:
        """Switch every point off, as in production; who is paused goes on."""
        for point in self._points.values():
            point.arm(())

    def counts(self) -> dict[str, int]:
        """Return how often each point was passed while it was set, by name."""
        return {name: self._points[name].n_hits for name in self.names()}

    def names(self) -> list[str]:
        """Return the known names, sorted: those that code asked for and those that were set."""
        return sorted(self._points)

    def armed_names(self) -> list[str]:
        """Return the names of those that are set, sorted."""
        return [name for name in self.names() if self._points[name].armed]


def _split(settings: str) -> Iterator[tuple[str, str]]:
    for part in settings.split(";"):
        if part.strip():
            name, equals, action = part.partition("=")
            if not equals:
                raise InvalidArgument(ENVIRONMENT_NAME, part.strip(), "want NAME=ACTION;NAME=ACTION", _HOW)
            yield name.strip(), action.strip()


def _parse(action: str) -> tuple[_Step, ...]:
    return tuple(_parse_step(action, part.strip()) for part in action.split("->"))


def _parse_step(action: str, text: str) -> _Step:
    found = _STEP.fullmatch(text)
    if found is None:
        raise InvalidArgument("failpoint action", action, f"{text!r} cannot be read", _HOW)
    task: Task = found["task"]  # type: ignore[assignment]  # the expression names no other
    code = found["code"]
    if code is not None and (task != "error" or code not in _CODES):
        raise InvalidArgument("failpoint action", action, f"{code!r} is no error number's name", _HOW)
    percent = _PERCENT if found["percent"] is None else float(found["percent"])
    if percent > _PERCENT:
        raise InvalidArgument("failpoint action", action, "a chance is at most 100%", _HOW)
    nth = None if found["nth"] is None else int(found["nth"])
    if nth == 0:
        raise InvalidArgument("failpoint action", action, "the first hit is nth(1)", _HOW)
    times = None if found["times"] is None else int(found["times"])
    return _Step(task, _CODES[code or "EIO"], percent / _PERCENT, times, nth)


def _not_here(name: str) -> InvalidArgument:
    return InvalidArgument("failpoint action", "pause", f"the place of {name} cannot wait", "use error or panic there")
