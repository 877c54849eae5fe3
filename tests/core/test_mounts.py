"""Mounts and mount namespaces, each test in namespaces of its own."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from isopod import _core
from tests.core.layers import in_namespaces

pytestmark = pytest.mark.host

FAILS = """
def fails(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error.errno
"""


def overlay_folders(where: Path, lower: str = "lower") -> None:
    for name in (lower, lower + "2", "upper", "work", "merged"):
        (where / name).mkdir(parents=True)
    (where / lower / "both").write_text("upper layer")
    (where / (lower + "2") / "both").write_text("lower layer")
    (where / (lower + "2") / "gone").write_text("gone")


OVERLAY = """
where, lower = sys.argv[1:3]
merged = where + "/merged"
_core.mount_overlay(merged, [f"{where}/{lower}", f"{where}/{lower}2"], where + "/upper", where + "/work", %s)
text = open(merged + "/both").read()
os.remove(merged + "/gone")
open(merged + "/new", "w").close()
options = next(line.split()[3] for line in open("/proc/self/mounts") if line.split()[1] == merged)
_core.unmount(merged, False)
print(json.dumps([text, sorted(os.listdir(where + "/upper")), os.listdir(merged), options]))
"""


@pytest.mark.parametrize("volatile", [False, True])
@pytest.mark.parametrize("lower", ["lower", "a,b:c\\d e", "l" * 200 + "/" + "m" * 200])
def test_overlay(tmp_path: Path, lower: str, volatile: bool) -> None:
    overlay_folders(tmp_path, lower)
    text, upper, left, options = in_namespaces(OVERLAY % volatile, str(tmp_path), lower)
    assert (text, upper, left) == ("upper layer", ["gone", "new"], [])
    assert ("volatile" in options) == volatile


def test_overlay_of_very_many_layers(tmp_path: Path) -> None:
    overlay_folders(tmp_path)
    for number in range(200):
        (tmp_path / f"layer-with-a-rather-long-name-{number}").mkdir()
    script = """
where = sys.argv[1]
lowers = [f"{where}/layer-with-a-rather-long-name-{number}" for number in range(200)]
open(lowers[199] + "/deep", "w").close()
_core.mount_overlay(where + "/merged", lowers, where + "/upper", where + "/work", True)
print(json.dumps(os.listdir(where + "/merged")))
"""
    assert in_namespaces(script, str(tmp_path)) == ["deep"]


def test_an_upper_folder_is_a_layer_by_itself(tmp_path: Path) -> None:
    """Renaming a folder of a lower layer must not leave a reference to it, whatever the kernel's defaults are."""
    overlay_folders(tmp_path)
    (tmp_path / "lower/folder").mkdir()
    script = """
where = sys.argv[1]
_core.mount_overlay(where + "/merged", [where + "/lower"], where + "/upper", where + "/work", True)
os.chmod(where + "/merged/both", 0o600)
try:
    os.rename(where + "/merged/folder", where + "/merged/renamed")
except OSError as error:
    print(json.dumps([error.errno, open(where + "/upper/both").read()]))
"""
    assert in_namespaces(script, str(tmp_path)) == [18, "upper layer"]


def test_overlay_failures_name_what_is_missing(tmp_path: Path) -> None:
    overlay_folders(tmp_path)
    script = """
where = sys.argv[1]
good = [where + "/merged", [where + "/lower"], where + "/upper", where + "/work", False]
found = []
changes = [
    (0, where + "/no"), (1, [where + "/no"]), (1, [where + "/lower", where + "/no"]), (1, []), (2, where + "/no"),
    (1, [where + "/lower/both"]),
]
for position, value in changes:
    arguments = [*good[:position], value, *good[position + 1:]]
    try:
        _core.mount_overlay(*arguments)
    except OSError as error:
        found.append(error.errno)
print(json.dumps([found, os.path.ismount(where + "/merged")]))
"""
    assert in_namespaces(script, str(tmp_path)) == [[2, 2, 2, 22, 2, 22], False]


def test_tmpfs_is_bounded(tmp_path: Path) -> None:
    script = """
_core.mount_tmpfs(sys.argv[1], 1 << 20)
facts = os.statvfs(sys.argv[1])
try:
    with open(sys.argv[1] + "/file", "wb") as file:
        file.write(bytes(2 << 20))
except OSError as error:
    print(json.dumps([error.errno, facts.f_blocks * facts.f_frsize, facts.f_flag & (os.ST_NOSUID | os.ST_NODEV)]))
"""
    assert in_namespaces(script, str(tmp_path)) == [28, 1 << 20, os.ST_NOSUID | os.ST_NODEV]


def test_unmounting(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    os.symlink(tmp_path / "b", tmp_path / "link")
    script = (
        FAILS
        + """
where = sys.argv[1]
found = [fails(_core.unmount, where + "/a", False), fails(_core.unmount, where + "/missing", True)]
_core.bind_mount(where + "/a", where + "/b")
found.append(fails(_core.unmount, where + "/link", False))
busy = open(where + "/b/file", "w")
found.append(fails(_core.unmount, where + "/b", False))
_core.unmount(where + "/b", True)
print(json.dumps([found, os.listdir(where + "/b")]))
"""
    )
    assert in_namespaces(script, str(tmp_path)) == [[22, 2, 22, 16], []]


def test_propagation(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    script = """
import subprocess
def kind(where):
    return [field for line in open("/proc/self/mountinfo") if line.split()[4] == where for field in line.split()[6:] if ":" in field]
where = sys.argv[1]
_core.bind_mount(where, where)
found = [kind(where)]
subprocess.run(["mount", "--make-shared", where], check=True)
found.append([field.split(":")[0] for field in kind(where)])
old = os.open("/proc/self/ns/mnt", os.O_RDONLY)  # or the peer would be gone
_core.unshare_mounts()
_core.make_slave_recursive("/")
found.append([field.split(":")[0] for field in kind(where)])
_core.make_private(where)
found.append(kind(where))
print(json.dumps(found))
"""
    assert in_namespaces(script, str(tmp_path)) == [[], ["shared"], ["master"], []]


def test_a_mount_namespace_is_entered(tmp_path: Path) -> None:
    script = """
inside = sys.argv[1]
ready, tell_ready = os.pipe()
wait, end_wait = os.pipe()
child = os.fork()
if child == 0:
    os.close(end_wait)
    _core.unshare_mounts()
    _core.mount_tmpfs(inside, 1 << 20)
    open(inside + "/file", "w").close()
    os.write(tell_ready, b"x")
    os.read(wait, 1)
    os._exit(0)
os.close(tell_ready)
os.read(ready, 1)
namespace = os.open(f"/proc/{child}/ns/mnt", os.O_RDONLY)
before = os.listdir(inside)
os.close(end_wait)
os.waitpid(child, 0)
_core.enter_mount_namespace(namespace)
print(json.dumps([before, os.listdir(inside)]))
"""
    assert in_namespaces(script, str(tmp_path)) == [[], ["file"]]


def test_only_a_process_of_one_thread_changes_its_namespace() -> None:
    script = (
        FAILS
        + """
import threading
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
found = [fails(_core.unshare_mounts), fails(_core.enter_mount_namespace, os.open("/proc/self/ns/mnt", os.O_RDONLY))]
stop.set()
thread.join()
found.append(fails(_core.enter_mount_namespace, os.open("/proc/self/ns/net", os.O_RDONLY)))
found.append(fails(_core.enter_mount_namespace, -1))
print(json.dumps(found))
"""
    )
    assert in_namespaces(script) == [22, 22, 22, 9]


def test_overlay_is_asked_of_the_kernel() -> None:
    with open("/proc/filesystems", encoding="ascii") as known:
        listed = any(line.split()[-1] == "overlay" for line in known)
    assert _core.overlay_supported() or not listed


def test_a_pidfd_is_of_its_process() -> None:
    process = subprocess.Popen(["sleep", "60"])
    fd = _core.pidfd_open(process.pid)
    try:
        assert not os.get_inheritable(fd)
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        assert process.wait(timeout=10) == -signal.SIGKILL
    finally:
        os.close(fd)
    for pid in (0, -5):
        with pytest.raises(OSError, match="Invalid argument"):
            _core.pidfd_open(pid)
