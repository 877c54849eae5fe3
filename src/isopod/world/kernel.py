"""Kernel: the port to mounts, network namespaces, links, cgroups and the packet filter.

Names of links, namespaces, cgroups and tables begin with the instance's prefix, so that two nodes on one machine never collide, and
`inventory(prefix)` can list whatever an instance owns: tests compare it before and after. Failures are OSErrors.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

CgroupMode = Literal["v1", "hybrid", "v2"]


class HostFacts(NamedTuple):
    """What `isopod info` says about the machine."""

    hostname: str
    kernel: str
    architecture: str
    n_cpus: int
    memory_bytes: int
    operating_system: str


class CgroupFacts(NamedTuple):
    """How control groups are mounted here, and why we think so."""

    mode: CgroupMode
    """"hybrid": v1 controllers beside a unified hierarchy (crun refuses that until it is hidden)."""
    controllers: tuple[str, ...]
    """Those that can limit a container, sorted."""
    why: str


class CgroupUsage(NamedTuple):
    """Measured use of one control group; None where the controller is missing or the group is gone."""

    memory_bytes: int | None
    n_oom_kills: int | None
    cpu_usage_ns: int | None
    n_pids: int | None


class Inventory(NamedTuple):
    """Everything of one instance that lives in the kernel, each tuple sorted."""

    mounts: tuple[str, ...]
    namespaces: tuple[str, ...]
    links: tuple[str, ...]
    cgroups: tuple[str, ...]
    """Each group and those below it, from the hierarchy's root ("/PREFIX/ID")."""
    tables: tuple[str, ...]
    """Of the packet filter: "NAME" in family inet, "bridge NAME" in family bridge."""


class ProcessFigures(NamedTuple):
    """What this process has used so far; 0 where the kernel does not say."""

    cpu_user_s: float
    cpu_system_s: float
    resident_bytes: int
    proportional_bytes: int
    """Its memory, pages shared with others counted in parts (PSS)."""
    virtual_bytes: int
    peak_bytes: int
    n_fds: int
    n_threads: int
    n_switches_voluntary: int
    n_switches_involuntary: int
    n_page_faults_major: int
    read_bytes: int
    """From disks, as `written_bytes` to them."""
    written_bytes: int
    n_fds_max: int = 0
    """So many may be open."""
    virtual_bytes_max: int = 0
    """2**64 - 1 for no limit."""
    ip_received_bytes: int = 0
    """By its network namespace, as `ip_sent_bytes`."""
    ip_sent_bytes: int = 0


class InterfaceFigures(NamedTuple):
    """What a network interface has carried so far."""

    name: str
    received_bytes: int
    n_packets_received: int
    n_receive_errors: int
    n_receive_drops: int
    sent_bytes: int
    n_packets_sent: int
    n_send_errors: int
    n_send_drops: int


class DiskFigures(NamedTuple):
    """What a disk has done so far."""

    name: str
    n_reads: int
    read_bytes: int
    n_writes: int
    written_bytes: int
    busy_s: float


class CgroupFigures(NamedTuple):
    """More of what a control group has used; 0 where a controller is missing or the group is gone."""

    working_set_bytes: int
    """Memory less the file pages that were not used lately."""
    rss_bytes: int
    """Memory of no file."""
    cache_bytes: int
    swap_bytes: int
    n_oom_kills: int
    n_periods: int
    """Of its limit of processors' time: those in which it ran."""
    n_throttled_periods: int
    throttled_ns: int
    disks: tuple[DiskFigures, ...]
    """How long each was busy is not known of one group: 0."""
    interfaces: tuple[InterfaceFigures, ...]
    """Those that a process in it sees, loopback left out."""


class MachineFigures(NamedTuple):
    """What the machine has used so far."""

    cpu_s: Mapping[str, float]
    """Seconds of all CPUs by mode: user, nice, system, idle, iowait, irq, softirq, steal."""
    memory_bytes: Mapping[str, int]
    """total, free, available, cached, swap_total, swap_free."""
    interfaces: tuple[InterfaceFigures, ...]
    disks: tuple[DiskFigures, ...]


class Kernel(Protocol):
    """The kernel's objects that the engine owns."""

    async def prepare(self, pin: str) -> None:
        """Enter the node's private mount namespace: the one pinned at the file `pin`, or a new one pinned there.

        It is a slave of the host's (later host mounts are still seen), and where v1 controllers stand beside a unified hierarchy the
        latter is unmounted in it.
        """

    async def release(self, pin: str) -> None:
        """Unpin the mount namespace: it ends with the last process in it."""

    def host_facts(self) -> HostFacts:
        """Return facts about the machine."""

    def overlay_supported(self) -> bool:
        """Return whether overlayfs can be mounted (asked of the kernel, not of a list)."""

    async def mount_overlay(self, target: str, *, lowers: Sequence[str], upper: str, work: str, volatile: bool = False) -> None:
        """Mount an overlay. `lowers` are ordered from the top; `volatile` skips syncs for a container whose files end with it."""

    def erofs_supported(self) -> bool:
        """Return whether the kernel knows EROFS. Whether it mounts it from files, on the file system in question, shows by mounting."""

    async def mount_erofs(self, target: str, *, index: str, tar: str | None) -> None:
        """Mount an EROFS file read-only, without set-user-id programs and devices. ENOTBLK: not from files (before Linux 6.12).

        Args:
            target: The folder.
            index: The file.
            tar: The file that an index without data is about (`Disk.index_layer`).
        """

    def mounts_below(self, root: str) -> Sequence[str]:
        """Return the folders at and under `root` that something is mounted on, sorted."""

    async def mount_tmpfs(self, target: str, *, n_bytes: int) -> None:
        """Mount a memory file system of a bounded size."""

    async def unmount(self, target: str) -> None:
        """Unmount all that is mounted at and under `target`, detaching what is busy; nothing mounted is fine."""

    async def create_namespace(self, path: str) -> None:
        """Make a network namespace with loopback up, pinned at the new file `path`."""

    async def pin_namespace(self, path: str, *, pid: int, started_ticks: int) -> None:
        """Pin a process's network namespace (see `ProcessIdentity`) at the new file `path`. ESRCH: it is gone. EINVAL: it is in ours."""

    async def delete_namespace(self, path: str) -> None:
        """Unpin and remove; nothing there is fine. Links inside end with it."""

    async def create_bridge(self, name: str, address: str) -> None:
        """Make a bridge, up, with `address` ("10.88.0.1/24"). One that exists is given the address if it lacks it.

        What the host sends there from 127.0.0.1 is routed (route_localnet): the filter must drop what comes from there for it.
        """

    async def create_veth(self, host_name: str, *, bridge: str, namespace: str, guest_name: str = "eth0") -> None:
        """Make a veth pair: one end on the bridge, up, the other inside the namespace as `guest_name`, up, without an address."""

    async def create_tap(self, name: str, *, bridge: str) -> None:
        """Make a persistent tap with virtio headers, up, a port of the bridge: whoever opens it is its other end. EEXIST: there is a link
        of that name."""

    async def limit_link(self, name: str, *, bytes_per_s: int | None) -> None:
        """Let the host send into a link at most so much (None: without a limit); what is too fast waits a little, then is lost."""

    async def reflect_link(self, name: str) -> None:
        """Let the bridge send back through a port what came from it (hairpin mode), so that who is behind it reaches itself by the host."""

    async def configure_link(self, namespace: str, name: str, *, address: str, gateway: str) -> str:
        """Give a link inside a namespace its address ("10.88.0.2/24") and the default route; return its MAC address."""

    async def delete_link(self, name: str) -> None:
        """Remove a link of the host; nothing there is fine."""

    def cgroup_facts(self) -> CgroupFacts:
        """Return how control groups work here."""

    def cgroup_usage(self, cgroup: str) -> CgroupUsage:
        """Return the measured use of a group; `cgroup` is the path below each hierarchy ("/isopod-x/ID")."""

    def cgroup_figures(self, cgroup: str, pid: int | None) -> CgroupFigures:
        """Return more of what a group has used; `cgroup` as for `cgroup_usage`, `pid` a process in it whose interfaces are asked for."""

    async def create_cgroup(
        self, cgroup: str, *, cpus: float | None = None, memory_bytes_max: int | None = None, pids_max: int | None = None
    ) -> tuple[str, ...]:
        """Make a group, or keep one, with these limits (None: without that limit) and return its cgroup.procs files.

        A process that writes itself into all of them is in the group. EOPNOTSUPP: a limit is asked for that nothing here can keep.
        """

    async def kill_cgroup(self, cgroup: str) -> None:
        """Kill every process in a group and below it, and wait until it is empty (at most 5 s, then EBUSY)."""

    async def delete_cgroup(self, cgroup: str) -> None:
        """Remove an empty group and its children from every hierarchy; nothing there is fine."""

    async def apply_filter(self, ruleset: str) -> None:
        """Apply an nftables script atomically."""

    async def delete_table(self, name: str) -> None:
        """Remove the `inet` and the `bridge` table of that name; nothing there is fine."""

    async def enable_forwarding(self) -> None:
        """Let the host route IPv4 between links."""

    async def routes(self) -> Sequence[str]:
        """Return the IPv4 prefixes the host already routes, default route excluded ("192.168.0.0/24")."""

    async def inventory(self, prefix: str, roots: Sequence[str]) -> Inventory:
        """List what an instance owns: mounts below `roots`, namespace files below them, links, cgroups and tables by prefix."""

    async def process_figures(self) -> ProcessFigures:
        """Return what this process has used so far."""

    async def machine_figures(self) -> MachineFigures:
        """Return what the machine has used so far."""

    async def pressure(self) -> Mapping[str, float]:
        """Return the load averages and stalled shares known here ("load1", "cpu_some_avg10", ...)."""
