"""Cloud Hypervisor: a VMM with hot-plug of processors and memory, shared folders, snapshots; KVM only.

The process starts empty, with the REST socket that the shim listens on already (descriptor 3: who connects early waits, nobody asks twice).
`boot` creates and boots the machine, or restores a snapshot and resumes it.

Rules: the vsock's path is relative to the machine's folder, which is the working folder. A snapshot names the disks, taps and sockets it
was made with; for a machine that has others a copy of the snapshot is made in its folder, with a configuration that names them. A machine
may grow while it runs to four times what it began with; that much is set aside at its start (address space, not memory).
Source: Cloud Hypervisor's OpenAPI document and docs/api.md, docs/hotplug.md, docs/snapshot_restore.md (39 and later).
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from isopod.engine.launch import ENVIRONMENT
from isopod.engine.vm.drivers.programs import (
    KvmProbe,
    check_kvm_program,
    demand,
    located,
    read_record,
    record_of,
    remove_stale,
    socket_path,
    write_record,
)
from isopod.engine.vm.drivers.rest import Json, Rest, words
from isopod.engine.vm.machine import AGENT_VSOCK_PORT, Control, DriverCheck, MachineSpec, MachineStatus, Plan, PlannedFile, Vsock
from isopod.world.errors import Disconnected, RuntimeFailed, UnavailableError, from_os_error
from isopod.world.world import World

NAME: Final = "cloud-hypervisor"
API_SOCKET: Final = "api.sock"
VSOCK_SOCKET: Final = "agent.sock"
HOW_TO_GET: Final = "take the static binary from its releases on GitHub and put it on PATH"
GUEST_CID: Final = 3
GROWTH: Final = 4
"""A running machine may have up to so many times the processors and the memory it began with."""
VCPUS_MAX: Final = 254
CONFIG_FILE: Final = "config.json"
STATE_FILE: Final = "state.json"
MEMORY_FILE: Final = "memory-ranges"
RESTORE_FOLDER: Final = "restore"
_PREFIX: Final = "/api/v1"
_BOOT_TIMEOUT_S: Final = 30.0
_SNAPSHOT_TIMEOUT_S: Final = 300.0
_CONFIG_BYTES_MAX: Final = 4 << 20
_STATES: Final[dict[str, MachineStatus]] = {
    "Created": "unknown",
    "Running": "running",
    "Paused": "paused",
    "Shutdown": "shutdown",
    "BreakPoint": "paused",
}
_GONE_TIMEOUT_S: Final = 1.0
_OK: Final = 200
_NOT_FOUND: Final = 404
_MEMORY_STEP_BYTES: Final = 128 << 20
"""What ACPI memory hot-plug adds is a multiple of this."""


class CloudHypervisorDriver:
    """Plans and steers Cloud Hypervisor.

    Args:
        world: The machine.
        kvm: Whether KVM comes up here.
        command: The program, and arguments before all others.
    """

    def __init__(self, world: World, *, kvm: KvmProbe, command: Sequence[str] = ("cloud-hypervisor",)) -> None:
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
            InvalidArgument: A size or a path makes no sense to it.
            UnavailableError: The disk failed.
        """
        demand(spec, NAME, vcpus_max=VCPUS_MAX, shares=True)
        command = located(self._world, self._command, HOW_TO_GET)
        api, vsock = socket_path(spec, API_SOCKET), socket_path(spec, VSOCK_SOCKET)
        await remove_stale(self._world, vsock)
        return Plan(
            argv=(*command, "--api-socket", "fd=3"),
            env=dict(ENVIRONMENT),
            cwd=spec.folder,
            files=(PlannedFile("listen", api),),
            console="stdio",
            agent=Vsock(vsock, AGENT_VSOCK_PORT),
            own_network=False,  # it opens its taps by name
        )

    async def connect(self, spec: MachineSpec) -> Control:
        """Connect to a process that was started by the plan. Raises UnavailableError."""
        rest = Rest(self._world, socket_path(spec, API_SOCKET), vmm=NAME, name=spec.name, prefix=_PREFIX)
        await rest.wait_ready("/vmm.ping")
        return CloudHypervisorControl(self._world, rest, spec)


class CloudHypervisorControl:
    """Steers one process. Calls are made one after the other; each looks at the state first, so that nothing is asked that is refused.

    Args:
        world: The machine.
        rest: Its interface.
        spec: The machine.
    """

    def __init__(self, world: World, rest: Rest, spec: MachineSpec) -> None:
        self._world = world
        self._rest = rest
        self._spec = spec
        self._lock = asyncio.Lock()

    async def boot(self) -> None:
        """Create the machine and boot it, or restore its snapshot and resume. See `Control`."""
        async with self._lock:
            state = await self._state()
            if state:
                raise RuntimeFailed("boot", self._spec.name, f"{NAME} has a machine already: {state.lower()}")
            if self._spec.restore_from:
                await self._restore()
            else:
                await self._put("create", "/vm.create", machine_config(self._spec))
                await self._put("boot", "/vm.boot", timeout_s=_BOOT_TIMEOUT_S)

    async def pause(self) -> None:
        """Stop its processors; fine if they are stopped."""
        async with self._lock:
            if await self._expect("pause") == "Running":
                await self._put("pause", "/vm.pause")

    async def resume(self) -> None:
        """Let them go on; fine if they do."""
        async with self._lock:
            if await self._expect("resume") == "Paused":
                await self._put("resume", "/vm.resume")

    async def snapshot(self, folder: str) -> None:
        """Write configuration, state, memory and a record into `folder`. The files of its disks are not part of it."""
        async with self._lock:
            if await self._expect("snapshot") != "Paused":
                raise RuntimeFailed("snapshot", self._spec.name, "it is not paused")
            await self._put("snapshot", "/vm.snapshot", {"destination_url": f"file://{folder}"}, timeout_s=_SNAPSHOT_TIMEOUT_S)
            await write_record(self._world, self._spec, NAME, folder)

    async def power_button(self) -> None:
        """Press the ACPI power button."""
        async with self._lock:
            if await self._expect("power off") != "Running":
                raise RuntimeFailed("power off", self._spec.name, "it is paused: resume it first")
            await self._put("power off", "/vm.power-button")

    async def quit(self) -> None:
        """End the process; one that is gone is fine."""
        async with self._lock:
            try:
                await self._put("quit", "/vmm.shutdown")
            except RuntimeFailed:
                raise
            except UnavailableError:
                if not await self._is_gone():
                    raise

    async def resize(self, *, vcpus: int | None, memory_bytes: int | None) -> tuple[str, ...]:
        """Add or take away processors, add memory, within what was set aside at the start; a note for all else."""
        async with self._lock:
            await self._expect("resize")
            config = await self._config()
            wanted: Json = {}
            notes = [*_fit_vcpus(config, vcpus, wanted), *_fit_memory(config, memory_bytes, wanted)]
            if wanted:
                await self._put("resize", "/vm.resize", wanted)
            return tuple(notes)

    async def status(self) -> MachineStatus:
        """Say what it does."""
        return _STATES.get(await self._state(), "unknown")

    def close(self) -> None:
        """Let go: no connection is kept between calls."""

    # --- restoring ------------------------------------------------------------------------------------------------------

    async def _restore(self) -> None:
        source = await self._source()
        try:
            await self._put("restore", "/vm.restore", {"source_url": f"file://{source}"}, timeout_s=_SNAPSHOT_TIMEOUT_S)
        finally:
            if source != self._spec.restore_from:  # a copy: its memory has been read, or nobody will
                await self._remove(source)
        await self._put("restore", "/vm.resume")

    async def _remove(self, folder: str) -> None:
        try:
            await self._world.disk.remove_tree(folder)
        except OSError as error:
            raise from_os_error(error, "remove", folder) from error

    async def _source(self) -> str:
        """Return the folder to restore from: the snapshot itself, or a copy that names this machine's disks and taps."""
        spec = self._spec
        record = await read_record(self._world, spec, NAME)
        if record == record_of(spec, NAME):
            return spec.restore_from
        target = f"{spec.folder}/{RESTORE_FOLDER}"
        await self._remove(target)
        disk = self._world.disk
        try:
            await disk.make_directory(target)
            data = await disk.read(f"{spec.restore_from}/{CONFIG_FILE}", n_bytes_max=_CONFIG_BYTES_MAX)
            await disk.write(f"{target}/{CONFIG_FILE}", relocated(data, spec))
            for file in (STATE_FILE, MEMORY_FILE):
                await disk.copy_file(f"{spec.restore_from}/{file}", f"{target}/{file}")
        except OSError as error:
            raise from_os_error(error, "copy", spec.restore_from) from error
        return target

    # --- the wire -------------------------------------------------------------------------------------------------------

    async def _put(self, action: str, path: str, body: Json | None = None, *, timeout_s: float = 10.0) -> None:
        await self._rest.call(action, "PUT", path, body, timeout_s=timeout_s)

    async def _state(self) -> str:
        """Return what it says of its machine, "" if it has none."""
        answer = await self._rest.ask("GET", "/vm.info")
        if answer.status == _NOT_FOUND:
            return ""
        state = answer.value.get("state") if isinstance(answer.value, dict) else None
        if answer.status != _OK or not isinstance(state, str):
            why = words(answer.value) if answer.status >= 400 else ""
            raise RuntimeFailed("ask for the state of", self._spec.name, why or f"{NAME}'s answer makes no sense")
        return state

    async def _config(self) -> Json:
        value = await self._rest.call("ask for the size of", "GET", "/vm.info")
        config = value.get("config") if isinstance(value, dict) else None
        if not isinstance(config, dict):
            raise RuntimeFailed("ask for the size of", self._spec.name, f"{NAME}'s answer makes no sense")
        return config

    async def _expect(self, action: str) -> str:
        """Return "Running" or "Paused". Raises RuntimeFailed for anything else."""
        state = await self._state()
        if state not in ("Running", "Paused"):
            raise RuntimeFailed(action, self._spec.name, f"{NAME} says it is {state.lower() or 'not created'}")
        return state

    async def _is_gone(self) -> bool:
        try:
            await self._rest.ask("GET", "/vmm.ping", timeout_s=_GONE_TIMEOUT_S)
        except UnavailableError as error:
            return isinstance(error.__cause__, Disconnected)
        return False


def machine_config(spec: MachineSpec) -> Json:
    """Return the body of vm.create."""
    grown = spec.memory_bytes * (GROWTH - 1)
    return {
        "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": min(spec.vcpus * GROWTH, VCPUS_MAX), "nested": False},
        "memory": {
            "size": spec.memory_bytes,
            "hotplug_method": "Acpi",
            "hotplug_size": grown - grown % _MEMORY_STEP_BYTES,
            "shared": bool(spec.shares),
        },
        "payload": {
            key: value
            for key, value in (
                ("kernel", spec.kernel),
                ("initramfs", spec.initrd),
                ("cmdline", " ".join((*spec.cmdline, "isopod.channel=vsock"))),
            )
            if value
        },
        "disks": [
            {"id": disk.serial, "serial": disk.serial, "path": disk.path, "readonly": disk.read_only, "image_type": "Raw", "sparse": False}
            for disk in spec.disks
        ],
        "net": [{"id": f"eth{number}", "tap": nic.tap, "mac": nic.mac} for number, nic in enumerate(spec.nics)],
        "fs": [{"id": share.tag, "tag": share.tag, "socket": share.socket, "num_queues": 1, "queue_size": 1024} for share in spec.shares],
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "vsock": {"cid": GUEST_CID, "socket": VSOCK_SOCKET},
    }


def relocated(config: bytes, spec: MachineSpec) -> bytes:
    """Return a snapshot's configuration with this machine's disks, taps and shares in the place of those it was made with.

    Raises:
        RuntimeFailed: It is no configuration, or of a machine with other devices.
    """
    try:
        found = msgspec.json.decode(config, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise RuntimeFailed("restore", spec.name, f"the snapshot's {CONFIG_FILE} is damaged: {error}") from error
    plan = machine_config(spec)
    for kind, keys in (("disks", ("path",)), ("net", ("tap", "mac")), ("fs", ("socket",))):
        theirs, ours = found.get(kind) or [], plan[kind]
        if not isinstance(theirs, list) or [_id(each) for each in theirs] != [each["id"] for each in ours]:
            raise RuntimeFailed("restore", spec.name, f"the snapshot's {kind} are not the machine's")
        for old, new in zip(theirs, ours, strict=True):
            old.update({key: new[key] for key in keys})
    return msgspec.json.encode(found)


def _id(device: object) -> object:
    return device.get("id") if isinstance(device, dict) else None


def _fit_vcpus(config: Json, vcpus: int | None, wanted: Json) -> list[str]:
    """Put what can be had at once into `wanted`; return notes for what cannot."""
    cpus = config.get("cpus") or {}
    if vcpus is None or vcpus == cpus.get("boot_vcpus"):
        return []
    most = int(cpus.get("max_vcpus") or 0)
    if 1 <= vcpus <= most:
        wanted["desired_vcpus"] = vcpus
        return []
    return [f"vcpus: {vcpus} at the next start only, {most} were set aside"]


def _fit_memory(config: Json, memory_bytes: int | None, wanted: Json) -> list[str]:
    memory = config.get("memory") or {}
    present = int(memory.get("size") or 0)
    if memory_bytes is None or memory_bytes == present:
        return []
    most = int(memory.get("hotplug_size") or 0) * GROWTH // (GROWTH - 1)  # `size` grows with the machine, this does not
    if present < memory_bytes <= most and not (memory_bytes - present) % _MEMORY_STEP_BYTES:
        wanted["desired_ram"] = memory_bytes
        return []
    if memory_bytes < present:
        return ["memory: less of it at the next start only"]
    if memory_bytes > most:
        return [f"memory: {memory_bytes} bytes at the next start only, {most} were set aside"]
    return [f"memory: at the next start only, as it grows in steps of {_MEMORY_STEP_BYTES >> 20} MiB"]
