"""What the commands of a simulated guest live in: its clock and chance, its disks, its root, its network, its processes.

The agent makes it as it is told (`prepare`, `configure`, `renew`), and starts processes in it. What fails is an OSError with the kernel's
errno, or `Refused` with the agent's code.
"""

import errno
import hashlib
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Final

from isopod.world.sim.inodes import FileSystem, Inode
from isopod.world.sim.links import Link
from isopod.world.sim.machine import Machine
from isopod.world.sim.nodes import MergedNode, Node, PlainNode
from isopod.world.sim.programs import guest_files
from isopod.world.sim.programs.container import (
    DEFAULT_PATH,
    Config,
    Container,
    KernelFacts,
    ProcessSpec,
    Root,
    User,
    find_executable,
)
from isopod.world.sim.programs.guest_disks import Ext4, mount_layer
from isopod.world.sim.programs.guest_state import GuestState
from isopod.world.sim.programs.hardware import Hardware
from isopod.world.sim.table import Group, PidNamespace, SimProcess
from isopod.world.sim.view import View, fail

RELEASE: Final = "6.12.48+guest-sim"
_KERNEL_BYTES: Final = 42 << 20
"""What a guest's kernel keeps of its memory, and does not count as there (measured on the real one)."""
AGENT_BYTES: Final = 8 << 20
"""What the agent and the rest of the system use of it."""
"""What the agent and the rest of the system use of it."""
_TMPFS_BYTES: Final = 1 << 30
_BLOCK_BYTES: Final = 4096


class Refused(Exception):
    """An operation failed; the host is told why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class GuestWorld:
    """The world inside of one guest.

    Args:
        machine: The computer that the guest runs on.
        hardware: What the guest finds.
        init: Its first process.
        small_disk: Whether its own file system has next to no room.
    """

    def __init__(self, machine: Machine, hardware: Hardware, init: SimProcess, *, small_disk: bool) -> None:
        self.group = Group("guest")
        self.group.memory_bytes_max = max(0, hardware.memory_bytes - _KERNEL_BYTES - AGENT_BYTES)
        self.pids = PidNamespace()
        self.pids.join(init)
        self.network = machine.kernel.links.new_namespace()
        self.container: Container | None = None
        self.on_disk_error: Callable[[], None] | None = None
        """Told when a command's sync met a disk that refuses."""
        self._machine = machine
        self._hardware = hardware
        self._small_disk = small_disk
        self._state = GuestState(boot_id="", entropy=machine.chance.randbytes(32).hex())
        self._random = Random(self._state.entropy)
        self._started_ns = machine.loop.elapsed_ns
        self._clock_base_ns = machine.clock.now_ns()
        self._layers: list[Inode] = []
        self._upper: Ext4 | None = None
        self._disks: list[Ext4] = []
        for number, mac in enumerate(hardware.macs):
            self.network.add(Link(f"eth{number}", "ether", mac))

    # -- clock and chance ------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> GuestState:
        """What a snapshot keeps of it beside its files."""
        return self._state

    @property
    def up_s(self) -> float:
        """Since when its kernel runs."""
        return (self._machine.loop.elapsed_ns - self._started_ns) / 1e9

    @property
    def total_bytes(self) -> int:
        """The memory that its kernel says it has."""
        return self._hardware.memory_bytes - _KERNEL_BYTES

    def now_ns(self) -> int:
        """Return what its clock shows."""
        return self._clock_base_ns + self._machine.loop.elapsed_ns - self._started_ns

    def set_clock(self, now_ns: int) -> None:
        """Set its clock."""
        self._clock_base_ns = now_ns - (self._machine.loop.elapsed_ns - self._started_ns)

    def reseed(self, entropy: str) -> None:
        """Mix something into its chance."""
        self._state.entropy = hashlib.sha256(f"{self._state.entropy} {entropy}".encode()).hexdigest()
        self._random.seed(self._state.entropy)

    def resume(self, state: GuestState, upper: bytes | None, now_ns: int) -> None:
        """Be as a snapshot says."""
        self._state, self._clock_base_ns = state, now_ns
        self._random = Random(state.entropy)
        for index, tar in state.layers:
            self.mount_layer(index, tar)
        if state.configuration is not None:
            self.build(state.configuration, upper)

    # -- making ----------------------------------------------------------------------------------------------------------------------

    def mount_layer(self, index: str, tar: str | None) -> None:
        """Mount a layer below those that are there, unless it is one of them. Raises OSError, Refused."""
        if (index, tar) in self._state.layers and len(self._layers) == len(self._state.layers):
            return
        self._layers.append(mount_layer(self._machine, self._disk(index), None if tar is None else self._disk(tar)))
        if (index, tar) not in self._state.layers:
            self._state.layers.append((index, tar))

    def build(self, request: Mapping[str, Any], upper: bytes | None) -> None:
        """Make root, mounts and network.

        Args:
            request: What `configure` asks for.
            upper: The tree of its own files, where the guest's memory knows better than its disk.

        Raises:
            OSError, Refused: As they say.
        """
        view = View(MergedNode(self._mount_upper(request["upper"], upper), list(self._layers)))
        guest_files.furnish(view, self.now_ns, n_cpus=self._hardware.n_cpus, memory_bytes=self.total_bytes)
        self._configure_network(view, request["network"])
        for each in request.get("mounts", []):
            guest_files.mount_at(view, each["path"], self._source(each), read_only=bool(each.get("read_only")))
        guest_files.mount_file(view, "/etc/hosts", request["hosts"], self.now_ns)
        guest_files.mount_file(view, "/etc/resolv.conf", request["resolv"], self.now_ns)
        self.group.pids_max = request.get("pids_max")
        config = Config(process=ProcessSpec(args=[]), root=Root("/"), hostname=request["hostname"])
        facts = KernelFacts(RELEASE, self._hardware.n_cpus, self.total_bytes, self.now_ns, self._random)
        self.container = Container(view, config, self.group, self.network, kernel=facts)
        self.container.pids = self.pids
        self.container.on_sync = self._sync
        self._state.configuration = {key: value for key, value in request.items() if key not in ("time_ns", "entropy", "op")}

    def renew(self, request: Mapping[str, Any]) -> None:
        """Take another name and other addresses. Raises OSError, Refused."""
        container = self.configured()
        container.config.hostname = request["hostname"]
        self._configure_network(container.view, request["network"])
        for path, text in (("/etc/hosts", request["hosts"]), ("/etc/resolv.conf", request["resolv"])):
            container.view.node(path).inode.fill(text.encode())
        assert self._state.configuration is not None
        self._state.configuration |= {key: request[key] for key in ("hostname", "network", "hosts", "resolv")}

    def configured(self) -> Container:
        """Return what processes live in. Raises Refused: there is nothing yet."""
        if self.container is None:
            raise Refused("invalid", "it is not configured yet")
        return self.container

    def new_process(self, request: Mapping[str, Any], *, pid: int | None) -> SimProcess:
        """Make a process that has neither stdio nor code yet; what it is to run is checked.

        Args:
            request: What `start` or `exec` asks for.
            pid: Its number, if it had one before.

        Raises:
            OSError, Refused: As they say.
        """
        container = self.configured()
        argv, cwd = [str(word) for word in request["argv"]], str(request.get("cwd") or "/")
        user = guest_files.find_user(container.view, str(request.get("user") or ""))
        env = {"PATH": DEFAULT_PATH, "HOSTNAME": container.config.hostname, "HOME": user.home}
        env |= ({"TERM": "xterm"} if request.get("terminal") else {}) | request.get("env", {})
        if container.view.find(cwd) is None:
            raise Refused("not_found", f"{cwd}: no such folder")
        find_executable(container.view, argv[0], env, cwd)
        if self.group.pids_max is not None and len(self.group.members) >= self.group.pids_max:
            fail(errno.EAGAIN, argv[0])
        process = self._machine.table.add(argv, {}, cwd)
        lines = [f"{key}={value}" for key, value in sorted(env.items())]
        container.adopt(process, ProcessSpec(args=argv, env=lines, cwd=cwd, user=User(user.uid, user.gid)))
        process.inner_pid = process.inner_pid if pid is None else pid
        return process

    # -- files -----------------------------------------------------------------------------------------------------------------------

    def pack_upper(self) -> bytes | None:
        """Return the tree of its own files as its kernel knows it, None if that is what its disk holds."""
        return self._upper.pack() if self._upper is not None and not self._upper.is_read_only else None

    def write_back(self) -> None:
        """Write what changed to its disks. EIO, ENOSPC: a disk of the host refused."""
        for disk in self._disks:
            disk.write_back()

    def turn_read_only(self) -> bool:
        """Let its own files be read-only from now on; return whether they were not."""
        if self._upper is None or self.container is None or self._upper.is_read_only:
            return False
        self._upper.is_read_only = True
        self.container.view.make_read_only("/")
        return True

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    def _sync(self) -> None:
        """Write back for a command that asked for it, which sees the error too."""
        try:
            self.write_back()
        except OSError:
            if self.on_disk_error is not None:
                self.on_disk_error()
            raise

    def _disk(self, serial: str) -> str:
        drive = self._hardware.drive(serial)
        if drive is None:
            raise Refused("failed", f"no disk has the serial {serial}")
        return drive.path

    def _mount_upper(self, serial: str | None, tree: bytes | None) -> Inode:
        if serial is None:
            return FileSystem(self._hardware.memory_bytes // 2, self.now_ns, volatile=True).root
        self._upper = self._mount_disk(serial, tree)
        if self._small_disk:
            self._upper.file_system.capacity_bytes = self._upper.file_system.used_bytes + _BLOCK_BYTES
        return self._upper.root

    def _mount_disk(self, serial: str, tree: bytes | None) -> Ext4:
        self._disks.append(Ext4(self._machine, self._disk(serial), self.now_ns, tree=tree))
        return self._disks[-1]

    def _source(self, wanted: Mapping[str, Any]) -> Node:
        """Return what a mount shows."""
        if wanted["kind"] == "tmpfs":
            return PlainNode(FileSystem(wanted.get("n_bytes") or _TMPFS_BYTES, self.now_ns, volatile=True).root)
        if wanted["kind"] == "disk":
            return PlainNode(self._mount_disk(wanted["tag"], None).root)
        share = next((each for each in self._hardware.shares if each.tag == wanted["tag"]), None)
        served = None if share is None else self._machine.shares.get(share.socket)
        if served is None:
            raise Refused("failed", f"no share has the tag {wanted['tag']}")
        return self._machine.view.node(f"{served.folder}/{wanted['file']}" if wanted.get("file") else served.folder)

    def _configure_network(self, view: View, wanted: Mapping[str, Any] | None) -> None:
        if wanted is None:
            return
        links = [link for link in self.network.links.values() if link.kind == "ether"]
        if not links:
            raise Refused("failed", "no network interface")
        link = next((each for each in links if each.mac == wanted["mac"]), links[0])
        link.mac, link.is_up, link.addresses = wanted["mac"], True, []
        self._machine.kernel.links.configure(self.network, link.name, address=wanted["address"], gateway=wanted["gateway"])
        folder = f"/sys/class/net/{link.name}"
        view.make_folders(folder, 0o755)
        view.write(f"{folder}/address", f"{wanted['mac']}\n".encode(), 0o444)
