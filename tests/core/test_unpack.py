"""Layers unpacked: what becomes of honest archives, in every format and compression."""

import gzip
import hashlib
import os
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from isopod import _core
from tests.core import layers
from tests.core.layers import END, Limits, entry, folder, hard_link, header, is_opaque, is_whiteout, padded, pax, symlink, tar, unpack

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("form")]

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
"""cap_net_bind_service+ep, version 2."""


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def everything() -> bytes:
    """Build an archive with an entry of each kind."""
    note = {"SCHILY.xattr.user.note": "h\u00f6"}
    capability = {"SCHILY.xattr.security.capability": CAPABILITY.decode("ascii")}
    return tar(
        folder("./", mode=0o750, mtime=1_500_000_000),
        folder("bin", mode=0o2711, uid=3, gid=4, mtime=1_600_000_000),
        entry("bin/tool", data=b"tool" * 1000, mode=0o6755, uid=70_000, gid=5_000_000, mtime=1_600_000_001.25, pax_headers=note),
        entry("bin/plain", data=b"x", mode=0o444, mtime=7, pax_headers=capability),
        hard_link("bin/same", "./bin/tool"),
        symlink("bin/link", "/../../etc/passwd", uid=9, gid=8, mtime=1_600_000_002),
        hard_link("bin/link2", "bin/link"),
        layers.device("dev/null", tarfile.CHRTYPE, 1, 3, mode=0o666, uid=1),
        layers.device("dev/disk", tarfile.BLKTYPE, 4095, 1_048_575, mode=0o660, mtime=5),
        entry("run/pipe", tarfile.FIFOTYPE, mode=0o622, mtime=6),
        entry("\u00fcber/" + "n" * 200 + "/" + "m" * 200, data=b"long"),
        symlink("far", "t" * 300),
    )


def test_every_kind_of_entry(tmp_path: Path) -> None:
    data = everything()
    done = unpack(data, tmp_path / "layer")
    assert done == (sha256(data), sha256(data), len(data), len(data), 12)
    tree = layers.tree(tmp_path / "layer")
    root, tool, link = tree["."], tree["bin/tool"], tree["bin/link"]
    assert (root.mode, root.mtime_ns) == (stat.S_IFDIR | 0o750, 1_500_000_000 * 10**9)
    assert tree["bin"] == (stat.S_IFDIR | 0o2711, (3, 4), 1_600_000_000 * 10**9, b"", 0, (), "bin")
    assert (tool.mode, tool.owner, tool.mtime_ns) == (stat.S_IFREG | 0o6755, (70_000, 5_000_000), 1_600_000_001_250_000_000)
    assert (tool.contents, tool.xattrs) == (b"tool" * 1000, (("user.note", b"h\xc3\xb6"),))
    assert tree["bin/same"] == tool
    assert (link.contents, link.owner, link.mtime_ns) == (b"/../../etc/passwd", (9, 8), 1_600_000_002 * 10**9)
    assert tree["bin/link2"].same_as == "bin/link"
    assert tree["bin/plain"].xattrs == (("security.capability", CAPABILITY),)
    assert (tree["dev/null"].mode, tree["dev/null"].device) == (stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert (tree["dev/disk"].mode, tree["dev/disk"].device) == (stat.S_IFBLK | 0o660, os.makedev(4095, 1_048_575))
    assert (tree["run/pipe"].mode, tree["run/pipe"].mtime_ns) == (stat.S_IFIFO | 0o622, 6 * 10**9)
    assert tree["\u00fcber/" + "n" * 200 + "/" + "m" * 200].contents == b"long"
    assert tree["far"].contents == b"t" * 300
    # Left out by the archive, hence as everybody expects them; with a time that does not depend on when this ran.
    assert tree["run"] == (stat.S_IFDIR | 0o755, (0, 0), 0, b"", 0, (), "run")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_agree(tmp_path: Path, form: int) -> None:
    names = ["short", "d" * 90 + "/" + "f" * 90]
    members = [entry(name, data=name.encode(), mtime=9, uid=5) for name in names] + [symlink("link", "t" * 99)]
    if form != tarfile.USTAR_FORMAT:
        members += [entry("e" * 250 + "/" + "g" * 250, data=b"g"), symlink("far", "u" * 200), entry("old", mtime=-5, uid=1 << 30)]
    unpack(tar(*members, form=form), tmp_path / "layer")
    tree = layers.tree(tmp_path / "layer")
    assert {name: tree[name].contents for name in names} == {name: name.encode() for name in names}
    assert (tree["short"].mtime_ns, tree["short"].owner, tree["link"].contents) == (9 * 10**9, (5, 0), b"t" * 99)
    if form != tarfile.USTAR_FORMAT:
        assert tree["e" * 250 + "/" + "g" * 250].contents == b"g"
        assert (tree["old"].mtime_ns, tree["old"].owner) == (-5 * 10**9, (1 << 30, 0))


def test_headers_older_than_posix(tmp_path: Path) -> None:
    old = {"magic": bytes(8), "mode": b"   755 \0"}
    data = header(b"d/", b"\0", **old) + header(b"d/f", b"\0", size=b"          3 ", **old) + padded(b"abc") + END
    unpack(data, tmp_path / "layer")
    assert (tmp_path / "layer/d/f").read_bytes() == b"abc"


def test_one_block_of_zeros_ends_an_archive(tmp_path: Path) -> None:
    unpack(header(b"f") + bytes(512), tmp_path / "layer")
    assert (tmp_path / "layer/f").exists()


def test_time_of_a_folder_outlives_its_contents(tmp_path: Path) -> None:
    unpack(tar(folder("a", mtime=11), folder("a/b", mtime=12), entry("a/b/c"), entry("a/d")), tmp_path / "layer")
    tree = layers.tree(tmp_path / "layer")
    assert (tree["."].mtime_ns, tree["a"].mtime_ns, tree["a/b"].mtime_ns) == (0, 11 * 10**9, 12 * 10**9)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "gzip-members": lambda data: gzip.compress(data[:700], mtime=0) + gzip.compress(data[700:], mtime=0),
    "zstd": zstandard.compress,
    "zstd-frames": lambda data: zstandard.compress(data[:700]) + b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstandard.compress(data[700:]),
    "zstd-skippable-first": lambda data: b"\x5f\x2a\x4d\x18\x04\0\0\0skip" + zstandard.compress(data),
}


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("trailing", [b"", bytes(20_000), b"not a tar any more" * 3000])
def test_digests_are_of_the_whole(tmp_path: Path, name: str, trailing: bytes) -> None:
    data = everything() + trailing
    blob = COMPRESSIONS[name](data)
    done = unpack(blob, tmp_path / "layer")
    assert done == (sha256(blob), sha256(data), len(blob), len(data), 12)


def test_a_blob_inside_a_file(tmp_path: Path) -> None:
    blob = gzip.compress(everything())
    (tmp_path / "outer").write_bytes(b"before" + blob + b"after")
    done = layers.unpack_file(tmp_path / "outer", tmp_path / "layer", offset=6, n_bytes=len(blob))
    assert (done.blob_digest, done.diff_id) == (sha256(blob), sha256(everything()))
    with pytest.raises(_core.ArchiveError, match="ends before its size"):
        layers.unpack_file(tmp_path / "outer", tmp_path / "layer2", offset=6, n_bytes=len(blob) + 6)
    assert not (tmp_path / "layer2").exists()


def through_pipe(data: bytes, target: Path, offset: int) -> layers.Unpacked:
    reader, writer = os.pipe()

    def feed() -> None:
        with open(writer, "wb") as file:
            file.write(data)

    # Only runs while the other thread is inside the core if that lets go of the GIL: the pipe holds less than the data.
    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        return layers.Unpacked(*_core.unpack_layer(reader, str(target), offset, None, *Limits(), None))
    finally:
        os.close(reader)
        feeder.join()


def test_a_pipe_is_read_while_other_threads_run(tmp_path: Path) -> None:
    data = tar(entry("f", data=os.urandom(3 << 20)))
    blob = gzip.compress(data, 1)
    done = through_pipe(blob, tmp_path / "layer", 0)
    assert (done.blob_digest, done.diff_id) == (sha256(blob), sha256(data))


def test_a_pipe_has_no_offsets(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Illegal seek"):
        through_pipe(b"", tmp_path / "layer", 5)
    assert not (tmp_path / "layer").exists()


def test_progress_is_told_and_may_stop(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(tar(entry("f", data=os.urandom(30 << 20))))
    told: list[int] = []
    done = layers.unpack_file(blob, tmp_path / "layer", progress=told.append)
    assert told == sorted(told)
    assert told[-1] == done.n_blob_bytes

    def stop(n_bytes: int) -> None:
        raise KeyError(n_bytes)

    with pytest.raises(KeyError):
        layers.unpack_file(blob, tmp_path / "layer2", progress=stop)
    assert not (tmp_path / "layer2").exists()


def test_whiteouts_become_what_overlayfs_takes(tmp_path: Path) -> None:
    unpack(tar(entry(".wh.top"), entry("d/.wh.gone"), entry("o/.wh..wh..opq"), entry("o/new"), entry("../x"[3:])), tmp_path / "layer")
    layer = tmp_path / "layer"
    assert is_whiteout(layer / "top")
    assert is_whiteout(layer / "d/gone")
    assert is_opaque(layer / "o")
    assert not is_opaque(layer / "d")
    unpack(tar(entry(".wh..wh..opq")), tmp_path / "all")
    assert is_opaque(tmp_path / "all")


def test_whiteouts_hide_lower_layers_only(tmp_path: Path) -> None:
    kept = [folder("d"), entry("d/f"), entry("f", data=b"f")]
    hidden = [entry(".wh.d"), entry(".wh.f")]
    for number, members in enumerate([[*kept, *hidden], [*hidden, *kept], [*hidden, *kept[1:]]]):
        layer = tmp_path / str(number)
        unpack(tar(*members), layer)
        assert is_opaque(layer / "d")
        assert (layer / "d/f").exists()
        assert (layer / "f").read_bytes() == b"f"


def test_later_entries_replace_earlier_ones(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    members = [
        symlink("file-over-link", str(outside)),
        entry("file-over-link", data=b"new"),
        entry("folder-over-file", data=b"old"),
        folder("folder-over-file"),
        folder("file-over-folder"),
        entry("file-over-folder/a/b", data=b"old"),
        entry("file-over-folder", data=b"new"),
        symlink("folder-over-link", "elsewhere"),
        folder("elsewhere"),
        folder("folder-over-link"),
        entry("folder-over-link/f"),
        folder("merged", mode=0o700),
        entry("merged/stays"),
        folder("merged", mode=0o711),
        entry("a", data=b"a"),
        entry("b", data=b"b"),
        hard_link("b", "a"),
        hard_link("a", "a"),
        entry("link-over-file"),
        symlink("link-over-file", "x"),
    ]
    layer = tmp_path / "layer"
    unpack(tar(*members), layer)
    assert outside.read_bytes() == b"untouched"
    assert (layer / "file-over-link").read_bytes() == b"new"
    assert (layer / "folder-over-file").is_dir()
    assert (layer / "file-over-folder").read_bytes() == b"new"
    assert not (layer / "folder-over-link").is_symlink()
    assert list((layer / "elsewhere").iterdir()) == []
    assert (layer / "merged/stays").exists()
    assert stat.S_IMODE((layer / "merged").stat().st_mode) == 0o711
    assert (layer / "a").stat().st_ino == (layer / "b").stat().st_ino
    assert (layer / "link-over-file").readlink() == Path("x")


def test_links_on_the_way_are_resolved_in_the_root(tmp_path: Path) -> None:
    members = [
        folder("usr/bin"),
        symlink("bin", "/usr/bin"),
        entry("bin/tool", data=b"tool"),
        symlink("up", "../../.."),
        entry("up/top", data=b"top"),
        symlink("out", "/../../usr"),
        entry("out/f", data=b"f"),
        hard_link("tool2", "bin/tool"),
        folder("bin/sub", mtime=3),
    ]
    before = set(tmp_path.iterdir())
    layer = tmp_path / "layer"
    unpack(tar(*members), layer)
    assert set(tmp_path.iterdir()) - before == set(layers.made_at(layer))
    assert (layer / "usr/bin/tool").read_bytes() == b"tool"
    assert (layer / "top").read_bytes() == b"top"
    assert (layer / "usr/f").read_bytes() == b"f"
    assert (layer / "tool2").stat().st_nlink == 2
    assert (layer / "usr/bin/sub").stat().st_mtime == 3


@pytest.mark.parametrize(
    "options", ["--format=oldgnu", "--format=gnu", *(f"--format=posix --sparse-version={v}" for v in ("0.0", "0.1", "1.0"))]
)
@pytest.mark.parametrize("n_parts", [0, 1, 3, 30])
def test_sparse_files_stay_sparse(tmp_path: Path, options: str, n_parts: int, form: layers.Form) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        for part in range(n_parts):
            file.seek(part * (1 << 20) + 8192)
            file.write(b"%d" % part * 5000)
        file.truncate(50 << 20)
    (source / "zlast").write_bytes(b"after")
    command = ["tar", "--sparse", *options.split(), "-cf", str(tmp_path / "tar"), "-C", str(source), "sparse", "zlast"]
    subprocess.run(command, check=True, timeout=30)
    layers.unpack_file(tmp_path / "tar", tmp_path / "layer")
    unpacked = tmp_path / "layer/sparse"
    assert unpacked.read_bytes() == (source / "sparse").read_bytes()
    kept = unpacked if form == "directory" else tmp_path / "layer.tar"  # a mounted index tells the size of all, holes included
    assert kept.stat().st_blocks * 512 <= n_parts * (32 << 10) + (0 if form == "directory" else 16 << 10)
    assert (tmp_path / "layer/zlast").read_bytes() == b"after"


def test_attributes_a_link_cannot_have_are_passed_over(tmp_path: Path) -> None:
    attributes = pax((b"SCHILY.xattr.user.note", b"x"), (b"SCHILY.xattr.trusted.note", b"y"))
    unpack(attributes + header(b"link", b"2", link=b"t") + END, tmp_path / "layer")
    assert os.listxattr(tmp_path / "layer/link", follow_symlinks=False) == ["trusted.note"]


@pytest.mark.parametrize("form", ["directory"], indirect=True)
def test_the_target_must_be_empty_and_is_otherwise_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "layer"
    target.mkdir()
    unpack(tar(entry("f")), target)
    with pytest.raises(OSError, match="not empty"):
        unpack(tar(entry("g")), target)
    assert [path.name for path in target.iterdir()] == ["f"]
    blob = tmp_path / "blob-without-parent"
    blob.write_bytes(tar(entry("g")))
    with pytest.raises(FileNotFoundError):
        layers.unpack_file(blob, tmp_path / "missing/layer")
    os.symlink(tmp_path / "layer", tmp_path / "link")
    with pytest.raises(NotADirectoryError):
        unpack(tar(entry("g")), tmp_path / "link")
    assert [path.name for path in target.iterdir()] == ["f"]


MEASURE = """
import resource, sys
from isopod import _core
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
with open(sys.argv[1], "rb") as blob:
    _core.unpack_layer(blob.fileno(), sys.argv[2], 0, None, 1 << 40, 10**6, 1 << 40, 4096, 10**6, None)
print(peak() - before)
"""


@pytest.mark.parametrize("compress", [lambda data: gzip.compress(data, 1), zstandard.compress], ids=["gzip", "zstd"])
def test_memory_does_not_grow_with_the_layer(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / "blob").write_bytes(compress(tar(entry("f", data=bytes(200 << 20)))))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "blob"), str(tmp_path / "layer")]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60, env={**os.environ, "PYTHONPATH": layers.SOURCE})
    assert int(done.stdout) < 16 << 10
