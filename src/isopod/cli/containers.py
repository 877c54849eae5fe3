"""The commands about containers: from a parsed line to requests, and from answers to what is printed."""

from __future__ import annotations

from isopod.cli.lean import number_of, rows_of, text_of
from isopod.cli.say import for_each, invalid, open_link, render, say, show
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from isopod.cli.lean import Link
    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body

SHORT_ID_CHARS: Final = 12
STOP_GRACE_S: Final = 60.0
"""How much longer than its own timeout a stop may take."""
COMMIT_TIMEOUT_S: Final = 1800.0
START_TIMEOUT_S: Final = 120.0


def run(parsed: Parsed) -> int:
    """`isopod run`."""
    spec = _spec(parsed)
    if parsed.flag("detach"):
        with open_link(parsed) as link:
            ran = link.call("container.run", {"spec": spec, "attach": False}, START_TIMEOUT_S)
        say(text_of(ran, "id") + "\n")
        return 0
    from isopod.cli.attach import attached

    terminal, stdin = parsed.flag("tty"), parsed.flag("interactive")
    rows, columns = _terminal(terminal=terminal, stdin=stdin)
    body: Body = {"spec": spec, "attach": True, "rows": rows, "columns": columns}
    with open_link(parsed) as link:
        return attached(link, "container.run", body, terminal=terminal, stdin=stdin)


def exec_(parsed: Parsed) -> int:
    """`isopod exec`."""
    words = parsed.words
    name = parsed.value("name")
    if not name:
        name, words = words[0], words[1:]
    terminal, stdin = parsed.flag("tty"), parsed.flag("interactive")
    rows, columns = _terminal(terminal=terminal, stdin=stdin)
    body: Body = {
        "name": name,
        "command": words,
        "env": environment(parsed),
        "working_dir": parsed.value("workdir"),
        "user": parsed.value("user"),
        "terminal": terminal,
        "stdin_open": stdin,
        "rows": rows,
        "columns": columns,
    }
    from isopod.cli.attach import attached

    with open_link(parsed) as link:
        return attached(link, "container.exec", body, terminal=terminal, stdin=stdin)


def create(parsed: Parsed) -> int:
    """`isopod create`."""
    spec = _spec(parsed)
    with open_link(parsed) as link:
        say(text_of(link.call("container.create", spec), "id") + "\n")
    return 0


def start(parsed: Parsed) -> int:
    """`isopod start`: several names, or one attached."""
    if not (parsed.flag("attach") or parsed.flag("interactive")):
        return for_each(parsed, lambda link, name: _started(link.call("container.start", {"name": name}, START_TIMEOUT_S), name))
    if len(parsed.words) != 1 or parsed.flag("detach"):
        why = "cannot be combined with -d" if parsed.flag("detach") else "takes one container"
        raise invalid("attached start", " ".join(parsed.words), why)
    from isopod.cli.attach import attached

    with open_link(parsed) as link:
        record = link.call("container.inspect", {"name": parsed.words[0]})
        terminal = record.get("terminal") is True
        stdin = parsed.flag("interactive") and record.get("stdin_open") is True
        rows, columns = _terminal(terminal=terminal, stdin=stdin)
        body: Body = {"name": parsed.words[0], "attach": True, "rows": rows, "columns": columns}
        return attached(link, "container.start", body, terminal=terminal, stdin=stdin)


def stop(parsed: Parsed) -> int:
    """`isopod stop`."""
    from isopod.world.units import parse_duration

    timeout_s = parse_duration(parsed.value("time", "10"))

    def act(link: Link, name: str) -> str:
        link.call("container.stop", {"name": name, "timeout_s": timeout_s}, timeout_s + STOP_GRACE_S)
        return name

    return for_each(parsed, act)


def restart(parsed: Parsed) -> int:
    """`isopod restart`."""
    from isopod.world.units import parse_duration

    timeout_s = parse_duration(parsed.value("time", "10"))

    def act(link: Link, name: str) -> str:
        link.call("container.restart", {"name": name, "timeout_s": timeout_s}, timeout_s + STOP_GRACE_S + START_TIMEOUT_S)
        return name

    return for_each(parsed, act)


def pause(parsed: Parsed) -> int:
    """`isopod pause`, `isopod unpause`."""
    command = parsed.command
    method = command.method if command is not None else "container.pause"

    def act(link: Link, name: str) -> str:
        link.call(method, {"name": name})
        return name

    return for_each(parsed, act)


def update(parsed: Parsed) -> int:
    """`isopod update`."""
    from isopod.cli import changes

    return changes.update(parsed)


def events(parsed: Parsed) -> int:
    """`isopod events`."""
    from isopod.cli.events import print_events

    return print_events(parsed)


def stats(parsed: Parsed) -> int:
    """`isopod stats`."""
    return show(parsed, "container.stats", {"names": parsed.words})


def kill(parsed: Parsed) -> int:
    """`isopod kill`."""
    text = parsed.value("signal", "KILL")
    number = console.signal_number(text)
    if number is None:
        raise invalid("signal", text, "no such signal", "a name like HUP or a number like 1")

    def act(link: Link, name: str) -> str:
        link.call("container.kill", {"name": name, "signal": number})
        return name

    return for_each(parsed, act)


def remove(parsed: Parsed) -> int:
    """`isopod rm`."""

    def act(link: Link, name: str) -> str:
        link.call("container.remove", {"name": name, "force": parsed.flag("force")})
        return name

    return for_each(parsed, act)


def list_(parsed: Parsed) -> int:
    """`isopod ps`."""
    body: Body = {"all": parsed.flag("all")}
    if parsed.values("filter") or parsed.value("last") or parsed.value("sort"):
        from isopod.cli.changes import filters

        body = filters(parsed, console.unix_time_ns())
    if not parsed.flag("quiet"):
        return show(parsed, "container.list", body)
    with open_link(parsed) as link:
        rows = rows_of(link.call("container.list", body), "containers")
    say("".join(text_of(row, "id")[:SHORT_ID_CHARS] + "\n" for row in rows))
    return 0


def logs(parsed: Parsed) -> int:
    """`isopod logs`."""
    from isopod.cli.follow import print_logs

    tail = parsed.value("tail", "all")
    if tail != "all" and not (tail.isascii() and tail.isdigit() and len(tail) < 19):
        raise invalid("tail", tail, "want a number of lines, or all")
    since = parsed.value("since")
    body: Body = {
        "name": parsed.words[0],
        "follow": parsed.flag("follow"),
        "tail": None if tail == "all" else int(tail),
        "since_ns": _moment_ns(since) if since else None,
        "timestamps": parsed.flag("timestamps"),
    }
    return print_logs(parsed, body)


def wait(parsed: Parsed) -> int:
    """`isopod wait`."""

    def act(link: Link, name: str) -> str:
        code = number_of(link.call("container.wait", {"name": name}, None), "exit_code")
        return str(255 if code is None else code)

    return for_each(parsed, act)


def inspect(parsed: Parsed) -> int:
    """`isopod inspect`: a container, else an image, else a network; `isopod container inspect`: only the first."""
    command = parsed.command
    kinds = ("container", "image", "network") if command is None or command.name == "inspect" else ("container",)
    return for_each(parsed, lambda link, name: inspected(link, name, kinds))


def inspected(link: Link, name: str, kinds: tuple[str, ...]) -> str:
    """Return the JSON of the first object of that name, looking through `kinds` in order.

    Raises:
        NotFound: There is none.
    """
    for kind in kinds:
        try:
            return render(link, f"{kind}.inspect", {"name": name}, "json").rstrip("\n")
        except Exception as error:
            # A name that cannot be a container's may well be an image's: debian:12.
            if len(kinds) == 1 or getattr(error, "code", "") not in ("not_found", "invalid_argument"):
                raise
    from isopod.world.errors import NotFound

    raise NotFound("container, image or network", name, "see: isopod ps -a, isopod images, isopod network ls")


def commit(parsed: Parsed) -> int:
    """`isopod commit`."""
    name, image = parsed.words
    with open_link(parsed) as link:
        say(text_of(link.call("container.commit", {"name": name, "image": image}, COMMIT_TIMEOUT_S), "id") + "\n")
    return 0


def _started(ran: Body, name: str) -> str:
    return text_of(ran, "name") or name


def _terminal(*, terminal: bool, stdin: bool) -> tuple[int, int]:
    """Return the terminal's size if one is wanted.

    Raises:
        InvalidArgument: -i and -t are wanted, but stdin is no terminal.
    """
    if not terminal:
        return 0, 0
    if stdin and not console.is_terminal(console.STDIN):
        raise invalid("option", "-t", "standard input is not a terminal", "leave out -t to feed a command from a file or pipe")
    return console.terminal_size(console.STDOUT, console.STDIN)


def _spec(parsed: Parsed) -> Body:
    """Return the ContainerSpec that the options of run and create describe."""
    from isopod.cli.options import health_check, labels, mount, resources

    machine: Body = {}
    if parsed.value("isolation") == "vm":
        from isopod.cli.vm import options

        machine = {"isolation": "vm", "vm": {**options(parsed), "memory_bytes": None}}
    return {
        **machine,
        "image": parsed.words[0],
        "command": parsed.words[1:],
        "name": parsed.value("name"),
        "env": environment(parsed),
        "labels": labels(parsed.values("label")),
        "working_dir": parsed.value("workdir"),
        "user": parsed.value("user"),
        "hostname": parsed.value("hostname"),
        "network": parsed.value("network", "bridge"),
        "ports": _ports(parsed.values("publish")),
        "resources": resources(parsed),
        "mounts": [mount(text) for text in parsed.values("volume")],
        "health_check": health_check(parsed),
        "terminal": parsed.flag("tty"),
        "stdin_open": parsed.flag("interactive"),
        "auto_remove": parsed.flag("rm"),
    }


def _ports(texts: list[str]) -> list[Body]:
    if not texts:
        return []
    from isopod.cli.ports import published

    return published(texts)


def environment(parsed: Parsed) -> dict[str, str]:
    """Return the variables of -e; a KEY alone takes the client's value, and is left out where the client has none.

    Raises:
        InvalidArgument: One has no name.
    """
    variables: dict[str, str] = {}
    for text in parsed.values("env"):
        key, equals, value = text.partition("=")
        if not key:
            raise invalid("variable", text, "want KEY=VALUE or KEY")
        if equals:
            variables[key] = value
        elif (own := console.environment(key)) is not None:
            variables[key] = own
    return variables


def copy(parsed: Parsed) -> int:
    """`isopod cp`."""
    from isopod.cli import copying

    return copying.copy(parsed)


def _moment_ns(text: str) -> int:
    """Return the moment that --since names, in nanoseconds since the epoch."""
    from isopod.cli.options import moment_ns

    return moment_ns(text, console.unix_time_ns())


VERBS: Final[dict[str, Callable[[Parsed], int]]] = {
    "run": run,
    "exec": exec_,
    "create": create,
    "start": start,
    "stop": stop,
    "kill": kill,
    "remove": remove,
    "list": list_,
    "logs": logs,
    "wait": wait,
    "inspect": inspect,
    "commit": commit,
    "restart": restart,
    "pause": pause,
    "unpause": pause,
    "update": update,
    "events": events,
    "stats": stats,
    "copy_to": copy,
}
"""What carries out the commands, by the verb of their method."""
