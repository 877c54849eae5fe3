"""Machines: what a driver is asked to run, what it plans, and how it is steered. Types only.

A driver knows one virtual machine monitor (VMM). It plans the command line; the shim (rust/guest) starts it and keeps its console and its
agent's channel; the driver's `Control` then speaks to the VMM's own control socket. The life cycle is not here (`isolation`): a driver
neither knows records nor decides anything.
"""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

MachineStatus = Literal["running", "paused", "shutdown", "panicked", "unknown"]
AGENT_PORT = "isopod.agent.0"
"""The name of the virtio-serial port of the agent."""
AGENT_VSOCK_PORT = 1024


class Disk(NamedTuple):
    """A block device. The guest finds it by its serial."""

    path: str
    serial: str
    read_only: bool


class Nic(NamedTuple):
    """A network interface: an existing tap, and the guest's address on it."""

    tap: str
    mac: str


class Share(NamedTuple):
    """A folder of the host, served to the guest by a virtiofsd."""

    tag: str
    socket: str
    read_only: bool


class MachineSpec(NamedTuple):
    """One machine to run."""

    id: str
    name: str
    vcpus: int
    memory_bytes: int
    kernel: str
    initrd: str
    cmdline: tuple[str, ...]
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    shares: tuple[Share, ...]
    folder: str
    """Where its sockets are; gone with it."""
    accelerator: Literal["kvm", "tcg"]
    config: str = ""
    """A flake, a module or a unit's name, for drivers that take one."""
    restore_from: str = ""
    """The folder of a snapshot to go on from, "" to boot."""
    machine: Literal["microvm", "q35"] = "microvm"
    memory_file: str = ""
    """The file that holds a template's memory. With `restore_from`: it is mapped privately, its pages are shared until they are written to.
    Without: the memory lies in that file, and a snapshot leaves it there. "" for memory of its own."""


class PlannedFile(NamedTuple):
    """A descriptor the VMM is started with. The first is number 3."""

    kind: Literal["listen", "console", "agent", "tap"]
    target: str = ""
    """A path to listen on, or the name of a tap."""


class Vsock(NamedTuple):
    """A hybrid vsock: a Unix socket that asks for a port in words."""

    path: str
    port: int


class Plan(NamedTuple):
    """How to start a VMM."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    files: tuple[PlannedFile, ...]
    console: Literal["socket", "stdio"]
    agent: Literal["socket", "none"] | Vsock
    own_network: bool
    """It gets a network namespace of its own, empty: its taps come as descriptors."""
    stop_argv: tuple[str, ...] = ()
    """Ends a machine that has no agent."""


class DriverCheck(NamedTuple):
    """Whether a driver can work here, and why."""

    usable: bool
    why: str


class Control(Protocol):
    """A running VMM's control socket. Each call has a deadline of its own.

    Raises, every call:
        RuntimeFailed: The VMM refused; its words are in the message.
        UnavailableError: It is gone, or did not answer in time.
    """

    async def boot(self) -> None:
        """Let it run: a machine that was just started, or one that goes on from a snapshot."""

    async def pause(self) -> None:
        """Stop its processors."""

    async def resume(self) -> None:
        """Let them go on."""

    async def snapshot(self, folder: str) -> None:
        """Write its memory and state into a folder that exists. It is paused before and stays so; QEMU's may also run, does not run any
        more afterwards, and what is restored from it runs at once."""

    async def power_button(self) -> None:
        """Ask the guest to end, the way a person at the machine would."""

    async def quit(self) -> None:
        """End the VMM."""

    async def resize(self, *, vcpus: int | None, memory_bytes: int | None) -> tuple[str, ...]:
        """Change what it has; return a note for what takes effect only at its next start."""

    async def status(self) -> MachineStatus:
        """Say what it does."""

    def close(self) -> None:
        """Let go; the machine goes on."""


class Driver(Protocol):
    """One kind of VMM."""

    @property
    def name(self) -> str:
        """What `--driver` calls it."""

    async def check(self) -> DriverCheck:
        """Say whether it can work here."""

    async def plan(self, spec: MachineSpec) -> Plan:
        """Return how to start a machine.

        Raises:
            Unsupported: It cannot run such a machine.
            RuntimeFailed: What it takes to plan failed, for instance a build.
        """

    async def connect(self, spec: MachineSpec) -> Control:
        """Connect to the control socket of a machine that runs.

        Raises:
            UnavailableError: It does not answer.
        """


class Built(Protocol):
    """What is built of a machine's configuration."""

    @property
    def current(self) -> str:
        """What its next start runs."""

    @property
    def booted(self) -> str:
        """What was started last, "" if nothing was."""


@runtime_checkable
class Builder(Protocol):
    """A driver that builds what it runs."""

    async def update(self, spec: MachineSpec) -> Built:
        """Build a machine's configuration anew, whatever runs; a start takes what was built last.

        Raises:
            InvalidArgument: The configuration makes no sense.
            RuntimeFailed: It cannot be built.
            ToolMissing: What builds it is missing.
            UnavailableError: The disk failed.
        """
