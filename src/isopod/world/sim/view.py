"""View: a tree of mounted file systems as one process sees it, with the operations of the kernel's file calls.

Synchronous and instant; `SimDisk` adds delays, and the simulated programs use a view directly. Failures are OSErrors with the kernel's
errno. A container has a view of its own, rooted at its overlay. Not modelled: permission checks (everybody is root), hard limits on names.
"""

import errno
import os
from collections import deque
from typing import Final, NamedTuple, NoReturn

from isopod.world.sim.inodes import Inode, Kind
from isopod.world.sim.nodes import MergedNode, Node, PlainNode

SYMLINKS_MAX: Final = 40
NAME_BYTES_MAX: Final = 255
_PARENT_MODE: Final = 0o755


class Spot(NamedTuple):
    """Where a path led: the entry, or the folder and the name under which it could be made."""

    parent: Node | None
    name: str
    node: Node | None
    path: str


class View:
    """A root and what is mounted over it.

    Args:
        root: The root folder.
    """

    def __init__(self, root: Node) -> None:
        self.root = root
        self._mounts: dict[str, list[Node]] = {}
        self._read_only: dict[str, None] = {}

    # -- mounts ----------------------------------------------------------------------------------------------------------------------

    def mount(self, path: str, node: Node) -> None:
        """Cover what is at `path` (which exists) with `node`."""
        spot = self.spot(path)
        if spot.node is None:
            fail(errno.ENOENT, path)
        if (spot.node.inode.kind == "directory") != (node.inode.kind == "directory"):
            fail(errno.ENOTDIR, path)
        self._mounts.setdefault(spot.path, []).append(node)

    def make_read_only(self, path: str) -> None:
        """Let changes below the mount at `path` fail with EROFS; mounts inside it are not concerned."""
        self._read_only[self.spot(path).path] = None

    def unmount(self, path: str) -> bool:
        """Uncover the topmost mount at `path`; False if nothing is mounted there."""
        stack = self._mounts.get(path, [])
        if not stack:
            return False
        stack.pop()
        if not stack:
            del self._mounts[path]
            self._read_only.pop(path, None)
        return True

    def mounts_below(self, path: str) -> list[str]:
        """Return the mounted paths at and under `path`, sorted."""
        inside = path.rstrip("/") + "/"
        return sorted(each for each in self._mounts if each == path or each.startswith(inside))

    def clear_mounts(self) -> None:
        """Forget every mount: the machine lost its power."""
        self._mounts.clear()
        self._read_only.clear()

    # -- paths -----------------------------------------------------------------------------------------------------------------------

    def spot(self, path: str, *, follow: bool = True) -> Spot:
        """Walk a path. A missing last component is no error; a missing earlier one is ENOENT."""
        if not path.startswith("/"):
            fail(errno.EINVAL, path)
        todo = deque(path.split("/"))
        way: list[tuple[str, Node]] = [("", self._top("/", self.root))]
        n_links = 0
        while todo:
            part = todo.popleft()
            if part in ("", ".") or (part == ".." and _pop(way)):
                continue
            here, child = self._step(way, part, path)
            if child is None:
                if any(each not in ("", ".") for each in todo):
                    fail(errno.ENOENT, path)
                return Spot(way[-1][1], part, None, here)
            if child.inode.kind == "symlink" and (follow or any(todo)):
                n_links += 1
                if n_links > SYMLINKS_MAX:
                    fail(errno.ELOOP, path)
                target = child.inode.target
                if target.startswith("/"):
                    del way[1:]
                todo.extendleft(reversed(target.split("/")))
                continue
            way.append((part, child))
        parent = way[-2][1] if len(way) > 1 else None
        return Spot(parent, way[-1][0], way[-1][1], "/" + "/".join(name for name, _ in way[1:]))

    def node(self, path: str, *, follow: bool = True) -> Node:
        """Return what is at `path`. ENOENT if there is nothing."""
        found = self.spot(path, follow=follow).node
        if found is None:
            fail(errno.ENOENT, path)
        return found

    def find(self, path: str, *, follow: bool = True) -> Node | None:
        """Return what is at `path`, or None if it or a folder on the way is missing."""
        try:
            return self.spot(path, follow=follow).node
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise

    def folder(self, path: str) -> Node:
        """Return the folder at `path`. ENOENT, ENOTDIR."""
        node = self.node(path)
        if node.inode.kind != "directory":
            fail(errno.ENOTDIR, path)
        return node

    # -- files -----------------------------------------------------------------------------------------------------------------------

    def open_file(self, path: str, *, create_mode: int | None = None) -> Inode:
        """Return a regular file's inode, made if missing and `create_mode` is given; writable then."""
        spot = self.spot(path)
        if spot.node is None:
            if create_mode is None:
                fail(errno.ENOENT, path)
            return self._create(spot, "file", create_mode)
        kind = spot.node.inode.kind
        if kind == "directory":
            fail(errno.EISDIR, path)
        if kind == "socket":
            fail(errno.ENXIO, path)
        if create_mode is not None and kind == "file":
            self._check_writable(spot.path)
        return spot.node.writable() if create_mode is not None else spot.node.inode

    def write(self, path: str, data: bytes, mode: int = 0o600) -> Inode:
        """Create or replace a file's bytes, not durable."""
        inode = self.open_file(path, create_mode=mode)
        inode.replace(data)
        self.touched(path)
        return inode

    def create(self, path: str, kind: Kind, mode: int) -> Inode:
        """Make a new entry. EEXIST if there is one."""
        spot = self.spot(path, follow=False)
        if spot.node is not None:
            fail(errno.EEXIST, path)
        return self._create(spot, kind, mode)

    def symlink(self, target: str, path: str) -> Inode:
        """Make a symbolic link at `path`."""
        inode = self.create(path, "symlink", 0o777)
        inode.target = target
        return inode

    def link(self, inode: Inode, path: str) -> None:
        """Give an inode one more name."""
        spot = self.spot(path, follow=False)
        if spot.node is not None:
            fail(errno.EEXIST, path)
        self._check_writable(spot.path)
        assert spot.parent is not None
        spot.parent.attach(spot.name, inode)

    def make_folders(self, path: str, mode: int = 0o700) -> Inode:
        """Make a folder, and its parents, which others may not write; what exists is left as it is."""
        here = ""
        parts = [each for each in path.split("/") if each]
        for n_left, part in zip(reversed(range(len(parts))), parts, strict=True):
            here += "/" + part
            spot = self.spot(here)
            if spot.node is None:
                self._create(spot, "directory", mode & _PARENT_MODE if n_left else mode)
            elif spot.node.inode.kind != "directory":
                fail(errno.EEXIST if here == path else errno.ENOTDIR, path)
        return self.node(path).inode

    def rename(self, source: str, target: str) -> None:
        """Move an entry, with the errors that the system call of that name has."""
        old, new = self.spot(source, follow=False), self.spot(target, follow=False)
        if old.node is None:
            fail(errno.ENOENT, source)
        if old.parent is None or new.parent is None or old.path in self._mounts or new.path in self._mounts:
            fail(errno.EBUSY, source)
        if new.path.startswith(old.path + "/"):
            fail(errno.EINVAL, target)
        self._check_writable(old.path)
        self._check_writable(new.path)
        if new.node is not None:
            if new.node.inode is old.node.inode:
                return
            _check_replace(old.node, new.node, target)
        if isinstance(old.node, MergedNode) and old.node.lowers and old.node.inode.kind == "directory":
            fail(errno.EXDEV, source)
        inode = old.node.writable()
        if new.parent.writable().file_system is not inode.file_system:
            fail(errno.EXDEV, target)
        with inode.file_system.together():
            new.parent.attach(new.name, inode)
            if old.parent.inode is new.parent.inode:
                old = self.spot(source, follow=False)
            assert old.parent is not None
            old.parent.detach(old.name)

    def remove(self, path: str) -> None:
        """Remove a file or an empty folder. ENOENT, ENOTEMPTY, EBUSY."""
        spot = self.spot(path, follow=False)
        if spot.node is None:
            fail(errno.ENOENT, path)
        if spot.parent is None or spot.path in self._mounts:
            fail(errno.EBUSY, path)
        if spot.node.inode.kind == "directory" and spot.node.list_names():
            fail(errno.ENOTEMPTY, path)
        self._check_writable(spot.path)
        spot.parent.detach(spot.name)

    def remove_tree(self, path: str) -> None:
        """Remove a folder and all in it; EBUSY before anything is touched if a mount lies at or under it."""
        spot = self.spot(path, follow=False)
        if spot.node is None:
            fail(errno.ENOENT, path)
        if spot.parent is None or self.mounts_below(spot.path):
            fail(errno.EBUSY, path)
        self._check_writable(spot.path)
        self._empty(spot.node)
        spot.parent.detach(spot.name)

    def touched(self, path: str) -> None:
        """Tell who watches the folder of `path` that its content changed."""
        spot = self.spot(path)
        if spot.parent is not None:
            spot.parent.inode.notify(spot.name)

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    def _check_writable(self, path: str) -> None:
        """EROFS if the innermost mount that holds `path` is read-only."""
        while self._read_only:
            if path in self._mounts or path == "/":
                if path in self._read_only:
                    fail(errno.EROFS, path)
                return
            path = path.rpartition("/")[0] or "/"

    def _create(self, spot: Spot, kind: Kind, mode: int) -> Inode:
        self._check_writable(spot.path)
        assert spot.parent is not None
        if len(spot.name.encode(errors="surrogateescape")) > NAME_BYTES_MAX:
            fail(errno.ENAMETOOLONG, spot.path)
        inode = spot.parent.writable().file_system.new(kind, mode)
        spot.parent.attach(spot.name, inode)
        return inode

    def _empty(self, node: Node) -> None:
        if node.inode.kind != "directory":
            return
        for name in node.list_names():
            child = node.lookup(name)
            assert child is not None
            self._empty(child)
            node.detach(name)

    def _step(self, way: list[tuple[str, Node]], part: str, path: str) -> tuple[str, Node | None]:
        node = way[-1][1]
        if node.inode.kind != "directory":
            fail(errno.ENOTDIR, path)
        here = "/".join(name for name, _ in way) + "/" + part
        child = node.lookup(part)
        return here, None if child is None else self._top(here, child)

    def _top(self, path: str, node: Node) -> Node:
        stack = self._mounts.get(path)
        return stack[-1] if stack else node


def plain_view(root: Inode) -> View:
    """Return a view of one file system."""
    return View(PlainNode(root))


def fail(number: int, path: str) -> NoReturn:
    """Raise the OSError of an errno."""
    raise OSError(number, os.strerror(number), path)


def _pop(way: list[tuple[str, Node]]) -> bool:
    if len(way) > 1:
        way.pop()
    return True


def _check_replace(old: Node, new: Node, target: str) -> None:
    old_is_folder, new_is_folder = old.inode.kind == "directory", new.inode.kind == "directory"
    if new_is_folder and not old_is_folder:
        fail(errno.EISDIR, target)
    if old_is_folder and not new_is_folder:
        fail(errno.ENOTDIR, target)
    if new_is_folder and new.list_names():
        fail(errno.ENOTEMPTY, target)
