"""Snapshot files: the machine at one index, whole and checked, made here or received in pieces.

    snapshots/snapshot-INDEX-TERM.raft         MAGIC | length (u32) | header | the machine's bytes | CRC-32 of all before (u32)
    snapshots/snapshot-INDEX-TERM.raft.making  what was written so far of one that is being made; worth nothing after a crash
    snapshots/incoming-INDEX-TERM-CRC.part     what came so far of one that is being received
    snapshots/removed/                         what is being removed

A file gets its name only when it is durable and whole, so that what has the name can be used. Which of them counts is said by the log
(`isopod.cluster.raft.log`), never by the folder. A file that is being sent is not removed before its reader closes it (POSIX keeps the
bytes of an open file).
"""

import asyncio
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from struct import Struct as Layout
from typing import Final, NamedTuple

import msgspec

from isopod.cluster.raft.core import ConfState
from isopod.cluster.raft.ports import SnapshotOffer
from isopod.world.disk import OpenFile
from isopod.world.errors import BadRecord, DigestMismatch, InvalidArgument, NotFound, TooLarge, from_os_error
from isopod.world.world import World

HINT: Final = "let the other members `isopod cluster leave` this node, empty its folder, and join anew; or restore a backup"
MAGIC: Final = b"ISORAFT1"
FILE_BYTES_MAX: Final = 16 << 30
PIECE_BYTES: Final = 1 << 20
MAKING: Final = ".making"
REMOVED: Final = "removed"
_U32: Final = Layout("<I")


class SnapshotHeader(msgspec.Struct, frozen=True, array_like=True):
    """What a snapshot says about itself."""

    cluster_id: str
    index: int
    term: int
    conf_state: ConfState
    stamp_ns: int
    """The last stamp that the machine saw: later ones are not before it."""


class Snapshot(msgspec.Struct, frozen=True):
    """A snapshot in memory."""

    header: SnapshotHeader
    machine: bytes


class Captured(NamedTuple):
    """A snapshot of which the machine's bytes are still to be made, piece by piece; an empty piece only says that work was done."""

    header: SnapshotHeader
    pieces: Iterable[bytes]


def pack_snapshot(snapshot: Snapshot) -> bytes:
    """Return the bytes of the file."""
    body = _pack_head(snapshot.header) + snapshot.machine
    return body + _U32.pack(zlib.crc32(body))


def parse_snapshot(data: bytes, path: str) -> Snapshot:
    """Return what a file holds.

    Raises:
        BadRecord: It is damaged, or another program's.
    """
    begin = len(MAGIC) + _U32.size
    if len(data) < begin + _U32.size or not data.startswith(MAGIC):
        raise BadRecord(path, "it is no Raft snapshot", HINT)
    body = memoryview(data)[: -_U32.size]
    if zlib.crc32(body) != crc_of(data):
        raise BadRecord(path, "its checksum does not fit", HINT)
    try:
        (n_header,) = _U32.unpack_from(data, len(MAGIC))
        header = msgspec.msgpack.decode(data[begin : begin + n_header], type=SnapshotHeader)
    except (msgspec.MsgspecError, struct.error) as error:
        raise BadRecord(path, f"its header cannot be read: {error}", HINT) from None
    return Snapshot(header, bytes(body[begin + n_header :]))


def crc_of(data: bytes) -> int:
    """Return the checksum that a file carries at its end."""
    return int(_U32.unpack_from(data, len(data) - _U32.size)[0])


class SnapshotFolder:
    """The files.

    Args:
        world: Its disk is used.
        path: The folder.
    """

    def __init__(self, world: World, path: str) -> None:
        self.path = path
        self._disk = world.disk

    async def prepare(self) -> None:
        """Make the folder, and remove what a crash left of one that was being made or removed."""
        await self._disk.make_directory(self.path)
        await self._disk.remove_tree(f"{self.path}/{REMOVED}")
        for name in await self._disk.list(self.path):
            if name.endswith(MAKING):
                await self._disk.remove(f"{self.path}/{name}")

    async def save(self, snapshot: Snapshot | Captured) -> int:
        """Write a snapshot so that it is durable and whole, or not there; return its length. Others get their turn between the pieces.

        Raises:
            UnavailableError: The disk failed or is full.
        """
        path = self.file(snapshot.header.index, snapshot.header.term)
        making = path + MAKING
        pieces = snapshot.pieces if isinstance(snapshot, Captured) else (snapshot.machine,)
        try:
            try:
                n_bytes = await self._write(making, snapshot.header, pieces)
                await self._disk.rename(making, path)
                await self._disk.sync_directory(self.path)
            except OSError:
                with suppress(OSError):  # a full disk wants the room back; why it failed is what counts
                    await self._disk.remove(making)
                raise
        except OSError as error:
            raise from_os_error(error, "write the snapshot", path) from error
        return n_bytes

    async def _write(self, path: str, header: SnapshotHeader, pieces: Iterable[bytes]) -> int:
        if await self._disk.stat(path) is not None:
            await self._disk.remove(path)
        file = await self._disk.open_append(path)
        crc = 0
        try:
            for piece in _cut((_pack_head(header),), pieces):
                if piece:
                    crc = zlib.crc32(piece, crc)
                    await file.append(piece)
                await asyncio.sleep(0)  # whether or not the disk made us wait
            await file.append(_U32.pack(crc))
            await file.sync()
            return file.size_bytes()
        finally:
            file.close()

    async def load(self, index: int, term: int) -> Snapshot:
        """Read a snapshot.

        Raises:
            NotFound: There is none of that index.
            BadRecord: It is damaged.
            UnavailableError: The disk failed.
        """
        path = self.file(index, term)
        try:
            data = await self._disk.read(path, n_bytes_max=FILE_BYTES_MAX)
        except FileNotFoundError:
            raise NotFound("snapshot", path, "the log names it: was the folder changed by hand?") from None
        except OSError as error:
            raise from_os_error(error, "read the snapshot", path) from error
        snapshot = parse_snapshot(data, path)
        if (snapshot.header.index, snapshot.header.term) != (index, term):
            raise BadRecord(path, f"it is of index {snapshot.header.index} and term {snapshot.header.term}", HINT)
        return snapshot

    async def remove_but(self, kept: Sequence[tuple[int, int]]) -> None:
        """Remove all files but those of these (index, term), and those of later ones: they are being received, or were just now."""
        names = [self.file(index, term).rpartition("/")[2] for index, term in kept]
        newest = max(kept, default=(0, 0))
        for name in await self._disk.list(self.path):
            if name in names or name == REMOVED or (not name.endswith(MAKING) and _index_of(name) > newest[0]):
                continue
            # To free a large file takes long: a whole folder is removed beside the loop, a single file within it.
            await self._disk.make_directory(f"{self.path}/{REMOVED}")
            await self._disk.rename(f"{self.path}/{name}", f"{self.path}/{REMOVED}/{name}")
        await self._disk.remove_tree(f"{self.path}/{REMOVED}")

    async def open_source(self, index: int, term: int) -> "FileSource":
        """Open a snapshot for sending.

        Raises:
            NotFound: It is gone.
            UnavailableError: The disk failed.
        """
        path = self.file(index, term)
        try:
            file = await self._disk.open_read(path)
            n_bytes = file.size_bytes()
            crc = crc_of(await file.read_at(n_bytes - _U32.size, _U32.size))
        except FileNotFoundError:
            raise NotFound("snapshot", path, "a newer one has taken its place") from None
        except OSError as error:
            raise from_os_error(error, "open the snapshot", path) from error
        return FileSource(file, n_bytes, crc)

    async def open_receiver(self, offer: SnapshotOffer) -> "PartFile":
        """Begin or go on to receive.

        Raises:
            TooLarge: More is announced than a snapshot can be.
            UnavailableError: The disk failed.
        """
        if not 0 < offer.n_bytes <= FILE_BYTES_MAX:
            raise TooLarge(f"snapshot {offer.index}", offer.n_bytes, FILE_BYTES_MAX)
        path = f"{self.path}/incoming-{offer.index:020d}-{offer.term:020d}-{offer.crc:08x}.part"
        try:
            file = await self._disk.open_append(path)
            if file.size_bytes() > offer.n_bytes:
                file.close()
                await self._disk.remove(path)
                file = await self._disk.open_append(path)
        except OSError as error:
            raise from_os_error(error, "receive the snapshot", path) from error
        return PartFile(self, file, path, offer)

    def file(self, index: int, term: int) -> str:
        """Return where the snapshot of an index is."""
        return f"{self.path}/snapshot-{index:020d}-{term:020d}.raft"


class FileSource:
    """A snapshot file that is being sent: `SnapshotSource`."""

    def __init__(self, file: OpenFile, n_bytes: int, crc: int) -> None:
        self.n_bytes = n_bytes
        self.crc = crc
        self._file: OpenFile | None = file

    async def read(self, offset: int, n_bytes: int) -> bytes:
        """See `SnapshotSource.read`."""
        if self._file is None:
            return b""
        return await self._file.read_at(offset, n_bytes)

    def close(self) -> None:
        """See `SnapshotSource.close`."""
        if self._file is not None:
            self._file.close()
            self._file = None


class PartFile:
    """A snapshot that is being received into a file of its own.

    Args:
        folder: Where it will be.
        file: What came so far.
        path: Its name.
        offer: What was announced.
    """

    def __init__(self, folder: SnapshotFolder, file: OpenFile, path: str, offer: SnapshotOffer) -> None:
        self.offer = offer
        self.offset = file.size_bytes()
        self._folder = folder
        self._file: OpenFile | None = file
        self._path = path

    async def write(self, data: bytes) -> None:
        """Append what came.

        Raises:
            InvalidArgument: More than was announced, or after the end.
            UnavailableError: The disk failed or is full.
        """
        if self._file is None or self.offset + len(data) > self.offer.n_bytes:
            raise InvalidArgument("snapshot", self.offer.index, f"more than the {self.offer.n_bytes} bytes announced")
        try:
            await self._file.append(data)
        except OSError as error:
            raise from_os_error(error, "receive the snapshot", self._path) from error
        self.offset += len(data)

    async def finish(self) -> Snapshot:
        """Check what came, make it durable under its name, and return it.

        Raises:
            DigestMismatch: It is not what was announced; it is removed.
            BadRecord: It is damaged; it is removed.
            UnavailableError: The disk failed.
        """
        disk = self._folder._disk
        assert self._file is not None
        try:
            await self._file.sync()
            self.close()
            data = await disk.read(self._path, n_bytes_max=FILE_BYTES_MAX)
            if len(data) != self.offer.n_bytes or len(data) < _U32.size or crc_of(data) != self.offer.crc:
                await disk.remove(self._path)
                raise DigestMismatch(f"snapshot {self.offer.index}", f"{self.offer.n_bytes} bytes", f"{len(data)} bytes")
            try:
                snapshot = parse_snapshot(data, self._path)
            except BadRecord:
                await disk.remove(self._path)
                raise
            await disk.rename(self._path, self._folder.file(snapshot.header.index, snapshot.header.term))
            await disk.sync_directory(self._folder.path)
        except OSError as error:
            raise from_os_error(error, "receive the snapshot", self._path) from error
        return snapshot

    def close(self) -> None:
        """Keep what came for the next try; twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _pack_head(header: SnapshotHeader) -> bytes:
    packed = msgspec.msgpack.encode(header)
    return b"".join((MAGIC, _U32.pack(len(packed)), packed))


def _cut(*streams: Iterable[bytes]) -> Iterator[bytes | memoryview]:
    """Return pieces in pieces that one write takes."""
    for stream in streams:
        for piece in stream:
            if len(piece) <= PIECE_BYTES:
                yield piece
            else:
                whole = memoryview(piece)
                yield from (whole[begin : begin + PIECE_BYTES] for begin in range(0, len(piece), PIECE_BYTES))


def _index_of(name: str) -> int:
    """Return the index in a file's name, 0 if it is no such name."""
    digits = name.split("-")[1] if name.count("-") >= 2 else ""
    return int(digits) if digits.isascii() and digits.isdigit() else 0
