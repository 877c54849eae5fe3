"""What the agent says of itself: kata-monitor's four families, and its own."""

import asyncio
import errno
import os
import subprocess
from dataclasses import replace
from typing import Any, cast

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from isopod.pulse.model import Query, Row
from isopod.pulse.own import SCRAPE_BOUNDS_MS, Durations, Facts, Own, PushFacts, Sheet
from isopod.pulse.own_sandboxes import ROW_SANDBOXES
from isopod.pulse.store import Store
from isopod.world.kernel import ProcessFigures
from isopod.world.sim import SimWorld
from isopod.world.world import World
from tests.pulse.server_kit import HOSTILE, WEB, Rig, values

PROMTOOL = "/usr/bin/promtool"
TOOK = "kata_monitor_scrape_durations_histogram_milliseconds"


def figures(own: Own, facts: Facts | None = None, *, strict: bool = False) -> dict[str, float]:
    return values(b"".join(each.text for each in own.families(facts or Facts(), strict=strict).values()).decode())


@pytest.mark.row("K15", "T22")
async def test_kata_monitors_four_are_there_and_move(sim_world: SimWorld) -> None:
    async with Rig(sim_world.world) as rig:
        rig.fill("a")
        rig.fill("b")
        rig.fill("plain", runtime="isopod")
        before = values((await rig.ask("/metrics")).text)
        await rig.ask("/metrics?sandbox=nobody")
        after = values((await rig.ask("/metrics")).text)
        for name, first, then in (
            ("kata_monitor_running_shim_count", 2, 2),
            ("kata_monitor_scrape_count", 1, 3),
            ("kata_monitor_scrape_failed_count", 0, 1),
            (f"{TOOK}_count", 0, 2),
            (f'{TOOK}_bucket{{le="+Inf"}}', 0, 2),
        ):
            assert (before[name], after[name]) == (first, then), name
        bounds = [name.split('"')[1] for name in after if name.startswith(f"{TOOK}_bucket")]
        assert bounds == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "+Inf"]


@pytest.mark.row("K15")
async def test_durations_are_whole_milliseconds_cut_off(sim_world: SimWorld) -> None:
    own = Own(sim_world.world, Store(asyncio.get_running_loop().time), version="1")
    for took_s in (0.0019, 0.0021, 0.0329, 0.6):
        began_ns = own.begin()
        await asyncio.sleep(took_s)
        own.end(began_ns, failed=False)
    shown = figures(own)
    buckets = [shown[f'{TOOK}_bucket{{le="{bound}"}}'] for bound in SCRAPE_BOUNDS_MS]
    assert buckets == [1, 2, 2, 2, 2, 3, 3, 3, 3, 3]
    assert (shown[f"{TOOK}_count"], shown[f"{TOOK}_sum"]) == (4, 1 + 2 + 32 + 600)


@pytest.mark.row("T22", "K25")
async def test_facts_of_all_parts_become_families(world: World) -> None:
    facts = Facts(
        roots={"/run/vc/sbs": True, '/run/"kata"': False},
        requests={"ok": 7, "timeout": 2},
        durations=Durations((0.1, 1.0), (1, 2, 3), 4.5),
        n_in_flight=5,
        n_overflows=1,
        n_refused=3,
        cri_calls={"ok": 4, "error": 1},
        cri_stats={"ok": 2, "error": 3},
        cri_up=True,
        stages_s={"read": 0.25},
        failures={"cri": 2},
        push=PushFacts(
            n_sent=70, n_stale=6, n_refused=5, n_dropped=4, n_retries=3, n_bytes=2000, n_queued=2, queued_bytes=99, success_s=1.5
        ),
    )
    async with Rig(world, facts=facts) as rig:
        rig.fill("a", WEB)
        rig.add("b")
        rig.store.fail("b", "timeout", 3.0)
        shown = values((await rig.ask("/metrics")).text)
    web = 'sandbox_id="a",cri_uid="0d3b",cri_name="web-0",cri_namespace="prod"'
    for name, value in (
        ('kata_pulse_root_available{path="/run/vc/sbs"}', 1),
        ('kata_pulse_root_available{path="/run/\\"kata\\""}', 0),
        ('kata_pulse_shim_requests_total{outcome="timeout"}', 2),
        ('kata_pulse_shim_request_duration_seconds_bucket{le="1.0"}', 3),
        ("kata_pulse_shim_request_duration_seconds_count", 6),
        ("kata_pulse_shim_requests_in_flight", 5),
        ("kata_pulse_inotify_overflows_total", 1),
        ("kata_pulse_sandboxes_refused_total", 3),
        ('kata_pulse_cri_calls_total{outcome="error"}', 1),
        ('kata_pulse_cri_stats_rounds_total{outcome="error"}', 3),
        ("kata_pulse_cri_up", 1),
        ('kata_pulse_stage_seconds_total{stage="read"}', 0.25),
        ('kata_pulse_part_failures_total{part="cri"}', 2),
        ('kata_pulse_push_samples_total{outcome="sent"}', 70),
        ('kata_pulse_push_samples_total{outcome="refused"}', 5),
        ('kata_pulse_push_samples_total{outcome="dropped"}', 4),
        ("kata_pulse_push_stale_total", 6),
        ("kata_pulse_push_retries_total", 3),
        ("kata_pulse_push_bytes_total", 2000),
        ("kata_pulse_push_queued_requests", 2),
        ("kata_pulse_push_queued_bytes", 99),
        ("kata_pulse_push_last_success_timestamp_seconds", 1.5),
        ('kata_pulse_sandboxes{runtime="go"}', 2),
        ("kata_pulse_sandboxes_up", 1),
        ("kata_pulse_rounds_failed_total", 1),
        ("kata_pulse_bytes", 99),
        (f"kata_pulse_sandbox_up{{{web}}}", 1),
        (f"kata_pulse_sandbox_collection_seconds{{{web}}}", 0.002),
        (f"kata_pulse_sandbox_series{{{web}}}", 8),
    ):
        assert shown[name] == value, name
    assert 0 <= shown[f"kata_pulse_sandbox_age_seconds{{{web}}}"] < 60
    down = [value for name, value in shown.items() if name.startswith('kata_pulse_sandbox_up{sandbox_id="b"')]
    assert down == [0]
    assert not [name for name in shown if name.startswith('kata_pulse_sandbox_age_seconds{sandbox_id="b"')], "it has no figures yet"
    assert shown["kata_monitor_process_open_fds"] > 0
    assert any(name.startswith("kata_pulse_build_info{version=") for name in shown)


async def test_only_kata_monitors_own_in_strict_mode(world: World) -> None:
    own = Own(world, Store(asyncio.get_running_loop().time), version="1")
    await own.refresh()
    assert {name.split("_")[1] for name in figures(own, strict=True)} == {"monitor"}
    assert "kata_pulse_sandboxes_up" in figures(own)


async def test_the_kernel_is_asked_seldom(sim_world: SimWorld) -> None:
    own = Own(sim_world.world, Store(asyncio.get_running_loop().time), version="1")
    await asyncio.sleep(100)
    await asyncio.gather(own.refresh(), own.refresh())
    used_s = figures(own)["kata_monitor_process_cpu_seconds_total"]
    await asyncio.sleep(5)
    await own.refresh()
    assert figures(own)["kata_monitor_process_cpu_seconds_total"] == used_s
    await asyncio.sleep(6)
    await own.refresh()
    assert figures(own)["kata_monitor_process_cpu_seconds_total"] > used_s


class Kernel:
    """Has no descriptor left."""

    async def process_figures(self) -> ProcessFigures:
        """See `Kernel.process_figures`."""
        raise OSError(errno.EMFILE, "too many open files")


async def test_a_kernel_that_does_not_say_fails_no_scrape(sim_world: SimWorld) -> None:
    world = replace(sim_world.world, kernel=cast("Any", Kernel()))  # only this one method is asked
    async with Rig(world) as rig:
        answer = await rig.ask("/metrics")
    assert answer.status == 200
    assert "kata_monitor_scrape_count 1" in answer.text
    assert "kata_monitor_process" not in answer.text


async def test_dropped_lines_stay_counted_when_their_sandbox_goes(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a")
        families = dict(rig.store.entries()[0].families)
        name = 'kata_pulse_dropped_lines_total{reason="value"}'
        rig.store.replace("a", families, dropped={"value": 2})
        assert figures(rig.server.own)[name] == 2
        rig.store.replace("a", families, dropped={"value": 3})
        assert figures(rig.server.own)[name] == 5
        assert figures(rig.server.own)[name] == 5, "a scrape drops nothing"
        rig.store.remove("a")
        assert figures(rig.server.own)[name] == 5
        rig.fill("a")
        rig.store.replace("a", families, dropped={"value": 1})
        assert figures(rig.server.own)[name] == 6


async def test_conflicts_are_told_by_family(world: World) -> None:
    async with Rig(world) as rig:
        rig.fill("a")
        rig.fill("b")
        rig.fill("c")
        families = dict(rig.store.entries()[0].families)
        families["kata_agent_scrape_count"].kind = "gauge"
        rig.store.remove("a")
        rig.add("a")
        rig.store.replace("a", families)
        assert rig.store.view(Query()).conflicts == {"kata_agent_scrape_count": 1}
        assert figures(rig.server.own)['kata_pulse_conflicts{family="kata_agent_scrape_count"}'] == 1


@pytest.mark.row("T22", "K4")
async def test_others_can_read_what_it_says(world: World) -> None:
    """By Prometheus' own client library, and promtool where there is one."""
    facts = Facts(
        roots={'/run/"a\\b\n': True}, requests={"ok": 1}, durations=Durations((0.1,), (1, 2), 3.5), cri_calls={"ok": 1}, cri_up=False
    )
    async with Rig(world, facts=facts) as rig:
        rig.fill("a", HOSTILE)
        text = (await rig.ask("/metrics")).text
        opened = (await rig.ask("/metrics", accept="application/openmetrics-text; version=1.0.0")).text
    plain = {family.name: family for family in parse_text(text)}
    assert plain["kata_pulse_root_available"].samples[0].labels == {"path": '/run/"a\\b\n'}
    assert plain["kata_pulse_sandbox_up"].samples[0].labels["cri_name"] == HOSTILE.name
    assert plain["kata_pulse_shim_request_duration_seconds"].type == "histogram"
    open_types = {family.name: family.type for family in parse_openmetrics(opened)}  # type: ignore[no-untyped-call]
    assert open_types["kata_pulse_shim_requests"] == "counter"
    assert open_types["kata_monitor_scrape_count"] == "unknown", "its name stays, so it cannot be a counter there"


@pytest.mark.row("T22")
@pytest.mark.host
@pytest.mark.skipif(not os.path.exists(PROMTOOL), reason="no promtool")
async def test_promtool_has_no_complaint_about_what_is_ours(host_world: World) -> None:
    """kata-monitor's names it does not like: counters without _total, and milliseconds."""
    async with Rig(host_world, facts=Facts(roots={"/r": True}, requests={"ok": 1}, durations=Durations((0.1,), (1, 2), 3.5))) as rig:
        rig.fill("a", HOSTILE)
        text = (await rig.ask("/metrics")).text
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text.encode(), capture_output=True, timeout=30, check=False)
    said = done.stderr.decode()
    assert "error while linting" not in said
    assert [line for line in said.splitlines() if "kata_pulse" in line] == []


def test_a_sheet_is_in_the_order_of_names_and_escapes() -> None:
    sheet = Sheet()
    sheet.add("b", "gauge", "B.", 2, path='a"\\\n')
    sheet.add("a_total", "counter", "A.", 1)
    sheet.add_many("none", "gauge", "Nothing.", [("", None)])
    made = sheet.families()
    assert list(made) == ["a_total", "b"]
    assert made["b"].text == b'b{path="a\\"\\\\\\n"} 2\n'
    assert (made["a_total"].text, made["a_total"].kind, made["a_total"].n_series) == (b"a_total 1\n", "counter", 1)


async def test_what_is_said_of_each_sandbox_is_the_same_whether_kept_or_made_anew(world: World) -> None:
    """For an answer rows of many sandboxes are kept while their figures stay the same."""
    async with Rig(world) as rig:
        own, store = rig.server.own, rig.store

        def kept() -> dict[str, list[Row]]:
            return {block.shape.pairs[0][0]: list(block.rows) for block in own.told(Facts()).blocks}

        def is_true() -> bool:
            shown = b"".join([each.text for name, rows in kept().items() if "age" not in name for row in rows for each in row.fragments])
            made = own.of_sandboxes(store.entries())
            return shown == b"".join([each.text for name, each in made.items() if "age" not in name])

        assert kept() == {} == own.of_sandboxes(())
        for number in range(2 * ROW_SANDBOXES + 1):
            rig.add(f"s{number:03}")
        assert "kata_pulse_sandbox_age_seconds" not in kept(), "none of them has figures"
        first = kept()["kata_pulse_sandbox_up"]
        assert is_true()
        assert kept()["kata_pulse_sandbox_up"] == first
        rig.fill("s000", WEB)
        then = kept()["kata_pulse_sandbox_up"]
        assert [one is other for one, other in zip(first, then, strict=True)] == [False, True, True]
        assert is_true()
        store.remove("s000")
        store.describe("s200", WEB)
        assert len(kept()["kata_pulse_sandbox_up"]) == 2
        assert is_true()
