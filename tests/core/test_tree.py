"""Trees removed and measured, and files hashed."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from isopod import _core
from tests.core.layers import in_namespaces


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").touch()
    (tmp_path / "tree/a/b").mkdir(parents=True)
    (tmp_path / "tree/a/b").chmod(0)
    os.symlink(tmp_path / "outside", tmp_path / "tree/a/link")
    os.mkfifo(tmp_path / "tree/pipe")
    _core.remove_tree(str(tmp_path / "tree"))
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside/file").exists()


def test_what_is_no_folder_is_left(tmp_path: Path) -> None:
    _core.remove_tree(str(tmp_path / "missing"))
    _core.remove_tree(str(tmp_path / "missing/too"))
    (tmp_path / "file").touch()
    os.symlink(tmp_path, tmp_path / "link")
    for name in ("file", "link"):
        with pytest.raises(NotADirectoryError):
            _core.remove_tree(str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_depth_costs_nothing(tmp_path: Path) -> None:
    # Deeper than paths, descriptors and the stack of a thread would carry a naive walk.
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d" * 10, dir_fd=here)
        inner = os.open("d" * 10, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert _core.tree_bytes(str(tmp_path)) >= 0
    _core.remove_tree(str(tmp_path / ("d" * 10)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.host
@pytest.mark.parametrize("mount", ["_core.mount_tmpfs(where, 1 << 20)", "_core.bind_mount(sys.argv[2], where)"])
def test_mounts_are_not_crossed(tmp_path: Path, mount: str) -> None:
    (tmp_path / "tree/z/inner").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    script = f"""
tree = sys.argv[1]
found = []
for where in (tree + "/z/inner", tree):
    {mount}
    open(where + "/file", "w").close()
    try:
        _core.remove_tree(tree)
    except OSError as error:
        found.append((error.errno, os.listdir(where)))
    _core.unmount(where, False)
print(json.dumps(found))
"""
    assert in_namespaces(script, str(tmp_path / "tree"), str(tmp_path / "other")) == [[16, ["file"]], [16, ["file"]]]
    assert (tmp_path / "tree/z/inner").exists()


@pytest.mark.host
def test_a_mount_on_a_file_is_not_crossed(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").touch()
    script = """
_core.bind_mount("/proc/self/ns/net", sys.argv[1] + "/file")
try:
    _core.remove_tree(sys.argv[1])
except OSError as error:
    print(error.errno)
"""
    assert in_namespaces(script, str(tmp_path / "tree")) == 16


def test_bytes_are_what_is_allocated(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file").write_bytes(os.urandom(300_000))
    os.link(tmp_path / "d/file", tmp_path / "again")
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 30)
    os.symlink("/usr", tmp_path / "link")
    du = subprocess.run(["du", "-s", "-B1", str(tmp_path)], check=True, capture_output=True, text=True, timeout=10)
    assert _core.tree_bytes(str(tmp_path)) == int(du.stdout.split()[0])
    with pytest.raises(FileNotFoundError) as caught:
        _core.tree_bytes(str(tmp_path / "missing"))
    assert caught.value.filename == str(tmp_path / "missing")


def test_a_digest_is_of_the_whole_file(tmp_path: Path) -> None:
    data = os.urandom(1_000_001)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file:
        file.seek(500)
        assert _core.sha256_file(file.fileno()) == "sha256:" + hashlib.sha256(data).hexdigest()
        assert file.tell() == 500
    for fd in (-1, 1_000_000):
        with pytest.raises(OSError, match="Bad file descriptor"):
            _core.sha256_file(fd)
