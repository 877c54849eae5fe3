"""Failures of the disk, wrapped once where the image store meets its port."""

from collections.abc import Iterator
from contextlib import contextmanager

from isopod.world.errors import from_os_error


@contextmanager
def disk_failures(action: str, target: str) -> Iterator[None]:
    """Turn an OSError of the block into DiskFull or KernelError.

    Args:
        action: What is attempted, in words.
        target: On which file or folder.
    """
    try:
        yield
    except OSError as error:
        raise from_os_error(error, action, target) from error
