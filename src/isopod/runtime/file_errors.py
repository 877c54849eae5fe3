"""Where the OSErrors of the Disk port become errors of the tree, once, for everything in `isopod.runtime` that works on files."""

import errno
from typing import Self

from isopod.world.errors import AlreadyExists, NotFound, from_os_error


class wrapping:  # noqa: N801 - used as a word: `with wrapping("read", path):`
    """Turns an OSError of the block into an error of the tree: `NotFound`, `AlreadyExists`, `DiskFull`, else `KernelError`.

    A class, since a generator would cost more than a read from the page cache.

    Args:
        action: What is attempted, in words.
        path: On what.
    """

    __slots__ = ("_action", "_path")

    def __init__(self, action: str, path: str) -> None:
        self._action = action
        self._path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno == errno.ENOENT:
            raise NotFound("file", self._path) from error
        if error.errno == errno.EEXIST:
            raise AlreadyExists("file", self._path) from error
        raise from_os_error(error, self._action, self._path) from error
