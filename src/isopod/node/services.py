"""Services: the contract's methods that an engine serves. Thin: decode, ask the engine, answer."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, Final, TypeVar

from isopod.api import machines, methods
from isopod.api import messages as m
from isopod.api import usage as u
from isopod.engine.containers import LOST_EXIT_CODE
from isopod.engine.engine import Engine
from isopod.engine.events import stream_events
from isopod.engine.logs import read_logs
from isopod.net.rpc import Call, Handler
from isopod.node.groups import BULK
from isopod.node.progress import ProgressReport
from isopod.wire.service import Method
from isopod.world.world import World

CHUNK_BYTES: Final = 256 << 10
AnyCall = Call[Any, Any]
T = TypeVar("T")


class Services:
    """The handlers of one node.

    Args:
        world: For time.
        engine: Who does the work.
    """

    def __init__(self, world: World, engine: Engine) -> None:
        self._world = world
        self._engine = engine

    def handlers(self) -> dict[Method[Any, Any], Handler[Any, Any]]:
        """Return a handler for every method of the contract."""
        return {
            methods.SYSTEM_USAGE: self.usage,
            methods.SYSTEM_BACKUP: self.backup,
            methods.CONTAINER_RUN: self.run,
            methods.CONTAINER_CREATE: self.create,
            methods.CONTAINER_START: self.start,
            methods.CONTAINER_WAIT: self.wait,
            methods.CONTAINER_STOP: self.stop,
            methods.CONTAINER_KILL: self.kill,
            methods.CONTAINER_REMOVE: self.remove,
            methods.CONTAINER_LIST: self.list,
            methods.CONTAINER_INSPECT: self.inspect,
            methods.CONTAINER_EXEC: self.exec,
            methods.CONTAINER_LOGS: self.logs,
            methods.CONTAINER_COMMIT: self.commit,
            methods.CONTAINER_PAUSE: self.pause,
            methods.CONTAINER_UNPAUSE: self.unpause,
            methods.CONTAINER_RESTART: self.restart,
            methods.CONTAINER_UPDATE: self.update,
            methods.CONTAINER_EVENTS: self.events,
            methods.CONTAINER_STATS: self.stats,
            methods.CONTAINER_STAT_PATH: self.stat_path,
            methods.CONTAINER_COPY_FROM: self.copy_from,
            methods.CONTAINER_COPY_TO: self.copy_to,
            methods.VM_STATUS: self.vm_status,
            methods.VM_CONSOLE: self.vm_console,
            methods.VM_SNAPSHOT: self.vm_snapshot,
            methods.VM_SNAPSHOT_REMOVE: self.vm_snapshot_remove,
            methods.VM_RESTORE: self.vm_restore,
            methods.VM_RESIZE: self.vm_resize,
            methods.VM_UPDATE: self.vm_update,
            methods.IMAGE_LIST: self.image_list,
            methods.IMAGE_INSPECT: self.image_inspect,
            methods.IMAGE_REMOVE: self.image_remove,
            methods.IMAGE_IMPORT: self.image_import,
            methods.IMAGE_LOAD: self.image_load,
            methods.NETWORK_CREATE: self.network_create,
            methods.NETWORK_LIST: self.network_list,
            methods.NETWORK_INSPECT: self.network_inspect,
            methods.NETWORK_REMOVE: self.network_remove,
            methods.NETWORK_CONNECT: self.network_connect,
            methods.NETWORK_DISCONNECT: self.network_disconnect,
        }

    # --- containers ---------------------------------------------------------------------------------------------------

    async def run(self, call: AnyCall, request: m.RunContainer) -> m.Ran:
        """Create and start."""
        size = (request.rows, request.columns)
        return _ran(await self._engine.containers.run(request.spec, call if request.attach else None, size=size), request.attach)

    async def create(self, _: AnyCall, request: m.ContainerSpec) -> m.Container:
        """Create only."""
        return await self._engine.containers.create(request)

    async def start(self, call: AnyCall, request: m.StartContainer) -> m.Ran:
        """Start an existing one."""
        size = (request.rows, request.columns)
        return _ran(await self._engine.containers.start(request.name, call if request.attach else None, size=size), request.attach)

    async def wait(self, _: AnyCall, request: m.ContainerName) -> m.Ran:
        """Its exit code, once it has one."""
        return _ran(await self._engine.containers.wait(request.name), True)

    async def stop(self, _: AnyCall, request: m.StopContainer) -> m.Container:
        """End it."""
        return await self._engine.containers.stop(request.name, request.timeout_s)

    async def kill(self, _: AnyCall, request: m.KillContainer) -> m.Empty:
        """Signal it."""
        await self._engine.containers.kill(request.name, request.signal)
        return m.Empty()

    async def remove(self, _: AnyCall, request: m.RemoveContainer) -> m.Empty:
        """Remove it."""
        await self._engine.containers.remove(request.name, force=request.force)
        return m.Empty()

    async def list(self, _: AnyCall, request: m.ListContainers) -> m.ContainerList:
        """Those that pass the filters."""
        return m.ContainerList(containers=tuple(self._engine.usage.list(request)))

    async def inspect(self, _: AnyCall, request: m.ContainerName) -> m.Container:
        """Its record."""
        return self._engine.containers.get(request.name)

    async def exec(self, call: AnyCall, request: m.ExecContainer) -> m.Ran:
        """One more command in it."""
        record = self._engine.containers.get(request.name)
        code = await self._engine.containers.exec(request, call)
        return m.Ran(id=record.id, name=record.name, exit_code=LOST_EXIT_CODE if code is None else code)

    async def logs(self, call: AnyCall, request: m.LogsRequest) -> m.Empty:
        """What it wrote."""
        ended = self._engine.containers.ended(request.name)
        async with aclosing(read_logs(self._world, self._engine.log_of(request), request, ended=ended)) as items:
            async for item in items:
                await call.send(item)
        return m.Empty()

    async def commit(self, _: AnyCall, request: m.CommitContainer) -> m.Image:
        """An image of its files."""
        return await self._engine.containers.commit(request)

    async def pause(self, _: AnyCall, request: m.ContainerName) -> m.Container:
        """Freeze it."""
        return await self._engine.containers.pause(request.name)

    async def unpause(self, _: AnyCall, request: m.ContainerName) -> m.Container:
        """Let it go on."""
        return await self._engine.containers.unpause(request.name)

    async def restart(self, _: AnyCall, request: m.RestartContainer) -> m.Container:
        """Stop and start it."""
        return await self._engine.containers.restart(request.name, request.timeout_s)

    async def update(self, _: AnyCall, request: m.UpdateContainer) -> m.UpdatedContainer:
        """Change it."""
        return await self._engine.changes.update(request)

    async def events(self, call: AnyCall, request: m.EventsRequest) -> m.Empty:
        """What happens, until the client has enough."""
        async with aclosing(stream_events(self._world, self._engine.store, request)) as events:
            async for event in events:
                await call.send(event)
        return m.Empty()

    async def stats(self, _: AnyCall, request: u.StatsRequest) -> u.UsageList:
        """What containers use now."""
        return u.UsageList(containers=tuple(self._engine.usage.stats(request)))

    async def usage(self, _: AnyCall, __: m.Empty) -> m.SystemUsage:
        """What all of them add up to."""
        return await self._engine.usage.total()

    async def backup(self, call: AnyCall, _: m.Empty) -> m.BackedUp:
        """All records at one moment."""
        made = await self._engine.backup()
        for start in range(0, len(made.data), CHUNK_BYTES):
            await call.send(m.Chunk(data=made.data[start : start + CHUNK_BYTES]))
        return made.facts

    async def stat_path(self, _: AnyCall, request: machines.StatPath) -> machines.PathFacts:
        """What is at a path in it."""
        return await self._engine.copies.look(request)

    async def copy_from(self, call: AnyCall, request: machines.CopyFrom) -> m.Empty:
        """An archive of files in it."""
        async with aclosing(self._engine.copies.read(request)) as pieces:
            async for piece in pieces:
                await call.send(m.Chunk(data=piece))
        return m.Empty()

    async def copy_to(self, call: AnyCall, request: machines.CopyTo) -> m.Empty:
        """Files into it."""
        await self._engine.copies.write(request, _chunks(call))
        return m.Empty()

    # --- virtual machines -----------------------------------------------------------------------------------------------

    async def vm_status(self, _: AnyCall, request: m.ContainerName) -> machines.VmState:
        """What it does."""
        return await self._engine.machines.status(request.name)

    async def vm_console(self, call: AnyCall, request: machines.VmConsole) -> m.Empty:
        """Its console."""
        await self._engine.machines.console(request, call)
        return m.Empty()

    async def vm_snapshot(self, _: AnyCall, request: machines.VmSnapshotRequest) -> machines.VmSnapshot:
        """What it is at this moment."""
        return await self._engine.machines.snapshot(request)

    async def vm_snapshot_remove(self, _: AnyCall, request: machines.VmSnapshotRequest) -> m.Empty:
        """Forget one."""
        await self._engine.machines.remove_snapshot(request)
        return m.Empty()

    async def vm_restore(self, _: AnyCall, request: machines.VmSnapshotRequest) -> m.Container:
        """Go back to one."""
        return await self._engine.machines.restore(request)

    async def vm_resize(self, _: AnyCall, request: machines.ResizeVm) -> m.UpdatedContainer:
        """Other memory or processors."""
        return await self._engine.machines.resize(request)

    async def vm_update(self, _: AnyCall, request: m.ContainerName) -> machines.VmBuild:
        """Its configuration, built anew."""
        return await self._engine.machines.update(request.name)

    # --- images -------------------------------------------------------------------------------------------------------

    async def image_list(self, _: AnyCall, __: m.Empty) -> m.ImageList:
        """All of them."""
        return m.ImageList(images=tuple(self._engine.images.list()))

    async def image_inspect(self, _: AnyCall, request: m.ImageNameRequest) -> m.Image:
        """Its record."""
        return self._engine.images.resolve(request.name)

    async def image_remove(self, _: AnyCall, request: m.RemoveImage) -> m.RemovedImage:
        """Drop a name."""
        return await self._engine.remove_image(request.name)

    async def image_import(self, call: AnyCall, request: m.ImportImage) -> m.Image:
        """One layer from a stream."""
        return await _in_bulk(self._import(call, request))

    async def image_load(self, call: AnyCall, request: m.LoadImages) -> m.LoadedImages:
        """Images from an archive's stream."""
        return await _in_bulk(self._load(call, request))

    async def _import(self, call: AnyCall, request: m.ImportImage) -> m.Image:
        async with ProgressReport(call, request.total_bytes) as report:
            return await self._engine.images.import_rootfs(request.name, _chunks(call), command=request.command, progress=report)

    async def _load(self, call: AnyCall, request: m.LoadImages) -> m.LoadedImages:
        async with ProgressReport(call, request.total_bytes) as report:
            return m.LoadedImages(images=tuple(await self._engine.images.load(_chunks(call), progress=report)))

    # --- networks -----------------------------------------------------------------------------------------------------

    async def network_create(self, _: AnyCall, request: m.NetworkSpec) -> m.NetworkRecord:
        """A bridge network."""
        return await self._engine.create_network(request)

    async def network_list(self, _: AnyCall, __: m.Empty) -> m.NetworkList:
        """All, by name."""
        return m.NetworkList(networks=tuple(self._engine.networks.list()))

    async def network_inspect(self, _: AnyCall, request: m.NetworkNameRequest) -> m.NetworkRecord:
        """Its record."""
        return self._engine.networks.get(request.name)

    async def network_remove(self, _: AnyCall, request: m.NetworkNameRequest) -> m.Empty:
        """Remove it."""
        await self._engine.remove_network(request.name)
        return m.Empty()

    async def network_connect(self, _: AnyCall, request: m.ConnectNetwork) -> m.UpdatedContainer:
        """Put a container on it."""
        return await self._engine.changes.connect(request)

    async def network_disconnect(self, _: AnyCall, request: m.ConnectNetwork) -> m.UpdatedContainer:
        """Take a container off it."""
        return await self._engine.changes.disconnect(request)


def _ran(record: m.Container, ended: bool) -> m.Ran:
    return m.Ran(id=record.id, name=record.name, exit_code=record.exit_code if ended else None, oom_killed=record.oom_killed)


async def _in_bulk(work: Coroutine[Any, Any, T]) -> T:
    """Do what takes seconds in the group that gets what others leave; cancelled with its caller."""
    return await asyncio.get_running_loop().create_task(work, context=BULK.context(), name="bulk")


async def _chunks(call: AnyCall) -> AsyncIterator[bytes]:
    while (item := await call.receive()) is not None:
        yield item.data
