"""Console: what the lean command line may touch of the machine: one blocking Unix socket, its terminal, clock, signals and files.

It is not the host World: no event loop, no ports; a command line lives for milliseconds and imports as little as it can. The
modules used (`posix`, `_socket`, `_signal`, `select`, `termios`) are the C halves of `os`, `socket` and `signal`: those cost 2, 6
and 4 ms more at start-up, these next to nothing. No other module of the command line touches the machine.

Rules: functions raise `OSError` like the kernel; whoever opens closes; nothing here waits without a limit except where the
caller asks for none.

Sources: termios(3), poll(2), unix(7), signal(7), posix_spawn(3).
"""

from __future__ import annotations

import errno
import posix
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import signal as _signal
    from collections.abc import Iterable, Sequence
    from types import TracebackType
    from typing import Final, Self
else:
    import _signal

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2
PIPE_BYTES_SAFE: Final = 4096
"""PIPE_BUF: so much a pipe takes without blocking once poll(2) calls it writable."""
_SUN_PATH_BYTES_MAX: Final = 107
"""So much of a path an address holds (unix(7)); longer ones are reached through their folder, as the node binds them."""
_FILE_BYTES_MAX: Final = 1 << 20
_READ_STEP_BYTES: Final = 1 << 16

# --- clock ------------------------------------------------------------------------------------------------------------


def monotonic_s() -> float:
    """Return seconds of a clock that never goes back."""
    return time.monotonic()


def unix_time_ns() -> int:
    """Return nanoseconds since the Unix epoch."""
    return time.time_ns()


def pause(seconds: float) -> None:
    """Wait so long: only between attempts to reach a socket, which announces its return by no event."""
    time.sleep(seconds)


# --- environment and files --------------------------------------------------------------------------------------------


def environment(name: str) -> str | None:
    """Return a variable of the environment, None if it is not set."""
    value = posix.environ.get(name.encode("utf-8", "surrogateescape"))
    return None if value is None else value.decode("utf-8", "surrogateescape")


def absolute(path: str) -> str:
    """Return `path` against the working folder, without ".", ".." and doubled slashes. Links are not followed."""
    parts: list[str] = []
    try:
        whole = path if path.startswith("/") else posix.getcwd() + "/" + path
    except OSError as error:
        raise OSError(error.errno, error.strerror, "the working folder of this shell") from None
    for part in whole.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def read_small_file(path: str) -> bytes | None:
    """Return a file's bytes (at most 1 MiB are read), or None if there is no such file."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    data = b""
    try:
        while len(data) < _FILE_BYTES_MAX and (more := posix.read(fd, _READ_STEP_BYTES)):
            data += more
    finally:
        posix.close(fd)
    return data


def names(path: str) -> list[str]:
    """Return the sorted names in a folder, [] if there is none."""
    try:
        return sorted(posix.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return []


def open_to_read(path: str) -> int:
    """Return a descriptor of a file opened for reading; the caller closes it."""
    return posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)


def open_folder(path: str) -> int:
    """Return a descriptor of a folder, only to begin paths with; the caller closes it."""
    return posix.open(path, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)


def open_to_write(path: str) -> int:
    """Return a descriptor of an emptied or new file opened for writing; the caller closes it."""
    return posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, 0o644)


def replace(source: str, target: str, fd: int) -> None:
    """Make what was written to `fd`, the file `source`, durable, and give it the name `target`, replacing a file of that name."""
    posix.fsync(fd)
    posix.rename(source, target)
    folder = posix.open(target.rpartition("/")[0] or "/", posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
    try:
        posix.fsync(folder)
    finally:
        posix.close(folder)


def remove(path: str) -> None:
    """Remove a file; nothing there is fine."""
    try:
        posix.unlink(path)
    except FileNotFoundError:
        return


def open_private(path: str) -> int:
    """Return a descriptor of a new file that only we may read, opened for writing; the caller closes it. One that is there is removed: it
    may be somebody else's, who would read what is written."""
    remove(path)
    return posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC | posix.O_NOFOLLOW, 0o600)


def kind_of(path: str) -> str:
    """Return "folder", "file" for anything else that is there, or "nothing"."""
    try:
        mode = posix.stat(path).st_mode
    except OSError:
        return "nothing"
    return "folder" if mode & 0o170000 == 0o040000 else "file"


def is_folder(path: str) -> bool:
    """Tell whether `path` is a directory."""
    try:
        return posix.stat(path).st_mode & 0o170000 == 0o040000
    except OSError:
        return False


def size_bytes(fd: int) -> int:
    """Return the size of a regular file, 0 for anything else."""
    status = posix.fstat(fd)
    return status.st_size if status.st_mode & 0o170000 == 0o100000 else 0


def is_regular(fd: int) -> bool:
    """Tell whether a descriptor is a regular file, which never blocks."""
    try:
        return posix.fstat(fd).st_mode & 0o170000 == 0o100000
    except OSError:
        return False


def close(fd: int) -> None:
    """Close a descriptor."""
    posix.close(fd)


def hold_standard_descriptors() -> None:
    """Open /dev/null wherever standard input, output or error is closed: else the next socket or file would be taken for it."""
    while (fd := posix.open("/dev/null", posix.O_RDWR)) <= STDERR:  # the lowest free number
        pass
    posix.close(fd)


def read(fd: int, n_bytes_max: int) -> bytes:
    """Read once; b"" at the end. A descriptor that cannot give (closed, a hung-up terminal) is at its end, too."""
    try:
        return posix.read(fd, n_bytes_max)
    except OSError as error:
        if error.errno in (errno.EBADF, errno.EIO):
            return b""
        raise


def write(fd: int, data: bytes | memoryview) -> int:
    """Write once; return how many bytes were taken, 0 if a descriptor somebody made non-blocking is full."""
    try:
        return posix.write(fd, data)
    except BlockingIOError:
        return 0


def write_all(fd: int, data: bytes) -> None:
    """Write everything, waiting for room."""
    rest = memoryview(data)
    while rest:
        taken = write(fd, rest)
        if not taken:
            wait([], [fd], None)
        rest = rest[taken:]


def wait(readers: Iterable[int], writers: Iterable[int], timeout_s: float | None) -> tuple[list[int], list[int]]:
    """Wait until a descriptor can be read or written.

    Args:
        readers: Descriptors to read; one that hung up counts as readable, reading it tells.
        writers: Descriptors to write; one whose reader left counts as writable, writing tells.
        timeout_s: How long at most; None for no limit.

    Returns:
        The readable and the writable ones, in the order given. Both empty: the time is over, or a signal came.
    """
    poll = select.poll()
    masks: dict[int, int] = {}
    for fd in readers:
        masks[fd] = select.POLLIN
    for fd in writers:
        masks[fd] = masks.get(fd, 0) | select.POLLOUT
    for fd, mask in masks.items():
        poll.register(fd, mask)
    ready = poll.poll(None if timeout_s is None else max(0, timeout_s) * 1000)
    readable: list[int] = []
    writable: list[int] = []
    for fd, events in ready:
        if masks[fd] & select.POLLIN and events & ~select.POLLOUT:
            readable.append(fd)
        if masks[fd] & select.POLLOUT and events & ~select.POLLIN:
            writable.append(fd)
    return readable, writable


# --- the socket -------------------------------------------------------------------------------------------------------


class Connection:
    """A connected stream socket that never blocks; wait for it with `wait`."""

    __slots__ = ("_socket", "fd")

    def __init__(self, address: str | tuple[str, int], timeout_s: float) -> None:
        """Connect.

        Args:
            address: A Unix socket's path, or the host and port of a TCP one.
            timeout_s: How long that may take.

        Raises:
            OSError: Nobody listens there, it is not allowed, there is no such host, or `timeout_s` went by.
        """
        self._socket: Final = _unix(address, timeout_s) if isinstance(address, str) else _tcp(*address, timeout_s)
        self.fd: Final = self._socket.fileno()
        self._socket.setblocking(False)

    def receive(self, n_bytes_max: int) -> bytes | None:
        """Return what has arrived: b"" if the peer closed, None if nothing is there yet."""
        try:
            return self._socket.recv(n_bytes_max)
        except BlockingIOError:
            return None

    def send(self, data: bytes | bytearray) -> int:
        """Send a beginning of `data`; return how much was taken."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close; twice is once."""
        self._socket.close()


def _unix(path: str, timeout_s: float) -> _socket.socket:
    import _socket

    opened = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    folder, _, name = path.rpartition("/")
    if len(path.encode("utf-8", "surrogateescape")) <= _SUN_PATH_BYTES_MAX or not folder:
        return _connected(opened, path, timeout_s)
    try:
        folder_fd = posix.open(folder, posix.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    except OSError:
        opened.close()
        raise
    try:
        return _connected(opened, f"/proc/self/fd/{folder_fd}/{name}", timeout_s)
    finally:
        posix.close(folder_fd)


def _tcp(host: str, port: int, timeout_s: float) -> _socket.socket:
    """Connect to the first of the host's addresses that takes connections."""
    import _socket

    failure: OSError | None = None
    for kind, _type, _protocol, _name, address in _socket.getaddrinfo(host, port, 0, _socket.SOCK_STREAM):
        try:
            return _connected(_socket.socket(kind, _socket.SOCK_STREAM), address, timeout_s)
        except OSError as error:
            failure = failure or error
    raise failure or OSError(errno.EADDRNOTAVAIL, "the host has no address")


def _connected(opened: _socket.socket, address: str | tuple[str | int | bytes, ...], timeout_s: float) -> _socket.socket:
    """Connect a socket and return it, or close it."""
    import _socket

    # connect(2) waits as long as the send timeout says: for a place in a Unix listener's queue, or for a host's answer.
    whole = int(timeout_s)
    limit = whole.to_bytes(8, "little") + int((timeout_s - whole) * 1e6).to_bytes(8, "little")
    try:
        opened.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, limit)
        opened.connect(address)
    except BlockingIOError:
        opened.close()
        raise OSError(errno.ETIMEDOUT, "it accepts no connections") from None
    except BaseException:
        opened.close()
        raise
    return opened


# --- the terminal -----------------------------------------------------------------------------------------------------


def is_terminal(fd: int) -> bool:
    """Tell whether a descriptor is a terminal."""
    return posix.isatty(fd)


def terminal_size(*fds: int) -> tuple[int, int]:
    """Return (rows, columns) of the first of `fds` that is a terminal, (0, 0) without one."""
    for fd in fds:
        try:
            columns, rows = posix.get_terminal_size(fd)
        except OSError:
            continue
        return rows, columns
    return 0, 0


class RawMode:
    """A terminal that hands on every key, for the length of a `with`; leaving it restores what was, whatever happened."""

    def __init__(self, fd: int) -> None:
        self._fd: Final = fd
        self._saved: list[int | list[bytes | int]] | None = None

    def __enter__(self) -> Self:
        import termios

        self._saved = termios.tcgetattr(self._fd)
        self.apply()
        return self

    def apply(self) -> None:
        """Enter raw mode (again: after a stop and SIGCONT the shell has put its own mode back)."""
        import termios as t

        iflag, oflag, cflag, lflag, ispeed, ospeed, keys = t.tcgetattr(self._fd)
        iflag &= ~(t.IGNBRK | t.BRKINT | t.PARMRK | t.ISTRIP | t.INLCR | t.IGNCR | t.ICRNL | t.IXON)
        oflag &= ~t.OPOST
        cflag = cflag & ~(t.CSIZE | t.PARENB) | t.CS8
        lflag &= ~(t.ECHO | t.ECHONL | t.ICANON | t.ISIG | t.IEXTEN)
        keys[t.VMIN], keys[t.VTIME] = 1, 0
        t.tcsetattr(self._fd, t.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, keys])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import termios

        if self._saved is None:
            return
        try:
            # Not TCSADRAIN: it waits for output to drain, for ever if the terminal was stopped by ctrl-s.
            termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
        except termios.error as failure:
            if failure.args[0] not in (errno.EIO, errno.ENOTTY):
                raise
            # The terminal itself is gone (its window was closed): nothing is left to restore.


# --- signals ----------------------------------------------------------------------------------------------------------


class SignalPipe:
    """Signals as bytes of a pipe, for the length of a `with`: wait for `fd`, then `take` their numbers.

    What the process did on these signals before is put back on leaving.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers: Final = [number for number in map(signal_number, names) if number is not None]
        self._before: dict[int, object] = {}
        self._write_fd = -1
        self.fd = -1

    def __enter__(self) -> Self:
        self.fd, self._write_fd = posix.pipe2(posix.O_NONBLOCK | posix.O_CLOEXEC)
        _signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in self._numbers:
            self._before[number] = _signal.signal(number, _noted)
        return self

    def take(self) -> list[int]:
        """Return the numbers of the signals that came, in their order."""
        try:
            return list(posix.read(self.fd, 512))
        except BlockingIOError:
            return []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            _signal.signal(number, before if callable(before) or isinstance(before, int) else _signal.SIG_DFL)
        _signal.set_wakeup_fd(-1)
        posix.close(self.fd)
        posix.close(self._write_fd)


def _noted(_number: int, _frame: object) -> None:
    """Do nothing: the interpreter has written the number to the pipe already."""


def signal_number(text: str) -> int | None:
    """Return the number of a signal given as 9, KILL, SIGKILL or kill; None if there is no such signal."""
    if text.isascii() and text.isdigit():
        number = int(text[:4])
        return number if 0 < number < _signal.NSIG and len(text) <= 4 else None
    upper = text.upper()
    name = upper if upper.startswith("SIG") else "SIG" + upper
    value = getattr(_signal, name, None) if name.isalnum() else None
    return int(value) if isinstance(value, int) else None


# --- helper programs --------------------------------------------------------------------------------------------------


class Child:
    """A helper program whose standard output is read here. `fd` gives its output; `finish` closes it and waits for the end."""

    __slots__ = ("_pid", "fd")

    def __init__(self, command: Sequence[str]) -> None:
        """Start `command`, found along PATH, with an empty stdin and our stderr.

        Raises:
            OSError: It cannot be started.
        """
        ours, theirs = posix.pipe2(posix.O_CLOEXEC)
        actions = [
            (posix.POSIX_SPAWN_OPEN, STDIN, "/dev/null", posix.O_RDONLY, 0),
            (posix.POSIX_SPAWN_DUP2, theirs, STDOUT),
        ]
        try:
            # The interpreter ignores SIGPIPE; inherited, that makes a helper whose output is refused complain instead of end.
            default = [_signal.SIGPIPE]
            self._pid = posix.posix_spawnp(command[0], list(command), posix.environ, file_actions=actions, setsigdef=default)
        except OSError:
            posix.close(ours)
            raise
        finally:
            posix.close(theirs)
        self.fd: Final = ours

    def finish(self) -> int:
        """Close its output (it ends by SIGPIPE if it still writes) and return its exit code, 128 + N for signal N."""
        posix.close(self.fd)
        _pid, status = posix.waitpid(self._pid, 0)
        return posix.WEXITSTATUS(status) if posix.WIFEXITED(status) else 128 + posix.WTERMSIG(status)


class Consumer:
    """A helper program whose standard input is written here. `fd` takes its input; `finish` closes it and waits for the end."""

    __slots__ = ("_is_over", "_pid", "fd")

    def __init__(self, command: Sequence[str]) -> None:
        """Start `command`, found along PATH, with our stdout and stderr.

        Raises:
            OSError: It cannot be started.
        """
        theirs, ours = posix.pipe2(posix.O_CLOEXEC)
        try:
            actions = [(posix.POSIX_SPAWN_DUP2, theirs, STDIN)]
            default = [_signal.SIGPIPE]
            self._pid = posix.posix_spawnp(command[0], list(command), posix.environ, file_actions=actions, setsigdef=default)
        except OSError:
            posix.close(ours)
            raise
        finally:
            posix.close(theirs)
        self.fd: Final = ours
        self._is_over = False

    def __enter__(self) -> Self:
        return self

    def finish(self) -> int:
        """Close its input and return its exit code, 128 + N for signal N."""
        self._is_over = True
        posix.close(self.fd)
        _pid, status = posix.waitpid(self._pid, 0)
        return posix.WEXITSTATUS(status) if posix.WIFEXITED(status) else 128 + posix.WTERMSIG(status)

    def __exit__(self, *_ended: object) -> None:
        if not self._is_over:
            self.finish()
