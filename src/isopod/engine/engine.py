"""Engine: everything one machine needs to run containers and virtual machines, put together over a World.

`open` probes the machine, reads what is stored, adopts what runs, and only then returns: whoever has an Engine sees true states.
`close` lets go without stopping anything; `dispose` also removes the bridges and the filter table, for a node on which nothing runs.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from isopod.api.messages import DriverFacts, LogsRequest, NetworkRecord, NetworkSpec, Probed, RemovedImage
from isopod.engine.adoption import Adoption
from isopod.engine.backup import Backup, make_backup
from isopod.engine.changes import Changes
from isopod.engine.container_isolation import ContainerIsolation
from isopod.engine.containers import Containers
from isopod.engine.copies import Copies
from isopod.engine.events import LoggingHandler, MetricsHandler
from isopod.engine.health import HealthChecks
from isopod.engine.images.store import ImageStore, LayerForm, StoreOptions
from isopod.engine.isolation import Isolation
from isopod.engine.layout import Layout
from isopod.engine.machines import Machines
from isopod.engine.metadata import RECORDS, MetadataStore
from isopod.engine.network.networks import Networks
from isopod.engine.probe import Machine, RuntimeChoice, probe
from isopod.engine.stage import Stage
from isopod.engine.states import LIVE
from isopod.engine.supervisor import Supervisor
from isopod.engine.usage import Usage
from isopod.engine.vm.assembly import VmTold, open_vm_isolation
from isopod.engine.vm.drivers.registry import Survey
from isopod.engine.vm.isolation import VmIsolation
from isopod.engine.vm.settings import VmSetup
from isopod.journal import JournalSettings
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.errors import InUse
from isopod.world.world import World


class VmSettings(NamedTuple):
    """How virtual machines are run: the table [vm] of the node's configuration."""

    guest: str = "/usr/share/isopod/guest"
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    templates_max: int = 8
    template_bytes_max: int = 4 << 30
    monitor_root: str = "/run/vc/sbs"
    boot_timeout_s: float = 60.0
    silent_timeout_s: float = 60.0
    microvm_nix: str = "github:astro/microvm.nix"


class EngineSettings(NamedTuple):
    """What the engine is told."""

    paths: Mapping[str, str]
    prefix: str
    default_subnet: str
    pool_size: int
    runtime: RuntimeChoice = "auto"
    log_bytes_max: int = 64 << 20
    """Size at which a container's log starts anew: a chatty container cannot fill the disk."""
    layer_form: LayerForm = "auto"
    """How layers are kept: "auto" finds out."""
    vm: VmSettings = VmSettings()
    """How virtual machines are run."""
    journal: JournalSettings = RECORDS
    """Sizes, ages and numbers of the records' journal, its archive and its snapshots."""


class Engine:
    """One machine's containers, images and networks. Made by `open`."""

    def __init__(
        self,
        world: World,
        machine: Machine,
        layout: Layout,
        *,
        store: MetadataStore,
        images: ImageStore,
        networks: Networks,
        stage: Stage,
        containers: Containers,
        changes: Changes,
        machines: Machines,
        copies: Copies,
        vm: VmIsolation,
        survey: Survey,
        usage: Usage,
        health: HealthChecks,
    ) -> None:
        self.machine = machine
        self.layout = layout
        self.store = store
        self.images = images
        self.networks = networks
        self.containers = containers
        self.changes = changes
        self.machines = machines
        self.copies = copies
        self.usage = usage
        self._world = world
        self._stage = stage
        self._vm = vm
        self._survey = survey
        self._health = health

    @classmethod
    async def open(cls, world: World, settings: EngineSettings, *, logger: Logger, metrics: Registry) -> "Engine":
        """Probe, read, adopt.

        Args:
            world: The machine; its private mount namespace is entered and its folders are locked by the caller.
            settings: What to use.
            logger: Told of what happens.
            metrics: Where the parts count.

        Raises:
            ToolMissing: The machine lacks something.
            BadRecord: The networks file is damaged.
            JournalDamaged, JournalForeign: The records cannot be read; nothing was changed.
        """
        layout = Layout.of(settings.paths)
        for folder in (layout.containers, layout.bundles, layout.namespaces, layout.supervisor.exits, layout.supervisor.runtime_state):
            await world.disk.make_directory(folder)
        machine = await probe(world, settings.runtime)
        images = await ImageStore.open(
            world, layout.images, logger=logger, options=StoreOptions(mounts=layout.layers, form=settings.layer_form)
        )
        store = await MetadataStore.open(world, layout.metadata, logger=logger, metrics=metrics, settings=settings.journal)
        store.subscribe(MetricsHandler(metrics))
        store.subscribe(LoggingHandler(logger, "debug"))
        try:
            networks = await Networks.open(
                world,
                file=layout.networks,
                namespaces=layout.namespaces,
                prefix=settings.prefix,
                default_subnet=settings.default_subnet,
                pool_size=settings.pool_size,
                logger=logger,
            )
        except BaseException:
            await store.close()
            raise
        stage = Stage(
            world,
            layout,
            images,
            networks,
            cgroup_root=settings.prefix,
            cgroups=world.kernel.cgroup_facts(),
            seccomp=machine.seccomp,
        )
        supervisor = Supervisor(world, machine.tools, layout.supervisor, log_bytes_max=settings.log_bytes_max)
        vm, survey = await open_vm_isolation(world, layout, images, networks, told=_told(settings, layout), logger=logger)
        isolations: dict[str, Isolation] = {
            "container": ContainerIsolation(world, stage, supervisor, layout=layout, logger=logger),
            "vm": vm,
        }
        containers = Containers(world, store, images, isolations, networks=networks, layout=layout, logger=logger, metrics=metrics)
        adoption = Adoption(world, store, containers, isolations, networks=networks, layout=layout, logger=logger)
        changes = Changes(world, store, containers, networks=networks, logger=logger)
        usage = Usage(world, store, containers, layout=layout, images=images)
        try:
            await adoption.run()
        except BaseException:
            await containers.close()
            await vm.close()
            await networks.close()
            await store.close()
            raise
        return cls(
            world,
            machine,
            layout,
            store=store,
            images=images,
            networks=networks,
            stage=stage,
            containers=containers,
            changes=changes,
            machines=Machines(store, containers, vm),
            copies=Copies(containers, images),
            vm=vm,
            survey=survey,
            usage=usage,
            health=HealthChecks(world, store, containers, logger=logger),
        )

    @property
    def is_idle(self) -> bool:
        """Whether no container runs."""
        return not any(record.status in LIVE for record in self.containers.list(all_states=True))

    async def remove_image(self, name: str) -> RemovedImage:
        """Drop an image's name, and the image with its last one. Raises NotFound, InUse."""
        removed = await self.images.remove(name, used_by=self.containers.user_of)
        await self._vm.drop_outdated()
        return removed

    def storage(self) -> Probed:
        """Return what root file systems are made of here, and why."""
        form = self.images.layer_form
        return Probed(value=f"overlay on {form.value}", why=form.why)

    async def accelerator(self) -> Probed:
        """Return what runs the processors of virtual machines, and why."""
        return await self._vm.accelerator()

    async def drivers(self) -> tuple[DriverFacts, ...]:
        """Return what can run virtual machines, and whether each works here."""
        return await self._survey.look()

    async def create_network(self, spec: NetworkSpec) -> NetworkRecord:
        """Create a bridge network. Raises AlreadyExists, InvalidArgument."""
        return await self.networks.create(spec)

    async def remove_network(self, name: str) -> None:
        """Remove a network no container is to be on. Raises NotFound, InUse."""
        user = self.containers.users_of_network(name)
        if user is not None:
            raise InUse("network", name, f"container {user}", f"remove it first: isopod rm {user}")
        await self.networks.remove(name)

    def log_of(self, request: LogsRequest) -> str:
        """Return the path of a container's log. Raises NotFound."""
        return self.layout.log(self.containers.get(request.name).id)

    async def close(self) -> None:
        """Let go; containers go on."""
        await self._health.close()
        try:
            await self.containers.settle()
            await self.containers.close()
            await self._vm.close()
        finally:
            try:
                await self.networks.close()
            finally:
                await self.store.close()

    async def backup(self) -> Backup:
        """Return a consistent copy of all records and networks, while everything goes on."""
        return await make_backup(self.store, self._world, self.layout.networks)

    async def dispose(self) -> None:
        """Remove bridges, filter table, mounts of layers and the top control group; call it only when idle, after `close`."""
        await self.networks.dispose()
        await self.images.unmount()
        await self._stage.dispose()


def _told(settings: EngineSettings, layout: Layout) -> VmTold:
    vm = settings.vm
    setup = VmSetup(
        guest=vm.guest,
        state=f"{layout.root}/vm",
        bundles=layout.bundles,
        exits=layout.supervisor.exits,
        cgroup_root=settings.prefix,
        accelerator=vm.accelerator,
        templates_max=vm.templates_max,
        template_bytes_max=vm.template_bytes_max,
        monitor_root=vm.monitor_root,
        boot_timeout_s=vm.boot_timeout_s,
        silent_timeout_s=vm.silent_timeout_s,
        log_bytes_max=settings.log_bytes_max,
    )
    return VmTold(setup, vm.microvm_nix)
