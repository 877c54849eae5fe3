"""Changes in one folder, or in many, by inotify(7).

Names are coalesced while nobody reads them, so memory stays bounded; too many of them, or the kernel's own overflow, become one "":
look at everything. The folder's own end is told the same way; of many folders it is told which one ended.
"""

import os
import struct
from collections.abc import AsyncIterator, Iterator
from typing import Final

from isopod.world.disk import FolderChange
from isopod.world.host import libc
from isopod.world.host.readiness import Readiness

N_NAMES_MAX: Final = 4096

_MODIFY: Final = 0x2
_CLOSE_WRITE: Final = 0x8
_MOVED_FROM: Final = 0x40
_MOVED_TO: Final = 0x80
_CREATE: Final = 0x100
_DELETE: Final = 0x200
_DELETE_SELF: Final = 0x400
_Q_OVERFLOW: Final = 0x4000
_IGNORED: Final = 0x8000
_ONLYDIR: Final = 0x01000000
_MASK: Final = _MODIFY | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _ONLYDIR
_ENTRIES_MASK: Final = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _ONLYDIR
_HEADER: Final = struct.Struct("=iIII")
_READ_BYTES: Final = 64 << 10


class FolderWatch:
    """One inotify instance on one folder; iterate over it, and close it.

    Args:
        path: The folder.
        n_names_max: Names kept for a slow reader; one more and all of them become "".
    """

    def __init__(self, path: str, *, n_names_max: int = N_NAMES_MAX) -> None:
        self._n_names_max = n_names_max
        self._fd = libc.open_inotify(path, _MASK)
        self._ready = Readiness(self._fd)
        self._names: dict[str, None] = {}

    def __aiter__(self) -> AsyncIterator[str]:
        """Iterate until closed."""
        return self

    async def __anext__(self) -> str:
        """Return the next name."""
        while not self._names:
            if self._ready.closed:
                raise StopAsyncIteration
            if not self._read():
                await self._ready.wait_readable()
        name = next(iter(self._names))
        del self._names[name]
        self._read()
        return name

    def close(self) -> None:
        """End the watch, and whoever iterates."""
        if not self._ready.closed:
            self._ready.close()
            os.close(self._fd)

    def _read(self) -> bool:
        """Take over what the kernel has ready; False if it has nothing."""
        if self._ready.closed:
            return False
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        for name in parse_events(data):
            if name == "" or len(self._names) >= self._n_names_max:
                self._names = {"": None}
            else:
                self._names[name] = None
        return True


class ManyFoldersWatch:
    """One inotify instance on any number of folders; iterate over it, and close it.

    Two paths may lead to one folder: the kernel has one watch for it, and both are told.

    Args:
        n_changes_max: Changes kept for a slow reader; one more and all of them become ("", "").
    """

    def __init__(self, *, n_changes_max: int = N_NAMES_MAX) -> None:
        self._n_changes_max = n_changes_max
        self._fd = libc.new_inotify()
        self._ready = Readiness(self._fd)
        self._changes: dict[FolderChange, None] = {}
        self._numbers: dict[str, int] = {}
        self._paths: dict[int, list[str]] = {}

    def add(self, path: str) -> None:
        """See `FolderWatches.add`."""
        number = libc.add_inotify(self._fd, path, _ENTRIES_MASK)
        if self._numbers.get(path) == number:
            return
        self.remove(path)  # the path leads to another folder now
        self._numbers[path] = number
        self._paths.setdefault(number, []).append(path)

    def remove(self, path: str) -> None:
        """See `FolderWatches.remove`."""
        number = self._numbers.pop(path, None)
        if number is None:
            return
        paths = self._paths[number]
        paths.remove(path)
        if not paths:
            del self._paths[number]
            libc.remove_inotify(self._fd, number)

    def __aiter__(self) -> AsyncIterator[FolderChange]:
        """Iterate until closed."""
        return self

    async def __anext__(self) -> FolderChange:
        """Return the next change."""
        while not self._changes:
            if self._ready.closed:
                raise StopAsyncIteration
            if not self._read():
                await self._ready.wait_readable()
        change = next(iter(self._changes))
        del self._changes[change]
        return change

    def close(self) -> None:
        """End all watches, and whoever iterates."""
        if not self._ready.closed:
            self._ready.close()
            os.close(self._fd)

    def _read(self) -> bool:
        """Take over what the kernel has ready; False if it has nothing."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        for number, mask, name in _events(data):
            if mask & _Q_OVERFLOW:
                self._changes = {FolderChange("", ""): None}
                continue
            if mask & _IGNORED:
                self._end(number)
            for path in self._paths.get(number, ()):
                if name:
                    self._put(FolderChange(path, name))
        return True

    def _end(self, number: int) -> None:
        """A folder is gone, and the kernel's watch with it."""
        for path in self._paths.pop(number, ()):
            del self._numbers[path]
            self._put(FolderChange(path, ""))

    def _put(self, change: FolderChange) -> None:
        if len(self._changes) >= self._n_changes_max:
            self._changes = {FolderChange("", ""): None}
        self._changes[change] = None


def parse_events(data: bytes) -> Iterator[str]:
    """Yield the names in a buffer of inotify events, "" for an overflow or the end of the folder itself."""
    for _, mask, name in _events(data):
        if mask & (_Q_OVERFLOW | _DELETE_SELF):
            yield ""
        elif name:
            yield name


def _events(data: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield watch, mask and name of each event in a buffer."""
    offset = 0
    while offset < len(data):
        number, mask, _, n_bytes = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size
        name = data[offset : offset + n_bytes].rstrip(b"\0")
        offset += n_bytes
        yield number, mask, os.fsdecode(name)
