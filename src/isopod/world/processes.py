"""Processes: the port to programs that run beside the node."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, NoReturn, Protocol

PipeDirection = Literal["read", "write"]
"""Seen from us: "read" is a pipe the child writes into."""


class ProcessIdentity(NamedTuple):
    """A pid that cannot be confused with a later process of the same number."""

    pid: int
    started_ticks: int
    """Field 22 of /proc/PID/stat: clock ticks after boot."""


class Completed(NamedTuple):
    """A finished program. `returncode` is negative for a signal."""

    returncode: int
    stdout: bytes
    stderr: bytes


class Pipe(Protocol):
    """Our end of a pipe."""

    async def read(self) -> bytes:
        """Return what is there, at most 64 KiB, waiting for the first byte; b"" at the end."""

    async def write(self, data: bytes) -> None:
        """Write all of `data`."""

    def close(self) -> None:
        """Close our end."""


class Process(Protocol):
    """A running child."""

    @property
    def identity(self) -> ProcessIdentity:
        """Who it is."""

    @property
    def pipes(self) -> Mapping[str, Pipe]:
        """Our ends of the pipes asked for, by environment name."""

    async def wait(self) -> int:
        """Return its exit status (negative for a signal); cancelling the wait leaves the child alone."""

    async def end(self) -> None:
        """Kill the child's whole session, and return when the child is reaped; one that has ended is fine. Our pipes stay open. Programs
        of the session that made process groups of their own are not reached."""


class Processes(Protocol):
    """Start, find and end programs. Failures are OSErrors (ENOENT for a missing program)."""

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", env: Mapping[str, str] | None = None, timeout_s: float = 30.0
    ) -> Completed:
        """Run a program to its end. On time-out or cancellation it is killed and reaped; a time-out raises DeadlineExceeded."""

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str = "/",
        pipes: Mapping[str, PipeDirection] | None = None,
    ) -> Process:
        """Start a program in a session of its own with /dev/null as stdio, which outlives us.

        Args:
            argv: Program and arguments; the program is an absolute path.
            env: Its whole environment.
            cwd: Its working folder.
            pipes: For each name a pipe is made, and the child finds its end's number in the environment variable of that name.
        """

    def which(self, program: str) -> str | None:
        """Return the absolute path of a program on PATH (and the sbin folders), or None."""

    def own_program(self, name: str) -> Sequence[str]:
        """Return how one of our own helper programs is called, before its arguments. There is "copier" (`world/host/copier.py`)."""

    def find(self, program: str) -> Sequence[tuple[ProcessIdentity, Sequence[str]]]:
        """Return the live processes that run the file `program`, with their arguments, ordered by pid.

        Only those of our own user and pid namespace: what stands in argv[0] can be claimed by anybody. Meant is the file, by whatever
        path it was started: ENOENT if there is none now, and who runs one that was replaced since is not found. A child that the
        program forked is found like its parent.
        """

    def identify(self, pid: int) -> ProcessIdentity | None:
        """Return the identity of a live (not zombie) process, or None."""

    async def wait_gone(self, identity: ProcessIdentity) -> None:
        """Return when that very process is gone (at once if it is already)."""

    def signal(self, identity: ProcessIdentity, signum: int) -> bool:
        """Send a signal to that very process; False if it is gone."""

    def signal_group(self, identity: ProcessIdentity, signum: int) -> bool:
        """Send a signal to the group that this very process leads, or to it alone if it leads none; False if it is gone."""

    def own_pid(self) -> int:
        """Return the node's own pid."""

    def abort(self, why: str) -> NoReturn:
        """End the own process at once, with the exit status 70 and without any cleaning up: nothing is flushed, closed or told.

        For the moment when going on would do harm: an fsync failed, a promise of the own code was broken.

        Args:
            why: One line for who looks at standard error.
        """

    def boot_id(self) -> str:
        """Return the kernel's identifier of this boot."""
