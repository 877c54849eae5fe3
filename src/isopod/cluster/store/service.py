"""The store's verbs on a node: what comes by RPC is checked here and handed to the replica."""

from collections.abc import Awaitable, Sequence
from typing import Any, Final

import msgspec

from isopod.api.messages import Empty
from isopod.api.store import messages as m
from isopod.api.store import methods
from isopod.api.store.sender import check_client_command, error_of, pack_ops
from isopod.cluster.store.replica import PROPOSAL_S_MAX, Replica, in_parts
from isopod.net.rpc.call import AnyHandler, AnyMethod, Call, Later
from isopod.world.errors import ProtocolViolation, RefusedError

ANSWER_S: Final = 10.0
_decode: Final = msgspec.msgpack.Decoder(m.Outcome).decode


def handlers(replica: Replica, *, reserved: tuple[str, ...] = ()) -> list[tuple[AnyMethod, AnyHandler]]:
    """Return the handlers of all verbs of the store, for a server.

    Args:
        replica: Of this node.
        reserved: Keys that begin so are nobody's to write who comes this way: the cluster's own records, for a server of its users.
    """
    service = StoreService(replica, reserved)
    return [
        (methods.KV_APPLY, service.apply),
        (methods.KV_READ, service.read),
        (methods.KV_TXN, service.txn),
        (methods.KV_WATCH, service.watch),
        (methods.KV_STATUS, service.status),
        (methods.KV_CHECKPOINT, service.checkpoint),
        (methods.KV_CONSISTENCY, service.consistency),
        (methods.LEASE_KEEP, service.keep),
        (methods.LEASE_LIST, service.list_leases),
    ]


class StoreService:
    """The handlers.

    Args:
        replica: Of this node.
        reserved: Beginnings of keys that are not to be written.
    """

    def __init__(self, replica: Replica, reserved: tuple[str, ...] = ()) -> None:
        self._replica = replica
        self._reserved = reserved

    def apply(self, call: Call[Any, Any], request: m.KvApply) -> Awaitable[m.KvApplied]:
        """Check a command, and have it applied."""
        command = check_client_command(request.command)
        if self._reserved:
            check_unreserved(command.ops, self._reserved)
        return self._replica.apply(request.command, timeout_s=_left_s(call), n_hops=max(0, request.n_hops))

    def read(self, call: Call[Any, Any], request: m.KvRead) -> m.KvPages | Later:
        """Read."""
        return self._replica.read_many(request, timeout_s=_left_s(call))

    async def txn(self, call: Call[Any, Any], request: m.KvTxn) -> m.KvTxnDone:
        """Do a transaction, outside of any session."""
        command = pack_ops([request.txn])
        check_unreserved(check_client_command(command).ops, self._reserved)
        outcome = _decode((await self._replica.apply(command, timeout_s=_left_s(call))).outcome)
        if outcome.refusal is not None:
            raise error_of(outcome.refusal)
        result = outcome.results[0]
        if isinstance(result, m.Refusal):
            raise error_of(result)
        if not isinstance(result, m.TxnResult):
            raise ProtocolViolation("the store", "no transaction's result")
        return m.KvTxnDone(result=result)

    async def watch(self, call: Call[Any, m.KvChanges], request: m.KvWatch) -> Empty:
        """Stream changes until the caller leaves."""
        watch = self._replica.watch(
            request.prefix,
            exact=request.exact,
            from_revision=request.from_revision,
            progress_s=request.progress_s,
            verified=request.verified,
        )
        async with watch:
            async for changes in watch:
                for part in in_parts(changes):
                    await call.send(part)
        return Empty()

    def status(self, _call: Call[Any, Any], _request: Empty) -> m.StoreStatus:
        """Tell how this node sees the store."""
        return self._replica.status()

    def checkpoint(self, _call: Call[Any, Any], request: m.CheckpointQuery) -> m.CheckpointAnswer:
        """Tell what this node noted at a checkpoint."""
        return self._replica.checkpoint(request.index)

    async def consistency(self, call: Call[Any, Any], _request: Empty) -> m.ConsistencyReport:
        """Compare all members."""
        return await self._replica.check_consistency(timeout_s=_left_s(call))

    async def keep(self, call: Call[Any, Any], request: m.LeaseKeep) -> m.LeasesKept:
        """Keep leases alive."""
        return await self._replica.keep(request, timeout_s=_left_s(call))

    def list_leases(self, _call: Call[Any, Any], _request: Empty) -> m.LeaseList:
        """Tell of all leases."""
        return self._replica.lease_list()


def check_unreserved(ops: Sequence[m.Op], reserved: tuple[str, ...]) -> None:
    """Refuse what would write a reserved key.

    Raises:
        RefusedError: Something would.
    """
    for op in ops:
        if isinstance(op, m.Put | m.Delete):
            is_touched = op.key.startswith(reserved)
            what = op.key
        elif isinstance(op, m.DeletePrefix):
            is_touched = op.prefix.startswith(reserved) or any(each.startswith(op.prefix) for each in reserved)
            what = op.prefix
        elif isinstance(op, m.Txn):
            check_unreserved((*op.then, *op.otherwise), reserved)
            continue
        else:
            continue
        if is_touched:
            raise RefusedError(f"{what!r} is the cluster's own: keys under {', '.join(reserved)} are", "see: isopod cluster --help")


def _left_s(call: Call[Any, Any]) -> float:
    """Return how long the caller still waits, as far as the store goes along with that."""
    left_s = call.deadline_s
    return PROPOSAL_S_MAX if left_s is None else min(left_s, PROPOSAL_S_MAX)
