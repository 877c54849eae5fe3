"""ClientCall: one open call with streams, as its caller sees it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from isopod.net.rpc.codec import Codec
from isopod.net.rpc.connection import Connection
from isopod.net.rpc.streams import Inbox, Outbox
from isopod.wire import frames as f
from isopod.world.errors import BugError, Disconnected, IsopodError, ProtocolViolation

R = TypeVar("R")


class ClientCall(Generic[R]):
    """One open call: what its method streams, and its reply."""

    __slots__ = ("_connection", "_done", "_error", "_inbox", "_outbox", "_result", "codec", "deadline_ms", "expires_at", "id")

    def __init__(self, connection: Connection, call_id: int, codec: Codec[Any, R], *, expires_at: float | None) -> None:
        self.id = call_id
        self.codec = codec
        self.expires_at = expires_at
        """The loop's time at which it fails; None for never."""
        self.deadline_ms: int | None = None
        self._connection = connection
        # Only ever set to None: an exception kept in a future nobody awaits any more would be reported by the loop.
        self._done: asyncio.Future[None] = connection.loop.create_future()
        self._error: IsopodError | None = None
        self._result: R | None = None
        self._inbox: Inbox[Any] | None = None
        self._outbox: Outbox | None = None

    async def send(self, item: Any) -> None:  # of the union that the method names
        """Stream one item to the server, waiting for its credit.

        Raises:
            BugError: The method takes no items, or after `end`.
            InvalidArgument: The item is over 1 MiB.
            IsopodError: The call has ended.
        """
        if self._outbox is None:
            raise BugError(f"{self.codec.method.name} takes no items")
        await self._outbox.send(item)

    def end(self) -> None:
        """Say that no more items will come."""
        if self._outbox is not None:
            self._outbox.end()

    async def receive(self) -> Any:  # of the union that the method names
        """Return the next item the server streams; None at the end (the reply may follow).

        Raises:
            IsopodError: The call failed.
        """
        return None if self._inbox is None else await self._inbox.receive()

    def __aiter__(self) -> AsyncIterator[Any]:
        """Iterate over what the server streams."""
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        while (item := await self.receive()) is not None:
            yield item

    async def reply(self) -> R:
        """Wait for the reply. Items not received are dropped only when the call is left.

        Raises:
            IsopodError: The call failed.
        """
        await asyncio.shield(self._done)
        return self.result()

    # --- for the client -----------------------------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """Whether reply or error are there."""
        return self._error is not None or self._result is not None

    def open_streams(self) -> None:
        """Give the call the streams of its method."""
        method = self.codec.method
        if self.codec.receives is not None:
            self._inbox = Inbox(self._connection, self.id, decoder=self.codec.receives, method=method.name)
        if method.sends is not None:
            self._outbox = Outbox(self._connection, self.id, method=method.name)

    def result(self) -> R:
        """Return the reply, or raise the error, of an ended call."""
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise BugError(f"{self.codec.method.name} has not ended")
        return self._result

    def finish(self, result: R) -> None:
        """The reply came."""
        self._result = result
        self._settle(None)

    def fail(self, error: IsopodError) -> None:
        """The call failed."""
        self._error = error
        self._settle(error)

    def on_frame(self, frame: f.Frame, n_bytes: int) -> None:
        """Take a frame of this call's streams. Raises ProtocolViolation."""
        if isinstance(frame, f.Credit):
            if self._outbox is not None:
                self._outbox.on_credit(frame.n_bytes)
        elif isinstance(frame, f.ITEM_FRAMES):
            if self._inbox is None:
                raise ProtocolViolation(self._connection.peer, f"{self.codec.method.name} streams no items")
            self._inbox.on_item(frame.body, n_bytes)
        elif self._inbox is not None:
            self._inbox.end()

    def wake(self) -> None:
        """The peer reads again."""
        if self._outbox is not None:
            self._outbox.wake()

    def discard(self) -> None:
        """Nobody will take what is queued."""
        if self._inbox is not None:
            self._inbox.discard()

    def _settle(self, error: IsopodError | None) -> None:
        if not self._done.done():
            self._done.set_result(None)
        if self._inbox is not None:
            self._inbox.end(error)
        if self._outbox is not None:
            self._outbox.fail(error or Disconnected(self._connection.peer, f"{self.codec.method.name} has ended"))


AnyClientCall = ClientCall[Any]  # of whatever its method replies
