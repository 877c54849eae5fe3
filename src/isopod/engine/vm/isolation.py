"""VmIsolation: sandboxes with a kernel of their own, each a virtual machine under a shim.

The life cycle asks for the same things as of containers (`engine.isolation`): the main command is a command in the guest, its signals and
stdio go through the shim to the guest's agent, and the machine ends with it. What cannot be done to a machine that runs is said, not
pretended. A guest may lie, hang or be silent: whatever is asked of it has a deadline, and SIGKILL ends the VMM itself.

Not here: how a machine comes up (`starter`), what speaks to it (`shim`), its monitor (`drivers`).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec

from isopod.api.machines import PathFacts, VmSnapshot
from isopod.api.messages import Container, Endpoint, ExecContainer, Image, Probed, Resources
from isopod.engine.images.store import ImageStore
from isopod.engine.isolation import Attached as AttachedPort
from isopod.engine.isolation import End, MachineState
from isopod.engine.layout import Layout
from isopod.engine.network.networks import Networks
from isopod.engine.vm import shares
from isopod.engine.vm.accelerator import Accelerators
from isopod.engine.vm.drivers.qemu import QemuDriver
from isopod.engine.vm.machine import Builder, Control, Driver, DriverCheck, MachineStatus
from isopod.engine.vm.settings import VmSetup
from isopod.engine.vm.shim import SPEC_FILE, Attached, Process, ShimClient, ShimCommand, Shims, ShimStatus
from isopod.engine.vm.starter import CONFIGURED, Starter, VmLaunch, check_driver, snapshot_of
from isopod.engine.vm.templates import Templates, TemplateStatistics
from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError, NotFound, RuntimeFailed, UnavailableError, Unsupported, WrongState, from_os_error
from isopod.world.ids import is_container_id
from isopod.world.kernel import CgroupFigures, CgroupUsage
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

SIGNAL_TIMEOUT_S: Final = 2.0
KILL_GRACE_S: Final = 3.0
"""How long a guest may take to end in order after SIGKILL, before its VMM gets one."""
STATE_TIMEOUT_S: Final = 3.0
SHIM_GRACE_S: Final = 2.0
_SIGKILL: Final = 9
_USUAL: Final = ("command", "poweroff", "stopped")
"""Kinds of ends that need no explanation."""


Work = Callable[[Control], Awaitable[None]]


class VmIsolation:
    """See `engine.isolation.MachineIsolation`, which says what each method does. Made by `open`, ended by `close`.

    Args:
        world: Where machines run.
        layout: The engine's folders.
        images: Says which images there are.
        networks: Takes their taps down.
        setup: The settings.
        starter: Brings them up.
        shims: Speaks to them.
        drivers: By name.
        templates: Closed with it.
        accelerators: Says what runs processors.
        logger: Told of what happens in guests.
    """

    needs_running = True

    def __init__(
        self,
        world: World,
        layout: Layout,
        images: ImageStore,
        networks: Networks,
        *,
        setup: VmSetup,
        starter: Starter,
        shims: Shims,
        drivers: Mapping[str, Driver],
        templates: Templates,
        accelerators: Accelerators,
        logger: Logger,
    ) -> None:
        self._world = world
        self._layout = layout
        self._images = images
        self._networks = networks
        self._setup = setup
        self._starter = starter
        self._shims = shims
        self._drivers = drivers
        self._templates = templates
        self._accelerators = accelerators
        self._logger = logger
        self._waiting: dict[str, Attached] = {}
        """Who is attached to a command that has not begun: its terminal's size is told with the start."""
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._reasons: dict[str, str] = {}
        """What is wrong with a machine that runs."""

    @classmethod
    async def open(
        cls,
        world: World,
        layout: Layout,
        images: ImageStore,
        networks: Networks,
        *,
        setup: VmSetup,
        drivers: Mapping[str, Driver] | None = None,
        logger: Logger,
    ) -> "VmIsolation":
        """Put the parts together. Nothing is looked for: a machine without QEMU or a guest can still run containers.

        Args:
            world: Where machines run.
            layout: The engine's folders.
            images: Where layers come from.
            networks: Where taps and addresses come from.
            setup: The settings.
            drivers: Other drivers than QEMU's, by name.
            logger: Told of what happens.
        """
        qemu = QemuDriver(world)
        every: dict[str, Driver] = {"qemu": qemu, **(drivers or {})}
        shims = Shims(world, f"{setup.guest}/isopod-shim", setup.bundles)
        folder = f"{setup.state}/templates"
        templates = Templates(world, folder, n_max=setup.templates_max, bytes_max=setup.template_bytes_max, logger=logger)
        await templates.open()
        accelerators = Accelerators(world, f"{setup.state}/accelerator.json", setup.accelerator, qemu=qemu, logger=logger)
        starter = Starter(
            world,
            layout,
            images,
            networks,
            setup=setup,
            drivers=every,
            shims=shims,
            templates=templates,
            accelerators=accelerators,
            logger=logger,
        )
        return cls(
            world,
            layout,
            images,
            networks,
            setup=setup,
            starter=starter,
            shims=shims,
            drivers=every,
            templates=templates,
            accelerators=accelerators,
            logger=logger,
        )

    async def close(self) -> None:
        """Let go; machines go on. A template that is being made is given up."""
        watches = list(self._watches.values())
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        await self._templates.close()

    async def accelerator(self) -> Probed:
        """Return what is known of the accelerator, without booting anything: for `isopod info`."""
        return await self._accelerators.known()

    async def check_kvm(self) -> DriverCheck:
        """Say whether a guest comes up under KVM here, which is tried once per host."""
        found = await self._accelerators.find(await self._starter.guest())
        return DriverCheck(found.name == "kvm", found.why)

    async def known_kvm(self) -> DriverCheck:
        """Say what is known of KVM, without booting anything. Raises UnavailableError if it was not tried yet."""
        known = await self._accelerators.known()
        if known.value == "unknown":
            raise UnavailableError(f"it needs KVM; whether that works here is {known.why}")
        return DriverCheck(known.value == "kvm", known.why)

    def template_statistics(self) -> TemplateStatistics:
        """Return what templates there are, and what was done with them."""
        return self._templates.statistics()

    async def wait_templates(self) -> None:
        """Return when no template is being made."""
        await self._templates.wait_idle()

    async def drop_outdated(self) -> None:
        """Remove templates whose image, guest or VMM is no more: call it when an image was removed."""
        try:
            guest = (await self._starter.guest()).digest
        except IsopodError:
            guest = ""
        vmm = (await self._drivers["qemu"].check()).why
        await self._templates.sweep(images=self._has_image, guest=guest, vmm=vmm)

    # -- before and after --------------------------------------------------------------------------------------------------

    async def check(self, record: Container) -> None:
        """Check driver, guest and network."""
        check_driver(record)
        driver = self._starter.driver_of(record)
        found = await driver.check()
        if not found.usable:
            raise Unsupported(f"driver {driver.name}", found.why)
        if driver.name not in CONFIGURED:
            await self._starter.guest()
        if record.network.network == "host":
            raise Unsupported(
                "network host for a virtual machine", "its kernel is not the host's", "use a bridge network, and publish ports"
            )

    async def prepare(self, record: Container, image: Image | None) -> Container:
        """Make disks, tap and shares."""
        try:
            return await self._starter.prepare(record, image)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self.clear(record.id, record.name)))
            raise

    async def launch(self, record: Container) -> VmLaunch:
        """Spawn the shim."""
        return await self._starter.launch(record)

    async def begin(self, record: Container) -> None:
        """Start the main command, if there is one and it does not run already."""
        waiting = self._waiting.pop(record.id, None)
        prepared = await self._starter.prepared(record.id)
        if record.command and prepared.driver not in CONFIGURED and not snapshot_of(record):
            size = waiting.size if waiting is not None else (0, 0)
            await self._client(record).start(_process(record, size))
        if waiting is not None:
            waiting.is_held = False
        self._watch(record)
        self._starter.make_template_nowait(record)

    async def end(self, record: Container) -> End:
        """Read end.json and the exit file."""
        bundle = self._setup.bundle(record.id)
        found, code = await self._shims.read_end(bundle), await self._exit_code(record.id)
        if found is None:
            return End(code, "its shim died without telling how it ended" if code is None else "")
        why = "" if found.kind in _USUAL else found.why or found.kind
        return End(code if code is not None else found.code, why, out_of_memory=found.out_of_memory)

    async def forget(self, identifier: str) -> None:
        """Remove the exit file."""
        path = self._setup.exit_file(identifier)
        try:
            await self._world.disk.remove(path)
        except OSError as error:
            raise from_os_error(error, "remove", path) from error

    async def clear(self, identifier: str, name: str, supervisor: ProcessIdentity | None = None) -> None:
        """End shim, machine and shares; remove tap, control group, sockets and bundle."""
        if await self._is_anothers(identifier, name, supervisor):
            return
        self._unwatch(identifier)
        self._waiting.pop(identifier, None)
        if supervisor is not None:
            await self._wait_shim(supervisor)
        await self._world.kernel.kill_cgroup(self._setup.cgroup(identifier))
        await asyncio.gather(
            shares.end(self._world, self._setup.bundles, identifier),
            self._networks.detach(identifier),
            self._clear_driver(identifier),
        )
        await self._world.kernel.delete_cgroup(self._setup.cgroup(identifier))
        if self._setup.monitor_root:
            await self._world.disk.remove_tree(f"{self._setup.monitor_root}/{identifier}")
        await self._world.disk.remove_tree(self._setup.bundle(identifier))
        self._starter.forget(identifier)

    async def leftovers(self) -> Sequence[str]:
        """Look at the bundles and the servers of shares."""
        names = [
            *await self._world.disk.list(self._setup.bundles),
            *(owner for owner, _ in shares.servers(self._world, self._setup.bundles)),
        ]
        return [name for name in dict.fromkeys(names) if is_container_id(name)]

    async def ends(self) -> Sequence[str]:
        """Look at the exit files."""
        return [name for name in await self._world.disk.list(self._setup.exits) if is_container_id(name)]

    def strays(self, known: Collection[ProcessIdentity]) -> Sequence[tuple[str, ProcessIdentity]]:
        """Look for shims."""
        return self._shims.strays(known)

    async def end_supervisor(self, supervisor: ProcessIdentity) -> None:
        """Kill a shim; its machine dies with it."""
        await self._shims.end(supervisor)

    # -- commands ------------------------------------------------------------------------------------------------------------

    async def attach(self, record: Container) -> AttachedPort:
        """Connect to the main command."""
        attached = await self._client(record).attach(stdin=record.stdin_open)
        if record.status == "starting":
            attached.is_held = True
            self._waiting[record.id] = attached
        return attached

    async def reserve(self, record: Container, session: str) -> None:
        """Do nothing: a command leaves nothing on the host."""

    async def exec(self, record: Container, request: ExecContainer, session: str) -> ShimCommand:
        """Start one more command in the guest."""
        return await self._client(record).exec(
            Process(
                command=request.command,
                env={**record.env, **request.env},
                cwd=request.working_dir or record.working_dir,
                user=request.user or record.user,
                terminal=request.terminal,
                stdin=request.stdin_open,
                size=(request.rows, request.columns),
            )
        )

    async def signal(self, record: Container, signum: int) -> None:
        """Signal the main command. Without one every signal asks the machine to end; SIGKILL ends it whatever the guest does."""
        try:
            if record.command and record.image_id:
                await self._client(record).request("signal", signal=signum, deadline_s=SIGNAL_TIMEOUT_S)
            else:
                await self._ask_to_end(record, 0.0 if signum == _SIGKILL else self._setup.stop_timeout_s)
        except IsopodError as error:
            if signum != _SIGKILL:
                self._logger.warning("vm.signal_failed", id=record.id, name=record.name, signal=signum, why=str(error))
                return
        if signum == _SIGKILL:
            await self._kill(record)

    # -- changes -------------------------------------------------------------------------------------------------------------

    async def pause(self, record: Container) -> None:
        """Stop the processors; the shim expects no answers meanwhile."""
        await self._client(record).request("hold", paused=True)
        try:
            await self._steer(record, lambda control: control.pause())
        except BaseException:
            await self._client(record).request("hold", paused=False)
            raise

    async def resume(self, record: Container) -> None:
        """Let the processors go on."""
        await self._steer(record, lambda control: control.resume())
        await self._client(record).request("hold", paused=False)

    async def update(self, record: Container, resources: Resources) -> Sequence[str]:
        """Change the share of processors at once, the memory by the balloon; the rest at the next start."""
        notes: list[str] = []
        try:
            await self._world.kernel.create_cgroup(self._setup.cgroup(record.id), cpus=resources.cpus)
        except OSError as error:
            raise from_os_error(error, "limit", record.name) from error
        if resources.memory_bytes_max is not None and resources.memory_bytes_max != record.resources.memory_bytes_max:
            notes += await self.resize(record, vcpus=None, memory_bytes=resources.memory_bytes_max)
        if resources.pids_max != record.resources.pids_max:
            notes.append("the number of processes takes effect at the next start")
        return tuple(notes)

    async def connect(self, record: Container, network: str) -> Endpoint:
        """Refuse: its network card is there from the start on."""
        raise Unsupported("changing the network of a virtual machine that runs", "its card is plugged in at the start", "stop it first")

    async def disconnect(self, record: Container) -> None:
        """Refuse: its network card is there from the start on."""
        raise Unsupported("changing the network of a virtual machine that runs", "its card is plugged in at the start", "stop it first")

    def writable_layer(self, record: Container) -> str:
        """Refuse: what it changed lies on a disk of its own."""
        why = "what it wrote is on a disk, not in a folder"
        raise Unsupported("an image of a virtual machine's files", why, "`isopod vm snapshot` keeps them; `isopod cp` copies them out")

    async def resize(self, record: Container, *, vcpus: int | None, memory_bytes: int | None) -> Sequence[str]:
        """Ask the VMM."""
        notes: list[str] = []

        async def ask(control: Control) -> None:
            notes.extend(await control.resize(vcpus=vcpus, memory_bytes=memory_bytes))

        await self._steer(record, ask)
        return tuple(notes)

    # -- looking -------------------------------------------------------------------------------------------------------------

    def usage(self, record: Container) -> CgroupUsage:
        """Return what its control group counts: the machine as the host sees it."""
        return self._world.kernel.cgroup_usage(self._setup.cgroup(record.id))

    def figures(self, record: Container) -> CgroupFigures:
        """Return what its control group counts. Its tap stands the other way round, and is left out: what it receives the machine sent."""
        return self._world.kernel.cgroup_figures(self._setup.cgroup(record.id), None)

    async def state(self, record: Container) -> tuple[str, int]:
        """Ask the shim."""
        status = await self._client(record).status()
        runs = status.main != "none" or (status.agent is not None and not record.command) or not record.image_id
        if runs:
            self._watch(record)
        word = "paused" if status.paused else "running"
        return (word if runs else "created"), status.vmm_pid

    async def machine_state(self, record: Container) -> MachineState:
        """Ask shim and monitor, side by side."""
        shim, machine = await asyncio.gather(self._shim_status(record), self._machine_status(record))
        agent = shim.agent if shim is not None else None
        return MachineState(
            machine=machine,
            agent=agent.agent if agent is not None else None,
            guest_kernel=agent.kernel if agent is not None else None,
            silent_s=shim.silent_s if shim is not None else None,
            why=self._reasons.get(record.id, "") if shim is not None else "its shim does not answer",
        )

    async def metrics(self, record: Container) -> Mapping[str, Any]:
        """Return what the guest measures of itself. Raises RuntimeFailed."""
        return await self._client(record).request("metrics", deadline_s=STATE_TIMEOUT_S)

    async def console(self, record: Container, *, tail_bytes: int) -> Attached:
        """Connect to the console."""
        return await self._client(record).console(tail_bytes)

    async def console_tail(self, record: Container, *, n_bytes: int) -> bytes:
        """Read the end of the console's log, and of the one before it while that is short."""
        path = f"{self._layout.container(record.id)}/console.log"
        data = b""
        for each in (path, f"{path}.1"):
            if len(data) < n_bytes:
                data = await self._logged(each) + data
        return data[-n_bytes:] if n_bytes else b""

    async def _logged(self, path: str) -> bytes:
        try:
            return await self._world.disk.read(path, n_bytes_max=2 * self._setup.console_bytes_max)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise from_os_error(error, "read", path) from error

    # -- files ---------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def files(self, record: Container, image: Image | None) -> AsyncIterator["GuestFiles"]:
        """Ask its guest, which must run."""
        if record.status != "running":
            verb = "resume" if record.status == "paused" else "start"
            hint = f"only its own kernel reads its disk; first: isopod vm {verb} {record.name}"
            raise WrongState("virtual machine", record.name, record.status, "reach into it", hint=hint)
        if not record.image_id:
            raise Unsupported("copying files of a machine from a configuration", "there is no agent of isopod's in it")
        yield GuestFiles(self._client(record))

    # -- snapshots -----------------------------------------------------------------------------------------------------------

    async def write_snapshot(self, record: Container, snapshot: str) -> VmSnapshot:
        """Stop the processors, save, let them go on."""
        prepared = await self._starter.prepared(record.id)
        if not record.image_id:
            raise Unsupported("a snapshot of a machine from a configuration", "its disks are not isopod's")
        spec, shape = prepared.spec, await self._starter.shape(record, self._images.resolve(record.image_id))
        # What runs counts, not what the next start would be like.
        shape = msgspec.structs.replace(shape, vcpus=spec.vcpus, memory_bytes=spec.memory_bytes)
        was_paused = record.status == "paused"
        if not was_paused:
            await self.pause(record)
        try:
            return await self._starter.snapshots(record.id, record.name).write(
                snapshot,
                shape,
                upper=spec.disks[-1].path,
                save=lambda folder: self._steer(record, lambda control: control.snapshot(folder)),
            )
        finally:
            if not was_paused:
                await asyncio.shield(asyncio.ensure_future(self.resume(record)))

    async def snapshots(self, identifier: str) -> Sequence[VmSnapshot]:
        """List them."""
        return await self._starter.snapshots(identifier, identifier[:12]).list()

    async def remove_snapshot(self, record: Container, snapshot: str) -> None:
        """Remove one."""
        await self._starter.snapshots(record.id, record.name).remove(snapshot)

    async def check_snapshot(self, record: Container, snapshot: str) -> None:
        """Compare it with what would be started."""
        image = self._images.resolve(record.image_id) if record.image_id else None
        await self._starter.snapshots(record.id, record.name).check(snapshot, await self._starter.shape(record, image))

    async def rebuild(self, record: Container) -> tuple[str, str]:
        """Have its driver build what it runs."""
        driver = self._starter.driver_of(record)
        if not isinstance(driver, Builder):
            raise Unsupported(
                f"updating a machine of driver {driver.name}", "nothing of it is built", "an image: create another one; a unit: systemctl"
            )
        built = await driver.update(self._starter.config_spec(record))
        return built.current, built.booted

    # -- inside --------------------------------------------------------------------------------------------------------------

    def _client(self, record: Container) -> ShimClient:
        return self._shims.client(record.id, record.name)

    async def _steer(self, record: Container, work: Work) -> None:
        """Do something with a machine's control socket."""
        prepared = await self._starter.prepared(record.id)
        control = await self._drivers[prepared.driver].connect(prepared.spec)
        try:
            await work(control)
        finally:
            control.close()

    async def _ask_to_end(self, record: Container, timeout_s: float) -> None:
        """Ask a machine without a main command to end; it may take its time."""
        try:
            await self._client(record).request("stop", timeout_s=timeout_s, deadline_s=SIGNAL_TIMEOUT_S)
        except RuntimeFailed:  # it is busy ending, and answers when it has
            return

    async def _kill(self, record: Container) -> None:
        """See to it that a machine ends: in order if its guest plays along, else at once."""
        if record.pid is None or record.pid_started_ticks is None:
            return
        vmm = ProcessIdentity(record.pid, record.pid_started_ticks)
        try:
            async with asyncio.timeout(KILL_GRACE_S):
                await self._world.processes.wait_gone(vmm)
        except TimeoutError:
            self._logger.warning("vm.killed", id=record.id, name=record.name)
            self._world.processes.signal(vmm, _SIGKILL)

    async def _is_anothers(self, identifier: str, name: str, supervisor: ProcessIdentity | None) -> bool:
        """Whether another daemon's machine has the disk. A shim of ours that nobody knows is ended: its program may have been replaced."""
        holder = await self._starter.holder(identifier, name)
        if holder is None or holder in (supervisor, self._world.processes.identify(self._world.processes.own_pid())):
            return False
        bundle = self._setup.bundle(identifier)
        if await self._world.disk.stat(f"{bundle}/{SPEC_FILE}") is not None:
            await self._shims.end(holder)
            return False
        self._logger.warning("vm.not_cleared", id=identifier, name=name, why=f"process {holder.pid} runs it")
        await self._world.disk.remove_tree(bundle)
        return True

    async def _wait_shim(self, supervisor: ProcessIdentity) -> None:
        try:
            async with asyncio.timeout(SHIM_GRACE_S):
                await self._world.processes.wait_gone(supervisor)
        except TimeoutError:
            await self._shims.end(supervisor)

    async def _clear_driver(self, identifier: str) -> None:
        """Let the driver of a machine remove what it made outside of the bundle, if it makes anything."""
        try:
            prepared = await self._starter.prepared(identifier)
        except RuntimeFailed:  # it was never prepared
            return
        clear = getattr(self._drivers[prepared.driver], "clear", None)
        if clear is not None:
            await clear(prepared.spec)

    async def _exit_code(self, identifier: str) -> int | None:
        try:
            text = (await self._world.disk.read(self._setup.exit_file(identifier), n_bytes_max=64)).strip()
        except OSError:
            return None
        return int(text) & 0xFF if text.isdigit() else None

    async def _shim_status(self, record: Container) -> ShimStatus | None:
        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                return await self._client(record).status()
        except (IsopodError, TimeoutError):
            return None

    async def _machine_status(self, record: Container) -> MachineStatus:
        found: list[MachineStatus] = []

        async def ask(control: Control) -> None:
            found.append(await control.status())

        try:
            async with asyncio.timeout(STATE_TIMEOUT_S):
                await self._steer(record, ask)
        except (IsopodError, TimeoutError):
            return "unknown"
        return found[0]

    def _has_image(self, image_id: str) -> bool:
        try:
            self._images.resolve(image_id)
        except NotFound:
            return False
        return True

    def _watch(self, record: Container) -> None:
        """Log what happens in a machine, until it ends."""
        if record.id not in self._watches:
            task = asyncio.get_running_loop().create_task(self._follow(record), name=f"watch vm {record.id}")
            self._watches[record.id] = task

    def _unwatch(self, identifier: str) -> None:
        self._reasons.pop(identifier, None)
        task = self._watches.pop(identifier, None)
        if task is not None:
            task.cancel()

    async def _follow(self, record: Container) -> None:
        try:
            async for event in self._client(record).watch():
                self._notice(record, event)
        except IsopodError as error:
            self._logger.debug("vm.watch_ended", id=record.id, name=record.name, why=str(error))

    def _notice(self, record: Container, event: Mapping[str, Any]) -> None:
        kind = str(event.get("event", ""))[:32]
        facts = " ".join(f"{key}={value}" for key, value in sorted(event.items()) if key != "event")[:300]
        if kind in ("agent", "answers"):
            self._reasons.pop(record.id, None)
        else:
            self._reasons[record.id] = f"{kind}: {facts}" if facts else kind
            self._logger.warning("vm.event", id=record.id, name=record.name, what=kind, facts=facts)


class GuestFiles:
    """See `engine.isolation.Files`.

    Args:
        client: Of the machine's shim.
    """

    unpacks: Final = False

    def __init__(self, client: ShimClient) -> None:
        self._client = client

    async def look(self, path: str, *, follow: bool) -> PathFacts:
        """Ask what is at a path."""
        return await self._client.look(path, follow=follow)

    async def read(self, path: str) -> AsyncGenerator[bytes, None]:
        """Yield a tar of what is at a path."""
        transfer = await self._client.archive(path)
        try:
            async for piece in transfer.pieces():
                yield piece
        finally:
            transfer.close()

    async def write(self, path: str, pieces: AsyncIterator[bytes]) -> None:
        """Unpack a tar in a folder."""
        transfer = await self._client.extract(path)
        try:
            async for piece in pieces:
                if not await transfer.write(piece):
                    break
            await transfer.finish()
        finally:
            transfer.close()


def _process(record: Container, size: tuple[int, int]) -> Process:
    return Process(
        command=record.command,
        env=record.env,
        cwd=record.working_dir,
        user=record.user,
        terminal=record.terminal,
        stdin=record.stdin_open,
        size=size,
    )
