"""Services: the contract's methods, served by an engine. Thin: decode, ask the engine, answer."""

import asyncio
import platform
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

import msgspec

import isopod
from isopod.api import messages as m
from isopod.api import methods, render
from isopod.engine.containers import LOST_EXIT_CODE
from isopod.engine.engine import Engine
from isopod.engine.logs import read_logs
from isopod.net.rpc import Call, Handler, Server
from isopod.node.groups import BULK
from isopod.node.progress import ProgressReport
from isopod.runtime.config import NodeConfig
from isopod.runtime.task_list import list_tasks
from isopod.wire.frames import VERSION_HIGHEST
from isopod.wire.service import Method
from isopod.world.errors import BugError
from isopod.world.world import World

AnyCall = Call[Any, Any]
T = TypeVar("T")


class NodeFacts(NamedTuple):
    """What a node says of itself."""

    started_at_ns: int
    event_loop: str
    core: str


class Services:
    """The handlers of one node.

    Args:
        world: For time and the machine's facts.
        engine: Who does the work.
        config: What the node was told.
        facts: What the node is.
    """

    def __init__(self, world: World, engine: Engine, config: NodeConfig, facts: NodeFacts) -> None:
        self._world = world
        self._engine = engine
        self._config = config
        self._facts = facts
        self._server: Server | None = None

    def serve_on(self, server: Server) -> None:
        """Say which server dispatches, for `system.render`."""
        self._server = server

    def handlers(self) -> dict[Method[Any, Any], Handler[Any, Any]]:
        """Return a handler for every method of the contract."""
        return {
            methods.SYSTEM_VERSION: self.version,
            methods.SYSTEM_INFO: self.info,
            methods.SYSTEM_TASKS: self.tasks,
            methods.SYSTEM_RENDER: self.render,
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
            methods.IMAGE_LIST: self.image_list,
            methods.IMAGE_INSPECT: self.image_inspect,
            methods.IMAGE_REMOVE: self.image_remove,
            methods.IMAGE_IMPORT: self.image_import,
            methods.IMAGE_LOAD: self.image_load,
            methods.NETWORK_CREATE: self.network_create,
            methods.NETWORK_LIST: self.network_list,
            methods.NETWORK_INSPECT: self.network_inspect,
            methods.NETWORK_REMOVE: self.network_remove,
        }

    # --- the node -----------------------------------------------------------------------------------------------------

    async def version(self, _: AnyCall, __: m.Empty) -> m.Version:
        """Who answers."""
        return m.Version(version=isopod.__version__, protocol=VERSION_HIGHEST, python=platform.python_version(), core=self._facts.core)

    async def info(self, _: AnyCall, __: m.Empty) -> m.NodeInfo:
        """What was probed, and why."""
        machine, host, paths = self._engine.machine, self._world.kernel.host_facts(), self._config.paths
        containers = self._engine.containers
        return m.NodeInfo(
            version=isopod.__version__,
            pid=self._world.processes.own_pid(),
            started_at_ns=self._facts.started_at_ns,
            socket=paths["socket"],
            root=paths["root"],
            run_root=paths["run_root"],
            paths=dict(paths),
            hostname=host.hostname,
            operating_system=host.operating_system,
            kernel=host.kernel,
            architecture=host.architecture,
            n_cpus=host.n_cpus,
            memory_bytes=host.memory_bytes,
            event_loop=self._facts.event_loop,
            cgroup_mode=machine.cgroup_mode,
            runtime=m.Probed(value=machine.tools.runtime, why=machine.tools.runtime_why),
            supervisor=m.Probed(value=machine.tools.supervisor, why=machine.tools.supervisor_why),
            accelerator=machine.accelerator,
            storage_driver=machine.storage_driver,
            network_driver=m.Probed(value="bridge", why="rtnetlink, and one nftables table of isopod's own"),
            seccomp_profile=machine.seccomp_profile,
            containers=len(containers.list(all_states=True)),
            containers_running=len(containers.list(all_states=False)),
            images=len(self._engine.images.list()),
        )

    async def tasks(self, _: AnyCall, __: m.Empty) -> m.TaskList:
        """What the loop is doing."""
        return m.TaskList(
            tasks=tuple(
                m.TaskEntry(
                    name=task.name,
                    state=task.state,
                    group=task.group,
                    function=task.function,
                    location=task.location,
                    awaits=task.awaits,
                    age_s=task.age_s,
                )
                for task in list_tasks()
            )
        )

    async def render(self, _: AnyCall, request: m.RenderRequest) -> m.Rendered:
        """Another method's answer as text."""
        if self._server is None:
            raise BugError("services without a server")
        reply = await self._server.invoke(request.method, request.body)
        if not isinstance(reply, msgspec.Struct):
            raise BugError(f"{request.method} answered no message")
        now_s = self._world.clock.now_ns() / 1e9
        return m.Rendered(text=render.render(request.method, reply, form=request.format, now_s=now_s))

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
        """The running ones, or all."""
        return m.ContainerList(containers=tuple(self._engine.containers.list(all_states=request.all)))

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


def _ran(record: m.Container, ended: bool) -> m.Ran:
    return m.Ran(id=record.id, name=record.name, exit_code=record.exit_code if ended else None, oom_killed=record.oom_killed)


async def _in_bulk(work: Coroutine[Any, Any, T]) -> T:
    """Do what takes seconds in the group that gets what others leave; cancelled with its caller."""
    return await asyncio.get_running_loop().create_task(work, context=BULK.context(), name="bulk")


async def _chunks(call: AnyCall) -> AsyncIterator[bytes]:
    while (item := await call.receive()) is not None:
        yield item.data
