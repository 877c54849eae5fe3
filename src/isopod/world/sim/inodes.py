"""Inodes: the objects of a simulated file system, and what of them survives a crash.

Each inode has two versions of what it holds: the present one and the durable one. `sync_data` copies the bytes over, `sync_names` the
names of a folder. A crash makes the durable version the present one; what was never synced is as if it had not happened.

Legal behaviours at a crash today: everything that was not synced is lost (the worst that a kernel may do, always). A folder whose names
are synced is reachable afterwards: the chain of names that leads to it is durable too, as journaling file systems keep it.
Not yet: a seeded part of the unsynced survives, torn writes, bit rot, failing syncs.
"""

import errno
import os
from collections.abc import Callable
from typing import Final, Literal

Kind = Literal["file", "directory", "symlink", "socket", "fifo", "device"]
Watcher = Callable[[str], None]

OPAQUE: Final = "trusted.overlay.opaque"
BLOCK_BYTES: Final = 4096


class FileSystem:
    """One mounted file system: its capacity and its root.

    Args:
        capacity_bytes: What all files together may hold; more is ENOSPC. May be set at any time.
        now_ns: The wall clock, for modification times.
        volatile: Whether nothing of it survives a crash (tmpfs).
    """

    def __init__(self, capacity_bytes: int, now_ns: Callable[[], int], *, volatile: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.volatile = volatile
        self.now_ns = now_ns
        self._n_inodes = 1
        self.root = Inode(self, 1, "directory", 0o755)
        self.root.n_links = 1

    def new(self, kind: Kind, mode: int) -> "Inode":
        """Make an inode that no folder names yet."""
        self._n_inodes += 1
        return Inode(self, self._n_inodes, kind, mode)

    def charge(self, n_bytes: int) -> None:
        """Use (or give back) space; ENOSPC leaves everything as it was."""
        if n_bytes > 0 and self.used_bytes + n_bytes > self.capacity_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.used_bytes += n_bytes

    def crash(self) -> None:
        """Return to what is durable."""
        if self.volatile:
            self.root.durable_names.clear()
        self.used_bytes = 0
        self.root.restore({})
        self.root.n_links = 1


class Inode:
    """A file, folder, link, socket, pipe or device. Owned by its file system."""

    __slots__ = (
        "data",
        "device",
        "durable_data",
        "durable_names",
        "file_system",
        "gid",
        "kind",
        "mode",
        "modified_at_ns",
        "n_links",
        "names",
        "number",
        "parent",
        "target",
        "uid",
        "watchers",
        "xattrs",
    )

    def __init__(self, file_system: FileSystem, number: int, kind: Kind, mode: int) -> None:
        self.file_system = file_system
        self.number = number
        self.kind: Kind = kind
        self.mode = mode
        self.uid = 0
        self.gid = 0
        self.n_links = 0
        self.modified_at_ns = file_system.now_ns()
        self.data = bytearray()
        self.durable_data = b""
        self.names: dict[str, Inode] = {}
        self.durable_names: dict[str, Inode] = {}
        self.parent: Inode | None = None
        self.target = ""
        self.device = (0, 0)
        self.xattrs: dict[str, bytes] = {}
        self.watchers: list[Watcher] = []

    @property
    def size_bytes(self) -> int:
        """The size as stat(2) gives it."""
        if self.kind == "symlink":
            return len(self.target)
        return len(self.data) if self.kind == "file" else 0

    @property
    def is_whiteout(self) -> bool:
        """Whether this hides a name of a lower layer (device 0/0)."""
        return self.kind == "device" and self.device == (0, 0)

    @property
    def is_opaque(self) -> bool:
        """Whether this folder hides the whole folder below it."""
        return self.xattrs.get(OPAQUE) == b"y"

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        if self.n_links:
            self.file_system.charge(len(data))
        self.data += data
        self.modified_at_ns = self.file_system.now_ns()

    def replace(self, data: bytes) -> None:
        """Set the bytes."""
        if self.n_links:
            self.file_system.charge(len(data) - len(self.data))
        self.data[:] = data
        self.modified_at_ns = self.file_system.now_ns()

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Set bytes at a place; what lies between it and the present end becomes zeros."""
        n_more = max(0, offset + len(data) - len(self.data))
        if self.n_links:
            self.file_system.charge(n_more)
        self.data += bytes(n_more)
        self.data[offset : offset + len(data)] = data
        self.modified_at_ns = self.file_system.now_ns()

    def resize(self, n_bytes: int) -> None:
        """Cut, or extend with zeros."""
        if self.n_links:
            self.file_system.charge(n_bytes - len(self.data))
        if n_bytes < len(self.data):
            del self.data[n_bytes:]
        self.data += bytes(n_bytes - len(self.data))
        self.modified_at_ns = self.file_system.now_ns()

    def attach(self, name: str, inode: "Inode") -> None:
        """Give `inode` a name in this folder. An inode of that name loses it."""
        if inode.n_links == 0:
            self.file_system.charge(len(inode.data))
        self._drop(self.names.get(name))
        self.names[name] = inode
        inode.n_links += 1
        if inode.kind == "directory":
            inode.parent = self
        self.modified_at_ns = self.file_system.now_ns()
        self.notify(name)

    def detach(self, name: str) -> None:
        """Take a name out of this folder."""
        self._drop(self.names.pop(name))
        self.modified_at_ns = self.file_system.now_ns()
        self.notify(name)

    def notify(self, name: str) -> None:
        """Tell who watches this folder that an entry changed."""
        for watcher in list(self.watchers):
            watcher(name)

    def sync_data(self) -> None:
        """Make bytes and size durable."""
        self.durable_data = bytes(self.data)

    def sync_names(self) -> None:
        """Make the names in this folder durable, and the way to it."""
        self.durable_names = dict(self.names)
        node = self
        while node.parent is not None:
            for name, inode in node.parent.names.items():
                if inode is node:
                    node.parent.durable_names[name] = node
            node = node.parent

    def sync_below(self) -> None:
        """Make this folder's content durable, all of it, but not the name it has itself."""
        todo = [self]
        while todo:
            inode = todo.pop()
            inode.sync_data()
            inode.durable_names = dict(inode.names)
            todo.extend(inode.names.values())

    def restore(self, seen: "dict[int, Inode]") -> None:
        """Make the durable version of this inode, and of all it leads to, the present one."""
        if self.number in seen:
            return
        seen[self.number] = self
        self.n_links = 0
        self.watchers.clear()
        self.data[:] = self.durable_data
        self.file_system.used_bytes += len(self.data)
        self.names = dict(self.durable_names)
        for inode in self.names.values():
            inode.restore(seen)
            inode.n_links += 1

    def _drop(self, inode: "Inode | None") -> None:
        if inode is None:
            return
        inode.n_links -= 1
        if inode.n_links == 0:
            inode.file_system.charge(-len(inode.data))
