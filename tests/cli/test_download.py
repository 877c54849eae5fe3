"""A backup into a file: whole or not there, and nobody else's to read."""

import os
import stat
from collections.abc import Callable

from tests.cli.scripted_node import Peer, ScriptedNode, isopod

FACTS = {"cursor": 7, "containers": 2, "digest": "sha256:abc"}


def sending(*pieces: bytes, fails: bool = False) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _body = peer.request("system.backup")
        for piece in pieces:
            peer.item(call, type="chunk", data=piece)
        if fails:
            peer.error(call, "disk_full", "no space left on /", exit_code=4)
        else:
            peer.reply(call, FACTS)
        peer.wait_closed()

    return script


def test_what_was_there_before_is_replaced_and_never_written_to(folder: str) -> None:
    target = os.path.join(folder, "b")
    for name in (target, target + ".partial"):
        with open(name, "w", encoding="utf-8") as file:
            file.write("before")
        os.chmod(name, 0o666)
    with open(target + ".partial", encoding="utf-8") as spy, ScriptedNode(folder, sending(b"ab", b"cd")) as node:
        ended = isopod("-H", node.path, "backup", target)
        assert spy.read() == "before", "who holds the old file open reads nothing of the new one"
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.decode() == f"{target}: 2 containers up to record 7, sha256:abc\n"
    with open(target, "rb") as found:
        assert found.read() == b"abcd"
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o600
    assert not os.path.exists(target + ".partial")


def test_a_failure_leaves_what_was_there(folder: str) -> None:
    target = os.path.join(folder, "b")
    with open(target, "w", encoding="utf-8") as file:
        file.write("before")
    with ScriptedNode(folder, sending(b"ab", fails=True)) as node:
        ended = isopod("-H", node.path, "backup", target)
    assert ended.returncode == 4
    assert sorted(name for name in os.listdir(folder) if name.startswith("b")) == ["b"]
    with open(target, encoding="utf-8") as found:
        assert found.read() == "before"


def test_a_folder_that_is_not_there_is_named(folder: str) -> None:
    with ScriptedNode(folder, lambda _: None) as node:
        ended = isopod("-H", node.path, "backup", os.path.join(folder, "absent", "b"))
    assert ended.returncode == 1
    assert ended.stderr.decode() == f"error: no such folder: {os.path.join(folder, 'absent')}\nhint: create it first\n"
