"""TelemetryService: everything of telemetry in one object: collection, health, and the HTTP face on a port or socket of its own.

A node has one, on its first shard; it reads the pages of all. On the way down `shut` comes first (not ready), `drain` with the other
servers, `close` last, so that the final figures can still be scraped.
"""

from collections.abc import Collection, Sequence

from isopod.net.http.server import HttpListener, HttpServer
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry, ShardMetrics, Snapshot
from isopod.runtime.scheduling import SchedulingGroup
from isopod.telemetry.collectors import Collector, system_collectors
from isopod.telemetry.exporters import Exporters
from isopod.telemetry.health import HealthRegistry
from isopod.telemetry.monitoring import INTERVAL_S, FileExport, MonitoringSystem
from isopod.telemetry.web import TelemetryWeb
from isopod.world.network import Address, ProtocolFactory, ServerTls
from isopod.world.world import World


class TelemetryService:
    """Collects, judges and serves. Who starts it closes it. `health`, `monitoring` and `exporters` are there to be added to.

    Args:
        world: The ports.
        registry: This shard's metrics.
        logger: Where failures go.
        shards: Reads all shards' metrics; None for this one's alone. Closed with the service.
        collectors: What is collected; the system's figures if None.
        interval_s: Between two collections.
        export: Files to write snapshots to, or None.
        n_shards: Shown on the dashboard while no metric says it.
        group: The scheduling group of its requests.
        hosts: See `TelemetryWeb`.
    """

    def __init__(
        self,
        world: World,
        registry: Registry,
        *,
        logger: Logger,
        shards: ShardMetrics | None = None,
        collectors: Sequence[Collector] | None = None,
        interval_s: float = INTERVAL_S,
        export: FileExport | None = None,
        n_shards: int = 1,
        group: SchedulingGroup | None = None,
        hosts: Collection[str] = (),
    ) -> None:
        self._shards = shards
        self.health = HealthRegistry(world.clock)
        self.exporters = Exporters()
        self.monitoring = MonitoringSystem(
            world,
            registry,
            collectors=system_collectors(world, registry) if collectors is None else collectors,
            logger=logger,
            snapshot=None if shards is None else lambda at_ns: _of_all(registry, shards, at_ns),
            interval_s=interval_s,
            export=export,
        )
        self.web = TelemetryWeb(self.monitoring, self.health, exporters=self.exporters, n_shards=n_shards, hosts=hosts)
        self._server = HttpServer(world, self.web.router(), logger=logger, metrics=registry, group=group)

    async def start(self) -> None:
        """Collect once, and from then on at intervals."""
        await self.monitoring.start()

    async def listen(self, address: Address, *, tls: ServerTls | None = None) -> HttpListener:
        """Serve on an address too. OSError if it cannot be had. There is no password: see `isopod.telemetry.web`."""
        return await self._server.listen(address, tls=tls)

    def factory(self, name: str) -> ProtocolFactory:
        """Return what makes the protocols of connections that somebody else accepts; `name` stands for the listener in metrics."""
        return self._server.factory(name)

    def shut(self, reason: str) -> None:
        """Be not ready any more."""
        self.health.shut(reason)

    async def drain(self, deadline_s: float) -> None:
        """Let requests under way end."""
        await self._server.drain(deadline_s)

    async def close(self) -> None:
        """Stop serving and collecting."""
        await self._server.close()
        await self.monitoring.close()
        if self._shards is not None:
            self._shards.close()


def _of_all(registry: Registry, shards: ShardMetrics, at_ns: int) -> Snapshot:
    """Return all shards' values. This shard's figures that are asked for are brought up to date first; the others' are at most as old as
    their own last collection."""
    registry.refresh()
    return shards.snapshot(at_ns)
