"""The host's processes.

Children are watched by pidfd in the loop and reaped the moment they end, by whoever started them: no SIGCHLD handler, no thread per
child. A pid is only ever signalled through a pidfd whose process was checked against its start time, so a reused number is safe.

Programs are started with `subprocess.Popen`, which uses vfork(2). Measured here (Python 3.11, 60 MiB resident, medians of 300, three
rounds): Popen 0.11-0.15 ms a call, `os.posix_spawn` 0.09-0.10 ms, start to reaped 0.64-0.82 against 0.63-0.69 ms. posix_spawn cannot
set the working folder and closes only what is marked close-on-exec; its 0.04 ms do not pay for that. Sources: pidfd_open(2), proc(5).
"""

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

import isopod
from isopod.world.errors import DeadlineExceeded
from isopod.world.host.daemon import write_some_stderr
from isopod.world.host.readiness import Readiness
from isopod.world.processes import Completed, Pipe, PipeDirection, Process, ProcessIdentity

OUTPUT_BYTES_MAX: Final = 16 << 20
"""What `run` takes from stdout and stderr together; more raises EFBIG."""
PIPE_BYTES: Final = 64 << 10
ABORT_STATUS: Final = 70
"""EX_SOFTWARE of sysexits.h, as for every error that is our own."""
SBIN_FOLDERS: Final = "/usr/local/sbin:/usr/sbin:/sbin"


class HostProcesses:
    """`Processes` by the kernel's."""

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", env: Mapping[str, str] | None = None, timeout_s: float = 30.0
    ) -> Completed:
        """See `Processes.run`. The program leads a session of its own, all of which is killed on time-out or cancellation. Output of
        helpers that outlive it is not waited for. More than 16 MiB of output raises EFBIG."""
        program = self._resolve(argv[0])
        ends = _open_ends(3)
        try:
            child = _start([program, *argv[1:]], env, cwd=None, stdio=(ends[0].theirs_read, ends[1].theirs_write, ends[2].theirs_write))
        except BaseException:
            for end in ends:
                end.close()
            raise
        to_child, out, err = ends[0].keep_write(), ends[1].keep_read(), ends[2].keep_read()
        try:
            async with asyncio.timeout(timeout_s):
                return await _communicate(child, stdin, (to_child, out, err))
        except TimeoutError as error:
            raise DeadlineExceeded(os.path.basename(program), timeout_s) from error
        finally:
            for pipe in (to_child, out, err):
                pipe.close()
            await child.end()

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str = "/",
        pipes: Mapping[str, PipeDirection] | None = None,
    ) -> Process:
        """See `Processes.spawn`."""
        ends = dict(zip(pipes or {}, _open_ends(len(pipes or {})), strict=True))
        theirs = {name: end.theirs_write if (pipes or {})[name] == "read" else end.theirs_read for name, end in ends.items()}
        environment = {**env, **{name: str(fd) for name, fd in theirs.items()}}
        try:
            child = _start(argv, environment, cwd=cwd, pass_fds=tuple(theirs.values()))
        except BaseException:
            for end in ends.values():
                end.close()
            raise
        for name, end in ends.items():
            child.pipes[name] = end.keep_read() if (pipes or {})[name] == "read" else end.keep_write()
        return child

    def which(self, program: str) -> str | None:
        """See `Processes.which`."""
        return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{SBIN_FOLDERS}")

    def own_program(self, name: str) -> Sequence[str]:
        """See `Processes.own_program`. Without the site's folders and whatever the environment says: faster, and nobody else's code."""
        folder = os.path.dirname(os.path.dirname(isopod.__file__))
        code = f"import sys; sys.path.insert(0, {folder!r}); from isopod.world.host.{name} import main; sys.exit(main(sys.argv[1:]))"
        return [sys.executable, "-I", "-S", "-c", code]

    def find(self, program: str) -> Sequence[tuple[ProcessIdentity, Sequence[str]]]:
        """See `Processes.find`."""
        pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
        wanted = os.stat(program)
        rows = [(_identify(pid), _arguments(pid)) for pid in pids if _runs(pid, wanted)]
        return [(identity, argv) for identity, argv in rows if identity is not None]

    def identify(self, pid: int) -> ProcessIdentity | None:
        """See `Processes.identify`."""
        return _identify(pid)

    async def wait_gone(self, identity: ProcessIdentity) -> None:
        """See `Processes.wait_gone`."""
        fd = _open_identity(identity)
        if fd is None:
            return
        ready = Readiness(fd)
        try:
            await ready.wait_readable()
        finally:
            ready.close()
            os.close(fd)

    def signal(self, identity: ProcessIdentity, signum: int) -> bool:
        """See `Processes.signal`."""
        fd = _open_identity(identity)
        if fd is None:
            return False
        try:
            signal.pidfd_send_signal(fd, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def signal_group(self, identity: ProcessIdentity, signum: int) -> bool:
        """See `Processes.signal_group`. The group keeps its number as long as anybody is in it, the leader while it is not reaped."""
        if _identify(identity.pid) != identity:
            return False
        try:
            os.killpg(identity.pid, signum)
        except ProcessLookupError:
            return self.signal(identity, signum)  # it leads no group of its own
        return True

    def own_pid(self) -> int:
        """See `Processes.own_pid`."""
        return os.getpid()

    def abort(self, why: str) -> NoReturn:
        """See `Processes.abort`. Standard error gets one line, if it takes it without waiting."""
        with contextlib.suppress(OSError):
            write_some_stderr(f"isopod: aborted: {' '.join(why.split())}\n".encode(errors="replace"))
        os._exit(ABORT_STATUS)

    def boot_id(self) -> str:
        """See `Processes.boot_id`."""
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()

    def _resolve(self, program: str) -> str:
        found = program if "/" in program else self.which(program)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), program)
        return found


class HostPipe:
    """`Pipe` over a non-blocking descriptor, which it owns."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._ready = Readiness(fd)

    async def read(self) -> bytes:
        """See `Pipe.read`."""
        while not self._ready.closed:
            data = self.read_nowait()
            if data is not None:
                return data
            await self._ready.wait_readable()
        return b""

    def read_nowait(self) -> bytes | None:
        """Return what is there, b"" at the end, None if there is nothing yet."""
        try:
            return os.read(self._fd, PIPE_BYTES)
        except BlockingIOError:
            return None

    async def wait_readable(self) -> None:
        """Return when there may be something to read, or after `wake_reader`."""
        await self._ready.wait_readable()

    def wake_reader(self) -> None:
        """Let `wait_readable` return."""
        self._ready.wake_reader()

    async def write(self, data: bytes) -> None:
        """See `Pipe.write`. After `close` it raises EBADF."""
        view = memoryview(data)
        while view:
            if self._ready.closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                await self._ready.wait_writable()

    def close(self) -> None:
        """See `Pipe.close`. Closing twice is fine."""
        if not self._ready.closed:
            self._ready.close()
            os.close(self._fd)


class HostProcess:
    """A child, reaped when it ends."""

    def __init__(self, pid: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._identity = _read_identity(pid)  # before the pidfd, which nobody would close if this failed
        self._pidfd = os.pidfd_open(pid)
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._pipes: dict[str, Pipe] = {}
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def identity(self) -> ProcessIdentity:
        """See `Process.identity`."""
        return self._identity

    @property
    def pipes(self) -> dict[str, Pipe]:
        """See `Process.pipes`."""
        return self._pipes

    async def wait(self) -> int:
        """See `Process.wait`."""
        return await asyncio.shield(self._ended)

    @property
    def has_ended(self) -> bool:
        """Whether the child is reaped."""
        return self._ended.done()

    def call_when_ended(self, callback: Callable[[], None]) -> None:
        """Call back in the loop once the child is reaped."""
        self._ended.add_done_callback(lambda _: callback())

    async def end(self) -> None:
        """See `Process.end`."""
        if self._ended.done():
            return
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself, its loop callback on the way
            os.killpg(self._identity.pid, signal.SIGKILL)
        await self.wait()

    def _reap(self) -> None:
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        if result is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        if not self._ended.done():
            self._ended.set_result(status)


class _Ends:
    """Both ends of a new pipe: of the two `keep_*` one is called, and the child's end is then closed here."""

    def __init__(self) -> None:
        self.theirs_read, self.theirs_write = os.pipe2(os.O_CLOEXEC)

    def keep_read(self) -> HostPipe:
        os.close(self.theirs_write)
        return HostPipe(self.theirs_read)

    def keep_write(self) -> HostPipe:
        os.close(self.theirs_read)
        return HostPipe(self.theirs_write)

    def close(self) -> None:
        os.close(self.theirs_read)
        os.close(self.theirs_write)


def _open_ends(count: int) -> list[_Ends]:
    """Open so many pipes, or none."""
    ends: list[_Ends] = []
    try:
        for _ in range(count):
            ends.append(_Ends())
    except OSError:
        for end in ends:
            end.close()
        raise
    return ends


def parse_stat(text: str) -> tuple[str, int]:
    """Return (state, start in ticks after boot) of a /proc/PID/stat; the command's name may hold spaces and brackets."""
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _start(
    argv: Sequence[str],
    env: Mapping[str, str] | None,
    *,
    cwd: str | None,
    stdio: tuple[int, int, int] = (subprocess.DEVNULL, subprocess.DEVNULL, subprocess.DEVNULL),
    pass_fds: tuple[int, ...] = (),
) -> HostProcess:
    started = subprocess.Popen(
        argv, env=env, cwd=cwd, stdin=stdio[0], stdout=stdio[1], stderr=stdio[2], pass_fds=pass_fds, start_new_session=True
    )
    try:
        child = HostProcess(started.pid)
    except BaseException:  # no descriptor left for the pidfd
        started.kill()
        started.wait()
        raise
    started.returncode = 0  # the loop reaps: Popen must neither wait for the pid nor complain that nobody did
    return child


async def _communicate(child: HostProcess, stdin: bytes, pipes: tuple[HostPipe, HostPipe, HostPipe]) -> Completed:
    to_child, out, err = pipes
    budget = [OUTPUT_BYTES_MAX]
    feeding = asyncio.ensure_future(_feed(to_child, stdin))
    reading = [asyncio.ensure_future(_drain(pipe, child, budget)) for pipe in (out, err)]
    try:
        stdout, stderr = await asyncio.gather(*reading)
        returncode = await child.wait()
    finally:
        for task in (feeding, *reading):
            task.cancel()
        await asyncio.gather(feeding, *reading, return_exceptions=True)
    return Completed(returncode, stdout, stderr)


async def _feed(pipe: HostPipe, data: bytes) -> None:
    try:
        await pipe.write(data)
    except BrokenPipeError:
        return  # it does not want to read all: its affair, its exit status tells
    finally:
        pipe.close()


async def _drain(pipe: HostPipe, child: HostProcess, budget: list[int]) -> bytes:
    """Collect output until its end, or until the child has ended and what it wrote is read: a helper may keep the pipe open."""
    chunks: list[bytes] = []
    child.call_when_ended(pipe.wake_reader)
    while True:
        has_ended = child.has_ended
        data = pipe.read_nowait()
        if data == b"" or (data is None and has_ended):
            return b"".join(chunks)
        if data is None:
            await pipe.wait_readable()
            continue
        chunks.append(data)
        budget[0] -= len(data)
        if budget[0] < 0:
            raise OSError(errno.EFBIG, f"more than {OUTPUT_BYTES_MAX} bytes of output")


def _runs(pid: int, program: os.stat_result) -> bool:
    """Return whether a process of our user and pid namespace runs that very file; what cannot be looked at does not.

    The file comes last: a stranger's may lie on a file system that he serves himself, and would let us wait.
    """
    try:
        is_ours = os.path.samefile(f"/proc/{pid}/ns/pid", "/proc/self/ns/pid") and os.stat(f"/proc/{pid}").st_uid == os.geteuid()
        return is_ours and os.path.samestat(os.stat(f"/proc/{pid}/exe"), program)
    except OSError:
        return False


def _identify(pid: int) -> ProcessIdentity | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="surrogateescape") as file:
            state, started_ticks = parse_stat(file.read())
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in ("Z", "X") else ProcessIdentity(pid, started_ticks)


def _arguments(pid: int) -> list[str]:
    """Return a process's argv; [] if it is gone, or a kernel thread."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _read_identity(pid: int) -> ProcessIdentity:
    """Return the identity of our own unreaped child, which may be a zombie already."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="surrogateescape") as file:
        return ProcessIdentity(pid, parse_stat(file.read())[1])


def _open_identity(identity: ProcessIdentity) -> int | None:
    """Return a pidfd of that very process, None if it is gone. The check comes after the open: the pidfd cannot change its process."""
    try:
        fd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    if _identify(identity.pid) != identity:
        os.close(fd)
        return None
    return fd
