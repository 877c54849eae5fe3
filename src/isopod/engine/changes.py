"""Changes: what may be changed of a container that exists, and when each takes effect.

| what | of one that runs | of one that does not |
|---|---|---|
| limits | at once: the kernel is told first, then it is stored | at the next start |
| labels | at once | at once |
| environment | at the next start, and in every `exec` from now on | at the next start |
| mounts | refused | at the next start |
| network, off | at once: its link goes | at the next start |
| network, on | at once: it gets a link; the host's network at the next start | at the next start |

One request is one batch: all of it is done or nothing. What takes effect later is said in `notes`.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from isopod.api.messages import ConnectNetwork, Container, Endpoint, Mount, Resources, UpdateContainer, UpdatedContainer
from isopod.engine import operations as ops
from isopod.engine.containers import Containers, Entry
from isopod.engine.creation import check_mounts, check_resources, check_sources
from isopod.engine.metadata import MetadataStore
from isopod.engine.network.networks import HOST, Networks
from isopod.engine.states import LIVE
from isopod.runtime.logger import Logger
from isopod.world.errors import InvalidArgument, IsopodError, NotFound, WrongState
from isopod.world.world import World

NO_LIMIT: Final = -1
LATER: Final = "takes effect at the next start"


class Changes:
    """Changes containers that exist.

    Args:
        world: Where they live.
        store: Where their records are.
        containers: Who they are, and their locks.
        networks: Checked before somebody is put on one.
        logger: Told of what could not be undone.
    """

    def __init__(self, world: World, store: MetadataStore, containers: Containers, *, networks: Networks, logger: Logger) -> None:
        self._world = world
        self._store = store
        self._containers = containers
        self._networks = networks
        self._logger = logger

    async def update(self, request: UpdateContainer) -> UpdatedContainer:
        """Change limits, labels, variables and mounts, all of them or none.

        Raises:
            NotFound: No such container, label, variable or mount.
            InvalidArgument: A value is out of range, or nothing is to be changed.
            AlreadyExists: A mount's place is taken.
            WrongState: It runs, and mounts are to be changed.
            RuntimeFailed: The kernel did not accept a limit; nothing changed.
        """
        return await self._containers.carry_through(self._update(self._containers.entry(request.name), request))

    async def connect(self, request: ConnectNetwork) -> UpdatedContainer:
        """Put a container on a network: at once if it runs, but for the host's, which one that runs cannot be moved to.

        Raises:
            NotFound: No such container or network.
            InUse: It is on another network.
            AlreadyExists: It is on this one.
            Exhausted: The network has no address left.
            UnavailableError: The kernel refused; nothing changed.
        """
        return await self._containers.carry_through(self._connect(self._containers.entry(request.name), request.network))

    async def disconnect(self, request: ConnectNetwork) -> UpdatedContainer:
        """Take a container off its network, at once.

        Raises:
            NotFound: No such container, or it is not on that network.
            WrongState: It runs in the host's network.
            UnavailableError: The kernel refused.
        """
        return await self._containers.carry_through(self._disconnect(self._containers.entry(request.name), request.network))

    # --- steps --------------------------------------------------------------------------------------------------------

    async def _update(self, entry: Entry, request: UpdateContainer) -> UpdatedContainer:
        async with entry.lock:
            record = self._present(entry)
            changes = self._operations(record, request)
            if not changes:
                raise InvalidArgument("update", record.name, "nothing to change", "see: isopod update --help")
            await check_sources(self._world, request.mounts)
            resources = next((change.resources for change in changes if isinstance(change, ops.UpdateResources)), record.resources)
            ops.Draft(self._store).add(changes)  # what would be refused is refused before the kernel is told
            is_live = record.status in ("running", "paused") and resources != record.resources
            notes: list[str] = []
            try:
                if is_live:
                    notes += await self._limit(record, resources)
                await self._store.commit(*changes)
            except BaseException:
                if is_live:
                    await self._limit_again(record)
                raise
            env_changed = any(isinstance(change, ops.UpdateEnvironment) for change in changes)
            if env_changed and record.status in LIVE:
                notes.append(f"the environment of what runs stays; the new one {LATER}")
            return UpdatedContainer(container=entry.record, notes=tuple(notes))

    def _operations(self, record: Container, request: UpdateContainer) -> list[ops.Operation]:
        changes: list[ops.Operation] = []
        resources = _new_limits(record.resources, request)
        if resources != record.resources:
            check_resources(resources)
            changes.append(ops.UpdateResources(record.id, resources))
        if request.labels or request.labels_remove:
            changes.append(ops.UpdateLabels(record.id, _edited(record.labels, request.labels, request.labels_remove, "label")))
        if request.env or request.env_remove:
            changes.append(ops.UpdateEnvironment(record.id, _edited(record.env, request.env, request.env_remove, "environment variable")))
        changes += [ops.RemoveMount(record.id, destination) for destination in request.mounts_remove]
        changes += [ops.AddMount(record.id, mount) for mount in _checked(request.mounts)]
        return changes

    async def _limit(self, record: Container, resources: Resources) -> Sequence[str]:
        return await self._containers.isolation(record).update(record, resources)

    async def _limit_again(self, record: Container) -> None:
        """Give back the limits that are stored, after the kernel took only some of the new ones, or the disk refused them."""
        try:
            await self._limit(record, record.resources)
        except IsopodError as error:
            self._logger.error("container.limits_not_restored", id=record.id, name=record.name, why=str(error))

    async def _connect(self, entry: Entry, network: str) -> UpdatedContainer:
        async with entry.lock:
            record = self._present(entry)
            self._networks.check(network)
            if network == ops.NO_NETWORK:
                raise InvalidArgument("network", network, "it is the absence of one", f"isopod network disconnect NET {record.name}")
            wanted = ops.AttachNetwork(record.id, Endpoint(network=network))
            ops.check(wanted, self._store)  # what would be refused is refused before there is a link
            if not _runs(record) or network == HOST:
                await self._store.commit(wanted)
                notes = (f"the connection {LATER}",) if record.status in LIVE else ()
                return UpdatedContainer(container=entry.record, notes=notes)
            endpoint = await self._containers.isolation(record).connect(record, network)
            try:
                await self._store.commit(msgspec.structs.replace(wanted, network=endpoint))
            except BaseException:
                await self._containers.isolation(record).disconnect(record)
                raise
            return UpdatedContainer(container=entry.record)

    async def _disconnect(self, entry: Entry, network: str) -> UpdatedContainer:
        async with entry.lock:
            record = self._present(entry)
            if record.network.network != network or network == ops.NO_NETWORK:
                raise NotFound(f"network {network} of container", record.name, f"it is on {record.network.network}")
            if network == HOST and record.status in LIVE:
                raise WrongState(
                    "container", record.name, record.status, "leave the host's network", hint=f"first: isopod stop {record.name}"
                )
            await self._store.commit(ops.DetachNetwork(record.id))
            if record.network.ip_address is not None:
                await self._containers.isolation(record).disconnect(record)  # if the kernel refuses, the container's end clears it away
            return UpdatedContainer(container=entry.record)

    def _present(self, entry: Entry) -> Container:
        if self._containers.is_gone(entry):
            raise NotFound("container", entry.last.name, "it was removed meanwhile")
        return entry.record


def _runs(record: Container) -> bool:
    return record.status in ("running", "paused") and record.pid is not None and record.pid_started_ticks is not None


def _new_limits(now: Resources, request: UpdateContainer) -> Resources:
    limits = now
    for name in ("memory_bytes_max", "cpus", "pids_max"):
        value = getattr(request, name)
        if value is not None:
            limits = msgspec.structs.replace(limits, **{name: None if value == NO_LIMIT else value})
    return limits


def _edited(now: Mapping[str, str], added: Mapping[str, str], removed: Sequence[str], kind: str) -> dict[str, str]:
    for key in removed:
        if key not in now:
            raise NotFound(kind, key, "see: isopod inspect CONTAINER")
    return {**{key: value for key, value in now.items() if key not in removed}, **added}


def _checked(mounts: Sequence[Mount]) -> Sequence[Mount]:
    check_mounts(mounts)
    return mounts
