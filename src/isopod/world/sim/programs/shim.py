"""The simulated isopod-shim: the process beside each microVM, in the behaviour of rust/guest/src/shim as the engine sees it.

It reads shim.json, waits on the start pipe, makes its sockets, starts the monitor with the descriptors that were planned, and says its
pid on the sync pipe. Then it holds the console (`shim_console`) and the agent's channel (`shim_guest`), keeps the main command's output and
the log (`shim_main`), serves its socket, asks the guest whether it lives, and judges how it ended (`shim_verdict`): end.json, then the exit
file. Its death is the monitor's. Not modelled: an agent behind a vsock, and the metrics of a real guest on the monitor socket, which
answers in its form.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from isopod.world.sim.machine import Machine
from isopod.world.sim.pipes import Channel, ReadEnd, WriteEnd, open_pipe
from isopod.world.sim.programs.container_log import ConsoleLog, ContainerLog
from isopod.world.sim.programs.frames import (
    MAIN_STREAM,
    BadFrame,
    Decoder,
    Frame,
    Kind,
    of_error,
    of_object,
    of_ok,
)
from isopod.world.sim.programs.hardware import Wire
from isopod.world.sim.programs.shim_config import PlannedFile, ShimConfig
from isopod.world.sim.programs.shim_console import Console
from isopod.world.sim.programs.shim_guest import Asker, Streams
from isopod.world.sim.programs.shim_main import MainCommand
from isopod.world.sim.programs.shim_verdict import LOST, Cause, End, judge
from isopod.world.sim.programs.sockets import Connection, serve, unlink
from isopod.world.sim.table import SIGKILL, SimProcess

VERSION: Final = 1
_STARTUP_S: Final = (300e-6, 2e-3)
_PING_EVERY_S: Final = 5.0
_LAST_WORDS_BYTES: Final = 4096
_FD_FIRST: Final = 3
_OUTGOING_MAX: Final = 16
_METRICS: Final = b"# TYPE kata_shim_threads gauge\nkata_shim_threads 1\n"


async def shim(machine: Machine, process: SimProcess) -> int:
    """Be isopod-shim."""
    start = process.pipes.get("_OCI_STARTPIPE")
    if isinstance(start, ReadEnd):
        await start.read()
    await asyncio.sleep(machine.chance.uniform(*_STARTUP_S))
    try:
        config = msgspec.json.decode(bytes(machine.view.open_file(process.argv[1]).data), type=ShimConfig)
    except (OSError, msgspec.DecodeError, IndexError) as error:
        await _tell(process, {"data": -1, "message": f"the configuration makes no sense: {error}"})
        return 1
    return await _Shim(machine, process, config).run()


class _Shim:
    """One run."""

    def __init__(self, machine: Machine, process: SimProcess, config: ShimConfig) -> None:
        self._machine = machine
        self._process = process
        self._config = config
        self._loop = machine.loop
        self._log = ContainerLog(machine, config.log, config.log_bytes_max)
        self._words = machine.view.open_file(f"{config.console_log.rpartition('/')[0]}/vmm.log", create_mode=0o600)
        self._streams = Streams()
        self._main = MainCommand(self._log, self._streams, send=self._to_guest, send_soon=self._to_guest_soon)
        self._console = Console(ConsoleLog(machine, config.console_log, config.console_bytes_max), self._on_panic)
        self._agent_wire: Wire | None = None
        self._vmm: SimProcess | None = None
        self._stderr: ReadEnd | None = None
        self._stdout: ReadEnd | None = None
        self._clients: list[Connection] = []
        self._watchers: list[Asker] = []
        self._ready: list[Asker] = []
        self._outgoing: deque[Frame] = deque()
        self._sent = Channel()
        self._hello: dict[str, Any] | None = None
        self._cause: Cause | None = None
        self._heard_ns = 0
        self._is_held = False
        self._is_silent = False
        self._is_over = False

    async def run(self) -> int:
        """Shim from the start to the exit file."""
        try:
            await self._make_sockets()
            vmm = await self._start_vmm()
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
            await _tell(self._process, {"data": -1, "message": why})
            self._put(self._config.end_file, msgspec.json.encode(End(None, why, "vmm_failed", out_of_memory=False)._asdict()))
            self._take_away()
            return 1
        await _tell(self._process, {"data": vmm.pid})
        readers = [self._loop.create_task(work) for work in (self._console.read(), self._read_agent(), self._read_stdout())]
        self._loop.create_task(self._write_agent())
        self._loop.create_task(self._beat())
        self._loop.call_later(self._config.boot_timeout_s, self._on_boot_timeout)
        status = await vmm.wait()
        self._is_over = True
        self._sent.wake()
        self._console.close()
        for reader in readers:
            await reader
        words = b"" if self._stderr is None else self._stderr.read_nowait()[-_LAST_WORDS_BYTES:]
        self._words.append(words)
        told = (words.decode(errors="replace").strip().splitlines() or [""])[-1]
        self._conclude(
            judge(
                status,
                self._cause,
                exit_facts=self._main.exit,
                panic=self._console.panic,
                has_agent=self._config.agent != "none",
                main=self._main.state,
                told=told,
            )
        )
        return 0

    # -- making --------------------------------------------------------------------------------------------------------------------

    async def _make_sockets(self) -> None:
        backlog = await serve(self._machine, self._config.socket)
        self._loop.create_task(self._accept(backlog.accept, self._serve_client))
        if self._config.monitor_socket is not None:
            self._machine.view.make_folders(self._config.monitor_socket.rpartition("/")[0])
            backlog = await serve(self._machine, self._config.monitor_socket, mode=0o660)
            self._loop.create_task(self._accept(backlog.accept, self._serve_monitor))

    async def _accept(self, accept: Callable[[], Awaitable[Connection]], work: Callable[[Connection], Awaitable[None]]) -> None:
        while True:
            self._loop.create_task(work(await accept()))  # type: ignore[arg-type]  # both are coroutine functions

    async def _start_vmm(self) -> SimProcess:
        config, table = self._config, self._machine.table
        vmm = table.add(config.argv, config.env, config.cwd)
        vmm.session = self._process.session
        try:
            for number, planned in enumerate(config.files, start=_FD_FIRST):
                vmm.descriptors[number] = await self._open(planned, vmm)
            for path in config.cgroup_procs:
                self._join_group(path, vmm)
        except OSError:
            table.end(vmm, 127)
            raise
        self._stderr, vmm.stderr = open_pipe(self._process.owner, vmm.owner)
        if config.console == "stdio":
            self._stdout, vmm.stdout = open_pipe(self._process.owner, vmm.owner)
        if config.own_network:
            vmm.network = self._machine.kernel.links.new_namespace()
        self._machine.processes.start(vmm)
        self._process.on_exit.append(lambda: table.end(vmm, -SIGKILL))
        self._vmm = vmm
        return vmm

    async def _open(self, planned: PlannedFile, vmm: SimProcess) -> object:
        match planned.kind:
            case "listen":
                backlog = await serve(self._machine, planned.path)
                assert backlog.listener is not None
                backlog.listener.belong(vmm.owner)
                return backlog
            case "tap":
                return self._machine.kernel.links.host.link(planned.name)
        out, theirs_out = open_pipe(self._process.owner, vmm.owner)
        theirs_in, into = open_pipe(vmm.owner, self._process.owner)
        if planned.kind == "console":
            self._console.wire = Wire(out, into)
        else:
            self._agent_wire = Wire(out, into)
        return Wire(theirs_in, theirs_out)

    def _join_group(self, path: str, vmm: SimProcess) -> None:
        """Put the monitor into the group whose cgroup.procs that is."""
        folder = path.rpartition("/")[0]
        found = [group for name, group in self._machine.kernel.groups.items() if folder.endswith(name)]
        if not found:
            raise FileNotFoundError(2, "No such file or directory", path)
        max(found, key=lambda group: len(group.path)).join(vmm)

    # -- what comes from the machine -----------------------------------------------------------------------------------------------

    async def _read_stdout(self) -> None:
        """Log what a monitor without an agent writes: it is the command."""
        while self._stdout is not None and (data := await self._stdout.read()):
            self._main.publish(Kind.STDOUT, data)

    async def _read_agent(self) -> None:
        wire, decoder = self._agent_wire, Decoder()
        if wire is None:
            return
        self._to_guest_soon(of_object(Kind.HELLO, 0, {"version": VERSION}))
        while data := await wire.incoming.read():
            try:
                for frame in decoder.feed(data):
                    await self._take(frame)
            except BadFrame as error:
                self._want_end(Cause("vmm_killed", f"the guest broke the protocol: {error}"), kills=True)
                return

    async def _take(self, frame: Frame) -> None:
        self._hear()
        if frame.stream == 0:
            self._take_word(frame)
        elif frame.stream == MAIN_STREAM:
            self._main.take(frame)
            if self._main.state == "exited":
                self._want_end(Cause("command", ""))
        elif (asker := self._streams.take(frame)) is not None:
            asker.connection.write_nowait(frame._replace(stream=asker.stream).encode())

    def _take_word(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.HELLO:
                self._hello = frame.object()
                if self._hello.get("main") in ("running", "exited"):
                    self._main.found()
                self._tell_watchers({"event": "agent"})
                waiting, self._ready = self._ready, []
                for asker in waiting:
                    self._answer(asker, self._hello)
            case Kind.EVENT:
                self._tell_watchers(frame.object())
            case Kind.PONG:
                return
            case _:
                raise BadFrame("a frame that stream 0 does not have")

    async def _to_guest(self, frame: Frame) -> None:
        """Send a frame, waiting while too many wait before it."""
        self._to_guest_soon(frame)
        while len(self._outgoing) > _OUTGOING_MAX and not self._is_over:
            await self._sent.wait()

    def _to_guest_soon(self, frame: Frame) -> None:
        """Send a frame after those that wait."""
        self._outgoing.append(frame)
        self._sent.wake()

    async def _write_agent(self) -> None:
        """Write what is to be sent, one frame after the other."""
        while self._agent_wire is not None and not self._is_over:
            if self._outgoing:
                frame = self._outgoing.popleft()
                self._sent.wake()
                try:
                    await self._agent_wire.outgoing.write(frame.encode())
                except BrokenPipeError:
                    return  # its end is noticed elsewhere
            else:
                await self._sent.wait()

    # -- heartbeats ----------------------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        self._heard_ns = self._machine.loop.elapsed_ns
        if self._is_silent:
            self._is_silent = False
            self._tell_watchers({"event": "answers"})

    @property
    def _silent_s(self) -> float:
        if self._hello is None or self._is_held:
            return 0.0
        return (self._machine.loop.elapsed_ns - self._heard_ns) / 1e9

    async def _beat(self) -> None:
        """Ask the guest whether it lives; report its silence, then end it."""
        patience_s = self._config.silent_timeout_s
        while self._config.agent == "socket":
            await asyncio.sleep(min(_PING_EVERY_S, patience_s / 4))
            if self._hello is None or self._is_held:
                continue
            silent_s = self._silent_s
            if silent_s >= patience_s:
                self._want_end(Cause("silent", f"the guest did not answer for {patience_s:.1f} s"), kills=True)
                return
            if silent_s >= patience_s / 2 and not self._is_silent:
                self._is_silent = True
                self._tell_watchers({"event": "silent", "silent_s": silent_s})
            self._to_guest_soon(Frame(Kind.PING, 0, self._machine.loop.elapsed_ns.to_bytes(8, "little")))

    def _on_panic(self) -> None:
        self._tell_watchers({"event": "panic", "message": self._console.panic})
        self._want_end(Cause("panic", ""))

    def _on_boot_timeout(self) -> None:
        if self._hello is None and self._config.agent == "socket":
            why = f"the guest's agent did not answer within {self._config.boot_timeout_s:.1f} s"
            self._want_end(Cause("boot_timeout", why), kills=True)

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def _want_end(self, cause: Cause, *, kills: bool = False, timeout_s: float | None = None) -> None:
        """End the machine, if nobody has wanted that before."""
        if self._cause is None and not self._is_over:
            self._cause = cause
            patience_s = self._config.stop_timeout_s if timeout_s is None else timeout_s
            self._loop.create_task(self._end_machine(0.0 if kills else patience_s))
        elif kills:
            self._kill()

    async def _end_machine(self, patience_s: float) -> None:
        if self._cause is not None and self._cause.kind == "panic":
            await asyncio.sleep(patience_s)  # most machines end by themselves
        elif patience_s and self._hello is not None:
            number = self._streams.open(None, "poweroff")
            if number is not None:
                self._to_guest_soon(of_object(Kind.REQUEST, number, {"op": "poweroff"}))
            await asyncio.sleep(patience_s)
        self._kill()

    def _kill(self) -> None:
        if self._vmm is not None:
            self._machine.table.signal(self._vmm, SIGKILL)

    def _conclude(self, end: End) -> None:
        """Tell how it ended: those who listen, end.json, the exit file; then take the sockets away."""
        code = LOST if end.code is None else end.code
        self._main.end(code, out_of_memory=end.out_of_memory)
        for asker in self._ready:
            asker.connection.write_nowait(of_error(asker.stream, "failed", end.why).encode())
        for client in self._clients:
            client.close()
        self._log.sync()
        self._put(self._config.end_file, msgspec.json.encode(end._asdict()))
        self._put(self._config.exit_file, str(code).encode())
        self._take_away()

    def _take_away(self) -> None:
        """Remove what it listened on."""
        for path in (self._config.socket, *(each.path for each in self._config.files if each.kind == "listen")):
            unlink(self._machine, path)
        if self._config.monitor_socket is not None:
            unlink(self._machine, self._config.monitor_socket)
            folder = self._machine.view.find(self._config.monitor_socket.rpartition("/")[0])
            if folder is not None and not folder.list_names():
                self._machine.view.remove(self._config.monitor_socket.rpartition("/")[0])

    def _put(self, path: str, data: bytes) -> None:
        self._machine.view.write(f"{path}.tmp", data, 0o600)
        self._machine.view.rename(f"{path}.tmp", path)

    # -- clients -------------------------------------------------------------------------------------------------------------------

    async def _serve_monitor(self, client: Connection) -> None:
        """Answer one request on Kata's socket."""
        request = await client.read()
        body = _METRICS if request.startswith(b"GET /metrics") else b"unix://" + self._config.socket.encode()
        client.write_nowait(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        client.close()

    async def _serve_client(self, client: Connection) -> None:
        self._clients.append(client)
        decoder = Decoder()
        try:
            while data := await client.read():
                for frame in decoder.feed(data):
                    await self._hear_client(client, frame)
        except BadFrame:
            pass  # who speaks so is not spoken to
        self._clients.remove(client)
        self._leave(client)
        client.close()

    def _leave(self, client: Connection) -> None:
        self._main.forget(client)
        self._console.forget(client)
        self._watchers = [each for each in self._watchers if each.connection is not client]
        self._ready = [each for each in self._ready if each.connection is not client]
        for number in self._streams.leave(client):
            if number != MAIN_STREAM:
                self._to_guest_soon(Frame(Kind.CLOSE, number))

    async def _hear_client(self, client: Connection, frame: Frame) -> None:
        asker = Asker(client, frame.stream)
        if frame.kind is Kind.REQUEST:
            await self._request(asker, frame)
        elif self._main.is_attached(asker):
            await self._main.hear(asker, frame)
        elif self._console.is_open(asker):
            await self._console.hear(asker, frame)
        elif (number := self._streams.find(client, frame.stream)) is not None:
            if frame.kind is Kind.CREDIT:
                self._streams.grant(number, frame.number())
            await self._to_guest(frame._replace(stream=number))

    async def _request(self, asker: Asker, frame: Frame) -> None:
        request = frame.object()
        operation = str(request.get("op"))
        own = _OPERATIONS.get(operation)
        try:
            if own is not None:
                await own(self, asker, request)
            elif self._hello is None:
                self._refuse(asker, "failed", "the guest's agent has not answered yet")
            elif (number := self._streams.open(asker, operation)) is None:
                self._refuse(asker, "busy", "too many streams")
            else:
                await self._to_guest(frame._replace(stream=number))
        except (KeyError, TypeError, ValueError) as error:
            self._refuse(asker, "invalid", f"the request makes no sense: {error}")

    async def _op_ready(self, asker: Asker, _request: dict[str, Any]) -> None:
        if self._hello is not None:
            self._answer(asker, self._hello)
        elif self._cause is not None:
            self._refuse(asker, "failed", self._cause.why or self._console.panic)
        else:
            self._ready.append(asker)

    async def _op_start(self, asker: Asker, request: dict[str, Any]) -> None:
        if self._main.state != "none":
            self._refuse(asker, "busy", "the main command was started before")
        elif self._hello is None:
            self._refuse(asker, "failed", "the guest's agent has not answered yet")
        else:
            await self._main.start(asker, request)

    async def _op_attach(self, asker: Asker, _request: dict[str, Any]) -> None:
        self._answer(asker, {})
        self._main.attach(asker)

    async def _op_console(self, asker: Asker, request: dict[str, Any]) -> None:
        self._answer(asker, {})
        self._console.open(asker, request)

    async def _op_signal(self, asker: Asker, request: dict[str, Any]) -> None:
        number = int(request["signal"])
        if self._main.state != "running" or not 1 <= number <= 64:
            self._refuse(asker, "failed", "the main command does not run")
            return
        await self._to_guest(Frame(Kind.SIGNAL, MAIN_STREAM, bytes([number])))
        self._answer(asker, {})

    async def _op_status(self, asker: Asker, _request: dict[str, Any]) -> None:
        assert self._vmm is not None
        main = "none" if self._main.state == "asked" else self._main.state
        facts = {"vmm_pid": self._vmm.pid, "agent": self._hello, "main": main, "exit": self._main.exit}
        self._answer(asker, facts | {"silent_s": self._silent_s, "paused": self._is_held})

    async def _op_hold(self, asker: Asker, request: dict[str, Any]) -> None:
        self._is_held = bool(request["paused"])
        self._heard_ns = self._machine.loop.elapsed_ns
        self._answer(asker, {})

    async def _op_stop(self, asker: Asker, request: dict[str, Any]) -> None:
        timeout_s = float(request["timeout_s"])
        self._answer(asker, {})
        self._want_end(Cause("stopped", "it was stopped"), timeout_s=timeout_s, kills=timeout_s <= 0)

    async def _op_watch(self, asker: Asker, _request: dict[str, Any]) -> None:
        self._answer(asker, {})
        self._watchers.append(asker)

    def _answer(self, asker: Asker, value: dict[str, Any]) -> None:
        asker.connection.write_nowait(of_ok(asker.stream, value).encode())

    def _refuse(self, asker: Asker, code: str, message: str) -> None:
        asker.connection.write_nowait(of_error(asker.stream, code, message).encode())

    def _tell_watchers(self, event: dict[str, Any]) -> None:
        for asker in self._watchers:
            asker.connection.write_nowait(of_object(Kind.EVENT, asker.stream, event).encode())


_Operation = Callable[[_Shim, Asker, dict[str, Any]], Awaitable[None]]
_OPERATIONS: Final[dict[str, _Operation]] = {
    "ready": _Shim._op_ready,
    "start": _Shim._op_start,
    "attach": _Shim._op_attach,
    "console": _Shim._op_console,
    "signal": _Shim._op_signal,
    "status": _Shim._op_status,
    "hold": _Shim._op_hold,
    "stop": _Shim._op_stop,
    "watch": _Shim._op_watch,
}


async def _tell(process: SimProcess, message: dict[str, object]) -> None:
    end = process.pipes.get("_OCI_SYNCPIPE")
    if isinstance(end, WriteEnd):
        try:
            await end.write(msgspec.json.encode(message) + b"\n")
        except BrokenPipeError:
            return  # who wanted to know is gone
        finally:
            end.close()
