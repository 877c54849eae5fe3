"""Layers: taken in once, named by the digest of their uncompressed tar, shared by all images that need them.

A layer has one of two forms, or both. As a directory it is `FOLDER/sha256-HEX/`, its files in overlayfs form. As files it is
`FOLDER/sha256-HEX.tar`, its uncompressed tar, and `FOLDER/sha256-HEX.erofs`, an index over it: mounted together they show the same, on
the host (`mounts`) and in a guest, which gets them as disks. `FOLDER/sha256-HEX.json` is its record; `kind` says what containers use.
New layers get the form the machine is best at; one that is missing is made of the other when it is first asked for.

The record is written after what it names is whole and durable, and removed before it: what no record names is half made or half removed,
and `clear_unneeded` clears it. Files are checked by their lengths when the store is opened, and the index by its digest before it is
used. A flipped byte in a tar is a flipped byte in a file of the layer, as in a directory; a damaged index is never mounted.

A layer stays while an image needs it (`is_needed`) or an operation has it pinned.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final, Literal, NamedTuple

import msgspec

from isopod.engine.images.failures import disk_failures
from isopod.engine.images.finish import finish
from isopod.engine.images.locks import KeyedLocks
from isopod.engine.images.mounts import LayerMounts
from isopod.runtime.logger import Logger
from isopod.world.disk import Disk, Indexed, Unpacked, UnpackLimits
from isopod.world.errors import BadRecord

LayerKind = Literal["directory", "erofs"]

DAMAGED: Final = ".damaged"
"""Ends the name of a record that was set aside."""
TAR: Final = ".tar"
INDEX: Final = ".erofs"
_JSON: Final = ".json"
_HINT_LOAD: Final = "load the image again"


class LayerFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a layer's tar and index."""

    tar_bytes: int
    """The file's length, a multiple of 512."""
    index_bytes: int
    index_digest: str


class LayerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known about a stored layer."""

    diff_id: str
    blob_digest: str
    """The digest of the bytes it came as."""
    blob_bytes: int
    unpacked_bytes: int
    n_entries: int
    kind: LayerKind = "directory"
    """What containers use: the directory, or the files, mounted."""
    files: LayerFiles | None = None
    """None: there is only the directory."""


class LayerDisk(msgspec.Struct, frozen=True):
    """A layer as a guest gets it: the paths of two files."""

    index: str
    tar: str | None
    """None: the index holds the data as well."""


class Made(NamedTuple):
    """A layer in its maker's folder, not yet in the store."""

    path: str
    """The directory; or, of files, what `TAR` and `INDEX` are to be appended to."""
    unpacked: Unpacked
    files: LayerFiles | None = None
    """None: it is a directory."""


class LayerStore:
    """The layers of one image store.

    Args:
        disk: Where they lie.
        folder: Theirs alone.
        tmp: Where one form is made of the other, on the same file system.
        is_needed: Whether an image needs the layer of a diff id.
        limits: Those that the layers were taken in with.
        mounts: Where layers kept as files are mounted; None: containers use directories.
        logger: Says what was cleared.
    """

    def __init__(
        self,
        disk: Disk,
        folder: str,
        *,
        tmp: str,
        is_needed: Callable[[str], bool],
        limits: UnpackLimits,
        mounts: LayerMounts | None,
        logger: Logger,
    ) -> None:
        self._disk = disk
        self._folder = folder
        self._tmp = tmp
        self._limits = limits
        self._is_needed = is_needed
        self._mounts = mounts
        self._logger = logger
        self.can_mount = mounts is not None
        """Whether layers kept as files can be mounted here: whoever finds out that they cannot sets it False."""
        self._records: dict[str, LayerRecord] = {}
        self._n_pins: dict[str, int] = {}
        self._locks = KeyedLocks()
        self._checked: dict[str, None] = {}
        """Layers whose index was found to be what its record says."""

    async def load(self) -> list[BadRecord]:
        """Read the records; clear what has none. Returns one error per damaged record, which is set aside."""
        damaged: list[BadRecord] = []
        await self._disk.make_directory(self._folder)
        names = await self._disk.list(self._folder)
        for name in [name for name in names if name.endswith(_JSON)]:
            path = f"{self._folder}/{name}"
            try:
                record = msgspec.json.decode(await self._disk.read(path), type=LayerRecord)
                await self._check(record, path)
                self._records[record.diff_id] = record
            except (msgspec.DecodeError, UnicodeDecodeError, BadRecord) as error:
                await self._disk.rename(path, path + DAMAGED)
                damaged.append(error if isinstance(error, BadRecord) else BadRecord(path, str(error)))
        if self._mounts is not None:
            wanted = {_name_of(record.diff_id): None for record in self._records.values() if record.kind == "erofs"}
            await self._mounts.open(wanted.__contains__)
        return damaged

    async def clear_unneeded(self) -> None:
        """Remove the layers that no image needs, and what a kill left half made. To be called once, before any other use."""
        for diff_id in [diff_id for diff_id in self._records if not self._is_needed(diff_id)]:
            await self._remove(diff_id)
        whole = {path: None for record in self._records.values() for path in (*self._paths(record), self._record_path(record.diff_id))}
        for name in await self._disk.list(self._folder):
            path = f"{self._folder}/{name}"
            if path not in whole:
                await self._discard(path)
                self._logger.info("layer.cleared", path=path)

    def has_kind(self, kind: LayerKind) -> bool:
        """Return whether any layer is of that kind."""
        return any(record.kind == kind for record in self._records.values())

    def find(self, diff_id: str) -> LayerRecord | None:
        """Return a stored layer's record."""
        return self._records.get(diff_id)

    async def folder(self, diff_id: str) -> str:
        """Return the folder that shows a layer's files: its directory, or where it is mounted, and it is then.

        Raises:
            BadRecord: Its index was damaged since it was made.
            OSError: The kernel or a disk refused.
        """
        mounts, name = self._mounts, _name_of(diff_id)
        if mounts is not None and mounts.is_mounted(name):
            return mounts.path_of(name)
        async with self._locks.hold(diff_id):
            if self._get(diff_id).kind == "directory":
                return self._base(diff_id)
            if mounts is None or not self.can_mount:
                await self._add_directory(diff_id)
                return self._base(diff_id)
            if not mounts.is_mounted(name):
                await self._check_index(diff_id)
                await finish(mounts.mount(name, index=self._base(diff_id) + INDEX, tar=self._base(diff_id) + TAR))
            return mounts.path_of(name)

    async def files(self, diff_id: str) -> LayerDisk:
        """Return a layer as files, made of its directory if there are none.

        Raises:
            BadRecord: Its index was damaged since it was made.
            Unsupported: It cannot be kept as files.
            OSError: A disk refused.
        """
        async with self._locks.hold(diff_id):
            if self._get(diff_id).files is None:
                await self._add_files(diff_id)
            await self._check_index(diff_id)
            return LayerDisk(self._base(diff_id) + INDEX, self._base(diff_id) + TAR)

    async def unmount(self) -> None:
        """Unmount all layers: nothing runs that needs them, and nothing is begun any more. Raises OSError."""
        if self._mounts is not None:
            await self._mounts.dispose()

    def pin(self, diff_id: str) -> None:
        """Keep a layer until it is released as often as it was pinned."""
        self._n_pins[diff_id] = self._n_pins.get(diff_id, 0) + 1

    async def acquire(self, diff_id: str, make: Callable[[], Awaitable[Made]]) -> LayerRecord:
        """Return a layer, pinned: the one that is here, or the one that `make` makes; of callers at the same time only one makes it.

        Args:
            diff_id: The layer.
            make: Makes it in a folder on the store's file system and verifies it. What it made is moved into the store.

        Raises:
            DiskFull, KernelError: The disk refused; nothing is left in the store.
            Exception: Whatever `make` raises.
        """
        async with self._locks.hold(diff_id):
            record = self._records.get(diff_id)
            if record is None:
                made = await make()
                try:
                    with disk_failures("store", self._base(diff_id)):
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
                    with disk_failures("remove", self._base(diff_id)):
                        await finish(self._remove(diff_id))

    # --- paths --------------------------------------------------------------------------------------------------------

    def _base(self, diff_id: str) -> str:
        """Return a layer's directory; its files are called like it."""
        return f"{self._folder}/{_name_of(diff_id)}"

    def _record_path(self, diff_id: str) -> str:
        return self._base(diff_id) + _JSON

    def _paths(self, record: LayerRecord) -> list[str]:
        """Return what a record names."""
        base = self._base(record.diff_id)
        files = [] if record.files is None else [base + TAR, base + INDEX]
        return files if record.kind == "erofs" else [base, *files]

    # --- checks -------------------------------------------------------------------------------------------------------

    def _get(self, diff_id: str) -> LayerRecord:
        record = self._records.get(diff_id)
        if record is None:
            raise BadRecord(self._record_path(diff_id), "the layer is missing, or was found damaged", _HINT_LOAD)
        return record

    async def _check(self, record: LayerRecord, path: str) -> None:
        """Check a record against what lies here."""
        if self._record_path(record.diff_id) != path or (record.kind == "erofs" and record.files is None):
            raise BadRecord(path, "it does not belong to a layer here")
        sizes = {} if record.files is None else {TAR: record.files.tar_bytes, INDEX: record.files.index_bytes}
        for each in self._paths(record):
            found = await self._disk.stat(each)
            size = sizes.get(each.removeprefix(self._base(record.diff_id)))
            if found is None:
                raise BadRecord(path, "it does not belong to a layer here")
            if size is not None and found.size_bytes != size:
                raise BadRecord(path, f"{each} has {found.size_bytes} bytes, and had {size}", _HINT_LOAD)

    async def _check_index(self, diff_id: str) -> None:
        """Check, once, that an index is what it was. A layer of which it is not is set aside, so that loading its image again mends it."""
        files, path = self._get(diff_id).files, self._base(diff_id) + INDEX
        if diff_id in self._checked or files is None:
            return
        if await self._disk.digest(path) != files.index_digest:
            del self._records[diff_id]
            await self._disk.rename(self._record_path(diff_id), self._record_path(diff_id) + DAMAGED)
            self._logger.error("layer.damaged", path=path)
            raise BadRecord(path, "the index was damaged since it was made", _HINT_LOAD)
        self._checked[diff_id] = None

    # --- making and removing ------------------------------------------------------------------------------------------

    async def _install(self, made: Made) -> LayerRecord:
        unpacked = made.unpacked
        record = LayerRecord(
            diff_id=unpacked.diff_id,
            blob_digest=unpacked.blob_digest,
            blob_bytes=unpacked.n_blob_bytes,
            unpacked_bytes=unpacked.n_unpacked_bytes,
            n_entries=unpacked.n_entries,
            kind="directory" if made.files is None else "erofs",
            files=made.files,
        )
        await self._move_in(made.path, self._paths(record), record)
        if made.files is not None:
            self._checked[record.diff_id] = None
        return record

    async def _add_directory(self, diff_id: str) -> None:
        """Make a layer kept as files a directory as well: containers cannot mount it here."""
        base = self._base(diff_id)
        async with self._aside(diff_id) as made:
            await self._disk.unpack_layer(base + TAR, made, limits=self._limits)
            await finish(self._move_in(made, [base], msgspec.structs.replace(self._get(diff_id), kind="directory")))

    async def _add_files(self, diff_id: str) -> None:
        """Make files of a layer kept as a directory: a guest gets them."""
        base = self._base(diff_id)
        async with self._aside(diff_id) as made:
            await self._disk.pack_layer(base, made, limits=self._limits)
            indexed = await self._disk.index_layer(made, made + TAR, made + INDEX, limits=self._limits)
            record = msgspec.structs.replace(self._get(diff_id), files=files_of(indexed))
            await finish(self._move_in(made, [base + TAR, base + INDEX], record))

    @asynccontextmanager
    async def _aside(self, diff_id: str) -> AsyncIterator[str]:
        """Give a path outside of the store whose folder goes at the end; whoever holds the layer's lock uses it alone."""
        folder = f"{self._tmp}/{_name_of(diff_id)}"
        await self._disk.make_directory(folder)
        try:
            yield f"{folder}/layer"
        finally:
            await finish(self._disk.remove_tree(folder))

    async def _move_in(self, made: str, paths: Sequence[str], record: LayerRecord) -> None:
        """Move what was made at `made` (and what is called like it) to the store, and write the record."""
        base = self._base(record.diff_id)
        try:
            for path in paths:
                await self._discard(path)  # what an earlier removal could not finish
                await self._disk.rename(made + path.removeprefix(base), path)
            # The old place first: never durable in both, so that clearing the one cannot empty the other.
            await self._disk.sync_directory(made.rpartition("/")[0])
            await self._disk.sync_directory(self._folder)
            await self._disk.write_atomic(self._record_path(record.diff_id), msgspec.json.encode(record))
        except OSError:
            for path in paths:
                await self._discard(path)
            raise
        self._records[record.diff_id] = record

    async def _remove(self, diff_id: str) -> None:
        record = self._records.pop(diff_id)
        self._checked.pop(diff_id, None)
        await self._disk.remove(self._record_path(diff_id))
        await self._disk.sync_directory(self._folder)  # never a record of what is half removed
        if self._mounts is not None:
            await self._mounts.unmount(_name_of(diff_id))
        for path in self._paths(record):
            await self._discard(path)

    async def _discard(self, path: str) -> None:
        found = await self._disk.stat(path)
        if found is not None and found.is_directory:
            await self._disk.remove_tree(path)
        elif found is not None:
            await self._disk.remove(path)


def files_of(indexed: Indexed) -> LayerFiles:
    """Return what a record says of a tar and an index."""
    return LayerFiles(tar_bytes=indexed.n_tar_bytes, index_bytes=indexed.n_index_bytes, index_digest=indexed.index_digest)


def _name_of(diff_id: str) -> str:
    return diff_id.replace(":", "-")
