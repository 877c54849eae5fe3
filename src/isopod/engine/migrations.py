"""Migrations: how records written by an older isopod become today's, one pure step from each format to the next.

A format's number stands beside every stored record. Reading one of format N applies the steps N -> N+1 -> ... -> FORMAT to its plain
JSON value, and only then is it decoded and validated. A record of a newer format is refused: this program cannot know what it says.

- Format 1: one fsynced JSON file per container, METADATA/containers/ID.json. Read once, at the first start, and kept beside as
  containers.v1 (damaged ones too, whose containers are left alone from then on).
- Format 2: the journal. Adds `revision`.

Rules: a step is never changed after a release; a new format adds one, with its test on a stored sample.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from isopod.api.messages import Container
from isopod.runtime.logger import Logger
from isopod.world.disk import Disk
from isopod.world.errors import BadRecord
from isopod.world.ids import is_container_id

Json = dict[str, Any]  # a record of any format: only the steps know what is in it
Step = Callable[[Json], Json]

FORMAT: Final = 2
KEPT: Final = ".v1"
_SUFFIX: Final = ".json"
_DAMAGED: Final = ".damaged"


def _from_1(record: Json) -> Json:
    return {**record, "revision": 0}


STEPS: Final[Mapping[int, Step]] = {1: _from_1}
"""From each format to the next."""


def upgrade(record: Json, version: int, where: str, *, steps: Mapping[int, Step] = STEPS, to: int = FORMAT) -> Json:
    """Return a record in today's format.

    Args:
        record: Its JSON value; it stays as it is.
        version: Its format.
        where: What to call it in errors.
        steps: The chain.
        to: Today's format.

    Raises:
        BadRecord: Its format is newer than this program, or unknown.
    """
    if version > to:
        raise BadRecord(where, f"written in format {version}, this isopod reads up to {to}", "use the isopod that wrote it, or a newer one")
    for number in range(version, to):
        step = steps.get(number)
        if step is None:
            raise BadRecord(where, f"nothing reads format {number} any more")
        record = step(record)
    return record


def decode(record: Json, version: int, where: str) -> Container:
    """Upgrade and validate a record.

    Raises:
        BadRecord: It is of a newer format, or not a container's record.
    """
    upgraded = upgrade(record, version, where)
    try:
        return msgspec.convert(upgraded, Container)
    except msgspec.ValidationError as error:
        raise BadRecord(where, str(error)) from error


class FilesFound(NamedTuple):
    """The records of format 1 that were there."""

    records: Sequence[Container]
    """Ordered by id."""
    damaged: Sequence[str]
    """Ids of containers whose files cannot be read."""


async def read_files(disk: Disk, folder: str, logger: Logger) -> FilesFound:
    """Read a folder of format 1. A file that cannot be read is said and renamed to ID.damaged; temporary ones are left out.

    Args:
        disk: Where.
        folder: METADATA/containers, or what is kept of it.
        logger: Told of damaged files.
    """
    records: list[Container] = []
    damaged: list[str] = []
    for name in await disk.list(folder):
        identifier = name.removesuffix(_SUFFIX).removesuffix(_DAMAGED)
        if not is_container_id(identifier):
            continue
        path = f"{folder}/{name}"
        try:
            record = decode(_json(await disk.read(path), path), 1, path)
            if record.id != identifier or name.endswith(_DAMAGED):
                raise BadRecord(path, "it is another container's, or was set aside as damaged")
            records.append(record)
        except BadRecord as error:
            logger.error("record.damaged", path=path, why=str(error))
            await set_aside(disk, folder, identifier)
            damaged.append(identifier)
    return FilesFound(records, damaged)


async def set_aside(disk: Disk, folder: str, identifier: str) -> None:
    """Mark a file of format 1 as one that cannot be used."""
    path = f"{folder}/{identifier}{_SUFFIX}"
    if await disk.stat(path) is not None:
        await disk.rename(path, f"{folder}/{identifier}{_DAMAGED}")


async def set_aside_in(disk: Disk, folder: str) -> list[str]:
    """Return the ids of the files of format 1 that cannot be used."""
    return [name.removesuffix(_DAMAGED) for name in await disk.list(folder) if name.endswith(_DAMAGED)]


async def keep(disk: Disk, folder: str) -> None:
    """Rename a folder of format 1 that was taken over, durably."""
    number, target = 1, f"{folder}{KEPT}"
    while await disk.stat(target) is not None:  # a second take-over, after an old folder was put back by hand
        number += 1
        target = f"{folder}{KEPT}-{number}"
    await disk.rename(folder, target)
    await disk.sync_directory(folder.rpartition("/")[0])


def _json(data: bytes, path: str) -> Json:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRecord(path, str(error)) from error
    if not isinstance(value, dict):
        raise BadRecord(path, "not a JSON object")
    return value
