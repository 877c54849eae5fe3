"""Network namespaces, links and the packet filter of the host.

Links and namespaces are the Rust core's netlink, taps and rates of links are in `taps`; every call waits for the kernel's network lock, so
it runs in a thread. The packet filter is nft(8) with the script on its stdin: one process per change, which is applied as a whole or not
at all.
"""

import errno
import os
from collections.abc import Sequence
from typing import Final

from isopod import _core
from isopod.world.errors import ToolMissing
from isopod.world.host import mountspace, taps
from isopod.world.host.processes import HostProcesses
from isopod.world.host.workers import Workers
from isopod.world.processes import ProcessIdentity

NFT_TIMEOUT_S: Final = 20.0
IP_FORWARD: Final = "/proc/sys/net/ipv4/ip_forward"
ROUTE_LOCALNET: Final = "/proc/sys/net/ipv4/conf/{}/route_localnet"
OWN_NAMESPACE: Final = "/proc/self/ns/net"
FAMILIES: Final = ("inet", "bridge")
"""Of the packet filter's tables."""


class HostLinks:
    """The part of `Kernel` that concerns the network."""

    def __init__(self, workers: Workers, processes: HostProcesses) -> None:
        self._workers = workers
        self._processes = processes

    async def create_namespace(self, path: str) -> None:
        """See `Kernel.create_namespace`."""
        await self._workers.quick(_core.create_network_namespace, path)

    async def pin_namespace(self, path: str, *, pid: int, started_ticks: int) -> None:
        """See `Kernel.pin_namespace`."""
        await self._workers.quick(_pin_namespace, path, ProcessIdentity(pid, started_ticks), self._processes)

    async def delete_namespace(self, path: str) -> None:
        """See `Kernel.delete_namespace`."""
        await self._workers.quick(_delete_namespace, path)

    async def create_bridge(self, name: str, address: str) -> None:
        """See `Kernel.create_bridge`."""
        await self._workers.quick(_create_bridge, name, address)

    async def create_veth(self, host_name: str, *, bridge: str, namespace: str, guest_name: str = "eth0") -> None:
        """See `Kernel.create_veth`."""
        await self._workers.quick(_core.create_veth, host_name, bridge, namespace, guest_name)

    async def create_tap(self, name: str, *, bridge: str) -> None:
        """See `Kernel.create_tap`."""
        await self._workers.quick(taps.create_tap, name, bridge)

    async def limit_link(self, name: str, *, bytes_per_s: int | None) -> None:
        """See `Kernel.limit_link`."""
        await self._workers.quick(taps.limit_link, name, bytes_per_s)

    async def reflect_link(self, name: str) -> None:
        """See `Kernel.reflect_link`."""
        await self._workers.quick(taps.reflect_link, name)

    async def configure_link(self, namespace: str, name: str, *, address: str, gateway: str) -> str:
        """See `Kernel.configure_link`."""
        return await self._workers.quick(_core.configure_link, namespace, name, address, gateway)

    async def delete_link(self, name: str) -> None:
        """See `Kernel.delete_link`."""
        await self._workers.quick(_core.delete_link, name)

    async def links(self, prefix: str) -> tuple[str, ...]:
        """Return the sorted names of the links that begin with `prefix`."""
        found = await self._workers.quick(_core.list_links)
        return tuple(sorted(name for _, name, _, _, _ in found if name.startswith(prefix)))

    async def routes(self) -> Sequence[str]:
        """See `Kernel.routes`."""
        return await self._workers.quick(_core.list_routes)

    async def enable_forwarding(self) -> None:
        """See `Kernel.enable_forwarding`. Nothing is written where it is on already: a read-only /proc/sys is then no obstacle."""
        _switch_on(IP_FORWARD)

    async def apply_filter(self, ruleset: str) -> None:
        """See `Kernel.apply_filter`. EINVAL, with nft's own words, if it refuses; `ToolMissing` without nft."""
        await self._nft(["-f", "-"], ruleset)

    async def delete_table(self, name: str) -> None:
        """See `Kernel.delete_table`."""
        doomed = [family for family, found in await self._tables() if found == name]
        if doomed:
            # Made first, so that one that somebody else removes meanwhile is no failure.
            await self.apply_filter("".join(f"table {family} {name}\ndelete table {family} {name}\n" for family in doomed))

    async def tables(self, prefix: str) -> tuple[str, ...]:
        """Return the sorted names of the tables that begin with `prefix`, as `Inventory.tables` has them; () without nft."""
        if self._processes.which("nft") is None:
            return ()
        found = [(family, name) for family, name in await self._tables() if name.startswith(prefix)]
        return tuple(sorted(name if family == "inet" else f"{family} {name}" for family, name in found))

    async def _tables(self) -> Sequence[tuple[str, str]]:
        """Return family and name of the tables of the families that nodes use."""
        rows = [line.split() for line in (await self._nft(["list", "tables"])).splitlines()]
        return [(row[1], row[2]) for row in rows if len(row) == 3 and row[1] in FAMILIES]

    async def _nft(self, arguments: Sequence[str], stdin: str = "") -> str:
        program = self._processes.which("nft")
        if program is None:
            raise ToolMissing("nft", "nftables")
        done = await self._processes.run([program, *arguments], stdin=stdin.encode(), timeout_s=NFT_TIMEOUT_S)
        if done.returncode != 0:
            complaint = done.stderr.decode(errors="replace").strip() or f"nft ended with {done.returncode}"
            raise OSError(errno.EINVAL, complaint.splitlines()[0])
        return done.stdout.decode(errors="replace")


def _create_bridge(name: str, address: str) -> None:
    _core.create_bridge(name, address)
    try:
        _switch_on(ROUTE_LOCALNET.format(name))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):  # then 127.0.0.1 leads to no container, all else works
            raise


def _switch_on(path: str) -> None:
    with open(path, encoding="ascii") as file:
        if file.read().strip() == "1":
            return
    with open(path, "w", encoding="ascii") as file:
        file.write("1\n")


def _pin_namespace(path: str, process: ProcessIdentity, processes: HostProcesses) -> None:
    try:
        fd = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), path) from error
    try:
        # What was opened is that very process's only if it lives still: a pid is given again only after its end.
        if processes.identify(process.pid) != process:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), path)
        if os.path.samestat(os.fstat(fd), os.stat(OWN_NAMESPACE)):
            raise OSError(errno.EINVAL, "the process shares the network of this one", path)
        os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            _core.bind_mount(f"/proc/self/fd/{fd}", path)
        except BaseException:
            os.unlink(path)
            raise
    finally:
        os.close(fd)


def _delete_namespace(path: str) -> None:
    mountspace.unmount_tree(path)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
