"""Direct I/O: opening past the page cache, and what the file system wants aligned.

The facts come from statx(2) (STATX_DIOALIGN, Linux 6.1); where that says nothing, from trying: a read at the smallest unit that works.
A file system that refuses is no failure: the file is then opened the ordinary way, and its `Alignment` says why.
"""

import ctypes
import errno
import mmap
import os
import struct
from typing import Final

from isopod.world.disk import Alignment

PAGE_BYTES: Final = mmap.PAGESIZE
UNITS: Final = (512, PAGE_BYTES)
NOT_DIRECT: Final = Alignment(False, 1, 1, "not asked for")
_STATX_DIOALIGN: Final = 0x2000
_STATX_BYTES: Final = 256
_ALIGNMENT: Final = struct.Struct("=II")
_ALIGNMENT_AT: Final = 152
"""stx_dio_mem_align and stx_dio_offset_align in struct statx."""
_AT_EMPTY_PATH: Final = 0x1000
_NOT_DIRECT: Final = (errno.EINVAL, errno.EOPNOTSUPP)


def open_aligned(path: str, flags: int, mode: int, *, direct: bool) -> tuple[int, Alignment]:
    """Open a file, directly if asked and possible.

    Args:
        path: The file.
        flags: Those of open(2), without O_DIRECT.
        mode: For a new file.
        direct: Whether to try.

    Returns:
        The descriptor and what its operations must keep to.
    """
    if not direct:
        return os.open(path, flags, mode), NOT_DIRECT
    try:
        fd = os.open(path, flags | os.O_DIRECT, mode)
    except OSError as error:
        if error.errno not in _NOT_DIRECT:
            raise
        # O_EXCL may have made the file before O_DIRECT was refused.
        return os.open(path, flags & ~os.O_EXCL, mode), Alignment(False, 1, 1, f"O_DIRECT was refused: {error.strerror}")
    return fd, facts(fd)


def facts(fd: int) -> Alignment:
    """Return what an O_DIRECT descriptor's operations must keep to; one whose file system cannot is switched back by fcntl(2)."""
    found = _from_statx(fd) or _from_trying(fd)
    if found is not None and found.is_direct:
        return found
    import fcntl

    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    return found or Alignment(False, 1, 1, "no direct read worked")


def _from_statx(fd: int) -> Alignment | None:
    """Return what statx says, None if it does not know."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if not hasattr(libc, "statx") or libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("=I", buffer.raw, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    memory_bytes, offset_bytes = _ALIGNMENT.unpack_from(buffer.raw, _ALIGNMENT_AT)
    if not memory_bytes or not offset_bytes:
        return Alignment(False, 1, 1, "statx: the file system takes no direct I/O on this file")
    if max(memory_bytes, offset_bytes) > PAGE_BYTES:
        return Alignment(False, 1, 1, f"statx: direct I/O in units of {max(memory_bytes, offset_bytes)} bytes, more than a page")
    return Alignment(True, memory_bytes, offset_bytes, "statx")


def _from_trying(fd: int) -> Alignment | None:
    with mmap.mmap(-1, 2 * PAGE_BYTES) as memory:
        for unit in UNITS:
            with memoryview(memory) as whole, whole[:unit] as target:
                try:
                    os.preadv(fd, [target], 0)
                except OSError as error:
                    if error.errno not in _NOT_DIRECT:
                        return Alignment(False, 1, 1, f"a direct read failed: {error.strerror}")
                    continue
                return Alignment(True, PAGE_BYTES, unit, f"a direct read of {unit} bytes worked")
    return None
