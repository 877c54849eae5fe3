"""Containers: the life cycle. Creates, starts, runs, stops and removes them, and knows their true state.

Records live in the `MetadataStore`; what a container is just doing is noted there too. Each container has a lock; whoever changes it
holds that lock, and no lock is held while waiting for a container to end. What changes a container runs in a task of the engine's own,
so that a client that goes away in the middle leaves no half of it. A container's end is learned in one way only: its supervisor is gone.

Not here: what can be changed of a container that exists (`changes`), how one is started and kept apart (`isolation`; a virtual machine is
a container here like any other), what a restarted daemon makes of what it finds (`adoption`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec

from isopod.api.messages import CommitContainer, Container, ContainerSpec, Endpoint, ExecContainer, Image, Started
from isopod.engine import creation
from isopod.engine.images.store import ImageStore
from isopod.engine.isolation import Attached, Command, Isolation
from isopod.engine.layout import Layout
from isopod.engine.metadata import MetadataStore
from isopod.engine.network.networks import Networks
from isopod.engine.operations import Create, Delete, Operation, UpdateState, state_of
from isopod.engine.states import LIVE, Event, advance
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
)
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

Result = TypeVar("Result")
Size = tuple[int, int]
"""Rows and columns of a terminal, (0, 0) if unknown."""

LOST_EXIT_CODE: Final = 255
KILL_TIMEOUT_S: Final = 10.0
SETTLE_TIMEOUT_S: Final = 5.0
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
        isolations: What keeps them apart, by the record's word for it.
        networks: Checked when one is created.
        layout: The engine's folders.
        logger: Told of every finished operation.
        metrics: Counts starts and ends.
    """

    def __init__(
        self,
        world: World,
        store: MetadataStore,
        images: ImageStore,
        isolations: Mapping[str, Isolation],
        *,
        networks: Networks,
        layout: Layout,
        logger: Logger,
        metrics: Registry,
    ) -> None:
        self._world = world
        self._store = store
        self._images = images
        self._isolations = isolations
        self._networks = networks
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

    def isolation(self, record: Container) -> Isolation:
        """Return what keeps a container apart."""
        return self._isolations[record.isolation]

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
        await self.isolation(entry.record).signal(entry.record, signum)

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
        command = await self._open_session(entry, request)

        async def pass_on(signum: int) -> None:
            if 1 <= signum <= _SIGNAL_MAX:
                await command.signal(signum)

        try:
            await stdio.send(Started(id=entry.record.id, name=entry.record.name))
            await converse(command.attached, stdio, pass_on)
            return await command.wait()
        finally:
            command.close()
            self._background(command.clear(), f"watch exec in {entry.record.id}")

    async def probe(self, identifier: str, argv: Sequence[str]) -> int | None:
        """Run a command in a running container, what it writes dropped; return its exit code, None if its supervisor died without telling.

        Cancelling kills the command.

        Raises:
            NotFound, WrongState: It is gone, or does not run.
            CommandNotRunnable, RuntimeFailed: The command could not be started.
        """
        entry = self._entries.get(identifier)
        if entry is None:
            raise NotFound("container", identifier[:12])
        command = await self._open_session(entry, ExecContainer(name=identifier, command=tuple(argv)))
        has_ended = False
        try:
            async for _ in command.attached.outputs():
                pass
            code = await command.wait()
            has_ended = True
            return code
        finally:
            if has_ended:
                command.close()
                self._background(command.clear(), f"watch exec in {identifier}")
            else:
                self._background(self._end_command(command), f"end exec in {identifier}")

    async def _open_session(self, entry: Entry, request: ExecContainer) -> Command:
        """Start a command in a container. Who is cancelled has withdrawn it."""
        name = self._world.random.token_hex(8)
        starting = self._background(self._exec(entry, request, name), f"exec in {entry.record.id}", logged=False)
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._background(self._withdraw_exec(starting), f"withdraw exec in {entry.record.id}")
            raise

    async def commit(self, request: CommitContainer) -> Image:
        """Make an image of a container's files; a running one is frozen meanwhile."""
        return await self._own(self._commit(self._find(request.name), request.image))

    async def _commit(self, entry: Entry, image: str) -> Image:
        # Commands that are being started come first, and those to come wait for the thaw. This lock before the other one, always.
        async with entry.thawed.exclusive(), entry.lock:
            self._check_there(entry)
            record = entry.record
            folder = self.isolation(record).writable_layer(record)
            base = self._images.resolve(record.image_id)
            config = msgspec.structs.replace(base.config, command=record.command, entrypoint=(), working_dir=record.working_dir)
            if record.status != "running":
                return await self._images.commit(image, base, folder, config)
            try:
                await self.isolation(record).pause(record)
                return await self._images.commit(image, base, folder, config)
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
            isolation = self.isolation(record)
            do, undo = isolation.pause, isolation.resume
            if not frozen:
                do, undo = undo, do
            await do(record)
            try:
                await self._update(entry, status=after)
            except BaseException:
                await undo(record)  # what is not stored has not happened
                raise
            return entry.record

    async def restart(self, name: str, timeout_s: float) -> Container:
        """Stop a container as `stop` does, if it runs, and start it."""
        return await self._own(self._restart(self._find(name), timeout_s))

    async def start_from(self, entry: Entry, origin: str) -> Container:
        """Start a virtual machine from what `origin` names (see `MachineIsolation`), ending what it does now."""
        return await self._own(self._start_from(entry, origin))

    async def _start_from(self, entry: Entry, origin: str) -> Container:
        if entry.record.status in LIVE:
            entry.restarting = True
            try:
                await self._kill(entry)
            finally:
                entry.restarting = False
        await self._start(entry, attach=False, size=(0, 0), origin=origin)
        return entry.record

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
            await self.isolation(record).resume(record)
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
        image = creation.image_of(spec, self._images.resolve)
        with self._images.hold(image.id) if image is not None else nullcontext():
            self._networks.check(spec.network)
            now_ns = self._world.clock.now_ns()
            identifier = self._world.random.token_hex(32)
            record = creation.first_record(spec, image, identifier=identifier, now_ns=now_ns, boot_id=self._world.processes.boot_id())
            await self.isolation(record).check(record)
            await creation.check_sources(self._world, record.mounts)
            await self._store.commit(Create(record))
            return self.insert(record).record

    async def _start(self, entry: Entry, *, attach: bool, size: Size, origin: str = "") -> Attached | None:
        async with entry.lock:
            self._check_there(entry)
            n_restarts = entry.record.restart_count + (entry.record.status == "restarting")
            self._note(entry, status=self._next(entry, "start"), error="", restart_count=n_restarts, origin=origin, accelerator="")
            entry.ended.clear()
            try:
                return await self._bring_up(entry, attach=attach, size=size)
            except BaseException as error:
                await self._fail(entry, error)
                raise

    async def _bring_up(self, entry: Entry, *, attach: bool, size: Size) -> Attached | None:
        started_ns = self._world.clock.monotonic_ns()
        record = entry.record
        isolation = self.isolation(record)
        image = self._images.resolve(record.image_id) if record.image_id else None
        await isolation.forget(record.id)
        record = await isolation.prepare(record, image)
        self._store.note(record)
        launch = await isolation.launch(record)
        try:
            await self._update(entry, **_supervised(launch.supervisor), boot_id=self._world.processes.boot_id(), **_NOT_RUN)
        except BaseException:
            await launch.abort()
            raise
        pid = await launch.create()
        identity = self._world.processes.identify(pid)
        attached = await isolation.attach(record) if attach else None
        try:
            if attached is not None and record.terminal and size != (0, 0):
                await attached.resize(*size)
            await isolation.begin(entry.record)
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
            if 1 <= signum <= _SIGNAL_MAX:
                await self.isolation(record).signal(record, signum)

        try:
            await stdio.send(Started(id=record.id, name=record.name))
            await converse(attached, stdio, pass_on)
            await entry.ended.wait()
            return entry.record
        finally:
            attached.close()

    async def _exec(self, entry: Entry, request: ExecContainer, session: str) -> Command:
        async with entry.thawed.shared():
            async with entry.lock:
                record = entry.record
                if record.status != "running":
                    raise WrongState("container", record.name, record.status, "run a command in it")
                await self.isolation(record).reserve(record, session)
            return await self.isolation(record).exec(record, request, session)

    async def _withdraw_exec(self, starting: "asyncio.Task[Command]") -> None:
        """End a command whose client went away before it was told of its start."""
        await asyncio.gather(starting, return_exceptions=True)
        if not starting.cancelled() and starting.exception() is None:  # else it undid itself
            await self._end_command(starting.result())

    async def _end_command(self, command: Command) -> None:
        await command.signal(_SIGKILL)
        command.close()
        await command.clear()

    async def _stop(self, entry: Entry, timeout_s: float) -> None:
        async with entry.lock:
            if entry.record.status not in LIVE and entry.record.status != "created":
                return
            paused = entry.record.status == "paused"
            self._note(entry, status=self._next(entry, "stop"))
            isolation = self.isolation(entry.record)
            if paused:
                await isolation.resume(entry.record)
            await isolation.signal(entry.record, self._stop_signal(entry.record))
        if await _within(entry.ended.wait(), timeout_s):
            return
        await self._kill(entry)

    async def _kill(self, entry: Entry) -> None:
        async with entry.lock:  # a start under way comes to its end first
            record = entry.record
            if record.status not in LIVE:
                return
            if record.status == "paused":
                await self.isolation(record).resume(record)
            await self.isolation(record).signal(record, _SIGKILL)
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
            end = await self.isolation(record).end(record)
            lost = end.exit_code is None
            oom_killed = record.oom_killed or end.out_of_memory
            if oom_killed and not record.auto_remove:
                # The counter goes with the control group: whoever dies now must have written it down.
                await self._remember(entry, oom_killed=True)
            await self._clear(record)
            await self._settle(
                entry,
                status=self._next(entry, "restart" if entry.restarting else "lost" if lost else "exited"),
                exit_code=LOST_EXIT_CODE if lost else end.exit_code,
                error=end.why,
                oom_killed=oom_killed,
            )
            ended = entry.record
            self._ends.inc()
            self._oom_kills.inc(ended.oom_killed)
            self._logger.info("container.ended", id=ended.id, name=ended.name, exit_code=ended.exit_code, oom=ended.oom_killed)

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
            await self.isolation(record).clear(record.id, record.name, supervisor_of(record))
        except (IsopodError, OSError) as error:
            self._logger.error("container.clear_failed", id=record.id, name=record.name, why=str(error))

    async def _discard(self, entry: Entry, *before: Operation) -> None:
        """Forget a container, after other changes of it. The record goes first: files without a record are removed at the next start."""
        record = entry.record
        await self._store.commit(*before, Delete(record.id))
        await self.isolation(record).forget(record.id)
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
        if not record.image_id:
            return 15
        try:
            return self._images.resolve(record.image_id).config.stop_signal
        except NotFound:
            return 15

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


def supervisor_of(record: Container) -> ProcessIdentity | None:
    """Return who the supervisor of a container is, None if it has none."""
    if record.supervisor_pid is None or record.supervisor_started_ticks is None:
        return None
    return ProcessIdentity(record.supervisor_pid, record.supervisor_started_ticks)


def _supervised(identity: ProcessIdentity) -> dict[str, Any]:
    return {"supervisor_pid": identity.pid, "supervisor_started_ticks": identity.started_ticks}


async def _within(condition: Awaitable[Any], timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await condition
    except TimeoutError:
        return False
    return True
