"""SimPages: the Pages port of the simulation: shared bytearrays by path.

Legal behaviours: pages outlive the process that made them, as files do; a power cut ends them all, as it does a tmpfs. There is one thread.
Not modelled: full file systems, permissions.
"""

import errno
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext


class SimPage:
    """One mapping.

    Args:
        view: The page's bytes.
    """

    __slots__ = ("view",)

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def close(self) -> None:
        """Nothing to give back."""


class SimPages:
    """The Pages port in memory. `stored` belongs to the test, which may damage pages."""

    def __init__(self) -> None:
        self.stored: dict[str, bytearray] = {}

    def create(self, path: str, n_bytes: int, head: bytes) -> SimPage:
        """See `Pages.create`."""
        self.stored[path] = bytearray(head.ljust(n_bytes, b"\0"))
        return SimPage(memoryview(self.stored[path]))

    def open(self, path: str) -> SimPage:
        """See `Pages.open`."""
        found = self.stored.get(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if not found:
            raise OSError(errno.EINVAL, "not a page", path)
        return SimPage(memoryview(found).toreadonly())

    def names(self, folder: str) -> Sequence[str]:
        """See `Pages.names`."""
        return sorted(path.rpartition("/")[2] for path in self.stored if path.rpartition("/")[0] == folder)

    def remove(self, path: str) -> None:
        """See `Pages.remove`."""
        self.stored.pop(path, None)

    def writer_id(self) -> int:
        """See `Pages.writer_id`."""
        return 0

    def lock(self) -> AbstractContextManager[object]:
        """See `Pages.lock`."""
        return nullcontext()

    def reset(self) -> None:
        """Lose everything: the machine lost its power."""
        self.stored.clear()
