"""The process table: every simulated process, the node's own among them.

A process is an `Owner` (its tasks, files, pipes, connections) with a pid, arguments, signal dispositions, a parent, a cgroup and
namespaces. Its code is a coroutine; what the coroutine returns is its exit status. The rules kept here are the kernel's:

- A signal without a handler ends the process, unless its default is to be ignored. SIGKILL always ends it.
- The first process of a pid namespace gets no signal that it has no handler for, except SIGKILL from outside; when it ends, all
  others in the namespace are killed.
- A frozen process (the freezer of cgroup v1) does nothing until it is thawed; signals, SIGKILL too, wait until then.
- Pids are never used twice within a run. A process that ended is gone at once for the port: nobody sees zombies.
- A process forked over the pids limit of its group is EAGAIN; memory charged over the limit gets the largest process of the group killed.

Sessions: a process leads one of its own, unless it was started into its parent's (`session`); each has one process group.
A process stopped by SIGSTOP stands still until SIGCONT; other signals wait as long, SIGKILL does not.
Not modelled: job control (a terminal signals its foreground process), credentials.
"""

import asyncio
import errno
import os
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from typing import Any, Final, Literal

from isopod.world.processes import ProcessIdentity
from isopod.world.sim.clock import BOOT_NS
from isopod.world.sim.inodes import Inode
from isopod.world.sim.links import NetworkNamespace
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.owners import OWNER, HostTime, Owner
from isopod.world.sim.pipes import ReadEnd, Sink, WriteEnd
from isopod.world.sim.terminal import Terminal

Handler = Literal["ignore"] | Callable[[], None]
Body = Callable[["SimProcess"], Coroutine[Any, Any, int]]

FIRST_PID: Final = 5000
TICK_NS: Final = 10_000_000
_IGNORED_BY_DEFAULT: Final = (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)
_ENDED_MAX: Final = 1024
SIGKILL: Final = int(signal.SIGKILL)
SIGSTOP: Final = int(signal.SIGSTOP)
SIGCONT: Final = int(signal.SIGCONT)


class PidNamespace:
    """A pid namespace: its members, the first of them is its init."""

    def __init__(self) -> None:
        self.members: list[SimProcess] = []
        self._n_pids = 0

    def join(self, process: "SimProcess") -> None:
        """Let a process be a member; it gets a number inside."""
        self._n_pids += 1
        self.members.append(process)
        process.pid_namespace = self
        process.inner_pid = self._n_pids


class Group:
    """A control group's processes, and whether they are frozen.

    Args:
        path: Below each hierarchy's root.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.members: dict[int, SimProcess] = {}
        self.is_frozen = False
        self.memory_bytes_max: int | None = None
        self.pids_max: int | None = None
        self.memory_bytes = 0
        self.n_oom_kills = 0
        self.cpu_usage_ns = 0
        self.thaw_waiters: list[asyncio.Future[None]] = []

    def join(self, process: "SimProcess") -> None:
        """Let a process be a member, of this group only."""
        if process.group is not None:
            process.group.members.pop(process.pid, None)
        process.group = self
        self.members[process.pid] = process


class SimProcess:
    """One process. See the module's header.

    Args:
        owner: Its identity for tasks and resources.
        argv: Its arguments; argv[0] is the program.
        env: Its environment.
        cwd: Its working folder.
        started_ticks: Clock ticks after boot.
    """

    def __init__(self, owner: Owner, argv: Sequence[str], env: Mapping[str, str], cwd: str, *, started_ticks: int) -> None:
        self.owner = owner
        self.argv = tuple(argv)
        self.env = dict(env)
        self.cwd = cwd
        self.identity = ProcessIdentity(owner.pid, started_ticks)
        self.status: int | None = None
        self.handlers: dict[int, Handler] = {}
        self.stdin: ReadEnd | None = None
        self.stdout: Sink | None = None
        self.stderr: Sink | None = None
        self.pipes: dict[str, ReadEnd | WriteEnd] = {}
        self.group: Group | None = None
        self.pid_namespace: PidNamespace | None = None
        self.network: NetworkNamespace | None = None
        """Its network namespace, None for the machine's."""
        self.inner_pid = owner.pid
        self.uid = 0
        self.gid = 0
        self.on_exit: list[Callable[[], None]] = []
        self.memory_bytes = 0
        self.session = owner.pid
        """The pid of the process that leads its session, which is also its group."""
        self.program: Inode | None = None
        """The file it runs, where that is a simulated program beside the containers."""
        self.terminal: Terminal | None = None
        self.container: object = None
        """What the simulated runtime keeps about the container that this is the first process of."""
        self.pending_signals: list[int] = []
        self.descriptors: dict[int, object] = {}
        """What it was started with beside its stdio and its pipes, by number."""
        self.claimed_bytes = 0
        """Memory that it was promised, used or not."""
        self.inside: Callable[[], list[SimProcess]] | None = None
        """The processes of the machine that it emulates: they stand still with it. Their end is that machine's business."""
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def pid(self) -> int:
        """Its number on the machine."""
        return self.owner.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.status is None

    @property
    def is_namespace_init(self) -> bool:
        """Whether it is the first process of its pid namespace."""
        return self.pid_namespace is not None and self.pid_namespace.members[0] is self

    async def wait(self) -> int:
        """Return its status once it has ended; negative for a signal."""
        while self.status is None:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        return self.status

    def ended(self, status: int) -> None:
        """Note the end and wake who waits. Called by the table."""
        self.status = status
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class ProcessTable:
    """All processes of the machine.

    Args:
        loop: The loop their code runs on.
        host: The machine's name, "" where there is only one.
        time: The machine's time, which its processes' timers follow.
    """

    def __init__(self, loop: SimLoop, *, host: str = "", time: HostTime | None = None) -> None:
        self._loop = loop
        self._host = host
        self._time = time
        self._processes: dict[int, SimProcess] = {}
        self._ended: dict[int, SimProcess] = {}
        self._next_pid = FIRST_PID

    def add(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, *, outside: bool = True) -> SimProcess:
        """Make a process that has no code yet.

        Args:
            argv: Its arguments.
            env: Its environment.
            cwd: Its working folder.
            outside: Whether it is a program beside the node: its tasks are not among asyncio's, and need not end with a test.
        """
        owner = Owner(self._next_pid, argv[0], outside=outside, host=self._host, time=self._time)
        self._next_pid += 1
        self._loop.add_owner(owner)
        ticks = (BOOT_NS + self._loop.elapsed_ns) // TICK_NS
        process = SimProcess(owner, argv, env, cwd, started_ticks=ticks)
        self._processes[process.pid] = process
        return process

    def run(self, process: SimProcess, body: Body) -> None:
        """Let a process begin: its code is `body`, what that returns is its exit status."""
        context = Context()
        context.run(OWNER.set, process.owner)
        self._loop.create_task(self._main(process, body), context=context)

    def run_in(self, process: SimProcess, work: Coroutine[Any, Any, None]) -> None:
        """Let a live process do something more, beside its code."""
        context = Context()
        context.run(OWNER.set, process.owner)
        self._loop.create_task(work, context=context)

    def live(self) -> list[SimProcess]:
        """Return the processes that live, by pid."""
        return list(self._processes.values())

    def get(self, pid: int) -> SimProcess | None:
        """Return a live process."""
        return self._processes.get(pid)

    def fork(self, parent: SimProcess, argv: Sequence[str]) -> SimProcess:
        """Make a child in the namespaces, group and terminal of `parent`, with ends of its own of the same stdio. EAGAIN."""
        group = parent.group
        if group is not None and group.pids_max is not None and len(group.members) >= group.pids_max:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        child = self.add(argv, parent.env, parent.cwd)
        child.terminal, child.uid, child.gid = parent.terminal, parent.uid, parent.gid
        child.session, child.program = parent.session, parent.program
        if parent.stdin is not None:
            child.stdin = parent.stdin.dup(child.owner)
        if parent.stdout is not None:
            child.stdout = parent.stdout.dup(child.owner)
        if parent.stderr is not None:
            child.stderr = parent.stderr.dup(child.owner)
        if parent.pid_namespace is not None:
            parent.pid_namespace.join(child)
        if group is not None:
            group.join(child)
        return child

    def charge_memory(self, process: SimProcess, n_bytes: int) -> None:
        """Let a process use more memory; over its group's limit the largest process there is killed."""
        group = process.group
        process.memory_bytes += n_bytes
        if group is None:
            return
        group.memory_bytes += n_bytes
        if group.memory_bytes_max is not None and group.memory_bytes > group.memory_bytes_max:
            group.n_oom_kills += 1
            self.end(max(group.members.values(), key=lambda each: each.memory_bytes), -SIGKILL)

    def lately(self, pid: int) -> SimProcess | None:
        """Return a process that lives, or ended not long ago: its parent has yet to hear of its end."""
        return self._processes.get(pid) or self._ended.get(pid)

    def signal_session(self, leader: int, number: int) -> None:
        """Send a signal to every process of a session, oldest first."""
        for process in self.live():
            if process.session == leader:
                self.signal(process, number)

    def signal(self, process: SimProcess, number: int) -> bool:
        """Send a signal from outside its pid namespace; False if it is gone."""
        if not process.is_alive:
            return False
        if process.group is not None and process.group.is_frozen:
            process.pending_signals.append(number)
            return True
        if number == SIGKILL:
            self.end(process, -SIGKILL)
            return True
        if number == SIGSTOP:
            self.stop(process)
            return True
        if number == SIGCONT:
            self.go_on(process)
        elif process.owner.is_hung and number:
            process.pending_signals.append(number)
            return True
        handler = process.handlers.get(number)
        if callable(handler):
            context = Context()
            context.run(OWNER.set, process.owner)
            self._loop.call_soon(handler, context=context)
        elif number and handler is None and number not in _IGNORED_BY_DEFAULT and not process.is_namespace_init:
            self.end(process, -number)
        return True

    def end(self, process: SimProcess, status: int) -> None:
        """End a process: release what it holds, leave its groups, tell who waits."""
        if not process.is_alive:
            return
        del self._processes[process.pid]
        self._ended[process.pid] = process
        if len(self._ended) > _ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        if process.group is not None:
            process.group.members.pop(process.pid, None)
            process.group.memory_bytes -= process.memory_bytes
        if process.pid_namespace is not None and process.is_namespace_init:
            for member in process.pid_namespace.members[1:]:
                self.end(member, -SIGKILL)
        self._loop.watch_owners()
        if process.owner.is_hung:
            self._loop.resume(process.owner)
        process.owner.die()
        process.ended(status)
        for callback in process.on_exit:
            callback()
        self._bury(process.owner)

    def stop(self, process: SimProcess) -> None:
        """Stop a process as SIGSTOP does: it stands still where it is, until `go_on` or its end."""
        if process.is_alive:
            self._loop.hang(process.owner)
            for each in process.inside() if process.inside is not None else ():
                self.stop(each)

    def go_on(self, process: SimProcess) -> None:
        """Let a stopped process go on, as SIGCONT does."""
        if process.is_alive and process.owner.is_hung:
            self._loop.resume(process.owner)
            pending, process.pending_signals = process.pending_signals, []
            for number in pending:
                self.signal(process, number)
            for each in process.inside() if process.inside is not None else ():
                self.go_on(each)

    def kill_all(self) -> None:
        """End every process: the machine lost its power."""
        for process in self.live():
            self.end(process, -SIGKILL)

    async def _main(self, process: SimProcess, body: Body) -> None:
        try:
            status = await body(process)
        except asyncio.CancelledError:
            if process.owner.alive:
                raise
            return
        except BrokenPipeError:
            status = -int(signal.SIGPIPE)
        except Exception as error:  # noqa: BLE001 - the root of a process: a defect of the simulated program
            self._loop.call_exception_handler({"message": f"simulated program {process.argv[0]} failed", "exception": error})
            status = -int(signal.SIGABRT)
        self.end(process, status)

    def _bury(self, owner: Owner) -> None:
        """Drop what the owner left scheduled, once its tasks have unwound."""
        context = Context()
        context.run(OWNER.set, self._loop.undertaker)
        self._loop.create_task(owner.unwound(), context=context)


async def frozen(process: SimProcess) -> None:
    """Wait while the process's control group is frozen."""
    while process.group is not None and process.group.is_frozen:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        process.group.thaw_waiters.append(waiter)
        await waiter
