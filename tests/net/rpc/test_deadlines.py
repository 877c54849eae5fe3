"""Deadlines: the right ids at the right time, one timer, bounded memory."""

import asyncio

from isopod.net.rpc.deadlines import Deadlines
from isopod.world.sim import SimWorld


async def test_ids_expire_in_the_order_of_their_deadlines(sim_world: SimWorld) -> None:
    loop = asyncio.get_running_loop()
    expired: list[tuple[int, float]] = []
    deadlines = Deadlines(loop, lambda call_id: expired.append((call_id, round(loop.time() - start, 3))))
    start = loop.time()
    for call_id, timeout_s in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.5), (5, 0.0)):
        deadlines.add(call_id, timeout_s)
    deadlines.discard(4)
    deadlines.discard(99)
    await asyncio.sleep(5)
    assert expired == [(5, 0.0), (2, 1.0), (3, 2.0), (1, 3.0)]
    assert len(deadlines) == 0


async def test_ended_calls_do_not_pile_up_and_no_timer_stays(sim_world: SimWorld) -> None:
    loop = asyncio.get_running_loop()
    expired: list[int] = []
    deadlines = Deadlines(loop, expired.append)
    for call_id in range(100_000):
        deadlines.add(call_id, 30.0)
        deadlines.discard(call_id)
    assert len(deadlines._heap) < 200
    await asyncio.sleep(31)
    assert expired == []
    assert deadlines._timer is None


async def test_close_forgets_all(sim_world: SimWorld) -> None:
    expired: list[int] = []
    deadlines = Deadlines(asyncio.get_running_loop(), expired.append)
    deadlines.add(1, 0.1)
    deadlines.close()
    await asyncio.sleep(1)
    assert expired == []


async def test_who_expires_may_add_and_discard(sim_world: SimWorld) -> None:
    expired: list[int] = []

    def on_expired(call_id: int) -> None:
        expired.append(call_id)
        if call_id == 1:
            deadlines.discard(2)
            deadlines.add(3, 0.5)

    deadlines = Deadlines(asyncio.get_running_loop(), on_expired)
    deadlines.add(1, 0.1)
    deadlines.add(2, 0.1)
    await asyncio.sleep(1)
    assert expired == [1, 3]
