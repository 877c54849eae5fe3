"""Download: the stream of a backup into a file. It appears under its name only when all of it is durable; a failure leaves nothing."""

from __future__ import annotations

from isopod.cli.lean import Link, answer, bytes_of
from isopod.cli.protocol import ERROR, ITEM, REPLY
from isopod.cli.say import open_link
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body

IDLE_LIMIT_S: Final = 60.0
_PARTIAL: Final = ".partial"


def download(parsed: Parsed, method: str, path: str) -> Body:
    """Write what a method streams to a file, readable by its owner only.

    Args:
        parsed: The command line, for the node's socket.
        method: Which; it streams items with `data`.
        path: The file; one that exists is replaced.

    Returns:
        The method's answer.

    Raises:
        IsopodError: The node could not make it, or went away.
        OSError: The file cannot be written.
    """
    with open_link(parsed) as link:
        partial = path + _PARTIAL
        try:
            fd = console.open_private(partial)
        except FileNotFoundError as error:
            from isopod.world.errors import NotFound

            raise NotFound("folder", path.rpartition("/")[0] or "/", "create it first") from error
        try:
            facts = _receive(link, method, fd)
            console.replace(partial, path, fd)
        except BaseException:
            console.remove(partial)
            raise
        finally:
            console.close(fd)
    return facts


def _receive(link: Link, method: str, fd: int) -> Body:
    call = link.begin(method, {}, None)
    heard_s = console.monotonic_s()
    while True:
        events, _, _ = link.turn(IDLE_LIMIT_S)
        for event in events:
            heard_s = console.monotonic_s()
            if event[1] != call:
                continue
            if event[0] in (REPLY, ERROR):
                return answer(event)
            if event[0] == ITEM:
                console.write_all(fd, bytes_of(event[2], "data"))
                link.protocol.consumed(call, event[3])
        if console.monotonic_s() - heard_s > IDLE_LIMIT_S:
            from isopod.world.errors import DeadlineExceeded

            raise DeadlineExceeded(f"the next part of the backup from {link.peer}", IDLE_LIMIT_S)
