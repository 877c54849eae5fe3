"""Owners: which container has which prepared namespace, kept in small files so that the next daemon knows.

One file per attached container, named by its id. They need not be durable: they say nothing once the machine was restarted, and a
daemon that is killed leaves them in the page cache. A file is whole before the container can start, so a damaged one belongs to no
running container.
"""

from collections.abc import Sequence

import msgspec

from isopod.api.messages import PortMapping
from isopod.world.disk import Disk


class Owner(msgspec.Struct, frozen=True):
    """What an attached container holds: the name of a veth and namespace, or of a tap, and its address there."""

    network: str
    name: str
    address: str
    mac: str = ""
    """Of a virtual machine: the one behind the tap."""
    names: tuple[str, ...] = ()
    """What it is called on the network."""
    ports: tuple[PortMapping, ...] = ()
    """What leads to it, with the host's ports that were chosen."""
    bytes_per_s_out: int | None = None
    """What it may send; what it may receive is a property of the link."""


class Owners:
    """The files.

    Args:
        disk: Where they are.
        folder: The folder, theirs alone.
    """

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk = disk
        self._folder = folder

    async def prepare(self) -> None:
        """Make the folder."""
        await self._disk.make_directory(self._folder)

    async def list(self) -> Sequence[str]:
        """Return the container ids."""
        return await self._disk.list(self._folder)

    async def read(self, container_id: str) -> Owner | None:
        """Return what a container holds; None if there is no file, or a damaged one."""
        try:
            return msgspec.json.decode(await self._disk.read(f"{self._folder}/{container_id}"), type=Owner)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    async def write(self, container_id: str, owner: Owner) -> None:
        """Note what a container holds."""
        await self._disk.write(f"{self._folder}/{container_id}", msgspec.json.encode(owner))

    async def remove(self, container_id: str) -> None:
        """Forget a container; none there is fine."""
        await self._disk.remove(f"{self._folder}/{container_id}")
