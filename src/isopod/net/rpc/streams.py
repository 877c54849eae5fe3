"""The two directions of a call's stream, the same for client and server: Inbox (what came) and Outbox (what goes).

Flow control is by credit in bytes of item frames, as docs/protocol.md says: a sender may send while its credit is above zero, a
receiver gives back what its application took. So a direction never holds more than a window and one frame, whoever is slow.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from isopod.net.rpc.codec import Body, Decode, decode_item
from isopod.net.rpc.connection import Connection
from isopod.runtime.waiters import Waiters
from isopod.wire import frames as f
from isopod.world.errors import BugError, InvalidArgument, IsopodError, ProtocolViolation

WINDOW_BYTES: Final = 1 << 20
CREDIT_STEP_BYTES: Final = 128 << 10

T = TypeVar("T")


class Inbox(Generic[T]):
    """Items received for one call and not yet taken.

    Args:
        connection: Where credit is given back.
        call_id: Whose items.
        decoder: Of the items' type.
        method: The method's name, for errors.
        on_taken: Told how many bytes the application took (or gave up).
    """

    __slots__ = (
        "_connection", "_decoder", "_error", "_id", "_is_ended", "_items", "_method", "_n_queued", "_n_taken", "_on_taken",
        "_waiters", "_window",
    )  # fmt: skip

    def __init__(
        self,
        connection: Connection,
        call_id: int,
        *,
        decoder: Decode,
        method: str,
        on_taken: Callable[[int], None] | None = None,
    ) -> None:
        self._connection = connection
        self._id = call_id
        self._decoder = decoder
        self._method = method
        self._on_taken = on_taken
        self._items: deque[tuple[T, int]] = deque()
        self._n_queued = 0
        self._n_taken = 0
        self._window = WINDOW_BYTES
        self._is_ended = False
        self._error: IsopodError | None = None
        self._waiters = Waiters()

    def on_item(self, body: Body, n_bytes: int) -> None:
        """Take an ITEM frame.

        Raises:
            ProtocolViolation: It came after END, without credit, or is no item of this method.
        """
        if self._is_ended:
            raise ProtocolViolation(self._connection.peer, f"an item of {self._method} after its end")
        if self._window <= 0:
            raise ProtocolViolation(self._connection.peer, f"an item of {self._method} without credit")
        item: T = decode_item(self._decoder, body, method=self._method, peer=self._connection.peer)
        self._window -= n_bytes
        self._n_queued += n_bytes
        self._items.append((item, n_bytes))
        self._waiters.wake()

    def end(self, error: IsopodError | None = None) -> None:
        """No more will come: after what is queued, `receive` raises `error`, or returns None. The first end counts."""
        if not self._is_ended:
            self._is_ended = True
            self._error = error
            self._waiters.wake()
        elif error is not None and self._error is None:
            self._error = error

    def discard(self) -> None:
        """Drop what is queued: nobody will take it."""
        self._items.clear()
        self._account(self._n_queued)

    async def receive(self) -> T | None:
        """Return the next item, None at the end.

        Raises:
            IsopodError: The call failed.
        """
        while not self._items:
            if self._is_ended:
                if self._error is not None:
                    raise self._error
                return None
            await self._waiters.wait()
        item, n_bytes = self._items.popleft()
        self._account(n_bytes)
        self._n_taken += n_bytes
        if self._n_taken >= CREDIT_STEP_BYTES and not self._is_ended:
            self._connection.send(f.Credit(self._id, self._n_taken))
            self._window += self._n_taken
            self._n_taken = 0
        return item

    def _account(self, n_bytes: int) -> None:
        self._n_queued -= n_bytes
        if self._on_taken is not None and n_bytes:
            self._on_taken(n_bytes)


class Outbox:
    """The sending direction of one call.

    Args:
        connection: Where items go.
        call_id: Whose items.
        method: The method's name, for errors.
    """

    __slots__ = ("_connection", "_credit", "_error", "_id", "_is_ended", "_method", "_waiters")

    def __init__(self, connection: Connection, call_id: int, *, method: str) -> None:
        self._connection = connection
        self._id = call_id
        self._method = method
        self._credit = WINDOW_BYTES
        self._is_ended = False
        self._error: IsopodError | None = None
        self._waiters = Waiters()

    async def send(self, item: Any) -> None:  # of the union that the method names
        """Send one item, waiting while the peer gives no credit or does not read.

        Raises:
            IsopodError: The call failed or ended.
            InvalidArgument: The item is over 1 MiB or cannot be packed.
            BugError: After `end`.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._is_ended:
                raise BugError(f"an item of {self._method} was sent after its end")
            if self._credit > 0 and not self._connection.is_write_paused:
                break
            await self._waiters.wait()
        try:
            connection = self._connection
            if type(item) is bytes and len(item) >= connection.raw_bytes_min:
                self._credit -= connection.send_raw((f.ITEM, self._id, None), item)
            else:
                self._credit -= connection.send((f.ITEM, self._id, item))
        except f.WireError as error:
            raise InvalidArgument("item of", self._method, error.why) from error

    def end(self) -> None:
        """Say that nothing more will be sent. Again is fine."""
        if not self._is_ended and self._error is None:
            self._is_ended = True
            self._connection.send(f.End(self._id))
            self._waiters.wake()

    def on_credit(self, n_bytes: int) -> None:
        """Take a CREDIT frame.

        Raises:
            ProtocolViolation: More was given back than was ever sent.
        """
        self._credit += n_bytes
        if self._credit > WINDOW_BYTES:
            raise ProtocolViolation(self._connection.peer, f"credit of {self._method} for bytes that were not sent")
        self.wake()

    def fail(self, error: IsopodError) -> None:
        """Let every `send`, waiting or to come, raise `error`."""
        if self._error is None:
            self._error = error
        self._waiters.wake()

    def wake(self) -> None:
        """Look again: credit came, or the peer reads again."""
        self._waiters.wake()
