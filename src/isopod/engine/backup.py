"""Backup: all records and networks of a node in one file, taken while it runs and put back while it does not.

The file is JSON of three members: what it is, the digest of its data, and the data: a snapshot of one moment, with the number of the
last journal record in it, and the list of networks. Images and the files of containers are not in it.

Putting it back makes a new journal beside the old one and swaps the two folders by renaming; a crash leaves the one or the other, or the
next start finishes the swap (`MetadataStore.open`). The old one stays as metadata.before-restore-N. Records that say "running" are
corrected by the next start, as after a boot.
What a container that the backup does not know left on the disk would be removed by that start, so such a backup is refused unless forced.
"""

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from isopod.api.messages import BackedUp, Container
from isopod.engine.metadata import RESTORED, MetadataStore, SnapshotHead, read_snapshot
from isopod.engine.network.store import StoredNetwork, load_networks, save_networks
from isopod.engine.operations import Create
from isopod.runtime.logger import Logger
from isopod.world.disk import Disk
from isopod.world.errors import BadRecord, DigestMismatch, InUse, from_os_error
from isopod.world.ids import is_container_id, short
from isopod.world.world import World

WHAT: Final = "isopod metadata backup"
VERSION: Final = 1
BACKUP_BYTES_MAX: Final = 1 << 30
_ASIDE: Final = ".before-restore-"
_NEW: Final = ".restoring"
_CHUNK: Final = 256


class Backup(NamedTuple):
    """A backup that was taken."""

    data: bytes
    facts: BackedUp


class Restored(NamedTuple):
    """What was put back."""

    containers: int
    cursor: int
    aside: str
    """Where the records from before lie now, "" if there were none."""


class _File(msgspec.Struct, frozen=True):
    what: str
    version: int
    digest: str
    data: msgspec.Raw


class _Data(msgspec.Struct, frozen=True):
    records: msgspec.Raw
    networks: tuple[StoredNetwork, ...] | None = None


class Contents(NamedTuple):
    """What a backup's file says, checked."""

    records: Sequence[Container]
    cursor: int
    networks: Sequence[StoredNetwork] | None


async def make_backup(store: MetadataStore, world: World, networks_file: str) -> Backup:
    """Take a copy of one moment; changes go on meanwhile.

    Args:
        store: The records.
        world: Where the file of networks is.
        networks_file: Its path.

    Raises:
        BadRecord, UnavailableError: The networks cannot be read.
    """
    networks = await load_networks(world.disk, networks_file)
    n_containers = len(store.records())  # of the same moment: nothing else runs before `encode` has looked
    cursor, snapshot = await store.encode()
    records = snapshot.rstrip()
    data = msgspec.json.encode(_Data(msgspec.Raw(records), None if networks is None else tuple(networks)))
    digest = _digest(data)
    facts = BackedUp(cursor=cursor, containers=n_containers, digest=digest)
    return Backup(msgspec.json.encode(_File(WHAT, VERSION, digest, msgspec.Raw(data))) + b"\n", facts)


def read_backup(data: bytes, name: str) -> Contents:
    """Check a backup and return what is in it.

    Args:
        data: The file's bytes.
        name: What to call it in errors.

    Raises:
        BadRecord: It is no backup, damaged, or of a newer isopod.
        DigestMismatch: It was changed.
    """
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRecord(name, f"not a backup: {error}", "was it cut off? make a new one: isopod backup FILE") from error
    if file.what != WHAT:
        raise BadRecord(name, f"it is {file.what[:40]!r}, not a backup of records")
    if file.version > VERSION:
        raise BadRecord(
            name, f"a backup of version {file.version}; this isopod reads {VERSION}", "use the isopod that made it, or a newer one"
        )
    found = _digest(bytes(file.data))
    if found != file.digest:
        raise DigestMismatch(name, file.digest, found)
    try:
        parts = msgspec.json.decode(file.data, type=_Data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRecord(name, str(error)) from error
    return Contents(read_snapshot(bytes(parts.records), name), _head(bytes(parts.records), name).cursor, parts.networks)


async def restore(
    world: World, contents: Contents, *, metadata: str, networks: str, containers: str, force: bool, logger: Logger
) -> Restored:
    """Put a backup in the place of what is there. The caller holds the node's lock.

    Args:
        world: Where.
        contents: The backup.
        metadata: The folder of the records.
        networks: The file of the networks.
        containers: The folder of the containers' files.
        force: Also if the next start would remove containers' files because of it.
        logger: Told of what the new journal finds.

    Raises:
        InUse: There are files of containers that the backup does not know, and `force` is not set.
        UnavailableError: The disk failed; the records from before are in place, or beside it.
    """
    disk = world.disk
    try:
        await _check_files(disk, contents, containers, force=force)
        fresh = f"{metadata}{_NEW}"
        await disk.remove_tree(fresh)
        await disk.remove_tree(f"{metadata}{RESTORED}")
        await _fill(world, fresh, contents, logger)
        aside = await _swap(disk, metadata, fresh)
        if contents.networks is not None:
            await save_networks(disk, networks, contents.networks)
    except OSError as error:
        raise from_os_error(error, "restore into", metadata) from error
    return Restored(len(contents.records), contents.cursor, aside)


async def _check_files(disk: Disk, contents: Contents, folder: str, *, force: bool) -> None:
    known = {record.id: None for record in contents.records}
    doomed = [name for name in await disk.list(folder) if is_container_id(name) and name not in known]
    if doomed and not force:
        shown = ", ".join(short(identifier) for identifier in doomed[:3]) + (" ..." if len(doomed) > 3 else "")
        hint = "their files would be removed at the next start: save them first, or use --force"
        raise InUse("data of containers", shown, "no record of this backup, which is older than they are", hint)


async def _fill(world: World, folder: str, contents: Contents, logger: Logger) -> None:
    store = await MetadataStore.open(world, folder, logger=logger)
    try:
        for start in range(0, len(contents.records), _CHUNK):
            await store.commit(*(Create(record) for record in contents.records[start : start + _CHUNK]))
    finally:
        await store.close()


async def _swap(disk: Disk, metadata: str, fresh: str) -> str:
    aside, ready = "", f"{metadata}{RESTORED}"
    folder = metadata.rpartition("/")[0] or "/"
    await disk.rename(fresh, ready)
    await disk.sync_directory(folder)  # from here on it is whole, whatever name it has
    if await disk.stat(metadata) is not None:
        number = 1
        while await disk.stat(f"{metadata}{_ASIDE}{number}") is not None:
            number += 1
        aside = f"{metadata}{_ASIDE}{number}"
        await disk.rename(metadata, aside)
    await disk.rename(ready, metadata)
    await disk.sync_directory(folder)
    return aside


def _head(records: bytes, name: str) -> SnapshotHead:
    try:
        return msgspec.json.decode(records, type=SnapshotHead)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRecord(name, str(error)) from error


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
