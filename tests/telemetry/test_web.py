"""The HTTP face, over a real connection on both Worlds; and the dashboard in a real browser."""

import asyncio
import json
import os
import re
from typing import Any, Self

import pytest

from isopod.net.http.client import HttpClient
from isopod.net.http.server import HttpServer
from isopod.runtime.metrics import Registry
from isopod.telemetry.health import HealthRegistry
from isopod.telemetry.monitoring import MonitoringSystem
from isopod.telemetry.web import TelemetryWeb
from isopod.world.network import TcpAddress, UnixAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.telemetry.kit import Memo

CHROMIUM = "/usr/bin/chromium-headless-shell"


class Rig:
    """Telemetry served on a loopback port."""

    def __init__(self, world: World, **options: Any) -> None:
        self.registry = Registry()
        self.memo = Memo(world.clock)
        self.monitoring = MonitoringSystem(world, self.registry, collectors=[], logger=self.memo.logger, interval_s=60)
        self.health = HealthRegistry(world.clock, kept_s=0)
        self.web = TelemetryWeb(self.monitoring, self.health, n_shards=3, **options)
        self.server = HttpServer(world, self.web.router(), logger=self.memo.logger, metrics=Registry())
        self.client = HttpClient(world)
        self.origin = ""

    async def __aenter__(self) -> Self:
        listener = await self.server.listen(TcpAddress("127.0.0.1", 0))
        assert isinstance(listener.address, TcpAddress)
        self.origin = f"http://127.0.0.1:{listener.address.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.close()
        await self.monitoring.close()

    async def get(self, path: str, **headers: str) -> tuple[int, str, bytes]:
        """Return status, content type and body."""
        answer = await self.client.request("GET", self.origin + path, headers=tuple(headers.items()))
        return answer.status, answer.headers.get("content-type") or "", await answer.read()


@pytest.mark.row("S24")
async def test_metrics_are_served_in_every_format(world: World) -> None:
    async with Rig(world) as rig:
        rig.registry.counter("calls_total", "Calls.").inc(7)
        status, kind, body = await rig.get("/metrics")
        assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert b"calls_total 7.0\n" in body
        status, kind, body = await rig.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
        assert (status, kind.split(";")[0], body[-6:]) == (200, "application/openmetrics-text", b"# EOF\n")
        for name in ("json", "csv", "influx", "openmetrics", "prometheus"):
            assert b"calls" in (await rig.get(f"/metrics?format={name}"))[2]
        status, _, body = await rig.get("/metrics?format=xml")
        assert (status, b"choose one of: prometheus" in body) == (400, True)
        assert (await rig.get("/elsewhere"))[0] == 404


@pytest.mark.row("S24")
async def test_health_is_served_with_reasons(world: World) -> None:
    async with Rig(world) as rig:
        reason: list[str | None] = [None]
        rig.health.register("database", lambda: reason[0])
        assert ((await rig.get("/healthz"))[0], (await rig.get("/readyz"))[0]) == (200, 200)
        reason[0] = "no connection"
        status, kind, body = await rig.get("/readyz")
        assert (status, kind, json.loads(body)["reasons"]) == (503, "application/json", ["database: no connection"])
        status, _, body = await rig.get("/healthz")
        assert (status, json.loads(body)["last_report"]["status"]) == (200, "failing")
        reason[0] = None
        rig.health.shut("SIGTERM")
        assert ((await rig.get("/healthz"))[0], (await rig.get("/readyz"))[0]) == (200, 503)


async def test_the_history_can_be_had(world: World) -> None:
    async with Rig(world) as rig:
        counter = rig.registry.counter("calls_total", "Calls.")
        for _ in range(3):
            counter.inc()
            await rig.monitoring.collect()
        counter.inc()
        state = json.loads((await rig.get("/api/metrics.json?history=1&name=calls_total"))[2])
        values = [past["totals"]["calls_total"] for past in state["history"]]
        assert (values, state["metrics"][0]["series"][0]["value"], len(state["metrics"])) == ([1, 2, 3], 4, 1)
        assert (state["shards"], state["health"]["status"]) == (3, "ok")
        assert "history" not in json.loads((await rig.get("/api/metrics.json"))[2])
        assert (await rig.get("/api/metrics.json?history=1"))[0] == 400
        assert (await rig.get("/api/metrics.json?history=1&name=" + ",".join(map(str, range(40)))))[0] == 400


async def test_the_dashboard_is_whole_in_itself(world: World) -> None:
    async with Rig(world) as rig:
        answer = await rig.client.request("GET", rig.origin + "/")
        page = (await answer.read()).decode()
        policy = answer.headers.get("content-security-policy") or ""
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert re.findall(r"(?:src|href)=\"?([^\s\">]+)", page) == ["data:,"]
        assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


async def test_the_dashboard_can_be_left_out(world: World) -> None:
    rig = Rig(world)
    rig.web = TelemetryWeb(rig.monitoring, rig.health, dashboard=False)
    assert list(rig.web.routes()) == ["/metrics", "/healthz", "/readyz"]


@pytest.mark.host
@pytest.mark.row("S24")
@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason="no chromium-headless-shell")
async def test_values_on_the_page_change_when_the_metric_does(host_world: World, folder: str) -> None:
    async with Rig(host_world) as rig:
        polls = rig.registry.gauge("polls", "How often the page has asked.", label="<b>markup</b><script>document.title='x'</script>")
        memory = rig.registry.gauge("isopod_memory_current_usage_bytes", "Memory.")

        def asked() -> None:
            polls.inc()
            memory.set(polls.value * (1 << 20))

        rig.registry.before_snapshot(asked)
        rig.health.register("cache", lambda: "cold", critical=False)
        argv = (CHROMIUM, "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={folder}/profile")
        browser = await asyncio.create_subprocess_exec(
            *(*argv, "--enable-logging=stderr", "--virtual-time-budget=6000", "--dump-dom", rig.origin + "/"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(40):
                out, log = await browser.communicate()
        finally:
            if browser.returncode is None:
                browser.kill()
                await browser.wait()
        dom = out.decode()
        found = re.search(r'<tr data-metric="polls"><td title="How often the page has asked.">polls</td><td class="dim">(.*?)</td>'
                          r'<td class="value">(\d+)</td>', dom)  # fmt: skip
        assert found is not None, dom[-3000:] + log.decode()
        assert "&lt;b&gt;markup" in found.group(1), "a label's markup stays text"
        # A page that never came back for more would still show 1.
        assert 3 <= int(found.group(2)) <= polls.value
        card = re.search(r'<div class="name">Memory</div><div class="now">(\d+) MiB</div><svg.*?<path d="(M[^"]*)"', dom)
        assert card is not None
        assert (int(card.group(1)), card.group(2).count("L") >= 2) == (int(found.group(2)), True)
        assert "<title>isopod</title>" in dom
        assert '<span id="status" class="degraded">degraded</span>' in dom
        assert "<li>cache: cold</li>" in dom
        assert b"Content Security Policy" not in log
        assert b"Uncaught" not in log


@pytest.mark.row("S24")
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("LOCALHOST", 200),
        ("localhost.:80", 200),
        ("node.localhost", 200),
        ("[::1]:80", 200),
        ("metrics.example", 200),
        ("evil.example:80", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil-metrics.example", 421),
    ],
)
async def test_pages_of_other_sites_cannot_read_a_loopback_port(sim_world: SimWorld, host: str, status: int) -> None:
    """DNS rebinding: the site's own name resolves to 127.0.0.1, and the browser takes our answers for its own."""
    async with Rig(sim_world.world, hosts=("Metrics.example",)) as rig:
        for path in ("/", "/metrics", "/api/metrics.json", "/healthz", "/readyz"):
            assert (await rig.get(path, host=host))[0] == status


@pytest.mark.row("S24")
async def test_a_unix_socket_may_be_asked_by_any_name(world: World, folder: str) -> None:
    async with Rig(world) as rig:
        listener = await rig.server.listen(UnixAddress(f"{folder}/socket"))
        answer = await rig.client.request("GET", "http://any.example/healthz", address=listener.address)
        assert answer.status == 200
