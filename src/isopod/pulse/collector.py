"""Collector: asks each sandbox's shim for its figures, once in each interval, without letting one disturb another.

Each sandbox has its time in the interval, one of fifty. A new one is asked at once, and then again after a random part of the interval;
from there on exactly each interval, so that many that were found together do not stay together. One that fails is asked less often: after
1, 2, 4, 8 and then each 10 intervals (one that never answered: after 1, 2, 4... seconds first, since shims need a moment to begin), with
some jitter, until it answers.

At most `in_flight_max` requests are under way. A shim that took too long the last time is a suspect: suspects have a quarter of these
places among themselves, so that however many hang, three quarters are there for the others.

With `pause_after_s` shims are left alone while nobody asks for figures (asking costs the guest something): whose time comes then is parked.
Who asks for figures next says so by `attend`, which has all that are parked asked at once, and waits for them; new sandboxes are asked
once in any case.

What is answered goes to `accept`, what fails to `reject`; whatever these raise is logged and counted, and the rounds go on.
Not here: which sandboxes there are (`discovery`), how a shim is asked (`shims`), what an answer means (`intake`).
"""

import asyncio
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

from isopod.pulse.model import Target
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import ShimClient, ShimError
from isopod.runtime.logger import Logger
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import IsopodError
from isopod.world.world import World

PATH: Final = "/metrics"
OK: Final = "ok"
FAILED: Final = "failed"
"""The class of what no shim is to blame for: a fault of our own."""
DURATION_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
FIRST_RETRY_S: Final = 1.0
"""The first pause of a sandbox that never answered."""
BACK_OFF_INTERVALS_MAX: Final = 10
SUSPECTS_PART: Final = 4
"""Suspects have one place in so many."""
SPREAD: Final = (0.2, 1.0)
"""After which part of the interval a sandbox is asked for the second time."""
JITTER: Final = (0.9, 1.0)
STEPS: Final = 50
"""At how many times of an interval sandboxes are asked: what is done for some together, with all that it needs still in the processor's
caches, costs half of what it costs for each alone."""
_EXPONENT_MAX: Final = 32


class CollectorStatistics(NamedTuple):
    """What is asked now, and what happened since the beginning."""

    n_sandboxes: int
    n_in_flight: int
    n_in_flight_peak: int
    n_queued: int
    """Whose time has come, and who wait for a place."""
    n_failing: int
    n_missed: int
    """Rounds left out because the one before had not ended."""
    n_bytes: int
    """Of all bodies taken in."""
    n_intake_failures: int
    requests: Mapping[str, int]
    """By outcome: "ok" or the class of failure."""
    durations: tuple[int, ...]
    """Requests by how long they took: one count for each of DURATION_BOUNDS_S, and one for longer ones; not summed up."""
    durations_sum_s: float


class _Asked:
    """One sandbox."""

    __slots__ = ("due_s", "has_answered", "is_gone", "is_queued", "is_suspect", "n_failures", "target", "task", "timer")

    def __init__(self, target: Target, due_s: float) -> None:
        self.target = target
        self.due_s = due_s
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None
        self.n_failures = 0
        self.has_answered = False
        self.is_suspect = False
        self.is_queued = False
        self.is_gone = False


class Collector:
    """Asks shims.

    Args:
        world: Whose chance.
        settings: The interval, and how many at once.
        client: Reaches shims; its owner closes it.
        accept: Takes a target, its body, and how long it took in seconds.
        reject: Takes a target, the class of failure, one line about it, and how long it took.
        logger: Told of faults of `accept` and `reject`.
    """

    def __init__(
        self,
        world: World,
        settings: PulseSettings,
        client: ShimClient,
        *,
        accept: Callable[[Target, bytes, float], None],
        reject: Callable[[Target, str, str, float], None],
        logger: Logger,
    ) -> None:
        self._chance = world.random.stream("pulse.collector")
        self._interval_s = settings.interval_s
        self._step_s = settings.interval_s / STEPS
        self._pause_after_s = settings.pause_after_s
        self._waking_s = settings.request_s
        self._in_flight_max = settings.in_flight_max
        self._suspects_max = max(1, settings.in_flight_max // SUSPECTS_PART)
        self._client = client
        self._accept = accept
        self._reject = reject
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self._group: TaskGroup | None = None
        self._asked: dict[str, _Asked] = {}
        self._queue: OrderedDict[str, _Asked] = OrderedDict()
        self._suspects: OrderedDict[str, _Asked] = OrderedDict()
        self._parked: dict[str, _Asked] = {}
        self._waking: dict[str, _Asked] = {}
        self._awake: asyncio.Future[None] | None = None
        self._attended_s = self._loop.time()
        self._n_in_flight = self._n_suspects_in_flight = self._n_in_flight_peak = 0
        self._n_missed = self._n_bytes = self._n_intake_failures = 0
        self._requests: dict[str, int] = {OK: 0}
        self._durations = [0] * (len(DURATION_BOUNDS_S) + 1)
        self._durations_sum_s = 0.0

    # --- what is asked ----------------------------------------------------------------------------------------------------------------

    def add(self, target: Target) -> None:
        """Ask a sandbox from now on, at once for the first time. One that is known is asked at once, too."""
        known = self._asked.get(target.id)
        if known is not None and known.target == target:
            self.refresh(target.id)
            return
        self.remove(target.id)
        asked = _Asked(target, self._loop.time())
        self._asked[target.id] = asked
        self._enqueue(asked)

    def remove(self, identifier: str) -> None:
        """Ask a sandbox no more: what is under way is given up, and nothing is told of it. One that is not known is fine."""
        asked = self._asked.pop(identifier, None)
        if asked is None:
            return
        asked.is_gone = True
        self._stop_timer(asked)
        self._parked.pop(identifier, None)
        self._woken(identifier)
        if asked.is_queued:
            del (self._suspects if asked.is_suspect else self._queue)[identifier]
        if asked.task is not None:
            asked.task.cancel()
        self._client.forget(asked.target.socket)

    def refresh(self, identifier: str) -> None:
        """Ask a sandbox at once, unless that is under way; its times in the interval stay what they are."""
        asked = self._asked.get(identifier)
        if asked is not None and asked.task is None:
            self._enqueue(asked)

    async def attend(self, within_s: float = math.inf) -> None:
        """Go on asking shims, since somebody asks for figures; return when none is left whose time had come while nobody did.

        At most a request's time is waited, however many there are: one that hangs is then shown as it was.

        Args:
            within_s: The longest wait.
        """
        now_s = self._attended_s = self._loop.time()
        if self._parked:
            parked, self._parked = self._parked, {}
            self._waking |= parked
            if self._awake is None:
                self._awake = self._loop.create_future()
            for asked in parked.values():
                asked.due_s += (now_s - asked.due_s) // self._interval_s * self._interval_s  # what was left out was meant to be
                self._enqueue(asked)
        if self._awake is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(self._waking_s, within_s)):
                    await asyncio.shield(self._awake)

    async def run(self) -> None:
        """Ask until cancelled."""
        try:
            async with TaskGroup("pulse collector") as group:
                self._group = group
                try:
                    for asked in self._asked.values():
                        if asked.task is None and asked.timer is None and asked.target.id not in self._parked:
                            self._enqueue(asked)
                    self._start_queued()
                    await self._loop.create_future()
                finally:
                    self._group = None  # nobody is asked any more from here on: the group ends
        finally:
            for asked in self._asked.values():
                self._stop_timer(asked)

    def statistics(self) -> CollectorStatistics:
        """Return what is asked now, and what happened."""
        return CollectorStatistics(
            n_sandboxes=len(self._asked),
            n_in_flight=self._n_in_flight,
            n_in_flight_peak=self._n_in_flight_peak,
            n_queued=len(self._queue) + len(self._suspects),
            n_failing=sum(asked.n_failures > 0 for asked in self._asked.values()),
            n_missed=self._n_missed,
            n_bytes=self._n_bytes,
            n_intake_failures=self._n_intake_failures,
            requests=dict(self._requests),
            durations=tuple(self._durations),
            durations_sum_s=self._durations_sum_s,
        )

    # --- when -------------------------------------------------------------------------------------------------------------------------

    def _due(self, asked: _Asked) -> None:
        """A sandbox's time has come: while nobody asks for figures, it is parked."""
        if self._pause_after_s and self._loop.time() - self._attended_s >= self._pause_after_s:
            asked.timer = None
            self._parked[asked.target.id] = asked
        else:
            self._enqueue(asked)

    def _woken(self, identifier: str) -> None:
        """One of those that are waited for was asked, or is gone."""
        self._waking.pop(identifier, None)
        if not self._waking and self._awake is not None:
            self._awake.set_result(None)
            self._awake = None

    def _enqueue(self, asked: _Asked) -> None:
        """Have a sandbox asked as soon as there is a place."""
        self._stop_timer(asked)
        self._parked.pop(asked.target.id, None)
        if not asked.is_queued:
            asked.is_queued = True
            (self._suspects if asked.is_suspect else self._queue)[asked.target.id] = asked
        self._start_queued()

    def _start_queued(self) -> None:
        """Give free places to who waits: to suspects only some of them."""
        while self._group is not None and self._n_in_flight < self._in_flight_max:
            if self._suspects and self._n_suspects_in_flight < self._suspects_max:
                self._start(self._group, self._suspects.popitem(last=False)[1])
            elif self._queue:
                self._start(self._group, self._queue.popitem(last=False)[1])
            else:
                return

    def _start(self, group: TaskGroup, asked: _Asked) -> None:
        asked.is_queued = False
        self._n_in_flight += 1
        self._n_in_flight_peak = max(self._n_in_flight_peak, self._n_in_flight)
        self._n_suspects_in_flight += asked.is_suspect
        asked.task = group.create_task(self._ask(asked), name="pulse ask")
        asked.task.add_done_callback(partial(self._ended, asked, asked.is_suspect))

    def _ended(self, asked: _Asked, was_suspect: bool, _: object) -> None:
        """A request is over, well, badly or cancelled (also before it began)."""
        asked.task = None
        self._woken(asked.target.id)
        self._n_in_flight -= 1
        self._n_suspects_in_flight -= was_suspect
        if not asked.is_gone and self._group is not None:
            self._plan(asked)
        self._start_queued()

    def _plan(self, asked: _Asked) -> None:
        """Say when a sandbox is asked next."""
        now_s = self._loop.time()
        if asked.n_failures:
            first_s = self._interval_s if asked.has_answered else min(self._interval_s, FIRST_RETRY_S)
            pause_s = min(first_s * 2 ** min(_EXPONENT_MAX, asked.n_failures - 1), BACK_OFF_INTERVALS_MAX * self._interval_s)
            asked.due_s = now_s + pause_s * self._chance.uniform(*JITTER)
        elif not asked.has_answered:
            asked.has_answered = True
            asked.due_s = self._together(now_s + self._interval_s * self._chance.uniform(*SPREAD))
        elif asked.due_s <= now_s:
            n_rounds = int((now_s - asked.due_s) // self._interval_s) + 1
            self._n_missed += n_rounds - 1
            asked.due_s = self._together(asked.due_s + n_rounds * self._interval_s)
        asked.timer = self._loop.call_at(asked.due_s, self._due, asked)

    def _together(self, due_s: float) -> float:
        """Return the time next to another at which sandboxes are asked."""
        return round(due_s / self._step_s) * self._step_s

    def _stop_timer(self, asked: _Asked) -> None:
        if asked.timer is not None:
            asked.timer.cancel()
            asked.timer = None

    # --- asking -----------------------------------------------------------------------------------------------------------------------

    async def _ask(self, asked: _Asked) -> None:
        target = asked.target
        began_s = self._loop.time()
        body, word, message = b"", OK, ""
        try:
            answer = await self._client.get(target.socket, PATH)
        except ShimError as error:
            word, message = error.word, error.message
        except Exception as error:  # noqa: BLE001  the root of a task: one sandbox must not end the rounds of all
            word, message = FAILED, error.message if isinstance(error, IsopodError) else f"{type(error).__name__}: {error}"
        else:
            body = answer.body
            if answer.status != 200:
                word, message = "status", f"{target.socket}: it answered status {answer.status}: {_first_line(body)}"
        took_s = self._loop.time() - began_s
        self._requests[word] = self._requests.get(word, 0) + 1
        self._durations[bisect_left(DURATION_BOUNDS_S, took_s)] += 1
        self._durations_sum_s += took_s
        self._logger.debug("pulse.asked", sandbox=target.id, outcome=word, bytes=len(body), took_s=round(took_s, 6))
        if asked.is_gone:  # it went in the very moment of its answer
            return
        asked.n_failures = 0 if word == OK else asked.n_failures + 1
        asked.is_suspect = word == "timeout"
        if word == OK:
            self._n_bytes += len(body)
            self._hand_over(target, lambda: self._accept(target, body, took_s))
        else:
            self._hand_over(target, lambda: self._reject(target, word, message, took_s))

    def _hand_over(self, target: Target, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  whatever becomes of one body, the rounds go on
            self._n_intake_failures += 1
            self._logger.error("pulse.intake_failed", sandbox=target.id, why=f"{type(error).__name__}: {error}")


def _first_line(body: bytes) -> str:
    """Return the beginning of an answer that is a complaint, fit for a log."""
    line = body[:200].decode("utf-8", "replace").strip().partition("\n")[0]
    return "".join(each if each.isprintable() else "?" for each in line)
