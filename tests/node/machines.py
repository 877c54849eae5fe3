"""A microVM without an engine: a shim told what to start by the engine's own driver, and the client that talks to it.

Bodies take a `Machines` and know no World: in the simulation everything is simulated, and on the host the same words start QEMU.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from isopod.engine.launch import START_PIPE, SYNC_PIPE
from isopod.engine.vm.disks import make_upper
from isopod.engine.vm.drivers.qemu import QemuControl, QemuDriver
from isopod.engine.vm.guest import find_guest, kernel_words
from isopod.engine.vm.machine import Disk, MachineSpec, Nic
from isopod.engine.vm.shim import Attached, MachineEnd, Process, ShimClient, ShimSpec, shim_json
from isopod.world.processes import Process as Child
from isopod.world.world import World
from tests.node.rig import starter_tar

MIB = 1 << 20
GATEWAY = "10.77.0.1"
ENV = {"PATH": "/bin"}


class Ran(NamedTuple):
    """What a command did."""

    exit_code: int | None
    stdout: bytes
    stderr: bytes


class Machine:
    """One machine: its folder, its shim, its client."""

    def __init__(self, world: World, folder: str, spec: MachineSpec, shim: Child, message: Mapping[str, Any]) -> None:
        self.world = world
        self.folder = folder
        self.spec = spec
        self.shim = shim
        self.message = message
        """What it said on the sync pipe."""
        self.client = ShimClient(world, f"{folder}/shim.sock", spec.name)

    async def control(self) -> QemuControl:
        """Connect to QEMU; the caller closes it."""
        return await QemuDriver(self.world).connect(self.spec)

    async def configure(self, *, hostname: str = "box", entropy: str = "11" * 32, **options: Any) -> None:
        """Tell the guest who it is, once it answers."""
        await self.client.ready(60)
        request: dict[str, Any] = {
            "hostname": hostname,
            "time_ns": self.world.clock.now_ns(),
            "entropy": entropy,
            "layers": [["l0i", "l0t"]],
            "upper": "upper",
            "network": None,
            "hosts": "127.0.0.1 localhost\n",
            "resolv": "nameserver 10.77.0.1\n",
            "mounts": [],
            "pids_max": None,
        }
        await self.client.request("configure", deadline_s=30, **(request | options))

    async def start(self, *command: str, **options: Any) -> Attached:
        """Attach, then start the main command."""
        attached = await self.client.attach(stdin=True)
        await self.client.start(process(*command, **options))
        return attached

    async def run(self, *command: str, **options: Any) -> Ran:
        """Start the main command and return what it did."""
        attached = await self.start(*command, **options)
        attached.end_input()
        return await collect(attached)

    async def exec(self, *command: str, **options: Any) -> Ran:
        """Run one more command."""
        session = await self.client.exec(process(*command, **options))
        session.attached.end_input()
        return await collect(session.attached)

    async def end(self) -> MachineEnd:
        """Return how it ended, once it did."""
        async with asyncio.timeout(120):
            await self.shim.wait()
        return msgspec.json.decode(await self.world.disk.read(f"{self.folder}/end.json"), type=MachineEnd)

    async def exit_file(self) -> bytes:
        """Return what the exit file says."""
        return await self.world.disk.read(f"{self.folder}/exit")

    async def events(self) -> "list[Mapping[str, Any]]":
        """Return what happens to it until its end."""
        return [event async for event in self.client.watch()]


class Machines:
    """Starts machines.

    Args:
        world: Where.
        guest: The folder of the guest's files.
        folder: An empty folder.
    """

    def __init__(self, world: World, guest: str, folder: str) -> None:
        self.world = world
        self.folder = folder
        self._guest = guest
        self._layer: tuple[Disk, ...] = ()

    async def launch(
        self,
        name: str = "vm1",
        *,
        memory_mib: int = 128,
        vcpus: int = 1,
        disk_mib: int = 64,
        taps: Sequence[Nic] = (),
        settings: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> Machine:
        """Start a machine; what its shim says of it is its `message`."""
        folder = f"{self.folder}/{name}"
        await self.world.disk.make_directory(folder)
        guest = await find_guest(self.world, self._guest)
        await make_upper(self.world, f"{folder}/upper.img", disk_mib * MIB)
        wanted = MachineSpec(
            id=name,
            name=name,
            vcpus=vcpus,
            memory_bytes=memory_mib * MIB,
            kernel=guest.kernel,
            initrd=guest.initrd,
            cmdline=kernel_words("tcg", 2_000_000),
            disks=await self._disks(f"{folder}/upper.img"),
            nics=tuple(taps),
            shares=(),
            folder=folder,
            accelerator="tcg",
        )
        wanted = wanted._replace(**spec)
        plan = await QemuDriver(self.world).plan(wanted)
        told = shim_json(_shim_spec(wanted, folder), plan) | dict(settings or {})
        await self.world.disk.write(f"{folder}/shim.json", msgspec.json.encode(told))
        shim = await self.world.processes.spawn(
            [guest.shim, f"{folder}/shim.json"], env=ENV, pipes={SYNC_PIPE: "read", START_PIPE: "write"}
        )
        await shim.pipes[START_PIPE].write(b"\0")
        message = msgspec.json.decode(await shim.pipes[SYNC_PIPE].read(), type=dict[str, Any])
        for pipe in shim.pipes.values():
            pipe.close()
        return Machine(self.world, folder, wanted, shim, message)

    async def booted(self, name: str = "vm1", **options: Any) -> Machine:
        """Start a machine and tell its guest who it is."""
        machine = await self.launch(name, **options)
        await machine.configure()
        return machine

    async def _disks(self, upper: str) -> tuple[Disk, ...]:
        """Return the disks of the starter image and an own one."""
        if not self._layer:
            base = f"{self.folder}/layer"
            await self.world.disk.write(f"{base}.in", starter_tar())
            await self.world.disk.index_layer(f"{base}.in", f"{base}.tar", f"{base}.index")
            self._layer = (Disk(f"{base}.index", "l0i", read_only=True), Disk(f"{base}.tar", "l0t", read_only=True))
        return (*self._layer, Disk(upper, "upper", read_only=False))


def process(*command: str, env: Mapping[str, str] = ENV, cwd: str = "/", user: str = "", terminal: bool = False) -> Process:
    """Return a command to start."""
    return Process(command, env, cwd, user, terminal=terminal, stdin=True, size=(24, 80))


async def collect(attached: Attached) -> Ran:
    """Gather what a command does until its end."""
    out = {False: bytearray(), True: bytearray()}
    try:
        async for output in attached.outputs():
            out[output.is_stderr] += output.data
        return Ran(await attached.exit_code(), bytes(out[False]), bytes(out[True]))
    finally:
        attached.close()


def _shim_spec(spec: MachineSpec, folder: str) -> ShimSpec:
    return ShimSpec(
        id=spec.id,
        name=spec.name,
        folder=folder,
        exit_file=f"{folder}/exit",
        log=f"{folder}/log",
        console_log=f"{folder}/console.log",
        log_bytes_max=1 << 20,
        console_bytes_max=1 << 20,
        cgroup_procs=(),
        monitor_socket="",
        boot_timeout_s=60.0,
        silent_timeout_s=30.0,
        stop_timeout_s=5.0,
        vcpus=spec.vcpus,
        memory_bytes=spec.memory_bytes,
        hypervisor="qemu",
    )
