"""Waiting until a file descriptor can be read or written, over the loop's add_reader and add_writer.

One waiter per descriptor and direction: the loops allow no more, and the ports promise no more. Works the same on uvloop and asyncio,
for pipes, SEQPACKET sockets, pidfds and inotify, which the loops' own transports do not take.
"""

import asyncio


class Readiness:
    """Waits on one descriptor, which its owner closes after `close`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._reading: asyncio.Future[None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self.closed = False

    async def wait_readable(self) -> None:
        """Return when reading would not block (or the peer is gone), or after `close`."""
        if self.closed:
            return
        if self._reading is not None:
            raise RuntimeError("another task is already reading this")
        loop = asyncio.get_running_loop()
        self._reading = loop.create_future()
        loop.add_reader(self._fd, _resolve, self._reading)
        try:
            await self._reading
        finally:
            self._reading = None
            if not self.closed:
                loop.remove_reader(self._fd)

    async def wait_writable(self) -> None:
        """Return when writing would not block (or the peer is gone), or after `close`."""
        if self.closed:
            return
        if self._writing is not None:
            raise RuntimeError("another task is already writing this")
        loop = asyncio.get_running_loop()
        self._writing = loop.create_future()
        loop.add_writer(self._fd, _resolve, self._writing)
        try:
            await self._writing
        finally:
            self._writing = None
            if not self.closed:
                loop.remove_writer(self._fd)

    def wake_reader(self) -> None:
        """Let `wait_readable` return although there may be nothing to read."""
        if self._reading is not None:
            _resolve(self._reading)

    def close(self) -> None:
        """Wake whoever waits; the descriptor is forgotten by the loop at once, so that its number may be used again."""
        self.closed = True
        for waiting, forget in ((self._reading, "remove_reader"), (self._writing, "remove_writer")):
            if waiting is not None:
                getattr(waiting.get_loop(), forget)(self._fd)
                _resolve(waiting)


def _resolve(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)
