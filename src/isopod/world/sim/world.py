"""SimWorld: the whole simulated machine, and the handles to break and inspect it.

One seed decides everything. `world` is what the code under test gets; the other attributes belong to the test:

- `disk.crash()`, `disk.capacity_bytes`; `network.refuse_next()`, `network.listeners()`; `clock.step_ns()`;
- `processes.table`, `processes.install()`; `kernel.links`, `.groups`, `.filters`;
- `spawn_node(coro)` runs code as a process of its own, whose `kill()` is a kill -9: its tasks, connections, files and locks end,
  while containers, their supervisors and the kernel's objects live on, for a new node on the same World to adopt;
- `power_cut()` ends all that lives and keeps what the disk had made durable.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, Generic, TypeVar

from isopod.world.sim.loop import EVENTS_MAX, SimLoop
from isopod.world.sim.machine import Machine
from isopod.world.sim.programs import install
from isopod.world.sim.table import SIGKILL, SimProcess
from isopod.world.world import World

_T = TypeVar("_T")
DEFAULT_SEED: Final = 12345


class NodeHandle(Generic[_T]):
    """A piece of code under test that runs as a process of its own.

    Args:
        sim: Where it runs.
        process: Its process.
        result: Its outcome.
    """

    def __init__(self, sim: "SimWorld", process: SimProcess, result: "asyncio.Future[_T]") -> None:
        self.process = process
        self._sim = sim
        self._result = result

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has neither ended nor been killed."""
        return self.process.is_alive

    def done(self) -> bool:
        """Return whether it has ended or was killed."""
        return self._result.done()

    async def wait(self) -> _T:
        """Return what its coroutine returned; `CancelledError` if it was killed."""
        return await asyncio.shield(self._result)

    def kill(self) -> None:
        """End it at once, as kill -9 does: nothing it does from now on has an effect."""
        self._sim.machine.table.signal(self.process, SIGKILL)
        if not self._result.done():
            self._result.cancel()


class SimWorld:
    """The simulation. Who made it closes it.

    Args:
        seed: Decides everything.
        n_events_max: Bound on events; more is a `Runaway`.
    """

    def __init__(self, seed: int, *, n_events_max: int = EVENTS_MAX) -> None:
        self.seed = seed
        self.machine = Machine(seed, n_events_max=n_events_max)
        self.loop: SimLoop = self.machine.loop
        self.clock = self.machine.clock
        self.random = self.machine.random
        self.network = self.machine.network
        self.disk = self.machine.disk
        self.processes = self.machine.processes
        self.kernel = self.machine.kernel
        self.pages = self.machine.pages
        self.shards = self.machine.shards
        install(self.machine)
        self.machine.seal()
        self.world = World(
            name="sim",
            clock=self.clock,
            random=self.random,
            network=self.network,
            disk=self.disk,
            processes=self.processes,
            kernel=self.kernel,
            pages=self.pages,
            shards=self.shards,
        )
        self.shards.bind(self.world)

    def run(self, coro: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to its end in virtual time.

        Raises:
            Deadlock: It waits for something that will never happen.
        """
        return self.loop.run_until_complete(coro)

    def spawn_node(self, coro: Coroutine[Any, Any, _T], *, name: str = "isopod") -> NodeHandle[_T]:
        """Run `coro` as a process of its own; see `NodeHandle`.

        Args:
            coro: The node's code. What it raises is raised by `NodeHandle.wait`.
            name: Its argv[0].
        """
        process = self.machine.table.add([name], {}, "/", outside=False)
        result: asyncio.Future[_T] = self.loop.create_future()

        async def body(_: SimProcess) -> int:
            return await _settle(coro, result)

        self.machine.table.run(process, body)
        return NodeHandle(self, process, result)

    def power_cut(self) -> None:
        """Lose power and boot again: every process but the test's ends, the disk keeps what was durable."""
        self.machine.power_cut()

    def close(self) -> None:
        """End every process and task, and close the loop."""
        if self.loop.is_closed():
            return
        self.machine.table.kill_all()
        self.loop.root.die()
        self.loop.run_until_complete(self._unwind())
        self.loop.close()

    async def _unwind(self) -> None:
        """Let every cancelled task end, so that none is destroyed while it is pending."""
        own = asyncio.current_task()
        for _ in range(1000):
            pending = [task for owner in self.loop.owners() for task in owner.pending() if task is not own]
            if not pending:
                break
            for task in pending:
                task.cancel()
            await asyncio.sleep(0)


async def _settle(coro: Coroutine[Any, Any, _T], result: "asyncio.Future[_T]") -> int:
    try:
        value = await coro
    except Exception as error:  # noqa: BLE001 - the root of the node's process; `wait` raises it
        if not result.done():
            result.set_exception(error)
        return 1
    if not result.done():
        result.set_result(value)
    return 0


def make_sim_world(seed: int = DEFAULT_SEED) -> SimWorld:
    """Make a simulation.

    Args:
        seed: Decides everything: the order of ready tasks, every delay, every identifier.
    """
    return SimWorld(seed)
