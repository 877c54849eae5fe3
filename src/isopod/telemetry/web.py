"""The HTTP face of telemetry: metrics, health, and the dashboard, as handlers for `isopod.net.http`.

::

    GET /metrics            the exposition; the format by Accept, or ?format=prometheus|openmetrics|json|csv|influx
    GET /healthz            200 while the process lives, at once; the last report as JSON
    GET /readyz             200 while it may be given work, else 503; the report as JSON
    GET /api/metrics.json   the values now, with health; ?name=a,b picks families, and with ?history=1 adds their remembered totals
    GET /                   the dashboard

There is no password: listen on a loopback address or a Unix socket, or put a proxy before it. On a loopback address only requests that
name this machine are answered (a numeric address, localhost, or one of `hosts`): else a page of any site could have its own name
resolve to 127.0.0.1 and read all this with the browser of somebody on this machine (DNS rebinding).
"""

import ipaddress
from collections.abc import Awaitable, Collection
from functools import partial
from typing import Final

import msgspec

from isopod.net.http.messages import Answer, Handler, HeaderPairs, HttpError, Request, Response
from isopod.net.http.router import Router
from isopod.runtime.metrics import Snapshot
from isopod.telemetry.dashboard import page, security_policy
from isopod.telemetry.exporters import Exporters, tables
from isopod.telemetry.health import HealthRegistry, Report
from isopod.telemetry.monitoring import MonitoringSystem

NOT_READY: Final = 503
_LOCALHOST: Final = "localhost"
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
        hosts: Names, besides localhost, by which this machine may be asked on a loopback address; a proxy's, mostly.
    """

    def __init__(
        self,
        monitoring: MonitoringSystem,
        health: HealthRegistry,
        *,
        exporters: Exporters | None = None,
        dashboard: bool = True,
        n_shards: int = 1,
        hosts: Collection[str] = (),
    ) -> None:
        self._monitoring = monitoring
        self._health = health
        self._exporters = Exporters() if exporters is None else exporters
        self._dashboard = dashboard
        self._n_shards = n_shards
        self._hosts = frozenset((_LOCALHOST, *(name.lower() for name in hosts)))

    def routes(self) -> dict[str, Handler]:
        """Return the handlers by path, all for GET."""
        routes: dict[str, Handler] = {"/metrics": self.metrics, "/healthz": self.live, "/readyz": self.ready}
        if self._dashboard:
            routes |= {"/api/metrics.json": self.history, "/": self.index}
        return {path: partial(self._guarded, handler) for path, handler in routes.items()}

    def router(self) -> Router:
        """Return a router with these paths alone."""
        router = Router()
        for path, handler in self.routes().items():
            router.get(path, handler)
        return router

    def _guarded(self, handler: Handler, request: Request) -> Answer | Awaitable[Answer]:
        if not names_this_machine(request, self._hosts):
            raise HttpError(421, "this is not the name of this machine", "ask for it by its address, or as localhost")
        return handler(request)

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


def names_this_machine(request: Request, hosts: Collection[str] = ()) -> bool:
    """Return whether the Host field names this machine, where only this machine's own users come (RFC 9110 section 15.5.20).

    Args:
        request: Asked of a listener; on one that is not on a loopback address every name will do.
        hosts: Names in lower case that will do besides localhost.
    """
    own = request.transport_info("sockname")
    if not isinstance(own, tuple) or not _is_numeric(str(own[0]), loopback=True):
        return True
    host = (request.headers.get("host") or "").lower()
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    name = name.removesuffix(".")
    return not name or name == _LOCALHOST or name in hosts or name.endswith(f".{_LOCALHOST}") or _is_numeric(name)


def _is_numeric(host: str, *, loopback: bool = False) -> bool:
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None) or found
    return mapped.is_loopback or not loopback


def _report(status: int, report: Report) -> Response:
    return Response(status, (("content-type", "application/json"), *_PLAIN), _encode(report))


def _totals(snapshot: Snapshot, names: frozenset[str]) -> dict[str, object]:
    """Return for each family the sum of its series (of a histogram: the number of observations)."""
    totals = {family.name: snapshot.value(family.name) for family in snapshot.layout.families if family.name in names and family.series}
    return {"at_ms": snapshot.at_ns // 1_000_000, "totals": totals}
