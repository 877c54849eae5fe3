"""SimProcesses: the Processes port over the process table.

Programs are coroutines registered by absolute path; a program exists if its file does. Legal behaviours: small seeded delays; a child
outlives who spawned it; pids rise and are never used again. `registry` is open: a test may add programs of its own.

Faults, only when a test asks for them: a program cannot be started (`fail_next`) or takes longer to (`delay_s`); any process hangs
(`table.stop`, or the signal SIGSTOP), is killed, or dies of memory (`table.charge_memory`).
"""

import asyncio
import errno
import hashlib
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from isopod.world.errors import DeadlineExceeded
from isopod.world.processes import Completed, Pipe, PipeDirection, ProcessIdentity
from isopod.world.processes import Process as ProcessPort
from isopod.world.processes import Processes as ProcessesPort
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.pipes import ReadEnd, WriteEnd, open_pipe
from isopod.world.sim.table import SIGKILL, ProcessTable, SimProcess
from isopod.world.sim.view import View, fail

if TYPE_CHECKING:
    from isopod.world.sim.machine import Machine

Program = Callable[["Machine", SimProcess], Coroutine[Any, Any, int]]
"""The code of a program: given the machine and its process, it returns its exit status."""

_PATH: Final = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
OUTPUT_BYTES_MAX: Final = 16 << 20
ABORT_STATUS: Final = 70
_SPAWN_S: Final = (300e-6, 2e-3)
_EXECUTABLE: Final = 0o111
_NODE_UID: Final = 0


class Abort(NamedTuple):
    """A process that ended itself."""

    pid: int
    name: str
    why: str


class SimChild:
    """A process that the node spawned, as the port shows it.

    Args:
        loop: To find who asks.
        table: All processes.
        process: The process.
        pipes: The node's ends of its pipes.
    """

    def __init__(self, loop: SimLoop, table: ProcessTable, process: SimProcess, pipes: Mapping[str, Pipe]) -> None:
        self._loop = loop
        self._table = table
        self._process = process
        self._pipes = dict(pipes)

    @property
    def identity(self) -> ProcessIdentity:
        """Who it is."""
        return self._process.identity

    @property
    def pipes(self) -> Mapping[str, Pipe]:
        """Our ends of the pipes asked for."""
        return self._pipes

    async def wait(self) -> int:
        """Return its exit status (negative for a signal)."""
        return await self._process.wait()

    async def end(self) -> None:
        """Kill the child's whole session and wait for the child."""
        self._loop.owner().check()
        if self._process.is_alive:
            self._table.signal_session(self._process.pid, SIGKILL)
        await self._process.wait()


class SimProcesses:
    """The Processes port of the simulation.

    Args:
        loop: The loop.
        chance: For delays.
        view: Where programs are files.
        table: The processes.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, view: View, table: ProcessTable) -> None:
        self.table = table
        self.registry: dict[str, Program] = {}
        self.n_boots = 1
        self._failures: list[int] = []
        self.delay_s = 0.0
        """What starting a program takes longer."""
        self.aborts: list[Abort] = []
        """Who called `abort`, oldest first, and why."""
        self._loop = loop
        self._chance = chance
        self._view = view
        self._machine: Machine | None = None

    def fail_next(self, number: int, *, times: int = 1) -> None:
        """Let the next `run` or `spawn` fail with that errno (EAGAIN and ENOMEM are fork's), having started nothing."""
        self._failures += [number] * times

    # -- programs --------------------------------------------------------------------------------------------------------------------

    def bind(self, machine: "Machine") -> None:
        """Name the machine that programs run on. Called once, by the machine."""
        self._machine = machine

    def install(self, path: str, program: Program) -> None:
        """Put a program on the machine."""
        self._view.make_folders(path.rpartition("/")[0], 0o755)
        self._view.write(path, b"\x7fELF simulated\n", 0o755)
        self.registry[path] = program

    def start(self, process: SimProcess) -> None:
        """Run the program that argv[0] of a new process names. ENOENT, EACCES, ENOEXEC; the process is gone then."""
        path = process.argv[0]
        try:
            inode = self._view.open_file(path)
            if not inode.mode & _EXECUTABLE:
                fail(errno.EACCES, path)
            program = self.registry.get(path)
            if program is None or self._machine is None:
                fail(errno.ENOEXEC, path)
        except OSError:
            self.table.end(process, 127)
            raise
        machine, process.program = self._machine, inode
        self.table.run(process, lambda running: program(machine, running))

    # -- the port --------------------------------------------------------------------------------------------------------------------

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", env: Mapping[str, str] | None = None, timeout_s: float = 30.0
    ) -> Completed:
        """Run a program to its end. Output of helpers that outlive it is not waited for; more than 16 MiB of output raises EFBIG."""
        await self._pause()
        program = argv[0] if "/" in argv[0] else self.which(argv[0])
        if program is None:
            fail(errno.ENOENT, argv[0])
        process = self.table.add([program, *argv[1:]], env or {}, "/")
        feed, out, err = self._connect(process)
        self.start(process)
        outputs = [bytearray(), bytearray()]
        copies = [
            self._loop.create_task(_feed(feed, stdin)),
            self._loop.create_task(_collect(out, outputs[0])),
            self._loop.create_task(_collect(err, outputs[1])),
        ]
        try:
            async with asyncio.timeout(timeout_s):
                status = await process.wait()
            outputs[0] += out.read_nowait()
            outputs[1] += err.read_nowait()
        except TimeoutError:
            raise DeadlineExceeded(program, timeout_s) from None
        finally:
            for copy in copies:
                copy.cancel()
            if self._loop.owner().alive:
                self.table.signal(process, SIGKILL)
            feed.close()
            out.close()
            err.close()
        if len(outputs[0]) + len(outputs[1]) > OUTPUT_BYTES_MAX:
            fail(errno.EFBIG, program)
        return Completed(status, bytes(outputs[0]), bytes(outputs[1]))

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str = "/",
        pipes: Mapping[str, PipeDirection] | None = None,
    ) -> SimChild:
        """Start a program that outlives us."""
        await self._pause()
        self._view.folder(cwd)
        process = self.table.add(argv, env, cwd)
        ours: dict[str, Pipe] = {}
        for number, (name, direction) in enumerate((pipes or {}).items(), start=3):
            process.env[name] = str(number)
            if direction == "read":
                ours[name], process.pipes[name] = open_pipe(self._loop.owner(), process.owner)
            else:
                process.pipes[name], ours[name] = open_pipe(process.owner, self._loop.owner())
        try:
            self.start(process)
        except OSError:
            for pipe in ours.values():
                pipe.close()
            raise
        return SimChild(self._loop, self.table, process, ours)

    def which(self, program: str) -> str | None:
        """Return the absolute path of a program, or None."""
        for folder in _PATH:
            node = self._view.find(f"{folder}/{program}")
            if node is not None and node.inode.kind == "file" and node.inode.mode & _EXECUTABLE:
                return f"{folder}/{program}"
        return None

    def own_program(self, name: str) -> Sequence[str]:
        """Name it: it lies beside Debian's programs."""
        return [f"/usr/lib/isopod/{name}"]

    def find(self, program: str) -> Sequence[tuple[ProcessIdentity, Sequence[str]]]:
        """Return the live processes of the node's user, outside of containers, that run the file `program`, ordered by pid."""
        wanted = self._view.node(program).inode
        ours = [process for process in self.table.live() if process.pid_namespace is None and process.uid == _NODE_UID]
        return [(process.identity, process.argv) for process in ours if process.program is wanted]

    def identify(self, pid: int) -> ProcessIdentity | None:
        """Return the identity of a live process, or None."""
        process = self.table.get(pid)
        return None if process is None else process.identity

    async def wait_gone(self, identity: ProcessIdentity) -> None:
        """Return when that very process is gone."""
        self._loop.owner().check()
        process = self.table.get(identity.pid)
        if process is not None and process.identity == identity:
            await process.wait()

    def signal(self, identity: ProcessIdentity, signum: int) -> bool:
        """Send a signal to that very process; False if it is gone."""
        process = self.table.get(identity.pid)
        if process is None or process.identity != identity or not self._loop.owner().alive:
            return False
        return self.table.signal(process, signum)

    def signal_group(self, identity: ProcessIdentity, signum: int) -> bool:
        """Send a signal to the group that this very process leads, or to it alone if it leads none; False if it is gone."""
        process = self.table.get(identity.pid)
        if process is None or process.identity != identity or not self._loop.owner().alive:
            return False
        if process.session != process.pid:
            return self.table.signal(process, signum)
        self.table.signal_session(process.pid, signum)
        return True

    def own_pid(self) -> int:
        """Return the pid of the process whose code asks."""
        return self._loop.owner().pid

    def abort(self, why: str) -> NoReturn:
        """See `Processes.abort`: the process is killed with status 70, and the code that called this gets `CancelledError`.

        The code of a test cannot die: there it is only the `CancelledError`. Either way `aborts` tells.
        """
        owner = self._loop.owner()
        owner.check()
        self.aborts.append(Abort(owner.pid, owner.name, why))
        process = self.table.get(owner.pid)
        if process is not None and process.owner is owner:
            self.table.end(process, ABORT_STATUS)
        raise asyncio.CancelledError(f"aborted: {why}")

    def boot_id(self) -> str:
        """Return the identifier of this boot."""
        digest = hashlib.sha256(b"boot %d" % self.n_boots).hexdigest()
        return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    def _connect(self, process: SimProcess) -> tuple[WriteEnd, ReadEnd, ReadEnd]:
        us = self._loop.owner()
        process.stdin, feed = open_pipe(process.owner, us)
        out, process.stdout = open_pipe(us, process.owner)
        err, process.stderr = open_pipe(us, process.owner)
        return feed, out, err

    async def _pause(self) -> None:
        self._loop.owner().check()
        await asyncio.sleep(self._chance.uniform(*_SPAWN_S) + self.delay_s)
        self._loop.owner().check()
        if self._failures:
            fail(self._failures.pop(0), "fork")


async def _feed(end: WriteEnd, data: bytes) -> None:
    try:
        await end.write(data)
    except BrokenPipeError:
        return  # the program did not read all of it, which is its right
    finally:
        end.close()


async def _collect(end: ReadEnd, into: bytearray) -> None:
    while part := await end.read():
        if len(into) <= OUTPUT_BYTES_MAX:
            into += part


def _check_port(processes: SimProcesses, child: SimChild) -> tuple[ProcessesPort, ProcessPort]:
    """Let the type checker compare with the ports."""
    return processes, child
