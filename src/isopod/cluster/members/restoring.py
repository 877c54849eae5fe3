"""Restoring: a backup put in the place of what a running cluster holds, wholly or not at all, whoever dies meanwhile.

    staging     the file is written into the store piece by piece; what the cluster holds is as it was
    applying    all pieces are there: the leader makes the state that of the backup, by as many transactions as that takes
    (gone)      it is done: mark and pieces went by one transaction

A node that dies while it stages leaves nothing but pieces, which the next restore, or in time the leader, removes. From the turn to
`applying` on nobody is needed who has the file: whoever leads goes on, and comes to the same end. Meanwhile users' reads and writes are
refused (`refuse_users`): they would see half of one state and half of another.

Every transaction has the mark's revision as its condition. So of two restores the later one wins, and an old leader that is still at work
changes nothing of what came after.
"""

import asyncio
import hashlib
from contextlib import suppress
from typing import Final

import msgspec

from isopod.api.cluster import Restored
from isopod.api.store.messages import Condition, Delete, DeletePrefix, PlainOp, Put, Txn, TxnResult
from isopod.cluster.members import records as r
from isopod.cluster.members.backup import Backup, held, read_backup, replace_all
from isopod.cluster.members.ports import Raft
from isopod.cluster.members.registry import Registry
from isopod.cluster.store.replica import Replica
from isopod.runtime.logger import Logger
from isopod.world.errors import BadRecord, CorruptError, DeadlineExceeded, InUse, IsopodError, WrongState
from isopod.world.world import World

PART_BYTES: Final = 128 << 10
TIMEOUT_S: Final = 10.0
RESTORE_S: Final = 300.0
"""How long a caller waits; the leader goes on."""
POLL_S: Final = 0.1
RETRY_S: Final = 1.0
ROUNDS_MAX: Final = 5
"""So often the leader looks whether nodes wrote something meanwhile."""
FORGOTTEN_NS: Final = 3600 * 1_000_000_000
"""After so long nobody stages any more."""


class Restorer:
    """Puts backups back.

    Args:
        world: For an id and the time.
        raft: Who leads.
        store: What is restored.
        registry: The mark, as this node has it.
        logger: Told of every restore.
    """

    def __init__(self, world: World, raft: Raft, store: Replica, registry: Registry, *, logger: Logger) -> None:
        self._world = world
        self._raft = raft
        self._store = store
        self._registry = registry
        self._logger = logger
        self._woken = asyncio.Event()
        registry.on_restore = self.wake

    def refuse_users(self) -> None:
        """Refuse a user's call while the state is neither the old one nor the new one.

        Raises:
            InUse: It is so.
        """
        mark = self._registry.restore
        if mark is not None and mark.state == "applying":
            raise InUse("the store", "of this cluster", "a restore", "try again when it is done: isopod cluster status")

    async def restore(self, data: bytes, *, force: bool, timeout_s: float = RESTORE_S) -> Restored:
        """Have the cluster hold what a backup holds, and nothing else.

        Args:
            data: The file.
            force: Also if the cluster holds something.
            timeout_s: How long to wait for the end; the leader goes on after it.

        Raises:
            BadRecord: It is no backup, or damaged.
            WrongState: The cluster holds something, and `force` was not said; or another restore took this one's place.
            InUse: Another restore is being applied.
            DeadlineExceeded: It is not done yet; it goes on.
            IsopodError: A transaction failed; nothing was changed.
        """
        backup = read_backup(data)
        await self._store.barrier()
        mark = self._registry.restore
        if mark is not None and mark.state == "applying":
            raise InUse("the store", "of this cluster", "another restore", "wait until it is done: isopod cluster status")
        n_held = len(held(self._store.machine))
        if n_held and not force:
            raise WrongState(
                "store", "of the cluster", f"not empty: it holds {n_held} keys", "restore into it", hint="to replace them all: --force"
            )
        staged = await self._stage(data, backup)
        await self._wait(staged, timeout_s)
        return Restored(n_keys=len(backup.entries), source_cluster_id=backup.head.cluster_id, source_revision=backup.head.revision)

    async def run(self) -> None:
        """As the leader, finish what was staged and remove what was left, until cancelled."""
        while True:
            self._woken.clear()
            mark = self._registry.restore
            pause_s: float | None = None
            if mark is not None and self._raft.is_leader:
                try:
                    pause_s = await self._look(mark)
                except IsopodError as error:
                    self._logger.warning("cluster.restore_waits", id=mark.id, why=error.message)
                    pause_s = RETRY_S
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()

    def wake(self) -> None:
        """The mark changed, or who leads."""
        self._woken.set()

    # --- staging ------------------------------------------------------------------------------------------------------

    async def _stage(self, data: bytes, backup: Backup) -> r.RestoreRecord:
        """Write the file's pieces down, and hand them to the leader; return the mark."""
        mark = r.RestoreRecord(
            id=self._world.random.token_hex(8),
            state="staging",
            digest=hashlib.sha256(data).hexdigest(),
            n_parts=-(-len(data) // PART_BYTES),
            began_at_ns=self._world.clock.now_ns(),
            source_cluster_id=backup.head.cluster_id,
            source_revision=backup.head.revision,
        )
        begun = await self._txn((), DeletePrefix(r.RESTORE_PARTS), _put(mark))
        revision = begun.revision
        try:
            for number in range(mark.n_parts):
                piece = data[number * PART_BYTES : (number + 1) * PART_BYTES]
                self._check(await self._txn(_while(revision), Put(r.restore_part_key(number), piece)))
            self._check(await self._txn(_while(revision), _put(msgspec.structs.replace(mark, state="applying"))))
        except BaseException:
            # The mark is still that of a restore that only stages, or somebody else's: then nothing of it is removed.
            cleaning = asyncio.ensure_future(self._drop(revision))
            await asyncio.gather(cleaning, return_exceptions=True)
            raise
        self._logger.info("cluster.restore_staged", id=mark.id, parts=mark.n_parts, source=mark.source_cluster_id)
        return mark

    def _check(self, result: TxnResult) -> None:
        if not result.succeeded:
            raise WrongState("restore", "", "replaced by a later one", "go on", hint="nothing of this one was applied")

    async def _wait(self, staged: r.RestoreRecord, timeout_s: float) -> None:
        """Wait until the mark is gone."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._store.barrier()
                    mark = self._registry.restore
                    if mark is None or mark.id != staged.id:
                        return
                    if mark.state == "failed":
                        raise BadRecord("backup", mark.why, "nothing was changed; begin again")
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise DeadlineExceeded("the restore, which goes on", timeout_s) from None

    # --- the leader's part --------------------------------------------------------------------------------------------

    async def _look(self, mark: r.RestoreRecord) -> float:
        """Do what is to be done; return when to look again, in seconds."""
        revision = self._registry.revision(r.RESTORE_STATE)
        left_ns = mark.began_at_ns + FORGOTTEN_NS - self._world.clock.now_ns()
        if mark.state == "applying":
            await self._apply(mark, revision)
        elif left_ns <= 0:
            await self._drop(revision)
            self._logger.warning("cluster.restore_forgotten", id=mark.id)
        else:
            return left_ns / 1e9 + RETRY_S
        return RETRY_S

    async def _apply(self, mark: r.RestoreRecord, revision: int) -> None:
        """Make the state that of the backup, and take the mark away with the pieces."""
        await self._store.barrier()
        machine = self._store.machine
        try:
            backup = self._staged(mark)
        except CorruptError as error:
            failed = msgspec.structs.replace(mark, state="failed", why=error.message)
            await self._txn(_while(revision), DeletePrefix(r.RESTORE_PARTS), _put(failed))
            self._logger.error("cluster.restore_failed", id=mark.id, why=error.message)
            return
        wanted = dict(backup.entries)
        for _ in range(ROUNDS_MAX):
            if not await replace_all(self._store, machine, backup, _while(revision)):
                return  # another leader was quicker, or a later restore came
            if held(machine) == wanted:
                break
        if (await self._txn(_while(revision), DeletePrefix(r.RESTORE_PARTS), Delete(r.RESTORE_STATE))).succeeded:
            self._logger.info("cluster.restored", id=mark.id, n_keys=len(wanted), source=mark.source_cluster_id)

    def _staged(self, mark: r.RestoreRecord) -> Backup:
        """Return the backup that was staged. Raises CorruptError: its pieces make none."""
        entries = self._store.machine.keys.entries
        parts = [entries.get(r.restore_part_key(number)) for number in range(mark.n_parts)]
        data = b"".join(part.value for part in parts if part is not None)
        if hashlib.sha256(data).hexdigest() != mark.digest:
            raise BadRecord("backup", f"{sum(part is None for part in parts)} of its {mark.n_parts} pieces are missing or changed")
        return read_backup(data)

    async def _drop(self, revision: int) -> None:
        """Take a mark away with the pieces."""
        await self._txn(_while(revision), DeletePrefix(r.RESTORE_PARTS), Delete(r.RESTORE_STATE))

    async def _txn(self, conditions: tuple[Condition, ...], *ops: PlainOp) -> TxnResult:
        return await self._store.txn(Txn(conditions=conditions, then=ops), timeout_s=TIMEOUT_S)


def _put(mark: r.RestoreRecord) -> Put:
    return Put(r.RESTORE_STATE, msgspec.json.encode(mark))


def _while(revision: int) -> tuple[Condition, ...]:
    """Return that the mark is as it was."""
    return (Condition(r.RESTORE_STATE, "mod_revision", "=", revision),)
