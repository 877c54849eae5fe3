"""The commands that change a container that exists, and those that choose containers by what they are."""

from __future__ import annotations

from isopod.cli.lean import rows_of, text_of
from isopod.cli.options import NO_LIMIT, labels, mount, resources
from isopod.cli.say import for_each, invalid, note, open_link, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body

_LIMITS: Final = (("memory", "memory_bytes_max"), ("cpus", "cpus"), ("pids-limit", "pids_max"))


def update(parsed: Parsed) -> int:
    """`isopod update`."""
    from isopod.cli.containers import environment

    wanted: Body = {
        **_limits(parsed),
        "labels": labels(parsed.values("label")),
        "labels_remove": parsed.values("label-rm"),
        "env": environment(parsed),
        "env_remove": parsed.values("env-rm"),
        "mounts": [mount(text) for text in parsed.values("volume")],
        "mounts_remove": parsed.values("volume-rm"),
    }
    return for_each(parsed, lambda link, name: _said(link.call("container.update", {**wanted, "name": name}), name))


def connect(parsed: Parsed, method: str) -> int:
    """`isopod network connect` and `isopod network disconnect`: `method` tells which."""
    network, name = parsed.words
    with open_link(parsed) as link:
        say(_said(link.call(method, {"network": network, "name": name}), name) + "\n")
    return 0


def filters(parsed: Parsed, now_ns: int) -> Body:
    """Return the fields of a ListContainers that the options of `ps` describe.

    Args:
        parsed: The command line.
        now_ns: Wall time.

    Raises:
        InvalidArgument: One makes no sense.
    """
    from isopod.cli.options import moment_ns
    from isopod.world.units import parse_duration, parse_size

    body: Body = {"all": parsed.flag("all"), "sort": parsed.value("sort", "created")}
    several: dict[str, list[str]] = {"status": [], "labels": []}
    for text in parsed.values("filter"):
        key, equals, value = text.partition("=")
        if not equals or not value:
            raise invalid("filter", text, "want KEY=VALUE", "for example status=exited")
        if key in ("status", "label"):
            several["status" if key == "status" else "labels"].append(value)
        elif key == "name":
            body["name"] = value
        elif key in ("since", "until"):
            body[f"created_{key}_ns"] = moment_ns(value, now_ns)
        elif key == "memory":
            body["memory_bytes_min"] = parse_size(value)
        elif key == "cpu":
            body["cpu_ns_min"] = int(parse_duration(value) * 1e9)
        elif key == "pids":
            body["pids_min"] = _number("filter", value)
        else:
            raise invalid("filter", text, f"nothing is filtered by {key!r}", "want status, label, name, since, until, memory, cpu or pids")
    last = parsed.value("last")
    if last:
        body |= {"limit": _number("last", last), "all": True}
    return body | several


def _limits(parsed: Parsed) -> Body:
    found = resources(parsed)
    body: Body = {}
    for option, field in _LIMITS:
        text = parsed.value(option)
        if text:
            body[field] = int(NO_LIMIT) if text == NO_LIMIT else found[field]
    return body


def _said(reply: Body, name: str) -> str:
    for text in rows_of(reply, "notes"):
        note(f"note: {name}: {text}\n")
    return text_of(reply.get("container"), "name") or name


def _number(what: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise invalid(what, text, "want a number")
    return int(text)
