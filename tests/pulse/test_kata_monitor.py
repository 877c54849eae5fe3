"""Strict mode beside kata-monitor itself: what it answered to each scene, and what the agent answers to the same.

The recordings are made by `python -m tests.pulse.kata_monitor.record`; ISOPOD_KATA_MONITOR names a binary to compare with directly.

`DIFFERENCES` is all that is not the same. What it does not name fails, and so does what it names and is the same.
"""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

import pytest

from isopod.pulse.agent import PulseAgent
from isopod.pulse.model import Pod
from isopod.pulse.settings import PulseSettings
from isopod.testing import wait_for_condition_with_backoff
from isopod.world.network import TcpAddress, parse_address
from isopod.world.world import World
from tests.pulse.fake_cri import GrpcCri
from tests.pulse.kata_monitor.monitor import missing
from tests.pulse.kata_monitor.record import read, record
from tests.pulse.kata_monitor.scenes import SCENES, Scene
from tests.pulse.kata_monitor.seen import Family, Recording, Seen, differences
from tests.pulse.kata_monitor.stage import Asker, Stage
from tests.telemetry.kit import Memo

BINARY: Final = os.environ.get("ISOPOD_KATA_MONITOR", "")


class Difference(NamedTuple):
    """Something that is not as with kata-monitor, on purpose.

    Args:
        cases: "SCENE/CASE", with wildcards; each is to be found.
        found: What `differences` says, with wildcards; each is to be found in each case.
        why: The reason.
        is_sure: False where kata-monitor's own answer is a matter of chance.
    """

    cases: tuple[str, ...]
    found: tuple[str, ...]
    why: str
    is_sure: bool = True


DIFFERENCES: Final = (
    # --- what is sent besides
    Difference(("*",), ("header referrer-policy: none, *",), "no page leads to another with its address"),
    Difference(("*",), ("header x-content-type-options: none, ours nosniff",), "no browser guesses that figures are a page"),
    Difference(("*",), ("header cache-control: none, ours no-*",), "figures are of this moment"),
    Difference(("*",), ("header content-security-policy: none, *",), "no page runs a script, whatever names it shows"),
    Difference(("*",), ("header vary: none, *", "header etag: none, *"), "who asks again may get 304"),
    Difference(
        ("empty/sandboxes", "broken/sandbox empty"),
        ("header content-type: none, ours text/plain; charset=utf-8",),
        "an answer without a byte has its type too",
    ),
    # --- families
    Difference(
        ("plain/metrics", "empty/metrics"),
        ("own kata_monitor_go_*: *, ours none",),
        "figures of Go's runtime: the agent is no Go program",
    ),
    Difference(
        ("plain/filter overlapping", "plain/filter same"),
        ("twice: (*), ours ()",),
        "its bug: a family that fits two prefixes stands there twice, which Prometheus refuses",
    ),
    Difference(("broken/line", "broken/cut"), ("family kata_*: not theirs",), "its bug: one bad line loses the whole sandbox"),
    Difference(
        ("broken/label",),
        ("family kata_label: 1 series missing, 1 not theirs: *",),
        "its bug: a label of the shim's that it adds too stands there twice; ours is exported_sandbox_id, as in Prometheus",
    ),
    Difference(("broken/twice",), ("family kata_twice: 1 series missing, 0 *",), "its bug: a series twice, which Prometheus refuses"),
    Difference(("broken/wrapped",), ("family kata_wrapped: 1 series missing, 0 *",), "an unsigned number below zero is no figure"),
    Difference(("broken/kind",), ("family kata_x: not theirs",), "its bug: the answer ends, with 200, where types differ"),
    Difference(
        ("broken/kind",), ("family kata_kind: *",), "its bug: the type of who answered first; ours is that of most", is_sure=False
    ),
    Difference(("broken/counted",), ("count scrape_failed_count: 2.0, ours 0.0",), "its bug: each cut answer counts as failed"),
    Difference(("broken/fails",), ("family kata_fails: missing",), "its bug: a shim's 500 is taken for figures"),
    # --- forms and codings
    Difference(
        ("plain/metrics protobuf text", "plain/metrics protobuf compact"),
        ("header content-type: application/vnd.google.protobuf; *text; *, ours text/plain; *",),
        "protobuf as text is for people who debug Go's library; it gets the text format",
    ),
    Difference(
        ("plain/metrics gzip refused", "plain/metrics identity"),
        ("header content-encoding: gzip, ours none",),
        "its bug: weights are not looked at, not even q=0",
    ),
    # --- requests
    Difference(
        ("plain/sandbox other folder*", "plain/sandbox slash", "plain/agent-url other folder", "plain/debug other folder"),
        ("status: 200, ours [45]00", "content: *, ours none", "line 0: none, *"),
        "its hole: ?sandbox= is part of a path, so that any shim-monitor.sock of the machine can be asked",
    ),
    Difference(
        ("plain/debug other folder", "plain/page below", "plain/odd page"), ("header x-go-pprof: none, ours 1",), "goes with a refusal"
    ),
    Difference(
        ("plain/page below", "plain/odd page"),
        ("status: 200, ours 404", "content: *, ours none", "line 0: none, *"),
        "what cannot be one of Go's pages is not asked for",
    ),
    Difference(
        ("plain/pprof of one",), ("content: 142 bytes, *, ours 154 bytes, *",), "links without quotation marks lead to the same sandbox too"
    ),
    Difference(
        ("plain/readyz",),
        ("line *: *, ours *",),
        "the index in this version; asked for by probes, and a later one is to answer it (spec/pulse.md)",
    ),
    Difference(
        ("broken/sandbox fails",),
        ("status: 200, ours 500", "content: *, ours none", "line 0: none, *"),
        "its bug: a shim's failure is shown as figures",
    ),
    Difference(
        ("broken/sandbox page",),
        ("status: 200, ours 500", "content: *, ours none", "line 0: none, *", "header content-type: text/html*, ours text/plain*"),
        "its hole: a shim's page is served as a page, scripts and all; what holds no figure is none",
    ),
    Difference(
        (
            "*/sandbox unknown", "plain/sandbox upper case", "plain/sandbox no socket", "plain/sandbox dot", "empty/sandbox",
            "hung/sandbox",
            "plain/agent-url missing", "plain/agent-url empty", "plain/agent-url unknown", "plain/agent-url no socket", "*/agent-url",
        ),
        ("line 0: *",),
        "says what is wrong in its own words, and without paths of the machine",
    ),
)  # fmt: skip


@asynccontextmanager
async def agent_over(world: World, scene: Scene, stage: Stage, folder: str) -> AsyncIterator[Asker]:
    """Run the agent over a stage; on the host with a runtime's socket, in the simulation it is told whose sandboxes are."""
    cri = GrpcCri(f"{folder}/cri.sock") if world.name == "host" and scene.pods else None
    told: dict[str, Any] = {} if cri else {"pods": {row.id: Pod(row.uid, row.name, row.namespace) for row in scene.pods}}
    if cri is not None:
        cri.behaviour.pods = list(scene.pods)
        await cri.start()
    settings = PulseSettings(
        listen="127.0.0.1:0",
        runtime_endpoint=cri.path if cri else "",
        go_root=stage.roots["go"],
        rust_root=stage.roots["rust"],
        strict_compat=True,
        pprof=True,
        request_s=1.0,
    )
    agent = PulseAgent(world, settings, Memo(world.clock).logger, **told)
    ids = sorted({each.id for each in scene.sandboxes})
    pods = {row.id for row in scene.pods}

    def is_ready() -> bool:
        entries = agent.store.entries()
        return [entry.id for entry in entries] == ids and all(
            (entry.up or entry.error) and (entry.id not in pods or entry.pod is not None) for entry in entries
        )

    asker = None
    try:
        address = parse_address(await agent.start())
        assert isinstance(address, TcpAddress)
        asker = Asker(world, address)
        await wait_for_condition_with_backoff(is_ready, what="the agent asked everybody", timeout_s=30.0)
        yield asker
    finally:
        if asker is not None:
            await asker.close()
        await agent.stop()
        if cri is not None:
            await cri.stop()


def unlike(scene: Scene, theirs: Recording, ours: Mapping[str, Seen], families: Mapping[str, Family]) -> list[tuple[str, str]]:
    """Return what is not the same, by case."""
    return [
        (f"{scene.name}/{ask.name}", found)
        for ask in scene.asks
        for found in differences(theirs.seen[ask.name], ours[ask.name], theirs.families, families)
    ]


def check(found: list[tuple[str, str]]) -> None:
    """Assert that what was found is what is listed."""
    rows = [(pattern, words, each.is_sure) for each in DIFFERENCES for pattern in each.cases for words in each.found]
    new = [f"{case}: {said}" for case, said in found if not any(_fits(case, pattern) and _fits(said, words) for pattern, words, _ in rows)]
    same = [
        f"{pattern}: {words}"
        for pattern, words, is_sure in rows
        if is_sure and not any(_fits(case, pattern) and _fits(said, words) for case, said in found)
    ]
    assert not new, "not as kata-monitor, and not listed:\n  " + "\n  ".join(new)
    assert not same, "listed, and as kata-monitor:\n  " + "\n  ".join(same)


def _fits(text: str, pattern: str) -> bool:
    return fnmatchcase(text, pattern)


@pytest.mark.row("T14", "K15")
async def test_answers_are_those_that_were_recorded(world: World, folder: str) -> None:
    found = []
    for scene in SCENES:
        async with Stage(world, scene, folder) as stage, agent_over(world, scene, stage, folder) as asker:
            ours, families = await asker.see(scene)
        found += unlike(scene, read(scene), ours, families)
    check(found)


def test_what_is_not_listed_fails_and_so_does_what_is_listed_and_not_found() -> None:
    with pytest.raises(AssertionError, match=r"and not listed:\s*plain/index: status: 200, ours 404"):
        check([("plain/index", "status: 200, ours 404")])
    with pytest.raises(AssertionError, match=r"listed, and as kata-monitor:\s*\*: header referrer-policy"):
        check([])


@pytest.mark.row("T14", "K15")
@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(not BINARY, reason="ISOPOD_KATA_MONITOR names no kata-monitor")
@pytest.mark.skipif(bool(missing()), reason=missing())
async def test_answers_are_those_of_a_kata_monitor_that_runs(host_world: World, folder: str) -> None:
    found = []
    for scene in SCENES:
        theirs = await record(host_world, BINARY, scene, folder)
        async with Stage(host_world, scene, folder) as stage, agent_over(host_world, scene, stage, folder) as asker:
            ours, families = await asker.see(scene)
        found += unlike(scene, theirs, ours, families)
    check(found)
