"""LayerMounts: layers that are mounted from their files, each once, for all containers that need it.

A layer's files are its tar and an EROFS index over it; it is mounted read-only at `FOLDER/NAME` when a container first needs it, and
stays mounted until the layer is removed or the node ends with nothing running. The mounts belong to the node's mount namespace and
outlive the daemon: `open` finds them again. An overlay holds on to its layers by itself: what is unmounted here goes on for who uses it.

Whether layers can be mounted so is found out by doing it once (`open`): the kernel must know EROFS, mount it from files (Linux 6.12) on
the file system where the layers lie, and put an overlay on it. Source: the kernel's Documentation/filesystems/erofs.rst.
"""

from collections.abc import Callable
from typing import Final

from isopod.api.messages import Probed
from isopod.world.errors import IsopodError
from isopod.world.world import World

_TRIAL: Final = "trial"
_TRIAL_MERGED: Final = "trial-merged"
_TRIAL_TAR: Final = bytes(1024)
"""The end of an archive of nothing."""


class LayerMounts:
    """The mounts of one image store. Use `open`.

    Args:
        world: The kernel they live in.
        folder: The mount points' folder, theirs alone; it need not survive a reboot.
    """

    def __init__(self, world: World, folder: str) -> None:
        self._kernel = world.kernel
        self._disk = world.disk
        self._folder = folder
        self._mounted: dict[str, None] = {}

    async def open(self, is_wanted: Callable[[str], bool]) -> None:
        """Find what an earlier daemon left mounted; unmount what is not wanted.

        Args:
            is_wanted: Whether a layer of that name is kept as files.
        """
        await self._disk.make_directory(self._folder)
        for path in self._kernel.mounts_below(self._folder):
            name = path.removeprefix(f"{self._folder}/")
            if is_wanted(name):
                self._mounted[name] = None
            else:
                await self._kernel.unmount(path)

    async def probe(self, tmp: str) -> Probed:
        """Find out how layers are best kept here: mount a layer of nothing, and an overlay on it.

        Args:
            tmp: A folder where the layers lie; nothing of it is left.

        Returns:
            "erofs" or "directory", and why.
        """
        if not self._kernel.erofs_supported():
            return Probed(value="directory", why="the kernel does not know EROFS")
        trial, merged = f"{self._folder}/{_TRIAL}", f"{self._folder}/{_TRIAL_MERGED}"
        try:
            for path in (trial, merged, f"{tmp}/upper", f"{tmp}/work"):
                await self._disk.make_directory(path)
            await self._disk.write(f"{tmp}/layer", _TRIAL_TAR)
            await self._disk.index_layer(f"{tmp}/layer", f"{tmp}/tar", f"{tmp}/index")
            await self._kernel.mount_erofs(trial, index=f"{tmp}/index", tar=f"{tmp}/tar")
            await self._kernel.mount_overlay(merged, lowers=[trial], upper=f"{tmp}/upper", work=f"{tmp}/work", volatile=True)
        except (OSError, IsopodError) as error:
            return Probed(value="directory", why=f"the kernel mounts no layers from files here: {error}")
        finally:
            await self._kernel.unmount(merged)
            await self._kernel.unmount(trial)
            await self._disk.remove_tree(tmp)
        return Probed(value="erofs", why="the kernel mounts layers from files, and overlays on them")

    def is_mounted(self, name: str) -> bool:
        """Return whether a layer is mounted."""
        return name in self._mounted

    def path_of(self, name: str) -> str:
        """Return where a layer is mounted, or would be."""
        return f"{self._folder}/{name}"

    async def mount(self, name: str, *, index: str, tar: str) -> None:
        """Mount a layer. Of calls for one layer only one may be under way.

        Raises:
            OSError: The kernel or a disk refused.
        """
        path = self.path_of(name)
        await self._disk.make_directory(path)
        await self._kernel.mount_erofs(path, index=index, tar=tar)
        self._mounted[name] = None

    async def unmount(self, name: str) -> None:
        """Unmount a layer, for whoever does not use it yet; not mounted is fine. Raises OSError."""
        if name in self._mounted:
            await self._kernel.unmount(self.path_of(name))
            del self._mounted[name]
            await self._disk.remove(self.path_of(name))

    async def dispose(self) -> None:
        """Unmount all. Raises OSError."""
        for name in list(self._mounted):
            await self.unmount(name)
