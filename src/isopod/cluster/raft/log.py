"""RaftLog: what one member must not forget, on a journal, and which snapshot file counts.

Records, of which the last of each kind counts (but for entries, which all do)::

    1 identity     cluster, node, incarnation, boot; written anew at every start, with the next boot
    2 entries      first index, last index (u64 each), the core's bytes; a later record replaces what it overlaps
    3 hard state   term, vote, commit, as the core writes them
    4 snapshot     index, term and length of the file from which the machine starts
    5 peer         a peer's incarnation, as it was first met

One Ready is one batch, so it is there whole or not at all. A commit index that moved alone waits for the next batch: nobody promised it.

Recovery: the machine starts from the snapshot's file, whose header holds the members at its index; the core gets all entries and hands out
those after that index again, membership changes included. So the members are always rebuilt from snapshot and log, never from a copy that
could be missing or old.

Compaction: once a snapshot is durable and its record too, everything that is no entry is written again, and the journal drops all records
before the first entry that is still wanted.

Incarnation: drawn when the folder is first used. A wiped disk under a known id has another, so its peers know that its votes are lost.

Source: Ongaro 2014, section 3.8 (persisted state) and chapter 5 (compaction).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from struct import Struct as Layout
from typing import Final, NamedTuple

import msgspec

from isopod.cluster.raft.codec import HardState, decode_hard_state, encode_hard_state
from isopod.cluster.raft.core import ConfState
from isopod.cluster.raft.ports import NodeId, TransportIdentity
from isopod.cluster.raft.settings import RaftSettings
from isopod.cluster.raft.snapshots import Captured, Snapshot, SnapshotFolder, SnapshotHeader
from isopod.journal import Journal, JournalLog, JournalMetrics, JournalSettings
from isopod.world.errors import BadRecord, DiskFull, ForeignCluster, IdentityConflict, InvalidArgument, IsopodError
from isopod.world.world import World

IDENTITY: Final = 1
ENTRIES: Final = 2
HARD_STATE: Final = 3
SNAPSHOT: Final = 4
PEER: Final = 5
FORMAT: Final = "isopod raft log 1"
FIRST_INDEX: Final = 1
"""Of the snapshot that a cluster begins with: every later member needs a snapshot, and learns the first members from it."""
FIRST_TERM: Final = 1
INCARNATION_BYTES: Final = 8
PEERS_MAX: Final = 4096
TURN_BYTES_MAX: Final = 4 << 20
MESSAGE_ROOM_BYTES: Final = 1 << 20
"""More than one message or entry takes."""
FULL_RETRY_S: Final = 0.5
_RANGE: Final = Layout("<QQ")


class IdentityRecord(msgspec.Struct, frozen=True, array_like=True):
    """Whose log it is."""

    cluster_id: str
    node_id: int
    incarnation: str
    boot: int


class SnapshotRecord(msgspec.Struct, frozen=True, array_like=True):
    """Which snapshot counts."""

    index: int
    term: int
    n_bytes: int


class PeerRecord(msgspec.Struct, frozen=True, array_like=True):
    """Who a peer is."""

    node_id: int
    incarnation: str


class Recovered(NamedTuple):
    """What a core and a machine start from."""

    hard_state: bytes
    snapshot: Snapshot | None
    records: list[bytes]


class _Unsaved(NamedTuple):
    """A batch that is not durable yet."""

    ticket: int
    lsn: int
    """0: the journal refused it, it has to be queued again."""
    batch: list[tuple[int, bytes]]


class _Stretch(NamedTuple):
    """A record of entries in the journal."""

    lsn: int
    first_index: int
    last_index: int
    n_bytes: int


class RaftLog:
    """Open with `RaftLog.open`; close after use.

    Args:
        journal: Where records go.
        snapshots: Where snapshot files are.
        identity: Whose it is.
    """

    def __init__(self, journal: Journal, snapshots: SnapshotFolder, identity: IdentityRecord) -> None:
        self.snapshots = snapshots
        self.identity = TransportIdentity(identity.cluster_id, identity.node_id, identity.incarnation)
        self.boot = identity.boot
        """Rises with every start: what is named after it is never named twice."""
        self.snapshot = SnapshotRecord(0, 0, 0)
        """The one that counts."""
        self.turn_bytes_max = min(TURN_BYTES_MAX, journal.settings.payload_bytes_max - MESSAGE_ROOM_BYTES)
        """How much one turn may bring, so that it fits into one record."""
        self._journal = journal
        self._hard_state = b""
        self._is_hard_state_due = False
        self._peers: dict[NodeId, str] = {}
        self._stretches: deque[_Stretch] = deque()
        self._n_entry_bytes = 0
        self._previous: SnapshotRecord | None = None
        self._unsaved: deque[_Unsaved] = deque()
        self._n_tickets = 0
        self._on_durable: Callable[[int], None] = _ignore
        self._on_full: Callable[[IsopodError | None], None] = _ignore
        self._retry: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.is_full = False
        """Whether the journal refuses batches for want of space."""
        journal.on_durable(self._on_journal)
        journal.on_refused(self._on_refused)

    @classmethod
    async def open(
        cls,
        world: World,
        folder: str,
        *,
        cluster_id: str,
        node_id: NodeId,
        bootstrap: "tuple[ConfState, bytes] | None",
        incarnation: str | None = None,
        log: JournalLog | None = None,
        metrics: JournalMetrics | None = None,
        journal_settings: JournalSettings | None = None,
    ) -> "tuple[RaftLog, Recovered]":
        """Open the log of a node, or begin it.

        Args:
            world: Whose disk.
            folder: Where; made if missing.
            cluster_id: Whose log it must be.
            node_id: The same.
            bootstrap: For a log that is begun: the first members and the empty machine; None for a node that joins.
            incarnation: What this disk is called; drawn if None.
            log: Told of recoveries.
            metrics: Told of writes.
            journal_settings: Other than the defaults.

        Raises:
            ForeignCluster: The folder belongs to another cluster.
            IdentityConflict: ... to another node or incarnation.
            JournalDamaged: The journal lost records.
            BadRecord: A record or the snapshot cannot be read.
            InUse: Another process has it open.
            InvalidArgument: The journal's records are too small.
            UnavailableError: The disk failed.
        """
        settings = journal_settings or JournalSettings(segment_bytes=16 << 20, compress=False, archive_n_max=0)
        if settings.payload_bytes_max < 2 * MESSAGE_ROOM_BYTES:
            raise InvalidArgument("raft journal records", settings.payload_bytes_max, f"must be at least {2 * MESSAGE_ROOM_BYTES} bytes")
        journal = await Journal.open(world, f"{folder}/log", format=FORMAT, settings=settings, log=log, metrics=metrics)
        try:
            snapshots = SnapshotFolder(world, f"{folder}/snapshots")
            await snapshots.prepare()
            found = await _Recovery(journal).run()
            before = found.identity
            if before is None:
                drawn = incarnation or world.random.token_hex(INCARNATION_BYTES)
                before = IdentityRecord(cluster_id, node_id, drawn, 0)
            _check_identity(before, folder, cluster_id=cluster_id, node_id=node_id)
            if incarnation is not None and before.incarnation != incarnation:
                raise IdentityConflict(node_id, f"the folder {folder} is of another incarnation", "was it copied from another node?")
            identity = IdentityRecord(cluster_id, node_id, before.incarnation, before.boot + 1)
            self = cls(journal, snapshots, identity)
            recovered = await self._take(found, bootstrap, identity)
        except BaseException:
            await journal.close()
            raise
        return self, recovered

    @property
    def entry_bytes(self) -> int:
        """The bytes of all entries that are kept."""
        return self._n_entry_bytes

    def append(self, records: bytes, first_index: int, last_index: int, *, hard_state: bytes) -> int:
        """Queue what a Ready wants durable, as one batch.

        Args:
            records: Entries as the core gave them, b"" for none.
            first_index: Of the entries; 0 for none.
            last_index: The same.
            hard_state: b"" if unchanged.

        Returns:
            A ticket, one more than the last one; `on_durable` tells it when all up to it is durable.
        """
        batch: list[tuple[int, bytes]] = []
        if records:
            batch.append((ENTRIES, _RANGE.pack(first_index, last_index) + records))
        if hard_state:
            self._hard_state = hard_state
        if hard_state or self._is_hard_state_due:
            batch.append((HARD_STATE, self._hard_state))
        self._is_hard_state_due = False
        return self._queue(batch, begin=False)

    def flush(self) -> bool:
        """Begin to write what `append` queued; return whether it is durable already, and all have been told."""
        return self._journal.flush()

    def install(self, record: SnapshotRecord, records: bytes, *, hard_state: bytes) -> int:
        """Queue that the log is replaced by a received snapshot, whose file is durable; returns as `append`."""
        self._hard_state = hard_state or self._hard_state
        self._is_hard_state_due = False
        batch = [(SNAPSHOT, msgspec.msgpack.encode(record)), (HARD_STATE, self._hard_state)]
        if records:
            batch.append((ENTRIES, _RANGE.pack(record.index, record.index) + records))
        self._previous, self.snapshot = None, record
        return self._queue(batch)

    def defer(self, hard_state: bytes) -> None:
        """Keep a HardState whose commit index alone moved, for the next batch."""
        self._hard_state = hard_state
        self._is_hard_state_due = True

    @property
    def n_unsaved(self) -> int:
        """How many batches are not durable yet."""
        return len(self._unsaved)

    def on_durable(self, callback: Callable[[int], None]) -> None:
        """Have the last durable ticket told, in the loop's thread."""
        self._on_durable = callback

    def on_full(self, callback: Callable[[IsopodError | None], None]) -> None:
        """Be told when the disk is full (why) and when it no longer is (None). Nothing is lost: what was refused is queued again."""
        self._on_full = callback

    # --- snapshots ----------------------------------------------------------------------------------------------------

    async def save_snapshot(self, snapshot: Snapshot | Captured) -> SnapshotRecord:
        """Make a snapshot of this node's machine durable, and the one that counts.

        Raises:
            UnavailableError: The disk failed or is full; the last one still counts.
        """
        n_bytes = await self.snapshots.save(snapshot)
        header = snapshot.header
        record = SnapshotRecord(header.index, header.term, n_bytes)
        if record.index <= self.snapshot.index:
            return self.snapshot  # one that was received meanwhile is newer
        batch = [(SNAPSHOT, msgspec.msgpack.encode(record)), (HARD_STATE, self._backed_hard_state(record.index))]
        await self._journal.commit(batch)
        if record.index > self.snapshot.index:
            self._previous, self.snapshot = self.snapshot, record
        return record

    def index_to_keep_from(self, settings: RaftSettings) -> int:
        """Return up to which index entries may go: behind the snapshot a bounded tail stays."""
        index = self.snapshot.index
        n_bytes = 0
        for stretch in reversed(self._stretches):
            if stretch.first_index > index:
                continue
            n_bytes += stretch.n_bytes
            if n_bytes > settings.keep_log_bytes or index - stretch.first_index >= settings.keep_log_entries:
                return min(stretch.last_index, index)
        return 0

    async def compact(self, index: int) -> None:
        """Let go of entries up to `index`, which the snapshot covers, and of files that no longer count.

        Raises:
            UnavailableError: The disk failed or is full.
        """
        keep_lsn = 0
        while self._stretches and self._stretches[0].last_index <= index:
            stretch = self._stretches.popleft()
            self._n_entry_bytes -= stretch.n_bytes
            keep_lsn = stretch.lsn
        kept = [(self.snapshot.index, self.snapshot.term)]
        if self._previous is not None:
            kept.append((self._previous.index, self._previous.term))
        if keep_lsn:
            await self._journal.commit(self._state_records())
            await self._journal.compact(keep_lsn)
        await self.snapshots.remove_but(kept)

    # --- peers --------------------------------------------------------------------------------------------------------

    def incarnation_of(self, node_id: NodeId) -> str | None:
        """Return the incarnation under which a peer was first met."""
        return self._peers.get(node_id)

    async def save_state(self) -> None:
        """Make the HardState as it is now durable, and with it all that was queued before.

        Raises:
            UnavailableError: The disk failed or is full.
        """
        if self._hard_state:
            await self._journal.commit([(HARD_STATE, self._backed_hard_state())])

    def learn_peer(self, node_id: NodeId, incarnation: str) -> None:
        """Remember who a peer is; durable with the next batch."""
        if self._peers.get(node_id) != incarnation and len(self._peers) < PEERS_MAX:
            self._peers[node_id] = incarnation
            self._queue([(PEER, msgspec.msgpack.encode(PeerRecord(node_id, incarnation)))])

    async def close(self) -> None:
        """Write what waits, and give the journal's lock back."""
        self._is_closed = True
        if self._retry is not None:
            self._retry.cancel()
        if self._is_hard_state_due and not self.is_full:
            self._is_hard_state_due = False
            self._queue([(HARD_STATE, self._backed_hard_state())])
        await self._journal.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _queue(self, batch: list[tuple[int, bytes]], *, begin: bool = True) -> int:
        """Give a batch to the journal, in its turn."""
        self._n_tickets += 1
        lsn = 0
        if not self.is_full:
            try:
                lsn = self._append(batch, begin=begin)
            except DiskFull as error:
                self._become_full(error)
        self._unsaved.append(_Unsaved(self._n_tickets, lsn, batch))
        return self._n_tickets

    def _append(self, batch: list[tuple[int, bytes]], *, begin: bool = True) -> int:
        lsn = self._journal.append(batch, begin=begin)
        first_lsn = lsn - len(batch) + 1
        for offset, (kind, payload) in enumerate(batch):
            if kind == ENTRIES:
                first_index, last_index = _RANGE.unpack_from(payload)
                self._note(_Stretch(first_lsn + offset, first_index, last_index, len(payload)))
        return lsn

    def _on_journal(self, lsn: int) -> None:
        """The journal is durable up to there."""
        unsaved = self._unsaved
        ticket = 0
        while unsaved and 0 < unsaved[0].lsn <= lsn:
            ticket = unsaved.popleft().ticket
        if ticket:
            self._on_durable(ticket)

    def _on_refused(self, first_lsn: int, error: IsopodError) -> None:
        """The journal refused all batches from there on: they come again, in their order. What failed for good ends the process."""
        if not isinstance(error, DiskFull):
            return
        while self._stretches and self._stretches[-1].lsn >= first_lsn:
            self._n_entry_bytes -= self._stretches.pop().n_bytes
        for position, unsaved in enumerate(self._unsaved):
            if unsaved.lsn >= first_lsn:
                self._unsaved[position] = unsaved._replace(lsn=0)
        self._become_full(error)

    def _become_full(self, error: IsopodError) -> None:
        if not self.is_full:
            self.is_full = True
            self._on_full(error)
        if self._retry is None and not self._is_closed:
            self._retry = asyncio.get_running_loop().call_later(FULL_RETRY_S, self._try_again)

    def _try_again(self) -> None:
        """Queue again what was refused."""
        self._retry = None
        self.is_full = False
        for position, unsaved in enumerate(self._unsaved):
            if unsaved.lsn == 0:
                try:
                    self._unsaved[position] = unsaved._replace(lsn=self._append(unsaved.batch))
                except DiskFull as error:
                    self.is_full = True
                    self._become_full(error)
                    return
        self._on_full(None)

    def _note(self, stretch: _Stretch) -> None:
        self._stretches.append(stretch)
        self._n_entry_bytes += stretch.n_bytes

    def _backed_hard_state(self, snapshot_index: int = 0) -> bytes:
        """Return the HardState with a commit index within what the journal has taken: entries that a full disk refuses may lie between, and
        a log that ends before its commit index is taken for one that lost its tail."""
        if not self._hard_state:
            return self._hard_state
        state = decode_hard_state(self._hard_state)
        commit = min(state.commit, max(snapshot_index, _last_index(self.snapshot, self._stretches)))
        return self._hard_state if commit == state.commit else encode_hard_state(state._replace(commit=commit))

    def _state_records(self) -> list[tuple[int, bytes]]:
        """Return everything that is no entry."""
        identity = IdentityRecord(*self.identity, self.boot)
        batch = [(IDENTITY, msgspec.msgpack.encode(identity)), (SNAPSHOT, msgspec.msgpack.encode(self.snapshot))]
        if self._hard_state:
            batch.append((HARD_STATE, self._backed_hard_state()))
        for node_id, incarnation in self._peers.items():
            batch.append((PEER, msgspec.msgpack.encode(PeerRecord(node_id, incarnation))))
        return batch

    async def _take(self, found: "_Recovery", bootstrap: "tuple[ConfState, bytes] | None", identity: IdentityRecord) -> Recovered:
        """Use what was found, and write the new boot down before anything is named after it."""
        self._hard_state = found.hard_state
        self._peers = found.peers
        snapshot = None
        if found.identity is None and bootstrap is not None:
            conf_state, machine = bootstrap
            header = SnapshotHeader(identity.cluster_id, FIRST_INDEX, FIRST_TERM, conf_state, 0)
            snapshot = Snapshot(header, machine)
            self.snapshot = SnapshotRecord(FIRST_INDEX, FIRST_TERM, await self.snapshots.save(snapshot))
            self._hard_state = encode_hard_state(HardState(FIRST_TERM, 0, FIRST_INDEX))
        elif found.snapshot is not None and found.snapshot.index:  # 0: it joined, and nothing came yet
            self.snapshot = found.snapshot
            snapshot = await self.snapshots.load(found.snapshot.index, found.snapshot.term)
            if snapshot.header.cluster_id != identity.cluster_id:
                raise ForeignCluster(f"the snapshot {self.snapshot.index}", snapshot.header.cluster_id, identity.cluster_id)
        self._hard_state = _fitted(self._hard_state, self.snapshot, found.stretches)
        for stretch in found.stretches:
            self._note(stretch)
        await self._journal.commit(self._state_records())
        return Recovered(self._hard_state, snapshot, found.records)


class _Recovery:
    """Reads a journal from its first record to its last.

    Args:
        journal: Which.
    """

    def __init__(self, journal: Journal) -> None:
        self.identity: IdentityRecord | None = None
        self.hard_state = b""
        self.snapshot: SnapshotRecord | None = None
        self.peers: dict[NodeId, str] = {}
        self.records: list[bytes] = []
        self.stretches: list[_Stretch] = []
        self._journal = journal

    async def run(self) -> "_Recovery":
        """Read. Raises BadRecord: a record is none of these."""
        async for record in self._journal.read():
            try:
                self._on_record(record.lsn, record.kind, record.payload)
            except msgspec.MsgspecError as error:
                raise BadRecord(f"{record.lsn} of the Raft log", str(error)) from None
        return self

    def _on_record(self, lsn: int, kind: int, payload: bytes) -> None:
        match kind:
            case 1:
                self.identity = msgspec.msgpack.decode(payload, type=IdentityRecord)
            case 2:
                if len(payload) <= _RANGE.size:
                    raise BadRecord(f"{lsn} of the Raft log", "entries without entries")
                first_index, last_index = _RANGE.unpack_from(payload)
                records = payload[_RANGE.size :]
                self.records.append(records)
                self.stretches.append(_Stretch(lsn, first_index, last_index, len(records)))
            case 3:
                self.hard_state = payload
            case 4:
                self.snapshot = msgspec.msgpack.decode(payload, type=SnapshotRecord)
            case 5:
                peer = msgspec.msgpack.decode(payload, type=PeerRecord)
                self.peers[peer.node_id] = peer.incarnation
            case _:
                raise BadRecord(f"{lsn} of the Raft log", f"kind {kind}", "is this isopod older than the one that wrote it?")


def members_of(conf_state: ConfState) -> Sequence[NodeId]:
    """Return everybody who gets entries under these members, sorted."""
    return sorted({*conf_state.voters, *conf_state.learners, *conf_state.voters_outgoing, *conf_state.learners_next})


def _last_index(snapshot: SnapshotRecord, stretches: Sequence[_Stretch]) -> int:
    return max(snapshot.index, stretches[-1].last_index if stretches else 0)


def _fitted(hard_state: bytes, snapshot: SnapshotRecord, stretches: Sequence[_Stretch]) -> bytes:
    """Return a HardState that is not older than the snapshot.

    Raises:
        BadRecord: Committed entries are missing: with them a vote of this node may be, and it must not vote again.
    """
    state = decode_hard_state(hard_state)
    last_index = _last_index(snapshot, stretches)
    if state.commit > last_index:
        why = f"it ends at entry {last_index}, but {state.commit} was committed: its tail is lost"
        raise BadRecord("of the Raft log", why, "let the other members `isopod cluster leave` this node, empty its folder, and join anew")
    commit = max(state.commit, snapshot.index)
    return encode_hard_state(state._replace(commit=commit, term=max(state.term, snapshot.term)))


def _ignore(_: object) -> None:
    """Nobody asked to be told."""


def _check_identity(found: IdentityRecord, folder: str, *, cluster_id: str, node_id: NodeId) -> None:
    if found.cluster_id != cluster_id:
        raise ForeignCluster(f"the folder {folder}", found.cluster_id, cluster_id)
    if found.node_id != node_id:
        raise IdentityConflict(
            node_id, f"the folder {folder} is node {found.node_id}'s", "start it with that id, or with another --data-dir"
        )
