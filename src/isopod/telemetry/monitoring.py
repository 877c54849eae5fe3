"""MonitoringSystem: collects at intervals, keeps a bounded history of snapshots, and writes them to files that rotate.

The history is for the dashboard and for who asks "what was it like a minute ago"; it holds a fixed number of snapshots, whatever happens.
A collector that fails or takes too long is counted and logged, and costs the others nothing.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Final

import msgspec

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry, Snapshot
from isopod.telemetry.collectors import Collector, LoopCollector
from isopod.telemetry.exporters import CSV_HEADER, CsvExporter, Exporter
from isopod.world.disk import OpenFile
from isopod.world.world import World

INTERVAL_S: Final = 5.0
HISTORY_MAX: Final = 360
COLLECT_DEADLINE_S: Final = 5.0
_HEADER: Final = (",".join(CSV_HEADER) + "\r\n").encode()


class FileExport(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how snapshots are written to files."""

    folder: str
    exporter: Exporter
    rotate_s: float = 3600.0
    """A new file after so long, or after `n_bytes_max`, whichever comes first."""
    n_bytes_max: int = 64 << 20
    n_files_max: int = 24
    """Older ones are removed."""


class MonitoringSystem:
    """Collects, remembers, exports. Who starts it closes it.

    Args:
        world: Clock and disk.
        registry: Gets the counts of its own work.
        collectors: Run before each snapshot, one after the other.
        snapshot: Takes one: the registry's own, or that of all shards.
        logger: Where failures go.
        interval_s: Between two collections.
        n_history_max: Snapshots kept.
        export: Files, or None.
    """

    def __init__(
        self,
        world: World,
        registry: Registry,
        *,
        collectors: Sequence[Collector],
        logger: Logger,
        snapshot: Callable[[int], Snapshot] | None = None,
        interval_s: float = INTERVAL_S,
        n_history_max: int = HISTORY_MAX,
        export: FileExport | None = None,
    ) -> None:
        self._world = world
        self._collectors = list(collectors)
        self._logger = logger
        self._snapshot = snapshot or registry.snapshot
        self._interval_s = interval_s
        self._history: deque[Snapshot] = deque(maxlen=n_history_max)
        self._writer = None if export is None else _RotatingWriter(world, export)
        self._task: asyncio.Task[None] | None = None
        self._rounds = registry.counter("isopod_collections_total", "Rounds of collection.")
        self._failures = registry.counter("isopod_collection_failures_total", "Collectors or exports that failed or took too long.")

    @property
    def history(self) -> tuple[Snapshot, ...]:
        """The snapshots kept, the oldest first."""
        return tuple(self._history)

    def add_collector(self, collector: Collector) -> None:
        """Run one more from the next round on."""
        self._collectors.append(collector)

    def set_interval(self, interval_s: float) -> None:
        """Collect at another interval, from the next round on."""
        self._interval_s = interval_s

    async def start(self) -> None:
        """Collect once, and then at intervals."""
        for collector in self._collectors:
            if isinstance(collector, LoopCollector):
                collector.start()
        await self.collect()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="monitoring")

    async def close(self) -> None:
        """Stop; close the file."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for collector in self._collectors:
            if isinstance(collector, LoopCollector):
                collector.close()
        if self._writer is not None:
            self._writer.close()

    async def collect(self) -> Snapshot:
        """Run one round now and return its snapshot."""
        for collector in tuple(self._collectors):
            await self._guard(collector.name, collector.collect())
        self._rounds.inc()
        snapshot = self._snapshot(self._world.clock.now_ns())
        self._history.append(snapshot)
        if self._writer is not None:
            await self._guard("export", self._writer.write(snapshot))
        return snapshot

    def read(self) -> Snapshot:
        """Return the values of this moment without a round of collection: what a scrape between two rounds gets."""
        return self._snapshot(self._world.clock.now_ns())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.collect()
            except Exception as error:  # noqa: BLE001 - the root of a task that must go on
                self._failures.inc()
                self._logger.error("collection.failed", collector="snapshot", error=str(error) or type(error).__name__)

    async def _guard(self, name: str, work: Coroutine[object, object, None]) -> None:
        try:
            async with asyncio.timeout(COLLECT_DEADLINE_S):
                await work
        except Exception as error:  # noqa: BLE001 - a collector may be anybody's; its failure is not the others'
            self._failures.inc()
            self._logger.warning("collection.failed", collector=name, error=str(error) or type(error).__name__)


class _RotatingWriter:
    """Appends snapshots to one file after another: metrics-001795164000-0001.json, a line (JSON) or a block for each snapshot."""

    def __init__(self, world: World, export: FileExport) -> None:
        self._disk = world.disk
        self._clock = world.clock
        self._export = export
        self._file: OpenFile | None = None
        self._opened_at_ns = 0
        self._n_files = 0

    async def write(self, snapshot: Snapshot) -> None:
        whole = self._export.exporter.export(snapshot)
        whole = whole if whole.endswith(b"\n") else whole + b"\n"
        if self._file is None or self._is_full(len(whole)):
            await self._rotate()
        elif isinstance(self._export.exporter, CsvExporter):
            whole = whole.removeprefix(_HEADER)
        assert self._file is not None
        await self._file.append(whole)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_full(self, n_bytes: int) -> bool:
        assert self._file is not None
        size, age_ns = self._file.size_bytes(), self._clock.now_ns() - self._opened_at_ns
        return size > 0 and (size + n_bytes > self._export.n_bytes_max or age_ns >= self._export.rotate_s * 1e9)

    async def _rotate(self) -> None:
        self.close()
        export = self._export
        await self._disk.make_directory(export.folder)
        self._opened_at_ns = self._clock.now_ns()
        self._n_files += 1
        # The number keeps files apart that begin in the same second, and in order.
        name = f"{_PREFIX}{self._opened_at_ns // 1_000_000_000:012d}-{self._n_files:04d}.{export.exporter.name}"
        self._file = await self._disk.open_append(f"{export.folder}/{name}")
        old = [each for each in await self._disk.list(export.folder) if each.startswith(_PREFIX)]
        for each in old[: -export.n_files_max]:
            await self._disk.remove(f"{export.folder}/{each}")


_PREFIX: Final = "metrics-"
