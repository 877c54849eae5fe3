"""The whole agent beside a runtime: whose a sandbox is stands in its lines once the runtime says it, and goes on standing there."""

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from isopod.pulse.demo import body
from isopod.pulse.model import ContainerStats
from isopod.pulse.pods import ContainerRow, PodRow
from isopod.world.world import World
from tests.pulse.fake_cri import GrpcCri, Refused
from tests.pulse.shims import FakeShims
from tests.pulse.test_agent import A, Asking, B, asking

POD = PodRow(A, "uid-1", "web", "shop", labels=(("app.kubernetes.io/name", "shop"), ("x", "y")), annotations=(("team", 'b"lue'),))


async def labels(asked: Asking, identifier: str = A) -> dict[str, str]:
    """Return the labels that a sandbox's line has."""
    _, text = await asked.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found: list[dict[str, str]] = [dict(sample.labels) for sample in families["kata_shim_threads"].samples]
    (mine,) = [each for each in found if each["sandbox_id"] == identifier]
    return mine


def is_known(asked: Asking, identifier: str = A) -> bool:
    return any(entry.id == identifier and entry.pod is not None for entry in asked.agent.store.entries())


@pytest.mark.row("K10", "T12")
async def test_labels_come_with_the_runtime_and_stay_when_it_goes(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    told: dict[str, Any] = {"pod_labels": ("app.kubernetes.io/name",), "pod_annotations": ("team",)}
    endpoint = f"unix://{cri.path}"
    async with FakeShims(host_world, f"{folder}/sbs") as shims, asking(host_world, folder, runtime_endpoint=endpoint, **told) as asked:
        await shims.add(A)
        await asked.until(lambda: asked.up(A))
        assert await labels(asked) == {"sandbox_id": A, "cri_uid": "", "cri_name": "", "cri_namespace": ""}

        cri.behaviour.pods = [POD]
        await cri.start()
        try:
            await asked.until(lambda: is_known(asked))
            whole = {
                "sandbox_id": A,
                "cri_uid": "uid-1",
                "cri_name": "web",
                "cri_namespace": "shop",
                "label_app_kubernetes_io_name": "shop",
                "annotation_team": 'b"lue',
            }
            assert await labels(asked) == whole
            await shims.add(B)
            await asked.until(lambda: asked.up(A, B))
            assert (await labels(asked, B))["cri_name"] == "", "the runtime does not know it"

            cri.behaviour.refusal = Refused("UNAVAILABLE", "server is not initialized yet")
            cri.behaviour.pods = []
            n_calls = len(cri.behaviour.calls)
            await asked.until(lambda: len(cri.behaviour.calls) > n_calls)
            assert await labels(asked) == whole
        finally:
            await cri.stop()
        assert await labels(asked) == whole

        cri.behaviour.refusal = None
        cri.behaviour.pods = [POD, PodRow(B, "uid-2", "db", "shop")]
        cri.behaviour.containers = [ContainerRow("c", A, "nginx", "nginx:1.27")]
        await cri.start()
        try:
            await asked.until(lambda: is_known(asked, B))
            assert (await labels(asked, B))["cri_name"] == "db"
            assert await labels(asked) == whole
            (entry,) = [entry for entry in asked.agent.store.entries() if entry.id == A]
            assert entry.pod is not None
            assert [each.name for each in entry.pod.containers] == ["nginx"]

            cri.behaviour.pods = [PodRow(B, "uid-2", "db", "shop")]
            n_calls = len(cri.behaviour.calls)
            await asked.until(lambda: len(cri.behaviour.calls) >= n_calls + 4)
            assert await labels(asked) == whole, "a sandbox that is being taken down keeps its labels to the end"
        finally:
            await cri.stop()


def series(text: str, name: str) -> dict[str, float]:
    """Return a family's figures by container."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    key = name.removesuffix("_total")
    return {sample.labels["container"]: sample.value for sample in families[key].samples} if key in families else {}


@pytest.mark.row("K14", "T17", "T12")
async def test_each_container_has_its_figures_over_a_restart_and_what_is_gone_goes(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    cri.behaviour.pods = [POD]
    cri.behaviour.containers = [ContainerRow("c1", A, "web", "nginx", 5 * 10**9), ContainerRow("c2", A, "side", "envoy", 6 * 10**9)]
    told: dict[str, Any] = {"runtime_endpoint": cri.path, "interval_s": 0.2}
    name = "container_cpu_usage_seconds_total"

    async def used(asked: Asking, path: str = "/metrics/cadvisor") -> dict[str, float]:
        return series((await asked.get(path))[1], name)

    async def shows(asked: Asking, wanted: dict[str, float], path: str = "/metrics/cadvisor") -> None:
        async with asyncio.timeout(60):
            while await used(asked, path) != wanted:
                await asyncio.sleep(0.02)  # what a scrape shows gives no event; the limit bounds the asking

    async with FakeShims(host_world, f"{folder}/sbs") as shims, asking(host_world, folder, **told) as asked:
        await shims.add(A, body=body(3, 100.0))
        for cpu_s in (1, 2):
            cri.behaviour.stats = [ContainerStats("c1", cpu_ns=cpu_s * 10**9, working_set_bytes=7), ContainerStats("c2", cpu_ns=0)]
            await cri.start()
            try:
                await shows(asked, {"": 30, "web": cpu_s, "side": 0})
            finally:
                await cri.stop()
            assert await used(asked) == {"": 30, "web": cpu_s, "side": 0}
        _, text = await asked.get("/metrics/cadvisor")
        line = next(line for line in text.splitlines() if line.startswith(f'{name}{{container="web"'))
        own = 'container="web",id="/kubepods/poduid-1/c1",image="nginx",name="c1",namespace="shop",pod="web",cpu="total"'
        assert line == f"{name}{{{own}}} 2"
        assert series(text, "container_start_time_seconds")["side"] == 6
        assert await used(asked, "/metrics/resource") == {"web": 2, "side": 0}
        cri.behaviour.containers = cri.behaviour.containers[:1]
        await cri.start()
        try:
            await shows(asked, {"web": 2}, "/metrics/resource")
            assert (await used(asked))[""] == 30
        finally:
            await cri.stop()


@pytest.mark.row("T14")
async def test_strictly_no_runtime_is_asked_what_nobody_can_see(host_world: World, folder: str) -> None:
    cri = GrpcCri(f"{folder}/cri.sock")
    cri.behaviour.pods, cri.behaviour.containers = [POD], [ContainerRow("c1", A, "web", "nginx")]
    for told in ({"strict_compat": True}, {"cadvisor_without": ("containers",)}):
        n_calls = len(cri.behaviour.calls)
        await cri.start()
        try:
            more: dict[str, Any] = {"runtime_endpoint": cri.path, "interval_s": 0.1, **told}
            async with FakeShims(host_world, f"{folder}/sbs") as shims, asking(host_world, folder, **more) as asked:
                await shims.add(A)
                await asked.until(lambda: asked.up(A) and is_known(asked))
                await asked.until(lambda: sum("ListPodSandbox" in call for call in cri.behaviour.calls[n_calls:]) >= 3)  # noqa: B023
        finally:
            await cri.stop()
    assert cri.behaviour.n("v1 ListContainerStats") == 0
