"""Records: where sandbox metadata is kept, and its first form, one fsynced file per container.

The interface is the journal's to fill later: put, remove, load. What `put` returned from survives kill -9 and a power cut.
A damaged file is set aside as NAME.damaged with a log line, never deleted, and never keeps the others from loading; its container is
left alone from then on.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

from isopod.api.messages import Container
from isopod.runtime.logger import Logger
from isopod.world.errors import from_os_error
from isopod.world.world import World

_SUFFIX: Final = ".json"
_DAMAGED: Final = ".damaged"


class Loaded(NamedTuple):
    """What is stored."""

    records: Sequence[Container]
    """Ordered by id."""
    damaged: Sequence[str]
    """Ids of containers whose records cannot be read."""


class Records(Protocol):
    """Durable container records."""

    async def load(self) -> Loaded:
        """Return all records."""

    async def put(self, record: Container) -> None:
        """Store a record durably, replacing the one of the same id. Calls for one id must not overlap."""

    async def remove(self, identifier: str) -> None:
        """Forget a record durably; one that is not there is fine."""


class FileRecords:
    """`Records` as files.

    Args:
        world: Where the files live.
        folder: The folder, created on first use.
        logger: Says which file was damaged.
    """

    def __init__(self, world: World, folder: str, logger: Logger) -> None:
        self._disk = world.disk
        self._folder = folder
        self._logger = logger
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(Container)

    async def load(self) -> Loaded:
        """Return all records, and set damaged ones aside."""
        await self._disk.make_directory(self._folder)
        found, damaged = [], []
        for name in await self._disk.list(self._folder):
            path = f"{self._folder}/{name}"
            identifier = name.removesuffix(_SUFFIX).removesuffix(_DAMAGED)
            if name.endswith(_DAMAGED):
                damaged.append(identifier)
            elif not name.endswith(_SUFFIX):
                await self._disk.remove(path)  # a temporary file of an interrupted write
            else:
                record = await self._decode(path, identifier)
                if record is None:
                    await self._disk.rename(path, f"{self._folder}/{identifier}{_DAMAGED}")
                    damaged.append(identifier)
                else:
                    found.append(record)
        return Loaded(found, damaged)

    async def _decode(self, path: str, identifier: str) -> Container | None:
        try:
            record = self._decoder.decode(await self._disk.read(path))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._logger.error("record.damaged", path=path, why=str(error))
            return None
        if record.id != identifier:
            self._logger.error("record.damaged", path=path, why="it is another container's")
            return None
        return record

    async def put(self, record: Container) -> None:
        """Write the record's file atomically and durably.

        Raises:
            DiskFull, KernelError: The disk refused; the old record stands.
        """
        path = f"{self._folder}/{record.id}{_SUFFIX}"
        try:
            await self._disk.write_atomic(path, self._encoder.encode(record))
        except OSError as error:
            raise from_os_error(error, "write", path) from error

    async def remove(self, identifier: str) -> None:
        """Remove the record's file and make that durable."""
        path = f"{self._folder}/{identifier}{_SUFFIX}"
        try:
            await self._disk.remove(path)
            await self._disk.sync_directory(self._folder)
        except OSError as error:
            raise from_os_error(error, "remove", path) from error
