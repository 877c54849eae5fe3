"""Accelerator: what runs the processors of virtual machines here, found out by booting.

That /dev/kvm exists says little: on a machine that is a guest itself a kernel may never come up under it. So a kernel is booted once under
KVM, without anything to run: one that comes up as far as missing its root file system within the deadline proves it. Else it is TCG, which
emulates the processor. What was found is kept in a file under a key of kernel, processor, QEMU and guest, and found out
anew when one of them changes. Nobody waits for it but the first machine.
"""

import asyncio
import hashlib
from typing import Final, Literal, NamedTuple

import msgspec

from isopod.api.messages import Probed
from isopod.engine.vm.guest import GuestFiles, kernel_words
from isopod.engine.vm.machine import Driver
from isopod.runtime.logger import Logger
from isopod.world.errors import DeadlineExceeded
from isopod.world.world import World

Name = Literal["kvm", "tcg"]
Choice = Literal["auto", "kvm", "tcg"]
KVM_DEVICE: Final = "/dev/kvm"
CPU_FACTS: Final = "/proc/cpuinfo"
CPU_FACTS_BYTES_MAX: Final = 16 << 20
KVM_TIMEOUT_S: Final = 6.0
"""A kernel comes up under KVM in half a second; one that needs ten times as long is not faster than TCG."""
CACHE_BYTES_MAX: Final = 64 << 10
PROGRAM: Final = "qemu-system-x86_64"
CHOSEN: Final = "chosen by the configuration"
_CAME_UP: Final = b"Unable to mount root fs"


class Accelerator(NamedTuple):
    """What was found."""

    name: Name
    why: str
    tsc_khz: int
    """The host's clock, 0 if it is not known."""


class _Stored(msgspec.Struct):
    key: str
    name: Name
    why: str


class Accelerators:
    """Finds it out once and remembers.

    Args:
        world: The machine.
        file: Where it is remembered.
        choice: "auto", or what the user wants whatever comes of it.
        qemu: The driver under which it is tried.
        logger: Told of what was found.
    """

    def __init__(self, world: World, file: str, choice: Choice, *, qemu: Driver, logger: Logger) -> None:
        self._world = world
        self._file = file
        self._choice = choice
        self._qemu = qemu
        self._logger = logger
        self._lock = asyncio.Lock()
        self._found: Accelerator | None = None

    async def find(self, guest: GuestFiles) -> Accelerator:
        """Return what to use; the first call may boot a kernel.

        Args:
            guest: Whose kernel.
        """
        async with self._lock:
            if self._found is None:
                self._found = await self._find(guest)
            return self._found

    async def known(self) -> Probed:
        """Return what is known by now, without booting anything."""
        if self._choice != "auto":
            return Probed(value=self._choice, why=CHOSEN)
        if self._found is None:
            stored = await self._load()
            if stored is None:
                return Probed(value="unknown", why="found out when the first virtual machine starts")
            return Probed(value=stored.name, why=f"{stored.why} (remembered)")
        return Probed(value=self._found.name, why=self._found.why)

    async def _find(self, guest: GuestFiles) -> Accelerator:
        model, khz = await self._processor()
        if self._choice != "auto":
            return Accelerator(self._choice, CHOSEN, khz)
        key = await self._key(guest, model)
        stored = await self._load()
        if stored is not None and stored.key == key:
            return Accelerator(stored.name, stored.why, khz)
        name, why = await self._try(guest)
        self._logger.info("vm.accelerator", value=name, why=why)
        await self._store(_Stored(key, name, why))
        return Accelerator(name, why, khz)

    async def _try(self, guest: GuestFiles) -> tuple[Name, str]:
        if await self._world.disk.stat(KVM_DEVICE) is None:
            return "tcg", f"there is no {KVM_DEVICE}"
        program = self._world.processes.which(PROGRAM)
        if program is None:
            return "tcg", f"{PROGRAM} is not installed"
        started_ns = self._world.clock.monotonic_ns()
        try:
            done = await self._world.processes.run(probe_argv(program, guest), timeout_s=KVM_TIMEOUT_S)
        except DeadlineExceeded:
            return "tcg", f"{KVM_DEVICE} is there, but a kernel did not come up under it within {KVM_TIMEOUT_S:g} s"
        except OSError as error:
            return "tcg", f"{PROGRAM} does not run: {error.strerror}"
        if _CAME_UP in done.stdout:
            return "kvm", f"a kernel came up under it in {(self._world.clock.monotonic_ns() - started_ns) / 1e9:.2f} s"
        reason = done.stderr.decode(errors="replace").splitlines()
        return "tcg", f"a kernel did not come up under {KVM_DEVICE}" + (f": {reason[0].strip()[:200]}" if reason else "")

    async def _key(self, guest: GuestFiles, model: str) -> str:
        version = (await self._qemu.check()).why
        facts = (self._world.kernel.host_facts().kernel, model, version, guest.digest)
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()

    async def _processor(self) -> tuple[str, int]:
        """Return the processor's model and its clock in kHz, "" and 0 where the kernel does not say."""
        try:
            text = (await self._world.disk.read(CPU_FACTS, n_bytes_max=CPU_FACTS_BYTES_MAX)).decode(errors="replace")
        except OSError:
            return "", 0
        return _field(text, "model name"), _khz(_field(text, "cpu MHz"))

    async def _load(self) -> _Stored | None:
        try:
            return msgspec.json.decode(await self._world.disk.read(self._file, n_bytes_max=CACHE_BYTES_MAX), type=_Stored)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    async def _store(self, found: _Stored) -> None:
        try:
            await self._world.disk.make_directory(self._file.rpartition("/")[0])
            await self._world.disk.write_atomic(self._file, msgspec.json.encode(found))
        except OSError as error:
            self._logger.warning("vm.accelerator_not_stored", path=self._file, why=error.strerror)


def probe_argv(program: str, guest: GuestFiles) -> list[str]:
    """Return the command that boots a kernel under KVM, with its console as standard output; it ends by itself, as it has no root."""
    words = " ".join(kernel_words("kvm", 0))
    return [
        *(program, "-M", "microvm,acpi=on,pit=off,pic=off,rtc=on,pcie=off,isa-serial=on", "-accel", "kvm", "-cpu", "host"),
        *("-m", "128M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", guest.kernel, "-append", f"{words} pci=off"),
    ]


def _field(text: str, name: str) -> str:
    """Return the first value of that name in /proc/cpuinfo."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _khz(mhz: str) -> int:
    try:
        return int(float(mhz) * 1000)
    except ValueError:
        return 0
