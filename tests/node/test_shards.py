"""A node of several shards: the telemetry endpoint that all of them serve, and what happens when one dies."""

import asyncio
import grp
import json
import os
import signal
from typing import Any

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.net.http.client import HttpClient
from isopod.world.errors import Disconnected
from isopod.world.network import UnixAddress
from tests.node.rig import Rig

WAIT_S = 30


class Endpoint:
    """The telemetry endpoint of a rig's node, as a client sees it; every request on a connection of its own."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._address = UnixAddress(rig.config.telemetry.removeprefix("unix:"))

    async def get(self, target: str) -> tuple[int, bytes]:
        client = HttpClient(self._rig.world)
        try:
            answer = await client.request("GET", f"http://node{target}", address=self._address, timeout_s=10)
            return answer.status, await answer.read()
        finally:
            await client.close()

    async def value(self, name: str, labels: str = "") -> float:
        """Return a sample of /metrics."""
        status, body = await self.get("/metrics")
        assert status == 200
        lines = [line for line in body.decode().splitlines() if line.startswith((f"{name}{{", f"{name} ")) and labels in line]
        assert lines, f"no sample of {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    async def wait_at_least(self, name: str, wanted: float) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self._value_or_none(name) < wanted:
                await asyncio.sleep(0.05)  # between two looks; the deadline above bounds them

    async def _value_or_none(self, name: str) -> float:
        try:
            return await self.value(name)
        except Disconnected:  # it had been handed to a shard in the moment of its death
            return float("-inf")


def endpoint(rig: Rig, *, shards: int) -> Endpoint:
    rig.flags |= {"--shards": str(shards), "--telemetry": f"unix:{rig.folder}/telemetry.sock"}
    return Endpoint(rig)


@pytest.mark.row("S4", "S24")
@pytest.mark.parametrize("shards", [1, 3])
async def test_every_shard_serves_the_figures_of_all(rig: Rig, shards: int) -> None:
    telemetry = endpoint(rig, shards=shards)
    async with rig:
        await rig.run("true")
        for _ in range(2 * shards):
            assert await telemetry.value("isopod_smp_shards_up") == shards
            assert await telemetry.value("isopod_rpc_calls_total", 'method="container.run"') == 1
        for group in ("rpc", "bulk"):  # the rig has imported an image
            assert await telemetry.value("isopod_scheduler_tasks_processed_total", f'group="{group}"') > 0
        status, body = await telemetry.get("/readyz")
        report: dict[str, Any] = json.loads(body)
        assert (status, report["ready"]) == (200, True)
        assert (await telemetry.get("/nowhere"))[0] == 404


@pytest.mark.host
@pytest.mark.row("S4")
async def test_a_shard_that_is_killed_comes_back_and_its_counts_stay(host_rig: Rig) -> None:
    telemetry = endpoint(host_rig, shards=2)
    async with host_rig:
        for _ in range(6):
            assert (await telemetry.get("/healthz"))[0] == 200
        await telemetry.wait_at_least("isopod_http_responses_total", 6)
        before = await telemetry.value("isopod_http_responses_total")
        os.kill(_shard_pid(host_rig), signal.SIGKILL)
        await telemetry.wait_at_least("isopod_smp_restarts_total", 1)
        await telemetry.wait_at_least("isopod_smp_shards_up", 2)
        assert (await host_rig.run("echo", "still here")).stdout == b"still here\n"
        assert await telemetry.value("isopod_http_responses_total") >= before
        assert (await telemetry.get("/readyz"))[0] == 200


@pytest.mark.host
async def test_the_sockets_are_the_groups(host_rig: Rig) -> None:
    """Who may use the node may read its figures."""
    group = grp.getgrgid(1)
    endpoint(host_rig, shards=1)
    host_rig.flags |= {"--socket-group": group.gr_name}
    async with host_rig as rig:
        for path in (rig.config.paths["socket"], rig.config.telemetry.removeprefix("unix:")):
            found = os.stat(path)
            assert (found.st_gid, found.st_mode & 0o777) == (group.gr_gid, 0o660)
        metrics = os.stat(f"{rig.config.paths['run_root']}/metrics")
        assert (metrics.st_uid, metrics.st_mode & 0o777) == (0, 0o700)


@pytest.mark.host
@pytest.mark.row("S4")
async def test_a_node_that_is_killed_leaves_no_shard(host_rig: Rig) -> None:
    endpoint(host_rig, shards=2)
    async with host_rig:
        shard = host_rig.world.processes.identify(_shard_pid(host_rig))
        assert shard is not None
        await host_rig.kill()
        async with asyncio.timeout(WAIT_S):
            await host_rig.world.processes.wait_gone(shard)
        await host_rig.start()


@pytest.mark.row("S6")
async def test_a_node_going_down_takes_its_endpoint_away(rig: Rig) -> None:
    telemetry = endpoint(rig, shards=2)
    async with rig:
        assert (await telemetry.get("/readyz"))[0] == 200
        await rig.restart()
        assert (await telemetry.get("/readyz"))[0] == 200
        assert await telemetry.value("isopod_rpc_calls_total", 'method="container.run"') == 0


@pytest.mark.row("R37", "S3")
async def test_tasks_of_a_live_node_are_listed_with_their_groups(rig: Rig) -> None:
    async with rig:
        await rig.run_detached("sleep", "1000", name="box")
        waiting = asyncio.get_running_loop().create_task(rig.client.call(methods.CONTAINER_WAIT, m.ContainerName(name="box"), timeout_s=60))
        async with asyncio.timeout(WAIT_S):
            while not (found := [task for task in await _tasks(rig) if task.name == "rpc container.wait"]):
                await asyncio.sleep(0.01)
        (task,) = found
        assert (task.group, task.state) == ("rpc", "waiting")
        assert task.age_s is not None
        assert task.age_s >= 0
        assert task.function
        assert task.location
        await rig.remove("box", force=True)
        await asyncio.gather(waiting, return_exceptions=True)


async def _tasks(rig: Rig) -> tuple[m.TaskEntry, ...]:
    return (await rig.client.call(methods.SYSTEM_TASKS, m.Empty())).tasks


def _shard_pid(rig: Rig) -> int:
    """Return the pid of the node's only other shard."""
    node = rig.backend.pid  # type: ignore[attr-defined]
    with open(f"/proc/{node}/task/{node}/children", encoding="ascii") as file:
        children = [int(word) for word in file.read().split()]
    (shard,) = [pid for pid in children if b"isopod" in _command(pid) and b"shard" in _command(pid)]
    return shard


def _command(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
