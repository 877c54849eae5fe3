"""Layers: unpacked once, named by the digest of their uncompressed tar, shared by all images that need them.

A layer is `FOLDER/sha256-HEX/`, its files in overlayfs form, and `FOLDER/sha256-HEX.json`, its record. The record is written after the
folder is whole and durable, and removed before it: a folder without a record is half made or half removed, and `open` clears it.
`kind` tells the folder's form, so that other forms (an EROFS file) can stand beside this one.

A layer stays while an image needs it (`is_needed`) or an operation has it pinned.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, NamedTuple

import msgspec

from isopod.engine.images.failures import disk_failures
from isopod.engine.images.finish import finish
from isopod.engine.images.locks import KeyedLocks
from isopod.runtime.logger import Logger
from isopod.world.disk import Disk, Unpacked
from isopod.world.errors import BadRecord

DAMAGED: Final = ".damaged"
"""Ends the name of a record that was set aside."""
_JSON: Final = ".json"


class LayerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a stored layer."""

    diff_id: str
    blob_digest: str
    """The digest of the bytes it came as."""
    blob_bytes: int
    unpacked_bytes: int
    n_entries: int
    kind: Literal["directory"] = "directory"


class Made(NamedTuple):
    """A layer unpacked into a folder of its maker, not yet in the store."""

    folder: str
    unpacked: Unpacked


class LayerStore:
    """The layers of one image store.

    Args:
        disk: Where they lie.
        folder: Theirs alone.
        is_needed: Whether an image needs the layer of a diff id.
        logger: Says what was cleared.
    """

    def __init__(self, disk: Disk, folder: str, is_needed: Callable[[str], bool], *, logger: Logger) -> None:
        self._disk = disk
        self._folder = folder
        self._is_needed = is_needed
        self._logger = logger
        self._records: dict[str, LayerRecord] = {}
        self._n_pins: dict[str, int] = {}
        self._locks = KeyedLocks()

    async def load(self) -> list[BadRecord]:
        """Read the records; clear what has none. Returns one error per damaged record, which is set aside."""
        damaged: list[BadRecord] = []
        await self._disk.make_directory(self._folder)
        names = await self._disk.list(self._folder)
        for name in [name for name in names if name.endswith(_JSON)]:
            path = f"{self._folder}/{name}"
            try:
                record = msgspec.json.decode(await self._disk.read(path), type=LayerRecord)
                if self._record_path(record.diff_id) != path or await self._disk.stat(self.folder_of(record.diff_id)) is None:
                    raise BadRecord(path, "it does not belong to a layer here")
                self._records[record.diff_id] = record
            except (msgspec.DecodeError, UnicodeDecodeError, BadRecord) as error:
                await self._disk.rename(path, path + DAMAGED)
                damaged.append(error if isinstance(error, BadRecord) else BadRecord(path, str(error)))
        return damaged

    async def clear_unneeded(self) -> None:
        """Remove the layers that no image needs, and what a kill left half made. To be called once, before any other use."""
        for diff_id in [diff_id for diff_id in self._records if not self._is_needed(diff_id)]:
            await self._remove(diff_id)
        whole = {path: diff_id for diff_id in self._records for path in (self.folder_of(diff_id), self._record_path(diff_id))}
        for name in await self._disk.list(self._folder):
            path = f"{self._folder}/{name}"
            if path not in whole:
                await self._disk.remove_tree(path)
                self._logger.info("layer.cleared", path=path)

    def folder_of(self, diff_id: str) -> str:
        """Return the folder of a layer's files."""
        return f"{self._folder}/{diff_id.replace(':', '-')}"

    def find(self, diff_id: str) -> LayerRecord | None:
        """Return a stored layer's record."""
        return self._records.get(diff_id)

    def pin(self, diff_id: str) -> None:
        """Keep a layer until it is released as often as it was pinned."""
        self._n_pins[diff_id] = self._n_pins.get(diff_id, 0) + 1

    async def acquire(self, diff_id: str, make: Callable[[], Awaitable[Made]]) -> LayerRecord:
        """Return a layer, pinned: the one that is here, or the one that `make` makes; of callers at the same time only one makes it.

        Args:
            diff_id: The layer.
            make: Unpacks it into a folder on the store's file system and verifies it. Its folder is moved into the store.

        Raises:
            DiskFull, KernelError: The disk refused; nothing is left in the store.
            Exception: Whatever `make` raises.
        """
        async with self._locks.hold(diff_id):
            record = self._records.get(diff_id)
            if record is None:
                made = await make()
                try:
                    with disk_failures("store", self.folder_of(diff_id)):
                        record = await finish(self._install(made))
                except asyncio.CancelledError:
                    if diff_id in self._records:  # it was finished nevertheless, for nobody
                        await finish(self._remove(diff_id))
                    raise
            self.pin(diff_id)
            return record

    async def release(self, diff_ids: Sequence[str]) -> None:
        """Take back pins, and remove the layers that nobody needs any more."""
        for diff_id in diff_ids:
            self._n_pins[diff_id] -= 1
            if not self._n_pins[diff_id]:
                del self._n_pins[diff_id]
        await self.collect(diff_ids)

    async def collect(self, diff_ids: Sequence[str]) -> None:
        """Remove those of the layers that nobody needs."""
        for diff_id in dict.fromkeys(diff_ids):
            async with self._locks.hold(diff_id):
                if diff_id in self._records and diff_id not in self._n_pins and not self._is_needed(diff_id):
                    with disk_failures("remove", self.folder_of(diff_id)):
                        await finish(self._remove(diff_id))

    def _record_path(self, diff_id: str) -> str:
        return self.folder_of(diff_id) + _JSON

    async def _install(self, made: Made) -> LayerRecord:
        unpacked = made.unpacked
        record = LayerRecord(
            diff_id=unpacked.diff_id,
            blob_digest=unpacked.blob_digest,
            blob_bytes=unpacked.n_blob_bytes,
            unpacked_bytes=unpacked.n_unpacked_bytes,
            n_entries=unpacked.n_entries,
        )
        folder = self.folder_of(record.diff_id)
        try:
            await self._disk.remove_tree(folder)  # what an earlier removal could not finish
            await self._disk.rename(made.folder, folder)
            # The old place first: never durable in both, so that clearing the one cannot empty the other.
            await self._disk.sync_directory(made.folder.rpartition("/")[0])
            await self._disk.sync_directory(self._folder)
            await self._disk.write_atomic(self._record_path(record.diff_id), msgspec.json.encode(record))
        except OSError:
            await self._disk.remove_tree(folder)
            raise
        self._records[record.diff_id] = record
        return record

    async def _remove(self, diff_id: str) -> None:
        del self._records[diff_id]
        await self._disk.remove(self._record_path(diff_id))
        await self._disk.sync_directory(self._folder)  # never a record of a folder that is half removed
        await self._disk.remove_tree(self.folder_of(diff_id))
