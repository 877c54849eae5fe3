"""Indexes of layers in the simulation: not EROFS, but a mark that names its tar; mounting one unpacks that tar into memory.

What holds of the real ones holds here: an index is small, belongs to one tar, is refused when it is not one, shows what the tar holds at
the time of mounting, and cannot be written to.
"""

import errno
import hashlib
from typing import Final

from isopod.world.disk import Indexed, Unpacked, UnpackLimits
from isopod.world.errors import BadArchive
from isopod.world.sim import layers
from isopod.world.sim.inodes import FileSystem, Inode
from isopod.world.sim.view import fail

_MARK: Final = b"simulated index of "
_BLOCK_BYTES: Final = 512


def make(blob: bytes, limits: UnpackLimits) -> tuple[Indexed, bytes, bytes]:
    """Return a layer's facts, its padded tar and its index.

    Args:
        blob: The layer, plain or compressed.
        limits: Bounds on what it may become.

    Raises:
        BadArchive: An entry is unsafe, damaged or over a limit.
    """
    layer: Unpacked = layers.unpack(blob, FileSystem(1 << 62, lambda: 0, volatile=True).root, limits)
    tar = layers.decompress(blob, limits)
    tar += bytes(-len(tar) % _BLOCK_BYTES)
    index = _MARK + f"{len(tar)} bytes, {layer.diff_id}".encode()
    index += bytes(-len(index) % _BLOCK_BYTES)
    return Indexed(layer, len(tar), len(index), "sha256:" + hashlib.sha256(index).hexdigest()), tar, index


def fill(root: Inode, index: bytes, tar: bytes, path: str) -> None:
    """Fill the root of a file system with what an index and its tar stand for.

    Args:
        root: The folder.
        index: The index.
        tar: The tar.
        path: Of the index, for errors.

    Raises:
        OSError: EINVAL: it is no index, or not of this tar. EUCLEAN: the tar is damaged.
    """
    if not index.startswith(_MARK + f"{len(tar)} bytes, ".encode()):
        fail(errno.EINVAL, path)
    try:
        layers.unpack(tar, root, UnpackLimits())
    except BadArchive:
        fail(errno.EUCLEAN, path)
