"""World: the frozen bundle of all ports."""

from collections.abc import Callable
from dataclasses import dataclass

from isopod.world.clock import Clock, Random
from isopod.world.compute import Compute
from isopod.world.disk import Disk
from isopod.world.failpoints import Failpoints
from isopod.world.kernel import Kernel
from isopod.world.network import Network
from isopod.world.pages import Pages
from isopod.world.processes import Processes
from isopod.world.shards import Shards


def _nothing() -> None:
    """Close a World that holds nothing."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything outside the program. `name` is "host" or "sim"; `close` gives back what the ports hold (threads, descriptors)."""

    name: str
    clock: Clock
    random: Random
    network: Network
    disk: Disk
    processes: Processes
    kernel: Kernel
    pages: Pages
    shards: Shards
    compute: Compute
    failpoints: Failpoints
    close: Callable[[], None] = _nothing
