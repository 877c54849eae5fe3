"""Adoption: what a newly started daemon makes of what it finds.

The kernel is the truth: a supervisor that lives, an exit file, a boot id. Each record is brought in line with it, containers that run
are watched again, and whatever belongs to no container is removed: bundles, namespaces, links, addresses, control groups, runtime
state, folders. A start that the old daemon did not finish is undone: the container is "created" (or "exited") as before, or gone if
it was to be removed at its end.
"""

from collections.abc import Mapping
from typing import Final

from isopod.api.messages import Container, Endpoint
from isopod.engine.containers import Containers
from isopod.engine.layout import Layout
from isopod.engine.network.networks import Networks
from isopod.engine.records import Records
from isopod.engine.stage import Stage
from isopod.engine.states import LIVE
from isopod.engine.supervisor import Supervisor
from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

_SIGKILL: Final = 9
_GONE: Final = {"pid": None, "pid_started_ticks": None, "supervisor_pid": None, "supervisor_started_ticks": None}


class Adoption:
    """One pass over what is there, before the daemon serves. See the module's header.

    Args:
        world: Where it looks.
        records: What the last daemon knew.
        containers: Told what is true; empty before.
        stage: Clears away.
        supervisor: Tells who runs.
        networks: Told which addresses are in use.
        layout: The engine's folders.
        logger: Told of everything that was not as expected.
    """

    def __init__(
        self,
        world: World,
        records: Records,
        containers: Containers,
        stage: Stage,
        *,
        supervisor: Supervisor,
        networks: Networks,
        layout: Layout,
        logger: Logger,
    ) -> None:
        self._world = world
        self._records = records
        self._containers = containers
        self._stage = stage
        self._supervisor = supervisor
        self._networks = networks
        self._layout = layout
        self._logger = logger

    async def run(self) -> None:
        """Do the pass."""
        for record in await self._records.load():
            self._containers.insert(record)
        supervisors = self._supervisor.running()
        running: dict[str, Endpoint] = {}
        for record in self._containers.list(all_states=True):
            if await self._is_running(record, supervisors):
                running[record.id] = record.network
        await self._networks.adopt(running)
        for record in self._containers.list(all_states=True):
            if record.id in running:
                await self._take_over(record, supervisors[record.id])
            else:
                await self._correct(record)
        await self._remove_strays(supervisors)

    async def _is_running(self, record: Container, supervisors: Mapping[str, ProcessIdentity]) -> bool:
        """Whether the container was started and its supervisor lives (only "created" for the runtime is a start that did not finish)."""
        if record.status not in LIVE or record.id not in supervisors:
            return False
        if record.status != "starting":
            return True
        state, _ = await self._supervisor.state(record.id)
        return state not in ("", "created", "creating")

    async def _take_over(self, record: Container, supervisor: ProcessIdentity) -> None:
        state, pid = await self._supervisor.state(record.id)
        identity = self._world.processes.identify(pid) if pid else None
        if identity is not None:
            await self._containers.amend(
                record.id,
                status="paused" if state == "paused" else "running",
                pid=identity.pid,
                pid_started_ticks=identity.started_ticks,
                started_at_ns=record.started_at_ns or self._world.clock.now_ns(),
            )
        elif record.status == "starting":  # it ran and ended before anybody wrote that down
            await self._containers.amend(record.id, status="running", started_at_ns=self._world.clock.now_ns())
        self._containers.watch(record.id, supervisor)
        self._logger.info("container.adopted", id=record.id, name=record.name, pid=pid)

    async def _correct(self, record: Container) -> None:
        """Bring a container that does not run in line with what is left of it."""
        if record.status == "removing":
            await self._clear(record.id, record.name)
            await self._containers.discard(record.id)
        elif record.status == "starting" and await self._supervisor.exit_code(record.id) is None:
            await self._undo_start(record)
        elif record.status in LIVE:
            if record.status == "starting":
                await self._containers.amend(record.id, status="running")
            await self._containers.conclude(record.id)
        elif record.auto_remove:
            await self._clear(record.id, record.name)
            await self._containers.discard(record.id)

    async def _undo_start(self, record: Container) -> None:
        await self._clear(record.id, record.name)
        self._logger.warning("container.start_undone", id=record.id, name=record.name)
        if record.auto_remove:
            await self._containers.discard(record.id)
            return
        status = "created" if record.started_at_ns is None else "exited"
        network = Endpoint(network=record.network.network)
        await self._containers.amend(record.id, status=status, error="the daemon died while it was starting", network=network, **_GONE)

    async def _remove_strays(self, supervisors: Mapping[str, ProcessIdentity]) -> None:
        """Remove whatever belongs to no live container."""
        disk = self._world.disk
        records = self._containers.list(all_states=True)
        live = [record.id for record in records if record.status in LIVE]
        known = [record.id for record in records]
        found = [await self._supervisor.known(), await disk.list(self._layout.bundles), await self._stage.cgroups_present()]
        suspects = [*supervisors, *(name for names in found for name in names)]
        for identifier in dict.fromkeys(name for name in suspects if name not in live):
            await self._clear(identifier, identifier)
            if identifier in supervisors:
                self._world.processes.signal(supervisors[identifier], _SIGKILL)
                await self._world.processes.wait_gone(supervisors[identifier])
        for identifier in await disk.list(self._layout.supervisor.exits):
            if identifier not in live:
                await self._supervisor.forget(identifier)
        for identifier in await disk.list(self._layout.containers):
            if identifier not in known:
                await disk.remove_tree(self._layout.container(identifier))

    async def _clear(self, identifier: str, name: str) -> None:
        try:
            await self._world.kernel.kill_cgroup(self._stage.cgroup(identifier))
            await self._supervisor.delete(identifier, name)
            await self._stage.clear(identifier)
        except (IsopodError, OSError) as error:
            self._logger.error("container.stray_clear_failed", id=identifier, why=str(error))
