"""cAdvisor's view: the families container_* that dashboards for Kubernetes ask for, of sandboxes and of isopod's own containers.

Two steps: `measure` turns what a guest says into figures with cAdvisor's names and units, `families_of` writes them with their labels.
`families` does both. Rates (`rates`) and the kubelet's short list (`resource`) are made of the same figures.

What is told, and at which level:

- Pod level (container="", image="", name = the sandbox): everything. CPU, memory and disks are those of the whole guest, its kernel and
  agent included: what the sandbox costs.
- Container level (the real name and image): what the pod's runtime counts of each container (`Inner`): CPU, memory, page faults, what is
  written to its own layer; and when it was made. Of a pod with exactly one container the guest's figures stand there too, where the runtime
  tells none. With several containers a guest does not say which of them did what. Queries that select container!="" (as the
  kubernetes-mixin does) find these, queries that select container="" the pod's; none finds both.
- Network is the pod's, as the kubelet has it, with the interface's name.

Rules: what is not known is left out (`figures`). Counters are typed as counters, though Kata types everything as a gauge. Not here, since
nobody tells it: container_tasks_state, container_ulimits_soft, container_sockets, pressure, a guest's throttling; nor machine_*, which is
the kubelet's.
A container's CPU time is counted by one of both for all of its life: a series that changed over would seem to begin anew (`COUNTERS`).
container_fs_inodes_used is called after the kubelet's name for volumes: cAdvisor has none for it.
Source: cAdvisor's table of Prometheus metrics.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, Literal, NamedTuple

from isopod.pulse.figures import LAST_SEEN, MILLISECOND_S, STARTED, WANTED, Figures, measure, measure_local
from isopod.pulse.labels import block
from isopod.pulse.model import Container, Families, Fragment, Kind, Labels, LocalContainer, Pod, Runtime, Values

__all__ = [
    "COUNTERS",
    "FAMILIES",
    "GROUPS",
    "OF_RUNTIME",
    "WANTED",
    "WHOLE",
    "Blocks",
    "Group",
    "Inner",
    "Part",
    "Shape",
    "Told",
    "blocks_of",
    "cadvisor_labels",
    "container_labels",
    "families",
    "families_of",
    "last_seen",
    "local_families",
    "measure",
    "measure_local",
    "number",
    "shape_without",
]

Group = Literal["cpu", "memory", "network", "disk", "process", "spec", "time"]

Part = Literal[Group, "containers"]
"""What can be left out: a group, or the series at container level."""

GROUPS: Final[tuple[Group, ...]] = ("cpu", "memory", "network", "disk", "process", "spec", "time")


class Shape(NamedTuple):
    """How much is shown.

    Args:
        groups: Which groups of families. Where the kubelet's own series of the same pods cannot be told apart by their job, one leaves out
            what it fills itself ("cpu" and "memory", from the host's cgroups).
        containers: Whether containers have series of their own.
    """

    groups: tuple[Group, ...] = GROUPS
    containers: bool = True


WHOLE: Final = Shape()


def shape_without(parts: Sequence[Part]) -> Shape:
    """Return what is shown when some parts are left out."""
    return Shape(tuple(group for group in GROUPS if group not in parts), containers="containers" not in parts)


class Told(NamedTuple):
    """What is said about a family, and whether a pod's only container has the guest's figures of it too."""

    group: Group
    kind: Kind
    help: bytes
    inner: bool = False


FAMILIES: Final[Mapping[str, Told]] = {
    "container_cpu_cfs_periods_total": Told(
        "cpu", "counter", b"Periods in which it ran, of those its CPU limit is counted over.", inner=True
    ),
    "container_cpu_cfs_throttled_periods_total": Told("cpu", "counter", b"Periods in which its CPU limit held it up.", inner=True),
    "container_cpu_cfs_throttled_seconds_total": Told("cpu", "counter", b"Time its CPU limit held it up, in seconds.", inner=True),
    "container_cpu_load_average_10s": Told("cpu", "gauge", b"Runnable tasks of the guest, averaged over one minute, times 1000."),
    "container_cpu_system_seconds_total": Told("cpu", "counter", b"CPU time spent in the kernel, in seconds.", inner=True),
    "container_cpu_usage_seconds_total": Told("cpu", "counter", b"CPU time used, in seconds.", inner=True),
    "container_cpu_user_seconds_total": Told("cpu", "counter", b"CPU time spent outside of the kernel, in seconds.", inner=True),
    "container_file_descriptors": Told("process", "gauge", b"Open files of the sandbox's processes on the host."),
    "container_fs_inodes_used": Told("disk", "gauge", b"Files and folders in the container's own layer."),
    "container_fs_io_current": Told("disk", "gauge", b"Operations under way.", inner=True),
    "container_fs_io_time_seconds_total": Told("disk", "counter", b"Time with operations under way, in seconds.", inner=True),
    "container_fs_io_time_weighted_seconds_total": Told("disk", "counter", b"The same, times the operations, in seconds.", inner=True),
    "container_fs_read_seconds_total": Told("disk", "counter", b"Time spent reading, in seconds.", inner=True),
    "container_fs_reads_bytes_total": Told("disk", "counter", b"Bytes read.", inner=True),
    "container_fs_reads_total": Told("disk", "counter", b"Reads completed.", inner=True),
    "container_fs_usage_bytes": Told("disk", "gauge", b"Bytes that the container's own layer takes."),
    "container_fs_write_seconds_total": Told("disk", "counter", b"Time spent writing, in seconds.", inner=True),
    "container_fs_writes_bytes_total": Told("disk", "counter", b"Bytes written.", inner=True),
    "container_fs_writes_total": Told("disk", "counter", b"Writes completed.", inner=True),
    "container_last_seen": Told("time", "gauge", b"When figures came last, in seconds since 1970."),
    "container_memory_cache": Told("memory", "gauge", b"Bytes of page cache and buffers.", inner=True),
    "container_memory_failures_total": Told("memory", "counter", b"Page faults.", inner=True),
    "container_memory_mapped_file": Told("memory", "gauge", b"Bytes of files mapped into memory.", inner=True),
    "container_memory_rss": Told("memory", "gauge", b"Bytes of anonymous memory.", inner=True),
    "container_memory_swap": Told("memory", "gauge", b"Bytes swapped out.", inner=True),
    "container_memory_usage_bytes": Told("memory", "gauge", b"Memory in use, page cache included.", inner=True),
    "container_memory_working_set_bytes": Told("memory", "gauge", b"Memory in use that is not given back easily.", inner=True),
    "container_network_receive_bytes_total": Told("network", "counter", b"Bytes received."),
    "container_network_receive_errors_total": Told("network", "counter", b"Packets received that were damaged."),
    "container_network_receive_packets_dropped_total": Told("network", "counter", b"Packets received that were dropped."),
    "container_network_receive_packets_total": Told("network", "counter", b"Packets received."),
    "container_network_transmit_bytes_total": Told("network", "counter", b"Bytes sent."),
    "container_network_transmit_errors_total": Told("network", "counter", b"Packets that could not be sent."),
    "container_network_transmit_packets_dropped_total": Told("network", "counter", b"Packets dropped before they were sent."),
    "container_network_transmit_packets_total": Told("network", "counter", b"Packets sent."),
    "container_oom_events_total": Told("memory", "counter", b"Processes killed for want of memory.", inner=True),
    "container_processes": Told("process", "gauge", b"Processes."),
    "container_spec_cpu_period": Told("spec", "gauge", b"Over which the CPU limit is counted, in microseconds.", inner=True),
    "container_spec_cpu_quota": Told("spec", "gauge", b"CPU time allowed in each period, in microseconds.", inner=True),
    "container_spec_memory_limit_bytes": Told("spec", "gauge", b"Memory it may use; a guest's whole memory. 0 is no limit."),
    "container_start_time_seconds": Told("time", "gauge", b"When it was started, in seconds since 1970.", inner=True),
    "container_threads": Told("process", "gauge", b"Threads, those of a guest's kernel included."),
    "container_threads_max": Told("process", "gauge", b"Threads it may have; 0 is no limit."),
}
"""All families there are, in the order of their names."""

OF_RUNTIME: Final = frozenset(
    (
        "container_cpu_usage_seconds_total",
        "container_memory_failures_total",
        "container_memory_rss",
        "container_memory_usage_bytes",
        "container_memory_working_set_bytes",
    )
)
"""What a runtime tells of a container of which it tells anything: the guest's figures do not stand in for these, even if one is missing."""
COUNTERS: Final = frozenset(("container_cpu_usage_seconds_total", "container_memory_failures_total"))
"""Those of them that only grow: one source counts them for all of a container's life, and not always the runtime (`Inner`)."""
_STARTED: Final = frozenset((STARTED,))
_STARTED_AND_ALL: Final = _STARTED | OF_RUNTIME
_STARTED_AND_GAUGES: Final = _STARTED_AND_ALL - COUNTERS
_NOTHING: Final[frozenset[str]] = frozenset()
_NO_FIGURES: Final[Figures] = {}
_PODS_CONTAINERS_MAX: Final = 256
"""Of one pod: those beyond have no series of their own."""


class Inner(NamedTuple):
    """What the runtime says of a sandbox's containers.

    Args:
        figures: By the id of a container.
        is_whole: Whether the runtime's word alone counts for the families of `OF_RUNTIME`.
        by_guest: Whether `COUNTERS` of the only container are the guest's even so.
    """

    figures: Mapping[str, Figures]
    is_whole: bool
    by_guest: bool = False


class Blocks(NamedTuple):
    """The labels of a sandbox and its containers as they stand in lines: made once, for they seldom change.

    Args:
        pod: Whose the sandbox is.
        outer: At pod level.
        copy: Of the pod's only container, "" if it has none or several, or one of which the runtime does not tell the name.
        containers: Of each container that can be told from the others.
    """

    pod: Pod | None
    outer: str
    copy: str
    containers: tuple[tuple[Container, str], ...]


class _Row(NamedTuple):
    """What is needed of a family to write it."""

    name: str
    begin: str
    kind: Kind
    help: bytes
    inner: bool


@lru_cache(1 << len(GROUPS))
def _rows(groups: tuple[Group, ...]) -> tuple[_Row, ...]:
    return tuple(_Row(name, f"{name}{{", told.kind, told.help, told.inner) for name, told in FAMILIES.items() if told.group in groups)


def cadvisor_labels(identifier: str, pod: Pod | None) -> Labels:
    """Return the labels at pod level. They stand first in each line, as one block.

    Args:
        identifier: The sandbox.
        pod: Whose it is; None while nobody has said.
    """
    return _labels(identifier, pod, container="", image="")


def families(
    values: Values,
    identifier: str,
    pod: Pod | None,
    runtime: Runtime,
    *,
    cpu_unit_s: float = MILLISECOND_S,
    now_ns: int = 0,
    shape: Shape = WHOLE,
) -> Families:
    """Return a sandbox's families.

    Args:
        values: What the reader found of `WANTED`.
        identifier: The sandbox.
        pod: Whose it is; None while nobody has said.
        runtime: Who serves the figures; only old shims in Go may count CPU time in anything but milliseconds.
        cpu_unit_s: In what the guest counts CPU time, in seconds (`cpu_units`).
        now_ns: When the figures came, since 1970; 0 leaves container_last_seen out.
        shape: How much is shown.
    """
    figures = measure(values, cpu_unit_s=cpu_unit_s if runtime == "go" else MILLISECOND_S)
    return families_of(figures, identifier, pod, now_ns=now_ns, shape=shape)


def local_families(container: LocalContainer, *, now_ns: int = 0, shape: Shape = WHOLE) -> Families:
    """Return the families of a container that has no shim. It is a pod of one container.

    Args:
        container: Its figures.
        now_ns: When they came, since 1970; 0 leaves container_last_seen out.
        shape: How much is shown.
    """
    return families_of(measure_local(container), container.id, container.pod, now_ns=now_ns, shape=shape)


def families_of(
    figures: Figures,
    identifier: str,
    pod: Pod | None,
    *,
    now_ns: int = 0,
    shape: Shape = WHOLE,
    inner: Inner | None = None,
    blocks: Blocks | None = None,
) -> Families:
    """Write figures.

    Args:
        figures: What was measured.
        identifier: The sandbox.
        pod: Whose it is; None while nobody has said.
        now_ns: When the figures came, since 1970; 0 leaves container_last_seen out.
        shape: How much is shown.
        inner: What the runtime says of the containers.
        blocks: The labels, if they are made already.

    Returns:
        By name, in the order of names. Empty if nothing was measured.
    """
    if not figures:
        return {}
    outer, copy, more = _levels(blocks or blocks_of(identifier, pod), shape, inner)
    is_local = pod is not None and pod.source == "isopod"
    uncopied = _NOTHING if is_local else _uncopied(inner)
    figures = {**figures, **_times(pod, now_ns)}
    found: Families = {}
    for name, begin, kind, told, is_inner in _rows(shape.groups):
        samples = figures.get(name, ())
        lines = more.get(name) if more else None
        if not samples and lines is None:
            continue
        is_copied = is_inner and copy and lines is None and name not in uncopied
        text, n = "", 0
        for extra, value in samples:
            # As `number`, without its call: this is done fifty times for each sandbox and round.
            shown: float = int(value) if value < 1e15 else float(value)
            if shown != value:
                shown = value
            if is_copied:
                text += f"{begin}{outer}{extra}}} {shown}\n{begin}{copy}{extra}}} {shown}\n"
                n += 2
            else:
                text += f"{begin}{outer}{extra}}} {shown}\n"
                n += 1
        if lines is not None:
            text += "".join(lines)
            n += len(lines)
        found[name] = Fragment(kind, told, text.encode(), n)
    return found


def last_seen(
    identifier: str, pod: Pod | None, now_ns: int, *, shape: Shape = WHOLE, inner: Inner | None = None, blocks: Blocks | None = None
) -> Fragment:
    """Return container_last_seen alone, for a sandbox whose figures came again unchanged. Arguments as of `families_of`."""
    only = shape._replace(groups=("time",))
    return families_of({"": ()}, identifier, pod, now_ns=now_ns, shape=only, inner=inner, blocks=blocks)[LAST_SEEN]


def blocks_of(identifier: str, pod: Pod | None) -> Blocks:
    """Return the labels of a sandbox and its containers.

    Args:
        identifier: The sandbox.
        pod: Whose it is; None while nobody has said.
    """
    outer = block(cadvisor_labels(identifier, pod)).decode()
    if pod is None:
        return Blocks(pod, outer, "", ())
    every = [(each, block(container_labels(identifier, pod, each)).decode()) for each in pod.containers[:_PODS_CONTAINERS_MAX] if each.name]
    copy = every[0][1] if every and len(pod.containers) == 1 else ""
    return Blocks(pod, outer, copy, tuple((each, labels) for each, labels in every if each.id))


def container_labels(identifier: str, pod: Pod, container: Container) -> Labels:
    """Return the labels at container level: as those at pod level, they stand first in each line.

    Args:
        identifier: The sandbox.
        pod: Whose it is.
        container: One of the pod's.
    """
    return _labels(container.id or identifier, pod, container=container.name, image=container.image)


def number(value: float) -> str:
    """Return a figure as it is written: whole ones without a point."""
    return str(int(value)) if value < 1e15 and value == int(value) else repr(float(value))


def _uncopied(inner: Inner | None) -> frozenset[str]:
    """Return the families of which a pod's only container does not have the guest's figures."""
    if inner is None or not inner.is_whole:
        return _STARTED
    return _STARTED_AND_GAUGES if inner.by_guest else _STARTED_AND_ALL


def _levels(blocks: Blocks, shape: Shape, inner: Inner | None) -> tuple[str, str, dict[str, list[str]]]:
    """Return the labels at pod level, those of a container that shares the pod's figures, and by family the lines of the others' own."""
    more: dict[str, list[str]] = {}
    if not shape.containers:
        return blocks.outer, "", more
    for container, labels in blocks.containers:
        if container.created_ns:
            more.setdefault(STARTED, []).append(f"{STARTED}{{{labels}}} {number(container.created_ns / 1e9)}\n")
        if inner is not None:
            for name, samples in inner.figures.get(container.id, _NO_FIGURES).items():
                more.setdefault(name, []).extend(f"{name}{{{labels}{extra}}} {number(value)}\n" for extra, value in samples)
    return blocks.outer, blocks.copy, more


def _times(pod: Pod | None, now_ns: int) -> Figures:
    """Return what the runtime and the clock say.

    A CRI's sandbox is made once and never started again, so that its creation is its start, as a container's is. A node's container begins
    with each start, which its figures say.
    """
    times: Figures = {}
    if pod is not None and pod.created_ns and pod.source == "cri":
        times[STARTED] = (("", pod.created_ns / 1e9),)
    if now_ns:
        times[LAST_SEEN] = (("", round(now_ns / 1e9, 3)),)
    return times


def _labels(identifier: str, pod: Pod | None, *, container: str, image: str) -> Labels:
    if pod is None:
        place, namespace, name = f"/{identifier}", "", ""
    else:
        place = f"/isopod/{identifier}" if pod.source == "isopod" else f"/kubepods/pod{pod.uid}/{identifier}"
        namespace, name = pod.namespace, pod.name
    return (
        ("container", container),
        ("id", place),
        ("image", image),
        ("name", identifier),
        ("namespace", namespace),
        ("pod", name),
    )
