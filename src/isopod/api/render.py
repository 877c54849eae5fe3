"""How answers look on a terminal: each listing as a table of columns, everything as JSON.

Rendering is the node's work, so that the lean command line imports no tables. Data only: no colours, readable without any.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from isopod.api import cluster, machines, methods
from isopod.api import messages as m
from isopod.world.errors import InvalidArgument
from isopod.world.ids import short
from isopod.world.units import format_age, format_size

Format = Literal["table", "json"]
Column = tuple[str, Callable[[Any, float], str]]
"""A heading, and a cell from (row, wall time in seconds)."""
_COMMAND_CHARS_MAX: Final = 30
_NS: Final = 1_000_000_000


def container_status(record: m.Container, now_s: float) -> str:
    """Return a container's state in words: "Up 3 minutes (healthy)", "Exited (137, out of memory) 2 hours ago"."""
    if record.status in ("running", "paused") and record.started_at_ns is not None:
        suffix = " (paused)" if record.status == "paused" else f" ({record.health})" if record.health != "none" else ""
        return f"Up {format_age(now_s - record.started_at_ns / _NS)}{suffix}"
    if record.status in ("exited", "unknown"):
        ended = f" {format_age(now_s - record.finished_at_ns / _NS)} ago" if record.finished_at_ns is not None else ""
        oom = ", out of memory" if record.oom_killed else ""
        word = "Exited" if record.status == "exited" else "Unknown"
        return f"{word} ({record.exit_code}{oom}){ended}"
    return record.status.capitalize()


def _command(record: m.Container, _: float) -> str:
    text = "".join(c if c.isprintable() else "?" for c in " ".join(record.command))
    return text if len(text) <= _COMMAND_CHARS_MAX else text[: _COMMAND_CHARS_MAX - 1] + "…"


def _ago(created_at_ns: int, now_s: float) -> str:
    return f"{format_age(now_s - created_at_ns / _NS)} ago"


def _size_of(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else format_size(n_bytes)


CONTAINERS: Final[tuple[Column, ...]] = (
    ("ID", lambda r, _: short(r.id)),
    ("NAME", lambda r, _: r.name),
    ("PID", lambda r, _: str(r.pid) if r.pid else "-"),
    ("COMMAND", _command),
    ("STATUS", container_status),
    ("IMAGE", lambda r, _: r.image),
)
IMAGES: Final[tuple[Column, ...]] = (
    ("NAME", lambda r, _: ", ".join(r.names) or "-"),
    ("ID", lambda r, _: short(r.id)),
    ("CREATED", lambda r, now: _ago(r.created_at_ns, now)),
    ("LAYERS", lambda r, _: str(len(r.layers))),
    ("SIZE", lambda r, _: format_size(r.size_bytes)),
)
NETWORKS: Final[tuple[Column, ...]] = (
    ("NAME", lambda r, _: r.name),
    ("DRIVER", lambda r, _: r.driver),
    ("SUBNET", lambda r, _: r.subnet or "-"),
    ("GATEWAY", lambda r, _: r.gateway or "-"),
    ("BRIDGE", lambda r, _: r.bridge or "-"),
    ("USED", lambda r, _: str(r.addresses_used)),
)
TASKS: Final[tuple[Column, ...]] = (
    ("TASK", lambda r, _: r.name),
    ("GROUP", lambda r, _: r.group),
    ("STATE", lambda r, _: r.state),
    ("AGE", lambda r, _: "-" if r.age_s is None else format_age(r.age_s)),
    ("AWAITS", lambda r, _: r.awaits or "-"),
    ("IN", lambda r, _: r.function),
    ("AT", lambda r, _: "/".join(r.location.rsplit("/", 2)[-2:]) or "-"),
)
USAGE: Final[tuple[Column, ...]] = (
    ("ID", lambda r, _: short(r.id)),
    ("NAME", lambda r, _: r.name),
    ("STATUS", lambda r, _: r.status),
    ("MEMORY", lambda r, _: _size_of(r.memory_bytes)),
    ("LIMIT", lambda r, _: _size_of(r.memory_bytes_max)),
    ("CPU TIME", lambda r, _: "-" if r.cpu_ns is None else f"{r.cpu_ns / _NS:.2f}s"),
    ("CPUS", lambda r, _: "-" if r.cpus is None else f"{r.cpus:g}"),
    ("PIDS", lambda r, _: "-" if r.n_pids is None else str(r.n_pids)),
    ("LIMIT", lambda r, _: "-" if r.pids_max is None else str(r.pids_max)),
)
MEMBERS: Final[tuple[Column, ...]] = (
    ("ID", lambda r, _: str(r.id)),
    ("ADDRESS", lambda r, _: r.address or "-"),
    ("ROLE", lambda r, _: r.role if r.role == r.wanted_role else f"{r.role} (wants {r.wanted_role})"),
    ("STATE", lambda r, _: "leaving" if r.is_leaving else r.state),
    ("HEALTH", lambda r, _: r.health),
    ("BEHIND", lambda r, _: "-" if r.entries_behind is None else str(r.entries_behind)),
    ("HEARD", lambda r, _: "-" if r.silent_s is None else f"{r.silent_s:.1f}s ago"),
    ("VERSION", lambda r, _: r.version or "-"),
)
TOKENS: Final[tuple[Column, ...]] = (
    ("ID", lambda r, _: r.id),
    ("USABLE", lambda r, _: "yes" if r.is_usable else "revoked" if r.is_revoked else "no"),
    ("USES LEFT", lambda r, _: f"{r.uses_left} of {r.uses}"),
    ("EXPIRES", lambda r, now: f"in {format_age(r.expires_at_ns / _NS - now)}" if r.expires_at_ns / _NS > now else "expired"),
    ("FOR", lambda r, _: r.role),
)
_LISTS: Final[dict[str, tuple[str, tuple[Column, ...]]]] = {
    methods.CONTAINER_LIST.name: ("containers", CONTAINERS),
    methods.CONTAINER_STATS.name: ("containers", USAGE),
    methods.IMAGE_LIST.name: ("images", IMAGES),
    methods.NETWORK_LIST.name: ("networks", NETWORKS),
    methods.SYSTEM_TASKS.name: ("tasks", TASKS),
    cluster.MEMBERS.name: ("nodes", MEMBERS),
    cluster.TOKEN_LIST.name: ("tokens", TOKENS),
}
_FACTS: Final = (methods.SYSTEM_INFO.name, methods.SYSTEM_USAGE.name, methods.SYSTEM_VERSION.name)


def render(method: str, reply: msgspec.Struct, *, form: Format, now_s: float) -> str:
    """Return the answer of a method as text.

    Args:
        method: Whose answer it is.
        reply: The answer.
        form: "table" for people (JSON where there is no table), "json" for programs.
        now_s: Wall time, for ages.
    """
    if form not in ("table", "json"):
        raise InvalidArgument("format", form, "want table or json")
    listing = _LISTS.get(method)
    if listing is not None:
        rows = getattr(reply, listing[0])
        return table(listing[1], rows, now_s) if form == "table" else as_json(rows)
    if form == "table" and isinstance(reply, cluster.ClusterStatus):
        return _cluster_status(reply, now_s)
    if form == "table" and isinstance(reply, machines.VmState):
        return _vm_state(reply, now_s)
    if form == "table" and isinstance(reply, m.NodeInfo):
        return facts(msgspec.to_builtins(reply) | {"drivers": _drivers(reply.drivers) or None})
    if form == "table" and method in _FACTS:
        return facts(msgspec.to_builtins(reply))
    return as_json(reply)


def _cluster_status(status: cluster.ClusterStatus, now_s: float) -> str:
    """Return a cluster's state as facts and a table of its nodes."""
    survives = "no leader can decide now" if status.failures_survived < 0 else f"{status.failures_survived} more failures"
    lines = [
        f"cluster: {status.cluster_id or '-'}\n",
        f"this node: {status.node_id} ({status.state})\n",
        f"leader id: {status.leader_id or '-'}{f' at {status.leader_address}' if status.leader_address else ''}\n",
        f"term: {status.term}\n",
        f"voters: {len(status.voters)} of at most {status.voters_max}, survives {survives}\n",
        f"commit: {status.commit}, applied: {status.applied}, digest: {status.digest or '-'}\n",
    ]
    if status.why:
        lines.append(f"why: {status.why}\n")
    return "".join(lines) + "nodes:\n" + table(MEMBERS, status.nodes, now_s)


def _vm_state(state: machines.VmState, now_s: float) -> str:
    """Return what a virtual machine is and does as facts."""
    record = state.container
    vm = record.vm
    told: dict[str, Any] = {"name": record.name, "id": record.id, "status": container_status(record, now_s), "machine": state.machine}
    if vm is not None:
        told |= {"driver": vm.driver, "vcpus": vm.vcpus, "memory_bytes": vm.memory_bytes, "disk_bytes": vm.disk_bytes}
    told |= {
        "made of": (vm.config if vm is not None else "") or record.image,
        "accelerator": record.accelerator or None,
        "started from": record.origin or None,
        "address": record.network.ip_address,
        "guest kernel": state.guest_kernel,
        "agent": state.agent,
        "guest last heard": None if state.silent_s is None else f"{state.silent_s:.1f} s ago",
        "snapshots": ", ".join(snapshot.name for snapshot in state.snapshots) or None,
        "why": state.why or None,
    }
    return facts(told)


def _drivers(drivers: Sequence[m.DriverFacts]) -> dict[str, Any]:
    """Return the drivers as facts."""
    words = {True: "works", False: "does not work here", None: "not known yet"}
    return {driver.name: {"value": words[driver.works], "why": driver.why} for driver in drivers}


def table(columns: Sequence[Column], rows: Sequence[Any], now_s: float) -> str:
    """Return lines of aligned columns, two spaces apart, with a heading."""
    cells = [[heading for heading, _ in columns], *([cell(row, now_s) for _, cell in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "".join(line + "\n" for line in lines)


def facts(values: dict[str, Any], indent: str = "") -> str:
    """Return "key: value" lines; what was probed carries its reason in brackets."""
    lines = []
    for key, value in values.items():
        label = indent + key.replace("_", " ")
        if isinstance(value, dict) and value.keys() == {"value", "why"}:
            lines.append(f"{label}: {value['value']} ({value['why']})\n")
        elif isinstance(value, dict):
            lines.append(f"{label}:\n{facts(value, indent + '  ')}")
        else:
            lines.append(_fact(indent, key, value))
    return "".join(lines)


def _fact(indent: str, key: str, value: Any) -> str:
    """Return one line; times and sizes in the form people read, their unit gone from the label."""
    if value is None:
        return f"{indent}{key.replace('_', ' ')}: none\n"
    if key.endswith("_at_ns"):
        when = datetime.fromtimestamp(value / _NS, UTC)
        return f"{indent}{key.removesuffix('_at_ns').replace('_', ' ')}: {when:%Y-%m-%d %H:%M:%S} UTC\n"
    if key.endswith("_bytes"):
        return f"{indent}{key.removesuffix('_bytes').replace('_', ' ')}: {format_size(value)}\n"
    if key.endswith("_ns"):
        return f"{indent}{key.removesuffix('_ns').replace('_', ' ')}: {value / _NS:.2f} s\n"
    return f"{indent}{key.replace('_', ' ')}: {value}\n"


def as_json(value: Any) -> str:
    """Return indented JSON with a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
