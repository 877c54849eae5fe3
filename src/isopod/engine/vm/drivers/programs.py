"""Programs: what the drivers share about the programs they start: found, asked for their version, checked, killed.

No driver, and nothing of a machine's life.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from isopod.engine.launch import ENVIRONMENT
from isopod.engine.vm.drivers.rest import SOCKET_PATH_BYTES_MAX
from isopod.engine.vm.machine import DriverCheck, MachineSpec
from isopod.world.errors import DeadlineExceeded, InvalidArgument, RuntimeFailed, UnavailableError, Unsupported, from_os_error
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

SNAPSHOT_RECORD: Final = "machine.json"
_VERSION_TIMEOUT_S: Final = 10.0
_KILL_TIMEOUT_S: Final = 10.0
_SIGKILL: Final = 9
_MEBIBYTE: Final = 1 << 20

KvmProbe = Callable[[], Awaitable[DriverCheck]]
"""Says whether a guest comes up under KVM here, and why."""


class SnapshotRecord(msgspec.Struct, frozen=True):
    """What a snapshot was made of: written beside it, and compared before it is restored.

    Attributes:
        driver: Whose snapshot it is.
        vcpus: Of the machine.
        memory_bytes: Of the machine.
        disks: Their (serial, path), in order.
        nics: Their (tap, MAC), in order.
    """

    driver: str
    vcpus: int
    memory_bytes: int
    disks: tuple[tuple[str, str], ...]
    nics: tuple[tuple[str, str], ...]


def located(world: World, command: Sequence[str], how_to_get: str) -> tuple[str, ...]:
    """Return a command with its program's absolute path. Raises Unsupported if there is none, with the hint how to get it."""
    found = world.processes.which(command[0])
    if found is None:
        raise Unsupported(f"a machine run by {command[0]}", "it is not installed", how_to_get)
    return (found, *command[1:])


async def version(world: World, command: Sequence[str]) -> str:
    """Return the first line of a program's --version, "" if it does not run."""
    try:
        done = await world.processes.run([*command, "--version"], env=ENVIRONMENT, timeout_s=_VERSION_TIMEOUT_S)
    except (OSError, DeadlineExceeded):
        return ""
    lines = done.stdout.decode(errors="replace").splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""


async def check_kvm_program(world: World, command: Sequence[str], *, kvm: KvmProbe, how_to_get: str) -> DriverCheck:
    """Say whether a VMM that needs KVM can work here.

    Args:
        world: The machine.
        command: The VMM's program and its leading arguments.
        kvm: Whether KVM comes up.
        how_to_get: Where the program is from.
    """
    found = world.processes.which(command[0])
    if found is None:
        return DriverCheck(usable=False, why=f"{command[0]} is not installed: {how_to_get}")
    told = await version(world, [found, *command[1:]])
    if not told:
        return DriverCheck(usable=False, why=f"{found} does not run")
    accelerated = await kvm()
    if not accelerated.usable:
        return DriverCheck(usable=False, why=f"{told}, but it needs KVM: {accelerated.why}")
    return DriverCheck(usable=True, why=told)


def demand(spec: MachineSpec, driver: str, *, vcpus_max: int, shares: bool) -> None:
    """Refuse a machine that a KVM-only driver cannot run.

    Raises:
        Unsupported: It cannot.
        InvalidArgument: Its sizes make no sense.
    """
    elsewhere = "use --driver qemu"
    if spec.accelerator != "kvm":
        raise Unsupported(driver, "it needs KVM, and guests do not come up under KVM on this machine", elsewhere)
    if spec.machine != "microvm":
        raise Unsupported(f"a {spec.machine} machine with {driver}", "it knows one kind of machine", elsewhere)
    if spec.shares and not shares:
        raise Unsupported(f"sharing folders with {driver}", "it has no virtiofs", f"{elsewhere}, or give the guest a disk")
    if not 1 <= spec.vcpus <= vcpus_max:
        raise Unsupported(f"{spec.vcpus} vcpus with {driver}", f"it takes 1 to {vcpus_max}", elsewhere)
    if spec.memory_bytes <= 0 or spec.memory_bytes % _MEBIBYTE:
        raise InvalidArgument("memory", spec.memory_bytes, "must be a whole number of MiB")


def socket_path(spec: MachineSpec, file: str) -> str:
    """Return the path of a socket in the machine's folder. Raises InvalidArgument if the kernel takes no such path."""
    path = f"{spec.folder}/{file}"
    if len(path.encode()) > SOCKET_PATH_BYTES_MAX:
        raise InvalidArgument(
            "path", path, f"longer than the {SOCKET_PATH_BYTES_MAX} bytes of a socket's path", "choose a shorter --run-root"
        )
    return path


async def remove_stale(world: World, *paths: str) -> None:
    """Remove sockets that an earlier VMM left: a new one refuses to bind them. Raises UnavailableError."""
    for path in paths:
        try:
            await world.disk.remove(path)
        except OSError as error:
            raise from_os_error(error, "remove", path) from error


async def kill(world: World, program: str, argument: str, *, name: str) -> None:
    """Kill the process that runs `program` with this argument, and return when it is gone; none is fine.

    Raises:
        UnavailableError: It does not end.
    """
    try:
        running = world.processes.find(program)
    except OSError:  # the program was removed meanwhile, or its folder was
        running = ()
    for identity, argv in running:
        if argument in argv:
            await kill_process(world, identity, name=name)


async def kill_process(world: World, identity: ProcessIdentity, *, name: str) -> None:
    """Kill that very process, and return when it is gone. Raises UnavailableError if it does not end."""
    world.processes.signal(identity, _SIGKILL)
    try:
        async with asyncio.timeout(_KILL_TIMEOUT_S):
            await world.processes.wait_gone(identity)
    except TimeoutError as error:
        raise UnavailableError(f"the machine monitor of {name} (pid {identity.pid}) does not end within {_KILL_TIMEOUT_S:g} s") from error


def record_of(spec: MachineSpec, driver: str) -> SnapshotRecord:
    """Return what a snapshot of this machine is made of."""
    disks = tuple((disk.serial, disk.path) for disk in spec.disks)
    return SnapshotRecord(driver, spec.vcpus, spec.memory_bytes, disks, tuple((nic.tap, nic.mac) for nic in spec.nics))


async def write_record(world: World, spec: MachineSpec, driver: str, folder: str) -> None:
    """Write the record of a snapshot beside it. Raises UnavailableError."""
    path = f"{folder}/{SNAPSHOT_RECORD}"
    try:
        await world.disk.write_atomic(path, msgspec.json.encode(record_of(spec, driver)))
    except OSError as error:
        raise from_os_error(error, "write", path) from error


async def read_record(world: World, spec: MachineSpec, driver: str) -> SnapshotRecord:
    """Return the record of the snapshot that a machine goes on from.

    Raises:
        RuntimeFailed: It is none, it is damaged, or it is another machine's.
    """
    path = f"{spec.restore_from}/{SNAPSHOT_RECORD}"
    try:
        record = msgspec.json.decode(await world.disk.read(path, n_bytes_max=1 << 20), type=SnapshotRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise RuntimeFailed("restore", spec.name, f"{spec.restore_from} holds no whole snapshot: {error}") from error
    wanted = record_of(spec, driver)
    facts = (
        ("driver", record.driver, wanted.driver),
        ("vcpus", record.vcpus, wanted.vcpus),
        ("memory", record.memory_bytes, wanted.memory_bytes),
        ("disks", [serial for serial, _ in record.disks], [serial for serial, _ in wanted.disks]),
        ("network interfaces", len(record.nics), len(wanted.nics)),
    )
    for what, theirs, ours in facts:
        if theirs != ours:
            raise RuntimeFailed("restore", spec.name, f"the snapshot's {what}: {theirs}, the machine's: {ours}")
    return record
