"""The lean client and the program's edge: what happens when there is no node, or one that fails or lies."""

import os
import signal
import socket
import subprocess

import pytest

from tests.cli.scripted_node import Peer, ScriptedNode, answering, command_line, environment, isopod, lines

START_HINT = "hint: start one: isopod node (or, in a source tree: make run)"


@pytest.mark.row("R1")
def test_no_node(folder: str) -> None:
    path = folder + "/none.sock"
    for words, exit_code in (
        ("ps", 3),
        ("run img", 125),
        ("exec web ls", 125),
        ("start web", 3),
        ("start -a web", 125),
        ("logs -f web", 3),
    ):
        ended = isopod("-H", path, *words.split())
        assert (ended.returncode, ended.stdout) == (exit_code, b"")
        assert lines(ended.stderr) == [f"error: cannot reach the isopod node at {path}: no such socket", START_HINT]


def test_a_socket_of_a_long_path(folder: str) -> None:
    far = os.path.join(folder, "f" * 120)
    os.mkdir(far)
    with ScriptedNode(folder, answering("system.render", {"text": "ID\n"})) as node:
        os.symlink(node.path, far + "/node.sock")
        ended = isopod("-H", far + "/node.sock", "ps")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"ID\n", b"")
    missing = isopod("-H", far + "/none.sock", "ps")
    assert (missing.returncode, lines(missing.stderr)[0]) == (3, f"error: cannot reach the isopod node at {far}/none.sock: no such socket")


def test_a_socket_nobody_listens_on(folder: str) -> None:
    path = folder + "/dead.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    ended = isopod("-H", path, "ps")
    assert (ended.returncode, lines(ended.stderr)[0]) == (
        3,
        f"error: cannot reach the isopod node at {path}: nobody listens on that socket",
    )


def test_a_socket_one_may_not_use(folder: str) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody else")
    path = folder + "/private.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        os.chmod(path, 0o600)
        os.chmod(folder, 0o755)
        ended = subprocess.run(command_line("-H", path, "ps"), user=65534, capture_output=True, env=environment(), timeout=30, check=False)
    if b"No module" in ended.stderr:
        pytest.skip("the source tree is readable by root only")
    assert ended.returncode == 3
    assert lines(ended.stderr) == [
        f"error: cannot reach the isopod node at {path}: Permission denied",
        "hint: you need to be root or in the group isopod: usermod -aG isopod YOU, then log in again",
    ]


def test_a_path_too_long_for_a_socket() -> None:
    ended = isopod("-H", "/" + "x" * 200, "ps")
    assert ended.returncode == 3
    assert lines(ended.stderr)[1] == "hint: choose a shorter path with --socket or ISOPOD_SOCKET"


def test_the_node_dies_in_the_middle_of_a_call(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.request("container.stop")

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "stop", "web")
    assert (ended.returncode, len(lines(ended.stderr))) == (3, 2)
    assert lines(ended.stderr)[0] == f"error: isopod node at {node.path}: it closed the connection before the answer"


def test_the_node_says_why_before_it_closes(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.send(2, 0, "exhausted", "connections exhausted: 64", "try again", 1)

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "stop", "web")
    assert (ended.returncode, lines(ended.stderr)) == (1, ["error: connections exhausted: 64", "hint: try again"])


def test_no_common_version(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet(7, 9)
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "ps")
    assert ended.returncode == 3
    assert lines(ended.stderr) == [
        f"error: isopod node at {node.path} speaks protocol 7-9, we speak 1",
        "hint: use the same isopod on both ends",
    ]


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad\r\n\r\n", b"ISO1\xff\xff\xff\x7f", b"ISO1\x00\x00\x00\x00", b"\x00" * 64])
def test_something_else_listens_there(folder: str, data: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.connection.sendall(data)
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "ps")
    [message] = lines(ended.stderr)
    assert ended.returncode == 3
    assert message.startswith(f"error: isopod node at {node.path} broke the protocol: ")


def test_a_frame_that_claims_to_be_too_long(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.connection.sendall(b"\xff\xff\xff\xff" + bytes(1000))
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "ps")
    assert lines(ended.stderr) == [f"error: isopod node at {node.path} broke the protocol: a frame of 4294967295 bytes is over 1048576"]


def test_an_answer_in_many_pieces(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("system.render")
        send, peer.connection = peer.connection, Trickle(peer.connection)  # type: ignore[misc, assignment]
        peer.reply(call, {"text": "x" * 300 + "\n"})
        peer.connection = send  # type: ignore[misc]
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "ps")
    assert ended.stdout == b"x" * 300 + b"\n"


class Trickle:
    """Sends byte by byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def sendall(self, data: bytes) -> None:
        for index in range(len(data)):
            self._connection.sendall(data[index : index + 1])


def test_a_reader_that_leaves_ends_it_quietly(folder: str) -> None:
    with ScriptedNode(folder, answering("system.render", {"text": "x" * 500_000})) as node, piped("-H", node.path, "ps") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


def piped(*words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(command_line(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())


def test_a_full_disk_behind_stdout(folder: str) -> None:
    with ScriptedNode(folder, answering("system.render", {"text": "x"})) as node, open("/dev/full", "wb") as full:
        ended = subprocess.run(command_line("-H", node.path, "ps"), stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    assert ended.returncode == 4
    assert lines(ended.stderr)[0].startswith("error: no space left on")


def test_ctrl_c_while_waiting(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.request("container.wait")
        os.kill(process.pid, signal.SIGINT)
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        process = piped("-H", node.path, "wait", "web")
        with process:
            out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_connecting_gives_up_when_the_queue_is_full(folder: str) -> None:
    from isopod.world.host.console import Connection

    path = folder + "/busy.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        waiting = [Connection(path, 1.0)]
        with pytest.raises(TimeoutError, match="accepts no connections"):
            for _ in range(5):
                waiting.append(Connection(path, 0.2))
        for connection in waiting:
            connection.close()


def test_a_turn_ends_when_the_queue_was_sent(folder: str) -> None:
    # A caller that reads nothing more while its queue is full must get the turn back as soon as it is not, though the node is silent.
    from isopod.cli.lean import Link

    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("image.import")
        assert peer.next() == [4, call, {"type": "chunk", "data": b"x" * 1000}]
        peer.wait_closed()

    with ScriptedNode(folder, script) as node, Link(node.path) as link:
        while not link.protocol.greeted:
            link.turn(5)
        call = link.begin("image.import", {}, None)
        link.protocol.send_item(call, {"type": "chunk", "data": b"x" * 1000})
        assert link.turn(None) == ([], [], [])
        assert not link.protocol.outbox
