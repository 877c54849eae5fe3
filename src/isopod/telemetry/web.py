"""The HTTP face of telemetry: metrics, health, and the dashboard, as handlers for `isopod.net.http`.

::

    GET /metrics            the exposition; the format by Accept, or ?format=prometheus|openmetrics|json|csv|influx
    GET /healthz            200 while the process lives, at once; the last report as JSON
    GET /readyz             200 while it may be given work, else 503; the report as JSON
    GET /api/metrics.json   the values now, with health; ?name=a,b picks families, and with ?history=1 adds their remembered totals
    GET /                   the dashboard

There is no password: listen on a loopback address or a Unix socket, or put a proxy before it.
"""

from typing import Final

import msgspec

from isopod.net.http.messages import Handler, HeaderPairs, HttpError, Request, Response
from isopod.net.http.router import Router
from isopod.runtime.metrics import Snapshot
from isopod.telemetry.dashboard import page, security_policy
from isopod.telemetry.exporters import Exporters, tables
from isopod.telemetry.health import HealthRegistry, Report
from isopod.telemetry.monitoring import MonitoringSystem

NOT_READY: Final = 503
HISTORY_NAMES_MAX: Final = 32
_PLAIN: Final[HeaderPairs] = (("cache-control", "no-store"), ("x-content-type-options", "nosniff"))
_encode = msgspec.json.Encoder().encode


class TelemetryWeb:
    """Handlers over a monitoring system and a health registry.

    Args:
        monitoring: Where values come from.
        health: Where health comes from.
        exporters: The formats of /metrics; a third party's are registered here.
        dashboard: Whether "/" and "/api/metrics.json" are served.
        n_shards: Shown on the dashboard while no metric says it.
    """

    def __init__(
        self,
        monitoring: MonitoringSystem,
        health: HealthRegistry,
        *,
        exporters: Exporters | None = None,
        dashboard: bool = True,
        n_shards: int = 1,
    ) -> None:
        self._monitoring = monitoring
        self._health = health
        self._exporters = Exporters() if exporters is None else exporters
        self._dashboard = dashboard
        self._n_shards = n_shards

    def routes(self) -> dict[str, Handler]:
        """Return the handlers by path, all for GET."""
        routes: dict[str, Handler] = {"/metrics": self.metrics, "/healthz": self.live, "/readyz": self.ready}
        if self._dashboard:
            routes |= {"/api/metrics.json": self.history, "/": self.index}
        return routes

    def router(self) -> Router:
        """Return a router with these paths alone."""
        router = Router()
        for path, handler in self.routes().items():
            router.get(path, handler)
        return router

    def metrics(self, request: Request) -> Response:
        """The exposition."""
        wanted = dict(request.query_pairs()).get("format", "")
        exporter = self._exporters.get(wanted) if wanted else self._exporters.accepted(request.headers.get("accept") or "")
        if exporter is None:
            raise HttpError(400, f"no such format: {wanted}", f"choose one of: {', '.join(self._exporters.names)}")
        body = exporter.export(self._monitoring.read())
        return Response(200, (("content-type", exporter.content_type), ("vary", "accept"), *_PLAIN), body)

    def live(self, _: Request) -> Response:
        """Whether the process lives: that it answers is the answer, no check is waited for."""
        return Response(200, (("content-type", "application/json"), *_PLAIN), _encode({"live": True, "last_report": self._health.last}))

    async def ready(self, _: Request) -> Response:
        """Whether it may be given work."""
        report = await self._health.report()
        return _report(200 if report.ready else NOT_READY, report)

    async def history(self, request: Request) -> Response:
        """The values now and, on request, those remembered."""
        pairs = dict(request.query_pairs())
        names = frozenset(name for name in pairs.get("name", "").split(",") if name)
        now = self._monitoring.read()
        state: dict[str, object] = {
            "at_ms": now.at_ns // 1_000_000,
            "shards": self._n_shards,
            "health": await self._health.report(),
            "metrics": tables(now, names),
        }
        if pairs.get("history", "") not in ("", "0"):
            if not 0 < len(names) <= HISTORY_NAMES_MAX:
                hint = "add &name=isopod_tasks,isopod_http_responses_total"
                raise HttpError(400, f"the history wants 1 to {HISTORY_NAMES_MAX} names", hint)
            state["history"] = [_totals(snapshot, names) for snapshot in self._monitoring.history]
        return Response(200, (("content-type", "application/json"), *_PLAIN), _encode(state))

    def index(self, _: Request) -> Response:
        """The dashboard."""
        headers = (
            ("content-type", "text/html; charset=utf-8"),
            ("content-security-policy", security_policy()),
            ("referrer-policy", "no-referrer"),
            *_PLAIN,
        )
        return Response(200, headers, page())


def _report(status: int, report: Report) -> Response:
    return Response(status, (("content-type", "application/json"), *_PLAIN), _encode(report))


def _totals(snapshot: Snapshot, names: frozenset[str]) -> dict[str, object]:
    """Return for each family the sum of its series (of a histogram: the number of observations)."""
    totals = {family.name: snapshot.value(family.name) for family in snapshot.layout.families if family.name in names and family.series}
    return {"at_ms": snapshot.at_ns // 1_000_000, "totals": totals}
