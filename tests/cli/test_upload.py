"""import and load: what is read, how it is cut, and what happens when either side fails."""

import io
import os
import pty
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.cli.scripted_node import Peer, ScriptedNode, command_line, environment, isopod, lines

IMAGE = {"id": "sha256:1", "names": ["my/base:latest"]}


def taking(method: str, reply: Any, into: list[bytes], bodies: list[Any]) -> Callable[[Peer], None]:
    """Return a script that takes an upload, giving credit, and reports progress."""

    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request(method)
        bodies.append(body)
        n_held = 0
        while (frame := peer.next())[0] == 4:
            assert frame[1] == call
            assert frame[2]["type"] == "chunk"
            assert len(frame[2]["data"]) <= 256 << 10
            into.append(frame[2]["data"])
            n_held += len(frame[2]["data"]) + 40
            assert n_held <= 1 << 20
            if n_held > 700_000:
                peer.send(6, call, n_held)
                n_held = 0
                peer.item(call, type="progress", what="unpacking", done_bytes=sum(map(len, into)), total_bytes=0)
        assert frame == [5, call]
        peer.reply(call, reply)
        peer.wait_closed()

    return script


@pytest.mark.parametrize("how", ["file", "stdin"])
def test_import_of_a_tar(folder: str, how: str) -> None:
    data = os.urandom(3_000_001)
    path = os.path.join(folder, "root.tar")
    with open(path, "wb") as file:
        file.write(data)
    got: list[bytes] = []
    bodies: list[Any] = []
    with ScriptedNode(folder, taking("image.import", IMAGE, got, bodies)) as node:
        words = ("import", path if how == "file" else "-", "my/base")
        ended = isopod("-H", node.path, *words, stdin=b"" if how == "file" else data)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"sha256:1\n", b"")
    assert b"".join(got) == data
    assert bodies == [{"name": "my/base", "total_bytes": len(data) if how == "file" else 0}]


def test_import_of_a_folder_keeps_numbers_and_hidden_files(folder: str) -> None:
    root = os.path.join(folder, "-root")
    os.mkdir(root)
    with open(os.path.join(root, ".hidden"), "w", encoding="ascii") as file:
        file.write("x")
    got: list[bytes] = []
    with ScriptedNode(folder, taking("image.import", IMAGE, got, [])) as node:
        ended = isopod("-H", node.path, "import", "./-root", "my/base", cwd=folder)
    assert (ended.returncode, ended.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(b"".join(got))) as archive:
        assert archive.getnames() == [".", "./.hidden"]
        assert archive.getmember("./.hidden").uname == ""


def test_load_from_file_and_from_stdin(folder: str) -> None:
    path = os.path.join(folder, "images.tar")
    with open(path, "wb") as file:
        file.write(b"archive")
    reply = {"images": [{"id": "sha256:1", "names": ["a:1", "b:2"]}, {"id": "sha256:2", "names": []}]}
    for words, stdin in (("load", "-i", path), b""), (("load",), b"archive"):
        got: list[bytes] = []
        with ScriptedNode(folder, taking("image.load", reply, got, [])) as node:
            ended = isopod("-H", node.path, *words, stdin=stdin)
        assert ended.stdout == b"loaded: a:1\nloaded: b:2\nloaded: sha256:2\n"
        assert b"".join(got) == b"archive"


def test_load_of_a_folder_sends_it_as_an_archive(folder: str) -> None:
    layout = os.path.join(folder, "layout")
    os.mkdir(layout)
    with open(os.path.join(layout, "oci-layout"), "w", encoding="ascii") as file:
        file.write("{}")
    got: list[bytes] = []
    with ScriptedNode(folder, taking("image.load", {"images": []}, got, [])) as node:
        ended = isopod("-H", node.path, "load", "-i", layout)
    assert (ended.returncode, ended.stderr) == (0, b"")
    with tarfile.open(fileobj=io.BytesIO(b"".join(got))) as archive:
        assert archive.getnames() == [".", "./oci-layout"]


def test_a_refused_folder_leaves_the_word_to_the_node(folder: str) -> None:
    root = os.path.join(folder, "root")
    os.mkdir(root)
    with open(os.path.join(root, "large"), "wb") as file:
        file.truncate(5 << 20)

    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("image.import")
        peer.next()
        peer.error(call, "no_space", "no space left", exit_code=4)
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "import", root, "x")
    assert (ended.returncode, lines(ended.stderr)) == (4, ["error: no space left"])


def test_a_refusal_in_the_middle_ends_the_upload(folder: str) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("image.import")
        peer.next()
        peer.error(call, "bad_archive", "archive entry '../x': leaves the root", exit_code=5)
        peer.wait_closed()

    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "import", "-", "x", stdin=bytes(5 << 20))
    assert (ended.returncode, ended.stdout, lines(ended.stderr)) == (5, b"", ["error: archive entry '../x': leaves the root"])


def test_tar_failing_withdraws_the_import(folder: str) -> None:
    tools = os.path.join(folder, "bin")
    os.mkdir(tools)
    os.mkdir(os.path.join(folder, "root"))
    with open(os.path.join(tools, "tar"), "w", encoding="ascii") as file:
        file.write('#!/bin/sh\necho part\nread line < "$0.go"\nexit 2\n')
    os.chmod(os.path.join(tools, "tar"), 0o755)
    os.mkfifo(os.path.join(tools, "tar.go"))

    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("image.import")
        assert peer.next() == [4, call, {"type": "chunk", "data": b"part\n"}]
        with open(os.path.join(tools, "tar.go"), "w", encoding="ascii") as go:
            go.write("\n")
        with pytest.raises(EOFError):
            raise AssertionError(peer.next())

    root = os.path.join(folder, "root")
    with ScriptedNode(folder, script) as node:
        ended = isopod("-H", node.path, "import", root, "x", env={"PATH": tools + ":/usr/bin:/bin"})
    assert (ended.returncode, lines(ended.stderr)) == (4, [f"error: reading {root}: tar ended with exit code 2"])
    none = isopod("import", root, "x", env={"PATH": folder})
    assert (none.returncode, lines(none.stderr)) == (4, ["error: tar is not installed", "hint: install it: apt-get install tar"])


def test_a_terminal_is_no_archive() -> None:
    ours, theirs = pty.openpty()
    try:
        for words, hint in (
            (("load",), "isopod load -i FILE reads a file"),
            (("import", "-", "x"), "isopod import FILE NAME reads a file"),
        ):
            ended = isopod(*words, stdin=theirs)
            assert ended.returncode == 2
            assert lines(ended.stderr) == ["error: archive '-': standard input is a terminal", f"hint: {hint}"]
    finally:
        os.close(ours)
        os.close(theirs)


def test_progress_is_shown_on_a_terminal_only(folder: str) -> None:
    ours, theirs = pty.openpty()
    got: list[bytes] = []
    with ScriptedNode(folder, taking("image.import", IMAGE, got, [])) as node:
        subprocess.run(
            command_line("-H", node.path, "import", "-", "x"),
            input=bytes(2 << 20), stdout=subprocess.PIPE, stderr=theirs, env=environment(), timeout=30, check=True,
        )  # fmt: skip
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # EIO is how a terminal ends
        while data := os.read(ours, 1 << 16):
            shown += data
    os.close(ours)
    assert b"\runpacking: " in shown
    assert b" MiB/s" in shown
    assert shown.endswith(b" \r"), "the line is cleared at the end"
