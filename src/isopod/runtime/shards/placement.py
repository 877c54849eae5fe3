"""Placement: which shard runs on which processor. A pure function of the machine's picture.

Shards fill one memory node after the other, so that as many as possible share one: messages between them then stay in its caches. A shard's
memory is on its processor's node because it is the first to touch it (`isopod.world.host.shards_topology`).
"""

from collections.abc import Sequence

from isopod.world.errors import InvalidArgument
from isopod.world.shards import NumaNode

SHARDS_MAX = 1024


def n_shards_auto(topology: Sequence[NumaNode]) -> int:
    """Return one for each processor that we may use."""
    return max(1, min(SHARDS_MAX, sum(len(node.cpus) for node in topology)))


def place(topology: Sequence[NumaNode], n_shards: int) -> list[int | None]:
    """Return the processor of each shard, in the order of the shards.

    Args:
        topology: The nodes with the processors that may be used.
        n_shards: At least 1.

    Returns:
        Processors, all different; all None if there are fewer of them than shards: pinning two shards to one processor would keep the one
        from running where the other has left room.

    Raises:
        InvalidArgument: `n_shards` is out of range.
    """
    if not 1 <= n_shards <= SHARDS_MAX:
        raise InvalidArgument("number of shards", n_shards, f"want 1 to {SHARDS_MAX}")
    # A node that holds all of them, the smallest such; else the largest nodes first.
    fitting = sorted((node for node in topology if len(node.cpus) >= n_shards), key=lambda node: (len(node.cpus), node.number))
    order = fitting[:1] or sorted(topology, key=lambda node: (-len(node.cpus), node.number))
    cpus = [cpu for node in order for cpu in sorted(node.cpus)]
    if len(cpus) < n_shards:
        return [None] * n_shards
    return list(cpus[:n_shards])
