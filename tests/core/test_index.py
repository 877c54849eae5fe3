"""Outer archives listed in place."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from isopod import _core
from tests.core.layers import END, entry, folder, hard_link, header, padded, pax, symlink, tar


def index(path: Path) -> list[tuple[str, int, int, str]]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return _core.index_archive(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_the_index_says(tmp_path: Path, form: int) -> None:
    contents = {"manifest.json": b"[]", "blobs/sha256/" + "a" * 64: os.urandom(100_001), "empty": b"", "l" * 80 + "/" + "m" * 90: b"long"}
    data = tar(folder("blobs"), *(entry(f"./{name}" if name == "empty" else name, data=body) for name, body in contents.items()), form=form)
    (tmp_path / "tar").write_bytes(data)
    found = index(tmp_path / "tar")
    assert {name: data[offset : offset + n_bytes] for name, offset, n_bytes, _ in found} == contents
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [offset for _, offset, *_ in found] == [member.offset_data for member in archive.getmembers() if member.isreg()]


def test_links_are_listed_with_their_targets(tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(
        tar(entry("a/layer.tar", data=b"x"), symlink("b/layer.tar", "../a/layer.tar"), hard_link("c", "a/layer.tar"))
    )
    found = [(name, n_bytes, target) for name, _, n_bytes, target in index(tmp_path / "tar")]
    assert found == [("a/layer.tar", 1, ""), ("b/layer.tar", 0, "../a/layer.tar"), ("c", 0, "a/layer.tar")]


@pytest.mark.parametrize(
    ("data", "name", "why"),
    [
        (header(b"f", size=b"77777777777\0") + END, "f", "truncated"),
        (header(b"f", size=b"\x80\0\0\0\x7f" + b"\xff" * 7) + END, "f", "truncated"),
        (header(b"f", size=b"00000001000\0") + bytes(511), "f", "truncated"),
        (tar(entry("f"))[:512], "", "truncated"),
        (gzip.compress(tar(entry("f"))) + bytes(600), "", "checksum"),
        (
            pax((b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"0,1")) + header(b"f", size=b"00000000001\0") + padded(b"x") + END,
            "f",
            "sparse",
        ),
        (tar(entry("n" * 4097)), "n" * 4097, "too long"),
    ],
)
def test_sizes_are_not_trusted(tmp_path: Path, data: bytes, name: str, why: str) -> None:
    (tmp_path / "tar").write_bytes(data)
    with pytest.raises(_core.ArchiveError, match=why) as caught:
        index(tmp_path / "tar")
    assert caught.value.args[0] == name


def test_a_pipe_cannot_be_listed() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with pytest.raises(OSError, match="Illegal seek"):
        _core.index_archive(reader)
    os.close(reader)
