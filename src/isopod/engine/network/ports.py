"""Ports: which ports of the host lead to which containers, and that nobody else has them.

A published port is an element of the packet filter's maps (`filter`), so no process stands between the outside and the container, and none
needs to live for it. Beside it the node holds a socket of that port, on which nothing ever arrives: so the kernel itself says, before
anything starts, that another program or container has the port, gives a free one when none is named, and keeps others from taking it. A
node that starts anew takes the sockets again; whoever got in between is told in the log, and the container keeps its port.
IPv4 only: addresses of containers are.
"""

import asyncio
import errno
import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from isopod.api.messages import PortMapping
from isopod.runtime.logger import Logger
from isopod.world.errors import InUse, InvalidArgument, IsopodError, from_os_error
from isopod.world.network import PORT_MAX, TcpAddress, UdpAddress
from isopod.world.world import World

PORTS_MAX: Final = 512
"""Of one container: each takes a descriptor of the node."""
ANY: Final = "0.0.0.0"  # noqa: S104 - "-p 80:80" means every address, as everywhere
_PROTOCOLS: Final = ("tcp", "udp")


class _Held(NamedTuple):
    mapping: PortMapping
    close: Callable[[], Awaitable[None]]


class Ports:
    """The published ports of one instance.

    Args:
        world: Its network is used.
        logger: Told of ports that cannot be held.
    """

    def __init__(self, world: World, logger: Logger) -> None:
        self._network = world.network
        self._logger = logger
        self._held: dict[str, list[_Held]] = {}

    async def hold(self, container_id: str, wanted: Sequence[PortMapping]) -> tuple[PortMapping, ...]:
        """Take ports for a container, all or none.

        Returns:
            The same, with the host's ports that were chosen.

        Raises:
            InUse: Another container or another program has one.
            InvalidArgument: An address is none of this machine's.
            UnavailableError: The kernel refused.
        """
        held = self._held.setdefault(container_id, [])
        for mapping in wanted:
            try:
                held.append(await self._take(mapping))
            except BaseException as error:
                why = self._explained(mapping, error) if isinstance(error, OSError) else None
                await self.release(container_id)
                if why is not None:
                    raise why from error
                raise
        return tuple(each.mapping for each in held)

    async def take_over(self, container_id: str, published: Sequence[PortMapping]) -> None:
        """Hold the ports of a container that runs already, as far as they are free."""
        held = self._held.setdefault(container_id, [])
        for mapping in published:
            try:
                held.append(await self._take(mapping))
            except OSError as error:
                why = str(self._explained(mapping, error))
                self._logger.warning("network_port_not_held", container=container_id, port=described(mapping), why=why)

    async def release(self, container_id: str) -> None:
        """Give a container's ports back; one without is fine."""
        for held in self._held.pop(container_id, []):
            await held.close()

    async def close(self) -> None:
        """Let go of all sockets; what is published goes on."""
        for container_id in list(self._held):
            await self.release(container_id)

    async def _take(self, mapping: PortMapping) -> _Held:
        host = mapping.host_ip or ANY
        if mapping.protocol == "tcp":
            listener = await self._network.listen(TcpAddress(host, mapping.host_port), _Refusal, backlog=1)
            assert isinstance(listener.address, TcpAddress)
            return _Held(msgspec.structs.replace(mapping, host_port=listener.address.port), listener.close)
        transport, _ = await self._network.open_udp(UdpAddress(host, mapping.host_port), asyncio.DatagramProtocol)

        async def close() -> None:
            transport.close()
            for _ in range(2):  # uvloop closes the socket in its next turn
                await asyncio.sleep(0)

        return _Held(msgspec.structs.replace(mapping, host_port=int(transport.get_extra_info("sockname")[1])), close)

    def _explained(self, mapping: PortMapping, error: OSError) -> IsopodError:
        if error.errno == errno.EADDRINUSE:
            hint = "choose another port of the host, or none (-p PORT) to get a free one"
            return InUse("port", described(mapping), self._owner_of(mapping), hint)
        if error.errno == errno.EADDRNOTAVAIL:
            return InvalidArgument("host address", mapping.host_ip, "it is none of this machine's", "`ip -4 address` lists them")
        return from_os_error(error, "publish port", described(mapping))

    def _owner_of(self, mapping: PortMapping) -> str:
        for container_id, held in self._held.items():
            if any(_overlap(each.mapping, mapping) for each in held):
                return f"container {container_id[:12]}"
        return "another program on this machine"


class _Refusal(asyncio.Protocol):
    """Ends a connection at once: none should come here."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """End it."""
        transport.close()


def check_ports(ports: Sequence[PortMapping], network: str) -> None:
    """Check what is to be published.

    Args:
        ports: What.
        network: On which network the container is to be.

    Raises:
        InvalidArgument: A number or address is malformed, a port of the host is named twice, there are too many, or the network has none.
    """
    if ports and network in ("none", "host"):
        why = "it has no ports of its own to publish" if network == "host" else "nobody can reach it"
        raise InvalidArgument("network", network, why, "leave -p out, or choose a bridge network")
    if len(ports) > PORTS_MAX:
        raise InvalidArgument("ports", len(ports), f"want at most {PORTS_MAX}")
    for index, mapping in enumerate(ports):
        _check_port(mapping)
        if any(_overlap(mapping, other) for other in ports[:index]):
            raise InvalidArgument("port", described(mapping), "it is published twice")


def described(mapping: PortMapping) -> str:
    """Return a host's port as people write it: 127.0.0.1:8080/tcp."""
    where = f"{mapping.host_ip}:" if mapping.host_ip else ""
    return f"{where}{mapping.host_port}/{mapping.protocol}"


def _check_port(mapping: PortMapping) -> None:
    if not 1 <= mapping.port <= PORT_MAX or not 0 <= mapping.host_port <= PORT_MAX:
        raise InvalidArgument("port", f"{mapping.host_port}:{mapping.port}", f"want 1 to {PORT_MAX}")
    if mapping.protocol not in _PROTOCOLS:
        raise InvalidArgument("protocol", mapping.protocol, "want tcp or udp")
    try:
        address = ipaddress.IPv4Address(mapping.host_ip or ANY)
    except ValueError:
        raise InvalidArgument("host address", mapping.host_ip, "not an IPv4 address", "for example -p 127.0.0.1:8080:80") from None
    if address.is_multicast or (mapping.host_ip and address == ipaddress.IPv4Address(ANY)):
        raise InvalidArgument("host address", mapping.host_ip, "it is no address of one machine", "leave it out for all addresses")


def _overlap(one: PortMapping, other: PortMapping) -> bool:
    if not one.host_port or (one.protocol, one.host_port) != (other.protocol, other.host_port):
        return False
    return one.host_ip == other.host_ip or not one.host_ip or not other.host_ip
