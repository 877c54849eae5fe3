"""`backup` and `restore`: the records of a node into a file, and back.

The file of a backup appears under its name only when all of it is durable. Restoring needs no node, but the installed packages, and the
node's lock: nobody restores under a running node.
"""

from __future__ import annotations

from isopod.cli.lean import Link, answer, bytes_of, number_of, text_of
from isopod.cli.protocol import ERROR, ITEM, REPLY
from isopod.cli.say import note, open_link, say
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body

IDLE_LIMIT_S: Final = 60.0
_PARTIAL: Final = ".partial"


def save(parsed: Parsed) -> int:
    """`isopod backup`."""
    path = console.absolute(parsed.words[0])
    with open_link(parsed) as link:
        partial = path + _PARTIAL
        fd = console.open_private(partial)
        try:
            facts = _receive(link, fd)
            console.replace(partial, path, fd)
        except BaseException:
            console.remove(partial)
            raise
        finally:
            console.close(fd)
    say(f"{path}: {number_of(facts, 'containers')} containers up to record {number_of(facts, 'cursor')}, {text_of(facts, 'digest')}\n")
    return 0


def put_back(parsed: Parsed) -> int:
    """`isopod restore`."""
    from isopod.node.restore import restore_file

    flags = {f"--{name}": console.absolute(parsed.value(name)) for name in ("config", "root", "run-root") if parsed.value(name)}
    restored = restore_file(console.absolute(parsed.words[0]), flags, force=parsed.flag("force"))
    if restored.aside:
        note(f"note: the records from before are in {restored.aside}\n")
    say(f"{restored.containers} containers as of record {restored.cursor}\n")
    return 0


def _receive(link: Link, fd: int) -> Body:
    """Write the stream of a backup to a file; return the answer.

    Raises:
        IsopodError: The node could not make it, or went away.
    """
    call = link.begin("system.backup", {}, None)
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
