"""System calls that Python 3.11 has no name for, through libc: inotify, openat2, syncfs, mounts of a program's own, and unshare.

They stay here, and out of the Rust core, because each is one call without a loop.
Sources: inotify(7), openat2(2), syncfs(2), mount(2), unshare(2).
"""

import ctypes
import errno
import functools
import os
from typing import Final

CLONE_FS: Final = 0x200
CLONE_NEWNS: Final = 0x20000
MS_RDONLY: Final = 0x1
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
SYS_OPENAT2: Final = 437
"""The same on every architecture, as all calls added since Linux 5.1."""
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10
N_RACES_MAX: Final = 32


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Open `path` with every symlink resolved as if the folder `root_fd` were "/"; return the descriptor, close-on-exec.

    Raises:
        OSError: EAGAIN if renames under it raced with each of many attempts: the kernel would rather fail than lead outside.
    """
    return _openat2(root_fd, path, flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)


def open_beneath(root_fd: int, path: str, flags: int) -> int:
    """Open `path`, which is relative, inside the folder `root_fd` without following any symlink; return the descriptor, close-on-exec.

    Raises:
        OSError: ELOOP for a symlink, EXDEV for what leads outside, EAGAIN as `open_in_root`.
    """
    return _openat2(root_fd, path, flags, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)


def _openat2(root_fd: int, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    libc = _libc()
    for _ in range(N_RACES_MAX):
        fd: int = libc.syscall(SYS_OPENAT2, root_fd, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno.EAGAIN:
            break
    raise _last_error(path)


def open_inotify(path: str, mask: int) -> int:
    """Return a non-blocking inotify descriptor that watches `path`."""
    fd = new_inotify()
    try:
        add_inotify(fd, path, mask)
    except BaseException:
        os.close(fd)
        raise
    return fd


def new_inotify() -> int:
    """Return a non-blocking inotify descriptor that watches nothing yet."""
    fd: int = _libc().inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise _last_error("inotify_init1")
    return fd


def add_inotify(fd: int, path: str, mask: int) -> int:
    """Let an inotify descriptor watch `path` too; return the number of the watch, which is that of the inode."""
    number: int = _libc().inotify_add_watch(fd, os.fsencode(path), mask)
    if number < 0:
        raise _last_error(path)
    return number


def remove_inotify(fd: int, number: int) -> None:
    """End one watch of an inotify descriptor; one that has ended by itself is fine."""
    _libc().inotify_rm_watch(fd, number)


def sync_file_system(path: str) -> None:
    """Make durable all that was written to the file system of `path`: one wait for the device, however many files."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc().syncfs(fd) != 0:
            raise _last_error(path)
    finally:
        os.close(fd)


def unshare_file_system_state() -> None:
    """Give the calling thread a root, working folder and umask of its own, so that it alone may enter a mount namespace."""
    if _libc().unshare(CLONE_FS) != 0:
        raise _last_error("unshare(CLONE_FS)")


def unshare_mounts() -> None:
    """Give the process mounts of its own, which nobody else sees and which end with it; it must have one thread."""
    if _libc().unshare(CLONE_NEWNS) != 0:
        raise _last_error("unshare(CLONE_NEWNS)")
    _mount("none", "/", MS_REC | MS_PRIVATE)


def bind_mount(source: str, target: str) -> None:
    """Show a file or folder, with what is mounted in it, at another place."""
    _mount(source, target, MS_BIND | MS_REC)


def make_read_only(target: str) -> None:
    """Let nobody write through what is mounted at a place; what is mounted in it is not concerned."""
    _mount("none", target, MS_REMOUNT | MS_BIND | MS_RDONLY)


def _mount(source: str, target: str, flags: int) -> None:
    if _libc().mount(os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None) != 0:
        raise _last_error(source if flags & MS_BIND else target)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _last_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), what)
