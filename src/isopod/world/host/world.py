"""The host's World: uvloop's or asyncio's loop, and the kernel."""

from isopod.world.host.clock import HostClock, HostRandom
from isopod.world.host.disk import HostDisk
from isopod.world.host.kernel import HostKernel
from isopod.world.host.network import HostNetwork
from isopod.world.host.processes import HostProcesses
from isopod.world.host.workers import Workers
from isopod.world.world import World


def make_host_world() -> World:
    """Return the host's ports. Nothing is opened and no thread starts before it is needed. `World.close` ends it."""
    workers = Workers()
    processes = HostProcesses()
    kernel = HostKernel(workers, processes)

    def close() -> None:
        kernel.close()
        workers.close()

    return World(
        name="host",
        clock=HostClock(),
        random=HostRandom(),
        network=HostNetwork(),
        disk=HostDisk(workers),
        processes=processes,
        kernel=kernel,
        close=close,
    )
