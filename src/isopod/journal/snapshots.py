"""Snapshots: the state up to an LSN as one JSON file that a person can read.

::

    {
      "format": "isopod snapshot", "version": 1, "of": NAME, "journal": ID, "lsn": N, "created_at_ns": T, "n_bytes": L, "checksum": CRC,
      "data": what the user gave
    }

The user's data is JSON and stands there byte for byte; other data stands there in base64 ("data_base64"). The checksum covers the data and
what is said about it. A snapshot is written whole and atomically: a crash leaves it or does not.
"""

import binascii
from typing import Final, NamedTuple

import msgspec

from isopod.journal.crc import crc32c
from isopod.journal.folder import SNAPSHOTS, Manifest
from isopod.journal.settings import JournalLog, JournalSettings
from isopod.world.errors import JournalDamaged
from isopod.world.world import World

FORMAT: Final = "isopod snapshot"
VERSION: Final = 1
SNAPSHOT_BYTES_MAX: Final = 1 << 30
_PREFIX: Final = "snapshot-"
_SUFFIX: Final = ".json"
_DIGITS: Final = 20
_BLANKS: Final = b" \t\r\n"


class SnapshotFile(NamedTuple):
    """A snapshot, by its name."""

    lsn: int
    name: str


class Snapshot(NamedTuple):
    """What a snapshot says."""

    lsn: int
    created_at_ns: int
    data: bytes


class BadSnapshot(Exception):
    """A snapshot that cannot be used."""


class _Envelope(msgspec.Struct, frozen=True, kw_only=True):
    format: str
    version: int
    of: str
    journal: str
    lsn: int
    created_at_ns: int
    n_bytes: int
    checksum: str
    data: msgspec.Raw = msgspec.Raw(b"")
    data_base64: str = ""


def file_name(lsn: int) -> str:
    """Return the name of the snapshot that covers every record up to `lsn`."""
    return f"{_PREFIX}{lsn:0{_DIGITS}}{_SUFFIX}"


def parse_name(name: str) -> SnapshotFile | None:
    """Return what a file's name says, None if it is no snapshot's."""
    digits = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    if name == f"{_PREFIX}{digits}{_SUFFIX}" and len(digits) == _DIGITS and digits.isascii() and digits.isdigit():
        return SnapshotFile(int(digits), name)
    return None


def pack(manifest: Manifest, snapshot: Snapshot) -> bytes:
    """Return the file of a snapshot."""
    is_plain = snapshot.data == snapshot.data.strip(_BLANKS) and _is_json(snapshot.data)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "of": manifest.name,
        "journal": manifest.id,
        "lsn": snapshot.lsn,
        "created_at_ns": snapshot.created_at_ns,
        "n_bytes": len(snapshot.data),
        "checksum": _checksum(manifest.name, manifest.id, snapshot),
    }
    head = msgspec.json.format(msgspec.json.encode(facts), indent=2)[:-2]
    if is_plain:
        return b"".join((head, b',\n  "data": ', snapshot.data, b"\n}\n"))
    return b"".join((head, b',\n  "data_base64": "', binascii.b2a_base64(snapshot.data, newline=False), b'"\n}\n'))


def unpack(manifest: Manifest, data: bytes, lsn: int) -> Snapshot:
    """Return what a snapshot's file says.

    Args:
        manifest: The journal's.
        data: The file.
        lsn: What its name says.

    Raises:
        BadSnapshot: It is damaged, or not this journal's.
    """
    try:
        found = msgspec.json.decode(data, type=_Envelope)
        content = bytes(found.data) or binascii.a2b_base64(found.data_base64, strict_mode=True)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise BadSnapshot(f"it cannot be read: {error}") from error
    if found.format != FORMAT or found.version != VERSION:
        raise BadSnapshot(f"it is of format {found.format!r}, version {found.version}")
    if found.journal != manifest.id:
        raise BadSnapshot("it belongs to another journal")
    snapshot = Snapshot(found.lsn, found.created_at_ns, content)
    if found.checksum != _checksum(found.of, found.journal, snapshot) or len(content) != found.n_bytes:
        raise BadSnapshot("its checksum does not fit")
    if found.lsn != lsn:
        raise BadSnapshot(f"its name says lsn {lsn}, its content {found.lsn}")
    return snapshot


class Snapshots:
    """The snapshots of one journal.

    Args:
        world: Whose disk.
        folder: The journal's.
        settings: How many are kept.
    """

    def __init__(self, world: World, folder: str, settings: JournalSettings) -> None:
        self._disk = world.disk
        self._folder = f"{folder}/{SNAPSHOTS}"
        self._n_kept = settings.snapshots_kept
        self._before = world.failpoints.point("journal.before_snapshot")
        self._after_rename = world.failpoints.point("journal.after_snapshot_rename")

    async def list(self) -> list[SnapshotFile]:
        """Return them by their names, the newest first; OSError."""
        names = await self._disk.list(self._folder)
        return sorted((found for found in map(parse_name, names) if found is not None), reverse=True)

    def path(self, file: SnapshotFile) -> str:
        """Return where one is."""
        return f"{self._folder}/{file.name}"

    async def store(self, manifest: Manifest, snapshot: Snapshot) -> int:
        """Store one durably, and remove the oldest ones over the bound; returns its size in bytes. OSError: it may not be there."""
        packed = pack(manifest, snapshot)
        if self._before.armed:
            await self._before.hit()
        await self._disk.write_atomic(f"{self._folder}/{file_name(snapshot.lsn)}", packed)
        if self._after_rename.armed:
            await self._after_rename.hit()
        for old in (await self.list())[self._n_kept :]:
            await self._disk.remove(self.path(old))
        return len(packed)

    async def load(self, manifest: Manifest, file: SnapshotFile) -> Snapshot:
        """Read one; BadSnapshot, OSError."""
        return unpack(manifest, await self._disk.read(self.path(file), n_bytes_max=2 * SNAPSHOT_BYTES_MAX), file.lsn)

    async def load_newest(self, manifest: Manifest, first_lsn: int, last_lsn: int, *, log: JournalLog) -> tuple[int, bytes] | None:
        """Return the newest that is whole and fits the records, None if there are no snapshots.

        Args:
            manifest: The journal's.
            first_lsn: Its first record.
            last_lsn: Its last one.
            log: Who is told of damaged ones.

        Raises:
            JournalDamaged: There is none that the records continue.
            OSError: The disk failed.
        """
        why = ""
        for file in await self.list():
            path = self.path(file)
            try:
                found = await self.load(manifest, file)
            except BadSnapshot as error:
                why = why or f"{file.name}: {error}"
                log.warning("journal.bad_snapshot", path=path, why=str(error))
                continue
            if found.lsn < first_lsn - 1:
                because = why or "a newer one is missing"
                raise JournalDamaged(
                    path, 0, f"it ends at lsn {found.lsn}, the records begin at {first_lsn} ({because})", lsn=found.lsn + 1
                )
            if found.lsn > last_lsn:
                raise JournalDamaged(path, 0, f"it covers lsn {found.lsn}, the records end at {last_lsn}", lsn=last_lsn + 1)
            return found.lsn, found.data
        if why:
            raise JournalDamaged(self._folder, 0, f"no snapshot is whole: {why}")
        return None


def _is_json(data: bytes) -> bool:
    try:
        data.decode()
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def _checksum(name: str, journal_id: str, snapshot: Snapshot) -> str:
    start = crc32c(f"{name}\n{journal_id}\n{snapshot.lsn}\n{snapshot.created_at_ns}\n".encode())
    return f"{crc32c(snapshot.data, start):08x}"
