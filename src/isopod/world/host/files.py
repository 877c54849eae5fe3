"""Plain calls on files, blocking, without the loop: what `HostDisk` does inline or hands to its threads.

`write_atomic` writes a nameless file (O_TMPFILE): a crash or a full disk before it is linked leaves nothing behind. A file system
without nameless files gets a hidden temporary name, removed on failure. Sources: open(2), linkat(2), fsync(2), rename(2).
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from typing import Final

from isopod.world.disk import Data
from isopod.world.host import libc

TEMPORARY_PREFIX: Final = ".isopod-tmp-"
"""A crash between link and rename can leave one file of such a name; `list_names` does not show it."""
PARENT_MODE: Final = 0o755
"""What a folder's mode may at most give to the parents that are made for it."""
_COPY_BYTES: Final = 1 << 20
_KERNEL_COPY_BYTES: Final = 16 << 20
_NO_COPY_RANGE: Final = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def read_file(path: str, n_bytes_max: int) -> bytes:
    """Return a whole file; EFBIG over the bound. Never waits for the writer of a FIFO."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        expected = os.fstat(fd).st_size
        if expected > n_bytes_max:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        return _read_to_end(fd, path, n_bytes_max=n_bytes_max, n_bytes_first=expected + 1)
    finally:
        os.close(fd)


def read_file_beneath(root: str, path: str, n_bytes_max: int) -> bytes:
    """Return a regular file below `root`, symlinks resolved inside it. It is looked at before it is opened: devices are left alone."""
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = libc.open_in_root(root_fd, path, os.O_PATH)
    finally:
        os.close(root_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
        return read_file(f"/proc/self/fd/{fd}", n_bytes_max)
    finally:
        os.close(fd)


def write_file(path: str, data: bytes, mode: int) -> None:
    """Create or replace a file in place."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        write_all(fd, data)
    finally:
        os.close(fd)


def write_atomic(path: str, data: bytes, mode: int) -> None:
    """Create or replace a file so that a crash leaves the old one or the new one."""
    folder, name = os.path.split(path)
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        temporary = TEMPORARY_PREFIX + secrets.token_hex(8)
        try:
            _write_durable(folder_fd, temporary, data, mode=mode)
            os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        except BaseException:
            _unlink_quietly(temporary, folder_fd)
            raise
        os.fsync(folder_fd)
    finally:
        os.close(folder_fd)


def write_all(fd: int, data: Data) -> None:
    """Write all of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def copy_file(source: str, target: str, mode: int, check: Callable[[], None]) -> int:
    """Copy a regular file to a new one, by copy_file_range(2) where the file systems can; `check` may raise to stop. Returns the size."""
    with contextlib.ExitStack() as stack:
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, source_fd)
        if not stat.S_ISREG(os.fstat(source_fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", source)
        target_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        stack.callback(os.close, target_fd)
        try:
            return _copy_bytes(source_fd, target_fd, check)
        except BaseException:
            os.unlink(target)
            raise


def compress_file(source: str, target: str, level: int, *, mode: int, check: Callable[[], None]) -> int:
    """Write a file's bytes as one zstd frame to a new, durable file; `check` may raise to stop. Returns the number of bytes written."""
    import zstandard  # what need not compress need not pay for it

    with contextlib.ExitStack() as stack:
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, source_fd)
        target_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        stack.callback(os.close, target_fd)
        try:
            n_written = 0
            packer = zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj(size=os.fstat(source_fd).st_size)
            while data := os.read(source_fd, _COPY_BYTES):
                packed = packer.compress(data)
                write_all(target_fd, packed)
                n_written += len(packed)
                check()
            packed = packer.flush()
            write_all(target_fd, packed)
            os.fsync(target_fd)
            return n_written + len(packed)
        except BaseException:
            os.unlink(target)
            raise


def list_names(path: str) -> list[str]:
    """Return the sorted names in a folder, [] if there is none."""
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith(TEMPORARY_PREFIX))
    except FileNotFoundError:
        return []


def make_directory(path: str, mode: int) -> None:
    """Create a folder with `mode` and its missing parents with `mode & PARENT_MODE`; a folder that exists is left as it is."""
    try:
        os.mkdir(path, mode)
    except FileNotFoundError:
        parent = os.path.dirname(path)
        if os.path.isdir(parent):  # it is there, and takes no folders: below /proc
            raise
        make_directory(parent, mode & PARENT_MODE)
        make_directory(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
    else:
        _set_folder_mode(path, mode)


def remove(path: str) -> None:
    """Remove a file or an empty folder; nothing there is fine."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        _remove_folder(path)


def sync_directory(path: str) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_bytes(source_fd: int, target_fd: int, check: Callable[[], None]) -> int:
    n_bytes = 0
    try:
        while n_copied := os.copy_file_range(source_fd, target_fd, _KERNEL_COPY_BYTES):
            n_bytes += n_copied
            check()
    except OSError as error:
        if error.errno not in _NO_COPY_RANGE:
            raise
    # Files of /proc say that they are empty, and some kernels believe it: reading is what tells.
    while data := os.pread(source_fd, _COPY_BYTES, n_bytes):
        os.lseek(target_fd, n_bytes, os.SEEK_SET)
        write_all(target_fd, data)
        n_bytes += len(data)
        check()
    return n_bytes


def _set_folder_mode(path: str, mode: int) -> None:
    """Undo what the umask took from a new folder, through a descriptor: a link put in its place meanwhile is refused."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def _remove_folder(path: str) -> None:
    """Remove an empty folder; one that a crash left with nothing but our temporary files counts as empty."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENOTEMPTY or list_names(path):
            raise
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)


def _read_to_end(fd: int, path: str, *, n_bytes_max: int, n_bytes_first: int) -> bytes:
    """Read on until the end: the size of files in /proc says nothing."""
    chunks: list[bytes] = []
    n_bytes = 0
    while chunk := os.read(fd, n_bytes_first if not chunks and n_bytes_first > 1 else _COPY_BYTES):
        chunks.append(chunk)
        n_bytes += len(chunk)
        if n_bytes > n_bytes_max:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _write_durable(folder_fd: int, name: str, data: bytes, *, mode: int) -> None:
    """Make `name` in the folder a file with durable `data`."""
    try:
        fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=folder_fd)
        is_named = False
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=folder_fd)
        is_named = True
    try:
        os.fchmod(fd, mode)
        write_all(fd, data)
        os.fsync(fd)
        if not is_named:  # naming the target folder by its fd is what makes Python call linkat(2), which can follow the link
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder_fd, follow_symlinks=True)
    finally:
        os.close(fd)


def _unlink_quietly(name: str, folder_fd: int) -> None:
    """Clean up after a failure: that failure is the one to be told."""
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder_fd)
