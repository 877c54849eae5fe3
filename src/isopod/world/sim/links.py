"""Links: the network objects of the simulated kernel: namespaces, bridges, veth pairs, taps, addresses, routes.

Errors are those of netlink: EEXIST for a name that is taken, ENODEV for a link that is not there, ERANGE for a name that is too long.
A namespace lives while it is pinned or a process is in it; its links end with it, and the other end of a veth pair with them.
Not modelled: packets.
"""

import errno
import ipaddress
import random
from collections.abc import Sequence
from typing import Final

from isopod.world.sim.view import fail

LINK_NAME_BYTES_MAX: Final = 15
_HOST_ROUTES: Final = ("192.168.122.0/24",)


class Link:
    """A network link.

    Args:
        name: Its name in its namespace.
        kind: "loopback", "bridge", "veth", "tap" or "ether".
        mac: Its hardware address.
    """

    def __init__(self, name: str, kind: str, mac: str) -> None:
        self.name = name
        self.kind = kind
        self.mac = mac
        self.is_up = False
        self.master: str | None = None
        self.bytes_per_s: int | None = None
        self.addresses: list[str] = []
        self.gateway: str | None = None
        self.peer: tuple[NetworkNamespace, str] | None = None


class NetworkNamespace:
    """A network namespace, with the links in it."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self.is_pinned = True
        self.n_processes = 0

    def add(self, link: Link) -> Link:
        """Put a link in. EEXIST, ERANGE."""
        if len(link.name.encode()) > LINK_NAME_BYTES_MAX:
            fail(errno.ERANGE, link.name)
        if link.name in self.links:
            fail(errno.EEXIST, link.name)
        self.links[link.name] = link
        return link

    def link(self, name: str) -> Link:
        """Return a link. ENODEV."""
        if name not in self.links:
            fail(errno.ENODEV, name)
        return self.links[name]

    def remove(self, name: str) -> None:
        """Remove a link, and the other end of a pair."""
        link = self.links.pop(name, None)
        if link is not None and link.peer is not None:
            namespace, peer = link.peer
            namespace.links.pop(peer, None)

    def leave(self) -> None:
        """Note that a process ended in it."""
        self.n_processes -= 1
        self.collect()

    def unpin(self) -> None:
        """Let it end with its last process."""
        self.is_pinned = False
        self.collect()

    def collect(self) -> None:
        """End it if nothing keeps it."""
        if not self.is_pinned and self.n_processes <= 0:
            for name in list(self.links):
                self.remove(name)


class Links:
    """The links of the host and the operations on them.

    Args:
        chance: For hardware addresses.
    """

    def __init__(self, chance: random.Random) -> None:
        self.host = NetworkNamespace()
        self._chance = chance
        self.reset()

    def reset(self) -> None:
        """Go back to what a freshly booted machine has."""
        self.host.links.clear()
        for name, kind in (("lo", "loopback"), ("eth0", "ether")):
            self.host.add(Link(name, kind, self._mac())).is_up = True

    def new_namespace(self) -> NetworkNamespace:
        """Make a namespace with loopback up."""
        namespace = NetworkNamespace()
        namespace.add(Link("lo", "loopback", "00:00:00:00:00:00")).is_up = True
        return namespace

    def create_bridge(self, name: str, address: str) -> None:
        """Make a bridge or keep one, with that address."""
        ipaddress.IPv4Interface(address)
        link = self.host.links.get(name)
        if link is None:
            link = self.host.add(Link(name, "bridge", self._mac()))
        elif link.kind != "bridge":
            fail(errno.EEXIST, name)
        link.is_up = True
        if address not in link.addresses:
            link.addresses.append(address)

    def create_veth(self, host_name: str, *, bridge: str, namespace: NetworkNamespace, guest_name: str) -> None:
        """Make a pair between a bridge and a namespace."""
        if self.host.link(bridge).kind != "bridge":
            fail(errno.EOPNOTSUPP, bridge)
        if guest_name in namespace.links:
            fail(errno.EEXIST, guest_name)
        host = self.host.add(Link(host_name, "veth", self._mac()))
        guest = namespace.add(Link(guest_name, "veth", self._mac()))
        host.peer, guest.peer = (namespace, guest_name), (self.host, host_name)
        host.is_up = guest.is_up = True
        host.master = bridge

    def create_tap(self, name: str, *, bridge: str) -> None:
        """Make a tap on a bridge."""
        if self.host.link(bridge).kind != "bridge":
            fail(errno.EOPNOTSUPP, bridge)
        link = self.host.add(Link(name, "tap", self._mac()))
        link.is_up, link.master = True, bridge

    def configure(self, namespace: NetworkNamespace, name: str, *, address: str, gateway: str) -> str:
        """Set address and default route; return the hardware address."""
        link = namespace.link(name)
        if ipaddress.IPv4Address(gateway) not in ipaddress.IPv4Interface(address).network:
            fail(errno.ENETUNREACH, gateway)
        if address not in link.addresses:
            link.addresses.append(address)
        link.gateway = gateway
        return link.mac

    def routes(self) -> Sequence[str]:
        """Return the prefixes the host routes."""
        found = dict.fromkeys(_HOST_ROUTES)
        for link in self.host.links.values():
            found.update(dict.fromkeys(str(ipaddress.IPv4Interface(address).network) for address in link.addresses))
        return list(found)

    def _mac(self) -> str:
        octets = self._chance.randbytes(5)
        return "02:" + ":".join(f"{octet:02x}" for octet in octets)
