"""Containers: the life cycle. Creates, starts, runs, stops and removes them, and knows their true state.

Records live in the `MetadataStore`; what a container is just doing is noted there too. Each container has a lock; whoever changes it
holds that lock, and no lock is held while waiting for a container to end. What changes a container runs in a task of the engine's own,
so that a client that goes away in the middle leaves no half of it. A container's end is learned in one way only: its supervisor is gone.

Not here: what can be changed of a container that exists (`changes`), how a process is started (`supervisor`), what surrounds it
(`stage`), what a restarted daemon makes of what it finds (`adoption`).
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from isopod.api.messages import CommitContainer, Container, ContainerSpec, Endpoint, ExecContainer, Image, Started
from isopod.engine import creation
from isopod.engine.bundle import build_process
from isopod.engine.images.store import ImageStore
from isopod.engine.layout import Layout
from isopod.engine.metadata import MetadataStore
from isopod.engine.operations import Create, Delete, Operation, UpdateState, state_of
from isopod.engine.stage import Stage
from isopod.engine.states import LIVE, Event, advance
from isopod.engine.supervisor import Attached, ExecSession, Launch, Supervisor
from isopod.engine.terminal import Stdio, converse
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.runtime.sync import SharedMutex
from isopod.world.errors import (
    CommandNotRunnable,
    InvalidArgument,
    IsopodError,
    NotFound,
    RuntimeFailed,
    UnavailableError,
    WrongState,
    from_os_error,
)
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

Result = TypeVar("Result")
Size = tuple[int, int]
"""Rows and columns of a terminal, (0, 0) if unknown."""

LOST_EXIT_CODE: Final = 255
KILL_TIMEOUT_S: Final = 10.0
SETTLE_TIMEOUT_S: Final = 5.0
SUPERVISOR_GRACE_S: Final = 2.0
STORE_PAUSE_S: Final = 1.0
STORE_PAUSE_S_MAX: Final = 30.0
_SIGKILL: Final = 9
_SIGNAL_MAX: Final = 64


@dataclass(slots=True)
class Entry:
    """A container in memory. `ended` is set while it is not live and its end was dealt with."""

    store: MetadataStore
    last: Container
    """What it was when it was last looked at: all there is of one that was removed."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    thawed: SharedMutex = field(default_factory=SharedMutex)
    """Held shared while a command is being started in it, exclusively while it is frozen for a commit."""
    restarting: bool = False
    """Its end is the first half of a restart."""

    @property
    def record(self) -> Container:
        """What is known of it now."""
        found = self.store.get(self.last.id)
        if found is not None:
            self.last = found
        return self.last


class Containers:
    """All containers of a node.

    Args:
        world: Where they live.
        store: Where their records are kept.
        images: What they are made of.
        stage: What surrounds them.
        supervisor: What starts them.
        layout: The engine's folders.
        logger: Told of every finished operation.
        metrics: Counts starts and ends.
    """

    def __init__(
        self,
        world: World,
        store: MetadataStore,
        images: ImageStore,
        stage: Stage,
        *,
        supervisor: Supervisor,
        layout: Layout,
        logger: Logger,
        metrics: Registry,
    ) -> None:
        self._world = world
        self._store = store
        self._images = images
        self._stage = stage
        self._supervisor = supervisor
        self._layout = layout
        self._logger = logger
        self._entries: dict[str, Entry] = {}
        self._tasks: dict[int, asyncio.Task[Any]] = {}
        self._n_tasks = 0
        self._start_seconds = metrics.histogram("isopod_container_start_seconds", "Time from the request to the running command.")
        self._failed_starts = metrics.counter("isopod_container_start_failures_total", "Starts that were undone.")
        self._ends = metrics.counter("isopod_container_ends_total", "Containers that ended.")
        self._oom_kills = metrics.counter("isopod_container_oom_kills_total", "Containers that ended out of memory.")

    # --- asking -------------------------------------------------------------------------------------------------------

    def list(self, *, all_states: bool) -> "list[Container]":
        """Return the running containers, or all, newest first."""
        records = [entry.record for entry in self._entries.values() if all_states or entry.record.status in LIVE]
        return sorted(records, key=lambda record: (-record.created_at_ns, record.id))

    def get(self, name: str) -> Container:
        """Return a container's record by name, id, or unambiguous beginning of its id.

        Raises:
            NotFound: There is none.
            InvalidArgument: More than one id begins so.
        """
        return self._find(name).record

    def entry(self, name: str) -> Entry:
        """Return a container's entry by name, id, or unambiguous beginning of its id; whoever changes it takes its lock.

        Raises:
            NotFound: There is none.
            InvalidArgument: More than one id begins so.
        """
        return self._find(name)

    def is_gone(self, entry: Entry) -> bool:
        """Return whether a container was removed while its lock was waited for."""
        return entry.last.id not in self._entries

    def ended(self, name: str) -> asyncio.Event:
        """Return the event that is set while a container does not run, its end dealt with. Raises NotFound."""
        return self._find(name).ended

    def user_of(self, image_id: str) -> str | None:
        """Return the name of a container that needs an image, or None."""
        return next((entry.record.name for entry in self._entries.values() if entry.record.image_id == image_id), None)

    def users_of_network(self, network: str) -> str | None:
        """Return the name of a container that is to be on a network, or None."""
        return next((entry.record.name for entry in self._entries.values() if entry.record.network.network == network), None)

    # --- life cycle ---------------------------------------------------------------------------------------------------

    async def create(self, spec: ContainerSpec) -> Container:
        """Create a container; nothing runs yet.

        Raises:
            NotFound, AlreadyExists, InvalidArgument: As they say.
        """
        return await self._own(self._create(spec))

    async def start(self, name: str, stdio: Stdio | None = None, *, size: Size = (0, 0)) -> Container:
        """Start a container that does not run. With `stdio`, carry its terminal until it ended and return its last record.

        A client that goes away before it heard of the start has withdrawn it: the container is ended again.
        """
        entry = self._find(name)
        starting = self._background(self._start(entry, attach=stdio is not None, size=size), f"start {name}", logged=False)
        try:
            attached = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._background(self._withdraw(starting, lambda: self._kill(entry)), f"withdraw {name}")
            raise
        return await self._accompany(entry, attached, stdio)

    async def run(self, spec: ContainerSpec, stdio: Stdio | None = None, *, size: Size = (0, 0)) -> Container:
        """Create and start in one. If the start fails, an auto-remove container is gone again.

        A client that goes away before it heard of the start has withdrawn it: the container is removed again.
        """
        made: list[Entry] = []

        async def create_and_start() -> Attached | None:
            made.append(self._entries[(await self._create(spec)).id])
            return await self._start(made[0], attach=stdio is not None, size=size)

        starting = self._background(create_and_start(), "run", logged=False)
        try:
            attached = await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._background(self._withdraw(starting, lambda: self._remove(made[0], force=True)), "withdraw run")
            raise
        return await self._accompany(made[0], attached, stdio)

    async def wait(self, name: str) -> Container:
        """Return a container's record once it does not run."""
        entry = self._find(name)
        if entry.record.status == "created":
            raise WrongState("container", entry.record.name, "created", "wait for its end", hint="start it first")
        await entry.ended.wait()
        return entry.record

    async def stop(self, name: str, timeout_s: float) -> Container:
        """Ask a container to end, and kill it after `timeout_s`. One that does not run is left as it is."""
        entry = self._find(name)
        if entry.record.status in ("exited", "unknown"):
            return entry.record
        await self._own(self._stop(entry, timeout_s))
        return entry.record

    async def kill(self, name: str, signum: int) -> None:
        """Send a signal to a running container's first process."""
        entry = self._find(name)
        if not 1 <= signum <= _SIGNAL_MAX:
            raise InvalidArgument("signal", signum, f"want 1 to {_SIGNAL_MAX}")
        if entry.record.status not in ("running", "stopping", "paused"):
            raise WrongState("container", entry.record.name, entry.record.status, "signal it")
        self._signal(entry.record, signum)

    async def remove(self, name: str, *, force: bool) -> None:
        """Remove a container that is not live; with `force` kill it first."""
        entry = self._find(name)
        await self._own(self._remove(entry, force=force))

    async def exec(self, request: ExecContainer, stdio: Stdio) -> int | None:
        """Run one more command in a running container; return its exit code, None if its supervisor died without telling."""
        entry = self._find(request.name)
        if entry.record.status != "running":
            hint = "`isopod unpause` lets it go on" if entry.record.status == "paused" else "start it first"
            raise WrongState("container", entry.record.name, entry.record.status, "run a command in it", hint=hint)
        if not request.command or not request.command[0]:
            raise InvalidArgument("command", "", "nothing to run")
        creation.check_command(request.command, request.env, request.working_dir or "/")
        session, folder = await self._open_session(entry, request)
        try:
            await stdio.send(Started(id=entry.record.id, name=entry.record.name))
            await converse(session.attached, stdio, lambda signum: self._signal_pid(session.pid, signum))
            return await session.wait()
        finally:
            session.close()
            self._background(self._clear_exec(session, folder), f"watch exec in {entry.record.id}")

    async def probe(self, identifier: str, command: Sequence[str]) -> int | None:
        """Run a command in a running container, what it writes dropped; return its exit code, None if its supervisor died without telling.

        Cancelling kills the command.

        Raises:
            NotFound, WrongState: It is gone, or does not run.
            CommandNotRunnable, RuntimeFailed: The command could not be started.
        """
        entry = self._entries.get(identifier)
        if entry is None:
            raise NotFound("container", identifier[:12])
        session, folder = await self._open_session(entry, ExecContainer(name=identifier, command=tuple(command)))
        process = self._world.processes.identify(session.pid)
        has_ended = False
        try:
            async for _ in session.attached.outputs():
                pass
            code = await session.wait()
            has_ended = True
            return code
        finally:
            if not has_ended and process is not None:
                self._world.processes.signal(process, _SIGKILL)
            session.close()
            self._background(self._clear_exec(session, folder), f"watch exec in {identifier}")

    async def _open_session(self, entry: Entry, request: ExecContainer) -> tuple[ExecSession, str]:
        """Start a command in a container; return its session and the session's folder. Who is cancelled has withdrawn it."""
        name = self._world.random.token_hex(8)
        folder = f"{self._layout.bundle(entry.record.id)}/{name}"
        starting = self._background(self._exec(entry, request, name, folder), f"exec in {entry.record.id}", logged=False)
        try:
            return await asyncio.shield(starting), folder
        except asyncio.CancelledError:
            self._background(self._withdraw_exec(starting, folder), f"withdraw exec in {entry.record.id}")
            raise

    async def commit(self, request: CommitContainer) -> Image:
        """Make an image of a container's files; a running one is frozen meanwhile."""
        return await self._own(self._commit(self._find(request.name), request.image))

    async def _commit(self, entry: Entry, image: str) -> Image:
        # Commands that are being started come first, and those to come wait for the thaw. This lock before the other one, always.
        async with entry.thawed.exclusive(), entry.lock:
            self._check_there(entry)
            record = entry.record
            base = self._images.resolve(record.image_id)
            config = msgspec.structs.replace(base.config, command=record.command, entrypoint=(), working_dir=record.working_dir)
            if record.status != "running":
                return await self._images.commit(image, base, self._layout.upper(record.id), config)
            try:
                await self._supervisor.pause(record.id, record.name)
                return await self._images.commit(image, base, self._layout.upper(record.id), config)
            finally:
                await self._thaw(record)

    async def pause(self, name: str) -> Container:
        """Freeze every process of a running container."""
        return await self._own(self._freeze(self._find(name), frozen=True))

    async def unpause(self, name: str) -> Container:
        """Let a paused container go on."""
        return await self._own(self._freeze(self._find(name), frozen=False))

    async def _freeze(self, entry: Entry, *, frozen: bool) -> Container:
        async with entry.thawed.exclusive(), entry.lock:
            self._check_there(entry)
            record = entry.record
            after = self._next(entry, "pause" if frozen else "resume")
            do, undo = self._supervisor.pause, self._supervisor.resume
            if not frozen:
                do, undo = undo, do
            await do(record.id, record.name)
            try:
                await self._update(entry, status=after)
            except BaseException:
                await undo(record.id, record.name)  # what is not stored has not happened
                raise
            return entry.record

    async def restart(self, name: str, timeout_s: float) -> Container:
        """Stop a container as `stop` does, if it runs, and start it."""
        return await self._own(self._restart(self._find(name), timeout_s))

    async def _restart(self, entry: Entry, timeout_s: float) -> Container:
        if entry.record.status in LIVE:
            entry.restarting = True
            try:
                await self._stop(entry, timeout_s)
            finally:
                entry.restarting = False
        await self._start(entry, attach=False, size=(0, 0))
        return entry.record

    async def _thaw(self, record: Container) -> None:
        """Let a container go on after a commit; a failure here must not hide that the image is made."""
        try:
            await self._supervisor.resume(record.id, record.name)
        except IsopodError as error:
            self._logger.error("container.resume_failed", id=record.id, name=record.name, why=str(error))

    async def close(self) -> None:
        """Let go of everything; containers go on. Running operations are given up where they stand."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Wait until no operation is under way (watching a container's end is none), but not for long: `close` ends the rest."""

        async def wait_settled() -> None:
            while busy := [task for task in self._tasks.values() if not task.get_name().startswith("watch ")]:
                await asyncio.gather(*(asyncio.shield(task) for task in busy), return_exceptions=True)

        await _within(wait_settled(), SETTLE_TIMEOUT_S)

    # --- for adoption -------------------------------------------------------------------------------------------------

    def insert(self, record: Container) -> Entry:
        """Know of a container whose record is stored."""
        entry = Entry(self._store, record)
        self._entries[record.id] = entry
        if record.status not in LIVE:
            entry.ended.set()
        return entry

    def watch(self, identifier: str, supervisor: ProcessIdentity) -> None:
        """Watch the end of a container found running."""
        entry = self._entries[identifier]
        entry.ended.clear()
        self._watch(entry, lambda: self._world.processes.wait_gone(supervisor))

    async def conclude(self, identifier: str) -> None:
        """Deal with the end of a container found dead."""
        await self._finish(self._entries[identifier])

    async def discard(self, identifier: str) -> None:
        """Remove a container found half removed, or one that was to be removed at its end."""
        await self._discard(self._entries[identifier])

    async def amend(self, identifier: str, **changes: Any) -> None:
        """Change a record; a disk that refuses does not keep the node from starting."""
        await self._remember(self._entries[identifier], **changes)

    # --- steps --------------------------------------------------------------------------------------------------------

    async def _create(self, spec: ContainerSpec) -> Container:
        image = self._images.resolve(spec.image)
        with self._images.hold(image.id):
            self._stage.check_network(spec.network)
            now_ns = self._world.clock.now_ns()
            identifier = self._world.random.token_hex(32)
            record = creation.first_record(spec, image, identifier=identifier, now_ns=now_ns, boot_id=self._world.processes.boot_id())
            await creation.check_sources(self._world, record.mounts)
            await self._store.commit(Create(record))
            return self.insert(record).record

    async def _start(self, entry: Entry, *, attach: bool, size: Size) -> Attached | None:
        async with entry.lock:
            self._check_there(entry)
            n_restarts = entry.record.restart_count + (entry.record.status == "restarting")
            self._note(entry, status=self._next(entry, "start"), error="", restart_count=n_restarts)
            entry.ended.clear()
            try:
                return await self._bring_up(entry, attach=attach, size=size)
            except BaseException as error:
                await self._fail(entry, error)
                raise

    async def _bring_up(self, entry: Entry, *, attach: bool, size: Size) -> Attached | None:
        started_ns = self._world.clock.monotonic_ns()
        record = entry.record
        image = self._images.resolve(record.image_id)
        await self._supervisor.forget(record.id)
        attachment = await self._stage.set(record, image)
        record = self._note(entry, network=attachment.endpoint)
        await self._stage.write_bundle(record, attachment.namespace)
        launch = await self._launch(record)
        try:
            await self._update(entry, **_supervised(launch.supervisor), boot_id=self._world.processes.boot_id(), **_NOT_RUN)
        except BaseException:
            await launch.abort()
            raise
        pid = await launch.create()
        identity = self._world.processes.identify(pid)
        attached = await self._supervisor.attach(record.id) if attach else None
        try:
            if attached is not None and record.terminal and size != (0, 0):
                await attached.resize(*size)
            await self._supervisor.start(record.id, record.name)
            now_ns = self._world.clock.now_ns()
            ticks = identity.started_ticks if identity else None
            await self._update(entry, status=self._next(entry, "started"), pid=pid, pid_started_ticks=ticks, started_at_ns=now_ns)
        except BaseException:
            if attached is not None:
                attached.close()
            raise
        self._watch(entry, launch.wait_supervisor)
        duration_ns = self._world.clock.monotonic_ns() - started_ns
        self._start_seconds.observe(duration_ns / 1e9)
        self._logger.info("container.started", id=record.id, name=record.name, duration_us=duration_ns // 1000)
        return attached

    async def _launch(self, record: Container) -> Launch:
        return await self._supervisor.launch(
            record.id,
            record.name,
            log=self._layout.log(record.id),
            command=record.command,
            terminal=record.terminal,
            stdin=record.stdin_open,
        )

    async def _fail(self, entry: Entry, error: BaseException) -> None:
        """Undo a start that failed."""
        record = entry.record
        self._failed_starts.inc()
        self._logger.warning("container.start_failed", id=record.id, name=record.name, why=str(error) or type(error).__name__)
        await self._clear(record)
        code = error.exit_code if isinstance(error, CommandNotRunnable) else 125
        await self._settle(entry, status=self._next(entry, "failed"), exit_code=code, error=str(error) or "interrupted")

    async def _withdraw(self, starting: "asyncio.Task[Attached | None]", undo: Callable[[], Awaitable[None]]) -> None:
        """Undo a start whose client went away before it was told."""
        await asyncio.gather(starting, return_exceptions=True)
        if starting.cancelled() or starting.exception() is not None:
            return  # it undid itself
        attached = starting.result()
        if attached is not None:
            attached.close()
        await undo()

    async def _accompany(self, entry: Entry, attached: Attached | None, stdio: Stdio | None) -> Container:
        """Carry a started container's terminal, if there is a client for it, until it ended."""
        record = entry.record
        if attached is None or stdio is None:
            return record

        async def pass_on(signum: int) -> None:
            self._signal(record, signum)

        try:
            await stdio.send(Started(id=record.id, name=record.name))
            await converse(attached, stdio, pass_on)
            await entry.ended.wait()
            return entry.record
        finally:
            attached.close()

    async def _exec(self, entry: Entry, request: ExecContainer, session: str, folder: str) -> ExecSession:
        async with entry.thawed.shared():
            async with entry.lock:  # never in a bundle that is being cleared
                record = entry.record
                if record.status != "running":
                    raise WrongState("container", record.name, record.status, "run a command in it")
                await self._world.disk.make_directory(folder)
            return await self._exec_in(record, request, session, folder)

    async def _exec_in(self, record: Container, request: ExecContainer, session: str, folder: str) -> ExecSession:
        spec = build_process(
            command=request.command,
            env={**record.env, **request.env},
            working_dir=request.working_dir or record.working_dir,
            user=await self._stage.user(record, request.user or record.user),
            terminal=request.terminal,
            hostname=record.hostname,
        )
        size = (request.rows, request.columns)
        try:
            return await self._supervisor.exec(record.id, record.name, session, spec=spec, stdin=request.stdin_open, size=size)
        except BaseException as error:
            await self._world.disk.remove_tree(folder)
            if isinstance(error, OSError):
                raise from_os_error(error, "run a command in", record.name) from error
            raise

    async def _withdraw_exec(self, starting: "asyncio.Task[ExecSession]", folder: str) -> None:
        """End a command whose client went away before it was told of its start."""
        await asyncio.gather(starting, return_exceptions=True)
        if starting.cancelled() or starting.exception() is not None:
            return  # it undid itself
        session = starting.result()
        await self._signal_pid(session.pid, _SIGKILL)
        session.close()
        await self._clear_exec(session, folder)

    async def _clear_exec(self, session: ExecSession, folder: str) -> None:
        """Remove a session's folder: at once, as a command that lost its client may run on for long, and again when its supervisor is
        gone, which may have been writing the exit code into it."""
        try:
            await self._world.disk.remove_tree(folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        await session.wait_supervisor()
        await self._world.disk.remove_tree(folder)

    async def _stop(self, entry: Entry, timeout_s: float) -> None:
        async with entry.lock:
            if entry.record.status not in LIVE and entry.record.status != "created":
                return
            paused = entry.record.status == "paused"
            self._note(entry, status=self._next(entry, "stop"))
            if paused:
                await self._supervisor.resume(entry.record.id, entry.record.name)
            self._signal(entry.record, self._stop_signal(entry.record))
        if await _within(entry.ended.wait(), timeout_s):
            return
        await self._kill(entry)

    async def _kill(self, entry: Entry) -> None:
        async with entry.lock:  # a start under way comes to its end first
            record = entry.record
            if record.status not in LIVE:
                return
            if record.status == "paused":
                await self._supervisor.resume(record.id, record.name)
            self._signal(record, _SIGKILL)
        if not await _within(entry.ended.wait(), KILL_TIMEOUT_S):
            raise RuntimeFailed("kill", record.name, f"it did not end within {KILL_TIMEOUT_S:g} s of SIGKILL")

    async def _remove(self, entry: Entry, *, force: bool) -> None:
        if force:
            await self._kill(entry)
        async with entry.lock:
            if self.is_gone(entry):
                return  # auto-removed meanwhile
            self._note(entry, status=self._next(entry, "remove"))
            await self._discard(entry)

    def _watch(self, entry: Entry, gone: Callable[[], Awaitable[None]]) -> None:
        async def watch() -> None:
            await gone()
            await self._own(self._finish(entry))

        self._background(watch(), f"watch {entry.record.id}")

    async def _finish(self, entry: Entry) -> None:
        """Deal with the end of a container: true exit code, OOM, everything cleared, record stored or removed."""
        async with entry.lock:
            record = entry.record
            code = await self._supervisor.exit_code(record.id)
            lost = code is None
            oom_killed = record.oom_killed or self._was_out_of_memory(record)
            if oom_killed and not record.auto_remove:
                # The counter goes with the control group: whoever dies now must have written it down.
                await self._remember(entry, oom_killed=True)
            await self._clear(record)
            await self._settle(
                entry,
                status=self._next(entry, "restart" if entry.restarting else "lost" if lost else "exited"),
                exit_code=LOST_EXIT_CODE if lost else code,
                error="its supervisor died without telling the exit code" if lost else "",
                oom_killed=oom_killed,
            )
            ended = entry.record
            self._ends.inc()
            self._oom_kills.inc(ended.oom_killed)
            self._logger.info("container.ended", id=ended.id, name=ended.name, exit_code=ended.exit_code, oom=ended.oom_killed)

    def _was_out_of_memory(self, record: Container) -> bool:
        try:
            return bool(self._world.kernel.cgroup_usage(self._stage.cgroup(record.id)).n_oom_kills)
        except (OSError, ValueError) as error:
            self._logger.error("container.usage_unreadable", id=record.id, name=record.name, why=str(error))
            return False

    async def _remember(self, entry: Entry, **changes: Any) -> None:
        """Change a record, and store it if the disk lets us."""
        try:
            await self._update(entry, **changes)
        except IsopodError as error:
            self._logger.error("container.not_stored", id=entry.record.id, name=entry.record.name, why=str(error))
            self._note(entry, **changes)

    async def _settle(self, entry: Entry, **changes: Any) -> None:
        """Write down a container's end, or remove it if that was asked for, and let those who wait for it go on.

        A disk that refuses keeps nobody waiting: the next start of the daemon comes to the same end by the exit file.
        """
        record = entry.record
        changes |= {"finished_at_ns": self._world.clock.now_ns(), "network": Endpoint(network=record.network.network), **GONE}
        removes = record.auto_remove and not entry.restarting
        try:
            if removes:
                self._note(entry, **changes)
                await self._discard(entry, UpdateState(record.id, state_of(entry.record)))
            else:
                await self._update(entry, **changes)
        except IsopodError as error:
            self._logger.error("container.end_not_stored", id=record.id, name=record.name, why=str(error))
            if not removes:
                self._note(entry, **changes)
            self._background(self._store_later(entry), f"watch storing of {record.id}")
        finally:
            entry.ended.set()

    async def _store_later(self, entry: Entry) -> None:
        """Store what the disk refused, as soon as it takes it again."""
        pause_s = STORE_PAUSE_S
        while not self.is_gone(entry):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, STORE_PAUSE_S_MAX)
            async with entry.lock:
                try:
                    if not self.is_gone(entry):
                        await self._store.put_state(entry.record)
                    return
                except UnavailableError:
                    continue

    async def _clear(self, record: Container) -> None:
        """Clear a container's kernel objects away; what refuses is logged and left for the next start of the daemon."""
        try:
            await self._world.kernel.kill_cgroup(self._stage.cgroup(record.id))
            await self._supervisor.delete(record.id, record.name)
            await self._end_supervisor(record)
            await self._stage.clear(record.id)
        except (IsopodError, OSError) as error:
            self._logger.error("container.clear_failed", id=record.id, name=record.name, why=str(error))

    async def _end_supervisor(self, record: Container) -> None:
        """End a supervisor whose container was deleted and that is still there: it hangs, or its runtime does."""
        if record.supervisor_pid is None or record.supervisor_started_ticks is None:
            return
        identity = ProcessIdentity(record.supervisor_pid, record.supervisor_started_ticks)
        if not await _within(self._world.processes.wait_gone(identity), SUPERVISOR_GRACE_S):
            await self._supervisor.end(identity)

    async def _discard(self, entry: Entry, *before: Operation) -> None:
        """Forget a container, after other changes of it. The record goes first: files without a record are removed at the next start."""
        record = entry.record
        await self._store.commit(*before, Delete(record.id))
        await self._supervisor.forget(record.id)
        self._entries.pop(record.id, None)
        entry.ended.set()
        self._background(self._world.disk.remove_tree(self._layout.container(record.id)), f"remove {record.id}")
        self._logger.info("container.removed", id=record.id, name=record.name)

    async def _update(self, entry: Entry, **changes: Any) -> None:
        await self._store.put_state(msgspec.structs.replace(entry.record, **changes))

    def _note(self, entry: Entry, **changes: Any) -> Container:
        """Change what is known of a container without storing it; return the record."""
        self._store.note(msgspec.structs.replace(entry.record, **changes))
        return entry.record

    # --- small things -------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> Entry:
        named = self._entries.get(self._store.id_of(name) or "")
        if named is not None:
            return named
        found = [identifier for identifier in self._entries if identifier.startswith(name)] if len(name) >= 2 else []
        if len(found) > 1:
            raise InvalidArgument("container", name, f"{len(found)} ids begin so", "give more digits")
        if not found:
            raise NotFound("container", name, "`isopod ps -a` lists them")
        return self._entries[found[0]]

    def _check_there(self, entry: Entry) -> None:
        if self.is_gone(entry):
            raise NotFound("container", entry.last.name, "it was removed meanwhile")

    def _next(self, entry: Entry, event: Event) -> Any:
        return advance(entry.record.name, entry.record.status, event)

    def _stop_signal(self, record: Container) -> int:
        try:
            return self._images.resolve(record.image_id).config.stop_signal
        except NotFound:
            return 15

    def _signal(self, record: Container, signum: int) -> None:
        if record.pid is not None and record.pid_started_ticks is not None:
            self._world.processes.signal(ProcessIdentity(record.pid, record.pid_started_ticks), signum)

    async def _signal_pid(self, pid: int, signum: int) -> None:
        identity = self._world.processes.identify(pid)
        if identity is not None and 1 <= signum <= _SIGNAL_MAX:
            self._world.processes.signal(identity, signum)

    async def carry_through(self, operation: Coroutine[Any, Any, Result]) -> Result:
        """Run an operation to its end even if the caller is cancelled."""
        return await self._own(operation)

    async def _own(self, operation: Coroutine[Any, Any, Result]) -> Result:
        """Run an operation to its end even if the caller is cancelled."""
        return await asyncio.shield(self._background(operation, "operation", logged=False))

    def _background(self, work: Coroutine[Any, Any, Result], name: str, *, logged: bool = True) -> "asyncio.Task[Result]":
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._n_tasks += 1
        key = self._n_tasks
        self._tasks[key] = task

        def ended(done: asyncio.Task[Result]) -> None:
            del self._tasks[key]
            if not done.cancelled() and (error := done.exception()) is not None and logged:
                self._logger.error("container.background_failed", task=name, why=repr(error))

        task.add_done_callback(ended)
        return task


GONE: Final[dict[str, Any]] = {
    "pid": None,
    "pid_started_ticks": None,
    "supervisor_pid": None,
    "supervisor_started_ticks": None,
}
_NOT_RUN: Final[dict[str, Any]] = {"exit_code": None, "finished_at_ns": None, "oom_killed": False, "error": ""}


def _supervised(identity: ProcessIdentity) -> dict[str, Any]:
    return {"supervisor_pid": identity.pid, "supervisor_started_ticks": identity.started_ticks}


async def _within(condition: Awaitable[Any], timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await condition
    except TimeoutError:
        return False
    return True
