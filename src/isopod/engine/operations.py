"""Operations: the only ways in which a sandbox's record changes, as data.

`check` says whether an operation is allowed on what is known, `apply` is the record after it, `event` what subscribers are told. All
three are pure: the same operations in the same order give the same records, which is what recovery is. An operation is checked once,
before it goes into the journal; what comes out of the journal is applied as it is.

Rules: one operation changes one record. A batch is a sequence of operations that is checked as a whole on a `Draft` and is one atomic
batch of the journal. The vocabulary may grow; a tag never changes its meaning.
"""

from collections.abc import Iterable
from typing import Any, Final, Protocol

import msgspec

from isopod.api.messages import Container, Endpoint, Event, Health, Mount, Resources, Status, VmSettings
from isopod.engine.creation import check_env, check_labels, check_machine, check_mounts, check_resources, place_of
from isopod.engine.states import LIVE, advance, check_step
from isopod.world.errors import AlreadyExists, InUse, InvalidArgument, NotFound, WrongState
from isopod.world.ids import check_name, is_container_id

NO_NETWORK: Final = "none"


class State(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of a record that says what is, not what was asked."""

    status: Status
    network: Endpoint
    pid: int | None = None
    pid_started_ticks: int | None = None
    supervisor_pid: int | None = None
    supervisor_started_ticks: int | None = None
    boot_id: str = ""
    started_at_ns: int | None = None
    finished_at_ns: int | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""
    restart_count: int = 0
    accelerator: str = ""
    origin: str = ""


class _Operation(msgspec.Struct, frozen=True, tag_field="op", omit_defaults=True):
    """Base."""


class _Change(_Operation, frozen=True):
    """Base of those on a record that exists."""

    id: str
    """Whose record it is about."""


class Create(_Operation, frozen=True, tag="create"):
    """A new sandbox."""

    record: Container

    @property
    def id(self) -> str:
        """Whose record it is about."""
        return self.record.id


class Delete(_Change, frozen=True, tag="delete"):
    """Forget one."""


class UpdateStatus(_Change, frozen=True, tag="status"):
    """Only the state in the table of states."""

    status: Status


class UpdateState(_Change, frozen=True, tag="state"):
    """All that is known of a running or ended one."""

    state: State


class UpdateHealth(_Change, frozen=True, tag="health"):
    """What its health check found."""

    health: Health


class UpdateEnvironment(_Change, frozen=True, tag="environment"):
    """All variables, replacing those before."""

    env: dict[str, str]


class UpdateLabels(_Change, frozen=True, tag="labels"):
    """All labels, replacing those before."""

    labels: dict[str, str]


class UpdateResources(_Change, frozen=True, tag="resources"):
    """All limits, replacing those before."""

    resources: Resources


class UpdateMachine(_Change, frozen=True, tag="machine"):
    """What a virtual machine has, from its next start on where it cannot be changed at once."""

    vm: VmSettings


class AttachNetwork(_Change, frozen=True, tag="attach"):
    """Put it on a network; it is on none."""

    network: Endpoint


class DetachNetwork(_Change, frozen=True, tag="detach"):
    """Take it off its network."""


class AddMount(_Change, frozen=True, tag="add_mount"):
    """One more mount, of one that does not run."""

    mount: Mount


class RemoveMount(_Change, frozen=True, tag="remove_mount"):
    """One mount less, by its place inside, of one that does not run."""

    destination: str


Operation = (
    Create
    | Delete
    | UpdateStatus
    | UpdateState
    | UpdateHealth
    | UpdateEnvironment
    | UpdateLabels
    | UpdateResources
    | UpdateMachine
    | AttachNetwork
    | DetachNetwork
    | AddMount
    | RemoveMount
)


class Known(Protocol):
    """Records to look at: those of a store, or a draft over them."""

    def get(self, identifier: str) -> Container | None:
        """Return a record, None if there is none."""

    def id_of(self, name: str) -> str | None:
        """Return the id of the record of exactly that name, None if there is none."""


class Draft:
    """Records as they would be after some operations, over others that stay untouched.

    Args:
        base: What it lies over.
    """

    def __init__(self, base: Known) -> None:
        self._base = base
        self._changed: dict[str, Container | None] = {}
        self._names: dict[str, str | None] = {}

    def get(self, identifier: str) -> Container | None:
        """Return a record, None if there is none."""
        return self._changed[identifier] if identifier in self._changed else self._base.get(identifier)

    def id_of(self, name: str) -> str | None:
        """Return the id of the record of that name, None if there is none."""
        return self._names[name] if name in self._names else self._base.id_of(name)

    def add(self, operations: Iterable[Operation], *, at_ns: int = 0) -> None:
        """Check operations one after the other, each on what those before it leave; if one is refused, none is added.

        Raises:
            IsopodError: One is refused.
        """
        trial = Draft(self)
        for operation in operations:
            check(operation, trial)
            trial.put(operation.id, apply(operation, trial.get(operation.id), at_ns=at_ns, revision=0))
        self._changed.update(trial._changed)
        self._names.update(trial._names)

    def put(self, identifier: str, record: Container | None) -> None:
        """Set or remove a record."""
        before = self.get(identifier)
        if before is not None and self.id_of(before.name) == identifier:
            self._names[before.name] = None
        if record is not None:
            self._names[record.name] = identifier
        self._changed[identifier] = record


def check(operation: Operation, known: Known) -> None:
    """Check that an operation is allowed.

    Args:
        operation: What is to be done.
        known: What it is to be done to.

    Raises:
        NotFound: There is no such sandbox, or no such mount.
        AlreadyExists: The id, the name or the mount's place is taken.
        WrongState: Its state does not allow it.
        InUse: It is on another network.
        InvalidArgument: A value is out of range.
    """
    if isinstance(operation, Create):
        _check_create(operation.record, known)
        return
    record = known.get(operation.id)
    if record is None:
        raise NotFound("container", operation.id[:12], "`isopod ps -a` lists them")
    match operation:
        case Delete():
            advance(record.name, record.status, "remove")
        case UpdateStatus(status=status) | UpdateState(state=State(status=status)):
            check_step(record.name, record.status, status)
        case UpdateEnvironment():
            check_env(operation.env)
        case UpdateLabels():
            check_labels(operation.labels)
        case UpdateResources():
            check_resources(operation.resources)
        case UpdateMachine(vm=vm):
            if record.vm is None:
                raise WrongState("container", record.name, "no virtual machine", "resize it", hint="limits of a container: isopod update")
            check_machine(vcpus=vm.vcpus, memory_bytes=vm.memory_bytes, disk_bytes=vm.disk_bytes)
        case AttachNetwork() | DetachNetwork():
            _check_network(operation, record)
        case AddMount() | RemoveMount():
            _check_mount(operation, record)
        case UpdateHealth():
            return


def apply(operation: Operation, record: Container | None, *, at_ns: int, revision: int) -> Container | None:
    """Return the record after an operation.

    Args:
        operation: What is done.
        record: The record before, None if there is none.
        at_ns: Wall time of the change.
        revision: Number of the journal's record of it.

    Returns:
        The record, None if it is deleted or never was.
    """
    if isinstance(operation, Create):
        return msgspec.structs.replace(operation.record, revision=revision)
    if record is None or isinstance(operation, Delete):
        return None
    return msgspec.structs.replace(record, **_changes(operation, record), updated_at_ns=at_ns, revision=revision)


def event(operation: Operation, record: Container | None, *, at_ns: int) -> Event | None:
    """Return what subscribers are told of an operation, None if nothing that concerns them changed.

    Args:
        operation: What is done.
        record: The durable record before it.
        at_ns: Wall time of the change.
    """
    if isinstance(operation, Create):
        new = operation.record
        return Event(kind="created", id=new.id, name=new.name, at_ns=at_ns, image=new.image, status=new.status)
    if record is None:
        return None
    told = _told(operation, record)
    return None if told is None else Event(id=record.id, name=record.name, at_ns=at_ns, **told)


def state_of(record: Container) -> State:
    """Return the part of a record that says what is."""
    return msgspec.convert(record, State, from_attributes=True)


def _told(operation: Operation, record: Container) -> dict[str, Any] | None:
    told: dict[str, Any] | None = None
    match operation:
        case UpdateStatus(status=status) if status != record.status:
            told = {"kind": "status", "status": status, "status_before": record.status}
        case UpdateState(state=state) if state.status != record.status:
            told = {"kind": "status", "status": state.status, "status_before": record.status}
            told |= {"exit_code": state.exit_code, "oom_killed": state.oom_killed}
        case UpdateHealth(health=health) if health != record.health:
            told = {"kind": "health", "health": health, "health_before": record.health}
        case Delete():
            told = {"kind": "deleted"}
        case UpdateEnvironment():
            told = {"kind": "environment", "env": operation.env}
        case UpdateLabels():
            told = {"kind": "labels", "labels": operation.labels}
        case UpdateResources():
            told = {"kind": "resources", "resources": operation.resources}
        case UpdateMachine():
            told = {"kind": "resources", "vm": operation.vm}
        case AttachNetwork(network=endpoint):
            told = {"kind": "network", "network": endpoint.network, "network_before": record.network.network}
        case DetachNetwork():
            told = {"kind": "network", "network": NO_NETWORK, "network_before": record.network.network}
        case AddMount():
            told = {"kind": "mounts", "mount_added": operation.mount}
        case RemoveMount():
            told = {"kind": "mounts", "mount_removed": place_of(operation.destination)}
        case _:
            pass
    return told


def _changes(operation: Operation, record: Container) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    match operation:
        case UpdateState(state=state):
            changes = {name: getattr(state, name) for name in _STATE_FIELDS}
        case UpdateStatus():
            changes = {"status": operation.status}
        case UpdateHealth():
            changes = {"health": operation.health}
        case UpdateEnvironment():
            changes = {"env": operation.env}
        case UpdateLabels():
            changes = {"labels": operation.labels}
        case UpdateResources():
            changes = {"resources": operation.resources}
        case UpdateMachine():
            changes = {"vm": operation.vm}
        case AttachNetwork():
            changes = {"network": operation.network}
        case DetachNetwork():
            changes = {"network": Endpoint(network=NO_NETWORK)}
        case AddMount():
            changes = {"mounts": (*record.mounts, operation.mount)}
        case RemoveMount():
            place = place_of(operation.destination)
            changes = {"mounts": tuple(mount for mount in record.mounts if place_of(mount.destination) != place)}
        case _:
            pass
    return changes


def _check_create(record: Container, known: Known) -> None:
    if not is_container_id(record.id):
        raise InvalidArgument("container id", record.id[:80], "want 64 hexadecimal digits")
    check_name("container name", record.name)
    check_env(record.env)
    check_labels(record.labels)
    check_resources(record.resources)
    check_mounts(record.mounts)
    if known.get(record.id) is not None:
        raise AlreadyExists("container", record.id)
    if known.id_of(record.name) is not None:
        raise AlreadyExists("container", record.name, f"remove it first: isopod rm {record.name}")


def _check_network(operation: AttachNetwork | DetachNetwork, record: Container) -> None:
    now = record.network.network
    if isinstance(operation, DetachNetwork):
        if now == NO_NETWORK:
            raise NotFound("network of container", record.name, "it is on none")
    elif now == operation.network.network:
        raise AlreadyExists(f"network of container {record.name}", now)
    elif now != NO_NETWORK:
        raise InUse("network place of container", record.name, f"network {now}", f"first: isopod network disconnect {now} {record.name}")


def _check_mount(operation: AddMount | RemoveMount, record: Container) -> None:
    if record.status in LIVE or record.status == "removing":
        raise WrongState("container", record.name, record.status, "change its mounts", hint=f"first: isopod stop {record.name}")
    if isinstance(operation, AddMount):
        check_mounts((operation.mount,))
        if _has_place(record, operation.mount.destination):
            raise AlreadyExists(f"mount of container {record.name}", place_of(operation.mount.destination))
        check_mounts((*record.mounts, operation.mount))
    elif not _has_place(record, operation.destination):
        raise NotFound(f"mount of container {record.name}", operation.destination, f"see: isopod inspect {record.name}")


def _has_place(record: Container, destination: str) -> bool:
    place = place_of(destination)
    return any(place_of(mount.destination) == place for mount in record.mounts)


_STATE_FIELDS: Final = State.__struct_fields__
