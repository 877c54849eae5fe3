"""Failpoints, on both Worlds: every action, chained and counted; what cannot be read; the environment and the end of the process."""

import asyncio
import errno
import os
import subprocess
import sys
import timeit

import pytest

from isopod.world.errors import InvalidArgument
from isopod.world.failpoints import Failpoint, Failpoints
from isopod.world.sim import make_sim_world
from isopod.world.world import World

pytestmark = pytest.mark.row("B26")


async def outcomes(point: Failpoint, n_hits: int) -> str:
    """Pass a point as code does; return a letter for each time: "." nothing, "E" an error."""
    seen = ""
    for _ in range(n_hits):
        try:
            if point.armed:
                await point.hit()
            seen += "."
        except OSError:
            seen += "E"
    return seen


async def test_a_point_is_off_and_uncounted_until_it_is_set(world: World) -> None:
    point = world.failpoints.point("a.b")
    assert point is world.failpoints.point("a.b")
    assert not point.armed
    assert await outcomes(point, 5) == "....."
    assert world.failpoints.counts() == {"a.b": 0}


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("off", "......"),
        ("error", "EEEEEE"),
        ("3*error", "EEE..."),
        ("nth(3):error", "..E..."),
        ("2*off->error", "..EEEE"),
        ("2*off->2*error->off", "..EE.."),
        ("nth(1):error->nth(4):error(ENOSPC)", "E..E.."),
        ("0%error", "......"),
        ("100%error", "EEEEEE"),
        ("0%error->nth(2):error", ".E...."),
        ("50%2*off->error", None),
    ],
)
async def test_actions(world: World, action: str, expected: str | None) -> None:
    world.failpoints.set("x", action)
    point = world.failpoints.point("x")
    seen = await outcomes(point, 6)
    assert seen == expected or (expected is None and seen.count(".") <= 2)
    assert world.failpoints.counts() == {"x": 6}
    assert world.failpoints.armed_names() == ["x"]


async def test_an_error_says_which_and_where(world: World) -> None:
    world.failpoints.set("disk.write", "error(ENOSPC)")
    with pytest.raises(OSError) as caught:
        await world.failpoints.point("disk.write").hit()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "failpoint disk.write")
    world.failpoints.set("disk.write", "error")
    with pytest.raises(OSError) as caught:
        world.failpoints.point("disk.write").hit_now()
    assert caught.value.errno == errno.EIO


async def test_clear_switches_off_and_keeps_the_counts(world: World) -> None:
    world.failpoints.set("x", "error")
    assert await outcomes(world.failpoints.point("x"), 2) == "EE"
    world.failpoints.clear()
    assert await outcomes(world.failpoints.point("x"), 3) == "..."
    await world.failpoints.point("x").hit()
    world.failpoints.point("x").hit_now()
    assert world.failpoints.counts() == {"x": 2}
    assert world.failpoints.armed_names() == []


async def test_setting_again_counts_anew(world: World) -> None:
    world.failpoints.set("x", "nth(2):error")
    assert await outcomes(world.failpoints.point("x"), 3) == ".E."
    world.failpoints.set("x", "nth(2):error")
    assert await outcomes(world.failpoints.point("x"), 3) == ".E."


async def test_pause_waits_until_it_is_let_go(world: World) -> None:
    world.failpoints.set("x", "pause")
    point = world.failpoints.point("x")
    tasks = [asyncio.create_task(point.hit()) for _ in range(3)]
    while point.n_paused < 3:
        await asyncio.sleep(0)
    assert world.failpoints.release("x") == 3
    await asyncio.gather(*tasks)
    again = asyncio.create_task(point.hit())
    while not point.n_paused:
        await asyncio.sleep(0)
    world.failpoints.set("x", "off")
    await again
    world.failpoints.set("x", "pause")
    last = asyncio.create_task(point.hit())
    while not point.n_paused:
        await asyncio.sleep(0)
    world.failpoints.clear()
    await last


async def test_a_paused_task_can_be_cancelled(world: World) -> None:
    world.failpoints.set("x", "pause")
    task = asyncio.create_task(world.failpoints.point("x").hit())
    while not world.failpoints.point("x").n_paused:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.failpoints.release("x") == 0


async def test_a_place_that_cannot_wait_refuses_pause(world: World) -> None:
    world.failpoints.set("early", "pause")
    with pytest.raises(InvalidArgument, match="cannot wait"):
        world.failpoints.point("early", is_synchronous=True)
    world.failpoints.point("late", is_synchronous=True)
    with pytest.raises(InvalidArgument, match="cannot wait"):
        world.failpoints.set("late", "2*off->pause")
    with pytest.raises(InvalidArgument, match="cannot wait"):
        world.failpoints.point("early").hit_now()


@pytest.mark.parametrize(
    "action",
    [
        "",
        "explode",
        "error(",
        "error(ENOTHING)",
        "error(5)",
        "off(EIO)",
        "101%error",
        "nth(0):error",
        "nth(x):error",
        "error->",
        "-1*error",
    ],
)
async def test_an_action_that_cannot_be_read_is_refused(world: World, action: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        world.failpoints.set("x", action)
    assert "nth(3):error" in caught.value.hint or "chance" in caught.value.message
    assert not world.failpoints.point("x").armed


@pytest.mark.parametrize("name", ["", "A", "a b", ".a", "a" * 101, "a=b"])
async def test_a_name_that_is_none_is_refused(world: World, name: str) -> None:
    with pytest.raises(InvalidArgument):
        world.failpoints.point(name)


def drawn(seed: int, name: str) -> str:
    sim = make_sim_world(seed)
    sim.failpoints.set(name, "30%error")
    found = sim.run(outcomes(sim.failpoints.point(name), 200))
    sim.close()
    return found


def test_chance_follows_from_the_seed_and_the_name() -> None:
    first = drawn(1, "x")
    assert first == drawn(1, "x")
    assert first != drawn(2, "x")
    assert first != drawn(1, "y")
    assert 30 < first.count("E") < 90


def test_panic_ends_the_simulated_process_and_says_why() -> None:
    sim = make_sim_world(3)
    done: list[str] = []

    async def node() -> None:
        try:
            await sim.failpoints.point("here").hit()
            done.append("went on")
        finally:
            await sim.world.disk.write("/tmp/after", b"x")

    async def main() -> None:
        sim.failpoints.set("here", "nth(1):panic")
        handle = sim.spawn_node(node())
        with pytest.raises(asyncio.CancelledError):
            await handle.wait()
        assert not handle.is_alive
        assert handle.aborted == "failpoint here"
        assert handle.process.status == 70
        assert await sim.world.disk.stat("/tmp/after") is None

    sim.run(main())
    assert done == []
    assert [abort.why for abort in sim.processes.aborts] == ["failpoint here"]
    sim.close()


def test_the_environment_sets_them_on_the_host() -> None:
    program = "from isopod.world.host.world import make_host_world as m; w = m(); print(w.failpoints.armed_names(), flush=True); "
    program += "w.failpoints.point('a.b').hit_now(); w.failpoints.point('c').hit_now()"

    def run(settings: str) -> "subprocess.CompletedProcess[str]":
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "ISOPOD_FAILPOINTS": settings}
        return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False, timeout=50)

    done = run(" a.b = nth(2):error ; c=panic;")
    assert done.stdout.splitlines()[0] == "['a.b', 'c']"
    assert done.returncode == 70
    assert done.stderr == "isopod: aborted: failpoint c\n"
    for wrong in ("a.b", "a.b=explode", "=off"):
        refused = run(wrong)
        assert refused.returncode == 1
        assert "InvalidArgument" in refused.stderr


def test_a_point_that_is_off_costs_next_to_nothing() -> None:
    sim = make_sim_world()
    point = Failpoints(sim.random, sim.processes).point("x")
    sim.close()
    bare, checked = (min(timeit.repeat(code, globals={"point": point}, number=100_000, repeat=5)) for code in ("pass", "if point.armed: 1"))
    assert (checked - bare) / 100_000 < 300e-9
