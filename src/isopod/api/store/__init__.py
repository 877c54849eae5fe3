"""The replicated store: its words, its verbs, and its Python client.

`StoreClient` is what programs use; `messages` are the operations and what they answer; `methods` the verbs on the wire.
"""

from isopod.api.store.blocking import BlockingStore
from isopod.api.store.cache import CacheSettings, CacheStatistics
from isopod.api.store.client import ClientSettings, StoreClient
from isopod.api.store.holding import HeldLease
from isopod.api.store.messages import (
    Condition,
    Consistency,
    Delete,
    DeletePrefix,
    Entry,
    Get,
    KvChanges,
    Page,
    Put,
    Range,
    Txn,
    TxnResult,
)
from isopod.api.store.operations import Found, StoreOperations, Watch

__all__ = [
    "BlockingStore",
    "CacheSettings",
    "CacheStatistics",
    "ClientSettings",
    "Condition",
    "Consistency",
    "Delete",
    "DeletePrefix",
    "Entry",
    "Found",
    "Get",
    "HeldLease",
    "KvChanges",
    "Page",
    "Put",
    "Range",
    "StoreClient",
    "StoreOperations",
    "Txn",
    "TxnResult",
    "Watch",
]
