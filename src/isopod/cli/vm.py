"""The commands about virtual machines: from a parsed line to requests, and from answers to what is printed.

Most do what the command of the same name does to a container; only how the machine is named differs (NAME or --name NAME).
"""

from __future__ import annotations

from isopod.cli import containers
from isopod.cli.lean import rows_of, text_of
from isopod.cli.say import invalid, note, open_link, say, show
from isopod.world.host import console
from isopod.world.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body

SNAPSHOT_TIMEOUT_S: Final = 600.0
RESTORE_TIMEOUT_S: Final = 180.0
BUILD_TIMEOUT_S: Final = 1900.0
"""More than the node gives a build."""
LATEST: Final = "latest"


def options(parsed: Parsed) -> Body:
    """Return the VmOptions that the options of run, create and vm create describe.

    Raises:
        InvalidArgument: One of them makes no sense.
    """
    memory, disk = parsed.value("memory"), parsed.value("disk")
    return {
        "driver": parsed.value("driver", "auto"),
        "machine": parsed.value("machine", "microvm"),
        "vcpus": _count(parsed, "vcpus"),
        "memory_bytes": memory_bytes(memory) if memory else None,
        "disk_bytes": parse_size(disk) if disk else None,
        "config": _config(parsed.value("config"), parsed.value("driver")),
        "cold": parsed.flag("cold"),
    }


def memory_bytes(text: str) -> int:
    """Return the memory of a machine: as for containers, but a bare number below 1 Mi counts MiB, as in the tools machines come from."""
    size = parse_size(text)
    return size << 20 if text.isascii() and text.isdigit() and size < 1 << 20 else size


def create(parsed: Parsed) -> int:
    """`isopod vm create`."""
    words = parsed.words
    name = parsed.value("name")
    if not name and words:
        name, words = words[0], words[1:]
    from isopod.cli.options import labels, mount
    from isopod.cli.ports import published, rates

    spec: Body = {
        "image": parsed.value("image"),
        "command": words,
        "name": name,
        "isolation": "vm",
        "vm": options(parsed),
        "env": containers.environment(parsed),
        "labels": labels(parsed.values("label")),
        "network": parsed.value("network", "bridge"),
        "ports": published(parsed.values("publish")),
        "resources": rates(parsed.value("network-rate")) if parsed.value("network-rate") else {},
        "mounts": [mount(text) for text in parsed.values("volume")],
    }
    with open_link(parsed) as link:
        say(text_of(link.call("container.create", spec), "id") + "\n")
    return 0


def list_(parsed: Parsed) -> int:
    """`isopod vm list`."""
    body: Body = {"all": True, "isolation": "vm"}
    if not parsed.flag("quiet"):
        return show(parsed, "container.list", body)
    with open_link(parsed) as link:
        rows = rows_of(link.call("container.list", body), "containers")
    say("".join(text_of(row, "name") + "\n" for row in rows))
    return 0


def status(parsed: Parsed) -> int:
    """`isopod vm status`."""
    return show(parsed, "vm.status", {"name": _one(parsed)})


def logs(parsed: Parsed) -> int:
    """`isopod vm logs`."""
    parsed.words[:] = [_one(parsed)]
    return containers.VERBS["logs"](parsed)


def exec_(parsed: Parsed) -> int:
    """`isopod vm exec`."""
    return containers.VERBS["exec"](parsed)


def look(parsed: Parsed) -> int:
    """`isopod vm console`."""
    tail = _count(parsed, "tail")
    follow = not parsed.flag("no-follow")
    body: Body = {"name": _one(parsed), "tail_bytes": 16384 if tail is None else tail, "follow": follow}
    from isopod.cli.attach import attached

    with open_link(parsed) as link:
        code = attached(link, "vm.console", body, terminal=follow, stdin=follow and console.is_terminal(console.STDIN))
    return 0 if code == 255 else code  # a console has no exit code


def snapshot(parsed: Parsed) -> int:
    """`isopod vm snapshot`."""
    name, taken = _with_snapshot(parsed)
    body: Body = {"name": name, "snapshot": taken}
    with open_link(parsed) as link:
        if parsed.flag("remove"):
            link.call("vm.snapshot_remove", body)
        else:
            link.call("vm.snapshot", body, SNAPSHOT_TIMEOUT_S)
    say(taken + "\n")
    return 0


def restore(parsed: Parsed) -> int:
    """`isopod vm restore`."""
    name, taken = _with_snapshot(parsed)
    with open_link(parsed) as link:
        say(text_of(link.call("vm.restore", {"name": name, "snapshot": taken}, RESTORE_TIMEOUT_S), "name") + "\n")
    return 0


def resize(parsed: Parsed) -> int:
    """`isopod vm resize`."""
    memory = parsed.value("memory")
    body: Body = {"name": _one(parsed), "vcpus": _count(parsed, "vcpus"), "memory_bytes": memory_bytes(memory) if memory else None}
    with open_link(parsed) as link:
        reply = link.call("vm.resize", body)
    for text in rows_of(reply, "notes"):
        note(f"note: {text}\n")
    say(text_of(reply.get("container"), "name") + "\n")
    return 0


def update(parsed: Parsed) -> int:
    """`isopod vm update`."""
    with open_link(parsed) as link:
        reply = link.call("vm.update", {"name": _one(parsed)}, BUILD_TIMEOUT_S)
    name = text_of(reply.get("container"), "name")
    if reply.get("is_outdated"):
        note(f"note: it goes on as it was started; then: isopod vm restart {name}\n")
    say(name + "\n")
    return 0


def _named(verb: str) -> Callable[[Parsed], int]:
    """Return what does to machines what `verb` does to containers."""

    def act(parsed: Parsed) -> int:
        if parsed.value("name"):
            parsed.words.append(parsed.value("name"))
        if not parsed.words:
            raise _nobody()
        return containers.VERBS[verb](parsed)

    return act


def _one(parsed: Parsed) -> str:
    name = parsed.value("name") or (parsed.words[0] if parsed.words else "")
    if not name:
        raise _nobody()
    return name


def _with_snapshot(parsed: Parsed) -> tuple[str, str]:
    words = [*([parsed.value("name")] if parsed.value("name") else []), *parsed.words]
    if not words:
        raise _nobody()
    if len(words) > 2:
        raise invalid("snapshot", " ".join(words[1:]), "one name is enough")
    return words[0], words[1] if len(words) == 2 else LATEST


def _nobody() -> Exception:
    from isopod.world.errors import UsageError

    return UsageError("no machine is named", "give its name, or --name NAME; `isopod vm list` lists them")


def _count(parsed: Parsed, key: str) -> int | None:
    text = parsed.value(key)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise invalid(key, text, "want a number")
    return int(text)


def _config(text: str, driver: str) -> str:
    """Return a configuration as the node finds it: a path is made absolute, a unit's name and a flake's address stay as they are."""
    scheme = text.partition("/")[0].partition("#")[0]
    if not text or driver == "systemd" or text.startswith("microvm@") or ":" in scheme:
        return text
    path, mark, attribute = text.partition("#")
    return console.absolute(path) + mark + attribute


VERBS: Final[dict[str, Callable[[Parsed], int]]] = {
    "vm create": create,
    "vm start": _named("start"),
    "vm stop": _named("stop"),
    "vm restart": _named("restart"),
    "vm pause": _named("pause"),
    "vm resume": _named("unpause"),
    "vm delete": _named("remove"),
    "vm list": list_,
    "vm status": status,
    "vm logs": logs,
    "vm exec": exec_,
    "vm console": look,
    "vm snapshot": snapshot,
    "vm restore": restore,
    "vm resize": resize,
    "vm update": update,
}
"""What carries out the commands, by their name."""
