"""A runner of microvm.nix: what its folder says, and what can be asked of a machine that it runs.

Not how it is built (`nix_build`), nor which one runs (`nix`).

Source: microvm.nix's lib/runner.nix: bin/microvm-run, bin/microvm-shutdown (only of machines with a socket; that of Cloud Hypervisor waits
for the process $MAINPID), share/microvm/{tap-flags,tap-interfaces,macvtap-interfaces,pci-devices,virtiofs}.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from isopod.engine.launch import ENVIRONMENT
from isopod.engine.vm.drivers.programs import kill_process
from isopod.engine.vm.machine import MachineSpec, MachineStatus
from isopod.engine.vm.shim import ShimClient
from isopod.world.errors import RuntimeFailed, UnavailableError, Unsupported, from_os_error
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

SHIM_SOCKET: Final = "shim.sock"
SHUTDOWN_TIMEOUT_S: Final = 150.0
"""As the host module's unit."""
_LIST_BYTES_MAX: Final = 64 << 10
_TAP: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_ELSEWHERE: Final = "run it by microvm.nix's host module, and give its unit: --driver systemd"
_UNMADE: Final = (
    ("macvtap-interfaces", "macvtap interfaces"),
    ("pci-devices", "PCI devices"),
    ("virtiofs", "virtiofs shares"),
)
"""Entries of share/microvm for which something would have to be made before the start."""


FindPid = Callable[[World, MachineSpec], Awaitable[int | None]]
"""Returns the pid of a machine's VMM, None if it has none any more."""


class Runner(NamedTuple):
    """A runner's folder."""

    path: str
    taps: tuple[str, ...]
    can_shut_down: bool

    @property
    def stop_argv(self) -> tuple[str, ...]:
        """What ends its machine, () if it has nothing for that."""
        return (f"{self.path}/bin/microvm-shutdown",) if self.can_shut_down else ()


async def read_runner(world: World, path: str, *, name: str) -> Runner:
    """Look into a runner's folder.

    Args:
        world: The machine.
        path: The folder.
        name: The machine, for errors.

    Raises:
        RuntimeFailed: It is no runner.
        Unsupported: It needs what is not made here.
        UnavailableError: The disk failed.
    """
    disk = world.disk
    try:
        if await disk.stat(f"{path}/bin/microvm-run") is None:
            raise RuntimeFailed("run", name, f"{path} is no microvm.nix runner: it has no bin/microvm-run")
        for entry, what in _UNMADE:
            found = await disk.stat(f"{path}/share/microvm/{entry}")
            if found is not None and (found.is_directory or found.size_bytes):
                raise Unsupported(f"a runner with {what}", "they are not made here", _ELSEWHERE)
        taps = await _lines(world, f"{path}/share/microvm/tap-interfaces")
        flags = await _lines(world, f"{path}/share/microvm/tap-flags")
        can_shut_down = await disk.stat(f"{path}/bin/microvm-shutdown") is not None
    except OSError as error:
        raise from_os_error(error, "look into", path) from error
    if taps and "multi_queue" in " ".join(flags).split():
        raise Unsupported("a runner with taps of several queues", "only those with one are made here", f"give it one vcpu, or {_ELSEWHERE}")
    for tap in taps:
        if not _TAP.fullmatch(tap) or tap in (".", ".."):
            raise RuntimeFailed("run", name, f"the runner's tap {tap!r} is no interface's name")
    return Runner(path, taps, can_shut_down)


async def pid_by_shim(world: World, spec: MachineSpec) -> int | None:
    """Ask a machine's shim for the pid of what it runs."""
    try:
        return (await ShimClient(world, f"{spec.folder}/{SHIM_SOCKET}", spec.name).status()).vmm_pid or None
    except RuntimeFailed:  # it is gone, and its machine with it
        return None


class RunnerControl:
    """Steers a machine that a runner started, as far as one can: it has no socket whose language is known.

    Args:
        world: The machine.
        runner: What runs.
        spec: The machine.
        cwd: The machine's state folder.
        find_pid: Finds its process.
    """

    def __init__(self, world: World, runner: Runner, spec: MachineSpec, *, cwd: str, find_pid: FindPid) -> None:
        self._world = world
        self._runner = runner
        self._spec = spec
        self._cwd = cwd
        self._find_pid = find_pid

    async def boot(self) -> None:
        """Nothing: the runner boots at once."""

    async def pause(self) -> None:
        """Refused."""
        raise self._impossible("pause")

    async def resume(self) -> None:
        """Refused."""
        raise self._impossible("resume")

    async def snapshot(self, folder: str) -> None:
        """Refused."""
        raise self._impossible("snapshot")

    async def power_button(self) -> None:
        """Run its bin/microvm-shutdown, which returns when the machine has ended."""
        if not self._runner.can_shut_down:
            raise RuntimeFailed("power off", self._spec.name, "its runner has no bin/microvm-shutdown (microvm.socket is not set)")
        identity = await self._identity()
        env = {**ENVIRONMENT, **({"MAINPID": str(identity.pid)} if identity is not None else {})}
        try:
            process = await self._world.processes.spawn(self._runner.stop_argv, env=env, cwd=self._cwd)
        except OSError as error:
            raise RuntimeFailed("power off", self._spec.name, f"{self._runner.stop_argv[0]}: {error.strerror}") from error
        try:
            async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
                status = await process.wait()
        except TimeoutError as error:
            raise UnavailableError(f"{self._spec.name} did not end within {SHUTDOWN_TIMEOUT_S:g} s of its bin/microvm-shutdown") from error
        finally:
            await process.end()
        if status != 0:
            raise RuntimeFailed("power off", self._spec.name, f"bin/microvm-shutdown ended with status {status}")

    async def quit(self) -> None:
        """Kill the machine; one that is gone is fine."""
        identity = await self._identity()
        if identity is not None:
            await kill_process(self._world, identity, name=self._spec.name)

    async def resize(self, *, vcpus: int | None, memory_bytes: int | None) -> tuple[str, ...]:
        """Change nothing: its sizes stand in its configuration."""
        changes = (("vcpus", vcpus), ("memory", memory_bytes))
        return tuple(
            f"{what}: change microvm.{key} in its configuration, update it and restart"
            for (what, wanted), key in zip(changes, ("vcpu", "mem"), strict=True)
            if wanted is not None
        )

    async def status(self) -> MachineStatus:
        """Say whether its process lives."""
        return "running" if await self._identity() is not None else "shutdown"

    def close(self) -> None:
        """Let go: nothing is held."""

    async def _identity(self) -> ProcessIdentity | None:
        pid = await self._find_pid(self._world, self._spec)
        return None if pid is None else self._world.processes.identify(pid)

    def _impossible(self, action: str) -> RuntimeFailed:
        return RuntimeFailed(action, self._spec.name, "a microvm.nix runner offers no way to do that from outside")


async def _lines(world: World, path: str) -> tuple[str, ...]:
    """Return a list's lines, none if there is no such file."""
    try:
        data = await world.disk.read(path, n_bytes_max=_LIST_BYTES_MAX)
    except FileNotFoundError:
        return ()
    return tuple(line for line in (each.strip() for each in data.decode("utf-8", "replace").splitlines()) if line)
