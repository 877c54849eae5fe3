"""The replicated store: typed keys, transactions, watches and leases, the same on every node.

`StoreMachine` is the pure part, fed by the Raft log. `Replica` is a node's door to it, `service` its verbs, `Table` typed records on top.
"""

from isopod.cluster.store.machine import StoreMachine
from isopod.cluster.store.replica import Replica, ReplicaSettings
from isopod.cluster.store.service import handlers
from isopod.cluster.store.table import Table

__all__ = ["Replica", "ReplicaSettings", "StoreMachine", "Table", "handlers"]
