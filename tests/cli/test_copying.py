"""`isopod cp` against a node that follows a script: what is asked of the node, what goes to it, and what its archives may do here."""

import io
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cli.scripted_node import Peer, ScriptedNode, isopod


def entry(name: str, data: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return an entry of an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def archive(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Return an archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def serving(data: bytes, path: str = "/etc/hosts", kind: str = "file") -> Callable[[Peer], None]:
    """Return a script that has something at a path, and sends that as its archive."""

    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.stat_path")
        assert (body["name"], body["path"]) == ("web", path)
        peer.reply(call, {"kind": kind, "path": path, "mode": 0o644, "n_bytes": 1})
        call, body = peer.request("container.copy_from")
        assert body == {"name": "web", "path": path}
        for start in range(0, len(data), 5000):
            piece = data[start : start + 5000]
            peer.send(4, call, {"type": "chunk", "data": piece}, len(piece))
        peer.reply(call, {})
        peer.wait_closed()

    return script


def until_hung_up(script: Callable[[Peer], None]) -> Callable[[Peer], None]:
    """Return a script whose client may hang up in the middle of what is sent: it refuses what it got so far."""

    def shorter(peer: Peer) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            script(peer)

    return shorter


def taking(sent: list[bytes], there: dict[str, object], into: str) -> Callable[[Peer], None]:
    """Return a script that says what is at the destination, and takes an archive for the folder `into`."""

    def script(peer: Peer) -> None:
        peer.greet()
        if there:
            call, _ = peer.request("container.stat_path")
            peer.reply(call, {"mode": 0o755, "n_bytes": 0, **there})
        call, body = peer.request("container.copy_to")
        assert body == {"name": "web", "path": into}
        peer.send(6, call, 1 << 20)
        sent.extend(item["data"] for item in peer.items(call))
        peer.reply(call, {})
        peer.wait_closed()

    return script


def names_of(pieces: list[bytes]) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as tar:
        return [member.name for member in tar]


@pytest.mark.row("V3")
@pytest.mark.parametrize("spelling", [["cp"], ["container", "cp"], ["vm", "cp"]])
def test_a_file_comes_out_into_a_folder(tmp_path: Path, spelling: list[str]) -> None:
    (tmp_path / "here").mkdir()
    with ScriptedNode(str(tmp_path), serving(archive(entry("hosts", b"127.0.0.1\n", uid=77, mode=0o4755)))) as node:
        done = isopod("-H", node.path, *spelling, "web:/etc/hosts", str(tmp_path / "here"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    found = tmp_path / "here" / "hosts"
    assert found.read_bytes() == b"127.0.0.1\n"
    assert (found.stat().st_uid, found.stat().st_mode & 0o7777) == (os.geteuid(), 0o755), "owners and set-user-id do not come out"


@pytest.mark.parametrize("target,made", [("new", "new"), ("here", "here/hosts"), ("here/", "here/hosts"), ("old", "old")])
def test_a_file_is_named_by_where_it_goes(tmp_path: Path, target: str, made: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "old").write_bytes(b"old")
    with ScriptedNode(str(tmp_path), serving(archive(entry("hosts", b"x")))) as node:
        done = isopod("-H", node.path, "cp", "web:/etc/hosts", target, cwd=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / made).read_bytes() == b"x"


@pytest.mark.parametrize(
    "source,target,made",
    [
        ("web:/var/log", "new", "new/a"),
        ("web:/var/log", "here", "here/log/a"),
        ("web:var/log/.", "here", "here/a"),
        ("web:/var/log/", "new", "new/a"),
    ],
)
def test_a_folder_is_made_or_goes_into_one(tmp_path: Path, source: str, target: str, made: str) -> None:
    (tmp_path / "here").mkdir()
    tree = archive(
        entry("log", type=tarfile.DIRTYPE, mode=0o700), entry("log/a", b"x"), entry("log/b", type=tarfile.LNKTYPE, linkname="log/a")
    )
    with ScriptedNode(str(tmp_path), serving(tree, "/var/log", "folder")) as node:
        done = isopod("-H", node.path, "cp", source, target, cwd=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / made).read_bytes() == b"x"
    assert (tmp_path / made).stat().st_nlink == 2


def test_an_archive_comes_out_as_it_is(tmp_path: Path) -> None:
    data = archive(entry("hosts", b"x" * 100_000))
    with ScriptedNode(str(tmp_path), serving(data)) as node:
        done = isopod("-H", node.path, "cp", "web:/etc/hosts", "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")


@pytest.mark.row("V3")
@pytest.mark.parametrize(
    "entries,said",
    [
        ([entry("../outside", b"x")], b"leads out"),
        ([entry("hosts/../../outside", b"x")], b"leads out"),
        ([entry("other", b"x")], b"not asked for"),
        ([entry("/outside", b"x")], b"not asked for"),
        ([entry("hosts", type=tarfile.SYMTYPE, linkname=".."), entry("hosts/outside", b"x")], b"through a link"),
        ([entry("hosts", type=tarfile.SYMTYPE, linkname=".."), entry("hosts/outside/x", b"x")], b"through a link"),
        ([entry("hosts", type=tarfile.LNKTYPE, linkname="../secret")], b"leads out"),
        ([entry("hosts", type=tarfile.LNKTYPE, linkname="secret")], b"not asked for"),
        (
            [
                entry("hosts", type=tarfile.DIRTYPE),
                entry("hosts/l", type=tarfile.SYMTYPE, linkname="../../"),
                entry("hosts/l", type=tarfile.DIRTYPE),
            ],
            b"",
        ),
    ],
)
def test_a_hostile_archive_stays_where_it_was_sent(tmp_path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], said: bytes) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    with ScriptedNode(str(tmp_path), until_hung_up(serving(archive(*entries)))) as node:
        done = isopod("-H", node.path, "cp", "web:/etc/hosts", str(tmp_path / "here"))
    assert done.returncode in (1, 2, 4, 5), done
    assert said in done.stderr
    assert b"Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert sorted(os.listdir(tmp_path)) == ["here", "secret"]
    assert (tmp_path / "secret").stat().st_nlink == 1


def test_devices_stay_outside(tmp_path: Path) -> None:
    tree = archive(
        entry("dev", type=tarfile.DIRTYPE), entry("dev/sda", type=tarfile.BLKTYPE, devmajor=8), entry("dev/pipe", type=tarfile.FIFOTYPE)
    )
    with ScriptedNode(str(tmp_path), serving(tree, "/dev", "folder")) as node:
        done = isopod("-H", node.path, "cp", "web:/dev", str(tmp_path / "dev"))
    assert done.returncode == 0
    assert b"note: left out 'dev/sda'" in done.stderr
    assert os.listdir(tmp_path / "dev") == ["pipe"]


@pytest.mark.parametrize("cut", [100, 512, 1000, 1500])
def test_an_archive_that_breaks_off_is_an_error_and_replaces_nothing(tmp_path: Path, cut: int) -> None:
    (tmp_path / "hosts").write_bytes(b"old")
    with ScriptedNode(str(tmp_path), serving(archive(entry("hosts", b"x" * 3000))[:cut])) as node:
        done = isopod("-H", node.path, "cp", "web:/etc/hosts", str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.startswith(b"error: ")
    assert os.listdir(tmp_path) == ["hosts"]
    assert (tmp_path / "hosts").read_bytes() == b"old"


def test_what_the_node_says_midway_is_said(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _ = peer.request("container.stat_path")
        peer.reply(call, {"kind": "file", "path": "/f", "mode": 0, "n_bytes": 0})
        call, _ = peer.request("container.copy_from")
        peer.send(4, call, {"type": "chunk", "data": archive(entry("f", b"x" * 3000))[:1000]}, 1000)
        peer.error(call, "runtime_failed", "copying files of 'web' failed: it ended meanwhile", hint="")
        peer.wait_closed()

    with ScriptedNode(str(tmp_path), script) as node:
        done = isopod("-H", node.path, "cp", "web:/f", str(tmp_path / "f"))
    assert done.returncode == 1
    assert b"it ended meanwhile" in done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.row("V3")
@pytest.mark.parametrize(
    "source,there,into,names",
    [
        ("site", {"kind": "folder", "path": "/www"}, "/www", ["site", "site/index"]),
        ("site/.", {"kind": "folder", "path": "/www"}, "/www", ["index"]),
        ("site", {"kind": "nothing", "path": "/www"}, "/", ["www", "www/index"]),
        ("site/.", {"kind": "nothing", "path": "/a/www"}, "/a", ["www", "www/index"]),
        ("site/index", {"kind": "nothing", "path": "/www"}, "/", ["www"]),
        ("site/index", {"kind": "file", "path": "/really/there"}, "/really", ["there"]),
        ("site/index", {"kind": "folder", "path": "/"}, "/", ["index"]),
    ],
)
def test_what_goes_in_is_named_by_where_it_goes(tmp_path: Path, source: str, there: dict[str, object], into: str, names: list[str]) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index").write_bytes(b"hello" * 100_000)
    sent: list[bytes] = []
    with ScriptedNode(str(tmp_path), taking(sent, there, into)) as node:
        done = isopod("-H", node.path, "cp", source, "web:/www", cwd=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, b"")
    assert names_of(sent) == names
    assert max(len(piece) for piece in sent) <= 256 << 10


def test_a_link_is_copied_as_one_unless_it_is_to_be_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    for options, kind in (([], tarfile.SYMTYPE), (["-L"], tarfile.REGTYPE)):
        sent: list[bytes] = []
        with ScriptedNode(str(tmp_path), taking(sent, {"kind": "folder", "path": "/www"}, "/www")) as node:
            done = isopod("-H", node.path, "cp", *options, "link", "web:/www", cwd=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, b"")
        with tarfile.open(fileobj=io.BytesIO(b"".join(sent))) as tar:
            assert [(member.name, member.type) for member in tar] == [("link", kind)]


def test_an_archive_on_standard_input_goes_in_as_it_is(tmp_path: Path) -> None:
    sent: list[bytes] = []
    data = archive(entry("x", b"y" * 10_000))
    with ScriptedNode(str(tmp_path), taking(sent, {}, "/www")) as node:
        done = isopod("-H", node.path, "cp", "-", "web:/www", stdin=data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"".join(sent) == data


@pytest.mark.parametrize(
    "source,kind,target,said",
    [
        ("site", "file", "web:/etc/hosts", b"it is no folder"),
        ("site/index", "file", "web:/etc/hosts/", b"it is no folder"),
        ("site/index", "nothing", "web:/new/", b"there is no such folder"),
    ],
)
def test_what_cannot_be_copied_there(tmp_path: Path, source: str, kind: str, target: str, said: bytes) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index").write_bytes(b"hello")

    def script(peer: Peer) -> None:
        peer.greet()
        call, body = peer.request("container.stat_path")
        peer.reply(call, {"kind": kind, "path": body["path"], "mode": 0, "n_bytes": 0})
        peer.wait_closed()

    with ScriptedNode(str(tmp_path), script) as node:
        done = isopod("-H", node.path, "cp", source, target, cwd=str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert b"hint: " in done.stderr


@pytest.mark.parametrize(
    "words,said",
    [
        (["a", "b"], b"CONTAINER:PATH"),
        (["web:/a", "db:/b"], b"from here to a container or back"),
        (["/nonexistent/file", "web:/b"], b"no such file: /nonexistent/file"),
        (["./a:b", "web:/b"], b"a:b"),
        (["web:", "."], b"web:/"),
        (["web:/a", "/nonexistent/folder/file"], b"no such folder"),
        (["-", "-"], b"CONTAINER:PATH"),
        (["one"], b"DESTINATION"),
    ],
)
def test_words_that_make_no_sense_need_no_node(words: list[str], said: bytes) -> None:
    done = isopod("cp", *words)
    assert done.returncode in (1, 2), done
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 2
