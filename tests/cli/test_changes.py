"""The commands that change and choose containers: from words to requests, from answers and events to lines."""

from typing import Any

import pytest

from isopod.cli import changes, events
from isopod.cli.parse import parse
from isopod.world.errors import InvalidArgument, IsopodError, UsageError
from tests.cli.scripted_node import Peer, ScriptedNode, isopod

NOW_NS = 1_000 * 10**9


def filters(*words: str) -> dict[str, Any]:
    return changes.filters(parse(["ps", *words]), NOW_NS)


@pytest.mark.row("R28")
@pytest.mark.parametrize(
    "words,expected",
    [
        (["-a"], {"all": True}),
        (["--filter", "status=exited", "-f", "status=dead"], {"status": ["exited", "dead"]}),
        (["--filter=label=a", "-flabel=b=c=d"], {"labels": ["a", "b=c=d"]}),
        (["-f", "name=web*"], {"name": "web*"}),
        (["-f", "since=10s", "-f", "until=5"], {"created_since_ns": 990 * 10**9, "created_until_ns": 5 * 10**9}),
        (["-f", "memory=64m", "-f", "cpu=1m", "-f", "pids=3"], {"memory_bytes_min": 64 << 20, "cpu_ns_min": 60 * 10**9, "pids_min": 3}),
        (["--last", "5"], {"limit": 5, "all": True}),
        (["-n0", "--sort", "memory"], {"limit": 0, "all": True, "sort": "memory"}),
    ],
)
def test_filters_of_ps(words: list[str], expected: dict[str, Any]) -> None:
    assert filters(*words) == {"all": False, "sort": "created", "status": [], "labels": [], **expected}


@pytest.mark.parametrize(
    "words",
    [
        *(["-f", "x"], ["-f", "x=y"], ["-f", "status="], ["-f", "memory=much"]),
        *(["-f", "pids=-1"], ["-f", "since=tea"], ["--last", "-1"], ["-n", "x"]),
    ],
)
def test_filters_that_make_no_sense(words: list[str]) -> None:
    with pytest.raises((InvalidArgument, UsageError)) as refused:
        filters(*words)
    assert isinstance(refused.value, IsopodError)
    assert refused.value.exit_code == 2


def test_an_update_sends_only_what_was_said(tmp_path: Any) -> None:
    asked: list[Any] = []

    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.update")
        asked.append(body)
        peer.reply(call, {"container": {"name": "box"}, "notes": ["later"]})
        peer.wait_closed()

    with ScriptedNode(str(tmp_path), script) as node:
        done = isopod("update", "-H", node.path, "--memory", "64m", "--cpus", "-1", "--label-rm", "a", "-l", "b=c", "box")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"box\n", b"note: box: later\n")
    assert asked[0] == {
        "name": "box",
        "memory_bytes_max": 64 << 20,
        "cpus": -1,
        "labels": {"b": "c"},
        "labels_remove": ["a"],
        "env": {},
        "env_remove": [],
        "mounts": [],
        "mounts_remove": [],
    }


@pytest.mark.parametrize(
    "fields,line",
    [
        ({"kind": "created", "image": "i:1"}, "created from i:1"),
        ({"kind": "deleted"}, "deleted"),
        ({"kind": "status", "status": "running", "status_before": "starting"}, "status starting -> running"),
        (
            {"kind": "status", "status": "exited", "status_before": "running", "exit_code": 137, "oom_killed": True},
            "status running -> exited (137, out of memory)",
        ),
        ({"kind": "health", "health": "healthy", "health_before": "starting"}, "health starting -> healthy"),
        ({"kind": "network", "network": "none", "network_before": "bridge"}, "network bridge -> none"),
        ({"kind": "mounts", "mount_added": {"destination": "/data"}}, "mounts + /data"),
        ({"kind": "mounts", "mount_removed": "/data"}, "mounts - /data"),
        ({"kind": "labels", "labels": {"a": "b"}}, "labels"),
    ],
)
def test_an_event_is_one_line(fields: dict[str, Any], line: str) -> None:
    body = {"type": "event", "id": "a" * 64, "name": "box\x1b[31m", "at_ns": 1_700_000_000_123_000_000, "cursor": 7, **fields}
    assert events._as_line(body) == f"2023-11-14T22:13:20.123Z 7 box [31m {line}\n"
