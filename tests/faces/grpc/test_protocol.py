"""The protocol is kept: nothing of what was published is removed, renamed or renumbered, and what is served is what proto/ says."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from isopod.faces.grpc.main import Face
from isopod.faces.grpc.schema import FILE, Schema, load_schema
from isopod.faces.grpc.settings import FaceSettings
from isopod.runtime.logger import Logger
from isopod.world.errors import BadRecord, ToolMissing
from isopod.world.world import World
from tests.faces.grpc.kit import BLIXARD, CLUSTER, PROTO, RAFT, compiled, pool

FROZEN = Path(__file__).parent / "frozen.txt"
TYPES = {3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string", 11: "message", 12: "bytes", 13: "uint32", 14: "enum"}
THE_14 = (
    *("JoinCluster", "LeaveCluster", "GetClusterStatus", "SendRaftMessage", "SubmitTask", "GetTaskStatus"),
    *("CreateVm", "StartVm", "StopVm", "ListVms", "GetVmStatus", "HealthCheck", "GetRaftStatus", "ProposeTask"),
)


def summary(descriptors: bytes) -> list[str]:
    """Return one line for everything that a client of these descriptors counts on."""
    found: list[str] = []
    schema = Schema(descriptors)
    for name in ("blixard.proto", "blixard_raft.proto"):
        file = schema.pool.FindFileByName(name)
        for message in file.message_types_by_name.values():
            found += [f"message {message.full_name}", *(_field(field) for field in message.fields)]
        for enum in file.enum_types_by_name.values():
            found += [f"value {enum.full_name}.{value.name} = {value.number}" for value in enum.values]
        for service in file.services_by_name.values():
            found += [
                f"call {service.full_name}.{call.name}({call.input_type.full_name}) -> {call.output_type.full_name}"
                for call in service.methods
            ]
    return sorted(found)


def _field(field: Any) -> str:
    kind = TYPES[field.type]
    other = field.message_type or field.enum_type
    many = "repeated " if field.is_repeated else ""
    return f"field {field.containing_type.full_name}.{field.name} = {field.number} {many}{kind}{f' {other.full_name}' if other else ''}"


def missing(frozen: list[str], descriptors: bytes) -> list[str]:
    """Return what was promised and is not there any more."""
    there = dict.fromkeys(summary(descriptors))
    return [line for line in frozen if line not in there]


@pytest.mark.row("B41")
def test_nothing_that_was_published_has_changed() -> None:
    assert missing(FROZEN.read_text().splitlines(), compiled()) == []


@pytest.mark.row("B41")
def test_everything_that_is_published_is_frozen() -> None:
    frozen = dict.fromkeys(FROZEN.read_text().splitlines())
    added = [line for line in summary(compiled()) if line not in frozen]
    assert added == [], "add these lines to tests/faces/grpc/frozen.txt"


@pytest.mark.row("B41")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"string name = 1;", b"string called = 1;"),
        (b"uint32 memory_mb = 5;", b"uint32 memory_mb = 6;"),
        (b"VM_STATE_FAILED = 6;", b""),
        (b"TASK_STATUS_PENDING = 1;", b"TASK_STATUS_WAITING = 1;"),
        (b"uint64 term = 3;", b"string term = 3;"),
        (b"repeated string args = 3;", b"string args = 3;"),
        (b"  rpc HealthCheck(HealthCheckRequest) returns (HealthCheckResponse);", b""),
        (b"  rpc StopVm(StopVmRequest) returns (StopVmResponse);", b"  rpc StopVm(StopVmRequest) returns (StartVmResponse);"),
    ],
)
def test_a_change_is_seen(old: bytes, new: bytes, tmp_path: Path) -> None:
    source = (PROTO / "blixard.proto").read_bytes()
    assert old in source
    (tmp_path / "blixard.proto").write_bytes(source.replace(old, new))
    (tmp_path / "blixard_raft.proto").write_bytes((PROTO / "blixard_raft.proto").read_bytes())
    command = ["protoc", f"--proto_path={tmp_path}", f"--descriptor_set_out={tmp_path}/set", "blixard.proto", "blixard_raft.proto"]
    subprocess.run(command, check=True, timeout=60)
    assert missing(FROZEN.read_text().splitlines(), (tmp_path / "set").read_bytes()) != []


@pytest.mark.row("B41")
def test_what_is_served_is_what_the_sources_say() -> None:
    served, wanted = (FileDescriptorSet.FromString(data) for data in (Path(FILE).read_bytes(), compiled()))
    assert served == wanted, "the sources changed since set-up compiled them: make setup"


@pytest.mark.row("B6")
def test_all_14_calls_are_there() -> None:
    calls = [method.name for service in (CLUSTER, BLIXARD) for method in Schema(compiled()).services[service]]
    assert sorted(calls) == sorted(THE_14)


@pytest.mark.row("B6")
async def test_each_call_has_a_handler_and_tests_have_three_more(host_world: World) -> None:
    schema = Schema(compiled())
    lines: list[bytes] = []
    for test_services, services in ((False, (CLUSTER, BLIXARD)), (True, (CLUSTER, BLIXARD, RAFT))):
        settings = FaceSettings(listen="127.0.0.1:0", socket="/none", test_services=test_services)
        face = Face(host_world, settings, Logger(lines.append, host_world.clock))
        wanted = [method.path for service in services for method in schema.services[service]]
        assert sorted(face.handlers()) == sorted(wanted)
        await face.stop()


@pytest.mark.row("B6")
def test_constants_carry_the_name_of_their_enum() -> None:
    for name, enum in pool().FindFileByName("blixard.proto").enum_types_by_name.items():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper() + "_"
        assert all(value.name.startswith(prefix) for value in enum.values)
        assert enum.values[0].name == f"{prefix}UNKNOWN"


@pytest.mark.row("B41")
async def test_a_protocol_that_was_not_compiled_is_said(world: World, folder: str) -> None:
    with pytest.raises(ToolMissing, match="make setup"):
        await load_schema(world.disk, f"{folder}/none")
    await world.disk.write(f"{folder}/set", b"\xff\xff\xff")
    with pytest.raises(BadRecord, match="no descriptors"):
        await load_schema(world.disk, f"{folder}/set")
