"""The routes that show figures: which are shown, in which form, when there are none, and what happens to slow readers."""

import asyncio
import gzip
import re
from typing import Any
from urllib.parse import urlencode

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from isopod.net.http.headers import Headers
from isopod.net.http.messages import Request
from isopod.pulse.scrape import SCRAPES_MAX, time_left_s
from isopod.pulse.server import query_of
from isopod.world.network import TcpAddress
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.net.http.kit import Peer
from tests.pulse.server_kit import DB, WEB, Rig, values

TEXT = "text/plain; version=0.0.4; charset=utf-8"
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
WAIT_S = 20.0


def names(text: str) -> set[str]:
    """Return the families that an exposition has samples of."""
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}


@pytest.mark.row("K4", "K14")
async def test_metrics_of_all_sandboxes_are_one_exposition(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a", WEB)
        rig.fill("b", DB)
        answer = await rig.ask("/metrics")
    assert (answer.status, answer.headers["content-type"]) == (200, TEXT)
    text = answer.text
    headers = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headers) == len(set(headers)), "one HELP and one TYPE for each family"
    shown = values(text)
    for sandbox, pod in (("a", WEB), ("b", DB)):
        labels = f'sandbox_id="{sandbox}",cri_uid="{pod.uid}",cri_name="{pod.name}",cri_namespace="prod"'
        assert shown[f'kata_guest_load{{{labels},item="load0"}}'] == 0.5
        assert shown[f"kata_pulse_sandbox_up{{{labels}}}"] == 1
    assert {"kata_monitor_scrape_count", "container_memory_usage_bytes", "kata_agent_scrape_count"} <= names(text)


@pytest.mark.row("K4")
async def test_no_sandbox_is_no_failure(world: World) -> None:
    async with Rig(world) as rig:
        answer = await rig.ask("/metrics")
        assert (answer.status, answer.headers["content-type"]) == (200, TEXT)
        assert values(answer.text)["kata_monitor_running_shim_count"] == 0
        for path in ("/metrics?namespace=prod", "/metrics?pod=x", "/metrics?filter_family=kata_guest", "/metrics/cadvisor"):
            answer = await rig.ask(path)
            assert (answer.status, answer.body) == (200, b""), path


@pytest.mark.row("K5", "K19")
async def test_one_sandbox_alone(world: World) -> None:
    async with Rig(world, interval_s=30) as rig:
        rig.fill("a", WEB)
        rig.fill("b", DB)
        rig.add("new")
        answer = await rig.ask("/metrics?sandbox=a")
        assert answer.status == 200
        assert {*re.findall(r'sandbox_id="(.*?)"', answer.text)} == {"a"}
        assert names(answer.text) == {
            "kata_agent_scrape_count", "kata_guest_load", "container_memory_usage_bytes", "container_memory_working_set_bytes",
            *(f"kata_shim_rpc_durations_histogram_milliseconds_{end}" for end in ("bucket", "sum", "count")),
            *(f"kata_pulse_sandbox_{end}" for end in ("up", "age_seconds", "collection_seconds", "bytes", "series")),
        }  # fmt: skip
        for path in ("/metrics?sandbox=nobody", "/metrics?sandbox=..%2F..%2Fetc", "/metrics/cadvisor?sandbox=nobody"):
            missing = await rig.ask(path)
            assert (missing.status, missing.headers["content-type"]) == (404, "text/plain; charset=utf-8")
            assert missing.text.startswith("no such sandbox: ") and "hint: GET /sandboxes" in missing.text
        early = await rig.ask("/metrics?sandbox=new")
        assert (early.status, early.headers["retry-after"]) == (503, "30")
        assert early.text == "no figures of sandbox new: it was not asked yet\nhint: GET /targets says more\n"
        rig.store.fail("new", "timeout", 3.0)
        assert "does not answer (timeout)" in (await rig.ask("/metrics?sandbox=new")).text


@pytest.mark.row("T16")
@pytest.mark.parametrize(
    ("query", "sandboxes", "families"),
    [
        ("namespace=prod", {"a", "b"}, {"kata_guest_load", "container_memory_usage_bytes", "kata_pulse_sandbox_up"}),
        ("namespace=test", {"c"}, {"kata_guest_load"}),
        ("pod=web-0", {"a"}, {"kata_guest_load"}),
        ("pod=web-0&namespace=test", set(), set()),
        ("sandbox=a&sandbox=b", {"a"}, {"kata_guest_load"}),
        ("filter_family=kata_guest,%20kata_agent%20,", {"a", "b", "c"}, {"kata_guest_load", "kata_agent_scrape_count"}),
        ("filter_family=kata_", {"a", "b", "c"}, {"kata_guest_load"}),
        ("filter_family=kata_pulse_sandbox_up", {"a", "b", "c"}, {"kata_pulse_sandbox_up"}),
        ("filter_family=kata_guest&sandbox=b", {"b"}, {"kata_guest_load"}),
        ("family=kata_guest_load", {"a", "b", "c"}, {"kata_guest_load"}),
        ("family=kata_guest_load,%20kata_agent_scrape_count,", {"a", "b", "c"}, {"kata_guest_load", "kata_agent_scrape_count"}),
        ("family=kata_guest_load&family=kata_agent_scrape_count&sandbox=b", {"b"}, {"kata_guest_load", "kata_agent_scrape_count"}),
        ("family=kata_guest", set(), set()),
        ("family=kata_guest_load,kata_agent_scrape_count&filter_family=kata_a", {"a", "b", "c"}, {"kata_agent_scrape_count"}),
        ('family=kata_guest_load&match[]={cri_name="db-0"}', {"b"}, {"kata_guest_load"}),
        ("family=kata_pulse_sandbox_up,nothing", {"a", "b", "c"}, {"kata_pulse_sandbox_up"}),
        ("match[]=kata_guest_load", {"a", "b", "c"}, {"kata_guest_load"}),
        ('match[]={__name__%3D~"kata_a.*",cri_name="db-0"}', {"b"}, {"kata_agent_scrape_count"}),
        ("match[]=kata_guest_load&match[]=kata_agent_scrape_count&sandbox=c", {"c"}, {"kata_guest_load", "kata_agent_scrape_count"}),
        ("match[]=kata_pulse_sandbox_up", {"a", "b", "c"}, {"kata_pulse_sandbox_up"}),
        ('match[]=%20{__name__%3D"kata_pulse_sandbox_up",cri_namespace="test"}', {"c"}, {"kata_pulse_sandbox_up"}),
        ("view=cadvisor", {"web-0", "db-0"}, {"container_memory_usage_bytes"}),
        ("anything=else&sandbox=a", {"a"}, {"kata_guest_load"}),
    ],
)
async def test_queries_choose(sim_world: SimWorld, query: str, sandboxes: set[str], families: set[str]) -> None:
    async with Rig(sim_world.world) as rig:
        rig.fill("a", WEB)
        rig.fill("b", DB)
        rig.fill("c", DB._replace(uid="1", name="other", namespace="test"))
        answer = await rig.ask(f"/metrics?{query}")
    assert answer.status == 200
    label = "pod" if "view=" in query else "sandbox_id"
    found = {*re.findall(rf'[{{,]{label}="(.*?)"', answer.text)}
    assert sandboxes <= found and (found <= sandboxes or "view=" in query)
    assert families <= names(answer.text)
    if "filter_family" in query or "match" in query:
        assert not {name for name in names(answer.text) if name.startswith("kata_monitor")}
    if "filter_family" in query or "match" in query or "view" in query:
        assert "kata_pulse_build_info" not in names(answer.text)


HISTOGRAM = "kata_shim_rpc_durations_histogram_milliseconds"


@pytest.mark.row("T16")
async def test_families_are_chosen_by_their_very_names(sim_world: SimWorld) -> None:
    """A name is what stands behind # TYPE: a histogram comes with its lines, and theirs are no families."""
    async with Rig(sim_world.world) as rig:
        rig.fill("a", WEB)
        rig.fill("b", DB)
        everything = (await rig.ask("/metrics")).text

        def part(*families: str) -> str:
            return "".join(
                line
                for line in everything.splitlines(keepends=True)
                if re.search(rf"\b({'|'.join(families)})(_bucket|_sum|_count)?[ {{]", line)
            )

        assert (await rig.ask(f"/metrics?family={HISTOGRAM},kata_guest_load")).text == part("kata_guest_load", HISTOGRAM)
        assert (await rig.ask("/metrics?family=kata_monitor_running_shim_count")).text == part("kata_monitor_running_shim_count")
        for none in (f"{HISTOGRAM}_bucket", "kata_guest_loa", "kata_guest_load_", "*", "KATA_GUEST_LOAD"):
            answer = await rig.ask(f"/metrics?family={none}")
            assert (answer.status, answer.body) == (200, b""), none
        for empty in ("family=", "family=,%20,"):
            assert names((await rig.ask(f"/metrics?{empty}")).text) == names(everything), "as if it were not said"
        cadvisor = await rig.ask("/metrics/cadvisor?family=container_memory_usage_bytes,kata_guest_load")
        assert names(cadvisor.text) == {"container_memory_usage_bytes"}
        assert names((await rig.ask("/metrics/resource?family=scrape_error")).text) == {"scrape_error"}
        openmetrics = await rig.ask("/metrics?family=kata_guest_load", accept="application/openmetrics-text;version=1.0.0")
        assert openmetrics.text.endswith("# EOF\n") and names(openmetrics.text) == {"kata_guest_load"}


@pytest.mark.row("T13", "T16")
async def test_an_etag_stands_for_the_families_that_were_asked_for(sim_world: SimWorld) -> None:
    async with Rig(sim_world.world) as rig:
        rig.fill("a", WEB)
        tag = (await rig.ask("/metrics?family=kata_guest_load,kata_agent_scrape_count")).headers["etag"]
        for query, status in (
            ("family=kata_agent_scrape_count,kata_guest_load", 304),
            ("family=kata_guest_load&family=kata_agent_scrape_count&family=kata_guest_load", 304),
            ("family=kata_guest_load", 200),
            ("filter_family=kata_guest_load,kata_agent_scrape_count", 200),
        ):
            assert (await rig.ask(f"/metrics?{query}", if_none_match=tag)).status == status, query


@pytest.mark.row("T16")
@given(pairs=st.lists(st.tuples(st.sampled_from(["family", "filter_family", "match", "sandbox", "x"]), st.text(max_size=12)), max_size=6))
def test_whatever_a_query_says_it_is_understood(pairs: list[tuple[str, str]]) -> None:
    query = query_of(Request("GET", f"/metrics?{urlencode(pairs)}"), "all")
    words = [word.strip() for name, value in pairs if name == "family" for word in value.split(",") if word.strip()]
    assert query.names == tuple(sorted(dict.fromkeys(words)))
    assert query.matches == tuple(value for name, value in pairs if name == "match")
    assert query.sandbox == next((value for name, value in pairs if name == "sandbox"), "")


@pytest.mark.row("K19")
@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/metrics?match[]=%7B", 400, "selector"),
        ("/metrics?match[]=a%7Bb=~%22(%22%7D", 400, ""),
        ("/metrics?view=everything", 400, "no such view: everything"),
        ("/metrics?sandbox=%ff", 400, "malformed"),
        ("/sandboxes?format=xml", 400, "no such format: xml"),
        ("/nowhere", 404, "no such page: /nowhere"),
        ("/metrics/", 404, "no such page"),
        ("/debug/vars?sandbox=a", 404, "not passed on"),
        ("/debug/pprof/", 404, "not passed on"),
        ("/debug", 404, "no such page"),
        ("/%2e%2e/metrics", 404, "no such page: /../metrics"),
        ("/agent-url", 400, "which sandbox?"),
    ],
)
async def test_failures_are_told_as_text(sim_world: SimWorld, path: str, status: int, text: str) -> None:
    async with Rig(sim_world.world) as rig:
        answer = await rig.ask(path)
        assert (answer.status, answer.headers["content-type"]) == (status, "text/plain; charset=utf-8")
        assert text in answer.text and answer.text.endswith("\n")
        if path.startswith("/metrics?match"):
            assert values((await rig.ask("/metrics")).text)["kata_monitor_scrape_failed_count"] == 1


@pytest.mark.row("K19")
async def test_other_methods_are_refused(world: World) -> None:
    async with Rig(world) as rig:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            answer = await rig.ask("/metrics", method)
            assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
            assert method in answer.text
        assert (await rig.ask("/nowhere", "POST")).status == 404


async def test_head_is_get_without_its_body(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a", WEB, n_lines=3000)  # a stream, and small answers
        for path in ("/metrics", "/metrics?sandbox=a", "/", "/sandboxes", "/targets", "/top", "/healthz", "/readyz", "/nowhere"):
            got, head = await rig.ask(path), await rig.ask(path, "HEAD")
            assert (head.status, head.body) == (got.status, b""), path
            for name in ("content-type", "etag", "content-security-policy", "vary"):
                assert head.headers.get(name) == got.headers.get(name), (path, name)
        # Neither HEAD nor what was cut before it leaves a scrape that never ends.
        assert rig.server.own.n_in_flight == 0


@pytest.mark.row("T13")
async def test_formats_and_codings_by_weight(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a", WEB)
        plain = (await rig.ask("/metrics/cadvisor")).body
        for accept, kind in (
            ("", TEXT),
            ("*/*", TEXT),
            ("text/html", TEXT),
            (PROMETHEUS, "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8"),
            ("application/openmetrics-text;version=1.0.0;q=0.1,text/plain;q=0.2", TEXT),
        ):
            answer = await rig.ask("/metrics/cadvisor", accept=accept)
            assert answer.headers["content-type"] == kind, accept
            assert answer.body.endswith(b"# EOF\n") is ("openmetrics" in kind)
        zstd = zstandard.ZstdDecompressor()
        for accepted, coding, unpack in (
            ("gzip", "gzip", gzip.decompress),
            ("zstd", "zstd", lambda data: zstd.decompressobj(read_across_frames=True).decompress(data)),
            ("gzip;q=0.1, zstd;q=0.5, br", "zstd", lambda data: zstd.decompressobj(read_across_frames=True).decompress(data)),
            ("gzip;q=0", None, bytes),
            ("identity", None, bytes),
            ("br", None, bytes),
        ):
            answer = await rig.ask("/metrics/cadvisor", accept_encoding=accepted)
            assert answer.headers.get("content-encoding") == coding, accepted
            assert unpack(answer.body) == plain
            assert answer.headers["vary"] == "accept, accept-encoding"


async def test_an_unchanged_answer_is_not_sent_again(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a", WEB)
        tag = (await rig.ask("/metrics")).headers["etag"]
        assert tag.startswith('W/"')
        same = await rig.ask("/metrics", if_none_match=f'"other", {tag}')
        assert (same.status, same.body, same.headers["etag"]) == (304, b"", tag)
        assert (await rig.ask("/metrics", if_none_match="*")).status == 304
        for path, headers in (
            ("/metrics", {"accept_encoding": "gzip"}),
            ("/metrics", {"accept": "application/openmetrics-text"}),
            ("/metrics?sandbox=a", {}),
            ("/metrics/cadvisor", {}),
        ):
            assert (await rig.ask(path, if_none_match=tag, **headers)).status == 200, path
        rig.fill("a", WEB, load=0.75)
        fresh = await rig.ask("/metrics", if_none_match=tag)
        assert (fresh.status, fresh.headers["etag"] != tag) == (200, True)


@pytest.mark.row("T1", "K7")
async def test_scrapes_ask_no_shim(world: World) -> None:
    """Twenty at once, while every shim hangs."""
    async with Rig(world) as rig:
        rig.shims.gate = asyncio.Event()
        for number in range(50):
            rig.fill(f"s{number:02}", WEB)
        answers = await asyncio.gather(*(rig.ask("/metrics") for _ in range(20)))
        assert {answer.status for answer in answers} == {200}
        assert all('sandbox_id="s49"' in answer.text for answer in answers)
        assert rig.shims.asked == []


@pytest.mark.row("K18")
async def test_what_a_scrape_shows_stays_while_it_streams(sim_world: SimWorld) -> None:
    world = sim_world.world
    async with Rig(world) as rig:
        for number in range(40):
            rig.fill(f"s{number:02}", WEB, n_lines=400)
        peer = Peer()
        await world.network.connect(rig.address, lambda: peer)
        peer.send(b"GET /metrics?filter_family=kata_guest HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await peer.until(lambda data: len(data) > 1000)
        assert peer.transport is not None
        peer.transport.pause_reading()
        for number in range(40):
            rig.fill(f"s{number:02}", WEB, n_lines=400, load=0.25)
        rig.store.remove("s39")
        peer.transport.resume_reading()
        data = await peer.until(lambda data: data.endswith(b"0\r\n\r\n"))
        assert b" 0.25\n" not in data
        assert b'sandbox_id="s39"' in data
        peer.close()


@pytest.mark.parametrize(
    ("told", "left_s"),
    [
        ("10", 9.5),
        ("1", 0.9),
        ("0.2", 0.18),
        ("1e9", 120.0),
        ("", 120.0),
        ("0", 120.0),
        ("-3", 120.0),
        ("nan", 120.0),
        ("inf", 120.0),
        ("ten", 120.0),
        ("1_0", 120.0),
    ],
)
def test_the_readers_time_less_a_margin(told: str, left_s: float) -> None:
    request = Request("GET", "/metrics", Headers((("X-Prometheus-Scrape-Timeout-Seconds", told),)))
    assert time_left_s(request) == pytest.approx(left_s)


def big(rig: Rig) -> None:
    """Fill a store with more than fits the buffers of a connection."""
    for number in range(100):
        rig.fill(f"s{number:03}", WEB, n_lines=1000)


@pytest.mark.row("T13")
@pytest.mark.virtual_time
async def test_an_answer_that_is_not_taken_in_time_is_cut(world: World) -> None:
    async with Rig(world) as rig:
        big(rig)
        peer = Peer()
        await world.network.connect(rig.address, lambda: peer)
        assert peer.transport is not None
        peer.transport.pause_reading()
        peer.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n")
        await asyncio.sleep(4.0)
        assert rig.server.own.n_in_flight == 1
        await asyncio.sleep(0.6)
        assert (rig.server.own.n_in_flight, rig.server.own.n_failed) == (0, 1)
        peer.transport.resume_reading()
        data = await peer.until_end()
        assert not data.endswith(b"0\r\n\r\n"), "every reader can tell that it is not whole"
        peer.close()
        assert "pulse.scrape_cut" in rig.memo.events()
        assert "http.handler_failed" not in rig.memo.events()
        shown = values((await rig.ask("/metrics?filter_family=kata_monitor")).text)
        assert shown["kata_monitor_scrape_failed_count"] == 1
        assert shown['kata_monitor_scrape_durations_histogram_milliseconds_bucket{le="512"}'] == 0


async def test_a_reader_that_goes_is_a_failed_scrape(world: World) -> None:
    async with Rig(world) as rig:
        big(rig)
        peer = Peer()
        await world.network.connect(rig.address, lambda: peer)
        assert peer.transport is not None
        peer.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await peer.until(lambda data: data)
        peer.transport.pause_reading()
        peer.close()
        async with asyncio.timeout(WAIT_S):
            while rig.server.own.n_failed == 0:
                await asyncio.sleep(0.01)
        assert rig.server.own.n_in_flight == 0
        assert (await rig.ask("/healthz")).status == 200


@pytest.mark.virtual_time
async def test_so_many_scrapes_at_once_and_no_more(world: World) -> None:
    async with Rig(world) as rig:
        big(rig)
        peers = [Peer() for _ in range(SCRAPES_MAX)]
        for each in peers:
            await world.network.connect(rig.address, lambda each=each: each)  # type: ignore[misc]  # mypy cannot infer it
            assert each.transport is not None
            each.transport.pause_reading()
            each.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.5)
        assert rig.server.own.n_in_flight == SCRAPES_MAX
        answer = await rig.ask("/metrics")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        for each in peers:
            each.close()
        await asyncio.sleep(0.5)
        assert (await rig.ask("/metrics?sandbox=s001")).status == 200


@pytest.mark.row("T5")
async def test_the_first_byte_does_not_wait_for_the_last(world: World) -> None:
    """The first bytes are there while the reader has not taken them all: what is made is bounded by what is taken."""
    async with Rig(world) as rig:
        big(rig)
        peer = Peer()
        await world.network.connect(rig.address, lambda: peer)
        assert peer.transport is not None
        peer.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await peer.until(lambda data: b"container_memory_usage_bytes{" in data)
        assert rig.server.own.n_in_flight == 1
        await peer.until(lambda data: data.endswith(b"0\r\n\r\n"))
        peer.close()


async def test_health_and_readiness(world: World) -> None:
    async with Rig(world) as rig:
        assert (await rig.ask("/healthz"))[::2] == (200, b"ok\n")
        assert (await rig.ask("/readyz"))[::2] == (200, b"/run/vc/sbs available\n/run/kata unavailable\n")
        rig.facts = rig.facts._replace(roots={"/run/vc/sbs": False, "/run/kata": False})
        assert (await rig.ask("/readyz"))[::2] == (503, b"/run/vc/sbs unavailable\n/run/kata unavailable\n")
        assert (await rig.ask("/healthz")).status == 200
        rig.facts = rig.facts._replace(roots={})
        assert (await rig.ask("/readyz")).status == 503


@pytest.mark.row("T18")
@pytest.mark.parametrize(("view", "has"), [("all", (True, True)), ("kata", (True, False)), ("cadvisor", (False, True))])
async def test_a_setting_says_what_metrics_shows(sim_world: SimWorld, view: Any, has: tuple[bool, bool]) -> None:
    async with Rig(sim_world.world, view=view) as rig:
        rig.fill("a", WEB)
        shown = names((await rig.ask("/metrics")).text)
        assert ("kata_guest_load" in shown, "container_memory_usage_bytes" in shown) == has
        assert ("kata_monitor_scrape_count" in shown) is has[0]
        assert {name.split("_")[0] for name in names((await rig.ask("/metrics/cadvisor")).text)} == {"container"}
        assert "kata_guest_load" in names((await rig.ask("/metrics?view=kata")).text)


async def test_the_kubelets_list_says_whether_it_could_be_made(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a", WEB)
        shown = values((await rig.ask("/metrics/resource")).text)
        pod = 'pod_memory_working_set_bytes{namespace="prod",pod="web-0"}'
        assert shown == {pod: 4096, "resource_scrape_error": 0, "scrape_error": 0}
        rig.fill("b", WEB._replace(uid="new", created_ns=1))
        again = (await rig.ask("/metrics/resource")).text
        assert again.count(pod) == 1, "of two sandboxes of one pod the newer"


async def test_the_address_is_the_real_one(world: World) -> None:
    async with Rig(world) as rig:
        assert isinstance(rig.address, TcpAddress)
        assert rig.address.port > 0
    await rig.server.stop()  # again, and without harm
