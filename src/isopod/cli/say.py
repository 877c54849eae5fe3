"""What commands have in common: opening the node, printing rendered answers, and one command for several names."""

from __future__ import annotations

from isopod.cli.lean import CALL_TIMEOUT_S, Link, text_of
from isopod.cli.protocol import one_line
from isopod.cli.settings import socket_path
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body


def open_link(parsed: Parsed) -> Link:
    """Connect to the node that the command line means; the caller closes."""
    return Link(socket_path(parsed.value("socket")))


def say(text: str) -> None:
    """Write to standard output."""
    console.write_all(console.STDOUT, text.encode("utf-8", "replace"))


def complain(message: str, hint: str) -> None:
    """Write an error to the user: one line, and a hint if there is one. A closed stderr hears nothing."""
    note(f"error: {one_line(message)}\n" + (f"hint: {one_line(hint)}\n" if hint else ""))


def note(text: str) -> None:
    """Write to standard error, if anybody listens there."""
    try:
        console.write_all(console.STDERR, text.encode("utf-8", "replace"))
    except OSError:
        return


def render(link: Link, method: str, body: Body, how: str, *, timeout_s: float = CALL_TIMEOUT_S) -> str:
    """Return another method's answer as the text the node makes of it.

    Args:
        link: The node.
        method: What is asked.
        body: Its request.
        how: "table" or "json".
        timeout_s: How long it may take.
    """
    _rows, columns = console.terminal_size(console.STDOUT)
    asked: Body = {"method": method, "body": body, "format": how, "columns": columns}
    return text_of(link.call("system.render", asked, timeout_s), "text")


def show(parsed: Parsed, method: str, body: Body) -> int:
    """Print an answer as --format says."""
    with open_link(parsed) as link:
        say(render(link, method, body, parsed.value("format", "table")))
    return 0


def for_each(parsed: Parsed, act: Callable[[Link, str], str]) -> int:
    """Do something to every name of a command line, and print what it returns, a line each.

    One that is refused does not keep the others from their turn; the first failure's exit code is returned.
    """
    exit_code = 0
    with open_link(parsed) as link:
        for name in parsed.words:
            try:
                say(act(link, name) + "\n")
            except Exception as error:
                from isopod.world.errors import IsopodError, PeerError

                if not isinstance(error, IsopodError) or isinstance(error, PeerError):
                    raise
                complain(error.message, error.hint)
                exit_code = exit_code or error.exit_code
    return exit_code


def invalid(what: str, value: str, why: str, hint: str = "") -> Exception:
    """Make the error of a value that makes no sense."""
    from isopod.world.errors import InvalidArgument

    return InvalidArgument(what, value, why, hint)
