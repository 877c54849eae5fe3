"""SimKernel: the Kernel port: mounts, namespaces, links, control groups and the packet filter, in memory.

Legal behaviours: every call takes a small seeded time and takes effect at one instant; errors are the kernel's (EEXIST, ENOENT, ENODEV,
EBUSY, EINVAL). Objects outlive the node that made them, as on the host; a power cut ends them all. Overlays are seen through the disk.
Faults, only when a test asks for them: the next calls fail (`fail_next`), every call takes longer (`delay_s`).

Not modelled: packets, CPU time beyond what simulated programs charge, more than one mount namespace (a pinned one shows the same tree).
"""

import asyncio
import errno
import random
from collections.abc import Mapping, Sequence
from typing import Final

from isopod.world.kernel import (
    CgroupFacts,
    CgroupFigures,
    CgroupUsage,
    DiskFigures,
    HostFacts,
    InterfaceFigures,
    Inventory,
    MachineFigures,
    ProcessFigures,
)
from isopod.world.kernel import Kernel as KernelPort
from isopod.world.sim import indexes
from isopod.world.sim.filters import Filters
from isopod.world.sim.inodes import FileSystem, Inode
from isopod.world.sim.links import Links, NetworkNamespace
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.nodes import MergedNode, PlainNode
from isopod.world.sim.table import SIGKILL, Group, ProcessTable
from isopod.world.sim.view import View, fail

_CALL_S: Final = (50e-6, 800e-6)
_EMPTY_WITHIN_S: Final = 5.0
_CONTROLLERS: Final = ("blkio", "cpu", "cpuset", "devices", "freezer", "memory", "pids")


class SimKernel:
    """The Kernel port of the simulation.

    Args:
        loop: The loop.
        chance: For delays and hardware addresses.
        view: The tree that mounts appear in.
        table: The processes.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, view: View, table: ProcessTable) -> None:
        self.links = Links(chance)
        self.filters = Filters()
        self.groups: dict[str, Group] = {}
        self.forwards = False
        self.facts = HostFacts("simulated", "6.12.0-sim", "x86_64", 4, 8 << 30, "Simulated GNU/Linux 1")
        self._loop = loop
        self._chance = chance
        self._view = view
        self._table = table
        self._namespaces: dict[Inode, NetworkNamespace] = {}
        self._pins: list[str] = []
        self._failures: list[int] = []
        self.knows_erofs = True
        """Whether layers can be mounted: set it False for an older kernel."""
        self.delay_s = 0.0
        """What every call takes longer."""

    # -- faults and inspection -------------------------------------------------------------------------------------------------------

    def fail_next(self, number: int, *, times: int = 1) -> None:
        """Let the next calls fail with that errno, having changed nothing."""
        self._failures += [number] * times

    def reset(self) -> None:
        """Lose everything: the machine lost its power. The process table and the disk are the caller's."""
        self.links.reset()
        self.filters.tables.clear()
        self.groups.clear()
        self.forwards = False
        self._namespaces.clear()
        self._pins.clear()

    def namespace_at(self, path: str) -> NetworkNamespace:
        """Return the network namespace pinned at a path. ENOENT, EINVAL."""
        found = self._namespaces.get(self._view.node(path).inode)
        if found is None:
            fail(errno.EINVAL, path)
        return found

    # -- mounts ----------------------------------------------------------------------------------------------------------------------

    async def prepare(self, pin: str) -> None:
        """Enter the mount namespace pinned at `pin`, or pin a new one there."""
        await self._call()
        if pin in self._pins:
            return
        if self._view.find(pin) is None:
            self._view.create(pin, "file", 0o600)
        self._view.mount(pin, PlainNode(self._pseudo()))
        self._pins.append(pin)

    async def release(self, pin: str) -> None:
        """Unpin the mount namespace."""
        await self._call()
        if pin in self._pins:
            self._pins.remove(pin)
            self._view.unmount(pin)
            self._view.remove(pin)

    def host_facts(self) -> HostFacts:
        """Return facts about the machine."""
        return self.facts

    def overlay_supported(self) -> bool:
        """Return whether overlays can be mounted."""
        return True

    async def mount_overlay(self, target: str, *, lowers: Sequence[str], upper: str, work: str, volatile: bool = False) -> None:
        """Mount an overlay; `lowers` are ordered from the top."""
        await self._call()
        if not lowers:
            fail(errno.EINVAL, target)
        self._view.folder(target)
        layers = [self._view.folder(lower).inode for lower in lowers]
        above, aside = self._view.folder(upper), self._view.folder(work)
        if above.inode.file_system is not aside.inode.file_system or above.inode is aside.inode:
            fail(errno.EINVAL, work)
        self._view.mount(target, MergedNode(above.inode, layers))

    def erofs_supported(self) -> bool:
        """Return whether indexes can be mounted."""
        return self.knows_erofs

    async def mount_erofs(self, target: str, *, index: str, tar: str | None) -> None:
        """Mount the tree that an index made by `SimDisk.index_layer` stands for. EINVAL, EUCLEAN: it does not fit its archive."""
        await self._call()
        if not self.knows_erofs:
            fail(errno.ENODEV, target)
        self._view.folder(target)
        if tar is None:
            fail(errno.EINVAL, index)
        system = FileSystem(1 << 62, self._view.root.inode.file_system.now_ns, volatile=True)
        indexes.fill(system.root, bytes(self._view.open_file(index).data), bytes(self._view.open_file(tar).data), index)
        self._view.mount(target, PlainNode(system.root))
        self._view.make_read_only(target)

    def mounts_below(self, root: str) -> Sequence[str]:
        """Return the folders at and under `root` that something is mounted on, sorted."""
        return self._view.mounts_below(root)

    async def mount_tmpfs(self, target: str, *, n_bytes: int) -> None:
        """Mount a memory file system of a bounded size."""
        await self._call()
        self._view.folder(target)
        root = self._view.root.inode.file_system
        self._view.mount(target, PlainNode(FileSystem(n_bytes, root.now_ns, volatile=True).root))

    async def unmount(self, target: str) -> None:
        """Unmount all at and under `target`; nothing mounted is fine."""
        await self._call()
        self.unmount_now(target)

    def unmount_now(self, target: str) -> None:
        """The same, at once."""
        for path in reversed(self._view.mounts_below(target.rstrip("/") or "/")):
            while self._view.unmount(path):
                pass

    # -- network ---------------------------------------------------------------------------------------------------------------------

    async def create_namespace(self, path: str) -> None:
        """Make a network namespace pinned at the new file `path`."""
        await self._call()
        self._view.create(path, "file", 0o600)
        inode = self._pseudo()
        self._view.mount(path, PlainNode(inode))
        self._namespaces[inode] = self.links.new_namespace()

    async def pin_namespace(self, path: str, *, pid: int, started_ticks: int) -> None:
        """Pin a process's network namespace at the new file `path`."""
        await self._call()
        found = self._table.get(pid)
        if found is None or not found.is_alive or found.identity != (pid, started_ticks):
            fail(errno.ESRCH, path)
        if found.network is None:
            fail(errno.EINVAL, path)
        self._view.create(path, "file", 0o600)
        inode = self._pseudo()
        self._view.mount(path, PlainNode(inode))
        found.network.is_pinned = True
        self._namespaces[inode] = found.network

    async def delete_namespace(self, path: str) -> None:
        """Unpin and remove; nothing there is fine."""
        await self._call()
        node = self._view.find(path)
        if node is None:
            return
        namespace = self._namespaces.pop(node.inode, None)
        if namespace is not None:
            namespace.unpin()
        while self._view.unmount(path):
            pass
        self._view.remove(path)

    async def create_bridge(self, name: str, address: str) -> None:
        """Make a bridge, up, with `address`."""
        await self._call()
        self.links.create_bridge(name, address)

    async def create_veth(self, host_name: str, *, bridge: str, namespace: str, guest_name: str = "eth0") -> None:
        """Make a veth pair between a bridge and a namespace."""
        await self._call()
        self.links.create_veth(host_name, bridge=bridge, namespace=self.namespace_at(namespace), guest_name=guest_name)

    async def create_tap(self, name: str, *, bridge: str) -> None:
        """Make a persistent tap, up, a port of the bridge."""
        await self._call()
        self.links.create_tap(name, bridge=bridge)

    async def limit_link(self, name: str, *, bytes_per_s: int | None) -> None:
        """Note how much the host may send into a link."""
        await self._call()
        self.links.host.link(name).bytes_per_s = bytes_per_s

    async def reflect_link(self, name: str) -> None:
        """Let the bridge send back through a port what came from it."""
        await self._call()
        if self.links.host.link(name).master is None:
            fail(errno.EOPNOTSUPP, name)

    async def configure_link(self, namespace: str, name: str, *, address: str, gateway: str) -> str:
        """Give a link inside a namespace its address and default route; return its MAC address."""
        await self._call()
        return self.links.configure(self.namespace_at(namespace), name, address=address, gateway=gateway)

    async def delete_link(self, name: str) -> None:
        """Remove a link of the host; nothing there is fine."""
        await self._call()
        self.links.host.remove(name)

    async def apply_filter(self, ruleset: str) -> None:
        """Apply an nftables script atomically."""
        await self._call()
        self.filters.apply(ruleset)

    async def delete_table(self, name: str) -> None:
        """Remove the `inet` and the `bridge` table of that name; nothing there is fine."""
        await self._call()
        self.filters.delete(name)

    async def enable_forwarding(self) -> None:
        """Let the host route IPv4 between links."""
        await self._call()
        self.forwards = True

    async def routes(self) -> Sequence[str]:
        """Return the IPv4 prefixes the host already routes."""
        await self._call()
        return self.links.routes()

    # -- control groups --------------------------------------------------------------------------------------------------------------

    def cgroup_facts(self) -> CgroupFacts:
        """Return how control groups work here."""
        return CgroupFacts("v1", _CONTROLLERS, "the simulation has one hierarchy with every controller")

    def cgroup_usage(self, cgroup: str) -> CgroupUsage:
        """Return the measured use of a group, its children included."""
        family = self._family(cgroup)
        if not family or family[0].path != cgroup:
            return CgroupUsage(None, None, None, None)
        return CgroupUsage(
            memory_bytes=sum(group.memory_bytes for group in family),
            n_oom_kills=sum(group.n_oom_kills for group in family),
            cpu_usage_ns=sum(group.cpu_usage_ns for group in family),
            n_pids=sum(len(group.members) for group in family),
        )

    def cgroup_figures(self, cgroup: str, pid: int | None) -> CgroupFigures:
        """Return more of what a group has used, its children included. Its interfaces carry nothing, and there are no disks."""
        used = self.cgroup_usage(cgroup)
        process = self._table.get(pid) if pid is not None else None
        links = process.network.links if process is not None and process.is_alive and process.network is not None else {}
        return CgroupFigures(
            working_set_bytes=used.memory_bytes or 0,
            rss_bytes=used.memory_bytes or 0,
            cache_bytes=0,
            swap_bytes=0,
            n_oom_kills=used.n_oom_kills or 0,
            n_periods=0,
            n_throttled_periods=0,
            throttled_ns=0,
            disks=(),
            interfaces=tuple(InterfaceFigures(name, 0, 0, 0, 0, 0, 0, 0, 0) for name in sorted(links) if name != "lo"),
        )

    async def create_cgroup(
        self, cgroup: str, *, cpus: float | None = None, memory_bytes_max: int | None = None, pids_max: int | None = None
    ) -> tuple[str, ...]:
        """Make a group, or keep one, with these limits (that of the CPU has no effect); return its cgroup.procs files."""
        await self._call()
        group = self.make_group(cgroup)
        group.memory_bytes_max, group.pids_max = memory_bytes_max, pids_max
        return tuple(f"/sys/fs/cgroup/{controller}{cgroup}/cgroup.procs" for controller in _CONTROLLERS)

    async def kill_cgroup(self, cgroup: str) -> None:
        """Kill every process in a group and below it, and wait until it is empty."""
        await self._call()
        deadline = self._loop.time() + _EMPTY_WITHIN_S
        while members := [member for group in self._family(cgroup) for member in group.members.values()]:
            for member in members:
                self._table.signal(member, SIGKILL)
            if self._loop.time() > deadline:
                fail(errno.EBUSY, cgroup)
            await self._call()

    async def delete_cgroup(self, cgroup: str) -> None:
        """Remove an empty group and its children; nothing there is fine."""
        await self._call()
        self.delete_group(cgroup)

    def make_group(self, path: str) -> Group:
        """Make a group and its parents, as a runtime does."""
        here = ""
        for part in [each for each in path.split("/") if each]:
            here += "/" + part
            self.groups.setdefault(here, Group(here))
        return self.groups[here]

    def delete_group(self, path: str) -> None:
        """Remove an empty group and its children at once. EBUSY."""
        family = self._family(path)
        if any(group.members for group in family):
            fail(errno.EBUSY, path)
        for group in family:
            del self.groups[group.path]

    def freeze(self, group: Group, *, frozen: bool) -> None:
        """Freeze or thaw the processes of a group."""
        group.is_frozen = frozen
        if frozen:
            return
        for member in list(group.members.values()):
            signals, member.pending_signals = member.pending_signals, []
            for number in signals:
                self._table.signal(member, number)
        waiters, group.thaw_waiters = group.thaw_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # -- listing ---------------------------------------------------------------------------------------------------------------------

    async def inventory(self, prefix: str, roots: Sequence[str]) -> Inventory:
        """List what an instance owns."""
        await self._call()
        mounts = dict.fromkeys(path for root in roots for path in self._view.mounts_below(root))
        namespaces = [path for path in mounts if self._view.node(path).inode in self._namespaces]
        return Inventory(
            mounts=tuple(sorted(path for path in mounts if path not in namespaces)),
            namespaces=tuple(sorted(namespaces)),
            links=tuple(sorted(name for name in self.links.host.links if name.startswith(prefix))),
            cgroups=tuple(sorted(path for path in self.groups if path.startswith("/" + prefix))),
            tables=self.filters.names(prefix),
        )

    async def process_figures(self) -> ProcessFigures:
        """Return figures that follow from the virtual time alone."""
        await self._call()
        now_s = self._loop.time()
        return ProcessFigures(
            cpu_user_s=now_s / 100,
            cpu_system_s=now_s / 400,
            resident_bytes=48 << 20,
            proportional_bytes=40 << 20,
            virtual_bytes=256 << 20,
            peak_bytes=48 << 20,
            n_fds=16,
            n_threads=1,
            n_switches_voluntary=int(now_s * 10),
            n_switches_involuntary=int(now_s),
            n_page_faults_major=0,
            read_bytes=1 << 20,
            written_bytes=int(now_s) << 10,
            n_fds_max=1024,
            virtual_bytes_max=2**64 - 1,
        )

    async def machine_figures(self) -> MachineFigures:
        """Return figures that follow from the virtual time alone: one interface and one disk, lightly used."""
        await self._call()
        now_s = self._loop.time()
        n = int(now_s * 1000)
        return MachineFigures(
            cpu_s={"user": now_s / 10, "nice": 0.0, "system": now_s / 20, "idle": now_s * 3.85, "iowait": 0.0, "steal": 0.0},
            memory_bytes={"total": 8 << 30, "free": 4 << 30, "available": 6 << 30, "cached": 1 << 30, "swap_total": 0, "swap_free": 0},
            interfaces=(InterfaceFigures("eth0", n * 1500, n, 0, 0, n * 600, n, 0, 0),),
            disks=(DiskFigures("sda", n, n << 12, n, n << 12, now_s / 50),),
        )

    async def pressure(self) -> Mapping[str, float]:
        """Return the load averages and stalled shares."""
        await self._call()
        n_busy = float(len(self._table.live()))
        return {"load1": n_busy / 10, "load5": n_busy / 10, "load15": n_busy / 10, "cpu_some_avg10": 0.0}

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    async def _call(self) -> None:
        self._loop.owner().check()
        await asyncio.sleep(self._chance.uniform(*_CALL_S) + self.delay_s)
        self._loop.owner().check()
        if self._failures:
            fail(self._failures.pop(0), "simulated kernel")

    def _family(self, cgroup: str) -> list[Group]:
        """Return a group and all below it, parents first."""
        paths = sorted(path for path in self.groups if path == cgroup or path.startswith(cgroup.rstrip("/") + "/"))
        return [self.groups[path] for path in paths]

    def _pseudo(self) -> Inode:
        return self._view.root.inode.file_system.new("file", 0o444)


def _check_port(kernel: SimKernel) -> KernelPort:
    """Let the type checker compare with the port."""
    return kernel
