"""Shards as processes: a program's own script, idle costs, pinning, both kinds of channel, and the metrics of all in one place."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Home, PrometheusText, Registry, ShardMetrics, next_generation
from isopod.runtime.shards import Sharded, SmpConfig, SmpService, submit_to
from isopod.world.errors import InvalidArgument
from isopod.world.shards import ChannelKind
from isopod.world.world import World
from tests.runtime.shards import program as p
from tests.runtime.shards.kit import shards

PROJECT = Path(__file__).parents[3]
_SCRIPT = """
import asyncio, operator, sys
sys.path.insert(0, {src!r})
from isopod.runtime.logger import Logger
from isopod.runtime.shards import Sharded, SmpConfig, SmpService, this_shard_id, verb
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world

class Counter:
    def __init__(self, start: int) -> None:
        self.value = start

    @verb
    async def add(self, amount: int) -> int:
        self.value += amount
        return self.value + 1000 * this_shard_id()

async def service(smp):
    print("service on", smp.shard, __name__, flush=True)

async def main() -> None:
    world = make_host_world()
    logger = Logger(lambda line: None, world.clock)
    async with SmpService(world, SmpConfig(n_shards=2), logger=logger, services=[service]):
        counter = await Sharded.start(Counter, 40)
        print(await counter.map_reduce(lambda each: each.add(2), operator.add, 0))
    world.close()

if __name__ == "__main__":
    loop = new_loop()
    loop.run_until_complete(main())
    loop.close()
"""


@pytest.mark.host
def test_classes_of_the_programs_own_script(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(_SCRIPT.format(src=str(PROJECT / "src")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=False)

    assert done.stderr == ""
    assert sorted(done.stdout.splitlines()) == ["1084", "service on 0 __main__", "service on 1 __isopod_main__"]


def test_a_session_without_a_script_says_so() -> None:
    code = _SCRIPT.format(src=str(PROJECT / "src"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)

    assert "InvalidArgument: service name '__main__:service': another shard cannot see it" in done.stderr
    assert "1084" not in done.stdout


@pytest.mark.host
async def test_idle_shards_sleep(host_world: World) -> None:
    """One that asks again and again is runnable whenever somebody looks, also where it gets no processor; an idle one hardly ever."""
    async with shards(host_world, 3):
        pids = [(await submit_to(shard, p.WHO, p.Text())).values[2] for shard in (1, 2)]
        await asyncio.sleep(0.1)
        n_runnable = 0
        for _ in range(50):
            n_runnable += sum(_is_runnable(pid) for pid in pids)
            await asyncio.sleep(0.01)
        assert n_runnable < 10


@pytest.mark.host
async def test_each_shard_has_its_processor(host_world: World) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two processors")
    for pin, wanted in (("all", 1), ("others", len(allowed))):
        service = SmpService(
            host_world,
            SmpConfig(n_shards=2, pin=pin),  # type: ignore[arg-type]
            logger=Logger(lambda _: None, host_world.clock),
            services=[p.serve],
        )
        async with service:
            pid = (await submit_to(1, p.WHO, p.Text())).values[2]
            assert os.sched_getaffinity(pid) == {service.cpus[1]}
            assert len(os.sched_getaffinity(0)) == wanted
        assert os.sched_getaffinity(0) == allowed


@pytest.mark.host
@pytest.mark.parametrize("kind", ["auto", "ring", "socketpair"])
async def test_the_channel_is_chosen(host_world: World, kind: ChannelKind) -> None:
    async with shards(host_world, 3, channel=kind) as rig:
        assert (await submit_to(1, p.RELAY, p.Numbers((2, 0)))).values == (1, 2, 0)
        kinds = [lane.channel for each in await rig.service.statistics() for lane in each.lanes]
        assert kinds == ["socketpair" if kind == "socketpair" else "ring"] * 6


@pytest.mark.host
async def test_metrics_of_all_shards_are_read_in_one_place(host_world: World, folder: str) -> None:
    home = Home(host_world.pages, folder, 0, next_generation(host_world.pages, folder, 0))
    metrics = Registry(home)
    config = SmpConfig(n_shards=2, pin="none", metrics_folder=folder)
    service = SmpService(host_world, config, logger=Logger(lambda _: None, host_world.clock), metrics=metrics, services=[p.serve])
    reader = ShardMetrics(host_world.pages, folder)
    async with service:
        for _ in range(5):
            await submit_to(1, p.ECHO, p.Text())
        text = PrometheusText().render(reader.snapshot())
        assert 'isopod_smp_calls_received_total{shard="1",peer="0"}' in text
        assert 'isopod_smp_calls_sent_total{shard="0",peer="1"}' in text
    reader.close()
    metrics.close()


@pytest.mark.host
@pytest.mark.slow
async def test_a_thousand_calls_of_each_to_each_leave_nothing(host_world: World) -> None:
    """Calls that end well, fail, expire and are cancelled, in a mixture; then all credits are back and nothing runs."""
    async with shards(host_world, 3, max_nonlocal_requests=16) as rig:
        calls = [asyncio.ensure_future(_any_call(number)) for number in range(3000)]
        await asyncio.sleep(0.05)
        for call in calls[::7]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        async with asyncio.timeout(40):
            while any(lane.calls_in_flight for lane in rig.smp.statistics().lanes):
                await asyncio.sleep(0.01)
        for each in await rig.service.statistics():
            assert [lane.calls_waiting for lane in each.lanes] == [0, 0]
            assert sum(lane.calls_serving for lane in each.lanes) == 0
        counter = await Sharded.start(p.Counter, p.Add(1))
        assert await counter.on_all(lambda one: one.value_of()) == [1, 1, 1]


async def _any_call(number: int) -> None:
    shard = 1 + number % 2
    if number % 5 == 0:
        await submit_to(shard, p.SLEEP, p.Text("5"), timeout_s=0.02)
    elif number % 5 == 1:
        await submit_to(shard, p.FAIL, p.Text("x"))
    elif number % 5 == 2:
        await submit_to(shard, p.RELAY, p.Numbers((3 - shard, 0, shard)))
    elif number % 5 == 3:
        with pytest.raises(InvalidArgument):
            await submit_to(9, p.WHO, p.Text())
    else:
        await submit_to(shard, p.ECHO, p.Text("x" * (number * 7 % 9000)))


def _is_runnable(pid: int) -> bool:
    """Return whether a process runs or wants to (proc(5), stat: the state behind the name)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b") ")[2][:1] == b"R"
