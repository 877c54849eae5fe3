"""SimWorld: the whole simulated machine, and the handles to break and inspect it (`SimHost`). One seed decides everything.

Several machines on one network are a `SimCluster` (`world.sim.cluster`).
"""

from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from isopod.world.sim.loop import EVENTS_MAX, SimLoop
from isopod.world.sim.random import SimRandom
from isopod.world.sim.sim_host import NodeHandle, SimHost, unwind

__all__ = ["DEFAULT_SEED", "NodeHandle", "SimWorld", "make_sim_world"]

_T = TypeVar("_T")
DEFAULT_SEED: Final = 12345


class SimWorld(SimHost):
    """The simulation of one machine. Who made it closes it.

    Args:
        seed: Decides everything.
        n_events_max: Bound on events; more is a `Runaway`.
    """

    def __init__(self, seed: int, *, n_events_max: int = EVENTS_MAX) -> None:
        self.seed = seed
        random = SimRandom(seed)
        super().__init__(SimLoop(random.stream("loop"), n_events_max=n_events_max), random)

    def run(self, coro: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to its end in virtual time.

        Raises:
            Deadlock: It waits for something that will never happen.
        """
        return self.loop.run_until_complete(coro)

    def close(self) -> None:
        """End every process and task, and close the loop."""
        if self.loop.is_closed():
            return
        self.machine.table.kill_all()
        self.loop.n_events_max = max(self.loop.n_events_max, self.loop.n_events + EVENTS_MAX)
        self.loop.root.die()
        self.loop.run_until_complete(unwind(self.loop))
        self.loop.close()


def make_sim_world(seed: int = DEFAULT_SEED) -> SimWorld:
    """Make a simulation.

    Args:
        seed: Decides everything: the order of ready tasks, every delay, every identifier.
    """
    return SimWorld(seed)
