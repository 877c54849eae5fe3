"""SimCluster: several simulated machines on one network, in one virtual time. One seed decides everything.

The machines are named node1, node2, ... with the addresses 10.99.0.1, 10.99.0.2, ...; each name resolves on every machine. What lies
between them, and what may go wrong there, is the `fabric`'s; what may go wrong on a machine is its `SimHost`'s. Each machine has chance
of its own, so that one more draw on one changes nothing on another.
"""

from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from isopod.world.errors import InvalidArgument
from isopod.world.sim.fabric import Fabric, LinkQuality
from isopod.world.sim.loop import EVENTS_MAX, SimLoop
from isopod.world.sim.random import SimRandom
from isopod.world.sim.sim_host import SimHost, unwind

_T = TypeVar("_T")
HOSTS_MAX: Final = 50_000
_HOSTS_PER_NETWORK: Final = 250


class SimCluster:
    """The machines. Who made it closes it.

    Args:
        seed: Decides everything.
        n_hosts: How many machines there are in the beginning.
        n_events_max: Bound on events; more is a `Runaway`.
        quality: Of every link until `fabric.set_link` says otherwise.
    """

    def __init__(self, seed: int, n_hosts: int, *, n_events_max: int = EVENTS_MAX, quality: LinkQuality = LinkQuality()) -> None:  # noqa: B008
        self.seed = seed
        self.random = SimRandom(seed)
        self.loop = SimLoop(self.random.stream("loop"), n_events_max=n_events_max)
        self.fabric = Fabric(self.loop, SimRandom(seed, "fabric"), quality)
        self.hosts: list[SimHost] = []
        """The machines in the order of their numbers."""
        for _ in range(n_hosts):
            self.add_host()

    def add_host(self) -> SimHost:
        """Add one more machine, switched on; it may be done while the simulation runs."""
        number = len(self.hosts) + 1
        if number > HOSTS_MAX:
            raise InvalidArgument("hosts", number, f"a simulation has at most {HOSTS_MAX}")
        high, low = divmod(number - 1, _HOSTS_PER_NETWORK)
        station = self.fabric.add_station(f"node{number}", f"10.99.{high}.{low + 1}")
        host = SimHost(self.loop, SimRandom(self.seed, station.name), station)
        self.hosts.append(host)
        return host

    def host(self, name: str) -> SimHost:
        """Return the machine of that name.

        Raises:
            InvalidArgument: There is none.
        """
        for host in self.hosts:
            if host.name == name:
                return host
        raise InvalidArgument("host", name, f"there are node1 to node{len(self.hosts)}")

    def run(self, coro: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine of the test, which belongs to no machine, to its end in virtual time.

        Raises:
            Deadlock: It waits for something that will never happen.
        """
        return self.loop.run_until_complete(coro)

    def close(self) -> None:
        """End every process and task, and close the loop."""
        if self.loop.is_closed():
            return
        for host in self.hosts:
            host.machine.table.kill_all()
        self.loop.n_events_max = max(self.loop.n_events_max, self.loop.n_events + EVENTS_MAX)
        self.loop.root.die()
        self.loop.run_until_complete(unwind(self.loop))
        self.loop.close()
