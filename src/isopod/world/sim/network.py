"""SimNetwork: the Network port over memory.

Unix sockets are files of the simulated disk: connecting to a missing one is ENOENT, to one that nobody serves (any more) ECONNREFUSED.
TCP end points are names "host:port"; a listener on 0.0.0.0, :: or "" takes connections to any host. A process that dies stops listening
and its connections close, but the socket's file stays behind, as on the host. Names are resolved by a table that the test fills
(`names`); a name that somebody listens on needs no entry. TLS is the real one (`tls_stream`), with the simulation's clock.

Legal behaviours: small seeded delays before a connection stands and before bytes arrive (`streams`, `packets`, `udp`). `refuse_next` makes
the next connection attempts fail, `hang_next` keeps them from ever being answered. A machine among others (`SimCluster`) has an address and
a name: what goes to another one passes the `fabric`, with all that may happen there; addresses that are not its own cannot be bound.
"""

import asyncio
import errno
import os
import random
from collections.abc import Sequence
from contextvars import Context, copy_context
from typing import Final

from isopod.world.network import (
    Address,
    ClientTls,
    DatagramFactory,
    ProtocolFactory,
    ServerTls,
    TcpAddress,
    TcpOptions,
    UdpAddress,
    UnixAddress,
)
from isopod.world.network import Network as NetworkPort
from isopod.world.sim.clock import SimClock
from isopod.world.sim.dial import dial
from isopod.world.sim.fabric import Link, Station
from isopod.world.sim.inodes import Inode
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.names import Names
from isopod.world.sim.owners import OWNER, Owner
from isopod.world.sim.packets import PacketEnd, PacketListener, PacketQueue
from isopod.world.sim.pipe import Pipe
from isopod.world.sim.streams import StreamEnd
from isopod.world.sim.tls import SimTls
from isopod.world.sim.udp import SimDatagrams, SimUdpTransport
from isopod.world.sim.view import View, fail
from isopod.world.sim.wires import Wire

_ANY_HOSTS: Final = ("0.0.0.0", "::", "")  # noqa: S104 - names in memory
_OWN_HOST: Final = "127.0.0.1"
_FIRST_EPHEMERAL_PORT: Final = 32768
_LAST_EPHEMERAL_PORT: Final = 60999
_CONNECT_S: Final = (10e-6, 200e-6)
_UNIX_PATH_BYTES_MAX: Final = 107


class SimListener:
    """A listening stream socket, with what the test may want to know about it.

    Args:
        network: Where it is registered.
        address: Where it listens.
        factory: Makes the protocol of a connection.
        owner: The process that listens.
        mode: Permission bits of the socket's file.
        gid: Its group, or None.
        options: Of the connections it accepts.
    """

    def __init__(
        self,
        network: "SimNetwork",
        address: Address,
        factory: ProtocolFactory,
        *,
        owner: Owner,
        mode: int,
        gid: int | None,
        options: TcpOptions | None = None,
    ) -> None:
        self.factory = factory
        self.options = options
        self.owner = owner
        self.mode = mode
        self.gid = gid
        self.is_open = True
        self.context: Context = copy_context()
        self._network = network
        self._address = address
        self._held = owner.hold(self.stop)

    @property
    def address(self) -> Address:
        """The bound address (with the real port)."""
        return self._address

    async def close(self) -> None:
        """Stop accepting and remove a Unix socket's file; open connections go on."""
        if self.is_open and self.owner.alive:
            self.owner.forget(self._held)
            self.stop()
            self._network.unbind(self)

    def stop(self) -> None:
        """Stop accepting; the file stays."""
        self.is_open = False

    def belong(self, owner: Owner) -> None:
        """Let it belong to another process, as a descriptor does that was passed on: that one's end closes it."""
        self.owner.forget(self._held)
        self.owner = owner
        self._held = owner.hold(self.stop)
        self.context = Context()
        self.context.run(OWNER.set, owner)


class SimNetwork:
    """The Network port of the simulation.

    Args:
        loop: The loop.
        chance: The stream for delays and splits.
        view: Where Unix sockets have their files.
        clock: The time certificates are judged by.
        station: Where the machine is on a network with others, or None.
    """

    def __init__(self, loop: SimLoop, chance: random.Random, *, view: View, clock: SimClock, station: Station | None = None) -> None:
        self._loop = loop
        self._chance = chance
        self._view = view
        self._unix: dict[Inode, SimListener | PacketListener] = {}
        self._tcp: dict[tuple[str, int], SimListener] = {}
        self._next_port = _FIRST_EPHEMERAL_PORT
        self._refusals: list[int] = []
        self._n_hangs = 0
        self._tls = SimTls(clock)
        self._station = station
        self.names = Names(loop, None if station is None else station.fabric)
        """What names resolve to; see `Names.set`."""
        self.datagrams = SimDatagrams(loop, chance, station)
        """UDP; `loss` and `duplication` are chances between 0 and 1, for what stays on this machine."""
        if station is not None:
            station.network = self

    # -- faults and inspection -------------------------------------------------------------------------------------------------------

    def refuse_next(self, number: int, *, times: int = 1) -> None:
        """Let the next `times` stream connections fail with that errno."""
        self._refusals += [number] * times

    def hang_next(self, *, times: int = 1) -> None:
        """Let the next `times` stream connections wait for an answer for ever, as behind a firewall that drops packets."""
        self._n_hangs += times

    def listeners(self) -> list[SimListener]:
        """Return the open stream listeners, oldest first."""
        found = [each for each in self._unix.values() if isinstance(each, SimListener)]
        return [each for each in (*found, *self._tcp.values()) if each.is_open]

    def vanish(self) -> None:
        """The machine loses power: its connections to others are gone, and nobody is told."""
        if self._station is not None:
            for wire in list(self._station.wires.values()):
                if wire.writer is not None:
                    wire.writer.vanish()

    # -- the port --------------------------------------------------------------------------------------------------------------------

    async def listen(
        self,
        address: Address,
        factory: ProtocolFactory,
        *,
        mode: int = 0o660,
        gid: int | None = None,
        backlog: int = 4096,
        tls: ServerTls | None = None,
        options: TcpOptions | None = None,
    ) -> SimListener:
        """Accept connections, each with a new protocol from `factory`."""
        await self._pause()
        if backlog < 1:
            raise ValueError("backlog must be at least 1")
        if tls is not None:
            factory = self._tls.server(factory, tls)
        if isinstance(address, UnixAddress):
            inode = self._bind_file(address.path, mode, gid)
            listener = SimListener(self, address, factory, owner=self._loop.owner(), mode=mode, gid=gid)
            self._unix[inode] = listener
            return listener
        bound = self._bind_port(address)
        listener = SimListener(self, bound, factory, owner=self._loop.owner(), mode=mode, gid=gid, options=options)
        self._tcp[bound] = listener
        return listener

    async def connect(
        self, address: Address, factory: ProtocolFactory, *, tls: ClientTls | None = None, options: TcpOptions | None = None
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """Connect once."""
        await self._pause()
        if self._n_hangs:
            self._n_hangs -= 1
            await self._loop.create_future()
        if self._refusals:
            fail(self._refusals.pop(0), str(address))
        if isinstance(address, UnixAddress):
            return await self._begin(_listening(self._find_unix(address.path), address.path), factory, address, tls=tls)
        if self._station is None or self._is_here(address.host):
            found = await self._find_host(address)
            return await self._begin(_listening(found, f"{address.host}:{address.port}"), factory, address, tls=tls)
        numeric = (await self.names.resolve(address.host, address.port))[0]
        listener, link = await dial(self._loop, self._station, numeric.host, numeric.port)
        return await self._begin(listener, factory, address, tls=tls, wires=self._lay(link, listener, options))

    async def _begin(
        self,
        listener: SimListener,
        factory: ProtocolFactory,
        address: Address,
        *,
        tls: ClientTls | None,
        wires: tuple[Wire, Wire] | None = None,
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        protocol = factory()
        if tls is None:
            return self._join(listener, protocol, wires), protocol
        host = None if isinstance(address, UnixAddress) else address.host
        stream, done = self._tls.client(protocol, tls, host)
        below = self._join(listener, stream, wires)
        try:
            await done
        except BaseException:
            below.abort()
            raise
        return stream, protocol

    async def connect_packets(self, path: str) -> PacketEnd:
        """Connect to a Unix SOCK_SEQPACKET socket."""
        await self._pause()
        listener = self._find_unix(path)
        if listener is None or not listener.is_open:
            fail(errno.ECONNREFUSED, path)
        if not isinstance(listener, PacketListener):
            fail(errno.EPROTOTYPE, path)
        there, back = PacketQueue(self._loop), PacketQueue(self._loop)
        listener.offer(PacketEnd(self._loop, self._chance, listener.owner, incoming=there, outgoing=back))
        return PacketEnd(self._loop, self._chance, self._loop.owner(), incoming=back, outgoing=there)

    # -- for simulated programs ------------------------------------------------------------------------------------------------------

    def listen_packets(self, path: str, *, mode: int = 0o700) -> PacketListener:
        """Serve a SEQPACKET socket at `path`, for the process whose code calls this. EADDRINUSE if the path exists."""
        if self._view.find(path, follow=False) is not None:
            fail(errno.EADDRINUSE, path)
        listener = PacketListener(self._loop, self._loop.owner())
        self._unix[self._view.create(path, "socket", mode)] = listener
        return listener

    def unbind(self, listener: SimListener) -> None:
        """Forget a closed listener and remove its file, if that is still its own."""
        if isinstance(listener.address, UnixAddress):
            node = self._view.find(listener.address.path, follow=False)
            if node is not None and self._unix.get(node.inode) is listener:
                self._view.remove(listener.address.path)
            self._unix = {inode: each for inode, each in self._unix.items() if each is not listener}
        else:
            self._tcp = {key: each for key, each in self._tcp.items() if each is not listener}

    async def open_udp(
        self, local: UdpAddress | None, factory: DatagramFactory, *, remote: UdpAddress | None = None, reuse_port: bool = False
    ) -> tuple[SimUdpTransport, asyncio.DatagramProtocol]:
        """Open a UDP socket."""
        await self._pause()
        if remote is not None:
            remote = UdpAddress((await self.names.resolve(remote.host, remote.port))[0].host, remote.port)
        return self.datagrams.open(local, factory, remote=remote, reuse_port=reuse_port)

    async def resolve(self, host: str, port: int = 0) -> Sequence[TcpAddress]:
        """Return the numeric addresses of a name."""
        await self._pause()
        return await self.names.resolve(host, port)

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    async def _pause(self) -> None:
        self._loop.owner().check()
        await asyncio.sleep(self._chance.uniform(*_CONNECT_S))
        self._loop.owner().check()

    def _bind_file(self, path: str, mode: int, gid: int | None) -> Inode:
        if len(os.fsencode(path)) > _UNIX_PATH_BYTES_MAX:
            raise OSError("AF_UNIX path too long")
        node = self._view.find(path, follow=False)
        if node is not None:
            served = self._unix.get(node.inode)
            if node.inode.kind != "socket" or (served is not None and served.is_open):
                fail(errno.EADDRINUSE, path)
            self._view.remove(path)
            self._unix.pop(node.inode, None)
        inode = self._view.create(path, "socket", mode)
        inode.gid = inode.gid if gid is None else gid
        return inode

    def _bind_port(self, address: TcpAddress) -> TcpAddress:
        if self._station is not None and not self._is_here(address.host):
            fail(errno.EADDRNOTAVAIL, f"{address.host}:{address.port}")
        port = address.port or self._free_port()
        for (host, taken), listener in self._tcp.items():
            overlaps = host == address.host or host in _ANY_HOSTS or address.host in _ANY_HOSTS
            if taken == port and overlaps and listener.is_open:
                fail(errno.EADDRINUSE, f"{address.host}:{port}")
        return TcpAddress(address.host, port)

    def _free_port(self) -> int:
        taken = [port for _, port in self._tcp]
        while self._next_port in taken or self._next_port > _LAST_EPHEMERAL_PORT:
            self._next_port = _FIRST_EPHEMERAL_PORT if self._next_port > _LAST_EPHEMERAL_PORT else self._next_port + 1
        self._next_port += 1
        return self._next_port - 1

    def _find_unix(self, path: str) -> SimListener | PacketListener | None:
        node = self._view.node(path)
        return self._unix.get(node.inode) if node.inode.kind == "socket" else None

    def find_tcp(self, host: str, port: int) -> SimListener | None:
        """Return who listens at an address of this machine."""
        for each in (host, *_ANY_HOSTS):
            found = self._tcp.get((each, port))
            if found is not None and found.is_open:
                return found
        return None

    def _is_here(self, host: str) -> bool:
        """Return whether an address or name is this machine's own."""
        own = () if self._station is None else (self._station.address, self._station.name)
        return host in (*_ANY_HOSTS, *own, "localhost", "::1") or host.startswith("127.")

    async def _find_host(self, address: TcpAddress) -> SimListener | None:
        """Find who listens on a name, or on one of the addresses it resolves to."""
        found = self.find_tcp(*address)
        if found is not None or not self.names.knows(address.host):
            return found
        for numeric in await self.names.resolve(address.host, address.port):
            found = found or self.find_tcp(*numeric)
        return found

    def _lay(self, link: Link, listener: SimListener, options: TcpOptions | None) -> tuple[Wire, Wire]:
        """Make both directions of a connection to another machine."""
        there, back = Wire(self._loop, link, options), Wire(self._loop, link.back, listener.options)
        there.peer, back.peer = back, there
        return there, back

    def _join(self, listener: SimListener, protocol: asyncio.BaseProtocol, wires: tuple[Wire, Wire] | None) -> StreamEnd:
        client, server = self._pair(listener, self._loop.owner(), wires)
        if wires is None:
            self._loop.call_soon(_accept, listener, server, context=listener.context)
        else:
            link = wires[0].link
            arrives_ns = wires[0].holds_until(link.delay_ns(0, self._loop.elapsed_ns))
            self._loop.call_at_ns(arrives_ns, _accept, listener, server, context=listener.context)
        client.begin(protocol)
        return client

    def _pair(self, listener: SimListener, owner: Owner, wires: tuple[Wire, Wire] | None) -> tuple[StreamEnd, StreamEnd]:
        there, back = wires or (Pipe(self._loop, self._chance), Pipe(self._loop, self._chance))
        is_tcp = isinstance(listener.address, TcpAddress)
        name: tuple[str, int] | str = (
            (listener.address.host, listener.address.port) if isinstance(listener.address, TcpAddress) else listener.address.path
        )
        peer = (_OWN_HOST if wires is None or self._station is None else self._station.address, self._free_port()) if is_tcp else ""
        if wires is not None:
            name = (wires[0].link.target.address, name[1])  # type: ignore[assignment]  # only TCP goes over wires
        client = StreamEnd(
            self._loop, owner, incoming=back, outgoing=there, context=copy_context(), extra={"peername": name, "sockname": peer}
        )
        server = StreamEnd(
            self._loop,
            listener.owner,
            incoming=there,
            outgoing=back,
            context=listener.context.copy(),
            extra={"peername": peer, "sockname": name},
        )
        return client, server


def _listening(found: SimListener | PacketListener | None, where: str) -> SimListener:
    if found is None or not found.is_open:
        fail(errno.ECONNREFUSED, where)
    if not isinstance(found, SimListener):
        fail(errno.EPROTOTYPE, where)
    return found


def _accept(listener: SimListener, server: StreamEnd) -> None:
    if listener.owner.alive and not server.is_closing():
        server.begin(listener.factory())


def _check_port(network: SimNetwork) -> NetworkPort:
    """Let the type checker compare with the port."""
    return network
