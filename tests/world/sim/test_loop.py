"""The simulated loop: virtual time, seeded order, and its refusals."""

import asyncio

import pytest

from isopod.world.sim import Deadlock, Runaway, SimWorld, make_sim_world
from isopod.world.sim.clock import EPOCH_NS


async def test_time_jumps_when_all_is_idle(sim_world: SimWorld) -> None:
    began = sim_world.loop.time()
    await asyncio.gather(asyncio.sleep(86_400), asyncio.sleep(3))
    assert 86_400 <= sim_world.loop.time() - began < 86_401


async def test_timers_run_in_the_order_of_their_time(sim_world: SimWorld) -> None:
    seen: list[int] = []
    for number, delay in enumerate((0.3, 0.1, 0.2, 0.1)):
        sim_world.loop.call_later(delay, seen.append, number)
    await asyncio.sleep(1)
    assert seen == [1, 3, 2, 0]


async def test_plain_callbacks_keep_their_order(sim_world: SimWorld) -> None:
    seen: list[int] = []
    for number in range(50):
        sim_world.loop.call_soon(seen.append, number)
    await asyncio.sleep(0.001)
    assert seen == list(range(50))


def order_of_tasks(seed: int) -> list[int]:
    sim = make_sim_world(seed)
    seen: list[int] = []

    async def step(number: int) -> None:
        seen.append(number)

    async def main() -> None:
        await asyncio.gather(*(step(number) for number in range(20)))

    sim.run(main())
    sim.close()
    return seen


def test_tasks_run_in_an_order_that_the_seed_decides() -> None:
    assert order_of_tasks(1) == order_of_tasks(1)
    assert order_of_tasks(1) != order_of_tasks(2)
    assert sorted(order_of_tasks(1)) == list(range(20)) != order_of_tasks(1)


def test_a_deadlock_names_what_waits() -> None:
    sim = make_sim_world()

    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="waits_for_ever"):
        sim.run(waits_for_ever())
    sim.close()


def test_a_run_away_loop_is_stopped() -> None:
    sim = SimWorld(1, n_events_max=1000)

    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Runaway, match="1000 events"):
        sim.run(spin())
    sim.loop.n_events_max = 1 << 30
    sim.close()


async def test_polling_sees_time_pass(sim_world: SimWorld) -> None:
    deadline = sim_world.loop.time() + 0.001
    while sim_world.loop.time() < deadline:
        await asyncio.sleep(0)


async def test_an_executor_runs_inline_and_passes_errors_on(sim_world: SimWorld) -> None:
    assert await sim_world.loop.run_in_executor(None, divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await sim_world.loop.run_in_executor(None, divmod, 7, 0)


async def test_cancelled_timers_cost_nothing(sim_world: SimWorld) -> None:
    for _ in range(10_000):
        sim_world.loop.call_later(1000, lambda: None).cancel()
    assert len(sim_world.loop._timers) < 1000
    began = sim_world.loop.time()
    await asyncio.sleep(0.5)
    assert sim_world.loop.time() - began < 1


async def test_what_was_cancelled_never_runs_and_can_be_shown(sim_world: SimWorld) -> None:
    loop, seen = sim_world.loop, list[str]()
    soon = loop.call_soon(seen.append, "soon")
    later = loop.call_later(0.001, seen.append, "later")
    done = loop.call_later(0.001, seen.append, "done")
    for handle in (soon, later):
        assert "append" in repr(handle)
        handle.cancel()
        handle.cancel()
        assert handle.cancelled()
        assert "cancelled" in repr(handle)
    await asyncio.sleep(0.01)
    done.cancel()  # too late, and harmless
    assert seen == ["done"]


async def test_timers_swept_while_the_loop_runs_leave_the_others_in_order(sim_world: SimWorld) -> None:
    loop, seen = sim_world.loop, list[int]()
    doomed = [loop.call_later(10 + number, seen.append, -1) for number in range(1_000)]
    for number in range(20):
        loop.call_later(1 + number, seen.append, number)

    def sweep() -> None:
        for timer in doomed:
            timer.cancel()

    loop.call_later(5.5, sweep)
    await asyncio.sleep(2_000)
    assert seen == list(range(20))


async def test_a_disk_call_may_be_cancelled_at_any_instant(sim_world: SimWorld) -> None:
    reports: list[dict[str, object]] = []
    sim_world.loop.set_exception_handler(lambda _, context: reports.append(context))
    chance = sim_world.random.stream("test")
    n_written = 0
    for number in range(300):
        task = sim_world.loop.create_task(sim_world.disk.write(f"/tmp/file{number}", b"x"))
        sim_world.loop.call_later(chance.random() * 120e-6, task.cancel)
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 1)
        written = await sim_world.disk.stat(f"/tmp/file{number}") is not None
        assert task.cancelled() != written
        n_written += written
    assert not reports
    assert 0 < n_written < 300


async def test_a_timeout_fires_in_virtual_time(sim_world: SimWorld) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(60):
            await asyncio.Event().wait()


async def test_names_are_not_resolved_outside(sim_world: SimWorld) -> None:
    with pytest.raises(RuntimeError, match="Network port"):
        await sim_world.loop.getaddrinfo("localhost", 80)


async def test_the_wall_clock_starts_at_its_epoch_and_can_be_stepped(sim_world: SimWorld) -> None:
    clock = sim_world.world.clock
    assert 0 <= clock.now_ns() - EPOCH_NS < 10**9
    before, wall = clock.monotonic_ns(), clock.now_ns()
    sim_world.clock.step_ns(-3600 * 10**9)
    assert clock.now_ns() < wall
    assert clock.monotonic_ns() == before


def test_streams_of_chance_do_not_touch_each_other() -> None:
    first = make_sim_world(7)
    second = make_sim_world(7)
    second.random.stream("other").random()
    assert first.random.stream("mine").random() == second.random.stream("mine").random()
    first.close()
    second.close()
