"""CriSource beside a real runtime: Debian's containerd with real pod sandboxes, started by the test and gone with it."""

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from isopod.pulse.cri import APIS, CriSource, Pace
from isopod.pulse.cri_client import GrpcRuntime, load_messages
from isopod.pulse.model import Pod
from isopod.pulse.pods import Wanted
from isopod.runtime.logger import Logger
from isopod.world.world import World
from tests.pulse.containerd import HANDLER, IMAGE, OWN_NETWORK, Containerd, missing

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
        said = [(await runtime.version(api), await runtime.pods(api, Wanted(("app",), ())), await runtime.containers(api)) for api in APIS]
        await runtime.close()
    assert said[0] == said[1]
    facts, pods, containers = said[0]
    assert facts.name == "containerd"
    assert [(row.id, row.uid, row.name, row.labels) for row in pods] == [(pod[0], "uid-1", "web", (("app", "web"),))]
    assert [(row.id, row.pod_id, row.name, row.image) for row in containers] == [(container, pod[0], "main", IMAGE)]
    assert containerd.left() == []


@pytest.mark.row("T12")
async def test_a_test_that_fails_leaves_nothing(host_world: World, containerd: Containerd) -> None:
    with pytest.raises(ZeroDivisionError):
        async with containerd:
            await containerd.run_pod("web", uid="uid-1", network=OWN_NETWORK)
            assert containerd.left() != []
            raise ZeroDivisionError
    assert containerd.left() == []


async def _version(containerd: Containerd) -> str:
    """Ask by the daemon's own client."""
    done = await asyncio.create_subprocess_exec("ctr", "-a", containerd.socket, "version", stdout=asyncio.subprocess.PIPE)
    out, _ = await done.communicate()
    return [line.split()[1] for line in out.decode().splitlines() if line.strip().startswith("Version:")][-1]
