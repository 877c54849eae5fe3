"""A daemon that is killed while twenty containers are attached: its successor finds every piece, and keeps none (rows R10, R13)."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.network.conftest import Instance

pytestmark = pytest.mark.host

DAEMON = """
import asyncio, sys
from isopod.engine.network.networks import Networks
from isopod.runtime.logger import Logger
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world

async def main(world, folder, prefix, subnet):
    networks = await Networks.open(world, file=f"{folder}/net/networks", namespaces=f"{folder}/netns", prefix=prefix,
                                   default_subnet=subnet, pool_size=4, logger=Logger(lambda line: None, world.clock))
    await networks.adopt({})
    print("open", flush=True)
    async def attach(number):
        await networks.attach(f"{number:064x}", "bridge")
        print(number, flush=True)
    await asyncio.gather(*(attach(number) for number in range(20)))
    print("all", flush=True)
    await asyncio.Event().wait()

loop = new_loop("uvloop")
loop.run_until_complete(main(make_host_world(), *sys.argv[1:]))
"""
SOURCES = Path(__file__).parents[3] / "src"


@pytest.mark.row("R13")
@pytest.mark.parametrize("n_lines", [1, 2, 8, 21, 22])
async def test_what_a_killed_daemon_leaves_is_removed(host_instance: Instance, n_lines: int) -> None:
    host_instance.subnet = await host_instance.free_subnet()
    command = [sys.executable, "-c", DAEMON, host_instance.folder, host_instance.prefix, host_instance.subnet]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(SOURCES)}) as daemon:
        assert daemon.stdout is not None
        seen = [daemon.stdout.readline() for _ in range(n_lines)]
        daemon.send_signal(signal.SIGKILL)
    assert seen[0] == "open\n"
    before = await host_instance.left()
    assert before["tables"] == (host_instance.prefix,) and f"{host_instance.prefix}0" in before["links"]
    networks = await host_instance.open(pool_size=0)
    assert await host_instance.left() == {"links": (f"{host_instance.prefix}0",), "tables": (host_instance.prefix,)}
    assert networks.get("bridge").addresses_used == 1
    assert await host_instance.world.disk.list(f"{host_instance.namespaces}-owners") == []
    await networks.close()
    await networks.dispose()
