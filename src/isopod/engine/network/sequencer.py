"""Sequencer: operations of one key run one after the other, each to its end.

An attach and the detach that follows it must never overlap, and neither may stop half way because its caller was cancelled: a kernel
call runs on in its thread, and what it made would belong to nobody. So each operation is a task of its own; the caller only waits for
it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from isopod.runtime.logger import Logger

T = TypeVar("T")
Operation = Callable[[], Coroutine[Any, Any, T]]


class Sequencer:
    """Tasks by key, the newest of each.

    Args:
        logger: Told of failures that no caller waits for any more.
    """

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._newest: dict[str, asyncio.Task[Any]] = {}  # of any result

    def is_busy(self, key: str) -> bool:
        """Return whether an operation of that key runs or waits."""
        return key in self._newest

    async def run(self, key: str, operation: Operation[T]) -> T:
        """Run an operation after the earlier ones of its key. Cancelling the wait does not cancel it."""
        return await asyncio.shield(self.start(key, operation))

    def start(self, key: str, operation: Operation[T]) -> asyncio.Task[T]:
        """Begin an operation without waiting for it; if it fails, the logger is told."""
        task = asyncio.create_task(_after(self._newest.get(key), operation), name=f"network operation on {key}")
        self._newest[key] = task
        task.add_done_callback(lambda ended: self._on_done(key, ended))
        return task

    async def wait(self, key: str) -> None:
        """Return when the operations of that key have ended, however they ended."""
        while key in self._newest:
            await asyncio.gather(self._newest[key], return_exceptions=True)

    async def wait_idle(self) -> None:
        """Return when nothing runs."""
        while self._newest:
            await self.wait(next(iter(self._newest)))

    def _on_done(self, key: str, task: asyncio.Task[Any]) -> None:
        if self._newest.get(key) is task:
            del self._newest[key]
        failure = None if task.cancelled() else task.exception()
        if failure is not None:
            self._logger.debug("network_operation_failed", key=key, why=str(failure))


async def _after(earlier: "asyncio.Task[Any] | None", operation: Operation[T]) -> T:
    if earlier is not None:
        await asyncio.gather(earlier, return_exceptions=True)
    return await operation()
