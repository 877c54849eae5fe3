"""The calls about virtual machines on one node: replies, states, and which failure is told how. On both Worlds, without gRPC."""

from typing import Any

import msgspec
import pytest

from isopod.api import messages as m
from isopod.faces.grpc.machines import vm_state
from isopod.world.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    RuntimeFailed,
    Unsupported,
)
from isopod.world.world import World
from tests.faces.grpc.fake_node import Desk, FakeNode, asked, container

pytestmark = pytest.mark.row("B10")
CREATE: dict[str, Any] = {"config_path": "", "vcpus": 0, "memory_mb": 0}


async def test_a_machine_is_made_started_seen_and_stopped(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        made = await desk.machines.create_vm(asked(name="web", config_path="", vcpus=2, memory_mb=512))
        assert made == {"success": True, "message": "VM 'web' created successfully", "vm_id": "id1-1"}
        record = node.containers["web"]
        assert (record.isolation, record.image, record.command) == ("vm", "isopod/busybox", ("sleep", "infinity"))
        assert record.vm is not None
        assert (record.vm.vcpus, record.vm.memory_bytes) == (2, 512 << 20)

        assert await desk.machines.start_vm(asked(name="web")) == {"success": True, "message": "VM 'web' start command sent"}
        info = {"name": "web", "state": "VM_STATE_RUNNING", "node_id": 1, "vcpus": 2, "memory_mb": 512}
        assert await desk.machines.vm_status(asked(name="web")) == {"found": True, "vm_info": info}
        assert await desk.machines.stop_vm(asked(name="web")) == {"success": True, "message": "VM 'web' stop command sent"}
        assert await desk.listed() == [("web", 1, "STOPPED")]


async def test_a_configuration_takes_the_place_of_the_image(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        await desk.machines.create_vm(asked(name="web", config_path="/srv/web/microvm.nix", vcpus=0, memory_mb=0))
        record = node.containers["web"]
        assert (record.image, record.command) == ("", ())
        assert record.vm is not None
        assert record.vm.config == "/srv/web/microvm.nix"


async def test_what_a_machine_is_made_of_is_a_setting(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node, vm_image="my/own", vm_command=()) as desk:
        await desk.machines.create_vm(asked(name="web", **CREATE))
        assert (node.containers["web"].image, node.containers["web"].command) == ("my/own", ())


@pytest.mark.row("B7")
async def test_what_cannot_be_created(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        assert await desk.machines.create_vm(asked(name="", **CREATE)) == {"success": False, "message": "VM name cannot be empty"}
        with pytest.raises(InvalidArgument, match="VM name"):
            await desk.machines.create_vm(asked(name="../etc", **CREATE))
        with pytest.raises(InvalidArgument, match="vcpus"):
            await desk.machines.create_vm(asked(name="big", config_path="", vcpus=4_000_000_000, memory_mb=0))
        await desk.machines.create_vm(asked(name="web", **CREATE))
        with pytest.raises(AlreadyExists, match="web"):
            await desk.machines.create_vm(asked(name="web", **CREATE))
        node.failures["container.create"] = Unsupported("a virtual machine", "no hypervisor was found")
        with pytest.raises(Unsupported):
            await desk.machines.create_vm(asked(name="other", **CREATE))
        node.failures["container.create"] = RuntimeFailed("create", "other", "no space for its disk")
        told = await desk.machines.create_vm(asked(name="other", **CREATE))
        assert told == {"success": False, "message": "create other: no space for its disk"}
        assert list(node.containers) == ["web"]


@pytest.mark.row("B7")
async def test_what_cannot_be_started_or_stopped(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        for call in (desk.machines.start_vm, desk.machines.stop_vm):
            with pytest.raises(InvalidArgument, match="VM name"):
                await call(asked(name=""))
            with pytest.raises(NotFound, match="no such VM: none"):
                await call(asked(name="none"))
        node.make("plain", isolation="container")
        with pytest.raises(NotFound, match="no such VM: plain"):
            await desk.machines.stop_vm(asked(name="plain"))
        node.make("web")
        with pytest.raises(NotFound, match="no such VM: id-w"):
            await desk.machines.stop_vm(asked(name="id-w"))
        node.failures["container.start"] = RuntimeFailed("start", "web", "the guest's kernel panicked")
        assert await desk.machines.start_vm(asked(name="web")) == {"success": False, "message": "start web: the guest's kernel panicked"}
        node.failures["container.start"] = DeadlineExceeded("container.start", 10)
        with pytest.raises(DeadlineExceeded):
            await desk.machines.start_vm(asked(name="web"))
        node.change("web", status="running")
        told = await desk.machines.start_vm(asked(name="web"))
        assert (told["success"], "running" in told["message"]) == (False, True)


async def test_who_is_not_there_is_not_found(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node) as desk:
        node.make("plain", isolation="container")
        for name in ("none", "", "plain", "x" * 100_000, "\0", "../.."):
            assert await desk.machines.vm_status(asked(name=name)) == {"found": False}
        assert await desk.listed() == []


async def test_a_node_without_an_engine_has_no_machines(world: World, folder: str) -> None:
    async with FakeNode(world, folder) as node, Desk(node, has_engine=False) as desk:
        assert await desk.listed() == []
        assert await desk.machines.vm_status(asked(name="web")) == {"found": False}
        with pytest.raises(NotFound):
            await desk.machines.start_vm(asked(name="web"))


STATES: list[tuple[dict[str, Any], str]] = [
    ({"status": "created"}, "CREATED"),
    ({"status": "starting"}, "STARTING"),
    ({"status": "restarting"}, "STARTING"),
    ({"status": "running"}, "RUNNING"),
    ({"status": "paused"}, "RUNNING"),
    ({"status": "stopping"}, "STOPPING"),
    ({"status": "removing"}, "STOPPING"),
    ({"status": "unknown"}, "UNKNOWN"),
    ({"status": "exited", "exit_code": 0}, "STOPPED"),
    ({"status": "exited", "exit_code": 137}, "STOPPED"),
    ({"status": "exited", "exit_code": 143}, "STOPPED"),
    ({"status": "exited", "exit_code": 1}, "FAILED"),
    ({"status": "exited", "exit_code": 137, "oom_killed": True}, "FAILED"),
    ({"status": "exited", "exit_code": 137, "error": "the guest's kernel panicked"}, "FAILED"),
    ({"status": "running", "error": "an older story"}, "RUNNING"),
]


@pytest.mark.row("B11")
@pytest.mark.parametrize(("fields", "wanted"), STATES)
def test_every_state_has_its_constant(fields: dict[str, Any], wanted: str) -> None:
    assert vm_state(msgspec.structs.replace(container("web", "id"), **fields)) == f"VM_STATE_{wanted}"


def test_no_state_was_forgotten() -> None:
    known = {fields["status"] for fields, _ in STATES}
    assert known == set(m.Status.__args__)  # type: ignore[attr-defined]
