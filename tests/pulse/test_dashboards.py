"""The dashboard, the rules, and expressions like those of others' dashboards, in a real Prometheus that scrapes a real server.

What is scraped is made of the samples of shims' texts, of the demo's (whose sandbox uses one CPU, by its clock), of a container and of a
shim that does not answer, through reader, converter, store and server.
"""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from isopod.pulse import core, demo
from isopod.pulse.cadvisor import FAMILIES, WANTED, cadvisor_labels
from isopod.pulse.converter import Converter
from isopod.pulse.figures import measure_container
from isopod.pulse.labels import kata_labels
from isopod.pulse.model import Container, ContainerStats, Pod, SandboxStats, Target
from isopod.pulse.own import Durations, Facts
from isopod.pulse.resource import resource
from isopod.pulse.server import PulseServer
from isopod.pulse.settings import PulseSettings
from isopod.pulse.store import Store
from isopod.runtime.logger import Logger
from isopod.world.network import TcpAddress, parse_address
from isopod.world.world import World
from tests.pulse.prometheus import Prometheus, missing
from tests.pulse.server_kit import Shims
from tests.pulse.test_cadvisor import LOCAL

DEPLOY: Final = Path(__file__).parents[2] / "deploy" / "pulse"
DATA: Final = Path(__file__).parent / "data"
RULES: Final = DEPLOY / "alerts.yaml"
DASHBOARD: Final = DEPLOY / "grafana-dashboard.json"
BUSY: Final = Pod("0b1c", "busy-0", "team", containers=(Container("c1", "busy", "docker.io/library/busybox:1"),))
SAMPLED: Final = Pod("77aa", "sampled-0", "team", containers=(Container("c2", "web", "nginx"), Container("c3", "side", "envoy")))
SIDECARS: Final = (ContainerStats("c3", 0, 1 << 20, 2 << 20, 1 << 20, 1 << 20, 5, 0, 0, 4096, 1, "/var/lib/x"),)
"""What the runtime says of one of the containers; the other is busy."""
OF_CONTAINERS: Final = frozenset(measure_container(SIDECARS[0], seen_ns=1))
FACTS: Final = Facts(
    roots={"/run/vc/sbs": True},
    requests={"ok": 5, "timeout": 1},
    durations=Durations((0.01, 0.1), (3, 2, 1), 0.5),
    cri_calls={"ok": 3},
    cri_up=True,
    failures={"cri": 0},
)
WRAPPED: Final = b"kata_shim_pod_overhead_cpu 1.8446744073709552e+19\n"
"""A figure that went below zero as an unsigned number, as Kata's shim in Go says it at times: it is left out and counted."""
QUIET: Final = frozenset(("kata_pulse_conflicts",))
"""Families that are there only if something is wrong which is not wrong here."""
STEP_S: Final = 0.1
SCRAPES_S: Final = 12.0
WAIT_S: Final = 90.0

needs_prometheus = pytest.mark.skipif(bool(missing()), reason=f"not installed: {missing()} (Debian: prometheus)")


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def panels() -> Iterator[tuple[str, str]]:
    """Iterate over the title and the expression of each query, with the dashboard's variables at "all"."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            expression = re.sub(r"\$(namespace|pod|instance)\b", ".*", target["expr"]).replace("$__rate_interval", "1m")
            yield panel["title"], expression


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


# --- without Prometheus -----------------------------------------------------------------------------------------------


def test_the_dashboard_is_sound() -> None:
    board = dashboard()
    shown = board["panels"]
    assert len({panel["id"] for panel in shown}) == len(shown) > 20
    variables = {each["name"] for each in board["templating"]["list"]}
    text = DASHBOARD.read_text(encoding="utf-8")
    assert set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"} == variables, "each variable is defined and used"
    for panel in shown:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        others = [other["gridPos"] for other in shown if other is not panel]
        assert not [
            other
            for other in others
            if other["x"] < place["x"] + place["w"]
            and place["x"] < other["x"] + other["w"]
            and other["y"] < place["y"] + place["h"]
            and place["y"] < other["y"] + other["h"]
        ], f"{panel['title']} lies on another panel"
    for title, expression in panels():
        assert "$" not in expression, f"{title}: {expression}"


def test_queries_of_containers_leave_the_kubelet_s_out_and_choose_a_level() -> None:
    """T18: a pod that both tell of counts once, and so does one whose only container has series of its own."""
    for expression in [expression for _, expression in panels()] + [rule["expr"] for rule in rules()]:
        for name, selector in re.findall(r"\b(container_\w+)\{([^}]*)\}", expression):
            assert 'job!="kubelet"' in selector, expression
            has_levels = FAMILIES[name].inner or name in OF_CONTAINERS
            assert not has_levels or 'container=""' in selector, expression


def test_every_rule_says_what_it_is_for() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning", "info")
            assert rule["annotations"]["summary"].endswith(".")
        else:
            assert re.fullmatch(r"namespace_pod:\w+:\w+", rule["record"])


@needs_prometheus
def test_rules_pass_promtool() -> None:
    """Each alert fires in the unit tests beside it, and nothing fires where all is well."""
    tests = DATA / "alerts_test.yaml"
    for argv in (["promtool", "check", "rules", str(RULES)], ["promtool", "test", "rules", str(tests)]):
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=WAIT_S, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    fired = set(re.findall(r"alertname: (\w+)", tests.read_text(encoding="utf-8")))
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


# --- in Prometheus ----------------------------------------------------------------------------------------------------


class Figures:
    """Sandboxes whose figures are taken in again and again, as an agent does."""

    def __init__(self, store: Store, now_ns: Callable[[], int]) -> None:
        self._store = store
        self._now_ns = now_ns
        self._converter = Converter()
        self._now_s = asyncio.get_running_loop().time
        self._began_s = self._now_s()
        self._samples = {path.name: path.read_bytes() for path in sorted(DATA.glob("*.prom"))}
        for target, pod in self._targets():
            store.add(target)
            store.describe(target.id, pod)
        store.add(Target("silent", "go", "/nowhere"))
        store.fail("silent", "refused", 0.001)
        store.add(Target(LOCAL.id, "isopod", ""))
        store.describe(LOCAL.id, LOCAL.pod)

    async def run(self) -> None:
        while True:
            self.take_in()
            await asyncio.sleep(STEP_S)

    def take_in(self) -> None:
        """Take one round in: the busy sandbox has used one CPU since it began."""
        up_s = self._now_s() - self._began_s
        half_busy = ContainerStats("c2", cpu_ns=int(up_s * 5e8), working_set_bytes=7 << 20, usage_bytes=8 << 20, rss_bytes=6 << 20)
        stats: SandboxStats = dict.fromkeys(self._samples, (half_busy, *SIDECARS))
        self._converter.take_stats({**stats, "busy": ()}, now_ns=self._now_ns())
        for target, pod in self._targets():
            body = self._samples.get(target.id) or demo.body(10, 60.0 + up_s) + calls(up_s) + WRAPPED
            reading = core.read(body, kata_labels(target.id, pod), core.Rules(), WANTED)
            assert set(reading.dropped) <= {"wrapped"}, f"{target.id}: {reading.dropped}"
            containers = self._converter.take(target, reading.values, pod, at_s=self._now_s(), now_ns=self._now_ns())
            self._store.replace(target.id, reading.families, containers=containers, n_bytes=len(body), dropped=reading.dropped)
        assert LOCAL.details is not None
        details = LOCAL.details._replace(n_periods=int(up_s * 10), n_throttled_periods=int(up_s))
        local = self._converter.take_local(LOCAL._replace(cpu_s=up_s, details=details), at_s=self._now_s(), now_ns=self._now_ns())
        self._store.replace(LOCAL.id, {}, containers=local)

    def _targets(self) -> list[tuple[Target, Pod | None]]:
        known = [(Target(name, "rust" if "_rs" in name else "go", f"/{name}"), SAMPLED._replace(name=name)) for name in self._samples]
        return [*known, (Target("busy", "go", "/busy"), BUSY), (Target("unknown", "go", "/unknown"), None)]


def calls(up_s: float) -> bytes:
    """Return the histogram of a shim that asks its agent ten times a second, and gets its answers within 2 ms."""
    name, n = "kata_shim_agent_rpc_durations_histogram_milliseconds", int(up_s * 10)
    action = 'action="grpc.CheckRequest"'
    rows = [f'{name}_bucket{{{action},le="{le}"}} {count}\n' for le, count in (("1", 0), ("2", n), ("+Inf", n))]
    rows += [f"{name}_{end}{{{action}}} {n}\n" for end in ("sum", "count")]
    return f"# TYPE {name} histogram\n{''.join(rows)}".encode()


@asynccontextmanager
async def scraped(world: World, folder: str) -> AsyncIterator[Prometheus]:
    """Have a Prometheus scrape for `SCRAPES_S`."""
    store = Store(asyncio.get_running_loop().time, container_labels=cadvisor_labels, resource=resource)
    logger = Logger(lambda _: None, world.clock)
    server = PulseServer(world, PulseSettings(listen="127.0.0.1:0"), store, Shims(), facts=lambda: FACTS, logger=logger)
    address = parse_address(await server.start())
    assert isinstance(address, TcpAddress)
    jobs = {"pulse": (address, "/metrics"), "pulse-resource": (address, "/metrics/resource")}
    figures = asyncio.get_running_loop().create_task(Figures(store, world.clock.now_ns).run())
    try:
        async with Prometheus(world, folder, jobs, str(RULES)) as prometheus:
            async with asyncio.timeout(WAIT_S):
                while not [value for _, value in await prometheus.query('count_over_time(up{job="pulse"}[5m]) > 12') if value]:
                    assert not figures.done(), figures
                    await asyncio.sleep(0.2)
            yield prometheus
    finally:
        figures.cancel()
        await asyncio.gather(figures, return_exceptions=True)
        await server.stop()


MIXIN: Final = {
    "CPU by container": "sum by (namespace, pod, container) "
    '(rate(container_cpu_usage_seconds_total{image!="", container!="", cpu="total"}[1m]))',
    "CPU by pod": 'sum by (namespace, pod) (rate(container_cpu_usage_seconds_total{container=""}[1m]))',
    "working set by container": 'container_memory_working_set_bytes{image!="", container!=""}',
    "rss by container": 'sum by (namespace, pod) (container_memory_rss{image!="", container!=""})',
    "cache by container": 'sum by (namespace, pod) (container_memory_cache{image!="", container!=""})',
    "swap by container": 'sum by (namespace, pod) (container_memory_swap{image!="", container!=""})',
    "received by pod": "sum by (namespace, pod, interface) (rate(container_network_receive_bytes_total[1m]))",
    "sent by pod": "sum by (namespace, pod, interface) (rate(container_network_transmit_bytes_total[1m]))",
    "packets received": "sum by (namespace, pod) (rate(container_network_receive_packets_total[1m]))",
    "packets dropped": "sum by (namespace, pod) (rate(container_network_receive_packets_dropped_total[1m]))",
    "operations": "sum by (namespace, pod) (rate(container_fs_reads_total"
    '{device=~"(/dev/)?(mmcblk.p.+|nvme.+|rbd.+|sd.+|vd.+|xvd.+|dm-.+|md.+|dasd.+)", container!=""}[1m]))',
    "throughput": 'sum by (pod) (rate(container_fs_writes_bytes_total{container!="", device=~"(/dev/)?(sd.+|vd.+)"}[1m]))',
    "throttling": 'sum by (container, pod, namespace) (increase(container_cpu_cfs_throttled_periods_total{container!=""}[1m]))'
    " / sum by (container, pod, namespace) (increase(container_cpu_cfs_periods_total[1m])) >= 0",
    "metrics server": "sum by (namespace, pod) (rate(pod_cpu_usage_seconds_total[1m]))",
    "resource": 'container_memory_working_set_bytes{job="pulse-resource", container="busy"}',
}
"""Written for these tests after what the kubernetes-mixin asks."""


@pytest.mark.host
@pytest.mark.slow
@needs_prometheus
@pytest.mark.row("K14", "T17", "T18")
async def test_every_query_is_answered(host_world: World, folder: str) -> None:
    async with scraped(host_world, folder) as prometheus:
        for target in await prometheus.targets():
            assert (target["health"], target["lastError"]) == ("up", ""), target["scrapeUrl"]
        empty = [title for title, expression in panels() if not await prometheus.query(expression)]
        assert not empty, "panels without an answer"
        empty = [what for what, expression in MIXIN.items() if not await prometheus.query(expression)]
        assert not empty, "expressions of the mixin's kind without an answer"
        await check_rules(prometheus)
        await check_variables(prometheus)
        await check_types(prometheus)
        await check_truth(prometheus)


async def check_rules(prometheus: Prometheus) -> None:
    """All are evaluated without an error; sums are there; each family that an alert looks at is."""
    for rule in await prometheus.rules():
        assert (rule["health"], rule.get("lastError", "")) == ("ok", ""), rule["name"]
    for rule in rules():
        if "record" in rule:
            assert await prometheus.query(rule["record"]), rule["record"]
            continue
        for name in re.findall(r"\b(?:kata|container|namespace_pod:container)_[\w:]+|\bup\b", rule["expr"]):
            assert name in QUIET or await prometheus.query(name), f"{rule['alert']} looks at {name}"
    firing = {labels["alertname"] for labels, _ in await prometheus.query('ALERTS{alertstate=~"pending|firing"}')}
    assert firing <= {"KataPulseSandboxUnanswered", "KataPulseLinesDropped", "KataSandboxMemoryNearlyFull"}


async def check_variables(prometheus: Prometheus) -> None:
    """The dashboard's variables find their values."""
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]  # else it fails
            values = await prometheus.label_values(label, selector.replace("$namespace", ".*"))
            assert {"namespace": "team", "pod": "busy-0"}.get(label, values[0]) in values


async def check_types(prometheus: Prometheus) -> None:
    """T15: what Prometheus took for counters and gauges is what was meant; the families are one each."""
    known = await prometheus.metadata()
    seen = {name: told for name in FAMILIES if (told := known.get(name) or known.get(name.removesuffix("_total")))}
    assert len(seen) > 30
    for name, told in seen.items():  # OpenMetrics, which Prometheus asks for, has the type under the name without _total
        assert {each["type"] for each in told} == {FAMILIES[name].kind}, name


async def check_truth(prometheus: Prometheus) -> None:
    """T17: one CPU of use is a rate of 1.0, at both levels, and a query that chooses a level finds it once."""
    for selector in ('container=""', 'container="busy"', 'image!="", container!=""'):
        found = await prometheus.query(f'rate(container_cpu_usage_seconds_total{{job="pulse", pod="busy-0", {selector}}}[10s])')
        assert len(found) == 1
        assert found[0][1] == pytest.approx(1.0, rel=0.05)
    of_local = f'job="pulse", pod="{LOCAL.pod.name}", container!=""'
    local = await prometheus.query(f"sum by (pod) (rate(container_cpu_usage_seconds_total{{{of_local}}}[10s]))")
    assert local[0][1] == pytest.approx(1.0, rel=0.05)
    of_sampled = 'job="pulse", pod=~"shim_sample.*", image!="", container!=""'
    for container, cores in (("web", 0.5), ("side", 0.0)):
        found = await prometheus.query(f'rate(container_cpu_usage_seconds_total{{{of_sampled}, container="{container}"}}[10s])')
        assert len(found) == len(list(DATA.glob("*.prom")))
        assert all(value == pytest.approx(cores, rel=0.05, abs=0.001) for _, value in found)
        listed = f'job="pulse-resource", namespace="team", container="{container}"'
        short = await prometheus.query(f"rate(container_cpu_usage_seconds_total{{{listed}}}[10s])")
        assert len(short) == len(found)
    for name in sorted(OF_CONTAINERS - {"container_memory_failures_total"}):
        (most,) = await prometheus.query(f'max(count by (namespace, pod, container, device) ({name}{{job="pulse", pod!=""}}))')
        assert most[1] == 1, f"{name} stands twice"
    pods = await prometheus.query('rate(pod_cpu_usage_seconds_total{pod="busy-0"}[10s])')
    assert [value for _, value in pods] == [pytest.approx(1.0, rel=0.05)]
