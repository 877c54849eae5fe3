"""The simulated guest's agent: what the host asks it (`frames`), and what it says of itself.

Frames that come while a stream is being opened are kept for it. Its port may be missing, and with some faults of `vm_faults` it lies.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from isopod.world.sim.machine import Machine
from isopod.world.sim.programs import guest_files
from isopod.world.sim.programs.commands import run_command
from isopod.world.sim.programs.frames import (
    COMMANDS_MAX,
    MAIN_STREAM,
    STREAMS_MAX,
    BadFrame,
    Decoder,
    Frame,
    Kind,
    of_error,
    of_object,
    of_ok,
)
from isopod.world.sim.programs.guest_streams import Command, Receiving, Sending, Stream
from isopod.world.sim.programs.guest_world import AGENT_BYTES, RELEASE, GuestWorld, Refused
from isopod.world.sim.programs.hardware import Hardware, Wire
from isopod.world.sim.table import SimProcess
from isopod.world.sim.vm_faults import Drawn

AGENT: Final = "0.1.0"
_CALL_S: Final = (0.5e-3, 4e-3)
_CODES: Final = {
    errno.ENOENT: "not_found",
    errno.ENOTDIR: "not_found",
    errno.EINVAL: "invalid",
    errno.EACCES: "not_executable",
    errno.EPERM: "not_executable",
}


class GuestAgent:
    """The agent of one guest.

    Args:
        machine: The computer that the guest runs on.
        world: What it has made inside.
        hardware: What it found.
        init: The process that it is.
        port: How it speaks to the host, None without a port.
        faults: What goes wrong with it.
    """

    def __init__(
        self, machine: Machine, world: GuestWorld, hardware: Hardware, *, init: SimProcess, port: Wire | None, faults: Drawn
    ) -> None:
        self.flush: Callable[[], Awaitable[None]] | None = None
        """Writes back what changed; set by the kernel."""
        self.power_off: Callable[[], Awaitable[None]] | None = None
        """Ends the machine; set by the kernel."""
        self.main: Command | None = None
        self._machine = machine
        self._world = world
        self._hardware = hardware
        self._init = init
        self._port = port
        self._faults = faults
        self._streams: dict[int, Stream] = {}
        self._early: dict[int, list[Frame]] = {}
        """What came on streams that are being opened."""
        self._n_oom_kills_told = 0
        self._sending = asyncio.Lock()

    async def serve(self) -> None:
        """Hear the host, to the machine's end."""
        if self._port is None or "no_hello" in self._faults:
            return
        decoder = Decoder()
        while data := await self._port.incoming.read():
            try:
                for frame in decoder.feed(data):
                    await self._take(frame)
            except BadFrame:
                return  # the host is out of its mind; the shim's silence time is the answer

    async def send(self, frame: Frame) -> None:
        """Say something."""
        await self.send_bytes(frame.encode())

    async def send_bytes(self, data: bytes) -> None:
        """Say anything, also what is no frame."""
        if self._port is None:
            return
        async with self._sending:
            try:
                await self._port.outgoing.write(data)
            except BrokenPipeError:
                return  # the host is gone, and so are we in a moment

    async def tell(self, event: Mapping[str, object]) -> None:
        """Say that something happened."""
        await self.send(of_object(Kind.EVENT, 0, event))

    def begin_again(self) -> None:
        """Start what ran when the snapshot was made."""
        for request in self._world.state.commands:
            command = self._spawn(request.stream, request.arguments, pid=request.pid)
            self._streams[request.stream] = command
            self._machine.loop.create_task(self._accompany(request.stream, command))

    # -- frames ----------------------------------------------------------------------------------------------------------------------

    async def _take(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.HELLO:
                await self._greet()
            case Kind.PING:
                await self.send(Frame(Kind.PONG, 0, frame.payload))
            case Kind.REQUEST:
                self._early.setdefault(frame.stream, [])
                self._machine.loop.create_task(self._answer(frame))
            case _ if frame.stream in self._early:
                self._early[frame.stream].append(frame)
            case _ if frame.stream in self._streams:
                await self._streams[frame.stream].take(frame)

    async def _greet(self) -> None:
        """Answer a host that begins anew: it hears of no stream any more but the main command's."""
        for number, stream in list(self._streams.items()):
            if number == MAIN_STREAM and isinstance(stream, Command):
                stream.revive()
                continue
            stream.drop()
            del self._streams[number]
        exited = self._world.state.main_exit
        facts: dict[str, object] = {
            "version": 1,
            "agent": AGENT,
            "kernel": RELEASE,
            "cpus": self._hardware.n_cpus,
            "memory_bytes": self._world.total_bytes,
            "boot_id": self._world.state.boot_id,
            "main": "exited" if exited is not None else "none" if self.main is None else "running",
        }
        await self.send(of_object(Kind.HELLO, 0, facts))
        if exited is not None:
            await self.send(of_object(Kind.EXIT, MAIN_STREAM, exited))

    async def _answer(self, frame: Frame) -> None:
        """Do what was asked, and say how that went."""
        await asyncio.sleep(self._machine.chance.uniform(*_CALL_S))
        try:
            request = frame.object()
            work = _OPS.get(str(request.get("op")))
            if work is None:
                raise Refused("unsupported", f"no operation {request.get('op')!r}")
            if frame.stream == 0 or frame.stream in self._streams or len(self._streams) >= STREAMS_MAX:
                raise Refused("busy", f"stream {frame.stream} cannot be opened")
            await work(self, frame.stream, request)
        except Refused as refused:
            await self.send(of_error(frame.stream, refused.code, refused.message))
        except OSError as error:
            await self.send(of_error(frame.stream, _CODES.get(error.errno or 0, "failed"), f"{error.filename}: {error.strerror}"))
        except (BadFrame, KeyError, TypeError, ValueError) as error:
            await self.send(of_error(frame.stream, "invalid", f"the request makes no sense: {error}"))
        finally:
            self._early.pop(frame.stream, None)

    async def _open(self, number: int, stream: Stream) -> None:
        """Let a stream take its frames, those first that came while it was being opened."""
        self._streams[number] = stream
        early = self._early.get(number, [])
        while early:
            await stream.take(early.pop(0))
        self._early.pop(number, None)

    # -- operations ------------------------------------------------------------------------------------------------------------------

    async def _prepare(self, stream: int, request: Mapping[str, Any]) -> None:
        for index, tar in request["layers"]:
            self._world.mount_layer(index, tar)
        await self.send(of_ok(stream, {}))

    async def _configure(self, stream: int, request: Mapping[str, Any]) -> None:
        if self._world.container is not None:
            raise Refused("busy", "it is configured already")
        for index, tar in request["layers"]:
            self._world.mount_layer(index, tar)
        self._world.set_clock(int(request["time_ns"]))
        self._world.reseed(str(request["entropy"]))
        self._world.build(request, None)
        await self.send(of_ok(stream, {}))

    async def _renew(self, stream: int, request: Mapping[str, Any]) -> None:
        self._world.configured()
        self._world.set_clock(int(request["time_ns"]))
        self._world.reseed(str(request["entropy"]))
        self._world.renew(request)
        await self.send(of_ok(stream, {}))

    async def _start(self, stream: int, request: Mapping[str, Any]) -> None:
        if stream != MAIN_STREAM or self.main is not None:
            raise Refused("busy", "the main command was started before")
        await self._run(stream, request)

    async def _exec(self, stream: int, request: Mapping[str, Any]) -> None:
        if sum(isinstance(each, Command) for each in self._streams.values()) >= COMMANDS_MAX:
            raise Refused("busy", f"{COMMANDS_MAX} commands run already")
        await self._run(stream, request)

    async def _run(self, stream: int, request: Mapping[str, Any]) -> None:
        command = self._spawn(stream, request, pid=None)
        self._world.state.remember(stream, request, command.process.inner_pid)
        await self.send(of_ok(stream, {"pid": command.process.inner_pid}))
        await self._open(stream, command)
        self._machine.loop.create_task(self._accompany(stream, command))

    async def _metrics(self, stream: int, _request: Mapping[str, Any]) -> None:
        await self.send(of_ok(stream, _figures(self._world, self._hardware)))

    async def _warm(self, stream: int, _request: Mapping[str, Any]) -> None:
        self._world.configured()  # pages cost nothing here
        await self.send(of_ok(stream, {}))

    async def _look(self, stream: int, request: Mapping[str, Any]) -> None:
        view = self._world.configured().view
        await self.send(of_ok(stream, guest_files.look(view, str(request["path"]), follow=bool(request.get("follow")))))

    async def _archive(self, stream: int, request: Mapping[str, Any]) -> None:
        facts, data = guest_files.pack(self._world.configured().view, str(request["path"]))
        sending = Sending(self.send, stream, data)
        await self._open(stream, sending)
        await self.send(of_ok(stream, facts))
        await sending.run()
        self._streams.pop(stream, None)

    async def _extract(self, stream: int, request: Mapping[str, Any]) -> None:
        view = self._world.configured().view
        view.folder(str(request["path"]))
        receiving = Receiving(self.send, stream)
        await self._open(stream, receiving)
        data = await receiving.done
        self._streams.pop(stream, None)
        if data is not None:
            guest_files.extract(view, str(request["path"]), data)
            await self.send(of_ok(stream, {}))

    async def _sync(self, stream: int, _request: Mapping[str, Any]) -> None:
        assert self.flush is not None
        await self.flush()
        await self.send(of_ok(stream, {}))

    async def _poweroff(self, stream: int, _request: Mapping[str, Any]) -> None:
        assert self.power_off is not None
        await self.send(of_ok(stream, {}))
        await self.power_off()

    # -- commands --------------------------------------------------------------------------------------------------------------------

    def _spawn(self, stream: int, request: Mapping[str, Any], *, pid: int | None) -> Command:
        """Start a command; what it is is checked first."""
        process = self._world.new_process(request, pid=pid)
        command = Command(self._machine, self.send, stream, process, obeys_credit="over_credit" not in self._faults)
        size = int(request.get("rows") or 0), int(request.get("columns") or 0)
        command.connect(self._init, terminal=bool(request.get("terminal")), stdin=bool(request.get("stdin")), size=size)
        if stream == MAIN_STREAM:
            self.main = command
        self._machine.table.run(process, lambda running: run_command(self._machine, running))
        return command

    async def _accompany(self, stream: int, command: Command) -> None:
        """Carry a command's output to its end, and note that."""
        group = self._world.group
        facts = await command.carry(lambda: group.n_oom_kills > 0)
        if stream == MAIN_STREAM:
            self._world.state.main_exit = facts
        if self._streams.get(stream) is command:
            del self._streams[stream]
        self._world.state.forget(stream)
        if group.n_oom_kills > self._n_oom_kills_told:
            self._n_oom_kills_told = group.n_oom_kills
            await self.tell({"event": "oom", "pid": command.process.inner_pid, "command": command.process.argv[0]})


_Op = Callable[[GuestAgent, int, Mapping[str, Any]], Awaitable[None]]
_OPS: Final[dict[str, _Op]] = {
    "prepare": GuestAgent._prepare,
    "configure": GuestAgent._configure,
    "renew": GuestAgent._renew,
    "start": GuestAgent._start,
    "exec": GuestAgent._exec,
    "metrics": GuestAgent._metrics,
    "warm": GuestAgent._warm,
    "look": GuestAgent._look,
    "archive": GuestAgent._archive,
    "extract": GuestAgent._extract,
    "sync": GuestAgent._sync,
    "poweroff": GuestAgent._poweroff,
}


def _figures(world: GuestWorld, hardware: Hardware) -> dict[str, object]:
    """Return what the guest measures of itself: figures that follow from the virtual time and what its commands charged."""
    group, up_s = world.group, world.up_s
    free = world.total_bytes - AGENT_BYTES - group.memory_bytes
    main_s, n_pids = group.cpu_usage_ns / 1e9, len(group.members)
    idle_disk = {"reads": 0, "read_bytes": 0, "writes": 0, "written_bytes": 0, "busy_s": 0.0}
    idle_link = {f"{way}_{what}": 0 for way in ("received", "sent") for what in ("bytes", "packets", "errors", "drops")}
    memory = dict.fromkeys(("cached", "buffers", "swap_total", "swap_free"), 0)
    cpu = dict.fromkeys(("nice", "iowait", "irq", "softirq", "steal"), 0.0)
    return {
        "uptime_s": up_s,
        **dict.fromkeys(("load1", "load5", "load15"), 0.1),
        "memory": {"total": world.total_bytes, "free": free, "available": free, **memory},
        "cpu": {"user": main_s, "system": up_s / 100, "idle": up_s, **cpu},
        "n_cpus": hardware.n_cpus,
        "processes": n_pids + 1,
        "threads": n_pids + 1,
        "disks": [{"name": f"vd{chr(97 + at)}", **idle_disk} for at in range(len(hardware.drives))],
        "interfaces": [{"name": name, **idle_link} for name in world.network.links],
        "agent": {"cpu_s": up_s / 1000, "resident_bytes": 2 << 20, "n_fds": 8, "n_threads": 1, "proportional_bytes": 2 << 20},
        "main": {"memory_bytes": group.memory_bytes, "cpu_s": main_s, "n_pids": n_pids, "oom_kills": group.n_oom_kills},
    }
