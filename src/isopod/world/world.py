"""World: the frozen bundle of all ports."""

from dataclasses import dataclass

from isopod.world.clock import Clock, Random
from isopod.world.disk import Disk
from isopod.world.kernel import Kernel
from isopod.world.network import Network
from isopod.world.processes import Processes


@dataclass(frozen=True, slots=True)
class World:
    """Everything outside the program. `name` is "host" or "sim"."""

    name: str
    clock: Clock
    random: Random
    network: Network
    disk: Disk
    processes: Processes
    kernel: Kernel
