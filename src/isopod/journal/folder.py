"""The folder of a journal: what its files are called, who may use it, and the manifest.

::

    journal.json              the manifest: format, version, id, and how far the journal was compacted
    current.wal               the segment that is written to
    next.wal                  the one that will be; without content
    archive/wal-LSN.log       closed segments, named by their first LSN in 20 digits; .log.zst when compressed
    snapshots/snapshot-LSN.json
    lock                      held by the process that has the journal open

A name of the form `*.tmp` in any of them is what a crash left of a file that was being made; it is removed when the journal is opened.
The manifest is written whole and atomically, and carries a checksum: it is made last, so a folder with segments and none is damaged.
"""

from typing import Final, NamedTuple

import msgspec

from isopod.journal.crc import crc32c
from isopod.journal.layout import ID_BYTES, NAME_BYTES_MAX
from isopod.world.disk import OpenFile
from isopod.world.errors import InUse, InvalidArgument, IsopodError, JournalDamaged, JournalForeign, KernelError, from_os_error
from isopod.world.world import World

MANIFEST: Final = "journal.json"
MANIFEST_FORMAT: Final = "isopod journal"
MANIFEST_VERSION: Final = 1
CURRENT: Final = "current.wal"
NEXT: Final = "next.wal"
LOCK: Final = "lock"
ARCHIVE: Final = "archive"
SNAPSHOTS: Final = "snapshots"
TEMPORARY: Final = ".tmp"
FOLDER_MODE: Final = 0o700
_PREFIX: Final = "wal-"
_PLAIN: Final = ".log"
_PACKED: Final = ".log.zst"
_DIGITS: Final = 20
_OTHERS_WRITE: Final = 0o002


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a journal is. `checksum` is the CRC-32C of the other values."""

    format: str
    version: int
    name: str
    id: str
    floor_lsn: int
    checksum: str = ""

    def sealed(self) -> "Manifest":
        """Return it with its checksum."""
        return msgspec.structs.replace(self, checksum=_checksum(self))


class SegmentName(NamedTuple):
    """A closed segment, by its name in the archive."""

    first_lsn: int
    is_packed: bool

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{_PREFIX}{self.first_lsn:0{_DIGITS}}{_PACKED if self.is_packed else _PLAIN}"


def new_manifest(name: str, journal_id: bytes, floor_lsn: int) -> Manifest:
    """Return the manifest of a journal."""
    return Manifest(format=MANIFEST_FORMAT, version=MANIFEST_VERSION, name=name, id=journal_id.hex(), floor_lsn=floor_lsn).sealed()


def pack_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as it is stored."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def parse_manifest(path: str, data: bytes) -> Manifest:
    """Return what a manifest's file says.

    Raises:
        JournalForeign: It is another program's, or a newer version's.
        JournalDamaged: It is damaged.
    """
    try:
        found = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JournalDamaged(path, 0, f"the manifest cannot be read: {error}") from error
    if found.checksum != _checksum(found):
        if found.format == MANIFEST_FORMAT and found.version > MANIFEST_VERSION:
            raise JournalForeign(path, f"journal version {found.version}; this isopod reads {MANIFEST_VERSION}")
        raise JournalDamaged(path, 0, "the manifest's checksum does not fit")
    if found.format != MANIFEST_FORMAT:
        raise JournalForeign(path, f"it is of format {found.format!r}, not {MANIFEST_FORMAT!r}")
    if found.version != MANIFEST_VERSION:
        raise JournalForeign(path, f"journal version {found.version}; this isopod reads {MANIFEST_VERSION}")
    if len(found.id) != 2 * ID_BYTES:
        raise JournalDamaged(path, 0, "the manifest's id has the wrong length")
    return found


def parse_segment_name(name: str) -> SegmentName | None:
    """Return what the name of a file in the archive says, None if it is no segment's."""
    for suffix, is_packed in ((_PACKED, True), (_PLAIN, False)):
        digits = name.removeprefix(_PREFIX).removesuffix(suffix)
        if name.startswith(_PREFIX) and name.endswith(suffix) and len(digits) == _DIGITS and digits.isascii() and digits.isdigit():
            return SegmentName(int(digits), is_packed)
    return None


def check_name(name: str) -> str:
    """Return the name of what a journal holds if it can be stored.

    Raises:
        InvalidArgument: It is empty, too long, or not printable ASCII.
    """
    if not (0 < len(name) <= NAME_BYTES_MAX and name.isascii() and name.isprintable()):
        raise InvalidArgument("journal format", name, f"want 1 to {NAME_BYTES_MAX} printable ASCII characters")
    return name


async def claim(world: World, folder: str, *, create: bool) -> OpenFile:
    """Make sure that a folder may hold a journal, and take its lock; closing what is returned releases it.

    Args:
        world: Whose disk.
        folder: The folder.
        create: Whether it is made if it is missing.

    Raises:
        InvalidArgument: It is a symbolic link, missing, or others may write to it.
        JournalForeign: There is something that is no folder.
        InUse: Another process, or this one, has the journal open.
        UnavailableError: The disk or the permissions do not let us.
    """
    try:
        await check_folder(world, folder, create=create)
        lock = await world.disk.lock(f"{folder}/{LOCK}", f"{world.processes.own_pid()}\n".encode())
    except OSError as error:
        raise explain(error, "open the journal in", folder) from error
    if lock is None:
        raise InUse("journal", folder, await _holder(world, folder), "stop the node that uses it first")
    return lock


async def claim_to_read(world: World, folder: str) -> OpenFile | None:
    """Take the lock of a folder that is only looked at, and change nothing in it: it may lie on a disk that cannot be written to.

    Args:
        world: Whose disk.
        folder: The folder; others may look at it too.

    Returns:
        What is closed to release it; None where there is no lock: who writes to a journal makes one first.

    Raises:
        InUse: A process has the journal open.
        UnavailableError: The disk or the permissions do not let us.
    """
    path = f"{folder}/{LOCK}"
    try:
        lock = await world.disk.lock_shared(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain(error, "read the journal in", folder) from error
    if lock is None:
        raise InUse("journal", folder, await _holder(world, folder), "stop the node that uses it first")
    return lock


async def check_folder(world: World, folder: str, *, create: bool) -> None:
    """Make sure that a folder may hold a journal; raises as `claim`, and OSError."""
    if not folder.startswith("/"):
        raise InvalidArgument("journal folder", folder, "not an absolute path")
    found = await world.disk.stat(folder)
    if found is None:
        if not create:
            raise InvalidArgument("journal folder", folder, "there is no such folder")
        await world.disk.make_directory(folder, mode=FOLDER_MODE)
        await world.disk.sync_directory(folder.rstrip("/").rpartition("/")[0] or "/")
        return
    if found.is_symlink:
        raise InvalidArgument("journal folder", folder, "it is a symbolic link", "give the folder that it leads to")
    if not found.is_directory:
        raise JournalForeign(folder, "it is not a folder", "give the folder that holds current.wal")
    if found.mode & _OTHERS_WRITE:
        raise InvalidArgument("journal folder", folder, f"everybody may write to it (mode {found.mode:04o})", f"chmod o-w {folder}")


def explain(error: OSError, action: str, path: str) -> IsopodError:
    """Return an OSError of the disk as an error of the tree, with what to do about permissions."""
    found = from_os_error(error, action, path)
    if isinstance(found, KernelError) and not found.hint:
        found.hint = "the folder must belong to the user that this runs as, and be on a writable file system if it is to be changed"
    return found


class explained:  # noqa: N801 - used as a word: `with explained("read", path):`
    """Turns an OSError of the block into an error of the tree.

    Args:
        action: What is attempted, in words.
        path: On what.
    """

    __slots__ = ("_action", "_path")

    def __init__(self, action: str, path: str) -> None:
        self._action = action
        self._path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise explain(error, self._action, self._path) from error


async def _holder(world: World, folder: str) -> str:
    try:
        text = (await world.disk.read(f"{folder}/{LOCK}", n_bytes_max=64)).decode("ascii", "replace").strip()
    except OSError:
        text = ""
    if not text.isdigit():
        return "another process"
    # One that only reads leaves the number of the last one that wrote.
    is_there = int(text) == world.processes.own_pid() or world.processes.identify(int(text)) is not None
    return f"process {text}" if is_there else "another process"


def _checksum(manifest: Manifest) -> str:
    text = f"{manifest.format}\n{manifest.version}\n{manifest.name}\n{manifest.id}\n{manifest.floor_lsn}"
    return f"{crc32c(text.encode()):08x}"
