"""The log of a container or a microVM: conmon's k8s format, as the simulated supervisor and the simulated shim write it; and a console's.

Each line is "TIME STREAM F|P TEXT": P where the read ended without a newline. Over its size the file starts anew, in place of the old one.
"""

from datetime import UTC, datetime

from isopod.world.sim.inodes import Inode
from isopod.world.sim.machine import Machine


class ContainerLog:
    """The container's log file in the k8s format.

    Args:
        machine: Where it lies.
        path: Its path, or None to drop everything.
        n_bytes_max: Size at which it starts anew, or 0.
    """

    def __init__(self, machine: Machine, path: str | None, n_bytes_max: int) -> None:
        self._path = path
        self._machine = machine
        self._n_bytes_max = n_bytes_max
        self._n_written = 0
        self._inode: Inode | None = None
        if self._path is not None:
            self._inode = machine.view.open_file(self._path, create_mode=0o600)
            machine.view.touched(self._path)

    def write(self, stream: str, data: bytes) -> None:
        """Log what came in one read; each line has the read's time."""
        if self._path is None or self._inode is None:
            return
        now_ns = self._machine.clock.now_ns()
        stamp = datetime.fromtimestamp(now_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        prefix = f"{stamp}.{now_ns % 10**9:09d}+00:00 {stream} ".encode()
        for line in lines_of(data):
            partial = not line.endswith(b"\n")
            entry = prefix + (b"P " if partial else b"F ") + line + (b"\n" if partial else b"")
            if self._n_bytes_max > 0 and self._n_written + len(entry) > self._n_bytes_max:
                self.reopen()
            self._inode.append(entry)
            self._n_written += len(entry)
        self._machine.view.touched(self._path)

    def reopen(self) -> None:
        """Start the file anew, in place of the old one."""
        if self._path is not None:
            temporary = self._path + ".tmp"
            self._inode = self._machine.view.write(temporary, b"", 0o600)
            self._machine.view.rename(temporary, self._path)
            self._n_written = 0

    def sync(self) -> None:
        """Make it durable."""
        if self._inode is not None:
            self._inode.sync_data()


class ConsoleLog:
    """What the console said, byte by byte. Over its size it is renamed to FILE.1 and begun anew.

    Args:
        machine: Where it lies.
        path: Its path.
        n_bytes_max: Its size at most, 0 for any.
    """

    def __init__(self, machine: Machine, path: str, n_bytes_max: int) -> None:
        self._machine = machine
        self._path = path
        self._n_bytes_max = n_bytes_max
        self._inode = machine.view.open_file(path, create_mode=0o600)

    def write(self, data: bytes) -> None:
        """Add what it said; a full disk takes nothing, and nobody waits for it."""
        view = self._machine.view
        try:
            size = self._inode.content.size
            if 0 < self._n_bytes_max < size + len(data) and size:
                view.rename(self._path, f"{self._path}.1")
                self._inode = view.open_file(self._path, create_mode=0o600)
            self._inode.append(data)
        except OSError:
            return

    def tail(self, n_bytes: int) -> bytes:
        """Return its last bytes."""
        return bytes(self._inode.data[-n_bytes:]) if n_bytes > 0 else b""


def lines_of(data: bytes) -> list[bytes]:
    """Split after each newline only."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
