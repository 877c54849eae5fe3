"""The fakes of VMMs enforce what is documented: each rule is broken here once, and the fake says so."""

from typing import Any, Final

import msgspec
import pytest

from isopod.world.world import World
from tests.engine.vm.fakes.cloud_hypervisor import CloudHypervisorRules
from tests.engine.vm.fakes.firecracker import FirecrackerRules
from tests.engine.vm.fakes.rules import Rules, WorldFiles

Call = tuple[str, str, Any]
START: Final[Call] = ("PUT", "/actions", {"action_type": "InstanceStart"})
SOURCE: Final[Call] = ("PUT", "/boot-source", {"kernel_image_path": "/tmp/kernel"})
PAUSE: Final[Call] = ("PATCH", "/vm", {"state": "Paused"})
CREATE: Final[Call] = ("PUT", "/snapshot/create", {"snapshot_path": "/tmp/state", "mem_file_path": "/tmp/memory"})
LOAD: Final[Call] = (
    "PUT",
    "/snapshot/load",
    {"snapshot_path": "/tmp/state", "mem_backend": {"backend_type": "File", "backend_path": "/tmp/memory"}},
)

FIRECRACKER_BROKEN: Final[dict[str, tuple[list[Call], str]]] = {
    "no kernel": ([START], "kernel configuration"),
    "started twice": ([SOURCE, START, START], "after starting"),
    "configured after the start": ([SOURCE, START, SOURCE], "after starting"),
    "paused before the start": ([PAUSE], "before starting"),
    "button before the start": ([("PUT", "/actions", {"action_type": "SendCtrlAltDel"})], "before starting"),
    "snapshot before the start": ([CREATE], "before starting"),
    "snapshot while it runs": ([SOURCE, START, CREATE], "not paused"),
    "load after configuration": ([SOURCE, LOAD], "not allowed after configuring"),
    "load after the start": ([SOURCE, START, PAUSE, CREATE, LOAD], "after starting"),
    "load of nothing": ([("PUT", "/snapshot/load", {**LOAD[2], "snapshot_path": "/tmp/none"})], "No such file"),
    "load without memory": ([("PUT", "/snapshot/load", {"snapshot_path": "/tmp/state"})], "is required"),
    "unknown field": ([("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128, "cpus": 1})], "unknown field `cpus`"),
    "missing field": ([("PUT", "/machine-config", {"vcpu_count": 1})], "missing field `mem_size_mib`"),
    "wrong kind": ([("PUT", "/machine-config", {"vcpu_count": "1", "mem_size_mib": 128})], "invalid type"),
    "unknown variant": ([("PUT", "/actions", {"action_type": "Halt"})], "unknown variant"),
    "too many processors": ([("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 128})], "vCPU"),
    "unknown path": ([("PUT", "/reboot", {})], "Invalid request method and/or path"),
    "unknown method": ([("DELETE", "/vm", None)], "Empty DELETE"),
    "no body": ([("PUT", "/actions", None)], "Empty PUT"),
    "another id": ([("PUT", "/drives/a", {"drive_id": "b", "is_root_device": False, "path_on_host": "/tmp/kernel"})], "does not match"),
    "bad id": ([("PUT", "/drives/a-b", {"drive_id": "a-b", "is_root_device": False, "path_on_host": "/tmp/kernel"})], "alphanumeric"),
    "no disk": ([("PUT", "/drives/a", {"drive_id": "a", "is_root_device": False, "path_on_host": "/tmp/none"})], "No such file"),
    "disk changed before the start": ([("PATCH", "/drives/a", {"drive_id": "a", "path_on_host": "/tmp/kernel"})], "before starting"),
    "bad address": ([("PUT", "/network-interfaces/e", {"iface_id": "e", "host_dev_name": "t", "guest_mac": "1"})], "invalid MAC"),
}


@pytest.mark.parametrize(("calls", "why"), FIRECRACKER_BROKEN.values(), ids=FIRECRACKER_BROKEN.keys())
async def test_firecracker(sim_world: Any, calls: list[Call], why: str) -> None:
    world: World = sim_world.world
    await world.disk.write("/tmp/kernel", b"kernel")
    await broken(FirecrackerRules(WorldFiles(world)), calls, why, status=400)


MACHINE: Final = {"payload": {"kernel": "/tmp/kernel"}, "cpus": {"boot_vcpus": 1, "max_vcpus": 2}, "memory": {"size": 128 << 20}}


def put(verb: str, body: Any = None) -> Call:
    """Return a call of Cloud Hypervisor's interface."""
    return ("PUT", f"/api/v1/{verb}", body)


MADE: Final = put("vm.create", MACHINE)
SNAPSHOT: Final = put("vm.snapshot", {"destination_url": "file:///tmp"})
RESTORE: Final = put("vm.restore", {"source_url": "file:///tmp"})

CLOUD_HYPERVISOR_BROKEN: Final[dict[str, tuple[list[Call], str, int]]] = {
    "boot of nothing": ([put("vm.boot")], "not created", 404),
    "created twice": ([MADE, MADE], "already created", 500),
    "booted twice": ([MADE, put("vm.boot"), put("vm.boot")], "already created", 500),
    "paused before the boot": ([MADE, put("vm.pause")], "Invalid state transition", 500),
    "paused twice": ([MADE, put("vm.boot"), put("vm.pause"), put("vm.pause")], "Invalid state transition", 500),
    "resumed while it runs": ([MADE, put("vm.boot"), put("vm.resume")], "Invalid state transition", 500),
    "snapshot while it runs": ([MADE, put("vm.boot"), SNAPSHOT], "not paused", 500),
    "restore where there is one": ([MADE, put("vm.boot"), put("vm.pause"), SNAPSHOT, RESTORE], "already created", 500),
    "restore of nothing": ([RESTORE], "No such file", 500),
    "no kernel": ([put("vm.create", {**MACHINE, "payload": {}})], "Kernel is missing", 400),
    "no such kernel": ([put("vm.create", {**MACHINE, "payload": {"kernel": "/tmp/none"}}), put("vm.boot")], "No such file", 500),
    "unknown field": ([put("vm.create", {**MACHINE, "disk": []})], "unknown field `disk`", 400),
    "fewer at most": ([put("vm.create", {**MACHINE, "cpus": {"boot_vcpus": 2, "max_vcpus": 1}})], "Max CPUs", 400),
    "shares without shared memory": (
        [put("vm.create", {**MACHINE, "fs": [{"tag": "t", "socket": "/s", "num_queues": 1, "queue_size": 1024}]})],
        "shared memory",
        400,
    ),
    "one id twice": ([put("vm.create", {**MACHINE, "net": [{"id": "a"}, {"id": "a"}]})], "not unique", 409),
    "too many processors": ([MADE, put("vm.boot"), put("vm.resize", {"desired_vcpus": 3})], "exceeds the maximum", 500),
    "too much memory": ([MADE, put("vm.boot"), put("vm.resize", {"desired_ram": 256 << 20})], "could not be resized", 500),
    "a body too many": ([MADE, put("vm.boot", {})], "Bad Request", 400),
    "unknown verb": ([put("vm.start")], "Not Found", 404),
    "wrong method": ([("GET", "/api/v1/vm.boot", None)], "Not Found", 404),
    "no prefix": ([("GET", "/vm.info", None)], "Not Found", 404),
}


@pytest.mark.parametrize(("calls", "why", "status"), CLOUD_HYPERVISOR_BROKEN.values(), ids=CLOUD_HYPERVISOR_BROKEN.keys())
async def test_cloud_hypervisor(sim_world: Any, calls: list[Call], why: str, status: int) -> None:
    world: World = sim_world.world
    await world.disk.write("/tmp/kernel", b"kernel")
    await broken(CloudHypervisorRules(WorldFiles(world)), calls, why, status=status)


async def broken(rules: Rules, calls: list[Call], why: str, *, status: int) -> None:
    """Make calls of which the last one alone is refused, with these words."""
    answers = [await rules.handle(method, path, b"" if body is None else msgspec.json.encode(body)) for method, path, body in calls]
    assert [each[0] < 400 for each in answers] == [True] * (len(calls) - 1) + [False]
    assert answers[-1][0] == status
    assert why in answers[-1][1].decode()
