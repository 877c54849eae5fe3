"""Attachments: which container or virtual machine is on which network, with which link, address, names and published ports.

A container has a namespace and a veth pair, a virtual machine a tap; all else is the same for both.

Rules:
- attach and detach of one container run one after the other and to their end (`Sequencer`); different containers run side by side. An
  attach that fails or is cancelled leaves nothing behind.
- Ports of the host are taken first: what somebody else has is refused before anything is made. A tap is guarded before it exists.
- One that runs and is on no network may be given a link too: its own namespace is hung on the bridge, instead of a prepared one.
- `detach` returns when the namespace is unpinned; that the link is gone is waited for in the background, because it takes the kernel tens
  of milliseconds. The address is free only then: an `attach` that finds no other waits for it.
- If the kernel refuses to remove a namespace, the container keeps its lease and `detach` may be tried again; if it refuses to remove a
  link, the address stays taken until the network or the node ends, where it is tried once more.
"""

import asyncio
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from isopod.api.messages import Endpoint, PortMapping
from isopod.engine.network import names
from isopod.engine.network.directory import Directory
from isopod.engine.network.filter import Plug
from isopod.engine.network.ipam import Subnet
from isopod.engine.network.owners import Owner, Owners
from isopod.engine.network.pool import GUEST_LINK, Pool, Wiring
from isopod.engine.network.ports import Ports
from isopod.engine.network.rules import Rules
from isopod.engine.network.sequencer import Operation, Sequencer
from isopod.engine.network.store import StoredNetwork
from isopod.runtime.logger import Logger
from isopod.world.errors import AlreadyExists, InvalidArgument, IsopodError, from_os_error
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World


class Wants(NamedTuple):
    """What a sandbox wants of its network, besides an address."""

    names: tuple[str, ...] = ()
    """What the others of its network may call it; the first is what its address is called."""
    ports: tuple[PortMapping, ...] = ()
    bytes_per_s_in: int | None = None
    """What it may receive, as `bytes_per_s_out` what it may send; None: no limit."""
    bytes_per_s_out: int | None = None


class Attachment(NamedTuple):
    """A container's place, for its bundle."""

    namespace: str | None
    """Path of the network namespace to join; "" to share the host's; None for a new one with loopback only, which the OCI runtime makes."""
    endpoint: Endpoint


class TapAttachment(NamedTuple):
    """A virtual machine's place."""

    tap: str | None
    """The tap that is to be the other end of its network card; None: it has no card."""
    endpoint: Endpoint
    """Its `mac_address` must be the card's: from another, and from another IPv4 address, nothing gets through."""


class Fittings(NamedTuple):
    """What is done for all of an instance's attachments in one place each."""

    rules: Rules
    ports: Ports
    directory: Directory


@dataclass(slots=True)
class Net:
    """A bridge network at work."""

    stored: StoredNetwork
    subnet: Subnet
    pool: Pool


Place = TypeVar("Place", Attachment, TapAttachment)


@dataclass(slots=True)
class _Lease:
    net: Net
    address: str
    name: str | None
    """Of namespace and link, or tap; None while there is none."""
    container_id: str
    ports: tuple[PortMapping, ...] = ()
    """Those that are published, with the host's that were chosen."""


class Attachments:
    """The containers on bridge networks of one instance.

    Args:
        world: The machine.
        wiring: Makes and removes namespaces and taps.
        owners: Where it is noted who has which.
        fittings: The packet filter, the host's ports and the names.
        sequencer: Runs the operations; its keys are container ids and names of links.
        logger: Told of what is not as expected.
    """

    def __init__(self, world: World, wiring: Wiring, owners: Owners, *, fittings: Fittings, sequencer: Sequencer, logger: Logger) -> None:
        self._world = world
        self._wiring = wiring
        self._owners = owners
        self._rules, self._ports, self._directory = fittings
        self._sequencer = sequencer
        self._logger = logger
        self._leases: dict[str, _Lease] = {}
        self._ending: dict[str, _Lease] = {}  # by the link's name: detached, but the link may be there still

    def users(self, net: Net) -> Sequence[str]:
        """Return the ids of the containers on a network."""
        return [container_id for container_id, lease in self._leases.items() if lease.net is net]

    def all_users(self) -> Sequence[str]:
        """Return the ids of all containers, and the names of links that are still to go."""
        return [*self._leases, *self._ending]

    async def adopt(self, container_id: str, net: Net | None) -> None:
        """Take over a running container that an earlier daemon attached.

        Raises:
            OSError: The disk failed.
        """
        owner = await self._owners.read(container_id)
        why = "its namespace is not known" if owner is None or net is None else ""
        if owner is not None and net is not None:
            try:
                net.subnet.take(owner.address)
            except (AlreadyExists, InvalidArgument) as error:
                why = str(error)
            else:
                self._wiring.claim(owner.name)
                self._leases[container_id] = _Lease(net, owner.address, owner.name, container_id, owner.ports)
                self._directory.add(owner.network, owner.address, owner.names)
                await self._ports.take_over(container_id, owner.ports)
        if why:
            self._logger.error("network_adoption_failed", container=container_id, why=why)

    async def noted(self, networks: Container[str]) -> Sequence[Plug]:
        """Return what the packet filter is to hold for those whom the last daemon noted on one of these networks.

        Raises:
            OSError: The disk failed.
        """
        owners = [await self._owners.read(container_id) for container_id in await self._owners.list()]
        return [_plug(owner) for owner in owners if owner is not None and owner.network in networks]

    async def network_of(self, container_id: str) -> str | None:
        """Return the network on which a container was noted, None if on none."""
        owner = await self._owners.read(container_id)
        return owner.network if owner is not None else None

    async def sweep(self, prefix: str, folder: str) -> None:
        """Remove namespaces below `folder`, links of the instance and notes that no attached container has.

        Raises:
            OSError: The kernel or the disk failed.
        """
        kept = [lease.name for lease in self._leases.values()]
        links = (await self._world.kernel.inventory(prefix, [])).links
        ours = [link for link in links if names.owns_veth(prefix, link) or names.owns_tap(prefix, link)]
        found = [*await self._world.disk.list(folder), *ours]
        strays = [name for name in dict.fromkeys(found) if name not in kept]
        await self._wiring.remove_all(strays)
        for container_id in await self._owners.list():
            if container_id in self._leases:
                continue
            owner = await self._owners.read(container_id)
            if owner is not None:
                await self._rules.remove(owner.name)
            await self._owners.remove(container_id)
        if strays:
            self._logger.info("network_strays_removed", n_namespaces=len(strays))

    async def attach(self, container_id: str, find: Callable[[], Net], wants: Wants, process: ProcessIdentity | None = None) -> Attachment:
        """Give a container a namespace on the network that `find` names when its turn has come.

        Args:
            container_id: Whose.
            find: Called when its turn has come.
            wants: What it wants.
            process: Its first process, if it runs already: then it is this one's namespace that gets the link.

        Raises:
            IsopodError: See `Networks.attach`; nothing is left behind, on cancellation neither.
        """

        async def wire(lease: _Lease) -> Attachment:
            return await self._wire(container_id, lease, wants, process)

        return await self._in_turn(container_id, lambda: self._attach(container_id, find, wants.ports, wire))

    async def attach_tap(self, container_id: str, find: Callable[[], Net], wants: Wants) -> TapAttachment:
        """Give a virtual machine a tap on the network that `find` names when its turn has come. As `attach`."""

        async def wire(lease: _Lease) -> TapAttachment:
            return await self._wire_tap(container_id, lease, wants)

        return await self._in_turn(container_id, lambda: self._attach(container_id, find, wants.ports, wire))

    async def _in_turn(self, container_id: str, operation: Operation[Place]) -> Place:
        try:
            return await self._sequencer.run(container_id, operation)
        except asyncio.CancelledError:
            self._sequencer.start(container_id, lambda: self._detach(container_id))
            raise

    async def detach(self, container_id: str, *, waits: bool = False) -> None:
        """Take a container's namespace, link and address away; one that is not attached is fine.

        Args:
            container_id: Whose.
            waits: Whether to return only when the link is gone, as for a container that runs on.

        Raises:
            UnavailableError: The kernel or a disk failed; call again.
        """
        if container_id in self._leases or self._sequencer.is_busy(container_id):
            await self._sequencer.run(container_id, lambda: self._detach(container_id))
        if waits:
            await self._wait_ended(container_id)

    async def _wait_ended(self, container_id: str) -> None:
        """Wait until the links that a container had are gone, or the kernel refused that."""
        for link in [link for link, lease in self._ending.items() if lease.container_id == container_id]:
            await self._sequencer.wait(link)

    async def end_rest(self, net: Net) -> None:
        """Wait for the links of detached containers of a network to go, once more where that failed.

        Raises:
            OSError: The kernel refused.
        """
        for link in [link for link, lease in self._ending.items() if lease.net is net]:
            await self._sequencer.wait(link)
            if link in self._ending:
                await self._end(self._ending[link], link)

    async def _attach(
        self, container_id: str, find: Callable[[], Net], ports: Sequence[PortMapping], wire: Callable[[_Lease], Awaitable[Place]]
    ) -> Place:
        if container_id in self._leases:
            raise AlreadyExists("network end point of container", container_id)
        published = await self._ports.hold(container_id, ports)
        try:
            lease = self._leases[container_id] = await self._allocate(container_id, find)
        except BaseException:
            await self._ports.release(container_id)
            raise
        lease.ports = published
        try:
            return await wire(lease)
        except BaseException as error:
            try:
                await self._detach(container_id)
            except IsopodError as failure:
                self._logger.error("network_detach_failed", container=container_id, why=str(failure))
            if isinstance(error, OSError):
                raise from_os_error(error, "attach a container to network", lease.net.stored.name) from error
            raise

    async def _allocate(self, container_id: str, find: Callable[[], Net]) -> _Lease:
        """Return a lease without a namespace; when all addresses are in use, after waiting for those that are about to be free."""
        while True:
            net = find()
            ending = [link for link, lease in self._ending.items() if lease.net is net and self._sequencer.is_busy(link)]
            if not ending or net.subnet.n_taken < net.subnet.capacity:
                return _Lease(net, net.subnet.allocate(), None, container_id)
            await self._sequencer.wait(ending[0])

    async def _wire(self, container_id: str, lease: _Lease, wants: Wants, process: ProcessIdentity | None) -> Attachment:
        subnet = lease.net.subnet
        if process is not None:  # the link that it had before has the name of the one it is to get
            await self._wait_ended(container_id)
        taking = lease.net.pool.take() if process is None else self._wiring.join(lease.net.stored.bridge, process)
        name = lease.name = await taking
        path = self._wiring.path(name)
        address = f"{lease.address}/{subnet.prefix_length}"
        mac = await self._world.kernel.configure_link(path, GUEST_LINK, address=address, gateway=subnet.gateway)
        owner = _owner(lease, name, wants, mac="")
        await self._rules.add(_plug(owner))
        await self._admit(container_id, owner, wants)
        return Attachment(path, _endpoint(lease, mac))

    async def _wire_tap(self, container_id: str, lease: _Lease, wants: Wants) -> TapAttachment:
        name = lease.name = self._wiring.draw_tap()
        mac = names.guest_mac(container_id)
        owner = _owner(lease, name, wants, mac=mac)
        await self._rules.add(_plug(owner))
        await self._wiring.make_tap(name, lease.net.stored.bridge)
        await self._admit(container_id, owner, wants)
        return TapAttachment(name, _endpoint(lease, mac))

    async def _admit(self, container_id: str, owner: Owner, wants: Wants) -> None:
        """Do what is left to do for a link that is there."""
        if wants.bytes_per_s_in is not None:
            await self._world.kernel.limit_link(owner.name, bytes_per_s=wants.bytes_per_s_in)
        if owner.ports:  # with br_netfilter, what it sends to its own published port is bridged straight back
            await self._world.kernel.reflect_link(owner.name)
        await self._owners.write(container_id, owner)
        self._directory.add(owner.network, owner.address, owner.names)

    async def _detach(self, container_id: str) -> None:
        lease = self._leases.get(container_id)
        if lease is None:
            return
        link = lease.name
        self._directory.remove(lease.net.stored.name, lease.address)
        try:
            if link is not None:
                await self._rules.unpublish(link)
                await self._wiring.unpin(link)
            await self._owners.remove(container_id)
        except OSError as error:
            raise from_os_error(error, "detach from network", lease.net.stored.name) from error
        await self._ports.release(container_id)
        del self._leases[container_id]
        if link is None:
            lease.net.subnet.release(lease.address)
        else:
            self._ending[link] = lease
            self._sequencer.start(link, lambda: self._end(lease, link))

    async def _end(self, lease: _Lease, link: str) -> None:
        """Wait for the link to go, take its guard away, free the address."""
        try:
            await self._wiring.unlink(link)
            await self._rules.remove(link)
        except OSError as error:
            self._logger.error("network_link_left", link=link, network=lease.net.stored.name, why=str(error))
            raise
        lease.net.subnet.release(lease.address)
        del self._ending[link]


def _owner(lease: _Lease, link: str, wants: Wants, *, mac: str) -> Owner:
    return Owner(lease.net.stored.name, link, lease.address, mac, wants.names, lease.ports, wants.bytes_per_s_out)


def _plug(owner: Owner) -> Plug:
    return Plug(owner.name, owner.address, owner.mac, owner.ports, owner.bytes_per_s_out)


def _endpoint(lease: _Lease, mac: str) -> Endpoint:
    return Endpoint(
        network=lease.net.stored.name,
        ip_address=lease.address,
        prefix_length=lease.net.subnet.prefix_length,
        gateway=lease.net.subnet.gateway,
        mac_address=mac,
        ports={port.host_port: port.port for port in lease.ports if port.protocol == "tcp"},
        published=lease.ports,
    )
