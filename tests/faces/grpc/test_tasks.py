"""Tasks: containers that run one command to their end. On whole nodes, on the host and in the simulation; gRPC is left out here."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from isopod.api import messages as m
from isopod.api import methods
from isopod.faces.grpc.node import NodeLink
from isopod.faces.grpc.settings import FaceSettings
from isopod.faces.grpc.tasks import GIB, ID_LABEL, OUTPUT_BYTES_MAX, Demand, Room, TaskCalls, name_of, unfit
from isopod.runtime.logger import Logger
from isopod.testing import wait_for_condition_with_backoff
from isopod.world.errors import UsageError
from tests.faces.grpc.fake_node import asked
from tests.node.rig import Rig

pytestmark = pytest.mark.row("B6")
END_S = 60.0


@asynccontextmanager
async def desk(rig: Rig) -> AsyncIterator[TaskCalls]:
    """The face's calls about tasks before a rig's node, seeing tasks through."""
    settings = FaceSettings(listen="", socket=rig.config.paths["socket"])
    lines: list[bytes] = []
    link = NodeLink(rig.world, settings, Logger(lines.append, rig.world.clock))
    calls = TaskCalls(link)
    running = asyncio.get_running_loop().create_task(calls.run())
    try:
        yield calls
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await link.close()


async def submit(calls: TaskCalls, task_id: str, *command: str, **fields: Any) -> Any:
    told = {"cpu_cores": 0, "memory_mb": 0, "disk_gb": 0, "required_features": (), "timeout_secs": 0, **fields}
    return await calls.submit_task(asked(30.0, task_id=task_id, command=command[0], args=list(command[1:]), **told))


async def status(calls: TaskCalls, task_id: str) -> dict[str, Any]:
    found = await calls.task_status(asked(task_id=task_id))
    if "status" in found:
        found["status"] = found["status"].removeprefix("TASK_STATUS_")
    return found


async def end_of(calls: TaskCalls, task_id: str, seen: list[str] | None = None) -> dict[str, Any]:
    """Return a task's status once it has ended; collect the states before."""
    found: dict[str, Any] = {}

    async def has_ended() -> bool:
        found.update(await status(calls, task_id))
        if seen is not None and found["status"] not in seen:
            seen.append(found["status"])
        return found["status"] in ("COMPLETED", "FAILED")

    await wait_for_condition_with_backoff(has_ended, timeout_s=END_S)
    return found


async def test_a_task_runs_and_tells_how_it_went(rig: Rig) -> None:
    async with rig, desk(rig) as calls:
        told = await submit(calls, "build/1 \N{SNOWMAN}", "sh", "-c", "echo begun; sleep 0.3; echo done", cpu_cores=1, memory_mb=64)
        assert told == {"accepted": True, "message": "Task build/1 \N{SNOWMAN} assigned to node 1", "assigned_node": 1}
        seen: list[str] = []
        found = await end_of(calls, "build/1 \N{SNOWMAN}", seen)
        assert seen[-2:] == ["RUNNING", "COMPLETED"]
        assert set(seen) <= {"PENDING", "RUNNING", "COMPLETED"}
        assert (found["output"], found["error"]) == ("begun\ndone\n", "")
        assert 300 <= found["execution_time_ms"] < 60_000
        [record] = await rig.list()
        assert (record.resources.cpus, record.resources.memory_bytes_max) == (1.0, 64 << 20)
        assert await status(calls, "build") == {"found": False}


async def test_a_task_that_fails_says_why(rig: Rig) -> None:
    async with rig, desk(rig) as calls:
        await submit(calls, "a", "sh", "-c", "echo out; echo oh no >&2; exit 3")
        await submit(calls, "b", "no-such-program")
        found = await end_of(calls, "a")
        assert (found["status"], found["output"], found["error"]) == ("FAILED", "out\n", "it ended with exit code 3\noh no\n")
        found = await end_of(calls, "b")
        assert found["status"] == "FAILED"
        assert "no-such-program" in found["error"]


async def test_a_task_that_takes_too_long_is_ended(rig: Rig) -> None:
    async with rig, desk(rig) as calls:
        await submit(calls, "slow", "sleep", "100", timeout_secs=1)
        found = await end_of(calls, "slow")
        assert (found["status"], found["error"]) == ("FAILED", "it took longer than 1 s and was ended")
        assert 1000 <= found["execution_time_ms"] < 50_000


async def test_a_face_that_comes_back_sees_its_tasks_through(rig: Rig) -> None:
    async with rig:
        async with desk(rig) as calls:
            await submit(calls, "slow", "sleep", "100", timeout_secs=2)

            async def is_running() -> bool:
                return bool((await status(calls, "slow"))["status"] == "RUNNING")

            await wait_for_condition_with_backoff(is_running, timeout_s=END_S)
        # One that was put on record and not started, as a face leaves it that dies in between.
        spec = m.ContainerSpec(image="isopod/busybox", command=("echo", "late"), name=name_of("new"), labels={ID_LABEL: "new"})
        await rig.client.call(methods.CONTAINER_CREATE, spec)
        async with desk(rig) as calls:
            assert (await end_of(calls, "new"))["output"] == "late\n"
            assert (await end_of(calls, "slow"))["error"] == "it took longer than 2 s and was ended"


async def test_an_impossible_demand_is_refused_with_the_reason(rig: Rig) -> None:
    async with rig, desk(rig) as calls:
        for fields, why in (
            ({"cpu_cores": 4096}, "it wants 4096 processors"),
            ({"memory_mb": 1 << 40}, "MiB of memory"),
            ({"disk_gb": 1 << 40}, "MiB of disk"),
            ({"required_features": ("gpu", "container")}, "it wants gpu, and has container"),
        ):
            told = await submit(calls, "t", "true", **fields)
            assert told["accepted"] is False
            assert told["message"].startswith("Failed to submit task: no suitable worker: this is node 1: ")
            assert why in told["message"]
        for task_id, command in (("", "true"), ("x" * 300, "true"), ("t", "")):
            told = await submit(calls, task_id, command)
            assert (told["accepted"], told["message"].startswith("Failed to submit task: ")) == (False, True)
        assert await rig.list() == []


async def test_an_id_is_given_once(rig: Rig) -> None:
    async with rig, desk(rig) as calls:
        told = await asyncio.gather(*(submit(calls, "same", "sleep", "1") for _ in range(4)))
        assert sorted(each["accepted"] for each in told) == [False, False, False, True]
        assert {each["message"] for each in told if not each["accepted"]} == {"Failed to submit task: task already exists: same"}
        await end_of(calls, "same")


async def test_the_other_services_task_is_the_same(rig: Rig) -> None:
    def proposal(**fields: Any) -> Any:
        task = SimpleNamespace(**{"id": "p", "command": "echo", "args": ["hello"], "cpu_cores": 0, "memory_mb": 0, **fields})
        return asked(30.0, task=task, HasField=lambda name: True)

    async with rig, desk(rig) as calls:
        told = await calls.propose_task(proposal())
        assert told == {"success": True, "message": "Task p proposed successfully, assigned to node 1"}
        assert (await end_of(calls, "p"))["output"] == "hello\n"
        assert (await calls.propose_task(proposal()))["message"] == "Failed to submit task: task already exists: p"
        assert await calls.propose_task(proposal(id="")) == {"success": False, "message": "Task ID cannot be empty"}
        with pytest.raises(UsageError, match="^Task is required$"):
            await calls.propose_task(asked(task=None, HasField=lambda name: False))


@pytest.mark.host
async def test_only_the_end_of_much_output_is_told(host_rig: Rig) -> None:
    async with host_rig, desk(host_rig) as calls:
        await submit(calls, "loud", "sh", "-c", f"yes 0123456789abcde | head -n {2 * OUTPUT_BYTES_MAX // 16}; echo end")
        found = await end_of(calls, "loud")
        assert len(found["output"]) == OUTPUT_BYTES_MAX
        assert found["output"].endswith("0123456789abcde\nend\n")


FULL = Room(2.0, GIB, 10 * GIB, ("container", "microvm"))


@pytest.mark.parametrize(
    ("demand", "wanted"),
    [
        ({}, ""),
        ({"cpu_cores": 2, "memory_bytes": GIB, "disk_bytes": 10 * GIB, "features": ("microvm", "container")}, ""),
        ({"cpu_cores": 3}, "it wants 3 processors, and 2 are free"),
        ({"memory_bytes": GIB + (1 << 20)}, "it wants 1025 MiB of memory, and 1024 are free"),
        ({"disk_bytes": 11 * GIB}, "it wants 11264 MiB of disk, and 10240 are free"),
        ({"features": ("gpu", "microvm", "tpu")}, "it wants gpu, tpu, and has container, microvm"),
    ],
)
def test_what_a_node_lacks(demand: dict[str, Any], wanted: str) -> None:
    told: Sequence[str] = ("true",)
    assert unfit(Demand("t", tuple(told), **demand), FULL) == wanted
