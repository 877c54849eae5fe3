"""Figures: what a guest says of itself, and a runtime of a container, with cAdvisor's names and units. Their text is `cadvisor`'s.

Rules: a figure of which one part is missing, or cannot be true (negative, wrapped around, more free than there is), is left out: nothing is
made up, and zero is a figure. Only the guest's own figures count: a stand-in from the host (the hypervisor's process) would make counters
jump when the agent in the guest fails for one round.
Source: procfs as Kata's agent reads it: milliseconds (CPU and disks), bytes (memory), sectors of 512 bytes. The CRI's ListContainerStats:
nanoseconds and bytes.
"""

from collections.abc import Mapping
from typing import Final

from isopod.pulse.labels import escaped
from isopod.pulse.model import ContainerStats, LocalContainer, Values

Figures = dict[str, tuple[tuple[str, float], ...]]
"""By family: what stands behind the labels that all its series have (begins with a comma, or is empty), and the figure."""

MILLISECOND_S: Final = 0.001
WRAPPED_MIN: Final = 1.8e19
"""From here on a figure is a negative number that somebody took for an unsigned one."""
SECTOR_BYTES: Final = 512
CPU_PERIOD_US: Final = 100_000
STARTED: Final = "container_start_time_seconds"
LAST_SEEN: Final = "container_last_seen"

WANTED: Final[Mapping[str, tuple[str, ...]]] = {
    "kata_guest_cpu_time": ("cpu", "item"),
    "kata_guest_diskstat": ("disk", "item"),
    "kata_guest_load": ("item",),
    "kata_guest_meminfo": ("item",),
    "kata_guest_netdev_stat": ("interface", "item"),
    "kata_guest_tasks": ("item",),
    "kata_guest_vm_stat": ("item",),
    "kata_hypervisor_fds": (),
    "kata_shim_agent_answers": (),
    "kata_shim_fds": (),
    "kata_shim_process_start_time_seconds": (),
    "kata_virtiofsd_fds": (),
}
"""What `measure` needs of a shim's text: families after renaming, and their labels."""
_MEMORY_ITEMS: Final = {
    "container_memory_mapped_file": ("mapped",),
    "container_memory_rss": ("anon_pages",),
    "container_spec_memory_limit_bytes": ("mem_total",),
}
_IN_USE: Final = (("mem_total",), ("mem_free",), ("inactive_file",))
_CACHE_AND_SWAP: Final = (("cached",), ("buffers",), ("swap_total",), ("swap_free",))
_NETWORK_ITEMS: Final = {
    "recv_bytes": "container_network_receive_bytes_total",
    "recv_packets": "container_network_receive_packets_total",
    "recv_errs": "container_network_receive_errors_total",
    "recv_drop": "container_network_receive_packets_dropped_total",
    "sent_bytes": "container_network_transmit_bytes_total",
    "sent_packets": "container_network_transmit_packets_total",
    "sent_errs": "container_network_transmit_errors_total",
    "sent_drop": "container_network_transmit_packets_dropped_total",
}
_DISK_ITEMS: Final = {
    "reads": ("container_fs_reads_total", 1),
    "sectors_read": ("container_fs_reads_bytes_total", SECTOR_BYTES),
    "time_reading": ("container_fs_read_seconds_total", MILLISECOND_S),
    "writes": ("container_fs_writes_total", 1),
    "sectors_written": ("container_fs_writes_bytes_total", SECTOR_BYTES),
    "time_writing": ("container_fs_write_seconds_total", MILLISECOND_S),
    "in_progress": ("container_fs_io_current", 1),
    "time_in_progress": ("container_fs_io_time_seconds_total", MILLISECOND_S),
    "weighted_time_in_progress": ("container_fs_io_time_weighted_seconds_total", MILLISECOND_S),
}
_DETAILS: Final = {
    "container_memory_working_set_bytes": "working_set_bytes",
    "container_memory_rss": "rss_bytes",
    "container_memory_cache": "cache_bytes",
    "container_memory_swap": "swap_bytes",
    "container_oom_events_total": "n_oom_kills",
}
"""Fields of `LocalDetails`."""
_THROTTLING: Final = {
    "container_cpu_cfs_periods_total": "n_periods",
    "container_cpu_cfs_throttled_periods_total": "n_throttled_periods",
    "container_cpu_cfs_throttled_seconds_total": "throttled_s",
}
_LOCAL_NETWORK: Final = {
    "container_network_receive_bytes_total": "received_bytes",
    "container_network_receive_errors_total": "receive_errors",
    "container_network_receive_packets_dropped_total": "receive_drops",
    "container_network_receive_packets_total": "received_packets",
    "container_network_transmit_bytes_total": "sent_bytes",
    "container_network_transmit_errors_total": "send_errors",
    "container_network_transmit_packets_dropped_total": "send_drops",
    "container_network_transmit_packets_total": "sent_packets",
}
_LOCAL_DISKS: Final = {
    "container_fs_reads_bytes_total": "read_bytes",
    "container_fs_reads_total": "reads",
    "container_fs_writes_bytes_total": "written_bytes",
    "container_fs_writes_total": "writes",
}
_FAULTS: Final = (("pgfault",), ("pgmajfault",))
_OOM_KILLS: Final = ("oom_kill",)
_TASKS: Final = ("max",)
_RUNNABLE: Final = ("cur",)
_LOAD: Final = ("load1",)
_FAULT_LABELS: Final = tuple(f',failure_type="{item}",scope="{scope}"' for (item,) in _FAULTS for scope in ("container", "hierarchy"))
_CONTAINER_FAULTS: Final = ((_FAULT_LABELS[0], "page_faults"), (_FAULT_LABELS[2], "major_page_faults"))
_COUNTERS: Final = ("cpu_ns", "page_faults", "major_page_faults")
"""Fields of `ContainerStats` that only grow."""
_STATS_GAUGES: Final = {
    "container_memory_rss": "rss_bytes",
    "container_memory_swap": "swap_bytes",
    "container_memory_usage_bytes": "usage_bytes",
    "container_memory_working_set_bytes": "working_set_bytes",
}
_STATS_FIELDS: Final = ContainerStats._fields[1:-1]
_STATS_DISKS: Final = {"container_fs_inodes_used": "written_inodes", "container_fs_usage_bytes": "written_bytes"}
_CPU_TOTAL: Final = ',cpu="total"'
_INTERNAL_INTERFACES: Final = ("lo", "veth", "docker", "br-", "cni", "virbr", "dummy", "sit", "tunl", "ip6tnl", "gre", "erspan", "tap")
"""Beginnings of names of interfaces that carry nothing into or out of the pod, or carry it once more."""
_INTERNAL_DISKS: Final = ("loop", "ram", "zram")
_Rows = tuple[tuple[tuple[str, ...], float], ...]
_Items = dict[tuple[str, ...], float]


def measure(values: Values, *, cpu_unit_s: float = MILLISECOND_S) -> Figures:
    """Return a guest's figures with cAdvisor's names and units.

    Args:
        values: What the reader found of `WANTED`.
        cpu_unit_s: In what the guest counts CPU time, in seconds.
    """
    figures: Figures = {}
    _measure_cpu(values.get("kata_guest_cpu_time", ()), cpu_unit_s, figures)
    _measure_memory(dict(values.get("kata_guest_meminfo", ())), figures)
    _measure_faults(dict(values.get("kata_guest_vm_stat", ())), figures)
    _measure_network(values.get("kata_guest_netdev_stat", ()), figures)
    _measure_disks(values.get("kata_guest_diskstat", ()), figures)
    _measure_processes(values, figures)
    started_s = _single(values, "kata_shim_process_start_time_seconds")
    if started_s:
        figures[STARTED] = (("", started_s),)
    return figures


def measure_local(container: LocalContainer) -> Figures:
    """Return the figures of a container that has no shim."""
    figures: Figures = {
        "container_cpu_usage_seconds_total": ((_CPU_TOTAL, container.cpu_s),),
        "container_memory_usage_bytes": (("", container.memory_bytes),),
        "container_spec_memory_limit_bytes": (("", container.memory_limit_bytes),),
        STARTED: (("", container.started_ns / 1e9),),
        "container_threads": (("", container.n_processes),),
        "container_threads_max": (("", container.processes_max),),
    }
    shown: dict[str, str] = {}
    if container.details is not None:
        shown |= _DETAILS
    if container.cpus:  # without a limit nothing is ever throttled, nor is it counted
        figures["container_spec_cpu_period"] = (("", CPU_PERIOD_US),)
        figures["container_spec_cpu_quota"] = (("", round(container.cpus * CPU_PERIOD_US)),)
        if container.details is not None:
            shown |= _THROTTLING
    figures.update((name, (("", getattr(container.details, field)),)) for name, field in shown.items())
    interfaces = [(f',interface="{escaped(each.name)}"', each) for each in container.interfaces if not _is_internal(each.name)]
    devices = [(f',device="/dev/{escaped(each.name)}"', each) for each in container.devices if not each.name.startswith(_INTERNAL_DISKS)]
    if interfaces:
        for name, field in _LOCAL_NETWORK.items():
            figures[name] = tuple((label, getattr(each, field)) for label, each in interfaces)
    if devices:
        for name, field in _LOCAL_DISKS.items():
            figures[name] = tuple((label, getattr(each, field)) for label, each in devices)
    return figures


def measure_container(stats: ContainerStats, before: ContainerStats | None = None, *, seen_ns: int = 0) -> Figures:
    """Return the figures of a container of which its runtime tells.

    Args:
        stats: What it says.
        before: What it said before of the same container: what only grows and is less now is left out.
        seen_ns: When it said so, since 1970; 0 leaves container_last_seen out.
    """
    known = {name: value for name, value in zip(_STATS_FIELDS, stats[1:-1], strict=True) if value is not None and 0 <= value < WRAPPED_MIN}
    if before is not None:
        for name in _COUNTERS:
            last = getattr(before, name)
            if last is not None and name in known and known[name] < last < WRAPPED_MIN:
                del known[name]
    figures: Figures = {}
    if "cpu_ns" in known:
        figures["container_cpu_usage_seconds_total"] = ((_CPU_TOTAL, round(known["cpu_ns"] / 1e9, 9)),)
    faults = tuple((label, known[field]) for label, field in _CONTAINER_FAULTS if field in known)
    if faults:
        figures["container_memory_failures_total"] = faults
    for name, field in _STATS_GAUGES.items():
        if field in known:
            figures[name] = (("", known[field]),)
    if known.get("available_bytes") and "working_set_bytes" in known:  # what is left of a limit, and what is taken of it
        figures["container_spec_memory_limit_bytes"] = (("", known["available_bytes"] + known["working_set_bytes"]),)
    for name, field in _STATS_DISKS.items():
        if field in known:
            figures[name] = ((f',device="{escaped(stats.mountpoint)}"', known[field]),)
    if figures and seen_ns:
        figures[LAST_SEEN] = (("", round(seen_ns / 1e9, 3)),)
    return figures


def _nested(rows: _Rows) -> dict[str, dict[str, float]]:
    """Return figures by the first label, then the second."""
    found: dict[str, dict[str, float]] = {}
    last, items = None, {}
    for (first, second), value in rows:
        if 0 <= value < WRAPPED_MIN:
            if first != last:
                last, items = first, found.setdefault(first, {})
            items[second] = value
    return found


def _single(values: Values, name: str) -> float | None:
    rows = values.get(name)
    return rows[0][1] if rows and 0 <= rows[0][1] < WRAPPED_MIN else None


def _measure_cpu(rows: _Rows, unit_s: float, figures: Figures) -> None:
    """Time of guests in the guest is in user already, and waiting is not use; stolen time was wanted and is counted as used."""
    whole = {item: value for (cpu, item), value in rows if cpu == "total" and 0 <= value < WRAPPED_MIN}
    cpus = [whole] if whole else list(_nested(rows).values())
    if not cpus or any("user" not in each or "system" not in each for each in cpus):
        return
    user = system = stolen = 0.0
    for each in cpus:
        user += each["user"] + each.get("nice", 0)
        system += each["system"] + each.get("irq", 0) + each.get("softirq", 0)
        stolen += each.get("steal", 0)
    # Rounded, because a thousandth is no binary fraction: 1.234 and not 1.2340000000000002.
    figures["container_cpu_usage_seconds_total"] = ((_CPU_TOTAL, round((user + system + stolen) * unit_s, 3)),)
    figures["container_cpu_user_seconds_total"] = (("", round(user * unit_s, 3)),)
    figures["container_cpu_system_seconds_total"] = (("", round(system * unit_s, 3)),)


def _possible(items: _Items, key: tuple[str, ...]) -> float | None:
    """Return a figure, None if it is missing or cannot be true."""
    value = items.get(key)
    return value if value is not None and 0 <= value < WRAPPED_MIN else None


def _measure_memory(items: _Items, figures: Figures) -> None:
    if not items:
        return
    for name, key in _MEMORY_ITEMS.items():
        value = items.get(key)
        if value is not None and 0 <= value < WRAPPED_MIN:
            figures[name] = (("", value),)
    total, free, inactive = [_possible(items, key) for key in _IN_USE]
    if total is not None and free is not None and free <= total:
        figures["container_memory_usage_bytes"] = (("", total - free),)
        if inactive is not None:
            figures["container_memory_working_set_bytes"] = (("", max(0.0, total - free - inactive)),)
    cached, buffers, swap, swap_free = [_possible(items, key) for key in _CACHE_AND_SWAP]
    if cached is not None and buffers is not None:
        figures["container_memory_cache"] = (("", cached + buffers),)
    if swap is not None and swap_free is not None and swap_free <= swap:
        figures["container_memory_swap"] = (("", swap - swap_free),)


def _measure_faults(items: _Items, figures: Figures) -> None:
    """The guest is one hierarchy and one container, so that both scopes have the same figure, as at a leaf of the cgroups."""
    faults, major = _possible(items, _FAULTS[0]), _possible(items, _FAULTS[1])
    if faults is not None and major is not None:
        figures["container_memory_failures_total"] = tuple(zip(_FAULT_LABELS, (faults, faults, major, major), strict=True))
    kills = _possible(items, _OOM_KILLS)
    if kills is not None:
        figures["container_oom_events_total"] = (("", kills),)


def _measure_network(rows: _Rows, figures: Figures) -> None:
    for interface, items in _nested(rows).items():
        if _is_internal(interface):
            continue
        label = f',interface="{escaped(interface)}"'
        for item, name in _NETWORK_ITEMS.items():
            value = items.get(item)
            if value is not None:
                figures[name] = (*figures.get(name, ()), (label, value))


def _measure_disks(rows: _Rows, figures: Figures) -> None:
    disks = _nested(rows)
    for disk, items in disks.items():
        if disk.startswith(_INTERNAL_DISKS) or _is_partition(disk, disks):
            continue
        label = f',device="/dev/{escaped(disk)}"'
        for item, (name, factor) in _DISK_ITEMS.items():
            value = items.get(item)
            if value is not None:
                value = round(value * factor, 3) if factor < 1 else value * factor
                figures[name] = (*figures.get(name, ()), (label, value))


def _measure_processes(values: Values, figures: Figures) -> None:
    tasks: _Items = dict(values.get("kata_guest_tasks", ()))
    threads, runnable = _possible(tasks, _TASKS), _possible(tasks, _RUNNABLE)
    if threads is not None:  # of /proc/loadavg: all scheduling entities there are
        figures["container_threads"] = (("", threads),)
    # Kata's "cur" are the tasks that can run just now, which is no number of processes; isopod's shim (which tells of itself) has it there.
    if runnable is not None and "kata_shim_agent_answers" in values:
        figures["container_processes"] = (("", runnable),)
    load = _possible(dict(values.get("kata_guest_load", ())), _LOAD)
    if load is not None:
        figures["container_cpu_load_average_10s"] = (("", round(load * 1000, 3)),)
    opened = [_single(values, f"kata_{who}_fds") for who in ("hypervisor", "shim", "virtiofsd")]
    if opened[0] is not None and opened[1] is not None:  # a sandbox may have no virtiofsd, but has both of these
        figures["container_file_descriptors"] = (("", sum(each for each in opened if each is not None)),)


def _is_internal(interface: str) -> bool:
    return interface.startswith(_INTERNAL_INTERFACES)


def _is_partition(disk: str, disks: Mapping[str, object]) -> bool:
    """Tell whether a disk is a part of another one in the list, which has its figures already."""
    stem = disk.rstrip("0123456789")
    return stem != disk and (stem in disks or (stem.endswith("p") and stem[:-1] in disks))
