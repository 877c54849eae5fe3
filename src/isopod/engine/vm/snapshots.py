"""Snapshots: what a user wrote down of a virtual machine, beside its other durable files.

CONTAINERS/ID/snapshots/NAME holds what the VMM wrote (memory and devices), a copy of the disk as it was at the same moment, and `meta.json`
with what is needed to go on. A folder without `meta.json` was never finished, and counts as none.

Rules: a snapshot fits one guest, one VMM, one accelerator and one shape of machine; that is checked before anything of the machine is
touched. The disk of a machine that goes back is a copy of the snapshot's, so that one can go back to it again.
Not here: who pauses the machine, and who starts it (`isolation`).
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec

from isopod.api.machines import VmSnapshot
from isopod.engine.vm.disks import copy_sparse
from isopod.world.errors import AlreadyExists, BadRecord, DiskFull, NotFound, Unsupported, from_os_error
from isopod.world.world import World

VERSION: Final = 1
META_FILE: Final = "meta.json"
META_BYTES_MAX: Final = 64 << 10
UPPER_FILE: Final = "upper.img"
_PART: Final = ".part-"
"""Before a snapshot's name: no snapshot is called so."""


class _Version(msgspec.Struct):
    version: int


class Shape(msgspec.Struct, frozen=True):
    """What a machine must be like to go on from a snapshot."""

    driver: str
    vmm: str
    guest: str
    accelerator: str
    machine: str
    vcpus: int
    memory_bytes: int
    disks: tuple[str, ...]
    """Paths of the layers, in their order."""
    n_nics: int


class SnapshotMeta(msgspec.Struct, frozen=True):
    """meta.json."""

    version: int
    name: str
    created_at_ns: int
    shape: Shape
    n_memory_bytes: int
    n_disk_bytes: int

    @property
    def message(self) -> VmSnapshot:
        """As the API has it."""
        return VmSnapshot(name=self.name, created_at_ns=self.created_at_ns, memory_bytes=self.n_memory_bytes, disk_bytes=self.n_disk_bytes)


class Snapshots:
    """The snapshots of one machine.

    Args:
        world: Where they are.
        folder: Their folder.
        machine: The machine's name, for errors.
    """

    def __init__(self, world: World, folder: str, machine: str) -> None:
        self._world = world
        self._folder = folder
        self._machine = machine

    def path(self, name: str) -> str:
        """Return the folder of a snapshot."""
        return f"{self._folder}/{name}"

    async def write(self, name: str, shape: Shape, *, upper: str, save: Callable[[str], Awaitable[None]]) -> VmSnapshot:
        """Write one; the machine stands still meanwhile.

        Args:
            name: Its name, checked.
            shape: What the machine is like.
            upper: The machine's disk.
            save: Writes memory and devices into a folder.

        Raises:
            AlreadyExists: There is one.
            DiskFull, UnavailableError, RuntimeFailed: Nothing is left behind.
        """
        part = f"{self._folder}/{_PART}{name}"
        if await self._read(name) is not None:
            raise AlreadyExists("snapshot", name, f"remove it, or take another name: `isopod vm status {self._machine}` lists them")
        try:
            await self._world.disk.remove_tree(part)
            await self._world.disk.remove_tree(self.path(name))
            await self._world.disk.make_directory(part)
            if await self._world.disk.free_bytes(part) < shape.memory_bytes:
                raise DiskFull(part)
            await save(part)
            n_memory_bytes = await self._world.disk.tree_bytes(part)
            await copy_sparse(self._world, upper, f"{part}/{UPPER_FILE}")
            n_disk_bytes = await self._world.disk.tree_bytes(part) - n_memory_bytes
            now_ns = self._world.clock.now_ns()
            meta = SnapshotMeta(VERSION, name, now_ns, shape, n_memory_bytes, n_disk_bytes)
            await self._world.disk.write_atomic(f"{part}/{META_FILE}", msgspec.json.encode(meta))
            await self._world.disk.rename(part, self.path(name))
            await self._world.disk.sync_directory(self._folder)
            return meta.message
        except BaseException as error:
            await self._world.disk.remove_tree(part)
            if isinstance(error, OSError):
                raise from_os_error(error, "write", part) from error
            raise

    async def list(self) -> Sequence[VmSnapshot]:
        """Return those that are whole, newest first."""
        metas = [await self._read(name) for name in await self._world.disk.list(self._folder)]
        whole = [meta for meta in metas if meta is not None and meta.version == VERSION]
        return [meta.message for meta in sorted(whole, key=lambda meta: (-meta.created_at_ns, meta.name))]

    async def remove(self, name: str) -> None:
        """Remove one. Raises NotFound, UnavailableError."""
        if await self._world.disk.stat(self.path(name)) is None:
            raise self._missing(name)
        try:
            await self._world.disk.remove(f"{self.path(name)}/{META_FILE}")
            await self._world.disk.remove_tree(self.path(name))
        except OSError as error:
            raise from_os_error(error, "remove", self.path(name)) from error

    async def check(self, name: str, shape: Shape) -> None:
        """Check that a machine of that shape can go on from one.

        Raises:
            NotFound: There is none.
            BadRecord: It is damaged.
            Unsupported: It does not fit.
        """
        if await self._world.disk.stat(self.path(name)) is None:
            raise self._missing(name)
        meta = await self._load(name)
        if await self._world.disk.stat(f"{self.path(name)}/{UPPER_FILE}") is None:
            raise BadRecord(f"{self.path(name)}/{UPPER_FILE}", "the disk is missing", "remove the snapshot: it cannot be gone back to")
        for field in shape.__struct_fields__:
            theirs, ours = getattr(meta.shape, field), getattr(shape, field)
            if theirs != ours:
                raise Unsupported(f"snapshot {name}", f"it was made with another {field}: {_brief(theirs)}, not {_brief(ours)}")

    async def restore_disk(self, name: str, upper: str) -> None:
        """Give the machine the disk of a snapshot; it does not run. Raises RuntimeFailed, UnavailableError."""
        part = f"{upper}.part"
        try:
            await self._world.disk.remove(part)
            await copy_sparse(self._world, f"{self.path(name)}/{UPPER_FILE}", part)
            await self._world.disk.rename(part, upper)
        except OSError as error:
            raise from_os_error(error, "restore", upper) from error

    async def _load(self, name: str) -> SnapshotMeta:
        """Return what describes a snapshot. Raises BadRecord, Unsupported."""
        path = f"{self.path(name)}/{META_FILE}"
        try:
            text = await self._world.disk.read(path, n_bytes_max=META_BYTES_MAX)
            version = msgspec.json.decode(text, type=_Version).version
            if version != VERSION:
                raise Unsupported(f"snapshot {name}", f"it is of version {version}, this isopod knows {VERSION}")
            return msgspec.json.decode(text, type=SnapshotMeta)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadRecord(path, str(error), "remove the snapshot: it cannot be gone back to") from error

    async def _read(self, name: str) -> SnapshotMeta | None:
        try:
            text = await self._world.disk.read(f"{self.path(name)}/{META_FILE}", n_bytes_max=META_BYTES_MAX)
            return msgspec.json.decode(text, type=SnapshotMeta)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _missing(self, name: str) -> NotFound:
        return NotFound("snapshot", name, f"`isopod vm status {self._machine}` lists them")


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
