"""Machine: the simulated computer, as simulated programs see it: its tree of files, processes, network and kernel.

Programs use these directly, without the ports: they are part of the World, not of what is tested in it.
"""

from random import Random
from typing import Final, NamedTuple

from isopod.world.sim.clock import SimClock
from isopod.world.sim.disk import SimDisk
from isopod.world.sim.fabric import Station
from isopod.world.sim.inodes import FileSystem, Inode
from isopod.world.sim.kernel import SimKernel
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.network import SimNetwork
from isopod.world.sim.pages import SimPages
from isopod.world.sim.processes import SimProcesses
from isopod.world.sim.random import SimRandom
from isopod.world.sim.shards import SimShards
from isopod.world.sim.table import ProcessTable, SimProcess
from isopod.world.sim.view import plain_view
from isopod.world.sim.vm_faults import VmFaults

DISK_BYTES: Final = 64 << 30
_FOLDERS: Final = (
    *("/dev", "/etc", "/home", "/opt", "/proc", "/root", "/run", "/srv", "/sys", "/tmp"),  # noqa: S108 - on the simulated disk
    *("/usr/bin", "/usr/sbin", "/usr/share", "/var/lib", "/var/log", "/var/tmp"),  # noqa: S108
)
_FILES: Final = {
    "/etc/hostname": b"simulated\n",
    "/etc/resolv.conf": b"nameserver 192.168.122.1\n",
    "/usr/share/containers/seccomp.json": b'{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}\n',
}


class SharedFolder(NamedTuple):
    """A folder that a daemon serves to a guest."""

    folder: str
    process: SimProcess


class Machine:
    """The computer.

    Args:
        loop: The loop, which machines share that can reach each other.
        random: Its chance.
        station: Where it is on a network with others, or None.
    """

    def __init__(self, loop: SimLoop, random: SimRandom, station: Station | None = None) -> None:
        self.random = random
        self.loop = loop
        self.station = station
        self.name = "" if station is None else station.name
        self.clock = SimClock(self.loop)
        self.device = FileSystem(DISK_BYTES, self.clock.now_ns)
        self.view = plain_view(self.device.root)
        self.table = ProcessTable(self.loop, host=self.name, time=self.clock.time)
        self.disk = SimDisk(
            self.loop, self.random.stream("disk"), view=self.view, device=self.device, faults_chance=self.random.stream("disk faults")
        )
        self.network = SimNetwork(self.loop, self.random.stream("network"), view=self.view, clock=self.clock, station=station)
        self.processes = SimProcesses(self.loop, self.random.stream("processes"), self.view, self.table)
        self.kernel = SimKernel(self.loop, self.random.stream("kernel"), self.view, self.table)
        self.pages = SimPages()
        self.vms = VmFaults(self.random.stream("vm faults"), self._show_kvm)
        """What goes wrong with microVMs, and what /dev/kvm is."""
        self.layer_trees: dict[tuple[int, int], Inode] = {}
        """Trees of image layers that guests have read, by the checksums of their files."""
        self.shares: dict[str, SharedFolder] = {}
        """What is served to guests, by the daemon's socket."""
        self.shards = SimShards(self.loop, self.random.stream("shards"), table=self.table, network=self.network, clock=self.clock)
        self.processes.bind(self)
        self._furnish()

    @property
    def chance(self) -> Random:
        """Chance for simulated programs."""
        return self.random.stream("programs")

    def power_cut(self) -> None:
        """Lose power and boot again: every process ends, the kernel forgets, the disk keeps what was durable, and what faults let it."""
        self.network.vanish()
        self.table.kill_all()
        self.kernel.reset()
        self.disk.crash()
        self.pages.reset()
        self.processes.n_boots += 1

    def _show_kvm(self, is_there: bool) -> None:
        """Make /dev/kvm, or take it away."""
        if is_there != (self.view.find("/dev/kvm") is not None):
            if is_there:
                self.view.create("/dev/kvm", "device", 0o660).device = (10, 232)
            else:
                self.view.remove("/dev/kvm")

    def _furnish(self) -> None:
        """Make the folders and files that every machine has, durable."""
        for folder in _FOLDERS:
            self.view.make_folders(folder, 0o755)
        self.view.symlink("usr/bin", "/bin")
        self.view.symlink("usr/sbin", "/sbin")
        for path, data in _FILES.items():
            self.view.make_folders(path.rpartition("/")[0], 0o755)
            self.view.write(path, data, 0o644)

    def seal(self) -> None:
        """Make all that is on the disk durable: the state in which the simulation begins."""
        self.device.root.sync_below()
