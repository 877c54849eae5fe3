"""SimWatches: which entries come and go in many folders of the simulated disk, bounded.

Changes that nobody read are told once; over `N_CHANGES_MAX` of them all become ("", ""): look at everything. The disk's `lose_changes` does
so at will, and its `watches_max` refuses more watches (ENOSPC), as fs.inotify.max_user_watches does.
"""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

from isopod.world.disk import FolderChange
from isopod.world.sim.inodes import Inode
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.view import fail

if TYPE_CHECKING:
    from isopod.world.sim.disk import SimDisk

N_CHANGES_MAX: Final = 4096


class SimWatches:
    """See `FolderWatches`.

    Args:
        disk: Whose folders.
        loop: The source of futures.
    """

    def __init__(self, disk: "SimDisk", loop: SimLoop) -> None:
        self._disk = disk
        self._loop = loop
        self._changes: dict[FolderChange, None] = {}
        self._watched: dict[str, tuple[Inode, Callable[[str], None]]] = {}
        self._waiter: asyncio.Future[None] | None = None

    def add(self, path: str) -> None:
        """See `FolderWatches.add`."""
        self._loop.owner().check()
        inode = self._disk.view.folder(path).inode
        known = self._watched.get(path)
        if known is not None and known[0] is inode:
            return
        self.remove(path)
        if self._disk.n_watches >= self._disk.watches_max:
            fail(errno.ENOSPC, path)

        def changed(name: str) -> None:
            if not name:
                self.remove(path)
            self._put(FolderChange(path, name))

        inode.watchers.append(changed)
        self._watched[path] = (inode, changed)
        self._disk.n_watches += 1

    def remove(self, path: str) -> None:
        """See `FolderWatches.remove`."""
        inode, changed = self._watched.pop(path, (None, None))
        if inode is None or changed is None:
            return
        self._disk.n_watches -= 1
        if changed in inode.watchers:  # a crash of the machine forgets them
            inode.watchers.remove(changed)

    def lose(self) -> None:
        """Lose the changes that were not read, as the kernel does when its queue is full."""
        self._changes = {}
        self._put(FolderChange("", ""))

    def close(self) -> None:
        """End all watches."""
        for path in list(self._watched):
            self.remove(path)

    def __aiter__(self) -> AsyncIterator[FolderChange]:
        """Iterate over the changes, for ever."""
        return self

    async def __anext__(self) -> FolderChange:
        """Return the next change."""
        while not self._changes:
            self._waiter = self._loop.create_future()
            await self._waiter
        change = next(iter(self._changes))
        del self._changes[change]
        return change

    def _put(self, change: FolderChange) -> None:
        if len(self._changes) >= N_CHANGES_MAX:
            self._changes = {FolderChange("", ""): None}
        self._changes[change] = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
