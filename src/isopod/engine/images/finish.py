"""finish: work that must not be left half done when its caller is cancelled.

For steps that belong together, such as a record, the index, and what memory says of them. A single call of the disk needs no such care:
it is over when it raises CancelledError.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end, then let a cancellation that came meanwhile go on.

    Returns:
        What `work` returned.

    Raises:
        asyncio.CancelledError: The caller was cancelled; `work` has ended, well or not.
        Exception: What `work` raised.
    """
    ended = asyncio.Event()
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(lambda _: ended.set())
    interrupted: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await ended.wait()
        except asyncio.CancelledError as error:
            interrupted = error
    if interrupted is not None and not task.cancelled():
        task.exception()  # seen: the cancellation outweighs it
        raise interrupted
    return task.result()
