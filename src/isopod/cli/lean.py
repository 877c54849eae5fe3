"""The lean client: one connection to the node, opened, called and closed within milliseconds.

Not the SDK (that is `isopod.api`, on asyncio and msgspec). A call either answers or raises an error of the tree; a stream is
driven by its owner (`attach`, `follow`, `upload`) in turns of `Link.turn`.

Rules: every wait has a limit, except those for which the caller asks none (an attached container may run for years); a node
that dies closes the socket, which ends every wait at once.
"""

from __future__ import annotations

from isopod import __version__
from isopod.cli.protocol import ERROR, REPLY, Protocol
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final, Self

    from isopod.cli.protocol import Body, Event

CONNECT_TIMEOUT_S: Final = 10.0
CALL_TIMEOUT_S: Final = 60.0
ANSWER_GRACE_S: Final = 5.0
"""The server ends a late call by itself; only if it does not even do that, the client gives up this much later."""
START_HINT: Final = "start one: isopod node (or, in a source tree: make run)"


class Link:
    """A connection to the node at `path`. Use it in a `with`, or `close` it.

    Raises:
        Disconnected: No node can be reached there.
    """

    def __init__(self, path: str) -> None:
        self.peer: Final = f"isopod node at {path}"
        self.protocol: Final = Protocol(self.peer, __version__)
        self._connection: Final = _connect(path)
        self._greeting_until_s: Final = console.monotonic_s() + CONNECT_TIMEOUT_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_ended: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the node withdraws what is still open."""
        self._connection.close()

    def call(self, method: str, body: Body, timeout_s: float | None = CALL_TIMEOUT_S) -> Body:
        """Ask and wait for the answer.

        Args:
            method: A name of `isopod.api.methods`.
            body: The request as a map.
            timeout_s: The server's deadline; None for no limit.

        Raises:
            IsopodError: What the server answered, or PeerError: it did not.
        """
        call = self.begin(method, body, timeout_s)
        until_s = None if timeout_s is None else console.monotonic_s() + timeout_s + ANSWER_GRACE_S
        while True:
            left_s = None if until_s is None else until_s - console.monotonic_s()
            if left_s is not None and left_s <= 0:
                from isopod.world.errors import DeadlineExceeded

                raise DeadlineExceeded(f"{method} on {self.peer}", timeout_s or 0)
            events, _, _ = self.turn(left_s)
            for event in events:
                if event[1] == call and event[0] in (REPLY, ERROR):
                    return answer(event)

    def begin(self, method: str, body: Body, timeout_s: float | None) -> int:
        """Send a request (with the next turn); return the call's id."""
        return self.protocol.request(method, body, None if timeout_s is None else int(timeout_s * 1000))

    def turn(
        self, timeout_s: float | None, readers: Iterable[int] = (), writers: Iterable[int] = ()
    ) -> tuple[list[Event], list[int], list[int]]:
        """Wait once, then send what can be sent and take what came.

        Args:
            timeout_s: How long to wait at most; None for no limit.
            readers: Other descriptors to wait for until they can be read.
            writers: Other descriptors to wait for until they can be written.

        Returns:
            Events of the protocol, and which of `readers` and of `writers` are ready. All may be empty: what was queued was sent.

        Raises:
            Disconnected: The node went away.
            ProtocolViolation: It broke the protocol.
        """
        fd = self._connection.fd
        if not self.protocol.greeted:
            left_s = self._greeting_until_s - console.monotonic_s()
            if left_s <= 0:
                from isopod.world.errors import DeadlineExceeded

                raise DeadlineExceeded(f"the greeting of {self.peer}", CONNECT_TIMEOUT_S)
            timeout_s = left_s if timeout_s is None else min(left_s, timeout_s)
        # Sending only after the wait: a caller that left out a descriptor because of a full outbox must hear of its emptying.
        pending = [fd] if self.protocol.outbox else []
        readable, writable = console.wait([fd, *readers], [*pending, *writers], timeout_s)
        if fd in writable:
            writable.remove(fd)
            self._send()
        events: list[Event] = []
        if fd in readable:
            readable.remove(fd)
            events = self._receive()
        return events, readable, writable

    def _send(self) -> None:
        outbox = self.protocol.outbox
        try:
            del outbox[: self._connection.send(outbox)]
        except (BrokenPipeError, ConnectionResetError):
            outbox.clear()  # what the node said before it went is still to be read, and tells more than a broken pipe

    def _receive(self) -> list[Event]:
        try:
            data = self._connection.receive(1 << 18)
        except ConnectionResetError:
            data = b""
        if data is None:
            return []
        if not data:
            from isopod.world.errors import Disconnected

            raise Disconnected(self.peer, "it closed the connection before the answer", "is it still running? see its log")
        return self.protocol.feed(data)


def answer(event: Event) -> Body:
    """Return the body of a REPLY.

    Raises:
        IsopodError: It is an ERROR.
    """
    _kind, _call, body, _n_bytes = event
    if isinstance(body, Exception):
        raise body
    return body if isinstance(body, dict) else {}


def text_of(body: object, key: str) -> str:
    """Return a text field of a map, "" if it is missing or something else."""
    value = body.get(key) if isinstance(body, dict) else None
    return value if isinstance(value, str) else ""


def bytes_of(body: object, key: str) -> bytes:
    """Return a bytes field of a map, b"" if it is missing or something else."""
    value = body.get(key) if isinstance(body, dict) else None
    return value if isinstance(value, bytes) else b""


def number_of(body: object, key: str) -> int | None:
    """Return an integer field of a map, None if it is missing or something else."""
    value = body.get(key) if isinstance(body, dict) else None
    return value if isinstance(value, int) else None


def rows_of(body: object, key: str) -> list[object]:
    """Return a list field of a map, [] if it is missing or something else."""
    value = body.get(key) if isinstance(body, dict) else None
    return value if isinstance(value, list) else []


def _connect(path: str) -> console.Connection:
    try:
        return console.Connection(path, CONNECT_TIMEOUT_S)
    except OSError as error:
        raise _unreachable(path, error) from error


def _unreachable(path: str, error: OSError) -> Exception:
    from isopod.world.errors import Disconnected

    hint = START_HINT
    why = error.strerror or str(error)
    if isinstance(error, FileNotFoundError):
        why = "no such socket"
    elif isinstance(error, ConnectionRefusedError):
        why = "nobody listens on that socket"
    elif isinstance(error, PermissionError):
        hint = "you need to be root or in the group isopod: usermod -aG isopod YOU, then log in again"
    elif error.errno is None:
        hint = "choose a shorter path with --socket or ISOPOD_SOCKET"
    return Disconnected(f"cannot reach the isopod node at {path}", why, hint)
