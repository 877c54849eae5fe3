"""Queries: which records pass a filter, in which order, and what they add up to. Pure, but for the measuring that is handed in.

Filters that need no measuring come first, so that the kernel is asked only about those that pass them. A name's filter is a part of the
name, or with `*` or `?` a pattern for all of it. A window's both ends count. Limits set and use measured are never mixed in one sum.
"""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from isopod.api.messages import Container, LimitSums, ListContainers, MeasuredSums
from isopod.api.usage import ContainerUsage, DeviceUsage, InterfaceUsage, UsageFigures
from isopod.engine.states import LIVE, STATUSES, parse_status
from isopod.world.kernel import CgroupFigures, CgroupUsage

Measure = Callable[[Container], CgroupUsage]
NOT_MEASURED: Final = CgroupUsage(None, None, None, None)


def select(records: Iterable[Container], request: ListContainers, measure: Measure) -> list[Container]:
    """Return the records that pass, sorted and limited as asked.

    Args:
        records: All of them.
        request: What is asked.
        measure: Measures the use of one that runs.

    Raises:
        InvalidArgument: A state's name is unknown.
    """
    statuses = [parse_status(text) for text in request.status]
    found = [record for record in records if _passes(record, request, statuses)]
    usage: dict[str, CgroupUsage] = {}
    if _needs_measuring(request):
        usage = {record.id: measure(record) for record in found}
        found = [record for record in found if _uses_enough(usage[record.id], request)]
    found.sort(key=lambda record: (-record.created_at_ns, record.id))
    if request.sort == "name":
        found.sort(key=lambda record: record.name)
    elif request.sort == "memory":
        found.sort(key=lambda record: -(usage[record.id].memory_bytes or 0))
    elif request.sort == "cpu":
        found.sort(key=lambda record: -(usage[record.id].cpu_usage_ns or 0))
    return found if request.limit is None else found[: request.limit]


def by_status(records: Iterable[Container]) -> dict[str, int]:
    """Return how many are in each state that occurs, in the order of the states."""
    counts = dict.fromkeys(STATUSES, 0)
    for record in records:
        counts[record.status] += 1
    return {str(status): n for status, n in counts.items() if n}


def sum_limits(records: Sequence[Container]) -> LimitSums:
    """Add up what records may use."""
    memory = [record.resources.memory_bytes_max for record in records]
    cpus = [record.resources.cpus for record in records]
    pids = [record.resources.pids_max for record in records]
    return LimitSums(
        memory_bytes=sum(limit for limit in memory if limit is not None),
        memory_unlimited=memory.count(None),
        cpus=sum(limit for limit in cpus if limit is not None),
        cpus_unlimited=cpus.count(None),
        pids=sum(limit for limit in pids if limit is not None),
        pids_unlimited=pids.count(None),
    )


def sum_usage(usages: Sequence[CgroupUsage]) -> MeasuredSums:
    """Add up what was measured."""
    return MeasuredSums(
        memory_bytes=sum(usage.memory_bytes or 0 for usage in usages),
        cpu_ns=sum(usage.cpu_usage_ns or 0 for usage in usages),
        pids=sum(usage.n_pids or 0 for usage in usages),
        unmeasured=sum(usage.memory_bytes is None and usage.cpu_usage_ns is None for usage in usages),
    )


def usage_of(record: Container, usage: CgroupUsage, figures: CgroupFigures | None = None) -> ContainerUsage:
    """Return use and limits of one, side by side."""
    return ContainerUsage(
        id=record.id,
        name=record.name,
        status=record.status,
        memory_bytes=usage.memory_bytes,
        memory_bytes_max=record.resources.memory_bytes_max,
        cpu_ns=usage.cpu_usage_ns,
        cpus=record.resources.cpus,
        n_pids=usage.n_pids,
        pids_max=record.resources.pids_max,
        figures=_figures_of(figures) if figures is not None else None,
    )


def _figures_of(found: CgroupFigures) -> UsageFigures:
    return UsageFigures(
        working_set_bytes=found.working_set_bytes,
        rss_bytes=found.rss_bytes,
        cache_bytes=found.cache_bytes,
        swap_bytes=found.swap_bytes,
        oom_kills=found.n_oom_kills,
        cpu_periods=found.n_periods,
        cpu_throttled_periods=found.n_throttled_periods,
        cpu_throttled_ns=found.throttled_ns,
        devices=tuple(
            DeviceUsage(
                name=disk.name, read_bytes=disk.read_bytes, written_bytes=disk.written_bytes, reads=disk.n_reads, writes=disk.n_writes
            )
            for disk in found.disks
        ),
        interfaces=tuple(
            InterfaceUsage(
                name=each.name,
                received_bytes=each.received_bytes,
                received_packets=each.n_packets_received,
                receive_errors=each.n_receive_errors,
                receive_drops=each.n_receive_drops,
                sent_bytes=each.sent_bytes,
                sent_packets=each.n_packets_sent,
                send_errors=each.n_send_errors,
                send_drops=each.n_send_drops,
            )
            for each in found.interfaces
        ),
    )


def _passes(record: Container, request: ListContainers, statuses: Sequence[str]) -> bool:
    if request.isolation is not None and record.isolation != request.isolation:
        return False
    if statuses:
        if record.status not in statuses:
            return False
    elif not request.all and record.status not in LIVE:
        return False
    if request.created_since_ns is not None and record.created_at_ns < request.created_since_ns:
        return False
    if request.created_until_ns is not None and record.created_at_ns > request.created_until_ns:
        return False
    return _has_labels(record, request.labels) and _has_name(record, request.name)


def _has_labels(record: Container, wanted: Iterable[str]) -> bool:
    for text in wanted:
        key, equals, value = text.partition("=")
        if key not in record.labels or (equals and record.labels[key] != value):
            return False
    return True


def _has_name(record: Container, pattern: str) -> bool:
    if "*" in pattern or "?" in pattern:
        return fnmatch.fnmatchcase(record.name, pattern.replace("[", "[[]"))
    return pattern in record.name


def _needs_measuring(request: ListContainers) -> bool:
    minima = (request.memory_bytes_min, request.cpu_ns_min, request.pids_min)
    return request.sort in ("memory", "cpu") or any(least is not None for least in minima)


def _uses_enough(usage: CgroupUsage, request: ListContainers) -> bool:
    pairs = (
        (usage.memory_bytes, request.memory_bytes_min),
        (usage.cpu_usage_ns, request.cpu_ns_min),
        (usage.n_pids, request.pids_min),
    )
    return all(least is None or (used is not None and used >= least) for used, least in pairs)
