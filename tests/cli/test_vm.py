"""The commands about virtual machines: from words to requests, and back."""

import os
from pathlib import Path
from typing import Any

import pytest

from isopod.cli import vm
from isopod.cli.parse import parse
from isopod.world.errors import InvalidArgument
from tests.cli.scripted_node import Peer, ScriptedNode, isopod

MACHINE = {"driver": "auto", "machine": "microvm", "vcpus": None, "memory_bytes": None, "disk_bytes": None, "config": "", "cold": False}


def told(folder: Path, words: list[str], method: str, reply: object) -> tuple[Any, Any]:
    """Run a command against a node that gives one answer; return what it was asked and how the command ended."""
    asked: list[Any] = []

    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request(method)
        asked.append(body)
        peer.reply(call, reply)
        peer.wait_closed()

    with ScriptedNode(str(folder), script) as node:
        done = isopod("-H", node.path, *words)
    return asked[0], done


@pytest.mark.row("B10")
@pytest.mark.parametrize(
    "words,changes,options",
    [
        (["web", "--image", "img"], {}, {}),
        (["--name", "web", "--image", "img"], {}, {}),
        (["--image", "img", "web", "--", "sleep", "--fast"], {"command": ["sleep", "--fast"]}, {}),
        (
            ["web", "--image=img", "--vcpus", "2", "--memory", "512", "--disk", "2g", "--network", "none", "--cold"],
            {"network": "none"},
            {"vcpus": 2, "memory_bytes": 512 << 20, "disk_bytes": 2 << 30, "cold": True},
        ),
        (["web", "--image", "img", "--memory", "1g", "--driver", "firecracker"], {}, {"memory_bytes": 1 << 30, "driver": "firecracker"}),
        (["web", "--config", "/srv/flake#web"], {"image": ""}, {"config": "/srv/flake#web"}),
        (["web", "-c", "microvm@web"], {"image": ""}, {"config": "microvm@web"}),
        (["web", "-c", "github:me/machines#web"], {"image": ""}, {"config": "github:me/machines#web"}),
        (["web", "-c", "web", "--driver", "systemd"], {"image": ""}, {"config": "web", "driver": "systemd"}),
    ],
)
def test_create_in_all_spellings(tmp_path: Path, words: list[str], changes: dict[str, Any], options: dict[str, Any]) -> None:
    body, done = told(tmp_path, ["vm", "create", *words], "container.create", {"id": "abc"})
    wanted = {"image": "img", "command": [], "name": "web", "isolation": "vm", "env": {}, "labels": {}, "network": "bridge"}
    wanted |= {"ports": [], "resources": {}, "mounts": []}
    assert (done.returncode, done.stdout, done.stderr) == (0, b"abc\n", b"")
    assert body == {**wanted, **changes, "vm": {**MACHINE, **options}}


def test_a_relative_configuration_is_taken_from_here(tmp_path: Path) -> None:
    body, _ = told(tmp_path, ["vm", "create", "web", "--config", "flake#one"], "container.create", {"id": "abc"})
    assert body["vm"]["config"] == f"{os.getcwd()}/flake#one"


@pytest.mark.row("V4")
def test_run_makes_a_machine_of_the_same_options(tmp_path: Path) -> None:
    words = ["run", "-d", "--isolation", "vm", "-m", "300m", "--cpus", "1.5", "-e", "A=b", "-v", "/srv:/data:ro", "img", "id", "-u"]
    body, done = told(tmp_path, words, "container.run", {"id": "abc", "name": "x"})
    spec = body["spec"]
    assert done.stdout == b"abc\n"
    assert (spec["isolation"], spec["vm"]) == ("vm", MACHINE)
    assert spec["resources"] == {"memory_bytes_max": 300 << 20, "cpus": 1.5, "pids_max": None}
    assert (spec["command"], spec["env"]) == (["id", "-u"], {"A": "b"})
    assert spec["mounts"] == [{"source": "/srv", "destination": "/data", "kind": "bind", "read_only": True}]
    plain, _ = told(tmp_path, ["run", "-d", "img"], "container.run", {"id": "abc", "name": "x"})
    assert "isolation" not in plain["spec"]


@pytest.mark.row("B10")
@pytest.mark.parametrize(
    "verb,method,fields",
    [
        ("start", "container.start", {}),
        ("stop", "container.stop", {"timeout_s": 10.0}),
        ("pause", "container.pause", {}),
        ("resume", "container.unpause", {}),
        ("delete", "container.remove", {"force": False}),
        ("rm", "container.remove", {"force": False}),
    ],
)
@pytest.mark.parametrize("words", [["web"], ["--name", "web"], ["-n", "web"]])
def test_the_life_cycle_in_other_tools_words(tmp_path: Path, verb: str, method: str, fields: dict[str, Any], words: list[str]) -> None:
    body, done = told(tmp_path, ["vm", verb, *words], method, {"name": "web"})
    assert (done.returncode, done.stdout) == (0, b"web\n")
    assert body == {"name": "web", **fields}


@pytest.mark.parametrize("verb", ["start", "stop", "status", "delete", "logs", "console", "snapshot", "resize"])
def test_without_a_name_nothing_is_asked(verb: str) -> None:
    done = isopod("vm", verb)
    assert done.returncode == 2
    assert b"no machine is named" in done.stderr


@pytest.mark.row("B10")
@pytest.mark.parametrize("verb", ["list", "ls"])
def test_list_shows_machines_only(tmp_path: Path, verb: str) -> None:
    body, done = told(tmp_path, ["vm", verb, "-q"], "container.list", {"containers": [{"name": "web"}, {"name": "db"}]})
    assert body == {"all": True, "isolation": "vm"}
    assert done.stdout == b"web\ndb\n"


def test_status_is_asked_of_the_machine(tmp_path: Path) -> None:
    body, done = told(tmp_path, ["vm", "status", "--name", "web", "--format", "json"], "system.render", {"text": "{}\n"})
    assert (body["method"], body["body"], body["format"]) == ("vm.status", {"name": "web"}, "json")
    assert done.stdout == b"{}\n"


@pytest.mark.parametrize(
    "words,method,body",
    [
        (["snapshot", "web"], "vm.snapshot", {"name": "web", "snapshot": "latest"}),
        (["snapshot", "web", "a"], "vm.snapshot", {"name": "web", "snapshot": "a"}),
        (["snapshot", "--name", "web", "a"], "vm.snapshot", {"name": "web", "snapshot": "a"}),
        (["snapshot", "--remove", "web", "a"], "vm.snapshot_remove", {"name": "web", "snapshot": "a"}),
        (["restore", "web", "a"], "vm.restore", {"name": "web", "snapshot": "a"}),
    ],
)
def test_snapshots(tmp_path: Path, words: list[str], method: str, body: dict[str, Any]) -> None:
    asked, done = told(tmp_path, ["vm", *words], method, {"name": "web"})
    assert done.returncode == 0
    assert asked == body


def test_resize_says_what_takes_effect_later(tmp_path: Path) -> None:
    words = ["vm", "resize", "web", "--vcpus", "2", "--memory", "384"]
    asked, done = told(tmp_path, words, "vm.resize", {"container": {"name": "web"}, "notes": ["processors take effect at the next start"]})
    assert asked == {"name": "web", "vcpus": 2, "memory_bytes": 384 << 20}
    assert (done.stdout, done.stderr) == (b"web\n", b"note: processors take effect at the next start\n")


@pytest.mark.row("B11")
@pytest.mark.parametrize("is_outdated,said", [(False, b""), (True, b"note: it goes on as it was started; then: isopod vm restart web\n")])
def test_update_says_when_a_restart_makes_a_difference(tmp_path: Path, is_outdated: bool, said: bytes) -> None:
    reply = {"container": {"name": "web"}, "runner": "/nix/store/b", "booted": "/nix/store/a", "is_outdated": is_outdated}
    asked, done = told(tmp_path, ["vm", "update", "--name", "web"], "vm.update", reply)
    assert asked == {"name": "web"}
    assert (done.returncode, done.stdout, done.stderr) == (0, b"web\n", said)


@pytest.mark.parametrize(
    "words,said",
    [
        (["create", "web", "--image", "i", "--vcpus", "two"], b"vcpus"),
        (["create", "web", "--image", "i", "--memory", "lots"], b"lots"),
        (["snapshot", "web", "a", "b"], b"does not take"),
        (["restore", "--name", "web", "a", "b"], b"one name"),
    ],
)
def test_words_that_make_no_sense(words: list[str], said: bytes) -> None:
    done = isopod("vm", *words)
    assert done.returncode in (1, 2)
    assert said in done.stderr


def test_the_console_is_carried_and_has_no_exit_code(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("vm.console")
        assert body == {"name": "web", "tail_bytes": 100, "follow": False}
        peer.send(4, call, {"type": "stdout", "data": b"booted\r\n"}, 10)
        peer.reply(call, {})
        peer.wait_closed()

    with ScriptedNode(str(tmp_path), script) as node:
        done = isopod("-H", node.path, "vm", "console", "--no-follow", "--tail", "100", "web")
    assert (done.returncode, done.stdout) == (0, b"booted\r\n")


@pytest.mark.parametrize("text,size", [("512", 512 << 20), ("512m", 512 << 20), ("1g", 1 << 30), (str(256 << 20), 256 << 20)])
def test_memory_as_other_tools_write_it(text: str, size: int) -> None:
    assert vm.memory_bytes(text) == size


def test_options_are_checked_before_anything_is_asked() -> None:
    with pytest.raises(InvalidArgument):
        vm.options(parse(["vm", "create", "x", "--vcpus", "-1"]))
