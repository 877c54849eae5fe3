"""CriSource beside a real runtime: Debian's containerd with real pod sandboxes, started by the test and gone with it."""

import asyncio
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from isopod.pulse.cri import APIS, CriSource, Pace
from isopod.pulse.cri_client import GrpcRuntime, load_messages
from isopod.pulse.demo import body
from isopod.pulse.model import Pod
from isopod.pulse.pods import Wanted
from isopod.runtime.logger import Logger
from isopod.world.world import World
from tests.pulse.containerd import BUSYBOX, HANDLER, IMAGE, OWN_NETWORK, Containerd, missing
from tests.pulse.shims import FakeShims
from tests.pulse.test_agent import Asking, asking

pytestmark = [pytest.mark.host, pytest.mark.slow]
LIMIT_S = 60.0
PACE = Pace(soon_s=0.02, refresh_s=0.2, call_s=20.0, look_s=0.1, retry_first_s=0.05, retry_max_s=0.2)


@pytest.fixture
def containerd(folder: str) -> Containerd:
    if os.geteuid() != 0:
        pytest.skip("needs root: a runtime makes namespaces and control groups")
    if lacking := missing():
        pytest.skip(f"not installed: {lacking} (Debian: containerd containernetworking-plugins runc busybox-static)")
    return Containerd(folder)


@pytest.mark.row("K10", "T12")
async def test_real_pods_are_known_and_stay_known_over_a_restart(host_world: World, containerd: Containerd) -> None:
    told: list[dict[str, Pod]] = []
    log: list[bytes] = []
    source = CriSource(
        host_world,
        f"unix://{containerd.socket}",
        on_pods=told.append,
        logger=Logger(log.append, host_world.clock),
        pod_labels=("app", "missing"),
        pod_annotations=("team",),
        pace=PACE,
    )
    task = asyncio.get_running_loop().create_task(source.run())
    begun_ns = host_world.clock.now_ns()

    async def until(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                assert not task.done(), task
                await asyncio.sleep(0.01)  # what a source tells gives no event; the limit bounds the asking

    try:
        await until(lambda: source.statistics().state == "away" and source.statistics().n_rounds > 0)
        async with containerd:
            await until(lambda: told == [{}])
            words: dict[str, Any] = {"labels": {"app": "web", "tier": "front"}, "annotations": {"team": "blue\nsky", "note": "n"}}
            web = await containerd.run_pod("web", uid="uid-1", network=OWN_NETWORK, hostname="web", handler=HANDLER, **words)
            db = await containerd.run_pod("db", uid="uid-2", namespace="store")
            await until(lambda: len(told[-1]) == 2)
            main = await containerd.run_container(web, "main")
            await until(lambda: told[-1][web[0]].containers)
            pod = told[-1][web[0]]
            assert (pod.uid, pod.name, pod.namespace, pod.runtime_handler, pod.source) == ("uid-1", "web", "shop", HANDLER, "cri")
            assert (pod.labels, pod.annotations) == ((("app", "web"),), (("team", "blue\nsky"),))
            assert begun_ns < pod.created_ns < host_world.clock.now_ns()
            assert [(each.id, each.name, each.image) for each in pod.containers] == [(main, "main", IMAGE)]
            assert told[-1][db[0]]._replace(created_ns=0) == Pod("uid-2", "db", "store")
            assert source.statistics()[:3] == ("known", "v1", f"containerd {await _version(containerd)}")

            n_told = len(told)
            for _ in range(2):
                containerd.kill()
                await until(lambda: source.statistics().state == "failing")
                assert source.statistics().n_pods == 2
                await containerd.start()
                await until(lambda: source.statistics().state == "known")
            assert told[n_told:] == [], "a runtime that is away or has just begun says nothing about its pods"

            await containerd.stop_container(main)
            await until(lambda: not told[-1][web[0]].containers)
            await containerd.remove_pod(web)
            await until(lambda: list(told[-1]) == [db[0]])
        await until(lambda: source.statistics().state != "known")
        assert source.statistics().n_pods == 1
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert containerd.left() == []
    assert not any(b'"cri.bug"' in line for line in log)


@pytest.mark.row("T12")
async def test_both_versions_of_the_interface_say_the_same(host_world: World, containerd: Containerd) -> None:
    async with containerd:
        pod = await containerd.run_pod("web", uid="uid-1", labels={"app": "web"})
        container = await containerd.run_container(pod, "main")
        runtime = GrpcRuntime(containerd.socket, await load_messages(host_world.disk))
        other = await containerd.run_container(await containerd.run_pod("db", uid="uid-2"), "other")
        used = [(await runtime.stats(api), await runtime.stats(api, pod[0]), await runtime.stats(api, "f" * 64)) for api in APIS]
        await containerd.stop_container(other)
        said = [(await runtime.version(api), await runtime.pods(api, Wanted(("app",), ())), await runtime.containers(api)) for api in APIS]
        await runtime.close()
    for every, mine, nobodys in used:
        assert sorted(row.id for row in every) == sorted((container, other))
        assert [row.id for row in mine] == [container]
        assert nobodys == []
        assert all(row.cpu_ns and row.working_set_bytes and row.usage_bytes and row.mountpoint for row in every)
        assert {row.available_bytes for row in every} == {0}, "there is no limit"
    assert said[0] == said[1]
    facts, pods, containers = said[0]
    assert facts.name == "containerd"
    assert [(row.id, row.uid, row.name, row.labels) for row in pods if row.name == "web"] == [(pod[0], "uid-1", "web", (("app", "web"),))]
    assert [(row.id, row.pod_id, row.name, row.image) for row in containers] == [(container, pod[0], "main", IMAGE)]
    assert 0 < host_world.clock.now_ns() - containers[0].created_ns < 300 * 10**9
    assert containerd.left() == []


@pytest.mark.row("T12")
async def test_a_test_that_fails_leaves_nothing(host_world: World, containerd: Containerd) -> None:
    with pytest.raises(ZeroDivisionError):
        async with containerd:
            await containerd.run_pod("web", uid="uid-1", network=OWN_NETWORK)
            assert containerd.left() != []
            raise ZeroDivisionError
    assert containerd.left() == []


BURN = (BUSYBOX, "sh", "-c", "while true; do true; done", "isopod-burner")
BURN_S = 8.0
TOLERANCE = 0.05
CPU = "container_cpu_usage_seconds_total"


@pytest.mark.row("T17", "T12", "K14")
async def test_one_busy_container_of_two_has_a_rate_of_one_also_over_a_restart(host_world: World, containerd: Containerd) -> None:
    """What is scraped, against what the kernel says of the burner at the very times at which the runtime was heard.

    The kernel's word is the measure and not the wall clock, so that a busy machine decides nothing. The shim is made up: the runtime runs
    these containers without one of Kata's.
    """
    folder = f"{containerd.folder}/agent"
    os.mkdir(folder)
    truth: list[tuple[float, float]] = []
    async with containerd:
        told: dict[str, Any] = {"runtime_endpoint": containerd.socket, "interval_s": 0.5}
        async with FakeShims(host_world, f"{folder}/sbs") as shims, asking(host_world, folder, **told) as asked:
            pod = await containerd.run_pod("web", uid="uid-1")
            ids = {"busy": await containerd.run_container(pod, "busy", BURN), "idle": await containerd.run_container(pod, "idle")}
            pid = burner()
            await shims.add(pod[0], body=body(1, 100.0))
            watching = asyncio.get_running_loop().create_task(watch(host_world, pid, truth))

            async def look(at_s: float) -> dict[str, Look]:
                """Return what is scraped, heard of the runtime after a moment."""
                async with asyncio.timeout(LIMIT_S):
                    while True:
                        _, text = await asked.get("/metrics/cadvisor")
                        found = looks(text, pod[0], ids)
                        if len(found) == 2 and min(each.seen_s for each in found.values()) > at_s:
                            return found
                        await asyncio.sleep(0.1)  # what a scrape shows gives no event; the limit bounds the asking

            try:
                first = await look(0.0)
                await asyncio.sleep(BURN_S)  # what is measured is time
                last = await look(0.0)
                used = {name: last[name].used_s - first[name].used_s for name in ids}
                ran_s = at(truth, last["busy"].seen_s) - at(truth, first["busy"].seen_s)
                assert ran_s > 0.1 * BURN_S, "the machine is too busy for the burner to run at all"
                assert used["busy"] == pytest.approx(ran_s, rel=TOLERANCE)
                assert 0 <= used["idle"] < 0.02 * BURN_S
                short = {sample.labels["container"]: sample.value for sample in await asked_samples(asked, "/metrics/resource", CPU)}
                assert sorted(short) == ["busy", "idle"]

                containerd.kill()
                await containerd.start()
                again = await look(host_world.clock.now_ns() / 1e9)
                more_s = at(truth, again["busy"].seen_s) - at(truth, first["busy"].seen_s)
                assert again["busy"].used_s - first["busy"].used_s == pytest.approx(more_s, rel=TOLERANCE)
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
    assert containerd.left() == []


class Look(NamedTuple):
    """A container's CPU time as it is scraped, and when the runtime said so."""

    used_s: float
    seen_s: float


def looks(text: str, sandbox: str, ids: dict[str, str]) -> dict[str, Look]:
    """Return what is scraped of each container; its labels must be right."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.labels["container"]
            if not name or sample.name not in (CPU, "container_last_seen"):
                continue
            own = {
                "container": name,
                "id": f"/kubepods/poduid-1/{ids[name]}",
                "image": IMAGE,
                "name": ids[name],
                "namespace": "shop",
                "pod": "web",
            }
            assert sample.labels == {**own, **({"cpu": "total"} if sample.name == CPU else {})}
            figures = found.setdefault(name, {})
            assert sample.name not in figures, "nothing twice"
            figures[sample.name] = sample.value
    return {name: Look(each[CPU], each["container_last_seen"]) for name, each in found.items() if len(each) == 2}


async def asked_samples(asked: Asking, path: str, name: str) -> list[Any]:
    _, text = await asked.get(path)
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name]


def burner() -> int:
    """Return the busy container's process, as the machine counts it."""
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and Path(f"/proc/{name}/cmdline").read_bytes() == "\0".join((*BURN, "")).encode():
                return int(name)
        except OSError:
            continue  # it has just ended
    raise AssertionError("it does not run")


async def watch(world: World, pid: int, seen: list[tuple[float, float]]) -> None:
    """Note again and again how long a process has run: /proc/PID/schedstat, proc(5)."""
    while True:
        ran_s = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
        seen.append((world.clock.now_ns() / 1e9, ran_s))
        await asyncio.sleep(0.02)


def at(seen: list[tuple[float, float]], moment_s: float) -> float:
    """Return what was noted at a moment, between the notes before and after it."""
    for (before_s, low), (after_s, high) in itertools.pairwise(seen):
        if before_s <= moment_s <= after_s:
            return low + (high - low) * (moment_s - before_s) / (after_s - before_s)
    raise AssertionError(f"{moment_s} is not between {seen[0][0]} and {seen[-1][0]}")


async def _version(containerd: Containerd) -> str:
    """Ask by the daemon's own client."""
    done = await asyncio.create_subprocess_exec("ctr", "-a", containerd.socket, "version", stdout=asyncio.subprocess.PIPE)
    out, _ = await done.communicate()
    return [line.split()[1] for line in out.decode().splitlines() if line.strip().startswith("Version:")][-1]
