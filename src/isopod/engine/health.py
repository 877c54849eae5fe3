"""Health checks: a command that is run in a container from time to time, and what its exit codes say of the container.

A record's health is "none" without a check, else "starting" from each start on, "healthy" after a command that ended with 0, "unhealthy"
after `retries` in a row that did not: another exit code, no end within `timeout_s` (it is killed then), or a command that cannot be run.
In the first `start_period_s` a failure of one that is "starting" does not count. What changes is stored and told as an event; nothing is
done to an unhealthy container. One that is paused is not asked. After a restart of the node the count begins anew, the health stays.

Rules: at most `PROBES_MAX` commands run at a time; a container has at most one of them.
Source: the HEALTHCHECK instruction in Docker's documentation of Dockerfiles, for the words and what they mean.
"""

import asyncio
from typing import Final

from isopod.api.messages import Event, Health, HealthCheck
from isopod.engine.containers import Containers
from isopod.engine.metadata import MetadataStore
from isopod.engine.operations import UpdateHealth
from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError, NotFound, WrongState
from isopod.world.world import World

PROBES_MAX: Final = 8
_SECOND_NS: Final = 1_000_000_000


class HealthChecks:
    """The health checks of a node's containers.

    Args:
        world: Whose clock tells how long ago a start was.
        store: The records: who runs, and what was found.
        containers: Runs the commands.
        logger: Told of checks that fail.
    """

    def __init__(self, world: World, store: MetadataStore, containers: Containers, *, logger: Logger) -> None:
        self._world = world
        self._store = store
        self._containers = containers
        self._logger = logger
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(PROBES_MAX)
        self._unsubscribe = store.subscribe(self._on_event)
        for record in store.records():
            if record.status == "running":
                self._begin(record.id, is_new=False)

    async def close(self) -> None:
        """Stop asking; what was found stays."""
        self._unsubscribe()
        watches = list(self._watches.values())
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    def _on_event(self, event: Event) -> None:
        if event.kind == "status" and event.status == "running":
            self._begin(event.id, is_new=event.status_before == "starting")
        elif event.kind in ("status", "deleted") and event.id in self._watches:
            self._watches.pop(event.id).cancel()

    def _begin(self, identifier: str, *, is_new: bool) -> None:
        record = self._store.get(identifier)
        if record is None or record.health_check is None or identifier in self._watches:
            return
        watching = self._watch(identifier, record.health_check, is_new=is_new or record.health == "none")
        self._watches[identifier] = asyncio.get_running_loop().create_task(watching, name=f"health of {identifier}")

    async def _watch(self, identifier: str, check: HealthCheck, *, is_new: bool) -> None:
        begun_ns = self._world.clock.monotonic_ns()
        if is_new:
            await self._store_health(identifier, "starting")
        n_failures = 0
        while True:
            await asyncio.sleep(check.interval_s)
            is_well = await self._ask(identifier, check)
            record = self._store.get(identifier)
            if record is None:
                return
            if is_well is None:
                continue
            is_early = self._world.clock.monotonic_ns() - begun_ns < check.start_period_s * _SECOND_NS
            if is_well:
                n_failures = 0
                await self._store_health(identifier, "healthy")
            elif not (is_early and record.health == "starting"):
                n_failures += 1
                if n_failures >= check.retries:
                    await self._store_health(identifier, "unhealthy")

    async def _ask(self, identifier: str, check: HealthCheck) -> bool | None:
        """Run the command once; None if the container cannot be asked just now."""
        async with self._slots:
            try:
                async with asyncio.timeout(check.timeout_s):
                    code = await self._containers.probe(identifier, check.command)
            except (WrongState, NotFound):
                return None
            except TimeoutError:
                self._logger.debug("container.health_check", id=identifier, why=f"no end within {check.timeout_s:g} s")
                return False
            except (IsopodError, OSError) as error:
                self._logger.debug("container.health_check", id=identifier, why=str(error))
                return False
        if code:
            self._logger.debug("container.health_check", id=identifier, exit_code=code)
        return code == 0

    async def _store_health(self, identifier: str, health: Health) -> None:
        """Store a health that is new; what the disk refuses is tried again after the next command."""
        record = self._store.get(identifier)
        if record is None or record.health == health:
            return
        try:
            await self._store.commit(UpdateHealth(identifier, health))
        except NotFound:
            return
        except IsopodError as error:
            self._logger.warning("container.health_not_stored", id=identifier, name=record.name, health=health, why=str(error))
        else:
            write = self._logger.warning if health == "unhealthy" else self._logger.info
            write("container.health", id=identifier, name=record.name, health=health, before=record.health)
