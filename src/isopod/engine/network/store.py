"""The file of the defined networks: JSON, versioned, replaced as a whole. Only what was asked for is in it, never who uses an address.

Rules: a file that cannot be read is an error, never an empty list: else a daemon would hand out addresses of networks it forgot, and
write that down.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from isopod.engine.network import ipam
from isopod.world.disk import Disk
from isopod.world.errors import BadRecord, InvalidArgument, from_os_error

VERSION: Final = 1
_BYTES_MAX: Final = 4 << 20
_HINT: Final = "restore the file from a backup, or move it away to begin with the default network only"


class StoredNetwork(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One bridge network as it is kept."""

    name: str
    subnet: str
    bridge: str
    created_at_ns: int


class _Head(msgspec.Struct, frozen=True):
    version: int


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    networks: tuple[StoredNetwork, ...]


async def load_networks(disk: Disk, path: str) -> Sequence[StoredNetwork] | None:
    """Return the networks in the order they were created, or None if there is no file yet.

    Raises:
        BadRecord: The file is damaged, of another version, or contradicts itself.
        UnavailableError: The disk failed.
    """
    try:
        if await disk.stat(path) is None:
            return None
        data = await disk.read(path, n_bytes_max=_BYTES_MAX)
    except OSError as error:
        raise from_os_error(error, "read", path) from error
    try:
        version = msgspec.json.decode(data, type=_Head).version
        if version != VERSION:
            why = f"it is of version {version}, this isopod knows version {VERSION}"
            raise BadRecord(path, why, "use the isopod that wrote it")
        networks = msgspec.json.decode(data, type=_File).networks
    except msgspec.MsgspecError as error:
        raise BadRecord(path, str(error), _HINT) from error
    _check(path, networks)
    return networks


async def save_networks(disk: Disk, path: str, networks: Sequence[StoredNetwork]) -> None:
    """Replace the file; a crash leaves the old or the new one.

    Raises:
        UnavailableError: The disk failed; the old file stands.
    """
    data = msgspec.json.format(msgspec.json.encode(_File(VERSION, tuple(networks))), indent=2) + b"\n"
    try:
        await disk.make_directory(path.rpartition("/")[0] or "/")
        await disk.write_atomic(path, data)
    except OSError as error:
        raise from_os_error(error, "write", path) from error


def _check(path: str, networks: Sequence[StoredNetwork]) -> None:
    for index, network in enumerate(networks):
        before = networks[:index]
        try:
            ipam.parse_subnet(network.subnet)
        except InvalidArgument as error:
            raise BadRecord(path, f"network {network.name}: {error}", _HINT) from error
        if any(network.name == other.name or network.bridge == other.bridge for other in before):
            raise BadRecord(path, f"network {network.name} is in it twice", _HINT)
        if ipam.find_overlap(network.subnet, [other.subnet for other in before]) is not None:
            raise BadRecord(path, f"network {network.name}: {network.subnet} overlaps another network", _HINT)
