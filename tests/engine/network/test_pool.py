"""The pool: ready ones first, refilled behind, emptied on closing."""

import asyncio

from isopod.engine.network.names import owns_veth
from isopod.engine.network.pool import Pool, Wiring
from isopod.runtime.metrics import Registry
from tests.engine.network.conftest import Instance
from tests.engine.network.faults import with_refusing_kernel


async def test_takes_are_served_from_what_is_ready(instance: Instance) -> None:
    world, kernel = with_refusing_kernel(instance.world)
    await world.disk.make_directory(instance.namespaces)
    await world.kernel.create_bridge(f"{instance.prefix}0", "10.127.255.1/30")
    wiring, metrics = Wiring(world, folder=instance.namespaces, prefix=instance.prefix), Registry()
    pool = Pool(wiring, f"{instance.prefix}0", size=2, logger=instance.logger, metrics=metrics)
    pool.fill_nowait()
    await pool.wait_full()
    assert pool.n_ready == 2
    kernel.calls.clear()
    kernel.refuse = lambda method: True  # from now on nothing can be made
    ready = [await pool.take(), await pool.take()]
    await pool.wait_full()
    kernel.refuse = lambda method: False
    made = await asyncio.gather(*(pool.take() for _ in range(4)))
    await pool.wait_full()
    assert pool.n_ready == 2
    assert len({*ready, *made}) == 6
    assert all(owns_veth(instance.prefix, name) for name in [*ready, *made])
    left = await instance.left()
    assert len(left["namespaces"]) == 8 and len(left["links"]) == 9
    text = metrics.render()
    assert f'isopod_network_pool_takes_total{{bridge="{instance.prefix}0",ready="yes"}} 2' in text
    assert f'isopod_network_pool_takes_total{{bridge="{instance.prefix}0",ready="no"}} 4' in text
    await pool.close()
    await pool.close()
    pool.fill_nowait()
    await wiring.remove_all([*ready, *made])
    await world.kernel.delete_link(f"{instance.prefix}0")


async def test_removing_what_is_not_there_is_fine(instance: Instance) -> None:
    await Wiring(instance.world, folder=instance.namespaces, prefix=instance.prefix).remove(f"{instance.prefix}-v00000")
