"""Folders packed as layers, and that packing and unpacking undo each other."""

import errno
import hashlib
import io
import os
import socket
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isopod import _core
from tests.core import layers
from tests.core.layers import OPAQUE, pack, tree, unpack

pytestmark = pytest.mark.host


def whiteout(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive.getmembers()}


def test_overlay_forms_become_whiteout_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "d/e").mkdir(parents=True)
    whiteout(source / "d/gone")
    # Overlayfs saves inodes by hard-linking its whiteouts.
    os.link(source / "d/gone", source / "top")
    os.setxattr(source / "d/e", OPAQUE, b"y")
    os.setxattr(source / "d/e", "trusted.overlay.origin", b"handle")
    found = members(pack(source))
    assert list(found) == [".", "d", "d/e", "d/e/.wh..wh..opq", "d/.wh.gone", ".wh.top"]
    assert found["d/.wh.gone"].isreg()
    assert found["d/e"].pax_headers == {} or not any("overlay" in key for key in found["d/e"].pax_headers)


def test_an_archive_depends_on_nothing_but_the_files(tmp_path: Path) -> None:
    for name, order in (("one", "abc"), ("two", "cab")):
        folder = tmp_path / name
        folder.mkdir()
        for letter in order:
            (folder / letter).write_bytes(letter.encode())
            os.utime(folder / letter, (0, 7))
        os.link(folder / "a", folder / "z")
        os.utime(folder, (9, 9))
    packed = pack(tmp_path / "one")
    assert packed == pack(tmp_path / "two")
    found = members(packed)
    assert list(found) == [".", "a", "b", "c", "z"]
    assert (found["z"].islnk(), found["z"].linkname) == (True, "a")
    assert {(member.uname, member.gname) for member in found.values()} == {("", "")}


def test_what_ustar_cannot_say_goes_into_extended_headers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    deep = source / ("a" * 200) / ("\u00fc" * 120)
    deep.mkdir(parents=True)
    (deep / "f").write_bytes(b"f")
    os.chown(deep / "f", 3_000_000_000, 2_097_152)
    os.utime(deep / "f", ns=(0, -1_500_000_000))
    os.symlink("t" * 500, source / "link")
    with (source / "large").open("wb") as file:
        file.truncate(1 << 20)
    found = members(pack(source))
    file_info = found[str((deep / "f").relative_to(source))]
    assert (file_info.uid, file_info.gid, file_info.mtime) == (3_000_000_000, 2_097_152, -1.5)
    assert found["link"].linkname == "t" * 500


def test_sockets_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(source, os.O_PATH)
        try:
            listener.bind(f"/proc/self/fd/{here}/socket")
        finally:
            os.close(here)
    os.mkfifo(source / "pipe")
    assert list(members(pack(source))) == [".", "pipe"]


@pytest.mark.parametrize("name", ["trusted.overlay.metacopy", "trusted.overlay.redirect"])
def test_what_needs_its_lower_layers_is_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"")
    os.setxattr(source / "f", name, b"x")
    with pytest.raises(_core.ArchiveError, match="not complete") as caught:
        pack(source)
    assert caught.value.args[0] == "f"


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_real_names_that_look_like_whiteouts_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "source/d").mkdir(parents=True)
    make(tmp_path / "source/d/.wh.f")
    with pytest.raises(_core.ArchiveError, match="reserved") as caught:
        pack(tmp_path / "source")
    assert caught.value.args[0] == "d/.wh.f"


def test_a_missing_source_and_a_bad_target(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        _core.pack_layer(str(tmp_path / "missing"), 1, 1 << 20, 1 << 20, None)
    assert caught.value.filename == str(tmp_path / "missing")
    with pytest.raises(OSError, match="Bad file descriptor"):
        _core.pack_layer(str(tmp_path), -1, 1 << 20, 1 << 20, None)


def sparse_file(path: Path, size: int, **parts: bytes) -> None:
    """Make a file of holes with some data ("at_4096")."""
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in parts.items():
            os.pwrite(file.fileno(), data, int(at.removeprefix("at_")))


def test_holes_cost_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    sparse_file(source / "huge", 1 << 39)
    sparse_file(source / ("n" * 120), 1 << 20, at_8192=b"a" * 4096, at_524288=b"b" * 5000)
    sparse_file(source / "end", (1 << 20) + 7, at_1048576=b"1234567")
    (source / "full").write_bytes(b"f" * 10_000)
    packed = pack(source)
    assert len(packed) < 64 << 10
    found = members(packed)
    assert {name: member.size for name, member in found.items() if member.isreg()} == {
        "end": (1 << 20) + 7,
        "full": 10_000,
        "huge": 1 << 39,
        "n" * 120: 1 << 20,
    }
    assert [name for name, member in found.items() if member.issparse()] == ["end", "huge", "n" * 120]
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for name in ("end", "full", "n" * 120):
            file = archive.extractfile(name)
            assert file is not None
            assert file.read() == (source / name).read_bytes()
    unpack(packed, target, limits=layers.Limits(unpacked_bytes_max=1 << 40, entry_bytes_max=1 << 39))
    assert (target / "huge").stat().st_size == 1 << 39
    assert (target / "huge").stat().st_blocks < 64
    for root in (source, target):
        (root / "huge").unlink()
        os.utime(root, (0, 0))
    assert tree(source) == tree(target)
    assert pack(source) == pack(target)


def test_many_holes_are_packed_and_unpacked(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    sparse_file(source / "f", 2000 * 8192, **{f"at_{number * 8192}": b"%04096d" % number for number in range(2000)})
    packed = pack(source)
    assert 2000 * 4096 < len(packed) < 2000 * 4096 + (64 << 10)
    unpack(packed, target)
    assert tree(source) == tree(target)


@pytest.mark.parametrize(
    "limits, name",
    [
        ({"n_bytes_max": (1 << 20) + 5000}, "b"),
        ({"n_bytes_max": 512}, "a"),
        ({"n_bytes_max": 511}, "source"),
        ({"entry_bytes_max": (1 << 20) - 1}, "b"),
        ({"n_bytes_max": (11 << 20) - 1}, "holes"),
    ],
)
def test_what_is_too_large_is_refused_and_named(tmp_path: Path, limits: dict[str, int], name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"a" * 4096)
    (source / "b").write_bytes(b"b" * (1 << 20))
    sparse_file(source / "holes", 10 << 20)
    for path in (source / "a", source / "b", source):
        os.utime(path, (0, 0))
    with pytest.raises(OSError, match="too large") as caught:
        pack(source, **limits)
    assert (caught.value.errno, os.path.basename(caught.value.filename)) == (errno.EFBIG, name)
    written = (tmp_path / "packed").stat().st_size
    assert written <= limits.get("n_bytes_max", 1 << 20)
    assert written == 0 or name == "holes"


def test_limits_that_just_suffice(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(b"f" * 100_000)
    n_bytes = len(pack(source))
    assert len(pack(source, n_bytes_max=n_bytes, entry_bytes_max=100_000)) == n_bytes
    with pytest.raises(OSError, match="too large"):
        pack(source, n_bytes_max=n_bytes - 1)


def test_what_the_callback_raises_ends_packing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_bytes(bytes(64 << 20))
    seen: list[int] = []

    def stop(n_bytes: int) -> None:
        seen.append(n_bytes)
        raise KeyError("stop")

    with (tmp_path / "packed").open("wb") as file, pytest.raises(KeyError, match="stop"):
        _core.pack_layer(str(source), file.fileno(), 1 << 40, 1 << 40, stop)
    assert len(seen) == 1
    assert seen[0] < 64 << 20


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: name not in {".", ".."} and not name.startswith(".wh.")
)
KINDS = st.sampled_from(["file", "folder", "symlink", "link", "fifo", "device", "whiteout", "opaque"])
MTIMES = st.integers(-(10**18), 4 * 10**18)
ENTRIES = st.lists(
    st.tuples(NAMES, KINDS, st.binary(max_size=1500), st.integers(0, 0o7777), st.integers(0, 2**32 - 2), MTIMES), max_size=12
)


def build(root: Path, entries: list[tuple[str, str, bytes, int, int, int]]) -> None:
    """Make files; folders are gone into, so that the list becomes a tree."""
    root.mkdir()
    here, folders, files = root, [root], list[Path]()
    for name, kind, data, mode, owner, _ in entries:
        path = here / name
        if os.path.lexists(path) or len(os.fsencode(name)) > 250:
            continue
        match kind:
            case "folder" | "opaque":
                path.mkdir()
                folders.append(path)
                here = path
                if kind == "opaque":
                    os.setxattr(path, OPAQUE, b"y")
            case "symlink":
                os.symlink(data.replace(b"\0", b".")[:1000] or b".", os.fsencode(path))
            case "fifo":
                os.mkfifo(path)
            case "device":
                os.mknod(path, stat.S_IFBLK, os.makedev(mode, owner % (1 << 20)) or 1)
            case "whiteout":
                whiteout(path)
                continue
            case "link" if files:
                os.link(files[-1], path, follow_symlinks=False)
            case _:
                path.write_bytes(data)
                os.setxattr(path, "user.data", data[:100])
        if kind not in {"folder", "opaque"}:
            files.append(path)
        os.chown(path, owner, owner // 2, follow_symlinks=False)
        if kind != "symlink" and not path.is_symlink():
            path.chmod(mode)
    for path, (*_, mtime_ns) in zip([*files, *reversed(folders)], entries * 2 + [("", "", b"", 0, 0, 0)], strict=False):
        os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=ENTRIES)
def test_unpacking_undoes_packing(tmp_path: Path, entries: list[tuple[str, str, bytes, int, int, int]]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    try:
        build(source, entries)
        packed = pack(source)
        done = unpack(packed, target)
        assert done.diff_id == "sha256:" + hashlib.sha256(packed).hexdigest()
        expected, found = tree(source), tree(target)
        # A whiteout has no facts of its own.
        hidden = [name for name in expected if layers.is_whiteout(source / name)]
        assert all(layers.is_whiteout(target / name) for name in hidden)
        assert {name: facts for name, facts in found.items() if name not in hidden} == {
            name: facts for name, facts in expected.items() if name not in hidden
        }
        assert pack(target) == packed
    finally:
        _core.remove_tree(str(source))
        _core.remove_tree(str(target))
