"""Adoption: what a newly started daemon makes of what it finds.

The kernel is the truth: a supervisor that lives (the very process that the record names), an exit file, a boot id. Each record is
brought in line with it, containers that run are watched again, and whatever belongs to no container is removed: bundles, namespaces,
links, addresses, control groups, runtime state, folders. A start that the old daemon did not finish is undone: the container is
"created" (or "exited") as before, or gone if it was to be removed at its end.
"""

from collections.abc import Mapping
from typing import Final

from isopod.api.messages import Container, Endpoint
from isopod.engine.containers import GONE, Containers, supervisor_of
from isopod.engine.isolation import Isolation
from isopod.engine.layout import Layout
from isopod.engine.metadata import Loaded, MetadataStore
from isopod.engine.network.networks import Networks
from isopod.engine.states import LIVE
from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError
from isopod.world.ids import is_container_id
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

INTERRUPTED_EXIT_CODE: Final = 125


class Adoption:
    """One pass over what is there, before the daemon serves. See the module's header.

    Args:
        world: Where it looks.
        store: What the last daemon knew.
        containers: Told what is true; empty before.
        isolations: Tell who runs, and clear away.
        networks: Told which addresses are in use.
        layout: The engine's folders.
        logger: Told of everything that was not as expected.
    """

    def __init__(
        self,
        world: World,
        store: MetadataStore,
        containers: Containers,
        isolations: Mapping[str, Isolation],
        *,
        networks: Networks,
        layout: Layout,
        logger: Logger,
    ) -> None:
        self._world = world
        self._store = store
        self._containers = containers
        self._isolations = isolations
        self._networks = networks
        self._layout = layout
        self._logger = logger

    async def run(self) -> None:
        """Do the pass."""
        loaded = self._store.loaded()
        for record in loaded.records:
            self._containers.insert(record)
        running: dict[str, Endpoint] = {}
        for record in loaded.records:
            if await self._is_running(record):
                running[record.id] = record.network
        # One that runs without an address was connected to a network for its next start only.
        attached = {identifier: endpoint for identifier, endpoint in running.items() if endpoint.ip_address is not None}
        await self._networks.adopt(attached, spared=loaded.damaged)
        for record in loaded.records:
            if record.id in running:
                await self._take_over(record)
            else:
                await self._correct(record)
        await self._remove_strays(loaded)

    async def _is_running(self, record: Container) -> bool:
        """Whether the container was started and its supervisor lives (only "created" for the runtime is a start that did not finish)."""
        if record.status not in LIVE or record.boot_id != self._world.processes.boot_id():
            return False
        supervisor = supervisor_of(record)
        if supervisor is None or self._world.processes.identify(supervisor.pid) != supervisor:
            return False
        if record.status != "starting":
            return True
        state, _ = await self._state(record)
        return state not in ("", "created", "creating")

    async def _take_over(self, record: Container) -> None:
        state, pid = await self._state(record)
        identity = self._world.processes.identify(pid) if pid else None
        if identity is not None:
            await self._containers.amend(
                record.id,
                status="paused" if state == record.status == "paused" else "running",
                pid=identity.pid,
                pid_started_ticks=identity.started_ticks,
                started_at_ns=record.started_at_ns or self._world.clock.now_ns(),
            )
        elif record.status == "starting":  # it ran and ended before anybody wrote that down
            await self._containers.amend(record.id, status="running", started_at_ns=self._world.clock.now_ns())
        if state == "paused" != record.status:
            await self._thaw(record)
        supervisor = supervisor_of(record)
        if supervisor is not None:
            self._containers.watch(record.id, supervisor)
        self._logger.info("container.adopted", id=record.id, name=record.name, pid=pid)

    async def _state(self, record: Container) -> tuple[str, int]:
        """Ask the runtime; one that does not answer keeps neither the container nor the node from going on."""
        try:
            return await self._isolations[record.isolation].state(record)
        except (IsopodError, OSError) as error:
            self._logger.error("container.state_unknown", id=record.id, name=record.name, why=str(error))
            return "unknown", record.pid or 0

    async def _thaw(self, record: Container) -> None:
        """Let a container go on that was frozen for a commit when the daemon died."""
        try:
            await self._isolations[record.isolation].resume(record)
        except (IsopodError, OSError) as error:
            self._logger.error("container.resume_failed", id=record.id, name=record.name, why=str(error))

    async def _correct(self, record: Container) -> None:
        """Bring a container that does not run in line with what is left of it."""
        if record.status == "starting" and (await self._isolations[record.isolation].end(record)).exit_code is None:
            await self._undo_start(record)
        elif record.status in LIVE:
            if record.status == "starting":
                await self._containers.amend(record.id, status="running")
            await self._containers.conclude(record.id)
        elif record.status == "restarting":
            await self._containers.amend(record.id, status="exited", error="the daemon died while it was restarting")
            if record.auto_remove:
                await self._clear(record.id, record.name)
                await self._containers.discard(record.id)
        elif record.auto_remove:
            await self._clear(record.id, record.name)
            await self._containers.discard(record.id)

    async def _undo_start(self, record: Container) -> None:
        supervisor = supervisor_of(record)
        if supervisor is not None and record.boot_id == self._world.processes.boot_id():
            await self._end(self._isolations[record.isolation], supervisor, record.id)
        await self._clear(record.id, record.name)
        self._logger.warning("container.start_undone", id=record.id, name=record.name)
        if record.auto_remove:
            await self._containers.amend(record.id, status="exited", **GONE)
            await self._containers.discard(record.id)
            return
        was_run = record.started_at_ns is not None
        await self._containers.amend(
            record.id,
            status="exited" if was_run else "created",
            exit_code=INTERRUPTED_EXIT_CODE if was_run else None,
            error="the daemon died while it was starting",
            network=Endpoint(network=record.network.network),
            **GONE,
        )

    async def _remove_strays(self, loaded: Loaded) -> None:
        """Remove whatever belongs to no live container. What belongs to one whose record cannot be read stays as it is."""
        disk = self._world.disk
        records = self._containers.list(all_states=True)
        live = [record.id for record in records if record.status in LIVE] + list(loaded.damaged)
        known = [record.id for record in records] + list(loaded.damaged)
        supervisors = [identity for record in records if (identity := supervisor_of(record)) is not None]
        suspects: list[str] = []
        for isolation in self._isolations.values():
            strays = [stray for stray in isolation.strays(supervisors) if stray[0] not in loaded.damaged]
            for identifier, identity in strays:
                await self._end(isolation, identity, identifier)
            suspects += [*(identifier for identifier, _ in strays), *await isolation.leftovers()]
        for identifier in dict.fromkeys(name for name in suspects if name not in live):
            await self._clear(identifier, identifier)
        for isolation in self._isolations.values():
            for identifier in await isolation.ends():
                if identifier not in live:
                    await isolation.forget(identifier)
        for identifier in await disk.list(self._layout.containers):
            if is_container_id(identifier) and identifier not in known:
                await disk.remove_tree(self._layout.container(identifier))

    async def _end(self, isolation: Isolation, supervisor: ProcessIdentity, identifier: str) -> None:
        """End a supervisor first, so that nothing it is just doing finishes behind the clearing."""
        try:
            await isolation.end_supervisor(supervisor)
        except TimeoutError:
            self._logger.error("container.supervisor_stays", id=identifier, pid=supervisor.pid)

    async def _clear(self, identifier: str, name: str) -> None:
        for isolation in self._isolations.values():
            try:
                await isolation.clear(identifier, name)
            except (IsopodError, OSError) as error:
                self._logger.error("container.stray_clear_failed", id=identifier, why=str(error))
