"""Waiters: tasks that wait for a condition someone else will bring about.

Smaller than `asyncio.Event`: nothing is allocated until somebody waits, and waking wakes those who wait now, in their order.
The waiter checks its condition again after each wake-up: `while not condition: await waiters.wait()`.
"""

import asyncio


class Waiters:
    """An ordered list of waiting tasks."""

    __slots__ = ("_futures",)

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._futures)

    async def wait(self) -> None:
        """Wait for the next `wake`."""
        future = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        try:
            await future
        finally:
            if future in self._futures:
                self._futures.remove(future)

    def wake(self) -> None:
        """Wake all who wait now."""
        futures, self._futures = self._futures, []
        for future in futures:
            if not future.done():
                future.set_result(None)
