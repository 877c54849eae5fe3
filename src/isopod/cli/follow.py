"""`logs`: prints what a container wrote, and with -f bridges a restart of the node.

Exactly once: the node sends the log in batches, each ended by a cursor ("everything before this was sent"). A batch is printed when its
cursor has come; after a lost connection the next request begins at the last cursor, and the unfinished batch comes again.
"""

from __future__ import annotations

from isopod.cli.lean import Link, answer, bytes_of, number_of, text_of
from isopod.cli.protocol import ERROR, ITEM, REPLY
from isopod.cli.say import note, open_link
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body, Event

RECONNECT_LIMIT_S: Final = 60.0
PAUSE_FIRST_S: Final = 0.05
PAUSE_MAX_S: Final = 1.0
BATCH_BYTES_MAX: Final = 4 << 20
"""The node ends a batch at some 64 KiB."""
IDLE_LIMIT_S: Final = 60.0
"""Without -f, so long a silence in the middle of an answer is an error."""


def print_logs(parsed: Parsed, body: Body) -> int:
    """Print a container's log.

    Args:
        parsed: The command line, for the node's socket.
        body: A LogsRequest.

    Raises:
        IsopodError: No such container, or the node went away and stayed away.
    """
    printer = Printer(body)

    def lost(error: Exception) -> None:
        if not body["follow"]:
            printer.print_batch()
            raise error
        printer.drop()

    serve_bridged(parsed, printer.serve, lost)
    return 0


class Printer:
    """What was asked, what of the current batch has come, and how to go on."""

    def __init__(self, body: Body) -> None:
        self._body: Final = body
        self._cursor: int | None = None
        self._batch: Final[list[tuple[int, bytes]]] = []
        self._batch_bytes = 0

    def request(self) -> Body:
        """Return the request that begins where printing ended."""
        if self._cursor is None:
            return self._body
        # What --tail and --since left out lies before the cursor.
        return {**self._body, "tail": None, "since_ns": None, "cursor": self._cursor}

    def serve(self, link: Link) -> None:
        """Print until the log's end."""
        call = link.begin("container.logs", self.request(), None)
        limit_s = None if self._body["follow"] else IDLE_LIMIT_S
        heard_s = console.monotonic_s()
        while True:
            events, _, _ = link.turn(limit_s)
            for event in events:
                heard_s = console.monotonic_s()
                if event[1] == call and self._take(link, event):
                    return
            if limit_s is not None and console.monotonic_s() - heard_s > limit_s:
                from isopod.world.errors import DeadlineExceeded

                raise DeadlineExceeded(f"the next part of the log from {link.peer}", limit_s)

    def drop(self) -> None:
        """Forget the unfinished batch: it comes again."""
        self._batch.clear()
        self._batch_bytes = 0

    def print_batch(self) -> None:
        """Print what has come of the batch."""
        for fd, data in self._batch:
            console.write_all(fd, data)
        self.drop()

    def _take(self, link: Link, event: Event) -> bool:
        """Act on an event; tell whether it was the last one."""
        kind, call, body, n_bytes = event
        if kind in (REPLY, ERROR):
            answer(event)
            self.print_batch()
            return True
        if kind != ITEM:
            return False
        what = text_of(body, "type")
        if what in ("stdout", "stderr"):
            data = bytes_of(body, "data")
            self._batch.append((console.STDERR if what == "stderr" else console.STDOUT, data))
            self._batch_bytes += len(data)
            if self._batch_bytes > BATCH_BYTES_MAX:
                from isopod.world.errors import ProtocolViolation

                raise ProtocolViolation(link.peer, f"more than {BATCH_BYTES_MAX} bytes of log without a cursor")
        elif what == "cursor" and (position := number_of(body, "position")) is not None:
            self.print_batch()
            self._cursor = position
        link.protocol.consumed(call, n_bytes)
        return False


def serve_bridged(parsed: Parsed, serve: Callable[[Link], None], lost: Callable[[Exception], None]) -> None:
    """Serve a stream to its end, and bridge restarts of the node.

    Args:
        parsed: The command line, for the node's socket.
        serve: Asks for the stream on a connection, from where it was cut, and returns at its end.
        lost: Told of each loss before the node is waited for; what it raises ends the waiting.

    Raises:
        Disconnected: The node was not there, or stayed away for too long.
        IsopodError: What it answered.
    """
    link = open_link(parsed)
    while True:
        try:
            with link:
                serve(link)
            return
        except OSError:  # of an output: nothing is imported for it
            raise
        except Exception as error:
            from isopod.world.errors import Cancelled, Disconnected

            if not isinstance(error, (Cancelled, Disconnected)):
                raise
            lost(error)
            note(f"note: the node went away; waiting for it, {RECONNECT_LIMIT_S:.0f} s at most\n")
            link = _reopened(parsed, error)


def _reopened(parsed: Parsed, error: Exception) -> Link:
    """Connect again, as soon as the node is back; Disconnected if it stays away for too long."""
    from isopod.world.errors import Disconnected

    until_s = console.monotonic_s() + RECONNECT_LIMIT_S
    pause_s = PAUSE_FIRST_S
    while True:
        console.pause(pause_s)
        try:
            return open_link(parsed)
        except Disconnected as again:
            if console.monotonic_s() >= until_s:
                raise again from error
        pause_s = min(2 * pause_s, PAUSE_MAX_S)
