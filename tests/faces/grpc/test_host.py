"""The face before a node that runs things: tasks and machines by a standard client, on the real kernel."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from isopod.testing import wait_for_condition_with_backoff
from tests.faces.grpc import kit
from tests.faces.grpc.kit import BLIXARD, Client
from tests.node.rig import HostBackend, Rig

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.row("B6")]
END_S = 120.0
SECRET = "a-secret-of-these-tests-0123456789"


@pytest.fixture
def guest() -> str:
    """The folder of the guest's files."""
    folder = Path(__file__).parents[3] / ".venv/share/isopod/guest"
    if not (folder / "guest.json").exists():
        pytest.skip(f"no guest in {folder}: make setup")
    return str(folder)


@asynccontextmanager
async def served(rig: Rig, *flags: str) -> AsyncIterator[Client]:
    """A node with the face before it, and a client."""
    backend = rig.backend
    assert isinstance(backend, HostBackend)
    address = f"unix:{rig.folder}/grpc.sock"
    backend.more_flags = ["--grpc-listen", address, *flags]
    async with rig:
        # It is there when the node is ready, which it is a moment after it answers on its own socket.
        await wait_for_condition_with_backoff(lambda: '"node.grpc"' in backend.log(), timeout_s=kit.START_S)
        with Client(address) as client:
            yield client


async def ended(client: Client, task_id: str) -> Any:
    """Return a task's status once it has ended."""
    over = (kit.value_of("TaskStatus", "TASK_STATUS_COMPLETED"), kit.value_of("TaskStatus", "TASK_STATUS_FAILED"))
    await wait_for_condition_with_backoff(lambda: client.call("GetTaskStatus", task_id=task_id).status in over, timeout_s=END_S)
    return client.call("GetTaskStatus", task_id=task_id)


async def test_tasks_run_and_are_told_of(host_rig: Rig) -> None:
    async with served(host_rig) as client:
        reply = client.call("SubmitTask", task_id="t1", command="sh", args=["-c", "echo $((6 * 7)); id -u"], cpu_cores=1, memory_mb=64)
        assert (reply.accepted, reply.message, reply.assigned_node) == (True, "Task t1 assigned to node 1", 1)
        reply = client.call("ProposeTask", BLIXARD, task=kit.message("Task", id="t2", command="sh", args=["-c", "echo no >&2; exit 7"]))
        assert (reply.success, reply.message) == (True, "Task t2 proposed successfully, assigned to node 1")
        first, second = await ended(client, "t1"), await ended(client, "t2")
        assert (first.found, first.output, first.error) == (True, "42\n0\n", "")
        assert first.status == kit.value_of("TaskStatus", "TASK_STATUS_COMPLETED")
        assert (second.status, second.error) == (kit.value_of("TaskStatus", "TASK_STATUS_FAILED"), "it ended with exit code 7\nno\n")
        assert first.execution_time_ms < 60_000
        assert client.call("HealthCheck").healthy is True
        status, words = client.refused("GetClusterStatus")
        assert status == "FAILED_PRECONDITION"
        assert "--bind HOST:PORT" in words


@pytest.mark.row("B7")
async def test_what_cannot_be_made_a_machine_of(host_rig: Rig) -> None:
    async with served(host_rig, "--grpc-vm-image", "no/such/image") as client:
        status, words = client.refused("CreateVm", name="web")
        assert (status, words.startswith("no such image: no/such/image")) == ("NOT_FOUND", True)
        assert client.refused("CreateVm", name="web", config_path="/srv/web", memory_mb=1)[0] == "INVALID_ARGUMENT"
        assert client.refused("CreateVm", name="web", config_path="/srv/web", vcpus=100_000)[0] == "INVALID_ARGUMENT"
        assert list(client.call("ListVms").vms) == []


@pytest.mark.row("B10")
@pytest.mark.row("B3")
async def test_a_machine_runs_on_its_node_and_is_led_from_another(guest: str, host_rig: Rig) -> None:
    backend = host_rig.backend
    assert isinstance(backend, HostBackend)
    form = ("--peers", "1:127.0.0.1:7001,2:127.0.0.1:7002", "--token", SECRET)
    flags = ("--id", "1", "--bind", "127.0.0.1:7001", *form, "--vm-guest", guest, "--vm-monitor-root", f"{host_rig.folder}/sbs")
    address = f"unix:{host_rig.folder}/other.sock"
    async with served(host_rig, *flags) as own:
        with (
            kit.running(Path(host_rig.folder), *form, number=2, port=7002, listen=address, prefix=backend.enter) as node,
            node.client() as other,
        ):
            await wait_for_condition_with_backoff(lambda: both_vote(own, other), timeout_s=END_S)
            made = own.call("CreateVm", name="web", vcpus=1, memory_mb=128)
            assert (made.success, made.message) == (True, "VM 'web' created successfully")
            assert made.vm_id == (await host_rig.inspect("web")).id
            assert own.refused("CreateVm", name="web", vcpus=1, memory_mb=128)[0] == "ALREADY_EXISTS"
            [info] = other.call("ListVms").vms
            assert (info.name, info.node_id, info.state) == ("web", 1, kit.value_of("VmState", "VM_STATE_CREATED"))

            started = other.call("StartVm", name="web", timeout_s=END_S)
            assert (started.success, started.message) == (True, "VM 'web' start command sent")
            wanted = kit.message("VmInfo", name="web", state="VM_STATE_RUNNING", node_id=1, vcpus=1, memory_mb=128)
            assert own.call("GetVmStatus", name="web").vm_info == wanted
            await wait_for_condition_with_backoff(lambda: other.call("GetVmStatus", name="web").vm_info == wanted, timeout_s=END_S)
            again = other.call("StartVm", name="web")
            assert (again.success, "running" in again.message) == (False, True)
            stopped = other.call("StopVm", name="web", timeout_s=END_S)
            assert (stopped.success, stopped.message) == (True, "VM 'web' stop command sent")
            assert own.call("GetVmStatus", name="web").vm_info.state == kit.value_of("VmState", "VM_STATE_STOPPED")

            await host_rig.remove("web")
            await wait_for_condition_with_backoff(lambda: not other.call("ListVms").vms, timeout_s=END_S)


def both_vote(*clients: Client) -> bool:
    """Whether two nodes have formed their cluster."""
    try:
        states = sorted(client.call("GetRaftStatus", BLIXARD).state for client in clients)
    except grpc.RpcError:
        return False
    return states == ["follower", "leader"]
