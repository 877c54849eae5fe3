"""The host's World: uvloop's or asyncio's loop, and the kernel."""

import os

from isopod.world.failpoints import ENVIRONMENT_NAME, Failpoints
from isopod.world.host.clock import HostClock, HostRandom
from isopod.world.host.compute import HostCompute
from isopod.world.host.disk import FileIoChoice, HostDisk
from isopod.world.host.kernel import HostKernel
from isopod.world.host.network import HostNetwork
from isopod.world.host.pages import HostPages
from isopod.world.host.processes import HostProcesses
from isopod.world.host.shards import HostShards
from isopod.world.host.workers import Workers
from isopod.world.world import World


def make_host_world(*, file_io: FileIoChoice = "auto") -> World:
    """Return the host's ports. Nothing is opened and no thread starts before it is needed. `World.close` ends it.

    Args:
        file_io: Who reads and writes data files, see `HostDisk`.

    Raises:
        InvalidArgument: ISOPOD_FAILPOINTS cannot be read.
    """
    random = HostRandom()
    workers = Workers()
    processes = HostProcesses()
    failpoints = Failpoints(random, processes, os.environ.get(ENVIRONMENT_NAME, ""))
    kernel = HostKernel(workers, processes)
    network = HostNetwork()
    disk = HostDisk(workers, file_io)

    def close() -> None:
        kernel.close()
        network.close()
        disk.close()
        workers.close()

    return World(
        name="host",
        clock=HostClock(),
        random=random,
        network=network,
        disk=disk,
        processes=processes,
        kernel=kernel,
        pages=HostPages(),
        shards=HostShards(),
        compute=HostCompute(workers),
        failpoints=failpoints,
        close=close,
    )
