"""Tables and JSON, as they are printed."""

import json

import msgspec
import pytest

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.api.render import container_status, facts, render
from isopod.world.errors import InvalidArgument

NS = 1_000_000_000
BOX = m.Container(
    id="0123456789abcdef" * 4,
    name="box",
    created_at_ns=0,
    updated_at_ns=0,
    image="busybox",
    image_id="sha256:1",
    command=("sh", "-c", "echo a long line that goes on\nand on"),
    working_dir="/",
    user="",
    hostname="box",
    status="running",
    pid=77,
    started_at_ns=100 * NS,
    network=m.Endpoint(network="none"),
)


@pytest.mark.row("R6")
def test_containers_as_a_table() -> None:
    gone = msgspec.structs.replace(BOX, name="b", status="exited", pid=None, exit_code=137, oom_killed=True, finished_at_ns=160 * NS)
    text = render(methods.CONTAINER_LIST.name, m.ContainerList(containers=(BOX, gone)), form="table", now_s=220.0)
    assert text == (
        "ID            NAME  PID  COMMAND                         STATUS                                    IMAGE\n"
        "0123456789ab  box   77   sh -c echo a long line that g…  Up 2 minutes                              busybox\n"
        "0123456789ab  b     -    sh -c echo a long line that g…  Exited (137, out of memory) 1 minute ago  busybox\n"
    )


def test_containers_as_json() -> None:
    text = render(methods.CONTAINER_LIST.name, m.ContainerList(containers=(BOX,)), form="json", now_s=0)
    assert [row["name"] for row in json.loads(text)] == ["box"]


def test_an_empty_list_is_a_heading_or_an_empty_array() -> None:
    empty = m.ContainerList(containers=())
    assert render(methods.CONTAINER_LIST.name, empty, form="table", now_s=0) == "ID  NAME  PID  COMMAND  STATUS  IMAGE\n"
    assert json.loads(render(methods.CONTAINER_LIST.name, empty, form="json", now_s=0)) == []


def test_what_was_probed_carries_its_reason() -> None:
    version = m.Version(version="1", protocol=1, python="3", core="1")
    assert render(methods.SYSTEM_VERSION.name, version, form="table", now_s=0) == "version: 1\nprotocol: 1\npython: 3\ncore: 1\n"


def test_times_and_sizes_are_for_people() -> None:
    text = facts({"started_at_ns": 1_700_000_000 * NS, "memory_bytes": 3 << 30, "paths": {"root": "/r"}, "cluster": None})
    assert text == "started: 2023-11-14 22:13:20 UTC\nmemory: 3.0 GiB\npaths:\n  root: /r\ncluster: none\n"


def test_a_format_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        render(methods.SYSTEM_VERSION.name, m.Empty(), form="yaml", now_s=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": "created"}, "Created"),
        ({"status": "paused"}, "Up 5 seconds (paused)"),
        ({"status": "unknown", "exit_code": 255, "finished_at_ns": 105 * NS}, "Unknown (255) 0 seconds ago"),
    ],
)
def test_states_in_words(changes: dict[str, object], words: str) -> None:
    assert container_status(msgspec.structs.replace(BOX, **changes), 105.0) == words


@pytest.mark.row("B10")
def test_a_virtual_machine_as_facts() -> None:
    vm = m.VmSettings(driver="auto", vcpus=2, memory_bytes=256 << 20, disk_bytes=10 << 30)
    record = msgspec.structs.replace(BOX, isolation="vm", vm=vm, accelerator="tcg", origin="template")
    snapshot = machines.VmSnapshot(name="before", created_at_ns=1, memory_bytes=1, disk_bytes=1)
    state = machines.VmState(container=record, machine="running", agent="0.1.0", guest_kernel="6.12", silent_s=0.25, snapshots=(snapshot,))
    lines = render(methods.VM_STATUS.name, state, form="table", now_s=220.0).splitlines()
    assert "machine: running" in lines
    assert "vcpus: 2" in lines
    assert "memory: 256.0 MiB" in lines
    assert "started from: template" in lines
    assert "guest last heard: 0.2 s ago" in lines
    assert "snapshots: before" in lines
    assert "why: none" in lines
