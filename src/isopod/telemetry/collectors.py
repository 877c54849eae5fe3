"""Collectors: figures that are asked for rather than counted: CPU, memory, descriptors, network, disks, pressure, garbage, the event loop.

A collector makes its series when it is made, and brings them up to date when it is told to collect; the interface is public. Names follow
the reference's system metrics where they mean the same, with isopod's prefix. All facts come through the World's ports: the simulation
gives figures that follow from its virtual time.
"""

import asyncio
import gc
from collections.abc import Callable
from typing import Final, Protocol

from isopod.runtime.metrics import Counter, Gauge, Registry
from isopod.world.kernel import DiskFigures, InterfaceFigures
from isopod.world.world import World

LAG_PERIOD_S: Final = 0.5
LAG_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
INTERFACES_MAX: Final = 64
"""So many interfaces and disks get series of their own: a node with a thousand containers has a thousand links."""


class Collector(Protocol):
    """Brings the figures of one area up to date. What it raises is logged and counted; the other collectors go on."""

    @property
    def name(self) -> str:
        """One word, for logs."""

    async def collect(self) -> None:
        """Bring the series up to date."""


class Total:
    """A counter that follows a total which somebody else counts; a total that falls began anew.

    Args:
        counter: The series.
    """

    __slots__ = ("_counter", "_last")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._last = 0.0

    def follow(self, total: float) -> None:
        """Take over the total."""
        self._counter.inc(total - self._last if total >= self._last else total)
        self._last = total


class ProcessCollector:
    """What this process uses.

    Args:
        world: Its kernel is asked.
        registry: Gets the series.
    """

    name: Final = "process"

    def __init__(self, world: World, registry: Registry) -> None:
        self._kernel = world.kernel
        gauge, counter = registry.gauge, registry.counter
        registry.declare("isopod_memory_peak_usage_bytes", aggregation="max")
        cpu, switches = "CPU time of the process.", "Context switches of the process."
        self._cpu_user = Total(counter("isopod_process_cpu_seconds_total", cpu, mode="user"))
        self._cpu_system = Total(counter("isopod_process_cpu_seconds_total", cpu, mode="system"))
        self._resident = gauge("isopod_memory_current_usage_bytes", "Resident memory of the process.")
        self._proportional = gauge("isopod_memory_proportional_bytes", "Memory of the process, shared pages counted in parts (PSS).")
        self._virtual = gauge("isopod_memory_virtual_bytes", "Address space of the process.")
        self._peak = gauge("isopod_memory_peak_usage_bytes", "Resident memory of the process at its highest.")
        self._fds = gauge("isopod_process_open_fds", "Open file descriptors.")
        self._threads = gauge("isopod_process_threads", "Threads.")
        self._voluntary = Total(counter("isopod_process_context_switches_total", switches, kind="voluntary"))
        self._involuntary = Total(counter("isopod_process_context_switches_total", switches, kind="involuntary"))
        self._faults = Total(counter("isopod_process_major_page_faults_total", "Page faults that had to read from a disk."))
        self._read = Total(counter("isopod_io_bytes_read_total", "Bytes the process had read from disks."))
        self._written = Total(counter("isopod_io_bytes_written_total", "Bytes the process had written to disks."))

    async def collect(self) -> None:
        """See `Collector.collect`."""
        now = await self._kernel.process_figures()
        self._cpu_user.follow(now.cpu_user_s)
        self._cpu_system.follow(now.cpu_system_s)
        self._resident.set(now.resident_bytes)
        self._proportional.set(now.proportional_bytes)
        self._virtual.set(now.virtual_bytes)
        self._peak.set(now.peak_bytes)
        self._fds.set(now.n_fds)
        self._threads.set(now.n_threads)
        self._voluntary.follow(now.n_switches_voluntary)
        self._involuntary.follow(now.n_switches_involuntary)
        self._faults.follow(now.n_page_faults_major)
        self._read.follow(now.read_bytes)
        self._written.follow(now.written_bytes)


class MachineCollector:
    """What the machine uses. One shard of a node collects it, or it is counted several times.

    Args:
        world: Its kernel is asked.
        registry: Gets the series.
    """

    name: Final = "machine"

    def __init__(self, world: World, registry: Registry) -> None:
        self._kernel = world.kernel
        self._registry = registry
        self._totals: dict[tuple[str, str], Total] = {}

    async def collect(self) -> None:
        """See `Collector.collect`."""
        now = await self._kernel.machine_figures()
        for mode, seconds in now.cpu_s.items():
            self._total("isopod_machine_cpu_seconds_total", "CPU time of the machine.", seconds, mode=mode)
        for kind, n_bytes in now.memory_bytes.items():
            self._registry.gauge("isopod_machine_memory_bytes", "Memory of the machine.", kind=kind).set(n_bytes)
        for interface in now.interfaces[:INTERFACES_MAX]:
            self._interface(interface)
        for disk in now.disks[:INTERFACES_MAX]:
            self._disk(disk)
        for name, value in (await self._kernel.pressure()).items():
            if name.startswith("load"):
                self._registry.gauge("isopod_machine_load", "Load average of so many minutes.", minutes=name.removeprefix("load")).set(
                    value
                )
            else:
                self._registry.gauge(
                    "isopod_machine_pressure_ratio", "Share of time in which tasks waited for a resource (PSI).", window=name
                ).set(value / 100)

    def _interface(self, now: InterfaceFigures) -> None:
        for name, help_text, value in (
            ("isopod_network_bytes_received_total", "Bytes received.", now.received_bytes),
            ("isopod_network_bytes_sent_total", "Bytes sent.", now.sent_bytes),
            ("isopod_network_packets_received_total", "Packets received.", now.n_packets_received),
            ("isopod_network_packets_sent_total", "Packets sent.", now.n_packets_sent),
            ("isopod_network_receive_errors_total", "Packets that could not be received.", now.n_receive_errors + now.n_receive_drops),
            ("isopod_network_send_errors_total", "Packets that could not be sent.", now.n_send_errors + now.n_send_drops),
        ):
            self._total(name, help_text, value, interface=now.name)

    def _disk(self, now: DiskFigures) -> None:
        for name, help_text, value in (
            ("isopod_disk_bytes_read_total", "Bytes read.", now.read_bytes),
            ("isopod_disk_bytes_written_total", "Bytes written.", now.written_bytes),
            ("isopod_disk_reads_total", "Reads.", now.n_reads),
            ("isopod_disk_writes_total", "Writes.", now.n_writes),
            ("isopod_disk_busy_seconds_total", "Time in which requests were under way.", now.busy_s),
        ):
            self._total(name, help_text, value, device=now.name)

    def _total(self, name: str, help_text: str, value: float, **labels: str) -> None:
        (label,) = labels.values()
        found = self._totals.get((name, label))
        if found is None:
            found = self._totals[name, label] = Total(self._registry.counter(name, help_text, **labels))
        found.follow(value)


class GarbageCollector:
    """What the interpreter's cyclic garbage collector did, and how many objects it looks after."""

    name: Final = "garbage"

    def __init__(self, registry: Registry) -> None:
        self._generations = [
            (
                Total(registry.counter("isopod_gc_collections_total", "Runs of the garbage collector.", generation=str(number))),
                Total(registry.counter("isopod_gc_collected_total", "Objects it freed.", generation=str(number))),
                Total(registry.counter("isopod_gc_uncollectable_total", "Objects it could not free.", generation=str(number))),
                registry.gauge("isopod_gc_pending", "Allocations since the generation was last looked through.", generation=str(number)),
            )
            for number in range(3)
        ]

    async def collect(self) -> None:
        """See `Collector.collect`."""
        for (runs, freed, stuck, pending), stats, count in zip(self._generations, gc.get_stats(), gc.get_count(), strict=True):
            runs.follow(stats["collections"])
            freed.follow(stats["collected"])
            stuck.follow(stats["uncollectable"])
            pending.set(count)


class LoopCollector:
    """How late the event loop is, and how many tasks it has. Between `start` and `close` a timer measures how much later than asked it
    fires.

    Args:
        world: Its clock is read.
        registry: Gets the series.
    """

    name: Final = "loop"

    def __init__(self, world: World, registry: Registry, *, period_s: float = LAG_PERIOD_S) -> None:
        registry.declare("isopod_reactor_lag_seconds_max", unit="seconds", aggregation="max")
        self._period_s = period_s
        self._lag = registry.histogram("isopod_reactor_lag_seconds", "How late timers of the event loop fire.", LAG_BOUNDS_S)
        self._worst: Gauge = registry.gauge("isopod_reactor_lag_seconds_max", "The worst since the last collection.")
        self._tasks: Gauge = registry.gauge("isopod_tasks", "Tasks that have not ended.")
        self._now_ns: Callable[[], int] = world.clock.monotonic_ns
        self._worst_s = 0.0
        self._due_ns = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to measure on the running loop."""
        if self._timer is None:
            self._arm()

    def close(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def collect(self) -> None:
        """See `Collector.collect`."""
        self._tasks.set(len(asyncio.all_tasks()))
        self._worst.set(self._worst_s)
        self._worst_s = 0.0

    def _arm(self) -> None:
        self._due_ns = self._now_ns() + int(self._period_s * 1e9)
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._fired)

    def _fired(self) -> None:
        late_s = max(0.0, (self._now_ns() - self._due_ns) / 1e9)
        self._lag.observe(late_s)
        self._worst_s = max(self._worst_s, late_s)
        self._arm()


class FileCollector:
    """What the disk port's data files did. Not among the system's: asking makes the port set up its way to read and write.

    Args:
        world: Its disk is asked.
        registry: Gets the series.
    """

    name: Final = "files"

    def __init__(self, world: World, registry: Registry) -> None:
        self._disk = world.disk
        help_text = "Operations on data files."
        self._reads = Total(registry.counter("isopod_file_operations_total", help_text, kind="read"))
        self._writes = Total(registry.counter("isopod_file_operations_total", help_text, kind="write"))
        self._syncs = Total(registry.counter("isopod_file_operations_total", help_text, kind="sync"))
        self._errors = Total(registry.counter("isopod_io_operations_failed_total", "Operations on data files that failed."))
        self._read = Total(registry.counter("isopod_file_bytes_read_total", "Bytes read from data files."))
        self._written = Total(registry.counter("isopod_file_bytes_written_total", "Bytes written to data files."))
        self._open = registry.gauge("isopod_file_operations_open", "Operations on data files under way.")

    async def collect(self) -> None:
        """See `Collector.collect`."""
        now = self._disk.io_statistics()
        self._reads.follow(now.n_reads)
        self._writes.follow(now.n_writes)
        self._syncs.follow(now.n_syncs)
        self._errors.follow(now.n_errors)
        self._read.follow(now.n_bytes_read)
        self._written.follow(now.n_bytes_written)
        self._open.set(now.n_in_flight)


def system_collectors(world: World, registry: Registry, *, machine: bool = True) -> tuple[Collector, ...]:
    """Return the collectors of the system.

    Args:
        world: Where facts come from.
        registry: Gets the series.
        machine: Whether to collect the machine's figures too: on one shard only.
    """
    own: tuple[Collector, ...] = (ProcessCollector(world, registry), GarbageCollector(registry), LoopCollector(world, registry))
    return (*own, MachineCollector(world, registry)) if machine else own
