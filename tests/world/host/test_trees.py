"""Trees as archives: what is kept on the way out and in, what a hostile archive or tree cannot do, whatever is in it."""

import io
import os
import shutil
import stat
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isopod.world.host import trees
from isopod.world.host.trees import TreeError, Wishes

CONFINED = Wishes(top="t", name="t", confined=True, owners=False, special=False)


@contextmanager
def opened(path: Path | str) -> Iterator[int]:
    fd = os.open(path, os.O_PATH)
    try:
        yield fd
    finally:
        os.close(fd)


def packed(root: Path, path: str, name: str | None = None) -> bytes:
    out = io.BytesIO()
    with opened(root) as fd:
        trees.pack(fd, path, out, name=name)
    return out.getvalue()


def unpacked(root: Path, folder: str, data: bytes, wishes: Wishes = Wishes()) -> list[str]:  # noqa: B008 - a tuple
    with opened(root) as fd:
        return trees.unpack(fd, folder, io.BytesIO(data), wishes)


def archive(*entries: tuple[str, dict[str, Any], bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, facts, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in facts.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def described(folder: Path) -> list[tuple[object, ...]]:
    """Return all that is to be kept of a tree."""
    rows: list[tuple[object, ...]] = []
    for path in sorted([folder, *folder.rglob("*")]):
        found = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        rows.append((str(path.relative_to(folder)), found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_nlink, content))
    return rows


def test_a_tree_comes_out_and_goes_in_as_it_was(tmp_path: Path) -> None:
    tree = tmp_path / "root" / "t"
    (tree / "sub" / ("long" * 50)).mkdir(parents=True)
    (tree / "file").write_bytes(b"x" * 1_000_001)
    (tree / "sub" / ("long" * 50) / "ünïcode \n\x01").write_bytes(b"")
    os.link(tree / "file", tree / "sub" / "same")
    (tree / "link").symlink_to("/nowhere/at/all" * 20)
    os.mkfifo(tree / "pipe", 0o640)
    (tree / os.fsdecode(b"not-utf8-\xff")).write_bytes(b"1")
    (tree / "file").chmod(0o4711)
    (tree / "sub").chmod(0o500)
    os.utime(tree / "sub", ns=(1, 1234567890_123456789))
    if os.geteuid() == 0:
        os.chown(tree / "file", 3_000_000, 5)
        (tree / "file").chmod(0o4711)
    (tmp_path / "there").mkdir()
    data = packed(tmp_path / "root", "/t")
    assert unpacked(tmp_path, "/there", data) == []
    assert described(tmp_path / "there" / "t") == described(tree)
    read = subprocess.run(["tar", "-tf", "-"], input=data, capture_output=True, check=True)
    assert read.stdout.count(b"\n") == len(described(tree)), "tar(1) reads it"


@pytest.mark.host
def test_what_tar_writes_is_read(tmp_path: Path) -> None:
    tree = tmp_path / "t"
    (tree / ("deep" * 40)).mkdir(parents=True)
    (tree / ("deep" * 40) / ("name" * 50)).write_bytes(b"x")
    with open(tree / "holes", "wb") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"middle")
    (tmp_path / "there").mkdir()
    for form in (["--format=gnu", "--sparse"], ["--format=pax", "--sparse"], ["--format=posix", "--xattrs"]):
        data = subprocess.run(["tar", "-C", tmp_path, *form, "-cf", "-", "t"], capture_output=True, check=True).stdout
        shutil.rmtree(tmp_path / "there" / "t", ignore_errors=True)
        unpacked(tmp_path, "/there", data)
        assert [row[0] for row in described(tmp_path / "there" / "t")] == [row[0] for row in described(tree)]
        assert (tmp_path / "there" / "t" / "holes").read_bytes() == (tree / "holes").read_bytes()
        assert (tmp_path / "there" / "t" / "holes").stat().st_blocks < 2048, "holes stay holes"


def test_a_root_is_the_end_of_every_way(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    for name, target in (("absolute", str(tmp_path)), ("upwards", "../../.."), ("proc", "/proc/self/root")):
        (root / "in" / name).symlink_to(target)
        with opened(root) as fd, pytest.raises(OSError, match=r"No such|Not a"):
            trees.pack(fd, f"/in/{name}/secret", io.BytesIO())
        with opened(root) as fd:
            assert trees.look(fd, f"/in/{name}", follow=False).kind == "link"
    with opened(root) as fd:
        assert trees.look(fd, "/../../../in", follow=True).kind == "folder"
        assert trees.look(fd, "/in/upwards/secret", follow=True).kind == "nothing"
    unpacked(root, "/in/upwards", archive(("made", {}, b"x")))
    assert sorted(os.listdir(root)) == ["in", "made"]
    assert sorted(os.listdir(tmp_path)) == ["root", "secret"]


def test_a_link_inside_a_container_leads_where_it_does_there(tmp_path: Path) -> None:
    (tmp_path / "usr" / "lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("/usr/lib")
    unpacked(tmp_path, "/", archive(("lib", {"type": tarfile.DIRTYPE}, b""), ("lib/a", {}, b"x"), ("lib/new/b", {}, b"y")))
    assert (tmp_path / "lib").is_symlink()
    assert ((tmp_path / "usr/lib/a").read_bytes(), (tmp_path / "usr/lib/new/b").read_bytes()) == (b"x", b"y")


@pytest.mark.parametrize(
    "first,second",
    [
        ({"type": tarfile.DIRTYPE}, {}),
        ({}, {"type": tarfile.DIRTYPE}),
        ({"type": tarfile.DIRTYPE}, {"type": tarfile.SYMTYPE, "linkname": "x"}),
    ],
)
def test_files_and_folders_do_not_replace_each_other(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    unpacked(tmp_path, "/", archive(("x", first, b"")))
    with pytest.raises(OSError, match=r"folder|directory"):
        unpacked(tmp_path, "/", archive(("x", second, b"")))
    assert [name for name in os.listdir(tmp_path) if name != "x"] == []


def test_a_file_that_came_half_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(TreeError, match="archive"):
        unpacked(tmp_path, "/", archive(("x", {}, b"new" * 10_000))[:20_000])
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_an_endless_header_is_not_read(tmp_path: Path) -> None:
    class Endless:
        n_read = 0
        head = tarfile.TarInfo("././@LongLink")

        def read(self, n_bytes: int) -> bytes:
            if not self.n_read:
                self.head.type, self.head.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
                block = self.head.tobuf(tarfile.GNU_FORMAT)
                self.n_read += len(block)
                return block + bytes(n_bytes - len(block))
            self.n_read += n_bytes
            return bytes(n_bytes)

    source = Endless()
    with opened(tmp_path) as fd, pytest.raises(TreeError, match="header"):
        trees.unpack(fd, "/", source)
    assert source.n_read < 4 << 20


def test_folders_in_folders_have_an_end(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(trees.DEPTH_MAX + 20):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    with pytest.raises(OSError, match="deep"):
        packed(tmp_path, "/d")
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_a_tree_that_changes_all_the_time_never_shows_what_is_outside(tmp_path: Path) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_bytes(b"S" * 1000)
    (root / "t").mkdir(parents=True)
    (root / "spare").mkdir()
    (root / "spare" / "file").write_bytes(b"o" * 1000)
    ended = threading.Event()

    def swap() -> None:
        """Let a folder be a link to the secret every other moment."""
        while not ended.is_set():
            with suppress(OSError):  # what is unpacked meanwhile may be in the way
                (root / "t" / "x").symlink_to(secret)
                (root / "t" / "x").unlink()
                os.rename(root / "spare", root / "t" / "x")
                os.rename(root / "t" / "x", root / "spare")
                continue
            shutil.rmtree(root / "t", ignore_errors=True)
            (root / "t").mkdir(exist_ok=True)
            (root / "spare").mkdir(exist_ok=True)
            (root / "spare" / "file").write_bytes(b"o" * 1000)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(150):
            out = io.BytesIO()
            with opened(root) as fd:
                try:
                    trees.pack(fd, "/t", out)
                except OSError:
                    continue
            assert b"SSS" not in out.getvalue()
            with opened(root) as fd:
                try:
                    trees.unpack(fd, "/t", io.BytesIO(archive(("x/planted", {}, b"p"))))
                except (OSError, TreeError):
                    continue
            assert os.listdir(secret) == ["file"]
    finally:
        ended.set()
        swapper.join()
    assert os.listdir(secret) == ["file"]


NAMES = st.sampled_from(["t", "t/a", "t/b", "t/a/b", "t/a/../..", "../x", "/t/a", "t//a", "t/./b", "x", "t/b/c", ".", "t/l", "t/l/x"])
TYPES = st.sampled_from(
    [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z", tarfile.CONTTYPE]
)
TARGETS = st.sampled_from(["..", "../..", "/", "t/a", "a", "../out", "t", "l", "t/../../out/kept", ""])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, TYPES, TARGETS, st.integers(0, 0o7777)), max_size=8), st.booleans())
def test_whatever_an_archive_holds_it_stays_in_its_place(tmp_path: Path, entries: list[tuple[str, bytes, str, int]], flip: bool) -> None:
    for name in ("root", "out"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "kept").write_bytes(b"kept")
    (tmp_path / "root" / "in").mkdir()
    data = archive(*((name, {"type": kind, "linkname": target, "mode": mode}, b"") for name, kind, target, mode in entries))
    if flip and data:
        data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    with suppress(TreeError, OSError):
        unpacked(tmp_path, "/root/in", data, CONFINED)
    assert sorted(os.listdir(tmp_path)) == ["out", "root"]
    assert os.listdir(tmp_path / "root") == ["in"]
    assert os.listdir(tmp_path / "out") == ["kept"]
    assert (tmp_path / "out" / "kept").stat().st_nlink == 1
    assert set(os.listdir(tmp_path / "root" / "in")) <= {"t"}
    for path in (tmp_path / "root" / "in").rglob("*"):
        mode = path.lstat().st_mode
        assert not stat.S_ISCHR(mode)
        assert path.is_symlink() or not mode & (stat.S_ISUID | stat.S_ISGID)
