"""Machines: what can be done to virtual machines beyond the life cycle they share with containers.

Like `changes` it takes the lock of whom it changes, and what it changes runs in a task of the engine's own. A restore is a start that goes
on from a snapshot: what ran before is ended, and the record's `origin` says where it came from.
"""

import msgspec

from isopod.api.machines import ResizeVm, VmBuild, VmConsole, VmSnapshot, VmSnapshotRequest, VmState
from isopod.api.messages import Container, Stdout, UpdatedContainer, VmSettings
from isopod.engine import operations as ops
from isopod.engine.containers import Containers, Entry
from isopod.engine.isolation import MachineIsolation
from isopod.engine.metadata import MetadataStore
from isopod.engine.states import LIVE
from isopod.engine.terminal import Stdio, converse
from isopod.world.errors import InvalidArgument, NotFound, WrongState
from isopod.world.ids import check_name


class Machines:
    """The virtual machines among the containers.

    Args:
        store: Where their records are.
        containers: Who they are, and their locks.
        isolation: What runs them.
    """

    def __init__(self, store: MetadataStore, containers: Containers, isolation: MachineIsolation) -> None:
        self._store = store
        self._containers = containers
        self._isolation = isolation

    async def status(self, name: str) -> VmState:
        """Ask a machine what it does.

        Raises:
            NotFound: No such machine.
            WrongState: It is a container.
        """
        record = self._machine(name).record
        snapshots = tuple(await self._isolation.snapshots(record.id))
        if record.status not in LIVE:
            return VmState(container=record, snapshots=snapshots, why=record.error)
        state = await self._isolation.machine_state(record)
        return VmState(
            container=record,
            machine=state.machine,
            agent=state.agent,
            guest_kernel=state.guest_kernel,
            silent_s=state.silent_s,
            snapshots=snapshots,
            why=state.why,
        )

    async def snapshot(self, request: VmSnapshotRequest) -> VmSnapshot:
        """Write a machine down as it is. It stands still for that long.

        Raises:
            NotFound: No such machine.
            WrongState: It does not run, or is a container.
            AlreadyExists: It has a snapshot of that name.
            RuntimeFailed, UnavailableError: Nothing is left behind.
        """
        return await self._containers.carry_through(self._snapshot(self._machine(request.name), _snapshot_name(request)))

    async def remove_snapshot(self, request: VmSnapshotRequest) -> None:
        """Remove a snapshot. Raises NotFound."""
        await self._containers.carry_through(self._remove_snapshot(self._machine(request.name), _snapshot_name(request)))

    async def restore(self, request: VmSnapshotRequest) -> Container:
        """Let a machine go on from a snapshot; what it does now is ended.

        Raises:
            NotFound: No such machine or snapshot.
            Unsupported: The snapshot is of another version.
            BadRecord: The snapshot is damaged.
            RuntimeFailed, UnavailableError: It did not come up; the record says why.
        """
        entry, snapshot = self._machine(request.name), _snapshot_name(request)
        await self._isolation.check_snapshot(entry.record, snapshot)
        return await self._containers.start_from(entry, f"snapshot {snapshot}")

    async def resize(self, request: ResizeVm) -> UpdatedContainer:
        """Give a machine other memory or processors.

        Raises:
            NotFound: No such machine.
            InvalidArgument: A value is out of range, or nothing is to be changed.
            RuntimeFailed: The machine refused; nothing changed.
        """
        return await self._containers.carry_through(self._resize(self._machine(request.name), request))

    async def update(self, name: str) -> VmBuild:
        """Build the configuration of a machine anew. What runs goes on as it is; the next start takes what was built.

        Raises:
            NotFound: No such machine.
            WrongState: It is a container.
            Unsupported: It is made of no configuration that is built.
            ToolMissing, RuntimeFailed, UnavailableError: It cannot be built; the next start takes what was built before.
        """
        entry = self._machine(name)
        # Without the machine's lock: a build may take half an hour, in which it can be stopped. A start waits for the build.
        runner, booted = await self._containers.carry_through(self._isolation.rebuild(entry.record))
        record = self._present(entry)
        return VmBuild(container=record, runner=runner, booted=booted, is_outdated=record.status in LIVE and runner != booted)

    async def console(self, request: VmConsole, stdio: Stdio) -> None:
        """Carry a machine's console until it or the client ends; without `follow` show what it showed last, also of one that has ended.

        Raises:
            NotFound: No such machine.
            WrongState: It does not run.
        """
        if not request.follow:
            tail = await self._isolation.console_tail(self._machine(request.name).record, n_bytes=request.tail_bytes)
            await stdio.send(Stdout(data=tail))
            return
        record = self._running(request.name)
        console = await self._isolation.console(record, tail_bytes=request.tail_bytes)

        async def drop(_: int) -> None:
            """A console takes no signals: their characters are typed."""

        try:
            await converse(console, stdio, drop)
        finally:
            console.close()

    async def _snapshot(self, entry: Entry, snapshot: str) -> VmSnapshot:
        async with entry.thawed.exclusive(), entry.lock:
            record = self._present(entry)
            if record.status not in ("running", "paused"):
                raise WrongState(
                    "virtual machine", record.name, record.status, "write it down", hint=f"first: isopod vm start {record.name}"
                )
            return await self._isolation.write_snapshot(record, snapshot)

    async def _remove_snapshot(self, entry: Entry, snapshot: str) -> None:
        async with entry.lock:
            await self._isolation.remove_snapshot(self._present(entry), snapshot)

    async def _resize(self, entry: Entry, request: ResizeVm) -> UpdatedContainer:
        async with entry.lock:
            record = self._present(entry)
            vm = _resized(record, request)
            change = ops.UpdateMachine(record.id, vm)
            ops.Draft(self._store).add([change])  # what would be refused is refused before the machine is told
            notes: list[str] = []
            if record.status in ("running", "paused"):
                notes += await self._isolation.resize(record, vcpus=request.vcpus, memory_bytes=request.memory_bytes)
            await self._store.commit(change)
            return UpdatedContainer(container=entry.record, notes=tuple(notes))

    def _machine(self, name: str) -> Entry:
        entry = self._containers.entry(name)
        if entry.record.isolation != "vm":
            hint = "`isopod vm list` lists virtual machines; containers have the same verbs without vm"
            raise WrongState("container", entry.record.name, "no virtual machine", "treat it as one", hint=hint)
        return entry

    def _running(self, name: str) -> Container:
        record = self._machine(name).record
        if record.status != "running":
            hint = f"first: isopod vm {'resume' if record.status == 'paused' else 'start'} {record.name}"
            raise WrongState("virtual machine", record.name, record.status, "reach into it", hint=hint)
        return record

    def _present(self, entry: Entry) -> Container:
        if self._containers.is_gone(entry):
            raise NotFound("virtual machine", entry.last.name, "it was removed meanwhile")
        return entry.record


def _resized(record: Container, request: ResizeVm) -> VmSettings:
    changes = {name: value for name in ("vcpus", "memory_bytes") if (value := getattr(request, name)) is not None}
    if not changes or record.vm is None:
        raise InvalidArgument("resize", record.name, "nothing to change", "add --vcpus N or --memory SIZE")
    return msgspec.structs.replace(record.vm, **changes)


def _snapshot_name(request: VmSnapshotRequest) -> str:
    return check_name("snapshot name", request.snapshot)
