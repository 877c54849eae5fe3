"""What the machine and this process have used so far, read from /proc. Sources: proc(5), Documentation/admin-guide/iostats.rst.

Every file may be missing (another kernel, a hidden /proc): what it would have said is then left out, never guessed.
"""

import os
import resource
from collections.abc import Mapping
from typing import Final

from isopod.world.kernel import DiskFigures, InterfaceFigures, MachineFigures, ProcessFigures

CPU_MODES: Final = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_SECTOR_BYTES: Final = 512
_KIB: Final = 1024
_NOT_DISKS: Final = ("loop", "ram", "zram", "dm-", "sr", "fd")


def process_figures() -> ProcessFigures:
    """Return what this process uses. Reading its share of shared memory takes the kernel a millisecond or more."""
    times = os.times()
    status = parse_fields(_read("/proc/self/status"))
    io = parse_fields(_read("/proc/self/io"))
    ip = parse_table(_read("/proc/self/net/netstat"), "IpExt")
    stat = _read("/proc/self/stat").rpartition(")")[2].split()
    return ProcessFigures(
        cpu_user_s=times.user,
        cpu_system_s=times.system,
        resident_bytes=status.get("VmRSS", 0) * _KIB,
        proportional_bytes=parse_fields(_read("/proc/self/smaps_rollup")).get("Pss", 0) * _KIB,
        virtual_bytes=status.get("VmSize", 0) * _KIB,
        peak_bytes=status.get("VmHWM", 0) * _KIB,
        n_fds=_count("/proc/self/fd"),
        n_threads=status.get("Threads", 0),
        n_switches_voluntary=status.get("voluntary_ctxt_switches", 0),
        n_switches_involuntary=status.get("nonvoluntary_ctxt_switches", 0),
        n_page_faults_major=int(stat[9]) if len(stat) > 9 else 0,
        read_bytes=io.get("read_bytes", 0),
        written_bytes=io.get("write_bytes", 0),
        n_fds_max=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        virtual_bytes_max=resource.getrlimit(resource.RLIMIT_AS)[0] % 2**64,  # RLIM_INFINITY is -1
        ip_received_bytes=ip.get("InOctets", 0),
        ip_sent_bytes=ip.get("OutOctets", 0),
    )


def machine_figures() -> MachineFigures:
    """Return what the machine uses."""
    memory = parse_fields(_read("/proc/meminfo"))
    return MachineFigures(
        cpu_s=parse_cpu(_read("/proc/stat"), os.sysconf("SC_CLK_TCK")),
        memory_bytes={name: memory.get(field, 0) * _KIB for name, field in _MEMORY.items()},
        interfaces=parse_interfaces(_read("/proc/self/net/dev")),
        disks=parse_disks(_read("/proc/diskstats")),
    )


_MEMORY: Final[Mapping[str, str]] = {
    "total": "MemTotal",
    "free": "MemFree",
    "available": "MemAvailable",
    "cached": "Cached",
    "swap_total": "SwapTotal",
    "swap_free": "SwapFree",
}


def parse_fields(text: str) -> dict[str, int]:
    """Return the numbers of a file of lines "Name:  123 kB"."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name.strip()] = int(words[0])
    return found


def parse_table(text: str, name: str) -> dict[str, int]:
    """Return a row of a file that has a line of names and then one of numbers for each, both beginning with "NAME: "."""
    rows = [line.partition(": ")[2].split() for line in text.splitlines() if line.startswith(f"{name}: ")]
    if len(rows) != 2:
        return {}
    return {word: int(number) for word, number in zip(*rows, strict=False) if number.isdigit()}


def parse_cpu(text: str, ticks_per_s: int) -> dict[str, float]:
    """Return the seconds all CPUs spent in each mode, from /proc/stat."""
    for line in text.splitlines():
        words = line.split()
        if words and words[0] == "cpu":
            return {mode: int(ticks) / ticks_per_s for mode, ticks in zip(CPU_MODES, words[1:], strict=False)}
    return {}


def parse_interfaces(text: str) -> tuple[InterfaceFigures, ...]:
    """Return the interfaces of /proc/net/dev, loopback too."""
    found = []
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        numbers = rest.split()
        if colon and len(numbers) >= 16:
            n = [int(word) for word in numbers]
            found.append(InterfaceFigures(name.strip(), n[0], n[1], n[2], n[3], n[8], n[9], n[10], n[11]))
    return tuple(found)


def parse_disks(text: str) -> tuple[DiskFigures, ...]:
    """Return the whole disks of /proc/diskstats: no partitions, no loop devices."""
    found: list[DiskFigures] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 14 or words[2].startswith(_NOT_DISKS):
            continue
        name = words[2]
        if any(name.startswith(disk.name) and name != disk.name for disk in found):  # a partition follows its disk
            continue
        n = [int(word) for word in words[3:14]]
        found.append(DiskFigures(name, n[0], n[2] * _SECTOR_BYTES, n[4], n[6] * _SECTOR_BYTES, n[9] / 1000))
    return tuple(found)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _count(folder: str) -> int:
    try:
        return len(os.listdir(folder)) - 1  # the descriptor it is listed by
    except OSError:
        return 0
