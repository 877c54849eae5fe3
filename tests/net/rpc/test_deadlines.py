"""Deadlines: the right ids at the right time, one timer, nothing kept for calls that have ended."""

import asyncio

from isopod.net.rpc.deadlines import LOOK_S_MIN, Deadlines
from isopod.world.sim import SimWorld


class Table:
    """Open calls and those that expired, with when."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.start_s = self.loop.time()
        self.open: dict[int, float | None] = {}
        self.expired: list[tuple[int, float]] = []
        self.n_looks = 0
        self.deadlines = Deadlines(self.loop, self.look, self.on_expired)

    def look(self) -> list[tuple[int, float | None]]:
        self.n_looks += 1
        return list(self.open.items())

    def on_expired(self, call_id: int) -> None:
        del self.open[call_id]
        self.expired.append((call_id, round(self.loop.time() - self.start_s, 2)))

    def add(self, call_id: int, timeout_s: float) -> None:
        at = self.loop.time() + timeout_s
        self.open[call_id] = at
        self.deadlines.note(at)


async def test_ids_expire_in_the_order_of_their_deadlines(sim_world: SimWorld) -> None:
    table = Table()
    for call_id, timeout_s in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 1.5), (5, 0.0)):
        table.add(call_id, timeout_s)
    del table.open[4]
    table.open[6] = None
    await asyncio.sleep(5)
    assert table.expired == [(5, 0.0), (2, 1.0), (3, 2.0), (1, 3.0)]
    assert not table.deadlines.is_armed


async def test_a_hundred_thousand_calls_that_end_in_time_cost_one_timer(sim_world: SimWorld) -> None:
    table = Table()
    for call_id in range(100_000):
        table.add(call_id, 30.0)
        del table.open[call_id]
    await asyncio.sleep(31)
    assert table.expired == []
    assert table.n_looks == 1
    assert not table.deadlines.is_armed


async def test_many_deadlines_close_together_share_looks(sim_world: SimWorld) -> None:
    table = Table()
    for call_id in range(1000):
        table.add(call_id, 1.0 + call_id / 10_000)
    await asyncio.sleep(2)
    assert [call_id for call_id, _ in table.expired] == list(range(1000))
    assert all(1.0 + call_id / 10_000 - 0.01 <= at <= 1.0 + call_id / 10_000 + LOOK_S_MIN + 0.01 for call_id, at in table.expired)
    assert table.n_looks <= 0.1 / LOOK_S_MIN + 2


async def test_close_forgets_all(sim_world: SimWorld) -> None:
    table = Table()
    table.add(1, 0.1)
    table.deadlines.close()
    table.add(2, 0.2)
    await asyncio.sleep(1)
    assert table.expired == []


async def test_who_expires_may_add_and_end_others(sim_world: SimWorld) -> None:
    table = Table()

    def on_expired(call_id: int) -> None:
        table.on_expired(call_id)
        if call_id == 1:
            table.add(3, 0.5)

    table.deadlines = Deadlines(table.loop, table.look, on_expired)
    table.add(1, 0.1)
    table.add(2, 0.1)
    await asyncio.sleep(1)
    assert table.expired == [(1, 0.1), (2, 0.1), (3, 0.6)]
