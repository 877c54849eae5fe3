"""The node's shards: shard 0 owns the state (the engine, the API on its socket); all of them serve the telemetry endpoint.

Connections to that endpoint are accepted by shard 0 and handed to the shard with the fewest. A scrape is answered where it arrives, as
every shard reads the metric pages of all; only whether the node is ready is asked of shard 0. With one shard, the default, there is no
further process and the same code runs in the node's own.
"""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from isopod.node.groups import METRICS
from isopod.runtime.metrics import ShardMetrics
from isopod.runtime.reactor import Reactor
from isopod.runtime.shards import Smp
from isopod.telemetry.collectors import system_collectors
from isopod.telemetry.service import TelemetryService
from isopod.wire.service import Method
from isopod.world.errors import IsopodError, UnavailableError

TELEMETRY: Final = "telemetry"
"""The name under which shards serve accepted connections of the endpoint."""
DRAIN_S: Final = 2.0
ASK_S: Final = 5.0
SERVE: Final = "isopod.node.shards:serve"
"""This module's service, as every shard finds it."""


class Nothing(msgspec.Struct, frozen=True):
    """A request without content."""


class Readiness(msgspec.Struct, frozen=True):
    """What shard 0 says: why the node is not ready, or nothing."""

    reasons: tuple[str, ...]


READINESS: Final = Method("node.readiness", Nothing, Readiness)


class Telemetry:
    """The telemetry service of one shard, and its part in the endpoint."""

    def __init__(self, smp: Smp) -> None:
        folder = smp.config.metrics_folder
        self._smp = smp
        self._reactor = Reactor(metrics=smp.metrics)
        """Of this shard's loop, for its figures: turns, busy time, and what each scheduling group got."""
        self.service = TelemetryService(
            smp.world,
            smp.metrics,
            logger=smp.logger,
            shards=ShardMetrics(smp.world.pages, folder) if folder else None,
            collectors=system_collectors(smp.world, smp.metrics, machine=smp.shard == 0),
            n_shards=smp.n_shards,
            group=METRICS,
        )

    async def start(self) -> None:
        """Collect from now on, and serve what the endpoint accepts."""
        if self._smp.shard == 0:
            self._smp.serve({READINESS: self._readiness})
        else:
            self.service.health.register("node", self._ask)
        await self.service.start()
        self._smp.serve_connections(TELEMETRY, self.service.factory(TELEMETRY))

    async def close(self) -> None:
        """Let requests end, then stop."""
        await self.service.drain(DRAIN_S)
        await self.service.close()
        await self._reactor.close()

    async def _readiness(self, _: Nothing) -> Readiness:
        report = await self.service.health.report()
        return Readiness(() if report.ready else report.reasons or (report.status,))

    async def _ask(self) -> str | None:
        try:
            answer = await self._smp.submit_to(0, READINESS, Nothing(), timeout_s=ASK_S)
        except IsopodError as error:
            raise UnavailableError(f"shard 0 does not say whether the node is ready: {error}") from error
        return "; ".join(answer.reasons) or None


async def serve(smp: Smp) -> Callable[[], Awaitable[None]] | None:
    """Be what a shard other than 0 is for; the node itself does this on shard 0, where more depends on it."""
    if smp.shard == 0:
        return None
    telemetry = Telemetry(smp)
    await telemetry.start()
    return telemetry.close
