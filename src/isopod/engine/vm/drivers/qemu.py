"""The QEMU driver: the `microvm` machine, or q35 where PCI is needed, under KVM or TCG.

The guest's console, the agent's port, the control socket and the taps come as descriptors from the shim, so that QEMU needs no rights to
make any and may live in a network namespace with nothing in it. A template's memory lies in a file: the state beside it is small, since
the capability `x-ignore-shared` leaves that memory where it is, and whoever is restored from it maps the file privately. Measured on two
cores under TCG with 128 MiB: 0.13 s from the spawn to the guest's next word against 0.16 s for memory in the stream, and 54 MB of
proportional memory against 110.

Not here: when to do what (`isolation`), QEMU's control protocol (`qmp`).
Sources: qemu-system-x86_64(1), docs/system/i386/microvm.rst, QEMU 7.2; `tsc_early_khz` is what keeps Linux from calibrating against a clock
that TCG emulates too badly.
"""

import asyncio
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

from isopod.engine.launch import ENVIRONMENT
from isopod.engine.vm.drivers.qmp import Qmp
from isopod.engine.vm.machine import AGENT_PORT, DriverCheck, MachineSpec, MachineStatus, Plan, PlannedFile
from isopod.world.errors import RuntimeFailed, Unsupported
from isopod.world.world import World

PROGRAM: Final = "qemu-system-x86_64"
CONTROL_SOCKET: Final = "qmp.sock"
STATE_FILE: Final = "state"
VERSION_TIMEOUT_S: Final = 10.0
MIGRATE_TIMEOUT_S: Final = 300.0
SPACE_TIMEOUT_S: Final = 60.0
_FD_FIRST: Final = 3
_TRANSPORTS_MAX: Final = 24
"""Devices on virtio-mmio that the microvm machine has room for."""
_FIXED_DEVICES: Final = 3
"""Serial ports, entropy, balloon."""
_BYTES_PER_S_MAX: Final = 10**11
_MIB: Final = 1 << 20
_KEYS: Final = ("ctrl", "alt", "delete")
_STATUS: Final[dict[str, MachineStatus]] = {
    "running": "running",
    "shutdown": "shutdown",
    "guest-panicked": "panicked",
    **dict.fromkeys(
        ("paused", "suspended", "prelaunch", "inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "io-error"), "paused"
    ),
}


class QemuDriver:
    """See `machine.Driver`.

    Args:
        world: Where QEMU runs.
    """

    name: Final = "qemu"

    def __init__(self, world: World) -> None:
        self._world = world
        self._checked: DriverCheck | None = None

    async def check(self) -> DriverCheck:
        """Ask QEMU for its version, once it is there."""
        if self._checked is None or not self._checked.usable:
            self._checked = await self._check()
        return self._checked

    async def plan(self, spec: MachineSpec) -> Plan:
        """Return QEMU's command line."""
        program = self._world.processes.which(PROGRAM)
        if program is None:
            raise Unsupported("a virtual machine under QEMU", f"{PROGRAM} is not installed", "apt-get install qemu-system-x86")
        if spec.shares and (spec.restore_from or spec.memory_file):
            raise Unsupported("a snapshot of a machine with shared folders", "QEMU cannot save what virtiofsd knows")
        files = (
            PlannedFile("listen", f"{spec.folder}/{CONTROL_SOCKET}"),
            PlannedFile("console"),
            PlannedFile("agent"),
            *(PlannedFile("tap", nic.tap) for nic in spec.nics),
        )
        return Plan(
            argv=(program, *arguments(spec)),
            env=dict(ENVIRONMENT),
            cwd=spec.folder,
            files=files,
            console="socket",
            agent="socket",
            own_network=True,
        )

    async def connect(self, spec: MachineSpec) -> "QemuControl":
        """Return the control of a machine; its socket is connected to when it is first needed."""
        return QemuControl(self._world, spec)

    async def _check(self) -> DriverCheck:
        program = self._world.processes.which(PROGRAM)
        if program is None:
            return DriverCheck(usable=False, why=f"{PROGRAM} is not installed (apt-get install qemu-system-x86)")
        try:
            done = await self._world.processes.run([program, "--version"], timeout_s=VERSION_TIMEOUT_S)
        except OSError as error:
            return DriverCheck(usable=False, why=f"{PROGRAM} does not run: {error.strerror}")
        lines = done.stdout.decode(errors="replace").splitlines()
        if done.returncode != 0 or not lines:
            return DriverCheck(usable=False, why=f"{PROGRAM} does not run")
        return DriverCheck(usable=True, why=lines[0].strip()[:200])


def arguments(spec: MachineSpec) -> tuple[str, ...]:
    """Return QEMU's arguments for a machine. Descriptors: 3 control, 4 console, 5 agent, 6 and up its taps."""
    bus = bus_of(spec)
    return (
        *("-name", spec.name, "-M", _machine(bus), *_accelerator(spec)),
        *("-m", f"{spec.memory_bytes // _MIB}M", "-smp", str(spec.vcpus), *_memory(spec)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-global", "virtio-mmio.force-legacy=false"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,resourcecontrol=deny"),
        *("-kernel", spec.kernel, "-initrd", spec.initrd, "-append", " ".join((*spec.cmdline, *_words(bus)))),
        *("-chardev", f"socket,id=qmp,fd={_FD_FIRST},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=console,fd={_FD_FIRST + 1}", "-serial", "chardev:console", "-device", "i8042"),
        *("-device", f"virtio-serial-{bus}", "-chardev", f"socket,id=agent,fd={_FD_FIRST + 2}"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"),
        *("-device", f"virtio-rng-{bus}", "-device", f"virtio-balloon-{bus},deflate-on-oom=on"),
        *_disks(spec, bus),
        *_nics(spec, bus),
        *_shares(spec, bus),
        *(("-incoming", "defer") if spec.restore_from else ()),
    )


class QemuControl:
    """See `machine.Control`.

    Args:
        world: Where the machine runs.
        spec: The machine.
    """

    def __init__(self, world: World, spec: MachineSpec) -> None:
        self._world = world
        self._spec = spec
        self._qmp: Qmp | None = None

    async def boot(self) -> None:
        """Restore, if that is asked for; a machine that boots does so by itself."""
        if not self._spec.restore_from:
            return
        await self._prepare_migration(ignores_shared=bool(self._spec.memory_file))
        await self._execute("migrate-incoming", uri=f"exec:cat {shlex.quote(f'{self._spec.restore_from}/{STATE_FILE}')}")
        if self._spec.memory_file:
            return  # it ran when it was saved, and does so again when it is there
        await self._wait_migration("restore")
        if await self.status() == "paused":
            await self.resume()

    async def pause(self) -> None:
        """Stop its processors."""
        await self._execute("stop")

    async def resume(self) -> None:
        """Let them go on."""
        await self._execute("cont")

    async def snapshot(self, folder: str) -> None:
        """Write the state, and the memory unless that lies in a file of a template's, into FOLDER/state, durable."""
        if self._spec.shares:
            raise Unsupported("a snapshot of a machine with shared folders", "QEMU cannot save what virtiofsd knows")
        is_template = bool(self._spec.memory_file) and not self._spec.restore_from
        await self._prepare_migration(ignores_shared=is_template)
        await self._execute("migrate-set-parameters", **{"max-bandwidth": _BYTES_PER_S_MAX})
        await self._migrate_to(folder)

    async def power_button(self) -> None:
        """Press Ctrl-Alt-Del: a guest of ours takes it, while it has no listener for ACPI's button."""
        for down in (True, False):
            await self._execute("input-send-event", events=[_key(key, down=down) for key in _KEYS])

    async def quit(self) -> None:
        """End QEMU."""
        await self._execute("quit")

    async def resize(self, *, vcpus: int | None, memory_bytes: int | None) -> tuple[str, ...]:
        """Take memory away by the balloon, or give it back, at most what it was started with."""
        notes = []
        if memory_bytes is not None:
            await self._execute("balloon", value=min(memory_bytes, self._spec.memory_bytes))
            if memory_bytes > self._spec.memory_bytes:
                notes.append(f"more than {self._spec.memory_bytes // _MIB} MiB of memory takes effect at the next start")
        if vcpus is not None and vcpus != self._spec.vcpus:
            notes.append("the number of processors takes effect at the next start")
        return tuple(notes)

    async def status(self) -> MachineStatus:
        """Ask for the run state."""
        found = await self._execute("query-status")
        return _STATUS.get(str(found.get("status")), "unknown") if isinstance(found, dict) else "unknown"

    def close(self) -> None:
        """Close the connection."""
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    # -- inside ----------------------------------------------------------------------------------------------------------

    async def _connected(self) -> Qmp:
        if self._qmp is None:
            self._qmp = await Qmp.connect(self._world, f"{self._spec.folder}/{CONTROL_SOCKET}", self._spec.name)
        return self._qmp

    async def _execute(self, command: str, **arguments: Any) -> Any:
        return await (await self._connected()).execute(command, **arguments)

    async def _prepare_migration(self, *, ignores_shared: bool) -> None:
        wanted = {"events": True, "x-ignore-shared": ignores_shared}
        capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
        await self._execute("migrate-set-capabilities", capabilities=capabilities)

    async def _wait_migration(self, action: str) -> None:
        qmp = await self._connected()
        while True:
            _, facts = await qmp.wait_event("MIGRATION", deadline_s=MIGRATE_TIMEOUT_S)
            if facts.get("status") == "completed":
                return
            if facts.get("status") in ("failed", "cancelled"):
                why = "QEMU could not move the machine's state; is the disk full, or the snapshot damaged?"
                raise RuntimeFailed(action, self._spec.name, why)

    async def _migrate_to(self, folder: str) -> None:
        path = f"{folder}/{STATE_FILE}"
        whole, part = shlex.quote(path), shlex.quote(f"{path}.part")
        async with self._world.disk.watch(folder) as changes:
            # The last word is the shell's: QEMU is content once the pipe took everything, whatever the disk said.
            await self._execute("migrate", uri=f"exec:cat >{part} && sync {part} && mv {part} {whole}")
            await self._wait_migration("save")
            try:
                async with asyncio.timeout(SPACE_TIMEOUT_S):
                    if await self._world.disk.stat(path) is None:
                        async for _ in changes:
                            if await self._world.disk.stat(path) is not None:
                                return
            except TimeoutError as error:
                raise RuntimeFailed("save", self._spec.name, f"the disk did not take {path}; is it full?") from error


def bus_of(spec: MachineSpec) -> Literal["device", "pci"]:
    """Return what virtio devices are called by on a machine: "device" on memory-mapped transports, "pci" on q35.

    The microvm machine has room for 24 devices: an image of very many layers gets q35.
    """
    n_devices = len(spec.disks) + len(spec.nics) + len(spec.shares) + _FIXED_DEVICES
    return "pci" if spec.machine == "q35" or n_devices > _TRANSPORTS_MAX else "device"


def _words(bus: str) -> Sequence[str]:
    return ("isopod.channel=serial",) if bus == "pci" else ("isopod.channel=serial", "pci=off")


def _machine(bus: str) -> str:
    kind = "q35" if bus == "pci" else "microvm,acpi=on,pit=off,pic=off,rtc=on,pcie=off,isa-serial=on"
    return f"{kind},memory-backend=mem"


def _accelerator(spec: MachineSpec) -> Sequence[str]:
    if spec.accelerator == "kvm":
        return ("-accel", "kvm", "-cpu", "host")
    # The code cache of the default size alone is 54 MB of every machine; a fifth level of page tables is walked for nothing.
    return ("-accel", "tcg,tb-size=32", "-cpu", "max,la57=off")


def _memory(spec: MachineSpec) -> Sequence[str]:
    """Return the memory. It has one name whatever it lies in, for what is saved names it."""
    size = f"size={spec.memory_bytes // _MIB}M"
    if spec.shares:
        return ("-object", f"memory-backend-memfd,id=mem,{size},share=on")
    if spec.memory_file:
        is_shared = "off" if spec.restore_from else "on"
        return ("-object", f"memory-backend-file,id=mem,{size},mem-path={_escape(spec.memory_file)},share={is_shared}")
    return ("-object", f"memory-backend-ram,id=mem,{size}")


def _disks(spec: MachineSpec, bus: str) -> Iterator[str]:
    for disk in spec.disks:
        mode = "read-only=on" if disk.read_only else "discard=unmap,detect-zeroes=unmap"
        yield from ("-drive", f"id={disk.serial},if=none,format=raw,{mode},file={_escape(disk.path)}")
        yield from ("-device", f"virtio-blk-{bus},drive={disk.serial},serial={disk.serial}")


def _nics(spec: MachineSpec, bus: str) -> Iterator[str]:
    for number, nic in enumerate(spec.nics):
        yield from ("-netdev", f"tap,id=n{number},fd={_FD_FIRST + 3 + number},vhost=off")
        rom = ",romfile=" if bus == "pci" else ""
        yield from ("-device", f"virtio-net-{bus},netdev=n{number},mac={nic.mac}{rom}")


def _shares(spec: MachineSpec, bus: str) -> Iterator[str]:
    for number, share in enumerate(spec.shares):
        yield from ("-chardev", f"socket,id=f{number},path={_escape(share.socket)}")
        yield from ("-device", f"vhost-user-fs-{bus},chardev=f{number},tag={share.tag}")


def _escape(path: str) -> str:
    """Return a path as it stands in a list of QEMU's options."""
    return path.replace(",", ",,")


def _key(key: str, *, down: bool) -> dict[str, Any]:
    return {"type": "key", "data": {"down": down, "key": {"type": "qcode", "data": key}}}
