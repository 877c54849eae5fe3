"""Commands against a scripted node: the requests they make fit the contract, and answers come out as promised."""

import json
import os
import subprocess
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from isopod.api import messages as m
from isopod.api.methods import METHODS
from tests.cli.scripted_node import Peer, ScriptedNode, answering, command_line, environment, isopod, lines, refusing

TYPES = {method.name: method for method in METHODS}
CONTAINER = {"id": "c" * 64, "name": "web", "status": "running"}


def collecting(replies: dict[str, Any], into: list[tuple[str, Any]]) -> Callable[[Peer], None]:
    """Return a script that answers calls by method and collects their bodies, each checked against the contract."""

    def script(peer: Peer) -> None:
        peer.greet()
        while True:
            try:
                frame = peer.next()
            except EOFError:
                return
            assert frame[0] == 0
            into.append(
                (frame[2], msgspec.convert(frame[4], TYPES[frame[2]].request, strict=True) if frame[2] != "system.render" else frame[4])
            )
            peer.reply(frame[1], replies.get(frame[2], {}))

    return script


def request_of(folder: str, *words: str, reply: Any = None, **more: Any) -> Any:
    """Run a command that makes one call; return its request."""
    got: list[tuple[str, Any]] = []
    with ScriptedNode(folder, collecting({} if reply is None else reply, got)) as node:
        ended = isopod("-H", node.path, *words, **more)
    assert (ended.returncode, ended.stderr) == (0, b"")
    [(_, body)] = got
    return body


@pytest.mark.row("R2", "R11")
def test_run_detached_asks_for_all_that_was_said(folder: str) -> None:
    words = (
        "run -d --rm --name web -e A=1 -e FROM_HERE -e NOT_SET -v ./data:/data:ro -v /etc:/e -w /work -u 5:6 -m 64m --cpus 0.5 "
        "--pids-limit 9 --network none --hostname h -l a=b -l c -i -t isopod/busybox sh -c x"
    ).split()
    body = request_of(folder, *words, reply={"container.run": {"id": "c" * 64, "name": "web"}}, env={"FROM_HERE": "yes"}, cwd=folder)
    assert body == m.RunContainer(
        attach=False,
        spec=m.ContainerSpec(
            image="isopod/busybox",
            command=("sh", "-c", "x"),
            name="web",
            env={"A": "1", "FROM_HERE": "yes"},
            labels={"a": "b", "c": ""},
            working_dir="/work",
            user="5:6",
            hostname="h",
            network="none",
            resources=m.Resources(memory_bytes_max=64 << 20, cpus=0.5, pids_max=9),
            mounts=(
                m.Mount(source=os.path.join(folder, "data"), destination="/data", read_only=True),
                m.Mount(source="/etc", destination="/e"),
            ),
            terminal=True,
            stdin_open=True,
            auto_remove=True,
        ),
    )


@pytest.mark.parametrize(
    "words,expected",
    [
        ("create --name a img", m.ContainerSpec(image="img", name="a")),
        ("start a", m.StartContainer(name="a")),
        ("start a -d", m.StartContainer(name="a")),
        ("stop -t 1m a", m.StopContainer(name="a", timeout_s=60.0)),
        ("kill a", m.KillContainer(name="a", signal=9)),
        ("kill -s HUP a", m.KillContainer(name="a", signal=1)),
        ("kill --signal=sigusr1 a", m.KillContainer(name="a", signal=10)),
        ("kill -s 15 a", m.KillContainer(name="a", signal=15)),
        ("rm -f a", m.RemoveContainer(name="a", force=True)),
        ("ps -aq", m.ListContainers(all=True)),
        ("wait a", m.ContainerName(name="a")),
        ("commit a img:2", m.CommitContainer(name="a", image="img:2")),
        ("logs --tail 5 --since 3 -t a", m.LogsRequest(name="a", tail=5, since_ns=3_000_000_000, timestamps=True)),
        ("logs a", m.LogsRequest(name="a")),
        ("rmi a", m.RemoveImage(name="a")),
        ("network create --subnet 10.9.0.0/24 n", m.NetworkSpec(name="n", subnet="10.9.0.0/24")),
        ("network rm n", m.NetworkNameRequest(name="n")),
    ],
)
@pytest.mark.row("R3", "R4", "R5", "R8", "R9", "R10")
def test_request(folder: str, words: str, expected: m.Message) -> None:
    assert request_of(folder, *words.split()) == expected


def test_since_is_so_long_ago(folder: str) -> None:
    early, late = (request_of(folder, "logs", "--since", text, "a").since_ns for text in ("2h", "30m"))
    assert abs((late - early) / 1e9 - 5400) < 60
    iso = request_of(folder, "logs", "--since", "2026-11-20T08:00:00Z", "a").since_ns
    assert iso == 1795161600 * 10**9


@pytest.mark.parametrize(
    "words,how,method,body",
    [
        ("ps", "table", "container.list", {"all": False}),
        ("container ls -a --format json", "json", "container.list", {"all": True}),
        ("images", "table", "image.list", {}),
        ("network ls", "table", "network.list", {}),
        ("info --format=json", "json", "system.info", {}),
        ("image inspect a", "json", "image.inspect", {"name": "a"}),
        ("network inspect a", "json", "network.inspect", {"name": "a"}),
        ("container inspect a", "json", "container.inspect", {"name": "a"}),
    ],
)
@pytest.mark.row("R6")
def test_the_node_renders(folder: str, words: str, how: str, method: str, body: dict[str, Any]) -> None:
    got: list[tuple[str, Any]] = []
    with ScriptedNode(folder, collecting({"system.render": {"text": "as rendered – ü\n"}}, got)) as node:
        ended = isopod("-H", node.path, *words.split())
    assert (ended.returncode, ended.stdout.decode()) == (0, "as rendered – ü\n")
    [(name, request)] = got
    assert (name, request["method"], request["format"], request["body"]) == ("system.render", method, how, body)
    assert msgspec.convert(request["body"], TYPES[method].request) is not None


def test_ids_and_names_only(folder: str) -> None:
    with ScriptedNode(folder, answering("container.list", {"containers": [{"id": "ab" * 32}, {"id": "cd" * 32}]})) as node:
        assert isopod("-H", node.path, "ps", "-q").stdout == b"abababababab\ncdcdcdcdcdcd\n"
    with ScriptedNode(folder, answering("image.list", {"images": [{"id": "sha256:" + "ef" * 32}]})) as node:
        assert isopod("-H", node.path, "images", "-q").stdout == b"efefefefefef\n"
    with ScriptedNode(folder, answering("network.list", {"networks": [{"name": "bridge"}]})) as node:
        assert isopod("-H", node.path, "network", "ls", "-q").stdout == b"bridge\n"


def test_several_names_each_have_their_turn(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        for name, refused in (("a", False), ("b", True), ("c", False)):
            call, body = peer.request("container.remove")
            assert body == {"name": name, "force": False}
            if refused:
                peer.error(call, "wrong_state", "container b is running: cannot remove it", hint="isopod rm -f b")
            else:
                peer.reply(call, {})
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "rm", "a", "b", "c")
    assert (ended.returncode, ended.stdout) == (1, b"a\nc\n")
    assert lines(ended.stderr) == ["error: container b is running: cannot remove it", "hint: isopod rm -f b"]


def test_inspect_looks_for_a_container_then_an_image_then_a_network(folder: str) -> None:
    asked: list[str] = []

    def script(peer: Peer) -> None:
        peer.greet()
        for _ in range(3):
            call, body = peer.request("system.render")
            asked.append(body["method"])
            if body["method"] == "network.inspect":
                peer.reply(call, {"text": '{"name": "x"}\n'})
            else:
                peer.error(call, "not_found", "no such thing: x")
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "inspect", "x")
    assert asked == ["container.inspect", "image.inspect", "network.inspect"]
    assert json.loads(ended.stdout) == {"name": "x"}


def test_inspect_of_nothing(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        for _ in range(3):
            call, _body = peer.request("system.render")
            peer.error(call, "not_found", "no such thing: x")
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "inspect", "x")
    assert ended.returncode == 1
    assert lines(ended.stderr)[0] == "error: no such container, image or network: x"


@pytest.mark.parametrize(
    "words,method,reply,printed",
    [
        ("create img", "container.create", CONTAINER, "c" * 64 + "\n"),
        ("start web", "container.start", CONTAINER, "web\n"),
        ("stop web", "container.stop", CONTAINER, "web\n"),
        ("wait web", "container.wait", {"id": "c", "name": "web", "exit_code": 137}, "137\n"),
        ("wait web", "container.wait", {"id": "c", "name": "web", "exit_code": None}, "255\n"),
        ("commit web i", "container.commit", {"id": "sha256:0"}, "sha256:0\n"),
        ("rmi i", "image.remove", {"untagged": "i:latest", "deleted": "sha256:0"}, "untagged: i:latest\ndeleted: sha256:0\n"),
        ("network create n", "network.create", {"name": "n"}, "n\n"),
    ],
)
def test_answer(folder: str, words: str, method: str, reply: dict[str, Any], printed: str) -> None:
    with ScriptedNode(folder, answering(method, reply)) as node:
        ended = isopod("-H", node.path, *words.split())
    assert (ended.returncode, ended.stdout.decode(), ended.stderr) == (0, printed, b"")


def test_version_of_both_ends(folder: str) -> None:
    script = answering("system.render", {"text": '{"version": "9"}\n'})
    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "version", "--format", "json")
    both = json.loads(ended.stdout)
    assert both["server"] == {"version": "9"}
    assert both["client"]["version"]
    with ScriptedNode(folder, answering("system.render", {"text": "version: 9\nprotocol: 1\n"})) as node:
        assert lines(isopod("-H", node.path, "version").stdout)[1:] == ["node version: 9", "node protocol: 1"]
    without = isopod("-H", folder + "/none", "version")
    assert (without.returncode, without.stdout) == (3, f"client version: {both['client']['version']}\n".encode())


@pytest.mark.parametrize(
    "words,exit_code,message",
    [
        ("run -m 3q img", 125, "error: size '3q': want digits with an optional suffix k, m, g or t"),
        ("run --cpus none img", 125, "error: cpus 'none': want a number of cores"),
        ("run --pids-limit 0 img", 125, "error: pids-limit '0': want a number of processes, or -1 for no limit"),
        ("run -v data:/data img", 125, "error: volume 'data:/data': HOST begins with none of /, ./ and ../"),
        ("run -v /data img", 125, "error: volume '/data': want HOST:CONTAINER or HOST:CONTAINER:ro"),
        ("run -v /data:data img", 125, "error: volume '/data:data': CONTAINER is not an absolute path"),
        ("run -v /d:/d:rx img", 125, "error: volume '/d:/d:rx': 'rx' is neither ro nor rw"),
        ("run -e =x img", 125, "error: variable '=x': want KEY=VALUE or KEY"),
        ("run -l =x img", 125, "error: label '=x': want KEY=VALUE or KEY"),
        ("run -it img", 125, "error: option '-t': standard input is not a terminal"),
        ("create -m 0 img", 2, "error: size '0': out of range"),
        ("stop -t soon web", 2, "error: duration 'soon': want a number with an optional suffix ms, s, m or h"),
        ("kill -s FOO web", 2, "error: signal 'FOO': no such signal"),
        ("kill -s 99 web", 2, "error: signal '99': no such signal"),
        ("kill -s NSIG web", 2, "error: signal 'NSIG': no such signal"),
        ("logs --tail x web", 2, "error: tail 'x': want a number of lines, or all"),
        ("logs --since tomorrow web", 2, "error: time 'tomorrow': want 10m, 2026-11-20T08:00:00Z, or seconds since 1970"),
        ("start -a x y", 125, "error: attached start 'x y': takes one container"),
        ("import /nonexistent/x.tar name", 1, "error: no such file: /nonexistent/x.tar"),
        ("completion tcsh", 2, "error: shell 'tcsh': choose one of: bash, zsh, fish"),
        ("help nothing", 2, "error: no such command: nothing"),
    ],
)
@pytest.mark.row("R12")
def test_values_that_make_no_sense_are_refused_before_any_call(words: str, exit_code: int, message: str) -> None:
    ended = isopod("-H", "/nonexistent/socket", *words.split())
    assert (ended.returncode, ended.stdout) == (exit_code, b"")
    assert lines(ended.stderr)[0] == message


def test_words_that_are_not_utf8() -> None:
    ended = isopod("rm", os.fsdecode(b"a\xff"))
    assert ended.returncode == 2
    assert lines(ended.stderr) == ["error: argument 'a?': not UTF-8"]
    assert isopod("run", "img", os.fsdecode(b"a\xff")).returncode == 125


def test_output_that_is_closed_goes_nowhere(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("system.render")
        peer.reply(call, {"text": "ID NAME"})
        with pytest.raises(EOFError):
            raise AssertionError(peer.next())

    with ScriptedNode(folder, script) as node:
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command_line("-H", node.path, "ps")]
        ended = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_relative_volume_in_a_folder_that_is_gone(folder: str) -> None:
    command = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *command_line("run", "-v", "./x:/x", "img")]
    gone = os.path.join(folder, "gone")
    os.mkdir(gone)
    ended = subprocess.run(command, env=environment(), cwd=gone, capture_output=True, check=False)
    assert ended.returncode == 125
    assert lines(ended.stderr)[0] == "error: cannot use the working folder of this shell: No such file or directory"


@pytest.mark.parametrize("code,exit_code", [("not_found", 1), ("kernel", 4), ("bad_record", 5), ("bug", 70), ("something_new", 1)])
def test_exit_code_of_a_refusal_is_the_errors(folder: str, code: str, exit_code: int) -> None:
    with ScriptedNode(folder, refusing("container.stop", code, "it did not work", hint="try this", exit_code=exit_code)) as node:
        ended = isopod("-H", node.path, "stop", "web")
    assert ended.returncode == exit_code
    assert lines(ended.stderr) == ["error: it did not work", "hint: try this"]


@pytest.mark.parametrize(
    "code,exit_code,expected",
    [("not_found", 1, 125), ("command_not_runnable", 127, 127), ("command_not_runnable", 126, 126), ("bug", 70, 125)],
)
def test_exit_code_of_run_and_exec(folder: str, code: str, exit_code: int, expected: int) -> None:
    for words, method in (("run -d img x", "container.run"), ("run img x", "container.run"), ("exec web x", "container.exec")):
        with ScriptedNode(folder, refusing(method, code, "no", exit_code=exit_code)) as node:
            assert isopod("-H", node.path, *words.split()).returncode == expected
