"""The disks of a simulated guest: image layers it only reads, and ext4 file systems whose bytes lie in a file of the host.

An ext4 image is a superblock of one sector and a tar of the tree. The guest's kernel keeps what was changed in its memory and writes it
back at `sync`, at a clean end, and every few seconds; each time it flushes, so that what was written back survives a power cut of the host
as far as the host's disk keeps its promises. What was not written back is lost when the guest dies; never a part of it, as ext4's journal
promises. Not modelled: sockets, which a tree in an image does not keep, and times below a second.

Source: the ext4 data structures in the kernel's documentation, for the place of the superblock and its magic.
"""

import errno
import zlib
from collections.abc import Callable
from typing import Final

import msgspec

from isopod.world.disk import UnpackLimits
from isopod.world.sim import indexes, layers
from isopod.world.sim.inodes import FileSystem, Inode
from isopod.world.sim.machine import Machine
from isopod.world.sim.view import fail

SUPERBLOCK_OFFSET: Final = 1024
SUPERBLOCK_BYTES: Final = 512
_FIRST_DATA: Final = 4096
_MAGIC: Final = 0xEF53
_OVERHEAD: Final = 0.05
"""What inode tables and the journal take of an image."""
_LAYER_BYTES: Final = 1 << 40


class Superblock(msgspec.Struct):
    """Where the tree lies, and what the file system may hold."""

    n_bytes: int
    at: int = _FIRST_DATA
    length: int = 0
    checksum: int = 0
    magic: int = _MAGIC


def make_ext4(inode: Inode, n_bytes: int, tree: bytes = b"") -> None:
    """Write an ext4 file system into a file, holding `tree` (a tar) or nothing."""
    inode.resize(n_bytes)
    _store(inode, Superblock(n_bytes), tree)


class Ext4:
    """A mounted ext4 image.

    Args:
        machine: Whose disk the image lies on.
        path: Where.
        now_ns: The guest's clock.
        tree: What the mounted tree is, where that is not what the image holds: the guest's memory knew better. None: what it holds.
    """

    def __init__(self, machine: Machine, path: str, now_ns: Callable[[], int], *, tree: bytes | None = None) -> None:
        self._machine = machine
        self._path = path
        self._now_ns = now_ns
        self._is_dirty = tree is not None
        self._inode = machine.view.open_file(path)
        self._superblock = _read_superblock(self._inode, path)
        self.file_system = FileSystem(int(self._superblock.n_bytes * (1 - _OVERHEAD)), self._touch)
        self.is_read_only = False
        held = self._read_tree() if tree is None else tree
        if held:
            layers.unpack(held, self.file_system.root, UnpackLimits())
        self._is_dirty = tree is not None

    @property
    def root(self) -> Inode:
        """Its root folder."""
        return self.file_system.root

    @property
    def is_dirty(self) -> bool:
        """Whether memory and image differ."""
        return self._is_dirty

    def pack(self) -> bytes:
        """Return the tree as it is now, as a tar."""
        return layers.pack(self.root, self._path, UnpackLimits())[1]

    def write_back(self) -> None:
        """Write what changed into the image, and flush it. EIO, ENOSPC: the host's disk refused."""
        if self.is_read_only or not self._is_dirty:
            return
        disk = self._machine.disk
        disk.faults.check("write", self._path)
        self._superblock = _store(self._inode, self._superblock, self.pack(), flush=False)
        self._is_dirty = False
        disk.sync_inode(self._inode, self._inode.content.mark(), self._path)

    def _touch(self) -> int:
        self._is_dirty = True
        return self._now_ns()

    def _read_tree(self) -> bytes:
        block = self._superblock
        data = self._inode.content.read(block.at, block.length)
        if zlib.crc32(data) != block.checksum:
            fail(errno.EUCLEAN, self._path)
        return data


def mount_layer(machine: Machine, index: str, tar: str | None) -> Inode:
    """Return the tree of an image's layer as a guest reads it from its disks; equal files are read once.

    Args:
        machine: Whose files they are.
        index: The EROFS index.
        tar: The layer's tar. None is a whole image, of which the simulation has none.

    Raises:
        OSError: EINVAL: it is no index of this tar. EUCLEAN: the tar is damaged.
    """
    if tar is None:
        fail(errno.EINVAL, index)
    contents = []
    for path in (index, tar):
        inode = machine.view.open_file(path)
        machine.disk.faults.check_read(inode, path, 0, inode.content.size)
        contents.append(inode.content.read(0, inode.content.size))
    key = (zlib.crc32(contents[0]), zlib.crc32(contents[1]))
    if key not in machine.layer_trees:
        root = FileSystem(_LAYER_BYTES, machine.clock.now_ns).root
        indexes.fill(root, contents[0], contents[1], index)
        machine.layer_trees[key] = root
    return machine.layer_trees[key]


def _read_superblock(inode: Inode, path: str) -> Superblock:
    data = inode.content.read(SUPERBLOCK_OFFSET, SUPERBLOCK_BYTES).rstrip(b"\0")
    try:
        block = msgspec.json.decode(data, type=Superblock)
    except (msgspec.DecodeError, UnicodeDecodeError):
        fail(errno.EINVAL, path)
    if block.magic != _MAGIC or block.n_bytes > inode.content.size:
        fail(errno.EUCLEAN, path)
    return block


def _store(inode: Inode, old: Superblock, tree: bytes, *, flush: bool = True) -> Superblock:
    """Write a tree where the old one is not, then, with that durable, the superblock that leads to it."""
    fits_before = old.at >= _FIRST_DATA + len(tree)
    at = _FIRST_DATA if fits_before or not old.length else _round_up(old.at + old.length)
    if at + len(tree) > old.n_bytes:
        fail(errno.ENOSPC, "ext4")
    inode.write_at(at, tree)
    inode.sync_data()
    new = Superblock(old.n_bytes, at, len(tree), zlib.crc32(tree))
    inode.write_at(SUPERBLOCK_OFFSET, msgspec.json.encode(new).ljust(SUPERBLOCK_BYTES, b"\0"))
    if flush:
        inode.sync_data()
    return new


def _round_up(offset: int) -> int:
    return -(-offset // SUPERBLOCK_BYTES) * SUPERBLOCK_BYTES
