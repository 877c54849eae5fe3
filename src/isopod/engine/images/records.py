"""Records of images: one file per image, and one index that says which of them count and what they are called.

`FOLDER/records/HEX.json` holds an image's facts and its OCI configuration, byte for byte. `FOLDER/index.json` maps image ids to names.
The index is the only commit point: an image, all images of a load, a name that moves and a removal take effect when it is replaced, at
once and durably. A record that the index does not name is half made or half removed, and `load` clears it.

A record that cannot be read is set aside as HEX.json.damaged, a damaged index is copied to index.json.damaged; without an index every
readable record counts, nameless.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from isopod.api.messages import Image
from isopod.engine.images.catalog import Catalog, Damaged
from isopod.engine.images.config import check_digest, digest_bytes
from isopod.engine.images.layers import DAMAGED
from isopod.world.disk import Disk
from isopod.world.errors import BadArchive, BadRecord

_JSON: Final = ".json"
HINT_DAMAGED: Final = "remove the image, or load it again"


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    image: Image
    """Without names."""
    config: str


class _Index(msgspec.Struct, frozen=True, kw_only=True):
    names: dict[str, tuple[str, ...]]


class ImageRecords:
    """The records of one image store.

    Args:
        disk: Where they lie.
        folder: The store's folder.
    """

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk = disk
        self._folder = f"{folder}/records"
        self._index_path = f"{folder}/index.json"

    async def load(self) -> tuple[Catalog, BadRecord | None]:
        """Read all records; clear those that do not count, set aside those that cannot be read.

        Returns:
            The images, and what was wrong with the index, if anything: then it must be put again.
        """
        await self._disk.make_directory(self._folder)
        index, index_error = await self._read_index()
        images: dict[str, Image] = {}
        damaged: dict[str, Damaged] = {}
        for name in await self._disk.list(self._folder):
            identifier, names = f"sha256:{name.removesuffix(_JSON)}", (index or {}).get(f"sha256:{name.removesuffix(_JSON)}", ())
            if name.endswith(DAMAGED):
                continue
            if not name.endswith(_JSON) or (index is not None and identifier not in index):
                await self._disk.remove(f"{self._folder}/{name}")
                continue
            try:
                images[identifier] = msgspec.structs.replace((await self._read(identifier)).image, names=names)
            except BadRecord as error:
                await self._disk.rename(f"{self._folder}/{name}", f"{self._folder}/{name}{DAMAGED}")
                damaged[identifier] = Damaged(identifier, names, error)
        for identifier, names in (index or {}).items():
            if identifier not in images and identifier not in damaged:
                damaged[identifier] = Damaged(identifier, names, BadRecord(self._path(identifier), "it is missing", HINT_DAMAGED))
        return Catalog(images, damaged), index_error

    async def put(self, image: Image, config_json: bytes) -> None:
        """Write an image's record; it counts once the index names it."""
        record = _Record(image=msgspec.structs.replace(image, names=()), config=config_json.decode())
        await self._disk.write_atomic(self._path(image.id), msgspec.json.encode(record))
        await self._disk.remove(self._path(image.id) + DAMAGED)

    async def put_index(self, names: Mapping[str, Sequence[str]]) -> None:
        """Make the images of these ids those that count, with their names."""
        index = _Index(names={identifier: tuple(those) for identifier, those in names.items()})
        await self._disk.write_atomic(self._index_path, msgspec.json.format(msgspec.json.encode(index)))

    async def remove(self, identifier: str) -> None:
        """Remove the record of an image that no longer counts."""
        await self._disk.remove(self._path(identifier))
        await self._disk.remove(self._path(identifier) + DAMAGED)

    async def config_json(self, identifier: str) -> bytes:
        """Return an image's OCI configuration, byte for byte.

        Raises:
            BadRecord: The record was damaged since it was loaded.
        """
        return (await self._read(identifier)).config.encode()

    def _path(self, identifier: str) -> str:
        return f"{self._folder}/{identifier.removeprefix('sha256:')}{_JSON}"

    async def _read(self, identifier: str) -> _Record:
        path = self._path(identifier)
        try:
            record = msgspec.json.decode(await self._disk.read(path), type=_Record)
            for layer in record.image.layers:
                check_digest(layer.diff_id, path)
        except (msgspec.DecodeError, UnicodeDecodeError, BadArchive) as error:
            raise BadRecord(path, str(error), HINT_DAMAGED) from error
        if record.image.id != identifier or digest_bytes(record.config.encode()) != identifier:
            raise BadRecord(path, "its configuration does not match the image's id", HINT_DAMAGED)
        return record

    async def _read_index(self) -> tuple[dict[str, tuple[str, ...]] | None, BadRecord | None]:
        """Return the index ({} for a new store), or None and why it cannot be read."""
        if await self._disk.stat(self._index_path) is None:
            return {}, None
        data = await self._disk.read(self._index_path)
        try:
            return msgspec.json.decode(data, type=_Index).names, None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # A copy: without any index, what is there would count as half made. The store replaces the original.
            await self._disk.write_atomic(self._index_path + DAMAGED, data)
            return None, BadRecord(self._index_path, str(error), "images kept their files but lost their names: load them again")
