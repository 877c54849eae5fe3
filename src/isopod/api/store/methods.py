"""The verbs of the replicated store, one row each.

`kv.apply` and `kv.read` are what `StoreClient` uses: many operations in one call. `kv.txn` is the same for whoever speaks JSON by hand.
`kv.checkpoint` is asked by nodes of nodes.
"""

from typing import Final

from isopod.api import messages as m
from isopod.api.store import messages as s
from isopod.wire.service import Method

KV_APPLY: Final = Method("kv.apply", s.KvApply, s.KvApplied)
KV_READ: Final = Method("kv.read", s.KvRead, s.KvPages, idempotent=True)
KV_TXN: Final = Method("kv.txn", s.KvTxn, s.KvTxnDone)
KV_WATCH: Final = Method("kv.watch", s.KvWatch, m.Empty, receives=s.KvChanges)
KV_STATUS: Final = Method("kv.status", m.Empty, s.StoreStatus, idempotent=True)
KV_CHECKPOINT: Final = Method("kv.checkpoint", s.CheckpointQuery, s.CheckpointAnswer, idempotent=True)
KV_CONSISTENCY: Final = Method("kv.consistency", m.Empty, s.ConsistencyReport, idempotent=True)
LEASE_KEEP: Final = Method("lease.keep", s.LeaseKeep, s.LeasesKept, idempotent=True)
LEASE_LIST: Final = Method("lease.list", m.Empty, s.LeaseList, idempotent=True)

METHODS: Final = tuple(value for name, value in sorted(globals().items()) if isinstance(value, Method))
