"""What a node says of itself: its version, what it found on the machine, its tasks; and other methods' answers as text.

A node without an engine (`--role control`) says so by name to whoever asks it about containers, images or networks.
"""

import platform
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

import isopod
from isopod.api import messages as m
from isopod.api import methods, render
from isopod.engine.engine import Engine
from isopod.net.rpc import Call, Handler, Server
from isopod.net.rpc.call import AnyHandler, AnyMethod
from isopod.runtime.config import NodeConfig
from isopod.runtime.task_list import list_tasks
from isopod.wire.frames import VERSION_HIGHEST
from isopod.wire.service import Method
from isopod.world.errors import BugError, WrongState
from isopod.world.world import World

AnyCall = Call[Any, Any]
NO_ENGINE: Final = m.Probed(value="none", why="--role control: this node runs no containers")


class NodeFacts(NamedTuple):
    """What a node says of itself."""

    started_at_ns: int
    event_loop: str
    core: str
    guest: str = "/usr/share/isopod/guest"
    """Where the files of guests are installed, unless the configuration says otherwise."""
    origins: Mapping[str, str] = {}
    """Where settings were said that are no defaults, by key: "environment ISOPOD_LOG_LEVEL"."""


class SystemServices:
    """The handlers.

    Args:
        world: For time and the machine's facts.
        config: What the node was told.
        facts: What the node is.
        engine: Who runs containers, None for nobody.
        cluster: Returns what the node says of its cluster, None if it is in none.
    """

    def __init__(
        self,
        world: World,
        config: NodeConfig,
        facts: NodeFacts,
        *,
        engine: Engine | None,
        cluster: Callable[[], m.ClusterFacts | None] = lambda: None,
    ) -> None:
        self._world = world
        self._config = config
        self._facts = facts
        self._engine = engine
        self._cluster = cluster
        self._server: Server | None = None

    def serve_on(self, server: Server) -> None:
        """Say which server dispatches, for `system.render`."""
        self._server = server

    def handlers(self) -> dict[Method[Any, Any], Handler[Any, Any]]:
        """Return a handler for each."""
        return {
            methods.SYSTEM_VERSION: self.version,
            methods.SYSTEM_INFO: self.info,
            methods.SYSTEM_TASKS: self.tasks,
            methods.SYSTEM_RENDER: self.render,
        }

    async def version(self, _: AnyCall, __: m.Empty) -> m.Version:
        """Who answers."""
        return m.Version(version=isopod.__version__, protocol=VERSION_HIGHEST, python=platform.python_version(), core=self._facts.core)

    async def info(self, _: AnyCall, __: m.Empty) -> m.NodeInfo:
        """What was probed, and why."""
        host, paths, engine = self._world.kernel.host_facts(), self._config.paths, self._engine
        machine = engine.machine if engine is not None else None
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
            cgroup_mode=machine.cgroup_mode if machine is not None else NO_ENGINE,
            runtime=m.Probed(value=machine.tools.runtime, why=machine.tools.runtime_why) if machine is not None else NO_ENGINE,
            supervisor=m.Probed(value=machine.tools.supervisor, why=machine.tools.supervisor_why) if machine is not None else NO_ENGINE,
            accelerator=await engine.accelerator() if engine is not None else NO_ENGINE,
            storage_driver=engine.storage() if engine is not None else NO_ENGINE,
            network_driver=_BRIDGE if machine is not None else NO_ENGINE,
            seccomp_profile=machine.seccomp_profile if machine is not None else NO_ENGINE,
            drivers=await engine.drivers() if engine is not None else (),
            containers=len(engine.containers.list(all_states=True)) if engine is not None else 0,
            containers_running=len(engine.containers.list(all_states=False)) if engine is not None else 0,
            images=len(engine.images.list()) if engine is not None else 0,
            cluster=self._cluster(),
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


def no_engine_handlers() -> dict[AnyMethod, AnyHandler]:
    """Return handlers that refuse everything an engine would do."""
    return dict.fromkeys(methods.METHODS, _refuse)


def _refuse(call: AnyCall, _: object) -> NoReturn:
    raise WrongState(
        "node", "at this socket", "without an engine (--role control)", f"serve {call.method}", hint="ask a node that runs containers"
    )


_BRIDGE: Final = m.Probed(value="bridge", why="rtnetlink, and one nftables table of isopod's own")
