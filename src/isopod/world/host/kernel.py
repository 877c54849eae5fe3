"""The host's kernel objects: one face over the mount namespace, the network and control groups."""

import errno
import os
from collections.abc import Mapping, Sequence
from typing import Final

from isopod import _core
from isopod.world.host import cgroup_figures, cgroup_limits, cgroups, figures, machine, mountspace
from isopod.world.host.links import HostLinks
from isopod.world.host.mountinfo import is_below, read_own
from isopod.world.host.processes import HostProcesses
from isopod.world.host.workers import Workers
from isopod.world.kernel import CgroupFacts, CgroupFigures, CgroupUsage, HostFacts, Inventory, MachineFigures, ProcessFigures

NAMESPACE_KIND: Final = "nsfs"


class HostKernel(HostLinks):
    """`Kernel` by system calls. Mounting is quick and runs inline; unmounting may have to sync, and runs in a thread."""

    def __init__(self, workers: Workers, processes: HostProcesses) -> None:
        super().__init__(workers, processes)
        self._layout: cgroups.Layout | None = None
        self._facts: CgroupFacts | None = None
        self._entered: dict[str, int] = {}
        """For each pin the descriptor of the namespace that was left."""

    async def prepare(self, pin: str) -> None:
        """See `Kernel.prepare`. Before any thread starts (EINVAL otherwise): first thing in the process. Entering twice is fine."""
        if pin in self._entered:
            return
        if self._entered:
            raise OSError(errno.EBUSY, "this process is already in another private mount namespace", pin)
        self._facts = self.cgroup_facts()
        self._entered[pin] = mountspace.enter(pin)
        self._layout = None

    async def release(self, pin: str) -> None:
        """See `Kernel.release`."""
        host_fd = self._entered.get(pin)
        await self._workers.quick(mountspace.leave_pin, pin, host_fd)
        if host_fd is not None:
            os.close(self._entered.pop(pin))

    def host_facts(self) -> HostFacts:
        """See `Kernel.host_facts`."""
        return machine.host_facts()

    def overlay_supported(self) -> bool:
        """See `Kernel.overlay_supported`."""
        return _core.overlay_supported()

    async def mount_overlay(self, target: str, *, lowers: Sequence[str], upper: str, work: str, volatile: bool = False) -> None:
        """See `Kernel.mount_overlay`."""
        _core.mount_overlay(target, lowers, upper, work, volatile)

    def erofs_supported(self) -> bool:
        """See `Kernel.erofs_supported`."""
        return _core.erofs_supported()

    async def mount_erofs(self, target: str, *, index: str, tar: str | None) -> None:
        """See `Kernel.mount_erofs`. In a thread: it may wait for the device."""
        await self._workers.quick(_core.mount_erofs, target, index, tar)

    def mounts_below(self, root: str) -> Sequence[str]:
        """See `Kernel.mounts_below`."""
        return sorted({mount.target for mount in read_own() if is_below(mount.target, root)})

    async def mount_tmpfs(self, target: str, *, n_bytes: int) -> None:
        """See `Kernel.mount_tmpfs`."""
        _core.mount_tmpfs(target, n_bytes)

    async def unmount(self, target: str) -> None:
        """See `Kernel.unmount`."""
        await self._workers.quick(mountspace.unmount_tree, target)

    def cgroup_facts(self) -> CgroupFacts:
        """See `Kernel.cgroup_facts`. After `prepare` still what the host has: the unified hierarchy is then hidden, not gone."""
        return self._facts or cgroups.facts(self._cgroups())

    def cgroup_usage(self, cgroup: str) -> CgroupUsage:
        """See `Kernel.cgroup_usage`."""
        return cgroups.usage(self._cgroups(), cgroup)

    def cgroup_figures(self, cgroup: str, pid: int | None) -> CgroupFigures:
        """See `Kernel.cgroup_figures`."""
        return cgroup_figures.measure(self._cgroups(), cgroup, pid)

    async def create_cgroup(
        self, cgroup: str, *, cpus: float | None = None, memory_bytes_max: int | None = None, pids_max: int | None = None
    ) -> tuple[str, ...]:
        """See `Kernel.create_cgroup`."""
        limits = cgroup_limits.Limits(cpus, memory_bytes_max, pids_max)
        return await self._workers.quick(cgroup_limits.create, self._cgroups(), cgroup, limits)

    async def kill_cgroup(self, cgroup: str) -> None:
        """See `Kernel.kill_cgroup`."""
        await cgroups.kill(self._cgroups(), cgroup)

    async def delete_cgroup(self, cgroup: str) -> None:
        """See `Kernel.delete_cgroup`."""
        await cgroups.delete(self._cgroups(), cgroup)

    async def inventory(self, prefix: str, roots: Sequence[str]) -> Inventory:
        """See `Kernel.inventory`."""
        below = [mount for mount in read_own() if any(is_below(mount.target, root) for root in roots)]
        return Inventory(
            mounts=tuple(sorted(mount.target for mount in below if mount.kind != NAMESPACE_KIND)),
            namespaces=tuple(sorted(mount.target for mount in below if mount.kind == NAMESPACE_KIND)),
            links=await self.links(prefix),
            cgroups=cgroups.groups(self._cgroups(), prefix),
            tables=await self.tables(prefix),
        )

    async def process_figures(self) -> ProcessFigures:
        """See `Kernel.process_figures`. In a thread: the kernel walks all its pages."""
        return await self._workers.quick(figures.process_figures)

    async def machine_figures(self) -> MachineFigures:
        """See `Kernel.machine_figures`."""
        return await self._workers.quick(figures.machine_figures)

    async def pressure(self) -> Mapping[str, float]:
        """See `Kernel.pressure`."""
        return machine.pressure()

    def close(self) -> None:
        """Forget the namespaces that were left; pins stay."""
        for fd in self._entered.values():
            os.close(fd)
        self._entered.clear()

    def _cgroups(self) -> cgroups.Layout:
        """Return the layout of the current namespace, probed once: mounts of control groups do not change under a running node."""
        if self._layout is None:
            self._layout = cgroups.read_layout()
        return self._layout
