"""ProgressReport: carries the latest word on long work to a client, never faster than the client reads, never holding the work up."""

import asyncio
from types import TracebackType
from typing import Any, Self

from isopod.api.messages import Progress
from isopod.net.rpc import Call


class ProgressReport:
    """Callable from any thread with (done bytes, total bytes, what); words that were overtaken are dropped.

    Args:
        call: The client's call; gets `Progress` items while the context is open.
        total_bytes: What the client said it sends, used where the work does not know better.
    """

    def __init__(self, call: Call[Any, Any], total_bytes: int) -> None:
        self._call = call
        self._total_bytes = total_bytes
        self._loop = asyncio.get_running_loop()
        self._latest: Progress | None = None
        self._news = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    def __call__(self, done_bytes: int, total_bytes: int, what: str) -> None:
        """Say how far the work is."""
        progress = Progress(what=what, done_bytes=done_bytes, total_bytes=total_bytes or self._total_bytes)
        self._loop.call_soon_threadsafe(self._set, progress)

    async def __aenter__(self) -> Self:
        """Begin to send."""
        self._sender = self._loop.create_task(self._send(), name="progress")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop sending."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)

    def _set(self, progress: Progress) -> None:
        self._latest = progress
        self._news.set()

    async def _send(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self._latest is not None:
                await self._call.send(self._latest)
