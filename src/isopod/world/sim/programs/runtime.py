"""The simulated OCI runtime: /usr/bin/crun, and /usr/bin/runc with that one's words.

Commands: create, start, exec (--detach), state, kill, delete, list, pause, resume, update, --version. State lies at ROOT/ID as crun
keeps it (status, config.json, exec.fifo until started). Exit codes and texts were taken from crun 1.8.1 and runc 1.1.5 by experiment:
a failed create or command is 1, a command that exec cannot run is 255; a container whose first process is gone is "stopped" with pid 0.

Legal behaviours: seeded delays; a runtime that is killed half way leaves its state folder. Not modelled: run, checkpoint, hooks.
"""

import asyncio
import errno
import os
import signal
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple, NoReturn

import msgspec

from isopod.world.sim.links import NetworkNamespace
from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.commands import run_command
from isopod.world.sim.programs.container import (
    Config,
    Container,
    ProcessSpec,
    Resources,
    build_view,
    container_of,
    decode_config,
    decode_process,
    environment_of,
    find_executable,
)
from isopod.world.sim.programs.stdio import write_error, write_out
from isopod.world.sim.table import SIGKILL, SimProcess

CRUN_VERSION: Final = "crun version 1.8.1\ncommit: simulated\nspec: 1.0.0\n"
RUNC_VERSION: Final = "runc version 1.1.5\nspec: 1.0.2-dev\ngo: simulated\n"
_WORK_S: Final = (2e-3, 12e-3)
_FAILED: Final = 1
_EXEC_FAILED: Final = 255
_VALUE_OPTIONS: Final = (
    *("--root", "--log", "--log-format", "--cgroup-manager", "--format"),
    *("--bundle", "-b", "--pid-file", "--process", "-p", "--console-socket", "--cwd", "--resources"),
)


class _Failure(Exception):
    """What the runtime says before it ends."""

    def __init__(self, text: str, code: int = _FAILED) -> None:
        super().__init__(text)
        self.text = text
        self.code = code


class _Status(msgspec.Struct):
    """ROOT/ID/status."""

    pid: int
    process_start_time: int
    cgroup_path: str
    rootfs: str
    bundle: str
    created: str


class _Call(NamedTuple):
    """One invocation, its arguments parsed."""

    machine: Machine
    process: SimProcess
    flavour: str
    root: str
    options: dict[str, str]
    words: Sequence[str]

    @property
    def id(self) -> str:
        """The container."""
        if not self.words:
            raise _Failure("please specify a ID for the container")
        return self.words[0]

    @property
    def folder(self) -> str:
        """The state of the container."""
        return f"{self.root}/{self.id}"


async def crun(machine: Machine, process: SimProcess) -> int:
    """Be crun."""
    return await _main(machine, process, "crun")


async def runc(machine: Machine, process: SimProcess) -> int:
    """Be runc."""
    return await _main(machine, process, "runc")


async def _main(machine: Machine, process: SimProcess, flavour: str) -> int:
    before, options, words = _parse(process.argv[1:])
    await asyncio.sleep(machine.chance.uniform(*_WORK_S))
    if "--version" in before or "--version" in options:
        await write_out(process, (CRUN_VERSION if flavour == "crun" else RUNC_VERSION).encode())
        return 0
    command = _COMMANDS.get(words[0] if words else "")
    if command is None:
        await write_error(process, f"unknown command {words[0] if words else ''}\n".encode())
        return _FAILED
    root = options.get("--root", f"/run/{flavour}")
    try:
        await command(_Call(machine, process, flavour, root, options, words[1:]))
    except _Failure as failure:
        await write_error(process, _spell(machine, flavour, failure.text).encode())
        return failure.code if flavour == "crun" else _FAILED
    return 0


async def _create(call: _Call) -> None:
    machine, bundle = call.machine, call.options.get("--bundle") or call.options.get("-b") or call.process.cwd
    view = machine.view
    if view.find(call.folder) is not None:
        raise _Failure(f"container `{call.id}` already exists" if call.flavour == "crun" else "container with given ID already exists")
    try:
        config = decode_config(bytes(view.open_file(f"{bundle}/config.json").data))
    except OSError as error:
        raise _Failure(f"error opening file `{bundle}/config.json`: {error.strerror}") from error
    view.make_folders(call.folder)
    try:
        container = _build(call, bundle, config)
        _check_command(call, container, config.process, code=_FAILED)
    except _Failure:
        _destroy(call, config.linux.cgroupsPath)
        raise
    await asyncio.sleep(machine.chance.uniform(*_WORK_S))
    _launch(call, bundle, container)


def _build(call: _Call, bundle: str, config: Config) -> Container:
    machine = call.machine
    try:
        view = build_view(machine, bundle, config)
    except OSError as error:
        raise _Failure(f"mount `{error.filename}`: {error.strerror}") from error
    if view.find("/dev") is None:
        raise _Failure(f"open /dev directory in `{config.root.path}`: {os.strerror(errno.ENOENT)}")
    try:
        network = _network(machine, config)
    except OSError as error:
        raise _Failure(f"open `{error.filename}`: {error.strerror}") from error
    group = machine.kernel.make_group(config.linux.cgroupsPath or f"/{call.id}")
    group.memory_bytes_max = config.linux.resources.memory.limit
    group.pids_max = config.linux.resources.pids.limit
    return Container(view, config, group, network)


def _launch(call: _Call, bundle: str, container: Container) -> None:
    """Make the first process, which waits at the fifo for `start`."""
    machine, spec = call.machine, container.config.process
    process = machine.table.add(call.process.argv, {}, "/")
    _connect(call.process, process, terminal=spec.terminal)
    container.adopt(process, spec)
    fifo = machine.view.create(f"{call.folder}/exec.fifo", "fifo", 0o600)
    go: asyncio.Future[None] = machine.loop.create_future()
    fifo.watchers.append(lambda _: None if go.done() else go.set_result(None))

    async def begin(first: SimProcess) -> int:
        await go
        return await _be(machine, first, spec)

    machine.table.run(process, begin)
    created = datetime.fromtimestamp(machine.clock.now_ns() // 1000 / 1e6, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    status = _Status(
        pid=process.pid,
        process_start_time=process.identity.started_ticks,
        cgroup_path=container.group.path,
        rootfs=container.config.root.path,
        bundle=bundle,
        created=created,
    )
    machine.view.write(f"{call.folder}/config.json", bytes(machine.view.open_file(f"{bundle}/config.json").data), 0o700)
    machine.view.write(f"{call.folder}/status", msgspec.json.encode(status), 0o700)
    _write_pid(call, process.pid)


async def _be(machine: Machine, process: SimProcess, spec: ProcessSpec) -> int:
    """Become the container's command."""
    process.argv = tuple(spec.args)
    process.handlers.clear()
    return await run_command(machine, process)


async def _start(call: _Call) -> None:
    status, process = _find(call)
    if process is None:
        raise _Failure(f"container `{call.id}` is not running" if call.flavour == "crun" else "cannot start a container that has stopped")
    fifo = call.machine.view.find(f"{call.folder}/exec.fifo")
    if fifo is None:
        raise _Failure(
            f"cannot open `{call.folder}/exec.fifo`: {os.strerror(errno.ENOENT)}"
            if call.flavour == "crun"
            else "cannot start an already running container"
        )
    call.machine.view.remove(f"{call.folder}/exec.fifo")
    fifo.inode.notify("")
    assert status.pid == process.pid


async def _exec(call: _Call) -> None:
    _, init = _find(call)
    if init is None:
        crun_text = f"the container `{call.id}` is not running"
        raise _Failure(crun_text if call.flavour == "crun" else "cannot exec a container that has stopped")
    container = container_of(init)
    if "--process" in call.options:
        spec = decode_process(bytes(call.machine.view.open_file(call.options["--process"]).data))
    else:
        spec = ProcessSpec(args=list(call.words[1:]), env=[f"{name}={value}" for name, value in init.env.items()], cwd=init.cwd)
    if container.view.find(spec.cwd or "/") is None:
        raise _Failure(f"chdir `{spec.cwd}`: {os.strerror(errno.ENOENT)}", _EXEC_FAILED)
    _check_command(call, container, spec, code=_EXEC_FAILED)
    if container.group.pids_max is not None and len(container.group.members) >= container.group.pids_max:
        raise _Failure(f"clone: {os.strerror(errno.EAGAIN)}")
    machine = call.machine
    process = machine.table.add(call.process.argv, {}, "/")
    _connect(call.process, process, terminal=spec.terminal)
    container.adopt(process, spec)
    machine.table.run(process, lambda running: _be(machine, running, spec))
    _write_pid(call, process.pid)
    if "--detach" not in call.options and "-d" not in call.options:
        raise _Failure("", await process.wait() & 0xFF)


async def _state(call: _Call) -> None:
    status, process = _find(call)
    facts = {
        "ociVersion": "1.0.0",
        "id": call.id,
        "pid": 0 if process is None else process.pid,
        "status": _word(call, process),
        "bundle": status.bundle,
        "rootfs": status.rootfs,
        "created": status.created,
        "systemd-scope": "",
        "owner": "root",
    }
    await write_out(call.process, msgspec.json.format(msgspec.json.encode(facts), indent=4) + b"\n")


async def _kill(call: _Call) -> None:
    _, process = _find(call)
    number = _signal_number(call.words[1] if len(call.words) > 1 else "TERM")
    if "--all" in call.options or "-a" in call.options:
        members = [] if process is None else list(container_of(process).group.members.values())
        for member in members:
            call.machine.table.signal(member, number)
        return
    if process is None:
        raise _Failure(f"open pidfd: {os.strerror(errno.ESRCH)}" if call.flavour == "crun" else "container not running")
    call.machine.table.signal(process, number)


async def _delete(call: _Call) -> None:
    forced = "--force" in call.options or "-f" in call.options
    if call.machine.view.find(call.folder) is None:
        if forced:
            return
        text = f"cannot open directory '{call.folder}': {os.strerror(errno.ENOENT)}"
        raise _Failure(text if call.flavour == "crun" else "container does not exist")
    if call.machine.view.find(f"{call.folder}/status") is None:
        call.machine.view.remove_tree(call.folder)
        return
    status, process = _find(call)
    if process is not None:
        if not forced and _word(call, process) != "created":
            raise _Failure(f"the container `{call.id}` is not in `created` or `stopped` state")
        group = container_of(process).group
        call.machine.kernel.freeze(group, frozen=False)
        call.machine.table.signal(process, SIGKILL)
    _destroy(call, status.cgroup_path)


async def _list(call: _Call) -> None:
    folder = call.machine.view.find(call.root)
    lines = ["NAME PID       STATUS   BUNDLE PATH                             CREATED                        OWNER"]
    for name in folder.list_names() if folder is not None else []:
        one = call._replace(words=[name])
        status, process = _find(one)
        pid = 0 if process is None else process.pid
        lines.append(f"{name} {pid:<9} {_word(one, process):<8} {status.bundle:<39} {status.created:<30} root")
    await write_out(call.process, ("\n".join(lines) + "\n").encode())


async def _pause(call: _Call) -> None:
    _freeze(call, frozen=True)


async def _resume(call: _Call) -> None:
    _freeze(call, frozen=False)


def _freeze(call: _Call, *, frozen: bool) -> None:
    _, process = _find(call)
    if process is None:
        raise _Failure(f"the container `{call.id}` is not running: {os.strerror(errno.ESRCH)}")
    call.machine.kernel.freeze(container_of(process).group, frozen=frozen)


async def _update(call: _Call) -> None:
    """Change limits: as on cgroup v1 memory in use cannot be limited away."""
    _, process = _find(call)
    if process is None:
        raise _Failure(f"the container `{call.id}` is not running: {os.strerror(errno.ESRCH)}")
    group = container_of(process).group
    limits = msgspec.json.decode(bytes(call.machine.view.open_file(call.options["--resources"]).data), type=Resources)
    memory, pids = limits.memory.limit, limits.pids.limit
    if memory is not None and 0 <= memory < group.memory_bytes:
        raise _Failure(f"write to `memory.limit_in_bytes`: {os.strerror(errno.EBUSY)}")
    group.memory_bytes_max = group.memory_bytes_max if memory is None else memory if memory >= 0 else None
    group.pids_max = group.pids_max if pids is None else pids if pids >= 0 else None


_COMMANDS: Final = {
    "create": _create,
    "start": _start,
    "exec": _exec,
    "state": _state,
    "kill": _kill,
    "delete": _delete,
    "list": _list,
    "pause": _pause,
    "resume": _resume,
    "update": _update,
}


def _parse(arguments: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Split into the options before the command, all options with their values, and the words."""
    before: list[str] = []
    options: dict[str, str] = {}
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        takes_options = len(words) < 2
        if not takes_options or not word.startswith("-"):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        if not equals and name in _VALUE_OPTIONS and rest:
            value = rest.pop(0)
        options[name] = value
        if not words:
            before.append(name)
    return before, options, words


def _find(call: _Call) -> tuple[_Status, SimProcess | None]:
    """Return a container's status and its first process, None if that is gone."""
    path = f"{call.folder}/status"
    if call.machine.view.find(path) is None:
        text = f"error opening file `{path}`: {os.strerror(errno.ENOENT)}"
        raise _Failure(text if call.flavour == "crun" else "container does not exist")
    status = msgspec.json.decode(bytes(call.machine.view.open_file(path).data), type=_Status)
    process = call.machine.table.get(status.pid)
    if process is not None and process.identity.started_ticks != status.process_start_time:
        process = None
    return status, process


def _word(call: _Call, process: SimProcess | None) -> str:
    if process is None:
        return "stopped"
    if process.group is not None and process.group.is_frozen:
        return "paused"
    return "created" if call.machine.view.find(f"{call.folder}/exec.fifo") is not None else "running"


def _check_command(call: _Call, container: Container, spec: ProcessSpec, *, code: int) -> None:
    """Refuse a command that cannot be executed, in the runtime's words."""
    name = spec.args[0]
    try:
        find_executable(container.view, name, environment_of(spec), spec.cwd)
    except OSError as error:
        number = error.errno or errno.ENOENT
        if call.flavour == "runc":
            why = {errno.ENOENT: "executable file not found in $PATH", errno.EACCES: "permission denied", errno.EPERM: "is a directory"}
            text = why.get(number, os.strerror(number).lower())
            raise _Failure(f'unable to start container process: exec: "{name}": {text}', code) from error
        if number in (errno.EACCES, errno.EPERM):
            raise _Failure(f"open executable: {os.strerror(number)}", code) from error
        raise _Failure(f"executable file `{name}` not found in $PATH: {os.strerror(errno.ENOENT)}", code) from error


def _network(machine: Machine, config: Config) -> NetworkNamespace:
    for namespace in config.linux.namespaces:
        if namespace.type == "network":
            if namespace.path:
                return machine.kernel.namespace_at(namespace.path)
            fresh = machine.kernel.links.new_namespace()
            fresh.is_pinned = False
            return fresh
    return machine.kernel.links.host


def _connect(runtime: SimProcess, process: SimProcess, *, terminal: bool) -> None:
    """Give a process the stdio that the runtime was given."""
    if terminal and runtime.terminal is not None:
        process.terminal = runtime.terminal
        process.stdin, process.stdout = runtime.terminal.open(process.owner)
        process.stderr = process.stdout.dup(process.owner)
        return
    process.stdin = None if runtime.stdin is None else runtime.stdin.dup(process.owner)
    process.stdout = None if runtime.stdout is None else runtime.stdout.dup(process.owner)
    process.stderr = None if runtime.stderr is None else runtime.stderr.dup(process.owner)


def _write_pid(call: _Call, pid: int) -> None:
    path = call.options.get("--pid-file")
    if path:
        call.machine.view.write(path, str(pid).encode(), 0o700)


def _destroy(call: _Call, cgroup: str) -> None:
    if cgroup:
        call.machine.kernel.delete_group(cgroup)
    if call.machine.view.find(call.folder) is not None:
        call.machine.view.remove_tree(call.folder)


def _signal_number(word: str) -> int:
    if word.isdigit():
        number = int(word)
        return number if number <= int(signal.SIGRTMAX) else _invalid()
    name = word.upper().removeprefix("SIG")
    found = getattr(signal, f"SIG{name}", None)
    return int(found) if isinstance(found, signal.Signals) else 0


def _invalid() -> NoReturn:
    raise _Failure(f"send signal to pidfd: {os.strerror(errno.EINVAL)}")


def _spell(machine: Machine, flavour: str, text: str) -> str:
    if not text:
        return ""
    if flavour == "crun":
        return text + "\n"
    stamp = datetime.fromtimestamp(machine.clock.now_ns() // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'time="{stamp}" level=error msg="{quoted}"\n'
