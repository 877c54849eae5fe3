"""Network namespaces, links and the packet filter of the host.

Links and namespaces are the Rust core's netlink; every call waits for the kernel's network lock, so it runs in a thread. The packet
filter is nft(8) with the script on its stdin: one process per change, which is applied as a whole or not at all.
"""

import errno
import os
from collections.abc import Sequence
from typing import Final

from isopod import _core
from isopod.world.errors import ToolMissing
from isopod.world.host import mountspace
from isopod.world.host.processes import HostProcesses
from isopod.world.host.workers import Workers
from isopod.world.processes import ProcessIdentity

NFT_TIMEOUT_S: Final = 20.0
IP_FORWARD: Final = "/proc/sys/net/ipv4/ip_forward"
OWN_NAMESPACE: Final = "/proc/self/ns/net"


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
        await self._workers.quick(_core.create_bridge, name, address)

    async def create_veth(self, host_name: str, *, bridge: str, namespace: str, guest_name: str = "eth0") -> None:
        """See `Kernel.create_veth`."""
        await self._workers.quick(_core.create_veth, host_name, bridge, namespace, guest_name)

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
        """See `Kernel.delete_table`: made first, so that one script works whether it is there or not."""
        await self.apply_filter(f"table inet {name}\ndelete table inet {name}\n")

    async def tables(self, prefix: str) -> tuple[str, ...]:
        """Return the sorted names of the `inet` tables that begin with `prefix`; () without nft."""
        if self._processes.which("nft") is None:
            return ()
        rows = [line.split() for line in (await self._nft(["list", "tables", "inet"])).splitlines()]
        return tuple(sorted(row[2] for row in rows if row[:2] == ["table", "inet"] and row[2].startswith(prefix)))

    async def _nft(self, arguments: Sequence[str], stdin: str = "") -> str:
        program = self._processes.which("nft")
        if program is None:
            raise ToolMissing("nft", "nftables")
        done = await self._processes.run([program, *arguments], stdin=stdin.encode(), timeout_s=NFT_TIMEOUT_S)
        if done.returncode != 0:
            complaint = done.stderr.decode(errors="replace").strip() or f"nft ended with {done.returncode}"
            raise OSError(errno.EINVAL, complaint.splitlines()[0])
        return done.stdout.decode(errors="replace")


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
