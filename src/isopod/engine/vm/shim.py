"""Shim: the process beside each virtual machine that outlives the daemon, and how the daemon speaks to it.

`isopod-shim` starts the VMM, holds its console and the channel to the guest's agent, writes the log and, at the end, end.json and the exit
file; its death is the machine's (it takes the VMM with it). Here are what it is told (shim.json), its launch in two steps, and its client:
requests, the stdio of commands, the console. Each conversation has a connection of its own, so that a slow one holds up no other, and a
connection that closes only lets go.

Not here: what a machine is (`machine`), what its life means (`engine.containers`).
Source: docs/microvms.md; rust/guest/src/shim.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from isopod.api.machines import PathFacts
from isopod.engine.isolation import Output
from isopod.engine.launch import ENVIRONMENT, START_PIPE, SYNC_PIPE, Launch, spawn
from isopod.engine.vm.channel import Answer, Channel, Stream, open_channel
from isopod.engine.vm.machine import Plan, PlannedFile, Vsock
from isopod.wire.agent import Kind
from isopod.world.errors import CommandNotRunnable, InvalidArgument, IsopodError, NotFound, RuntimeFailed, Unsupported, from_os_error
from isopod.world.ids import is_container_id
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

REQUEST_TIMEOUT_S: Final = 10.0
KILL_TIMEOUT_S: Final = 30.0
SPEC_FILE: Final = "shim.json"
END_BYTES_MAX: Final = 64 << 10
_SIGKILL: Final = 9

Typed = TypeVar("Typed")
EndKind = Literal["command", "poweroff", "panic", "vmm_killed", "vmm_failed", "silent", "boot_timeout", "stopped"]


class ShimSpec(NamedTuple):
    """What a shim is told beside the plan."""

    id: str
    name: str
    folder: str
    """The bundle: its sockets and end.json are there."""
    exit_file: str
    log: str
    console_log: str
    log_bytes_max: int
    console_bytes_max: int
    cgroup_procs: tuple[str, ...]
    monitor_socket: str
    """Where Kata's metrics are served, "" for nowhere."""
    boot_timeout_s: float
    silent_timeout_s: float
    stop_timeout_s: float
    vcpus: int
    memory_bytes: int
    hypervisor: str


class MachineEnd(msgspec.Struct, frozen=True):
    """end.json: how a machine ended."""

    kind: EndKind
    code: int | None = None
    why: str = ""
    out_of_memory: bool = False


class ShimStatus(msgspec.Struct, frozen=True):
    """What a shim says of its machine."""

    vmm_pid: int
    main: Literal["none", "running", "exited"]
    silent_s: float = 0.0
    paused: bool = False
    agent: "AgentHello | None" = None


class AgentHello(msgspec.Struct, frozen=True):
    """What a guest says of itself."""

    version: int = 0
    agent: str = ""
    kernel: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    boot_id: str = ""


class Attached:
    """The stdio of a command in the machine. See `isolation.Attached`.

    Args:
        channel: Closed with it.
        stream: The command's.
    """

    def __init__(self, channel: Channel, stream: Stream) -> None:
        self._channel = channel
        self._stream = stream
        self._exit: Mapping[str, Any] | None = None
        self._is_over = False
        self.size = (0, 0)
        """The last size told."""
        self.is_held = False
        """Whether the command has not begun: the terminal's size is then only noted, its start tells it."""

    async def outputs(self) -> AsyncIterator[Output]:
        """Yield what the command writes until it ends, or drops us."""
        while not self._is_over:
            frame = await self._stream.receive()
            if frame is None:
                self._is_over = True
            elif frame.kind in (Kind.STDOUT, Kind.STDERR):
                yield Output(frame.kind is Kind.STDERR, frame.payload)
            elif frame.kind is Kind.EXIT:
                self._is_over = True
                self._exit = _as_mapping(frame.payload)

    async def exit_code(self) -> int | None:
        """Return the command's exit code once it ended, None if nobody can tell. What it still writes is dropped."""
        async for _ in self.outputs():
            pass
        code = (self._exit or {}).get("code")
        return code & 0xFF if isinstance(code, int) else None

    async def write(self, data: bytes) -> bool:
        """Send input; False if the command reads no more."""
        return await self._stream.send_bytes(Kind.STDIN, data)

    def end_input(self) -> None:
        """Close the command's stdin."""
        self._stream.send(Kind.STDIN_END)

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal's new size."""
        self.size = (rows, columns)
        if not self.is_held:
            self._stream.resize(rows, columns)

    def signal(self, signum: int) -> None:
        """Send the command a signal."""
        self._stream.send(Kind.SIGNAL, bytes([signum]))

    def close(self) -> None:
        """Let go; the command runs on."""
        self._channel.close()


class ShimCommand:
    """One more command in a machine. See `isolation.Command`."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached

    @property
    def attached(self) -> Attached:
        """Its stdio."""
        return self._attached

    async def wait(self) -> int | None:
        """Return its exit code, None if the machine ended before."""
        return await self._attached.exit_code()

    async def signal(self, signum: int) -> None:
        """Send it a signal."""
        self._attached.signal(signum)

    def close(self) -> None:
        """Let go; it runs on."""
        self._attached.close()

    async def clear(self) -> None:
        """Do nothing: a command leaves nothing on the host."""


class Process(NamedTuple):
    """A command to start in a guest."""

    command: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    user: str
    terminal: bool
    stdin: bool
    size: tuple[int, int] = (0, 0)

    def request(self, op: str) -> dict[str, Any]:
        """Return the request that starts it."""
        rows, columns = self.size
        return {
            "op": op,
            "argv": list(self.command),
            "env": dict(self.env),
            "cwd": self.cwd,
            "user": self.user,
            "terminal": self.terminal,
            "stdin": self.stdin,
            "rows": min(rows, 0xFFFF),
            "columns": min(columns, 0xFFFF),
        }


class ShimClient:
    """Speaks to the shim of one machine; holds nothing between two calls.

    Args:
        world: Where it is.
        path: Its socket.
        name: The machine's name, for errors.
    """

    def __init__(self, world: World, path: str, name: str) -> None:
        self._world = world
        self._path = path
        self._name = name

    async def request(self, op: str, *, deadline_s: float = REQUEST_TIMEOUT_S, **arguments: Any) -> Mapping[str, Any]:
        """Ask, and return what was answered.

        Args:
            op: The operation, of the shim or of the guest.
            deadline_s: How long it may take.
            **arguments: Of the operation.

        Raises:
            RuntimeFailed: It was refused, or there was no answer in time.
        """
        channel, answer = await self._converse({"op": op, **arguments}, deadline_s)
        channel.close()
        return answer

    async def ready(self, deadline_s: float) -> AgentHello:
        """Return what the guest says of itself, as soon as it speaks. Raises RuntimeFailed."""
        found = await self.request("ready", deadline_s=deadline_s)
        return self._typed(found, AgentHello)

    async def status(self) -> ShimStatus:
        """Return what the shim says of its machine. Raises RuntimeFailed."""
        return self._typed(await self.request("status"), ShimStatus)

    async def start(self, process: Process) -> None:
        """Start the main command, once.

        Raises:
            CommandNotRunnable: The command is missing or not executable.
            RuntimeFailed: Refused.
        """
        channel, _ = await self._converse(process.request("start"), REQUEST_TIMEOUT_S, command=process.command)
        channel.close()

    async def attach(self, *, stdin: bool) -> Attached:
        """Connect to the main command's stdio. Raises RuntimeFailed."""
        return Attached(*await self._open({"op": "attach", "stdin": stdin}))

    async def exec(self, process: Process) -> ShimCommand:
        """Start one more command.

        Raises:
            CommandNotRunnable: The command is missing or not executable.
            RuntimeFailed: Refused.
        """
        return ShimCommand(Attached(*await self._open(process.request("exec"), command=process.command)))

    async def console(self, tail_bytes: int) -> Attached:
        """Connect to the machine's console: the last bytes of it come first. Raises RuntimeFailed."""
        return Attached(*await self._open({"op": "console", "tail": tail_bytes, "write": True}))

    async def look(self, path: str, *, follow: bool) -> PathFacts:
        """Return what the guest says of a path. Raises RuntimeFailed, NotFound, InvalidArgument."""
        return self._typed(await self.request("look", path=path, follow=follow), PathFacts)

    async def archive(self, path: str) -> "Transfer":
        """Begin to read a file or folder of the guest as a tar. Raises RuntimeFailed, NotFound, InvalidArgument."""
        return Transfer(*await self._open({"op": "archive", "path": path}), self._name)

    async def extract(self, path: str) -> "Transfer":
        """Begin to unpack a tar in a folder of the guest. Raises RuntimeFailed, NotFound, InvalidArgument."""
        channel = await self._connect()
        return Transfer(channel, channel.open({"op": "extract", "path": path}), self._name)

    async def watch(self) -> AsyncIterator[Mapping[str, Any]]:
        """Yield what happens to the machine, until it ends. Raises RuntimeFailed."""
        channel, stream = await self._open({"op": "watch"})
        try:
            while (frame := await stream.receive()) is not None:
                if frame.kind is Kind.EVENT and (event := _as_mapping(frame.payload)):
                    yield event
        finally:
            channel.close()

    # -- inside ----------------------------------------------------------------------------------------------------------

    async def _connect(self) -> Channel:
        try:
            return await open_channel(self._world, self._path)
        except OSError as error:
            raise RuntimeFailed("reach the shim of", self._name, error.strerror or "it does not listen") from error

    async def _open(self, request: Mapping[str, Any], command: Sequence[str] = ()) -> tuple[Channel, Stream]:
        channel = await self._connect()
        try:
            stream = channel.open(request)
            await self._answered(channel, stream, request, REQUEST_TIMEOUT_S, command=command)
        except BaseException:
            channel.close()
            raise
        return channel, stream

    async def _converse(
        self, request: Mapping[str, Any], deadline_s: float, command: Sequence[str] = ()
    ) -> tuple[Channel, Mapping[str, Any]]:
        channel = await self._connect()
        try:
            return channel, await self._answered(channel, channel.open(request), request, deadline_s, command=command)
        except BaseException:
            channel.close()
            raise

    async def _answered(
        self, channel: Channel, stream: Stream, request: Mapping[str, Any], deadline_s: float, *, command: Sequence[str]
    ) -> Mapping[str, Any]:
        op = str(request["op"])
        try:
            async with asyncio.timeout(deadline_s):
                answer = await stream.answer()
        except TimeoutError as error:
            raise RuntimeFailed(op, self._name, f"no answer within {deadline_s:g} s") from error
        if answer is None:
            raise RuntimeFailed(op, self._name, channel.why or "its shim ended without an answer")
        if answer.ok is None:
            raise explain(op, self._name, answer, command)
        return answer.ok

    def _typed(self, found: Mapping[str, Any], kind: type[Typed]) -> Typed:
        try:
            return msgspec.convert(found, kind)
        except msgspec.ValidationError as error:
            raise RuntimeFailed("ask", self._name, f"an answer that makes no sense: {error}") from error


class Transfer:
    """A tar on its way from or to a guest."""

    def __init__(self, channel: Channel, stream: Stream, name: str) -> None:
        self._channel = channel
        self._stream = stream
        self._name = name

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the tar's bytes.

        Raises:
            RuntimeFailed: It broke off before its end.
        """
        while (frame := await self._stream.receive()) is not None:
            if frame.kind is Kind.DATA:
                yield frame.payload
            elif frame.kind is Kind.DATA_END:
                return
            elif frame.kind is Kind.RESPONSE:  # a second one: it failed midway
                answer = self._channel.decode_answer(frame)
                if answer is not None and answer.ok is None:
                    raise explain("archive", self._name, answer, ())
        raise RuntimeFailed("copy from", self._name, self._channel.why or "the guest broke off")

    async def write(self, data: bytes) -> bool:
        """Send a piece; False if the guest takes no more, and `finish` says why."""
        return await self._stream.send_bytes(Kind.DATA, data)

    async def finish(self) -> None:
        """End the tar that was sent, and wait until it is unpacked.

        Raises:
            RuntimeFailed, NotFound, InvalidArgument: It was refused.
        """
        self._stream.send(Kind.DATA_END)
        answer: Answer | None = None
        while (frame := await self._stream.receive()) is not None:
            if frame.kind is Kind.RESPONSE:
                answer = self._channel.decode_answer(frame)
                break
        if answer is None:
            raise RuntimeFailed("copy to", self._name, self._channel.why or "the guest broke off")
        if answer.ok is None:
            raise explain("extract", self._name, answer, ())

    def close(self) -> None:
        """Let go."""
        self._channel.close()


def explain(op: str, name: str, answer: Answer, command: Sequence[str]) -> IsopodError:
    """Return the error of a response that is one."""
    why = answer.message or answer.code
    if command and answer.code in ("not_found", "not_executable"):
        exit_code = 127 if answer.code == "not_found" else 126
        return CommandNotRunnable(command[0], why, exit_code=exit_code)
    if answer.code == "not_found":
        return NotFound(f"path in {name}", why)
    if answer.code == "invalid":
        return InvalidArgument(op, name, why)
    if answer.code == "unsupported":
        return Unsupported(f"{op} in {name}", why)
    return RuntimeFailed(op, name, why)


class Shims:
    """The shims of one instance.

    Args:
        world: Where they run.
        program: The shim's path.
        bundles: The instance's bundles: BUNDLES/ID.
    """

    def __init__(self, world: World, program: str, bundles: str) -> None:
        self._world = world
        self._program = program
        self._bundles = bundles

    async def launch(self, spec: ShimSpec, plan: Plan) -> Launch:
        """Write shim.json and spawn a shim, which waits.

        Raises:
            UnavailableError: The disk or the kernel refused.
        """
        path = f"{spec.folder}/{SPEC_FILE}"
        try:
            await self._world.disk.write(path, msgspec.json.encode(shim_json(spec, plan)))
        except OSError as error:
            raise from_os_error(error, "write", path) from error
        process = await spawn(self._world, [self._program, path], {SYNC_PIPE: "read", START_PIPE: "write"}, spec.name)
        return Launch(process, spec.name, lambda why: RuntimeFailed("start", spec.name, why or "no reason given"))

    def client(self, identifier: str, name: str) -> ShimClient:
        """Return the client of a machine's shim."""
        return ShimClient(self._world, self.socket(identifier), name)

    def socket(self, identifier: str) -> str:
        """Return the path of a shim's socket."""
        return f"{self._bundles}/{identifier}/shim.sock"

    def strays(self, known: Collection[ProcessIdentity]) -> list[tuple[str, ProcessIdentity]]:
        """Return (id, identity) of this instance's shims that are not known. A missing program runs nowhere."""
        try:
            found = self._world.processes.find(self._program)
        except OSError:
            return []
        rows = [(_id_in(argv, self._bundles), identity) for identity, argv in found if identity not in known]
        return [(identifier, identity) for identifier, identity in rows if identifier]

    async def end(self, shim: ProcessIdentity) -> None:
        """Kill a shim, its machine with it, and wait until it is gone. Raises TimeoutError."""
        self._world.processes.signal_group(shim, _SIGKILL)
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await self._world.processes.wait_gone(shim)

    async def wait_end(self, folder: str) -> MachineEnd | None:
        """Return what end.json of a bundle says as soon as it is there; the caller has the deadline."""
        async with self._world.disk.watch(folder) as changes:
            if await self._world.disk.stat(f"{folder}/end.json") is None:
                async for _ in changes:
                    if await self._world.disk.stat(f"{folder}/end.json") is not None:
                        break
        return await self.read_end(folder)

    async def read_end(self, folder: str) -> MachineEnd | None:
        """Return what end.json of a bundle says, None if there is none that can be read."""
        try:
            text = await self._world.disk.read(f"{folder}/end.json", n_bytes_max=END_BYTES_MAX)
            return msgspec.json.decode(text, type=MachineEnd)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None


def shim_json(spec: ShimSpec, plan: Plan) -> dict[str, Any]:
    """Return what a shim is told."""
    return {
        "version": 1,
        "id": spec.id,
        "name": spec.name,
        "argv": list(plan.argv),
        "env": dict(plan.env) or dict(ENVIRONMENT),
        "cwd": plan.cwd,
        "files": [_file(planned) for planned in plan.files],
        "console": plan.console,
        "agent": {"vsock": plan.agent.path, "port": plan.agent.port} if isinstance(plan.agent, Vsock) else plan.agent,
        "own_network": plan.own_network,
        "cgroup_procs": list(spec.cgroup_procs),
        "log": spec.log,
        "log_bytes_max": spec.log_bytes_max,
        "console_log": spec.console_log,
        "console_bytes_max": spec.console_bytes_max,
        "exit_file": spec.exit_file,
        "end_file": f"{spec.folder}/end.json",
        "socket": f"{spec.folder}/shim.sock",
        "monitor_socket": spec.monitor_socket or None,
        "stop_argv": list(plan.stop_argv) or None,
        "boot_timeout_s": spec.boot_timeout_s,
        "silent_timeout_s": spec.silent_timeout_s,
        "stop_timeout_s": spec.stop_timeout_s,
        "vcpus": spec.vcpus,
        "memory_bytes": spec.memory_bytes,
        "hypervisor": spec.hypervisor,
    }


def _file(planned: PlannedFile) -> dict[str, str]:
    match planned.kind:
        case "listen":
            return {"kind": "listen", "path": planned.target}
        case "tap":
            return {"kind": "tap", "name": planned.target}
        case _:
            return {"kind": planned.kind}


def _id_in(argv: Sequence[str], bundles: str) -> str:
    """Return the id of the machine that a shim's arguments name, "" if it is not one of these bundles'."""
    path = argv[1] if len(argv) > 1 else ""
    folder = path.removesuffix(f"/{SPEC_FILE}")
    identifier = folder.removeprefix(f"{bundles}/")
    return identifier if path != folder != identifier and is_container_id(identifier) else ""


def _as_mapping(payload: bytes) -> Mapping[str, Any] | None:
    try:
        found = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None
