"""Templates: machines that were booted once and written down, for others to go on from.

A template is a folder with the memory of a booted guest that has mounted everything and is nobody yet, the state of its devices, and the
empty disk that it has mounted. A new machine maps that memory privately, gets a copy of that disk, and is told who it is. Templates are
made in the background after a cold start, bounded in number and bytes, the longest unused going first, and thrown away when what they
were made of changes: that is their name.

Rules: a folder that has its `meta.json` is whole; everything else is removed at `open`. They are good for the boot of the host in which
they were made. Before each use length, beginning and end are compared; the whole memory's digest once, in the background, for those that
a daemon before this one made. One that a start goes on from right now is not removed.
Not here: how a machine is booted and saved (`isolation` passes that in).
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, NamedTuple

import msgspec

from isopod.journal.crc import crc32c
from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError, UnavailableError
from isopod.world.world import World

VERSION: Final = 1
MEMORY_FILE: Final = "memory"
STATE_FILE: Final = "state"
DISK_FILE: Final = "upper.img"
META_FILE: Final = "meta.json"
META_BYTES_MAX: Final = 64 << 10
STATE_BYTES_MAX: Final = 64 << 20
SAMPLE_BYTES: Final = 64 << 10
FAILURES_MAX: Final = 2
"""So often is a template tried that cannot be made."""
_PART: Final = ".part"
_NAME_CHARS: Final = 32

Make = Callable[[str], Awaitable[None]]
"""Boots a machine and fills the folder with `memory`, `state` and `upper.img`."""


class TemplateKey(NamedTuple):
    """What a template is made of: one of another key does not fit."""

    image_id: str
    guest: str
    """Digest of kernel and agent."""
    vmm: str
    """The VMM's version."""
    machine: str
    accelerator: str
    vcpus: int
    memory_bytes: int
    disk_bytes: int
    n_nics: int
    inside: str
    """What was mounted and limited in the guest beside its layers and its empty disk, as JSON."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:_NAME_CHARS]


class Template(NamedTuple):
    """A template that may be used."""

    name: str
    folder: str

    @property
    def memory_file(self) -> str:
        """Where its memory lies."""
        return f"{self.folder}/{MEMORY_FILE}"


class Meta(msgspec.Struct, frozen=True):
    """meta.json of a template."""

    version: int
    key: TemplateKey
    boot_id: str
    made_at_ns: int
    n_memory_bytes: int
    memory_sample: int
    """CRC-32C of its beginning and end."""
    memory_digest: str
    n_state_bytes: int
    state_crc: int
    n_disk_bytes: int
    """What the folder takes on the disk."""


class TemplateStatistics(NamedTuple):
    """What there is, and what was done."""

    n_templates: int
    n_bytes: int
    n_made: int
    n_used: int
    n_failed: int
    n_damaged: int


class Templates:
    """The templates of one instance.

    Args:
        world: Where they are.
        folder: Their folder.
        n_max: How many are kept; 0 for none ever.
        bytes_max: What all may take on the disk.
        logger: Told of what is made and removed.
    """

    def __init__(self, world: World, folder: str, *, n_max: int, bytes_max: int, logger: Logger) -> None:
        self._world = world
        self._folder = folder
        self._n_max = n_max
        self._bytes_max = bytes_max
        self._logger = logger
        self._found: dict[str, Meta] = {}
        """By name, the longest unused first."""
        self._unverified: dict[str, None] = {}
        self._users: dict[str, str] = {}
        """Who goes on from which right now, by the machine's id."""
        self._failures: dict[str, int] = {}
        self._making: dict[str, None] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._n_tasks = 0
        self._turn = asyncio.Lock()
        self._counts = {"made": 0, "used": 0, "failed": 0, "damaged": 0}

    async def open(self) -> None:
        """Look at what is there; what is half made, or of another boot, is removed. Raises UnavailableError."""
        disk, boot_id = self._world.disk, self._world.processes.boot_id()
        try:
            metas = [(name, await self._read_meta(name)) for name in await disk.list(self._folder)]
            for name, meta in metas:
                if meta is None or meta.version != VERSION or meta.boot_id != boot_id or meta.key.name != name:
                    await disk.remove_tree(f"{self._folder}/{name}")
        except OSError as error:
            self._logger.error("vm.templates_unreadable", path=self._folder, why=error.strerror)
            return
        whole = [(name, meta) for name, meta in metas if meta is not None and await disk.stat(f"{self._folder}/{name}") is not None]
        self._found = dict(sorted(whole, key=lambda row: (row[1].made_at_ns, row[0])))
        self._unverified = dict.fromkeys(self._found)

    async def take(self, key: TemplateKey, user: str) -> Template | None:
        """Return the template of a key, if there is a whole one; it stays until `release`.

        Args:
            key: What it must be made of.
            user: The machine's id.
        """
        name = key.name
        meta = self._found.pop(name, None)
        if meta is None:
            return None
        self._found[name] = meta  # it is the one used last now
        self._users[user] = name
        why = await self._damage(name, meta)
        if why:
            self.release(user)
            await self.discard(name, why)
            return None
        if name in self._unverified:
            self._start(self._verify(name, meta), f"verify template {name}")
        self._counts["used"] += 1
        return Template(name, f"{self._folder}/{name}")

    def release(self, user: str) -> None:
        """Say that a machine has what it needed, or never will; one that took none is fine."""
        self._users.pop(user, None)

    async def discard(self, name: str, why: str) -> None:
        """Remove a template that is no good. A machine that runs from it goes on."""
        if self._found.pop(name, None) is None:
            return
        self._counts["damaged"] += 1
        self._logger.warning("vm.template_discarded", template=name, why=why)
        await self._remove(name)

    def make_nowait(self, key: TemplateKey, make: Make) -> None:
        """Have a template made in the background, if there is none and it may be; one is made at a time."""
        name = key.name
        if self._n_max == 0 or name in self._found or name in self._making or self._failures.get(name, 0) >= FAILURES_MAX:
            return
        self._making[name] = None
        self._start(self._make(key, make), f"make template {name}")

    async def sweep(self, *, images: Callable[[str], bool], guest: str, vmm: str) -> None:
        """Remove those whose image is gone, or that were made with another guest or VMM.

        Args:
            images: Says whether there is an image of that id.
            guest: The guest's digest now.
            vmm: The VMM's version now.
        """
        for name, meta in list(self._found.items()):
            is_current = images(meta.key.image_id) and meta.key.guest == guest and meta.key.vmm == vmm
            if not is_current and name not in self._users.values():
                self._found.pop(name, None)
                self._logger.info("vm.template_outdated", template=name)
                await self._remove(name)

    def statistics(self) -> TemplateStatistics:
        """Return what there is, and what was done."""
        counts = self._counts
        n_bytes = sum(meta.n_disk_bytes for meta in self._found.values())
        return TemplateStatistics(len(self._found), n_bytes, counts["made"], counts["used"], counts["failed"], counts["damaged"])

    async def wait_idle(self) -> None:
        """Return when nothing is made or verified."""
        while tasks := list(self._tasks.values()):
            await asyncio.gather(*(asyncio.shield(task) for task in tasks), return_exceptions=True)

    async def close(self) -> None:
        """Give up what is being made; what is whole stays."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- making --------------------------------------------------------------------------------------------------------------

    async def _make(self, key: TemplateKey, make: Make) -> None:
        name, part = key.name, f"{self._folder}/{key.name}{_PART}"
        try:
            async with self._turn:
                if not await self._make_room(key.memory_bytes):
                    return
                await self._world.disk.remove_tree(part)
                await self._world.disk.make_directory(part)
                await make(part)
                meta = await self._describe(key, part)
                await self._world.disk.write(f"{part}/{META_FILE}", msgspec.json.encode(meta))
                await self._world.disk.rename(part, f"{self._folder}/{name}")
                self._found[name] = meta
                self._counts["made"] += 1
                self._logger.info("vm.template_made", template=name, n_bytes=meta.n_disk_bytes)
        except (IsopodError, OSError) as error:
            self._failures[name] = self._failures.get(name, 0) + 1
            self._counts["failed"] += 1
            self._logger.warning("vm.template_failed", template=name, why=str(error))
        finally:
            self._making.pop(name, None)
            await asyncio.shield(asyncio.ensure_future(self._remove(f"{name}{_PART}")))

    async def _make_room(self, n_bytes: int) -> bool:
        """Remove the longest unused until one more of that size fits; False if it never will."""
        await self._world.disk.make_directory(self._folder)
        if n_bytes > self._bytes_max or await self._world.disk.free_bytes(self._folder) < 2 * n_bytes:
            return False
        while len(self._found) >= self._n_max or sum(meta.n_disk_bytes for meta in self._found.values()) + n_bytes > self._bytes_max:
            unused = [name for name in self._found if name not in self._users.values()]
            if not unused:
                return False
            self._found.pop(unused[0])
            self._logger.info("vm.template_evicted", template=unused[0])
            await self._remove(unused[0])
        return True

    async def _describe(self, key: TemplateKey, folder: str) -> Meta:
        disk = self._world.disk
        state = await disk.read(f"{folder}/{STATE_FILE}", n_bytes_max=STATE_BYTES_MAX)
        n_memory_bytes, sample = await self._sample(folder)
        return Meta(
            version=VERSION,
            key=key,
            boot_id=self._world.processes.boot_id(),
            made_at_ns=self._world.clock.now_ns(),
            n_memory_bytes=n_memory_bytes,
            memory_sample=sample,
            memory_digest=await disk.digest(f"{folder}/{MEMORY_FILE}"),
            n_state_bytes=len(state),
            state_crc=crc32c(state),
            n_disk_bytes=await disk.tree_bytes(folder),
        )

    # -- checking ------------------------------------------------------------------------------------------------------------

    async def _damage(self, name: str, meta: Meta) -> str:
        """Return what is wrong with a template, "" for nothing that can be seen quickly."""
        folder = f"{self._folder}/{name}"
        try:
            state = await self._world.disk.read(f"{folder}/{STATE_FILE}", n_bytes_max=STATE_BYTES_MAX)
            sample = await self._sample(folder)
        except OSError as error:
            return error.strerror or "cannot be read"
        if (len(state), crc32c(state)) != (meta.n_state_bytes, meta.state_crc):
            return "its state is damaged"
        return "" if sample == (meta.n_memory_bytes, meta.memory_sample) else "its memory is damaged"

    async def _sample(self, folder: str) -> tuple[int, int]:
        """Return the length of a memory, and the CRC of its beginning and end."""
        file = await self._world.disk.open_read(f"{folder}/{MEMORY_FILE}")
        try:
            n_bytes = file.size_bytes()
            head = await file.read_at(0, SAMPLE_BYTES)
            tail = await file.read_at(max(0, n_bytes - SAMPLE_BYTES), SAMPLE_BYTES)
        finally:
            file.close()
        return n_bytes, crc32c(head + tail)

    async def _verify(self, name: str, meta: Meta) -> None:
        """Compare the whole memory with its digest, once."""
        self._unverified.pop(name, None)
        try:
            found = await self._world.disk.digest(f"{self._folder}/{name}/{MEMORY_FILE}")
        except OSError as error:
            await self.discard(name, error.strerror or "cannot be read")
            return
        if found != meta.memory_digest:
            await self.discard(name, "its memory is not what was written")

    async def _read_meta(self, name: str) -> Meta | None:
        try:
            text = await self._world.disk.read(f"{self._folder}/{name}/{META_FILE}", n_bytes_max=META_BYTES_MAX)
            return msgspec.json.decode(text, type=Meta)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    async def _remove(self, name: str) -> None:
        try:
            await self._world.disk.remove_tree(f"{self._folder}/{name}")
        except (OSError, UnavailableError) as error:
            self._logger.warning("vm.template_not_removed", template=name, why=str(error))

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._n_tasks += 1
        key = self._n_tasks
        self._tasks[key] = task

        def ended(done: asyncio.Task[None]) -> None:
            del self._tasks[key]
            if not done.cancelled() and (error := done.exception()) is not None:
                self._logger.error("vm.background_failed", task=name, why=repr(error))

        task.add_done_callback(ended)
