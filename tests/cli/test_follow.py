"""`logs` prints what comes, and `logs -f` bridges a restart: nothing lost, nothing twice."""

import pytest

from tests.cli.scripted_node import Peer, ScriptedNode, isopod, lines


@pytest.mark.row("R8")
def test_both_streams(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.logs")
        peer.item(call, type="stdout", data=b"a\n")
        peer.item(call, type="stderr", data=b"b\n")
        peer.item(call, type="cursor", position=40)
        peer.item(call, type="stdout", data=b"last, without a cursor\n")
        peer.reply(call, {})
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "logs", "web")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"a\nlast, without a cursor\n", b"b\n")


def test_following_goes_on_after_restarts_of_the_node(folder: str) -> None:
    def first(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.logs")
        assert (body["follow"], body["tail"]) == (True, 3)
        peer.item(call, type="stdout", data=b"one\n")
        peer.item(call, type="cursor", position=100)
        peer.item(call, type="stdout", data=b"tw")

    def second(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.logs")
        assert (body["cursor"], body["tail"], body["follow"]) == (100, None, True)
        peer.item(call, type="stdout", data=b"two\n")
        peer.item(call, type="cursor", position=200)
        peer.error(call, "cancelled", "the node shuts down", exit_code=3)
        peer.wait_closed()

    def third(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.logs")
        assert body["cursor"] == 200
        peer.item(call, type="stdout", data=b"three\n")
        peer.item(call, type="cursor", position=300)
        peer.reply(call, {})
        peer.wait_closed()

    with ScriptedNode(folder, first, second, third) as node:
        ended = isopod("-H", node.path, "logs", "-f", "--tail", "3", "web")
    assert (ended.returncode, ended.stdout) == (0, b"one\ntwo\nthree\n")
    assert lines(ended.stderr) == ["note: the node went away; waiting for it, 60 s at most"] * 2


def test_a_tail_interrupted_before_its_first_cursor_is_asked_for_again(folder: str) -> None:
    def first(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.logs")
        peer.item(call, type="stdout", data=b"on")

    def second(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.logs")
        assert (body["tail"], body.get("cursor", 0)) == (2, 0)
        peer.item(call, type="stdout", data=b"one\n")
        peer.item(call, type="cursor", position=100)
        peer.reply(call, {})
        peer.wait_closed()

    with ScriptedNode(folder, first, second) as node:
        assert isopod("-H", node.path, "logs", "-f", "--tail", "2", "web").stdout == b"one\n"


def test_a_container_removed_meanwhile_ends_following(folder: str) -> None:
    def first(peer: Peer) -> None:
        peer.greet()
        peer.request("container.logs")

    def second(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.logs")
        peer.error(call, "not_found", "no such container: web")
        peer.wait_closed()

    with ScriptedNode(folder, first, second) as node:
        ended = isopod("-H", node.path, "logs", "-f", "web")
    assert (ended.returncode, lines(ended.stderr)[1]) == (1, "error: no such container: web")


def test_without_following_a_lost_node_is_an_error(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.logs")
        peer.item(call, type="stdout", data=b"so far\n")

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "logs", "web")
    assert (ended.returncode, ended.stdout) == (3, b"so far\n")


def test_a_log_without_cursors_is_refused_before_it_fills_the_memory(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.logs")
        for _ in range(66):
            peer.item(call, type="stdout", data=bytes(64 << 10))
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "logs", "web")
    assert ended.returncode == 3
    assert lines(ended.stderr)[0].endswith("more than 4194304 bytes of log without a cursor")
