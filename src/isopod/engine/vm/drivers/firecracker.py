"""Firecracker: AWS' VMM. Tap and disk, one vsock, snapshots; no folders to share, no hot-plug of processors or memory, KVM only.

The process starts empty, with its REST socket in the machine's folder. `boot` then tells it everything, in this order, and lets it go:
machine-config, boot-source, drives, network-interfaces, entropy, vsock, InstanceStart. A snapshot is loaded only by a process that was told
nothing yet; what differs (taps, disks) is put right between loading and resuming.

Rules: the vsock's path is relative, and each process has its machine's folder as working folder, so that a snapshot's clones do not fight
for one socket. Disks are attached in the order of the plan, and the guest finds them by that order: Firecracker makes up the serial numbers
of disks itself, so the kernel's command line says which is which (`isopod.disks=NAME,NAME,...`: vda, vdb, ...). It has no verb that ends
it, so `quit` kills it. A guest ends it by rebooting (`reboot=k` or `t`), not by powering off: there is no power to switch.
Source: Firecracker's OpenAPI document and its docs on snapshots and vsock (1.7 and later).
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Final

from isopod.engine.launch import ENVIRONMENT
from isopod.engine.vm.drivers.programs import (
    KvmProbe,
    check_kvm_program,
    demand,
    kill,
    located,
    read_record,
    remove_stale,
    socket_path,
    write_record,
)
from isopod.engine.vm.drivers.rest import Answer, Json, Rest
from isopod.engine.vm.machine import AGENT_VSOCK_PORT, Control, DriverCheck, MachineSpec, MachineStatus, Plan, Vsock
from isopod.world.errors import InvalidArgument, RuntimeFailed, Unsupported
from isopod.world.world import World

NAME: Final = "firecracker"
API_SOCKET: Final = "api.sock"
VSOCK_SOCKET: Final = "agent.sock"
STATE_FILE: Final = "state"
MEMORY_FILE: Final = "memory"
HOW_TO_GET: Final = "take the static binary from its releases on GitHub and put it on PATH"
GUEST_CID: Final = 3
"""The same for all: each process has a vsock of its own."""
VCPUS_MAX: Final = 32
DEVICES_MAX: Final = 17
"""Of virtio-mmio: each has an interrupt line of its own, 5 to 23, and Firecracker keeps two."""
_OWN_DEVICES: Final = 2
"""Vsock and entropy."""
_BOOT_TIMEOUT_S: Final = 30.0
_SNAPSHOT_TIMEOUT_S: Final = 300.0
_ARGUMENTS: Final = ("reboot=k", "pci=off", "isopod.channel=vsock")
_DRIVE_ID: Final = re.compile(r"[A-Za-z0-9_]{1,20}")
_STATES: Final[dict[str, MachineStatus]] = {"Not started": "unknown", "Running": "running", "Paused": "paused"}
_MEBIBYTE: Final = 1 << 20


class FirecrackerDriver:
    """Plans and steers Firecracker.

    Args:
        world: The machine.
        kvm: Whether KVM comes up here.
        command: The program, and arguments before all others.
    """

    def __init__(self, world: World, *, kvm: KvmProbe, command: Sequence[str] = ("firecracker",)) -> None:
        self._world = world
        self._kvm = kvm
        self._command = tuple(command)

    @property
    def name(self) -> str:
        """What `--driver` calls it."""
        return NAME

    async def check(self) -> DriverCheck:
        """Say whether it can work here."""
        return await check_kvm_program(self._world, self._command, kvm=self._kvm, how_to_get=HOW_TO_GET)

    async def plan(self, spec: MachineSpec) -> Plan:
        """Return how to start a machine.

        Raises:
            Unsupported: It is not installed, or cannot run such a machine.
            InvalidArgument: A size, a path or a disk's serial makes no sense to it.
            UnavailableError: The disk failed.
        """
        demand(spec, NAME, vcpus_max=VCPUS_MAX, shares=False)
        n_devices = len(spec.disks) + len(spec.nics) + _OWN_DEVICES
        if n_devices > DEVICES_MAX:
            raise Unsupported(
                f"{n_devices} devices with {NAME}", f"it takes {DEVICES_MAX}", "use --driver qemu, or an image of fewer layers"
            )
        for disk in spec.disks:
            if not _DRIVE_ID.fullmatch(disk.serial):
                raise InvalidArgument("disk serial", disk.serial, "must be up to 20 letters, digits and _")
        command = located(self._world, self._command, HOW_TO_GET)
        api, vsock = socket_path(spec, API_SOCKET), socket_path(spec, VSOCK_SOCKET)
        await remove_stale(self._world, api, vsock)
        return Plan(
            argv=(*command, "--api-sock", api, "--id", _instance_id(spec.id), "--level", "Error"),
            env=dict(ENVIRONMENT),
            cwd=spec.folder,
            files=(),
            console="stdio",
            agent=Vsock(vsock, AGENT_VSOCK_PORT),
            own_network=False,  # it opens its taps by name
        )

    async def connect(self, spec: MachineSpec) -> Control:
        """Connect to a process that was started by the plan. Raises UnavailableError."""
        rest = Rest(self._world, socket_path(spec, API_SOCKET), vmm=NAME, name=spec.name)
        await rest.wait_ready("/")
        return FirecrackerControl(self._world, rest, spec, program=located(self._world, self._command, HOW_TO_GET)[0])


class FirecrackerControl:
    """Steers one process. Calls are made one after the other; each looks at the state first, so that nothing is asked that is refused.

    Args:
        world: The machine.
        rest: Its interface.
        spec: The machine.
        program: The file that the process runs.
    """

    def __init__(self, world: World, rest: Rest, spec: MachineSpec, *, program: str) -> None:
        self._world = world
        self._rest = rest
        self._spec = spec
        self._program = program
        self._lock = asyncio.Lock()

    async def boot(self) -> None:
        """Configure the machine and start it, or load its snapshot and resume. See `Control`."""
        async with self._lock:
            state = await self._state()
            if state != "Not started":
                raise RuntimeFailed("boot", self._spec.name, f"firecracker was started already: {state}")
            if self._spec.restore_from:
                await self._restore()
            else:
                await self._configure()
                await self._put("boot", "/actions", {"action_type": "InstanceStart"}, timeout_s=_BOOT_TIMEOUT_S)

    async def pause(self) -> None:
        """Stop its processors; fine if they are stopped."""
        async with self._lock:
            if await self._expect("pause") == "Running":
                await self._patch("pause", "/vm", {"state": "Paused"})

    async def resume(self) -> None:
        """Let them go on; fine if they do."""
        async with self._lock:
            if await self._expect("resume") == "Paused":
                await self._patch("resume", "/vm", {"state": "Resumed"})

    async def snapshot(self, folder: str) -> None:
        """Write STATE_FILE, MEMORY_FILE and a record into `folder`. The files of its disks are not part of it."""
        async with self._lock:
            if await self._expect("snapshot") != "Paused":
                raise RuntimeFailed("snapshot", self._spec.name, "it is not paused")
            body = {"snapshot_type": "Full", "snapshot_path": f"{folder}/{STATE_FILE}", "mem_file_path": self._memory(folder)}
            await self._put("snapshot", "/snapshot/create", body, timeout_s=_SNAPSHOT_TIMEOUT_S)
            await write_record(self._world, self._spec, NAME, folder)

    async def power_button(self) -> None:
        """Press ctrl-alt-del."""
        async with self._lock:
            if await self._expect("power off") != "Running":
                raise RuntimeFailed("power off", self._spec.name, "it is paused: resume it first")
            await self._put("power off", "/actions", {"action_type": "SendCtrlAltDel"})

    async def quit(self) -> None:
        """Kill it: it has no verb for that."""
        await kill(self._world, self._program, socket_path(self._spec, API_SOCKET), name=self._spec.name)

    async def resize(self, *, vcpus: int | None, memory_bytes: int | None) -> tuple[str, ...]:
        """Change nothing: Firecracker adds no processors or memory to a machine that runs. Every change is a note."""
        changes = (("vcpus", vcpus, self._spec.vcpus), ("memory", memory_bytes, self._spec.memory_bytes))
        return tuple(
            f"{what}: {NAME} changes it at the next start only" for what, wanted, present in changes if wanted not in (None, present)
        )

    async def status(self) -> MachineStatus:
        """Say what it does."""
        return _STATES.get(await self._state(), "unknown")

    def close(self) -> None:
        """Let go: no connection is kept between calls."""

    # --- what it is told ------------------------------------------------------------------------------------------------

    async def _configure(self) -> None:
        spec = self._spec
        await self._put("configure", "/machine-config", {"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_bytes // _MEBIBYTE})
        source = {"kernel_image_path": spec.kernel, "initrd_path": spec.initrd, "boot_args": _boot_arguments(spec)}
        await self._put("configure", "/boot-source", {key: value for key, value in source.items() if value})
        for disk in spec.disks:
            body = {"drive_id": disk.serial, "path_on_host": disk.path, "is_root_device": False, "is_read_only": disk.read_only}
            await self._put("configure", f"/drives/{disk.serial}", body)
        for number, nic in enumerate(spec.nics):
            interface = {"iface_id": f"eth{number}", "host_dev_name": nic.tap, "guest_mac": nic.mac}
            await self._put("configure", f"/network-interfaces/eth{number}", interface)
        await self._put("configure", "/entropy", {})
        await self._put("configure", "/vsock", {"guest_cid": GUEST_CID, "uds_path": VSOCK_SOCKET})

    async def _restore(self) -> None:
        """Load the snapshot, give the machine its own disks (of a clone they are others), and let it go on."""
        spec = self._spec
        record = await read_record(self._world, spec, NAME)
        taps = [
            {"iface_id": f"eth{number}", "host_dev_name": nic.tap}
            for number, (nic, (tap, _)) in enumerate(zip(spec.nics, record.nics, strict=True))
            if nic.tap != tap
        ]
        body = {
            "snapshot_path": f"{spec.restore_from}/{STATE_FILE}",
            "mem_backend": {"backend_type": "File", "backend_path": self._memory(spec.restore_from)},
            "resume_vm": False,
            **({"network_overrides": taps} if taps else {}),
        }
        await self._put("restore", "/snapshot/load", body, timeout_s=_SNAPSHOT_TIMEOUT_S)
        for disk, (_, path) in zip(spec.disks, record.disks, strict=True):
            if disk.path != path:
                await self._patch("restore", f"/drives/{disk.serial}", {"drive_id": disk.serial, "path_on_host": disk.path})
        await self._patch("restore", "/vm", {"state": "Resumed"})

    def _memory(self, folder: str) -> str:
        """Return where the memory of a snapshot lies; it is mapped privately, so that clones share what they do not write to."""
        return self._spec.memory_file or f"{folder}/{MEMORY_FILE}"

    # --- the wire -------------------------------------------------------------------------------------------------------

    async def _put(self, action: str, path: str, body: Json, *, timeout_s: float = 10.0) -> None:
        await self._rest.call(action, "PUT", path, body, timeout_s=timeout_s)

    async def _patch(self, action: str, path: str, body: Json) -> None:
        await self._rest.call(action, "PATCH", path, body)

    async def _state(self) -> str:
        answer: Answer = await self._rest.ask("GET", "/")
        state = answer.value.get("state") if isinstance(answer.value, dict) else None
        if answer.status != 200 or not isinstance(state, str):
            raise RuntimeFailed("ask for the state of", self._spec.name, f"{NAME}'s answer makes no sense")
        return state

    async def _expect(self, action: str) -> str:
        """Return "Running" or "Paused". Raises RuntimeFailed for anything else."""
        state = await self._state()
        if state not in ("Running", "Paused"):
            raise RuntimeFailed(action, self._spec.name, f"{NAME} says it is {state.lower()}")
        return state


def _boot_arguments(spec: MachineSpec) -> str:
    given = [word.partition("=")[0] for word in spec.cmdline]
    added = [word for word in _ARGUMENTS if word.partition("=")[0] not in given]
    names = ",".join(disk.serial for disk in spec.disks)
    return " ".join((*spec.cmdline, *added, *((f"isopod.disks={names}",) if names else ())))


def _instance_id(identifier: str) -> str:
    """Return what Firecracker takes as an id: at most 64 letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9-]", "-", identifier)[:64]
