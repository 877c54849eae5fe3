"""The commands about networks and about the node itself."""

from __future__ import annotations

from isopod.cli.containers import inspected
from isopod.cli.lean import rows_of, text_of
from isopod.cli.say import for_each, open_link, render, say, show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from isopod.cli.lean import Link
    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body


def create(parsed: Parsed) -> int:
    """`isopod network create`."""
    name = parsed.words[0]
    body: Body = {"name": name, "subnet": parsed.value("subnet"), "driver": parsed.value("driver", "bridge")}
    with open_link(parsed) as link:
        say((text_of(link.call("network.create", body), "name") or name) + "\n")
    return 0


def list_(parsed: Parsed) -> int:
    """`isopod network ls`."""
    if not parsed.flag("quiet"):
        return show(parsed, "network.list", {})
    with open_link(parsed) as link:
        rows = rows_of(link.call("network.list", {}), "networks")
    say("".join(text_of(row, "name") + "\n" for row in rows))
    return 0


def inspect(parsed: Parsed) -> int:
    """`isopod network inspect`."""
    return for_each(parsed, lambda link, name: inspected(link, name, ("network",)))


def remove(parsed: Parsed) -> int:
    """`isopod network rm`."""

    def act(link: Link, name: str) -> str:
        link.call("network.remove", {"name": name})
        return name

    return for_each(parsed, act)


def connect(parsed: Parsed) -> int:
    """`isopod network connect`, `isopod network disconnect`."""
    from isopod.cli import changes

    command = parsed.command
    return changes.connect(parsed, command.method if command is not None else "network.connect")


def usage(parsed: Parsed) -> int:
    """`isopod system df`."""
    return show(parsed, "system.usage", {})


def backup(parsed: Parsed) -> int:
    """`isopod backup`."""
    from isopod.cli.backup import save

    return save(parsed)


def info(parsed: Parsed) -> int:
    """`isopod info`."""
    return show(parsed, "system.info", {})


def tasks(parsed: Parsed) -> int:
    """`isopod debug tasks`."""
    return show(parsed, "system.tasks", {})


def version(parsed: Parsed) -> int:
    """`isopod version`: ours even where no node runs, then the node's."""
    from isopod import __version__

    if parsed.value("format") == "json":
        with open_link(parsed) as link:
            server = render(link, "system.version", {}, "json").strip()
        say(f'{{"client": {{"version": "{__version__}"}}, "server": {server or "null"}}}\n')
        return 0
    say(f"client version: {__version__}\n")
    with open_link(parsed) as link:
        lines = render(link, "system.version", {}, "table").splitlines()
    say("".join(f"node {line}\n" for line in lines))
    return 0


VERBS: Final[dict[str, Callable[[Parsed], int]]] = {
    "network.create": create,
    "network.list": list_,
    "network.inspect": inspect,
    "network.remove": remove,
    "network.connect": connect,
    "network.disconnect": connect,
    "system.usage": usage,
    "system.backup": backup,
    "system.info": info,
    "system.tasks": tasks,
    "system.version": version,
}
"""What carries out the commands, by their method."""
