"""Lease: a sandbox's machine runs once, whoever starts it.

Beside the disk it would write lies a file that names the process which has it: the daemon while it starts the machine, then the shim. Who
wants to start it takes that file first, and is refused while the named process lives. A process of another boot lives no more.
Looking and taking are one step, under a lock, so that of two daemons on the same folder one is refused.
"""

from typing import Final

import msgspec

from isopod.world.errors import InUse, from_os_error
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

LEASE_BYTES_MAX: Final = 4096
_HINT: Final = "a machine never runs twice on one disk: end the other one first"


class _Holder(msgspec.Struct):
    pid: int
    started_ticks: int
    boot_id: str


class Lease:
    """The lease of one sandbox.

    Args:
        world: Where.
        path: Its file, in a folder that exists.
        name: The sandbox's name, for errors.
    """

    def __init__(self, world: World, path: str, name: str) -> None:
        self._world = world
        self._path = path
        self._name = name

    async def take(self) -> None:
        """Take it for this process.

        Raises:
            InUse: Another process has it, and lives.
            UnavailableError: The disk refused.
        """
        pid = self._world.processes.own_pid()
        own = self._world.processes.identify(pid) or ProcessIdentity(pid, 0)  # the code of a simulated test is no process
        try:
            lock = await self._world.disk.lock(f"{self._path}.lock", b"")
            if lock is None:
                raise InUse("virtual machine", self._name, "another daemon, which is starting it", _HINT)
            try:
                await self._check(own)
                await self._write(own)
            finally:
                lock.close()
        except OSError as error:
            raise from_os_error(error, "take", self._path) from error

    async def hand_over(self, holder: ProcessIdentity) -> None:
        """Name the process that has it from now on. Raises UnavailableError."""
        try:
            await self._write(holder)
        except OSError as error:
            raise from_os_error(error, "hand over", self._path) from error

    async def holder(self) -> ProcessIdentity | None:
        """Return the process that has it and lives, None if it is free."""
        try:
            found = msgspec.json.decode(await self._world.disk.read(self._path, n_bytes_max=LEASE_BYTES_MAX), type=_Holder)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):  # what is torn was being written by who died of it
            return None
        identity = ProcessIdentity(found.pid, found.started_ticks)
        lives = found.boot_id == self._world.processes.boot_id() and self._world.processes.identify(found.pid) == identity
        return identity if lives else None

    async def _check(self, own: ProcessIdentity) -> None:
        holder = await self.holder()
        if holder is not None and holder != own:
            raise InUse("virtual machine", self._name, f"process {holder.pid}, which runs it", _HINT)

    async def _write(self, holder: ProcessIdentity) -> None:
        # Whole, but not durable: what names a process is worth nothing after the boot of the host in which it lived.
        facts = _Holder(holder.pid, holder.started_ticks, self._world.processes.boot_id())
        await self._world.disk.write(f"{self._path}.part", msgspec.json.encode(facts))
        await self._world.disk.rename(f"{self._path}.part", self._path)
