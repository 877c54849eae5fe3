"""Roster: how the records about nodes are changed. Every change is a transaction with the record's revision as its condition, so that two
nodes that change the same record never lose one of the changes; who finds it changed looks again.

It decides nothing about votes: the leader's `steward` follows what is written here.
"""

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

import msgspec

from isopod.api.cluster import Health
from isopod.api.store.messages import Condition, Delete, Get, PlainOp, Put, Range, Txn, TxnResult
from isopod.api.store.operations import Found
from isopod.cluster.members import records as r
from isopod.cluster.members.config import Role
from isopod.cluster.members.registry import Registry
from isopod.cluster.members.tokens import TokenRecord, TokenUse, check_use, is_forgettable
from isopod.world.errors import AlreadyExists, Exhausted, IdentityConflict, NotFound
from isopod.world.world import World

T = TypeVar("T", bound=msgspec.Struct)
ATTEMPTS_MAX: Final = 8
MEMBERS_MAX: Final = 20_000
TOKENS_MAX: Final = 1000
TIMEOUT_S: Final = 5.0


class Store(Protocol):
    """What the roster needs of the replicated store: `Replica` has it."""

    async def txn(self, txn: Txn, *, timeout_s: float) -> TxnResult:
        """Do a transaction, at the leader, wherever that is."""

    def read(self, op: Get | Range, *, timeout_s: float) -> Awaitable[Found]:
        """Read as of now, whatever this node has."""


class Roster:
    """Changes records.

    Args:
        world: For the time.
        store: Where they are.
        registry: The records as this node has them.
    """

    def __init__(self, world: World, store: Store, registry: Registry) -> None:
        self._world = world
        self._store = store
        self.registry = registry

    async def found(self, cluster: r.ClusterRecord, member: r.MemberRecord, token: TokenRecord | None) -> None:
        """Write the first records of a cluster, if they are not there yet."""
        ops: list[PlainOp] = [_put(r.CLUSTER, cluster), _put(r.member_key(member.node_id), member)]
        if token is not None:
            ops.append(_put(r.token_record_key(token.id), token))
        await self._txn(Txn(conditions=(_unwritten(r.CLUSTER),), then=tuple(ops)))

    async def admit(self, wanted: r.MemberRecord, *, timeout_s: float = TIMEOUT_S) -> r.MemberRecord:
        """Write down a node that joins; one that is written down already stays as it is, but for its address and version.

        Args:
            wanted: Who comes.
            timeout_s: How long a transaction may take.

        Returns:
            The record.

        Raises:
            IdentityConflict: The id is another node's, or was this one's and is over.
            AlreadyExists: The address is another node's.
            Exhausted: There are too many nodes.
        """
        key = r.member_key(wanted.node_id)
        for _ in range(ATTEMPTS_MAX):
            record, revision = await self._read(key, r.MemberRecord, timeout_s)
            new = self._admitted(record, wanted)
            if new == record or await self._write(key, new, revision, timeout_s):
                return new
        raise _contended(key)

    async def find_member(self, node_id: int, *, timeout_s: float = TIMEOUT_S) -> r.MemberRecord | None:
        """Return a node's record as it is now, whatever this node has; None if there is none."""
        return (await self._read(r.member_key(node_id), r.MemberRecord, timeout_s))[0]

    async def change(
        self, node_id: int, change: Callable[[r.MemberRecord], r.MemberRecord], *, timeout_s: float = TIMEOUT_S
    ) -> r.MemberRecord:
        """Change a node's record.

        Args:
            node_id: Whose.
            change: Makes the new one of the present one.
            timeout_s: How long a transaction may take.

        Raises:
            NotFound: There is no such node.
        """
        key = r.member_key(node_id)
        for _ in range(ATTEMPTS_MAX):
            record, revision = await self._read(key, r.MemberRecord, timeout_s)
            if record is None:
                raise not_found(node_id)
            new = change(record)
            if new == record or await self._write(key, new, revision, timeout_s):
                return new
        raise _contended(key)

    async def set_voters_max(self, voters_max: int, *, timeout_s: float = TIMEOUT_S) -> r.ClusterRecord:
        """Change how many nodes vote at most; the leader follows.

        Raises:
            NotFound: The cluster's own record is not written yet.
        """
        for _ in range(ATTEMPTS_MAX):
            record, revision = await self._read(r.CLUSTER, r.ClusterRecord, timeout_s)
            if record is None:
                raise NotFound("record of", "the cluster", "it is being founded: try again")
            new = msgspec.structs.replace(record, voters_max=voters_max)
            if new == record or await self._write(r.CLUSTER, new, revision, timeout_s):
                return new
        raise _contended(r.CLUSTER)

    async def bury(self, node_id: int, why: str) -> None:
        """Write down that a node's life in the cluster is over, and drop its records, in one transaction."""
        record = self.registry.members.get(node_id)
        if record is None:
            return
        before = self.registry.removed.get(node_id)
        lives = dict.fromkeys((*(before.incarnations if before else ()), record.incarnation))
        kept = tuple(lives)[-r.INCARNATIONS_KEPT :]
        key = r.member_key(node_id)
        removed = r.RemovedRecord(incarnations=kept, removed_at_ns=self._world.clock.now_ns(), why=why)
        then = (_put(r.removed_key(node_id), removed), Delete(key), Delete(r.health_key(node_id)))
        await self._txn(Txn(conditions=(Condition(key, "mod_revision", "=", self.registry.revision(key)),), then=then))

    async def judge(self, node_id: int, health: Health, judge: int) -> None:
        """Write down what the leader thinks of a node; nothing is kept of those that are alive."""
        record = self.registry.members.get(node_id)
        if record is None:
            return
        key = r.health_key(node_id)
        now_ns = self._world.clock.now_ns()
        new = r.HealthRecord(health=health, since_ns=now_ns, incarnation=record.incarnation, judge=judge)
        op: PlainOp = Delete(key) if health == "alive" else _put(key, new)
        await self._txn(Txn(conditions=(Condition(r.member_key(node_id), "version", ">", 0),), then=(op,)))

    # --- tokens -------------------------------------------------------------------------------------------------------

    async def add_token(self, record: TokenRecord) -> None:
        """Keep a new token; those that nobody will ask for any more are dropped.

        Raises:
            AlreadyExists: It is there already.
            Exhausted: There are too many.
        """
        now_ns = self._world.clock.now_ns()
        old = [known for known in self.registry.tokens.values() if is_forgettable(known, now_ns)]
        if len(self.registry.tokens) - len(old) >= TOKENS_MAX:
            raise Exhausted("join tokens", str(TOKENS_MAX), "revoke some and let them expire: isopod cluster token list")
        key = r.token_record_key(record.id)
        drop = tuple(Delete(r.token_record_key(known.id)) for known in old[:100])
        found = await self._txn(Txn(conditions=(_unwritten(key),), then=(_put(key, record), *drop)))
        if not found.succeeded:
            raise AlreadyExists("join token", record.id)

    async def find_token(self, token_id: str) -> TokenRecord | None:
        """Return a token as it is now, whatever this node has; None if there is none."""
        return (await self._read(r.token_record_key(token_id), TokenRecord, TIMEOUT_S))[0]

    async def use_token(self, token_id: str, use: TokenUse, role: Role, *, timeout_s: float = TIMEOUT_S) -> TokenRecord:
        """Note that a node comes in by a token.

        Raises:
            TokenRefused: It may not.
        """
        key = r.token_record_key(token_id)
        for _ in range(ATTEMPTS_MAX):
            record, revision = await self._read(key, TokenRecord, timeout_s)
            new = check_use(record, use, role, now_ns=self._world.clock.now_ns())
            if new == record or await self._write(key, new, revision, timeout_s):
                return new
        raise _contended(key)

    async def revoke_token(self, token_id: str) -> TokenRecord:
        """Let nobody in by a token any more.

        Raises:
            NotFound: There is no such token.
        """
        key = r.token_record_key(token_id)
        for _ in range(ATTEMPTS_MAX):
            record, revision = await self._read(key, TokenRecord, TIMEOUT_S)
            if record is None:
                raise NotFound("join token", token_id, "see: isopod cluster token list")
            new = msgspec.structs.replace(record, is_revoked=True)
            if new == record or await self._write(key, new, revision, TIMEOUT_S):
                return new
        raise _contended(key)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _admitted(self, record: r.MemberRecord | None, wanted: r.MemberRecord) -> r.MemberRecord:
        """Return the record of a node that joins."""
        node_id = wanted.node_id
        if self.registry.is_removed(node_id, wanted.incarnation):
            raise IdentityConflict(node_id, "it was a member and was removed", "empty its data folder, and join with a new token")
        if record is not None and record.incarnation != wanted.incarnation:
            raise known_id(node_id)
        for other in self.registry.members.values():
            if other.node_id != node_id and other.address == wanted.address and not other.is_leaving:
                raise AlreadyExists(
                    "node at", f"{wanted.address} (node {other.node_id})", "give each node an address of its own: --bind, --advertise"
                )
        if record is not None:
            return msgspec.structs.replace(record, address=wanted.address, version=wanted.version)
        if len(self.registry.members) >= MEMBERS_MAX:
            raise Exhausted("nodes of the cluster", str(MEMBERS_MAX))
        return wanted

    async def _read(self, key: str, kind: type[T], timeout_s: float) -> tuple[T | None, int]:
        """Return a record as the leader has it, and its revision."""
        entry = (await self._store.read(Get(key), timeout_s=timeout_s)).entry
        if entry is None:
            return None, 0
        return msgspec.json.decode(entry.value, type=kind), entry.mod_revision

    async def _write(self, key: str, record: msgspec.Struct, revision: int, timeout_s: float) -> bool:
        condition = Condition(key, "mod_revision", "=", revision)
        return (await self._store.txn(Txn(conditions=(condition,), then=(_put(key, record),)), timeout_s=timeout_s)).succeeded

    async def _txn(self, txn: Txn) -> TxnResult:
        return await self._store.txn(txn, timeout_s=TIMEOUT_S)


def not_found(node_id: int) -> NotFound:
    """Return the error of a node that is no member."""
    return NotFound("node", f"Node {node_id} not found in cluster configuration", "see: isopod cluster members")


def known_id(node_id: int) -> IdentityConflict:
    """Return the error of a node whose id is another's, or whose disk was wiped."""
    return IdentityConflict(
        node_id,
        f"Node {node_id} already exists in cluster, with another disk than this one",
        f"if its disk was lost: isopod cluster leave {node_id} on another member, then join again; else take a free id",
    )


def _put(key: str, record: msgspec.Struct) -> Put:
    return Put(key, msgspec.json.encode(record))


def _unwritten(key: str) -> Condition:
    return Condition(key, "version", "=", 0)


def _contended(key: str) -> Exhausted:
    return Exhausted(f"attempts to change {key}", str(ATTEMPTS_MAX), "others change it all the time: try again", retry_after_s=0.5)
