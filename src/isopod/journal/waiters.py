"""Who waits for which record to be durable."""

import asyncio
import bisect


class Waiters:
    """Futures by LSN. Nearly always they come in order: then adding and waking cost no search."""

    __slots__ = ("_futures", "_lsns")

    def __init__(self) -> None:
        self._lsns: list[int] = []
        self._futures: list[asyncio.Future[None]] = []

    def add(self, lsn: int) -> "asyncio.Future[None]":
        """Return a future that `wake` resolves when `lsn` is durable."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._lsns or lsn >= self._lsns[-1]:
            self._lsns.append(lsn)
            self._futures.append(future)
        else:
            at = bisect.bisect_right(self._lsns, lsn)
            self._lsns.insert(at, lsn)
            self._futures.insert(at, future)
        return future

    def wake(self, durable_lsn: int) -> None:
        """Tell all who wait for a record up to `durable_lsn`."""
        n = bisect.bisect_right(self._lsns, durable_lsn)
        ready = self._futures[:n]
        del self._lsns[:n], self._futures[:n]
        for future in ready:
            if not future.done():
                future.set_result(None)

    def fail(self, error: Exception) -> None:
        """Tell all who wait that it will not happen."""
        futures, self._futures, self._lsns = self._futures, [], []
        for future in futures:
            if not future.done():
                future.set_exception(error)
