"""SimHost: one simulated machine with its World, and the handles to break and inspect it.

`world` is what the code under test gets; the other attributes belong to the test:

- `disk.crash()`, `disk.faults`, `disk.capacity_bytes`; `network.refuse_next()`, `network.listeners()`; `clock.step_ns()`,
  `clock.drift_ppm`;
- `processes.table`, `processes.install()`, `processes.aborts`; `machine.vms` (faults of microVMs); `kernel.links`, `.groups`, `.filters`;
  `world.failpoints`;
- `spawn_node(coro)` runs code as a process of its own, whose `kill()` is a kill -9: its tasks, connections, files and locks end,
  while containers, their supervisors and the kernel's objects live on, for a new node on the same World to adopt; `hang()` is a SIGSTOP;
- `power_cut()` ends all that lives and keeps what the disk had made durable; `power_off()` keeps the machine silent until `power_on()`.
"""

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from isopod.world.failpoints import Failpoints
from isopod.world.sim.compute import SimCompute
from isopod.world.sim.fabric import Station
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.machine import Machine
from isopod.world.sim.programs import install
from isopod.world.sim.random import SimRandom
from isopod.world.sim.table import SIGKILL, ProcessTable, SimProcess
from isopod.world.world import World

_T = TypeVar("_T")


class NodeHandle(Generic[_T]):
    """A piece of code under test that runs as a process of its own.

    Args:
        host: Where it runs.
        process: Its process.
        result: Its outcome.
    """

    def __init__(self, host: "SimHost", process: SimProcess, result: "asyncio.Future[_T]") -> None:
        self.process = process
        self._host = host
        self._result = result
        process.on_exit.append(self._on_exit)

    @property
    def pid(self) -> int:
        """Its pid."""
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has neither ended nor been killed."""
        return self.process.is_alive

    @property
    def is_hung(self) -> bool:
        """Whether it stands still."""
        return self.process.owner.is_hung

    @property
    def aborted(self) -> str | None:
        """Why it ended itself (`Processes.abort`), or None."""
        return next((abort.why for abort in self._host.processes.aborts if abort.pid == self.pid), None)

    def done(self) -> bool:
        """Return whether it has ended or was killed."""
        return self._result.done()

    async def wait(self) -> _T:
        """Return what its coroutine returned; `CancelledError` if it was killed."""
        return await asyncio.shield(self._result)

    def kill(self) -> None:
        """End it at once, as kill -9 does: nothing it does from now on has an effect."""
        self._table.signal(self.process, SIGKILL)

    def hang(self) -> None:
        """Stop it, as SIGSTOP does: its tasks, timers and deliveries stand still until `resume`; the kernel's side goes on."""
        self._table.stop(self.process)

    def resume(self) -> None:
        """Let it go on, as SIGCONT does."""
        self._table.go_on(self.process)

    @property
    def _table(self) -> ProcessTable:
        return self._host.machine.table

    def _on_exit(self) -> None:
        if self.process.status != 0 and not self._result.done():
            self._result.cancel()


class SimHost:
    """One machine. Made by `SimWorld`, which is one by itself, or by `SimCluster`.

    Args:
        loop: The loop.
        random: Its chance.
        station: Where it is on the network with others, or None.
    """

    def __init__(self, loop: SimLoop, random: SimRandom, station: Station | None = None) -> None:
        self.machine = Machine(loop, random, station)
        self.loop = loop
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
        self.failpoints = Failpoints(self.random, self.processes)
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
            compute=SimCompute(),
            failpoints=self.failpoints,
        )
        self.shards.bind(self.world)

    @property
    def name(self) -> str:
        """The machine's name: "node1"; "" for a World of one machine."""
        return self.machine.name

    @property
    def address(self) -> str:
        """Where others reach it: "10.99.0.1"; the loopback address for a World of one machine."""
        return "127.0.0.1" if self.machine.station is None else self.machine.station.address

    @property
    def is_up(self) -> bool:
        """Whether it has power."""
        return self.machine.station is None or self.machine.station.is_up

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

        handle = NodeHandle(self, process, result)
        process.owner.hold(lambda: _drop_unbegun(coro))
        self.machine.table.run(process, body)
        return handle

    def power_cut(self) -> None:
        """Lose power and boot again at once: every process but the test's ends, and nobody is told; the disk keeps what was durable."""
        self.power_off()
        self.power_on()

    def power_off(self) -> None:
        """Lose power, and answer nobody until `power_on`. Start no node meanwhile."""
        self.machine.power_cut()
        if self.machine.station is not None:
            self.machine.station.set_up(up=False)

    def power_on(self) -> None:
        """Boot: whoever still believes in an old connection is told otherwise as soon as it says something."""
        if self.machine.station is not None:
            self.machine.station.set_up(up=True)


def _drop_unbegun(coro: Coroutine[Any, Any, object]) -> None:
    """Close the code of a process that died before its first step: nobody will await it."""
    if inspect.getcoroutinestate(coro) == inspect.CORO_CREATED:
        coro.close()


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


async def unwind(loop: SimLoop) -> None:
    """Let every cancelled task end, so that none is destroyed while it is pending."""
    own = asyncio.current_task()
    for _ in range(1000):
        pending = [task for owner in loop.owners() for task in owner.pending() if task is not own]
        if not pending:
            break
        for task in pending:
            task.cancel()
        await asyncio.sleep(0)
