"""TaskGroup: structured concurrency whose order never varies.

The same promises as `asyncio.TaskGroup` (nobody leaves the block before every child has ended; the first failure cancels the
others; failures come out together in one ExceptionGroup), plus one: children are kept, cancelled and reported in the order they
were created. asyncio's own keeps them in a set and cancels by hash order, which differs from run to run.

Rules: a task that is not awaited by anybody belongs to a group or to a dict of its owner, never to `create_task` alone.
"""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class TaskGroup:
    """Use as `async with TaskGroup() as group: group.create_task(...)`.

    Cancelling the task that is in the block cancels the children, waits for them, and then raises CancelledError.

    Args:
        name: For error messages and task names.
    """

    def __init__(self, name: str = "group") -> None:
        self._name = name
        self._parent: asyncio.Task[Any] | None = None  # of any result
        self._children: dict[int, asyncio.Task[Any]] = {}
        self._failures: dict[int, BaseException] = {}
        self._n_created = 0
        self._is_entered = False
        self._in_block = False
        self._aborting = False
        self._interrupted_parent = False
        self._all_done: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        if self._is_entered:
            raise RuntimeError(f"task group {self._name} was entered before")
        self._is_entered = True
        self._parent = asyncio.current_task()
        if self._parent is None:
            raise RuntimeError(f"task group {self._name} is entered outside of a task")
        self._in_block = True
        return self

    def __len__(self) -> int:
        """Return the number of children that have not ended."""
        return len(self._children)

    def create_task(self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Start a child.

        Args:
            coroutine: What it runs.
            name: Its name in task listings; "GROUP-NUMBER" if None.

        Returns:
            The task; cancelling it alone does not disturb the others.

        Raises:
            RuntimeError: The group was not entered, has ended, or is being cancelled.
        """
        if self._parent is None or (not self._in_block and not self._children) or self._aborting:
            coroutine.close()
            raise RuntimeError(f"task group {self._name} takes no more tasks")
        number = self._n_created
        self._n_created += 1
        task = asyncio.get_running_loop().create_task(coroutine, name=name or f"{self._name}-{number}")
        self._children[number] = task
        task.add_done_callback(lambda ended: self._on_done(number, ended))
        return task

    def cancel(self) -> None:
        """Cancel all children, in the order they were created; the group takes no more."""
        self._aborting = True
        for task in list(self._children.values()):
            task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._in_block = False
        cancelled = error if isinstance(error, asyncio.CancelledError) else None
        if cancelled is not None and self._take_back_interruption():
            cancelled = None
        if error is not None and not self._aborting:
            self.cancel()
        cancelled = await self._wait_children() or cancelled
        self._parent = None
        try:
            self._raise_outcome(error, cancelled)
        finally:
            self._failures.clear()  # no cycles: exceptions hold frames, frames hold the group

    async def _wait_children(self) -> asyncio.CancelledError | None:
        """Wait until every child has ended, whatever happens; return a cancellation from outside that came meanwhile."""
        cancelled: asyncio.CancelledError | None = None
        while self._children:
            self._all_done = asyncio.get_running_loop().create_future()
            try:
                await self._all_done
            except asyncio.CancelledError as error:
                cancelled = error
                self.cancel()
            finally:
                self._all_done = None
        return cancelled

    def _raise_outcome(self, error: BaseException | None, cancelled: asyncio.CancelledError | None) -> None:
        failures = [failure for _, failure in sorted(self._failures.items())]
        if error is not None and not isinstance(error, asyncio.CancelledError):
            if not isinstance(error, Exception):
                raise error
            failures.insert(0, error)
        for failure in failures:
            if not isinstance(failure, Exception):
                raise failure  # KeyboardInterrupt and SystemExit are not for an ExceptionGroup
        if failures:
            raise BaseExceptionGroup(f"tasks of {self._name} failed", failures) from None
        if cancelled is not None:
            raise cancelled

    def _take_back_interruption(self) -> bool:
        """Return whether the CancelledError in the block was only this group's own, sent to leave the block."""
        if not self._interrupted_parent or self._parent is None:
            return False
        return self._parent.uncancel() == 0

    def _on_done(self, number: int, task: asyncio.Task[Any]) -> None:
        del self._children[number]
        if not self._children and self._all_done is not None and not self._all_done.done():
            self._all_done.set_result(None)
        failure = None if task.cancelled() else task.exception()
        if failure is None:
            return
        self._failures[number] = failure
        if self._aborting:
            return
        self.cancel()
        if self._in_block and self._parent is not None and not self._parent.done():
            self._interrupted_parent = True
            self._parent.cancel()
