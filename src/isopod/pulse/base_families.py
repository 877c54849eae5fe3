"""BaseFamilies: what Kata's families mean, and which families in base units their lines become. A table; `base_units` does the work.

Names say the unit, and _total where a figure only grows; `item` stays where the name does not say what it said. Units: ticks are hundredths
of a second on every machine that Kata runs on. Sizes in *_proc_status are bytes where Go's procfs read them (Kata's shim in Go, and
isopod's), and KiB where the Rust crate did (the agent in the guest, and runtime-rs on the host). /proc/meminfo is in bytes everywhere, its
counts of huge pages are counts. The overhead of a pod is told in per cent of one processor.

Not here, since they are right as they are: load, tasks, threads, open files, kata_shim_go_* and kata_shim_process_*. Nor is
kata_firecracker_*, of which nobody says what only grows.
Source: proc(5); Kata's src/runtime/pkg/utils/metrics.go, shim_metrics.go and src/agent/src/metrics.rs; procfs in Go and in Rust.
"""

from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

from isopod.pulse.model import Kind

Unit = Literal["as it is", "milliseconds", "ticks", "percent", "sectors", "kibibytes", "cpu", "host"]
"""In what a figure comes. Those of "cpu" and "host" differ between sandboxes."""


class Made(NamedTuple):
    """What becomes of a line.

    Args:
        name: Its family.
        kind: The family's type.
        help: And help.
        unit: In what the figure comes.
        keeps: Whether the label `item` stays.
    """

    name: str
    kind: Kind
    help: bytes
    unit: Unit = "as it is"
    keeps: bool = True


class Known(NamedTuple):
    """A family of which it is known what it means.

    Args:
        choose: What becomes of a line, by its label `item` ("" without one); None for what is not known.
        made: By name, all families that may come of it.
        names: All names that these and their lines may bear.
        kinds: The types under which it may come.
    """

    choose: Callable[[str], Made | None]
    made: Mapping[str, Made]
    names: tuple[str, ...]
    kinds: tuple[Kind, ...]


_PLAIN: Final[tuple[Kind, ...]] = ("gauge", "counter", "untyped")
_PARTS: Final = ("", "_bucket", "_count", "_sum", "_created")
_VM_COUNTS: Final = frozenset(
    (
        "nr_dirtied",
        "nr_foll_pin_acquired",
        "nr_foll_pin_released",
        "nr_throttled_written",
        "nr_tlb_local_flush_all",
        "nr_tlb_local_flush_one",
        "nr_tlb_remote_flush",
        "nr_tlb_remote_flush_received",
        "nr_vmscan_immediate_reclaim",
        "nr_vmscan_write",
        "nr_written",
    )
)
"""Of /proc/vmstat: what only grows although its name begins as those of levels do."""
_VM_LEVELS: Final = frozenset(("workingset_nodes",))
"""And the other way round."""
_HUGE_PAGES: Final = frozenset(("hugepages_free", "hugepages_rsvd", "hugepages_surp", "hugepages_total"))
_STATUS_COUNTS: Final = frozenset(("nonvoluntary_ctxt_switches", "voluntary_ctxt_switches"))
_STATUS_SIZES: Final = frozenset(
    "hugetlbpages rssanon rssfile rssshmem vmdata vmexe vmhwm vmlck vmlib vmpeak vmpin vmpmd vmpte vmrss vmsize vmstk vmswap".split()
)
_IO_BYTES: Final = frozenset("cancelled_write_bytes cancelledwritebytes rchar read_bytes readbytes wchar write_bytes writebytes".split())
_IO_CALLS: Final = frozenset(("syscr", "syscw"))
_CPU_TIMES: Final = frozenset("guest guest_nice idle iowait irq nice softirq steal system user".split())
_PROCESS_TIMES: Final = frozenset(("cstime", "cutime", "stime", "utime"))
_DISK_ITEMS: Final[tuple[tuple[str, str, str, Unit], ...]] = (
    ("discards", "discards_total", "Discards completed.", "as it is"),
    ("discards_merged", "discards_merged_total", "Discards merged with others.", "as it is"),
    ("flushes", "flushes_total", "Flushes completed.", "as it is"),
    ("merged", "reads_merged_total", "Reads merged with others.", "as it is"),
    ("reads", "reads_total", "Reads completed.", "as it is"),
    ("sectors_discarded", "discard_bytes_total", "Bytes discarded.", "sectors"),
    ("sectors_read", "read_bytes_total", "Bytes read.", "sectors"),
    ("sectors_written", "write_bytes_total", "Bytes written.", "sectors"),
    ("time_discarding", "discard_seconds_total", "Time spent discarding.", "milliseconds"),
    ("time_flushing", "flush_seconds_total", "Time spent flushing.", "milliseconds"),
    ("time_in_progress", "io_seconds_total", "Time with operations under way.", "milliseconds"),
    ("time_reading", "read_seconds_total", "Time spent reading.", "milliseconds"),
    ("time_writing", "write_seconds_total", "Time spent writing.", "milliseconds"),
    ("weighted_time_in_progress", "io_weighted_seconds_total", "Time with operations under way, times their number.", "milliseconds"),
    ("writes", "writes_total", "Writes completed.", "as it is"),
    ("writes_merged", "writes_merged_total", "Writes merged with others.", "as it is"),
)
_NETWORK_ITEMS: Final = (
    ("bytes", "bytes_total", "Bytes"),
    ("compressed", "compressed_total", "Compressed packets"),
    ("drop", "packets_dropped_total", "Dropped packets"),
    ("errs", "errors_total", "Errors"),
    ("fifo", "fifo_errors_total", "Overruns of the queue"),
    ("packets", "packets_total", "Packets"),
)
"""Of both directions."""


def _known(choose: Callable[[str], Made | None], *every: Made) -> Known:
    made = {each.name: each for each in every}
    return Known(choose, made, tuple(made), _PLAIN)


def _by_item(items: Mapping[str, Made]) -> Known:
    return _known(items.get, *items.values())


def _single(made: Made) -> Known:
    return _known(lambda _: made, made)


def _several(*choices: tuple[frozenset[str], Made]) -> Known:
    return _by_item({item: made for items, made in choices for item in sorted(items)})


def _histogram(name: str, text: bytes) -> Known:
    made = Made(name, "histogram", text, "milliseconds")
    return Known(lambda _: made, {name: made}, tuple(f"{name}{part}" for part in _PARTS), ("histogram",))


def _vm_stat() -> Known:
    events = Made("kata_guest_vm_events_total", "counter", b"What the guest's memory management did, as /proc/vmstat counts it.")
    levels = Made("kata_guest_vm_state", "gauge", b"State of the guest's memory as /proc/vmstat has it: pages, stacks in KiB.")

    def choose(item: str) -> Made | None:
        if not item:
            return None
        is_level = item in _VM_LEVELS or (item.startswith("nr_") and item not in _VM_COUNTS)
        return levels if is_level else events

    return _known(choose, events, levels)


def _memory() -> Known:
    sizes = Made("kata_guest_memory_bytes", "gauge", b"Memory of the guest, as /proc/meminfo has it.")
    pages = Made("kata_guest_memory_hugepages", "gauge", b"Huge pages of the guest.")

    def choose(item: str) -> Made | None:
        if not item:
            return None
        return pages if item in _HUGE_PAGES else sizes

    return _known(choose, sizes, pages)


def _disk() -> Known:
    begin = "kata_guest_disk_"
    made = {item: Made(begin + end, "counter", text.encode(), unit, keeps=False) for item, end, text, unit in _DISK_ITEMS}
    made["in_progress"] = Made(f"{begin}io_current", "gauge", b"Operations under way.", keeps=False)
    return _by_item(made)


def _network(begin: str, whose: str) -> Known:
    made: dict[str, Made] = {}

    def put(item: str, end: str, text: str) -> None:
        made[item] = Made(f"{begin}_network_{end}", "counter", f"{text} {whose}.".encode(), keeps=False)

    for item, end, text in _NETWORK_ITEMS:
        put(f"recv_{item}", f"receive_{end}", f"{text} received, in")
        put(f"sent_{item}", f"transmit_{end}", f"{text} sent, in")
    put("recv_frame", "receive_frame_errors_total", "Frames received with errors, in")
    put("recv_multicast", "receive_multicast_total", "Multicast packets received, in")
    put("sent_carrier", "transmit_carrier_errors_total", "Losses of the carrier while sending, in")
    put("sent_colls", "transmit_collisions_total", "Collisions while sending, in")
    return _by_item(made)


def _process(who: str, text: str, unit: Unit) -> dict[str, Known]:
    """Return the three families that tell of a process."""

    def made(end: str, kind: Kind, what: str, unit: Unit = "as it is") -> Made:
        return Made(f"kata_{who}_{end}", kind, f"{what} of {text}.".encode(), unit)

    return {
        f"kata_{who}_io_stat": _several(
            (_IO_BYTES, made("io_bytes_total", "counter", "Bytes read and written by calls (rchar, wchar) and on disks")),
            (_IO_CALLS, made("io_calls_total", "counter", "Calls that read or write")),
        ),
        f"kata_{who}_proc_stat": _several((_PROCESS_TIMES, made("cpu_seconds_total", "counter", "CPU time", "ticks"))),
        f"kata_{who}_proc_status": _several(
            (_STATUS_SIZES, made("memory_bytes", "gauge", "Memory", unit)),
            (_STATUS_COUNTS, made("context_switches_total", "counter", "Context switches")),
        ),
    }


def _table() -> Mapping[str, Known]:
    gauge: Final = "gauge"
    counter: Final = "counter"
    known = {
        "kata_agent_scrape_count": _single(Made("kata_agent_scrapes_total", counter, b"How often the agent was asked for metrics.")),
        "kata_agent_total_rss": _single(Made("kata_agent_resident_memory_bytes", gauge, b"Resident memory of the agent.")),
        "kata_agent_total_time": _single(Made("kata_agent_time_seconds_total", counter, b"CPU time of the agent, user and system.")),
        "kata_agent_total_vm": _single(Made("kata_agent_virtual_memory_bytes", gauge, b"Address space of the agent.")),
        "kata_guest_cpu_time": _several(
            (_CPU_TIMES, Made("kata_guest_cpu_seconds_total", counter, b"Time of the guest's CPUs, by what they did.", "cpu"))
        ),
        "kata_guest_diskstat": _disk(),
        "kata_guest_meminfo": _memory(),
        "kata_guest_netdev_stat": _network("kata_guest", "the guest"),
        "kata_guest_vm_stat": _vm_stat(),
        "kata_hypervisor_netdev": _network("kata_hypervisor", "the hypervisor's network namespace"),
        "kata_hypervisor_scrape_count": _single(
            Made("kata_hypervisor_scrapes_total", counter, b"How often the hypervisor was asked for metrics.")
        ),
        "kata_hypervisor_seccomp": _several(
            (frozenset(("num_faults",)), Made("kata_hypervisor_seccomp_faults_total", counter, b"Calls that seccomp refused."))
        ),
        "kata_hypervisor_signals": _several(
            (frozenset(("sigbus", "sigsegv")), Made("kata_hypervisor_signals_received_total", counter, b"Signals of faults that came."))
        ),
        "kata_hypervisor_vcpu": _several(
            (
                frozenset("exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures filter_cpuid".split()),
                Made("kata_hypervisor_vcpu_events_total", counter, b"Exits and failures of virtual CPUs."),
            )
        ),
        "kata_shim_agent_rpc_durations_histogram_milliseconds": _histogram(
            "kata_shim_agent_rpc_durations_seconds", b"How long the agent's answers to the shim took."
        ),
        "kata_shim_netdev": _network("kata_shim", "the shim's network namespace"),
        "kata_shim_pod_overhead_cpu": _single(
            Made("kata_shim_pod_overhead_cpu_ratio", gauge, b"CPU used beyond what the containers use; 1 is one processor.", "percent")
        ),
        "kata_shim_pod_overhead_memory_in_bytes": _single(
            Made("kata_shim_pod_overhead_memory_bytes", gauge, b"Memory used beyond what the containers use.")
        ),
        "kata_shim_rpc_durations_histogram_milliseconds": _histogram(
            "kata_shim_rpc_durations_seconds", b"How long the shim's answers to the runtime took."
        ),
    }
    known |= _process("agent", "the agent", "kibibytes")
    for who, text in (("hypervisor", "the hypervisor"), ("shim", "the shim"), ("virtiofsd", "virtiofsd")):
        known |= _process(who, text, "host")
    return known


KNOWN: Final[Mapping[str, Known]] = _table()
"""By the names that Kata gives."""
