"""VmBook: the records of all nodes' virtual machines in the replicated store, under "isopod/vms/NAME", as JSON.

A node writes the records of its own machines and no other's. To create one is to claim its name first, by a transaction that fails if any
node has it; then the machine is made; then its record follows what becomes of it, told by the node's events. What the machines of a node
are is decided by the node alone: after anything unclear the book reads both again and writes what is so, and a record without its machine
goes. A machine that was made by another door than this one is written down too, unless another node has its name: then it is listed by its
own node only.

Not here: moving a machine, or starting it elsewhere.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, NamedTuple

import msgspec

from isopod.api import messages as m
from isopod.api import methods
from isopod.api.store import Condition, Delete, Entry, StoreOperations, Txn
from isopod.faces.grpc.node import NodeLink
from isopod.world.errors import AlreadyExists, IsopodError, PeerError

PREFIX: Final = "isopod/vms/"
COALESCE_S: Final = 0.05
"""What happens within this time is written at once."""
RETRY_S: Final = 1.0
CHECK_S: Final = 30.0
"""After so long the records are compared with the store once more."""


class VmRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What all nodes know of a machine. `state` is a constant of the protocol's VmState, `why` the reason of FAILED."""

    name: str
    node_id: int
    vm_id: str = ""
    state: str = "VM_STATE_UNKNOWN"
    vcpus: int = 0
    memory_mb: int = 0
    config: str = ""
    why: str = ""


class _Known(NamedTuple):
    """A record as it stands in the store."""

    revision: int
    value: bytes


List = Callable[[], Awaitable[list[VmRecord]]]


class VmBook:
    """Close after use.

    Args:
        node: The node whose machines are written down.
        store: The replicated store.
        own: Returns the records of the node's machines, as they are now.
    """

    def __init__(self, node: NodeLink, store: StoreOperations, own: List) -> None:
        self._node = node
        self._store = store
        self._own = own
        self._known: dict[str, _Known] | None = None
        """The own records in the store by name; None if that has to be looked up."""
        self._claimed: dict[str, None] = {}
        """Names whose machine is just being made."""
        self._foreign: dict[str, None] = {}
        """Names of own machines that another node has too."""
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Keep the records true from now on."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._listen(), name="vm events"), loop.create_task(self._follow(), name="vm records")]

    async def close(self) -> None:
        """Stop keeping them; what stands in the store stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @asynccontextmanager
    async def claim(self, record: VmRecord, *, timeout_s: float) -> AsyncIterator[None]:
        """Have a name for the machine that is made in the block; if that fails, the name is free again.

        Raises:
            AlreadyExists: It is another machine's.
            IsopodError: The store cannot decide now.
        """
        self._claimed[record.name] = None
        try:
            known = await self._claim(record, timeout_s)
            try:
                yield
            except PeerError:
                raise  # whether it was made is not known: the comparison below finds out
            except IsopodError:
                with suppress(IsopodError):  # then the comparison takes it away
                    await self._delete(record.name, known, timeout_s)
                raise
        finally:
            del self._claimed[record.name]
            self._known = None
            self._wake.set()

    async def others(self, *, timeout_s: float) -> list[VmRecord]:
        """Return the records of the other nodes' machines."""
        entries, _ = await self._store.list_all(PREFIX, timeout_s=timeout_s)
        found = (_decode(entry) for entry in entries)
        return [record for record in found if record is not None and record.node_id != self._node.node_id]

    async def find(self, name: str, *, timeout_s: float) -> VmRecord | None:
        """Return the record under a name."""
        entry = (await self._store.get(PREFIX + name, timeout_s=timeout_s)).entry
        return _decode(entry) if entry is not None else None

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _claim(self, record: VmRecord, timeout_s: float) -> _Known:
        value = msgspec.json.encode(record)
        revision = await self._store.put_if(PREFIX + record.name, value, revision=0, timeout_s=timeout_s)
        if revision is not None:
            return _Known(revision, value)
        entry = (await self._store.get(PREFIX + record.name, timeout_s=timeout_s)).entry
        there = _decode(entry) if entry is not None else None
        if entry is not None and there is not None and (there.node_id != record.node_id or await self._has(record.name)):
            raise AlreadyExists("VM", record.name, f"it is on node {there.node_id}")
        # A record of ours without a machine, or one that nobody can read: it is in nobody's way.
        revision = await self._store.put_if(
            PREFIX + record.name, value, revision=entry.mod_revision if entry is not None else 0, timeout_s=timeout_s
        )
        if revision is None:
            raise AlreadyExists("VM", record.name, "it was created just now")
        return _Known(revision, value)

    async def _has(self, name: str) -> bool:
        return any(record.name == name for record in await self._own())

    async def _listen(self) -> None:
        """Wake the other task for all that happens to the node's containers."""
        request = m.EventsRequest(kinds=("created", "deleted", "status", "resources"))
        while True:
            try:
                async with self._node.client.open(methods.CONTAINER_EVENTS, request) as call:
                    self._known = None
                    self._wake.set()
                    async for _ in call:
                        self._wake.set()
            except IsopodError as error:
                self._node.logger.debug("grpc.events_lost", why=error.message)
            await asyncio.sleep(RETRY_S)

    async def _follow(self) -> None:
        """Write what changed whenever something did, and now and then all the same."""
        waits_for = ""
        while True:
            try:
                async with asyncio.timeout(CHECK_S):
                    await self._wake.wait()
            except TimeoutError:
                self._known = None
            await asyncio.sleep(COALESCE_S)
            self._wake.clear()
            try:
                await self._write_all()
                waits_for = ""
            except IsopodError as error:
                if error.code != waits_for:
                    self._node.logger.info("grpc.records_wait", why=error.message)
                waits_for = error.code
                self._known = None
                self._wake.set()
                await asyncio.sleep(RETRY_S)

    async def _write_all(self) -> None:
        """Make the store say what the node says."""
        known = self._known
        if known is None:
            known = self._known = await self._read_own()
        wanted = {record.name: record for record in await self._own()}
        for name, record in wanted.items():
            value = msgspec.json.encode(record)
            if name in self._claimed or (name in known and known[name].value == value):
                continue
            revision = await self._store.put_if(PREFIX + name, value, revision=known[name].revision if name in known else 0)
            if revision is None:
                self._say_foreign(record)
            else:
                known[name] = _Known(revision, value)
                self._foreign.pop(name, None)
        for name in [name for name in known if name not in wanted and name not in self._claimed]:
            await self._delete(name, known.pop(name))

    async def _read_own(self) -> dict[str, _Known]:
        entries, _ = await self._store.list_all(PREFIX)
        decoded = ((entry, _decode(entry)) for entry in entries)
        return {
            record.name: _Known(entry.mod_revision, entry.value)
            for entry, record in decoded
            if record is not None and record.node_id == self._node.node_id
        }

    async def _delete(self, name: str, known: _Known, timeout_s: float = 5.0) -> None:
        """Remove a record, unless somebody else changed it meanwhile."""
        unchanged = Condition(PREFIX + name, "mod_revision", "=", known.revision)
        await self._store.txn(Txn((unchanged,), (Delete(PREFIX + name),)), timeout_s=timeout_s)

    def _say_foreign(self, record: VmRecord) -> None:
        if record.name not in self._foreign:
            self._foreign[record.name] = None
            self._node.logger.warning("grpc.vm_name_taken", name=record.name, why="another node has a machine of that name")


def _decode(entry: Entry) -> VmRecord | None:
    """Return a record, None for what is none: the key space is everybody's."""
    try:
        record = msgspec.json.decode(entry.value, type=VmRecord)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return record if entry.key == PREFIX + record.name else None
