"""ContainerIsolation: sandboxes that share the host's kernel, kept apart by its namespaces, under conmon and an OCI runtime."""

import asyncio
import errno
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Final

from isopod.api.messages import Container, Endpoint, ExecContainer, Image, Resources
from isopod.engine.bundle import build_process
from isopod.engine.container_files import Bind, ContainerFiles
from isopod.engine.isolation import End
from isopod.engine.launch import Launch
from isopod.engine.layout import Layout
from isopod.engine.stage import Stage
from isopod.engine.supervisor import Attached, ExecSession, Supervisor
from isopod.runtime.logger import Logger
from isopod.world.errors import InvalidArgument, WrongState, from_os_error
from isopod.world.ids import is_container_id
from isopod.world.kernel import CgroupFigures, CgroupUsage
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

SUPERVISOR_GRACE_S: Final = 2.0


class ContainerCommand:
    """One more command in a container. See `isolation.Command`."""

    def __init__(self, world: World, session: ExecSession, folder: str) -> None:
        self._world = world
        self._session = session
        self._folder = folder

    @property
    def attached(self) -> Attached:
        """Its stdio."""
        return self._session.attached

    async def wait(self) -> int | None:
        """Return its exit code, None if its supervisor died without telling."""
        return await self._session.wait()

    async def signal(self, signum: int) -> None:
        """Send it a signal."""
        identity = self._world.processes.identify(self._session.pid)
        if identity is not None:
            self._world.processes.signal(identity, signum)

    def close(self) -> None:
        """Let go; it runs on."""
        self._session.close()

    async def clear(self) -> None:
        """Remove the session's folder: at once, as a command that lost its client may run on for long, and again when its supervisor is
        gone, which may have been writing the exit code into it."""
        try:
            await self._world.disk.remove_tree(self._folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        await self._session.wait_supervisor()
        await self._world.disk.remove_tree(self._folder)


class ContainerIsolation:
    """See `isolation.Isolation`, which says what each method does.

    Args:
        world: Where containers live.
        stage: What surrounds them.
        supervisor: What starts them.
        layout: The engine's folders.
        logger: Told of usage that cannot be read.
    """

    needs_running = False

    def __init__(self, world: World, stage: Stage, supervisor: Supervisor, *, layout: Layout, logger: Logger) -> None:
        self._world = world
        self._stage = stage
        self._supervisor = supervisor
        self._layout = layout
        self._logger = logger

    async def check(self, record: Container) -> None:
        """Check that there is an image."""
        if not record.image_id:
            raise InvalidArgument("image", record.image, "a container is made from one", "add one: isopod run IMAGE COMMAND")

    async def prepare(self, record: Container, image: Image | None) -> Container:
        """Mount, connect, write the bundle."""
        assert image is not None, "`check` refused a container without an image"
        return await self._stage.set(record, image)

    async def launch(self, record: Container) -> Launch:
        """Spawn conmon."""
        return await self._supervisor.launch(
            record.id,
            record.name,
            log=self._layout.log(record.id),
            command=record.command,
            terminal=record.terminal,
            stdin=record.stdin_open,
        )

    async def attach(self, record: Container) -> Attached:
        """Connect to conmon's attach socket."""
        return await self._supervisor.attach(record.id)

    async def begin(self, record: Container) -> None:
        """Let the command begin."""
        await self._supervisor.start(record.id, record.name)

    async def reserve(self, record: Container, session: str) -> None:
        """Make the session's folder: never in a bundle that is being cleared."""
        await self._world.disk.make_directory(self._folder(record, session))

    async def exec(self, record: Container, request: ExecContainer, session: str) -> ContainerCommand:
        """Start one more command under a conmon of its own."""
        folder = self._folder(record, session)
        try:
            spec = build_process(
                command=request.command,
                env={**record.env, **request.env},
                working_dir=request.working_dir or record.working_dir,
                user=await self._stage.user(record, request.user or record.user),
                terminal=request.terminal,
                hostname=record.hostname,
            )
            size = (request.rows, request.columns)
            started = await self._supervisor.exec(record.id, record.name, session, spec=spec, stdin=request.stdin_open, size=size)
            return ContainerCommand(self._world, started, folder)
        except BaseException as error:
            await self._world.disk.remove_tree(folder)
            if isinstance(error, OSError):
                raise from_os_error(error, "run a command in", record.name) from error
            raise

    async def signal(self, record: Container, signum: int) -> None:
        """Signal the first process."""
        if record.pid is not None and record.pid_started_ticks is not None:
            self._world.processes.signal(ProcessIdentity(record.pid, record.pid_started_ticks), signum)

    async def pause(self, record: Container) -> None:
        """Freeze it."""
        await self._supervisor.pause(record.id, record.name)

    async def resume(self, record: Container) -> None:
        """Thaw it."""
        await self._supervisor.resume(record.id, record.name)

    async def update(self, record: Container, resources: Resources) -> Sequence[str]:
        """Change its control group."""
        await self._supervisor.update(record.id, record.name, self._stage.limits(resources))
        return ()

    async def connect(self, record: Container, network: str) -> Endpoint:
        """Hang its namespace on a bridge."""
        assert record.pid is not None, "the caller has seen that it runs"
        assert record.pid_started_ticks is not None, "it is set with the pid"
        return await self._stage.connect(record, network, ProcessIdentity(record.pid, record.pid_started_ticks))

    async def disconnect(self, record: Container) -> None:
        """Take its link away."""
        await self._stage.disconnect(record)

    def writable_layer(self, record: Container) -> str:
        """Return the overlay's upper folder."""
        return self._layout.upper(record.id)

    @asynccontextmanager
    async def files(self, record: Container, image: Image | None) -> AsyncIterator[ContainerFiles]:
        """Look through its first process, or mount what it would see."""
        if image is None:
            if record.pid is None or record.pid_started_ticks is None:
                raise WrongState("container", record.name, record.status, "reach into it", hint="try again in a moment")
            yield ContainerFiles(self._world, record.name, ProcessIdentity(record.pid, record.pid_started_ticks))
            return
        async with self._stage.lend_root(record, image) as folder:
            binds = [Bind(mount.source, mount.destination, mount.read_only) for mount in record.mounts if mount.kind == "bind"]
            yield ContainerFiles(self._world, record.name, folder, binds)

    def usage(self, record: Container) -> CgroupUsage:
        """Return what its control group counts."""
        return self._world.kernel.cgroup_usage(self._stage.cgroup(record.id))

    def figures(self, record: Container) -> CgroupFigures:
        """Return what its control group counts, and what the interfaces of its first process carried."""
        return self._world.kernel.cgroup_figures(self._stage.cgroup(record.id), record.pid)

    async def state(self, record: Container) -> tuple[str, int]:
        """Ask the runtime."""
        return await self._supervisor.state(record.id)

    async def end(self, record: Container) -> End:
        """Read the exit file, and whether memory ran out."""
        code = await self._supervisor.exit_code(record.id)
        why = "its supervisor died without telling the exit code" if code is None else ""
        return End(code, why, out_of_memory=self._was_out_of_memory(record))

    def _was_out_of_memory(self, record: Container) -> bool:
        try:
            return bool(self.usage(record).n_oom_kills)
        except (OSError, ValueError) as error:
            self._logger.error("container.usage_unreadable", id=record.id, name=record.name, why=str(error))
            return False

    async def forget(self, identifier: str) -> None:
        """Remove the exit file."""
        await self._supervisor.forget(identifier)

    async def clear(self, identifier: str, name: str, supervisor: ProcessIdentity | None = None) -> None:
        """Kill, delete, unmount, disconnect."""
        await self._world.kernel.kill_cgroup(self._stage.cgroup(identifier))
        await self._supervisor.delete(identifier, name)
        if supervisor is not None:
            await self._wait_supervisor(supervisor)
        await self._stage.clear(identifier)

    async def _wait_supervisor(self, supervisor: ProcessIdentity) -> None:
        """End a supervisor whose container was deleted and that is still there after a moment: it hangs, or its runtime does."""
        try:
            async with asyncio.timeout(SUPERVISOR_GRACE_S):
                await self._world.processes.wait_gone(supervisor)
        except TimeoutError:
            await self._supervisor.end(supervisor)

    async def leftovers(self) -> Sequence[str]:
        """Look at the runtime's state, the bundles and the control groups."""
        found = [*await self._supervisor.known(), *await self._world.disk.list(self._layout.bundles), *await self._stage.cgroups_present()]
        return [name for name in dict.fromkeys(found) if is_container_id(name)]

    async def ends(self) -> Sequence[str]:
        """Look at the exit files."""
        return [name for name in await self._world.disk.list(self._layout.supervisor.exits) if is_container_id(name)]

    def strays(self, known: Collection[ProcessIdentity]) -> Sequence[tuple[str, ProcessIdentity]]:
        """Look for conmons."""
        return self._supervisor.strays(known)

    async def end_supervisor(self, supervisor: ProcessIdentity) -> None:
        """Kill conmon's group."""
        await self._supervisor.end(supervisor)

    def _folder(self, record: Container, session: str) -> str:
        return f"{self._layout.bundle(record.id)}/{session}"
