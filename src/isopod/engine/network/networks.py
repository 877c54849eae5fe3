"""Networks: the networks of one node and who is on them. The engine's only door to addresses, bridges, namespaces, taps, published ports,
names and the packet filter.

Life: `open` (bridges, filter, forwarding), `adopt` once (addresses of containers that run are taken again, everything else of ours that
is left is removed, pools begin to fill), then any operation, then `close` (containers go on) and, if none is left, `dispose`.

Rules:
- "bridge" exists from the first start, "none" and "host" are built in. A created network is visible once its file is written.
- Changes of the list run one after the other and to their end, whatever becomes of who asked. For containers see `attachments`.
- Ranges are chosen so that they overlap neither each other nor what the host routes, but routes wider than /8 do not count: they are a
  default route in parts (a VPN's).
- The bridge of a removed network, or of one that was never finished, is removed at the next `open`.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from isopod.api.messages import Container, Endpoint, NetworkRecord, NetworkSpec
from isopod.engine.network import ipam, names
from isopod.engine.network.attachments import Attachment, Attachments, Fittings, Net, TapAttachment, Wants
from isopod.engine.network.directory import Directory
from isopod.engine.network.filter import Bridge
from isopod.engine.network.owners import Owners
from isopod.engine.network.pool import Pool, Wiring
from isopod.engine.network.ports import Ports
from isopod.engine.network.rules import Rules
from isopod.engine.network.sequencer import Sequencer
from isopod.engine.network.store import StoredNetwork, load_networks, save_networks
from isopod.runtime.gate import Gate
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import (
    AlreadyExists,
    Exhausted,
    InUse,
    NotFound,
    Unsupported,
    WrongState,
    from_os_error,
)
from isopod.world.ids import SHORT_ID_CHARS, check_name
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

__all__ = [
    "DEFAULT",
    "DEFAULT_POOL_SIZE",
    "DEFAULT_SUBNET",
    "HOST",
    "NETWORKS_MAX",
    "NONE",
    "Attachment",
    "Networks",
    "TapAttachment",
    "Wants",
    "wants_of",
]

DEFAULT: Final = "bridge"
NONE: Final = "none"
HOST: Final = "host"
DEFAULT_SUBNET: Final = "10.88.0.0/24"
DEFAULT_POOL_SIZE: Final = 4
NETWORKS_MAX: Final = 256
_BUILT_IN: Final = {NONE: "null", HOST: "host"}
_CHANGE: Final = ""
"""The sequencer's key of changes to the list; no container has it as its id."""


class Networks:
    """See the module. Made by `open`."""

    def __init__(
        self, world: World, *, file: str, namespaces: str, prefix: str, pool_size: int, logger: Logger, metrics: Registry | None
    ) -> None:
        self._world = world
        self._file = file
        self._folder = namespaces
        self._prefix = prefix
        self._pool_size = pool_size
        self._logger = logger
        self._metrics = metrics
        self._wiring = Wiring(world, folder=namespaces, prefix=prefix)
        self._owners = Owners(world.disk, f"{namespaces}-owners")
        self._sequencer = Sequencer(logger)
        self._rules = Rules(world.kernel, prefix)
        self._ports = Ports(world, logger)
        self._directory = Directory(world, logger)
        fittings = Fittings(self._rules, self._ports, self._directory)
        self._attachments = Attachments(world, self._wiring, self._owners, fittings=fittings, sequencer=self._sequencer, logger=logger)
        self._gate = Gate("networks")
        self._nets: dict[str, Net] = {}

    @classmethod
    async def open(
        cls,
        world: World,
        *,
        file: str,
        namespaces: str,
        prefix: str,
        default_subnet: str = DEFAULT_SUBNET,
        pool_size: int = DEFAULT_POOL_SIZE,
        logger: Logger,
        metrics: Registry | None = None,
    ) -> "Networks":
        """Load the networks and make their bridges, the filter and forwarding as they should be. Everything that is so already stays.

        Args:
            world: The machine.
            file: The file of networks.
            namespaces: Folder in which namespaces are pinned; beside it a folder "NAME-owners" is kept.
            prefix: The instance's, see `names`.
            default_subnet: For the default network when there is no file yet; if something else uses it, a free one is chosen.
            pool_size: Namespaces kept ready per network in use.
            logger: Told of what is not as expected.
            metrics: Where takes from pools are counted.

        Raises:
            InvalidArgument: A bad prefix or default subnet.
            BadRecord: The file cannot be read.
            UnavailableError: The kernel or a disk failed.
        """
        names.check_prefix(prefix)
        networks = cls(world, file=file, namespaces=namespaces, prefix=prefix, pool_size=pool_size, logger=logger, metrics=metrics)
        try:
            await networks._begin(default_subnet)
        except BaseException as error:
            await networks._directory.close()
            if isinstance(error, OSError):
                raise from_os_error(error, "set up networks of", prefix) from error
            raise
        return networks

    async def adopt(self, owners: Mapping[str, Endpoint], *, spared: Sequence[str] = ()) -> None:
        """Take over what the last daemon left, once, before the first `attach`.

        Args:
            owners: Running containers by id, with their end points. Namespaces and links of anybody else are removed.
            spared: Ids of containers whose records cannot be read: what they hold, if anything, is theirs still.

        Raises:
            UnavailableError: The kernel or a disk failed.
        """
        try:
            for container_id, endpoint in owners.items():
                if endpoint.network not in _BUILT_IN:
                    await self._attachments.adopt(container_id, self._nets.get(endpoint.network))
            for container_id in spared:
                network = await self._attachments.network_of(container_id)
                if network is not None:
                    await self._attachments.adopt(container_id, self._nets.get(network))
            await self._attachments.sweep(self._prefix, self._folder)
        except OSError as error:
            raise from_os_error(error, "adopt networks of", self._prefix) from error
        for name, net in self._nets.items():
            if name == DEFAULT or self._attachments.users(net):
                net.pool.fill_nowait()

    def check(self, network: str) -> None:
        """Check that a network exists.

        Raises:
            NotFound: It does not.
        """
        if network not in _BUILT_IN:
            self._net(network)

    async def attach(
        self, container_id: str, network: str, process: ProcessIdentity | None = None, *, wants: Wants | None = None
    ) -> Attachment:
        """Give a container its place in a network.

        Args:
            container_id: Whose.
            network: Which.
            process: Its first process, if it runs already, with a network of its own but on no bridge.
            wants: Names, ports and rates; "none" and "host" have none of these.

        Raises:
            NotFound: No such network.
            AlreadyExists: The container is attached.
            InUse: A port of the host is somebody else's.
            InvalidArgument: An address that a port was asked for is none of this machine's.
            Exhausted: The network has no address left.
            UnavailableError: The kernel or a disk failed.

        On failure, and if the caller is cancelled, nothing stays behind.
        """
        self.check(network)
        if network == NONE:
            return Attachment(None, Endpoint(network=NONE))
        if network == HOST:
            return Attachment("", Endpoint(network=HOST))
        with self._gate.hold():
            return await self._attachments.attach(container_id, lambda: self._net(network), wants or Wants(), process)

    async def attach_tap(self, container_id: str, network: str, *, wants: Wants | None = None) -> TapAttachment:
        """Give a virtual machine its place in a network: a tap that is up, guarded, and waits for its monitor.

        Args:
            container_id: Whose.
            network: Which; on "none" it gets no tap.
            wants: Names, ports and rates.

        Raises:
            Unsupported: It is to be in the host's network.
            IsopodError: As `attach`; nothing stays behind.
        """
        self.check(network)
        if network == NONE:
            return TapAttachment(None, Endpoint(network=NONE))
        if network == HOST:
            why = "it has a kernel, and so a network, of its own"
            raise Unsupported("network host for a virtual machine", why, "choose a bridge network, or none")
        with self._gate.hold():
            return await self._attachments.attach_tap(container_id, lambda: self._net(network), wants or Wants())

    def nameserver(self, network: str) -> str | None:
        """Return where the names of a network are served; None if nowhere."""
        return self._directory.nameserver(network)

    async def detach(self, container_id: str, *, waits: bool = False) -> None:
        """Remove a sandbox's namespace and link, or tap, and free its address and ports; one that is not attached is fine.

        See the rules of `attachments` on when.

        Args:
            container_id: Whose.
            waits: Whether to return only when the link is gone, as for a container that runs on.

        Raises:
            UnavailableError: The kernel or a disk failed; the address stays taken, call again.
        """
        await self._attachments.detach(container_id, waits=waits)

    async def create(self, spec: NetworkSpec) -> NetworkRecord:
        """Create a bridge network; it is there after a restart too.

        Raises:
            InvalidArgument: A malformed name or subnet.
            Unsupported: Another driver.
            AlreadyExists: The name is taken, or the range is used by another network or routed by the host.
            Exhausted: No range is free, or there are too many networks.
            UnavailableError: The kernel or a disk failed; nothing is left behind.
        """
        check_name("network name", spec.name)
        if spec.driver != "bridge":
            raise Unsupported(f"network driver {spec.driver!r}", "only bridge is known", "leave --driver out")
        if spec.subnet:
            ipam.parse_subnet(spec.subnet)
        with self._gate.hold():
            return await self._sequencer.run(_CHANGE, lambda: self._create(spec))

    async def remove(self, name: str) -> None:
        """Remove a created network.

        Raises:
            NotFound: No such network.
            WrongState: It is built in.
            InUse: A container is attached to it.
            UnavailableError: The kernel or a disk failed.
        """
        if name == DEFAULT or name in _BUILT_IN:
            raise WrongState("network", name, "built in", "remove it")
        with self._gate.hold():
            await self._sequencer.run(_CHANGE, lambda: self._remove(name))

    def get(self, name: str) -> NetworkRecord:
        """Return one network, a built-in one too. `addresses_used` counts the gateway's.

        Raises:
            NotFound: No such network.
        """
        if name in _BUILT_IN:
            return NetworkRecord(name=name, driver=_BUILT_IN[name])
        net = self._net(name)
        return NetworkRecord(
            name=name,
            driver="bridge",
            subnet=net.subnet.cidr,
            gateway=net.subnet.gateway,
            bridge=net.stored.bridge,
            created_at_ns=net.stored.created_at_ns,
            addresses_used=net.subnet.n_taken,
        )

    def list(self) -> Sequence[NetworkRecord]:
        """Return all networks by name, built-in ones too."""
        return [self.get(name) for name in sorted([*self._nets, *_BUILT_IN])]

    async def wait_idle(self) -> None:
        """Return when nothing goes on: no attach, detach or change, no link that is still to go, no pool being filled."""
        await self._sequencer.wait_idle()
        for net in list(self._nets.values()):
            await net.pool.wait_full()

    async def close(self) -> None:
        """Stop: newcomers are refused, what runs is waited for, pools are emptied. Attached containers go on. May be called again.

        Raises:
            UnavailableError: The kernel failed; the next start removes what is left.
        """
        await self._gate.close()
        await self._sequencer.wait_idle()
        try:
            for net in self._nets.values():
                await net.pool.close()
                await self._attachments.end_rest(net)
        except OSError as error:
            raise from_os_error(error, "empty the network pools of", self._prefix) from error
        finally:
            await self._directory.close()
            await self._ports.close()

    async def dispose(self) -> None:
        """Remove bridges and filter; the file stays, and the next `open` makes them again. Call it after `close`.

        Raises:
            InUse: A container is attached.
            UnavailableError: The kernel failed.
        """
        users = self._attachments.all_users()
        if users:
            raise InUse("network", "bridges", _counted(users), "stop these containers first")
        try:
            for net in self._nets.values():
                await self._world.kernel.delete_link(net.stored.bridge)
            await self._world.kernel.delete_table(self._prefix)
        except OSError as error:
            raise from_os_error(error, "remove the bridges of", self._prefix) from error

    # --- open and adopt -----------------------------------------------------------------------------------------------

    async def _begin(self, default_subnet: str) -> None:
        kernel, disk = self._world.kernel, self._world.disk
        stored = await load_networks(disk, self._file)
        inventory = await kernel.inventory(self._prefix, [])
        expected = [network.bridge for network in stored or ()]
        for link in inventory.links:
            if names.owns_bridge(self._prefix, link) and link not in expected:
                await kernel.delete_link(link)
        if stored is None or all(network.name != DEFAULT for network in stored):
            stored = [await self._choose_default(default_subnet, stored or ()), *(stored or ())]
            await save_networks(disk, self._file, stored)
        for network in stored:
            self._nets[network.name] = self._make_net(network)
        await disk.make_directory(self._folder)
        await self._owners.prepare()
        await kernel.enable_forwarding()
        for net in self._nets.values():
            await kernel.create_bridge(net.stored.bridge, f"{net.subnet.gateway}/{net.subnet.prefix_length}")
        # What is published goes on without a gap: who is really there yet, `adopt` finds out.
        noted = await self._attachments.noted(self._nets)
        await self._rules.begin(self._bridges(), noted, has_guard=f"bridge {self._prefix}" in inventory.tables)
        for net in self._nets.values():
            await self._serve_names(net)

    async def _serve_names(self, net: Net) -> None:
        await self._directory.open(net.stored.name, net.subnet.cidr, net.subnet.gateway)

    async def _choose_default(self, wanted: str, others: Sequence[StoredNetwork]) -> StoredNetwork:
        network = ipam.parse_subnet(wanted)
        avoid = [*(other.subnet for other in others), *await self._foreign_routes()]
        subnet = str(network)
        overlapping = ipam.find_overlap(subnet, avoid)
        if overlapping is not None:
            subnet = ipam.choose_subnet(avoid, prefix_length=network.prefixlen)
            self._logger.warning("network_default_moved", wanted=wanted, subnet=subnet, used_by=overlapping)
        return StoredNetwork(DEFAULT, subnet, names.default_bridge(self._prefix), self._world.clock.now_ns())

    async def _foreign_routes(self) -> Sequence[str]:
        """Return what the host routes that a network must not overlap. Call it when our own ranges were looked at: they are routed too."""
        routes = await self._world.kernel.routes()
        return [route for route in routes if int(route.partition("/")[2] or 32) >= ipam.PREFIX_LENGTH_MIN]

    # --- the list of networks -----------------------------------------------------------------------------------------

    async def _create(self, spec: NetworkSpec) -> NetworkRecord:
        if spec.name in self._nets or spec.name in _BUILT_IN:
            raise AlreadyExists("network", spec.name, "choose another name; `isopod network ls` shows those taken")
        if len(self._nets) >= NETWORKS_MAX:
            raise Exhausted("networks", f"{NETWORKS_MAX} exist", "remove some: isopod network rm NAME")
        kernel = self._world.kernel
        net: Net | None = None
        try:
            net = self._make_net(await self._plan(spec))
            await kernel.create_bridge(net.stored.bridge, f"{net.subnet.gateway}/{net.subnet.prefix_length}")
            self._nets[spec.name] = net
            await self._rules.set_bridges(self._bridges())
            await self._save()
            await self._serve_names(net)
        except BaseException as error:
            if net is not None:
                await self._undo_create(net)
            if isinstance(error, OSError):
                raise from_os_error(error, "create network", spec.name) from error
            raise
        return self.get(spec.name)

    async def _plan(self, spec: NetworkSpec) -> StoredNetwork:
        own = {net.subnet.cidr: name for name, net in self._nets.items()}
        routes = await self._foreign_routes()
        if not spec.subnet:
            subnet = ipam.choose_subnet([*own, *routes])
        else:
            subnet = str(ipam.parse_subnet(spec.subnet))
            overlapping = ipam.find_overlap(subnet, own)
            if overlapping is not None:
                raise AlreadyExists(
                    "subnet", subnet, f"network {own[overlapping]} has {overlapping}: choose another, or leave --subnet out"
                )
            overlapping = ipam.find_overlap(subnet, routes)
            if overlapping is not None:
                raise AlreadyExists("subnet", subnet, f"the host routes {overlapping} already: choose another, or leave --subnet out")
        used = [net.stored.bridge for net in self._nets.values()]
        return StoredNetwork(spec.name, subnet, names.bridge(self._prefix, spec.name, used), self._world.clock.now_ns())

    async def _undo_create(self, net: Net) -> None:
        was_filtered = self._nets.pop(net.stored.name, None) is not None
        try:
            await self._directory.shut(net.stored.name)
            await self._world.kernel.delete_link(net.stored.bridge)
            if was_filtered:
                await self._rules.set_bridges(self._bridges())
        except OSError as error:
            self._logger.error("network_undo_failed", network=net.stored.name, why=str(error))

    async def _remove(self, name: str) -> None:
        net = self._net(name)
        users = self._attachments.users(net)
        if users:
            raise InUse("network", name, _counted(users), "stop these containers first")
        before = self._nets
        self._nets = {key: other for key, other in before.items() if other is not net}
        try:
            await self._save()
        except BaseException:
            self._nets = before
            raise
        try:
            await net.pool.close()
            await self._attachments.end_rest(net)
            await self._directory.shut(name)
            await self._world.kernel.delete_link(net.stored.bridge)
            await self._rules.set_bridges(self._bridges())
        except OSError as error:
            raise from_os_error(error, "remove the bridge of network", name) from error

    async def _save(self) -> None:
        await save_networks(self._world.disk, self._file, [net.stored for net in self._nets.values()])

    def _bridges(self) -> Sequence[Bridge]:
        return [Bridge(net.stored.bridge, net.subnet.cidr) for net in self._nets.values()]

    def _make_net(self, stored: StoredNetwork) -> Net:
        pool = Pool(self._wiring, stored.bridge, size=self._pool_size, logger=self._logger, metrics=self._metrics)
        return Net(stored, ipam.Subnet(stored.subnet), pool)

    def _net(self, name: str) -> Net:
        net = self._nets.get(name)
        if net is None:
            raise NotFound("network", name, "`isopod network ls` lists them, `isopod network create` makes one")
        return net


def wants_of(record: Container) -> Wants:
    """Return what a record asks of its network."""
    return Wants(
        names=(record.name, record.hostname, record.id[:SHORT_ID_CHARS]),
        ports=record.ports,
        bytes_per_s_in=record.resources.network_in_bytes_per_s,
        bytes_per_s_out=record.resources.network_out_bytes_per_s,
    )


def _counted(container_ids: Sequence[str]) -> str:
    shown = ", ".join(identifier[:12] for identifier in container_ids[:3])
    more = f" and {len(container_ids) - 3} more" if len(container_ids) > 3 else ""
    return f"container {shown}{more}"
