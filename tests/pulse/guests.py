"""What a guest says of itself, made by hand, as the reader hands it on: round figures, so that tests can name their results."""

from typing import Final

from isopod.pulse.model import Container, Pod, Values

MIB: Final = 1 << 20
SANDBOX: Final = "5" * 64
POD: Final = Pod(
    "0b1c",
    "web-0",
    "team",
    created_ns=1_700_000_000_000_000_000,
    containers=(Container("c" * 64, "web", "docker.io/library/nginx:1"),),
)

CPU: Final = {
    "user": 5000.0,
    "nice": 100.0,
    "system": 2000.0,
    "idle": 90_000.0,
    "iowait": 1000.0,
    "irq": 30.0,
    "softirq": 70.0,
    "steal": 400.0,
    "guest": 3000.0,
    "guest_nice": 50.0,
}
"""Of all CPUs together, in milliseconds: 7.6 s of use."""
MEMORY: Final = {
    "mem_total": 2048.0 * MIB,
    "mem_free": 1536.0 * MIB,
    "mem_available": 1800.0 * MIB,
    "inactive_file": 100.0 * MIB,
    "active": 77.0,
    "cached": 150.0 * MIB,
    "buffers": 10.0 * MIB,
    "anon_pages": 200.0 * MIB,
    "mapped": 40.0 * MIB,
    "swap_total": 64.0 * MIB,
    "swap_free": 60.0 * MIB,
}
NETWORK: Final = {
    "recv_bytes": 1000.0,
    "recv_packets": 10.0,
    "recv_errs": 1.0,
    "recv_drop": 2.0,
    "sent_bytes": 2000.0,
    "sent_packets": 20.0,
    "sent_errs": 3.0,
    "sent_drop": 0.0,
    "sent_colls": 9.0,
}
DISK: Final = {
    "reads": 8.0,
    "sectors_read": 16.0,
    "time_reading": 1500.0,
    "writes": 4.0,
    "sectors_written": 2.0,
    "time_writing": 250.0,
    "in_progress": 0.0,
    "time_in_progress": 1750.0,
    "weighted_time_in_progress": 3000.0,
}


def guest(
    *,
    cpu: dict[str, dict[str, float]] | None = None,
    memory: dict[str, float] | None = None,
    interfaces: tuple[str, ...] = ("eth0", "lo"),
    disks: tuple[str, ...] = ("vda",),
    more: Values | None = None,
) -> Values:
    """Return a guest's figures.

    Args:
        cpu: By CPU, one of which may be "total".
        memory: By item.
        interfaces: Each of which says `NETWORK`.
        disks: Each of which says `DISK`.
        more: Other families.
    """
    cpus = {"total": CPU, "0": CPU} if cpu is None else cpu
    return {
        "kata_guest_cpu_time": tuple(((name, item), value) for name, items in cpus.items() for item, value in items.items()),
        "kata_guest_meminfo": tuple(((item,), value) for item, value in (MEMORY if memory is None else memory).items()),
        "kata_guest_vm_stat": ((("nr_dirty",), 4.0), (("oom_kill",), 1.0), (("pgfault",), 500.0), (("pgmajfault",), 5.0)),
        "kata_guest_netdev_stat": tuple(((name, item), value) for name in interfaces for item, value in NETWORK.items()),
        "kata_guest_diskstat": tuple(((name, item), value) for name in disks for item, value in DISK.items()),
        "kata_guest_tasks": ((("cur",), 2.0), (("max",), 120.0)),
        "kata_guest_load": ((("load1",), 0.25), (("load15",), 3.0)),
        "kata_hypervisor_fds": (((), 40.0),),
        "kata_shim_fds": (((), 12.0),),
        "kata_shim_process_start_time_seconds": (((), 1_600_000_000.5),),
        "kata_virtiofsd_fds": (((), 30.0),),
        **(more or {}),
    }
