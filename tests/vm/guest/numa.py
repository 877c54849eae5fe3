"""What is to be seen on a machine with two memory nodes. Runs inside the guest: pytest collects it by its name only."""

import os

import pytest

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.shards import SmpConfig, SmpService, submit_to
from isopod.world.world import World
from tests.vm.guest import numa_shard

pytestmark = pytest.mark.host


async def test_the_machine_has_two_nodes(host_world: World) -> None:
    assert list(host_world.shards.topology()) == [(0, (0,)), (1, (1,))]


async def test_shards_and_their_buffers_lie_on_their_nodes(host_world: World) -> None:
    """One shard on each node; each leases from a pool of its own, and the kernel says where every page is."""
    logger = Logger(lambda _: None, host_world.clock)
    config = SmpConfig(n_shards=2, pin="all")
    async with SmpService(host_world, config, logger=logger, metrics=Registry(), services=(numa_shard.serve,)):
        found = [await submit_to(shard, numa_shard.PLACES, numa_shard.Wanted(2 << 20)) for shard in range(2)]
    assert [(each.cpus, each.nodes) for each in found] == [((0,), (0,)), ((1,), (1,))]
    assert [each.n_pages for each in found] == [(2 << 20) // 4096] * 2


async def test_memory_of_the_other_node_is_told_apart(host_world: World) -> None:
    """The check can fail: what is touched on one processor is not found on the other's node."""
    everywhere = os.sched_getaffinity(0)
    try:
        for cpu in sorted(everywhere):
            os.sched_setaffinity(0, {cpu})
            assert numa_shard.nodes_of_leases(1 << 20)[0] == (cpu,)
    finally:
        os.sched_setaffinity(0, everywhere)
