"""Strict mode by itself: one answer of each kind, and what no recording shows.

Answer by answer it is compared with kata-monitor in test_kata_monitor; where isopod differs on purpose the table there says so.
"""

import gzip
import json
import re
from typing import Any

import pytest

from isopod.pulse.model import Pod
from isopod.pulse.shims import ShimAnswer, ShimError
from isopod.pulse.strict import FIELDS_MAX, fields_of, shortest
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.pulse.server_kit import ROOTS, WEB, Answer, Rig, values

FOUR = ("kata_monitor_running_shim_count", "kata_monitor_scrape_count", "kata_monitor_scrape_failed_count")
PATHS = (
    "/metrics", "/sandboxes", "/agent-url", "/debug/vars", "/debug/pprof/", "/debug/pprof/cmdline", "/debug/pprof/profile",
    "/debug/pprof/symbol", "/debug/pprof/trace",
)  # fmt: skip
PLAIN = "text/plain; charset=utf-8"


def rig_of(world: World, **settings: Any) -> Rig:
    return Rig(world, strict_compat=True, **settings)


def types(answer: Answer) -> dict[str, str]:
    """Return the types of an exposition's families."""
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", answer.text, re.MULTILINE))


@pytest.mark.row("T14", "K3")
async def test_every_unknown_path_is_the_index(world: World) -> None:
    async with rig_of(world) as rig:
        width = max(map(len, PATHS)) + 3
        for path, method in (("/", "GET"), ("/nowhere", "GET"), ("/metrics/cadvisor", "GET"), ("/healthz", "POST"), ("/top?x=y", "DELETE")):
            answer = await rig.ask(path, method)
            lines = answer.text.splitlines()
            assert (answer.status, answer.headers["content-type"], lines[0]) == (200, PLAIN, "Available HTTP endpoints:")
            assert [line[: width + 2] for line in lines[1:]] == [f"{name:<{width}}: " for name in PATHS]
        shown = await rig.ask("/", accept="application/xml,text/html")
        assert shown.headers["content-type"] == "text/html"
        assert shown.text.startswith("<h1>Available HTTP endpoints:</h1>\n<ul><li><b><a href='/metrics'>/metrics</a></b>: ")
        assert re.findall(r"href='(.*?)'", shown.text) == ["/metrics", "/sandboxes"]
        assert (await rig.ask("/", accept="text/html;q=0.9,*/*")).headers["content-type"] == PLAIN, "the exact element only"
        assert (await rig.ask("/metrics", "POST")).status == 200, "any method"


@pytest.mark.row("T14")
@pytest.mark.parametrize(
    ("path", "elsewhere"),
    [
        ("/", ""),
        ("/metrics", ""),
        ("/metrics/", ""),
        ("/debug/pprof/", ""),
        ("/debug/pprof", "/debug/pprof/"),
        ("//metrics", "/metrics"),
        ("///", "/"),
        ("/a/./b//c/", "/a/b/c/"),
        ("/a/..", "/"),
        ("/../..", "/"),
        ("/debug//pprof", "/debug/pprof/"),
        ("/%2e%2e/metrics", ""),
        ("//evil.example/x", "/evil.example/x"),
        ("*", ""),
    ],
)
def test_paths_are_brought_to_their_shortest_form(path: str, elsewhere: str) -> None:
    assert shortest(path) == elsewhere


@pytest.mark.row("T14")
def test_a_querys_fields_are_read_as_go_reads_them() -> None:
    assert fields_of("a=1&a=2&&b&=c&d=%41+b&%65=f=g") == [("a", "1"), ("a", "2"), ("b", ""), ("", "c"), ("d", "A b"), ("e", "f=g")]
    assert fields_of("a=%zz&b=1;c=2&d=%4&e=%ff") == [("e", "\ufffd")]
    assert fields_of("") == []
    assert len(fields_of("a&" * (2 * FIELDS_MAX))) == FIELDS_MAX


@pytest.mark.row("T14")
async def test_a_redirect_leads_to_a_path_of_this_server(world: World) -> None:
    async with rig_of(world) as rig:
        answer = await rig.client.request(
            "GET", "http://localhost//evil.example/%22%3E?a='%3E<b>", address=rig.address, follows_redirects=False
        )
        assert answer.status == 307
        fields = {name.lower(): value for name, value in answer.headers}
        assert fields["location"] == "/evil.example/%22%3E?a='%3E%3Cb%3E"
        assert b"<b>" not in await answer.read()


@pytest.mark.row("T14", "K15")
async def test_the_aggregate(world: World) -> None:
    async with rig_of(world) as rig:
        rig.fill("a", WEB)
        rig.fill("b")
        rig.fill("plain", runtime="isopod")
        answer = await rig.ask("/metrics")
        assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores")
        shown = values(answer.text)
        assert all(name in shown for name in FOUR)
        assert {name.split("_")[0] for name in types(answer)} == {"kata"}, "no container_*"
        assert not [name for name in types(answer) if name.startswith("kata_pulse")]
        assert types(answer)["kata_monitor_scrape_count"] == "counter"
        assert shown['kata_agent_scrape_count{sandbox_id="a",cri_uid="0d3b",cri_name="web-0",cri_namespace="prod"}'] == 3
        assert shown['kata_agent_scrape_count{sandbox_id="b",cri_uid="",cri_name="",cri_namespace=""}'] == 3
        assert shown["kata_monitor_running_shim_count"] == 2


@pytest.mark.row("T14")
async def test_pod_labels_of_the_allow_list_stay(world: World) -> None:
    """A setting that kata-monitor has not; who sets it wants it."""
    async with rig_of(world) as rig:
        rig.fill("a", Pod("u", "n", "s", labels=(("app", "web"),)))
        assert 'cri_namespace="s",label_app="web"' in (await rig.ask("/metrics")).text


@pytest.mark.row("T14")
@pytest.mark.parametrize(
    ("value", "families"),
    [
        ("kata_guest,kata_agent", {"kata_guest_load", "kata_agent_scrape_count"}),
        ("kata_guest,%20kata_agent", {"kata_guest_load"}),
        ("kata_agent,kata_agent_scrape", {"kata_agent_scrape_count"}),
        ("kata_monitor", set()),
        ("kata_guest,", {"kata_guest_load", "kata_agent_scrape_count", "kata_shim_rpc_durations_histogram_milliseconds"}),
        ("nothing", set()),
    ],
)
async def test_filter_family_takes_prefixes_as_they_are(sim_world: SimWorld, value: str, families: set[str]) -> None:
    """Own metrics are left out; overlapping prefixes print a family once, where kata-monitor does so twice."""
    async with rig_of(sim_world.world) as rig:
        rig.fill("a", WEB)
        answer = await rig.ask(f"/metrics?filter_family={value}")
        assert (answer.status, {*types(answer)}) == (200, families)
        assert "kata_monitor_scrape_count" in types(await rig.ask("/metrics?filter_family="))


@pytest.mark.row("T14", "K5")
async def test_one_sandbox_is_the_shims_own_answer(world: World) -> None:
    async with rig_of(world) as rig:
        rig.fill("a", WEB)
        rig.add("new")
        answer = await rig.ask("/metrics?sandbox=a&filter_family=x", accept_encoding="gzip", accept="application/openmetrics-text")
        assert (answer.status, answer.headers["content-type"], answer.body) == (200, PLAIN, b"guest_load{} 0.5\n")
        assert "content-encoding" not in answer.headers
        for name in ("nobody", "new"):
            assert (await rig.ask(f"/metrics?sandbox={name}")).status == 500
        after = values((await rig.ask("/metrics?sandbox=")).text)
        assert (after["kata_monitor_scrape_count"], after["kata_monitor_scrape_failed_count"]) == (4, 0)
        assert after["kata_monitor_scrape_durations_histogram_milliseconds_count"] == 3
        assert rig.shims.asked == []


@pytest.mark.row("T14")
async def test_formats_are_text_and_protobuf_and_codings_gzip(sim_world: SimWorld) -> None:
    async with rig_of(sim_world.world) as rig:
        rig.fill("a", WEB)
        plain = (await rig.ask("/metrics?filter_family=kata_guest")).body
        for accept in ("application/openmetrics-text;version=1.0.0,text/plain;q=0.1", "application/openmetrics-text", "application/*", ""):
            answer = await rig.ask("/metrics?filter_family=kata_guest", accept=accept)
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", accept
        dots = await rig.ask("/metrics", accept="text/plain;version=0.0.4;escaping=dots")
        assert dots.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8; escaping=dots"
        protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
        assert (await rig.ask("/metrics", accept=protobuf)).headers["content-type"].startswith("application/vnd.google.protobuf")
        for accepted, coding in (("zstd, gzip", "gzip"), ("zstd", None), ("*", None), ("x-gzip", None), ("gzip;q=0", None)):
            answer = await rig.ask("/metrics?filter_family=kata_guest", accept_encoding=accepted)
            assert answer.headers.get("content-encoding") == coding, accepted
            assert (gzip.decompress(answer.body) if coding else answer.body) == plain


@pytest.mark.row("T14", "K6")
async def test_sandboxes_as_lines_and_as_links(world: World) -> None:
    async with rig_of(world) as rig:
        assert (await rig.ask("/sandboxes"))[::2] == (200, b"")
        rig.add("b")
        rig.fill("a", WEB)
        rig.add("plain", "isopod")
        rig.add("x'><b>")
        answer = await rig.ask("/sandboxes")
        assert (answer.headers["content-type"], answer.text) == (PLAIN, "a\nb\nx'><b>\n")
        shown = await rig.ask("/sandboxes", accept="text/html, */*")
        assert shown.headers["content-type"] == "text/html"
        assert shown.text.startswith("<h1>Sandbox list</h1>\n<ul>\n<li>a: ")
        assert re.findall(r"href='(.*?)'", shown.text)[:3] == ["/debug/pprof/?sandbox=a", "/metrics?sandbox=a", "/agent-url?sandbox=a"]
        assert "<b>" not in shown.text


@pytest.mark.row("T14", "K20")
async def test_the_agents_url(world: World) -> None:
    async with rig_of(world) as rig:
        socket = rig.add("a")
        rig.shims.answers[socket, "/agent-url"] = ShimAnswer(200, (), b"vsock://3:1024")
        answer = await rig.ask("/agent-url?sandbox=a")
        assert (answer.status, answer.headers["content-type"], answer.body) == (200, PLAIN, b"vsock://3:1024\n")
        rig.shims.answers[socket, "/agent-url"] = ShimAnswer(500, (), b"no agent")
        assert (await rig.ask("/agent-url?sandbox=a"))[::2] == (200, b"no agent\n"), "the status is not looked at"
        rig.shims.answers[socket, "/agent-url"] = ShimError("refused", "cannot connect")
        for query in ("?sandbox=a", "", "?sandbox=nobody", "?sandbox=../a"):
            answer = await rig.ask(f"/agent-url{query}")
            assert (answer.status, answer.headers["content-type"]) == (400, PLAIN), query
            assert answer.text.count("\n") == 1 and answer.text.endswith("\n")


@pytest.mark.row("T14")
async def test_readiness(world: World) -> None:
    async with rig_of(world) as rig:
        assert (await rig.ask("/readyz"))[::2] == (200, b"/run/vc/sbs available\n/run/kata unavailable\n")
        rig.facts = rig.facts._replace(roots=dict.fromkeys(ROOTS, False))
        assert (await rig.ask("/readyz")).status == 503


@pytest.mark.row("T14")
async def test_debug_pages(world: World) -> None:
    async with rig_of(world, pprof=True) as rig:
        socket = rig.add("a")
        for query in ("", "?sandbox=nobody", "?sandbox=../a"):
            answer = await rig.ask(f"/debug/pprof/{query}")
            assert (answer.status, answer.text) == (400, "sandbox may be stopped or deleted\n"), query
            assert (answer.headers["x-go-pprof"], answer.headers["content-type"]) == ("1", PLAIN)
        rig.shims.answers[socket, "/debug/pprof/?sandbox=a"] = ShimAnswer(200, (("content-type", "text/html"),), b"<a href='heap?debug=1'>")
        index = await rig.ask("/debug/pprof/?sandbox=a")
        assert (index.status, index.body) == (200, b"<a href='heap?sandbox=a&debug=1'>")
        rig.shims.answers[socket, "/debug/vars?debug=1&sandbox=a"] = ShimAnswer(404, (), b"404 page not found")
        answer = await rig.ask("/debug/vars?debug=1&sandbox=a")
        assert (answer.status, answer.body) == (200, b"404 page not found"), "whole query, and the status is not looked at"
        rig.shims.answers[socket, "/debug/vars?sandbox=a"] = ShimError("gone", "no such socket")
        answer = await rig.ask("/debug/vars?sandbox=a")
        assert (answer.status, answer.text) == (400, "sandbox may be stopped or deleted\n")
        rig.shims.answers[socket, "/debug/vars?sandbox=a"] = ShimError("refused", "cannot connect")
        answer = await rig.ask("/debug/vars?sandbox=a")
        assert (answer.status, answer.headers["x-go-pprof"]) == (500, "1")
        assert answer.text.startswith("failed to request ")


@pytest.mark.row("T14")
async def test_debug_pages_stay_off_without_their_flag(world: World) -> None:
    """Kept from kata-monitor's way on purpose."""
    async with rig_of(world) as rig:
        rig.add("a")
        assert (await rig.ask("/debug/pprof/?sandbox=a")).status == 404
        assert rig.shims.asked == []


async def test_a_proxy_may_ask_by_any_name(world: World) -> None:
    """kata-monitor does not look at Host, and proxies beside it send the client's."""
    async with rig_of(world) as rig:
        assert (await rig.ask("/metrics", host="node-7.example:8090")).status == 200


async def test_the_default_has_none_of_it(world: World) -> None:
    async with Rig(world) as rig:
        assert (await rig.ask("/nowhere")).status == 404
        assert json.loads((await rig.ask("/sandboxes?format=json")).body) == {"sandboxes": []}
