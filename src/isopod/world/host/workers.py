"""A bounded pool of threads for calls that block: fsync, unpacking, unmounting.

Not the loop's default executor: that one belongs to library code (name resolution), has no useful bound, and forgets its threads when
a caller is cancelled. Here a cancelled caller is told only after its call has ended (or never began), so that nothing goes on behind
its back, and what the call opened is disposed of. Threads start when first needed: `Kernel.prepare` demands a process without any.
"""

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

QUICK_THREADS: Final = 8
"""For calls of milliseconds: one per write of a burst of starting containers shares fsyncs in the kernel's journal."""
BULK_THREADS: Final = 3
"""For calls of seconds (unpack, digest, remove a tree), which would keep the quick ones waiting."""


class Workers:
    """Two bounded groups of threads, quick and bulk."""

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(QUICK_THREADS, thread_name_prefix="isopod-quick")
        self._bulk = ThreadPoolExecutor(BULK_THREADS, thread_name_prefix="isopod-bulk")

    async def quick(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call of milliseconds in a thread and return its result."""
        return await _finish(self._quick.submit(functools.partial(function, *args, **kwargs)))

    async def bulk(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a call of seconds in a thread and return its result."""
        return await _finish(self._bulk.submit(functools.partial(function, *args, **kwargs)))

    async def bulk_abortable(self, function: Callable[[Callable[[], None]], T]) -> T:
        """Run a call of seconds which calls its argument now and then: that raises `Aborted` once the caller is cancelled."""
        aborted: list[bool] = []

        def check() -> None:
            if aborted:
                raise Aborted

        return await _finish(self._bulk.submit(function, check), abort=lambda: aborted.append(True))

    def close(self) -> None:
        """End the threads after their present calls."""
        self._quick.shutdown(wait=True, cancel_futures=True)
        self._bulk.shutdown(wait=True, cancel_futures=True)


class Aborted(Exception):
    """The caller of a long call was cancelled."""


async def _finish(call: "Future[T]", abort: Callable[[], None] | None = None) -> T:
    waiter = asyncio.wrap_future(call)
    try:
        return await asyncio.shield(waiter)
    except asyncio.CancelledError:
        if not call.cancel():
            if abort is not None:
                abort()
            await _wait_settled(waiter)
        raise


async def _wait_settled(waiter: "asyncio.Future[T]") -> None:
    """Wait for a call that cannot be stopped, whatever happens to us meanwhile: the cancellation is raised by the caller after it."""
    settled = asyncio.Event()
    waiter.add_done_callback(lambda _: settled.set())
    while not settled.is_set():
        try:
            await settled.wait()
        except asyncio.CancelledError:
            continue
    if not waiter.cancelled():
        waiter.exception()  # seen: the cancellation is what the caller hears about
