"""The whole agent beside a runtime: whose a sandbox is stands in its lines once the runtime says it, and goes on standing there."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

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
