"""Directory: what containers and virtual machines are called on each network, and the name servers that tell it.

Each bridge network has a name server at its gateway's address, port 53. It knows the names, host names and short ids of the sandboxes that
are on that network now, and their addresses backwards; of other networks it knows nothing. Everything else is passed on to the host's own
name servers, also to such that only the host itself can reach (127.0.0.53). It hears the network's addresses only.

Rules: a name that is known but has no record of the type asked for (AAAA) is answered with none, so that nobody looks on; an address of
the network that nobody has is NXDOMAIN, because nobody else can know it. A name that several bear has all their addresses. Where port 53
is taken, the network is without names and says so in the log. While no node runs, nobody answers: containers have the host's name servers
as second choice.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

from isopod.net.dns.client import server_from
from isopod.net.dns.message import MalformedMessage, Question, Record, RecordType, normal_name
from isopod.net.dns.server import DnsServer, Known, Room
from isopod.runtime.logger import Logger
from isopod.world.errors import InvalidArgument
from isopod.world.network import UdpAddress
from isopod.world.world import World

PORT: Final = 53
TTL_S: Final = 5
"""An address changes when a container starts anew."""
HOST_RESOLV: Final = "/etc/resolv.conf"
REREAD_S: Final = 10.0
UPSTREAMS_MAX: Final = 3
"""As resolv.conf(5) has them."""
_REVERSE: Final = ".in-addr.arpa"


class Zone:
    """The names of one network.

    Args:
        subnet: Its range.
        gateway: The host's address in it.
    """

    def __init__(self, subnet: str, gateway: str) -> None:
        self._subnet = ipaddress.IPv4Network(subnet)
        self.gateway: Final = gateway
        self._addresses: dict[str, list[str]] = {}
        self._names: dict[str, tuple[str, ...]] = {}

    def add(self, address: str, names: Iterable[str]) -> None:
        """Know who has an address; names that no message can carry are left out."""
        found = dict.fromkeys(name for name in map(_normal, names) if name)
        self._names[address] = tuple(found)
        for name in found:
            self._addresses.setdefault(name, []).append(address)

    def remove(self, address: str) -> None:
        """Forget who had an address; unknown is fine."""
        for name in self._names.pop(address, ()):
            self._addresses[name].remove(address)
            if not self._addresses[name]:
                del self._addresses[name]

    def answer(self, question: Question) -> Known | None:
        """Return what is known; None: it is not ours to say."""
        addresses = self._addresses.get(question.name)
        if addresses is not None:
            rows = [Record(question.name, RecordType.A, TTL_S, address) for address in addresses]
            return Known(tuple(rows) if question.kind == RecordType.A else ())
        address = _from_reverse(question.name)
        if address is None or ipaddress.IPv4Address(address) not in self._subnet:
            return None
        names = self._names.get(address, ())[:1]
        if question.kind != RecordType.PTR:
            return Known(exists=bool(names))
        return Known(tuple(Record(question.name, RecordType.PTR, TTL_S, name) for name in names), exists=bool(names))

    def has(self, host: str) -> bool:
        """Return whether a numeric address is one of the network's; the host's own in it counts."""
        try:
            return ipaddress.IPv4Address(host) in self._subnet
        except ValueError:
            return False


class Directory:
    """All networks' names and their servers.

    Args:
        world: The ports.
        logger: Told of networks without a server.
    """

    def __init__(self, world: World, logger: Logger) -> None:
        self._world = world
        self._logger = logger
        self._zones: dict[str, Zone] = {}
        self._servers: dict[str, DnsServer] = {}
        self._room = Room()
        self._upstreams: Sequence[UdpAddress] = ()
        self._read_at_ns: int | None = None

    async def open(self, network: str, subnet: str, gateway: str) -> None:
        """Know a network, and serve its names if port 53 of its gateway is free."""
        zone = self._zones[network] = Zone(subnet, gateway)
        server = DnsServer(self._world, zone.answer, self._find_upstreams, is_client=zone.has, room=self._room)
        try:
            await server.listen(UdpAddress(gateway, PORT))
        except OSError as error:
            self._logger.warning("network_names_not_served", network=network, address=f"{gateway}:{PORT}", why=error.strerror or str(error))
        else:
            self._servers[network] = server

    async def shut(self, network: str) -> None:
        """Forget a network; unknown is fine."""
        self._zones.pop(network, None)
        server = self._servers.pop(network, None)
        if server is not None:
            await server.close()

    async def close(self) -> None:
        """Stop all servers. May be called again."""
        for network in list(self._servers):
            await self.shut(network)

    def nameserver(self, network: str) -> str | None:
        """Return where a network's names are served; None where they are not."""
        return self._zones[network].gateway if network in self._servers else None

    def add(self, network: str, address: str, names: Iterable[str]) -> None:
        """Know who has an address."""
        if network in self._zones:
            self._zones[network].add(address, names)

    def remove(self, network: str, address: str) -> None:
        """Forget who had an address; unknown is fine."""
        if network in self._zones:
            self._zones[network].remove(address)

    async def _find_upstreams(self) -> Sequence[UdpAddress]:
        """Return the host's name servers, as its file says now or a moment ago."""
        now_ns = self._world.clock.monotonic_ns()
        if self._read_at_ns is None or now_ns - self._read_at_ns > REREAD_S * 1e9:
            self._read_at_ns = now_ns
            try:
                text = (await self._world.disk.read(HOST_RESOLV, n_bytes_max=1 << 16)).decode(errors="replace")
            except OSError:
                text = ""
            ours = [zone.gateway for zone in self._zones.values()]
            self._upstreams = [server for server in nameservers(text) if server.host not in ours][:UPSTREAMS_MAX]
        return self._upstreams


def nameservers(resolv: str) -> Sequence[UdpAddress]:
    """Return the numeric name servers that a resolv.conf names."""
    found: list[UdpAddress] = []
    for line in resolv.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                found.append(server_from(words[1]))
            except InvalidArgument:
                continue
    return found


def _normal(name: str) -> str:
    """Return a name as messages have it, "" if they cannot carry it."""
    try:
        return normal_name(name)
    except MalformedMessage:
        return ""


def _from_reverse(name: str) -> str | None:
    """Return the address that a name like "5.0.88.10.in-addr.arpa" stands for, None if it is none."""
    octets = name.removesuffix(_REVERSE).split(".") if name.endswith(_REVERSE) else []
    if len(octets) != 4 or not all(octet.isascii() and octet.isdigit() and len(octet) < 4 for octet in octets):
        return None
    try:
        return str(ipaddress.IPv4Address(".".join(reversed(octets))))
    except ValueError:
        return None
