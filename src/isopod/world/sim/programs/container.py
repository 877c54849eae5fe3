"""Containers as the simulated runtime makes them: the file tree a container sees, and how its processes begin.

Source: OCI runtime specification 1.0.2 (config.md, config-linux.md), as far as isopod's bundles use it. Missing mount points are made in
the root file system, as crun does. Not modelled: user namespaces, capabilities, seccomp, devices beyond the usual six.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Final, NamedTuple

import msgspec

from isopod.world.sim.inodes import FileSystem, Inode
from isopod.world.sim.links import NetworkNamespace
from isopod.world.sim.machine import Machine
from isopod.world.sim.nodes import Node, PlainNode
from isopod.world.sim.table import Group, PidNamespace, SimProcess
from isopod.world.sim.view import View, fail

_DEVICES: Final = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_PSEUDO_BYTES: Final = 64 << 20
_EXECUTABLE: Final = 0o111
DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Memory(msgspec.Struct):
    """`linux.resources.memory`."""

    limit: int | None = None


class Pids(msgspec.Struct):
    """`linux.resources.pids`."""

    limit: int | None = None


class Resources(msgspec.Struct):
    """`linux.resources`."""

    memory: Memory = msgspec.field(default_factory=Memory)
    pids: Pids = msgspec.field(default_factory=Pids)


class Namespace(msgspec.Struct):
    """One of `linux.namespaces`."""

    type: str
    path: str = ""


class Linux(msgspec.Struct):
    """`linux`."""

    namespaces: list[Namespace] = []
    cgroupsPath: str = ""  # noqa: N815 - the specification's spelling
    resources: Resources = msgspec.field(default_factory=Resources)


class User(msgspec.Struct):
    """`process.user`."""

    uid: int = 0
    gid: int = 0


class ProcessSpec(msgspec.Struct):
    """`process`, which exec gets in a file of its own."""

    args: list[str]
    env: list[str] = []
    cwd: str = "/"
    terminal: bool = False
    user: User = msgspec.field(default_factory=User)


class Mount(msgspec.Struct):
    """One of `mounts`."""

    destination: str
    type: str = ""
    source: str = ""
    options: list[str] = []


class Root(msgspec.Struct):
    """`root`."""

    path: str
    readonly: bool = False


class Config(msgspec.Struct):
    """config.json, as far as it is understood here."""

    process: ProcessSpec
    root: Root
    hostname: str = "localhost"
    mounts: list[Mount] = []
    linux: Linux = msgspec.field(default_factory=Linux)


class KernelFacts(NamedTuple):
    """What a kernel tells the processes on it."""

    release: str
    n_cpus: int
    memory_bytes: int
    now_ns: Callable[[], int]
    """The wall clock."""
    random: Random
    """Behind /dev/urandom."""


class Container:
    """A container that was created, or the one world that a guest's processes see. Kept by its first process.

    Args:
        view: What it sees of files.
        config: Its configuration.
        group: Its control group.
        network: Its network namespace.
        kernel: What its kernel tells, if that is not the machine's.
    """

    def __init__(self, view: View, config: Config, group: Group, network: NetworkNamespace, *, kernel: KernelFacts | None = None) -> None:
        self.kernel = kernel
        self.view = view
        self.config = config
        self.group = group
        self.network = network
        self.pids = PidNamespace()
        self.on_sync: Callable[[], None] | None = None

    def sync(self) -> None:
        """Let the kernel make its files durable: a container's are the machine's."""
        if self.on_sync is not None:
            self.on_sync()
        else:
            self.view.root.inode.file_system.root.sync_below()

    def adopt(self, process: SimProcess, spec: ProcessSpec) -> None:
        """Put a process into the container."""
        process.container = self
        process.env = environment_of(spec)
        process.cwd = spec.cwd
        process.uid, process.gid = spec.user.uid, spec.user.gid
        self.pids.join(process)
        self.group.join(process)
        process.network = self.network
        self.network.n_processes += 1
        process.on_exit.append(self.network.leave)


class Executable(NamedTuple):
    """A command that can be run: its path inside, and the file."""

    path: str
    inode: Inode


def environment_of(spec: ProcessSpec) -> dict[str, str]:
    """Return the environment of a process."""
    pairs = [line.partition("=") for line in spec.env]
    return {name: value for name, _, value in pairs}


def build_view(machine: Machine, bundle: str, config: Config) -> View:
    """Build what a container sees: its root and its mounts. Missing sources and roots are ENOENT."""
    path = config.root.path if config.root.path.startswith("/") else f"{bundle}/{config.root.path}"
    view = View(machine.view.folder(path))
    for mount in config.mounts:
        node = _source(machine, mount)
        make_target(view, mount.destination, is_folder=node.inode.kind == "directory")
        view.mount(mount.destination, node)
    for mount in config.mounts:
        if "ro" in mount.options:
            view.make_read_only(mount.destination)
    if config.root.readonly:
        view.make_read_only("/")
    return view


def find_executable(view: View, name: str, env: Mapping[str, str], cwd: str = "/") -> Executable:
    """Look a command up as execvp(3) does. ENOENT, EACCES, EPERM for a folder."""
    if "/" in name:
        return _check_executable(view, name if name.startswith("/") else f"{cwd}/{name}")
    found_other = False
    for folder in env.get("PATH", DEFAULT_PATH).split(":"):
        try:
            return _check_executable(view, f"{folder or cwd}/{name}")
        except PermissionError:
            found_other = True
        except OSError:
            continue
    return fail(errno.EACCES if found_other else errno.ENOENT, name)


def _check_executable(view: View, path: str) -> Executable:
    inode = view.node(path).inode
    if inode.kind == "directory":
        fail(errno.EPERM, path)
    if inode.kind != "file" or not inode.mode & _EXECUTABLE:
        fail(errno.EACCES, path)
    return Executable(path, inode)


def _source(machine: Machine, mount: Mount) -> Node:
    if mount.type == "bind" or "bind" in mount.options or "rbind" in mount.options:
        return machine.view.node(mount.source)
    root = FileSystem(_size(mount.options), machine.clock.now_ns, volatile=True).root
    if mount.destination == "/dev":
        make_devices(root)
    return PlainNode(root)


def _size(options: Sequence[str]) -> int:
    for option in options:
        name, _, value = option.partition("=")
        if name == "size":
            digits = value.rstrip("kKmMgG")
            factors = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
            return int(digits) * factors[value[len(digits) :].lower()]
    return _PSEUDO_BYTES


def make_devices(root: Inode) -> None:
    """Furnish a /dev."""
    for name, numbers in _DEVICES.items():
        device = root.file_system.new("device", 0o666)
        device.device = numbers
        root.attach(name, device)
    for name in ("pts", "shm", "mqueue"):
        root.attach(name, root.file_system.new("directory", 0o755))


def make_target(view: View, path: str, *, is_folder: bool) -> None:
    """Make what is mounted over, if it is not there."""
    if view.find(path) is not None:
        return
    if is_folder:
        view.make_folders(path, 0o755)
        return
    view.make_folders(path.rpartition("/")[0] or "/", 0o755)
    view.create(path, "file", 0o755)


def decode_config(data: bytes) -> Config:
    """Read a config.json."""
    return msgspec.json.decode(data, type=Config)


def decode_process(data: bytes) -> ProcessSpec:
    """Read the process of an exec."""
    return msgspec.json.decode(data, type=ProcessSpec)


def container_of(process: SimProcess) -> Container:
    """Return the container a process is in."""
    assert isinstance(process.container, Container)
    return process.container
