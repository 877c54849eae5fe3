"""Formats of records: the chain of steps, the first format's files, and what is refused."""

from typing import Any

import msgspec
import pytest

from isopod.engine.migrations import FORMAT, STEPS, decode, keep, read_files, set_aside_in, upgrade
from isopod.runtime.logger import Logger
from isopod.world.errors import BadRecord
from isopod.world.world import World
from tests.engine.test_bundle import RECORD

FIRST: dict[str, Any] = {
    "id": "a" * 64,
    "name": "box",
    "created_at_ns": 1,
    "updated_at_ns": 2,
    "image": "isopod/busybox:latest",
    "image_id": "sha256:0",
    "command": ["true"],
    "working_dir": "/",
    "user": "",
    "hostname": "box",
    "env": {"A": "B"},
    "labels": {},
    "isolation": "container",
    "terminal": False,
    "stdin_open": False,
    "auto_remove": False,
    "status": "exited",
    "pid": None,
    "pid_started_ticks": None,
    "supervisor_pid": None,
    "supervisor_started_ticks": None,
    "boot_id": "b",
    "started_at_ns": 3,
    "finished_at_ns": 4,
    "exit_code": 3,
    "oom_killed": False,
    "error": "",
    "restart_count": 0,
    "health": "none",
    "network": {"network": "bridge", "ip_address": None, "prefix_length": None, "gateway": None, "mac_address": None, "ports": {}},
    "resources": {"memory_bytes_max": None, "cpus": 0.5, "pids_max": None, "disk_bytes_max": None},
    "mounts": [{"source": "/data", "destination": "/data", "kind": "bind", "read_only": True}],
}
"""A record as the first format stored it, written down when that was today's."""


@pytest.mark.row("R14")
def test_a_record_of_the_first_format_is_read() -> None:
    record = decode(FIRST, 1, "x")
    assert (record.exit_code, record.network.network, record.resources.cpus, record.mounts[0].read_only) == (3, "bridge", 0.5, True)
    assert record.revision == 0
    assert "revision" not in FIRST, "a step changes nothing in place"


def test_every_format_has_a_step_to_the_next() -> None:
    assert sorted(STEPS) == list(range(1, FORMAT))


def test_the_chain_is_walked_in_order() -> None:
    steps = {n: (lambda record, n=n: {**record, "way": [*record.get("way", []), n]}) for n in (1, 2, 3)}
    assert upgrade({}, 1, "x", steps=steps, to=4) == {"way": [1, 2, 3]}
    assert upgrade({}, 3, "x", steps=steps, to=4) == {"way": [3]}
    assert upgrade({"a": 1}, 4, "x", steps=steps, to=4) == {"a": 1}


def test_a_newer_format_is_refused_with_what_to_do() -> None:
    with pytest.raises(BadRecord, match=f"format {FORMAT + 1}, this isopod reads up to {FORMAT}") as refused:
        upgrade({}, FORMAT + 1, "x")
    assert "newer" in refused.value.hint
    with pytest.raises(BadRecord, match="nothing reads format 0"):
        upgrade({}, 0, "x")


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(BadRecord, match="status"):
        decode({**FIRST, "status": "dancing"}, 1, "x")


async def test_files_that_cannot_be_read_are_set_aside_and_said(world: World, folder: str) -> None:
    lines: list[bytes] = []
    files = f"{folder}/containers"
    await world.disk.make_directory(files)
    for name, data in {
        f"{'a' * 64}.json": msgspec.json.encode(FIRST),
        f"{'b' * 64}.json": msgspec.json.encode(FIRST),  # another container's
        f"{'c' * 64}.json": b'{"id": ',
        f"{'d' * 64}.json": b"\xff\xfe",
        f"{'e' * 64}.json": b"[]",
        f"{'f' * 64}.damaged": msgspec.json.encode({**FIRST, "id": "f" * 64}),
        f"{'a' * 64}.json.tmp": b"half",
        "notes.txt": b"",
    }.items():
        await world.disk.write(f"{files}/{name}", data)
    found = await read_files(world.disk, files, Logger(lines.append, world.clock))
    assert [record.id for record in found.records] == [RECORD.id]
    assert list(found.damaged) == [letter * 64 for letter in "bcdef"]
    assert b"".join(lines).count(b"record.damaged") == 5
    assert await set_aside_in(world.disk, files) == [letter * 64 for letter in "bcdef"]
    await keep(world.disk, files)
    await world.disk.make_directory(files)
    await keep(world.disk, files)
    assert [name for name in await world.disk.list(folder) if name.startswith("containers")] == ["containers.v1", "containers.v1-2"]
