"""The simulated supervisor: /usr/bin/conmon, in the behaviour of conmon 2.1.6 as isopod uses it.

One process per container or exec session: it waits on the start pipe, serves the attach socket and the control pipe in its bundle, runs
the runtime, reports {"data": pid} or {"data": -1, "message": ...} on the sync pipe, logs in the k8s format (starting the file anew
over --log-size-max), carries stdio to and from whoever is attached, and leaves the exit file. An exec session writes its exit code to
the sync pipe too, offers its socket on the attach pipe first, and waits a second time on the start pipe.

Only --api-version 1 with --sync. SIGTERM before the container exists ends it; later it is passed on. If it is killed, a runtime
that still runs under it is killed with it, and the container goes on with nobody to take its output.
Source: its manual page and source (v2.1.6), read, and experiments.
"""

import asyncio
import signal
from collections.abc import Sequence
from typing import Final

import msgspec

from isopod.world.sim.inodes import Inode
from isopod.world.sim.machine import Machine
from isopod.world.sim.packets import PacketEnd
from isopod.world.sim.pipes import ReadEnd, WriteEnd, open_pipe, wait_any
from isopod.world.sim.programs.container_log import ContainerLog
from isopod.world.sim.programs.stdio import write_error, write_out
from isopod.world.sim.table import SIGKILL, SimProcess
from isopod.world.sim.terminal import Terminal

VERSION: Final = b"conmon version 2.1.6\ncommit: simulated\n"
_STDOUT: Final = 2
_STDERR: Final = 3
_STDIO_BYTES: Final = 8192
_MESSAGE_BYTES_MAX: Final = 8191
_RESIZE: Final = 1
_REOPEN: Final = 2
_STARTUP_S: Final = (500e-6, 3e-3)
_FLAGS: Final = {"-e": "--exec", "-i": "--stdin", "-t": "--terminal", "-s": "--systemd-cgroup"}
_VALUES: Final = {
    "-b": "--bundle",
    "-c": "--cid",
    "-l": "--log-path",
    "-n": "--name",
    "-p": "--container-pidfile",
    "-P": "--conmon-pidfile",
    "-r": "--runtime",
    "-u": "--cuuid",
}
_LONG_FLAGS: Final = (
    *("--api-version", "--exec", "--exec-attach", "--full-attach", "--leave-stdin-open", "--no-new-keyring", "--no-pivot"),
    *("--no-sync-log", "--stdin", "--sync", "--syslog", "--systemd-cgroup", "--terminal", "--version"),
)


async def conmon(machine: Machine, process: SimProcess) -> int:
    """Be conmon."""
    options = _parse(process.argv[1:])
    if "--version" in options:
        await write_out(process, VERSION)
        return 0
    for needed in ("--cid", "--cuuid", "--runtime", "--bundle", "--sync"):
        if needed not in options:
            await write_error(process, f"[conmon:e]: {needed} not provided\n".encode())
            return 1
    return await _Supervisor(machine, process, options).run()


class _Supervisor:
    """One run of conmon."""

    def __init__(self, machine: Machine, process: SimProcess, options: dict[str, list[str]]) -> None:
        self._machine = machine
        self._process = process
        self._options = options
        self._bundle = options["--bundle"][0]
        self._is_exec = "--exec" in options
        self._has_stdin = "--stdin" in options
        self._consoles: list[PacketEnd] = []
        self._stdin: WriteEnd | None = None
        self._terminal: Terminal | None = None
        self._container: SimProcess | None = None
        self._control = b""
        self._fifo: Inode | None = None
        self._log: ContainerLog | None = None

    async def run(self) -> int:
        """Supervise from the start pipe to the exit file."""
        process = self._process
        process.handlers[int(signal.SIGPIPE)] = "ignore"
        start = process.pipes.get("_OCI_STARTPIPE")
        if isinstance(start, ReadEnd):
            await start.read()
        await asyncio.sleep(self._machine.chance.uniform(*_STARTUP_S))
        log = self._log = ContainerLog(self._machine, self._log_path(), int(self._option("--log-size-max", "0")))
        self._serve_attach()
        self._serve_control()
        if "--exec-attach" in self._options:
            await self._tell("_OCI_ATTACHPIPE", {"data": 0})
            if isinstance(start, ReadEnd):
                await start.read()
        code, stdout, stderr = await self._run_runtime()
        if code != 0:
            message = stderr.read_nowait()[:_MESSAGE_BYTES_MAX]
            if message:
                await self._tell("_OCI_SYNCPIPE", {"data": -1, "message": message.decode(errors="replace")})
            return 1
        pid = int(bytes(self._machine.view.open_file(self._option("--container-pidfile", "")).data))
        self._container = self._machine.table.lately(pid)
        if self._container is None:
            return 1
        process.handlers[int(signal.SIGTERM)] = self._pass_on_sigterm
        await self._tell("_OCI_SYNCPIPE", {"data": pid})
        await self._carry(log, stdout, stderr)
        return await self._conclude(log)

    async def _run_runtime(self) -> tuple[int, ReadEnd, ReadEnd]:
        """Run the runtime's create or exec; return its status and our ends of the container's outputs."""
        table, us = self._machine.table, self._process.owner
        runtime = table.add(self._runtime_argv(), self._process.env, "/")
        runtime.session = self._process.session
        self._process.on_exit.append(lambda: self._end_runtime(runtime))
        if "--terminal" in self._options:
            self._terminal = runtime.terminal = Terminal(us)
            self._terminal.on_signal = self._signal_foreground
        elif self._has_stdin:
            runtime.stdin, self._stdin = open_pipe(runtime.owner, us)
        stdout, runtime.stdout = open_pipe(us, runtime.owner)
        stderr, runtime.stderr = open_pipe(us, runtime.owner)
        self._machine.processes.start(runtime)
        return await runtime.wait(), stdout, stderr

    def _runtime_argv(self) -> list[str]:
        argv = [self._option("--runtime", ""), *self._options.get("--runtime-arg", [])]
        pid_file = self._option("--container-pidfile", "")
        if self._is_exec:
            argv += ["exec", "--pid-file", pid_file, "--process", self._option("--exec-process-spec", ""), "--detach"]
            argv += ["--tty"] if "--terminal" in self._options else []
        else:
            argv += ["create", "--bundle", self._bundle, "--pid-file", pid_file]
            argv += ["--no-new-keyring"] if "--no-new-keyring" in self._options else []
        return [*argv, self._option("--cid", "")]

    async def _carry(self, log: ContainerLog, stdout: ReadEnd, stderr: ReadEnd) -> None:
        """Carry outputs until the container's process ended, then what is left of them."""
        container = self._container
        assert container is not None
        ended = asyncio.ensure_future(container.wait())
        screen = self._terminal.output if self._terminal is not None else stdout.channel
        ended.add_done_callback(lambda _: screen.wake())
        while not ended.done():
            if not await self._carry_once(log, stdout, stderr) and not ended.done():
                await wait_any([screen, stderr.channel])
        while await self._carry_once(log, stdout, stderr):
            pass

    async def _carry_once(self, log: ContainerLog, stdout: ReadEnd, stderr: ReadEnd) -> bool:
        out = self._terminal.take() if self._terminal is not None else stdout.read_nowait()
        err = stderr.read_nowait()
        for kind, stream, data in ((_STDOUT, "stdout", out), (_STDERR, "stderr", err)):
            for start in range(0, len(data), _STDIO_BYTES):
                piece = data[start : start + _STDIO_BYTES]
                log.write(stream, piece)
                await self._show(bytes([kind]) + piece)
        return bool(out or err)

    async def _show(self, packet: bytes) -> None:
        for console in list(self._consoles):
            try:
                await console.send(packet)
            except OSError:
                self._consoles.remove(console)

    async def _conclude(self, log: ContainerLog) -> int:
        """Write the exit file, close what was served, report."""
        assert self._container is not None
        assert self._container.status is not None
        status = self._container.status
        code = status if status >= 0 else 128 - status
        if "--no-sync-log" not in self._options:
            log.sync()
        for console in self._consoles:
            console.close()
        for folder, name in ((self._option("--persist-dir", ""), "exit"), (self._option("--exit-dir", ""), self._option("--cid", ""))):
            if folder:
                self._write_exit(f"{folder}/{name}", code)
        if self._is_exec:
            await self._tell("_OCI_SYNCPIPE", {"data": code})
        return code

    def _write_exit(self, path: str, code: int) -> None:
        temporary = f"{path}.{self._machine.chance.randrange(16**6):06X}"
        self._machine.view.write(temporary, str(code).encode(), 0o666)
        self._machine.view.rename(temporary, path)

    # -- attach and control ----------------------------------------------------------------------------------------------------------

    def _serve_attach(self) -> None:
        path = f"{self._bundle}/attach"
        if self._machine.view.find(path, follow=False) is not None:
            self._machine.view.remove(path)
        listener = self._machine.network.listen_packets(path)

        async def accept() -> None:
            while True:
                console = await listener.accept()
                self._consoles.append(console)
                self._machine.loop.create_task(self._take_input(console))

        self._machine.loop.create_task(accept())

    async def _take_input(self, console: PacketEnd) -> None:
        """Feed what one client sends into stdin; its end is the end of stdin."""
        while data := await console.receive():
            if self._terminal is not None:
                self._terminal.feed(data)
            elif self._stdin is not None:
                try:
                    await self._stdin.write(data)
                except BrokenPipeError:
                    self._close_stdin()
        if "--leave-stdin-open" not in self._options:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            self._stdin.close()
            self._stdin = None

    def _serve_control(self) -> None:
        for name in ("ctl", "winsz"):
            path = f"{self._bundle}/{name}"
            if self._machine.view.find(path) is not None:
                self._machine.view.remove(path)
            fifo = self._machine.view.create(path, "fifo", 0o660)
            if name == "ctl":
                self._fifo = fifo
                fifo.watchers.append(self._on_control)
                self._process.on_exit.append(fifo.watchers.clear)

    def _on_control(self, name: str) -> None:
        """Take what was written into the control pipe, line by line."""
        assert self._fifo is not None
        self._control += bytes(self._fifo.data)
        self._fifo.replace(b"")
        while b"\n" in self._control:
            line, _, self._control = self._control.partition(b"\n")
            self._obey(line.split())

    def _obey(self, words: Sequence[bytes]) -> None:
        if len(words) != 3 or not all(word.isdigit() for word in words):
            return
        kind, rows, columns = (int(word) for word in words)
        if kind == _RESIZE and self._terminal is not None:
            self._terminal.resize(rows, columns)
        elif kind == _REOPEN and self._log is not None:
            self._log.reopen()

    # -- signals and pipes -----------------------------------------------------------------------------------------------------------

    def _signal_foreground(self, number: int) -> None:
        """Signal the youngest process of the terminal: its foreground job."""
        members = [each for each in self._machine.table.live() if each.terminal is self._terminal and each.pid_namespace is not None]
        if members:
            self._machine.table.signal(members[-1], number)

    def _pass_on_sigterm(self) -> None:
        if self._container is not None:
            self._machine.table.signal(self._container, int(signal.SIGTERM))

    def _end_runtime(self, runtime: SimProcess) -> None:
        self._machine.table.signal(runtime, SIGKILL)

    async def _tell(self, pipe: str, message: dict[str, object]) -> None:
        end = self._process.pipes.get(pipe)
        if isinstance(end, WriteEnd):
            try:
                await end.write(msgspec.json.encode(message) + b"\n")
            except BrokenPipeError:
                return  # who wanted to know is gone

    def _log_path(self) -> str | None:
        drivers = self._options.get("--log-path", [])
        return next((each.removeprefix("k8s-file:") for each in drivers if each not in ("none", "off", "null", "")), None)

    def _option(self, name: str, default: str) -> str:
        return self._options.get(name, [default])[0]


def _parse(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Read the options; unknown ones are refused by the real program and ignored here."""
    options: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        if not word.startswith("-"):
            continue
        name = _FLAGS.get(word) or _VALUES.get(word) or word
        if name in _LONG_FLAGS:
            options[name] = []
        else:
            options.setdefault(name, []).append(value if equals else rest.pop(0) if rest else "")
    return options
