"""The host's mapped pages: small files, best on a tmpfs such as /run. Sources: mmap(2), rename(2), ftruncate(2).

A new page is written under a hidden name and renamed: a crash leaves a hidden file, which `names` does not show and the next `create` of
the same page replaces. Calls are quick (no fsync, a few pages of memory) and run inline.
"""

import contextlib
import errno
import mmap
import os
import stat
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Final

from isopod.world.host import files

_HIDDEN: Final = ".new-"
_FOLDER_MODE: Final = 0o700
_FILE_MODE: Final = 0o600


class HostPage:
    """One mapping.

    Args:
        mapping: The mapped file.
    """

    __slots__ = ("_mapping", "view")

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self.view = memoryview(mapping)

    def close(self) -> None:
        """See `Page.close`."""
        # Somebody still holds a view: the mapping ends with the last of them.
        with contextlib.suppress(BufferError):
            self.view.release()
            self._mapping.close()


class HostPages:
    """`Pages` by files."""

    def create(self, path: str, n_bytes: int, head: bytes) -> HostPage:
        """See `Pages.create`."""
        folder, name = os.path.split(path)
        files.make_directory(folder, _FOLDER_MODE)
        hidden = f"{folder}/{_HIDDEN}{name}"
        files.remove(hidden)
        fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, _FILE_MODE)
        try:
            # Blocks are taken now: a store into a hole of a full file system would end the process by SIGBUS.
            os.posix_fallocate(fd, 0, n_bytes)
            os.pwrite(fd, head, 0)
            mapping = mmap.mmap(fd, n_bytes)
            os.rename(hidden, path)
        except BaseException:
            files.remove(hidden)
            raise
        finally:
            os.close(fd)
        return HostPage(mapping)

    def open(self, path: str) -> HostPage:
        """See `Pages.open`."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode) or not facts.st_size:
                raise OSError(errno.EINVAL, "not a page", path)
            return HostPage(mmap.mmap(fd, facts.st_size, prot=mmap.PROT_READ))
        finally:
            os.close(fd)

    def names(self, folder: str) -> Sequence[str]:
        """See `Pages.names`."""
        return [name for name in files.list_names(folder) if not name.startswith(_HIDDEN)]

    def remove(self, path: str) -> None:
        """See `Pages.remove`."""
        files.remove(path)

    def writer_id(self) -> int:
        """See `Pages.writer_id`."""
        return threading.get_ident()

    def lock(self) -> AbstractContextManager[object]:
        """See `Pages.lock`."""
        return threading.Lock()
