"""The messages of the one contract: what a client may ask a node, and what it answers.

Frozen structs, maps on the wire: a field added later has a default, an unknown field is ignored. Times are nanoseconds since
the Unix epoch, sizes are bytes. Only shapes live here; the meaning of values is checked where a request is served.
"""

from typing import Annotated, Literal

import msgspec

Isolation = Literal["container", "vm"]
VmDriver = Literal["auto", "qemu", "cloud-hypervisor", "firecracker", "microvm-nix", "systemd"]
VmMachine = Literal["microvm", "q35"]
Health = Literal["none", "starting", "healthy", "unhealthy"]
Status = Literal["created", "starting", "running", "paused", "restarting", "stopping", "exited", "removing", "unknown"]
MountKind = Literal["bind", "volume", "tmpfs"]
Protocol = Literal["tcp", "udp"]
EventKind = Literal["created", "deleted", "status", "resources", "network", "mounts", "labels", "environment", "health"]


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages."""


class Item(msgspec.Struct, frozen=True, tag_field="type"):
    """Base of what travels in streams; "type" tells which."""


class Empty(Message, frozen=True, kw_only=True):
    """Nothing to say."""


# --- containers: the record -------------------------------------------------------------------------------------------


class Mount(Message, frozen=True, kw_only=True):
    """A mount of a container. `destination` is absolute inside it."""

    source: str
    destination: str
    kind: MountKind = "bind"
    read_only: bool = False


class Resources(Message, frozen=True, kw_only=True):
    """Limits; None means none."""

    memory_bytes_max: int | None = None
    cpus: float | None = None
    pids_max: int | None = None
    disk_bytes_max: int | None = None
    network_in_bytes_per_s: int | None = None
    """What it may receive, as `network_out_bytes_per_s` what it may send."""
    network_out_bytes_per_s: int | None = None


class PortMapping(Message, frozen=True, kw_only=True):
    """A port of the host that leads to one of a container."""

    port: int
    """The container's."""
    host_port: int = 0
    """The host's; 0 asks for a free one, which is chosen when the container starts."""
    host_ip: str = ""
    """Only what arrives for this address of the host; "" for all of them."""
    protocol: Protocol = "tcp"


class Endpoint(Message, frozen=True, kw_only=True):
    """A container's place in a network. The addresses are set while it runs on a bridge network."""

    network: str
    """A network's name, or "none" or "host"."""
    ip_address: str | None = None
    prefix_length: int | None = None
    gateway: str | None = None
    mac_address: str | None = None
    ports: dict[int, int] = {}
    """Host port to container port, of TCP; all of it is in `published`."""
    published: tuple[PortMapping, ...] = ()
    """What is published while it runs, with the ports that were chosen."""


class HealthCheck(Message, frozen=True, kw_only=True):
    """A command that tells whether a container is well: it is if the command ends with 0."""

    command: tuple[str, ...]
    interval_s: float = 30.0
    """From one's end to the next one's start, and before the first."""
    timeout_s: float = 30.0
    """Longer is a failure."""
    retries: int = 3
    """So many failures in a row make it unhealthy."""
    start_period_s: float = 0.0
    """So long after the start a failure does not count, until the first success."""


class VmOptions(Message, frozen=True, kw_only=True):
    """What to create a virtual machine with; None and "" leave it to the engine, which takes limits of that name if there are any."""

    driver: VmDriver = "auto"
    machine: VmMachine = "microvm"
    vcpus: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    """Size of the disk that takes what the guest writes."""
    config: str = ""
    """A flake, a microvm.nix module, a runner's folder, or a unit's name, instead of an image."""
    cold: bool = False
    """Boot it, even where a booted template could be copied."""


class VmSettings(Message, frozen=True, kw_only=True):
    """What a virtual machine has."""

    driver: VmDriver
    machine: VmMachine = "microvm"
    vcpus: int
    memory_bytes: int
    disk_bytes: int
    config: str = ""
    cold: bool = False


class Container(Message, frozen=True, kw_only=True):
    """The record of one container (row R14): what was asked, and what is."""

    id: str
    name: str
    created_at_ns: int
    updated_at_ns: int
    image: str
    image_id: str
    command: tuple[str, ...]
    working_dir: str
    user: str
    hostname: str
    env: dict[str, str] = {}
    labels: dict[str, str] = {}
    isolation: Isolation = "container"
    vm: VmSettings | None = None
    """What it has, if it is a virtual machine."""
    terminal: bool = False
    stdin_open: bool = False
    auto_remove: bool = False
    status: Status = "created"
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
    """Why it could not start or how it ended unusually; one line."""
    restart_count: int = 0
    accelerator: str = ""
    """What runs a virtual machine's processor since its last start: "kvm" or "tcg"."""
    origin: str = ""
    """What its last start began with: "cold", "template", or "snapshot NAME"."""
    health: Health = "none"
    """What its health check found; "none" without one."""
    health_check: HealthCheck | None = None
    network: Endpoint
    ports: tuple[PortMapping, ...] = ()
    """What is to be published at each start."""
    resources: Resources = Resources()
    mounts: tuple[Mount, ...] = ()
    revision: int = 0
    """Number of the journal's record that changed it last."""


# --- containers: requests ---------------------------------------------------------------------------------------------


class ContainerSpec(Message, frozen=True, kw_only=True):
    """What to create. Empty fields fall back to the image's."""

    image: str
    """"" for a virtual machine that is made from its configuration."""
    command: tuple[str, ...] = ()
    name: str = ""
    isolation: Isolation = "container"
    vm: VmOptions = VmOptions()
    """Counts for isolation "vm" only."""
    env: dict[str, str] = {}
    labels: dict[str, str] = {}
    working_dir: str = ""
    user: str = ""
    """NAME, UID, NAME:GROUP or UID:GID; names are looked up inside the image."""
    hostname: str = ""
    network: str = "bridge"
    ports: tuple[PortMapping, ...] = ()
    resources: Resources = Resources()
    mounts: tuple[Mount, ...] = ()
    health_check: HealthCheck | None = None
    terminal: bool = False
    stdin_open: bool = False
    auto_remove: bool = False


class RunContainer(Message, frozen=True, kw_only=True):
    """Create and start. Attached: the stream carries its terminal until it ends; detached: the answer comes once it runs."""

    spec: ContainerSpec
    attach: bool = True
    rows: int = 0
    columns: int = 0
    """The client's terminal size, 0 if unknown."""


class StartContainer(Message, frozen=True, kw_only=True):
    """Start a created or exited container."""

    name: str
    attach: bool = False
    rows: int = 0
    columns: int = 0


class ContainerName(Message, frozen=True, kw_only=True):
    """A container by name, id, or unambiguous beginning of its id."""

    name: str


class ListContainers(Message, frozen=True, kw_only=True):
    """Running ones, or all; of these what passes every filter that is set."""

    all: bool = False
    isolation: Isolation | None = None
    """Only those isolated in this way."""
    status: tuple[str, ...] = ()
    """Any of these states (our names or rtain's); implies `all`."""
    labels: tuple[str, ...] = ()
    """Every one of these: KEY, or KEY=VALUE."""
    name: str = ""
    """A part of the name; with * or ? a pattern for the whole name."""
    created_since_ns: int | None = None
    created_until_ns: int | None = None
    """Both ends of the window count."""
    memory_bytes_min: int | None = None
    """Measured now: uses at least so much. What cannot be measured does not pass."""
    cpu_ns_min: int | None = None
    pids_min: int | None = None
    sort: Literal["created", "name", "memory", "cpu"] = "created"
    """Newest first, by name, or the greatest measured use first."""
    limit: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | None = None
    """At most so many, after sorting."""


class ContainerList(Message, frozen=True, kw_only=True):
    """Newest first."""

    containers: tuple[Container, ...]


class StopContainer(Message, frozen=True, kw_only=True):
    """SIGTERM, then SIGKILL after `timeout_s`."""

    name: str
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 10.0


class KillContainer(Message, frozen=True, kw_only=True):
    """Send a signal to the first process."""

    name: str
    signal: int = 9


class RemoveContainer(Message, frozen=True, kw_only=True):
    """Remove a container that is not running; with `force` it is killed first."""

    name: str
    force: bool = False


class RestartContainer(Message, frozen=True, kw_only=True):
    """Stop as `StopContainer`, and start again; one that does not run is started."""

    name: str
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 10.0


class UpdateContainer(Message, frozen=True, kw_only=True):
    """Change a container that exists: all of it or nothing. A limit that is None stays; -1 takes it away."""

    name: str
    memory_bytes_max: int | None = None
    cpus: float | None = None
    pids_max: int | None = None
    labels: dict[str, str] = {}
    labels_remove: tuple[str, ...] = ()
    env: dict[str, str] = {}
    env_remove: tuple[str, ...] = ()
    mounts: tuple[Mount, ...] = ()
    mounts_remove: tuple[str, ...] = ()
    """Places inside the container."""


class ConnectNetwork(Message, frozen=True, kw_only=True):
    """Put a container on a network, or take it off."""

    network: str
    name: str


class UpdatedContainer(Message, frozen=True, kw_only=True):
    """The record after a change. `notes` say what takes effect only at the next start."""

    container: Container
    notes: tuple[str, ...] = ()


class ExecContainer(Message, frozen=True, kw_only=True):
    """Run one more command inside a running container; its terminal is the stream."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str] = {}
    working_dir: str = ""
    user: str = ""
    terminal: bool = False
    stdin_open: bool = False
    rows: int = 0
    columns: int = 0


class LogsRequest(Message, frozen=True, kw_only=True):
    """What a container wrote. `cursor` continues where an earlier answer ended, nothing lost and nothing doubled."""

    name: str
    follow: bool = False
    tail: int | None = None
    """The last so many lines, None for all."""
    since_ns: int | None = None
    timestamps: bool = False
    cursor: int = 0


class CommitContainer(Message, frozen=True, kw_only=True):
    """Make an image of a container's files."""

    name: str
    image: str


# --- containers: events and use ---------------------------------------------------------------------------------------


class Event(Item, frozen=True, kw_only=True, omit_defaults=True, tag="event"):
    """One durable change of one container. What is set beside the first fields depends on `kind`."""

    kind: EventKind
    id: str
    name: str
    at_ns: int
    cursor: int = 0
    """The number of its journal record: hand it back to go on after it."""
    status: Status | None = None
    status_before: Status | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    health: Health | None = None
    health_before: Health | None = None
    image: str = ""
    network: str = ""
    network_before: str = ""
    resources: Resources | None = None
    vm: VmSettings | None = None
    mount_added: Mount | None = None
    mount_removed: str = ""
    labels: dict[str, str] | None = None
    env: dict[str, str] | None = None


class EventsRequest(Message, frozen=True, kw_only=True):
    """Which events to stream. Without `cursor` and `since_ns` they begin now; they end at `until_ns`, or never."""

    cursor: int | None = None
    """Everything after this journal record, nothing lost and nothing doubled."""
    since_ns: int | None = None
    until_ns: int | None = None
    kinds: tuple[EventKind, ...] = ()
    """Any of these; () for all."""
    containers: tuple[str, ...] = ()
    """Any of these names or beginnings of ids; () for all."""


class LimitSums(Message, frozen=True, kw_only=True):
    """What containers may use, added up, and how many have no limit of that kind."""

    memory_bytes: int
    memory_unlimited: int
    cpus: float
    cpus_unlimited: int
    pids: int
    pids_unlimited: int


class MeasuredSums(Message, frozen=True, kw_only=True):
    """What containers use now, added up. `unmeasured` run, but the kernel does not say what they use."""

    memory_bytes: int
    cpu_ns: int
    pids: int
    unmeasured: int


class StorageSums(Message, frozen=True, kw_only=True):
    """What is on the disk."""

    images_bytes: int
    containers_bytes: int
    metadata_bytes: int
    free_bytes: int


class SystemUsage(Message, frozen=True, kw_only=True):
    """Sums over a node's containers: limits and measured use apart, of those that run and of all."""

    containers: int
    by_status: dict[str, int]
    limits_running: LimitSums
    limits_all: LimitSums
    measured: MeasuredSums
    storage: StorageSums


class BackedUp(Message, frozen=True, kw_only=True):
    """What a backup holds: the records as they were at one journal record."""

    cursor: int
    containers: int
    digest: str


# --- streams of attached commands and logs ----------------------------------------------------------------------------


class Stdin(Item, frozen=True, tag="stdin"):
    """Bytes typed."""

    data: bytes


class StdinEnd(Item, frozen=True, tag="stdin_end"):
    """No more input: the command's stdin is closed."""


class Resize(Item, frozen=True, tag="resize"):
    """The client's terminal has a new size."""

    rows: int
    columns: int


class Signal(Item, frozen=True, tag="signal"):
    """A signal for the command."""

    number: int


class Started(Item, frozen=True, tag="started"):
    """The command runs."""

    id: str
    name: str


class Stdout(Item, frozen=True, tag="stdout"):
    """Bytes from stdout (or the terminal)."""

    data: bytes


class Stderr(Item, frozen=True, tag="stderr"):
    """Bytes from stderr."""

    data: bytes


class Cursor(Item, frozen=True, tag="cursor"):
    """Logs: everything before this byte of the log was sent. Events: everything up to this journal record was."""

    position: int


class Progress(Item, frozen=True, tag="progress"):
    """Long work: what is done so far. `total_bytes` 0 means unknown."""

    what: str
    done_bytes: int
    total_bytes: int = 0


class Chunk(Item, frozen=True, tag="chunk"):
    """Bytes of an uploaded archive, at most 256 KiB."""

    data: bytes


AttachInput = Stdin | StdinEnd | Resize | Signal
AttachOutput = Started | Stdout | Stderr
LogOutput = Stdout | Stderr | Cursor
EventOutput = Event | Cursor


class Ran(Message, frozen=True, kw_only=True):
    """The answer to run, start and exec. `exit_code` is None for a detached one that now runs."""

    id: str
    name: str
    exit_code: int | None = None
    oom_killed: bool = False


# --- images -----------------------------------------------------------------------------------------------------------


class ImageConfig(Message, frozen=True, kw_only=True):
    """What an image says about the containers made of it (the OCI image configuration's `config`, our names)."""

    env: dict[str, str] = {}
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    working_dir: str = "/"
    user: str = ""
    labels: dict[str, str] = {}
    stop_signal: int = 15


class Layer(Message, frozen=True, kw_only=True):
    """One layer: `diff_id` is the digest of its uncompressed tar."""

    diff_id: str
    unpacked_bytes: int
    n_entries: int
    created_by: str = ""


class Image(Message, frozen=True, kw_only=True):
    """The record of one image. `id` is the digest of its OCI configuration; `names` are all NAME:TAG that point to it."""

    id: str
    names: tuple[str, ...]
    created_at_ns: int
    architecture: str
    size_bytes: int
    layers: tuple[Layer, ...]
    """From the bottom up."""
    config: ImageConfig = ImageConfig()


class ImageList(Message, frozen=True, kw_only=True):
    """Newest first."""

    images: tuple[Image, ...]


class ImageNameRequest(Message, frozen=True, kw_only=True):
    """An image by NAME[:TAG], id, or unambiguous beginning of its id."""

    name: str


class RemoveImage(Message, frozen=True, kw_only=True):
    """Drop a name; the image goes with its last one, unless a container needs it."""

    name: str


class RemovedImage(Message, frozen=True, kw_only=True):
    """What went."""

    untagged: str = ""
    deleted: str = ""


class ImportImage(Message, frozen=True, kw_only=True):
    """Make a one-layer image of a root file system tar sent as chunks (plain, gzip, zstd)."""

    name: str
    command: tuple[str, ...] = ()
    total_bytes: int = 0


class LoadImages(Message, frozen=True, kw_only=True):
    """Take the images of a docker-archive or OCI layout tar sent as chunks (plain, gzip, zstd)."""

    total_bytes: int = 0


class LoadedImages(Message, frozen=True, kw_only=True):
    """What is there now."""

    images: tuple[Image, ...]


# --- networks ---------------------------------------------------------------------------------------------------------


class NetworkSpec(Message, frozen=True, kw_only=True):
    """A bridge network to create; an empty subnet lets isopod choose a free one."""

    name: str
    subnet: str = ""
    driver: str = "bridge"


class NetworkRecord(Message, frozen=True, kw_only=True):
    """One network. `bridge` is the link's name on the host."""

    name: str
    driver: str
    subnet: str = ""
    gateway: str = ""
    bridge: str = ""
    created_at_ns: int = 0
    addresses_used: int = 0


class NetworkList(Message, frozen=True, kw_only=True):
    """By name."""

    networks: tuple[NetworkRecord, ...]


class NetworkNameRequest(Message, frozen=True, kw_only=True):
    """A network by name."""

    name: str


# --- the node ---------------------------------------------------------------------------------------------------------


class Probed(Message, frozen=True, kw_only=True):
    """One thing found out by trying, and why it is so."""

    value: str
    why: str


class DriverFacts(Message, frozen=True, kw_only=True):
    """One way to run virtual machines."""

    name: str
    works: bool | None
    """Whether it works here; None if that is not known yet."""
    why: str


class NodeInfo(Message, frozen=True, kw_only=True):
    """What `isopod info` says."""

    version: str
    pid: int
    started_at_ns: int
    socket: str
    root: str
    run_root: str
    paths: dict[str, str]
    hostname: str
    operating_system: str
    kernel: str
    architecture: str
    n_cpus: int
    memory_bytes: int
    event_loop: str
    cgroup_mode: Probed
    runtime: Probed
    supervisor: Probed
    accelerator: Probed
    storage_driver: Probed
    network_driver: Probed
    seccomp_profile: Probed
    drivers: tuple[DriverFacts, ...] = ()
    """What can run virtual machines; none on a node that runs no containers."""
    containers: int
    containers_running: int
    images: int
    cluster: "ClusterFacts | None" = None
    """None if the node is in no cluster."""


class ClusterFacts(Message, frozen=True, kw_only=True):
    """A node's cluster in short; `isopod cluster status` says more."""

    id: str
    node_id: int
    state: str
    leader_id: int
    address: str
    voters: int
    nodes: int


class TaskEntry(Message, frozen=True, kw_only=True):
    """One task of a live node: who it is, and where it stands."""

    name: str
    state: str
    group: str
    function: str
    location: str
    awaits: str
    age_s: float | None = None


class TaskList(Message, frozen=True, kw_only=True):
    """Every task of the node's loop, oldest first."""

    tasks: tuple[TaskEntry, ...]


class Version(Message, frozen=True, kw_only=True):
    """Who answers."""

    version: str
    protocol: int
    python: str
    core: str


class RenderRequest(Message, frozen=True, kw_only=True):
    """Ask for another method's answer as text, so that a client without tables of its own can print it."""

    method: str
    body: msgspec.Raw
    format: Literal["table", "json"] = "table"
    columns: int = 0


class Rendered(Message, frozen=True, kw_only=True):
    """UTF-8 text, ending in a newline unless empty."""

    text: str
