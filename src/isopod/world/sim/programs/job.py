"""Job: what a simulated command has at hand: its arguments, files, stdio, children.

A command takes a small seeded time before its first effect, and does nothing while its control group is frozen.
"""

import asyncio
import errno
import os
from typing import Final

from isopod.world.sim.inodes import Inode
from isopod.world.sim.machine import Machine
from isopod.world.sim.nodes import Node
from isopod.world.sim.owners import Owner
from isopod.world.sim.programs.container import Container, KernelFacts, container_of
from isopod.world.sim.programs.stdio import read_in, write_error, write_out
from isopod.world.sim.table import SimProcess, frozen
from isopod.world.sim.view import View, fail

RESIDENT_BYTES: Final = 512 << 10
CPU_NS: Final = 800_000
_WORK_S: Final = (50e-6, 400e-6)
_FULL: Final = (1, 7)


class Job:
    """A command that runs.

    Args:
        machine: The computer.
        process: Its process.
    """

    def __init__(self, machine: Machine, process: SimProcess) -> None:
        self.machine = machine
        self.process = process

    @property
    def container(self) -> Container:
        """The container it runs in."""
        return container_of(self.process)

    @property
    def kernel(self) -> KernelFacts:
        """What the kernel it runs on tells it."""
        if self.container.kernel is not None:
            return self.container.kernel
        facts = self.machine.kernel.facts
        return KernelFacts(facts.kernel, facts.n_cpus, facts.memory_bytes, self.machine.clock.now_ns, self.machine.random.stream("urandom"))

    @property
    def view(self) -> View:
        """The files it sees."""
        return self.container.view

    async def work(self) -> None:
        """Let the time of a small piece of work pass."""
        await self.sleep(self.machine.chance.uniform(*_WORK_S))
        if self.process.group is not None:
            self.process.group.cpu_usage_ns += CPU_NS

    async def sleep(self, seconds: float) -> None:
        """Sleep; a frozen process does not wake."""
        await asyncio.sleep(seconds)
        await frozen(self.process)

    async def out(self, data: bytes | str) -> None:
        """Write to standard output."""
        await write_out(self.process, data if isinstance(data, bytes) else data.encode(errors="surrogateescape"))

    async def error(self, text: str) -> None:
        """Write a line to standard error."""
        await write_error(self.process, f"{text}\n".encode(errors="surrogateescape"))

    async def read_in(self, n_bytes: int = 64 << 10) -> bytes:
        """Read from standard input."""
        data = await read_in(self.process, n_bytes)
        await frozen(self.process)
        return data

    async def read_all(self) -> bytes:
        """Read standard input to its end."""
        parts = []
        while part := await self.read_in():
            parts.append(part)
        return b"".join(parts)

    def path(self, name: str) -> str:
        """Return a path as absolute."""
        return name if name.startswith("/") else f"{self.process.cwd.rstrip('/')}/{name}"

    def find(self, name: str, *, follow: bool = True) -> Node | None:
        """Return what is at a path, or None."""
        return self.view.find(self.path(name), follow=follow)

    def read_file(self, name: str) -> bytes:
        """Return a file's bytes."""
        inode = self.view.open_file(self.path(name))
        return b"" if inode.kind == "device" else bytes(inode.data)

    def sink(self, name: str, *, append: bool) -> "FileSink":
        """Open a file as somebody's output, emptied unless `append`."""
        path = self.path(name)
        inode = self.open_for_writing(path)
        if not append and inode.kind == "file":
            inode.replace(b"")
            self.view.touched(path)
        return FileSink(self.view, inode, path)

    def open_for_writing(self, path: str) -> Inode:
        """Return the inode to write to; devices need no copy in the writable layer."""
        node = self.view.find(path)
        if node is not None and node.inode.kind == "device":
            return node.inode
        return self.view.open_file(path, create_mode=0o644)


class FileSink:
    """A file as an output.

    Args:
        view: Where it lies.
        inode: The file.
        path: For who watches its folder.
    """

    def __init__(self, view: View, inode: Inode, path: str) -> None:
        self._view = view
        self._inode = inode
        self._path = path

    async def write(self, data: bytes) -> None:
        """Append; devices swallow, /dev/full is full."""
        if self._inode.kind != "device":
            self._inode.append(data)
            self._view.touched(self._path)
        elif self._inode.device == _FULL:
            fail(errno.ENOSPC, self._path)

    def dup(self, owner: Owner) -> "FileSink":
        """Return the same for another process."""
        return self

    def close(self) -> None:
        """Close: nothing is held."""


def why(error: OSError) -> str:
    """Return the text of an errno."""
    return os.strerror(error.errno or errno.EIO)
