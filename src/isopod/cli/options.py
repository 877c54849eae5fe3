"""Values of options that need more than a look: volumes, limits, labels, moments. Text in, what the contract wants out.

What needs the host's file system or the image (does the folder exist, is there such a user) is the node's to check.
"""

from __future__ import annotations

from isopod.cli.say import invalid
from isopod.world.host import console
from isopod.world.units import parse_cpus, parse_duration, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isopod.cli.parse import Parsed

_HOW = {"ro": True, "rw": False}
ANSWER_TIMEOUT = "5"
"""Seconds, where --timeout says nothing."""
NO_LIMIT = "-1"
"""A limit's value that takes it away."""


def timeout_s(parsed: Parsed) -> float:
    """Return how long --timeout lets the node take.

    Raises:
        InvalidArgument: It is no time, or out of range.
    """
    text = parsed.value("timeout", ANSWER_TIMEOUT)
    seconds = parse_duration(text)
    if not 0 < seconds <= 3600:
        raise invalid("--timeout", text, "want more than 0, at most an hour")
    return seconds


def mount(text: str) -> dict[str, object]:
    """Return the mount that HOST:CONTAINER[:ro] describes; a relative HOST is taken from the working folder.

    Raises:
        InvalidArgument: It is not of that form.
    """
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0] or not parts[1]:
        raise invalid("volume", text, "want HOST:CONTAINER or HOST:CONTAINER:ro")
    source, destination = parts[0], parts[1]
    if len(parts) == 3 and parts[2] not in _HOW:
        raise invalid("volume", text, f"{parts[2]!r} is neither ro nor rw")
    if not source.startswith(("/", "./", "../")) and source not in (".", ".."):
        raise invalid("volume", text, "HOST begins with none of /, ./ and ../", f"for a folder here: ./{source}:{destination}")
    if not destination.startswith("/"):
        raise invalid("volume", text, "CONTAINER is not an absolute path")
    read_only = len(parts) == 3 and _HOW[parts[2]]
    return {"source": console.absolute(source), "destination": destination, "kind": "bind", "read_only": read_only}


def resources(parsed: Parsed) -> dict[str, object]:
    """Return the Resources that -m, --cpus, --pids-limit and --network-rate describe.

    Raises:
        InvalidArgument: One of them makes no sense.
    """
    memory, cpus, pids = (parsed.value(name) for name in ("memory", "cpus", "pids-limit"))
    memory, cpus = ("" if text == NO_LIMIT else text for text in (memory, cpus))
    if pids and pids != NO_LIMIT and not (pids.isascii() and pids.isdigit() and int(pids[:18]) > 0 and len(pids) <= 18):
        raise invalid("pids-limit", pids, "want a number of processes, or -1 for no limit")
    found: dict[str, object] = {
        "memory_bytes_max": parse_size(memory) if memory else None,
        "cpus": parse_cpus(cpus) if cpus else None,
        "pids_max": int(pids) if pids and pids != NO_LIMIT else None,
    }
    if parsed.value("network-rate"):
        from isopod.cli.ports import rates

        found |= rates(parsed.value("network-rate"))
    return found


def health_check(parsed: Parsed) -> dict[str, object] | None:
    """Return the HealthCheck that the options of --health-cmd describe, None without one.

    Raises:
        InvalidArgument: One of them makes no sense.
    """
    command = parsed.value("health-cmd")
    others = [name for name in ("interval", "timeout", "retries", "start-period") if parsed.value(f"health-{name}")]
    if not command:
        if others:
            raise invalid(f"--health-{others[0]}", parsed.value(f"health-{others[0]}"), "there is no command", "add --health-cmd COMMAND")
        return None
    found: dict[str, object] = {"command": ["sh", "-c", command]}
    for name in others:
        text = parsed.value(f"health-{name}")
        if name != "retries":
            found[f"{name.replace('-', '_')}_s"] = parse_duration(text)
        elif text.isascii() and text.isdigit() and len(text) < 10:
            found["retries"] = int(text)
        else:
            raise invalid("--health-retries", text, "want a number")
    return found


def labels(texts: list[str]) -> dict[str, str]:
    """Return labels of the form KEY[=VALUE].

    Raises:
        InvalidArgument: A key is empty.
    """
    found: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key:
            raise invalid("label", text, "want KEY=VALUE or KEY")
        found[key] = value
    return found


def moment_ns(text: str, now_ns: int) -> int:
    """Return a moment in nanoseconds since the epoch.

    Args:
        text: "10m" (so long ago), an ISO 8601 time (without a zone: this machine's), or seconds since 1970.
        now_ns: The present.

    Raises:
        InvalidArgument: It is none of these.
    """
    if text.replace(".", "", 1).isdigit() and text.isascii() and len(text) < 24:
        return int(float(text) * 1e9)
    if text[-1:] in ("s", "m", "h"):
        return max(0, now_ns - int(parse_duration(text) * 1e9))
    from datetime import datetime

    try:
        return max(0, int(datetime.fromisoformat(text).timestamp() * 1e9))
    except (ValueError, OverflowError, OSError):
        raise invalid("time", text, "want 10m, 2026-11-20T08:00:00Z, or seconds since 1970") from None
