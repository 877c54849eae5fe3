r"""Backups of the replicated state: all keys at one revision as one file, and back into a cluster that runs.

    "isopod cluster backup 1\n" · one line of JSON that says what it is · zstd of MessagePack [[key, value], ...] · SHA-256 of all before

What says who is in the cluster (members, tokens) is left out both ways: a backup goes into another cluster as well as into its own, and
brings no node and no token with it. Leases are not kept either: what hung on one is there without it.

A backup is packed in pieces, for other work to be done between them. A restore is made of many transactions: `replace_all` is one part of
it, and `isopod.cluster.members.restoring` sees to it that it is done wholly or not at all.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import msgspec
import zstandard

from isopod.api.cluster import BackupInfo
from isopod.api.store.messages import TXN_OPS_MAX, Condition, Delete, PlainOp, Put, Txn
from isopod.cluster.members import records as r
from isopod.cluster.members.roster import Store
from isopod.cluster.store.image import array_head
from isopod.cluster.store.machine import StoreMachine
from isopod.world.errors import BadRecord

MAGIC: Final = b"isopod cluster backup 1\n"
DIGEST_BYTES: Final = 32
HEAD_BYTES_MAX: Final = 1 << 16
UNPACKED_BYTES_MAX: Final = 4 << 30
BATCH_BYTES_MAX: Final = 192 << 10
TIMEOUT_S: Final = 10.0
PIECE_BYTES: Final = 128 << 10
PIECE_ITEMS: Final = 1024
OWN: Final = (r.MEMBERS, r.HEALTH, r.REMOVED, r.TOKENS, r.RESTORE)
_encoder: Final = msgspec.msgpack.Encoder()


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup is of."""

    cluster_id: str
    revision: int
    index: int
    made_at_ns: int
    n_keys: int


class Backup(NamedTuple):
    """A backup that was read."""

    head: Head
    entries: Sequence[tuple[str, bytes]]


def is_own(key: str) -> bool:
    """Return whether a key is the cluster's own business, which backups leave out."""
    return key.startswith(OWN) or key == r.CLUSTER


class BackupMaker:
    """Makes the file of everything a machine holds now, whatever is written meanwhile.

    Args:
        machine: Which.
        cluster_id: Its cluster.
        now_ns: The wall time.
    """

    def __init__(self, machine: StoreMachine, cluster_id: str, now_ns: int) -> None:
        self._frozen = machine.keys.frozen()
        n_keys = sum(not is_own(key) for key in self._frozen.order)
        self._head = Head(cluster_id=cluster_id, revision=machine.revision, index=machine.index, made_at_ns=now_ns, n_keys=n_keys)
        self._digest = hashlib.sha256()
        self._n_bytes = 0

    def pieces(self) -> Iterator[bytes]:
        """Return the file in pieces of a few milliseconds' work each, once; an empty one says that there is nothing to write yet."""
        body = hashlib.sha256()
        packing = zstandard.ZstdCompressor(level=3).compressobj()
        begin = MAGIC + msgspec.json.encode(self._head) + b"\n"
        body.update(begin)
        yield self._counted(begin)
        for packed in self._packed():
            piece = packing.compress(packed)
            body.update(piece)
            yield self._counted(piece)
        piece = packing.flush()
        body.update(piece)
        yield self._counted(piece)
        yield self._counted(body.digest())

    def info(self) -> BackupInfo:
        """Return what is said of the file, when all pieces were taken."""
        head = self._head
        return BackupInfo(
            cluster_id=head.cluster_id,
            revision=head.revision,
            index=head.index,
            n_bytes=self._n_bytes,
            digest=self._digest.hexdigest(),
        )

    def _packed(self) -> Iterator[bytes]:
        buffer = bytearray(array_head(self._head.n_keys))
        for number, entry in enumerate(self._frozen.take(), 1):
            if not is_own(entry.key):
                _encoder.encode_into((entry.key, entry.value), buffer, -1)
            if len(buffer) >= PIECE_BYTES or not number % PIECE_ITEMS:
                yield bytes(buffer)
                buffer.clear()
        yield bytes(buffer)

    def _counted(self, piece: bytes) -> bytes:
        self._digest.update(piece)
        self._n_bytes += len(piece)
        return piece


def make_backup(machine: StoreMachine, cluster_id: str, now_ns: int) -> tuple[bytes, BackupInfo]:
    """Return the file of everything a machine holds now, and what is said of it: in one go, where nobody waits."""
    maker = BackupMaker(machine, cluster_id, now_ns)
    return b"".join(maker.pieces()), maker.info()


def read_backup(data: bytes) -> Backup:
    """Return what is in the file of a backup.

    Raises:
        BadRecord: It is none, or it is damaged.
    """
    if not data.startswith(MAGIC):
        raise BadRecord("backup", "it does not begin as one", "is it the right file? isopod cluster backup FILE makes one")
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise BadRecord("backup", "its check sum is wrong: it is damaged or cut off", "take another copy of it")
    end = body.find(b"\n", len(MAGIC), len(MAGIC) + HEAD_BYTES_MAX)
    try:
        head = msgspec.json.decode(body[len(MAGIC) : end], type=Head)
        entries = msgspec.msgpack.decode(_unpack(body[end + 1 :]), type=list[tuple[str, bytes]])
    except (msgspec.MsgspecError, zstandard.ZstdError, ValueError) as error:
        raise BadRecord("backup", str(error), "was it made by a newer isopod?") from error
    return Backup(head, [entry for entry in entries if not is_own(entry[0])])


def held(machine: StoreMachine) -> dict[str, bytes]:
    """Return what a machine holds that is not the cluster's own business."""
    keys = machine.keys
    return {key: keys.entries[key].value for key in keys.keys("") if not is_own(key)}


async def replace_all(store: Store, machine: StoreMachine, backup: Backup, conditions: tuple[Condition, ...] = ()) -> bool:
    """Have the cluster hold what a backup holds, and nothing else, by as many transactions as that takes.

    Args:
        store: The store.
        machine: What this node has of it; made sure of by the caller to be new.
        backup: The backup.
        conditions: Of every transaction.

    Returns:
        Whether it was done; False if a condition did not hold.

    Raises:
        IsopodError: A transaction failed: some were done, and it may be begun again.
    """
    there, wanted = held(machine), dict(backup.entries)
    ops: list[PlainOp] = [Put(key, value) for key, value in wanted.items() if there.get(key) != value]
    ops += [Delete(key) for key in there if key not in wanted]
    for batch in _batches(ops):
        if not (await store.txn(Txn(conditions=conditions, then=tuple(batch)), timeout_s=TIMEOUT_S)).succeeded:
            return False
    return True


def _unpack(data: bytes) -> bytes:
    """Return what was packed; its size is known only when it is there, so it is bounded on the way."""
    parts: list[bytes] = []
    n_bytes = 0
    with zstandard.ZstdDecompressor().stream_reader(data) as reader:
        while part := reader.read(PIECE_BYTES):
            parts.append(part)
            n_bytes += len(part)
            if n_bytes > UNPACKED_BYTES_MAX:
                raise ValueError(f"more than {UNPACKED_BYTES_MAX} bytes")
    return b"".join(parts)


def _batches(ops: Sequence[PlainOp]) -> list[list[PlainOp]]:
    """Return operations in batches that fit into one transaction each."""
    batches: list[list[PlainOp]] = []
    n_bytes = BATCH_BYTES_MAX + 1
    for op in ops:
        size = len(op.value) + len(op.key) if isinstance(op, Put) else 64
        if n_bytes + size > BATCH_BYTES_MAX or len(batches[-1]) >= TXN_OPS_MAX:
            batches.append([])
            n_bytes = 0
        batches[-1].append(op)
        n_bytes += size
    return batches
