"""Shards: one process per core that share nothing, and calls between them.

`SmpService` starts and keeps them; `submit_to` and `Sharded` call; `WorkQueue` spreads work that may run anywhere.
"""

from isopod.runtime.shards.config import RestartPolicy, SmpConfig
from isopod.runtime.shards.credits import DEFAULT_GROUP, SmpServiceGroup
from isopod.runtime.shards.movable import WorkQueue
from isopod.runtime.shards.service import ShardEvent, SmpService
from isopod.runtime.shards.sharded import PeeringShardedService, Sharded
from isopod.runtime.shards.smp import (
    LaneStats,
    QueueStats,
    ShardStats,
    Smp,
    shard_count,
    submit_to,
    submit_to_current,
    this_shard_id,
    this_smp,
)
from isopod.runtime.shards.verbs import verb

__all__ = [
    "DEFAULT_GROUP",
    "LaneStats",
    "PeeringShardedService",
    "QueueStats",
    "RestartPolicy",
    "ShardEvent",
    "ShardStats",
    "Sharded",
    "Smp",
    "SmpConfig",
    "SmpService",
    "SmpServiceGroup",
    "WorkQueue",
    "shard_count",
    "submit_to",
    "submit_to_current",
    "this_shard_id",
    "this_smp",
    "verb",
]
