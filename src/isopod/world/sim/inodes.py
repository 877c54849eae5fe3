"""Inodes: the objects of a simulated file system, and what of them survives a crash.

Each inode has two versions of what it holds: the present one and the durable one. `sync_data` makes bytes durable (`content`),
`sync_names` the names of a folder. A crash makes the durable version the present one.

Legal behaviours at a crash: everything that was not synced is lost (the worst that a kernel may do), unless the file system has a
`crash_chance`. Then a seeded part survives: of each file's bytes as `content` says; of the changes of names, the first so many, in the
order in which they were made, as a journal of metadata keeps them, and a rename always as a whole. What one sync makes durable does not
depend on that order. A folder whose names are synced is reachable afterwards: the chain of names that leads to it is durable too.
"""

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

from isopod.world.sim.content import Content, Misdirect

Kind = Literal["file", "directory", "symlink", "socket", "fifo", "device"]
Watcher = Callable[[str], None]

_Change = list[tuple["Inode", str, "Inode | None"]]
"""Names that change together: the folder, the name, what it leads to."""

OPAQUE: Final = "trusted.overlay.opaque"
CHANGES_MAX: Final = 4096
"""Changes of names that may wait to become durable by themselves."""
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
        self.crash_chance: random.Random | None = None
        """What decides which part of the unsynced survives a crash; None: nothing does."""
        self._n_inodes = 1
        self._changes: list[_Change] = []
        self._change: _Change | None = None
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

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let the changes of names in the block survive a crash all or not at all."""
        if self._change is not None:
            yield
            return
        self._change = []
        try:
            yield
        finally:
            change, self._change = self._change, None
            self._remember(change)

    def renamed(self, folder: "Inode", name: str, inode: "Inode | None") -> None:
        """Note that a name of a folder leads elsewhere now, or nowhere."""
        if self.crash_chance is not None:
            if self._change is not None:
                self._change.append((folder, name, inode))
            else:
                self._remember([(folder, name, inode)])

    def settle(self, folder: "Inode") -> None:
        """The names of a folder are durable: so is the other half of every change that concerns it."""
        rest: list[_Change] = []
        for change in self._changes:
            if any(each[0] is folder for each in change):
                _apply([change])
            else:
                rest.append(change)
        self._changes = rest

    def _remember(self, change: "_Change") -> None:
        if change and self.crash_chance is not None:
            self._changes.append(change)
            if len(self._changes) > CHANGES_MAX:
                _apply(self._changes[: CHANGES_MAX // 2])  # the kernel has written them by now
                del self._changes[: CHANGES_MAX // 2]

    def crash(self) -> None:
        """Return to what is durable, and to what survives by chance."""
        if self.crash_chance is not None:
            how = self.crash_chance.random()
            n_survive = 0 if how < 0.25 else len(self._changes) if how < 0.5 else self.crash_chance.randrange(len(self._changes) + 1)
            _apply(self._changes[:n_survive])
        self._changes.clear()
        if self.volatile:
            self.root.durable_names.clear()
        self.used_bytes = 0
        self.root.restore({})
        self.root.n_links = 1


class Inode:
    """A file, folder, link, socket, pipe or device. Owned by its file system."""

    __slots__ = (
        "content",
        "device",
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
        self.content = Content()
        self.names: dict[str, Inode] = {}
        self.durable_names: dict[str, Inode] = {}
        self.parent: Inode | None = None
        self.target = ""
        self.device = (0, 0)
        self.xattrs: dict[str, bytes] = {}
        self.watchers: list[Watcher] = []

    @property
    def data(self) -> bytearray:
        """All bytes, not to be changed: see `write_at`, `replace`, `resize`."""
        return self.content.whole()

    @property
    def size_bytes(self) -> int:
        """The size as stat(2) gives it."""
        if self.kind == "symlink":
            return len(self.target)
        return self.content.size if self.kind == "file" else 0

    @property
    def is_whiteout(self) -> bool:
        """Whether this hides a name of a lower layer (device 0/0)."""
        return self.kind == "device" and self.device == (0, 0)

    @property
    def is_opaque(self) -> bool:
        """Whether this folder hides the whole folder below it."""
        return self.xattrs.get(OPAQUE) == b"y"

    def append(self, data: bytes) -> int:
        """Add bytes at the end; returns the number of the change."""
        return self.write_at(self.content.size, data)

    def replace(self, data: bytes) -> None:
        """Set the bytes."""
        if self.n_links:
            self.file_system.charge(len(data) - self.content.size)
        self.fill(data)
        self.modified_at_ns = self.file_system.now_ns()

    def fill(self, data: bytes) -> None:
        """Set the bytes of an inode that is not in use yet: nothing is charged."""
        if self.content.size:
            self.content.resize(0)
        if data:
            self.content.write(0, bytes(data))

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Set bytes at a place; what lies between it and the present end becomes zeros. Returns the number of the change."""
        if self.n_links:
            self.file_system.charge(max(0, offset + len(data) - self.content.size))
        self.modified_at_ns = self.file_system.now_ns()
        return self.content.write(offset, bytes(data))

    def resize(self, n_bytes: int) -> None:
        """Cut, or extend with zeros."""
        if n_bytes == self.content.size:
            return
        if self.n_links:
            self.file_system.charge(n_bytes - self.content.size)
        self.content.resize(n_bytes)
        self.modified_at_ns = self.file_system.now_ns()

    def attach(self, name: str, inode: "Inode") -> None:
        """Give `inode` a name in this folder. An inode of that name loses it."""
        if inode.n_links == 0:
            self.file_system.charge(inode.content.size)
        self._drop(self.names.get(name))
        self.names[name] = inode
        self.file_system.renamed(self, name, inode)
        inode.n_links += 1
        if inode.kind == "directory":
            inode.parent = self
        self.modified_at_ns = self.file_system.now_ns()
        self.notify(name)

    def detach(self, name: str) -> None:
        """Take a name out of this folder."""
        self._drop(self.names.pop(name))
        self.file_system.renamed(self, name, None)
        self.modified_at_ns = self.file_system.now_ns()
        self.notify(name)

    def notify(self, name: str) -> None:
        """Tell who watches this folder that an entry changed."""
        for watcher in list(self.watchers):
            watcher(name)

    def sync_data(self, mark: int | None = None, misdirect: Misdirect | None = None) -> None:
        """Make bytes and size durable; see `Content.sync`."""
        self.content.sync(mark, misdirect)

    def sync_names(self) -> None:
        """Make the names in this folder durable, and the way to it."""
        self.file_system.settle(self)
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
            if inode.kind == "directory":
                self.file_system.settle(inode)
                inode.durable_names = dict(inode.names)
            todo.extend(inode.names.values())

    def restore(self, seen: "dict[int, Inode]") -> None:
        """Make the durable version of this inode, and of all it leads to, the present one."""
        if self.number in seen:
            return
        seen[self.number] = self
        self.n_links = 0
        self.watchers.clear()
        chance = self.file_system.crash_chance
        if chance is None:
            self.content.lose()
        else:
            self.content.survive(chance)
        self.file_system.used_bytes += self.content.size
        self.names = dict(self.durable_names)
        for inode in self.names.values():
            inode.restore(seen)
            inode.n_links += 1

    def _drop(self, inode: "Inode | None") -> None:
        if inode is None:
            return
        inode.n_links -= 1
        if inode.n_links == 0:
            inode.file_system.charge(-inode.content.size)
            if inode.kind == "directory":
                inode.notify("")


def _apply(changes: list[_Change]) -> None:
    """Make changes of names durable."""
    for change in changes:
        for folder, name, inode in change:
            if inode is None:
                folder.durable_names.pop(name, None)
            else:
                folder.durable_names[name] = inode
