"""Timers: a wheel for deadlines by the thousand, and `Timer`, which fires once or with a period.

The wheel is for deadlines, most of which are cancelled before they come: coarse (10 ms ticks, never early, at most one tick late),
constant cost to add and to cancel, and one timer of the loop for all of them. `Timer` is for what must be punctual: it is a timer of
the loop of its own.

    level 0     64 slots of 1 tick        0.64 s
    level 1     64 slots of 64 ticks      41 s        a slot's timers move to finer levels when its time begins,
    level 2     64 slots of 4096 ticks    44 min      so each timer moves at most five times in its life
    ...

A timer lies on the level of the highest bit group in which its tick differs from the present one, so the next occupied slot is the
lowest set bit of the lowest level's bitmap, and a wheel that has nothing due sleeps.

Rules: callbacks are short, run in the context in which the wheel was made, and one that raises is told to the loop's exception handler
and disturbs no other. Works on any asyncio loop, the simulated one too.
Source: Varghese and Lauck, "Hashed and hierarchical timing wheels", 1987 (scheme 7).
"""

import asyncio
import contextvars
import math
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVarTuple, Unpack

from isopod.world.errors import InvalidArgument, WrongState

TICK_S: Final = 0.01
DELAY_S_MAX: Final = 10 * 366 * 86_400.0
"""The longest delay: ten years."""
FIRED_PER_TURN_MAX: Final = 1_000
"""How many callbacks run before the loop gets a turn."""
FIRST_LOOK_S: Final = 1.0
"""After how long a wheel that was empty looks again: one timer at a time, always cancelled, so costs one loop timer a second."""
ROUNDING: Final = 1e-6
"""Part of a tick by which a loop's clock may seem early, since its seconds are binary fractions."""
_BITS: Final = 6
_SLOTS: Final = 1 << _BITS
_MASK: Final = _SLOTS - 1
_LEVELS: Final = 7

_Ts = TypeVarTuple("_Ts")


class TimerCounts(NamedTuple):
    """How many timers were added, came due, and were cancelled before."""

    n_created: int
    n_fired: int
    n_cancelled: int


class TimerTally:
    """Counts of several `Timer`s together."""

    __slots__ = ("n_cancelled", "n_created", "n_fired")

    def __init__(self) -> None:
        self.n_created = 0
        self.n_fired = 0
        self.n_cancelled = 0


class WheelTimer:
    """One deadline on a wheel; `TimerWheel.call_later` makes it."""

    __slots__ = ("_args", "_callback", "_slot", "_tick", "_wheel")

    def __init__(self, wheel: "TimerWheel", tick: int, callback: Callable[..., object], args: tuple[object, ...]) -> None:
        self._wheel = wheel
        self._tick = tick
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self._slot: dict[WheelTimer, None] | None = None

    @property
    def is_pending(self) -> bool:
        """Whether it will still fire."""
        return self._callback is not None

    def cancel(self) -> None:
        """Do not fire; after it has fired, or a second time, nothing happens."""
        if self._callback is None:
            return
        self._callback = None
        self._args = ()
        slot = self._slot
        if slot is not None:
            del slot[self]
            self._slot = None
        wheel = self._wheel
        wheel._n_pending -= 1
        if not wheel._n_pending:
            wheel._on_empty()


class TimerWheel:
    """Many deadlines on one timer of the loop.

    Args:
        loop: The loop whose time counts and in whose thread everything happens.
        tick_s: The resolution.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, tick_s: float = TICK_S) -> None:
        if not 0 < tick_s < math.inf:
            raise InvalidArgument("tick_s", tick_s, "must be above 0")
        self._loop = loop
        self._tick_s = tick_s
        self._ticks_per_s = 1 / tick_s
        self._time = loop.time
        self._origin_s = loop.time()
        self._context = contextvars.copy_context()
        self._tick = 0  # everything due up to this tick has been taken out of the slots
        self._slots: list[dict[WheelTimer, None] | None] = [None] * (_LEVELS * _SLOTS)
        self._occupied = [0] * _LEVELS  # bitmaps
        self._due: deque[WheelTimer] = deque()
        self._n_pending = 0
        self._n_created = 0
        self._n_fired = 0
        self._handle: asyncio.Handle | None = None
        self._armed_tick = 0  # of the handle
        self._is_firing = False
        self._is_closed = False

    def __len__(self) -> int:
        """Return the number of timers that are to fire."""
        return self._n_pending

    def call_later(self, delay_s: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts) -> WheelTimer:
        """Call `callback(*args)` at the first tick that is at least `delay_s` seconds away.

        Args:
            delay_s: Up to ten years; zero and less mean the next tick.
            callback: Short, and not a coroutine function.
            *args: For the callback.

        Returns:
            The timer, for its `cancel`.

        Raises:
            InvalidArgument: The delay is not a number or too long.
            WrongState: The wheel is closed.
        """
        if not delay_s <= DELAY_S_MAX:
            raise InvalidArgument("delay_s", delay_s, f"must be a number up to {DELAY_S_MAX:.0f}")
        if self._is_closed:
            raise WrongState("timer wheel", "", "closed", "add a timer")
        elapsed_s = self._time() - self._origin_s
        if not self._n_pending and not self._is_firing:
            self._skip_to(int(elapsed_s * self._ticks_per_s))
        now = self._tick
        tick = int((elapsed_s + delay_s) * self._ticks_per_s) + 1
        if tick <= now:
            tick = now + 1
        timer = WheelTimer(self, tick, callback, args)
        self._n_created += 1
        self._n_pending += 1
        # As `_put`, in place: this is the path that every request takes.
        level = ((tick ^ now).bit_length() - 1) // _BITS
        index = (tick >> level * _BITS) & _MASK
        place = level * _SLOTS + index
        slot = self._slots[place]
        if slot is None:
            slot = self._slots[place] = {}
        slot[timer] = None
        timer._slot = slot
        self._occupied[level] |= 1 << index
        if self._handle is None:
            if not self._is_firing:
                self._arm(min(tick, now + int(FIRST_LOOK_S * self._ticks_per_s) + 1))
        elif tick < self._armed_tick:
            self._handle.cancel()
            self._arm(tick)
        return timer

    def statistics(self) -> TimerCounts:
        """Return the counts since the wheel was made."""
        return TimerCounts(self._n_created, self._n_fired, self._n_created - self._n_fired - self._n_pending)

    def close(self) -> None:
        """Drop every timer, unfired; no more can be added."""
        self._is_closed = True
        for slot in self._slots:
            for timer in list(slot or ()):
                timer.cancel()
        for timer in list(self._due):
            timer.cancel()
        self._due.clear()
        self._disarm()

    def _skip_to(self, tick: int) -> None:
        """Let an empty wheel be at `tick`."""
        if tick != self._tick:
            self._tick = tick
            self._occupied = [0] * _LEVELS  # slots whose timers were all cancelled

    def _put(self, timer: WheelTimer) -> None:
        tick = timer._tick
        level = max(0, (tick ^ self._tick).bit_length() - 1) // _BITS
        index = (tick >> level * _BITS) & _MASK
        slot = self._slots[level * _SLOTS + index]
        if slot is None:
            slot = self._slots[level * _SLOTS + index] = {}
        slot[timer] = None
        timer._slot = slot
        self._occupied[level] |= 1 << index

    def _next(self) -> tuple[int, int, int]:
        """Return (tick at which it begins, level, index) of the next occupied slot; a tick of -1 if there is none."""
        for level, bitmap in enumerate(self._occupied):
            if bitmap:
                index = (bitmap & -bitmap).bit_length() - 1
                upper = self._tick >> (level + 1) * _BITS << _BITS
                return (upper | index) << level * _BITS, level, index
        return -1, 0, 0

    def _advance(self, now: int) -> None:
        """Move what is due at or before tick `now` to `_due`."""
        while True:
            begin, level, index = self._next()
            if begin < 0 or begin > now:
                break
            self._tick = max(self._tick, begin)
            self._occupied[level] &= ~(1 << index)
            slot = self._slots[level * _SLOTS + index]
            self._slots[level * _SLOTS + index] = None
            for timer in slot or ():
                if level == 0:
                    timer._slot = None
                    self._due.append(timer)
                else:
                    self._put(timer)
        self._tick = max(self._tick, now)

    def _on_timer(self) -> None:
        self._handle = None
        self._is_firing = True
        try:
            self._advance(int((self._time() - self._origin_s) * self._ticks_per_s + ROUNDING))
            self._fire()
        finally:
            self._is_firing = False
            if self._due:
                self._handle = self._loop.call_soon(self._on_timer, context=self._context)
                self._armed_tick = self._tick
            elif self._n_pending:
                self._arm(self._next()[0])

    def _fire(self) -> None:
        for _ in range(min(len(self._due), FIRED_PER_TURN_MAX)):
            timer = self._due.popleft()
            callback, args = timer._callback, timer._args
            if callback is None:
                continue
            timer._callback = None
            timer._args = ()
            self._n_pending -= 1
            self._n_fired += 1
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001 - the root of a callback: the others go on
                self._loop.call_exception_handler({"message": f"timer {callback!r} failed", "exception": error})

    def _arm(self, tick: int) -> None:
        self._armed_tick = tick
        # A loop may count in milliseconds and be early by a part of one: `_on_timer` then simply looks again.
        self._handle = self._loop.call_at(self._origin_s + tick * self._tick_s, self._on_timer, context=self._context)

    def _on_empty(self) -> None:
        """Stop the loop's timer, unless it is so near that a new one would cost more."""
        if self._handle is not None and self._armed_tick - self._tick > FIRST_LOOK_S * self._ticks_per_s + 1:
            self._disarm()

    def _disarm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class Timer:
    """A timer of the loop that can be set again and again.

    It is punctual to the loop's resolution. With a period, each shot is due on the grid that the first one began: a late callback
    does not move the next, and shots that were missed meanwhile are left out, not made up for.

    Args:
        callback: Short; called without arguments, in the context of the `arm`. One that raises is told to the loop's exception handler,
            and a periodic timer goes on.
        loop: The running loop if None.
        tally: Counts together with other timers; its own if None.
    """

    def __init__(
        self, callback: Callable[[], object], *, loop: asyncio.AbstractEventLoop | None = None, tally: TimerTally | None = None
    ) -> None:
        self._callback = callback
        self._loop = loop or asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._due_s = 0.0
        self._period_s: float | None = None
        self._tally = tally or TimerTally()

    @property
    def is_armed(self) -> bool:
        """Whether it will fire."""
        return self._handle is not None

    @property
    def remaining_s(self) -> float | None:
        """Seconds until it fires (0 if it is late), None if it is not armed."""
        return None if self._handle is None else max(0.0, self._due_s - self._loop.time())

    def arm(self, delay_s: float) -> None:
        """Fire once, in `delay_s` seconds.

        Raises:
            WrongState: It is armed already: `rearm` says that this is meant.
            InvalidArgument: The delay is not a number from 0 to ten years.
        """
        self._set(delay_s, None)

    def arm_periodic(self, period_s: float, *, delay_s: float | None = None) -> None:
        """Fire every `period_s` seconds, first after `delay_s` (one period if None). Raises as `arm`; the period must be above 0."""
        if not 0 < period_s <= DELAY_S_MAX:
            raise InvalidArgument("period_s", period_s, f"must be above 0 and up to {DELAY_S_MAX:.0f}")
        self._set(period_s if delay_s is None else delay_s, period_s)

    def rearm(self, delay_s: float) -> None:
        """Forget what was set and fire once, in `delay_s` seconds."""
        self.cancel()
        self.arm(delay_s)

    def cancel(self) -> bool:
        """Do not fire; return whether it was armed. Never raises, also from within the callback."""
        self._period_s = None
        if self._handle is None:
            return False
        self._handle.cancel()
        self._handle = None
        self._tally.n_cancelled += 1
        return True

    def statistics(self) -> TimerCounts:
        """Return how often it was armed, fired and was cancelled."""
        return TimerCounts(self._tally.n_created, self._tally.n_fired, self._tally.n_cancelled)

    def _set(self, delay_s: float, period_s: float | None) -> None:
        if not 0 <= delay_s <= DELAY_S_MAX:
            raise InvalidArgument("delay_s", delay_s, f"must be a number from 0 to {DELAY_S_MAX:.0f}")
        if self._handle is not None:
            raise WrongState("timer", getattr(self._callback, "__qualname__", "?"), "armed", "arm it again")
        self._tally.n_created += 1
        self._period_s = period_s
        self._due_s = self._loop.time() + delay_s
        self._handle = self._loop.call_at(self._due_s, self._fire)

    def _fire(self) -> None:
        self._handle = None
        self._tally.n_fired += 1
        period_s = self._period_s
        if period_s is not None:
            late_s = max(0.0, self._loop.time() - self._due_s)
            self._due_s += period_s * (math.floor(late_s / period_s) + 1)
            # Set before the callback, which may cancel or set it otherwise.
            self._handle = self._loop.call_at(self._due_s, self._fire)
        try:
            self._callback()
        except Exception as error:  # noqa: BLE001 - the root of a callback: a periodic timer goes on
            self._loop.call_exception_handler({"message": f"timer {self._callback!r} failed", "exception": error})
