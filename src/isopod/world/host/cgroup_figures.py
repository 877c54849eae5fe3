"""More of what a control group counts, for those who ask: memory by kind, throttling, disks; and the interfaces of a process in it.

Each costs a file more to read than `cgroups.usage`. Every file may be missing: what it would have said is 0 then.
Sources: Documentation/admin-guide/cgroup-v1/{memory,blkio-controller}.rst, cgroup-v2.rst; proc(5).
"""

import os
from collections.abc import Iterable

from isopod.world.host.cgroups import Layout, group_folder, read_text
from isopod.world.host.figures import parse_interfaces
from isopod.world.kernel import CgroupFigures, DiskFigures, InterfaceFigures

_LOOPBACK = "lo"


def measure(layout: Layout, cgroup: str, pid: int | None) -> CgroupFigures:
    """Return what a group counts, and what the interfaces carried that a process sees; None for no process."""
    interfaces = interfaces_of(pid) if pid is not None else ()
    if layout.mode == "v2":
        return _measure_v2(group_folder(layout.unified or "", cgroup), interfaces)
    folders = {name: layout.mount_of(name) for name in ("memory", "cpu", "blkio")}
    memory, cpu, blkio = (None if mount is None else group_folder(mount, cgroup) for mount in folders.values())
    kinds = parse_counters(read_text(memory, "memory.stat") or "")
    times = parse_counters(read_text(cpu, "cpu.stat") or "")
    used = int(read_text(memory, "memory.usage_in_bytes") or 0)
    n_bytes = read_text(blkio, "blkio.throttle.io_service_bytes_recursive") or ""
    n_times = read_text(blkio, "blkio.throttle.io_serviced_recursive") or ""
    return CgroupFigures(
        working_set_bytes=max(0, used - kinds.get("total_inactive_file", 0)),
        rss_bytes=kinds.get("total_rss", 0),
        cache_bytes=kinds.get("total_cache", 0),
        swap_bytes=kinds.get("total_swap", 0),
        n_oom_kills=parse_counters(read_text(memory, "memory.oom_control") or "").get("oom_kill", 0),
        n_periods=times.get("nr_periods", 0),
        n_throttled_periods=times.get("nr_throttled", 0),
        throttled_ns=times.get("throttled_time", 0),
        disks=_named(parse_blkio(n_bytes, n_times)),
        interfaces=interfaces,
    )


def parse_counters(text: str) -> dict[str, int]:
    """Return the numbers of a file of lines "key number"."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def parse_blkio(n_bytes: str, n_times: str) -> tuple[DiskFigures, ...]:
    """Return the disks of v1's two files of lines "254:0 Read 4096", by their numbers."""
    octets, times = _parse_operations(n_bytes), _parse_operations(n_times)
    return tuple(
        DiskFigures(
            number,
            n_reads=times.get(number, {}).get("Read", 0),
            read_bytes=found.get("Read", 0),
            n_writes=times.get(number, {}).get("Write", 0),
            written_bytes=found.get("Write", 0),
            busy_s=0.0,
        )
        for number, found in octets.items()
    )


def parse_io_stat(text: str) -> tuple[DiskFigures, ...]:
    """Return the disks of v2's io.stat, lines "254:0 rbytes=4096 wbytes=0 rios=1 wios=0 ...", by their numbers."""
    disks = []
    for line in text.splitlines():
        number, *words = line.split()
        n = {key: int(value) for key, _, value in (word.partition("=") for word in words) if value.isdigit()}
        if n:
            disks.append(DiskFigures(number, n.get("rios", 0), n.get("rbytes", 0), n.get("wios", 0), n.get("wbytes", 0), 0.0))
    return tuple(disks)


def interfaces_of(pid: int) -> tuple[InterfaceFigures, ...]:
    """Return the interfaces that a process sees, but for its loopback; none if it has ended."""
    try:
        with open(f"/proc/{pid}/net/dev", encoding="ascii") as file:
            return tuple(each for each in parse_interfaces(file.read()) if each.name != _LOOPBACK)
    except OSError:
        return ()


def _measure_v2(folder: str, interfaces: tuple[InterfaceFigures, ...]) -> CgroupFigures:
    kinds = parse_counters(read_text(folder, "memory.stat") or "")
    times = parse_counters(read_text(folder, "cpu.stat") or "")
    used = int(read_text(folder, "memory.current") or 0)
    return CgroupFigures(
        working_set_bytes=max(0, used - kinds.get("inactive_file", 0)),
        rss_bytes=kinds.get("anon", 0),
        cache_bytes=kinds.get("file", 0),
        swap_bytes=int(read_text(folder, "memory.swap.current") or 0),
        n_oom_kills=parse_counters(read_text(folder, "memory.events") or "").get("oom_kill", 0),
        n_periods=times.get("nr_periods", 0),
        n_throttled_periods=times.get("nr_throttled", 0),
        throttled_ns=times.get("throttled_usec", 0) * 1000,
        disks=_named(parse_io_stat(read_text(folder, "io.stat") or "")),
        interfaces=interfaces,
    )


def _parse_operations(text: str) -> dict[str, dict[str, int]]:
    """Return by number of the device what was counted of each operation. The last line is a sum without a device."""
    found: dict[str, dict[str, int]] = {}
    for row in (line.split() for line in text.splitlines()):
        if len(row) == 3 and row[2].isdigit():
            found.setdefault(row[0], {})[row[1]] = int(row[2])
    return found


def _named(disks: Iterable[DiskFigures]) -> tuple[DiskFigures, ...]:
    """Return disks by their names; one that has none any more keeps its number."""
    return tuple(sorted(disk._replace(name=_name_of(disk.name)) for disk in disks))


def _name_of(number: str) -> str:
    try:
        return os.path.basename(os.readlink(f"/sys/dev/block/{number}"))
    except OSError:
        return number
