"""What tests of sources share: a source that runs while a block does, and waiting for what it tells."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

LIMIT_S = 60.0


class Source(Protocol):
    """What goes on until it is cancelled."""

    async def run(self) -> None:
        """Go on."""


class Running:
    """A source under watch."""

    source: Source

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have it run during the block; it must not end by itself."""
        task = asyncio.get_running_loop().create_task(self.source.run())
        try:
            yield
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.01)  # what a source tells gives no event; the limit bounds the asking
