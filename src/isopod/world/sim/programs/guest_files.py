"""The files of a simulated guest: what its root shows, and the copies into and out of it.

The root is an overlay of the image's layers and an ext4 disk or a tmpfs; over it lie /proc, /sys and /dev, the mounts that were asked
for, and the two files about names. Archives are tars with names relative to the parent of what was asked for.
"""

import errno
import io
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from isopod.world.sim.inodes import FileSystem, Inode
from isopod.world.sim.nodes import Node, PlainNode
from isopod.world.sim.programs.container import make_devices, make_target
from isopod.world.sim.view import View, fail

_PSEUDO_BYTES: Final = 64 << 20
ID_MAX: Final = (1 << 31) - 1


def furnish(view: View, now_ns: Any, *, n_cpus: int, memory_bytes: int) -> None:
    """Mount /proc, /sys and /dev, with what commands read there."""
    for path in ("/proc", "/sys", "/dev"):
        make_target(view, path, is_folder=True)
        root = FileSystem(_PSEUDO_BYTES, now_ns, volatile=True).root
        if path == "/dev":
            make_devices(root)
        view.mount(path, PlainNode(root))
    kib = memory_bytes >> 10
    view.write("/proc/meminfo", f"MemTotal: {kib:14} kB\nMemFree: {kib // 2:15} kB\n".encode(), 0o444)
    view.write("/proc/cpuinfo", b"".join(b"processor\t: %d\n" % number for number in range(n_cpus)), 0o444)


def mount_file(view: View, path: str, text: str, now_ns: Any) -> None:
    """Show a small file of the guest's own memory at a path."""
    make_target(view, path, is_folder=False)
    inode = FileSystem(_PSEUDO_BYTES, now_ns, volatile=True).new("file", 0o644)
    inode.fill(text.encode())
    view.mount(path, PlainNode(inode))


def mount_at(view: View, path: str, node: Node, *, read_only: bool) -> None:
    """Mount something where it was asked for."""
    make_target(view, path, is_folder=node.inode.kind == "directory")
    view.mount(path, node)
    if read_only:
        view.make_read_only(path)


class Account(NamedTuple):
    """Who a command runs as."""

    uid: int
    gid: int
    home: str


def find_user(view: View, wanted: str) -> Account:
    """Return who NAME|UID[:GROUP|GID] is, by the root's own files. EINVAL for who is not there."""
    name, colon, group_name = wanted.partition(":")
    account = next((fields for fields in _lines(view, "/etc/passwd", 6) if (name or "0") in (fields[0], fields[2])), None)
    if account is not None:
        found = Account(_number(account[2]), _number(account[3]), account[5] or "/")
    else:
        found = Account(_number(name or "0"), 0, "/")
    if not colon:
        return found
    group = next((fields for fields in _lines(view, "/etc/group", 3) if group_name in (fields[0], fields[2])), None)
    return found._replace(gid=_number(group_name if group is None else group[2]))


def look(view: View, path: str, *, follow: bool) -> dict[str, object]:
    """Return what is at a path; "nothing" has a folder that is there. ENOENT, ENOTDIR."""
    spot = view.spot(path, follow=follow)
    node = spot.node
    if node is None and (path.endswith("/") or spot.parent is None):
        fail(errno.ENOENT, path)
    kinds = {"directory": "folder", "file": "file", "symlink": "link"}
    kind = "nothing" if node is None else kinds.get(node.inode.kind, "other")
    mode, n_bytes = (0, 0) if node is None else (node.inode.mode, node.inode.size_bytes)
    return {"kind": kind, "path": spot.path, "mode": mode, "n_bytes": n_bytes}


def pack(view: View, path: str) -> tuple[dict[str, object], bytes]:
    """Return what the answer to `archive` says, and the tar. ENOENT."""
    node = view.node(path, follow=False)
    name = path.rstrip("/").rpartition("/")[2] or "."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry, inode in _walk(name, node):
            archive.addfile(entry, io.BytesIO(bytes(inode.data)) if entry.isreg() else None)
    facts: dict[str, object] = {"mode": node.inode.mode, "n_bytes": node.inode.size_bytes, "is_folder": node.inode.kind == "directory"}
    return facts, buffer.getvalue()


def extract(view: View, path: str, data: bytes) -> None:
    """Unpack a tar below a folder. ENOTDIR, ENOENT, EINVAL for names that lead out, ENOSPC."""
    view.folder(path)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                _extract_one(view, path, entry, archive)
    except tarfile.TarError:
        fail(errno.EINVAL, path)


def _extract_one(view: View, folder: str, entry: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    parts = [part for part in entry.name.split("/") if part not in ("", ".")]
    if entry.name.startswith("/") or ".." in parts:
        fail(errno.EINVAL, entry.name)
    target = "/".join([folder.rstrip("/"), *parts])
    if entry.isdir():
        view.make_folders(target, entry.mode)
        return
    for number in range(1, len(parts)):
        above = "/".join([folder.rstrip("/"), *parts[:number]])
        if (found := view.find(above, follow=False)) is not None and found.inode.kind == "symlink":
            fail(errno.ELOOP, entry.name)
    view.make_folders(target.rpartition("/")[0] or "/", 0o755)
    if view.find(target, follow=False) is not None:
        view.remove(target)
    if entry.issym():
        view.symlink(entry.linkname, target)
    elif entry.isreg():
        content = archive.extractfile(entry)
        assert content is not None
        inode = view.write(target, content.read(), entry.mode)
        inode.uid, inode.gid = entry.uid, entry.gid


def _walk(name: str, node: Node) -> Iterator[tuple[tarfile.TarInfo, Inode]]:
    inode = node.inode
    entry = tarfile.TarInfo(name)
    entry.mode, entry.uid, entry.gid = inode.mode, inode.uid, inode.gid
    entry.mtime = inode.modified_at_ns // 10**9
    if inode.kind == "directory":
        entry.type = tarfile.DIRTYPE
    elif inode.kind == "symlink":
        entry.type, entry.linkname = tarfile.SYMTYPE, inode.target
    elif inode.kind == "file":
        entry.size = inode.size_bytes
    else:
        return
    yield entry, inode
    if inode.kind == "directory":
        for child_name in node.list_names():
            child = node.lookup(child_name)
            assert child is not None
            yield from _walk(f"{name}/{child_name}", child)


def _lines(view: View, path: str, n_fields: int) -> Iterator[Sequence[str]]:
    node = view.find(path)
    if node is not None and node.inode.kind == "file":
        for line in bytes(node.inode.data).decode(errors="replace").splitlines():
            fields = line.split(":")
            if len(fields) >= n_fields:
                yield fields


def _number(text: str) -> int:
    if not text.isdigit() or int(text) > ID_MAX:
        fail(errno.EINVAL, text)
    return int(text)
