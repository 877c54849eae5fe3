"""Starter: brings a virtual machine up, from its record to a guest that knows who it is.

`prepare` makes or finds everything the machine stands on, side by side; `launch` spawns its shim, which waits; `VmLaunch.create` lets it
run, waits for the agent and tells it its name, addresses, files and fresh entropy. Three origins, one way: a cold boot, a template's
memory (`templates`), a snapshot of its own (`snapshots`). What it prepared is written into the bundle, for the daemon after this one.

Rules: nothing serial that can run side by side; whatever fails is undone by `VmIsolation.clear`, as is what a killed daemon left.
Not here: commands and the end (`isolation`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from isopod.api.messages import Container, Endpoint, Image, VmSettings
from isopod.engine.images.layers import LayerDisk
from isopod.engine.launch import Launch
from isopod.engine.layout import Layout
from isopod.engine.network.networks import Networks, wants_of
from isopod.engine.network.resolve import hosts_text, resolv_text
from isopod.engine.vm import shares
from isopod.engine.vm.accelerator import Accelerator, Accelerators
from isopod.engine.vm.disks import UPPER_SERIAL, as_disks, copy_sparse, layer_serials, make_upper
from isopod.engine.vm.drivers.registry import name_for_config
from isopod.engine.vm.guest import GuestFiles, find_guest, kernel_words
from isopod.engine.vm.lease import Lease
from isopod.engine.vm.machine import Driver, MachineSpec, Nic
from isopod.engine.vm.settings import VmSetup
from isopod.engine.vm.shim import ShimClient, Shims, ShimSpec
from isopod.engine.vm.snapshots import Shape, Snapshots
from isopod.engine.vm.templates import DISK_FILE, MEMORY_FILE, TemplateKey, Templates
from isopod.runtime.logger import Logger
from isopod.world.errors import BugError, InvalidArgument, IsopodError, RuntimeFailed, Unsupported, from_os_error
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

MACHINE_FILE: Final = "machine.json"
MACHINE_BYTES_MAX: Final = 4 << 20
SNAPSHOT_ORIGIN: Final = "snapshot "
CONFIGURE_TIMEOUT_S: Final = 60.0
GRACE_S: Final = 2.0
"""How long a shim may take to say why its machine did not come up."""
MTU: Final = 1500
ENTROPY_BYTES: Final = 64
CONFIGURED: Final = ("microvm-nix", "systemd")
"""Drivers that take a configuration instead of an image, and make the machine themselves."""
_RESOLV: Final = "/etc/resolv.conf"
_RESOLV_BYTES_MAX: Final = 1 << 16
_SIGNS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


class Layers(Protocol):
    """Where an image's layers come from, as disks."""

    async def layer_disks(self, image: Image) -> Sequence[LayerDisk]:
        """Return those of each layer, top first."""


class Prepared(NamedTuple):
    """A machine that stands ready, as it is written into its bundle."""

    driver: str
    spec: MachineSpec
    mounts: list[dict[str, Any]]
    """In the words of the guest's `configure`."""
    cgroup_procs: tuple[str, ...]
    origin: str
    key: TemplateKey | None
    """What a template for it would be made of; None if it can have none."""


class Origin(NamedTuple):
    """What a machine goes on from."""

    name: str
    """"cold", "template" or "snapshot NAME"."""
    folder: str = ""
    memory_file: str = ""


class _TemplateWork(NamedTuple):
    """What it takes to make a template."""

    prepared: Prepared
    """A machine of the same kind that was booted."""
    key: TemplateKey
    network: str
    pids_max: int | None
    command: tuple[str, ...]
    env: Mapping[str, str]


class VmLaunch:
    """A machine whose shim waits. See `isolation.Launch`.

    Args:
        launch: The shim's.
        bring_up: Waits until the guest knows who it is.
    """

    def __init__(self, launch: Launch, bring_up: Callable[[], Awaitable[None]]) -> None:
        self._launch = launch
        self._bring_up = bring_up

    @property
    def supervisor(self) -> ProcessIdentity:
        """Who the shim is."""
        return self._launch.supervisor

    async def create(self) -> int:
        """Let the machine run; return the VMM's pid once its guest is ready for commands."""
        pid = await self._launch.create()
        try:
            await self._bring_up()
        except BaseException:
            await self.abort()
            raise
        return pid

    async def wait_supervisor(self) -> None:
        """Return when the shim has ended."""
        await self._launch.wait_supervisor()

    async def abort(self) -> None:
        """End the shim, and the machine with it."""
        await self._launch.abort()


class Starter:
    """See the module.

    Args:
        world: Where machines run.
        layout: The engine's folders.
        images: Where layers come from.
        networks: Where taps and addresses come from.
        setup: The settings.
        drivers: By name.
        shims: Spawns them.
        templates: What quick starts go on from.
        accelerators: Says what runs the processors.
        logger: Told of templates.
    """

    def __init__(
        self,
        world: World,
        layout: Layout,
        images: Layers,
        networks: Networks,
        *,
        setup: VmSetup,
        drivers: Mapping[str, Driver],
        shims: Shims,
        templates: Templates,
        accelerators: Accelerators,
        logger: Logger,
    ) -> None:
        self._world = world
        self._layout = layout
        self._images = images
        self._networks = networks
        self._setup = setup
        self._drivers = drivers
        self._shims = shims
        self._templates = templates
        self._accelerators = accelerators
        self._logger = logger
        self._prepared: dict[str, Prepared] = {}
        self._after_prepare = world.failpoints.point("vm.after_prepare")
        self._after_launch = world.failpoints.point("vm.after_launch")
        self._after_boot = world.failpoints.point("vm.after_boot")
        self._after_configure = world.failpoints.point("vm.after_configure")

    # -- asking ----------------------------------------------------------------------------------------------------------------

    def driver_of(self, record: Container) -> Driver:
        """Return the driver of a machine. Raises Unsupported."""
        name = driver_name(record)
        driver = self._drivers.get(name)
        if driver is None:
            raise Unsupported(f"driver {name}", f"known are {', '.join(self._drivers)}")
        return driver

    async def guest(self) -> GuestFiles:
        """Look at the guest's files. Raises Unsupported, BadRecord."""
        return await find_guest(self._world, self._setup.guest)

    async def prepared(self, identifier: str) -> Prepared:
        """Return what a machine that runs was started with.

        Raises:
            RuntimeFailed: Nothing that can be read says so.
        """
        found = self._prepared.get(identifier)
        if found is None:
            path = f"{self._setup.bundle(identifier)}/{MACHINE_FILE}"
            try:
                found = msgspec.json.decode(await self._world.disk.read(path, n_bytes_max=MACHINE_BYTES_MAX), type=Prepared)
            except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
                raise RuntimeFailed("find out about", identifier[:12], f"{path} cannot be read: {error}") from error
            self._prepared[identifier] = found
        return found

    async def holder(self, identifier: str, name: str) -> ProcessIdentity | None:
        """Return the process that lives and has the lease of a machine, None if it is free."""
        return await Lease(self._world, self._lease(identifier), name).holder()

    def snapshots(self, identifier: str, name: str) -> Snapshots:
        """Return the snapshots of a machine."""
        return Snapshots(self._world, f"{self._layout.container(identifier)}/snapshots", name)

    async def shape(self, record: Container, image: Image | None) -> Shape:
        """Return what a machine is like that would be started now: what a snapshot of it must fit."""
        driver, vm = self.driver_of(record), vm_of(record)
        guest = await self.guest()
        layers = await self._images.layer_disks(image) if image is not None else ()
        return Shape(
            driver=driver.name,
            vmm=(await driver.check()).why,
            guest=guest.digest,
            accelerator=(await self._accelerators.find(guest)).name,
            machine=vm.machine,
            vcpus=vm.vcpus,
            memory_bytes=vm.memory_bytes,
            disks=tuple(disk.path for disk in as_disks(layers, "")[:-1]),
            n_nics=int(record.network.network != "none"),
        )

    # -- the way up ------------------------------------------------------------------------------------------------------------

    async def prepare(self, record: Container, image: Image | None) -> Container:
        """Make and find what the machine stands on. On a failure the caller clears."""
        try:
            for folder in (self._setup.bundle(record.id), self._layout.container(record.id)):
                await self._world.disk.make_directory(folder)
            await Lease(self._world, self._lease(record.id), record.name).take()
            made = await (self._prepare_image(record, image) if image is not None else self._prepare_config(record))
            ready, prepared = made
            path = f"{self._setup.bundle(record.id)}/{MACHINE_FILE}"
            await self._world.disk.write(path, msgspec.json.encode(prepared))
        except OSError as error:
            raise from_os_error(error, "prepare", record.name) from error
        self._prepared[record.id] = prepared
        if self._after_prepare.armed:
            await self._after_prepare.hit()
        return ready

    async def launch(self, record: Container) -> VmLaunch:
        """Spawn the shim of a prepared machine."""
        prepared = await self.prepared(record.id)
        driver = self._drivers[prepared.driver]
        launch = await self._shims.launch(self._shim_spec(record, prepared), await driver.plan(prepared.spec))
        try:
            await Lease(self._world, self._lease(record.id), record.name).hand_over(launch.supervisor)
            if self._after_launch.armed:
                await self._after_launch.hit()
        except BaseException:
            await launch.abort()
            raise
        return VmLaunch(launch, lambda: self._bring_up(record, prepared))

    def make_template_nowait(self, record: Container) -> None:
        """Have a template made for machines like one that was just booted cold, unless there is one or can be none."""
        prepared = self._prepared.get(record.id)
        if prepared is not None and prepared.key is not None and prepared.origin == "cold" and not vm_of(record).cold:
            told = record.network.network, record.resources.pids_max, record.command, record.env
            work = _TemplateWork(prepared, prepared.key, *told)
            self._templates.make_nowait(prepared.key, lambda folder: self._make_template(folder, work))

    def forget(self, identifier: str) -> None:
        """Drop what is held of a machine that is no more."""
        self._prepared.pop(identifier, None)
        self._templates.release(identifier)

    # -- preparing -------------------------------------------------------------------------------------------------------------

    async def _prepare_image(self, record: Container, image: Image) -> tuple[Container, Prepared]:
        driver, bundle = self.driver_of(record), self._setup.bundle(record.id)
        guest = await self.guest()
        accelerator = await self._accelerators.find(guest)
        plans = await shares.plan_shares(self._world, record.mounts, bundle)
        spec = self._spec(record, guest, accelerator)._replace(shares=tuple(plan.share for plan in plans))
        mounts = shares.guest_mounts(record.mounts, plans)
        key = await self._key(driver, record, spec, guest=guest, mounts=mounts)
        origin = await self._origin(record, key)
        layers, tap, procs, *_ = await _together(
            self._images.layer_disks(image),
            self._networks.attach_tap(record.id, record.network.network, wants=wants_of(record)),
            self._world.kernel.create_cgroup(self._setup.cgroup(record.id), cpus=record.resources.cpus),
            self._make_disk(record, origin),
            *(shares.serve(self._world, plan, bundle) for plan in plans),
        )
        nics = (Nic(tap.tap, tap.endpoint.mac_address or ""),) if tap.tap is not None else ()
        spec = spec._replace(
            disks=as_disks(layers, self._upper(record.id)), nics=nics, restore_from=origin.folder, memory_file=origin.memory_file
        )
        ready = msgspec.structs.replace(record, network=tap.endpoint, accelerator=accelerator.name, origin=origin.name)
        return ready, Prepared(driver.name, spec, mounts, procs, origin.name, key)

    def _spec(self, record: Container, guest: GuestFiles, accelerator: Accelerator) -> MachineSpec:
        """Return a machine without disks and cards yet."""
        vm = vm_of(record)
        return MachineSpec(
            id=record.id,
            name=_machine_name(record.name),
            vcpus=vm.vcpus,
            memory_bytes=vm.memory_bytes,
            kernel=guest.kernel,
            initrd=guest.initrd,
            cmdline=kernel_words(accelerator.name, accelerator.tsc_khz),
            disks=(),
            nics=(),
            shares=(),
            folder=self._setup.bundle(record.id),
            accelerator=accelerator.name,
            machine=vm.machine,
        )

    async def _prepare_config(self, record: Container) -> tuple[Container, Prepared]:
        """Prepare a machine that its configuration makes: isopod gives it neither disks nor a network card."""
        driver, spec = self.driver_of(record), self.config_spec(record)
        procs = await self._world.kernel.create_cgroup(self._setup.cgroup(record.id), cpus=record.resources.cpus)
        ready = msgspec.structs.replace(record, network=Endpoint(network=record.network.network), accelerator="", origin="cold")
        return ready, Prepared(driver.name, spec, [], procs, "cold", None)

    def config_spec(self, record: Container) -> MachineSpec:
        """Return a machine that its configuration makes."""
        vm = vm_of(record)
        return MachineSpec(
            id=record.id,
            name=_machine_name(record.name),
            vcpus=vm.vcpus,
            memory_bytes=vm.memory_bytes,
            kernel="",
            initrd="",
            cmdline=(),
            disks=(),
            nics=(),
            shares=(),
            folder=self._setup.bundle(record.id),
            accelerator="tcg",
            config=vm.config,
            machine=vm.machine,
        )

    async def _origin(self, record: Container, key: TemplateKey | None) -> Origin:
        """Return what a machine goes on from. A template has an empty disk: it is for a machine that has written nothing yet."""
        snapshot = snapshot_of(record)
        if snapshot:
            return Origin(record.origin, self.snapshots(record.id, record.name).path(snapshot))
        is_new = await self._world.disk.stat(self._upper(record.id)) is None
        template = await self._templates.take(key, record.id) if key is not None and is_new and not vm_of(record).cold else None
        return Origin("cold") if template is None else Origin("template", template.folder, template.memory_file)

    async def _make_disk(self, record: Container, origin: Origin) -> None:
        snapshot, upper = snapshot_of(record), self._upper(record.id)
        if snapshot:
            await self.snapshots(record.id, record.name).restore_disk(snapshot, upper)
        elif origin.folder:
            await self._world.disk.remove(f"{upper}.part")
            await copy_sparse(self._world, f"{origin.folder}/{DISK_FILE}", f"{upper}.part", durable=False)
            await self._world.disk.rename(f"{upper}.part", upper)
        else:
            await make_upper(self._world, upper, vm_of(record).disk_bytes)

    async def _key(
        self, driver: Driver, record: Container, spec: MachineSpec, *, guest: GuestFiles, mounts: list[dict[str, Any]]
    ) -> TemplateKey | None:
        """Return what a template of a machine is made of; None where there can be none: its VMM cannot, or it shares folders."""
        if driver.name != "qemu" or spec.shares:
            return None
        return TemplateKey(
            image_id=record.image_id,
            guest=guest.digest,
            vmm=(await driver.check()).why,
            machine=spec.machine,
            accelerator=spec.accelerator,
            vcpus=spec.vcpus,
            memory_bytes=spec.memory_bytes,
            disk_bytes=vm_of(record).disk_bytes,
            n_nics=int(record.network.network != "none"),
            inside=msgspec.json.encode((mounts, record.resources.pids_max)).decode(),
        )

    # -- coming up -------------------------------------------------------------------------------------------------------------

    async def _bring_up(self, record: Container, prepared: Prepared) -> None:
        """Boot or restore, wait for the agent, tell the guest who it is."""
        driver, client = self._drivers[prepared.driver], self._shims.client(record.id, record.name)
        settling = asyncio.ensure_future(self._settle_disk(record.id))
        try:
            await self._boot(driver, prepared.spec)
            if self._after_boot.armed:
                await self._after_boot.hit()
            if prepared.driver not in CONFIGURED:
                await client.ready(self._setup.boot_timeout_s)
                await self._configure(client, record, prepared)
            await settling
            if self._after_configure.armed:
                await self._after_configure.hit()
        except IsopodError as error:
            if prepared.origin == "template":
                await self._templates.discard(prepared.spec.restore_from.rpartition("/")[2], f"no start came of it: {error}")
            raise await self._reason(record, error) from error
        finally:
            settling.cancel()
            await asyncio.gather(settling, return_exceptions=True)
            self._templates.release(record.id)

    async def _settle_disk(self, identifier: str) -> None:
        """Make the name of a machine's disk durable while it comes up: what a command syncs in there must be there after a power cut."""
        try:
            await self._world.disk.sync_directory(self._layout.container(identifier))
            await self._world.disk.sync_directory(self._layout.containers)
        except OSError as error:
            raise from_os_error(error, "make durable", self._layout.container(identifier)) from error

    async def _boot(self, driver: Driver, spec: MachineSpec) -> None:
        control = await driver.connect(spec)
        try:
            await control.boot()
        finally:
            control.close()

    async def _configure(self, client: ShimClient, record: Container, prepared: Prepared) -> None:
        hosts = hosts_text(record.hostname, record.network.ip_address)
        resolv = resolv_text(await self._host_resolv(), self._networks.nameserver(record.network.network))
        who = self._who(record.hostname, _network(record.network), hosts, resolv)
        if prepared.spec.restore_from:
            await client.request("renew", deadline_s=CONFIGURE_TIMEOUT_S, **who)
        else:
            what = _what(prepared.spec, prepared.mounts, record.resources.pids_max)
            await client.request("configure", deadline_s=CONFIGURE_TIMEOUT_S, **who, **what)

    def _who(self, hostname: str, network: dict[str, Any] | None, hosts: str, resolv: str) -> dict[str, Any]:
        """Return who and when a guest is."""
        return {
            "time_ns": self._world.clock.now_ns(),
            "entropy": self._world.random.token_hex(ENTROPY_BYTES),
            "hostname": hostname,
            "network": network,
            "hosts": hosts,
            "resolv": resolv,
        }

    async def _reason(self, record: Container, error: IsopodError) -> IsopodError:
        """Return why a machine did not come up: what its shim wrote down, if it ended, says more than a connection that broke off."""
        try:
            async with asyncio.timeout(GRACE_S):
                end = await self._shims.wait_end(self._setup.bundle(record.id))
        except TimeoutError:
            return error
        return RuntimeFailed("start", record.name, end.why or end.kind) if end is not None else error

    async def _host_resolv(self) -> str:
        try:
            return (await self._world.disk.read(_RESOLV, n_bytes_max=_RESOLV_BYTES_MAX)).decode(errors="replace")
        except OSError:  # a host without one
            return ""

    # -- templates -------------------------------------------------------------------------------------------------------------

    async def _make_template(self, folder: str, work: _TemplateWork) -> None:
        """Boot a machine like one that runs, as nobody, and write it down into `folder`."""
        identifier, like = self._world.random.token_hex(32), work.prepared.spec
        bundle = self._setup.bundle(identifier)
        try:
            await self._world.disk.make_directory(bundle)
            upper = f"{folder}/{DISK_FILE}"
            await make_upper(self._world, upper, work.key.disk_bytes)
            nics = like.nics
            if nics:
                tap = await self._networks.attach_tap(identifier, work.network)
                nics = (Nic(tap.tap or "", tap.endpoint.mac_address or ""),)
            spec = like._replace(
                id=identifier,
                name="template",
                folder=bundle,
                disks=(*like.disks[:-1], like.disks[-1]._replace(path=upper)),
                nics=nics,
                memory_file=f"{folder}/{MEMORY_FILE}",
            )
            await self._save_booted(folder, spec, work)
        finally:
            await asyncio.shield(asyncio.ensure_future(self._clear_template(identifier)))

    async def _save_booted(self, folder: str, spec: MachineSpec, work: _TemplateWork) -> None:
        driver, client = self._drivers[work.prepared.driver], self._shims.client(spec.id, spec.name)
        procs = await self._world.kernel.create_cgroup(self._setup.cgroup(spec.id))
        launch = await self._shims.launch(self._plain_shim(spec, procs), await driver.plan(spec))
        try:
            await launch.create()
            await client.ready(self._setup.boot_timeout_s)
            who, what = self._who("template", None, hosts_text("template", None), ""), _what(spec, work.prepared.mounts, work.pids_max)
            await client.request("configure", deadline_s=CONFIGURE_TIMEOUT_S, **who, **what)
            # The next machines will most likely run the same program: its pages are in the template, and read from there.
            await client.request("warm", deadline_s=CONFIGURE_TIMEOUT_S, argv=list(work.command), env=dict(work.env))
            await client.request("sync", deadline_s=CONFIGURE_TIMEOUT_S)
            control = await driver.connect(spec)
            try:
                await client.request("hold", paused=True)
                await control.snapshot(folder)
            finally:
                control.close()
        finally:
            await launch.abort()

    async def _clear_template(self, identifier: str) -> None:
        try:
            await self._world.kernel.kill_cgroup(self._setup.cgroup(identifier))
            await self._networks.detach(identifier)
            await self._world.kernel.delete_cgroup(self._setup.cgroup(identifier))
            await self._world.disk.remove_tree(self._setup.bundle(identifier))
        except (IsopodError, OSError) as error:  # the next daemon's adoption finds it
            self._logger.warning("vm.template_clear_failed", id=identifier, why=str(error))

    # -- small things ------------------------------------------------------------------------------------------------------------

    def _upper(self, identifier: str) -> str:
        return f"{self._layout.container(identifier)}/upper.img"

    def _lease(self, identifier: str) -> str:
        return f"{self._layout.container(identifier)}/lease"

    def _shim_spec(self, record: Container, prepared: Prepared) -> ShimSpec:
        plain = self._plain_shim(prepared.spec, prepared.cgroup_procs)
        return plain._replace(
            exit_file=self._setup.exit_file(record.id),
            log=self._layout.log(record.id),
            console_log=f"{self._layout.container(record.id)}/console.log",
            monitor_socket=self._setup.monitor(record.id),
            hypervisor=prepared.driver,
        )

    def _plain_shim(self, spec: MachineSpec, procs: tuple[str, ...]) -> ShimSpec:
        """Return a shim that leaves nothing outside of the bundle."""
        return ShimSpec(
            id=spec.id,
            name=spec.name,
            folder=spec.folder,
            exit_file=f"{spec.folder}/exit",
            log=f"{spec.folder}/container.log",
            console_log=f"{spec.folder}/console.log",
            log_bytes_max=self._setup.log_bytes_max,
            console_bytes_max=self._setup.console_bytes_max,
            cgroup_procs=procs,
            monitor_socket="",
            boot_timeout_s=self._setup.boot_timeout_s,
            silent_timeout_s=self._setup.silent_timeout_s,
            stop_timeout_s=self._setup.stop_timeout_s,
            vcpus=spec.vcpus,
            memory_bytes=spec.memory_bytes,
            hypervisor="qemu",
        )


def vm_of(record: Container) -> VmSettings:
    """Return what a virtual machine has."""
    if record.vm is None:
        raise BugError(f"{record.name} is a virtual machine without settings")
    return record.vm


def driver_name(record: Container) -> str:
    """Return the name of a machine's driver: left to us, it is QEMU for an image, and what takes a configuration for that."""
    vm = vm_of(record)
    if vm.driver != "auto":
        return vm.driver
    return name_for_config(vm.config) if vm.config else "qemu"


def snapshot_of(record: Container) -> str:
    """Return the name of the snapshot that a machine is to go on from, "" for none."""
    return record.origin.removeprefix(SNAPSHOT_ORIGIN) if record.origin.startswith(SNAPSHOT_ORIGIN) else ""


def check_driver(record: Container) -> None:
    """Check that a machine has what its driver takes: an image, or a configuration.

    Raises:
        InvalidArgument: It has not.
    """
    name, config = driver_name(record), vm_of(record).config
    if name in CONFIGURED and not config:
        raise InvalidArgument("driver", name, "it takes a configuration", "add --config FILE")
    if name not in CONFIGURED and (config or not record.image_id):
        raise InvalidArgument("driver", name, "it takes an image and no configuration", "--driver microvm-nix takes a flake or module")


def _what(spec: MachineSpec, mounts: list[dict[str, Any]], pids_max: int | None) -> dict[str, Any]:
    """Return what a guest is made of."""
    return {"layers": layer_serials(spec.disks), "upper": UPPER_SERIAL, "mounts": mounts, "pids_max": pids_max}


def _network(endpoint: Endpoint) -> dict[str, Any] | None:
    if endpoint.ip_address is None:
        return None
    return {
        "mac": endpoint.mac_address,
        "address": f"{endpoint.ip_address}/{endpoint.prefix_length}",
        "gateway": endpoint.gateway,
        "mtu": MTU,
    }


def _machine_name(name: str) -> str:
    """Return a name that is one word for every VMM."""
    return "".join(sign if sign in _SIGNS else "-" for sign in name) or "machine"


async def _together(*works: Awaitable[Any]) -> list[Any]:
    """Wait for all; the first failure is raised when every one has ended, so that nothing goes on behind the clearing."""
    results = await asyncio.gather(*works, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
