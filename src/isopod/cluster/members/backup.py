r"""Backups of the replicated state: all keys at one revision as one file, and back into a cluster that runs.

    "isopod cluster backup 1\n" · one line of JSON that says what it is · zstd of MessagePack [[key, value], ...] · SHA-256 of all before

What says who is in the cluster (members, tokens) is left out both ways: a backup goes into another cluster as well as into its own, and
brings no node and no token with it. Leases are not kept either: what hung on one is there without it. A restore is made of many
transactions; one that is interrupted is begun again, and leads to the same end.
"""

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec
import zstandard

from isopod.api.cluster import BackupInfo, Restored
from isopod.api.store.messages import TXN_OPS_MAX, Delete, PlainOp, Put, Txn
from isopod.cluster.members import records as r
from isopod.cluster.members.roster import Store
from isopod.cluster.store.machine import StoreMachine
from isopod.world.errors import BadRecord, WrongState

MAGIC: Final = b"isopod cluster backup 1\n"
DIGEST_BYTES: Final = 32
HEAD_BYTES_MAX: Final = 1 << 16
UNPACKED_BYTES_MAX: Final = 4 << 30
BATCH_BYTES_MAX: Final = 192 << 10
TIMEOUT_S: Final = 10.0
OWN: Final = (r.MEMBERS, r.HEALTH, r.REMOVED, r.TOKENS)


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


def make_backup(machine: StoreMachine, cluster_id: str, now_ns: int) -> tuple[bytes, BackupInfo]:
    """Return the file of everything a machine holds now, and what is said of it."""
    keys = machine.keys
    entries = [(key, keys.entries[key].value) for key in keys.keys("") if not is_own(key)]
    head = Head(cluster_id=cluster_id, revision=machine.revision, index=machine.index, made_at_ns=now_ns, n_keys=len(entries))
    data = MAGIC + msgspec.json.encode(head) + b"\n" + zstandard.ZstdCompressor(level=3).compress(msgspec.msgpack.encode(entries))
    data += hashlib.sha256(data).digest()
    info = BackupInfo(
        cluster_id=cluster_id,
        revision=head.revision,
        index=head.index,
        n_bytes=len(data),
        digest=hashlib.sha256(data).hexdigest(),
    )
    return data, info


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


async def restore(store: Store, machine: StoreMachine, backup: Backup, *, force: bool) -> Restored:
    """Have the cluster hold what a backup holds, and nothing else.

    Args:
        store: The store.
        machine: What this node has of it; made sure of by the caller to be new.
        backup: The backup.
        force: Also if the cluster holds something.

    Raises:
        WrongState: It holds something, and `force` was not said.
        IsopodError: A transaction failed: begin again.
    """
    keys = machine.keys
    there = {key: keys.entries[key].value for key in keys.keys("") if not is_own(key)}
    if there and not force:
        raise WrongState("cluster", "", f"not empty: it holds {len(there)} keys", "restore into it", hint="to replace them all: --force")
    wanted = dict(backup.entries)
    ops: list[PlainOp] = [Put(key, value) for key, value in wanted.items() if there.get(key) != value]
    ops += [Delete(key) for key in there if key not in wanted]
    for batch in _batches(ops):
        await store.txn(Txn(then=tuple(batch)), timeout_s=TIMEOUT_S)
    return Restored(n_keys=len(wanted), source_cluster_id=backup.head.cluster_id, source_revision=backup.head.revision)


def _unpack(data: bytes) -> bytes:
    n_bytes = zstandard.get_frame_parameters(data).content_size
    if n_bytes > UNPACKED_BYTES_MAX:
        raise ValueError(f"{n_bytes} bytes are over {UNPACKED_BYTES_MAX}")
    return zstandard.ZstdDecompressor().decompress(data)


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
