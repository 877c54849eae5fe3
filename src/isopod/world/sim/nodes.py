"""Nodes: what a path leads to, whether it lies on a plain file system or in an overlay.

`PlainNode` is one inode. `MergedNode` is the union of an upper and some lower folders by the rules of overlayfs: the topmost name wins,
folders of one name merge, a whiteout or an opaque folder hides what lies below, and whatever is written is copied up first.
Source: the kernel's Documentation/filesystems/overlayfs.rst. Not modelled: redirected folders, metacopy, inode number composition.
"""

import errno
import os
from collections.abc import Sequence
from typing import Protocol

from isopod.world.sim.inodes import OPAQUE, Inode


class Node(Protocol):
    """A file or folder found by its path."""

    @property
    def inode(self) -> Inode:
        """The inode whose bytes and attributes are seen."""

    def lookup(self, name: str) -> "Node | None":
        """Return the entry of that name in this folder."""

    def list_names(self) -> list[str]:
        """Return the names in this folder, sorted."""

    def writable(self) -> Inode:
        """Return the inode to change: in an overlay it is copied up first."""

    def attach(self, name: str, inode: Inode) -> None:
        """Name an inode in this folder."""

    def detach(self, name: str) -> None:
        """Take a name out of this folder."""


class PlainNode:
    """A node that is one inode."""

    __slots__ = ("inode",)

    def __init__(self, inode: Inode) -> None:
        self.inode = inode

    def lookup(self, name: str) -> Node | None:
        """Return the entry of that name in this folder."""
        found = self.inode.names.get(name)
        return None if found is None else PlainNode(found)

    def list_names(self) -> list[str]:
        """Return the names in this folder, sorted."""
        return sorted(self.inode.names)

    def writable(self) -> Inode:
        """Return the inode to change."""
        return self.inode

    def attach(self, name: str, inode: Inode) -> None:
        """Name an inode in this folder."""
        self.inode.attach(name, inode)

    def detach(self, name: str) -> None:
        """Take a name out of this folder."""
        self.inode.detach(name)


class MergedNode:
    """A node of an overlay.

    Args:
        upper: The writable layer's inode, or None where nothing was copied up yet.
        lowers: The read-only inodes, the topmost first. Only folders have more than one.
        parent: The folder it was found in and its name there, or None for the overlay's root.
    """

    __slots__ = ("lowers", "parent", "upper")

    def __init__(self, upper: Inode | None, lowers: Sequence[Inode], parent: "tuple[MergedNode, str] | None" = None) -> None:
        self.upper = upper
        self.lowers = tuple(lowers)
        self.parent = parent

    @property
    def inode(self) -> Inode:
        """The topmost inode."""
        return self.upper if self.upper is not None else self.lowers[0]

    def lookup(self, name: str) -> Node | None:
        """Return the merged entry of that name."""
        upper = self.upper.names.get(name) if self.upper is not None else None
        if upper is not None and (upper.is_whiteout or upper.kind != "directory"):
            return None if upper.is_whiteout else MergedNode(upper, (), (self, name))
        hidden = (self.upper is not None and self.upper.is_opaque) or (upper is not None and upper.is_opaque)
        lowers = [] if hidden else _merge_lowers(self.lowers, name, only_folders=upper is not None)
        if upper is None and not lowers:
            return None
        return MergedNode(upper, lowers, (self, name))

    def list_names(self) -> list[str]:
        """Return the merged names, sorted."""
        names: dict[str, None] = {}
        layers = [] if self.upper is None else [self.upper]
        for layer in (*layers, *self.lowers):
            names.update(dict.fromkeys(layer.names))
            if layer.is_opaque:
                break
        return sorted(name for name in names if self.lookup(name) is not None)

    def writable(self) -> Inode:
        """Return the upper inode, copying up this node and the folders that lead to it."""
        if self.upper is None:
            if self.parent is None:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            parent, name = self.parent
            self.upper = _copy_up(self.lowers[0], parent.writable(), name)
        return self.upper

    def attach(self, name: str, inode: Inode) -> None:
        """Name an inode in the upper folder; a folder that replaces a lower one is opaque."""
        upper = self.writable()
        if inode.kind == "directory" and any(name in lower.names for lower in self.lowers):
            inode.xattrs[OPAQUE] = b"y"
        upper.attach(name, inode)

    def detach(self, name: str) -> None:
        """Take a name out: removed above, hidden by a whiteout where a lower layer has it."""
        upper = self.writable()
        if _merge_lowers(self.lowers, name, only_folders=False) and not upper.is_opaque:
            whiteout = upper.file_system.new("device", 0)
            upper.attach(name, whiteout)
        else:
            upper.detach(name)


def _merge_lowers(layers: Sequence[Inode], name: str, *, only_folders: bool) -> list[Inode]:
    found: list[Inode] = []
    for layer in layers:
        inode = layer.names.get(name)
        if inode is not None:
            if inode.is_whiteout:
                break
            if inode.kind != "directory":
                return found if found or only_folders else [inode]
            found.append(inode)
            if inode.is_opaque:
                break
        if layer.is_opaque:
            break
    return found


def _copy_up(source: Inode, parent: Inode, name: str) -> Inode:
    copy = parent.file_system.new(source.kind, source.mode)
    copy.uid, copy.gid, copy.target, copy.device = source.uid, source.gid, source.target, source.device
    copy.xattrs = {key: value for key, value in source.xattrs.items() if key != OPAQUE}
    copy.fill(bytes(source.data))
    parent.attach(name, copy)
    return copy
