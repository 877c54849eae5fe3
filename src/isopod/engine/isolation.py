"""Isolation: what the life cycle asks of the thing that keeps sandboxes apart. Types only.

`containers` holds the records, the locks and the order of things; it knows neither namespaces nor virtual machines. What it needs done it
asks of the record's isolation: `container_isolation` (conmon and an OCI runtime) or `vm` (a shim and a virtual machine monitor).

The way of a start: `prepare`, `launch` (a supervisor exists and waits; who it is gets recorded), `Launch.create` (everything is there, the
command is not), `attach` if somebody watches, `begin`. The end is learned in one way only: the supervisor is gone, and `end` says how.
Rules: every method may be called again after it failed; `clear` takes whatever a killed daemon left; nothing here changes a record.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from isopod.api.machines import PathFacts, VmSnapshot
from isopod.api.messages import Container, Endpoint, ExecContainer, Image, Resources
from isopod.world.kernel import CgroupFigures, CgroupUsage
from isopod.world.processes import ProcessIdentity


class Output(NamedTuple):
    """Bytes a command wrote."""

    is_stderr: bool
    data: bytes


class Attached(Protocol):
    """A command's stdio, as long as both live."""

    def outputs(self) -> AsyncIterator[Output]:
        """Yield what the command writes until it closes its outputs."""

    async def write(self, data: bytes) -> bool:
        """Send input; False if the command reads no more."""

    def end_input(self) -> None:
        """Close the command's stdin."""

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal's new size."""

    def close(self) -> None:
        """Let go; the command runs on."""


class Command(Protocol):
    """One more command in a sandbox, running."""

    @property
    def attached(self) -> Attached:
        """Its stdio."""

    async def wait(self) -> int | None:
        """Return its exit code, None if whoever knew it is gone."""

    async def signal(self, signum: int) -> None:
        """Send it a signal; one that has ended is fine."""

    def close(self) -> None:
        """Let go of pipes and sockets; the command runs on."""

    async def clear(self) -> None:
        """Remove what was made for it, once it is over. Call it after `close`, in the background."""


class Launch(Protocol):
    """A supervisor that waits for the word. `create` is called once, or `abort`."""

    @property
    def supervisor(self) -> ProcessIdentity:
        """Who it is."""

    async def create(self) -> int:
        """Let it make the sandbox; return the pid of its first process (of a virtual machine: the monitor's).

        Raises:
            CommandNotRunnable: The command is missing or not executable.
            RuntimeFailed: It could not be made, or not in time; the supervisor is gone.
        """

    async def wait_supervisor(self) -> None:
        """Return when the supervisor has ended."""

    async def abort(self) -> None:
        """End the supervisor and what it started."""


class End(NamedTuple):
    """How a sandbox ended."""

    exit_code: int | None
    """None if nobody can tell."""
    why: str = ""
    """What was unusual about it; one line."""
    out_of_memory: bool = False


class Files(Protocol):
    """The files of one sandbox. Paths are absolute, inside it."""

    @property
    def unpacks(self) -> bool:
        """Whether `write` takes compressed archives."""

    async def look(self, path: str, *, follow: bool) -> PathFacts:
        """Return what is at a path.

        Raises:
            NotFound: A folder on the way is missing.
        """

    def read(self, path: str) -> AsyncGenerator[bytes, None]:
        """Yield a tar archive of a file or folder; a link at the path's end is packed as one.

        Raises:
            NotFound: No such file.
        """

    async def write(self, path: str, pieces: AsyncIterator[bytes]) -> None:
        """Unpack a tar archive in a folder.

        Raises:
            NotFound: No such folder.
            InvalidArgument: It is no archive, or leads out of the folder.
        """


class Isolation(Protocol):
    """One way to keep sandboxes apart."""

    needs_running: bool
    """Whether only one that runs shows its files."""

    async def check(self, record: Container) -> None:
        """Check, before a sandbox is created, that it can be kept in this way here.

        Raises:
            InvalidArgument, Unsupported, NotFound, ToolMissing: As they say.
        """

    async def prepare(self, record: Container, image: Image | None) -> Container:
        """Set what the sandbox stands on: files, network. Return the record with what became known of it.

        Raises:
            IsopodError: Nothing is left behind.
        """

    async def launch(self, record: Container) -> Launch:
        """Spawn the supervisor of a prepared sandbox; it waits."""

    async def attach(self, record: Container) -> Attached:
        """Connect to the stdio of the main command, before it begins or later."""

    async def begin(self, record: Container) -> None:
        """Let the main command of a created sandbox begin.

        Raises:
            CommandNotRunnable: The command is missing or not executable.
            RuntimeFailed: It was refused.
        """

    async def reserve(self, record: Container, session: str) -> None:
        """Make room for one more command. The sandbox does not end meanwhile: its lock is held."""

    async def exec(self, record: Container, request: ExecContainer, session: str) -> Command:
        """Start one more command, for which there is room.

        Raises:
            CommandNotRunnable: The command is missing or not executable.
            RuntimeFailed: It was refused, or not in time. The room is gone.
        """

    async def signal(self, record: Container, signum: int) -> None:
        """Send a signal to the main command; SIGKILL ends the sandbox whatever it does. One that has ended is fine."""

    async def pause(self, record: Container) -> None:
        """Freeze everything in it."""

    async def resume(self, record: Container) -> None:
        """Let it go on."""

    async def update(self, record: Container, resources: Resources) -> Sequence[str]:
        """Change the limits of one that runs; return notes on what takes effect only later.

        Raises:
            RuntimeFailed: Refused; some may have changed.
        """

    async def connect(self, record: Container, network: str) -> Endpoint:
        """Put one that runs on a network.

        Raises:
            NotFound, Exhausted, UnavailableError, Unsupported: Nothing is left behind.
        """

    async def disconnect(self, record: Container) -> None:
        """Take one that runs off its network. Raises UnavailableError, Unsupported."""

    def writable_layer(self, record: Container) -> str:
        """Return the folder with what it changed of its image. Raises Unsupported."""

    def files(self, record: Container, image: Image | None) -> AbstractAsyncContextManager[Files]:
        """Return its files, for as long as the context is open.

        Args:
            record: The sandbox.
            image: None for one that runs; of another its image, and its lock is held.

        Raises:
            WrongState: It must run, and does not.
            UnavailableError: Its root could not be mounted; nothing is left behind.
        """

    def usage(self, record: Container) -> CgroupUsage:
        """Return what it uses now.

        Raises:
            OSError, ValueError: It is just ending.
        """

    def figures(self, record: Container) -> CgroupFigures:
        """Return more of what it uses now.

        Raises:
            OSError, ValueError: It is just ending.
        """

    async def state(self, record: Container) -> tuple[str, int]:
        """Return the supervisor's word for its state ("created", "running", "paused", "stopped", "" if unknown) and its first pid."""

    async def end(self, record: Container) -> End:
        """Say how one ended whose supervisor is gone."""

    async def forget(self, identifier: str) -> None:
        """Remove what says how it ended. Raises UnavailableError."""

    async def clear(self, identifier: str, name: str, supervisor: ProcessIdentity | None = None) -> None:
        """Remove everything of a sandbox but its durable files, killing what is left of it.

        Raises:
            IsopodError, OSError: Something stays; call again.
        """

    async def leftovers(self) -> Sequence[str]:
        """Return the ids of sandboxes of which something is there that `clear` would remove."""

    async def ends(self) -> Sequence[str]:
        """Return the ids of sandboxes of which something says how they ended."""

    def strays(self, known: Collection[ProcessIdentity]) -> Sequence[tuple[str, ProcessIdentity]]:
        """Return (id, supervisor) of this instance's supervisors that are not known."""

    async def end_supervisor(self, supervisor: ProcessIdentity) -> None:
        """Kill a supervisor and what it is just doing, and wait until it is gone. Raises TimeoutError."""


class MachineState(NamedTuple):
    """What a virtual machine says of itself. None where it does not say."""

    machine: str
    """Its monitor's word: running, paused, shutdown, panicked or unknown."""
    agent: str | None
    """The version of the guest's agent."""
    guest_kernel: str | None
    silent_s: float | None
    """How long the guest has said nothing."""
    why: str = ""
    """Why it is not as it should be."""


class MachineIsolation(Isolation, Protocol):
    """What can be done to virtual machines only. A record whose `origin` is "snapshot NAME" when it is prepared goes on from that one:
    `begin` then takes up the command that runs in it."""

    async def write_snapshot(self, record: Container, snapshot: str) -> VmSnapshot:
        """Write memory, state and disk of one that runs or is paused; it stands still meanwhile and is then as before.

        Raises:
            AlreadyExists: There is one of that name.
            RuntimeFailed, UnavailableError: Nothing is left behind.
        """

    async def snapshots(self, identifier: str) -> Sequence[VmSnapshot]:
        """Return what is stored of one, newest first; those that cannot be read are left out."""

    async def remove_snapshot(self, record: Container, snapshot: str) -> None:
        """Remove one. Raises NotFound."""

    async def check_snapshot(self, record: Container, snapshot: str) -> None:
        """Check that one can be gone back to.

        Raises:
            NotFound: There is none of that name.
            Unsupported: It was made with another version, kernel or size.
            BadRecord: It is damaged.
        """

    async def rebuild(self, record: Container) -> tuple[str, str]:
        """Build the configuration of one anew, whatever runs.

        Returns:
            What its next start runs, and what was started last, "" if nothing was.

        Raises:
            Unsupported: It is made of no configuration that is built.
            ToolMissing, RuntimeFailed, UnavailableError: It cannot be built; nothing changed.
        """

    async def resize(self, record: Container, *, vcpus: int | None, memory_bytes: int | None) -> Sequence[str]:
        """Change what one that runs has; return notes on what takes effect only at its next start."""

    async def console(self, record: Container, *, tail_bytes: int) -> Attached:
        """Connect to its console; what it showed last comes first."""

    async def console_tail(self, record: Container, *, n_bytes: int) -> bytes:
        """Return what its console showed last, of one that has ended too; b"" if it showed nothing."""

    async def machine_state(self, record: Container) -> MachineState:
        """Ask it and its monitor, each with a short deadline."""
