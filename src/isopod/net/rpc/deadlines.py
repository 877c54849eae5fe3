"""Deadlines: many calls' deadlines on one timer of the loop.

A timer per call costs more than the rest of a short call. Here a call costs a heap entry; ended calls leave theirs behind, to be
skipped when their time comes or swept out when they outnumber the open ones. With nothing open, no timer runs after the next.
"""

import asyncio
import heapq
from collections.abc import Callable
from typing import Final

STALE_MIN: Final = 64


class Deadlines:
    """Calls `on_expired` with the ids whose time is over.

    Args:
        loop: Whose time counts.
        on_expired: Told once per id; the id is forgotten before.
    """

    __slots__ = ("_heap", "_live", "_loop", "_on_expired", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_expired: Callable[[int], None]) -> None:
        self._loop = loop
        self._on_expired = on_expired
        self._live: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Return the number of ids that wait."""
        return len(self._live)

    def add(self, call_id: int, timeout_s: float) -> None:
        """Expire `call_id` in `timeout_s` seconds."""
        at = self._loop.time() + timeout_s
        self._live[call_id] = at
        if len(self._heap) > STALE_MIN + 2 * len(self._live):
            self._heap = [(when, live) for live, when in self._live.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (at, call_id))
        if self._timer is None or at < self._timer.when():
            self._arm(at)

    def discard(self, call_id: int) -> None:
        """Forget an id; unknown ones are fine."""
        self._live.pop(call_id, None)

    def close(self) -> None:
        """Forget all."""
        self._live.clear()
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._heap:
            at, call_id = self._heap[0]
            is_live = self._live.get(call_id) == at
            if is_live and at > now:
                self._arm(at)
                return
            heapq.heappop(self._heap)
            if is_live:
                del self._live[call_id]
                self._on_expired(call_id)
