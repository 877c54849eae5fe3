"""Datagrams: UDP over memory.

Legal behaviours, as on a network: a small seeded delay each, so order may change; loss and duplication with the chances a test sets (none
by default, as on loopback); a datagram to nobody is lost, and a connected socket hears ECONNREFUSED of it; what finds the receiver's
queue full is lost. Over 65507 bytes is EMSGSIZE. Between machines the link decides (`world.sim.fabric`), and what is on its way when it
is cut is lost.
"""

import asyncio
import errno
import os
import random
import zlib
from contextvars import Context, copy_context
from typing import Any, Final

from isopod.world.network import DatagramFactory, UdpAddress
from isopod.world.sim.fabric import Link, Station
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.owners import Owner
from isopod.world.sim.view import fail

DATAGRAM_BYTES_MAX: Final = 65507
QUEUE_MAX: Final = 256
"""Datagrams on their way to one socket."""
_ANY_HOSTS: Final = ("0.0.0.0", "::", "")  # noqa: S104 - names in memory
_OWN_HOST: Final = "127.0.0.1"
_FIRST_PORT: Final = 32768
_DELAY_S: Final = (5e-6, 100e-6)


class SimDatagrams:
    """All UDP sockets of a machine.

    Args:
        loop: For timers.
        chance: For delays and faults.
        station: Where the machine is on a network with others, or None.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, station: Station | None = None) -> None:
        self.station = station
        self.loop = loop
        self.chance = chance
        self.loss = 0.0
        self.duplication = 0.0
        self._sockets: dict[tuple[str, int], list[SimUdpTransport]] = {}
        self._next_port = _FIRST_PORT

    def open(
        self, local: UdpAddress | None, factory: DatagramFactory, *, remote: UdpAddress | None, reuse_port: bool
    ) -> "tuple[SimUdpTransport, asyncio.DatagramProtocol]":
        """Open a socket."""
        wanted = local or UdpAddress(_ANY_HOSTS[0], 0)
        bound = UdpAddress(wanted.host, wanted.port or self._free_port())
        taken = [each for (_, port), found in self._sockets.items() if port == bound.port for each in found if each.overlaps(bound.host)]
        if any(not (reuse_port and each.reuse_port) for each in taken):
            fail(errno.EADDRINUSE, f"{bound.host}:{bound.port}")
        transport = SimUdpTransport(self, bound, remote, reuse_port=reuse_port)
        self._sockets.setdefault(bound, []).append(transport)
        protocol = factory()
        transport.begin(protocol)
        return transport, protocol

    def forget(self, transport: "SimUdpTransport") -> None:
        """Forget a closed socket."""
        found = self._sockets.get(transport.bound, [])
        if transport in found:
            found.remove(transport)
        if not found:
            self._sockets.pop(transport.bound, None)

    def find(self, address: tuple[str, int], sender: tuple[str, int]) -> "SimUdpTransport | None":
        """Return who receives what is sent to `address`; of several that share a port, by a hash of the sender."""
        for host in (address[0], *_ANY_HOSTS):
            found = self._sockets.get((host, address[1]))
            if found:
                return found[sender[1] % len(found)]
        return None

    def _free_port(self) -> int:
        taken = [port for _, port in self._sockets]
        while self._next_port in taken:
            self._next_port += 1
        self._next_port += 1
        return self._next_port - 1


class SimUdpTransport(asyncio.DatagramTransport):
    """One UDP socket.

    Args:
        datagrams: Where it is registered.
        bound: Its address.
        remote: Its one peer, or None.
        reuse_port: Whether others may bind the same.
    """

    def __init__(self, datagrams: SimDatagrams, bound: UdpAddress, remote: UdpAddress | None, *, reuse_port: bool) -> None:
        super().__init__({"sockname": tuple(bound), "peername": None if remote is None else tuple(remote)})
        self.bound = bound
        self.reuse_port = reuse_port
        self._all = datagrams
        self._remote = remote
        self._owner: Owner = datagrams.loop.owner()
        self._context = copy_context()
        self._protocol: asyncio.DatagramProtocol = asyncio.DatagramProtocol()
        self._n_coming = 0
        self._is_closed = False
        self._held = self._owner.hold(self._release)

    def begin(self, protocol: asyncio.DatagramProtocol) -> None:
        """Hand the socket to its protocol."""
        self._protocol = protocol
        protocol.connection_made(self)

    def overlaps(self, host: str) -> bool:
        """Return whether binding `host` as well would share datagrams with this one."""
        return host == self.bound.host or host in _ANY_HOSTS or self.bound.host in _ANY_HOSTS

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send one datagram, to the peer if the socket has one."""
        if self._is_closed or not self._owner.alive:
            return
        if self._remote is not None and addr not in (None, tuple(self._remote)):
            raise ValueError(f"Invalid address: must be None or {self._remote}")
        where = addr if self._remote is None else self._remote
        if where is None:
            raise ValueError("a socket without a peer needs an address")
        if len(data) > DATAGRAM_BYTES_MAX:
            self._report(OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE)))
            return
        there = self._elsewhere(str(where[0]))
        if there is not None:
            self._send_far(bytes(data), there, int(where[1]))
            return
        copies = 0 if self._all.chance.random() < self._all.loss else 1 + (self._all.chance.random() < self._all.duplication)
        for _ in range(copies):
            delay_s = self._all.chance.uniform(*_DELAY_S)
            self._all.loop.call_later(delay_s, self._arrive, bytes(data), (str(where[0]), int(where[1])))

    def _elsewhere(self, host: str) -> Station | None:
        own = self._all.station
        if own is None or host in (*_ANY_HOSTS, own.address, "localhost", "::1") or host.startswith("127."):
            return None
        return own.fabric.at(host) or Station(own.fabric, "nowhere", host)

    def _send_far(self, data: bytes, there: Station, port: int) -> None:
        """Send to another machine: over the fabric, with its faults."""
        own = self._all.station
        assert own is not None
        counts = own.fabric.counts
        if there.network is None:
            return
        link, loop = own.fabric.link(own, there), self._all.loop
        counts.n_datagrams += 1
        if link.is_lost():
            counts.n_datagrams_lost += 1
            return
        copies = 1
        if link.quality.duplication and link.chance.random() < link.quality.duplication:
            counts.n_datagrams_doubled += 1
            copies = 2
        for _ in range(copies):
            at_ns = link.delay_ns(len(data), loop.elapsed_ns)
            loop.call_at_ns(at_ns, self._arrive_far, data, link, port, context=Context())

    def _arrive_far(self, data: bytes, link: Link, port: int) -> None:
        network = link.target.network
        if link.is_blocked or network is None:
            link.counts.n_datagrams_lost += 1
            return
        sender = (link.source.address, self.bound.port)
        receiver = network.datagrams.find((link.target.address, port), sender)
        if receiver is not None:
            trace = self._all.loop.trace
            if trace is not None:
                trace.add(self._all.loop.elapsed_ns, link.target.name, f"udp {link.label} {len(data)} {zlib.crc32(data):08x}")
            receiver.take(data, sender)
        elif self._remote is not None and not link.back.is_blocked and not link.back.is_lost():
            refused = ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            self._all.loop.call_at_ns(link.back.delay_ns(0, self._all.loop.elapsed_ns), self._report, refused, context=Context())

    def abort(self) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close; the protocol's `connection_lost` follows."""
        if self._is_closed:
            return
        self._owner.forget(self._held)
        self._release()
        self._all.loop.call_soon(self._protocol.connection_lost, None, context=self._context)

    def is_closing(self) -> bool:
        """Return whether it is closed."""
        return self._is_closed

    def _release(self) -> None:
        self._is_closed = True
        self._all.forget(self)

    def _arrive(self, data: bytes, address: tuple[str, int]) -> None:
        sender = (_OWN_HOST if self.bound.host in _ANY_HOSTS else self.bound.host, self.bound.port)
        receiver = self._all.find(address, sender)
        if receiver is None:
            if self._remote is not None:
                self._report(ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)))
            return
        receiver.take(data, sender)

    def take(self, data: bytes, sender: tuple[str, int]) -> None:
        """Receive a datagram. Called by the sending socket."""
        if self._is_closed or not self._owner.alive or self._n_coming >= QUEUE_MAX:
            return
        if self._remote is not None and sender != tuple(self._remote):
            return
        self._n_coming += 1
        self._all.loop.call_soon(self._receive, data, sender, context=self._context)

    def _receive(self, data: bytes, sender: tuple[str, int]) -> None:
        self._n_coming -= 1
        if not self._is_closed and self._owner.alive:
            self._protocol.datagram_received(data, sender)

    def _report(self, error: OSError) -> None:
        if not self._is_closed and self._owner.alive:
            self._all.loop.call_soon(self._protocol.error_received, error, context=self._context)
