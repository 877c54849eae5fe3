"""Supervisor: starts a container's first process, or one more, under conmon and the OCI runtime, outside the daemon.

conmon holds the stdio, writes the log and the exit file, and serves an attach socket, so that the daemon's death stops nothing.
It is started in two steps (`launch`). Whatever fails after the spawn ends the supervisor's whole session, a hanging runtime included.

Not here: what a container's life means (`containers`), what its bundle holds (`bundle`).
Source: conmon(8) 2.1, checked by experiment.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from isopod.engine.isolation import Output
from isopod.engine.launch import (
    CREATE_TIMEOUT_S,
    ENVIRONMENT,
    START_PIPE,
    SYNC_PIPE,
    Explain,
    Launch,
    SyncPipe,
    end_process,
    expect_pid,
    spawn,
    why_not,
)
from isopod.world.errors import CommandNotRunnable, IsopodError, RuntimeFailed, from_os_error
from isopod.world.ids import is_container_id
from isopod.world.network import PacketConnection
from isopod.world.processes import Process, ProcessIdentity
from isopod.world.world import World

RUNTIME_TIMEOUT_S: Final = 30.0
_STDOUT: Final = 2
_STDERR: Final = 3
_RESIZE: Final = 1
_SIGKILL: Final = 9
_ATTACH_PIPE: Final = "_OCI_ATTACHPIPE"


class Tools(NamedTuple):
    """The programs in use, absolute paths, and why these."""

    runtime: str
    runtime_why: str
    supervisor: str
    supervisor_why: str


class SupervisorPaths(NamedTuple):
    """Folders of one instance."""

    bundles: str
    """BUNDLES/ID is the bundle of a container."""
    exits: str
    runtime_state: str


class Attached:
    """An open attach socket: the command's stdio as long as both live.

    Args:
        world: Where it runs.
        connection: conmon's attach socket.
        control: Path of conmon's control pipe.
    """

    def __init__(self, world: World, connection: PacketConnection, control: str) -> None:
        self._disk = world.disk
        self._connection = connection
        self._control = control

    async def outputs(self) -> AsyncIterator[Output]:
        """Yield what the command writes until it closes its outputs."""
        while True:
            try:
                packet = await self._connection.receive()
            except OSError:  # conmon ended with our input unread
                return
            if not packet:
                return
            if packet[0] in (_STDOUT, _STDERR) and len(packet) > 1:
                yield Output(packet[0] == _STDERR, packet[1:])

    async def write(self, data: bytes) -> bool:
        """Send input; False if the command reads no more."""
        try:
            for start in range(0, len(data), 8192):
                await self._connection.send(data[start : start + 8192])
        except OSError:
            return False
        return True

    def end_input(self) -> None:
        """Close the command's stdin."""
        try:
            self._connection.shutdown_write()
        except OSError:
            return  # it is gone already

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal's new size."""
        control = await self._disk.open_append(self._control)
        try:
            await control.append(b"%d %d %d\n" % (_RESIZE, rows, columns))
        finally:
            control.close()

    def close(self) -> None:
        """Let go; the command runs on."""
        self._connection.close()


class ExecSession:
    """One more command in a container, created and running."""

    def __init__(self, process: Process, pid: int, attached: Attached, sync: SyncPipe) -> None:
        self.pid = pid
        self.attached = attached
        self._process = process
        self._sync = sync

    async def wait(self) -> int | None:
        """Return the command's exit code, None if its supervisor died without telling."""
        message = await self._sync.next()
        await self._process.wait()
        return message.data if message is not None and message.data >= 0 else None

    async def wait_supervisor(self) -> None:
        """Return when the command's supervisor has ended: from then on nobody writes into the session's folder."""
        await self._process.wait()

    def close(self) -> None:
        """Let go of pipes and sockets; the command runs on."""
        self._sync.close()
        self.attached.close()


class Supervisor:
    """conmon and the runtime of one instance.

    Args:
        world: Where they run.
        tools: The programs.
        paths: The instance's folders.
        log_bytes_max: Size at which conmon starts a container's log anew.
    """

    def __init__(self, world: World, tools: Tools, paths: SupervisorPaths, *, log_bytes_max: int) -> None:
        self._world = world
        self._tools = tools
        self._paths = paths
        self._log_bytes_max = log_bytes_max

    async def launch(self, identifier: str, name: str, *, log: str, command: Sequence[str], terminal: bool, stdin: bool) -> Launch:
        """Spawn the supervisor of a container's first process; its bundle stands at BUNDLES/ID."""
        bundle = f"{self._paths.bundles}/{identifier}"
        argv = [
            *self._common(identifier, identifier, name, bundle, terminal=terminal, stdin=stdin),
            *("--persist-dir", bundle, "--exit-dir", self._paths.exits),
            *("-l", f"k8s-file:{log}", "--log-size-max", str(self._log_bytes_max), "--no-sync-log"),
        ]
        process = await spawn(self._world, argv, {SYNC_PIPE: "read", START_PIPE: "write"}, name)
        return Launch(process, name, _explain(name, command))

    async def attach(self, identifier: str) -> Attached:
        """Connect to the stdio of a container's first process."""
        return await self._connect(f"{self._paths.bundles}/{identifier}")

    async def exec(
        self, identifier: str, name: str, session: str, *, spec: Mapping[str, Any], stdin: bool, size: tuple[int, int]
    ) -> ExecSession:
        """Start one more command; its working folder BUNDLES/ID/SESSION exists when this is called.

        Raises:
            CommandNotRunnable: The command is missing or not executable.
            RuntimeFailed: The runtime refused, or did not answer in time.
        """
        folder = f"{self._paths.bundles}/{identifier}/{session}"
        await self._world.disk.write(f"{folder}/process.json", msgspec.json.encode(spec))
        argv = [
            *self._common(identifier, session, name, folder, terminal=spec["terminal"], stdin=stdin),
            *("--exec", "--exec-attach", "--exec-process-spec", f"{folder}/process.json"),
            *("--exit-dir", folder, "-l", "none"),
        ]
        process = await spawn(self._world, argv, {SYNC_PIPE: "read", START_PIPE: "write", _ATTACH_PIPE: "read"}, name)
        try:
            async with asyncio.timeout(CREATE_TIMEOUT_S):
                return await self._begin_exec(process, name, folder, command=spec["args"], size=size if spec["terminal"] else (0, 0))
        except (TimeoutError, OSError) as error:
            await end_process(process)
            raise RuntimeFailed("exec in", name, why_not(error, CREATE_TIMEOUT_S)) from error
        except BaseException:
            await end_process(process)
            raise

    async def _begin_exec(self, process: Process, name: str, folder: str, *, command: Sequence[str], size: tuple[int, int]) -> ExecSession:
        start, sync = process.pipes[START_PIPE], SyncPipe(process.pipes[SYNC_PIPE])
        ready = SyncPipe(process.pipes[_ATTACH_PIPE])
        attached: Attached | None = None
        try:
            await start.write(b"\0")
            if await ready.next() is None:
                raise RuntimeFailed("exec in", name, "the supervisor did not offer its attach socket")
            attached = await self._connect(folder)
            if size != (0, 0):
                await attached.resize(*size)
            await start.write(b"\0")
            return ExecSession(process, expect_pid(await sync.next(), name, _explain(name, command)), attached, sync)
        except BaseException:
            sync.close()
            if attached is not None:
                attached.close()
            raise
        finally:
            ready.close()
            start.close()

    async def start(self, identifier: str, name: str) -> None:
        """Let a created container's command begin."""
        await self._runtime("start", identifier, name=name)

    async def pause(self, identifier: str, name: str) -> None:
        """Freeze every process of a container."""
        await self._runtime("pause", identifier, name=name)

    async def resume(self, identifier: str, name: str) -> None:
        """Thaw a paused container."""
        await self._runtime("resume", identifier, name=name)

    async def update(self, identifier: str, name: str, limits: Mapping[str, Any]) -> None:
        """Change the limits of a container that runs.

        Args:
            identifier: The container.
            name: Its name, for errors.
            limits: The `resources` object of the OCI runtime specification.

        Raises:
            RuntimeFailed: The kernel refused, for instance less memory than is in use.
            UnavailableError: The disk failed.
        """
        path = f"{self._paths.bundles}/{identifier}/limits.json"
        try:
            await self._world.disk.write(path, msgspec.json.encode(limits))
        except OSError as error:
            raise from_os_error(error, "write", path) from error
        await self._runtime("update", "--resources", path, identifier, name=name)

    async def delete(self, identifier: str, name: str) -> None:
        """Remove what the runtime keeps of a container, killing what is left of it; one it does not know is fine."""
        if await self._world.disk.stat(f"{self._paths.runtime_state}/{identifier}") is not None:
            await self._runtime("delete", "--force", identifier, name=name)

    async def known(self) -> Sequence[str]:
        """Return the ids of which the runtime keeps state."""
        return await self._world.disk.list(self._paths.runtime_state)

    async def state(self, identifier: str) -> tuple[str, int]:
        """Return the runtime's word for a container's state ("created", "running", "stopped", "" if unknown) and its first pid."""
        done = await self._run("state", identifier)
        if done.returncode != 0:
            return "", 0
        try:
            state = msgspec.json.decode(done.stdout, type=_State)
        except msgspec.DecodeError as error:
            raise RuntimeFailed("ask for the state of", identifier, "the runtime's answer makes no sense") from error
        return state.status, state.pid

    async def exit_code(self, identifier: str) -> int | None:
        """Return what the supervisor left as exit code, None if it left nothing."""
        try:
            text = (await self._world.disk.read(f"{self._paths.exits}/{identifier}", n_bytes_max=64)).strip()
        except OSError:  # none, or nothing that can be read: as if it had told nothing
            return None
        return int(text) & 0xFF if text.isdigit() else None

    async def forget(self, identifier: str) -> None:
        """Remove the exit file. Raises UnavailableError."""
        path = f"{self._paths.exits}/{identifier}"
        try:
            await self._world.disk.remove(path)
        except OSError as error:
            raise from_os_error(error, "remove", path) from error

    def is_alive(self, supervisor: ProcessIdentity) -> bool:
        """Return whether that very process lives."""
        return self._world.processes.identify(supervisor.pid) == supervisor

    def strays(self, known: Collection[ProcessIdentity]) -> list[tuple[str, ProcessIdentity]]:
        """Return (container id, identity) of this instance's supervisors that no record names."""
        found = []
        for identity, argv in self._world.processes.find(self._tools.supervisor):
            identifier = argv[argv.index("-c") + 1] if "-c" in argv[:-1] else ""
            if self._paths.exits in argv and is_container_id(identifier) and identity not in known:
                found.append((identifier, identity))
        return found

    async def end(self, supervisor: ProcessIdentity) -> None:
        """Kill a supervisor that is not our child, and the runtime it may be running, and wait until it is gone."""
        self._world.processes.signal_group(supervisor, _SIGKILL)
        async with asyncio.timeout(RUNTIME_TIMEOUT_S):
            await self._world.processes.wait_gone(supervisor)

    def _common(self, identifier: str, session: str, name: str, folder: str, *, terminal: bool, stdin: bool) -> list[str]:
        return [
            *(self._tools.supervisor, "--api-version", "1", "--sync", "-c", identifier, "-u", session, "-n", name),
            *("-r", self._tools.runtime, "--runtime-arg", "--root", "--runtime-arg", self._paths.runtime_state),
            *("-b", folder, "-p", f"{folder}/pid", "--full-attach", "--log-level", "error"),
            *(["-t"] if terminal else []),
            *(["-i"] if stdin else []),
        ]

    async def _connect(self, folder: str) -> Attached:
        connection = await self._world.network.connect_packets(f"{folder}/attach")
        return Attached(self._world, connection, f"{folder}/ctl")

    async def _run(self, *arguments: str) -> Any:
        argv = [self._tools.runtime, "--root", self._paths.runtime_state, *arguments]
        return await self._world.processes.run(argv, env=ENVIRONMENT, timeout_s=RUNTIME_TIMEOUT_S)

    async def _runtime(self, *arguments: str, name: str) -> None:
        done = await self._run(*arguments)
        if done.returncode != 0:
            raise classify(f"{arguments[0]}", name, done.stderr.decode(errors="replace"), ())


class _State(msgspec.Struct):
    status: str
    pid: int = 0


def classify(action: str, name: str, text: str, command: Sequence[str]) -> IsopodError:
    """Turn a runtime's words into an error: a command that is missing (127) or not runnable (126), or a failure of the runtime.

    The texts are those of crun 1.8-1.21 and runc 1.1; an unknown text is passed on whole.
    """
    line = " ".join(text.split()) or "no reason given"
    lowered = line.lower()
    program = command[0] if command else name
    about_command = "executable" in lowered or "exec:" in lowered or "exec " in lowered
    if about_command and ("not found" in lowered or "no such file" in lowered):
        return CommandNotRunnable(program, "no such command in the image")
    if about_command and any(words in lowered for words in ("permission denied", "not permitted", "is a directory", "format error")):
        return CommandNotRunnable(program, "it is not an executable file", exit_code=126)
    return RuntimeFailed(action, name, line)


def _explain(name: str, command: Sequence[str]) -> Explain:
    return lambda text: classify("create", name, text, command)
